"""Every row's tokens, made once on all cores, in Arrow files that training maps instead of lists in its memory.

They lie in `tokens/<hash>/` of the run folder, where the hash is of all that they are made from; those of another hash
are removed. TRL keeps its packed rows beside them.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recipe import Recipe, Run, UserError
from recipe.files import fingerprint, fresh_folder, put_in_place, remove
from recipe.machine import cores
from recipe.rows import batches, count
from train.meter import Meter
from train.pool import in_order
from train.template import IGNORED, batch_examples

log = logging.getLogger("truetune")
PARTS = ("train", "validation")
WEIGHTS = (".safetensors", ".bin", ".gguf")
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Tokens:
    """`datasets` have `input_ids` and `labels`, a conversation a row; `counts` what became of each part's rows."""

    datasets: dict[str, Any]
    counts: dict[str, dict[str, int]]


def tokenized(recipe: Recipe, run: Run) -> Tokens:
    """The tokens of the run's data, from the run folder if they are there already.

    Raises:
        UserError: rows that the template refuses, unless `train.unshown` drops them; or no row is left to train on.
    """
    from datasets import Dataset

    folder = run.path("tokens", _key(recipe, run))
    if not (folder / "counts.json").is_file():
        made = fresh_folder(run.path(".tokens.tmp"))
        try:
            found = {part: _tokenize(recipe, run, part, made / f"{part}.arrow") for part in PARTS}
            (made / "counts.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            remove(folder.parent)
            folder.parent.mkdir()
            put_in_place(made, folder)
        finally:
            remove(made)
    for unfinished in folder.glob("tmp*"):  # of a packing that was killed
        remove(unfinished)
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    _tell(counts, recipe)
    return Tokens({part: Dataset.from_file(str(folder / f"{part}.arrow")) for part in PARTS}, counts)


def longest_and_sum(datasets: Iterable[Any]) -> tuple[int, int]:
    """Tokens of the longest row of these datasets, and of all; only the mapped offsets are read."""
    import pyarrow.compute as compute

    lengths = [compute.list_value_length(dataset.data.column("input_ids")) for dataset in datasets if len(dataset)]
    return max(compute.max(part).as_py() for part in lengths), sum(compute.sum(part).as_py() for part in lengths)


def _tokenize(recipe: Recipe, run: Run, part: str, path: Path) -> dict[str, int]:
    import pyarrow

    knobs = recipe.train
    data, counts, unshown = run.path("data"), Counter[str](), list[str]()
    schema = pyarrow.schema({name: pyarrow.list_(pyarrow.int32()) for name in ("input_ids", "labels")})
    prepare = partial(_tokenizer, str(run.path("base")), knobs.max_tokens)
    with Meter(f"tokens of {part}", count(data, part)) as meter, pyarrow.ipc.new_stream(str(path), schema) as stream:
        for batch, numbers, problems in in_order(_examples, batches(data, part), prepare, cores()):
            longest = max(counts["longest"], numbers.pop("longest"))
            counts.update(numbers)
            counts["longest"] = longest
            unshown += problems[: PROBLEMS_SHOWN - len(unshown)]
            if unshown and knobs.unshown == "error" and len(unshown) == PROBLEMS_SHOWN:
                break
            stream.write_batch(batch)
            meter.add(numbers["rows"], numbers["rows"])
    if unshown and knobs.unshown == "error":
        raise UserError(*unshown)
    if unshown:
        log.warning("%s: %d conversation(s) left out, the first: %s", part, counts["unshown"], unshown[0])
    if part == "train" and not counts["examples"]:
        raise UserError(f"no conversation keeps an answer within train.max_tokens={knobs.max_tokens}: raise it")
    return dict(counts)


def _tokenizer(base: str, max_tokens: int) -> tuple[Any, int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base), max_tokens


def _examples(state: tuple[Any, int], batch: Any) -> tuple[Any, dict[str, int], list[str]]:
    """(ids and labels, what was counted, problems) of a batch of rows; runs in a worker."""
    tokenizer, max_tokens = state
    texts, sources = (column.to_pylist() for column in batch.columns)
    rows = [json.loads(text) | {"source": source} for text, source in zip(texts, sources, strict=True)]
    found = batch_examples(tokenizer, rows, max_tokens)
    problems = [problem for row in found if isinstance(row, UserError) for problem in row.problems]
    kept = [row for row in found if not isinstance(row, UserError)]
    examples = [example for row in kept for example in row]
    columns = [_column([getattr(example, name) for example in examples]) for name in ("input_ids", "labels")]
    lengths = [len(example.input_ids) for example in examples]
    labels = columns[1].values.to_numpy()
    numbers = {
        "rows": len(rows),
        "unshown": len(rows) - len(kept),
        "dropped": sum(not row for row in kept),
        "cut": sum(any(len(example.input_ids) == max_tokens for example in row) for row in kept),
        "examples": len(examples),
        "tokens": sum(lengths),
        "supervised_tokens": int((labels != IGNORED).sum()),
        "longest": max(lengths, default=0),
    }
    import pyarrow

    return pyarrow.record_batch(columns, names=["input_ids", "labels"]), numbers, problems


def _column(rows: list[list[int]]) -> Any:
    import pyarrow

    return pyarrow.array(rows, pyarrow.list_(pyarrow.int32()))


def _tell(counts: dict[str, dict[str, int]], recipe: Recipe) -> None:
    for part, told in counts.items():
        if told.get("cut") or told.get("dropped"):
            log.warning(
                "%s: %d conversation(s) cut to %d tokens, %d dropped because no answer is left: raise train.max_tokens",
                part, told["cut"], recipe.train.max_tokens, told["dropped"],
            )  # fmt: skip


def _key(recipe: Recipe, run: Run) -> str:
    """Identifies what the tokens are made from: rows, tokenizer with its template, knobs, and the code that does it."""
    import tokenizers
    import transformers

    data, base = (run.receipt(stage).outputs for stage in ("data", "base"))
    made_from = {
        "data": {path: mark for path, mark in data.items() if path.endswith(".arrow")},
        "base": {path: mark for path, mark in base.items() if not path.endswith(WEIGHTS)},
        "knobs": [recipe.train.max_tokens, recipe.train.unshown],
        "code": [fingerprint(Path(__file__).with_name(name)) for name in ("template.py", "tokens.py")],
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
