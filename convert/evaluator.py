"""A GGUF in llama.cpp, asked for logits: one pass a sequence, through the bindings' low-level functions."""

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recipe import UserError

CONTEXT_TOKENS = 2048


class Evaluator:
    """A loaded model. Cache in float32 and no flash attention: only the weights' types may make a difference."""

    def __init__(self, path: Path, longest_tokens: int = CONTEXT_TOKENS) -> None:
        import llama_cpp

        from convert.llamacpp import be_quiet

        be_quiet()
        self.ending = ExitStack()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise UserError(f"llama.cpp cannot load {path}: delete it and run 'make gguf'")
        self.ending.callback(llama_cpp.llama_model_free, self.model)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = longest_tokens
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.n_threads = parameters.n_threads_batch = _cores()
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            self.ending.close()
            raise UserError(f"llama.cpp has no memory for {longest_tokens} tokens of {path}: free some")
        self.ending.callback(llama_cpp.llama_free, self.context)
        self.batch = llama_cpp.llama_batch_init(longest_tokens, 0, 1)
        self.ending.callback(llama_cpp.llama_batch_free, self.batch)
        self.longest_tokens = longest_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ending.close()

    def tokens(self, text: str) -> list[int]:
        """llama.cpp's tokens of a rendered prompt, special tokens read as such, none added."""
        import llama_cpp

        data = text.encode()
        room = len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), ids, room, False, True)
        return list(ids[: max(count, 0)])

    def logits(self, ids: list[int], positions: list[int]) -> Any:
        """(positions, vocabulary) float32 logits of the next token after each of those positions.

        Raises:
            UserError: more tokens than the evaluator was made for, or llama.cpp fails.
        """
        import llama_cpp
        import numpy as np

        if len(ids) > self.longest_tokens:
            raise UserError(f"{len(ids)} tokens are more than the {self.longest_tokens} of the proof: shorten the data")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        wanted = set(positions)
        self.batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            self.batch.token[index] = token
            self.batch.pos[index] = index
            self.batch.n_seq_id[index] = 1
            self.batch.seq_id[index][0] = 0
            self.batch.logits[index] = index in wanted
        if status := llama_cpp.llama_decode(self.context, self.batch):
            raise UserError(f"llama.cpp cannot evaluate {len(ids)} tokens (status {status}): report the model as a bug")
        rows = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, position), (self.vocabulary_size,))
            for position in positions
        ]
        return np.array(rows, dtype=np.float32)  # a copy: llama.cpp reuses its buffer


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
