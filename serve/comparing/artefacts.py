"""What can answer in the playground: the artefacts of every run folder, what is being served, any other endpoint."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.error import UserError
from pipeline.model import Trained
from pipeline.run import Receipt, Run
from serve.asking.client import models_of
from serve.asking.key import read_key


@dataclass(frozen=True)
class Artefact:
    """One choice of the page.

    `place` is a folder of weights, a GGUF file or the URL of an endpoint; `made_at` tells one training's from the
    next's; `adapter` lies beside the base in one process, which answers as `base` and as `adapter`. A training of whole
    weights leaves `trained`, a model of its own.
    """

    name: str
    about: str
    kind: str  # weights, gguf or endpoint
    place: str
    model: str
    recipe: str = ""
    stage: str = ""
    adapter: str = ""
    made_at: str = ""
    key: str = field(default="", repr=False)

    def label(self, recipe: str) -> str:
        """How a page about `recipe` names it."""
        other = f"{self.recipe}: " if self.recipe not in ("", recipe) else ""
        return f"{other}{self.model if self.kind != 'endpoint' else 'served'} · {self.about}"


def artefacts(recipe: str, root: Path = Path("runs")) -> dict[str, Artefact]:
    """Every choice by its name, those of `recipe` first; a run whose receipts are damaged has none.

    Raises:
        UserError: a receipt of `recipe` itself is damaged.
    """
    found = [*_of_run(Run(recipe, root))]
    for folder in sorted(path for path in root.glob("*") if path.is_dir() and path.name != recipe):
        try:
            found += _of_run(Run(folder.name, root))
        except UserError:
            continue
    known = {(artefact.place, artefact.model) for artefact in found}
    found += (other for other in _of_environment() if (other.place, other.model) not in known)
    return {artefact.name: artefact for artefact in found}


def _of_run(run: Run) -> Iterator[Artefact]:
    receipts = {name: run.find_receipt(name) for name in ("serve", "train", "merge", "gguf", "base")}
    if (served := receipts["serve"]) and (artefact := _served(run, served)):
        yield artefact
    whole = receipts["train"] is not None and Trained.read(run.path("trained")).kind == "weights"
    base, adapter = str(run.path("base")), str(run.path("trained")) if receipts["train"] and not whole else ""
    since = "".join(receipt.started_at for name in ("base", "train") if (receipt := receipts[name]))
    beside = {"kind": "weights", "place": base, "recipe": run.name, "adapter": adapter, "made_at": since}
    if whole and (train := receipts["train"]):
        place, about = str(run.path("trained")), "as trained"
        yield Artefact(
            f"{run.name}/trained", about, "weights", place, "trained", run.name, "train", "", train.started_at
        )
    elif receipts["train"] and receipts["base"]:
        yield Artefact(f"{run.name}/adapter", "on the base, as trained", model="adapter", stage="train", **beside)
    if merge := receipts["merge"]:
        place, about = str(run.path("merged")), "one set of weights"
        yield Artefact(f"{run.name}/merged", about, "weights", place, "merged", run.name, "merge", "", merge.started_at)
    for path in receipts["gguf"].outputs if receipts["gguf"] else ():
        if Path(path).match(f"{run.name}-*.gguf") and Path(path).is_file():  # the importance matrix is no model
            kind = Path(path).stem.removeprefix(f"{run.name}-")
            about = f"GGUF, {Path(path).stat().st_size / 1e6:.0f} MB"
            since = receipts["gguf"].started_at if receipts["gguf"] else ""
            yield Artefact(f"{run.name}/{kind}", about, "gguf", path, kind, run.name, "gguf", "", since)
    if receipts["base"]:
        yield Artefact(f"{run.name}/base", "before training", model="base", stage="base", **beside)


def _served(run: Run, served: Receipt) -> Artefact | None:
    """What `make serve` serves now, whichever engine it is; None when it does not answer."""
    url, model = served.metrics["url"], served.metrics["model"]
    try:
        key = read_key()
    except UserError:
        return None
    if model not in models_of(url, key):
        return None
    about = f"{served.metrics.get('type', model)} at {url.removeprefix('http://').removesuffix('/v1')}"
    return Artefact(f"{run.name}/served", about, "endpoint", url, model, run.name, "serve", key=key)


def _of_environment() -> Iterator[Artefact]:
    """The models of any endpoint of OpenAI's API, named by its client's own variables."""
    url = os.environ.get("OPENAI_BASE_URL", "").rstrip("/")
    key = os.environ.get("OPENAI_API_KEY") or "none"
    for model in models_of(url, key) if url else ():
        yield Artefact(f"{url} {model}", f"{model} at {url}", "endpoint", url, model, key=key)
