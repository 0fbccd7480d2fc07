"""What each method of training needs and leaves: the table that the whole line reads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """`train/methods/<name>.py` is its code.

    Args:
        rows: what `data` must deliver: `chat` (conversations or text) or `preference` (a better and a worse answer)
            or `judged` (an answer, and whether it is a good one).
        head: which AutoModel every later stage loads (`pipeline.model.HEADS`).
        leaves: what a training makes, and so which stages follow.
        loss: what its loss is counted in.
        sequences: how many the model reads of each row.
        asked: passes over each of them without a gradient, beside the one that is learned from.
    """

    rows: str
    head: str
    leaves: str
    loss: str = "nats a token"
    sequences: int = 1
    asked: int = 0

    @property
    def packs(self) -> bool:
        """Whether several rows can be one: answers that are compared stay apart."""
        return self.rows == "chat"


METHODS = {
    "sft": Method(rows="chat", head="causal", leaves="chat"),
    "dpo": Method(rows="preference", head="causal", leaves="chat", loss="a pair", sequences=2, asked=1),
    "orpo": Method(rows="preference", head="causal", leaves="chat", loss="a pair", sequences=2),
    "kto": Method(rows="judged", head="causal", leaves="chat", loss="an answer", asked=3),
}
