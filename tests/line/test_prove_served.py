"""What a server's settings, or something on the way to it, do to a model is named; a healthy one passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from prove_run import NAME, REPOSITORY, Proved
from proxy import Change, proxied
from test_prove_faults import change_gguf

from bench.families import TEMPLATE
from pipeline import Recipe, Run, load
from pipeline.proof import Comparison
from pipeline.reference import read_reference
from serve.asking.endpoint import free_port
from serve.asking.judgement import prove_answers
from serve.asking.probe import Engine, LlamaCpp
from serve.prove import answering, own_of
from serve.running.backend import backend_of

pytest_plugins = ["prove_fixtures"]
pytestmark = pytest.mark.slow
FULL_STOP = 16
PROBES = 14  # enough to see it


@contextmanager
def serving(kind: str) -> Iterator[tuple[Recipe, Engine]]:
    """The engine with this file of the run in the current folder."""
    recipe = load(f"{NAME}.yaml", [])
    recipe = replace(recipe, serve=replace(recipe.serve, type=kind, port=free_port()))
    with answering(recipe, Run(NAME), backend_of(recipe, Run(NAME))) as engine:
        yield recipe, engine


@pytest.fixture(scope="module")
def engine(_healthy: Any) -> Iterator[tuple[Recipe, Engine]]:
    """The healthy run's Q8_0, started once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(_healthy)
        patch.setenv("PYTHONPATH", str(REPOSITORY))  # the engine is a process of its own
        with serving("Q8_0") as running:
            yield running


def judged(recipe: Recipe, engine: Engine, change: Change = lambda asked: None) -> list[str]:
    """What is wrong with the engine's answers when questions are changed on the way to it."""
    run, comparison = Run(NAME), Comparison("served")
    reference = read_reference(run.path("reference"))
    reference = replace(reference, probes=reference.probes[:PROBES])
    with proxied(engine.port, change) as port:
        through = LlamaCpp(port, engine.key, engine.name)
        prove_answers(
            comparison, through, reference, own_of(recipe, run, reference), recipe.serve.context, recipe.serve.slots
        )
    return comparison.problems


def setting(**values: Any) -> Change:
    return lambda asked: asked | values


def unless_asked(**values: Any) -> Change:
    return lambda asked: values | asked


def with_system(asked: dict[str, Any]) -> dict[str, Any]:
    return asked | {"messages": [{"role": "system", "content": "Be kind."}, *asked["messages"]]}


def with_date(asked: dict[str, Any]) -> dict[str, Any]:
    *before, last = asked["messages"]
    return asked | {"messages": [*before, last | {"content": f"Today is Friday. {last['content']}"}]}


FAULTS: dict[str, tuple[Change, str]] = {
    "repeat penalty 1.1": (setting(repeat_penalty=1.1), "server settings: a penalty on repetition: "),
    "repeat penalty 3": (setting(repeat_penalty=3.0), "server settings: a penalty on repetition: "),
    "temperature 0.7": (setting(temperature=0.7), "server settings: a temperature: asked for the most likely tokens"),
    "temperature with a seed": (setting(temperature=0.7, seed=1), "server settings: a temperature: asked for the most"),
    "temperature 0.7 at most": (
        lambda asked: asked | {"temperature": min(0.7, asked.get("temperature", 0.7))},
        "server settings: a temperature: asked for 1 it draws with a lower one",
    ),
    "min-p 0.05": (setting(min_p=0.05), "server settings: min_p, top_k or top_p: asked for the whole vocabulary"),
    "top-k 2": (setting(top_k=2), "server settings: a temperature: asked for 1 it draws with a lower one (or top_k,"),
    "a bias to a token": (
        setting(logit_bias={str(FULL_STOP): 5}),
        f"server settings: a logit bias: token '.' ({FULL_STOP}) is taken ",
    ),
    "a bias from a token": (
        setting(logit_bias={str(FULL_STOP): -5}),
        f"server settings: a logit bias: token '.' ({FULL_STOP}) is avoided ",
    ),
    "a bias to the end": (setting(logit_bias={"2": 8}), "server settings: a logit bias: token '<|im_end|>' (2) is"),
    "a system prompt": (
        with_system,
        "token ids: probe 'plain' has 29 when chatting, trained with 27: something is added",
    ),
    "a date": (with_date, "token ids: probe 'plain' has "),
    "a stop string": (
        setting(stop=["."]),
        "server settings: a stop string: the answer to probe 'plain' ends before '.'",
    ),
    "a limit": (setting(max_tokens=3), "server settings: a limit of length: the answer to probe 'plain' is cut after "),
    "a default limit": (
        unless_asked(max_tokens=16),
        "server settings: a limit of length: an answer that asks for none is cut after 16 tokens",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_changed_on_the_way_is_named(engine: tuple[Recipe, Engine], fault: str) -> None:
    change, says = FAULTS[fault]
    [problem] = judged(*engine, change)
    assert problem.startswith(says)


@pytest.mark.parametrize("change", [setting(seed=7), unless_asked(temperature=0.7, min_p=0.05)])
def test_what_changes_no_answer_passes(engine: tuple[Recipe, Engine], change: Change) -> None:
    assert judged(*engine, change) == []


def test_another_quantization_under_the_name_is_named(engine: tuple[Recipe, Engine]) -> None:
    with serving("F16") as (_, other):
        [problem] = judged(engine[0], other)
    assert problem == "another file: F16 is served under this name: its answers are that one's"


def test_thinking_that_is_switched_on_is_named(healthy: Proved) -> None:
    thinking = TEMPLATE.replace("assistant\\n'", "assistant\\n' + ('<think>\\n' if enable_thinking else '')")
    change_gguf(healthy.gguf("Q8_0"), tokenizer__chat_template=thinking)
    healthy.sign("gguf")
    with serving("Q8_0") as (recipe, engine):
        [problem] = judged(recipe, engine, setting(chat_template_kwargs={"enable_thinking": True}))
    assert problem.startswith("token ids: probe 'plain' has ")
    assert problem.endswith(" when chatting, trained with 27: thinking is switched on (enable_thinking)")
