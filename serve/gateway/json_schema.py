"""What of a JSON schema llama.cpp cannot read, and what its grammar does not enforce, which a strict schema promises.

Source: llama.cpp's common/json-schema.cpp (what is read) and common/json-schema-to-grammar.cpp (what becomes of it).
"""

import re
from collections.abc import Iterator
from typing import Any

NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator")
)
DEFINITIONS = ("$defs", "definitions")
BOUNDS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
READ = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "string": frozenset(("pattern", "format", "minLength", "maxLength")),
    "integer": BOUNDS,
}
PLAIN = ("number", "boolean", "null")  # types of which no keyword is read
VALUES: dict[str, tuple[type[Any], str]] = {
    "properties": (dict, "an object of schemas"),
    **dict.fromkeys(("enum", "oneOf", "anyOf", "allOf"), (list, "a list of at least one")),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), (int, "a whole number from 0 on")),
    **dict.fromkeys(("pattern", "format"), (str, "a text")),
}
FORMATS = re.compile(r"date|time|date-time|uuid[1-5]?")
# The grammar repeats a run of literals that ends in an escape as a whole, and tears a letter of several bytes apart.
REPEATED = r"(?:[*+?]|\{\d{1,4}(?:,\d{0,4})?\})?"
PATTERN = re.compile(
    rf"""(?P<letter> [!#%&',/0-9:;<=>@A-Z_`a-z~\x20-] {REPEATED} | [^\x00-\x7f] )
      | (?P<escape> \\[\^$.\[\](){{}}|*+?-] (?P<repeated>{REPEATED}) )
      | \[(?!\^)(?:[^\\\[\]]|\\[\[\]-])+\] {REPEATED} | \)(?:{REPEATED}) | \((?!\?) | \(\?: | \|""",
    re.X,
)
CLASS = re.compile(r"\[(?:[^\\\[\]]|\\[\[\]-])+\]")
BREAKS_JSON = '"\\' + "".join(map(chr, range(32)))


def unreadable(schema: object, root: object, seen: set[str], where: str = "") -> Iterator[str]:
    """What in a schema, a part of `root`, llama.cpp cannot read, with its path; `seen` references were followed."""
    if not isinstance(schema, dict):
        yield f"{schema!r:.60}{_at(where)} is no schema: give an object"
        return
    if "$ref" in schema:
        ref = schema["$ref"]
        if (target := _target(ref, root)) is None:
            yield f"the $ref {ref!r:.60}{_at(where)} names nothing in the schema: give a path such as #/$defs/name"
        elif ref not in seen:
            seen.add(ref)
            yield from unreadable(target, root, seen, ref[1:])
        return
    for name, (kind, what) in VALUES.items():
        value = schema.get(name, kind())
        if type(value) is not kind or (kind is int and value < 0) or (kind is list and name in schema and not value):
            yield f"{name} is {value!r:.60}{_at(where)}: give {what}"
    given = schema.get("type")
    types = given if isinstance(given, list) and given else [given]
    for each in types:
        if each not in (*READ, *PLAIN, None):
            yield f"the type {each!r:.60}{_at(where)} is unknown: choose one of {', '.join((*READ, *PLAIN))}"
    for name in sorted(BOUNDS & schema.keys()) if "integer" in types else ():
        is_draft_4 = name.startswith("exclusive") and name.replace("exclusiveM", "m") in schema  # a truth beside it
        if type(schema[name]) not in (int, float) and not is_draft_4:
            yield f"{name} is {schema[name]!r:.60}{_at(where)}: give a number"
    for name in ("properties", "anyOf", "oneOf", "allOf", "items", "prefixItems", "additionalProperties"):
        within = schema.get(name, [])
        if name == "properties" or isinstance(within, list):
            for key, part in _items(within) if name == "properties" else enumerate(within):
                yield from unreadable(part, root, seen, f"{where}/{name}/{key}")
        elif name != "additionalProperties" or not isinstance(within, bool):
            yield from unreadable(within, root, seen, f"{where}/{name}")


def unenforced(schema: object, where: str = "") -> Iterator[str]:
    """Each keyword that an answer may break, with its path."""
    if not isinstance(schema, dict):
        yield f"{schema!r} as a schema{_at(where)}"
        return
    keys = schema.keys() - NOTES - {"$id", "$comment", *DEFINITIONS}
    for name in DEFINITIONS:
        for key, each in _items(schema.get(name)):
            yield from unenforced(each, f"{where}/{name}/{key}")
    for name in ("$ref", "anyOf", "oneOf"):
        if name in keys:
            yield from (f"{key!r} beside {name!r}{_at(where)}" for key in sorted(keys - {name}))
            for number, each in enumerate(schema[name] if isinstance(schema[name], list) else ()):
                yield from unenforced(each, f"{where}/{name}/{number}")
            return
    if "const" in keys or "enum" in keys:
        yield from (f"{key!r}{_at(where)}" for key in sorted(keys - {"const", "enum", "type"}))
        return
    types = schema.get("type") or next((kind for kind, names in READ.items() if names & keys), "")
    types = types if isinstance(types, list) else [types]
    read = frozenset().union(*(READ.get(kind, frozenset()) for kind in types if isinstance(kind, str)))
    yield from (f"{key!r}{_at(where)}" for key in sorted(keys - read - {"type"}))
    yield from _unenforced_values(schema, where)
    for key, each in _items(schema.get("properties")):
        yield from unenforced(each, f"{where}/properties/{key}")
    for name in ("items", "prefixItems"):
        given = schema.get(name)
        for number, each in enumerate(given if isinstance(given, list) else [given] if name in keys else []):
            yield from unenforced(each, f"{where}/{name}/{number}")
    if isinstance(more := schema.get("additionalProperties"), dict):
        yield from unenforced(more, f"{where}/additionalProperties")


def _unenforced_values(schema: dict[str, Any], where: str) -> Iterator[str]:
    """Keywords that are read, but not with these values or beside these others."""
    pattern, form = schema.get("pattern"), schema.get("format")
    if isinstance(pattern, str) and not is_enforced(pattern):
        yield f"the pattern {pattern!r}{_at(where)}"
    if isinstance(form, str) and not FORMATS.fullmatch(form):
        yield f"the format {form!r}{_at(where)}"
    if len(schema.keys() & {"pattern", "format"}) + bool(schema.keys() & {"minLength", "maxLength"}) > 1:
        yield f"a pattern, a format and a length together{_at(where)}"
    for absent in sorted(
        map(str, set(_strings(schema.get("required"))) - dict(_items(schema.get("properties"))).keys())
    ):
        yield f"{absent!r} in 'required' without its property{_at(where)}"
    for one, other in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"), ("items", "prefixItems")):
        if one in schema and other in schema:
            yield f"both {one!r} and {other!r}{_at(where)}"


def _target(ref: object, root: object) -> Any:
    """What a reference names, as llama.cpp follows it, without escapes; None if nothing."""
    if not isinstance(ref, str) or not ref.startswith("#/"):
        return None
    for name in ref.split("/")[1:]:
        if isinstance(root, list):
            root = dict(enumerate(root)).get(int(name)) if name.isdecimal() else None
        else:
            root = root.get(name) if isinstance(root, dict) else None
    return root


def is_enforced(pattern: str) -> bool:
    """Whether the grammar of a string with this pattern allows strings of JSON that match it, and no others."""
    inner, at, after_literal = pattern[1:-1], 0, False
    while at < len(inner):
        token = PATTERN.match(inner, at)
        if not token or (token["escape"] and token["repeated"] and after_literal):
            return False
        # A range such as [ -~] has signs in it that JSON writes otherwise.
        if (found := CLASS.match(token[0])) and re.search(found[0], BREAKS_JSON):
            return False
        after_literal, at = bool(token["letter"] or token["escape"]), token.end()
    try:
        re.compile(pattern)
    except re.error:
        return False
    return pattern[:1] == "^" and pattern[1:][-1:] == "$"


def _items(value: object) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _at(where: str) -> str:
    return f" at {where}" if where else ""
