"""The house: who may import whom, what an import costs, and names that clash with nobody's."""

import ast
import functools
import graphlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STAGES = ("train", "convert", "serve")
ROOMS = ("pipeline", *STAGES, "report", "setup", "bench")
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for room in ROOMS
    for path in (REPOSITORY / room).rglob("*.py")
}
ENTRIES = [name for name, path in MODULES.items() if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
SOURCES = [*MODULES.values(), *(REPOSITORY / "tests").rglob("*.py")]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "llama_cpp", "xllamacpp", "gguf", "openai", "gradio"}


def imported(path: Path, anywhere: bool) -> set[str]:
    """Top-level names of the packages that a file imports: anywhere in it, or when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = [] if anywhere else [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    late = {id(node) for function in inner for node in ast.walk(function)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in late or (isinstance(node, ast.If) and "__main__" in ast.dump(node.test)):
            late |= {id(child) for child in ast.walk(node)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    """Of each of our modules those that it imports, also inside functions."""
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        names = found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, f"{node.module}.__init__"}
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        names &= set(MODULES)
    return found


def test_there_are_modules_and_commands_to_look_at() -> None:
    assert {"pipeline.load", "train.run", "convert.merge", "serve.api"} <= set(MODULES)
    assert {"pipeline.resolve", "train.data", "train.run", "convert.gguf", "serve.api", "serve.chat"} <= set(ENTRIES)


@pytest.mark.parametrize("package", STAGES)
def test_the_stages_never_import_one_another(package: str) -> None:
    others = set(STAGES) - {package}
    assert {
        name: bad
        for name, path in MODULES.items()
        if name.startswith(f"{package}.") and (bad := imported(path, anywhere=True) & others)
    } == {}


def test_a_command_is_a_leaf() -> None:
    assert {name: bad for name, used in graph().items() if (bad := used & set(ENTRIES))} == {}


def test_no_module_imports_itself_through_others() -> None:
    graphlib.TopologicalSorter(graph()).prepare()  # a CycleError names the cycle


def test_recipe_imports_the_standard_library_and_yaml() -> None:
    allowed = sys.stdlib_module_names | {"yaml", "pipeline", "setup"}
    assert {
        name: bad
        for name, path in MODULES.items()
        if name.startswith("pipeline.") and (bad := imported(path, anywhere=False) - allowed)
    } == {}


def test_recipe_imports_no_stage() -> None:
    assert not {name for name, path in MODULES.items() if imported(path, True) & {*STAGES} and "pipeline." in name}


def test_importing_any_command_is_light() -> None:
    code = f"""import importlib, sys
for name in {ENTRIES!r}:
    importlib.import_module(name)
    heavy = {HEAVY!r} & set(sys.modules)
    assert not heavy, (name, heavy)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_dependency_ships_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    assert {name: owners[name] for name in (*ROOMS, "tests") if name in owners} == {}


def test_no_module_is_named_like_a_dependency() -> None:
    owners = {name.lower() for name in importlib.metadata.packages_distributions()}
    assert {name for name in MODULES if name.rpartition(".")[2] in owners - {"__init__"}} == {
        "convert.gguf",
        "train.evaluate",
    }


def test_no_file_is_a_drawer() -> None:
    drawers = {"util", "utils", "common", "helper", "helpers", "misc", "core", "base_class"}
    assert [path for path in SOURCES if path.stem in drawers] == []


def test_every_file_opens_with_its_purpose() -> None:
    assert [
        str(path)
        for path in SOURCES
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ] == []
