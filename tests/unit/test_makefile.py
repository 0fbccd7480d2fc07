"""The Makefile: documented targets, the order of the stages, and reruns of just what changed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.stages import STAGES

TEXT = Path("Makefile").read_text(encoding="utf-8")
PHONY = set(re.findall(r"^\.PHONY: (.*)", TEXT, re.M)[0].split())
DOCUMENTED = set(re.findall(r"^([a-z-]+):.*## \S", TEXT, re.M))
MADE = [stage for stage in STAGES if stage.name not in ("eval", "prove", "register", "serve")]  # these run each time

# A stage that writes one file and notes that it worked; the receipts, keys and locks are the real ones.
STUB = """
import sys
from pipeline import Made, Recipe, Run, command

def make(recipe: Recipe, run: Run) -> Made:
    path = run.path("{name}.txt")
    path.write_text(str(recipe))
    with run.path("worked").open("a") as file:
        file.write("{name} ")
    return Made([path])

if "--check" not in sys.argv:
    command("{name}", make)
"""


def make(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    # The tests may run under make themselves, whose variables must not reach the one under test.
    mine = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "RECIPE", "SET", "PORT", "Q")
    clean = {key: value for key, value in os.environ.items() if key not in mine}
    return subprocess.run(["make", *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Makefile, pipeline/ and recipes/ with stub stages, and an environment that is this one."""
    for folder in ("pipeline", "recipes", "setup"):
        shutil.copytree(folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(name, tmp_path)
    for stage in MADE:
        path = tmp_path / (stage.module.replace(".", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB.format(name=stage.name))
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.py").write_text("")  # a stub's receipts tell nothing
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv/.complete").touch()
    return tmp_path


def worked(checkout: Path, *arguments: str) -> list[str]:
    """The stages that did work in `make ARGUMENTS`."""
    note = checkout / "runs/tiny/worked"
    note.unlink(missing_ok=True)
    done = make(*arguments, "RECIPE=tiny", folder=checkout)
    assert done.returncode == 0, done.stderr
    return note.read_text().split() if note.exists() else []


def test_every_target_is_documented_and_phony() -> None:
    targets = set(re.findall(r"^([a-z-]+):", TEXT, re.M))
    assert targets == PHONY
    assert PHONY - DOCUMENTED == {"resolve", "ready", "docker"}  # steps of others, no commands of their own


def test_help_is_the_default_and_lists_every_target() -> None:
    shown = make().stdout
    assert shown == make("help").stdout
    assert set(re.findall(r"^  make ([a-z-]+) ", shown, re.M)) == DOCUMENTED


def test_a_fresh_serve_runs_the_stages_in_order(checkout: Path) -> None:
    commands = make("--dry-run", "serve", "RECIPE=tiny", folder=checkout).stdout
    modules = re.findall(r"-m (\S+) recipes/tiny\.yaml", commands)
    needed = [stage.module for stage in STAGES if stage.name not in ("eval", "prove", "register")]
    needed.insert(needed.index("train.run"), "convert.gguf")  # its check
    assert modules == ["pipeline.resolve", "serve.api", *needed[:-1], "report.report", "serve.api"]


def test_the_receipts_depend_on_those_that_the_stages_read() -> None:
    for stage in MADE:
        line = re.findall(rf"^\$\(RUN\)/{stage.name}\.json: (.*)", TEXT, re.M)[0].split("|")[0]
        assert re.findall(r"\$\(RUN\)/([a-z]+)\.json", line) == list(stage.after)
        assert f"$(RUN)/keys/{stage.name}.json" in line


def test_an_unknown_recipe_stops_with_the_list() -> None:
    done = make("train", "RECIPE=nope")
    assert done.returncode == 2
    assert "error: no recipe recipes/nope.yaml" in done.stderr
    assert "assistant" in done.stderr and "tiny" in done.stderr
    assert make("help", "RECIPE=nope").returncode == 0


@pytest.mark.parametrize("where", ["command line", "environment"])
@pytest.mark.parametrize("name", ["SET", "RECIPE", "Q", "ENGINE", "PORT", "PROFILE"])
def test_a_value_reaches_python_as_it_was_written(checkout: Path, name: str, where: str) -> None:
    """Make would run what stands in `$(shell)`, and take the `$5` of a question for a variable of its own."""
    given = f"$(shell touch {checkout}/ran) $5 `touch {checkout}/ran` #"
    (checkout / "pipeline/resolve.py").write_text(f"import os; print(os.environ[{name!r}])")
    words = ["resolve"] if name == "RECIPE" else ["resolve", "RECIPE=tiny"]
    if where == "environment":
        environment = {**os.environ, name: given}
        done = subprocess.run(["make", *words], cwd=checkout, env=environment, capture_output=True, text=True)
    else:
        done = make(*words, f"{name}={given}", folder=checkout)
    assert given in (done.stderr if name == "RECIPE" else done.stdout)
    assert not (checkout / "ran").exists()


@pytest.mark.parametrize("name", ["", "..", "a b", "recipe/../.."])
def test_clean_refuses_what_is_no_recipe(checkout: Path, name: str) -> None:
    (checkout / "runs/tiny").mkdir(parents=True)
    assert make("clean", f"RECIPE={name}", folder=checkout).returncode == 2
    assert (checkout / "runs/tiny").is_dir()


def test_make_runs_again_only_what_changed(checkout: Path) -> None:
    assert worked(checkout, "-j4", "compare") == [stage.name for stage in MADE]
    assert worked(checkout, "compare") == []
    (checkout / ".venv/.complete").touch()
    assert worked(checkout, "compare") == [], "a new environment must not train again"
    assert worked(checkout, "compare", "SET=gguf.types=Q6_K") == ["gguf", "compare"]
    assert worked(checkout, "compare") == [], "SET stays with the run"
    assert worked(checkout, "compare", "SET=") == ["gguf", "compare"], "an empty SET drops it"
    assert worked(checkout, "compare", "SET=train.epochs=2") == ["train", "reference", "merge", "gguf", "compare"]
    (checkout / "runs/tiny/merge.json").unlink()
    assert worked(checkout, "compare") == ["merge"], "what it makes is the same, so nothing after it works"


def test_a_path_with_a_space_is_refused_in_one_line(checkout: Path) -> None:
    (checkout / "my recipes").mkdir()
    shutil.copy("recipes/tiny.yaml", checkout / "my recipes")
    done = make("data", "RECIPE=my recipes/tiny.yaml", folder=checkout)
    assert "error: RECIPE=my recipes/tiny.yaml has a space" in done.stderr and done.stderr.count("\n") == 1


def test_the_run_of_another_recipe_of_the_same_name_is_left_alone(checkout: Path) -> None:
    assert make("data", "RECIPE=tiny", folder=checkout).returncode == 0
    (checkout / "b").mkdir()
    shutil.copy("recipes/tiny.yaml", checkout / "b")
    for target in ("clean", "data", "tensorboard"):
        done = make(target, "RECIPE=b/tiny.yaml", folder=checkout)
        assert done.returncode == 2 and "runs/tiny is the run of recipes/tiny.yaml" in done.stderr
    assert (checkout / "runs/tiny/data.json").is_file()


def test_clean_removes_the_run_and_nothing_else(checkout: Path) -> None:
    (checkout / "runs/other").mkdir(parents=True)
    (checkout / "runs/tiny").mkdir()
    assert make("clean", "RECIPE=tiny", folder=checkout).returncode == 0
    assert [path.name for path in (checkout / "runs").iterdir()] == ["other"]
