"""The parts of the README that come from the code:  python -m setup.documentation

Rewrites what stands between `<!-- name -->` and `<!-- end -->`: the picture of the line, the files with the sentence
that each one owns, the keys of a recipe, Make's targets.
"""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.files import write_whole
from pipeline.recipe import Recipe
from pipeline.stages import mermaid

README = Path("README.md")
FOLDERS = ("recipes", "pipeline", "train", "convert", "serve", "report", "setup")


def rendered(text: str) -> str:
    """The README's text with its generated parts as the code has them now."""
    parts = {"line": f"```mermaid\n{mermaid()}\n```", "files": files(), "keys": keys(), "targets": targets()}
    for name, part in parts.items():
        start = text.index(f"<!-- {name} -->\n") + len(f"<!-- {name} -->\n")
        text = text[:start] + part + "\n" + text[text.index("<!-- end -->", start) :]
    return text


def files() -> str:
    """Every module with the first sentence of its docstring."""
    lines = []
    for folder in FOLDERS:
        for path in sorted(Path(folder).rglob("*.py")):
            sentence = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
            if sentence:
                lines.append(f"{path!s:<30} {re.sub(r':  .*$', '', sentence[0])}")
        for kind in ("*.yaml", "*.jinja", "*.css"):
            lines += [f"{path!s:<30} {first_comment(path)}" for path in sorted(Path(folder).rglob(kind))]
    return "```text\n" + "\n".join(lines) + "\n```"


def first_comment(path: Path) -> str:
    """What a shipped recipe or a template says of itself."""
    return path.read_text(encoding="utf-8").splitlines()[0].strip("{#-/* }")


def keys() -> str:
    """A table of every key: type, default, meaning."""
    rows = [f"| `{key}` | {kind} | {default} | {doc} |" for key, kind, default, doc in _keys(Recipe, "")]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def targets() -> str:
    """Make's documented targets."""
    found = re.findall(r"^([a-z-]+):.*?## (.+)$", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    rows = [f"| `make {name}` | {doc} |" for name, doc in found]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def _keys(cls: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")
        elif field.metadata:
            default = "" if field.default in (None, ()) else f"`{_plain(field.default)}`"
            yield prefix + field.name, _kind(hints[field.name]), default, field.metadata["doc"]


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return "list of text"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "names with values"}
    kinds = [get_origin(option) or option for option in get_args(hint) or (hint,)]
    return names[next(kind for kind in kinds if kind in names)]


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    write_whole(README, rendered(README.read_text(encoding="utf-8")))
