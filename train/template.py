"""The chat template: what it renders, which words are the assistant's, and which token ends its turn."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from recipe import UserError
from recipe.files import write_whole

IGNORED = -100  # the label that torch's cross entropy leaves out
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
PROBE = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]


@dataclass(frozen=True)
class Example:
    """One training row: token ids, and the same ids as labels where the assistant speaks, else IGNORED."""

    input_ids: list[int]
    labels: list[int]


def prepare_tokenizer(folder: Path, template_file: str | None) -> str:
    """Make the tokenizer of a model folder say what training and serving both need; returns the end-of-turn token.

    The template loses its `{% generation %}` tags, which break GGUF loaders (llama-cpp-python#2225), and keeps the date
    of this day where it asks the clock, as Llama 3.1's does: another would be served than was trained. eos becomes the
    token that ends the assistant's turn; pad becomes another token than eos (trl#1623).

    Raises:
        UserError: no chat template, or one that does not end the assistant's turn with a special token.
    """
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the base has no tokenizer that transformers reads ({reason}): use another base") from None
    if template_file:
        try:
            tokenizer.chat_template = Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat_template: {template_file} cannot be read ({error}): give a Jinja file") from None
    if not isinstance(tokenizer.chat_template, str):
        raise UserError("the base has no chat template: name a Jinja file in the recipe's key 'chat_template'")
    tokenizer.chat_template = GENERATION_TAG.sub("", tokenizer.chat_template)
    tokenizer.chat_template = NOW.sub(lambda call: repr(datetime.now().strftime(call[2])), tokenizer.chat_template)
    before = tokenizer.eos_token_id
    tokenizer.eos_token = end_of_turn(tokenizer)
    tokenizer.pad_token = _pad_token(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)

    generation = (
        GenerationConfig.from_pretrained(folder)
        if (folder / "generation_config.json").is_file()
        else GenerationConfig()
    )
    known = generation.eos_token_id
    stops = [tokenizer.eos_token_id, before, *(known if isinstance(known, list) else [known])]
    generation.eos_token_id = list(dict.fromkeys(stop for stop in stops if stop is not None))
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return str(tokenizer.eos_token)


def render(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool = False, tools: Any = None) -> str:
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


def end_of_turn(tokenizer: Any) -> str:
    """The special token with which the template ends the assistant's turn.

    Raises:
        UserError: there is none, so the model would never learn to stop.
    """
    answer = render(tokenizer, PROBE)[len(render(tokenizer, PROBE[:1], prompt=True)) :]
    for token in tokenizer.convert_ids_to_tokens(tokenizer(answer, add_special_tokens=False).input_ids):
        if token in tokenizer.get_added_vocab() or token in tokenizer.all_special_tokens:
            return str(token)
    raise UserError(
        f"the chat template ends the assistant's turn with {answer!r}, which has no special token: the model would "
        "never learn to stop, let the template write the tokenizer's eos token there"
    )


def examples(tokenizer: Any, messages: list[dict[str, str]], max_tokens: int) -> list[Example]:
    """Training rows of a conversation: one, or one a turn where the template renders past turns differently.

    Every token of every answer and its end-of-turn token is supervised, in the context in which a server renders it.
    Rows are cut to `max_tokens`; a row whose answer is cut off whole is left out.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    whole = render(tokenizer, messages)
    spans = []
    for turn in turns:
        prompt = render(tokenizer, messages[:turn], prompt=True)
        answered = render(tokenizer, messages[: turn + 1])
        if not answered.startswith(prompt):
            raise UserError(
                f"the chat template opens the assistant's turn with {prompt[-40:]!r} but writes a past turn as "
                f"{answered[-40:]!r}: training and serving would differ, mend the template"
            )
        if not whole.startswith(answered):  # for example Qwen3, which drops the thoughts of past turns
            rows = [_example(tokenizer, *_last_turn(tokenizer, messages[: turn + 1]), max_tokens) for turn in turns]
            return [row for row in rows if row]
        spans.append((len(prompt), len(answered)))
    row = _example(tokenizer, whole, spans, max_tokens)
    return [row] if row else []


def _last_turn(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    whole = render(tokenizer, messages)
    return whole, [(len(render(tokenizer, messages[:-1], prompt=True)), len(whole))]


def _example(tokenizer: Any, text: str, spans: list[tuple[int, int]], max_tokens: int) -> Example | None:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    for first, last in spans:
        inside = [index for index, (start, end) in enumerate(offsets) if start >= first and end <= last and end > start]
        ends = [index for index in inside if ids[index] == tokenizer.eos_token_id]
        for index in inside:
            if not ends or index <= ends[-1]:  # what the template writes after the turn's end is never generated
                labels[index] = ids[index]
    ids, labels = ids[:max_tokens], labels[:max_tokens]
    return Example(ids, labels) if any(label != IGNORED for label in labels) else None


def _pad_token(tokenizer: Any) -> str:
    """A token to pad with that is not eos; no token is added, so no embedding is resized."""
    known = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *tokenizer.get_added_vocab()]
    return next((token for token in known if token and token != tokenizer.eos_token), tokenizer.eos_token)
