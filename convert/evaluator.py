"""A GGUF in llama.cpp: the logits that it gives, several sequences a pass, and what its header says in milliseconds.

Both by llama.cpp's own code, through the bindings' low-level functions.
"""

import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline import UserError
from pipeline.machine import cores
from pipeline.progress import progress

Asked = tuple[list[int], list[int]]  # tokens, and the positions in them whose next-token logits are wanted
# Each pass makes the threads wait for one another hundreds of times; a larger one attends to more foreign tokens.
PASS_TOKENS = 512
PASS_SEQUENCES = 16


class Evaluator:
    """A loaded model. Cache in float32 and no flash attention: only the weights' types may make a difference.

    `watch` is called for each node of the computation (`ggml_backend_sched_eval_callback`), `threads` is how many
    compute, `cache_tokens` how many are kept for `decode`; passes are of PASS_TOKENS or one sequence.

    Raises:
        UserError: llama.cpp cannot load the file, or has no memory for sequences of `longest_tokens`.
    """

    def __init__(
        self, path: Path, longest_tokens: int, watch: Any = None, threads: int = 0, cache_tokens: int = 0
    ) -> None:
        import llama_cpp

        be_quiet()
        self.ending = ExitStack()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise UserError(f"llama.cpp cannot load {path}: delete it and run 'make gguf'")
        self.ending.callback(llama_cpp.llama_model_free, self.model)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(self.vocabulary))
        self.known_tokens = llama_cpp.llama_model_n_ctx_train(self.model)
        self.pass_tokens = max(longest_tokens, PASS_TOKENS)
        self.cache_tokens = max(cache_tokens, self.pass_tokens)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_batch = parameters.n_ubatch = self.pass_tokens
        parameters.n_ctx = self.cache_tokens
        parameters.n_seq_max, parameters.kv_unified = PASS_SEQUENCES, True
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.n_threads = parameters.n_threads_batch = threads or cores()
        if watch:
            parameters.cb_eval = watch
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            self.ending.close()
            raise UserError(f"llama.cpp has no memory for {longest_tokens} tokens of {path}: free some")
        self.ending.callback(llama_cpp.llama_free, self.context)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(self.pass_tokens, 0, 1)
        self.ending.callback(llama_cpp.llama_batch_free, self.batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ending.close()

    def tokens(self, prompt: str) -> list[int]:
        """llama.cpp's tokens of a rendered prompt as its server makes them, with what the file says to add."""
        import llama_cpp

        bos = llama_cpp.llama_vocab_bos(self.vocabulary)
        if self.adds_bos and bos != llama_cpp.LLAMA_TOKEN_NULL:  # the server takes the template's BOS for the same one
            prompt = prompt.removeprefix(llama_cpp.llama_vocab_get_text(self.vocabulary, bos).decode())
        data = prompt.encode()
        room = len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), ids, room, True, True)
        return list(ids[: max(count, 0)])

    def logits(self, asked: Iterable[Asked]) -> Iterator[Any]:
        """For each sequence in turn (positions, vocabulary) float32 logits of the token after each position.

        Raises:
            UserError: a token that the model does not have, or llama.cpp fails.
        """
        import numpy as np

        for group in self.groups(asked):
            self.evaluate(group)
            first = 0
            for ids, positions in group:
                found = [self.row(first + position) for position in positions]
                yield np.array(found, dtype=np.float32).reshape(-1, self.vocabulary_size)
                first += len(ids)

    def groups(self, asked: Iterable[Asked]) -> Iterator[list[Asked]]:
        """The sequences, as many together as fit one pass."""
        group: list[Asked] = []
        for sequence in asked:
            if sum(len(ids) for ids, _ in [*group, sequence]) > self.pass_tokens or len(group) == PASS_SEQUENCES:
                yield group
                group = []
            group.append(sequence)
        if group:
            yield group

    def evaluate(self, group: list[Asked]) -> None:
        """One pass over sequences that do not see one another, nor anything before."""
        self.forget()
        wanted = [set(positions) for _, positions in group]
        self.decode(
            (token, position, number, position in wanted[number])
            for number, (ids, _) in enumerate(group)
            for position, token in enumerate(ids)
        )

    def decode(self, tokens: Iterable[tuple[int, int, int, bool]]) -> None:
        """One pass over (token, its position, its sequence, whether its logits are wanted); the cache keeps them."""
        import llama_cpp

        count = 0
        for token, position, sequence, wanted in tokens:
            self.batch.token[count] = token
            self.batch.pos[count] = position
            self.batch.n_seq_id[count] = 1
            self.batch.seq_id[count][0] = sequence
            self.batch.logits[count] = wanted
            count += 1
        self.batch.n_tokens = count
        if status := llama_cpp.llama_decode(self.context, self.batch):
            raise UserError(f"llama.cpp cannot evaluate {count} tokens (status {status}): report the model as a bug")

    def row(self, index: int) -> Any:
        """(vocabulary,) float32 logits after the last pass's token of that index; valid until the next pass."""
        import llama_cpp
        import numpy as np

        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, index), (self.vocabulary_size,))

    def forget(self) -> None:
        """Empty the cache."""
        import llama_cpp

        llama_cpp.llama_memory_clear(self.memory, True)

    def copy(self, sequence: int, other: int) -> None:
        """Let another sequence begin as this one does; they share the cache."""
        import llama_cpp

        llama_cpp.llama_memory_seq_cp(self.memory, sequence, other, -1, -1)

    def cache_bytes(self) -> int:
        """What the cache holds of the first sequence."""
        import llama_cpp

        return int(llama_cpp.llama_state_seq_get_size(self.context, 0))

    def ends(self, token: int) -> bool:
        """Whether the token ends an answer."""
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self.vocabulary, token))


def greedy_answers(evaluator: Evaluator, prompts: list[list[int]], most: int, says: str) -> list[list[int]]:
    """The tokens of each answer, up to the end of its turn or `most`; several are decoded together."""
    made: list[list[int]] = [[] for _ in prompts]
    waiting = [number for number, ids in enumerate(prompts) if len(ids) + most <= evaluator.cache_tokens]
    with progress(says, len(prompts), "questions") as tell:
        while waiting:
            group: list[int] = []
            room = evaluator.cache_tokens
            while waiting and len(group) < PASS_SEQUENCES and len(prompts[waiting[0]]) + most <= room:
                room -= len(prompts[waiting[0]]) + most
                group.append(waiting.pop(0))
            answers = _answer([prompts[number] for number in group], evaluator, most)
            for number, answer in zip(group, answers, strict=True):
                made[number] = answer
            tell(len(prompts) - len(waiting))
    return made


def _answer(prompts: list[list[int]], evaluator: Evaluator, most: int) -> list[list[int]]:
    """The answers to prompts that fit the cache together; how they all begin is computed once."""
    evaluator.forget()
    made: list[list[int]] = [[] for _ in prompts]
    shortest = min(map(len, prompts)) - 1
    columns = enumerate(zip(*prompts, strict=False))
    common = next((at for at, tokens in columns if at == shortest or len(set(tokens)) > 1), shortest)
    tokens = [(token, at, 0, False) for at, token in enumerate(prompts[0][:common])]
    for first in range(0, common, evaluator.pass_tokens):
        evaluator.decode(tokens[first : first + evaluator.pass_tokens])
    for number in range(1, len(prompts)):
        evaluator.copy(0, number)
    tokens = [
        (ids[at], at, number, at == len(ids) - 1)
        for number, ids in enumerate(prompts)
        for at in range(common, len(ids))
    ]
    for first in range(0, len(tokens), evaluator.pass_tokens):
        piece = tokens[first : first + evaluator.pass_tokens]
        evaluator.decode(piece)
        for index, (_, _, number, last) in enumerate(piece):
            if last:
                made[number].append(int(evaluator.row(index).argmax()))
    while going := [n for n, ids in enumerate(made) if len(ids) < most and not evaluator.ends(ids[-1])]:
        evaluator.decode((made[n][-1], len(prompts[n]) + len(made[n]) - 1, n, True) for n in going)
        for index, number in enumerate(going):
            made[number].append(int(evaluator.row(index).argmax()))
    return made


def _silence(level: int, text: bytes, data: object) -> None:
    """llama.cpp's log, once nobody listens."""


_quiet: list[object] = []  # ctypes callbacks must outlive their use


def be_quiet() -> None:
    """Switch llama.cpp's log off."""
    import llama_cpp

    if not _quiet:
        _quiet.append(llama_cpp.llama_log_callback(_silence))
    llama_cpp.llama_log_set(_quiet[0], None)


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
