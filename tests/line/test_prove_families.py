"""Families that differ most through the whole line, a tenth of `make prove-sweep`; how tokenizers split, by name."""

from pathlib import Path
from typing import Any

import pytest
from prove_run import REPOSITORY

from bench.families import (
    CORPUS,
    TEMPLATE,
    gpt2_tokenizer,
    llama3_tokenizer,
    qwen_tokenizer,
    split,
    trained_tokenizer,
)
from bench.sweep import lost_of, measured, models, wrong
from convert.llamacpp import CONTRACTIONS, GPT2, convert, pre_tokenizer
from pipeline import UserError

TENTH = ("mistral-0", "gemma2-0", "qwen3-moe-0", "qwen3.5-0", "gemma3-other-layers-0")


@pytest.mark.slow
@pytest.mark.parametrize("name", TENTH)
def test_a_family_is_proved_from_its_base_to_its_server(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [model] = [model for model in models() if model.name == name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the engine is a process of its own
    monkeypatch.setattr("convert.compare.cores", lambda: 1)
    line = measured(model, (model.full, model.served))
    assert wrong(line) == []
    if not lost_of(model.kind) and model.full == "F16":
        assert next(row["kl"] for row in line["rows"] if row["artefact"] == "F16") < 1e-5
    assert list(tmp_path.glob("runs/*/*")) == []


def declared(folder: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "make, name", [(gpt2_tokenizer, "gpt-2"), (llama3_tokenizer, "smaug-bpe"), (qwen_tokenizer, "qwen2")]
)
def test_what_a_tokenizer_declares_has_a_name(make: Any, name: str, tmp_path: Path) -> None:
    assert pre_tokenizer(declared(tmp_path, make(tmp_path))) == name
    assert GPT2.startswith("'s|'t|") and CONTRACTIONS.startswith("(?i:'s|'t|")


def test_a_space_before_the_text_is_refused_as_llama_cpp_adds_none(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    with pytest.raises(UserError, match=r"llama.cpp has no pre-tokenizer that splits by .*add_prefix_space"):
        pre_tokenizer(declared(tmp_path, trained_tokenizer(CORPUS, pre_tokenizers.ByteLevel(add_prefix_space=True))))


@pytest.mark.slow
def test_an_unknown_pattern_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer = trained_tokenizer(CORPUS, split(r"\w+|\W+"))
    tokenizer.chat_template = TEMPLATE
    declared(tmp_path / "model", tokenizer)
    with pytest.raises(UserError, match=r"no pre-tokenizer that splits by .*\\\\w\+"):
        convert(tmp_path / "model", tmp_path / "model.gguf", "F32")
