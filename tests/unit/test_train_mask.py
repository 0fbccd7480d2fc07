"""The labels of real templates, with tools and thoughts, against masks that others drew and texts written here."""

import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from pipeline import UserError
from train.template import IGNORED, Example, examples, row_examples, shown, text_examples
from train.tokenizer import DEFAULT, GENERATION_TAG, end_of_turn, one_template

LONG = 10_000
OWN = json.loads((Path(__file__).parents[1] / "chat_templates.json").read_text(encoding="utf-8"))
# TRL's copies of published templates, in which {% generation %} marks what the assistant says. Left out: those for
# pictures, and Nemotron's and DeepSeek's, whose prompt opens a thought that the turn has not (refused, see below).
TAGGED = ["cohere", "cohere2", "gemma", "gemma3", "glm4moe", "gptoss", "lfm2_v2",
          "llama3", "phi3", "phi3_5", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_instruct_2507"]  # fmt: skip
BAR = "\N{FULLWIDTH VERTICAL LINE}"  # of DeepSeek's tokens
SPECIAL = re.compile(rf"<[|{BAR}][^<>{{}}\s'\"]+[|{BAR}]>|<(?:start|end)_of_turn>|<eos>|<bos>|</?s>|\[/?[A-Z_]{{3,}}\]")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


DEAF = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def called(city: str, id: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return said("assistant", "", tool_calls=[{"type": "function", "id": id, "function": function}])


def answered(content: str, id: str) -> dict[str, Any]:
    return said("tool", content, tool_call_id=id, name="weather")


PLAIN = [said("user", "One?"), said("assistant", "Uno, the first."), said("user", "Two?"), said("assistant", "Dos.")]
WITH_SYSTEM = [said("system", "Be short."), *PLAIN]
WITH_TOOLS = [
    said("user", "How is Paris?"), called("Paris", "call00001"), answered("18 degrees", "call00001"),
    said("assistant", "Paris has 18 degrees."), said("user", "And Rome?"), called("Rome", "call00002"),
    answered("20 degrees", "call00002"), said("assistant", "Rome has 20."),
]  # fmt: skip
WITH_THOUGHTS = [
    said("user", "2+2?"), said("assistant", "4", reasoning_content="Two and two."),
    said("user", "3+3?"), said("assistant", "6", reasoning_content="Three twice."),
]  # fmt: skip
TALKS = {"plain": (PLAIN, None), "system": (WITH_SYSTEM, None), "tools": (WITH_TOOLS, TOOLS),
         "thoughts": (WITH_THOUGHTS, None)}  # fmt: skip


def published(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def vocabulary(base_folder: Path) -> Any:
    """The packaged tokenizer with every special token that some template here writes."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(base_folder)
    texts = [published(f"{name}_training") for name in TAGGED] + [
        published("llama3_1"),
        published("deepseek_r1_distill"),
        *OWN.values(),
    ]
    made.add_special_tokens({"additional_special_tokens": sorted({t for text in texts for t in SPECIAL.findall(text)})})
    return made


@pytest.fixture
def with_template(vocabulary: Any) -> Callable[[Any], Any]:
    """The tokenizer with a template, prepared as a base's is."""

    def prepared(template: Any) -> Any:
        vocabulary.eos_token = "<|endoftext|>"
        vocabulary.chat_template = GENERATION_TAG.sub("", one_template(template))
        vocabulary.eos_token = end_of_turn(vocabulary)
        return vocabulary

    return prepared


def spoken(tokenizer: Any, row: Example) -> list[str]:
    """The text of each run of supervised tokens."""
    runs = groupby(zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in run]) for supervised, run in runs if supervised]


def marked(tokenizer: Any, template: str, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[bool]]:
    """Ids and mask by transformers' reading of the template's own generation tags, brought to what is generated.

    TRL's tags also hold what the generation prompt already writes, and what follows the end of the turn.
    """
    encoded = tokenizer.apply_chat_template(
        messages, tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], [bool(bit) for bit in encoded["assistant_masks"]]
    for turn in [index for index, message in enumerate(messages) if message["role"] == "assistant"]:
        opened = tokenizer.apply_chat_template(
            messages[:turn], tools, chat_template=template, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if ids[: len(opened)] == opened:
            before = tokenizer.apply_chat_template(messages[:turn], tools, chat_template=template, return_dict=True)
            first = next(
                (n for n, pair in enumerate(zip(before["input_ids"], opened, strict=False)) if pair[0] != pair[1]), None
            )
            for index in range(len(before["input_ids"]) if first is None else first, len(opened)):
                mask[index] = False
    end = len(ids)
    for index in range(len(ids) - 1, -1, -1):
        if not mask[index]:
            end = index
        elif ids[index] == tokenizer.eos_token_id:
            mask[index + 1 : end] = [False] * (end - index - 1)
            end = index
    return ids, mask


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TAGGED)
def test_the_labels_are_those_of_the_template_s_own_tags(name: str, talk: str, with_template: Callable) -> None:
    from jinja2 import TemplateError

    template, (messages, tools) = published(f"{name}_training"), TALKS[talk]
    tokenizer = with_template(template)
    try:
        wanted = [marked(tokenizer, template, messages, tools)]
    except TemplateError:
        with pytest.raises(UserError, match=r"refuses|shows no"):
            examples(tokenizer, messages, LONG, tools)
        return
    if tools and not shown(tokenizer).tool_calls:
        with pytest.raises(UserError, match="shows no "):
            examples(tokenizer, messages, LONG, tools)
        return
    rows = examples(tokenizer, messages, LONG, tools)
    if len(rows) > 1:  # past turns are written otherwise: each turn is learned at the end of its own past
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [marked(tokenizer, template, messages[: turn + 1], tools) for turn in turns]
        for _, mask in wanted:
            last = max(index for index, bit in enumerate(mask) if bit)
            first = next((index + 1 for index in range(last, -1, -1) if not mask[index]), 0)
            mask[:first] = [False] * first
    assert [(row.input_ids, [label != IGNORED for label in row.labels]) for row in rows] == wanted


CALLS = {
    "own": (
        '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call><|im_end|>',
        "{said}<|im_end|>",
    ),
    "llama3_1": ('{{"name": "weather", "parameters": {{"city": "{city}"}}}}<|eot_id|>', "{said}<|eot_id|>"),
    "qwen2_5": (
        '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call><|im_end|>',
        "{said}<|im_end|>",
    ),
    "Mistral-Nemo-Instruct-2407": (
        '[TOOL_CALLS][{{"name": "weather", "arguments": {{"city": "{city}"}}, "id": "{id}"}}]<|endoftext|>',
        "{said}<|endoftext|>",
    ),
    "Hermes-3-Llama-3.1-8B": (
        '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call><|im_end|>',
        "{said}<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_and_answers_are_learned_as_they_are_written(name: str, with_template: Callable) -> None:
    tool_use = DEFAULT.read_text() if name == "own" else OWN.get(name) or published(name)
    tokenizer = with_template({"default": DEAF, "tool_use": tool_use} if "Hermes" in name else tool_use)
    call, text = CALLS[name]
    rows = examples(tokenizer, WITH_TOOLS, LONG, TOOLS)
    assert [words.strip() for row in rows for words in spoken(tokenizer, row)] == [
        call.format(city="Paris", id="call00001"), text.format(said="Paris has 18 degrees."),
        call.format(city="Rome", id="call00002"), text.format(said="Rome has 20."),
    ]  # fmt: skip
    assert all("The weather of a city" in tokenizer.decode(row.input_ids) for row in rows), "the tools are offered"


@pytest.mark.parametrize("name", ["own", "qwen3"])
def test_thoughts_are_learned_where_the_template_writes_them(name: str, with_template: Callable) -> None:
    tokenizer = with_template(DEFAULT.read_text() if name == "own" else published(name))
    rows = examples(tokenizer, WITH_THOUGHTS, LONG)
    assert [spoken(tokenizer, row) for row in rows] == [
        ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"],
        ["<think>\nThree twice.\n</think>\n\n6<|im_end|>"],
    ]
    assert "Two and two" not in tokenizer.decode(rows[1].input_ids), "a server forgets past thoughts"


def test_ids_of_another_length_are_shortened_where_the_template_refuses_them(with_template: Callable) -> None:
    tokenizer = with_template(OWN["Mistral-Nemo-Instruct-2407"])
    messages = [said("user", "How is Paris?"), called("Paris", "call_abcdefghijkl"),
                answered("18", "call_abcdefghijkl"), said("assistant", "18.")]  # fmt: skip
    text = "".join(tokenizer.decode(row.input_ids) for row in examples(tokenizer, messages, LONG, TOOLS))
    assert '"id": "defghijkl"' in text and '"call_id": "defghijkl"' in text


def test_arguments_are_text_where_the_template_wants_text(with_template: Callable) -> None:
    call = "{% for call in m.tool_calls %}CALL {{ call.function.name + ' ' + call.function.arguments }}{% endfor %}"
    every = DEAF.replace("m.role in ('user', 'assistant')", "true")
    tokenizer = with_template(every.replace("{{ m.content }}", "{{ m.content }}" + call))
    messages = [said("user", "Zürich?"), called("Zürich", "1"), answered("18", "1"), said("assistant", "18.")]
    [row] = examples(tokenizer, messages, LONG)
    assert spoken(tokenizer, row) == ['CALL weather {"city": "Zürich"}<|im_end|>', "18.<|im_end|>"]


SILENT = {
    "tools": (WITH_TOOLS[:1] + PLAIN[1:2], TOOLS, "shows no tools,"),
    "tool calls and answers": (WITH_TOOLS[:4], None, "shows no tool calls, no answers of tools,"),
    "all of it": (WITH_TOOLS, TOOLS, "shows no tools, no tool calls, no answers of tools,"),
}


@pytest.mark.parametrize("what", SILENT)
def test_what_a_template_leaves_out_is_told_with_row_and_template(what: str, with_template: Callable) -> None:
    messages, tools, reason = SILENT[what]
    tokenizer = with_template(DEAF)
    with pytest.raises(UserError) as raised:
        row_examples(tokenizer, {"messages": messages, "tools": tools, "source": "talks.jsonl:7"}, LONG)
    [said] = str(raised.value).splitlines()
    assert said.startswith(f"talks.jsonl:7: the chat template of {tokenizer.name_or_path} {reason} which this ")
    assert said.endswith("name one in chat_template, or set train.on_template_error=skip")


def test_a_refusal_names_the_row(with_template: Callable) -> None:
    tokenizer = with_template(OWN["Mistral-Nemo-Instruct-2407"])
    row = {"messages": [said("user", "a"), *PLAIN], "source": "talks.jsonl:9"}
    with pytest.raises(UserError, match=r"^talks\.jsonl:9: the chat template refuses a conversation of user, user, "):
        row_examples(tokenizer, row, LONG)


def test_a_prompt_that_opens_a_thought_which_the_turn_does_not_is_refused(with_template: Callable) -> None:
    tokenizer = with_template(published("deepseek_r1_distill"))
    with pytest.raises(UserError, match="training and serving would differ"):
        examples(tokenizer, PLAIN, LONG)


TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.mark.parametrize("most", [16, 17, 64, 1024])
def test_every_token_of_plain_text_is_learned_once_and_the_end(most: int, tokenizer: Any) -> None:
    ids = [*tokenizer(TEXT).input_ids, tokenizer.eos_token_id]
    rows = text_examples(tokenizer, TEXT, most)
    assert [ids[0], *(label for row in rows for label in row.labels if label != IGNORED)] == ids
    assert all(len(row.input_ids) <= most for row in rows)
    assert all(row.labels == [IGNORED, *row.input_ids[1:]] for row in rows)


@pytest.mark.parametrize("text", ["a", "Hi", TEXT])
def test_plain_text_never_makes_a_piece_without_a_label(text: str, tokenizer: Any) -> None:
    for most in range(16, 40):
        assert all(len(row.input_ids) > 1 for row in text_examples(tokenizer, text, most))


def test_plain_text_of_a_row_is_told_from_a_conversation(tokenizer: Any) -> None:
    [row] = row_examples(tokenizer, {"text": "Once upon a time", "source": "x"}, LONG)
    assert tokenizer.decode(row.input_ids) == "Once upon a time" + tokenizer.eos_token
