"""The pinned llama.cpp: its converter script and its quantizer, both of llama-cpp-python's own version."""

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.imatrix import DATASET, IMATRIX, Matrix, chunks
from convert.pretokenizer import pre_tokenizer
from pipeline import UserError
from pipeline.converter import converter
from pipeline.machine import cores
from pipeline.progress import progress
from pipeline.recipe import NEEDS_IMATRIX

FALLBACK = re.compile(r"warning: *(\S+) *- ncols .*?required for type *(\w+)\).*?falling back to *(\w+)")
FALLBACK_COUNT = re.compile(r"WARNING: (\d+) of (\d+) tensor\(s\) required fallback")
UNRECOGNIZED = "BPE pre-tokenizer was not recognized"
PROGRESS = re.compile(r"^\[ *(\d+)/ *(\d+)\]")


def convert(model: Path, output: Path, kind: str, settings_only: bool = False) -> None:
    """Convert a Hugging Face folder to a GGUF of type F16, BF16 or F32, or no more of it than its settings.

    Raises:
        UserError: the converter refuses the model; its last words and its log are named.
    """
    pre, unknown = _declared_pre_tokenizer(model)
    wrapped = [sys.executable, str(Path(__file__).with_name("converter.py")), str(converter()), pre]
    arguments = [*wrapped, str(model), "--outtype", kind.lower(), "--outfile", str(output)]
    arguments += ["--vocab-only"] if settings_only else []
    # The script finds its own gguf package beside it; a PYTHONPATH of ours would give it our packages.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    logged = output.with_suffix(".log")
    with logged.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if status != 0:
        words = [line for line in logged.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if unknown and words and UNRECOGNIZED in words[-1]:
            raise unknown
        raise UserError(f"llama.cpp cannot convert {model} ({words[-1] if words else f'exit {status}'}): see {logged}")
    logged.unlink()


def _declared_pre_tokenizer(model: Path) -> tuple[str, UserError | None]:
    """llama.cpp's name of it, or why there is none, which matters only where the converter knows none either."""
    if not (model / "tokenizer.json").is_file():
        return "", None
    try:
        return pre_tokenizer(model), None
    except UserError as error:
        return "", error


@dataclass
class Quantization:
    """What the quantizer said: tensors that could not take the type asked for, by `wanted -> written`."""

    fallbacks: Counter[str] = field(default_factory=Counter)
    counted: int = 0
    words: list[str] = field(default_factory=list)


def quantize(source: Path, output: Path, kind: str, matrix: Matrix | None = None) -> Quantization:
    """Quantize an unquantized GGUF to one of llama.cpp's types, its rounding weighed by an importance matrix, if any.

    Raises:
        UserError: the quantizer failed, with its last words, or the type needs a matrix and there is none.
    """
    import llama_cpp

    if matrix is None and kind in NEEDS_IMATRIX:
        raise UserError(f"{kind} needs an importance matrix: set gguf.imatrix_tokens, say to 4096")

    said = Quantization()
    pending = [""]

    def listen(level: int, text: bytes, data: object) -> None:
        *lines, pending[0] = (pending[0] + text.decode("utf-8", errors="replace")).split("\n")
        for line in lines:
            _hear(said, line)
            if tensor := PROGRESS.match(line.strip()):
                tell(100 * int(tensor[1]) / int(tensor[2]))

    callback = llama_cpp.llama_log_callback(listen)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type(kind)
    parameters.nthread = cores()
    kept = _weigh(parameters, matrix) if matrix else ()  # the arrays that the parameters point to
    try:
        with progress(f"gguf: {kind}", 100, "%") as tell:
            llama_cpp.llama_log_set(callback, None)
            status = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), parameters)
    finally:
        del kept
        _hear(said, pending[0])
        be_quiet()
    if status != 0:
        reason = said.words[-1] if said.words else f"status {status}"
        raise UserError(f"llama.cpp cannot quantize {source} to {kind} ({reason}): choose another type")
    if said.counted != said.fallbacks.total():
        raise RuntimeError(f"llama.cpp counts {said.counted} fallbacks, its log names {said.fallbacks.total()}")
    return said


def _weigh(parameters: Any, matrix: Matrix) -> tuple[Any, ...]:
    """Hand the matrix to the quantizer, and the keys by which llama.cpp's own tool records it in the file."""
    import ctypes

    import llama_cpp.llama_cpp as bindings

    means = {name: importance.means for name, importance in matrix.items()}
    data = (bindings.llama_model_imatrix_data * (len(means) + 1))()  # ends with one without a name
    for entry, (name, values) in zip(data, means.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    record = {"file": IMATRIX, "dataset": DATASET, "entries_count": len(means), "chunks_count": chunks(matrix)}
    keys = (bindings.llama_model_kv_override * (len(record) + 1))()  # ends with one without a key
    for override, (name, value) in zip(keys, record.items(), strict=False):
        override.key = f"quantize.imatrix.{name}".encode()
        if isinstance(value, str):
            override.tag, override.value.val_str = bindings.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            override.tag, override.value.val_i64 = bindings.LLAMA_KV_OVERRIDE_TYPE_INT, value
    parameters.imatrix = ctypes.cast(data, ctypes.POINTER(bindings.llama_model_imatrix_data))
    parameters.kv_overrides = ctypes.cast(keys, ctypes.POINTER(bindings.llama_model_kv_override))
    return data, keys, means


def file_type(kind: str) -> int:
    """llama.cpp's number of a type, such as 15 for Q4_K_M."""
    import llama_cpp

    name = "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}"
    return int(getattr(llama_cpp, name))


def _hear(said: Quantization, line: str) -> None:
    if found := FALLBACK.search(line):
        said.fallbacks[f"{found[2].upper()} -> {found[3].upper()}"] += 1
    elif found := FALLBACK_COUNT.search(line):
        said.counted = int(found[1])
    elif line.strip() and not PROGRESS.match(line.strip()):
        said.words.append(line.strip())


def _silence(level: int, text: bytes, data: object) -> None:
    """llama.cpp's log, once nobody listens."""


_quiet: list[object] = []  # ctypes callbacks must outlive their use


def be_quiet() -> None:
    import llama_cpp

    if not _quiet:
        _quiet.append(llama_cpp.llama_log_callback(_silence))
    llama_cpp.llama_log_set(_quiet[0], None)
