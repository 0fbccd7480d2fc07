"""README and docs/ say what the code does: generated pages, commands, recipes, overrides, examples, links, version."""

import json
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from pipeline.load import load
from pipeline.recipe import Recipe
from setup.documentation import ROOMS, pages
from train.data import checked_question
from train.reading.shapes import talk

PAGES = {path.as_posix(): path.read_text(encoding="utf-8") for path in [Path("README.md"), *Path("docs").glob("*.md")]}
TARGETS = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE))
each_page = pytest.mark.parametrize("page", PAGES)


def blocks(page: str, language: str) -> list[str]:
    """The page's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def test_the_generated_pages_are_as_the_code_has_them() -> None:
    for path, text in pages().items():
        assert PAGES[path.as_posix()] == text, f"{path}: run 'make format'"


def test_the_readme_is_read_in_minutes() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 200


@each_page
def test_every_command_exists(page: str) -> None:
    code = "\n".join(blocks(page, "sh") + re.findall(r"`[^`\n]+`", PAGES[page]))
    assert set(re.findall(r"\bmake ([a-z]+[a-z-]*)", code)) <= TARGETS


@each_page
def test_every_module_that_is_run_exists(page: str) -> None:
    for module in re.findall(r"python -m ((?:bench|docs|train|convert|serve|report|setup)\.\w+)", PAGES[page]):
        assert Path(module.replace(".", "/") + ".py").is_file()


@each_page
def test_every_recipe_exists(page: str) -> None:
    for name in set(re.findall(r"RECIPE=([\w.-]*\w)", "\n".join(blocks(page, "sh")))) - {"mine.yaml"}:
        assert Path(f"recipes/{name}.yaml").is_file()


@each_page
def test_every_override_is_a_key(page: str) -> None:
    for overrides in re.findall(r"""SET=["']([^"']+)["']""", PAGES[page]):
        load("assistant", overrides.split())


@each_page
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (Path(page).parent / target).is_file(), target


@each_page
def test_every_recipe_in_yaml_loads(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my-conversations.jsonl", "rte.tsv", "sst2.tsv", "my-task.yaml"):
        Path(name).write_text("{}")
    for block in blocks(page, "yaml"):
        data = "" if "data:" in block else "data:\n  train: my-conversations.jsonl\n"
        Path("mine.yaml").write_text(data + block)
        loaded: Recipe = load("mine.yaml", [])
        assert loaded.data.train == ("my-conversations.jsonl",)


@each_page
def test_every_row_in_json_passes_the_checks(page: str) -> None:
    for line in "".join(blocks(page, "json")).splitlines():
        row = json.loads(line)
        value = checked_question(row) if "facts" in row else talk(row, Counter())
        assert value["messages"] == row["messages"]


def test_the_examples_are_there_to_be_checked() -> None:
    every = "\n".join(PAGES.values())
    assert all(f"```{language}\n" in every for language in ("sh", "yaml", "json")) and 'SET="' in every


def test_every_module_owns_a_sentence() -> None:
    for room in ROOMS:
        for path in Path(room).rglob("*.py"):
            if path.read_text(encoding="utf-8"):
                assert f"\n{path} " in PAGES["docs/architecture.md"], path


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## [{version}]" in Path("CHANGELOG.md").read_text(encoding="utf-8")
