"""What each method of training needs and leaves: the table that the whole line reads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """`train/methods/<name>.py` is its code.

    Args:
        rows: what `data` must deliver.
        head: which AutoModel every later stage loads (`pipeline.model.HEADS`).
        leaves: what a training makes, and so which stages follow.
    """

    rows: str
    head: str
    leaves: str


METHODS = {"sft": Method(rows="chat", head="causal", leaves="chat")}
