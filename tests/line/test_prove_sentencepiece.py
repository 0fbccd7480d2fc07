"""The whole line with families whose tokenizers SentencePiece trained.

The tokenizers are trained here and saved as such families are released, with tokenizer.model beside tokenizer.json.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from prove_run import CORPUS, Proved

pytest_plugins = ["prove_fixtures"]
pytestmark = pytest.mark.slow

HARD = ["def f(x):\n\tif x:\n\t\treturn  {'a': [1, 2]}", "Größe naïve Ελλάδα Привет שלום", "你好 请用一句话介绍你自己",
        "1234567890 10,000.50 I'm sure they'll say it's what you've done"]  # fmt: skip
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else "
    "message['role']) + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA = (  # drops a system prompt in silence
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.08}  # fmt: skip
GEMMA_SIZES = SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}


def train(folder: Path, **options: Any) -> Any:
    """A tokenizer.model in the folder, and its processor."""
    import sentencepiece

    made = io.BytesIO()
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, *HARD]), model_writer=made, vocab_size=480, byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", character_coverage=0.98, split_digits=True,
        allow_whitespace_only_pieces=True, hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())


def opened(folder: Path, template: str, **settings: Any) -> Any:
    from transformers import AutoTokenizer

    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def gemma_tokenizer(folder: Path) -> Any:
    """Turn tokens and whitespace as user-defined symbols, no space before the first word."""
    from tokenizers import AddedToken

    turns = ["<start_of_turn>", "<end_of_turn>"]
    train(folder, model_type="bpe", add_dummy_prefix=False, user_defined_symbols=[*turns, "\n\n", "▁▁"], pad_id=0,
          eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>")  # fmt: skip
    tokenizer = opened(folder, GEMMA, tokenizer_class="GemmaTokenizer", bos_token="<bos>", eos_token="<eos>",
                       pad_token="<pad>", unk_token="<unk>", additional_special_tokens=turns)  # fmt: skip
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("\n\n", "▁▁")])
    return tokenizer


def phi_tokenizer(folder: Path) -> Any:
    """Turn tokens beyond the vocabulary that swallow the space after them."""
    size = train(folder, model_type="bpe").vocab_size()
    names = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    added = {
        str(size + index): {"content": name, "lstrip": False, "rstrip": index > 0, "normalized": False,
                            "single_word": False, "special": True}
        for index, name in enumerate(names)
    }  # fmt: skip
    return opened(folder, PHI, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token=names[0],
                  pad_token=names[0], unk_token="<unk>", legacy=False, added_tokens_decoder=added)  # fmt: skip


def llama_tokenizer(folder: Path) -> Any:
    train(folder, model_type="bpe")
    return opened(folder, LLAMA, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>",
                  pad_token="<unk>", unk_token="<unk>", legacy=False)  # fmt: skip


def without_bos(folder: Path) -> Any:
    """A tokenizer that starts every text with its BOS under a template that writes none."""
    tokenizer = phi_tokenizer(folder)
    tokenizer.add_bos_token = True
    return tokenizer


FAMILIES = {
    "Gemma2": (gemma_tokenizer, GEMMA_SIZES | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    "Gemma3Text": (gemma_tokenizer, GEMMA_SIZES | {"num_hidden_layers": 7}),  # the sixth attends to everything
    "Phi3": (phi_tokenizer, SIZES | {"original_max_position_embeddings": 2048}),
    "Llama": (llama_tokenizer, SIZES),
    "Mistral": (without_bos, SIZES | {"sliding_window": None}),
}


def write_base(family: str, folder: Path) -> None:
    import torch
    import transformers

    make, sizes = FAMILIES[family]
    tokenizer = make(folder)
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer) + 8, **ids, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_proved_from_its_base_to_its_server(family: str, untrained: Proved) -> None:
    write_base(family, untrained.folder / "small")
    untrained.make("data", "base", "train", "reference", "merge", "gguf")
    rows = untrained.comparisons()
    assert {name: row.problems for name, row in rows.items()} == {"merge": [], "F16": [], "Q8_0": []}
    assert rows["F16"].measures["divergence_mean"] < 1e-5
    assert untrained.served().problems == []


def test_layers_that_attend_as_no_released_model_does_are_noticed(untrained: Proved) -> None:
    """llama.cpp knows Gemma 3's pattern by heart and ignores what the config says."""
    write_base("Gemma3Text", untrained.folder / "small")
    config = json.loads((untrained.folder / "small/config.json").read_text())
    config["layer_types"] = ["full_attention", *["sliding_attention"] * 6]
    (untrained.folder / "small/config.json").write_text(json.dumps(config))
    untrained.make("data", "base", "train", "reference", "merge", "gguf")
    rows = untrained.comparisons()
    assert rows["merge"].problems == []
    assert rows["F16"].problems[0].startswith("logits: ")
