"""A recipe file and overrides become a Recipe, or every problem at once with its key and line."""

import dataclasses
import difflib
import os
import re
import shlex
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pipeline.error import UserError
from pipeline.files import HUB, TABLES, TEXTS, ending, matching, unusable
from pipeline.recipe import Recipe

SHIPPED = Path("recipes")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
MOST_DIGITS = 1000
MOST_CHARACTERS = 500_000  # of a recipe's file, and of its values with every alias written out

# What keys were called up to version 0.1: no aliases, but the suggestion is right.
RENAMED = {
    "base": "base_model",
    "train.rows": "batch_size",
    "train.accumulate": "gradient_accumulation",
    "train.max_tokens": "max_length",
    "train.schedule": "lr_scheduler",
    "train.warmup": "warmup_ratio",
    "train.checkpointing": "gradient_checkpointing",
    "train.patience": "early_stopping_patience",
    "train.evaluations": "evals_per_epoch",
    "train.answer_tokens": "max_new_tokens",
    "train.unshown": "on_template_error",
    "train.divergence": "stop_on_divergence",
    "eval.rows": "max_samples",
    "eval.answer_tokens": "max_new_tokens",
    "gguf.recommended_divergence": "recommended_max_kl",
    "prove.merged_divergence": "merged_max_kl",
    "prove.full_divergence": "full_max_kl",
    "prove.bfloat16_divergence": "bfloat16_max_kl",
    "prove.full_agreement": "full_min_agreement",
    "prove.quantized_divergence": "quantized_max_kl",
    "prove.quantized_agreement": "quantized_min_agreement",
}


def load(recipe: str, overrides: list[str] | None = None, complete: bool = False) -> Recipe:
    """The recipe of that shipped name or path, with `key=value` overrides.

    Without `overrides`, those that the last `make` kept for this run apply (`pipeline.resolve`). To be `complete`, the
    files that it names must be there, which what is trained already needs no more.

    Raises:
        UserError: with every problem of file and overrides, each with its place and the nearest valid key.
    """
    path = find(recipe)
    _refuse_namesake(path)
    problems: list[str] = []
    tree = _read_yaml(path, problems)
    for override in kept_overrides(path.stem) if overrides is None else overrides:
        _apply_override(tree, override, problems)
    places: dict[str, str] = {}
    values = _build(Recipe, tree, "", places, problems)
    # A key with a problem has its default here.
    loaded, unlocated = _locate(Recipe(os.path.relpath(path), **values), path.parent, complete)
    wrong = list(problems)
    for key, problem in [*unlocated, *loaded.problems()]:
        if not any(f" {told}:" in known for known in wrong for told in (key, key.partition(".")[0])):
            problems.append(f"{places.get(key, path)}: {key}: {problem}")
    if problems:
        raise UserError(*problems)
    return loaded


def find(recipe: str) -> Path:
    """Path of a recipe given by shipped name or by path; its stem is a valid run name."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else SHIPPED / f"{recipe}.yaml"
    if problem := unusable(str(path)):
        raise UserError(f"no recipe {path}: {problem}")
    if not path.is_file():
        shipped = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
        near = difflib.get_close_matches(recipe, shipped, 1)
        hint = f"did you mean '{near[0]}'?" if near else "give the path of your own file or"
        raise UserError(f"no recipe {path}: {hint} choose one of: {', '.join(shipped)}".replace("? choose", "? Choose"))
    if not NAME.fullmatch(path.stem):
        raise UserError(
            f"recipe name {path.stem!r}: use lower-case letters, digits, '.', '_' and '-' in the file's name"
        )
    return path


def kept_overrides(name: str) -> list[str]:
    """The overrides of the last `make SET=...` for this run."""
    kept = Path("runs") / name / "overrides"
    return kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []


def _refuse_namesake(path: Path) -> None:
    """A run folder is one recipe's, which `pipeline.resolve` writes there, until that file is moved or removed."""
    kept = Path("runs") / path.stem / "recipe"
    owner = Path(kept.read_text(encoding="utf-8").strip()) if kept.is_file() else path
    if owner.is_file() and not owner.samefile(path):
        raise UserError(
            f"{path}: {kept.parent} is the run of {owner}, a recipe of the same file name: rename one of them"
        )


def environment_overrides() -> list[str] | None:
    """`SET="train.epochs=3 data.train='my file.jsonl'"` of the environment; None when SET is not given."""
    if "SET" not in os.environ:
        return None
    try:
        return shlex.split(os.environ["SET"])
    except ValueError as error:
        raise UserError(f"SET={os.environ['SET']}: {error}: close the quotes") from None


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain JSON types."""
    return dataclasses.asdict(recipe)


def _locate(recipe: Recipe, beside: Path, complete: bool) -> tuple[Recipe, list[tuple[str, str]]]:
    """The recipe and its problems, as (key, problem). Files are named from the repository, where make runs; one that is
    not there is sought beside the recipe, and to be `complete` must be at one of these places."""
    problems = []

    def located(key: str, name: str) -> str:
        if problem := unusable(name):
            problems.append((key, f"{name!r}: {problem}"))
            return name
        path = Path(name).expanduser()
        at = next((at for at in (path, beside / path) if not unusable(str(at)) and matching(str(at))), path)
        if complete and not (os.path.lexists(at) or matching(str(at)) or _may_be_of_the_hub(key, name)):
            problems.append((key, f"{name!r}: no such file, here or beside the recipe: correct the path"))
        return str(at)

    data = dataclasses.replace(
        recipe.data,
        train=tuple(located("data.train", name) for name in recipe.data.train),
        heldout=recipe.data.heldout and located("data.heldout", recipe.data.heldout),
    )
    given = recipe.eval.classification
    evaluation = dataclasses.replace(
        recipe.eval,
        classification=tuple(
            "=".join((located("eval.classification", path), *labels)) for path, *labels in map(_halves, given)
        ),
        tasks=tuple(
            located("eval.tasks", name) if name.endswith((".yaml", ".yml")) else name for name in recipe.eval.tasks
        ),
    )
    template = recipe.chat_template and located("chat_template", recipe.chat_template)
    base = located("base_model", recipe.base_model)
    return dataclasses.replace(recipe, base_model=base, chat_template=template, data=data, eval=evaluation), problems


def _may_be_of_the_hub(key: str, name: str) -> bool:
    """Whether it may be an id of the Hub, or a base that comes along, and not a path alone."""
    if key == "base_model":
        return not name.startswith((".", "/", "~")) and not name.endswith(".gguf")
    return key == "data.train" and ending(Path(name)) not in (*TABLES, *TEXTS) and bool(HUB.fullmatch(name))


def _halves(entry: str) -> list[str]:
    """A path, and the names of its labels where they are given."""
    return entry.split("=", 1)


@dataclasses.dataclass
class _Leaf:
    """A YAML value and where it stands."""

    value: Any
    place: str


class _Section(dict[str, Any]):
    """Keys of a YAML mapping, and where it stands."""

    place = "SET"


def _read_yaml(path: Path, problems: list[str]) -> _Section:
    if path.stat().st_size > MOST_CHARACTERS:
        raise UserError(f"{path}: has {path.stat().st_size:,} bytes: a recipe has at most {MOST_CHARACTERS:,}")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        if node is None:
            return _Section()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:1: a recipe is a mapping of keys to values, not a list or a single value")
        if _written_out(node, {}) > MOST_CHARACTERS:
            raise UserError(
                f"{path}: its aliases multiply to more than {MOST_CHARACTERS:,} characters: write it plainly"
            )
        return _mapping(node, path, str(path), problems)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {_reason(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply, or in itself: a recipe has sections of keys and values") from None


def plain_yaml(text: str) -> Any:
    """The value of a YAML text that may come from anywhere.

    Raises:
        ValueError: it is not YAML, or nested without end.
        UserError: its aliases multiply.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node and _written_out(node, {}) > MOST_CHARACTERS:
            raise UserError(f"its aliases multiply to more than {MOST_CHARACTERS:,} characters")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_reason(error)) from None


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters and values of a node with every alias in it written out; `known` are those of nodes met before.

    Raises:
        ValueError: a number of so many digits that it takes minutes to read.
    """
    if id(node) not in known:
        known[id(node)] = 0  # one that is in itself is told when it is constructed
        if isinstance(node, yaml.CollectionNode):
            inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            known[id(node)] = 1 + sum(_written_out(part, known) for part in inner)
        elif node.tag in NUMBERS and len(node.value) > MOST_DIGITS:
            raise ValueError(f"a number of {len(node.value):,} characters")
        else:
            known[id(node)] = 1 + len(node.value)
    return known[id(node)]


def _reason(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _mapping(node: yaml.MappingNode, path: Path, place: str, problems: list[str]) -> _Section:
    loader = yaml.SafeLoader("")
    tree = _Section()
    tree.place = place
    for key_node, value_node in node.value:
        key, place = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if key in tree:
            problems.append(f"{place}: {key}: given twice: keep one")
        if isinstance(value_node, yaml.MappingNode):
            tree[key] = _mapping(value_node, path, place, problems)
        else:
            try:
                tree[key] = _Leaf(loader.construct_object(value_node, deep=True), place)
            except (yaml.YAMLError, ValueError) as error:  # an unknown tag, or a date that does not exist
                problems.append(f"{place}: {key}: cannot be read: {_reason(error)}")
    return tree


def _apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"SET: {override!r} is not key=value")
        return
    try:
        value = plain_yaml(text)
    except UserError as error:
        problems.append(f"SET: {key}: {error}")
        return
    except ValueError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        if not isinstance(child, dict):
            child = tree[parent] = _Section()
        tree = child
    if isinstance(known := tree.get(last), _Leaf) and known.place == "SET":
        problems.append(f"SET: {key}: given twice: keep one")
    tree[last] = _Leaf(value, "SET")


def _build(cls: Any, tree: dict[str, Any], prefix: str, places: dict[str, str], problems: list[str]) -> dict[str, Any]:
    """Values for the dataclass `cls` from `tree`; problems are appended, places of keys recorded."""
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if prefix or field.name != "path"}
    values: dict[str, Any] = {}
    for key, given in tree.items():
        dotted = prefix + key
        here = given.place
        places[dotted] = here
        if key not in fields:
            near = [RENAMED[dotted]] if dotted in RENAMED else difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"choose one of: {', '.join(fields)}"
            problems.append(f"{here}: {dotted}: unknown key: {hint}")
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(given, _Leaf) and given.value is not None:
                inner = ", ".join(field.name for field in dataclasses.fields(hints[key]))
                problems.append(
                    f"{here}: {dotted}: {given.value!r} is not a section: write its keys below it ({inner})"
                )
            else:
                nested = _Section() if isinstance(given, _Leaf) else given
                values[key] = _build_section(hints[key], nested, f"{dotted}.", places, problems)
        elif isinstance(given, _Section) and any(get_origin(kind) is dict for kind in get_args(hints[key])):
            values[key] = {name: leaf.value if isinstance(leaf, _Leaf) else dict(leaf) for name, leaf in given.items()}
        elif isinstance(given, _Section):
            problems.append(f"{here}: {dotted}: is one value, not a section")
        else:
            try:
                values[key] = _coerce(given.value, hints[key], fields[key].metadata)
            except ValueError as error:
                problems.append(f"{here}: {dotted}: {error}")
    return values


def _build_section(cls: Any, tree: dict[str, Any], prefix: str, places: dict[str, str], problems: list[str]) -> Any:
    return cls(**_build(cls, tree, prefix, places, problems))


def _coerce(value: Any, kind: Any, rules: Any) -> Any:
    """`value` as `kind`; YAML reads 1e-3 as text, so numbers are read from text too, and on and off as truths.

    Raises:
        ValueError: what is wrong with the value.
    """
    if get_origin(kind) in (UnionType, Union):
        words = [word for option in get_args(kind) if get_origin(option) is Literal for word in get_args(option)]
        words += [None] * (NoneType in get_args(kind))
        plain = next(
            option for option in get_args(kind) if option is not NoneType and get_origin(option) is not Literal
        )
        return value if value in words else _coerce(value, plain, rules)
    if get_origin(kind) is Literal:
        if isinstance(value, bool) and "on" in get_args(kind):
            return "on" if value else "off"
        if value not in get_args(kind):
            raise ValueError(_choose(value, [str(choice) for choice in get_args(kind)]))
        return value
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_coerce(item, get_args(kind)[0], rules) for item in items)
    if get_origin(kind) is dict:
        raise ValueError(f"{value!r} is not a section: write its names and values below it")
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
        return value
    if kind in (int, float):
        return _number(value, kind, rules)
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    if rules["choices"] and value not in rules["choices"]:
        raise ValueError(_choose(value, rules["choices"]))
    return value


def _number(value: Any, kind: type, rules: Any) -> float | int:
    wanted = "a whole number" if kind is int else "a number"
    try:
        number = float(value)
        exact = not isinstance(value, bool) and (kind is float or number == int(number))
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{value!r} is not {wanted}")
    low, high = rules["low"], rules["high"]
    if (low is not None and number < low) or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{value!r} is out of range: give {wanted} {bounds}")
    return int(number) if kind is int else number


def _choose(value: Any, choices: list[str]) -> str:
    near = difflib.get_close_matches(str(value).upper(), [choice.upper() for choice in choices], 1)
    exact = next((choice for choice in choices if near and choice.upper() == near[0]), None)
    hint = f"did you mean {exact!r}? " if exact else ""
    return f"{value!r} is unknown: {hint}choose one of: {', '.join(choices)}"
