"""What a base says of its licence and its languages, for the model card of what is made from it."""

from pathlib import Path
from typing import Any

from pipeline import UserError
from pipeline.gguf_head import read_head
from pipeline.load import MOST_CHARACTERS, plain_yaml


def origin(source: Path) -> dict[str, Any]:
    """`license` and `languages` as a GGUF's header or the model card in a folder states them; the rest is absent."""
    stated = _header(source) if source.suffix == ".gguf" else card(source / "README.md")
    languages = stated.get("languages") or stated.get("language") or []
    found = {
        "license": _text(stated.get("license")),
        "languages": [
            text for each in (languages if isinstance(languages, list) else [languages]) if (text := _text(each))
        ],
    }
    return {key: value for key, value in found.items() if value}


def _header(path: Path) -> dict[str, Any]:
    values = read_head(path).values
    return {name: values.get(f"general.{name}") for name in ("license", "languages")}


def card(path: Path) -> dict[str, Any]:
    """The YAML between the two lines of dashes that open a model card; nothing if it is no such card."""
    try:
        with path.open(encoding="utf-8") as file:
            opening, _, rest = file.read(MOST_CHARACTERS).partition("---\n")
        loaded = plain_yaml(rest.partition("\n---")[0]) if not opening.strip() else None
    except (OSError, ValueError, UserError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _text(stated: Any) -> str:
    """A text, whether it is text or, as those of a GGUF's lists, bytes."""
    return stated.decode(errors="replace") if isinstance(stated, bytes) else stated if isinstance(stated, str) else ""
