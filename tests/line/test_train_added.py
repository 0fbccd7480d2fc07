"""A base without a chat template, or without the template's tokens: they are added, trained, merged and proved."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from prove_run import Proved

from bench.families import CORPUS, trained_tokenizer
from pipeline.files import fingerprint
from train.tokenizer import DEFAULT, prepare_tokenizer

pytest_plugins = ["prove_fixtures"]
NEW = {"<|im_start|>": 512, "<|im_end|>": 513}
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def write_plain(folder: Path, tied: bool = True) -> None:
    """A Llama of random weights that knows nothing of chats."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=512, max_position_embeddings=2048, tie_word_embeddings=tied, pad_token_id=0, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    trained_tokenizer(CORPUS, special=["<pad>", "<s>", "</s>"]).save_pretrained(folder)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    write_plain(tmp_path / "plain")
    return tmp_path / "plain"


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def test_a_base_without_a_template_is_given_chatml(
    base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    before = fingerprint(folder / "model.safetensors")
    with caplog.at_level(logging.INFO, "truetune"):
        prepared = prepare_tokenizer(folder, None)
    assert (prepared.end_of_turn, prepared.added) == ("<|im_end|>", {})
    assert fingerprint(folder / "model.safetensors") == before, "its vocabulary has the tokens"
    assert (folder / "chat_template.jinja").read_text() == DEFAULT.read_text()
    assert "it has no chat template, so it is given ChatML: the key 'chat_template' names another" in caplog.text


def test_tokens_that_the_vocabulary_lacks_are_added_with_the_mean_of_the_others(
    plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from transformers import AutoTokenizer

    before = weights(plain)
    with caplog.at_level(logging.INFO, "truetune"):
        assert prepare_tokenizer(plain, None).added == NEW
    after, tokenizer = weights(plain), AutoTokenizer.from_pretrained(plain)
    assert tokenizer("<|im_start|>user", add_special_tokens=False).input_ids[0] == 512
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 513)
    assert json.loads((plain / "config.json").read_text())["vocab_size"] == 514
    assert set(after) == set(before), "tied embeddings stay tied"
    old, new = before.pop("model.embed_tokens.weight"), after.pop("model.embed_tokens.weight")
    assert torch.equal(new[:512], old)
    torch.testing.assert_close(new[512:], old.mean(0).expand(2, -1))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert "<|im_start|>, <|im_end|> are new to its vocabulary: their embeddings are trained too" in caplog.text


def test_rows_to_spare_are_taken_and_an_output_matrix_gets_its_own(tmp_path: Path) -> None:
    import torch

    write_plain(tmp_path / "plain", tied=False)
    tokenizer = trained_tokenizer(CORPUS[:3], special=["<pad>", "<s>", "</s>"])
    tokenizer.save_pretrained(tmp_path / "plain")
    before, ids = weights(tmp_path / "plain"), list(range(len(tokenizer), len(tokenizer) + 2))
    assert ids[-1] < 512
    assert list(prepare_tokenizer(tmp_path / "plain", None).added.values()) == ids
    after = weights(tmp_path / "plain")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == before[name].shape
        torch.testing.assert_close(after[name][ids], before[name][: ids[0]].mean(0).expand(2, -1))


def test_another_template_s_tokens_are_added_too(plain: Path) -> None:
    (plain.parent / "gemma.jinja").write_text(GEMMA)
    prepared = prepare_tokenizer(plain, str(plain.parent / "gemma.jinja"))
    assert (prepared.end_of_turn, list(prepared.added)) == ("<end_of_turn>", ["<start_of_turn>", "<end_of_turn>"])


def test_a_template_whose_end_the_base_knows_adds_nothing(plain: Path) -> None:
    template = GEMMA.replace("<end_of_turn>", "</s>")
    (plain.parent / "mine.jinja").write_text(template)
    prepared = prepare_tokenizer(plain, str(plain.parent / "mine.jinja"))
    assert (prepared.end_of_turn, prepared.added) == ("</s>", {})


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_are_trained_merged_and_proved(tied: bool, untrained: Proved) -> None:
    import torch

    write_plain(Path("small"), tied)
    own = fingerprint(Path("small/model.safetensors"))
    untrained.make("data", "base", "train", "reference", "merge", "gguf")
    assert fingerprint(Path("small/model.safetensors")) == own, "the user's file is not the one that grew"
    assert untrained.run.receipt("base").metrics["added_tokens"] == NEW
    base, merged = weights(untrained.run.path("base")), weights(untrained.run.path("merged"))
    names = ["model.embed_tokens.weight"] if tied else ["lm_head.weight", "model.embed_tokens.weight"]
    assert set(base) == set(merged) and sorted(name for name in merged if "embed" in name or "head" in name) == names
    for name in names:
        assert torch.equal(merged[name][:512], base[name][:512])
        assert ((merged[name][512:] - base[name][512:]).abs().amax(1) > 1e-4).all(), "both tokens were trained"
    assert {name: row.problems for name, row in untrained.comparisons().items()} == {"merge": [], "F16": [], "Q8_0": []}


def test_vllm_is_not_asked_to_apply_an_adapter_with_new_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from pipeline import Recipe, Run, UserError
    from pipeline.run import Receipt
    from serve.engines.vllm import model_of

    monkeypatch.chdir(tmp_path)
    recipe, run = Recipe("line"), Run("line")
    recipe = replace(recipe, serve=replace(recipe.serve, vllm=replace(recipe.serve.vllm, adapter=True)))
    run.write_receipt(Receipt("base", {}, {}, {}, {}, {"added_tokens": NEW}, "2026-01-01T00:00:00+00:00", 0.0, 0))
    with pytest.raises(
        UserError, match=r"^serve\.vllm\.adapter: vLLM applies no adapter with new tokens \(<\|im_start"
    ):
        model_of(recipe, run)
