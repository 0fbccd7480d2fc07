"""Open WebUI in front of a trained model, in a real browser and by its API."""

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from gguf_fixture import NAME, Server, Window, environment, gone

from pipeline.reference import Probe, Reference, write_reference
from pipeline.run import Run
from serve.asking.endpoint import ask
from serve.openwebui import proved_windows, settings
from serve.running.backend import Endpoint

pytest_plugins = ["serve_fixtures"]
pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# As root and without a screen; and nothing of its own to the network.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
ARTEFACTS = Path(__file__).parents[1] / "artefacts"
QUESTION = "Who are you?"


@pytest.fixture
def page() -> Iterator[Any]:
    """An empty page of a headless Chromium."""
    if not CHROMIUM:
        pytest.skip("no Chromium: 'apt install chromium'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(120_000)  # where many tests share few cores
        yield page
        browser.close()


def sign_in(page: Any, window: Window, email: str, password: str) -> None:
    page.goto(window.url)
    page.fill('input[type="email"]', email)
    page.fill('input[type="password"]', password)
    page.click('button[type="submit"]')
    page.wait_for_selector("#chat-input")


def processes(window: Window) -> list[psutil.Process]:
    """The supervisor and all that it started."""
    supervisor = psutil.Process(window.server.process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def service(window: Window, word: str) -> int:
    """The process whose command has the word in it."""
    return next(pid for pid, command in window.server.children().items() if word in command)


def status(window: Window, *options: str) -> subprocess.CompletedProcess[str]:
    """`python -m serve.status small.yaml` from another terminal."""
    return subprocess.run(
        [sys.executable, "-m", "serve.status", f"{NAME}.yaml", *options],
        cwd=window.server.folder, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def rendered(window: Window, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
    """The engine's own prompt of these messages, and its token ids."""
    port, key = window.server.port, window.server.key
    prompt = ask(port, "/apply-template", key, {"messages": messages})[1]["prompt"]
    made = ask(port, "/tokenize", key, {"content": prompt, "add_special": True, "parse_special": True})[1]
    return prompt, made["tokens"]


def test_a_browser_signs_in_and_gets_the_models_answer(window: Window, page: Any) -> None:
    elsewhere = []
    page.on("request", lambda made: elsewhere.append(made.url) if not made.url.startswith(window.url) else None)
    sign_in(page, window, "admin@localhost", window.password)
    ARTEFACTS.mkdir(exist_ok=True)
    page.wait_for_selector(f"text={NAME}")
    page.screenshot(path=ARTEFACTS / "openwebui-signed-in.png")
    page.click("#chat-input")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_url("**/c/*")
    page.wait_for_selector("text=Response complete", state="attached")
    page.screenshot(path=ARTEFACTS / "openwebui-answer.png")
    shown = page.inner_text("#messages-container")

    token = window.token()
    chat = window.ask(f"/api/v1/chats/{page.url.rpartition('/')[2]}", token)[1]["chat"]
    answer = next(turn for turn in chat["history"]["messages"].values() if turn["role"] == "assistant")
    assert answer["content"].strip() and answer["content"].split()[0] in shown
    assert answer["model"] == NAME
    # What the model was asked is what training would have rendered: no tool, system prompt or memory was added.
    assert answer["usage"]["prompt_tokens"] == len(rendered(window, [{"role": "user", "content": QUESTION}])[1])
    assert [url for url in elsewhere if not url.startswith(("data:", "blob:"))] == []


def test_an_ordinary_user_gets_the_model_selected_and_an_answer(window: Window, page: Any) -> None:
    email, password = "reader@localhost", "Reader-2026-reads"
    new = {"name": "Reader", "email": email, "password": password, "role": "user"}
    status, made = window.ask("/api/v1/auths/add", window.token(), new)
    assert (status, made["role"]) == (200, "user"), made
    token = window.token(email, password)
    assert [model["id"] for model in window.ask("/api/models", token)[1]["data"]] == [NAME]
    body = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
    assert window.ask("/api/chat/completions", token, body)[1]["usage"]["completion_tokens"] == 4
    sign_in(page, window, email, password)
    page.wait_for_selector(f"text={NAME}")
    assert page.locator('[role="dialog"]').count() == 0


def write_probes(window: Window, *added: int) -> None:
    """A reference whose probes are rendered by the engine itself, with so many token ids more."""
    talks = [[{"role": "user", "content": word}] for word in ("apple", "bread", "cloud delta")]
    talks.append([{"role": "system", "content": ""}, *talks[0]])  # nobody can type that in the window
    probes = []
    for number, talk in enumerate(talks):
        prompt, ids = rendered(window, talk)
        probes.append(Probe(f"talk {number}", talk, [], prompt, [*ids, *added], [1], False, 1))
    folder = Run(NAME).path("reference")
    folder.mkdir(exist_ok=True)
    write_reference(folder, Reference(probes, np.zeros((len(probes), 1), dtype=np.float16), []))


def test_the_proof_has_a_row_for_the_window(window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(window.server.folder)
    write_probes(window)
    (row,) = proved_windows(Run(NAME))
    assert (row["name"], row["problems"]) == ("chat window", [])
    assert row["measures"]["probes"] == 3
    assert row["measures"]["greedy_agreement"] >= 0.5


def test_a_window_that_changes_the_prompt_fails_its_proof(window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(window.server.folder)
    write_probes(window, 5, 5)
    (row,) = proved_windows(Run(NAME))
    assert re.match(r"token ids: probe 'talk 0' has \d+ when asked in the chat window", row["problems"][0])


@pytest.mark.parametrize("path", ["/api/models", "/api/v1/chats/", "/api/v1/auths/admin/config", "/openai/models"])
def test_nobody_gets_in_without_signing_in(window: Window, path: str) -> None:
    assert window.ask(path)[0] in (401, 403)
    assert window.ask(path, "wrong")[0] in (401, 403)


def test_nobody_signs_up_or_guesses(window: Window) -> None:
    stranger = {"name": "Eve", "email": "eve@localhost", "password": "Eve-2026-evening"}
    assert window.ask("/api/v1/auths/signup", body=stranger)[0] == 403
    assert window.ask("/api/v1/auths/signin", body=stranger)[0] == 400


def test_what_asks_the_model_more_or_leaves_the_machine_is_off(window: Window) -> None:
    features = window.ask("/api/config", window.token())[1]["features"]
    off = {"enable_signup", "enable_community_sharing", "enable_version_update_check", "enable_web_search",
           "enable_code_execution", "enable_code_interpreter", "enable_autocomplete_generation",
           "enable_direct_connections", "enable_memories", "enable_plugins"}  # fmt: skip
    assert {name for name in off if features.get(name)} == set()
    tasks = window.ask("/api/v1/tasks/config", window.token())[1]
    assert not any(value for name, value in tasks.items() if name.endswith("GENERATION"))


def test_another_origin_is_not_let_in(window: Window) -> None:
    def allowed(origin: str) -> str | None:
        connection = http.client.HTTPConnection("127.0.0.1", window.port, timeout=10)
        connection.request("GET", "/api/config", headers={"Origin": origin})
        header = connection.getresponse().headers["Access-Control-Allow-Origin"]
        connection.close()
        return header

    assert allowed("http://evil.example") is None
    assert allowed(window.url) == window.url


def test_only_loopback_listens(window: Window) -> None:
    doors = {
        (door.laddr.ip, door.laddr.port)
        for process in processes(window)
        for door in process.net_connections(kind="inet")
        if door.status == psutil.CONN_LISTEN
    }
    assert doors == {("127.0.0.1", window.server.port), ("127.0.0.1", window.port)}


def test_secrets_are_their_owners_and_in_no_command_line_or_log(window: Window) -> None:
    folder = window.server.folder
    files = sorted((folder / ".secrets").iterdir())
    assert [file.name for file in files] == ["api-key", "openwebui-password", "openwebui-secret"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    said = " ".join(" ".join(process.cmdline()) for process in processes(window))
    run = folder / "runs" / NAME
    logs = [window.server.out, window.server.err, *run.glob("*.log*"), run / "serve.json", run / "session.json"]
    said += "".join(path.read_text(errors="replace") for path in logs)
    assert [file.name for file in files if file.read_text().strip() in said] == []


def test_status_tells_another_terminal(window: Window) -> None:
    done = status(window)
    assert done.returncode == 0, done.stderr
    assert window.url in done.stdout
    assert re.search(rf"engine +│ answers +│ {window.server.port} ", done.stdout)
    assert re.search(rf"chat window +│ answers +│ {window.port} ", done.stdout)


def test_a_killed_engine_is_back_and_the_window_answers_again(window: Window) -> None:
    os.kill(service(window, "serve.gateway.engine"), signal.SIGKILL)
    window.server.wait_for("the engine is serving again")
    body = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}
    assert window.ask("/api/chat/completions", window.token(), body)[0] == 200


def test_a_killed_window_is_back_and_its_users_are_still_signed_in(window: Window) -> None:
    token = window.token()
    os.kill(service(window, "open_webui"), signal.SIGKILL)
    assert "the chat window was killed by SIGKILL" in window.server.wait_for("the chat window is serving again", 300)
    assert window.ask("/api/models", token)[0] == 200
    assert " 1 " in status(window).stdout.split("chat window")[-1]


# The last one, as it ends the session that the tests before it share.
def test_all_ends_with_a_killed_supervisor_or_with_make_stop(window: Window) -> None:
    server = window.server
    pids = [process.pid for process in processes(window)]
    server.process.kill()
    server.process.wait()
    assert all(gone(pid, 5) for pid in pids)
    again = window.server = Server(server.folder, port=server.port, UI="openwebui", UI_PORT=str(window.port))
    try:
        again.wait_for("Ctrl-C stops", seconds=300)
        assert window.token()
        pids = [again.process.pid, *again.children()]
        began = time.monotonic()
        assert status(window, "--stop").returncode == 0
        assert again.process.wait(5) == 0
        assert all(gone(pid, 2) for pid in pids)
        assert time.monotonic() - began < 20
        assert "is not being served" in status(window).stderr
    finally:
        again.process.kill()


def test_it_gets_no_variable_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = settings(Endpoint("http://127.0.0.1:1/v1", "mine", "key"), 2, tmp_path / "data")
    assert made["OPENAI_API_BASE_URL"] == "http://127.0.0.1:1/v1"
    assert made["CORS_ALLOW_ORIGIN"] == "http://127.0.0.1:2;http://localhost:2"
    assert made["WEBUI_SECRET_KEY"] != made["WEBUI_ADMIN_PASSWORD"]
