"""Fine-tune a LoRA adapter on the assistant's words:  python -m train.sft RECIPE

TRL's SFT over packed rows: conversations lie end to end in a row, each with positions of its own, and attend only to
themselves. A killed training goes on from its last whole checkpoint.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import Made, Recipe, Run, UserError, command
from pipeline.error import Stopped
from pipeline.files import fresh_folder, put_in_place, write_whole
from pipeline.rows import heldout
from train.base import parameters
from train.plan import check
from train.space import check_disk
from train.tokens import Tokens, longest_and_sum, row_tokens, tokenized
from train.trackers import prepare, same_run
from train.trainer.checkpoints import open_folder
from train.trainer.divergence import Watch
from train.trainer.journal import Journal
from train.trainer.recovery import recorded

log = logging.getLogger("truetune")
# A change of these goes on from the last checkpoint; so does one of rows whose product with accumulate is the same.
LEARNS_THE_SAME = ("rows", "accumulate", "checkpointing", "checkpoint_minutes", "divergence", "tracker")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def sft(recipe: Recipe, run: Run) -> Made:
    """Write `adapter/` (PEFT) and `answers.jsonl` (the held-out questions answered before and after).

    Raises:
        UserError: the training diverged, or memory or disk do not suffice; the last good checkpoint stays.
        Stopped: by a signal, after a checkpoint.
    """
    check_disk(recipe, parameters(run.path("base")), run.folder)
    key = _training_key(recipe, run)
    trackers = prepare(recipe.train.tracker, run, key)
    resume_from = open_folder(run.path("checkpoints"), key)
    if recipe.train.tracker == "mlflow":
        same_run(run.path("checkpoints", "mlflow.run"), recipe.name)
    with recorded(recipe, run, resume_from) as journal:
        return _train(recipe, run, resume_from, journal, trackers)


def _train(recipe: Recipe, run: Run, resume_from: Path | None, journal: Journal, trackers: list[str]) -> Made:
    from transformers import set_seed

    from train.preview import write_preview
    from train.trainer.curves import Curves, MlflowCurves

    tokens = tokenized(recipe, run)  # before the model takes its memory
    planned = check(recipe, run, tokens.counts)
    tokenizer, model = load_base(recipe, run)
    trainer = make_trainer(recipe, run, tokenizer, model, tokens.datasets, trackers)
    write_preview(recipe, run, tokens, tokenizer, trainer.train_dataset, trainer.args.max_length)
    trainer.check_stops()
    trainer.journal, trainer.pace.full_speed = journal, planned.get("peak_tokens_per_second")
    if recipe.train.tracker != "none":
        trainer.add_callback(Curves(run.path("logs", journal.began())))
    if recipe.train.tracker == "mlflow":
        trainer.add_callback(MlflowCurves())
    questions = heldout(run.path("data"))
    before = _before(trainer, tokenizer, questions, recipe, run.path("checkpoints"))
    log.info("before: validation loss %s, key facts %.0f %%", _loss(before), 100 * before["key_fact_accuracy"])

    if resume_from:
        log.info("going on from %s", resume_from)
    if recipe.train.divergence:
        trainer.watch = Watch(None if recipe.train.label_smoothing else before["validation_loss"])
    set_seed(recipe.seed)  # what was measured before has thrown dice, and is not measured again by who goes on
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    if trainer.stopping.wish:
        at = f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, its checkpoint is saved"
        raise Stopped(f"{at}: 'make train RECIPE={recipe.name}' goes on from there", trainer.stopping.wish)
    after = _measure(trainer, tokenizer, questions, recipe, "after")
    log.info("after: validation loss %s, key facts %.0f %%", _loss(after), 100 * after["key_fact_accuracy"])

    _save_adapter(trainer.model, run)
    _save_answers(run.path("answers.jsonl"), questions, before.pop("answers"), after.pop("answers"))
    return Made(
        outputs=[run.path("adapter"), run.path("answers.jsonl")],
        metrics={"before": before, "after": after, "data": tokens.counts, "packing": _packing(trainer, tokens)}
        | trainer.summary()
        | {"interruptions": journal.interruptions(), "planned": planned, "peak_gpu_bytes": _peak_gpu_bytes()},
        packages=PACKAGES,
    )


def load_base(recipe: Recipe, run: Run) -> tuple[Any, Any]:
    """(tokenizer, model) of the run's base folder, in the type that the tuner trains on.

    Raises:
        UserError: QLoRA without an NVIDIA GPU.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from pipeline.machine import fast_precision

    options: dict[str, Any] = {"dtype": torch.float32}
    if torch.cuda.is_available():
        options |= {"device_map": {"": torch.cuda.current_device()}}
        if fast_precision() == "bfloat16" and recipe.train.precision != "float32":
            options["dtype"] = torch.bfloat16
    if recipe.train.tuner == "qlora":
        if not torch.cuda.is_available():
            raise UserError(
                "train.tuner=qlora needs an NVIDIA GPU, here is none: use train.tuner=lora or a smaller base"
            )
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    return tokenizer, AutoModelForCausalLM.from_pretrained(run.path("base"), **options)


def make_trainer(
    recipe: Recipe, run: Run, tokenizer: Any, model: Any, rows: dict[str, Any], trackers: Sequence[str] = ()
) -> Any:
    """The trainer with the recipe's settings; `rows` maps train and validation to datasets of ids and labels."""
    import torch
    from transformers import PrinterCallback
    from trl import SFTConfig

    from pipeline.machine import fast_precision
    from train.assistant_trainer import AssistantTrainer
    from train.order import curriculum
    from train.trainer.resumable import Often, Patience
    from train.tuners import lora_config

    knobs = recipe.train
    precision = fast_precision() if knobs.precision == "auto" else knobs.precision
    validated = len(rows["validation"]) > 0
    row = row_tokens(*longest_and_sum(rows.values()), knobs.max_tokens)
    settings = SFTConfig(
        output_dir=str(run.path("checkpoints")),
        num_train_epochs=knobs.epochs,
        learning_rate=knobs.learning_rate,
        lr_scheduler_type=knobs.schedule,
        warmup_steps=knobs.warmup,
        max_length=row,
        packing=True,
        pad_to_multiple_of=row,  # rows of one length: oneDNN compiles, and keeps, its kernels for each length
        per_device_train_batch_size=knobs.rows,
        per_device_eval_batch_size=knobs.rows,
        gradient_accumulation_steps=knobs.accumulate,
        gradient_checkpointing=knobs.checkpointing,
        bf16=precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps" if validated else "no",
        save_strategy="steps",
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=validated,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that is no number
        report_to=list(trackers),
        run_name=recipe.name,
        disable_tqdm=True,
        seed=recipe.seed,
        full_determinism=knobs.deterministic,
    )
    callbacks: list[Any] = [Often(knobs.checkpoint_minutes)]
    if validated and knobs.patience:
        callbacks.append(Patience(knobs.patience))
    trainer = AssistantTrainer(
        smoothing=knobs.label_smoothing,
        noise=knobs.neftune,
        model=model,
        args=settings,
        processing_class=tokenizer,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"] if validated else None,
        callbacks=callbacks,
        peft_config=lora_config(recipe, model, list(run.receipt("base").metrics.get("added_tokens", {}).values())),
    )
    trainer.order = curriculum(trainer, knobs.order, run.path("checkpoints", "order.json"))
    trainer.remove_callback(PrinterCallback)
    steps_an_epoch = math.ceil(len(trainer.train_dataset) / (knobs.rows * knobs.accumulate))
    settings.eval_steps = settings.save_steps = math.ceil(steps_an_epoch / knobs.evaluations)
    return trainer


def _peak_gpu_bytes() -> int:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def _packing(trainer: Any, tokens: Tokens) -> dict[str, float]:
    """How full the packed rows are, which TRL fills best-fit, a thousand conversations at a time."""
    rows, length = len(trainer.train_dataset), trainer.args.max_length
    return {"rows": rows, "row_tokens": length, "fill": round(tokens.counts["train"]["tokens"] / (rows * length), 4)}


def _measure(
    trainer: Any, tokenizer: Any, questions: list[dict[str, Any]], recipe: Recipe, when: str
) -> dict[str, Any]:
    """Validation loss, key-fact accuracy and the answers that it was counted in."""
    from pipeline.score import key_fact_accuracy
    from train.scoring.score import answers

    loss = trainer.validation_loss()
    with trainer.autocast_smart_context_manager():
        found = answers(trainer.model, tokenizer, questions, recipe.train.answer_tokens, f"questions, {when}")
    return {
        "validation_loss": loss,
        "key_fact_accuracy": round(key_fact_accuracy(found, questions), 4),
        "answers": found,
    }


def _before(
    trainer: Any, tokenizer: Any, questions: list[dict[str, Any]], recipe: Recipe, checkpoints: Path
) -> dict[str, Any]:
    """What the base scores; measured once, then kept beside the checkpoints for a resumed training."""
    kept = checkpoints / "before.json"
    if not kept.is_file():
        with trainer.model.disable_adapter():  # untrained, it adds nothing but time
            write_whole(kept, json.dumps(_measure(trainer, tokenizer, questions, recipe, "before")))
    loaded: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return loaded


def _training_key(recipe: Recipe, run: Run) -> str:
    """Identifies a training: what of its knobs changes what is learned, its data and its base."""
    from dataclasses import asdict

    knobs = {name: value for name, value in asdict(recipe.train).items() if name not in LEARNS_THE_SAME}
    knobs["rows"] = recipe.train.rows * recipe.train.accumulate
    outputs = [run.receipt(stage).outputs for stage in ("data", "base")]
    return hashlib.sha256(json.dumps([knobs, recipe.seed, outputs]).encode()).hexdigest()


def _save_adapter(model: Any, run: Run) -> None:
    folder = fresh_folder(run.path(".adapter.tmp"))
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(run.path("base"))
    config.target_modules = sorted(config.target_modules)  # a set, which each process would write in another order
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    put_in_place(folder, run.path("adapter"))


def _save_answers(path: Path, questions: list[dict[str, Any]], before: list[str], after: list[str]) -> None:
    rows = [
        {"question": question["messages"][-1]["content"], "facts": question["facts"], "before": old, "after": new}
        for question, old, new in zip(questions, before, after, strict=True)
    ]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _loss(measured: dict[str, Any]) -> str:
    return "not measured" if measured["validation_loss"] is None else f"{measured['validation_loss']:.3f}"


if __name__ == "__main__":
    command("train", sft)
