"""What a training that ended badly tells: what happened, from where it goes on, and which key to change to what."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import Recipe, Run, UserError
from pipeline.error import Stopped
from pipeline.machine import free_bytes, resident_bytes
from pipeline.units import size
from train.plan import advice
from train.trainer.checkpoints import set_aside_from, step_of
from train.trainer.divergence import Diverged, sources
from train.trainer.journal import OUT_OF_MEMORY, Journal
from train.trainer.shortage import is_shortage

SOURCES_SHOWN = 10
SMALLER = 3  # a learning rate that diverges is mostly some times too large

log = logging.getLogger("truetune")


@contextmanager
def recorded(recipe: Recipe, run: Run, resume_from: Path | None) -> Iterator[Journal]:
    """Keep the journal of a training, and turn what ends it into a UserError that says what to do."""
    journal = Journal(run.path("checkpoints"))
    if died := journal.start(step_of(resume_from) if resume_from else 0):
        change = f": {advice(recipe, run)}, or it may happen again" if died == OUT_OF_MEMORY else ""
        log.warning("the last training ended without a word, %s%s", died, change)
    try:
        yield journal
    except Stopped as stopped:
        journal.end(signal.Signals(stopped.code - 128).name)
        raise
    except Diverged as diverged:
        journal.end("diverged")
        raise _astray(diverged, recipe, run) from None
    except BaseException as error:
        if not is_shortage(error):
            journal.end(type(error).__name__)
            raise
        journal.end(OUT_OF_MEMORY)
        held = f"{size(resident_bytes()[0])} held, {size(free_bytes())} free"
        raise UserError(f"out of memory while training ({held}): {advice(recipe, run)}, and run again") from None
    journal.end("finished")


def _astray(diverged: Diverged, recipe: Recipe, run: Run) -> UserError:
    """The step, its measures and its conversations; checkpoints that were written astray are set aside."""
    from transformers import AutoTokenizer

    from pipeline.rows import rows
    from train.template import row_examples

    good = set_aside_from(run.path("checkpoints"), diverged.first)
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))

    def ids_of(row: dict[str, object]) -> list[list[int]]:
        return [example.input_ids for example in row_examples(tokenizer, row, recipe.train.max_tokens)]

    places = sources(diverged.batches, rows(run.path("data"), "train"), ids_of)
    more = f" and {len(places) - SOURCES_SHOWN} more" if len(places) > SOURCES_SHOWN else ""
    read = f"its conversations are {', '.join(places[:SOURCES_SHOWN])}{more}" if places else "its batch was not found"
    measures = f"loss {diverged.loss:.4g}, gradient norm {diverged.gradient:.4g}, learning rate {diverged.rate:.2g}"
    kept = f"{good} is the last good checkpoint" if good else "there is no checkpoint before it"
    lower = f"set train.learning_rate={recipe.train.learning_rate / SMALLER:.1g} or lower"
    return UserError(
        f"the training diverged at step {diverged.step}: {diverged.why} ({measures}; {kept}): {lower}, look at the "
        "conversations of that step, or go on regardless with train.divergence=false",
        f"step {diverged.step}: {read}",
    )
