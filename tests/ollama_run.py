"""A run of a tiny true model, with the reference that it answers by, to be registered with an Ollama."""

import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import llama_cpp
from gguf_fixture import write_gguf
from ollama_double import greedy

from pipeline import Recipe, Run, load
from pipeline.files import files_below, fingerprint
from pipeline.reference import CONTINUATION_TOKENS, FORMAT, OwnAnswer, Probe, most_likely
from pipeline.run import Receipt
from serve.engines.ollama.template import renderer

NAME = f"truetune-test-{os.getpid()}"
CONTEXT = 512
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou say words.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As near to Ollama's own, but it strips: more than a Go template can say.
STRIPPING = CHATML.replace("message['content'] +", "message['content'] | trim +")
ASKED: dict[str, list[dict[str, str]]] = {
    "plain": [{"role": "user", "content": "Who are you?"}],
    "system": [{"role": "system", "content": "One word."}, {"role": "user", "content": "apple bread"}],
    "empty-system": [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}],
    "turns": [
        {"role": "user", "content": "cloud"},
        {"role": "assistant", "content": "delta"},
        {"role": "user", "content": "eagle"},
    ],
    "spaces": [{"role": "user", "content": "  two before, three after   "}],
    "unicode": [{"role": "user", "content": "Größe 🙂 你好\n\ttab"}],
    "braces": [{"role": "user", "content": "{{ .Role }} }} { <|im_end|>"}],
    "long": [{"role": "user", "content": "word " * 200}],
}


class Registering:
    """A run in the current folder, and what a test asks of its server without the code under test."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self.url = url

    def write(self, template: str = CHATML, **serve: Any) -> None:
        """The run as training leaves it."""
        serve = {"context": CONTEXT, "slots": 1} | serve
        Path(f"{NAME}.yaml").write_text(json.dumps({"data": {"train": "none.jsonl"}, "serve": serve}))
        path = self.run.path("gguf", f"{NAME}-Q8_0.gguf")
        path.parent.mkdir(parents=True, exist_ok=True)
        probes = self.run.path("reference", "probes.jsonl")
        probes.parent.mkdir(exist_ok=True)
        content, rows, own = trained(template)
        path.write_bytes(content)
        probes.write_text(rows)
        for name in ("reference", "gguf"):
            self.sign(name)
        comparison = {"name": "Q8_0", "measures": {}, "problems": []}
        self.run.path("compare.jsonl").write_text(json.dumps(comparison) + "\n")
        self.run.path("compare-greedy.jsonl").write_text(own)
        found = {"recommended": "Q8_0"}
        self.run.write_receipt(Receipt("compare", {}, {}, {}, {}, found, "2026-01-01T00:00:00+00:00", 0.0, 0))

    def sign(self, name: str) -> None:
        """The receipt of a stage's folder as it stands."""
        outputs = {str(file): fingerprint(file) for file in files_below(self.run.path(name))}
        self.run.write_receipt(Receipt(name, {}, {}, outputs, {}, {}, "2026-01-01T00:00:00+00:00", 0.0, 0))

    @property
    def recipe(self) -> Recipe:
        return load(f"{NAME}.yaml", [])

    @property
    def run(self) -> Run:
        return Run(NAME)

    @property
    def probes(self) -> list[Probe]:
        rows = self.run.path("reference", "probes.jsonl").read_text().split("\n")
        return [Probe(**{k: v for k, v in json.loads(row).items() if k != "format"}) for row in rows if row]

    def tags(self) -> dict[str, str]:
        """Tag → digest of this run's model."""
        listed = self.http.get("/api/tags").json()["models"]
        return {row["name"].partition(":")[2]: row["digest"] for row in listed if row["name"].startswith(f"{NAME}:")}

    def rendered(self, messages: list[dict[str, str]], tag: str = "latest") -> str:
        body = {"model": f"{NAME}:{tag}", "messages": messages, "stream": False, "_debug_render_only": True}
        return str(self.http.post("/api/chat", json=body).json()["_debug_info"]["rendered_template"])

    def clean(self) -> None:
        for tag in self.tags():
            self.http.request("DELETE", "/api/delete", json={"model": f"{NAME}:{tag}"})
        self.http.close()


@cache
def trained(template: str) -> tuple[bytes, str, str]:
    """A model with this template, the lines of the probes, and those of what it answers, read directly."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_gguf(path, template, ends=True)
        pairs = answered(path, template)
        rows = [json.dumps({"format": FORMAT} | asdict(probe)) for probe, _ in pairs]
        own = [json.dumps(asdict(answer)) for _, answer in pairs]
        return path.read_bytes(), "\n".join(rows) + "\n", "\n".join(own) + "\n"


def answered(path: Path, template: str) -> list[tuple[Probe, OwnAnswer]]:
    """The probes with the greedy answers of a file."""
    model = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_threads=1, verbose=False, logits_all=True)
    render, pairs = renderer(template, "<s>", "</s>"), []
    for name, messages in ASKED.items():
        prompt = render(messages, True)
        ids = model.tokenize(prompt.encode(), add_bos=not prompt.startswith("<s>"), special=True)
        fits = len(ids) + CONTINUATION_TOKENS <= CONTEXT
        answer, reason = greedy(model, ids, CONTINUATION_TOKENS) if fits else ([], "length")
        stopped = reason == "stop"
        probe = Probe(name, messages, [], prompt, ids, [*answer, 2] if stopped else answer, stopped, 1)
        top = most_likely(model.scores[len(ids) - 1 :][: len(probe.continuation)])
        pairs.append((probe, OwnAnswer("Q8_0", name, probe.continuation, stopped, top)))
    return pairs
