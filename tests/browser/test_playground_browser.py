"""The playground in a real browser: chat, comparison, thumbs and export with a model that was trained seconds ago.

Its screenshots are in `.pytest_cache/screenshots`. Needs Chromium: `apt install chromium`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, Workplace
from gguf_fixture import Server

from serve.asking.endpoint import free_port
from train.reading.formats import detect, rows
from train.reading.sources import Source, chunks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium"),
]
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
PICTURES = REPOSITORY / ".pytest_cache/screenshots"
HOT = {"Temperature": 2, "Top_p": 1, "Top_k_(0:_off)": 0}  # a model of random layers then has something to say
ANSWER_MS = 180_000


class Playground:
    """`python -m serve.playground` in a workplace."""

    def __init__(self, workplace: Workplace) -> None:
        self.folder, self.port = workplace.folder, free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve.playground", "line.yaml"],
            cwd=self.folder,
            env=os.environ | {"PLAYGROUND_PORT": str(self.port), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.said = "".join(iter(self.process.stdout.readline, "Ctrl-C stops it.\n"))

    @property
    def address(self) -> str:
        token = (self.folder / ".secrets/playground-token").read_text().strip()
        return f"http://127.0.0.1:{self.port}/?token={token}"

    def end(self) -> int:
        """Ctrl-C, as a terminal sends it."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield launched
        launched.close()


@pytest.fixture
def playground(converted: Workplace) -> Iterator[Playground]:
    started = Playground(converted)
    yield started
    if started.process.poll() is None:
        started.end()
    started.process.communicate()


def opened(browser: Any, playground: Playground, **context: Any) -> Any:
    """The page, behind its door; that it asks no other host is part of every test."""
    for earlier in browser.contexts:
        earlier.close()
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **context}).new_page()
    page.set_default_timeout(ANSWER_MS)
    foreign: list[str] = []
    page.on("request", lambda asked: None if _is_here(asked.url, playground.port) else foreign.append(asked.url))
    page.foreign = foreign
    page.goto(playground.address)
    page.locator("#question textarea").wait_for()
    page.locator("#left input").first.wait_for()
    page.wait_for_function("document.querySelector('#left input').value != ''")
    return page


def _is_here(url: str, port: int) -> bool:
    return url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))


def set_numbers(page: Any, **numbers: float) -> None:
    for name, value in ({"Max tokens": 12} | numbers).items():
        field = page.get_by_label(f"number input for {name.replace('_', ' ')}")
        field.fill(str(value))
        field.press("Tab")


def clear(page: Any) -> None:
    page.get_by_role("button", name="New conversation").click()
    page.locator("#left .status b").wait_for(state="detached")


def ask(page: Any, question: str, *sides: str) -> None:
    """Type, send, and wait until every side has told its speed and its prompt."""
    page.locator("#question textarea").fill(question)
    page.keyboard.press("Enter")
    for side in sides:
        page.locator(f"#{side} .status b").wait_for(timeout=ANSWER_MS)
        page.locator(f"#{side}-prompt .tokens").wait_for(timeout=ANSWER_MS)


def choose(page: Any, side: str, name: str) -> None:
    page.get_by_label(f"Who answers, {side}").click()
    page.get_by_role("option", name=re.compile(f"^{name} ")).click()
    page.get_by_role("option").first.wait_for(state="detached")  # a list that closes would stand beside the next


def answers(page: Any, side: str) -> list[str]:
    return [text.strip() for text in page.locator(f"#{side} .bot.message").all_inner_texts()]


def exported(page: Any, folder: Path) -> Path:
    """The file that the left pane's Export gives."""
    with page.expect_download() as download:
        page.locator("#left").get_by_role("button", name="Export").click()
    download.value.save_as(folder / "exported.jsonl")
    return folder / "exported.jsonl"


def picture(page: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(PICTURES / f"playground-{name}.png"))


def test_a_chat_with_the_adapter_is_streamed_rated_and_exported(
    browser: Any, playground: Playground, converted: Workplace, tmp_path: Path
) -> None:
    page = opened(browser, playground)
    set_numbers(page, **HOT)
    ask(page, "What says the cat?", "left")
    picture(page, "chat")
    assert "first after" in page.locator("#left .prose.status").inner_text()
    special = page.locator("#left-prompt .special").all_inner_texts()
    assert "<|im_start|>" in special and page.locator("#left-prompt .token").first.get_attribute("title") == "1"

    page.locator("#left").get_by_label(re.compile("^like$", re.IGNORECASE)).click()
    page.get_by_text("feedback.jsonl").wait_for()
    line = json.loads(converted.run.path("feedback.jsonl").read_text())
    assert (line["rating"], line["artefact"]) == ("up", "line/adapter")
    assert line["messages"] == [{"role": "user", "content": "What says the cat?"}] and line["answer"]

    source = Source(str(exported(page, tmp_path)))
    (chunk,) = chunks(source)
    read = rows(detect(source), chunk)
    (row,) = read.rows
    assert read.problems == [] and [turn["role"] for turn in row.value["messages"]] == ["user", "assistant"]
    assert page.foreign == []


def test_two_artefacts_answer_the_same_question_side_by_side(browser: Any, playground: Playground) -> None:
    page = opened(browser, playground, color_scheme="dark")
    page.get_by_label("Compare two").check()
    choose(page, "right", "F16")
    set_numbers(page, Temperature=0)
    for animal in ("dog", "owl", "hen"):  # F16 is the adapter, merged and converted: greedily, both say the same
        ask(page, f"What says the {animal}?", "left", "right")
        assert answers(page, "left") == answers(page, "right")
        ids = [page.locator(f"#{side}-prompt details code").text_content() for side in ("left", "right")]
        assert ids[0] == ids[1]
        clear(page)

    choose(page, "right", "base")
    set_numbers(page, **HOT)
    ask(page, "What says the dog?", "left", "right")
    picture(page, "compare-dark")
    assert answers(page, "left") != answers(page, "right")
    assert page.locator("#right .status b").inner_text() == "base"
    assert page.foreign == []


def test_stop_ends_an_answer_that_streams_and_keeps_what_came(browser: Any, playground: Playground) -> None:
    page = opened(browser, playground)
    set_numbers(page, **HOT | {"Max tokens": 2000})
    page.locator("#question textarea").fill("What says the cat?")
    page.keyboard.press("Enter")
    page.locator("#left .bot.message").get_by_text(re.compile(r"\S")).first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#left .status b").wait_for(timeout=60_000)
    assert page.locator("#left .prose.status").inner_text().endswith("stopped")
    (came,) = answers(page, "left")
    assert came
    picture(page, "stopped")
    set_numbers(page, **HOT)
    ask(page, "And twice?", "left")
    page.wait_for_function("document.querySelectorAll('#left .bot.message').length == 2")
    assert answers(page, "left")[0] == came


def test_an_edited_turn_is_exported_as_edited_and_read_by_the_next_answer(
    browser: Any, playground: Playground, converted: Workplace, tmp_path: Path
) -> None:
    page = opened(browser, playground)
    set_numbers(page, **HOT)
    ask(page, "What says the cat?", "left")
    page.locator("#left .bot.message").hover()
    page.locator("#left").get_by_role("button", name="Edit").last.click()
    page.locator("#left textarea").first.fill("The cat says meow.")
    page.locator("#left").get_by_role("button", name="Submit").first.click()
    page.locator("#left .bot.message").get_by_text("The cat says meow.").wait_for()
    picture(page, "edited")
    row = json.loads(exported(page, tmp_path).read_text())
    assert [turn["content"] for turn in row["messages"]] == ["What says the cat?", "The cat says meow."]
    page.locator("#left .status b").evaluate("told => told.remove()")  # so that the next answer's is waited for
    ask(page, "And twice?", "left")
    page.locator("#left-prompt .tokens").get_by_text("meow").first.wait_for()


def test_what_make_serve_serves_answers_in_a_pane(browser: Any, converted: Workplace) -> None:
    server = Server(converted.folder, name="line")
    server.wait_for("Ctrl-C stops", seconds=120)
    playground = Playground(converted)
    try:
        page = opened(browser, playground)
        page.get_by_label("Compare two").check()
        choose(page, "left", "served")
        choose(page, "right", "Q8_0")
        set_numbers(page, **HOT)
        ask(page, "What says the dog?", "left", "right")
        picture(page, "served")
        assert str(server.port) in page.get_by_label("Who answers, left").input_value()
        assert all(answers(page, "left")) and all(answers(page, "right"))
        ids = [page.locator(f"#{side}-prompt details code").text_content() for side in ("left", "right")]
        assert ids[0] == ids[1]

        long = " ".join(["dog"] * 5000)
        page.locator("#question textarea").fill(long)
        page.keyboard.press("Enter")
        for side in ("left", "right"):
            page.locator(f"#{side} .error").get_by_text("begin a new conversation").wait_for()
        page.locator("#question textarea:enabled").wait_for()
        assert page.locator("#question textarea").input_value() == long  # given back, to be asked otherwise
    finally:
        playground.end()
        playground.process.communicate()
        assert server.end() == 0


def test_a_phone_shows_it_all_without_scrolling_sideways(browser: Any, playground: Playground) -> None:
    page = opened(browser, playground, viewport={"width": 390, "height": 844})
    set_numbers(page, **HOT)
    ask(page, "What says the owl?", "left")
    picture(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_an_engine_that_was_killed_is_loaded_again(browser: Any, playground: Playground) -> None:
    page = opened(browser, playground)
    set_numbers(page, **HOT)
    ask(page, "What says the fox?", "left")
    (model,) = (
        child for child in psutil.Process(playground.process.pid).children() if "weights" in str(child.cmdline())
    )
    model.kill()
    clear(page)
    ask(page, "What says the bee?", "left")
    assert answers(page, "left") != []


def test_a_kill_leaves_no_process(browser: Any, playground: Playground) -> None:
    page = opened(browser, playground)
    ask(page, "What says the hen?", "left")
    children = psutil.Process(playground.process.pid).children(recursive=True)
    playground.process.kill()
    playground.process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_ctrl_c_leaves_no_process_and_no_token_in_its_output(browser: Any, playground: Playground) -> None:
    page = opened(browser, playground)
    ask(page, "What says the cow?", "left")
    children = psutil.Process(playground.process.pid).children(recursive=True)
    lines = [" ".join(child.cmdline()) for child in children]
    assert any("serve.engines.weights" in line for line in lines)
    assert playground.end() == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert playground.process.stderr
    told = playground.said + playground.process.stderr.read() + "".join(lines)
    for secret in (playground.folder / ".secrets").iterdir():
        assert secret.read_text().strip() not in told
    assert "Traceback" not in told
