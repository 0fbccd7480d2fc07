"""The chat template: what it renders of a row, and which of its tokens are the assistant's, and so are learned."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, takewhile
from typing import Any

from pipeline import UserError
from pipeline.error import reason
from pipeline.rows import rendered

# What renderers give to every template.
RENDERERS = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "strftime_now"}
IGNORED = -100  # the label that torch's cross entropy leaves out
PRIVATE = re.compile("[\U00100000-\U0010fffd]")  # characters in which no text is written stand in for control tokens

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One training row: token ids, and the same ids as labels where the assistant speaks, else IGNORED."""

    input_ids: list[int]
    labels: list[int]

    @property
    def sides(self) -> tuple[tuple[str, list[int], list[int]], ...]:
        """(name, ids, labels) of what the model reads of the row: one conversation, which has no name."""
        return (("", self.input_ids, self.labels),)


@dataclass(frozen=True)
class Spoken:
    """A text, from and to where the assistant speaks in it, and where the characters are that are only read.

    With `stand_ins`, control tokens and their stand-ins are swapped in it (`Controls`).
    """

    text: str
    answers: list[Span]
    only_read: list[Span]
    stand_ins: bool = False


def row_examples(tokenizer: Any, row: dict[str, Any], max_tokens: int, supervise: str = "all") -> list[Example]:
    """Training rows of one row of `data/`: a conversation with or without tools, or plain text.

    Raises:
        UserError: names the row's `source`, and what the template refuses or would leave out in silence.
    """
    [found] = batch_examples(tokenizer, [row], max_tokens, supervise)
    if isinstance(found, UserError):
        raise found
    return found


def batch_examples(
    tokenizer: Any, rows: list[dict[str, Any]], max_tokens: int, supervise: str = "all"
) -> list[list[Example] | UserError]:
    """What `row_examples` gives or raises for each row; tokenizing many texts at once is twice as fast."""
    found: list[list[Example] | UserError] = []
    texts: list[Spoken] = []
    of_row: list[list[Example]] = []
    for row in rows:
        if "text" in row:
            found.append(text_examples(tokenizer, row["text"], max_tokens))
            continue
        try:
            spoken = renderings(tokenizer, row["messages"], row.get("tools"), supervise)
        except UserError as error:
            place = row.get("source", "a row")
            found.append(UserError(*(f"{place}: {problem}" for problem in error.problems)))
            continue
        own: list[Example] = []
        found.append(own)
        texts += spoken
        of_row += [own] * len(spoken)
    for example, own in zip(_labelled(tokenizer, texts, max_tokens), of_row, strict=True):
        if example:
            own.append(example)
    return found


def text_examples(tokenizer: Any, text: str, max_tokens: int) -> list[Example]:
    """Plain text and an eos, every token learned but the very first, in pieces of at most `max_tokens`.

    A piece begins with the last token of the one before, not learned again, so that each is learned after another.
    Control tokens are tokens only in a text that begins with one: it is a conversation that is rendered already.
    """
    known = controls(tokenizer)
    as_text = known.spelled(text) and not known.token.match(text.lstrip())
    ids = known.plain.encode(text).ids if as_text else tokenizer(text).input_ids
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    pieces = [ids[first : first + max_tokens] for first in range(0, max(1, len(ids) - 1), max_tokens - 1)]
    return [Example(piece, [IGNORED, *piece[1:]]) for piece in pieces]


def examples(
    tokenizer: Any, messages: list[Message], max_tokens: int, tools: Any = None, supervise: str = "all"
) -> list[Example]:
    """Training rows of a conversation: one, or one a turn where the template renders past turns differently.

    Every token of every answer (of the last one, if that is what is to `supervise`) and its end-of-turn token is
    supervised, in the context in which a server renders it; but for what the row's author marks as only read.
    Rows are cut to `max_tokens`; a row whose answer is cut off whole is left out.

    Raises:
        UserError: the template refuses the conversation, leaves out a part of it, or opens a turn in two ways.
    """
    spoken = renderings(tokenizer, messages, tools, supervise)
    return [row for row in _labelled(tokenizer, spoken, max_tokens) if row]


def renderings(tokenizer: Any, messages: list[Message], tools: Any = None, supervise: str = "all") -> list[Spoken]:
    """The texts of these training rows, each with where the assistant's words begin and end."""
    spelled = controls(tokenizer).spelled([messages, tools])
    if spelled:
        messages, tools = controls(tokenizer).swapped([messages, tools])
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [index for index in spoken[-1:] if supervise == "last"] or spoken
    # Weight 0 is OpenAI's mark of an answer that others follow and that is not to be learned itself.
    turns = [index for index in turns if messages[index].get("weight") != 0]
    if not turns:
        raise UserError("its last answer is marked as one that is only read: set train.supervise=all, or fix the row")
    whole = rendered(tokenizer, messages, tools)
    _check_shown(tokenizer, messages, tools, whole)
    answers, only_read = [], []
    for turn in turns:
        prompt = rendered(tokenizer, messages[:turn], tools, prompt=True)
        answered = whole if turn == len(messages) - 1 else rendered(tokenizer, messages[: turn + 1], tools)
        answered = _as_served(tokenizer, messages[: turn + 1], tools, prompt, answered)
        answers.append((answered, (len(prompt), len(answered))))
        only_read.append(_only_read(messages[turn], answered, len(prompt)))
    if all(whole.startswith(answered) for answered, _ in answers):
        found = [Spoken(whole, [span for _, span in answers], list(chain.from_iterable(only_read)), spelled)]
    else:  # as of Qwen3, which drops the thoughts of past turns
        each = zip(answers, only_read, strict=True)
        found = [Spoken(answered, [span], spans, spelled) for (answered, span), spans in each]
    return found


def _only_read(message: Message, answered: str, start: int) -> list[Span]:
    """Where in the rendered text those characters of an answer's content are that are only read.

    Raises:
        UserError: the template does not write the content as it stands.
    """
    if not message.get("only_read"):
        return []
    thought = message.get("reasoning_content") or ""
    after_thought = max(start, answered.find(thought, start) + len(thought)) if thought in answered[start:] else start
    at = answered.find(message["content"].strip(), after_thought)
    if at < 0:
        raise UserError(
            "the chat template changes the words of an answer of which a part is marked as only read: mark the whole "
            "answer, or name a template in chat_template that writes it as it stands"
        )
    at -= len(message["content"]) - len(message["content"].lstrip())
    return [(max(start, at + first), at + last) for first, last in message["only_read"]]


def _as_served(tokenizer: Any, messages: list[Message], tools: Any, prompt: str, answered: str) -> str:
    """The conversation up to its last turn, opened as in the prompt: in past turns Hermes' template has a newline more.

    Raises:
        UserError: they differ in more than white space.
    """
    if answered.startswith(prompt):
        return answered
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, answered, strict=False)))
    opening, turn = prompt[same:].lstrip(), answered[same:].lstrip()
    if not turn.startswith(opening):
        before = len(rendered(tokenizer, messages[:-1], tools))
        past = answered[before:].partition(messages[-1]["content"].strip() or "\n")[0]  # nothing of this row's own
        raise UserError(
            f"the chat template opens the assistant's turn with {prompt[before:]!r} and a past one with {past!r}: "
            "training and serving would differ, fix the template"
        )
    return prompt + turn.removeprefix(opening)


def _labelled(tokenizer: Any, texts: list[Spoken], max_tokens: int) -> list[Example | None]:
    """Each text's tokens, of which those that end within an answer are supervised, up to the answer's last eos.

    A token may be half the prompt's, as the newline of a ChatML prompt takes the space of an answer that begins with
    one: it ends in the answer, so it is learned. A server splits there, and the model meets the halves. A token that
    has a character which is only read is not learned.
    """
    import numpy as np

    if not texts:
        return []
    rows, offsets = _encoded(tokenizer, texts)
    # From here on the texts are one long text: numpy costs as much for a short array as for a long one.
    before = np.cumsum([0, *(len(spoken.text) for spoken in texts)])
    lengths = [len(row) for row in rows]
    ids = np.fromiter(chain.from_iterable(rows), np.int64)
    places = np.fromiter(chain.from_iterable(chain.from_iterable(offsets)), np.int64).reshape(-1, 2)
    starts, ends = (places + np.repeat(before[:-1], lengths)[:, None]).T
    spans = [before[index] + span for index, spoken in enumerate(texts) for span in spoken.answers]
    firsts, lasts = np.array(spans, np.int64).reshape(-1, 2).T
    # What the template writes after the turn's end is never generated.
    stops = np.append(0, ends[ids == tokenizer.eos_token_id])
    stops = stops[np.searchsorted(stops, lasts, "right") - 1]
    learned = np.zeros(before[-1], bool)
    for first, last in zip(firsts, np.where(stops > firsts, stops, lasts), strict=True):
        learned[first:last] = True
    supervised = learned[ends - 1] & (ends > starts)
    if any(spoken.only_read for spoken in texts):
        only_read = np.zeros(before[-1], bool)
        for index, spoken in enumerate(texts):
            for first, last in spoken.only_read:
                only_read[before[index] + first : before[index] + last] = True
        until = np.append(0, np.cumsum(only_read))
        supervised &= until[ends] == until[starts]
    labels = np.where(supervised, ids, IGNORED)
    found: list[Example | None] = []
    for row, own in zip(rows, np.split(labels, np.cumsum(lengths)[:-1]), strict=True):
        own = own[:max_tokens]
        found.append(Example(row[:max_tokens], own.tolist()) if (own != IGNORED).any() else None)
    return found


def _encoded(tokenizer: Any, texts: list[Spoken]) -> tuple[list[list[int]], list[list[Span]]]:
    """(ids, offsets) of each text."""
    encoded = tokenizer(
        [spoken.text for spoken in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    rows, offsets = encoded["input_ids"], encoded["offset_mapping"]
    for index, spoken in enumerate(texts):
        if spoken.stand_ins:
            known = controls(tokenizer)
            made = known.plain.encode(known.swapped(spoken.text), add_special_tokens=False)
            rows[index], offsets[index] = made.ids, made.offsets
    return rows, offsets


@dataclass(frozen=True)
class Controls:
    """The control tokens of a vocabulary, of which a text may spell one without meaning it.

    Before a row is rendered, spelled tokens are swapped for stand-ins of the same length; after it all are swapped
    once more, which leaves what was spelled as it was, and stand-ins where the template wrote a token. `plain` is the
    tokenizer that knows the tokens by their stand-ins alone.
    """

    tokenizer: Any
    token: re.Pattern[str]
    either: re.Pattern[str]
    swap: dict[str, str]

    def spelled(self, value: Any) -> bool:
        """Whether a text in it spells a control token.

        Raises:
            UserError: a text has one of the characters that stand-ins are made of.
        """
        found = False
        for text in _texts(value):
            if not text.isascii() and (private := PRIVATE.search(text)):
                raise UserError(f"has the private character {private[0]!r}, which no font shows: remove it")
            found = found or self.token.search(text) is not None
        return found

    def swapped(self, value: Any) -> Any:
        """The same with tokens and stand-ins in each other's place; names of keys stay."""
        if isinstance(value, str):
            return self.either.sub(lambda found: self.swap[found[0]], value)
        if isinstance(value, list):
            return [self.swapped(item) for item in value]
        return {key: self.swapped(item) for key, item in value.items()} if isinstance(value, dict) else value

    @cached_property
    def plain(self) -> Any:
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        model = state["model"]
        for token in state["added_tokens"]:
            token["content"] = self.swap.get(token["content"], token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.swap.get(token, token): id for token, id in model["vocab"].items()}
        else:
            model["vocab"] = [[self.swap.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in self.swap:
            model["unk_token"] = self.swap[model["unk_token"]]
        return Tokenizer.from_str(json.dumps(state))


def controls(tokenizer: Any) -> Controls:
    """Those of this tokenizer."""
    return _controls(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _controls(tokenizer: Any, _: int) -> Controls:
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token)]
    stand_ins = [chr(0x100000 + number) + "\U0010fffd" * (len(token) - 1) for number, token in enumerate(tokens)]
    swap = dict(zip(tokens + stand_ins, stand_ins + tokens, strict=True))
    token, either = (
        re.compile("|".join(map(re.escape, sorted(of, key=len, reverse=True))) or r"(?!)") for of in (tokens, swap)
    )
    return Controls(tokenizer, token, either, swap)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


@dataclass(frozen=True)
class Shown:
    """What a template writes of a conversation, as it was tried; the rest it would leave out in silence."""

    tools: bool
    tool_calls: bool
    tool_answers: bool
    reasoning: bool
    names: frozenset[str]  # roles whose turns are written with the speaker's name


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
            return part in rendered(tokenizer, [asked, *messages], tools, prompt=not messages)
        except UserError:
            return False

    def named(role: str) -> bool:
        turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
        turns = [{"role": "system", "content": "Help."}, *turns] if role == "system" else turns
        try:
            given = [turn | {"name": "Wilhelmina"} if turn["role"] == role else turn for turn in turns]
            return "Wilhelmina" in rendered(tokenizer, given)
        except UserError:
            return False

    function = {"name": tool["name"], "arguments": {"town": "Ouagadougou"}}
    call = {"type": "function", "id": "call00001", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    found = {"role": "tool", "tool_call_id": "call00001", "name": tool["name"], "content": "BurkinaFaso"}
    said = {"role": "assistant", "content": "There."}
    return Shown(
        tools=shows("findTheTown"),
        tool_calls=shows("Ouagadougou", called),
        tool_answers=shows("BurkinaFaso", called, found, said),
        reasoning=shows("IthinkSo", said | {"reasoning_content": "IthinkSo"}),
        names=frozenset(filter(named, ("system", "user", "assistant"))),
    )


def _check_shown(tokenizer: Any, messages: list[Message], tools: Any, whole: str) -> None:
    """Raise UserError if the template leaves a system prompt, a name, tools, their calls or answers out of `whole`."""
    has = {
        "system prompt": any(m["role"] == "system" and m["content"].strip() not in whole for m in messages),
        "name": any(m.get("name") and m["role"] not in (*shown(tokenizer).names, "tool") for m in messages),
        "tools": bool(tools) and not shown(tokenizer).tools,
        "tool calls": any(m.get("tool_calls") for m in messages) and not shown(tokenizer).tool_calls,
        "answers of tools": any(m["role"] == "tool" for m in messages) and not shown(tokenizer).tool_answers,
    }
    if lost := [name for name, is_lost in has.items() if is_lost]:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} shows no {', no '.join(lost)}, which this conversation "
            "has: use a base whose template does, name one in chat_template, or set train.on_template_error=skip"
        )


def variables(template: str, place: str) -> set[str]:
    """The variables that a template, which stands at `place`, is rendered with.

    Raises:
        UserError: it is no Jinja, with the line.
    """
    from jinja2 import TemplateError, TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    jinja = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        jinja.compile(template)
        return meta.find_undeclared_variables(jinja.parse(template))
    except TemplateSyntaxError as error:
        problem = f"{place}:{error.lineno}: {error.message}"
    except (TemplateError, RecursionError) as error:
        problem = f"{place}: is no Jinja ({reason(error)})"
    raise UserError(f"{problem}: fix the template, or name another in chat_template")


def settled(template: str, system: str | None, arguments: dict[str, Any] | None) -> str:
    """The template with these variables set, and with this system prompt where messages begin without one.

    They stand in the template itself, which every stage and engine renders, so that all of them mean the same.

    Raises:
        UserError: the template has no such variable.
    """
    head = ""
    if arguments:
        known = sorted(variables(template, "the chat template") - RENDERERS)
        for name, value in arguments.items():
            if name not in known:
                there = f"it has {', '.join(known)}" if known else "it has none"
                raise UserError(f"chat_template_arguments: the chat template has no variable {name!r}: {there}")
            head += f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n"
    if system:
        turn = f"{{'role': 'system', 'content': {json.dumps(system.strip(), ensure_ascii=False)}}}"
        head += (
            "{%- if not messages or messages[0]['role'] not in ['system', 'developer'] %}\n"
            f"{{%- set messages = [{turn}] + messages %}}\n{{%- endif %}}\n"
        )
    return head + template
