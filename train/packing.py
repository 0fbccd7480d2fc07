"""How rows are laid out: conversations end to end, or one a row and padded, where a base does not keep them apart.

Before the first step one packed row is compared with its parts alone, on the very weights that are trained.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, cycle, islice
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.error import reason
from pipeline.files import write_whole
from pipeline.methods import METHODS
from train.launch import of_first, rank
from train.planning.architecture import ATTENTION
from train.template import IGNORED
from train.tokens import side_lengths

PARTS, PART_TOKENS = 3, 32  # of the row that is compared
# Of the logits' size, in float32: 30 layers gave 2e-6 where parts are kept apart, the least leak 7e-3.
MOST_EXACT = 1e-4
# In 16 bits, of what neighbours that are plainly seen do: rounding gave 0.01 to 0.04, the least leak 0.12.
MOST_ROUGH = 0.1
PADDED_LENGTHS = 16  # oneDNN compiles, and keeps, its kernels for each length of a batch
LEFT_TO_CHECK = "one packed row is compared with its conversations alone before the first step"

log = logging.getLogger("truetune")


@dataclass(frozen=True)
class Layout:
    """Whether rows are packed, and why; `difference` of a packed row's logits from those alone, where measured."""

    packed: bool
    why: str
    difference: float | None = None


def expected(recipe: Recipe, run: Run, config: Any) -> Layout:
    """The layout as far as it is known without the base's weights."""
    if why := _not_wished(recipe):
        return Layout(False, why)
    if known := _kept(run):
        return known
    why = cannot_pack(config)
    return Layout(not why, why or LEFT_TO_CHECK)


def _not_wished(recipe: Recipe) -> str:
    """Why no base's rows would be packed, or nothing."""
    if recipe.train.packing == "off":
        return "train.packing=off"
    method = recipe.train.method
    return "" if METHODS[method].packs else f"train.method={method} compares whole answers"


def cannot_pack(config: Any) -> str:
    """Why a base of this config does not keep the conversations of a row apart, or nothing if that must be tried."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils.import_utils import is_causal_conv1d_available

    if carries_state(config) and not is_causal_conv1d_available():
        return "its layers carry a state from token to token, from one conversation to the next"
    if "position_ids" not in inspect.signature(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].forward).parameters:
        return "it takes no positions, by which the conversations of a row are told apart"
    return ""


def carries_state(config: Any) -> bool:
    """Whether some layers read what is before a token from a state, as Mamba's do, not from keys and values."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kinds = {*(getattr(config.get_text_config(), "layer_types", None) or ())}
    return bool(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._is_stateful or kinds - ATTENTION)


def refused(recipe: Recipe, why: str) -> str:
    """The problem with train.packing=on."""
    return f"train.packing=on: base {recipe.base_model!r} cannot pack, {why}: set it to auto or off"


def layout_of(recipe: Recipe, run: Run, model: Any, rows: Any) -> Layout:
    """The layout of this training, the same in every process and after every resumption.

    Args:
        model: the base as it is trained, on its device.
        rows: the dataset of its conversations' `input_ids`.

    Raises:
        UserError: train.packing=on, and the base does not keep conversations apart.
    """
    if why := _not_wished(recipe):
        found = Layout(False, why)
    else:
        found = of_first((_kept(run) or _checked(recipe, run, model, rows)) if rank() == 0 else None)
    if recipe.train.packing == "on" and not found.packed:
        raise UserError(refused(recipe, found.why))
    if not found.packed and METHODS[recipe.train.method].packs:
        log.warning("train: rows are padded, each is one conversation, batch_size=%d a step: %s",
                    recipe.train.batch_size, found.why)  # fmt: skip
    return found


def padded_to(packed: bool, row_tokens: int, batch_size: int = 1) -> int:
    """Of what number of tokens a batch's length is a multiple; `row_tokens` has the longest row.

    Packed rows of a batch lie end to end.
    """
    return -(-row_tokens * (batch_size if packed else 1) // PADDED_LENGTHS)


def padded(rows: Sequence[tuple[list[int], list[int]]], padding: int, multiple: int) -> dict[str, Any]:
    """A batch of (ids, labels), (rows, time), padded on the right to a multiple of so many tokens.

    `completion_mask`, by which TRL compares answers, is 1 where a token has a label.
    """
    import torch

    def filled(values: list[list[int]], value: int) -> Any:
        tensors = [torch.tensor(row) for row in values]
        found = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(found, (0, -found.shape[1] % multiple), value=value)

    return {
        "input_ids": filled([ids for ids, _ in rows], padding),
        "attention_mask": filled([[1] * len(ids) for ids, _ in rows], 0),
        "completion_mask": (filled([labels for _, labels in rows], IGNORED) != IGNORED).long(),
    }


class Sides:
    """A batch of pairs: the chosen conversations above the rejected ones, padded (train.packing)."""

    def __init__(self, padding: int, multiple: int) -> None:
        self.padding, self.multiple = padding, multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        sides = [(row[f"{side}input_ids"], row[f"{side}labels"]) for side in ("", "rejected_") for row in rows]
        known = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in rows[0]]
        asked_before = {name: torch.tensor([row[name] for row in rows]) for name in known}
        return padded(sides, self.padding, self.multiple) | asked_before


def learned_positions(targets: Any) -> tuple[Any, Any]:
    """(positions at which some row is supervised, their targets), filled up with ignored ones to eighths of the row.

    Of few different sizes: oneDNN compiles a kernel for each and keeps it, which took 0.8 of 2.8 GB in 222 steps.
    """
    import torch

    length = targets.shape[1]
    kept = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    eighth = max(1, length // 8)
    filling = -len(kept) % eighth
    last = kept.new_full((filling,), length - 1)
    return torch.cat([kept, last]), torch.nn.functional.pad(targets[:, kept], (0, filling), value=IGNORED)


def told(found: Layout, rows: Any, row_tokens: int, batch_size: int) -> dict[str, Any]:
    """What preview and receipt say of `rows`: layout, number, longest, and the share of tokens that are no padding.

    They are counted in the batches of the data's own order.
    """
    import numpy as np

    sides, starts = side_lengths(rows), np.arange(0, len(rows), batch_size)
    multiple = padded_to(found.packed, row_tokens, batch_size)
    if found.packed:  # a batch is one row
        lengths, count = np.add.reduceat(sides.sum(0), starts), np.array(1)
    else:
        lengths, count = np.maximum.reduceat(sides.max(0), starts), len(sides) * np.diff([*starts, len(rows)])
    computed = int((-(-lengths // multiple) * multiple * count).sum())
    fill = round(int(sides.sum()) / computed, 4)
    return asdict(found) | {"rows": len(rows), "row_tokens": row_tokens, "fill": fill}


def _checked(recipe: Recipe, run: Run, model: Any, rows: Any) -> Layout:
    """The layout that a comparison tells, kept for who resumes, perhaps on another device."""
    most = min(PART_TOKENS, recipe.train.max_length // PARTS)
    few = [row[:most] for row in rows[:PARTS]["input_ids"]]
    found = compared(model, list(islice(cycle(few), PARTS)))
    if not found.packed and (why := cannot_pack(model.config)):
        found = replace(found, why=why)
    kept = json.dumps(asdict(found) | {"base": _base(run)})
    write_whole(run.path("checkpoints", "packing.json"), kept + "\n")
    return found


def compared(model: Any, parts: Sequence[list[int]]) -> Layout:
    """Whether the logits of these ids in one row are those of each part alone; weights in float32 compute in it.

    Raises:
        UserError: the logits are no numbers.
    """
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    whole = list(chain.from_iterable(parts))
    row = {"input_ids": whole, "labels": whole, "seq_lengths": list(map(len, parts))}
    packed = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    del packed["labels"]

    def logits(**fields: Any) -> Any:
        fields = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in fields.items()}
        found = model(**fields, use_cache=False).logits[0]
        return found - found.mean(-1, keepdim=True)  # which no probability depends on

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            alone = torch.cat([logits(input_ids=torch.tensor([part])) for part in parts])
            exact, alone = alone.dtype == torch.float32, alone.float()
            if not alone.isfinite().all():
                raise UserError("the base's weights hold NaN or infinity, it computes no numbers: fetch it again")

            def distance(other: Any) -> float:
                return float((other.float() - alone).norm() / alone.norm())

            try:
                difference = distance(logits(**packed))
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of the model's own code
                return Layout(False, f"it fails on a packed row ({reason(error)})")
            most = MOST_EXACT if exact else MOST_ROUGH * distance(logits(input_ids=packed["input_ids"]))
    finally:
        model.train(was_training)
    if difference <= most:
        return Layout(True, "a packed row gave the logits of its conversations alone", difference)
    return Layout(False, f"in a packed row its logits are off by {difference:.1%} from those of each alone", difference)


def _kept(run: Run) -> Layout | None:
    """What was found of this base before, if it was."""
    try:
        known = json.loads(run.path("checkpoints", "packing.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return Layout(**known) if known.pop("base") == _base(run) else None


def _base(run: Run) -> str:
    """Identifies the base."""
    receipt = run.find_receipt("base")
    return hashlib.sha256(json.dumps(receipt and receipt.outputs).encode()).hexdigest()
