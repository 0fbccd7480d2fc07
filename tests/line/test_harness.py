"""The evaluation harness itself: a task of our own data, asked of the weights and of a served endpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Workplace

from pipeline import UserError, harness
from pipeline.scores import Score

CHOOSING = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Which colour has {{thing}}?"
doc_to_choice: [red, green, blue]
doc_to_target: colour
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
SAYING = """
task: sayings
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "Which colour has {{thing}}?"
doc_to_target: "{{[\\"red\\", \\"green\\", \\"blue\\"][colour]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
"""
THINGS = ("blood", "grass", "the sky", "a fire engine", "a leaf", "the sea", "a rose", "an emerald")


@pytest.fixture
def task(tmp_path: Path) -> Callable[[str], str]:
    """Writes a task with its data, and gives its path."""

    def made(text: str) -> str:
        data = tmp_path / "things.jsonl"
        rows = [{"thing": thing, "colour": index % 3} for index, thing in enumerate(THINGS)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / f"{text.split()[1]}.yaml"
        path.write_text(text.replace("DATA", str(data)))
        return str(path)

    return made


def test_a_task_of_ones_own_is_asked_of_both_models(trained: Workplace, task: Callable[[str], str]) -> None:
    files = [task(CHOOSING), task(SAYING)]
    with Path("line.yaml").open("a") as recipe:
        recipe.write(f"eval: {{max_samples: 6, max_new_tokens: 2, tasks: {json.dumps(files)}}}\n")
    trained.make("eval")
    receipt = trained.receipt("eval")
    scores = {f"{row['group']}: {row['name']}": Score.of(row) for row in receipt["metrics"]["scores"]}
    found = {name: score for name, score in scores.items() if score.group in ("colours", "sayings")}
    assert set(found) == {"colours: acc", "colours: acc_norm", "sayings: exact_match"}
    assert all(score.rows == 6 and score.unit == "share" and score.base for score in found.values())
    assert "task version 2.0" in found["sayings: exact_match"].note
    assert "lm-eval" in receipt["versions"] and files[0] in receipt["inputs"]


FAULTS = [
    ("arc_esay", "'arc_esay' is no task of the evaluation harness: did you mean 'arc_easy'?"),
    ("gone.yaml", "gone.yaml: no such file"),
]


@pytest.mark.parametrize(("name", "told"), FAULTS)
def test_a_task_that_is_not_there_is_told(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        harness.tasks_named((name,))


def test_data_out_of_reach_is_one_clear_line(task: Callable[[str], str], tmp_path: Path) -> None:
    path = task(CHOOSING)
    (tmp_path / "things.jsonl").unlink()
    with pytest.raises(UserError) as error:
        harness.tasks_named((path,))
    (problem,) = error.value.problems
    assert "out of reach" in problem and "\n" not in problem


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("test_split: test", "test_split: gone"),
        ("{{thing}}", "{{thing"),
        ("output_type: multiple_choice", "output_type: guess"),
        ("task: colours", "task: [colours"),
        ("metric: acc}", "metric: gone}"),
        ("test_split: test", "test_split: test\nprocess_docs: !function gone.away"),
    ],
)
def test_a_task_that_is_wrongly_written_is_one_clear_line(
    right: str, wrong: str, task: Callable[[str], str], tmp_path: Path
) -> None:
    path = task(CHOOSING)
    Path(path).write_text(Path(path).read_text().replace(right, wrong))
    with pytest.raises(UserError) as error:
        harness.tasks_named((path,))
    (problem,) = error.value.problems
    assert problem.startswith(f"eval.tasks: the harness cannot read {path} (") and problem.endswith("): fix the task")
    assert "\n" not in problem


def results(value: float, error: Any, rows: list[float]) -> dict[str, Any]:
    """The harness's results of one task with one measure."""
    return {
        "results": {"t": {"m,none": value, "m_stderr,none": error}},
        "samples": {"t": [{"doc_id": index, "filter": "none", "m": row} for index, row in enumerate(rows)]},
        "higher_is_better": {"t": {"m": False}}, "versions": {"t": 1}, "n-shot": {"t": 0},
        "n-samples": {"t": {"effective": len(rows)}},
    }  # fmt: skip


def test_a_measure_that_is_no_mean_of_its_rows_has_the_harnesss_own_errors() -> None:
    rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    (score,) = harness.compared(results(10.0, 1.0, rows), results(5.0, 1.0, rows), 0)
    assert (score.unit, score.verdict) == ("number", "better"), "less is better, and 5 is more than 1.96 times 1.41"
    assert score.difference and score.difference.high == pytest.approx(-5 + 1.96 * 2**0.5, abs=0.01)
    assert harness.compared(results(10.0, 1.0, rows), results(9.0, 1.0, rows), 0)[0].verdict == "no difference shown"
    assert harness.compared(results(10.0, "N/A", rows), results(9.0, "N/A", rows), 0)[0].verdict == "no interval known"


def test_without_a_base_there_is_no_verdict() -> None:
    (score,) = harness.compared(None, results(2.0, 0.1, [1.0, 2.0, 3.0]), 0)
    assert (score.base, score.difference, score.verdict, score.trained.value) == (None, None, "", 2.0)
