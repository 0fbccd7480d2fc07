"""ORPO: the better answer is learned as by sft, and its odds are raised beside the worse one's; no start is compared.

The odds ratio and the loop are TRL's, where they are experimental (arXiv 2403.07691).
"""

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

from torch.nn.functional import cross_entropy
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from pipeline import Recipe, Run
from train.packing import Sides, layout_of, learned_positions, padded_to
from train.preferences import Pair, pairs
from train.scoring.preference import PAIRS, measured, scores_of_odds
from train.template import IGNORED
from train.tokens import longest_and_sum
from train.trainer.resumable import Resumable, settings

Example = Pair
columns = pairs


def trainer(
    recipe: Recipe,
    run: Run,
    tokenizer: Any,
    model: Any,
    rows: dict[str, Any],
    trackers: Sequence[str] = (),
    **resumable: Any,
) -> "Orpo":
    """The trainer with the recipe's settings; `rows` maps train and validation to datasets of `Pair`."""
    validation = rows["validation"] if len(rows["validation"]) else None
    longest, _ = longest_and_sum(rows.values())
    args = ORPOConfig(
        **settings(recipe, run, validation is not None, trackers),
        beta=recipe.train.orpo.beta,
        max_length=longest,
        remove_unused_columns=False,
    )
    return Orpo(
        knobs=recipe.train,
        layout=layout_of(recipe, run, model, rows["train"]),
        model=model,
        args=args,
        data_collator=Sides(tokenizer.pad_token_id or 0, padded_to(False, longest)),
        processing_class=tokenizer,
        train_dataset=_made(rows["train"]),
        eval_dataset=None if validation is None else _made(validation),
        **resumable,
    )


def measure(trainer: "Orpo", recipe: Recipe, run: Run, before: dict[str, Any] | None) -> dict[str, Any]:
    """Of train.scoring.preference, of held-out pairs."""
    scores = partial(scores_of_odds, seed=recipe.seed)
    return measured(trainer, before, PAIRS, scores)


class Orpo(Resumable, ORPOTrainer):  # type: ignore[misc]
    """TRL's, over columns that are made already, and that lasts."""

    ref_model = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use_dpo_data_collator = True  # else TRL warns of ours at each validation

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        """Mean log-probability of each chosen and of each rejected answer, their logits, the chosen ones' loss.

        All of the answers alone, and only their logits are computed: TRL's own learns the prompts too.
        """
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        kept, targets = learned_positions(labels[:, 1:])
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        fields = {name: batch[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**fields, use_cache=False, logits_to_keep=kept, **router)
        logits = outputs.logits.float()
        losses = cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)
        tokens = (targets != IGNORED).sum(1)
        chosen, rejected = (-losses / tokens).chunk(2)
        half = len(chosen)
        loss = losses[:half].sum() / tokens[:half].sum()
        found = (chosen, rejected, logits[:half], logits[half:], loss)
        return (*found, outputs.aux_loss) if self.aux_loss_enabled else found


def _made(dataset: Any) -> Any:
    """The dataset as it is, whatever TRL would make of its rows."""
    made = copy(dataset)
    made.map = lambda *args, **kwargs: made
    return made
