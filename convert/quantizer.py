"""llama.cpp's own quantizer, and the importance matrix by which it rounds: on the user's own training text.

The matrix is how large each input of each weight matrix is; columns with large inputs are rounded more carefully. The
sums are those of llama.cpp's tools/imatrix, taken by the callback that its scheduler calls for each node of the graph,
and written in that tool's format.
"""

import ctypes
import logging
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.evaluator import PASS_TOKENS, Evaluator, be_quiet
from pipeline import UserError
from pipeline.machine import cores
from pipeline.progress import progress
from pipeline.recipe import NEEDS_IMATRIX
from pipeline.rows import count, picked, row_text

IMATRIX = "imatrix.gguf"
DATASET = "data/train.arrow"  # what the files say that it was computed from
FLOAT32 = 0  # GGML_TYPE_F32
LAST = b"result_norm"  # what follows, the logits, is a fifth of a small model's work and of no use here
FALLBACK = re.compile(r"warning: *(\S+) *- ncols .*?required for type *(\w+)\).*?falling back to *(\w+)")
FALLBACK_COUNT = re.compile(r"WARNING: (\d+) of (\d+) tensor\(s\) required fallback")
PROGRESS = re.compile(r"^\[ *(\d+)/ *(\d+)\]")


@dataclass
class Importance:
    """Of one weight, a matrix an expert: (matrices, columns) sums of squared inputs, (matrices,) how many inputs."""

    squares: Any
    counts: Any

    @property
    def means(self) -> Any:
        """(matrices, columns) mean squares; 1 for an expert that no token reached, as llama.cpp's quantizer has it."""
        import numpy as np

        seen = self.counts[:, None]
        return np.where(seen > 0, self.squares / np.maximum(seen, 1), 1).astype(np.float32)


Matrix = dict[str, Importance]


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


def imatrix(model: Path, sequences: list[list[int]]) -> Matrix:
    """The importance of every weight of an unquantized GGUF's blocks, for so many sequences of tokens.

    Raises:
        UserError: llama.cpp cannot load or evaluate the model, or an input is no finite number.
    """
    pieces = [ids[at : at + PASS_TOKENS] for ids in sequences for at in range(0, len(ids), PASS_TOKENS)]
    collector = Collector()
    done = 0
    with (
        progress("gguf: importance", sum(map(len, pieces)), "tokens") as tell,
        Evaluator(model, PASS_TOKENS, collector.watch) as evaluator,
    ):
        # Logits of every token are asked for, since llama.cpp leaves the others out of its last layer.
        for group in evaluator.groups((ids, list(range(len(ids)))) for ids in pieces):
            evaluator.evaluate(group)
            if collector.error:
                raise collector.error
            done += sum(len(ids) for ids, _ in group)
            tell(done)
    for name, importance in collector.found.items():
        if not (importance.squares < float("inf")).all():
            raise UserError(f"an input of {name} is no finite number: a weight is damaged, train again")
    return collector.found


def training_tokens(merged: Path, data: Path, tokens: int, longest: int) -> list[list[int]]:
    """Token ids of training conversations as training saw them, picked at random, about `tokens` in all."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    order = list(range(count(data, "train")))
    random.Random(0).shuffle(order)
    sequences: list[list[int]] = []
    left = tokens
    for row in picked(data, "train", order):
        text = row_text(tokenizer, row)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: min(longest, left)]
        sequences.append(ids)
        left -= len(ids)
        if left <= 0:
            break
    return sequences


def write_imatrix(path: Path, matrix: Matrix) -> None:
    """The file that llama.cpp's tools/imatrix writes, for `llama-quantize --imatrix`."""
    import gguf
    import numpy as np

    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells the byte order of every file
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [DATASET])
    writer.add_uint32("imatrix.chunk_count", chunks(matrix))
    writer.add_uint32("imatrix.chunk_size", PASS_TOKENS)
    for name, importance in sorted(matrix.items()):
        writer.add_tensor(f"{name}.in_sum2", importance.squares.astype(np.float32))
        writer.add_tensor(f"{name}.counts", importance.counts[:, None].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def chunks(matrix: Matrix) -> int:
    """Of PASS_TOKENS tokens, rounded up."""
    return max(-(-int(importance.counts.max()) // PASS_TOKENS) for importance in matrix.values())


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""


Tensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
)


class Collector:
    """Adds up the inputs of the weights while llama.cpp evaluates; `watch` is the callback for its scheduler."""

    def __init__(self) -> None:
        import llama_cpp.llama_cpp as bindings

        self.found: Matrix = {}
        self.error: Exception | None = None  # ctypes would print it and go on
        self.ggml = ggml_library()
        self.watch = bindings.ggml_backend_sched_eval_callback(self._hear)

    def _hear(self, address: int, ask: bool, _: object) -> bool:
        """With `ask`, whether the node's inputs are wanted; then, once it is computed, whether to go on."""
        node = Tensor.from_address(address)
        if node.name == LAST:
            return ask
        operation = self.ggml.ggml_op_name(node.op)
        weight = weight_name(node) if operation in (b"MUL_MAT", b"MUL_MAT_ID") else None
        if ask or weight is None:
            return (weight is not None) if ask else True
        try:
            self._add(weight, node, experts=operation == b"MUL_MAT_ID")
        except Exception as error:
            self.error = error
        return self.error is None

    def _add(self, weight: str, node: Tensor, experts: bool) -> None:
        import numpy as np

        matrices, inputs = node.src[0].contents, self._values(node.src[1], np.float32)
        count, depth = matrices.ne[2] * matrices.ne[3], matrices.ne[2]
        columns = inputs.shape[-1]
        new = Importance(np.zeros((count, columns)), np.zeros(count, np.int64))
        importance = self.found.setdefault(weight, new)
        if experts:  # inputs (1, tokens, experts used or 1, columns), chosen (1, 1, tokens, experts used)
            chosen = self._values(node.src[2], np.int32)[0, 0]
            rows = np.broadcast_to(inputs[0], (*chosen.shape, columns))
            for expert in np.unique(chosen):
                self._sum(importance, int(expert), rows[chosen == expert])
        else:
            for outer in range(inputs.shape[0]):
                for inner in range(inputs.shape[1]):
                    matrix = (outer % matrices.ne[3]) * depth + inner % depth
                    self._sum(importance, matrix, inputs[outer, inner])

    @staticmethod
    def _sum(importance: Importance, matrix: int, rows: Any) -> None:
        import numpy as np

        importance.squares[matrix] += np.einsum("ij,ij->j", rows, rows)
        importance.counts[matrix] += len(rows)

    def _values(self, pointer: Any, kind: Any) -> Any:
        """A tensor's values, wherever they lie, as a 4-dimensional array, last dimension first."""
        import numpy as np

        tensor = pointer.contents
        raw = np.empty(self.ggml.ggml_nbytes(pointer), np.uint8)
        self.ggml.ggml_backend_tensor_get(pointer, raw.ctypes.data, 0, raw.nbytes)
        strides, shape = tuple(tensor.nb)[::-1], tuple(tensor.ne)[::-1]
        return np.lib.stride_tricks.as_strided(raw.view(kind), shape, strides)


def weight_name(node: Tensor) -> str | None:
    """The weight of a block that the node multiplies inputs with, without the marks of a device (`CUDA0#name#0`)."""
    if node.src[1].contents.type != FLOAT32:
        return None
    name = node.src[0].contents.name.decode()
    name = name.split("#")[1] if "#" in name else name
    return name if name.startswith("blk.") else None


def ggml_library() -> Any:
    """llama.cpp's ggml, with the types of the functions used here (ggml.h, ggml-backend.h)."""
    from llama_cpp._ggml import libggml

    pointer = ctypes.POINTER(Tensor)
    for name, result, arguments in (
        ("ggml_op_name", ctypes.c_char_p, [ctypes.c_int]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]),
        ("ggml_backend_tensor_get", None, [pointer, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    ):
        function = getattr(libggml, name)
        function.restype, function.argtypes = result, arguments
    return libggml
