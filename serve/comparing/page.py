"""The playground's page: one pane or two, each with its conversation, how fast they answer and what they read."""

import codecs
import fcntl
import html
import json
import os
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr

from pipeline.error import UserError
from pipeline.recipe import Recipe
from pipeline.rows import rendered
from pipeline.run import Run
from serve.asking.endpoint import ERRORS, HOST, ask
from serve.comparing.pool import Artefact, Chunk, ModelPool, Sampling, artefacts, together
from serve.running.backend import Endpoint
from setup.install import device

CSS = Path(__file__).with_suffix(".css")
QUEUE = 16
FRAME_SECONDS = 0.05  # a browser shows no more often
LONGEST_QUESTION = 100_000
Messages = list[dict[str, str]]
Update = dict[Any, Any]
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class Made:
    """What an answer was made from, and the answer as the model gave it."""

    artefact: str
    prompt: list[dict[str, str]]
    answer: str
    settings: dict[str, Any]
    speed: str


@dataclass
class Conversation:
    """`turns` are the user's and the assistant's; the system prompt is each answer's own, as `made` has it."""

    turns: list[dict[str, str]] = field(default_factory=list)
    made: dict[int, Made] = field(default_factory=dict)

    def messages(self, system: str) -> list[dict[str, str]]:
        """What is sent: the turns after the system prompt, if there is one."""
        return [*([{"role": "system", "content": system}] if system.strip() else []), *self.turns]

    def add(self, role: str, content: str, made: Made | None = None) -> None:
        if made:
            self.made[len(self.turns)] = made
        self.turns.append({"role": role, "content": content})

    def correct(self, index: int, content: str) -> None:
        """Another text for a turn; what the model really answered stays in `made`."""
        self.turns[index] = {**self.turns[index], "content": content}

    def rated(self, index: int, rating: str) -> dict[str, Any]:
        """A line of the feedback file.

        Raises:
            UserError: the turn is no answer.
        """
        if index not in self.made:
            raise UserError(f"turn {index} is no answer of a model: rate one that is")
        made, now = self.made[index], self.turns[index]["content"]
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rating": rating,
            "artefact": made.artefact,
            "messages": made.prompt,
            "answer": made.answer,
            **({"correction": now} if now != made.answer else {}),
            "settings": made.settings,
            "speed": made.speed,
        }

    def as_data(self) -> str:
        """The conversation as one line of a data file of `make train`; empty while nobody has answered.

        Its system prompt is that of the last answer, and what follows that answer is left out.
        """
        if not self.made:
            return ""
        last = max(self.made)
        system = [message for message in self.made[last].prompt if message["role"] == "system"]
        row = {"messages": [*system, *self.turns[: last + 1]]}
        return json.dumps(row, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Controls:
    """What both sides are asked with."""

    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    max_tokens: gr.Slider
    seed: gr.Number
    at_once: gr.Checkbox


@dataclass(frozen=True)
class Pane:
    """The parts of one side."""

    column: gr.Column
    choice: gr.Dropdown
    chat: gr.Chatbot
    status: gr.HTML
    prompt: gr.HTML
    export: gr.DownloadButton
    conversation: gr.State

    @property
    def changing(self) -> list[Any]:
        """What an answer changes."""
        return [self.chat, self.status, self.prompt, self.export, self.conversation]


def page(recipe: Recipe, pool: ModelPool) -> gr.Blocks:
    """The page of one recipe's run; every visitor has conversations of their own."""
    with gr.Blocks(title=f"{recipe.name} · Truetune", fill_width=True, analytics_enabled=False) as blocks:
        blocks.queue(max_size=QUEUE, default_concurrency_limit=4, api_open=False)
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>{html.escape(recipe.name)} <small>Truetune playground</small></h1>", elem_id="title")
            compare = gr.Checkbox(label="Compare two", elem_id="compare", container=False, min_width=140, scale=0)
        with gr.Row(elem_id="body"):
            with gr.Column(scale=4, min_width=320):
                with gr.Row(elem_id="panes"):
                    panes = [make_pane("left", visible=True), make_pane("right", visible=False)]
                question = gr.Textbox(
                    show_label=False, label="Message", placeholder="Ask something", lines=1, max_lines=8,
                    autofocus=True, submit_btn=True, elem_id="question", max_length=LONGEST_QUESTION, container=False,
                )  # fmt: skip
                with gr.Row(elem_id="actions"):
                    stop = gr.Button("Stop", size="sm", interactive=False, min_width=80, scale=0)
                    clear = gr.Button("New conversation", size="sm", min_width=150, scale=0)
                with gr.Row(elem_id="prompts"):
                    for pane in panes:
                        pane.prompt.render()
            with gr.Column(scale=1, min_width=250, elem_id="settings"):
                controls = _controls(recipe)
        _wire(blocks, recipe, pool, panes, controls, compare, question, stop, clear)
    return blocks


def theme() -> gr.Theme:
    """Gradio's own, with the system's fonts, since its usual ones are fetched from the network."""
    fonts, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono, radius_size="md")


def _controls(recipe: Recipe) -> Controls:
    most = min(recipe.serve.context, 4096)
    return Controls(
        gr.Textbox(label="System prompt", lines=2, max_lines=8, placeholder="The chat template's own"),
        gr.Slider(0, 2, recipe.serve.temperature, step=0.05, label="Temperature"),
        gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p"),
        gr.Slider(0, 200, 40, step=1, label="Top k (0: off)"),
        gr.Slider(1, most, min(256, most), step=1, label="Max tokens"),
        gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1),
        gr.Checkbox(
            device() == "cuda",
            label="Both at the same time",
            info="On a processor each slows the other; one after another, tokens/s are true",
        ),
    )


def _wire(
    blocks: gr.Blocks, recipe: Recipe, pool: ModelPool, panes: list[Pane], controls: Controls,
    compare: gr.Checkbox, question: gr.Textbox, stop: gr.Button, clear: gr.Button,
) -> None:  # fmt: skip
    run, stops = Run.of(recipe), {}
    fields = list(vars(controls).values())
    asking = [question, stop, clear, *(part for pane in panes for part in pane.changing)]

    def listed(found: dict[str, Artefact]) -> list[tuple[str, str]]:
        return [(artefact.label(recipe.name), name) for name, artefact in found.items()]

    def refreshed() -> Update:
        """Without a value: what was chosen while this was looked up stays."""
        named = listed(artefacts(recipe.name))
        return {pane.choice: gr.Dropdown(choices=named) for pane in panes}

    def choices(left: str | None, right: str | None) -> Update:
        found = artefacts(recipe.name)
        named, names = listed(found), list(found)
        base = f"{recipe.name}/base"
        first = left if left in found else names[0] if names else None
        second = right if right in found else base if base in found else names[-1] if names else None
        return {panes[0].choice: gr.Dropdown(named, value=first), panes[1].choice: gr.Dropdown(named, value=second)}

    def ask(
        request: gr.Request, text: str, both: bool, left: str, right: str,
        one: Conversation, two: Conversation, *given: Any,
    ) -> Iterator[Update]:  # fmt: skip
        if not text or not text.strip():
            yield {question: text}
            return
        system, *numbers, at_once = given
        ended = stops[request.session_hash] = threading.Event()
        shown = list(zip(panes, (left, right), (one, two), strict=True))[: 2 if both else 1]
        try:
            sampling = _sampling(*numbers)
            yield {question: gr.Textbox("", interactive=False), stop: gr.Button(interactive=True),
                   clear: gr.Button(interactive=False)}  # fmt: skip
            if not (yield from _answers(recipe, pool, shown, text, system, sampling, at_once, ended)):
                yield {question: text}  # to ask it otherwise, or again
        except UserError as error:
            yield {pane.status: shown_error(error) for pane, _, _ in shown} | {question: text}
        finally:
            ended.set()
            stops.pop(request.session_hash, None)
        yield {question: gr.Textbox(interactive=True), stop: gr.Button(interactive=False),
               clear: gr.Button(interactive=True)}  # fmt: skip

    def end(request: gr.Request) -> None:
        if event := stops.get(request.session_hash):
            event.set()

    def empty() -> Update:
        shut = gr.DownloadButton(interactive=False)
        emptied = (
            {p.conversation: Conversation(), p.chat: [], p.status: "", p.prompt: "", p.export: shut} for p in panes
        )
        return next(emptied) | next(emptied)

    picked = [pane.choice for pane in panes]
    blocks.load(choices, picked, picked, **QUIET)
    second = panes[1]
    compare.change(lambda both: (gr.Column(visible=both), gr.HTML(visible=both)), compare,
                   [second.column, second.prompt], **QUIET)  # fmt: skip
    inputs = [question, compare, *picked, *(pane.conversation for pane in panes), *fields]
    question.submit(ask, inputs, asking, concurrency_limit=1, concurrency_id="answers", **QUIET)
    stop.click(end, None, None, queue=False, **QUIET)
    blocks.unload(end)
    clear.click(empty, None, [part for pane in panes for part in pane.changing], **QUIET)
    for pane in panes:
        pane.choice.focus(refreshed, None, picked, **QUIET)
        pane.chat.clear(empty, None, [part for other in panes for part in other.changing], **QUIET)
        keep(run, pane)


def _answers(
    recipe: Recipe, pool: ModelPool, shown: list[tuple[Pane, str, Conversation]], text: str, system: str,
    sampling: Sampling, at_once: bool, ended: threading.Event,
) -> Generator[Update, None, bool]:  # fmt: skip
    """Both answers as they come, and whether there was any; what a pane has when the page is left, it keeps."""
    found = artefacts(recipe.name)
    chosen = []
    for side, name, before in shown:
        if name not in found:
            raise UserError(f"{name} is no longer there: choose another")
        conversation = deepcopy(before)  # the page's own stays as it is until the answer is whole
        conversation.add("user", text)
        chosen.append((side, found[name], conversation))
        yield {side.chat: conversation.turns, side.status: "waiting"}
    asked = [conversation.messages(system) for _, _, conversation in chosen]
    coming = [
        pool.answer(artefact, messages, sampling, ended)
        for (_, artefact, _), messages in zip(chosen, asked, strict=True)
    ]
    waiting, shown_at, answered = set(range(len(chosen))), [0.0] * len(chosen), False
    for number, chunk in together(coming, at_once):
        side, artefact, conversation = chosen[number]
        if isinstance(chunk, UserError):
            waiting.discard(number)
            yield unanswered(side, conversation, shown_error(chunk))
        elif chunk.speed:
            waiting.discard(number)
            answered = True
            yield whole(side, artefact, conversation, asked[number], sampling, chunk)
            yield {side.prompt: read(pool, artefact, asked[number])}
        elif time.monotonic() - shown_at[number] > FRAME_SECONDS:
            shown_at[number] = time.monotonic()
            turns = [*conversation.turns, *([{"role": "assistant", "content": chunk.text}] if chunk.text else [])]
            yield {side.chat: turns, side.status: f"{html.escape(chunk.status)}…"}
    for number in waiting:  # stopped before it was loaded
        side, _, conversation = chosen[number]
        yield unanswered(side, conversation, "stopped")
    return answered


def _sampling(temperature: float, top_p: float, top_k: float, max_tokens: float, seed: float | None) -> Sampling:
    """The numbers within their bounds, whatever a browser sends.

    Raises:
        UserError: one is missing or out of bounds.
    """
    bounds = {"temperature": (temperature, 0, 2), "top_p": (top_p, 0.01, 1), "top_k": (top_k, 0, 1000),
              "max_tokens": (max_tokens, 1, 32768), "seed": (seed, 0, 2**31 - 1)}  # fmt: skip
    for name, (value, low, high) in bounds.items():
        if not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"{name.replace('_', ' ')} is {value}: give a number from {low} to {high}")
    return Sampling(float(temperature), float(top_p), int(top_k), int(max_tokens), int(seed or 0))


def make_pane(side: str, visible: bool) -> Pane:
    """Lay out one side; its `prompt` is rendered where the page wants it."""
    with gr.Column(visible=visible, min_width=320, elem_id=side, elem_classes="pane") as column:
        choice = gr.Dropdown([], label=f"Who answers, {side}", show_label=False, container=False, filterable=False)
        chat = gr.Chatbot(
            show_label=False, label=f"Conversation, {side}", height="100%", layout="bubble", buttons=["copy"],
            editable="all", feedback_options=("Like", "Dislike"), allow_tags=False, latex_delimiters=[],
            placeholder="Its answers appear here. A thumb is kept; an edited turn is exported as edited.",
            elem_classes="chat",
        )  # fmt: skip
        with gr.Row(elem_classes="below"):
            status = gr.HTML("", elem_classes="status")
            export = gr.DownloadButton("Export", size="sm", interactive=False, min_width=80, scale=0)
    shown = gr.HTML(visible=visible, elem_id=f"{side}-prompt", elem_classes="prompt", render=False)
    return Pane(column, choice, chat, status, shown, export, gr.State(Conversation()))


def keep(run: Run, pane: Pane) -> None:
    """What a person does to an answer: rate it, correct it."""

    def rate(conversation: Conversation, data: gr.LikeData) -> str:
        rating = {True: "up", False: "down"}.get(data.liked, "none")  # type: ignore[arg-type]
        try:
            append(run.path("feedback.jsonl"), conversation.rated(_index(data), rating))
        except (UserError, OSError) as error:
            return shown_error(error)
        return f"thumb {rating}: kept in {html.escape(str(run.path('feedback.jsonl')))}"

    def correct(conversation: Conversation, data: gr.EditData) -> Update:
        conversation.correct(_index(data), data.value)
        return {pane.conversation: conversation, pane.export: export(conversation)}

    pane.chat.like(rate, pane.conversation, pane.status, **QUIET)
    pane.chat.edit(correct, pane.conversation, [pane.conversation, pane.export], **QUIET)


def whole(
    pane: Pane, artefact: Artefact, conversation: Conversation, asked: Messages, sampling: Sampling, chunk: Chunk
) -> Update:
    """What a whole answer changes; the conversation keeps it with what made it."""
    if chunk.text:
        made = Made(artefact.name, asked, chunk.text, asdict(sampling), chunk.speed)
        conversation.add("assistant", chunk.text, made)
    else:
        conversation.turns.pop()  # two questions in a row are no conversation
    status = f"<b>{html.escape(artefact.model)}</b> {html.escape(chunk.speed)}"
    return {
        pane.chat: conversation.turns,
        pane.status: status,
        pane.conversation: conversation,
        pane.export: export(conversation),
    }


def unanswered(pane: Pane, conversation: Conversation, status: str) -> Update:
    """Take back a question that got no answer: the next one must not follow it."""
    conversation.turns.pop()
    return {pane.chat: conversation.turns, pane.status: status, pane.conversation: conversation}


def read(pool: ModelPool, artefact: Artefact, messages: list[dict[str, str]]) -> str:
    """The prompt that was just answered, in the tokens that were read."""
    try:
        endpoint = pool.endpoint(artefact).result()
        return as_html(tokens(endpoint, messages, Run(artefact.recipe).path("base")))
    except UserError as error:
        return shown_error(error)


def export(conversation: Conversation) -> gr.DownloadButton:
    """The button with the conversation as a file, in the folder that Gradio may serve from and that ends with it."""
    if not (text := conversation.as_data()):
        return gr.DownloadButton(interactive=False)
    files = Path(gr.utils.get_upload_folder())
    files.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=files))
    (folder / "conversation.jsonl").write_text(text, encoding="utf-8")
    return gr.DownloadButton(value=str(folder / "conversation.jsonl"), interactive=True)


def _index(data: Any) -> int:
    return int(data.index[0] if isinstance(data.index, list | tuple) else data.index)


def shown_error(error: Exception) -> str:
    """One sentence, as the status shows it."""
    return f'<span class="error">{html.escape(str(error))}</span>'


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a JSONL file, whole or not at all, whoever else writes; a line that a kill cut stays alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        joint = b"\n" if end and file.read(1) != b"\n" else b""
        file.write(joint + json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Token:
    """A token's id, and its text: empty where it ends within a character."""

    id: int
    text: str
    is_special: bool


def tokens(endpoint: Endpoint, messages: Messages, base: Path) -> list[Token]:
    """What the engine itself makes of the messages; where it does not tell, what the tokenizer of `base` makes."""
    found = _of_engine(endpoint, messages) or _of_folder(base, messages)
    special = _special_ids(base)
    return [Token(id, text, id in special) for id, text in found]


def _of_engine(endpoint: Endpoint, messages: Messages) -> list[tuple[int, str]]:
    """By the two routes of llama.cpp's server, which only this machine is asked for."""
    url = urlsplit(endpoint.url)
    if url.hostname != HOST or not url.port:
        return []
    try:
        status, rendered = ask(url.port, "/apply-template", endpoint.key, {"messages": messages})
        if status != 200:
            return []
        asked = {"content": rendered["prompt"], "add_special": True, "parse_special": True, "with_pieces": True}
        status, cut = ask(url.port, "/tokenize", endpoint.key, asked)
        return _texts(cut["tokens"]) if status == 200 else []
    except (*ERRORS, LookupError, TypeError):
        return []


def _texts(pieces: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """llama.cpp gives the bytes of a token that ends within a character: the one that ends it shows it."""
    decoder, found = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for piece in pieces:
        text = piece["piece"]
        found.append((piece["id"], decoder.decode(text.encode() if isinstance(text, str) else bytes(text))))
    return found


def _of_folder(base: Path, messages: Messages) -> list[tuple[int, str]]:
    if not (base / "tokenizer.json").is_file():
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = rendered(tokenizer, messages, prompt=True)
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    return [
        (id, prompt[start:end])
        for id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _special_ids(base: Path) -> set[int]:
    try:
        added = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    except (OSError, ValueError, LookupError):
        return set()
    return {token["id"] for token in added if token["special"]}


def as_html(found: list[Token]) -> str:
    """The tokens in a row, each with its bounds and its id under the pointer, and the ids as a list."""
    if not found:
        return '<p class="quiet">This endpoint does not show its prompt.</p>'
    spans = "".join(_span(number, token) for number, token in enumerate(found))
    ids = ", ".join(str(token.id) for token in found)
    special = sum(token.is_special for token in found)
    head = f'<p class="quiet">{len(found)} tokens, {special} of them special; point at one to see its id</p>'
    return f'{head}<div class="tokens">{spans}</div><details><summary>ids</summary><code>[{ids}]</code></details>'


def _span(number: int, token: Token) -> str:
    kind = "special" if token.is_special else f"shade{number % 2}"
    text = html.escape(token.text).replace("\n", '<i class="mark">↵</i>\n').replace("\t", '<i class="mark">⇥</i>\t')
    shown = text or '<i class="mark">…</i>'
    return f'<span class="token {kind}" title="{token.id}">{shown}</span>'
