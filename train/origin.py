"""What a base says of its licence and its languages, for the model card of what is made from it."""

from pathlib import Path
from typing import Any


def origin(source: Path) -> dict[str, Any]:
    """`license` and `languages` as a GGUF's header or the model card in a folder states them; the rest is absent."""
    stated = _header(source) if source.suffix == ".gguf" else _card(source / "README.md")
    languages = stated.get("languages") or stated.get("language") or []
    found = {
        "license": stated.get("license"),
        "languages": [languages] if isinstance(languages, str) else list(languages),
    }
    return {key: value for key, value in found.items() if value}


def _header(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {name: fields[key].contents() for name in ("license", "languages") if (key := f"general.{name}") in fields}


def _card(path: Path) -> dict[str, Any]:
    """The YAML between the two lines of dashes that open a model card; nothing if it is no such card."""
    import yaml

    try:
        opening, _, rest = path.read_text(encoding="utf-8").partition("---\n")
        loaded = yaml.safe_load(rest.partition("\n---")[0]) if not opening.strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
