"""Tasks of EleutherAI's language model evaluation harness: found, asked of a model, and turned into scores."""

import difflib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.error import UserError, reason
from pipeline.scores import Estimate, Score, compare, squared_and_added, verdict

RESAMPLES = 1000  # for the error of a task's own measure that is no mean of its rows
NORMAL = 1.96  # standard errors of a 95 % interval
# What a mistake in a task's YAML ends in, besides errors of YAML and Jinja themselves.
WRONGLY_WRITTEN = (TypeError, LookupError, AttributeError, ValueError, NotImplementedError, ImportError)

log = logging.getLogger("truetune")


def tasks_named(names: tuple[str, ...]) -> dict[str, Any]:
    """The harness's tasks of these names or YAML files, with their data.

    Raises:
        UserError: no such task, it is wrongly written, runs code that the model wrote, or its data is out of reach.
    """
    for chatty in ("lm_eval", "lm-eval", "evaluate"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager
    from yaml import YAMLError

    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    if missing := [name for name in files if not Path(name).is_file()]:
        raise UserError(*(f"eval.tasks: {name}: no such file: correct its path" for name in missing))
    manager = TaskManager(include_defaults=len(files) < len(names))
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    problems = []
    for name in names:
        if name not in files and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"did you mean {near[0]!r}?" if near else "'lm-eval ls tasks' lists them"
            problems.append(f"eval.tasks: {name!r} is no task of the evaluation harness: {hint}")
            continue
        try:
            loaded = manager.load([name])
        except (OSError, DatasetsError) as error:  # of the network, too
            problems.append(f"eval.tasks: the data of {name} is out of reach ({reason(error)}): {_FIX}")
            continue
        except (YAMLError, TemplateError, *WRONGLY_WRITTEN) as error:
            problems.append(f"eval.tasks: the harness cannot read {name} ({reason(error)}): fix the task")
            continue
        for part, values in loaded.items():
            found[part] |= values
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task.config, "unsafe_code", False):
            problems.append(f"eval.tasks: {name} runs code that the model wrote, which Truetune does not: leave it out")
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    if problems:
        raise UserError(*problems)
    return found


_FIX = "go online once, so that it is kept, or name the YAML file of a task with data of your own"


def asked(model: Any, tasks: dict[str, Any], rows: int, seed: int) -> Any:
    """The harness's results of one model (an `lm_eval.api.model.LM`), in the chat template that it was trained in."""
    import random

    import numpy as np
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    np.random.seed(seed)  # the harness draws its examples by these
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=seed)
    try:
        return evaluate(
            lm=model,
            task_dict=tasks,
            limit=rows,
            bootstrap_iters=RESAMPLES,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
    except (TemplateError, *WRONGLY_WRITTEN) as error:
        names = ", ".join(tasks["tasks"])
        raise UserError(f"eval.tasks: the harness cannot ask {names} ({reason(error)}): fix the task") from error


def compared(base: Any, trained: Any, seed: int) -> list[Score]:
    """Every measure of every task, of both models: paired by row where it is the mean of its rows.

    Without the results of a `base` there is nothing to compare with.
    """
    scores = []
    for task, name, kind in _measures(trained):
        mine, other = (_rows(results, task, name, kind) if results else None for results in (base, trained))
        lower = trained["higher_is_better"][task].get(name) is False
        note = f"lm-eval, task version {trained['versions'].get(task)}, {trained['n-shot'].get(task, 0)} examples"
        label = name if kind == "none" else f"{name} ({kind})"
        if other is not None and (mine is not None or not base):
            unit = "share" if all(0 <= value <= 1 for value, _ in (mine or []) + other) else "number"
            scores.append(compare(task, label, mine, other, unit=unit, lower_is_better=lower, seed=seed, note=note))
        else:
            scores.append(_of_errors(task, label, name, kind, base, trained, lower, note))
    return scores


def _measures(results: Any) -> Iterator[tuple[str, str, str]]:
    """(task, measure, filter of the answer) of each number that the harness reports."""
    for task in results["samples"]:
        for key, value in results["results"][task].items():
            name, comma, kind = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, int | float):
                yield task, name, kind


def _rows(results: Any, task: str, name: str, kind: str) -> list[list[float]] | None:
    """(rows, 2): the measure of each row and 1, if the task's own figure is their mean."""
    samples = [row for row in results["samples"][task] if row["filter"] == kind]
    values = [row.get(name) for row in sorted(samples, key=lambda row: row["doc_id"])]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    numbers = [float(value) for value in values]
    told = results["results"][task][f"{name},{kind}"]
    return [[value, 1.0] for value in numbers] if math.isclose(sum(numbers) / len(numbers), told) else None


def _of_errors(task: str, label: str, name: str, kind: str, base: Any, trained: Any, lower: bool, note: str) -> Score:
    """By the harness's own standard errors, as if both models had been asked other rows: wide, never too sure."""

    def told(results: Any) -> Estimate:
        value, error = (results["results"][task].get(f"{key},{kind}") for key in (name, f"{name}_stderr"))
        if not isinstance(error, int | float):
            return Estimate(float(value))
        return Estimate(float(value), float(value) - NORMAL * error, float(value) + NORMAL * error)

    rows, second = trained["n-samples"][task]["effective"], told(trained)
    note = f"{note}, its own standard errors"
    if not base:
        return Score(task, label, "number", rows, None, second, None, "", note)
    difference = squared_and_added(told(base), second)
    judged = verdict(rows, difference, lower)
    return Score(task, label, "number", rows, told(base), second, difference, judged, note)
