"""The chat template: what it renders of a row, and which of its tokens are the assistant's, and so are learned."""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, takewhile
from typing import Any

from pipeline import UserError
from pipeline.rows import text_arguments

IGNORED = -100  # the label that torch's cross entropy leaves out

Message = dict[str, Any]
Spoken = tuple[str, list[tuple[int, int]]]  # a text, and where in it the assistant's words begin and end


@dataclass(frozen=True)
class Example:
    """One training row: token ids, and the same ids as labels where the assistant speaks, else IGNORED."""

    input_ids: list[int]
    labels: list[int]


def render(tokenizer: Any, messages: list[Message], prompt: bool = False, tools: Any = None) -> str:
    """The template's text for the messages and tools, with the opening of the assistant's turn if it is a `prompt`.

    Raises:
        UserError: the template refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(messages, tools or None, tokenize=False, add_generation_prompt=prompt)
        return str(rendered)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template refuses a conversation of {roles} ({error}): mend the data or the template"
        ) from None


def row_examples(tokenizer: Any, row: dict[str, Any], max_tokens: int) -> list[Example]:
    """Training rows of one row of `data/`: a conversation with or without tools, or plain text.

    Raises:
        UserError: names the row's `source`, and what the template refuses or would leave out in silence.
    """
    [found] = batch_examples(tokenizer, [row], max_tokens)
    if isinstance(found, UserError):
        raise found
    return found


def batch_examples(tokenizer: Any, rows: list[dict[str, Any]], max_tokens: int) -> list[list[Example] | UserError]:
    """What `row_examples` gives or raises for each row; tokenizing many texts at once is twice as fast."""
    found: list[list[Example] | UserError] = []
    texts: list[Spoken] = []
    of_row: list[list[Example]] = []
    for row in rows:
        if "text" in row:
            found.append(text_examples(tokenizer, row["text"], max_tokens))
            continue
        try:
            spoken = renderings(tokenizer, row["messages"], row.get("tools"))
        except UserError as error:
            place = row.get("source", "a row")
            found.append(UserError(*(f"{place}: {problem}" for problem in error.problems)))
            continue
        found.append([])
        texts += spoken
        of_row += [found[-1]] * len(spoken)
    for example, own in zip(_labelled(tokenizer, texts, max_tokens), of_row, strict=True):
        if example:
            own.append(example)
    return found


def text_examples(tokenizer: Any, text: str, max_tokens: int) -> list[Example]:
    """Plain text and an eos, every token learned but the very first, in pieces of at most `max_tokens`.

    A piece begins with the last token of the one before, not learned again, so that each is learned after another.
    """
    ids = tokenizer(text).input_ids
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    pieces = [ids[first : first + max_tokens] for first in range(0, max(1, len(ids) - 1), max_tokens - 1)]
    return [Example(piece, [IGNORED, *piece[1:]]) for piece in pieces]


def examples(tokenizer: Any, messages: list[Message], max_tokens: int, tools: Any = None) -> list[Example]:
    """Training rows of a conversation: one, or one a turn where the template renders past turns differently.

    Every token of every answer and its end-of-turn token is supervised, in the context in which a server renders it.
    Rows are cut to `max_tokens`; a row whose answer is cut off whole is left out.

    Raises:
        UserError: the template refuses the conversation, leaves out its tools, or opens a turn in two ways.
    """
    return [row for row in _labelled(tokenizer, renderings(tokenizer, messages, tools), max_tokens) if row]


def renderings(tokenizer: Any, messages: list[Message], tools: Any = None) -> list[Spoken]:
    """The texts of these training rows, each with where the assistant's words begin and end."""
    messages = _as_shown(tokenizer, messages, tools)
    # Weight 0 is OpenAI's mark of an answer that others follow and that is not to be learned itself.
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [index for index in spoken if messages[index].get("weight") != 0]
    whole = render(tokenizer, messages, tools=tools)
    answers = []
    for turn in turns:
        prompt = render(tokenizer, messages[:turn], prompt=True, tools=tools)
        answered = whole if turn == len(messages) - 1 else render(tokenizer, messages[: turn + 1], tools=tools)
        answered = _as_served(prompt, answered)
        answers.append((answered, (len(prompt), len(answered))))
    if all(whole.startswith(answered) for answered, _ in answers):
        return [(whole, [span for _, span in answers])]
    return [(answered, [span]) for answered, span in answers]  # as of Qwen3, which drops the thoughts of past turns


def _as_served(prompt: str, answered: str) -> str:
    """The conversation up to a turn, opened as in the prompt: Hermes' template writes a past turn after a newline more.

    Raises:
        UserError: they differ in more than white space.
    """
    if answered.startswith(prompt):
        return answered
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, answered, strict=False)))
    opening, turn = prompt[same:].lstrip(), answered[same:].lstrip()
    if not turn.startswith(opening):
        raise UserError(
            f"the chat template opens the assistant's turn with {prompt[-40:]!r} but writes a past turn as "
            f"{answered[-40:]!r}: training and serving would differ, mend the template"
        )
    return prompt + turn.removeprefix(opening)


def _labelled(tokenizer: Any, texts: list[Spoken], max_tokens: int) -> list[Example | None]:
    """Each text's tokens, of which those that end within a span are supervised, up to the span's last eos.

    A token may be half the prompt's, as the newline of a ChatML prompt takes the space of an answer that begins with
    one: it ends in the answer, so it is learned. A server splits there, and the model meets the halves.
    """
    import numpy as np

    if not texts:
        return []
    encoded = tokenizer(
        [text for text, _ in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    rows, offsets = encoded["input_ids"], encoded["offset_mapping"]
    # From here on the texts are one long text: numpy costs as much for a short array as for a long one.
    before = np.cumsum([0, *(len(text) for text, _ in texts)])
    lengths = [len(row) for row in rows]
    ids = np.fromiter(chain.from_iterable(rows), np.int64)
    places = np.fromiter(chain.from_iterable(chain.from_iterable(offsets)), np.int64).reshape(-1, 2)
    starts, ends = (places + np.repeat(before[:-1], lengths)[:, None]).T
    spans = [before[index] + span for index, (_, spans) in enumerate(texts) for span in spans]
    firsts, lasts = np.array(spans, np.int64).reshape(-1, 2).T
    # What the template writes after the turn's end is never generated.
    stops = np.append(0, ends[ids == tokenizer.eos_token_id])
    stops = stops[np.searchsorted(stops, lasts, "right") - 1]
    learned = np.zeros(before[-1], bool)
    for first, last in zip(firsts, np.where(stops > firsts, stops, lasts), strict=True):
        learned[first:last] = True
    labels = np.where(learned[ends - 1] & (ends > starts), ids, IGNORED)
    found: list[Example | None] = []
    for row, own in zip(rows, np.split(labels, np.cumsum(lengths)[:-1]), strict=True):
        own = own[:max_tokens]
        found.append(Example(row[:max_tokens], own.tolist()) if (own != IGNORED).any() else None)
    return found


@dataclass(frozen=True)
class Shown:
    """What a template writes of a conversation, as it was tried; the rest it would leave out in silence."""

    tools: bool
    tool_calls: bool
    tool_answers: bool
    reasoning: bool
    text_arguments: bool  # it wants a tool call's arguments as JSON text, as DeepSeek's do
    short_ids: bool  # it refuses a tool call's id that has not 9 characters, as Mistral's do


def shown(tokenizer: Any) -> Shown:
    """What this tokenizer's template shows, tried once."""
    return _shown(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=8)
def _shown(tokenizer: Any, template: str) -> Shown:
    tool = {"name": "findTheTown", "description": "Finds", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": tool}]

    def shows(part: str, *messages: Message) -> bool:
        try:
            asked = {"role": "user", "content": "Where?"}
            return part in render(tokenizer, [asked, *messages], prompt=not messages, tools=tools)
        except UserError:
            return False

    def called(id: str, arguments: Any) -> Message:
        function = {"name": tool["name"], "arguments": arguments}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": id, "function": function}],
        }

    town = "Ouagadougou"
    ways = [(id, kind) for kind in (dict, json.dumps) for id in ("call_00000001", "call00001")]
    way = next(((id, kind) for id, kind in ways if shows(town, called(id, kind({"town": town})))), None)
    id, kind = way or ways[0]
    found = {"role": "tool", "tool_call_id": id, "name": tool["name"], "content": "BurkinaFaso"}
    said = {"role": "assistant", "content": "There."}
    return Shown(
        tools=shows("findTheTown"),
        tool_calls=way is not None,
        tool_answers=shows("BurkinaFaso", called(id, kind({"town": town})), found, said),
        reasoning=shows("IthinkSo", said | {"reasoning_content": "IthinkSo"}),
        text_arguments=kind is not dict,
        short_ids=id == "call00001",
    )


def _as_shown(tokenizer: Any, messages: list[Message], tools: Any) -> list[Message]:
    """The messages as the template wants them.

    Raises:
        UserError: the template would leave out tools, calls or answers of tools.
    """
    called = any(message.get("tool_calls") for message in messages)
    answered = any(message["role"] == "tool" for message in messages)
    if not (tools or called or answered):
        return messages
    known = shown(tokenizer)
    has = {"tools": (tools, known.tools), "tool calls": (called, known.tool_calls)}
    has["answers of tools"] = (answered, known.tool_answers)
    lost = [name for name, (there, shows) in has.items() if there and not shows]
    if lost:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} shows no {', no '.join(lost)}, which this conversation "
            "has: use a base whose template does, name one in chat_template, or set train.unshown=drop"
        )
    if known.short_ids:
        messages = [_with_short_ids(message) for message in messages]
    return text_arguments(messages) if known.text_arguments else messages


def _with_short_ids(message: Message) -> Message:
    """The message with the last nine letters and digits of its tool calls' ids, as vLLM gives Mistral's templates."""

    def short(id: str) -> str:
        return "".join(filter(str.isalnum, id))[-9:].rjust(9, "0")

    if message.get("tool_call_id"):
        message = message | {"tool_call_id": short(message["tool_call_id"])}
    if message.get("tool_calls"):
        message = message | {"tool_calls": [call | {"id": short(call.get("id", ""))} for call in message["tool_calls"]]}
    return message
