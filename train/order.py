"""A curriculum: the order in which the packed rows are learned, the same in every epoch."""

import logging
from typing import Any

log = logging.getLogger("truetune")


def curriculum(trainer: Any, order: str) -> list[int] | None:
    """Indexes of the trainer's rows, easiest first by `order`; None for `random`, another order each epoch.

    `short_first` goes by the mean length of a row's conversations; `easy_first` by its loss under the base, which
    takes one pass over the data. Best-fit packing puts conversations of like length together, so rows differ.
    """
    if order == "random":
        return None
    rows = trainer.train_dataset
    if order == "short_first":
        hardness = [sum(lengths) / len(lengths) for lengths in rows["seq_lengths"]]
    else:
        log.info("train.order: the loss of %d rows under the base, one pass over the data", len(rows))
        with trainer.model.disable_adapter():
            hardness = [trainer.row_loss(row) for row in rows]
    return sorted(range(len(rows)), key=hardness.__getitem__)
