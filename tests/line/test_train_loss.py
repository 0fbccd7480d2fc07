"""The loss and its gradients: packed as alone, accumulated as at once, on two ranks as on one, in bfloat16 too."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.families import SPECIAL, trained_tokenizer

REPOSITORY = Path(__file__).parents[2]
TOKENS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256} | TOKENS  # fmt: skip
LAYERS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# A window of 4 tokens is far shorter than a conversation; GPT-2 adds learned positions, the others rotate.
ARCHITECTURES = {
    "llama": ("LlamaConfig", SIZES),
    "qwen3": ("Qwen3Config", SIZES),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", SIZES | LAYERS),
    "gpt2": ("GPT2Config", {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0,
                            "embd_pdrop": 0, "attn_pdrop": 0} | TOKENS),
}  # fmt: skip
LENGTHS = (7, 23, 12, 31, 5, 17)  # of the conversations, each with another share that is supervised


@cache
def tokenizer() -> Any:
    return trained_tokenizer(["a corpus"], special=SPECIAL)


def random_rows() -> list[dict[str, list[int]]]:
    import torch

    torch.manual_seed(1)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = [*torch.randint(3, 512, (length - 1,)).tolist(), 2]
        prompt = 1 + number % 4
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A trainer over random rows with the whole of a tiny model as weights to train."""
    monkeypatch.chdir(tmp_path)
    return make_trainer


def make_trainer(
    name: str = "llama", attention: str = "sdpa", rows: list[dict[str, Any]] | None = None, lora: bool = False,
    dropout: float = 0, knobs: dict[str, Any] | None = None, **settings: Any,
) -> Any:  # fmt: skip
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig

    from pipeline.recipe import Train
    from train.methods.sft import Sft
    from train.packing import Layout

    kind, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)  # as sharp as a trained one: what is wrong shows
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=dropout)
    settings = {"packing": True, "max_length": 48, "per_device_train_batch_size": 1} | settings
    return Sft(
        knobs=Train(**knobs or {}),
        layout=Layout(packed=True, why=""),
        model=get_peft_model(model, adapter) if lora else model,
        args=SFTConfig("out", use_cpu=True, report_to="none", disable_tqdm=True, bf16=settings.pop("bf16", False),
                       save_strategy="no", logging_steps=1, **settings),
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list(rows or random_rows()),
        order=Path("order.json"),
    )  # fmt: skip


def gradients(model: Any) -> Any:
    import torch

    found = [weights.grad.flatten() for weights in model.parameters() if weights.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def distance(found: Any, wanted: Any) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # what transformers takes on a CPU; flex has no backward there
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_give_the_loss_and_gradients_of_each_alone(name: str, attention: str, trainer: Callable) -> None:
    import torch

    made = trainer(name, attention)
    packed = made.data_collator([made.train_dataset[index] for index in range(len(made.train_dataset))])
    assert packed["input_ids"].shape == (1, sum(LENGTHS))
    starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert sorted(after - start for start, after in zip(starts, [*starts[1:], sum(LENGTHS)], strict=True)) == sorted(
        LENGTHS
    )
    supervised = torch.tensor(sum(label != -100 for row in random_rows() for label in row["labels"]))

    loss = made.compute_loss(made.model, dict(packed), num_items_in_batch=supervised)
    loss.backward()
    found = gradients(made.model)
    alone = [
        made.compute_loss(
            made.model, {key: torch.tensor([ids]) for key, ids in row.items()}, num_items_in_batch=supervised
        )
        for row in random_rows()
    ]
    sum(alone).backward()
    # float32 sums in another order: 4e-7 was seen.
    assert loss.item() == pytest.approx(sum(alone).item(), rel=1e-5)
    assert distance(found, gradients(made.model)) < 1e-5

    without = {key: value for key, value in packed.items() if key in ("input_ids", "labels")}
    seen = made.compute_loss(made.model, without, num_items_in_batch=supervised)
    seen.backward()
    assert distance(found, gradients(made.model)) > 1e-2, "a neighbour that is seen would be noticed"


def first_step(made: Any) -> Any:
    """The gradients of the first step, as the optimizer gets them."""
    from transformers import TrainerCallback

    taken = []

    class Taker(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            taken.append(gradients(model))

    made.add_callback(Taker())
    made.train()
    return taken[0]


def step_settings(**more: Any) -> dict[str, Any]:
    return {"max_steps": 1, "max_grad_norm": 1e9, "learning_rate": 1e-3, "train_sampling_strategy": "sequential"} | more


@pytest.mark.parametrize("rows", [1, 3])
def test_accumulated_gradients_are_those_of_the_large_batch(rows: int, trainer: Callable) -> None:
    """The rows have from 12 to 47 supervised tokens: a mean of means would be another gradient."""
    pieces = [random_rows()[index] for index in (1, 3, 2, 5, 0, 4)]
    settings = {"packing": False, "padding_free": True, "max_length": None}
    whole = first_step(trainer(rows=pieces, per_device_train_batch_size=6, **settings, **step_settings()))
    parts = trainer(
        rows=pieces,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=6 // rows,
        **settings,
        **step_settings(),
    )
    assert distance(first_step(parts), whole) < 1e-5


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one(tmp_path: Path, trainer: Callable) -> None:
    """Data parallel over gloo: each rank has half of the same global batch, with other supervised counts."""
    import torch

    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = first_step(trainer(**ranked(rows=6)))
    for rank in range(2):
        assert distance(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), one) < 1e-5


def ranked(rows: int) -> dict[str, Any]:
    return step_settings(packing=False, padding_free=True, max_length=None, per_device_train_batch_size=rows)


def test_label_smoothing_is_torch_s_and_only_in_training(trainer: Callable) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    made = trainer(knobs={"label_smoothing": 0.1})
    row = {key: torch.tensor([ids]) for key, ids in random_rows()[3].items()}
    logits = made.model(row["input_ids"]).logits[0, :-1]
    wanted = [cross_entropy(logits, row["labels"][0, 1:], label_smoothing=smoothing).item() for smoothing in (0.1, 0)]
    made.model.train()
    smoothed = made.compute_loss(made.model, row).item()
    made.model.eval()
    assert [smoothed, made.compute_loss(made.model, row).item()] == pytest.approx(wanted, rel=1e-5)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-4)


def test_noise_is_uniform_and_of_each_conversation_s_own_length(trainer: Callable) -> None:
    import torch

    made = trainer(knobs={"neftune": 5.0}, lora=True)
    [packed] = [made.data_collator([made.train_dataset[0]])]
    embedding = made.model.get_input_embeddings()
    made.noise.lengths(packed)
    made.model.eval()
    plain = embedding(packed["input_ids"])
    made.model.train()
    noise = torch.stack([embedding(packed["input_ids"]) - plain for _ in range(300)])[:, 0].detach()
    starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    for first, last in zip(starts, [*starts[1:], None], strict=True):
        part, most = noise[:, first:last], 5.0 / (noise[0, first:last].numel()) ** 0.5
        assert 0.99 * most < part.abs().max() <= most * 1.0001
        assert abs(part.mean()) < 0.01 * most
        assert part.std() == pytest.approx(most / 3**0.5, rel=0.02), "uniform"


def test_noise_changes_what_is_learned_and_not_what_is_measured(trainer: Callable) -> None:
    quiet, loud = trainer(lora=True), trainer(lora=True, knobs={"neftune": 5.0})
    row = quiet.train_dataset[0]
    assert quiet.row_loss(row) == loud.row_loss(row)
    assert distance(first_step(trainer(lora=True, knobs={"neftune": 5.0}, **step_settings())),
                    first_step(trainer(lora=True, **step_settings()))) > 1e-2  # fmt: skip


@pytest.mark.parametrize("order", ["short_first", "easy_first"])
def test_a_curriculum_begins_with_the_easy_rows(order: str, trainer: Callable) -> None:
    made = trainer(lora=True, max_length=32, num_train_epochs=2, knobs={"order": order})
    hardness = {
        "short_first": lambda row: sum(row["seq_lengths"]) / len(row["seq_lengths"]),
        "easy_first": made.row_loss,
    }[order]
    batches = [made.data_collator([made.train_dataset[index]])["input_ids"].tolist() for index in made.order]
    assert [hardness(made.train_dataset[index]) for index in made.order] == sorted(map(hardness, made.train_dataset))
    seen = []
    plain = made.compute_loss
    made.compute_loss = lambda model, inputs, **more: (
        seen.append(inputs["input_ids"].tolist()) or plain(model, inputs, **more)
    )
    made.train()
    assert len(batches) > 2 and seen == batches + batches


def test_random_order_is_another_each_epoch(trainer: Callable) -> None:
    assert trainer().order is None


def test_who_goes_on_keeps_the_order_where_losses_come_out_otherwise(
    trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.methods.sft import Sft

    first = trainer(lora=True, knobs={"order": "easy_first"}).order
    monkeypatch.setattr(Sft, "row_loss", lambda self, row: pytest.fail("measured again"))
    assert first and trainer(lora=True, knobs={"order": "easy_first"}).order == first


def test_in_bfloat16_the_loss_and_the_adapter_are_float32(trainer: Callable) -> None:
    import torch

    made = trainer(lora=True, bf16=True, **step_settings())
    seen = set()
    linear = next(module for name, module in made.model.named_modules() if name.endswith("q_proj.base_layer"))
    linear.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    losses = []
    plain = made.compute_loss
    made.compute_loss = lambda *args, **more: losses.append(plain(*args, **more)) or losses[-1]
    made.train()
    assert seen == {torch.bfloat16}, "the layers compute in bfloat16"
    assert {loss.dtype for loss in losses} == {torch.float32}
    trained = {name: weights.dtype for name, weights in made.model.named_parameters() if weights.requires_grad}
    assert set(trained.values()) == {torch.float32} and all("lora_" in name for name in trained)
    state = made.optimizer.state_dict()["state"]
    assert {value.dtype for weights in state.values() for value in weights.values()} == {torch.float32}


def test_the_loss_of_a_flat_model_is_exact_in_bfloat16(trainer: Callable) -> None:
    """A bfloat16 cross entropy would round ln 512 = 6.2383 to 6.25."""
    import math

    import torch

    made = trainer(lora=True, bf16=True)
    with torch.no_grad():
        for weights in made.model.parameters():
            weights.zero_()
    assert made.row_loss(made.train_dataset[0]) == pytest.approx(math.log(512), abs=1e-5)


def test_a_quantized_base_trains_its_adapter_in_float32(monkeypatch: pytest.MonkeyPatch, trainer: Callable) -> None:
    """TRL rounds the adapter of a 4-bit base to bfloat16; steps smaller than 1/256 of a weight would be lost."""
    import torch
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "is_loaded_in_4bit", True, raising=False)
    made = trainer(lora=True)
    assert {weights.dtype for weights in made.model.parameters() if weights.requires_grad} == {torch.float32}


TRAINING = """
from test_train_loss import make_trainer
noisy = {{"neftune": 5.0}}
made = make_trainer(lora=True, dropout=0.2, knobs=noisy, max_steps=8, seed={seed}, full_determinism={exact})
made.train()
made.save_model("{name}")
"""


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_in_every_process_and_another_others(tmp_path: Path) -> None:
    """With all that throws dice: order, dropout, noise; what makes a GPU deterministic changes nothing on a CPU."""

    def trained(name: str, seed: int = 0, exact: bool = False) -> bytes:
        code = TRAINING.format(name=name, seed=seed, exact=exact)
        path = f"{REPOSITORY}:{REPOSITORY / 'tests'}:{Path(__file__).parent}"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first = trained("first")
    assert trained("again") == first
    assert trained("exact", exact=True) == first
    assert trained("other", seed=1) != first


if __name__ == "__main__":  # one rank of the test above
    import torch

    torch.save(first_step(make_trainer(**ranked(rows=3))), f"rank{os.environ['RANK']}.pt")
