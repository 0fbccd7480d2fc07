"""Prove what other tools made:  python -m serve.foreign REFERENCE ARTEFACT ...

REFERENCE is what was trained: a PEFT adapter, a folder of safetensors, a Hub id. An ARTEFACT is what was made of it: a
folder, a GGUF, `ollama:name`, or the URL of a server of OpenAI's API (its key in OPENAI_API_KEY). The table names the
first stage that differs. FOLDER gets proof.json, proof.html and badge.svg. Exits 1 if anything is another model.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import UserError
from pipeline.command import boundary
from pipeline.files import write_whole
from pipeline.proof import Comparison, in_words, read_comparisons, suspects
from pipeline.recipe import Prove
from pipeline.reference import Reference, of_trained, read_own_answers, read_reference
from serve.asking.endpoint import ERRORS, ask
from serve.asking.judgement import Own, prove_answers
from serve.asking.probe import PROBABILITIES, Engine, LlamaCpp, OpenAi, Vllm
from serve.engines.ollama.server import server_url

ROOT = Path(__file__).parent.parent
CONTEXT = 4096  # of a server that tells none
LEAST_AGREEMENT = 0.6  # of answers without probabilities, by a file that is not at hand and may be quantized
NEARER = 3  # the adapter was ignored if the base is so many times nearer than what was trained
# Stage -> what usually causes it, and what fixes it.
CAUSES = {
    "file": "it is damaged or no model: make or fetch it again",
    "template": "the exporter or server guessed a template: give it the tokenizer's own chat_template, byte for byte",
    "BOS": "the template writes the first token and the tokenizer adds it again, or neither does: set add_bos_token so "
    "that it stands there once",
    "token ids": "the tokenizer of another model, tokens that training added, or the wrong pre-tokenizer: export the "
    "tokenizer that lies beside what was trained",
    "stop token": "eos is the base's, not the one that ends a turn: set eos_token_id in generation_config.json or "
    "in the GGUF",
    "adapter ignored": "it answers as the base does: the adapter was not merged, or not loaded: merge it, or name it "
    "when the server starts",
    "merge": "merged in too few bits, into another base, twice or with another scale: merge into the base's 16 bits",
    "conversion": "the converter does not know something of this architecture: {hint}convert with a newer llama.cpp",
    "quantization": "too few bits for this model: take a type with more, or an importance matrix",
    "server settings": "a preset or default of the server: set it to neutral, or send it with each request",
    "server": "it serves another file, or computes otherwise: see what it loaded",
}


@dataclass(frozen=True)
class Verdict:
    """One artefact's verdict: the first stage that differs, or none, and what usually causes that."""

    name: str
    stage: str
    problem: str
    cause: str
    words: str
    measures: dict[str, Any]


def foreign(arguments: argparse.Namespace) -> list[Verdict]:
    """Compare all artefacts with the reference; what is found is in the folder, too."""
    folder = Path(arguments.to or "proof-" + re.sub(r"[^\w.-]+", "-", arguments.reference).strip("-."))
    folder.mkdir(parents=True, exist_ok=True)
    run("train.foreign", arguments.reference, str(folder), arguments.base, arguments.prompts)
    files = [name for name in arguments.artefacts if not is_server(name)]
    run("convert.foreign", str(folder), *files)
    rows = {row.name: row for row in read_comparisons(folder / "compare.jsonl")}
    reference = read_reference(folder / "reference")
    for name in filter(is_server, arguments.artefacts):
        rows[name] = served(name, folder, reference)
    config = config_of(folder)
    found = [verdict(rows[name], config) for name in arguments.artefacts]
    write(folder, arguments.reference, found)
    return found


def run(module: str, *arguments: str) -> None:
    """Another stage's part, in a process of its own; it has told what is wrong when this ends."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=os.environ | {"PYTHONPATH": path}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)


def is_server(name: str) -> bool:
    return name.startswith(("http://", "https://", "ollama:"))


def served(name: str, folder: Path, reference: Reference) -> Comparison:
    """What a server answers, held to what was trained: its file may be quantized, its settings must change nothing."""
    comparison = Comparison(name)
    has_base = (folder / "base-greedy.jsonl").is_file()
    others = read_own_answers(folder / "base-greedy.jsonl") if has_base else {}
    try:
        engine, context = engine_of(name, folder)
        probes = [probe for probe in reference.probes if not (isinstance(engine, OpenAi) and probe.tools)]
        asked = Reference(probes, reference.logits, [])
        held = Own(of_trained(reference), others, Prove.quantized_max_kl, LEAST_AGREEMENT)
        prove_answers(comparison, engine, asked, held, context, slots=1)
    except (*ERRORS, LookupError, TypeError) as error:
        comparison.problems.append(f"server: it does not answer as OpenAI's API says ({error!r})")
    except UserError as error:
        comparison.problems += [f"server: {problem}" for problem in error.problems]
    return comparison


def engine_of(name: str, folder: Path) -> tuple[Engine, int]:
    """The server, by what it tells of itself, and the tokens of its context.

    Raises:
        UserError: it refuses the key, or lists no model.
    """
    from tokenizers import Tokenizer

    root = server_url() if name.startswith("ollama:") else name.rstrip("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY", "")
    status, listed = ask(root, "/v1/models", key)
    if status != 200 or not listed.get("data"):
        raise UserError(
            f"{root}/v1/models says {status}: set OPENAI_API_KEY, or give the address of an API of OpenAI's"
        )
    model = listed["data"][0]
    if name.startswith("ollama:"):
        wanted = name.removeprefix("ollama:")
        wanted = wanted if ":" in wanted else f"{wanted}:latest"
        model = next((each for each in listed["data"] if each["id"] == wanted), None)
        if model is None:
            raise UserError(f"{root} has no model {wanted}: see 'ollama list'")
    context = int((model.get("meta") or {}).get("n_ctx") or model.get("max_model_len") or CONTEXT)
    for kind, path in ((LlamaCpp, "/props"), (Vllm, "/version")):
        try:
            if not name.startswith("ollama:") and ask(root, path, key)[0] == 200:
                made: Engine = kind(root, key, model["id"])
                return made, context
        except ValueError:  # a page, not JSON
            continue
    body = {"model": model["id"], "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **PROBABILITIES}
    status, made_of = ask(root, "/v1/chat/completions", key, body, timeout=600)
    tells = status == 200 and bool((made_of["choices"][0].get("logprobs") or {}).get("content"))
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    return OpenAi(root, key, model["id"], vocabulary, tells), context


def verdict(row: Comparison, config: dict[str, Any]) -> Verdict:
    """The verdict in words."""
    problem = row.problems[0] if row.problems else ""
    stage = stage_of(row, problem) if problem else ""
    hint = f"{suspects(config)}; " if suspects(config) else ""
    cause = CAUSES[stage].format(hint=hint) if stage else ""
    return Verdict(row.name, stage, problem, cause, in_words(row), row.measures)


def stage_of(row: Comparison, problem: str) -> str:
    """The first stage that differs."""
    kind, measures = row.measures.get("type", ""), row.measures
    if problem.startswith("chat template"):
        return "template"
    if problem.startswith("token ids"):
        return "BOS" if ", position 0: " in problem else "token ids"
    if problem.startswith(("vocabulary", "stop token")):
        return "token ids" if problem.startswith("vocabulary") else "stop token"
    if problem.startswith("server settings"):
        return "server settings"
    if problem.startswith("another file: base "):
        return "adapter ignored"
    if problem.startswith("logits: "):
        if NEARER * measures.get("divergence_from_base", float("inf")) < measures.get("divergence_mean", 0):
            return "adapter ignored"
        return "merge" if not kind else "conversion" if kind in ("F32", "F16", "BF16") else "quantization"
    return "server" if is_server(row.name) else "file"


def config_of(folder: Path) -> dict[str, Any]:
    """The model's config.json, of the base where an adapter was trained."""
    stated = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = json.loads(Path(stated["base"] or stated["reference"], "config.json").read_text("utf-8"))
    return found


def write(folder: Path, reference: str, found: list[Verdict]) -> None:
    """proof.json, proof.html and badge.svg."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    passed = not any(each.stage for each in found)
    proof = {"reference": reference, "passed": passed, "artefacts": [asdict(each) for each in found]}
    write_whole(folder / "proof.json", json.dumps(proof, indent=2, ensure_ascii=False) + "\n")
    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    write_whole(folder / "proof.html", jinja.get_template("proof.html.jinja").render(**proof))
    says, colour = ("same model", "#2e7d32") if passed else ("another model", "#c62828")
    write_whole(folder / "badge.svg", BADGE.format(says=says, colour=colour))


BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="160" height="20" role="img" aria-label="proof: {says}">
<rect width="50" height="20" fill="#555"/><rect x="50" width="110" height="20" fill="{colour}"/>
<g fill="#fff" font-family="Verdana,sans-serif" font-size="11" text-anchor="middle">
<text x="25" y="14">proof</text><text x="105" y="14">{says}</text></g></svg>
"""


def show(found: list[Verdict]) -> None:
    """The table, and below it a sentence of each artefact."""
    from rich.console import Console
    from rich.table import Table

    table = Table("artefact", "verdict", "first stage that differs", "divergence", "top-1", "answers")
    for each in found:
        measures = each.measures
        table.add_row(
            each.name,
            "[red]FAILED[/red]" if each.stage else "[green]same[/green]",
            each.stage or "-",
            *(
                format(measures[key], layout) if key in measures else "-"
                for key, layout in (("divergence_mean", ".2g"), ("top1_agreement", ".0%"), ("greedy_agreement", ".0%"))
            ),
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for words in filter(None, (each.words for each in found)):
        console.print(f"note: {words}", markup=False, highlight=False)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m serve.foreign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference")
    parser.add_argument("artefacts", nargs="+")
    parser.add_argument("--base", default="", help="the adapter's base, if not where its config says")
    parser.add_argument("--prompts", default="", help="prompts of your own: a text a line, or JSON with messages")
    parser.add_argument("--to", default="", help="the folder of the proof; else proof-REFERENCE here")
    return parser.parse_args()


if __name__ == "__main__":
    given = parsed()
    with boundary():
        verdicts = foreign(given)
        show(verdicts)
        if lost := [each for each in verdicts if each.stage]:
            raise UserError(*(f"{each.name}: {each.problem}: {each.stage}: {each.cause}" for each in lost))
