"""Chat templates in Go: what is compiled says what the Jinja template says; the rest is left alone."""

import json
from pathlib import Path
from typing import Any

import go_text_template
import pytest
from ollama_double import TEMPLATES, collated, distance, nearest
from ollama_run import CHATML, STRIPPING

from serve.engines.ollama.proof import read_vocabulary
from serve.engines.ollama.template import Refused, compile_shape, renderer
from train.config import packaged_gguf

GOLDEN = json.loads(Path("tests/go_templates.json").read_text(encoding="utf-8"))
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
FIRST_TURN = "{% if messages[0].role == 'system' %}<<{% else %}<<none>>{% endif %}" + CHATML


def compiled(template: str) -> str | None:
    shape = compile_shape(renderer(template, "<s>", "</s>"))
    return shape.go() if shape else None


@pytest.mark.parametrize("case", GOLDEN["templates"], ids=range(len(GOLDEN["templates"])))
def test_the_interpreter_of_these_tests_writes_what_go_writes(case: dict[str, Any]) -> None:
    found = [go_text_template.render(case["template"], collated(messages)) for messages in GOLDEN["conversations"]]
    assert found == case["rendered"]


def test_every_compiled_template_has_been_rendered_by_go() -> None:
    golden = {case["template"] for case in GOLDEN["templates"]}
    found = {compiled(own["template"]) for own in TEMPLATES["index"]} - {None}
    assert len(found) >= 9
    assert found <= golden


@pytest.mark.parametrize("template", [CHATML, LLAMA3, FIRST_TURN], ids=["default system", "llama 3", "opening"])
def test_a_compiled_template_renders_as_the_jinja_template(template: str) -> None:
    go, render = compiled(template), renderer(template, "<s>", "</s>")
    assert go is not None
    for messages in GOLDEN["conversations"]:
        assert go_text_template.render(go, collated(messages)) == render(messages, True)


def test_the_packaged_base_keeps_its_default_system_prompt() -> None:
    vocabulary = read_vocabulary(packaged_gguf())
    go = compiled(vocabulary.template)
    assert go is not None and "named SmolLM, trained by Hugging Face" in go
    assert nearest(vocabulary.template) == "chatml"  # Ollama would take its own, which has no such prompt
    assert (vocabulary.eos, vocabulary.adds_bos) == ("<|im_end|>", False)


@pytest.mark.parametrize(
    "template",
    [
        STRIPPING,
        CHATML.replace("message['content'] +", "message['content'].upper() +"),
        "{% for message in messages %}{{ message['content'] }}{% if loop.last %}!{% endif %}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
        "{{ messages[7].content }}",
        "nothing",
    ],
)
def test_what_go_cannot_say_is_not_compiled(template: str) -> None:
    assert compiled(template) is None


@pytest.mark.parametrize("template", ["{% for %}", "{{ 'a' | no_such_filter }}"])
def test_what_is_no_jinja_is_refused(template: str) -> None:
    with pytest.raises(Refused):
        renderer(template, "", "")


def test_a_template_runs_in_a_sandbox() -> None:
    render = renderer("{{ messages.__class__.__mro__[1].__subclasses__() }}", "", "")
    with pytest.raises(Refused, match="unsafe"):
        render([], False)


@pytest.mark.parametrize(("one", "other", "edits"), [("", "abc", 3), ("kitten", "sitting", 3), ("é", "e", 1)])
def test_the_double_counts_edits_as_levenshtein(one: str, other: str, edits: int) -> None:
    assert distance(one, other) == edits
