"""A split of a data set on the Hugging Face Hub, from the cache in HF_HOME where it is, else downloaded into it."""

import os
import re
from typing import Any, NamedTuple

from pipeline import UserError
from train.reach import without_waiting

NAME = re.compile(
    r"(?P<id>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<first>[\w.-]+))?(?::(?P<second>[\w.-]+))?"
)


class HubSet(NamedTuple):
    """`owner/name@revision:config:split`; of one part alone after the colon the Hub tells which it is."""

    id: str
    revision: str | None = None
    first: str | None = None
    second: str | None = None


def hub_set(name: str) -> HubSet | None:
    """The set of that name, if it could be one."""
    found = NAME.fullmatch(name)
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
