"""Measure what training changed, base beside trained, each with its 95 % interval:  python -m train.evaluate RECIPE

Both in one process: an adapter is switched off and on in one model; of whole weights both are held, less than training
them took. Asked are held-out questions, whose answers are compared with their references, the likelihood of validation
answers, general knowledge that may have been forgotten, and classification files.
"""

import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import Made, Recipe, Run, UserError, harness
from pipeline.command import boundary, recipe_of_arguments, up_to_date
from pipeline.files import fingerprint
from pipeline.machine import fast_precision, resident_bytes
from pipeline.model import Trained, answers, load_trained
from pipeline.recipe import Train
from pipeline.rows import count, heldout, picked, rendered
from pipeline.scores import METHOD, Score, as_rows, compare, facts_in, median, show
from pipeline.stages import stage
from train.scoring.classification import PROMPT, Labelled, labelled, path_of, spoken
from train.scoring.likelihood import Choices, Likelihood, choice_losses, likelihoods
from train.scoring.measures import confusion, macro_f1, matthews, text_measures
from train.template import Example, row_examples
from train.tuners import base_to_train

KNOWLEDGE = Path(__file__).parents[1] / "recipes/knowledge.jsonl"
ROWS_AT_ONCE = 8  # of a task of the evaluation harness
KNOWN = "the likeliest of 4 answers by its summed log-likelihood, not scaled by length; chance is 25%"
LARGEST_LOSS = 100.0  # nats a token: more would be no number of JSON
SPEAKERS = ("base", "trained, not merged, in one process")
PACKAGES = ("torch", "transformers", "peft", "sacrebleu", "rouge-score", "scipy", "numpy")

log = logging.getLogger("truetune")
SPEED_TOKENS, SPEED_REPEATS = 16, 6


def evaluate(recipe: Recipe, run: Run) -> Made:
    """Ask both models everything; the receipt's metrics hold all scores with their intervals."""
    files = labelled(recipe.eval.classification)
    tasks = harness.tasks_named(recipe.eval.tasks) if recipe.eval.tasks and recipe.eval.through == "weights" else None
    pair = Pair(recipe, run)
    scores = [
        *of_validation(pair, recipe, run),
        *of_answers(pair, recipe, run),
        *of_knowledge(pair, recipe),
        *of_labels(pair, recipe, files),
        *of_tasks(pair, recipe, tasks),
    ]
    return Made(
        outputs=[],
        metrics={
            "scores": as_rows(scores),
            "method": METHOD,
            "precision": pair.precision,
            "speed": dict(zip(SPEAKERS, pair.ask(lambda model, _: speed(model, pair.tokenizer)), strict=True)),
        },
        inputs={path: fingerprint(Path(path)) for path in _read(recipe)},
        packages=PACKAGES + (("lm-eval",) if tasks else ()),
    )


def _read(recipe: Recipe) -> list[str]:
    """The files that it reads beside the run's own."""
    own = [name for name in recipe.eval.tasks if name.endswith((".yaml", ".yml"))]
    return [os.path.relpath(KNOWLEDGE), *map(path_of, recipe.eval.classification), *own]


def of_validation(pair: "Pair", recipe: Recipe, run: Run) -> list[Score]:
    """Perplexity and token accuracy of all that the assistant says in the validation conversations."""
    cut = [rows_of(pair.tokenizer, row, recipe.train) for row in sample(recipe, run, "validation")]
    flat = [example for each in cut for example in each]
    if not flat:
        return []
    owner = [index for index, each in enumerate(cut) for _ in each]
    both = pair.ask(lambda model, name: likelihoods(model, flat, f"eval: validation answers, {name}"))

    def of_rows(statistic: Callable[[Likelihood], float]) -> list[list[list[float]]]:
        """(rows, 2) of each model; a conversation that makes several rows is one that is resampled."""
        made = []
        for found in both:
            rows = [[0.0, 0.0] for _ in cut]
            for index, each in zip(owner, found, strict=True):
                rows[index][0] += statistic(each)
                rows[index][1] += each.tokens
            made.append([row for row in rows if row[1]])
        return made

    group = "validation answers"
    losses, hits = of_rows(lambda each: each.loss), of_rows(lambda each: each.hits)
    note = f"of the assistant's tokens, each once, teacher-forced in rows of at most {recipe.train.max_length:,} tokens"
    return [
        compare(
            group, "perplexity", *losses, perplexity, unit="number", lower_is_better=True, seed=recipe.seed, note=note
        ),
        compare(group, "token accuracy", *hits, seed=recipe.seed, note=f"the most likely token, {note}"),
    ]


def rows_of(tokenizer: Any, row: dict[str, Any], knobs: Train) -> list[Example]:
    """The training rows of a conversation; none of one that training left out because the template cannot show it."""
    try:
        return row_examples(tokenizer, row, knobs.max_length, knobs.supervise)
    except UserError:
        return []


def perplexity(sums: Any) -> Any:
    """exp of the mean loss, from sums of losses and tokens (..., 2)."""
    import numpy as np

    return np.exp(np.minimum(sums[..., 0] / sums[..., 1], LARGEST_LOSS))


def of_answers(pair: "Pair", recipe: Recipe, run: Run) -> list[Score]:
    """Key facts and likeness of the greedy answers to the held-out questions; without these, to the validation's."""
    questions = limited(heldout(run.path("data")), recipe)
    group = "held-out questions" if questions else "validation questions"
    if not questions:
        questions = [asked for row in sample(recipe, run, "validation") if (asked := question_of(row))]
    if not questions:
        return []
    both = pair.ask(
        lambda model, name: answers(
            model, pair.tokenizer, questions, recipe.eval.max_new_tokens, f"eval: {group}, {name}"
        )
    )
    scores = []
    if any(question["facts"] for question in questions):
        facts = [
            [facts_in(answer, question) for answer, question in zip(said, questions, strict=True)] for said in both
        ]
        hits = [[[sum(each), len(each)] for each in found] for found in facts]
        scores.append(
            compare(group, "key facts", *hits, seed=recipe.seed, note="share of the facts that answers contain")
        )
    referenced = [index for index, question in enumerate(questions) if question["answer"]]
    wanted = [questions[index]["answer"] for index in referenced]
    for measure in text_measures() if referenced else []:
        rows = [measure.statistics([said[index] for index in referenced], wanted) for said in both]
        scores.append(
            compare(group, measure.name, *rows, measure.score, unit=measure.unit, seed=recipe.seed, note=measure.note)
        )
    return scores


def question_of(row: dict[str, Any]) -> dict[str, Any] | None:
    """A conversation as the question that its last answer answers; None of plain text, or where that calls a tool."""
    last = row["messages"][-1] if "messages" in row else {}
    if not str(last.get("content") or "").strip() or last.get("tool_calls"):
        return None
    return {"messages": row["messages"][:-1], "tools": row.get("tools"), "answer": last["content"], "facts": []}


def of_knowledge(pair: "Pair", recipe: Recipe) -> list[Score]:
    """How many questions of general knowledge are answered rightly, by which of four answers is the most likely."""
    with KNOWLEDGE.open(encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    questions = limited(questions, recipe)
    asked = [choices_of(pair.tokenizer, row) for row in questions]
    both = pair.ask(lambda model, name: choice_losses(model, pair.tokenizer, asked, f"eval: general knowledge, {name}"))
    hits = map(right_answers, both)
    return [compare("general knowledge", "accuracy", *hits, seed=recipe.seed, note=KNOWN)]


def choices_of(tokenizer: Any, row: dict[str, Any]) -> Choices:
    """A question of general knowledge as the user asks it, and its answers, the right one first."""
    prompt = rendered(tokenizer, [{"role": "user", "content": row["question"]}], prompt=True)
    return Choices(prompt, (row["answer"], *row["others"]))


def right_answers(losses: list[list[float]]) -> list[list[float]]:
    """Whether the first choice alone is the likeliest, of each question: a row of `compare`."""
    return [[float(first < min(others)), 1.0] for first, *others in losses]


def of_labels(pair: "Pair", recipe: Recipe, files: list[Labelled]) -> list[Score]:
    """Accuracy, macro F1 and Matthews' correlation of each file, whose labels compete by their likelihood."""
    scores = []
    for file in files:
        kept = drawn(len(file.prompts), recipe)
        texts = tuple(map(spoken, file.labels))
        asked = [
            Choices(rendered(pair.tokenizer, [{"role": "user", "content": file.prompts[index]}], prompt=True), texts)
            for index in kept
        ]
        both = pair.ask(
            lambda model, name, asked=asked, file=file: choice_losses(
                model, pair.tokenizer, asked, f"eval: {file.name}, {name}"
            )
        )
        wanted = [file.wanted[index] for index in kept]
        found = [[losses.index(min(losses)) for losses in each] for each in both]
        hits = [[[float(mine == other), 1.0] for mine, other in zip(wanted, each, strict=True)] for each in found]
        cells = [confusion(wanted, each, len(file.labels)) for each in found]
        share = Counter(wanted).most_common(1)[0][1] / len(wanted)
        note = f"the likeliest of {', '.join(texts)}, asked: {PROMPT!r}; always the commonest would be {share:.0%}"
        scores += [
            compare(file.name, "accuracy", *hits, seed=recipe.seed, note=note),
            compare(file.name, "macro F1", *cells, macro_f1, seed=recipe.seed, note=note),
            compare(file.name, "Matthews' correlation", *cells, matthews, unit="number", seed=recipe.seed, note=note),
        ]
    return scores


def of_tasks(pair: "Pair", recipe: Recipe, tasks: dict[str, Any] | None) -> list[Score]:
    """Tasks of the evaluation harness, of the loaded model itself."""
    if not tasks:
        return []
    from lm_eval.models.huggingface import HFLM

    mixed = "bfloat16" if pair.precision == "bfloat16" else None  # it switches our own autocast off
    settings = {"tokenizer": pair.tokenizer, "batch_size": ROWS_AT_ONCE, "mixed_precision_dtype": mixed}
    log.info("eval: %s, both models", ", ".join(recipe.eval.tasks))

    def asked(model: Any, name: str) -> Any:
        return harness.asked(HFLM(pretrained=model, **settings), tasks, recipe.eval.max_samples, recipe.seed)

    both = pair.ask(asked)
    return harness.compared(*both, recipe.seed)


def limited(rows: list[Any], recipe: Recipe) -> list[Any]:
    """At most `eval.max_samples` of them, drawn with the recipe's seed, in their order."""
    return [rows[index] for index in drawn(len(rows), recipe)]


def sample(recipe: Recipe, run: Run, part: str) -> list[dict[str, Any]]:
    """At most `eval.max_samples` conversations of a part of the data, but for answers that are judged bad."""
    data = run.path("data")
    return [row for row in picked(data, part, drawn(count(data, part), recipe)) if row.get("label") is not False]


def drawn(total: int, recipe: Recipe) -> list[int]:
    return sorted(random.Random(recipe.seed).sample(range(total), min(total, recipe.eval.max_samples)))


class Pair:
    """Both models, in what the processor does fast."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        from transformers import AutoTokenizer

        self.tokenizer, base = AutoTokenizer.from_pretrained(run.path("base")), base_to_train(recipe, run).eval()
        trained = load_trained(run, str(base.dtype).removeprefix("torch."), base)
        self.models = {"base": base, "trained": trained}
        self.adapter = Trained.read(run.path("trained")).kind == "adapter"
        self.precision = fast_precision() if recipe.train.precision == "auto" else recipe.train.precision
        if self.precision == "bfloat16":
            for model in (trained,) if self.adapter else (base, trained):
                round_once(model)

    @contextmanager
    def speaking(self, name: str) -> Iterator[Any]:
        """The model of that name, base or trained."""
        import torch

        model = self.models["trained" if self.adapter else name]
        bare = model.disable_adapter() if self.adapter and name == "base" else nullcontext()
        with bare, torch.autocast(model.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            yield model

    def ask(self, what: Callable[[Any, str], Any]) -> tuple[Any, Any]:
        """What both find, base first; `what` takes the model and its name."""
        found = []
        for name in ("base", "trained"):
            with self.speaking(name) as model:
                found.append(what(model, name))
        return found[0], found[1]


def round_once(model: Any) -> None:
    """Round the layers' weights to bfloat16, as autocast would again at every step: it keeps none that are frozen."""
    import torch

    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:  # not those in 4 bits
            # A new parameter, since the output layer may share the embedding's, which autocast leaves as it is.
            module.weight = torch.nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)


class Ticks:
    """When `generate` had the prompt, and when each token: a streamer that keeps the time alone."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def speed(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Seconds to the first token of one answer, tokens a second after it, and the memory that all this took."""
    import torch

    prompt = rendered(tokenizer, [{"role": "user", "content": "What is the capital of France?"}], prompt=True)
    batch = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)

    def answered(tokens: int) -> list[float]:
        """The seconds from the prompt to each token."""
        ticks = Ticks()
        with torch.inference_mode():
            model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=ticks)
        return [at - ticks.at[0] for at in ticks.at[1:]]

    answered(1)  # the first one also prepares
    times = [answered(1 + SPEED_TOKENS) for _ in range(SPEED_REPEATS)]
    held = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else resident_bytes()[1]
    return {
        "first_token_seconds": asdict(median([each[0] for each in times])),
        "tokens_per_second": asdict(median([SPEED_TOKENS / (each[-1] - each[0]) for each in times])),
        "bytes": held,
    }


if __name__ == "__main__":
    with boundary():
        this = stage("eval")
        show(up_to_date(this, recipe_of_arguments(this.module, this.does), evaluate).metrics)
