"""What is served, measured over HTTP: speed, memory, and a task of the evaluation harness with the server's key."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_fixture import NAME, WORDS, Server, environment

pytest_plugins = ["serve_fixtures"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{word}}}}"
doc_to_target: answer
{more}
generation_kwargs: {{until: ["\\n"], max_gen_toks: 1}}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


def measured(server: Server, *overrides: str) -> "subprocess.CompletedProcess[str]":
    (server.folder / "runs" / NAME / "data").mkdir(exist_ok=True)
    (server.folder / "runs" / NAME / "data/heldout.jsonl").write_text("")
    return subprocess.run(
        [sys.executable, "-m", "serve.measure", f"{NAME}.yaml", *overrides],
        cwd=server.folder,
        env=environment(PORT=str(server.port)),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def task(folder: Path, name: str, kind: str, metric: str, more: str = "") -> str:
    data = folder / "words.jsonl"
    data.write_text("".join(json.dumps({"word": word, "answer": word}) + "\n" for word in WORDS))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, metric=metric, more=more))
    return f"{name}.yaml"


def found(server: Server) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((server.folder / "runs" / NAME / "served.json").read_text())
    return loaded


def test_speed_and_memory_of_what_is_served(server: Server) -> None:
    done = measured(server)
    assert done.returncode == 0, done.stderr
    row = found(server)["speed"]["served by llamacpp"]
    for key in ("first_token_seconds", "tokens_per_second"):
        assert 0 < row[key]["low"] <= row[key]["value"] <= row[key]["high"]
    assert row["bytes"] > 10_000_000
    assert "served by llamacpp: first token after" in done.stdout


def test_what_is_not_served_is_not_measured(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve.measure", f"{NAME}.yaml"], cwd=folder, env=environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "nothing is being served" in done.stderr
    asked = [sys.executable, "-m", "serve.measure", f"{NAME}.yaml", "eval.tasks=[arc_easy]", "eval.through=served"]
    done = subprocess.run(asked, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: eval.through=served: nothing of runs/")


@pytest.mark.slow  # the harness takes ten seconds to import
def test_a_task_is_asked_through_the_endpoint(server: Server) -> None:
    name = task(server.folder, "sayings", "generate_until", "exact_match")
    done = measured(server, f"eval.tasks=[{name}]", "eval.through=served", "eval.max_samples=6")
    assert done.returncode == 0, done.stderr
    (score,) = found(server)["scores"]
    assert (score["group"], score["name"], score["rows"], score["base"]) == ("sayings", "exact_match", 6, None)
    assert 0 <= score["trained"]["low"] <= score["trained"]["value"] <= score["trained"]["high"] <= 1
    assert "sayings" in done.stdout and server.key not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_task_that_needs_likelihoods_is_refused_where_the_server_tells_none(server: Server) -> None:
    name = task(server.folder, "choosing", "multiple_choice", "acc", "doc_to_choice: [apple, bread]")
    done = measured(server, f"eval.tasks=[{name}]", "eval.through=served")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "error: eval.tasks: choosing needs the likelihood of given texts, which llamacpp does not tell" in done.stderr
    )
