"""One side of the playground's page: who answers, the conversation, and what is told of its last answer."""

import html
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from pipeline.error import UserError
from pipeline.run import Run
from serve.comparing import prompt
from serve.comparing.artefacts import Artefact
from serve.comparing.conversation import Conversation, Made, append
from serve.comparing.voices import Said, Sampling, Voices

Update = dict[Any, Any]
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


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
        rating = {True: "up", False: "down"}.get(data.liked, "none")
        try:
            append(run.path("feedback.jsonl"), conversation.rated(_index(data), rating))
        except (UserError, OSError) as error:
            return told(error)
        return f"thumb {rating}: kept in {html.escape(str(run.path('feedback.jsonl')))}"

    def correct(conversation: Conversation, data: gr.EditData) -> Update:
        conversation.correct(_index(data), data.value)
        return {pane.conversation: conversation, pane.export: export(conversation)}

    pane.chat.like(rate, pane.conversation, pane.status, **QUIET)
    pane.chat.edit(correct, pane.conversation, [pane.conversation, pane.export], **QUIET)


def whole(
    pane: Pane, artefact: Artefact, conversation: Conversation, asked: prompt.Messages, sampling: Sampling, said: Said
) -> Update:
    """What a whole answer changes; the conversation keeps it with what made it."""
    if said.text:
        made = Made(artefact.name, asked, said.text, asdict(sampling), said.speed)
        conversation.add("assistant", said.text, made)
    else:
        conversation.turns.pop()  # two questions in a row are no conversation
    status = f"<b>{html.escape(artefact.model)}</b> {html.escape(said.speed)}"
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


def read(voices: Voices, artefact: Artefact, messages: list[dict[str, str]]) -> str:
    """The prompt that was just answered, in the tokens that were read."""
    try:
        endpoint = voices.endpoint(artefact).result()
        return prompt.as_html(prompt.tokens(endpoint, messages, Run(artefact.recipe).path("base")))
    except UserError as error:
        return told(error)


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


def told(error: Exception) -> str:
    """One sentence, as the status shows it."""
    return f'<span class="error">{html.escape(str(error))}</span>'
