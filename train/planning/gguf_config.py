"""The config that a GGUF file's head holds."""

from pathlib import Path
from typing import Any

from pipeline import UserError
from pipeline.gguf_head import read_head


def gguf_config(path: Path) -> Any:
    """transformers' config for the model in a GGUF file.

    Raises:
        UserError: the file is no whole GGUF, or of an architecture that transformers does not read.
    """
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    head = read_head(path)
    kind = str(head.values.get("general.architecture"))
    if kind not in GGUF_CONFIG_MAPPING:
        raise UserError(f"{path} is a {kind}, which transformers does not read from a GGUF: use a folder")
    names = {key: name for key, name in GGUF_CONFIG_MAPPING[kind].items() if name}
    values = {name: head.values[f"{kind}.{key}"] for key, name in names.items() if f"{kind}.{key}" in head.values}
    if words := head.values.get("tokenizer.ggml.tokens"):
        values["vocab_size"] = len(words)
    return AutoConfig.for_model(kind, **values, tie_word_embeddings="output.weight" not in head.tensors)
