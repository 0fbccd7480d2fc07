"""Chat with the served model in the terminal:  python -m serve.chat RECIPE [--ask QUESTION] [key=value ...]

With `--ask` it writes the one answer to standard output and nothing else. The question is the next argument, `-`
for standard input, or `Q` of the environment, where no shell's quoting can break it: make ask Q="..."
"""

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from serve.asking.endpoint import Answer, connect, failures, reason

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam
    from rich.console import Console, ConsoleOptions, RenderResult

DOES = "Chat with the served model in the terminal; with --ask QUESTION, print one answer"
HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"


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
