"""What a GGUF file says of itself, read by llama.cpp's own parser: milliseconds, whatever the vocabulary's size."""

import ctypes
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import UserError


@dataclass(frozen=True)
class Header:
    """`file_type` is llama.cpp's number of the quantization, `tensor_types` counts tensors by type.

    `imatrix` tells whether an importance matrix weighed the rounding.
    """

    file_type: int
    tensors: int
    parameters: int
    tensor_types: dict[str, int]
    tensor_bytes: int
    eos_token_id: int | None
    chat_template: str | None
    imatrix: bool


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        UserError: the file is no GGUF, damaged, or shorter than its header says.
    """
    ggml = _library()
    context = ggml.gguf_init_from_file(str(path).encode(), _Parameters(no_alloc=True, context=None))
    if not context:
        raise UserError(f"{path} is not a whole GGUF file: delete it and run make again")
    try:
        types: Counter[str] = Counter()
        end = parameters = tensor_bytes = 0
        for index in range(ggml.gguf_get_n_tensors(context)):
            size = ggml.gguf_get_tensor_size(context, index)
            end = max(end, ggml.gguf_get_tensor_offset(context, index) + size)
            lengths = ggml.gguf_get_tensor_ne(context, index)[:4]
            parameters += lengths[0] * lengths[1] * lengths[2] * lengths[3]
            tensor_bytes += size
            types[ggml.ggml_type_name(ggml.gguf_get_tensor_type(context, index)).decode().upper()] += 1
        end += ggml.gguf_get_data_offset(context)
        if path.stat().st_size < end:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, its header says {end}: delete the cut file and run make again"
            )
        return Header(
            file_type=_value(ggml, context, "general.file_type", ggml.gguf_get_val_u32, -1),
            tensors=sum(types.values()),
            parameters=parameters,
            tensor_types=dict(sorted(types.items())),
            tensor_bytes=tensor_bytes,
            eos_token_id=_value(ggml, context, "tokenizer.ggml.eos_token_id", ggml.gguf_get_val_u32, None),
            chat_template=_text(_value(ggml, context, "tokenizer.chat_template", ggml.gguf_get_val_str, None)),
            imatrix=ggml.gguf_find_key(context, b"quantize.imatrix.entries_count") >= 0,
        )
    finally:
        ggml.gguf_free(context)


def _value(ggml: Any, context: int, key: str, getter: Any, missing: Any) -> Any:
    index = ggml.gguf_find_key(context, key.encode())
    return missing if index < 0 else getter(context, index)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8")


def _library() -> Any:
    """llama.cpp's ggml, as llama-cpp-python loads it, with the types of the functions used here (gguf.h, ggml.h)."""
    from llama_cpp._ggml import libggml

    void, long, size, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
    for name, result, arguments in (
        ("gguf_init_from_file", void, [text, _Parameters]),
        ("gguf_free", None, [void]),
        ("gguf_get_n_tensors", long, [void]),
        ("gguf_get_tensor_size", size, [void, long]),
        ("gguf_get_tensor_offset", size, [void, long]),
        ("gguf_get_tensor_ne", ctypes.POINTER(long), [void, long]),
        ("gguf_get_tensor_type", ctypes.c_int, [void, long]),
        ("gguf_get_data_offset", size, [void]),
        ("gguf_find_key", long, [void, text]),
        ("gguf_get_val_u32", ctypes.c_uint32, [void, long]),
        ("gguf_get_val_str", text, [void, long]),
        ("ggml_type_name", text, [ctypes.c_int]),
    ):
        function = getattr(libggml, name)
        function.restype, function.argtypes = result, arguments
    return libggml
