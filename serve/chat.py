"""Chat with the served model in the terminal:  python -m serve.chat RECIPE [--ask QUESTION] [key=value ...]

With `--ask` it writes the one answer to standard output and nothing else. The question is the next argument, `-`
for standard input, or `Q` of the environment, where no shell's quoting can break it: make ask Q="..."
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from pipeline.recipe import Recipe
from pipeline.run import Run
from serve.asking.endpoint import is_healthy, port_of_environment, served_model, url_of
from serve.asking.key import read_key

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam
    from rich.console import Console, ConsoleOptions, RenderResult

DOES = "Chat with the served model in the terminal; with --ask QUESTION, print one answer"
HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"


class Answer:
    """One answer as it arrives, and how fast it did."""

    def __init__(
        self, client: "OpenAI", model: str, messages: "list[ChatCompletionMessageParam]", **sampling: Any
    ) -> None:
        self.text = ""
        self.tokens = 0
        self.finish_reason = ""
        self.asked_at = time.monotonic()
        self.first_at = self.last_at = 0.0
        self._stream = client.chat.completions.create(
            model=model, messages=messages, stream=True, stream_options={"include_usage": True}, **sampling
        )

    def __iter__(self) -> Iterator[str]:
        """The answer's pieces; an empty one is a token that is not shown, as a model's thinking."""
        with self._stream as chunks:
            for chunk in chunks:
                self.tokens = chunk.usage.completion_tokens if chunk.usage else self.tokens
                delta = chunk.choices[0].delta if chunk.choices else None
                self.finish_reason = (chunk.choices[0].finish_reason if delta else None) or self.finish_reason
                thought = (delta.model_extra or {}).get("reasoning_content") if delta else None
                if not delta or not (delta.content or thought):
                    continue
                self.last_at = time.monotonic()
                self.first_at = self.first_at or self.last_at
                piece = delta.content or ""
                self.text += piece
                yield piece

    def speed(self) -> str:
        """Tokens a second after the first token, and how long that one took; nothing if the answer was stopped."""
        if self.tokens < 2 or self.last_at <= self.first_at:
            return ""
        rate = (self.tokens - 1) / (self.last_at - self.first_at)
        return f"{self.tokens} tokens, {rate:.1f} a second, the first after {self.first_at - self.asked_at:.2f} s"


def connect(recipe: Recipe) -> "tuple[OpenAI, str]":
    """The official client, and the served model's name, once it is proved to be the recipe's.

    Raises:
        UserError: nothing answers, it refuses the key, or it is another model.
    """
    from openai import DefaultHttpxClient, OpenAI

    # A proxy of the environment must never see what is said to this machine, nor the key.
    http = DefaultHttpxClient(trust_env=False)
    run = Run(recipe.name)
    if (receipt := run.find_receipt("serve")) is None:
        raise UserError(
            f"{run.folder} is not served yet: run 'make serve RECIPE={recipe.name}' in another terminal and wait for "
            "its address"
        )
    served = receipt.metrics
    if served.get("engine") == "ollama":  # not our server: what it holds was proved when it was registered
        key = os.environ.get("OLLAMA_API_KEY") or "none"
        return OpenAI(base_url=served["url"], api_key=key, http_client=http), served["model"]
    port = port_of_environment(served["port"])
    if not is_healthy(port):
        raise UserError(f"nothing answers on {url_of(port)}: run 'make serve' in another terminal first")
    key = read_key()
    name = served_model(port, key, recipe.name)["id"]
    if name != recipe.name:
        raise UserError(
            f"{url_of(port)} serves {name!r}, not {recipe.name!r}: stop it or set the PORT of {recipe.name!r}"
        )
    return OpenAI(base_url=f"{url_of(port)}/v1", api_key=key, http_client=http), name


def ask(client: "OpenAI", model: str, question: str) -> None:
    """One answer on standard output: as it arrives on a terminal, else whole or not at all."""
    try:
        answer = Answer(client, model, [{"role": "user", "content": question}])
        for piece in answer:
            if sys.stdout.isatty():
                print(piece, end="", flush=True)
    except failures() as error:
        raise UserError(reason(error)) from None
    print("" if sys.stdout.isatty() else answer.text, flush=True)


def chat(client: "OpenAI", model: str) -> None:
    """Read, answer, remember, until the end of the input."""
    from rich.console import Console

    console = Console()
    console.print(f"[bold]{model}[/bold]  [dim]{HELP}[/dim]")
    messages: list[ChatCompletionMessageParam] = []
    while (line := read_line()) not in (None, "/quit"):
        if line == "/reset":
            messages.clear()
            console.print("[dim]forgotten[/dim]")
        elif re.fullmatch(r"/[a-z]+", line):
            console.print(f"[dim]{HELP}[/dim]")
        elif line:
            question: ChatCompletionMessageParam = {"role": "user", "content": line}
            if text := show_answer(console, client, model, [*messages, question]):
                messages += [question, {"role": "assistant", "content": text}]


def show_answer(console: "Console", client: "OpenAI", model: str, messages: "list[ChatCompletionMessageParam]") -> str:
    """Stream one answer to the terminal, then print it whole; what arrived before Ctrl-C counts."""
    from rich.live import Live
    from rich.markdown import Markdown

    answer, ending = None, "stopped"
    try:
        with Live(console=console, transient=True, get_renderable=lambda: Tail(answer.text if answer else "")):
            answer = Answer(client, model, messages)
            for _ in answer:
                pass
        ending = answer.speed()
    except KeyboardInterrupt:
        pass
    except failures() as error:
        ending = f"error: {reason(error)}"
    text = answer.text if answer else ""
    if text:
        console.print(Markdown(text))
    console.print(ending, style="dim", highlight=False, markup=False)
    return text


@dataclass(frozen=True)
class Tail:
    """As much of the end of a growing answer as the terminal has room for."""

    text: str

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.markdown import Markdown
        from rich.segment import Segments

        lines = console.render_lines(Markdown(self.text or "..."), options.update(height=None), new_lines=True)
        yield Segments(segment for line in lines[-(console.height - 2) :] for segment in line)


def read_line() -> str | None:
    """What the person types; None at Ctrl-D, Ctrl-C or the end of a file."""
    with suppress(ImportError):
        import readline  # noqa: F401  (its import gives `input` a history and the arrow keys)
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def failures() -> tuple[type[Exception], ...]:
    """What the client raises, before an answer and within one."""
    import httpx2
    from openai import OpenAIError

    return (OpenAIError, httpx2.HTTPError)


def reason(error: Exception) -> str:
    """One line that a person can act on."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and body.get("type") == "exceed_context_size_error":
        asked, context = body["n_prompt_tokens"], body["n_ctx"]
        return f"{asked} tokens, but serve.context is {context}: ask less, or begin a new conversation"
    return f"the server gave no whole answer ({error}): ask again, 'make serve' tells more"


def question_of_arguments() -> str | None:
    """Take `--ask QUESTION` out of the arguments; None when they want a chat."""
    if "--ask" not in sys.argv:
        return None
    at = sys.argv.index("--ask")
    given = sys.argv[at + 1 : at + 2]
    del sys.argv[at : at + 2]
    question = given[0] if given else os.environ.get("Q", "")
    question = sys.stdin.read() if question == "-" else question
    if not question.strip():
        raise UserError(
            "no question given: make ask Q=\"What can you do?\", or: python -m serve.chat RECIPE --ask '...'"
        )
    return question


if __name__ == "__main__":
    with boundary():
        question = question_of_arguments()
        recipe = recipe_of_arguments("serve.chat", DOES)
        client, model = connect(recipe)
        if question is None:
            chat(client, model)
        else:
            ask(client, model, question)
