"""A GGUF in llama.cpp, asked for logits: several sequences a pass, through the bindings' low-level functions."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recipe import UserError
from recipe.machine import cores

Asked = tuple[list[int], list[int]]  # tokens, and the positions in them whose next-token logits are wanted
# Each pass makes the threads wait for one another hundreds of times; a larger one attends to more foreign tokens.
PASS_TOKENS = 512
PASS_SEQUENCES = 16


class Evaluator:
    """A loaded model. Cache in float32 and no flash attention: only the weights' types may make a difference.

    Raises:
        UserError: llama.cpp cannot load the file, or has no memory for sequences of `longest_tokens`.
    """

    def __init__(self, path: Path, longest_tokens: int) -> None:
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
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(self.vocabulary))
        self.pass_tokens = max(longest_tokens, PASS_TOKENS)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = self.pass_tokens
        parameters.n_seq_max, parameters.kv_unified = PASS_SEQUENCES, True
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.n_threads = parameters.n_threads_batch = cores()
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            self.ending.close()
            raise UserError(f"llama.cpp has no memory for {longest_tokens} tokens of {path}: free some")
        self.ending.callback(llama_cpp.llama_free, self.context)
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
        group: list[Asked] = []
        for sequence in asked:
            if sum(len(ids) for ids, _ in [*group, sequence]) > self.pass_tokens or len(group) == PASS_SEQUENCES:
                yield from self._decode(group)
                group = []
            group.append(sequence)
        yield from self._decode(group)

    def _decode(self, group: list[Asked]) -> Iterator[Any]:
        """One pass over sequences that do not see one another."""
        import llama_cpp
        import numpy as np

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        index, rows = 0, []
        for number, (ids, positions) in enumerate(group):
            wanted = set(positions)
            rows.append([index + position for position in positions])
            for position, token in enumerate(ids):
                self.batch.token[index] = token
                self.batch.pos[index] = position
                self.batch.n_seq_id[index] = 1
                self.batch.seq_id[index][0] = number
                self.batch.logits[index] = position in wanted
                index += 1
        self.batch.n_tokens = index
        if status := llama_cpp.llama_decode(self.context, self.batch):
            raise UserError(f"llama.cpp cannot evaluate {index} tokens (status {status}): report the model as a bug")
        width = (self.vocabulary_size,)
        for found in rows:
            pointers = [llama_cpp.llama_get_logits_ith(self.context, row) for row in found]
            yield np.array([np.ctypeslib.as_array(pointer, width) for pointer in pointers], dtype=np.float32)
