"""The config that a GGUF file's header holds, read without its tensors and its vocabulary's words."""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from recipe import UserError

# The types of GGUF's specification (ggml/docs/gguf.md); 8 is a string, 9 an array.
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MOST_STRING_BYTES = 64_000_000


def gguf_config(path: Path) -> Any:
    """transformers' config for the model in a GGUF file.

    gguf's own reader takes seconds, as it makes an array of each word of the vocabulary.

    Raises:
        UserError: the file is no whole GGUF, or of an architecture that transformers does not read.
    """
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    try:
        with path.open("rb") as file:
            fields, tensors = _header(file)
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}): fetch it again") from None
    kind = str(fields.get("general.architecture"))
    if kind not in GGUF_CONFIG_MAPPING:
        raise UserError(f"{path} is a {kind}, which transformers does not read from a GGUF: use a folder")
    names = {key: name for key, name in GGUF_CONFIG_MAPPING[kind].items() if name}
    values = {name: fields[f"{kind}.{key}"] for key, name in names.items() if f"{kind}.{key}" in fields}
    values["vocab_size"] = fields.get("tokenizer.ggml.tokens", values.get("vocab_size"))
    return AutoConfig.for_model(kind, **values, tie_word_embeddings="output.weight" not in tensors)


def _header(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """(values by key, of an array its length; names of the tensors)."""
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, keys = struct.unpack("<IQQ", file.read(20))
    if version < 2:
        raise ValueError(f"version {version} is outdated")
    fields = {_string(file): _value(file, _number(file, "<I")) for _ in range(keys)}
    names = set()
    for _ in range(tensors):
        names.add(_string(file))
        file.seek(8 * _number(file, "<I") + 12, 1)  # dimensions, type, offset
    return fields, names


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _number(file, FORMATS[kind])
    inner, length = _number(file, "<I"), _number(file, "<Q")
    if inner in FORMATS:
        file.seek(length * struct.calcsize(FORMATS[inner]), 1)
    else:
        for _ in range(length):
            _value(file, inner)
    return length


def _string(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    if length > MOST_STRING_BYTES:
        raise ValueError(f"a text of {length} bytes")
    return file.read(length).decode("utf-8")


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]
