"""The merge: the same logits as base and adapter, and a refusal where they are not."""

import math
from collections.abc import Callable
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
from conftest import MODEL_FILES

from convert.merge import BOUNDS, all_logits, check, compare, merge, probe_ids
from pipeline import UserError
from pipeline.rows import rows

TEXT = "The cat says its name. 世界 and 😀, twice: 1234567890"


def model_of(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_merged_has_these_files(merged: Any) -> None:
    assert merged.files("merged") == MODEL_FILES


def test_nothing_half_made_is_left(merged: Any) -> None:
    assert [path.name for path in merged.run.folder.iterdir() if path.name.startswith(".")] == [".lock"]


def test_the_merged_weights_give_the_adapter_s_logits(merged: Any, tokenizer: Any) -> None:
    import torch
    from peft import PeftModel

    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    base = model_of(merged.run.path("base")).eval()
    with torch.inference_mode():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, merged.run.path("trained")).eval()(ids).logits
        found = model_of(merged.run.path("merged")).eval()(ids).logits
    assert (found - adapted).norm() / adapted.norm() < 1e-5, "float32 rounding gives 3e-7"
    assert (plain - adapted).norm() / adapted.norm() > 0.1, "the adapter does something"


def test_the_merged_weights_are_float32_and_differ_from_the_base(merged: Any) -> None:
    import torch

    base, found = (model_of(merged.run.path(name)).state_dict() for name in ("base", "merged"))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert set(base) == set(found)
    moved = {name for name in found if not torch.equal(base[name], found[name])}
    assert moved == {name for name in found if "_proj" in name}


def test_the_settings_of_the_base_are_taken_byte_for_byte(merged: Any) -> None:
    for name in MODEL_FILES - {"config.json", "model.safetensors"}:
        assert merged.run.path("merged", name).read_bytes() == merged.run.path("base", name).read_bytes()


def test_the_receipt_tells_how_near_it_came(merged: Any) -> None:
    metrics = merged.receipt("merge")["metrics"]
    assert metrics["relative_error"] < metrics["relative_error_bound"] == BOUNDS["float32"]
    assert metrics["effect_of_training"] > 0.1
    assert metrics["top1_agreement"] == 1.0
    assert metrics["probe_tokens"] > 100


def test_bfloat16_is_written_where_it_is_asked_for(trained: Any) -> None:
    from safetensors import safe_open

    recipe = changed(trained.recipe, merge=changed(trained.recipe.merge, precision="bfloat16"))
    merge(recipe, trained.run)
    with safe_open(trained.run.path("merged", "model.safetensors"), "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_an_adapter_that_changes_nothing_is_refused(trained: Any, replace: Callable[[Path, bytes], None]) -> None:
    from safetensors.torch import load, save

    path = trained.run.path("trained", "adapter_model.safetensors")
    tensors = load(path.read_bytes())
    metadata = {"format": "pt"}
    replace(path, save({name: t * 0 if "lora_B" in name else t for name, t in tensors.items()}, metadata))
    with pytest.raises(UserError) as raised:
        merge(trained.recipe, trained.run)
    assert str(raised.value) == (
        "training changed no logit of the base, so nothing was learned: train longer or faster"
    )
    assert not trained.run.path("merged").exists()


def test_a_tampered_adapter_stops(
    trained: Any, replace: Callable[[Path, bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained.run.path("trained", "adapter_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    replace(path, bytes(content))
    with pytest.raises(SystemExit) as raised:
        trained.make("merge")
    assert raised.value.code == 1
    assert capsys.readouterr().err == (
        f"error: {path} is not what 'train' wrote, its sha256 differs: "
        "delete runs/line/train.json and run 'make train RECIPE=line.yaml'\n"
    )
    assert not trained.run.receipt_path("merge").exists()


def test_a_lost_adapter_would_be_noticed(trained: Any, tokenizer: Any) -> None:
    from peft import PeftModel

    probes = probe_ids(tokenizer, trained.run.path("data"))
    base = model_of(trained.run.path("base"))
    plain = all_logits(base, probes)
    adapted = all_logits(PeftModel.from_pretrained(base, trained.run.path("trained")), probes)
    for precision in BOUNDS:
        with pytest.raises(
            UserError, match=r"^the merged logits differ from the trained model's by .*: set merge\.precision="
        ):
            check(compare(plain, adapted), compare(plain, adapted), precision)


@pytest.mark.parametrize("error", [1.01e-4, 1.0, math.inf, math.nan])
def test_an_error_beyond_the_bound_is_refused(error: float) -> None:
    with pytest.raises(UserError, match=r"allowed: 0\.0001"):
        check({"relative_error": error}, {"relative_error": 1.0}, "float32")


def test_an_error_within_the_bound_passes() -> None:
    check({"relative_error": 0.99e-4}, {"relative_error": 1.0}, "float32")


def test_logits_are_compared_by_norm_and_first_choice() -> None:
    import torch

    wanted = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    found = torch.tensor([[3.0, 0.0], [5.0, 4.0]])
    assert compare(found, wanted) == {"relative_error": 1.0, "top1_agreement": 0.5}
    assert compare(wanted, wanted) == {"relative_error": 0.0, "top1_agreement": 1.0}


def test_the_probes_are_whole_conversations_of_the_validation_split_first(trained: Any, tokenizer: Any) -> None:
    probes = probe_ids(tokenizer, trained.run.path("data"))
    [row] = rows(trained.run.path("data"), "validation", first=1)
    assert len(probes) == 4 and all(10 < len(probe) <= 128 for probe in probes)
    assert row["messages"][0]["content"] in tokenizer.decode(probes[0])
