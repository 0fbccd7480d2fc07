"""One training step against TRL's own, on the same rows:  python -m bench.train [RECIPE]

The peers are `SFTTrainer` with this machine's fast number type and no checkpointing, as its memory and speed guides
advise, and `SFTTrainer` as it comes. Rounds are interleaved, the first step of each is dropped, the ratio of medians is
reported; the losses must agree, since rows, seed, order and learning rate are the same. Needs `make train` first (base
and data of the run). The last line is one JSON document.
"""

import json
import statistics
import sys
import time
from typing import Any

from pipeline import Recipe, Run, load
from pipeline.command import boundary

ROUNDS, STEPS = 2, 4


def main() -> None:
    recipe = load(sys.argv[1] if len(sys.argv) > 1 else "assistant")
    run = Run.of(recipe)
    run.receipt("train")
    trainers = {"truetune": truetune(recipe, run), "trl tuned": trl(recipe, run, tuned=True)}
    if recipe.train.precision != "float32":
        trainers["trl as it comes"] = trl(recipe, run, tuned=False)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    losses = {}
    for _ in range(ROUNDS):
        for name, trainer in trainers.items():
            times, losses[name] = steps(trainer)
            seconds[name] += times[1:]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: round(median / medians["truetune"], 3) for name, median in medians.items()}
    for name, median in medians.items():
        print(f"{name:<16} {median:6.2f} s a step, {ratios[name]:5.2f} x, losses {losses[name]}")
    print(json.dumps({"seconds_a_step": medians, "ratios": ratios}))


def steps(trainer: Any) -> tuple[list[float], list[float]]:
    """(seconds, loss) of each of the first steps."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.start)

    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    trainer.remove_callback(watch)
    return times, [round(row["loss"], 3) for row in trainer.state.log_history if "loss" in row]


def truetune(recipe: Recipe, run: Run) -> Any:
    """The trainer of `make train`, on the run's rows."""
    from transformers import AutoTokenizer

    from train.methods.sft import trainer
    from train.tuners import model_to_train

    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    return prepared(trainer(recipe, run, tokenizer, model_to_train(recipe, run), rows(recipe, run)))


def trl(recipe: Recipe, run: Run, tuned: bool) -> Any:
    """TRL's trainer with the same rows, packing and adapter."""
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from pipeline.machine import fast_precision
    from train.tuners import base_to_train

    tokenizer, model = AutoTokenizer.from_pretrained(run.path("base")), base_to_train(recipe, run)
    knobs = recipe.train
    common = {
        "output_dir": str(run.path("bench")),
        "max_length": knobs.max_length,
        "packing": True,
        "report_to": "none",
    }
    common |= {
        "per_device_train_batch_size": knobs.batch_size,
        "seed": recipe.seed,
        "use_cpu": not torch.cuda.is_available(),
    }
    common |= {
        "learning_rate": knobs.learning_rate,
        "lr_scheduler_type": knobs.lr_scheduler,
        "warmup_steps": knobs.warmup_ratio,
    }
    choices = {"bf16": fast_precision() == "bfloat16", "gradient_checkpointing": False} if tuned else {}
    config = LoraConfig(
        task_type="CAUSAL_LM", r=knobs.lora.rank, lora_alpha=knobs.lora.alpha, target_modules="all-linear"
    )
    dataset = rows(recipe, run)["train"]
    settings = SFTConfig(**common, **choices)
    return prepared(SFTTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer, peft_config=config))


def rows(recipe: Recipe, run: Run) -> dict[str, Any]:
    """The run's training conversations as ids and labels."""
    from train.tokens import tokenized

    return {"train": tokenized(recipe, run).datasets["train"], "validation": []}


def prepared(trainer: Any) -> Any:
    """The trainer for a few steps that leave nothing behind; its weights go on from round to round."""
    from transformers.trainer import DEFAULT_CALLBACKS, ProgressCallback

    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) not in DEFAULT_CALLBACKS:
            trainer.remove_callback(callback)
    trainer.remove_callback(ProgressCallback)
    trainer.args.max_steps, trainer.args.logging_steps = STEPS, 1
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    return trainer


if __name__ == "__main__":
    with boundary():
        main()
