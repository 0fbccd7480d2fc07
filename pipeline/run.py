"""The run folder `runs/<recipe>/`: where each stage writes, and the receipt that says what it wrote."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.error import UserError
from pipeline.files import fingerprint, write_whole
from pipeline.load import as_dict
from pipeline.recipe import Recipe
from pipeline.stages import Stage, stage, value_at

Fingerprints = dict[str, dict[str, str | int]]


@dataclass(frozen=True)
class Receipt:
    """What one stage read, made and measured; written last, so that its existence means the stage is done.

    `inputs` and `outputs` map a path relative to the repository (or a model's id) to its sha256 and bytes.
    """

    stage: str
    recipe: dict[str, Any]
    inputs: Fingerprints
    outputs: Fingerprints
    versions: dict[str, str]
    metrics: dict[str, Any]
    started_at: str
    seconds: float
    peak_rss_bytes: int
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A stage's receipt, None before it has run, and what has changed since; None while all of it holds."""

    receipt: Receipt | None
    changed: str | None = None


@dataclass(frozen=True)
class Run:
    """The folder of one recipe's run; `recipe` is how RECIPE= names that, if not by the run's name."""

    name: str
    root: Path = Path("runs")
    recipe: str = ""

    @classmethod
    def of(cls, recipe: Recipe) -> "Run":
        return cls(recipe.name, recipe=recipe.given)

    @property
    def given(self) -> str:
        return self.recipe or self.name

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def receipt_path(self, name: str) -> Path:
        return self.path(f"{name}.json")

    def find_receipt(self, name: str) -> Receipt | None:
        """The receipt of a stage, or None when the stage has not finished."""
        try:
            return Receipt(**json.loads(self.receipt_path(name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            path = self.receipt_path(name)
            raise UserError(
                f"{path} is damaged ({error}): delete it and run 'make {name} RECIPE={self.given}'"
            ) from None

    def receipt(self, name: str) -> Receipt:
        """The receipt of a finished stage.

        Raises:
            UserError: the stage has not run; says which make target runs it.
        """
        found = self.find_receipt(name)
        if found is None:
            path = self.receipt_path(name)
            raise UserError(f"{path} is missing: run 'make {name} RECIPE={self.given}' first")
        return found

    def verified(self, name: str, only: str = "") -> Fingerprints:
        """Outputs of a finished stage (those whose path contains `only`), proved to be what it wrote.

        Raises:
            UserError: a file is gone or its hash differs from the receipt that made it.
        """
        fix = self.remake(name)
        outputs = {path: known for path, known in self.receipt(name).outputs.items() if only in path}
        for path, known in outputs.items():
            if not Path(path).is_file():
                raise UserError(f"{path}, which '{name}' wrote, is gone: {fix}")
            if Path(path).stat().st_size != known["bytes"] or fingerprint(Path(path)) != known:
                raise UserError(f"{path} is not what '{name}' wrote, its sha256 differs: {fix}")
        return outputs

    def remake(self, name: str) -> str:
        """What makes a stage write its files again, though its receipt is there."""
        return f"delete {self.receipt_path(name)} and run 'make {name} RECIPE={self.given}'"

    def write_receipt(self, receipt: Receipt) -> None:
        write_whole(self.receipt_path(receipt.stage), json.dumps(asdict(receipt), indent=2, ensure_ascii=False) + "\n")

    def state(self, name: str, recipe: Recipe | None = None, by_content: bool = False) -> State:
        """Whether what a stage made still holds: the one answer for Make, report, verify and serving.

        By the receipts: the stage and each that it rests on were made from what those before them wrote last, and with
        `recipe` from its keys. `by_content` asks this stage alone, and reads its files too.
        """
        receipt = self.find_receipt(name)
        for link in [stage(name)] if by_content else _line(stage(name)):
            if changed := self._changed(link, recipe):
                return State(receipt, changed)
        if receipt and by_content:
            # Outputs by their hash too: a kill between new outputs and their receipt leaves files of the same size.
            upstream = {path for before in stage(name).after for path in self.receipt(before).outputs}
            outside = {path: mark for path, mark in receipt.inputs.items() if path not in upstream}
            for path, mark in (outside | receipt.outputs).items():
                if not _is(Path(path), mark):
                    return State(receipt, f"{path} is not what it was")
        return State(receipt)

    def _changed(self, link: Stage, recipe: Recipe | None) -> str | None:
        """What has changed since a stage ran, by the receipts."""
        receipt = self.find_receipt(link.name)
        if receipt is None:
            return f"'{link.name}' has not run"
        wanted = json.loads(json.dumps(as_dict(recipe))) if recipe else {}  # as the receipt's JSON has it
        for key in link.keys if recipe else ():
            if value_at(receipt.recipe, key) != value_at(wanted, key):
                return f"the recipe's {key} has changed since '{link.name}'"
        for before in link.after:
            upstream = self.find_receipt(before)
            if upstream is None or not upstream.outputs.items() <= receipt.inputs.items():
                return f"'{before}' has run again since '{link.name}'"
        return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder for one writer.

        Raises:
            UserError: another process writes there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder} is in use by another make: wait for it or stop it") from None
            yield


def _line(last: Stage) -> list[Stage]:
    """Every stage that a stage rests on, first to last, and itself."""
    before = [link for name in last.after for link in _line(stage(name))]
    return list(dict.fromkeys([*before, last]))


def _is(path: Path, mark: dict[str, str | int]) -> bool:
    """Whether the file is the marked one; a model's id (`name`, `owner/name@revision/file`) stands for itself."""
    if not path.exists() and (path.suffix == "" if len(path.parts) == 1 else "@" in path.parts[1]):
        return True
    return path.is_file() and path.stat().st_size == mark["bytes"] and fingerprint(path) == mark
