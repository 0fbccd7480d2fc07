"""Prove what other tools made, or compare two of them:  python -m serve.foreign REFERENCE ARTEFACT ...

Each is an adapter, a folder of safetensors, a Hub id, a GGUF, `ollama:name`, or the URL of a server of OpenAI's API
(its key in OPENAI_API_KEY). REFERENCE is what was trained, and an ARTEFACT what was made of it; --pair compares any
two. The table names the first stage that differs. FOLDER gets proof.json, proof.html, badge.svg and card.md. Exits 1
if anything is another model.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline import UserError
from pipeline.command import boundary
from pipeline.files import read_object, remove, write_whole
from pipeline.gguf_head import read_head
from pipeline.progress import progress
from pipeline.proof import SAYS, Comparison, badge, in_figures, in_words, read_comparisons, suspects
from pipeline.recipe import Prove
from pipeline.reference import Reference, of_trained, read_own_answers, read_probes, read_reference
from serve.asking.endpoint import ERRORS
from serve.asking.judgement import Own, prove_answers
from serve.asking.reached import BYTES, LEAST_AGREEMENT, OLLAMA, Reached, compare_servers, engine_of, is_server, reach
from serve.engines.ollama import proof as ollama
from serve.engines.ollama.server import OllamaServer

ROOT = Path(__file__).parent.parent
NEARER = 3  # the adapter was ignored if the base is so many times nearer than what was trained
MADE = ("proof.json", "proof.html", "badge.svg", "card.md")
EXAMPLE = "make prove REFERENCE=saves/lora ARTEFACT='merged model.gguf', or make prove A=one.gguf B=other.gguf"
# Stage -> what usually causes it, and what fixes it.
CAUSES = {
    "file": "it is damaged or no model: make or fetch it again",
    "template": "the exporter or server guessed a template: give it the tokenizer's own chat_template, byte for byte",
    "prompt": "another template, a system prompt or a date added on the way, or thinking switched on or off: see what "
    "the server makes of a message",
    "BOS": "the template writes the first token and the tokenizer adds it again, or neither does: set add_bos_token so "
    "that it stands there once",
    "token ids": "the tokenizer of another model, tokens that training added, or the wrong pre-tokenizer: export the "
    "tokenizer that lies beside what was trained",
    "stop token": "eos is the base's, not the one that ends a turn: set eos_token_id in generation_config.json or "
    "in the GGUF",
    "adapter ignored": "it answers as the base does: the adapter was not merged, or not loaded: merge it, or name it "
    "when the server starts",
    "weights": "other weights: of another training or another base, rounded, or lost when they were saved or converted",
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
    """Compare all artefacts with the reference; what is found is in the folder, too.

    Raises:
        UserError: there is nothing to compare, something of it is not there, or the reference cannot be used.
    """
    reference, artefacts = arguments.reference, list(filter(None, arguments.artefacts))
    if not reference or not artefacts:
        lacking = "nothing to compare" if not reference else f"nothing to compare {reference} with"
        raise UserError(f"{lacking}: name both, as in {EXAMPLE}")
    if arguments.pair and is_server(reference) and not is_server(artefacts[0]):
        reference, artefacts = artefacts[0], [reference]  # a file shows all of itself
    if is_server(reference) and not all(map(is_server, artefacts)):
        raise UserError(
            f"{reference} shows too little to be the reference of files: compare it with one, as A=... B=..."
        )
    servers = reached([reference, *artefacts])
    folder = folder_of(arguments, reference, artefacts)
    files = [name for name in artefacts if not is_server(name)]
    named = "" if is_server(reference) else reference
    run("train.foreign", str(folder), arguments.base, arguments.prompts, named, *files)
    if named:
        run("convert.foreign", str(folder), *files)
        rows = {row.name: row for row in read_comparisons(folder / "compare.jsonl")}
        known = read_reference(folder / "reference")
        rows |= {name: served(name, servers[name], folder, known) for name in artefacts if is_server(name)}
    else:
        rows = {name: beside(name, servers[reference], servers[name], folder) for name in artefacts}
    told = read_object(folder / "reference.json")
    found = [verdict(rows[name], told, reference if arguments.pair else "") for name in artefacts]
    write(folder, reference, found, arguments.pair)
    return found


def folder_of(arguments: argparse.Namespace, reference: str, artefacts: list[str]) -> Path:
    """The folder of this proof, without what an earlier one found."""
    name = "-".join([reference, *artefacts] if arguments.pair else [reference])
    folder = Path(arguments.to or "proof-" + re.sub(r"[^\w.-]+", "-", name).strip("-.")[:200])
    for made in (*MADE, "base-greedy.jsonl"):
        remove(folder / made)
    return folder


def reached(names: list[str]) -> dict[str, Reached]:
    """The servers among them.

    Raises:
        UserError: some do not answer, or refuse the key; all are told.
    """
    found: dict[str, Reached] = {}
    problems: list[str] = []
    for name in filter(is_server, names):
        try:
            found[name] = reach(name)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def run(module: str, *arguments: str) -> None:
    """Another stage's part, in a process of its own; it has told what is wrong when this ends.

    Raises:
        UserError: a library ended it.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=os.environ | {"PYTHONPATH": path}, check=False
    )
    if done.returncode < 0:
        raise UserError(
            f"what reads the models was ended by signal {-done.returncode}: a file is damaged, or memory is short"
        )
    if done.returncode:
        sys.exit(done.returncode)


@dataclass(frozen=True)
class Vocabulary:
    """The reference's; a server that is not ours may add its `bos` or not, which the number of tokens shows."""

    tokenizer: Any
    bos: str
    adds_bos: bool = True

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens))


def served(name: str, server: Reached, folder: Path, reference: Reference) -> Comparison:
    """What a server answers, held to what was trained: its file may be quantized, its settings must change nothing."""
    from tokenizers import Tokenizer

    comparison = Comparison(name, {"not_compared": server.unseen})
    has_base = (folder / "base-greedy.jsonl").is_file()
    others = read_own_answers(folder / "base-greedy.jsonl") if has_base else {}
    held = Own(of_trained(reference), others, Prove.quantized_max_kl, LEAST_AGREEMENT)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    try:
        if server.kind == "ollama":
            words = Vocabulary(tokenizer, read_object(folder / "reference.json")["bos"] or "")
            by_ollama(comparison, server, words, reference, held)
            return comparison
        probes = [probe for probe in reference.probes if not (server.kind == "openai" and probe.tools)]
        asked = Reference(probes, reference.logits, [])
        prove_answers(comparison, engine_of(server, tokenizer), asked, held, server.context, slots=1)
    except (*ERRORS, LookupError, TypeError) as error:
        comparison.problems.append(f"server: it does not answer as OpenAI's API says ({error!r})")
    except UserError as error:
        comparison.problems += [f"server: {problem}" for problem in error.problems]
    return comparison


def by_ollama(comparison: Comparison, server: Reached, words: Vocabulary, reference: Reference, held: Own) -> None:
    """What Ollama makes of the prompts, and its answers."""
    probes = reference.probes
    with OllamaServer(server.root) as asked, progress("prove: Ollama", len(probes)) as tell:
        ollama.prove_prompts(comparison, asked, server.model, words, probes)
        if not comparison.problems:
            ollama.prove_answers(comparison, asked, server.model, words, probes, held, server.context, tell)


def beside(name: str, first: Reached, second: Reached, folder: Path) -> Comparison:
    """What a server answers, held to what another one answers."""
    comparison = Comparison(name)
    try:
        compare_servers(comparison, first, second, read_probes(folder / "reference"))
    except (*ERRORS, LookupError, TypeError) as error:
        comparison.problems.append(f"server: it does not answer as OpenAI's API says ({error!r})")
    return comparison


def verdict(row: Comparison, told: dict[str, Any], other: str) -> Verdict:
    """The verdict in words, which speak of the `other` one of a pair, or of what was trained."""
    problem = row.problems[0] if row.problems else ""
    stage = stage_of(row, problem, bool(told.get("base"))) if problem else ""
    place = Path(told["artefacts"].get(row.name, {}).get("model") or "")
    why = suspects(config_of(told), read_head(place) if stage == "conversion" else None)
    cause = CAUSES[stage].format(hint=f"{why}; " if why else "") if stage else ""
    if other:
        problem = re.sub(r", trained( with)? ", ", the trained model has ", problem).replace("the trained model", other)
    unseen = row.measures.get("not_compared")
    words = [in_words(row), in_figures(row), f"not compared: {', '.join(unseen)}" if unseen else ""]
    return Verdict(row.name, stage, problem, cause, "; ".join(filter(None, words)), row.measures)


def stage_of(row: Comparison, problem: str, has_base: bool) -> str:
    """The first stage that differs."""
    kind, measures = row.measures.get("type", ""), row.measures
    if problem.startswith("chat template"):
        return "template"
    if problem.startswith("token ids"):
        return "BOS" if ", position 0: " in problem else stage_of_number(row, problem)
    if problem.startswith(("vocabulary", "stop token")):
        return "token ids" if problem.startswith("vocabulary") else "stop token"
    if problem.startswith("server settings"):
        return "server settings"
    if problem.startswith("another file: base "):
        return "adapter ignored"
    if problem.startswith("logits: "):
        if NEARER * measures.get("divergence_from_base", float("inf")) < measures.get("divergence_mean", 0):
            return "adapter ignored"
        if kind:
            return "conversion" if kind in ("F32", "F16", "BF16") else "quantization"
        return "merge" if has_base else "weights"
    return "server" if is_server(row.name) else "file"


def stage_of_number(row: Comparison, problem: str) -> str:
    """Of a server that does not show its tokens, by their number; Ollama shows the prompt's bytes before."""
    numbers = re.search(r" has (\d+) when chatting, trained with (\d+)", problem)
    if not numbers:
        return "token ids"
    if not row.name.startswith(OLLAMA) or BYTES in row.measures.get("not_compared", ()):
        return "prompt"
    return "BOS" if abs(int(numbers[1]) - int(numbers[2])) == 1 else "token ids"


def config_of(told: dict[str, Any]) -> dict[str, Any]:
    """The model's config.json, of the base where an adapter was trained; a GGUF and a server have none."""
    file = Path(told.get("base") or told.get("model") or "", "config.json")
    return read_object(file) if file.is_file() else {}


def write(folder: Path, reference: str, found: list[Verdict], pair: bool) -> None:
    """proof.json, proof.html, and badge.svg with card.md, what a model card says of it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    passed = not any(each.stage for each in found)
    proof: dict[str, Any] = {"reference": reference, "pair": pair, "passed": passed}
    proof["artefacts"] = [asdict(each) for each in found]
    write_whole(folder / "proof.json", json.dumps(proof, indent=2, ensure_ascii=False) + "\n")
    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    write_whole(folder / "proof.html", jinja.get_template("proof.html.jinja").render(**proof))
    write_whole(folder / "badge.svg", badge("yes" if passed else "no"))
    write_whole(folder / "card.md", card(reference, found, passed))


def card(reference: str, found: list[Verdict], passed: bool) -> str:
    """Lines for a model card, with the badge beside it."""
    lines = [f"![proof: {SAYS['yes' if passed else 'no']}](badge.svg)", ""]
    lines += [f"Compared with `{reference}` by Truetune's proof:", ""]
    for each in found:
        differs = f"differs ({each.stage}: {each.problem})" if each.stage else "is the same model"
        lines.append(f"- `{each.name}` {differs}" + (f". {each.words}" if each.words else ""))
    return "\n".join(lines) + "\n"


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
    for words in (words for each in found for words in each.words.split("; ") if words):
        console.print(f"note: {words}", markup=False, highlight=False)


class Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: {' '.join(self.format_usage().split())}")


def parsed() -> argparse.Namespace:
    parser = Arguments(
        "python -m serve.foreign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", nargs="?", default="")
    parser.add_argument("artefacts", nargs="*")
    parser.add_argument("--pair", action="store_true", help="any two, each of which may be what was made")
    parser.add_argument("--base", default="", help="the adapter's base, if not where its config says")
    parser.add_argument("--prompts", default="", help="prompts of your own: a text a line, or JSON with messages")
    parser.add_argument("--to", default="", help="the folder of the proof; else proof-REFERENCE here")
    return parser.parse_args()


if __name__ == "__main__":
    with boundary():
        verdicts = foreign(parsed())
        show(verdicts)
        if lost := [each for each in verdicts if each.stage]:
            raise UserError(*(f"{each.name}: {each.problem}: {each.stage}: {each.cause}" for each in lost))
