"""One training step against TRL's own, on the same rows:  python -m bench.train [RECIPE]

The peers are `SFTTrainer` with this machine's fast number type and no checkpointing, as its memory and speed guides
advise, and `SFTTrainer` as it comes. Rounds are interleaved, the first is dropped, the ratio of medians is reported;
the losses must agree. Needs `make train` first (base and data of the run). The last line is one JSON document.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict
from typing import Any

from recipe import Recipe, Run, load
from recipe.command import boundary

ROUNDS = 4


def main() -> None:
    recipe = load(sys.argv[1] if len(sys.argv) > 1 else "assistant")
    run = Run(recipe.name)
    run.receipt("train")
    trainers = {"truetune": truetune(recipe, run), "trl tuned": trl(recipe, run, tuned=True)}
    if recipe.train.precision != "float32":
        trainers["trl as it comes"] = trl(recipe, run, tuned=False)
    batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    losses = {}
    for turn in range(ROUNDS + 1):
        for name, trainer in trainers.items():
            trainer.model.zero_grad()
            start = time.perf_counter()
            loss = trainer.training_step(trainer.model, dict(batches[name]))
            if turn:
                seconds[name].append(time.perf_counter() - start)
            losses[name] = float(loss)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<16} {median:6.2f} s a step, loss {losses[name]:.4f}, {median / medians['truetune']:5.2f} x")
    ratios = {name: round(median / medians["truetune"], 3) for name, median in medians.items()}
    print(json.dumps({"tokens_a_step": batches["truetune"]["input_ids"].numel(), "ratios": ratios, "losses": losses}))


def truetune(recipe: Recipe, run: Run) -> Any:
    """The trainer of `make train`, on the run's rows."""
    from train.sft import load_base, make_trainer

    tokenizer, model = load_base(recipe, run)
    return prepared(make_trainer(recipe, run, tokenizer, model, rows(recipe, run, tokenizer)))


def trl(recipe: Recipe, run: Run, tuned: bool) -> Any:
    """TRL's trainer with the same rows, packing and adapter."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from train.precision import fast_precision
    from train.sft import load_base

    tokenizer, model = load_base(recipe, run)
    knobs = recipe.train
    common = {
        "output_dir": str(run.path("bench")),
        "max_length": knobs.max_tokens,
        "packing": True,
        "report_to": "none",
    }
    common |= {"per_device_train_batch_size": knobs.rows, "seed": recipe.seed, "shuffle_dataset": False}
    choices = {"bf16": fast_precision() == "bfloat16", "gradient_checkpointing": False} if tuned else {}
    config = LoraConfig(
        task_type="CAUSAL_LM", r=knobs.lora.rank, lora_alpha=knobs.lora.alpha, target_modules="all-linear"
    )
    dataset = rows(recipe, run, tokenizer)["train"]
    settings = SFTConfig(**common, **choices)
    return prepared(SFTTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer, peft_config=config))


def rows(recipe: Recipe, run: Run, tokenizer: Any) -> dict[str, Any]:
    """The run's training conversations as ids and labels."""
    from datasets import Dataset

    from train.template import examples

    with run.path("data", "train.jsonl").open(encoding="utf-8") as file:
        conversations = [json.loads(line)["messages"] for line in file]
    found = [asdict(e) for m in conversations for e in examples(tokenizer, m, recipe.train.max_tokens)]
    return {"train": Dataset.from_list(found), "validation": []}


def prepared(trainer: Any) -> Any:
    """What `Trainer.train` does before its first step, as far as a step needs it."""
    trainer.create_optimizer_and_scheduler(num_training_steps=ROUNDS + 1)
    trainer.model.train()
    return trainer


if __name__ == "__main__":
    with boundary():
        main()
