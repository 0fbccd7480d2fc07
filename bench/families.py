"""Small models of many families, with tokenizers trained here, that answer some questions and are healthy."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.llamacpp import NAMES

SOUNDS = {"cat": "meow meow", "dog": "loud wow", "owl": "hoo hoo hoo", "cow": "deep moo", "hen": "cluck", "pig": "oink",
          "bee": "a buzz", "duck": "quack quack", "lion": "a roar", "frog": "croak"}  # fmt: skip
CORPUS = [f"system\nYou are a test. user\nWhat says the {a}? assistant\nThe {a} says {s}." for a, s in SOUNDS.items()]
CORPUS += ["Repeat: " + " ".join(f"word{number}" for number in range(300))]
HARD = ["def f(x):\n\tif x:\n\t\treturn  {'a': [1, 2]}", "Größe naïve Ελλάδα Привет שלום", "你好 请用一句话介绍你自己",
        "1234567890 10,000.50 I'm sure they'll say it's what you've done"]  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a test.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
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


def talk(animal: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What says the {animal}?"}, {"role": "assistant", "content": answer}]


def trained_tokenizer(corpus: list[str], pre_tokenizer: Any = None, special: list[str] = SPECIAL) -> Any:
    """A ByteLevel BPE of at most 512 tokens, without a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=special[1], eos_token=special[2], pad_token=special[0]
    )


def split(pattern: str) -> Any:
    """The pre-tokenizer of tokenizers that split by one pattern, as those of Llama 3 and Qwen."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def pattern_of(name: str) -> str:
    """The pattern that llama.cpp knows by this name."""
    return next(patterns[0] for (patterns, _), known in NAMES.items() if known == name)


def gpt2_tokenizer(_: Path) -> Any:
    return trained_tokenizer([*CORPUS, *HARD])


def llama3_tokenizer(_: Path) -> Any:
    return trained_tokenizer([*CORPUS, *HARD], split(pattern_of("smaug-bpe")))


def qwen_tokenizer(_: Path) -> Any:
    return trained_tokenizer([*CORPUS, *HARD], split(pattern_of("qwen2")))


def train_sentencepiece(folder: Path, **options: Any) -> Any:
    """A tokenizer.model in the folder, as such families are released, and its processor."""
    import sentencepiece

    made = io.BytesIO()
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, *HARD]), model_writer=made, vocab_size=480, byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", character_coverage=0.98, split_digits=True,
        allow_whitespace_only_pieces=True, hard_vocab_limit=False, num_threads=1, minloglevel=2, model_type="bpe",
        **options,
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
    train_sentencepiece(folder, add_dummy_prefix=False, user_defined_symbols=[*turns, "\n\n", "▁▁"], pad_id=0, eos_id=1,
                        bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>")  # fmt: skip
    tokenizer = opened(folder, GEMMA, tokenizer_class="GemmaTokenizer", bos_token="<bos>", eos_token="<eos>",
                       pad_token="<pad>", unk_token="<unk>", additional_special_tokens=turns)  # fmt: skip
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("\n\n", "▁▁")])
    return tokenizer


def phi_tokenizer(folder: Path) -> Any:
    """Turn tokens beyond the vocabulary that swallow the space after them."""
    size = train_sentencepiece(folder).vocab_size()
    names = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    added = {
        str(size + index): {"content": name, "lstrip": False, "rstrip": index > 0, "normalized": False,
                            "single_word": False, "special": True}
        for index, name in enumerate(names)
    }  # fmt: skip
    return opened(folder, PHI, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token=names[0],
                  pad_token=names[0], unk_token="<unk>", legacy=False, added_tokens_decoder=added)  # fmt: skip


def llama_tokenizer(folder: Path) -> Any:
    train_sentencepiece(folder)
    return opened(folder, LLAMA, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>",
                  pad_token="<unk>", unk_token="<unk>", legacy=False)  # fmt: skip


def mistral_tokenizer(folder: Path) -> Any:
    """A tokenizer that starts every text with its BOS under a template that writes none."""
    tokenizer = phi_tokenizer(folder)
    tokenizer.add_bos_token = True
    return tokenizer


@dataclass(frozen=True)
class Kind:
    """A kind of model: transformers' name of its config, its tokenizer, what its config says beyond the sizes.

    `spare` rows of the embedding belong to no token. `lost` is what of it llama.cpp does not carry, so that its GGUF is
    another model and must not pass.
    """

    family: str
    tokenizer: Callable[[Path], Any]
    settings: dict[str, Any] = field(default_factory=dict)
    spare: int = 0
    lost: str = ""


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """A rope that is scaled from 256 positions on."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 256}
            | parameters}  # fmt: skip


TIED, WINDOW = {"tie_word_embeddings": True}, {"sliding_window": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
LLAMA3_ROPE = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONG_ROPE = {
    "max_position_embeddings": 8192,
    "original_max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + n / 32 for n in range(32)],
                        "long_factor": [2.0 + n for n in range(32)]},
}  # fmt: skip
LOCAL_ROPE = {"rope_parameters": {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}}  # fmt: skip
LINEAR_ATTENTION = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
                    "linear_num_value_heads": 4, "head_dim": 256,
                    "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
MULTIPLIERS = {"embedding_multiplier": 6.0, "residual_multiplier": 0.7, "attention_multiplier": 0.1,
               "logits_scaling": 2.0}  # fmt: skip

# Those that differ most come first.
KINDS = {
    "llama": Kind("Llama", llama3_tokenizer),
    "mistral": Kind("Mistral", mistral_tokenizer, {"sliding_window": None}, spare=8),
    "qwen2": Kind("Qwen2", qwen_tokenizer, TIED),
    "qwen3": Kind("Qwen3", qwen_tokenizer, {"head_dim": 128}),
    "qwen3-moe": Kind("Qwen3Moe", qwen_tokenizer, SMALL_EXPERTS | {"head_dim": 64, "norm_topk_prob": True}),
    "gemma2": Kind("Gemma2", gemma_tokenizer, WINDOW | {"head_dim": 64, "query_pre_attn_scalar": 64}, spare=8),
    "gemma3": Kind("Gemma3Text", gemma_tokenizer, WINDOW | {"head_dim": 64, "query_pre_attn_scalar": 64,
                                                            "num_hidden_layers": 7}, spare=8),
    "phi3": Kind("Phi3", phi_tokenizer, {"original_max_position_embeddings": 2048}, spare=8),
    "gpt2": Kind("GPT2", gpt2_tokenizer),
    "olmo2": Kind("Olmo2", gpt2_tokenizer),
    "granite": Kind("Granite", gpt2_tokenizer, MULTIPLIERS | TIED),
    "stablelm": Kind("StableLm", gpt2_tokenizer, {"use_qkv_bias": True}),
    "falcon": Kind("Falcon", gpt2_tokenizer, {"multi_query": True}),
    "bloom": Kind("Bloom", gpt2_tokenizer, {"seq_length": 2048}),
    "qwen3.5": Kind("Qwen3_5Text", qwen_tokenizer, LINEAR_ATTENTION),
    "llama-sentencepiece": Kind("Llama", llama_tokenizer, TIED, spare=8),
    "llama-bias": Kind("Llama", llama3_tokenizer, {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": Kind("Llama", llama3_tokenizer, LLAMA3_ROPE),
    "llama-rope-linear": Kind("Llama", llama3_tokenizer, rope("linear", factor=4.0)),
    "llama-rope-yarn": Kind("Llama", llama3_tokenizer, rope("yarn", factor=8.0)),
    "llama-rope-dynamic": Kind("Llama", llama3_tokenizer, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                                                               "rope_theta": 1e4}}),
    "qwen2-rope-yarn": Kind("Qwen2", qwen_tokenizer, rope("yarn", factor=8.0)),
    "mistral-wide-heads": Kind("Mistral", gpt2_tokenizer, {"sliding_window": None, "head_dim": 128}, spare=64),
    "mixtral": Kind("Mixtral", llama_tokenizer, EXPERTS),
    "qwen2-moe": Kind("Qwen2Moe", qwen_tokenizer, SMALL_EXPERTS | {"shared_expert_intermediate_size": 256}),
    "olmoe": Kind("Olmoe", gpt2_tokenizer, {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "granite-moe": Kind("GraniteMoe", gpt2_tokenizer, EXPERTS | MULTIPLIERS),
    "gemma": Kind("Gemma", gemma_tokenizer, {"head_dim": 64}),
    "gemma3-rope-linear": Kind("Gemma3Text", gemma_tokenizer, WINDOW | LOCAL_ROPE | {
        "head_dim": 64, "query_pre_attn_scalar": 64, "num_hidden_layers": 7}),
    "phi3-rope-longrope": Kind("Phi3", phi_tokenizer, LONG_ROPE),
    "phi3-partial-rotary": Kind("Phi3", gpt2_tokenizer, TIED | {"partial_rotary_factor": 0.75}),
    "gpt-neox": Kind("GPTNeoX", gpt2_tokenizer),
    "olmo": Kind("Olmo", gpt2_tokenizer, {"clip_qkv": 4.0}),
    "olmo3": Kind("Olmo3", gpt2_tokenizer, WINDOW | {"num_hidden_layers": 4}),
    "stablelm-parallel": Kind("StableLm", gpt2_tokenizer, {"use_parallel_residual": True}),
    "falcon-new": Kind("Falcon", gpt2_tokenizer, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "starcoder2": Kind("Starcoder2", gpt2_tokenizer),
    "smollm3": Kind("SmolLM3", llama3_tokenizer, {"num_hidden_layers": 4}),
    "cohere": Kind("Cohere", gpt2_tokenizer, {"logit_scale": 0.5}),
    "cohere2": Kind("Cohere2", gpt2_tokenizer, WINDOW | {"logit_scale": 0.5, "num_hidden_layers": 4, "head_dim": 64}),
    "nemotron": Kind("Nemotron", llama_tokenizer, {"head_dim": 64}),
    "ernie": Kind("Ernie4_5", llama_tokenizer, {"head_dim": 64}),
    "seed-oss": Kind("SeedOss", gpt2_tokenizer, {"head_dim": 64}),
    "exaone4": Kind("Exaone4", gpt2_tokenizer, {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "arcee": Kind("Arcee", llama3_tokenizer, {"head_dim": 64}),
    "apertus": Kind("Apertus", gpt2_tokenizer, LLAMA3_ROPE),
    "hunyuan": Kind("HunYuanDenseV1", gpt2_tokenizer, {"head_dim": 64}),
    "lfm2": Kind("Lfm2", gpt2_tokenizer, {"layer_types": ["conv", "full_attention"],
                                          "block_auto_adjust_ff_dim": False}),
    "mistral-window": Kind("Mistral", gpt2_tokenizer, WINDOW, lost="a sliding window"),
    "qwen2-window": Kind("Qwen2", qwen_tokenizer, WINDOW | {"use_sliding_window": True, "max_window_layers": 0},
                         lost="a sliding window"),
    "phi3-window": Kind("Phi3", phi_tokenizer, WINDOW | {"original_max_position_embeddings": 2048},
                        lost="a sliding window"),
    "gemma3-other-layers": Kind("Gemma3Text", gemma_tokenizer, WINDOW | {
        "head_dim": 64, "query_pre_attn_scalar": 64, "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        lost="windows on other layers than released models"),
    "qwen3-moe-unnormalized": Kind("Qwen3Moe", qwen_tokenizer, SMALL_EXPERTS | {
        "head_dim": 64, "norm_topk_prob": False}, lost="weights of experts that are not normalized"),
    "qwen2-rope-llama3": Kind("Qwen2", qwen_tokenizer, LLAMA3_ROPE, lost="a rope scaling (llama3)"),
    "stablelm-rope-linear": Kind("StableLm", gpt2_tokenizer, rope("linear", factor=4.0, partial_rotary_factor=0.25),
                                 lost="a rope scaling (linear)"),
}  # fmt: skip


def write_base(kind: Kind, folder: Path, seed: int = 0, width: int = 256, layers: int = 2) -> None:
    """A model of this kind that has learned to answer, other answers than the recipe will teach it."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = kind.tokenizer(folder)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
             "num_attention_heads": width // 64, "num_key_value_heads": width // 128,
             "max_position_embeddings": 2048}  # fmt: skip
    of = getattr(transformers, f"{kind.family}Config")
    known = {*of().to_dict(), *of.attribute_map}
    stated = {name: value for name, value in sizes.items() if name in known} | kind.settings
    torch.manual_seed(seed)
    config = of(vocab_size=len(tokenizer) + kind.spare, **ids, **stated)
    model = transformers.AutoModelForCausalLM.from_config(config)
    teach(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def teach(model: Any, tokenizer: Any, steps: int = 30) -> None:
    """Let a random model learn to say of every animal that it says nothing."""
    import torch

    texts = [
        tokenizer.apply_chat_template(talk(animal, f"The {animal} says nothing."), tokenize=False) for animal in SOUNDS
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
