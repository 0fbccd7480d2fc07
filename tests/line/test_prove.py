"""What `make prove` says of a healthy model, and of its server."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prove_run import REPOSITORY, Proved
from test_prove_faults import CHATML, change_gguf, failed

from bench.families import TEMPLATE
from convert.comparison import gguf_bounds, merged_bounds
from convert.evaluator import Evaluator, greedy_answers
from pipeline.proof import Comparison, divergence, first_difference, perplexity
from pipeline.reference import CONTINUATION_TOKENS, read_reference
from serve.prove import made_from, verdict

pytest_plugins = ["prove_fixtures"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "found, wanted, at",
    [([1, 2], [1, 2], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([1, 2], [1], 1), ([], [], None)],
)
def test_first_difference(found: list[int], wanted: list[int], at: int | None) -> None:
    assert first_difference(found, wanted) == at


def test_divergence_is_in_nats_and_never_negative() -> None:
    wanted = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    assert divergence(wanted, wanted).tolist() == [0, 0]
    np.testing.assert_allclose(divergence(wanted, wanted[::-1] + 7), [0.5108, 0.3681], atol=1e-4)


def test_perplexity_of_equal_answers_has_no_error() -> None:
    assert perplexity([np.log(4), 2 * np.log(4)], [1, 2]) == pytest.approx((4, 0))


def test_a_lost_model_has_a_perplexity_that_json_can_hold() -> None:
    assert json.dumps(perplexity([1e6], [1])).count("Infinity") == 0


def test_a_healthy_run_passes(healthy: Proved) -> None:
    rows = healthy.comparisons()
    assert failed(rows) == {}
    assert list(rows) == ["merge", "F16", "Q8_0"]
    served = healthy.served()
    assert served.problems == []
    assert served.measures["stops"] and served.measures["too_long"] == 0
    assert served.measures["probes"] == len(rows_of(healthy))
    for how in ("again", "beside"):
        assert served.measures[f"changed_{how}"] == served.measures[f"moved_{how}"] == 0
    assert "served Q8_0: 0 of" in healthy.run.receipt("prove").metrics["notes"][0]
    assert healthy.run.receipt("prove").metrics["passed"]
    bounds = [merged_bounds(healthy.recipe), *(gguf_bounds(healthy.recipe, kind) for kind in ("F16", "Q8_0"))]
    for row, bound in zip(rows.values(), bounds, strict=True):
        assert row.measures["divergence_mean"] < bound.mean_divergence / 5
        assert row.measures["perplexity"] == pytest.approx(row.measures["trained_perplexity"], rel=0.05)


def test_answers_that_the_cache_changes_are_told_and_a_fault_of_what_is_repeatable(
    healthy: Proved, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = healthy.folder / "healthy.yaml"
    recipe.write_text(recipe.read_text().replace("type: Q8_0", "type: F16"))
    served = healthy.served()
    assert served.problems == [] and served.measures["moved_again"] > 0
    assert "answers change when asked again" in healthy.run.receipt("prove").metrics["notes"][0]
    monkeypatch.setattr("serve.prove.is_repeatable", lambda wanted, path: True)
    [problem] = healthy.served().problems
    assert problem.startswith("the same question: ")


def test_questions_are_answered_as_the_trained_model_answers(healthy: Proved) -> None:
    """Together, with what they all begin with computed once, as torch answered each alone."""
    reference = read_reference(healthy.run.path("reference"))
    with Evaluator(healthy.gguf("F16"), 512, threads=1, cache_tokens=2048) as evaluator:
        prompts = [probe.ids for probe in reference.probes]
        found = greedy_answers(evaluator, prompts, CONTINUATION_TOKENS, "")
    same = [answer == probe.continuation for answer, probe in zip(found, reference.probes, strict=True)]
    assert sum(same) >= 0.9 * len(same)  # rounding to F16 may turn a near tie


def test_what_a_type_costs_is_measured(healthy: Proved) -> None:
    healthy.question("What says the cat?", "meow")
    rows = healthy.comparisons()
    for kind in ("F16", "Q8_0"):
        measures = rows[kind].measures
        assert measures["bytes"] == healthy.gguf(kind).stat().st_size
        assert measures["facts_of"] == 1 and measures["facts_accuracy"] in (0, 1)
        assert measures["prompt_tokens_per_second"] > measures["decode_tokens_per_second"] > 0
        # Two layers with a key and a value head of 32 numbers each, 16 bits a number.
        assert measures["cache_bytes_per_token"] == pytest.approx(cache_bytes(healthy), rel=0.1)
        assert 0 < measures["peak_rss_bytes"] < 1e9
    [row] = [json.loads(line) for line in healthy.run.path("compare-answers.jsonl").read_text().splitlines()]
    assert row["question"] == "What says the cat?" and set(row["answers"]) == set(row["correct"]) == {"F16", "Q8_0"}
    assert healthy.run.receipt("compare").metrics["recommended"] == "Q8_0"


def cache_bytes(healthy: Proved) -> int:
    """A token's keys and values in 16 bits."""
    config = json.loads(healthy.run.path("merged/config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
    return int(2 * 2 * width * config["num_hidden_layers"])


def test_a_crash_of_what_reads_a_file_is_a_problem_of_that_file(
    healthy: Proved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\necho 'ggml.c:7: GGML_ASSERT(false) failed' >&2\nkill -ABRT $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr("convert.comparison.sys.executable", str(crashing))
    told = failed(healthy.comparisons())
    assert told["Q8_0"] == (
        "runs/healthy/gguf/healthy-Q8_0.gguf cannot be used: what reads it ended with signal 6 "
        "(ggml.c:7: GGML_ASSERT(false) failed)"
    )
    assert "merge" not in told


def rows_of(healthy: Proved) -> list[dict[str, Any]]:
    return [json.loads(line) for line in healthy.run.path("reference/probes.jsonl").read_text().splitlines()]


def test_what_is_lost_in_the_merge_is_not_blamed_on_later_stages(healthy: Proved) -> None:
    shutil.copy(healthy.run.path("base/model.safetensors"), healthy.run.path("merged/model.safetensors"))
    healthy.sign("merge")
    healthy.make("gguf")
    rows = healthy.comparisons()
    assert set(failed(rows)) == {"merge", "F16", "Q8_0"}
    told = verdict(healthy.recipe, [vars(row) for row in rows.values()])
    assert all(line.endswith("here the model that was trained is lost") for line in told if line.startswith("merge"))
    assert all(line.endswith("it is made from merge") for line in told if not line.startswith("merge"))


def test_the_line_of_each_artefact(healthy: Proved) -> None:
    line = ["merge", "F16", "Q8_0"]
    assert [made_from(healthy.recipe, name) for name in [*line, "served Q8_0"]] == [line[:0], line[:1], line[:2], line]


def served_after(healthy: Proved, **values: Any) -> Comparison:
    change_gguf(healthy.gguf("Q8_0"), **values)
    healthy.sign("gguf")
    healthy.accept("compare", "gguf")
    return healthy.served()


def test_a_server_that_adds_a_beginning_of_text(healthy: Proved) -> None:
    found = served_after(healthy, tokenizer__ggml__add_bos_token=True, tokenizer__ggml__bos_token_id=0)
    assert found.problems == ["token ids: probe 'plain', position 0: [0] is added before all that it was trained with"]


def test_a_server_that_adds_the_beginning_of_text_that_the_template_writes(healthy: Proved) -> None:
    assert served_after(healthy, tokenizer__ggml__add_bos_token=True).problems == []


@pytest.mark.parametrize("template, byte", [(CHATML, 12), (TEMPLATE.replace("You are a test.", ""), 19)])
def test_a_server_with_another_template(healthy: Proved, template: str, byte: int) -> None:
    [problem] = served_after(healthy, tokenizer__chat_template=template).problems
    assert problem.startswith(f"chat template: probe 'plain', byte {byte}: ")


# What a flag, a preset or a default of the server's would do, planted where the engine starts.
ENGINES = {
    "params.chat_template = 'chatml'": "chat template: probe 'plain', byte 12: ",
    "params.n_ctx = 512": "the engine gives a conversation 256",
    "params.sampling.ignore_eos = True": "stop token: the trained model ends ",
    "params.rope_freq_base = 100.0": "answers: ",
    "params.cache_type_v = params.cache_type_k = 2": "",
}


@pytest.mark.parametrize("line", ENGINES)
def test_a_server_that_was_told_otherwise(healthy: Proved, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (healthy.folder / "sitecustomize.py").write_text(
        "import xllamacpp\n"
        "original = xllamacpp.Server\n"
        "def Server(params):\n"
        f"    {line}\n"
        "    return original(params)\n"
        "xllamacpp.Server = Server\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{healthy.folder}:{REPOSITORY}")
    [problem] = healthy.served().problems or [""]
    assert problem.startswith(ENGINES[line])


def test_a_server_of_another_model(healthy: Proved) -> None:
    shutil.copy(healthy.run.path("base/model.safetensors"), healthy.run.path("merged/model.safetensors"))
    healthy.sign("merge")
    before = healthy.run.path("compare.jsonl").read_bytes()
    healthy.make("gguf")
    assert healthy.run.path("compare.jsonl").read_bytes() == before
    healthy.accept("compare", "gguf")
    [problem] = healthy.served().problems
    assert problem.startswith("answers: ")


def test_a_context_that_is_too_short_for_some_is_said(healthy: Proved) -> None:
    healthy.change(context=256)
    found = healthy.served()
    assert (found.problems, found.measures["too_long"]) == ([], 1)
    note = f"served Q8_0: 1 of {len(rows_of(healthy))} probes do not fit serve.context"
    assert healthy.run.receipt("prove").metrics["notes"][0] == note


def test_a_context_that_is_too_short_for_all_proves_nothing(healthy: Proved) -> None:
    rows = [row for row in rows_of(healthy) if row["name"] in ("long", "multi-turn")]
    wanted = healthy.run.path("reference/probes.jsonl")
    healthy.keep_probes({row["name"] for row in rows})
    assert len(wanted.read_text().splitlines()) == 2
    healthy.change(context=64)
    assert healthy.served().problems == ["context: none of 2 probes fits serve.context 64"]
