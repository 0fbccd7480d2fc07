"""Measure what is being served: speed, memory, and tasks if they are to be asked there:  python -m serve.measure RECIPE

The second half of `make eval`, where `make serve` runs in another terminal. Writes `served.json` beside the receipts.
"""

import json
import logging
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline import Recipe, Run, UserError, harness
from pipeline.command import boundary, recipe_of_arguments
from pipeline.files import write_whole
from pipeline.progress import progress
from pipeline.rows import heldout
from pipeline.scores import METHOD, as_rows, median, show
from serve.asking.endpoint import Answer, connect, failures, reason
from serve.running.session import Session, find, memory_bytes

if TYPE_CHECKING:
    from openai import OpenAI

DOES = "Measure what is being served: time to the first token, tokens a second, memory, tasks"
QUESTIONS, ANSWER_TOKENS = 10, 64
PLAIN = "Tell me about the number {}."

log = logging.getLogger("truetune")


def measure(recipe: Recipe, run: Run, session: Session) -> dict[str, Any]:
    """Speed and memory of the endpoint, and the tasks of `eval.tasks` if they are to be asked there.

    Raises:
        UserError: it does not answer, or a task cannot be asked of it.
    """
    tasks = served_tasks(recipe, session) if recipe.eval.through == "served" else None
    client, model = connect(recipe)
    asked = [question["messages"][-1]["content"] for question in heldout(run.path("data"))]
    questions = [*asked, *map(PLAIN.format, range(QUESTIONS))][:QUESTIONS]  # no two alike: a server keeps prompts
    try:
        speed = answered(client, model, questions)
        results = (
            harness.asked(evaluated(recipe, run, session, client, model), tasks, recipe.eval.max_samples, recipe.seed)
            if tasks
            else None
        )
    except failures() as error:
        raise UserError(reason(error)) from None
    held = [memory_bytes(service["pid"]) for service in session.services if service["name"] == "engine"]
    found = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": run.receipt("serve").inputs,
        "engine": session.engine,
        "speed": {f"served by {session.engine}": speed | {"bytes": sum(held)}},
        "scores": as_rows(harness.compared(None, results, recipe.seed)) if results else [],
        "method": METHOD,
    }
    write_whole(run.path("served.json"), json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return found


def answered(client: "OpenAI", model: str, questions: list[str]) -> dict[str, Any]:
    """Medians over the questions, asked one after the other."""
    firsts, rates = [], []
    with progress("eval: what is served", len(questions)) as tell:
        for done, question in enumerate(questions):
            tell(done)
            answer = Answer(
                client, model, [{"role": "user", "content": question}], max_tokens=ANSWER_TOKENS, temperature=0
            )
            for _ in answer:
                pass
            if answer.tokens > 1 and answer.last_at > answer.first_at:
                firsts.append(answer.first_at - answer.asked_at)
                rates.append((answer.tokens - 1) / (answer.last_at - answer.first_at))
    if not firsts:
        raise UserError(f"what is served answers {len(questions)} questions with one token each: see 'make prove'")
    return {"first_token_seconds": asdict(median(firsts)), "tokens_per_second": asdict(median(rates))}


def served_tasks(recipe: Recipe, session: Session) -> dict[str, Any]:
    """The tasks, all of which this engine can be asked.

    Raises:
        UserError: one needs the likelihood of given texts, and the engine tells none.
    """
    tasks = harness.tasks_named(recipe.eval.tasks)
    likelihood = [name for name, task in tasks["tasks"].items() if task.OUTPUT_TYPE != "generate_until"]
    if likelihood and session.engine != "vllm":
        raise UserError(
            f"eval.tasks: {', '.join(likelihood)} needs the likelihood of given texts, which {session.engine} does not "
            "tell over HTTP: set eval.through=weights, or serve with ENGINE=vllm"
        )
    return tasks


def evaluated(recipe: Recipe, run: Run, session: Session, client: "OpenAI", model: str) -> Any:
    """The harness's own client of the endpoint; the key travels in a header, not in arguments or the environment."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    given: dict[str, Any] = {
        "model": model,
        "header": {"Authorization": f"Bearer {client.api_key}"},
        "num_concurrent": recipe.serve.slots,
        "max_length": recipe.serve.context,
        "seed": recipe.seed,
    }
    if session.engine != "vllm":
        return LocalChatCompletion(base_url=f"{client.base_url}chat/completions", **given)
    tokenizer = {"tokenizer": str(run.path("base")), "tokenizer_backend": "huggingface"}
    return LocalCompletionsAPI(base_url=f"{client.base_url}completions", **given, **tokenizer)


if __name__ == "__main__":
    with boundary():
        recipe = recipe_of_arguments("serve.measure", DOES)
        run = Run.of(recipe)
        session = find(run)
        if session:
            show(measure(recipe, run, session))
        elif recipe.eval.tasks and recipe.eval.through == "served":
            start = f"run 'make serve RECIPE={recipe.given}' in another terminal first"
            raise UserError(f"eval.through=served: nothing of {run.folder} is being served: {start}")
        else:
            log.info("eval: nothing is being served, so the endpoint is not measured")
