"""What a recipe names as data, as sources to read: files, folders, globs and sets of the Hugging Face Hub."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import UserError
from pipeline.files import HUB, TABLES, TEXTS, ending, matching
from pipeline.recipe import Data
from train.hub import without_waiting
from train.reading.chunks import Chunk, file_chunks
from train.reading.records import small
from train.reading.row import Names, named_columns

log = logging.getLogger("truetune")
# Files beside the data in a folder that `datasets` saved or a repository has.
BESIDE = re.compile(r"dataset_infos?|dataset_dict|state|readme|license|changelog|requirements", re.IGNORECASE)
TRAINING = re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)", re.IGNORECASE)
TESTING = re.compile(
    r"(^|[^a-z])(tests?|testing|dev|valid|validation|val|eval|heldout|holdout)([^a-z]|$)", re.IGNORECASE
)


class HubSet(NamedTuple):
    """`owner/name@revision:config:split`; of one part alone after the colon the Hub tells which it is."""

    id: str
    revision: str | None = None
    first: str | None = None
    second: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or one split of a Hub set, how often each of its rows is taken, and the names of its columns."""

    name: str
    weight: float = 1.0
    hub: HubSet | None = None
    columns: Names = ()


def sources(data: Data) -> list[Source]:
    """The sources of `data.train`, in the order of the recipe.

    Raises:
        UserError: a name that is no file, folder, glob or Hub id, or a folder without a data file; all at once.
    """
    found: list[Source] = []
    problems: list[str] = []
    weights = data.weights or (1.0,) * len(data.train)
    names = named_columns(data.columns)
    for name, weight in zip(data.train, weights, strict=True):
        try:
            found += [Source(str(path), weight, columns=names) for path in files(name)]
        except UserError as error:
            hub = hub_set(name)
            if hub and not Path(name).parent.exists() and ending(Path(name)) not in TABLES + TEXTS:
                found.append(Source(name, weight, hub, names))
            else:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def files(name: str) -> list[Path]:
    """The data files that a path or a glob names; of a folder's files those to train on.

    Raises:
        UserError: there are none.
    """
    path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    if found := matching(name):
        return found
    if path.is_symlink():
        raise UserError(f"{name}: is a link to a file that is missing: correct the path in the recipe's `data` section")
    raise UserError(f"{name}: no such file: correct the path in the recipe's `data` section")


def chunks(source: Source) -> Iterator[Chunk]:
    """The source's records in pieces, in their order.

    Raises:
        UserError: it cannot be read, or only so far.
    """
    return _hub_chunks(source.name, source.hub) if source.hub else file_chunks(Path(source.name))


def copies(source: Source, value: Any, seed: int) -> int:
    """How often a row is taken: of weight 2.5 twice, and every other row a third time, whatever rows surround it."""
    whole, part = divmod(source.weight, 1)
    if not part:
        return int(whole)
    text = json.dumps([seed, "weight", value], sort_keys=True)
    return int(whole) + (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < part)


def _in_folder(folder: Path) -> list[Path]:
    splits = folder / "dataset_dict.json"
    if splits.is_file() and (folder / "train").is_dir():  # of datasets.DatasetDict.save_to_disk
        return _in_folder(folder / "train")
    if (folder / "state.json").is_file():  # of datasets.Dataset.save_to_disk
        return sorted(folder.glob("*.arrow"))
    below = [path for path in matching(str(folder)) if not BESIDE.match(path.name)]
    named = [path for path in below if ending(path) in TABLES] or [path for path in below if ending(path) in TEXTS]
    if not named:
        raise UserError(f"{folder}: no data file in this folder: it needs one that ends in {', '.join(TABLES + TEXTS)}")
    if chats := [path for path in named if re.fullmatch(r"conversations(-\d+)?\.json", path.name)]:
        named = chats  # the other files of ChatGPT's and Claude's exports are about the account
    training = [path for path in named if TRAINING.search(str(path.relative_to(folder)))]
    testing = [path for path in named if path not in training and TESTING.search(str(path.relative_to(folder)))]
    if training and testing:
        log.info("data: %s: left out, since they are named for testing: %s", folder, ", ".join(p.name for p in testing))
        named = [path for path in named if path not in testing]
    return named


def _hub_chunks(name: str, hub: HubSet) -> Iterator[Chunk]:
    for first, batch in small(download(hub).data.table.to_batches(), name):
        yield Chunk(name, first, batch)


def hub_set(name: str) -> HubSet | None:
    """The set of that name, if it could be one."""
    found = HUB.fullmatch(name)
    return HubSet(**found.groupdict()) if found else None


def download(wanted: HubSet) -> Any:
    """The split as a memory-mapped `datasets.Dataset`; nothing that the set brings is run.

    Raises:
        UserError: the Hub is out of reach and the cache has it not, there is no such set, or which part is not told.
    """
    for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.pop(bars, None)  # a download of gigabytes shows its progress
    from huggingface_hub import HfApi

    without_waiting(HfApi.dataset_info, wanted.id, wanted.revision)
    try:
        builder, split = _builder(wanted)
        builder.download_and_prepare()
        return builder.as_dataset(split=_split(builder, wanted, split))
    except UserError:
        raise
    except Exception as error:  # of httpx, huggingface_hub, datasets and pyarrow
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])[:300]
        raise UserError(
            f"{wanted.id}: neither a file here nor a set that the Hugging Face Hub gives ({reason}): correct the name, "
            "go online, for gated sets set HF_TOKEN, or name a folder with its files"
        ) from None


def _builder(wanted: HubSet) -> tuple[Any, str | None]:
    """(the set's builder, the split that was asked for)."""
    import datasets

    if wanted.first is None or wanted.second is not None:
        return datasets.load_dataset_builder(wanted.id, wanted.first, revision=wanted.revision), wanted.second
    try:
        return datasets.load_dataset_builder(wanted.id, wanted.first, revision=wanted.revision), None
    except ValueError:  # no such configuration: a split then
        return datasets.load_dataset_builder(wanted.id, revision=wanted.revision), wanted.first


def _split(builder: Any, wanted: HubSet, given: str | None) -> str:
    """The split that was asked for, else the one to train on.

    Raises:
        UserError: there is none such, or more than one.
    """
    splits = list(builder.info.splits or {})
    training = [split for split in splits if split.startswith("train")] or splits
    split = given or ("train" if "train" in splits else training[0] if len(training) == 1 else None)
    if split in splits:
        return str(split)
    example = ":".join([wanted.id, *([wanted.first] if wanted.first and wanted.first != given else []), splits[0]])
    which = f"no split {split!r}" if split else "several splits"
    raise UserError(f"{wanted.id}: {which}: name one of {', '.join(splits)}, as in {example}")
