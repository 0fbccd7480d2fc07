"""The planner: published figures, exact counts, what fits and what is refused."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import Run, UserError, load
from pipeline.recipe import GPUS
from train import plan
from train.config import read_config
from train.planning.architecture import (
    NF4_BITS,
    architecture,
    cache_bytes,
    checkpoint_bytes,
    state_bytes,
    token_flops,
    training_flops,
)
from train.planning.corpus import supervised_positions
from train.planning.prediction import (
    DEVICES,
    HOLES,
    advice,
    check,
    devices_needed,
    fitting,
    full_speed,
    impossible,
    job,
    memory_bytes,
    place,
    tokens_per_second,
)

REPOSITORY = Path(__file__).parents[2]
LLAMA_2 = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000}
CONFIGS = {
    "llama-2-7b": LLAMA_2 | dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                 num_attention_heads=32),
    "llama-2-13b": LLAMA_2 | dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                  num_attention_heads=40),
    "llama-2-70b": LLAMA_2 | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                  num_attention_heads=64, num_key_value_heads=8),
    "llama-65b": LLAMA_2 | dict(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80,
                                num_attention_heads=64),
    "llama-3.1-8b": LLAMA_2 | dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                   num_attention_heads=32, num_key_value_heads=8),
    "llama-3.1-405b": LLAMA_2 | dict(vocab_size=128256, hidden_size=16384, intermediate_size=53248,
                                     num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8),
    "mixtral-8x7b": dict(model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
                         num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    "qwen3-0.6b": dict(model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, head_dim=128,
                       num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True),
    "gpt2-xl": dict(model_type="gpt2", n_embd=1600, n_layer=48, n_head=25),
    "falcon-7b": dict(model_type="falcon", vocab_size=65024, hidden_size=4544, num_hidden_layers=32, bias=False,
                      num_attention_heads=71, multi_query=True, parallel_attn=True, alibi=False,
                      new_decoder_architecture=False),
    "bloom-176b": dict(model_type="bloom", vocab_size=250880, hidden_size=14336, n_layer=70, n_head=112),
}  # fmt: skip
COUNTS = {  # of the published weights
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-65b": 65_285_660_672,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "gpt2-xl": 1_557_611_200,
    "falcon-7b": 6_921_720_704,
    "bloom-176b": 176_247_271_424,
}


def config(name: str) -> Any:
    from transformers import AutoConfig

    fields = dict(CONFIGS[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A job whose base is a folder with a config.json and nothing else."""

    def make(name: str, *overrides: str) -> Any:
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
        keys = "data: {train: none.jsonl}\nplan: {tokens: 1000000, gpu: a100-80gb}\n"
        Path("mine.yaml").write_text(f"base_model: {folder}\n{keys}")
        recipe = load("mine.yaml", [*overrides])
        return job(recipe, Run("mine"))

    return make


@pytest.mark.parametrize("name", COUNTS)
def test_weights_are_counted_exactly(name: str) -> None:
    assert architecture(config(name)).parameters == COUNTS[name]


def test_a_token_meets_two_of_mixtrals_experts() -> None:
    assert architecture(config("mixtral-8x7b")).active == 12_879_925_248  # "12.9B" in its paper


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """7.5 billion weights on 64 GPUs: arXiv 1910.02054, figure 1, whose digits are the tolerance."""
    held = state_bytes(7_500_000_000, 7_500_000_000, 0, "full", 2, devices=64, zero=stage)
    assert sum(held.values()) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_qlora_of_65_billion_weights_fits_48_gb(planned: Callable) -> None:
    """arXiv 2305.14314: from more than 780 GB to less than 48, with rank 64 on every linear layer, rows of 512."""
    of = planned("llama-65b", "train.tuner=qlora", "train.lora.rank=64", "train.gradient_checkpointing=true",
                 "train.max_length=512")  # fmt: skip
    assert 16 * of.base.parameters > 780e9
    assert 33e9 < sum(memory_bytes(of, place(of.recipe)).values()) < 48 * 2**30
    saved = (4.5 - NF4_BITS) / 8 * of.base.parameters
    assert saved / 1e9 == pytest.approx(3, abs=0.1), "what the second quantization saves at 65B"


def test_lora_of_gpt_3_is_that_of_its_paper() -> None:
    """arXiv 2106.09685: rank 4 on q and v of 96 layers of 12288; 350 GB of VRAM, 35 MB of adapter, 1.2 TB in full."""
    trained = 96 * 2 * 2 * 4 * 12288
    assert trained == 18_874_368
    assert trained * 2 / 2**20 == pytest.approx(35, rel=0.03)
    held = state_bytes(175_000_000_000, trained, 0, "lora", 2)
    assert sum(held.values()) / 1e9 == pytest.approx(350, rel=0.01)


def test_bloom_took_months_on_384_gpus() -> None:
    """The log of BigScience: 2.3 TB a checkpoint (of 2**40), 366 billion tokens at 150 TFLOP/s with recomputation."""
    of = architecture(config("bloom-176b"))
    assert checkpoint_bytes(of.parameters, of.parameters, "full", 2) / 2**40 == pytest.approx(2.3, rel=0.03)
    held = state_bytes(of.parameters, of.parameters, 0, "full", 2)
    assert sum(held.values()) / 1e12 == pytest.approx(2.82, rel=0.01)
    flops = training_flops(token_flops(of, 2048, 1.0), "full", checkpointing=True)
    days = 366e9 * flops / (384 * 150e12) / 86400
    assert days == pytest.approx(105, rel=0.05)  # 11 March to early July with its pauses


def test_inference_of_7_billion_weights_takes_12_to_20_gb() -> None:
    of = config("llama-2-7b")
    assert 12e9 < 2 * architecture(of).parameters + cache_bytes(of, 4096) < 20e9


@pytest.mark.parametrize(
    ("name", "bytes_a_token"),
    [
        ("llama-2-7b", 524_288),
        ("llama-2-70b", 327_680),  # 8 groups for 64 heads
        ("falcon-7b", 8_192),  # one group
        ("qwen3-0.6b", 114_688),  # heads wider than hidden / heads
    ],
)
def test_the_cache_is_that_of_the_groups(name: str, bytes_a_token: int) -> None:
    assert cache_bytes(config(name), 1) == bytes_a_token


def test_a_full_tuning_of_7_billion_weights_needs_16_bytes_each(planned: Callable) -> None:
    of = planned("llama-2-7b")
    held = memory_bytes(of, place(of.recipe), "full")
    assert held["weights"] + held["gradients"] + held["optimizer"] == 16 * COUNTS["llama-2-7b"]
    spread = memory_bytes(of, replace(place(of.recipe), devices=8, zero=3), "full")
    assert spread["optimizer"] == held["optimizer"] / 8 and spread["gradients"] == held["gradients"] / 8
    gathered = spread["weights"] - held["weights"] / 8
    assert gathered == pytest.approx(2 * held["weights"] / 32, rel=0.05), "the layer that computes and the next"


@pytest.mark.parametrize(
    ("name", "tuner", "gpu", "fits"),
    [
        ("llama-2-7b", "lora", "rtx-4090", True),
        ("llama-2-7b", "full", "a100-80gb", False),
        ("llama-2-70b", "qlora", "rtx-4090", False),
        ("llama-2-70b", "qlora", "a6000", True),
        ("llama-2-70b", "lora", "a100-80gb", False),
        ("llama-3.1-8b", "qlora", "rtx-3060", True),
    ],
)
def test_what_fits_is_what_people_train(name: str, tuner: str, gpu: str, fits: bool, planned: Callable) -> None:
    of = planned(name, f"plan.gpu={gpu}", "train.gradient_checkpointing=true", "train.max_length=512")
    at = place(of.recipe)
    assert (sum(memory_bytes(of, at, tuner).values()) <= at.memory) is fits


def test_the_adapter_is_pefts(planned: Callable) -> None:
    from peft import LoraConfig, get_peft_model

    from pipeline.model import on_meta

    of = planned("qwen3-0.6b")
    model = get_peft_model(on_meta(config("qwen3-0.6b")), LoraConfig(r=16, target_modules="all-linear"))
    real = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    assert of.rehearsal(place(of.recipe), "lora", of.recipe.train).trained == real


def test_checkpointing_saves_and_longer_rows_cost(planned: Callable) -> None:
    of = planned("qwen3-0.6b")
    at, knobs = place(of.recipe), of.recipe.train
    held = {
        key: memory_bytes(of, at, knobs=replace(knobs, **change))["activations and logits"]
        for key, change in {
            "now": {}, "recomputed": {"gradient_checkpointing": True},
            "short": {"max_length": 256}, "two": {"batch_size": 2},
        }.items()
    }  # fmt: skip
    assert held["recomputed"] < held["now"] / 2 and held["short"] < held["now"] / 3
    assert held["two"] == pytest.approx(2 * held["now"], rel=0.1)


def test_a_layer_keeps_as_much_as_was_measured(planned: Callable) -> None:
    """28 copies of its input for Llama-3.1-8B, 20 to 50 for others (ml-engineering, training/performance)."""
    of = planned("llama-3.1-8b")
    less = replace(of, config=copy.deepcopy(of.config), rehearsed={})
    less.config.num_hidden_layers -= 1
    peak, without = (each.rehearsal(place(of.recipe), "full", of.recipe.train).bytes for each in (of, less))
    assert 20 < (peak - without) / (1024 * of.base.width * 2) < 35


def test_a_job_that_is_too_large_is_refused_with_what_fits(planned: Callable) -> None:
    of = planned("llama-3.1-8b", "plan.gpu=rtx-4090", "train.max_length=4096", "train.batch_size=4")
    said = impossible(of, place(of.recipe))
    assert re.fullmatch(
        r"training needs [\d.]+\WGB a device, rtx-4090 has 25\WGB: "
        r"SET='train\.batch_size=1 train\.gradient_accumulation=4 train\.gradient_checkpoint.*' fits.*",
        said,
    )
    changes = said.partition("SET='")[2].partition("'")[0].split()
    assert not impossible(planned("llama-3.1-8b", "plan.gpu=rtx-4090", *changes), place(of.recipe))


def test_the_smallest_device_count_holds_it(planned: Callable) -> None:
    of = planned("llama-3.1-405b", "train.tuner=qlora", "train.gradient_checkpointing=true")
    at = devices_needed(of, of.recipe, "h100-80gb")
    assert at and at.zero == 3 and at.devices == 4  # 209 GB in 4 bits


def test_an_hour_has_its_price(planned: Callable) -> None:
    of = planned("llama-2-7b", "plan.efficiency=0.5", "plan.price=2")
    at = place(of.recipe)
    speed, told = tokens_per_second(of, at)
    flops = training_flops(token_flops(of.base, 1024, 0.5), "lora", False)
    assert speed == pytest.approx(0.5 * DEVICES["a100-80gb"].bfloat16 / flops) and told == "50% of 312 TFLOP/s"
    assert plan._cost(at, 3600) == ", 2.00 USD"


def test_a_packaged_gguf_is_read_by_its_header() -> None:
    of = architecture(read_config(load("assistant", []), Run("nowhere")))
    assert (of.parameters, of.depth, of.width, of.vocabulary) == (134_515_008, 30, 576, 49152)


REFUSED = {
    "an encoder": (
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        r"\(BertForMaskedLM\), an encoder, which",
    ),
    "an encoder for search": ({"model_type": "bert", "architectures": ["BertModel"]}, "an encoder, which reads text"),
    "code of its own": (
        LLAMA_2 | {"auto_map": {"AutoConfig": "a.B"}},
        "asks to run the model's own code .* never done",
    ),
    "an unknown kind by its own code": ({"model_type": "nonesuch", "auto_map": {"AutoConfig": "a.B"}}, "never done"),
    "a translator": ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "which does not generate"),
    "an unknown kind": ({"model_type": "nonesuch"}, "its config is not understood"),
    "no kind": ({}, "its config is not understood"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_generates_no_text_is_refused(what: str, tmp_path: Path) -> None:
    fields, said = REFUSED[what]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=said):
        read_config(load("tiny", [f"base_model={tmp_path}"]), Run("nowhere"))


def test_a_folder_without_a_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        read_config(load("tiny", [f"base_model={tmp_path}"]), Run("nowhere"))


def test_a_truncated_gguf_is_told(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    with pytest.raises(UserError, match=r"cut\.gguf is not a whole GGUF"):
        read_config(load("tiny", [f"base_model={tmp_path / 'cut.gguf'}"]), Run("nowhere"))


def test_the_gpus_of_the_recipe_are_those_of_the_table() -> None:
    assert GPUS.split() == list(DEVICES)


def test_supervised_positions_are_filled_up_to_eighths() -> None:
    assert [supervised_positions(256, share) for share in (0.0, 0.3, 0.4, 1.0)] == [32, 128, 160, 256]


def plan_of(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "train.plan", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_page_goes_to_stdout_and_a_refusal_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama-3.1-405b"]))
    done = plan_of("tiny", f"base_model={tmp_path}", "plan.gpu=t4", "plan.tokens=1000")
    assert done.returncode == 1 and "405,853,388,800 weights" in done.stdout and "to rent" in done.stdout
    assert re.match(r"error: training needs [\d.]+\WTB a device, t4 has 16\WGB: .*\n$", done.stderr)


def test_training_stores_what_it_was_planned_to_take(trained: Any) -> None:
    metrics = trained.receipt("train")["metrics"]
    peak = metrics["planned"]["peak_tokens_per_second"]
    assert metrics["planned"].keys() - {"memory_bytes", "tokens", "tokens_per_second", "seconds"} == {
        "peak_tokens_per_second"
    }
    assert metrics["mfu"] == pytest.approx(metrics["tokens_per_second"] / peak, rel=0.05, abs=1e-3)
    assert metrics["planned"]["tokens"] == pytest.approx(metrics["tokens"], rel=0.01)


def test_what_checkpointing_computes_again_does_not_count_as_training(planned: Callable) -> None:
    plain, again = planned("llama-2-7b"), planned("llama-2-7b", "train.gradient_checkpointing=true")
    at = place(plain.recipe)
    assert full_speed(plain, at) == full_speed(again, at)
    assert full_speed(plain, at) == pytest.approx(312e12 / (4 * 6.6e9), rel=0.05)  # LoRA: 2 FLOPs a weight, twice


def test_fewer_rows_at_once_learn_the_same(planned: Callable) -> None:
    of = planned(
        "llama-2-7b",
        "train.batch_size=8",
        "train.gradient_accumulation=2",
        "train.max_length=2048",
        "train.gradient_checkpointing=true",
    )
    small = replace(place(of.recipe), memory=30e9)
    assert fitting(of, small)[:2] == ["train.batch_size=1", "train.gradient_accumulation=16"]


def test_training_that_cannot_fit_stops_before_weights_are_loaded(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.planning.prediction.free_bytes", lambda: 600e6)
    counts = {"train": {"tokens": 9000, "supervised_tokens": 3000, "longest": 100}, "validation": {"tokens": 0}}
    with pytest.raises(
        UserError, match=r"training needs \d+\WMB a device, this machine's processor has 600\WMB: .*FORCE=1"
    ):
        check(trained.recipe, trained.run, counts)
    monkeypatch.setenv("FORCE", "1")
    assert check(trained.recipe, trained.run, counts)["memory_bytes"] > 600e6
    assert advice(trained.recipe, trained.run).startswith("use a base of at most")


@pytest.mark.slow
def test_the_peak_is_the_planned_one(tmp_path: Path) -> None:
    """Within 15 %, in a process of its own, as `make train` runs it."""
    assert HOLES["processor"] == 1.25
    for name in (".cache", "convert", "pipeline", "recipes", "setup", "train"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    overrides = ["train.epochs=0.05", "train.max_new_tokens=2"]
    for module in ("train.data", "train.base", "train.run"):
        subprocess.run([sys.executable, "-m", module, "assistant", *overrides], cwd=tmp_path, check=True, timeout=600)
    receipt = Run("assistant", tmp_path / "runs").receipt("train")
    assert receipt.peak_rss_bytes == pytest.approx(receipt.metrics["planned"]["memory_bytes"], rel=0.15)
