"""The README says what the code does: generated parts, commands, recipe and data examples, changelog."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from pipeline.load import load
from pipeline.recipe import Recipe
from setup.documentation import rendered
from train.data import checked_question
from train.reading.shapes import talk

README = Path("README.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z]+):", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_generated_parts_are_as_the_code_has_them() -> None:
    assert rendered(README) == README, "run 'make format'"


def test_every_command_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(blocks("sh") + re.findall(r"`[^`\n]+`", README))))
    assert named and named <= TARGETS


def test_every_recipe_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"RECIPE=([\w.-]+)", "\n".join(blocks("sh")))) - {"mine.yaml"}
    assert named and all(Path(f"recipes/{name}.yaml").is_file() for name in named)


def test_the_recipe_of_the_readme_loads(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "my-conversations.jsonl").write_text("{}")
    loaded: Recipe = load(str(tmp_path / "mine.yaml"), [])
    assert loaded.data.train == (str(tmp_path / "my-conversations.jsonl"),)


@pytest.mark.parametrize("line", [line for block in blocks("json") for line in block.splitlines()])
def test_the_data_of_the_readme_passes_the_checks(line: str) -> None:
    row = json.loads(line)
    value = checked_question(row) if "facts" in row else talk(row, Counter())
    assert value["messages"] == row["messages"]


def test_the_overrides_of_the_readme_are_keys(tmp_path: Path) -> None:
    given = re.findall(r'SET="([^"]+)"', README)
    assert given
    for overrides in given:
        load("assistant", overrides.split())


def test_every_module_owns_a_sentence() -> None:
    for folder in ("pipeline", "train", "convert", "serve"):
        for path in Path(folder).rglob("*.py"):
            if path.read_text(encoding="utf-8"):
                assert f"\n{path} " in README, path
