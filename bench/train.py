"""Training by LoRA beside what a user would pick instead, on the same conversations:  python -m bench.train [RECIPE]

The peers are TRL's `SFTTrainer` and transformers' `Trainer` (rows padded, lengths grouped, four a step), each with this
machine's fast number type and without checkpointing, as their guides to speed and memory advise. Two sets: the recipe's
conversations, and lengths up to 1,024 tokens of which most are short. In each round every trainer passes once over the
set at a learning rate of zero; the first round is dropped. All must learn from as many tokens, and the mean loss must
be the same. Beside wall time, processor seconds are told, for a machine that is not idle, and each round's speed of a
matrix product. Needs `make train` first (base and data of the run). The last line is one JSON document.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

from pipeline import Recipe, Run, UserError, load
from pipeline.command import boundary
from pipeline.machine import machine

ROUNDS = 6
CONVERSATIONS = 48
SKEWED = (1024, 384, 256, 192, 160, 128, 96, 96, *[64] * 6, *[40] * 10)  # tokens; the mean is a tenth of the longest
SAME_LOSS = 1e-3  # relative: float32 in other orders differs by 1e-6, a token that is missed by more than this


@dataclass
class Pass:
    """One pass over the set: seconds of its steps by the clock and of the processors, tokens learned, their loss."""

    wall: float = 0.0
    processor: float = 0.0
    learned: int = 0
    losses: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return sum(self.losses) / self.learned


def main() -> None:
    recipe = load(sys.argv[1] if len(sys.argv) > 1 else "assistant")
    run = Run.of(recipe)
    run.receipt("train")
    rows = tokenized_rows(recipe, run)
    sets = {"recipe": (rows[:CONVERSATIONS], recipe.train.max_length), "skewed": (skewed(rows), SKEWED[0])}
    found = {}
    for name, (chosen, longest) in sets.items():
        knobs = replace(recipe.train, max_length=longest, learning_rate=1e-9, early_stopping_patience=0)
        found[name] = compared(name, chosen, replace(recipe, train=knobs), run)
    print(json.dumps({"machine": machine(), "sets": found}))


def compared(name: str, rows: list[dict[str, Any]], recipe: Recipe, run: Run) -> dict[str, Any]:
    """Medians of each trainer over the rounds.

    Raises:
        UserError: one learned from other tokens, or its loss is another.
    """
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[..., Any]] = {"truetune": truetune, "trl": trl, "trainer": plain}
        trainers = {peer: make(recipe, run, rows, folder) for peer, make in makers.items()}
        passes: dict[str, list[Pass]] = {peer: [] for peer in trainers}
        products = []
        for _ in range(ROUNDS):
            products.append(product_speed())
            for peer, trainer in trainers.items():
                passes[peer].append(one_pass(trainer))
    wanted = passes["truetune"][0]
    for peer, each in passes.items():
        if each[0].learned != wanted.learned or abs(each[0].loss / wanted.loss - 1) > SAME_LOSS:
            both = f"{each[0].learned} tokens at a loss of {each[0].loss:.5f}, {wanted.learned} at {wanted.loss:.5f}"
            raise UserError(f"{name}: {peer} and truetune do not learn the same: {both}")
    tokens, result = sum(len(row["input_ids"]) for row in rows), {}
    for peer, each in passes.items():
        walls, processors = [one.wall for one in each[1:]], [one.processor for one in each[1:]]
        ratios = [other.processor / own.processor for other, own in zip(each, passes["truetune"], strict=True)][1:]
        result[peer] = {
            "tokens_a_second": round(tokens / statistics.median(walls), 1),
            "least_wall_seconds": round(min(walls), 3),
            "processor_seconds": round(statistics.median(processors), 3),
            "times_truetune": round(statistics.median(ratios), 3),
        }
        print(f"{name:<8} {peer:<9} {result[peer]['tokens_a_second']:8.1f} tokens/s, "
              f"{result[peer]['processor_seconds']:7.2f} processor seconds, {result[peer]['times_truetune']:5.2f} x "
              f"truetune's, loss {each[0].loss:.5f}", flush=True)  # fmt: skip
    return {"tokens": tokens, "gflop_a_second": [round(speed, 1) for speed in products], "trainers": result}


def one_pass(trainer: Any) -> Pass:
    """Train one epoch, counting in its steps alone."""
    from transformers import TrainerCallback

    found, step = Pass(), trainer.training_step

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.wall += time.perf_counter() - self.began[0]
            found.processor += time.process_time() - self.began[1]

    def counted(model: Any, inputs: dict[str, Any], number: Any = None) -> Any:
        learned, loss = int((inputs["labels"][:, 1:] != -100).sum()), step(model, inputs, number)
        found.learned += learned
        found.losses.append(float(loss) * learned)
        return loss

    watch = Watch()
    trainer.add_callback(watch)
    trainer.training_step = counted
    trainer.train()
    trainer.training_step = step
    trainer.remove_callback(watch)
    return found


def tokenized_rows(recipe: Recipe, run: Run) -> list[dict[str, Any]]:
    """The run's training conversations as ids and labels."""
    from train.tokens import tokenized

    rows = tokenized(recipe, run).datasets["train"]
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]


def skewed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conversations of these lengths, of the words of those rows, one after another."""
    ids, labels = (iter([*chain(*(row[name] for row in rows))]) for name in ("input_ids", "labels"))
    return [{"input_ids": list(islice(ids, size)), "labels": list(islice(labels, size))} for size in SKEWED]


def truetune(recipe: Recipe, run: Run, rows: list[dict[str, Any]], folder: str) -> Any:
    """The trainer of `make train`."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from train.methods.sft import trainer
    from train.tuners import model_to_train

    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    datasets = {"train": Dataset.from_list(rows), "validation": []}
    return quiet(trainer(recipe, run, tokenizer, model_to_train(recipe, run), datasets))


def trl(recipe: Recipe, run: Run, rows: list[dict[str, Any]], folder: str) -> Any:
    """TRL's trainer with packing."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from train.tuners import base_to_train

    settings = SFTConfig(packing=True, max_length=recipe.train.max_length, gradient_checkpointing=False,
                         per_device_train_batch_size=recipe.train.batch_size, **common(recipe, folder))  # fmt: skip
    model, tokenizer = base_to_train(recipe, run), AutoTokenizer.from_pretrained(run.path("base"))
    more = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer, "peft_config": lora(recipe)}
    return quiet(SFTTrainer(model, settings, **more))


def plain(recipe: Recipe, run: Run, rows: list[dict[str, Any]], folder: str) -> Any:
    """transformers' trainer, four conversations of like length a step."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from train.tuners import base_to_train

    settings = TrainingArguments(
        per_device_train_batch_size=4, train_sampling_strategy="group_by_length", **common(recipe, folder)
    )
    model, tokenizer = (
        get_peft_model(base_to_train(recipe, run), lora(recipe)),
        AutoTokenizer.from_pretrained(run.path("base")),
    )
    collator = DataCollatorForSeq2Seq(tokenizer)
    return quiet(Trainer(model, settings, train_dataset=Dataset.from_list(rows), data_collator=collator))


def common(recipe: Recipe, folder: str) -> dict[str, Any]:
    """What both peers are told."""
    import torch

    from pipeline.machine import fast_precision

    return {
        "output_dir": folder,
        "learning_rate": recipe.train.learning_rate,
        "seed": recipe.seed,
        "bf16": fast_precision() == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
    }


def lora(recipe: Recipe) -> Any:
    from peft import LoraConfig

    knobs = recipe.train.lora
    return LoraConfig(task_type="CAUSAL_LM", r=knobs.rank, lora_alpha=knobs.alpha, target_modules="all-linear")


def quiet(trainer: Any) -> Any:
    """The trainer for one epoch that leaves nothing behind."""
    from transformers.trainer import DEFAULT_CALLBACKS, ProgressCallback

    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) not in DEFAULT_CALLBACKS:
            trainer.remove_callback(callback)
    trainer.remove_callback(ProgressCallback)
    trainer.args.num_train_epochs, trainer.args.logging_steps, trainer.args.disable_tqdm = 1, 1, True
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    return trainer


def product_speed(size: int = 1024, times: int = 8) -> float:
    """GFLOP a second of a float32 matrix product, the best of some."""
    import torch

    one, other = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        one @ other
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


if __name__ == "__main__":
    with boundary():
        main()
