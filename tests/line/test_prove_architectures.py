"""Other families, with tokenizers trained here, as GGUF files."""

from pathlib import Path
from typing import Any

import pytest
from prove_run import CORPUS, REPOSITORY, TEMPLATE, trained_tokenizer

from convert.llamacpp import CONTRACTIONS, GPT2, NAMES, pre_tokenizer
from pipeline import UserError

TEXTS = [
    "<|im_start|>user\nI'M sure they'll say 1234567890 <|im_end|>\n\n\n  x\t\ty\r\n",
    "Größe Ελλάδα Привет שלום 你好, 🙂 👩\u200d👩\u200d👧 a.b,c;d 3.14  ",
]
QWEN2 = next(patterns[0] for (patterns, _), name in NAMES.items() if name == "qwen2")
LLAMA3 = next(patterns[0] for (patterns, _), name in NAMES.items() if name == "smaug-bpe")
SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GPT_2_SIZES = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "n_ctx": 256,
               "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

LINEAR = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "head_dim": 256,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip


def split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


FAMILIES = {
    "Llama": (LLAMA3, SIZES, "smaug-bpe"),
    "Mistral": (None, SIZES | {"sliding_window": None}, "gpt-2"),
    "Qwen2": (QWEN2, SIZES, "qwen2"),
    "Qwen3": (QWEN2, SIZES | {"head_dim": 32}, "qwen2"),
    "Qwen3_5Text": (QWEN2, SIZES | LINEAR, "qwen2"),
    "GPT2": (None, GPT_2_SIZES, "gpt-2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_keeps_its_tokens_and_logits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import transformers

    from convert.evaluator import Evaluator
    from convert.llamacpp import convert

    pattern, sizes, name = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokenizer = trained_tokenizer([*CORPUS, *TEXTS], split(pattern) if pattern else None)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert pre_tokenizer(tmp_path / "model") == name
    monkeypatch.chdir(REPOSITORY)  # where .cache is
    convert(tmp_path / "model", tmp_path / "model.gguf", "F32")
    with Evaluator(tmp_path / "model.gguf", 256) as evaluator:
        asked = []
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert evaluator.tokens(text) == ids
            asked.append((ids, list(range(len(ids)))))
        for (ids, _), found in zip(asked, evaluator.logits(asked), strict=True):
            with torch.inference_mode():
                wanted = model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(torch.from_numpy(found), wanted, atol=2e-3, rtol=1e-3)


def declared(folder: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_gpt2s_own_way_is_known(tmp_path: Path) -> None:
    assert pre_tokenizer(declared(tmp_path, trained_tokenizer(CORPUS))) == "gpt-2"
    assert GPT2.startswith("'s|'t|") and CONTRACTIONS.startswith("(?i:'s|'t|")


def test_a_space_before_the_text_is_refused_as_llama_cpp_adds_none(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    with pytest.raises(UserError, match=r"llama.cpp has no pre-tokenizer that splits by .*add_prefix_space"):
        pre_tokenizer(declared(tmp_path, trained_tokenizer(CORPUS, pre_tokenizers.ByteLevel(add_prefix_space=True))))


@pytest.mark.slow
def test_an_unknown_pattern_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from convert.llamacpp import convert

    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")
    tokenizer = trained_tokenizer(CORPUS, split(r"\w+|\W+"))
    tokenizer.chat_template = TEMPLATE
    declared(tmp_path / "model", tokenizer)
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match=r"no pre-tokenizer that splits by .*\\\\w\+"):
        convert(tmp_path / "model", tmp_path / "model.gguf", "F32")
