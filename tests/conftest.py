"""What the tests share: no network, no variables of a make above, and the tiny model, made once a session."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from copy import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pipeline import Recipe, Run, command, load
from pipeline.stages import stage

# Before a library reads them. One thread each: tests run side by side, and sums depend on the threads.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
# The tests may run under make, whose variables must not reach the one under test.
OURS = "SET PORT UI UI_PORT ENGINE PROFILE RECIPE Q ROW NPROC NODE_RANK MASTER_ADDR MASTER_PORT"
MAKES = "MAKEFLAGS MAKEOVERRIDES MFLAGS MAKELEVEL"
for leaked in f"{OURS} {MAKES} OLLAMA_HOST OLLAMA_API_KEY".split():
    os.environ.pop(leaked, None)

# A background job of a shell ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent
MODEL_FILES = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
               "tokenizer_config.json"}  # fmt: skip
LARGE = (".safetensors", ".gguf")  # linked, not copied: a test that changes one must replace it
TINY = """
base_model: random
data: {train: talks.jsonl, heldout: questions.jsonl, validation: 0.2}
train: {epochs: 2, learning_rate: 1e-2, max_length: 160, max_new_tokens: 4}
gguf: {types: [Q8_0, F16, Q4_K_M, Q8_0]}
"""
ANIMALS = ["cat", "dog", "owl", "fox", "bee", "cow", "hen", "pig", "ant", "bat", "elk", "emu"]


class Workplace:
    """A folder with a recipe, whose stages run in this process as `python -m` runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def recipe(self) -> Recipe:
        return load("line.yaml")

    @property
    def run(self) -> Run:
        return Run("line")

    def make(self, *stages: str) -> None:
        """Run the stages; a failure is a SystemExit."""
        given, sigterm = sys.argv, signal.getsignal(signal.SIGTERM)
        try:
            for name in stages:
                module = import_module(stage(name).module)
                sys.argv = [module.__file__ or name, "line.yaml"]
                command(name, getattr(module, stage(name).module.rpartition(".")[2]))
        finally:
            sys.argv = given
            signal.signal(signal.SIGTERM, sigterm)

    def receipt(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.run.receipt_path(name).read_text(encoding="utf-8"))
        return loaded

    def files(self, name: str) -> set[str]:
        """Paths below a folder of the run."""
        folder = self.run.path(name)
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def copied(source: Path, target: Path) -> Workplace:
    def linked(here: str, there: str) -> None:
        os.link(here, there) if here.endswith(LARGE) else shutil.copy2(here, there)

    shutil.copytree(source, target, copy_function=linked, symlinks=True, dirs_exist_ok=True)
    return Workplace(target)


def once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of that name, filled by the first of the processes that share the tests; only to read."""
    shared = factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    made, filling = shared / name, shared / f"{name}.filling"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(filling, ignore_errors=True)
            filling.mkdir()
            with contextlib.chdir(filling):
                fill(filling)
            filling.rename(made)
    return made


@pytest.fixture
def rows() -> Callable[..., str]:
    """JSONL of conversations, each given as its turns: user, assistant, user, ..."""

    def jsonl(*conversations: list[str]) -> str:
        roles = ("user", "assistant")
        return "".join(
            json.dumps({"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}) + "\n"
            for turns in conversations
        )

    return jsonl


def _start(folder: Path) -> None:
    (folder / "line.yaml").write_text(TINY)
    (folder / ".cache").symlink_to(REPOSITORY / ".cache")
    with (folder / "talks.jsonl").open("w") as talks, (folder / "questions.jsonl").open("w") as questions:
        for animal in ANIMALS:
            turns = [("user", f"What says the {animal}?"), ("assistant", f"The {animal} says its name."),
                     ("user", "And twice?"), ("assistant", f"{animal} {animal}")]  # fmt: skip
            talks.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
        question = {"messages": [{"role": "user", "content": "Who says moo?"}], "facts": ["cow|bull"]}
        questions.write(json.dumps(question) + "\n")
    Workplace(folder).make("data", "base")


@pytest.fixture(scope="session")
def _based(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random base takes ten seconds, most of them to read the packaged tokenizer."""
    return once(tmp_path_factory, "based", _start)


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory, _based: Path) -> Path:
    return once(tmp_path_factory, "trained", lambda folder: copied(_based, folder).make("train"))


@pytest.fixture(scope="session")
def _merged(tmp_path_factory: pytest.TempPathFactory, _trained: Path) -> Path:
    return once(tmp_path_factory, "merged", lambda folder: copied(_trained, folder).make("merge"))


@pytest.fixture(scope="session")
def _converted(tmp_path_factory: pytest.TempPathFactory, _merged: Path) -> Path:
    return once(tmp_path_factory, "converted", lambda folder: copied(_merged, folder).make("gguf"))


def _here(source: Path, folder: Path) -> Iterator[Workplace]:
    with contextlib.chdir(folder):
        yield copied(source, folder)


@pytest.fixture
def based(tmp_path: Path, _based: Path) -> Iterator[Workplace]:
    """A workplace of the test's own, and its current folder, in which `data` and `base` are made."""
    yield from _here(_based, tmp_path)


@pytest.fixture
def trained(tmp_path: Path, _trained: Path) -> Iterator[Workplace]:
    """As `based`, and trained."""
    yield from _here(_trained, tmp_path)


@pytest.fixture
def merged(tmp_path: Path, _merged: Path) -> Iterator[Workplace]:
    """As `trained`, and merged."""
    yield from _here(_merged, tmp_path)


@pytest.fixture
def converted(tmp_path: Path, _converted: Path) -> Iterator[Workplace]:
    """As `merged`, and converted."""
    yield from _here(_converted, tmp_path)


@pytest.fixture(scope="session")
def base_folder(_based: Path) -> Path:
    """The random base with the packaged tokenizer; only to read."""
    return _based / "runs/line/base"


@pytest.fixture(scope="session")
def _tokenizer(base_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def tokenizer(_tokenizer: Any) -> Iterator[Any]:
    """The packaged tokenizer, whose template and special tokens the test may change; none may be added."""
    known = {name: copy(value) if isinstance(value, dict) else value for name, value in vars(_tokenizer).items()}
    size = len(_tokenizer)
    yield _tokenizer
    assert len(_tokenizer) == size, "load a tokenizer of your own"
    vars(_tokenizer).clear()
    vars(_tokenizer).update(known)


@pytest.fixture
def replace() -> Callable[[Path, bytes], None]:
    """Give a file new bytes, without changing another file linked to the old ones."""

    def replacing(path: Path, content: bytes) -> None:
        path.unlink()
        path.write_bytes(content)

    return replacing
