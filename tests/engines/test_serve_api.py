"""Starting, supervising and stopping the server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf_fixture import CONTEXT, NAME, SLOTS, TRAINED, Server, environment, free_port, gone, is_running, write_run

from pipeline.error import UserError
from pipeline.files import fingerprint
from pipeline.proof import Comparison, write_comparisons
from serve.asking.endpoint import ask, make_key, read_key

pytest_plugins = ["serve_fixtures"]

QUESTION = {"messages": [{"role": "user", "content": "apple"}], "max_tokens": 1}


def refused(folder: Path, *overrides: str, **variables: str) -> str:
    """What a start that must fail writes to stderr; it says so in `error:` lines only, with code 1."""
    done = subprocess.run(
        [sys.executable, "-m", "serve.api", f"{NAME}.yaml", *overrides],
        cwd=folder,
        env=environment(**{"PORT": str(free_port()), "UI": "none"} | variables),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    return done.stderr


def answers(server: Server) -> bool:
    return ask(server.port, "/v1/chat/completions", server.key, QUESTION)[0] == 200


def test_receipt(server: Server):
    receipt = json.loads((server.folder / "runs" / NAME / "serve.json").read_text())
    path = f"runs/{NAME}/gguf/{NAME}-Q8_0.gguf"
    assert list(receipt) == [
        "stage", "recipe", "inputs", "outputs", "versions", "metrics", "started_at", "seconds", "peak_rss_bytes",
        "machine",
    ]  # fmt: skip
    assert receipt["stage"] == "serve"
    assert receipt["inputs"] == {path: fingerprint(server.folder / path)}
    assert receipt["outputs"] == {}
    assert list(receipt["versions"]) == ["python", "xllamacpp"]
    assert 0 < receipt["metrics"].pop("seconds_to_ready") < 30
    assert receipt["metrics"] == {
        "url": f"{server.url}/v1",
        "model": NAME,
        "type": "Q8_0",
        "pid": server.process.pid,
        "port": server.port,
        "engine": "llamacpp",
        "ui": "none",
        "ui_url": "",
        "context": CONTEXT,
        "slots": SLOTS,
        "threads": 1,
    }
    assert receipt["peak_rss_bytes"] > 10_000_000
    assert "chat window" not in server.err.read_text(), "it has none"


def test_the_curl_line_works_when_pasted(server: Server):
    (line,) = [line for line in server.out.read_text().splitlines() if line.strip().startswith("curl ")]
    done = subprocess.run(["bash", "-c", line], cwd=server.folder, capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout)["model"] == NAME


def test_key_is_made_once_for_its_owner_only(server: Server):
    file = server.folder / ".secrets" / "api-key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert len(server.key) >= 43


def test_a_second_start_says_where_the_first_one_is(server: Server):
    stop = f"use it, or stop it with 'make stop RECIPE={NAME}.yaml'"
    error = refused(server.folder, PORT=str(server.port))
    assert error == f"error: runs/{NAME} is already being served on {server.url}/v1: {stop}\n"


@pytest.mark.parametrize("wish", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_both_processes(start, wish: signal.Signals):
    server = start()
    server.wait_for("Ctrl-C stops")
    engine = server.engine()
    assert engine
    assert server.end(wish) == 0
    assert not is_running(engine)
    assert server.err.read_text().splitlines()[-1] == "stopped"
    assert "Traceback" not in server.err.read_text()


def test_a_signal_while_loading_leaves_nothing(start, folder: Path):
    code = "import serve.engines.llamacpp as s, runpy; s.is_healthy = lambda *a, **k: False; {}".format(
        "runpy.run_module('serve.api', run_name='__main__')"
    )
    server = start(code=code)
    end = time.monotonic() + 15
    while not (engine := server.engine()) and time.monotonic() < end:
        time.sleep(0.02)
    assert engine
    assert server.end(signal.SIGINT) == 130
    assert gone(engine, 5)
    assert "Traceback" not in server.err.read_text()
    assert not (folder / "runs" / NAME / "serve.json").exists()


def test_a_killed_engine_comes_back(start):
    server = start()
    server.wait_for("Ctrl-C stops")
    first = server.engine()
    os.kill(first, signal.SIGKILL)
    said = server.wait_for("serving again", seconds=15)
    assert "the engine was killed by SIGKILL" in said
    assert "starting it again in 1 s" in said
    assert answers(server)
    assert server.engine() != first
    assert server.end() == 0


def test_a_hung_engine_comes_back(start):
    patience = "s.HEALTH_SECONDS = s.GRACE_SECONDS = 0.2; import serve.engines.llamacpp as l; l.PATIENCE_SECONDS = 0.5"
    server = start(
        code=f"import serve.running.supervisor as s, runpy; {patience}; "
        "runpy.run_module('serve.api', run_name='__main__')"
    )
    server.wait_for("Ctrl-C stops")
    os.kill(server.engine(), signal.SIGSTOP)
    assert "the engine did not answer 3 times in a row" in server.wait_for("serving again", seconds=30)
    assert answers(server)
    assert server.end() == 0


def test_an_engine_that_keeps_failing_is_given_up(start, folder: Path):
    patience = "s.LONGEST_PAUSE_SECONDS = 0.05"
    server = start(
        code=f"import serve.running.supervisor as s, runpy; {patience}; "
        "runpy.run_module('serve.api', run_name='__main__')"
    )
    server.wait_for("Ctrl-C stops")
    blocker = socket.socket()
    blocker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    os.kill(server.engine(), signal.SIGKILL)
    while True:
        try:
            blocker.bind(("127.0.0.1", server.port))
            break
        except OSError:
            time.sleep(0.001)
    blocker.listen()
    assert server.process.wait(30) == 1
    blocker.close()
    last = server.err.read_text().splitlines()[-1]
    assert last.startswith("error: the engine failed 5 times in a row, at last it could not start: port")
    assert last.endswith(f"see runs/{NAME}/serve.log")


def test_another_file_is_not_served_after_a_crash(start, folder: Path):
    server = start()
    server.wait_for("Ctrl-C stops")
    path = folder / "runs" / NAME / "gguf" / f"{NAME}-Q8_0.gguf"
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    other.replace(path)
    os.kill(server.engine(), signal.SIGKILL)
    assert server.process.wait(15) == 1
    assert "was replaced while it was served: run 'make serve' again" in server.err.read_text()


@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_a_taken_port_is_refused_fast(folder: Path, arguments: list[str]):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        began = time.monotonic()
        error = refused(folder, *arguments, PORT=str(port))
    assert time.monotonic() - began < 5
    assert error.startswith(f"error: port {port} is in use: stop the other program or choose another with 'PORT=")
    assert not (folder / ".secrets").exists()


@pytest.mark.parametrize("port", ["0", "65536", "eighty", "-1", "8000.5", "²"])
def test_a_bad_port_is_refused(folder: Path, port: str):
    assert refused(folder, PORT=port) == f"error: PORT='{port}' is not a port: give a whole number from 1 to 65535\n"


def test_a_missing_receipt_names_the_command(folder: Path):
    (folder / "runs" / NAME / "gguf.json").unlink()
    assert refused(folder) == f"error: runs/{NAME}/gguf.json is missing: run 'make gguf RECIPE={NAME}.yaml' first\n"


def test_a_type_that_was_not_made_is_refused(folder: Path):
    error = refused(folder, "gguf.types=[Q4_0]")
    assert f"knows no runs/{NAME}/gguf/{NAME}-Q4_0.gguf: run 'make gguf RECIPE={NAME}.yaml' first" in error


def test_a_changed_file_is_refused(folder: Path):
    path = folder / "runs" / NAME / "gguf" / f"{NAME}-Q8_0.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert "its sha256 differs" in refused(folder)


def test_a_truncated_file_is_refused_with_llama_cpps_reason(tmp_path: Path, tiny_gguf: bytes):
    write_run(tmp_path, tiny_gguf[:-30_000])
    error = refused(tmp_path).splitlines()[-1]
    assert error.startswith(f"error: the engine ended with code 1 while loading runs/{NAME}/gguf/{NAME}-Q8_0.gguf: ")
    assert "is not within the file bounds" in error
    assert error.endswith(f"see runs/{NAME}/serve.log")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path):
    write_run(tmp_path, b"<html>Not found</html>")
    assert "is not a whole GGUF file" in refused(tmp_path)


def test_a_context_beyond_the_trained_one_is_refused(folder: Path):
    error = refused(folder, f"serve.context={TRAINED + 1}")
    assert f"serve.context: {TRAINED + 1} is more than the {TRAINED} tokens that" in error


def test_a_second_start_is_quick_and_keeps_the_key(start):
    first = start()
    first.wait_for("Ctrl-C stops")
    key = first.key
    assert first.end() == 0
    began = time.monotonic()
    second = start(port=first.port)
    second.wait_for("Ctrl-C stops")
    assert time.monotonic() - began < 5
    assert second.key == key
    assert second.end() == 0


def test_key_open_to_others_is_closed(tmp_path: Path):
    file = tmp_path / "secrets" / "api-key"
    file.parent.mkdir(mode=0o755)
    file.write_text("mine\n")
    file.chmod(0o644)
    assert make_key(file) == "mine"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize("content", ["", "\n", "one\ntwo\n", "two words", "ключ"])
def test_a_bad_key_is_refused(tmp_path: Path, content: str):
    file = tmp_path / "api-key"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="delete it, 'make serve' makes a new one"):
        read_key(file)


def test_two_starts_at_once_agree_on_one_key(tmp_path: Path):
    make = "from serve.asking.endpoint import make_key; print(make_key())"
    makers = [
        subprocess.Popen([sys.executable, "-c", make], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    assert len({maker.communicate(timeout=30)[0] for maker in makers}) == 1
    assert os.listdir(tmp_path / ".secrets") == ["api-key"]


def write_proof(folder: Path, problems: list[str]) -> None:
    """The receipt of `make prove` for the run's very files."""
    made = json.loads((folder / "runs" / NAME / "gguf.json").read_text())
    comparisons = [{"name": "Q8_0", "measures": {}, "problems": problems}]
    metrics = {"passed": not problems, "comparisons": comparisons}
    proof = made | {"stage": "prove", "inputs": made["outputs"], "outputs": {}, "metrics": metrics}
    (folder / "runs" / NAME / "prove.json").write_text(json.dumps(proof))


def test_what_failed_its_proof_is_not_served(folder: Path):
    write_proof(folder, ["token ids: probe 'plain', position 3"])
    said = refused(folder)
    assert "failed its proof (token ids: probe 'plain', position 3)" in said
    assert "FORCE=1" in said


def test_force_serves_it_all_the_same_and_says_so(folder: Path, start, monkeypatch: pytest.MonkeyPatch):
    write_proof(folder, ["token ids: probe 'plain', position 3"])
    monkeypatch.setenv("FORCE", "1")
    server = start()
    server.wait_for("Ctrl-C stops")
    assert answers(server)


def test_a_proof_of_other_files_does_not_count(folder: Path, start):
    write_proof(folder, ["token ids: probe 'plain', position 3"])
    path = folder / "runs" / NAME / "prove.json"
    proof = json.loads(path.read_text())
    proof["inputs"] = {name: mark | {"sha256": "0" * 64} for name, mark in proof["inputs"].items()}
    path.write_text(json.dumps(proof))
    server = start()
    server.wait_for("Ctrl-C stops")
    assert answers(server)


def test_a_file_that_failed_its_comparison_is_not_served(folder: Path):
    rows = [
        Comparison("Q2_K", problems=["type: 7"]),
        Comparison("Q8_0", problems=["logits: mean divergence 2, allowed 0.02"]),
    ]
    write_comparisons(folder / "runs" / NAME / "compare.jsonl", rows)
    made = json.loads((folder / "runs" / NAME / "gguf.json").read_text())
    compared = made | {"stage": "compare", "inputs": made["outputs"], "outputs": {}, "metrics": {"recommended": "Q8_0"}}
    (folder / "runs" / NAME / "compare.json").write_text(json.dumps(compared))
    assert "failed its proof (Q8_0: logits: mean divergence 2, allowed 0.02)" in refused(folder)
