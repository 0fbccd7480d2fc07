"""Packing is checked: what reads otherwise in a packed row is padded, and learns what it does alone."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.families import SPECIAL, trained_tokenizer
from pipeline import Recipe, Run, UserError
from train import packing
from train.packing import Layout, carries_state, compared, expected, layout_of, padded_to, told

TOKENS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256} | TOKENS  # fmt: skip
HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | TOKENS
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
STATE = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}
PACKS = {"Llama": GROUPED, "Qwen3": GROUPED, "Gemma3Text": GROUPED | {"sliding_window": 4}}
TAKES_NO_POSITIONS = {"Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2} | TOKENS}
LOOKS_AS_IF = {  # takes positions, and lets conversations see each other all the same
    "Falcon": HEADS | {"alibi": False},
    "Falcon, alibi": HEADS | {"alibi": True},
    "OPT": HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "max_position_embeddings": 256},
    "GptOss": GROUPED | EXPERTS,
}
CARRIES_STATE = {
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8} | TOKENS,
    "Lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
    "FalconH1": GROUPED | STATE,
    "Qwen3_5Text": GROUPED | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
}
DOES_NOT = TAKES_NO_POSITIONS | LOOKS_AS_IF | CARRIES_STATE
SIZES = (9, 23, 14, 5, 31, 17)
CONVERSATIONS = [[3 + (7 * at + size) % 500 for at in range(size - 1)] + [2] for size in SIZES]
ROWS = [
    {"input_ids": ids, "labels": [-100] * (2 + number // 2) + ids[2 + number // 2 :]}
    for number, ids in enumerate(CONVERSATIONS)
]


def config(name: str) -> Any:
    import transformers

    return getattr(transformers, f"{name.partition(',')[0]}Config")(**(PACKS | DOES_NOT)[name])


def model(name: str, precision: str = "float32") -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(name), dtype=getattr(torch, precision))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # bfloat16 rounds a packed row otherwise than its parts
@pytest.mark.parametrize("name", PACKS)
def test_a_base_that_keeps_conversations_apart_packs(name: str, precision: str) -> None:
    found = compared(model(name, precision), CONVERSATIONS[:3])
    assert found.packed and found.difference is not None
    assert found.difference < {"float32": 1e-5, "bfloat16": 0.02}[precision]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DOES_NOT)
def test_a_base_that_does_not_is_found(name: str, precision: str) -> None:
    found = compared(model(name, precision), CONVERSATIONS[:3])
    assert not found.packed
    assert found.difference is None or found.difference > 1e-3
    assert "off by" in found.why or "fails on a packed row" in found.why


def test_the_comparison_leaves_the_model_as_it_was() -> None:
    import torch

    of, state = model("Llama").train(), torch.get_rng_state()
    compared(of, CONVERSATIONS[:3])
    assert of.training and torch.equal(torch.get_rng_state(), state)


def test_weights_that_are_no_numbers_are_told_before_the_first_step() -> None:
    of = model("Llama")
    of.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="weights hold NaN or infinity"):
        compared(of, CONVERSATIONS[:3])


@pytest.mark.parametrize(
    ("names", "packed", "why"),
    [
        (PACKS | LOOKS_AS_IF, True, "compared with its conversations alone before the first step"),
        (TAKES_NO_POSITIONS, False, "takes no positions"),
        (CARRIES_STATE, False, "carry a state"),
    ],
)
def test_what_a_config_tells_is_known_before(names: dict[str, Any], packed: bool, why: str, tmp_path: Path) -> None:
    for name in names:
        found = expected(Recipe("a"), Run("a", tmp_path), config(name))
        assert (found.packed, why in found.why) == (packed, True), name
        assert carries_state(config(name)) is (name in CARRIES_STATE)


def padded_trainer(of: Any, batch_size: int, **settings: Any) -> Any:
    """A trainer of all weights, one step after another in the data's order, without clipping, decay or schedule."""
    from datasets import Dataset
    from trl import SFTConfig

    from pipeline.recipe import Train
    from train.methods.sft import Sft

    settings = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1} | settings
    settings |= {"max_grad_norm": 1e9, "lr_scheduler_type": "constant", "learning_rate": 1e-3, "num_train_epochs": 1}
    settings |= {"train_sampling_strategy": "sequential", "dataset_kwargs": {"skip_prepare_dataset": True}}
    rows = {"max_length": max(SIZES), "pad_to_multiple_of": padded_to(False, max(SIZES))}
    return Sft(
        knobs=Train(early_stopping_patience=0),
        layout=Layout(packed=False, why="as told"),
        model=of,
        args=SFTConfig("out", use_cpu=True, bf16=False, per_device_train_batch_size=batch_size, **rows, **settings),
        processing_class=trained_tokenizer(["a corpus"], special=SPECIAL),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:3]),
    )  # fmt: skip


def supervised(row: dict[str, list[int]]) -> int:
    return sum(label != -100 for label in row["labels"])


def alone(row: dict[str, list[int]]) -> dict[str, Any]:
    import torch

    return {key: torch.tensor([ids]) for key, ids in row.items()} | {"use_cache": False}


def plain_losses(of: Any, rows_a_step: int) -> list[float]:
    """A loop over transformers' own loss of each row alone, without a mask, weighed by its tokens."""
    import torch

    optimizer = torch.optim.AdamW(of.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    of.train()
    for first in range(0, len(ROWS), rows_a_step):
        step = ROWS[first : first + rows_a_step]
        each = [of(**alone(row)).loss * supervised(row) / sum(map(supervised, step)) for row in step]
        sum(each).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(loss.item() for loss in each))
    return losses


@pytest.mark.parametrize(("batch_size", "accumulated"), [(2, 1), (1, 3)])
@pytest.mark.parametrize("name", ["Llama", *DOES_NOT])
def test_padded_rows_train_to_the_loss_of_plain_transformers(
    name: str, batch_size: int, accumulated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    made, plain = padded_trainer(model(name), batch_size, gradient_accumulation_steps=accumulated), model(name)
    made.train()
    found = [row["loss"] for row in made.state.log_history if "loss" in row]
    # float32 sums in another order, which Adam's first steps enlarge: 2e-5 was seen.
    assert found == pytest.approx(plain_losses(plain, batch_size * accumulated), rel=1e-4)
    plain.eval()
    with torch.inference_mode():
        wanted = [plain(**alone(row)).loss.item() * supervised(row) for row in ROWS[:3]]
    assert made.validation_loss() == pytest.approx(sum(wanted) / sum(map(supervised, ROWS[:3])), rel=1e-4)


def test_what_is_padding_is_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = padded_trainer(model("Llama"), 2)
    made.train()
    metrics = made.summary()
    widths = [24, 14, 32]  # of each pair the longer one, up to even numbers
    assert metrics["tokens"] == sum(SIZES)
    assert metrics["padding_tokens"] == 2 * sum(widths) - sum(SIZES)
    assert metrics["packing"] == {
        "packed": False, "why": "as told", "difference": None, "rows": 6, "row_tokens": 31,
        "fill": round(sum(SIZES) / (2 * sum(widths)), 4),
    }  # fmt: skip


def test_a_row_that_accelerate_repeats_is_padding() -> None:
    import torch

    from train.trainer.journal import conversations
    from train.trainer.metrics import Pace

    pace, ids = Pace(), torch.arange(10).reshape(2, 5)
    labels = torch.tensor([[-100, 1, 2, -100, -100], [-100] * 5])
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])}
    pace.count(batch)
    assert (pace.tokens, pace.supervised, pace.padding) == (3, 2, 7)
    assert conversations(batch) == [(0, 1, 2), (5, 6, 7, 8)]


@pytest.fixture
def on(based: Any) -> Callable[..., Any]:
    """The workplace with another base, small and random, and more keys of `train`."""

    def change(name: str, **knobs: Any) -> Any:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(based.run.path("base"))
        ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        made = transformers.AutoModelForCausalLM.from_config(
            type(config(name))(
                **(PACKS | DOES_NOT)[name] | {"vocab_size": len(tokenizer), "max_position_embeddings": 2048} | ids
            )
        )
        made.save_pretrained("folder")
        tokenizer.save_pretrained("folder")
        keys = "".join(f", {key}: {value}" for key, value in knobs.items())
        text = Path("line.yaml").read_text().replace("base_model: random", "base_model: folder")
        Path("line.yaml").write_text(text.replace("max_new_tokens: 4", f"max_new_tokens: 4{keys}"))
        return based

    return change


@pytest.mark.parametrize(
    ("name", "knobs", "why"),
    [
        pytest.param("Falcon", {"tuner": "full"}, "in a packed row its logits are off by", marks=pytest.mark.slow),
        pytest.param("Bloom", {"batch_size": 2}, "it takes no positions", marks=pytest.mark.slow),
        pytest.param(
            "Mamba", {"tuner": "dora"}, "its layers carry a state from token to token", marks=pytest.mark.slow
        ),
        ("Llama", {"packing": "off", "order": "short_first", "neftune": 5.0}, "train.packing=off"),
    ],
)
def test_a_padded_training_tells_so(
    name: str, knobs: dict[str, Any], why: str, on: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    place = on(name, **knobs)
    with caplog.at_level(logging.INFO, "truetune"):
        place.make("base", "train")
    metrics = place.receipt("train")["metrics"]
    counts = metrics["data"]["train"]
    assert not metrics["packing"]["packed"] and why in metrics["packing"]["why"]
    assert f"rows are padded, each is one conversation, batch_size={knobs.get('batch_size', 1)} a step" in caplog.text
    assert metrics["packing"]["rows"] == counts["examples"]
    assert metrics["tokens"] == 2 * counts["tokens"] and metrics["supervised_tokens"] == 2 * counts["supervised_tokens"]
    assert metrics["steps"] == 2 * -(-counts["examples"] // knobs.get("batch_size", 1))
    assert metrics["after"]["validation_loss"] < metrics["before"]["validation_loss"]
    shown = json.loads(place.run.path("tokens", "preview.json").read_text())["packing"]
    assert shown == metrics["packing"]


def test_a_base_that_packs_is_packed_and_its_receipt_tells(trained: Any) -> None:
    told = trained.receipt("train")["metrics"]["packing"]
    assert told["packed"] and told["difference"] < 1e-5 and told["why"].endswith("its conversations alone")


def test_on_is_refused_before_the_first_step(on: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    place = on("Falcon", packing="on")
    place.make("base")
    with pytest.raises(SystemExit):
        place.make("train")
    assert (
        "error: train.packing=on: base 'folder' cannot pack, in a packed row its logits are off by"
        in capsys.readouterr().err
    )
    assert not list(place.run.path("checkpoints").glob("checkpoint-*"))


def test_on_is_refused_at_base_where_the_config_tells(on: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    place = on("Bloom", packing="on")
    with pytest.raises(SystemExit):
        place.make("base")
    assert "error: train.packing=on: base 'folder' cannot pack, it takes no positions" in capsys.readouterr().err


def test_who_resumes_keeps_the_layout(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = trained.recipe, trained.run
    monkeypatch.setattr(packing, "compared", lambda *_: Layout(packed=False, why="another device finds otherwise"))
    rows = [{"input_ids": [1, 2, 3]}]
    assert layout_of(recipe, run, None, rows).packed
    base = run.receipt("base")
    other = {path: mark | {"sha256": "0"} for path, mark in base.outputs.items()}
    run.write_receipt(replace(base, outputs=other))
    assert expected(recipe, run, config("Llama")).why.startswith("one packed row is compared")
    off = replace(recipe, train=replace(recipe.train, packing="off"))
    assert layout_of(off, run, None, rows) == Layout(packed=False, why="train.packing=off")


def test_the_share_that_is_no_padding_is_of_batches_in_the_data_s_order() -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [1] * length} for length in (5, 8, 32, 16)])
    padded = told(Layout(packed=False, why=""), rows, 32, batch_size=2)
    assert padded["fill"] == round(61 / (2 * 8 + 2 * 32), 4)
    assert told(Layout(packed=True, why=""), rows, 32, batch_size=2)["fill"] == round(61 / (16 + 48), 4)
