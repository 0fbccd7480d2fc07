"""The registration of a model with Ollama: what it is given, what is made there, and whether it is the trained model.

Any Ollama at `OLLAMA_HOST` will do, over HTTP alone. A tag `name:<hash>` is made and asked the reference's probes;
only when it renders, counts, answers and stops as the trained model does, `name:latest` moves to it.
"""

import hashlib
import json
import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import Made, Recipe, Run, UserError
from pipeline.command import up_to_date_within
from pipeline.files import write_whole
from pipeline.progress import progress
from pipeline.proof import Comparison
from pipeline.reference import read_probes
from pipeline.run import Receipt
from pipeline.stages import stage
from serve.asking.judgement import own_of_file
from serve.engines.llamacpp import refuse_long_context, served_file
from serve.engines.ollama.proof import Vocabulary, prove_answers, prove_prompts, read_vocabulary, refused
from serve.engines.ollama.server import OllamaServer, server_url
from serve.engines.ollama.template import Refused, compile_shape, renderer
from serve.running.backend import Backend, Endpoint, chosen, refuse_disproved, refuse_without_gguf

TAG = r"[0-9a-f]{12}"

log = logging.getLogger("truetune")


@dataclass(frozen=True)
class Modelfile:
    """A model in Ollama's words; `template` is Go, or None where the server is to render the GGUF's own."""

    name: str
    gguf: Path
    sha256: str
    template: str | None
    parameters: dict[str, Any]
    licence: str | None

    @property
    def tag(self) -> str:
        """`name:<short hash>` of everything that makes the model, so that other bytes never have the same tag."""
        made_of = [self.sha256, self.template, self.parameters, self.licence]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        return f"{self.name}:{digest[:12]}"

    @property
    def latest(self) -> str:
        """The tag that moves."""
        return f"{self.name}:latest"

    def request(self) -> dict[str, Any]:
        """Arguments of the official client's `create`."""
        given = {"template": self.template, "license": self.licence}
        return {
            "model": self.tag,
            "files": {self.gguf.name: f"sha256:{self.sha256}"},
            "parameters": self.parameters,
        } | {key: value for key, value in given.items() if value}

    def text(self, folder: Path) -> str:
        """For people: `ollama create NAME -f folder/Modelfile` makes the same model."""
        lines = [
            f"# {self.tag}, as 'make register' makes it. By hand: ollama create {self.name} -f Modelfile",
            f"FROM ./{self.gguf.relative_to(folder)}",
        ]
        if self.template:
            lines.append(f'TEMPLATE """{self.template}"""')
        for key, value in self.parameters.items():
            for item in value if isinstance(value, list) else [value]:
                lines.append(f'PARAMETER {key} "{item}"' if isinstance(item, str) else f"PARAMETER {key} {item}")
        if self.licence:
            lines.append(f'LICENSE """{self.licence}"""')
        return "\n".join(lines) + "\n"


def register(recipe: Recipe, run: Run) -> Made:
    """Upload what is missing, create the tag, prove it, move `latest`.

    Raises:
        UserError: Ollama is absent, too old, busy, full or breaks off; or what it serves is not the trained model,
            whose tag is then removed again.
    """
    refuse_without_gguf(recipe, "Ollama")
    recipe = chosen(recipe, run)
    refuse_disproved(recipe, run)
    read_probes(run.path("reference"))  # one that cannot be read is refused before anything is sent
    modelfile, vocabulary = modelfile_of(recipe, run)
    with OllamaServer(server_url()) as server:
        version = server.version()
        refuse_foreign(server, modelfile)
        statuses = create(server, modelfile)
        digest = server.await_listed(modelfile.tag)
        comparison = prove(server, modelfile.tag, vocabulary, recipe, run)
        if comparison.problems:
            remove(server, modelfile, digest)
            raise refused(modelfile.tag, comparison.problems[0], statuses, version, modelfile.template is not None)
        server.copy(modelfile.tag, modelfile.latest)
    write_whole(run.path("Modelfile"), modelfile.text(run.folder))
    return Made(
        outputs=[run.path("Modelfile")],
        metrics={
            "url": server.url,
            "version": version,
            "tag": modelfile.tag,
            "latest": modelfile.latest,
            "digest": digest,
            "type": recipe.served_type,
            "template": "the model's own, by Ollama" if modelfile.template is None else "compiled to Go's",
            "measures": comparison.measures,
        },
        packages=("ollama",),
    )


def modelfile_of(recipe: Recipe, run: Run) -> tuple[Modelfile, Vocabulary]:
    """What Ollama is given; the GGUF's template goes along in Go where a Go template can say the same."""
    path, known = served_file(recipe, run)
    refuse_long_context(recipe.serve.context, path)
    vocabulary = read_vocabulary(path)
    try:
        render = renderer(vocabulary.template, vocabulary.bos, vocabulary.eos)
    except Refused as error:
        raise UserError(f"the chat template in {path} is no Jinja ({error}): run 'make base' and 'make gguf'") from None
    if vocabulary.adds_bos:
        whole, render = render, lambda messages, prompt: whole(messages, prompt).removeprefix(vocabulary.bos)
    shape = compile_shape(render)
    parameters: dict[str, Any] = {
        "num_ctx": recipe.serve.context,
        "temperature": recipe.serve.temperature,
        "repeat_penalty": 1.0,  # before 0.30 Ollama's default was 1.1, which changes the answers
        "stop": [vocabulary.eos],
    }
    licence = base_licence(run) or vocabulary.licence
    template = shape.go() if shape else None
    return Modelfile(recipe.name, path, str(known["sha256"]), template, parameters, licence), vocabulary


def base_licence(run: Run) -> str | None:
    """The licence of the base, which the trained model is under as well, if the base says it."""
    base = run.find_receipt("base")
    stated = base.metrics.get("license") if base else None
    return ", ".join(stated) if isinstance(stated, list) else stated


def refuse_foreign(server: OllamaServer, modelfile: Modelfile) -> None:
    """Never move a `latest` that someone else made: ours is always one of the versioned tags, too."""
    digests = server.digests()
    ours = {digest for name, digest in digests.items() if re.fullmatch(rf"{re.escape(modelfile.name)}:{TAG}", name)}
    if modelfile.latest in digests and digests[modelfile.latest] not in ours:
        raise UserError(
            f"{server.url} has a model {modelfile.latest} that 'make register' did not make: give your recipe's file "
            f"another name, or remove that model with 'ollama rm {modelfile.name}'"
        )


def create(server: OllamaServer, modelfile: Modelfile) -> list[str]:
    """Make the tag, sending the file only if the server lacks it; the statuses that it reported."""
    digest = f"sha256:{modelfile.sha256}"
    if server.has_blob(digest):
        log.info("register: %s has %s already", server.url, modelfile.gguf.name)
    else:
        size = modelfile.gguf.stat().st_size
        log.info("register: sending %s (%.0f MB) to %s", modelfile.gguf.name, size / 1e6, server.url)
        with progress("sending", size, "MB", 1e-6) as tell:
            server.upload(modelfile.gguf, digest, tell)
    last = ""

    def report(step: str) -> None:
        nonlocal last
        if step != last:
            last = step
            log.debug("register: %s", step)

    log.info("register: creating %s", modelfile.tag)
    return server.create(modelfile.request(), report)


def prove(server: OllamaServer, name: str, vocabulary: Vocabulary, recipe: Recipe, run: Run) -> Comparison:
    """Ask the model there the reference's probes."""
    comparison = Comparison(f"served {recipe.served_type} by Ollama")
    if (own := own_of_file(recipe, run, recipe.served_type)) is None:
        raise UserError(f"{recipe.served_type} itself failed its proof: run 'make prove RECIPE={run.name}'")
    probes = read_probes(run.path("reference"))
    log.info("register: loading %s", name)
    server.load(name)
    prove_prompts(comparison, server, name, vocabulary, probes)
    if other := comparison.measures.get("tools"):
        log.warning("register: with tools, Ollama does not render what training did: %s", other)
    if not comparison.problems:
        log.info("register: asking %d probes", len(probes))
        with progress("asking probes", len(probes), "probes") as tell:
            prove_answers(comparison, server, name, vocabulary, probes, own, recipe.serve.context, tell)
    return comparison


def remove(server: OllamaServer, modelfile: Modelfile, digest: str) -> None:
    """Take away every tag of the model that failed; one that is gone already is no matter."""
    names = [name for name, found in server.digests().items() if found == digest]
    for name in names:
        if name in (modelfile.tag, modelfile.latest):
            with suppress(UserError):
                server.delete(name)


def difference(receipt: Receipt, digests: dict[str, str]) -> str:
    """What the server lists otherwise than the receipt of the registration says, or nothing."""
    known, url = receipt.metrics["digest"], receipt.metrics["url"]
    for name in (receipt.metrics["tag"], receipt.metrics["latest"]):
        found = digests.get(name)
        if found != known:
            return f"{url} " + (f"has another {name} than was registered" if found else f"no longer has {name}")
    return ""


def check(run: Run) -> None:
    """Compare what Ollama shows with the receipt, where the run is registered and its server answers.

    Raises:
        UserError: the server lists another model under the name.
    """
    receipt = run.find_receipt("register")
    if receipt is None:
        return
    with OllamaServer(receipt.metrics["url"]) as server:
        try:
            digests = server.digests()
        except UserError as error:
            log.warning("register: not checked, since %s", error)
            return
    if problem := difference(receipt, digests):
        raise UserError(f"register: {problem}: run 'make register RECIPE={run.given}' again")
    log.info("register: %s shows the digest of the receipt", receipt.metrics["url"])


def ensure(recipe: Recipe, run: Run) -> Receipt:
    """The registration's receipt, made now unless the server still holds what it says; the caller has the lock."""
    receipt, recipe = run.find_receipt("register"), chosen(recipe, run)
    if receipt is not None:
        with OllamaServer(server_url()) as server:
            now = {"url": server.url, "version": server.version(), "tag": modelfile_of(recipe, run)[0].tag}
            if not now.items() <= receipt.metrics.items() or difference(receipt, server.digests()):
                run.receipt_path("register").unlink()
    return up_to_date_within(run, stage("register"), recipe, register)


def backend(recipe: Recipe, run: Run) -> Backend:
    """Ollama behind the chat window: registered and proved; its server is not ours, so there is no process."""
    found = ensure(recipe, run).metrics
    key = os.environ.get("OLLAMA_API_KEY") or "ollama"  # it takes any; a client sends none that is empty
    path, known = served_file(recipe, run)
    endpoint = Endpoint(f"{found['url']}/v1", found["latest"], key)
    return Backend(endpoint, inputs={str(path): known}, packages=("ollama",))


def row(recipe: Recipe, run: Run) -> Comparison | None:
    """Ollama's line of `make prove`: asked anew, since nobody vouches for a server that is not ours; None if unused."""
    receipt = run.find_receipt("register")
    if receipt is None and (os.environ.get("ENGINE") or recipe.serve.engine) != "ollama":
        return None
    recipe = chosen(recipe, run)
    comparison = Comparison(f"served {recipe.served_type} by Ollama")
    if receipt is None:
        comparison.problems.append(f"it is not registered: run 'make register RECIPE={recipe.given}'")
        return comparison
    try:
        modelfile, vocabulary = modelfile_of(recipe, run)
        if modelfile.tag != receipt.metrics["tag"]:
            raise UserError(f"{receipt.metrics['tag']} is another model: run 'make register RECIPE={recipe.given}'")
        with OllamaServer(receipt.metrics["url"]) as server:
            server.version()
            if problem := difference(receipt, server.digests()):
                raise UserError(f"{problem}: run 'make register RECIPE={recipe.given}' again")
            return prove(server, modelfile.latest, vocabulary, recipe, run)
    except UserError as error:
        comparison.problems += error.problems
    return comparison
