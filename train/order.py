"""A curriculum: the order in which the packed rows are learned, the same in every epoch."""

import json
from pathlib import Path
from typing import Any

from pipeline.files import write_whole
from pipeline.progress import progress


def curriculum(trainer: Any, order: str, kept: Path) -> list[int] | None:
    """Indexes of the trainer's rows, easiest first by `order`; None for `random`, another order each epoch.

    `short_first` goes by the mean length of a row's conversations; `easy_first` by its loss under the base, which
    takes one pass over the data. Best-fit packing puts conversations of like length together, so rows differ.
    A training that goes on takes the order in `kept`: where losses are nearly equal, another number of cores or a GPU
    may sort them otherwise.
    """
    if order == "random":
        return None
    rows = trainer.train_dataset
    if order == "short_first":
        hardness = [sum(lengths) / len(lengths) for lengths in rows["seq_lengths"]]
    else:
        if kept.is_file():
            found: list[int] = json.loads(kept.read_text(encoding="utf-8"))
            return found
        hardness = []
        with trainer.model.disable_adapter(), progress("loss under the base", len(rows), "rows") as tell:
            for row in rows:
                hardness.append(trainer.row_loss(row))
                tell(len(hardness))
    indexes = sorted(range(len(rows)), key=hardness.__getitem__)
    write_whole(kept, json.dumps(indexes))
    return indexes
