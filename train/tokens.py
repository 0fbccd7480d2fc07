"""Every row's tokens, made once on all cores, in Arrow files that training maps instead of lists in its memory.

They lie in `tokens/<hash>/` of the run folder, where the hash is of all that they are made from; those of another hash
are removed. TRL keeps its packed rows beside them; `tokens/preview.json` says what they are, for people.
"""

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.files import fingerprint, fresh_folder, put_in_place, remove, write_whole
from pipeline.machine import cores
from pipeline.progress import progress
from pipeline.rows import batches, count, rows
from train.pool import in_order
from train.reading.row import Problem, told
from train.template import IGNORED, controls, shown

log = logging.getLogger("truetune")
PARTS = ("train", "validation")
CODE = ("preferences.py", "template.py", "tokens.py")
IDS, LABELS = "input_ids", "labels"  # how every column of tokens, and the one of what is learned of them, ends
WEIGHTS = (".safetensors", ".bin", ".gguf")
PROBLEMS_KEPT = 10_000
SHORTEST_ROW_TOKENS = 256
STEPS_AN_EPOCH = 100
SHOWN_TOKENS = 600  # of a conversation or of a packed row, unless it was asked for
SHORTEST_BAR = 16  # tokens, the upper end of the histogram's first bar; each next one ends at twice as many
# What would steer the terminal, or turn the writing's direction beyond itself, is shown by its picture or its number.
PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "\N{SYMBOL FOR DELETE}"}
NUMBERED = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
VISIBLE = PICTURES | {code: f"\\u{code:04x}" for code in NUMBERED}


@dataclass(frozen=True)
class Tokens:
    """`datasets` have the columns of the method's examples, one a row; `counts` what became of each part's rows."""

    datasets: dict[str, Any]
    counts: dict[str, dict[str, int]]


def tokenized(recipe: Recipe, run: Run) -> Tokens:
    """The tokens of the run's data, from the run folder if they are there already.

    Raises:
        UserError: rows that the template refuses, unless `train.on_template_error` skips them; or no row is left.
    """
    folder = run.path("tokens", _key(recipe, run))
    if not (folder / "counts.json").is_file():
        made = fresh_folder(run.path(".tokens.tmp"))
        try:
            counts = _tokenize(recipe, run, made)
            (made / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
            remove(folder.parent)
            folder.parent.mkdir()
            put_in_place(made, folder)
        finally:
            remove(made)
    for unfinished in folder.glob("tmp*"):  # of a packing that was killed
        remove(unfinished)
    found = opened(recipe, run)
    _tell(found.counts, recipe)
    return found


def opened(recipe: Recipe, run: Run) -> Tokens:
    """The tokens that `tokenized` has made."""
    from datasets import Dataset

    folder = run.path("tokens", _key(recipe, run))
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    return Tokens({part: Dataset.from_file(str(folder / f"{part}.arrow")) for part in PARTS}, counts)


def examples_of(recipe: Recipe, tokenizer: Any, row: dict[str, Any], max_tokens: int = 0) -> list[Any]:
    """The examples that the recipe's method makes of a row of `data/`, cut to `train.max_length` or to `max_tokens`.

    Raises:
        UserError: names the row's place, and what the template refuses or would leave out in silence.
    """
    knobs = recipe.train
    [found] = _method(recipe).columns(tokenizer, [row], max_tokens or knobs.max_length, knobs.supervise)
    if isinstance(found, UserError):
        raise found
    made: list[Any] = found
    return made


def lengths(dataset: Any) -> Any:
    """Tokens of each row, of its longer side where it has two, as an array."""
    return side_lengths(dataset).max(0)


def side_lengths(dataset: Any) -> Any:
    """Tokens of what the model reads of each row, (sides, rows); only the mapped offsets are read."""
    import numpy as np
    import pyarrow.compute as compute

    sides = [name for name in dataset.column_names if name.endswith(IDS)]
    return np.array([compute.list_value_length(dataset.data.column(name)).to_numpy() for name in sides])


def longest_and_sum(datasets: Iterable[Any]) -> tuple[int, int]:
    """Tokens of the longest row of these datasets, and of all."""
    found = [lengths(dataset) for dataset in datasets if len(dataset)]
    return max(int(part.max()) for part in found), sum(int(part.sum()) for part in found)


def row_tokens(longest: int, total: int, most: int) -> int:
    """Length of a packed row: short enough that few conversations still make many steps, at most `most` tokens.

    Args:
        longest: tokens of the longest conversation.
        total: tokens of all conversations.
    """
    return min(most, max(SHORTEST_ROW_TOKENS, longest, total // STEPS_AN_EPOCH))


def _tokenize(recipe: Recipe, run: Run, folder: Path) -> dict[str, dict[str, int]]:
    """Write `<part>.arrow` of each part; what became of its rows."""
    import pyarrow
    from transformers import AutoTokenizer

    knobs, data, method = recipe.train, run.path("data"), _method(recipe)
    names = tuple(field.name for field in fields(method.Example))
    schema = pyarrow.schema({name: pyarrow.list_(pyarrow.int32()) for name in names})
    counts = {part: Counter[str]() for part in PARTS}
    unshown: dict[str, list[Problem]] = {part: [] for part in PARTS}
    silent: dict[str, list[str]] = {part: [] for part in PARTS}
    items = ((part, batch) for part in PARTS for batch in batches(data, part))
    # Sent to the workers and not loaded there: to find its class, AutoTokenizer imports torch.
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    state = tokenizer, method.columns, names, knobs.max_length, knobs.supervise
    with ExitStack() as stack:
        tell = stack.enter_context(progress("tokens", sum(count(data, part) for part in PARTS), "rows"))
        paths = {part: str(folder / f"{part}.arrow") for part in PARTS}
        streams = {part: stack.enter_context(pyarrow.ipc.new_stream(paths[part], schema)) for part in PARTS}
        for part, batch, numbers, problems, thoughtless in in_order(_examples, items, state, cores()):
            streams[part].write_batch(batch)
            longest = max(counts[part]["longest"], numbers.pop("longest"))
            counts[part].update(numbers)
            counts[part]["longest"] = longest
            unshown[part] += problems[: PROBLEMS_KEPT - len(unshown[part])]
            silent[part] = silent[part] or thoughtless[:1]
            tell(sum(counted["rows"] for counted in counts.values()))
            if knobs.on_template_error == "error" and len(unshown[part]) == PROBLEMS_KEPT:
                break
    nothing_left = not counts["train"]["examples"]
    for part, problems in unshown.items():
        if problems and (knobs.on_template_error == "error" or (part == "train" and nothing_left)):
            raise UserError(*told(problems))
        if problems:
            log.warning("%s: %d conversation(s) left out, the first: %s", part, counts[part]["unshown"], problems[0])
    for part, places in silent.items():
        if places:
            log.warning(
                "%s: %d conversation(s) lose their reasoning_content, which the base's chat template does not show, "
                "the first: %s: use a base whose template does, or name one in chat_template",
                part, counts[part]["reasoning_lost"], places[0],
            )  # fmt: skip
    if nothing_left:
        raise _nothing_learned(next(rows(data, "train")), tokenizer, recipe)
    return {part: dict(counted) for part, counted in counts.items()}


def _method(recipe: Recipe) -> Any:
    """The module of the recipe's method."""
    return import_module(f"train.methods.{recipe.train.method}")


def _nothing_learned(first: dict[str, Any], tokenizer: Any, recipe: Recipe) -> UserError:
    """Why of all conversations, of which this is the first, no token is learned, and what changes that."""
    whole = examples_of(recipe, tokenizer, first, sys.maxsize)
    sides = [labels for example in whole for _, _, labels in example.sides]
    learned = [index for labels in sides for index, label in enumerate(labels) if label != IGNORED]
    if not learned:
        return UserError(
            f"{first['source']}: the base's chat template shows none of the assistant's words, nor in any other "
            "conversation: name one that does in chat_template"
        )
    return UserError(
        f"{first['source']}: its first answer begins at token {min(learned) + 1:,}, and no conversation has one within "
        f"train.max_length={recipe.train.max_length}: raise it"
    )


def _examples(
    state: tuple[Any, Any, tuple[str, ...], int, str], item: tuple[str, Any]
) -> tuple[str, Any, dict[str, int], list[Problem], list[str]]:
    """(part, columns, what was counted, problems, rows without their thoughts) of a batch; runs in a worker."""
    import numpy as np
    import pyarrow

    tokenizer, columns_of, names, max_tokens, supervise = state
    part, batch = item
    texts, sources = (column.to_pylist() for column in batch.columns)
    rows = [json.loads(text) | {"source": source} for text, source in zip(texts, sources, strict=True)]
    found = columns_of(tokenizer, rows, max_tokens, supervise)
    problems = [
        Problem(row["source"], problem.removeprefix(f"{row['source']}: "))
        for row, made in zip(rows, found, strict=True)
        if isinstance(made, UserError)
        for problem in made.problems
    ]
    kept = [row for row in found if not isinstance(row, UserError)]
    examples = [example for row in kept for example in row]
    columns: dict[str, Any] = {}
    sizes: list[int] = []
    learned = 0
    for name in names:
        every = [getattr(example, name) for example in examples]
        ends = np.cumsum([0, *map(len, every)], dtype=np.int32)
        values = np.fromiter(chain.from_iterable(every), np.int32, ends[-1])
        columns[name] = pyarrow.ListArray.from_arrays(ends, values)
        if name.endswith(IDS):
            sizes += map(len, every)
        elif name.endswith(LABELS):
            learned += int((values != IGNORED).sum())
    reasoned = [row["source"] for row in rows if any(turn.get("reasoning_content") for turn in row.get("messages", []))]
    thoughtless = reasoned if reasoned and not shown(tokenizer).reasoning else []
    numbers = {
        "rows": len(rows),
        "reasoning_lost": len(thoughtless),
        "control_tokens": sum(controls(tokenizer).token.search(text) is not None for text in texts),
        "unshown": len(rows) - len(kept),
        "dropped": sum(not row for row in kept),
        "cut": sum(any(len(ids) == max_tokens for one in row for _, ids, _ in one.sides) for row in kept),
        "examples": len(examples),
        "tokens": sum(sizes),
        "supervised_tokens": learned,
        "longest": max(sizes, default=0),
    }
    return part, pyarrow.record_batch(columns), numbers, problems, thoughtless


def _tell(counts: dict[str, dict[str, int]], recipe: Recipe) -> None:
    for part, counted in counts.items():
        if counted.get("control_tokens"):
            log.warning(
                "%s: %d conversation(s) spell control tokens, such as the end of a turn: they are learned as text",
                part, counted["control_tokens"],
            )  # fmt: skip
        if counted.get("cut") or counted.get("dropped"):
            log.warning(
                "%s: %d conversation(s) cut to %d tokens, %d dropped because no answer is left: raise train.max_length",
                part, counted["cut"], recipe.train.max_length, counted["dropped"],
            )  # fmt: skip


def _key(recipe: Recipe, run: Run) -> str:
    """Identifies what the tokens are made from: rows, tokenizer with its template, knobs, and the code that does it."""
    import tokenizers
    import transformers

    data, base = (run.receipt(stage).outputs for stage in ("data", "base"))
    made_from = {
        "data": {path: mark for path, mark in data.items() if path.endswith(".arrow")},
        "base": {path: mark for path, mark in base.items() if not path.endswith(WEIGHTS)},
        "knobs": [getattr(recipe.train, key) for key in ("method", "max_length", "on_template_error", "supervise")],
        "code": [fingerprint(Path(__file__).with_name(name)) for name in CODE],
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def write_preview(recipe: Recipe, run: Run, tokens: Tokens, tokenizer: Any, packing: dict[str, Any]) -> dict[str, Any]:
    """Write `tokens/preview.json`, which the report shows; returns what is in it.

    Args:
        packing: what train.packing tells of the rows.
    """
    train = tokens.datasets["train"]
    source, first = _first_example(recipe, run, tokenizer)
    sides = [
        {
            "name": name,
            "tokens": len(ids),
            "pieces": [asdict(piece) for piece in pieces(tokenizer, ids[:SHOWN_TOKENS], labels[:SHOWN_TOKENS])],
        }
        for name, ids, labels in first.sides
    ]
    found = {
        "parts": tokens.counts,
        "system": run.receipt("base").metrics.get("system", ""),
        "sources": run.receipt("data").metrics["sources"],
        "lengths": histogram(train),
        "packing": packing,
        "example": {"source": source} | sides[0] | {"others": sides[1:]},
    }
    write_whole(run.path("tokens", "preview.json"), json.dumps(found, ensure_ascii=False) + "\n")
    return found


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind, as text: `learned` are those in the loss."""

    text: str
    learned: bool
    special: bool


def pieces(tokenizer: Any, ids: list[int], labels: list[int]) -> list[Piece]:
    """The tokens as text, controls made visible; a character that a boundary cuts lies in the later piece."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    kinds = [(label != IGNORED, token in special) for token, label in zip(ids, labels, strict=True)]
    found, written, index = [], "", 0
    for (learned, is_special), run in groupby(kinds):
        index += len(list(run))
        text = tokenizer.decode(ids[:index], clean_up_tokenization_spaces=False)
        if index < len(ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        found.append(Piece(text[len(written) :].translate(VISIBLE), learned, is_special))
        written = text
    return found


def histogram(dataset: Any) -> list[tuple[int, int]]:
    """(most tokens, conversations) of bars whose ends double, none before the shortest or after the longest."""
    if not len(dataset):
        return []
    sizes = lengths(dataset)
    bars: list[tuple[int, int]] = []
    end = SHORTEST_BAR
    while not bars or end // 2 < sizes.max():
        low = end // 2 if bars else 0
        bars.append((end, int(((sizes > low) & (sizes <= end)).sum())))
        end *= 2
    first = next(index for index, (_, number) in enumerate(bars) if number)
    return bars[first:]


def _first_example(recipe: Recipe, run: Run, tokenizer: Any) -> tuple[str, Any]:
    """(place, its first example) of the first conversation that was not left out."""
    for row in rows(run.path("data"), "train"):
        with suppress(UserError):
            if found := examples_of(recipe, tokenizer, row):
                return str(row["source"]), found[0]
    raise AssertionError("a part without examples is refused where it is made")
