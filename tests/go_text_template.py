"""As much of Go's text/template as Ollama's chat templates and ours use; go_templates.json is what Go writes."""

import re
from typing import Any

ACTION = re.compile(r'\{\{(-(?=\s))?((?:"(?:\\.|[^"\\])*"|[^"])*?)((?<=\s)-)?\}\}', re.S)
TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|:=|[(),=|]|\$?[\w.]+|\$|\S')
Node = tuple[Any, ...]


class Continued(Exception):
    """`{{ continue }}`."""


def render(template: str, data: dict[str, Any]) -> str:
    """The text that Go writes."""
    nodes, rest = _parse(_lex(template))
    assert not rest
    out: list[str] = []
    _run(nodes, {"$": data}, data, out)
    return "".join(out)


def _lex(template: str) -> list[Node]:
    """Text and actions, with the white space gone that `{{-` and `-}}` trim."""
    parts: list[Node] = []
    end, trim = 0, False
    for found in ACTION.finditer(template):
        text = template[end : found.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        text = text.rstrip(" \t\r\n") if found[1] else text
        parts += [("text", text), ("action", TOKEN.findall(found[2]))]
        end, trim = found.end(), bool(found[3])
    text = template[end:]
    return [*parts, ("text", text.lstrip(" \t\r\n") if trim else text)]


def _parse(parts: list[Node]) -> tuple[list[Node], list[Node]]:
    """Nodes up to the end of the block, and what follows from its `end` or `else` on."""
    nodes: list[Node] = []
    while parts:
        kind, value = parts[0]
        if kind == "text" or not value or value[0] == "/":
            nodes += [("text", value)] if kind == "text" and value else []
            parts = parts[1:]
        elif value[0] in ("end", "else"):
            return nodes, parts
        elif value[0] in ("if", "range", "with"):
            node, parts = _block(value, parts[1:])
            nodes.append(node)
        else:
            nodes.append(("continue",) if value == ["continue"] else ("do", value))
            parts = parts[1:]
    return nodes, []


def _block(head: list[str], parts: list[Node]) -> tuple[Node, list[Node]]:
    """An `if`, `range` or `with` up to its end; `else if` is one in its other branch that has no end of its own."""
    body, parts = _parse(parts)
    closing, parts = parts[0][1], parts[1:]
    other: list[Node] = []
    if closing[1:]:
        node, parts = _block(closing[1:], parts)
        other = [node]
    elif closing[0] == "else":
        other, parts = _parse(parts)
        parts = parts[1:]
    return (head[0], head[1:], body, other), parts


def _run(nodes: list[Node], names: dict[str, Any], dot: Any, out: list[str]) -> None:
    for node in nodes:
        match node:
            case ("text", text):
                out.append(text)
            case ("continue",):
                raise Continued
            case ("do", [name, ":=" | "=", *value]):
                names[name] = _value(value, names, dot)
            case ("do", value):
                out.append(_shown(_value(value, names, dot)))
            case ("if", condition, body, other):
                _run(body if _true(_value(condition, names, dot)) else other, names, dot, out)
            case ("with", condition, body, other):
                found = _value(condition, names, dot)
                _run(*((body, names, found) if _true(found) else (other, names, dot)), out)
            case ("range", [index, ",", item, ":=", *value], body, _):
                _loop(_value(value, names, dot), body, names, out, index, item)
            case ("range", value, body, _):
                _loop(_value(value, names, dot), body, names, out)


def _loop(items: Any, body: list[Node], names: dict[str, Any], out: list[str], *named: str) -> None:
    for index, item in enumerate(items or ()):
        names |= dict(zip(named, (index, item), strict=False))
        try:
            _run(body, names, item, out)
        except Continued:
            continue


def _value(tokens: list[str], names: dict[str, Any], dot: Any) -> Any:
    values, rest = _operands(list(tokens), names, dot)
    assert not rest, tokens
    return values


def _operands(tokens: list[str], names: dict[str, Any], dot: Any) -> tuple[Any, list[str]]:
    """One call or value up to a closing bracket."""
    function, values = "", []
    while tokens and tokens[0] != ")":
        token, tokens = tokens[0], tokens[1:]
        if token == "(":
            value, tokens = _operands(tokens, names, dot)
            tokens = tokens[1:]
            if tokens and re.fullmatch(r"\.\w+", tokens[0]):
                value, tokens = value.get(tokens[0][1:], ""), tokens[1:]
            values.append(value)
        elif token[0] == '"':
            values.append(token[1:-1].encode().decode("unicode_escape").encode("latin1").decode())
        elif re.fullmatch(r"\d+", token):
            values.append(int(token))
        elif token[0] in ".$":
            values.append(_field(token, names, dot))
        else:
            assert not function and not values, tokens
            function = token
    return (_call(function, values) if function else values[0]), tokens


def _field(token: str, names: dict[str, Any], dot: Any) -> Any:
    name, _, path = token.partition(".")
    value = names[name] if name else dot
    for part in filter(None, path.split(".")):
        value = value.get(part, "")
    return value


def _call(function: str, values: list[Any]) -> Any:
    match function, values:
        case "eq", [first, *others]:
            return first in others
        case "ne", [one, other]:
            return one != other
        case "not", [one]:
            return not _true(one)
        case "and", _:
            return next((value for value in values if not _true(value)), values[-1])
        case "or", _:
            return next((value for value in values if _true(value)), values[-1])
        case "len", [one]:
            return len(one)
        case "index", [items, at]:
            return items[at]
        case "slice", [items, start]:
            return items[start:]
        case "gt", [one, other]:
            return one > other
        case "printf", [layout, *others]:
            return layout % tuple(others)
    raise AssertionError(f"{function} with {len(values)} values")


def _true(value: Any) -> bool:
    return bool(value)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
