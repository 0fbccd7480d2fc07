"""llama.cpp behind the chat window: the GGUF that it serves, how, and what its answers must show before anyone asks."""

import json
import logging
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.error import UserError
from pipeline.files import fingerprint
from pipeline.gguf_head import read_head
from pipeline.recipe import Recipe, Serve
from pipeline.run import Fingerprints, Run
from serve.asking.endpoint import ERRORS, HOST, KEY_FILE, ask, is_healthy, make_key, served_model, url_of
from serve.running.backend import Backend, Endpoint, Service

ANSWER_SECONDS = 600
PROGRAM = "serve.gateway.engine"
WORDS = "tokenizer.ggml.tokens"
# ggml's types by number that x86-64 can multiply by one token as by many, bit for bit.
REPEATABLE = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
SPACE = "\u2581".encode()  # how sentencepiece writes one
PATIENCE_SECONDS = 10  # under load an engine takes seconds to say that it is well

log = logging.getLogger("truetune")


@dataclass(frozen=True)
class Settings:
    """What the engine serves, and how; anyone may see it in the process list, so it names the key's file only."""

    model: str
    name: str
    port: int
    key_file: str
    context: int
    slots: int
    threads: int
    temperature: float
    queue: int = Serve.queue
    ui: bool = False
    repeatable: bool = False
    origins: tuple[str, ...] = ()
    host: str = HOST  # a container's engine listens on its network, which no one outside reaches


def backend(recipe: Recipe, run: Run) -> Backend:
    """The engine of `make serve`, once its file is proved to be what `make gguf` wrote.

    Raises:
        UserError: the file is gone, is another, or does not know so long a context.
    """
    path, known = served_file(recipe, run)
    refuse_long_context(recipe.serve.context, path)
    settings, key = settings_of(recipe, path), make_key()
    engine = Service(
        name="engine",
        argv=(sys.executable, "-m", PROGRAM, json.dumps(asdict(settings))),
        log_file=run.path("serve.log"),
        port=settings.port,
        loading=f"loading {path}",
        is_ready=lambda: is_healthy(settings.port, timeout=PATIENCE_SECONDS),
        problem=lambda: problem_of_answer(settings, key),
        check=lambda: refuse_replaced(path, known),
    )
    endpoint = Endpoint(f"{url_of(settings.port)}/v1", settings.name, key)
    return Backend(endpoint, (engine,), {str(path): known}, ("xllamacpp",))


def served_file(recipe: Recipe, run: Run) -> tuple[Path, dict[str, str | int]]:
    """The GGUF that the recipe serves and its fingerprint, proved to be what 'gguf' wrote."""
    path = run.path("gguf", f"{recipe.name}-{recipe.served_type}.gguf")
    verified: Fingerprints = run.verified("gguf", only=str(path))
    if str(path) not in verified:
        raise UserError(f"{run.receipt_path('gguf')} knows no {path}: run 'make gguf RECIPE={recipe.given}' first")
    return path, verified[str(path)]


def refuse_long_context(context: int, path: Path) -> None:
    """llama.cpp would allocate such a context, then cut it to the trained one in silence."""
    trained = trained_context(path)
    if trained is not None and context > trained:
        raise UserError(f"serve.context: {context} is more than the {trained} tokens that {path} knows: lower it")


def trained_context(path: Path) -> int | None:
    """`<architecture>.context_length` of a GGUF; None when it does not say.

    Raises:
        UserError: the file is no GGUF, or ends within its metadata.
    """
    key = ".context_length"
    values = read_head(path, until=key).values
    return next((value for name, value in values.items() if name.endswith(key) and isinstance(value, int)), None)


def longest_token(path: Path) -> int:
    """The most bytes of text that one of its tokens stands for; byte-level BPE's are counted twice at most.

    Raises:
        UserError: the file is no GGUF, ends within its metadata, or has no vocabulary.
    """
    words = read_head(path, until=WORDS).values.get(WORDS)
    if not isinstance(words, list) or not all(isinstance(word, bytes) for word in words):
        raise UserError(f"{path} has no vocabulary: make it again with 'make gguf'")
    return max((len(word.replace(SPACE, b" ")) for word in words), default=0)


def has_window(path: Path) -> bool:
    """Whether layers of the model attend to a sliding window.

    Raises:
        UserError: the file is no GGUF, or ends within its metadata.
    """
    return any(name.endswith(".attention.sliding_window") and value for name, value in read_head(path).values.items())


def is_repeatable(wanted: bool | None, path: Path) -> bool:
    """Whether the engine is to say the same to a question that is new, cached, or evaluated beside others.

    Where nothing is said, for Q8_0 alone: it costs other types twice as long for a prompt.

    Raises:
        UserError: the file is no GGUF, or ends within its head.
    """
    tensors = read_head(path).tensors.values()
    matrices = {REPEATABLE.get(kind) for shape, kind in tensors if sum(length > 1 for length in shape) > 1}
    able = platform.machine().lower() in ("x86_64", "amd64") and None not in matrices
    if wanted and not able:
        log.warning("serve.repeatable: only x86-64 and quantized weights can: answers of %s may change when a prompt "
                    "is cached, 'make prove' tells how many do", path)  # fmt: skip
    return able and (matrices == {"Q8_0"} if wanted is None else wanted)


def refuse_replaced(path: Path, known: dict[str, str | int]) -> None:
    """After a crash only the file that was proved may be loaded again."""
    if fingerprint(path) != known:
        raise UserError(f"{path} was replaced while it was served: run 'make serve' again")


def settings_of(recipe: Recipe, path: Path) -> Settings:
    """What the recipe says to the engine."""
    return Settings(
        model=str(path),
        name=recipe.name,
        port=recipe.serve.port,
        key_file=str(KEY_FILE),
        context=recipe.serve.context,
        slots=recipe.serve.slots,
        queue=recipe.serve.queue,
        threads=recipe.serve.threads,
        temperature=recipe.serve.temperature,
        ui=recipe.serve.ui == "builtin",
        repeatable=is_repeatable(recipe.serve.repeatable, path),
        origins=recipe.serve.origins,
    )


def problem_of_answer(settings: Settings, key: str) -> str:
    """Ask for one token, as a client would; what is wrong with the answer, or nothing."""
    wanted, name = settings.context, settings.name
    question = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        model = served_model(settings.port, key)
        status, answer = ask(settings.port, "/v1/chat/completions", key, question, timeout=ANSWER_SECONDS)
    except (UserError, *ERRORS) as error:
        return f"does not answer a question: {error}"
    if status != 200 or not answer.get("choices"):
        return f"does not answer a question: {answer.get('error', answer)}"
    if model["id"] != name or answer["model"] != name:
        return f"answers as {model['id']!r}, not as {name!r}"
    if model["meta"]["n_ctx"] < wanted:
        return f"gives a conversation {model['meta']['n_ctx']} tokens, not the {wanted} of serve.context"
    return ""
