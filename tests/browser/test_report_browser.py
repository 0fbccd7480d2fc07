"""The page in a real Chromium: a phone, a desk, light, dark and paper."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_run import Told, comparisons

from report.report import report

pytest_plugins = ["report_fixtures"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium"),
]
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3, level AA
# Of each element with text of its own: its colour and the first opaque background behind it.
COLOURS = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && [...e.childNodes].some(
    n => n.nodeType == 3 && n.textContent.trim()) && e.offsetParent).map(e => {
  let behind = e;
  while (behind.parentElement && getComputedStyle(behind).backgroundColor == 'rgba(0, 0, 0, 0)')
    behind = behind.parentElement;
  return [e.textContent.trim().slice(0, 30), getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def address(told: Callable[..., Told]) -> str:
    """The page of a run in which one artefact failed: every kind of mark is on it."""
    run = told(rows=comparisons(Q2_K="token ids: probe 'long', position 7: " + "x" * 300))
    report(run.recipe, run.run)
    return run.run.path("report.html").resolve().as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_reads_and_asks_for_nothing(
    browser: Any, address: str, width: int, scheme: str, tmp_path: Path
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, asked, said = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(address)
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    wide, visible = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= visible
    assert [url for url in asked if not url.startswith("data:")] == [address] and said == []
    seen = page.evaluate(COLOURS)
    assert len(seen) > 100
    assert [(text, *colours) for text, *colours in seen if contrast(*colours) < LEAST_CONTRAST] == []
    context.close()


def test_labels_of_the_charts_stay_on_their_paper(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(address)
    outside = page.evaluate("""() => [...document.querySelectorAll('svg text')].filter(text => {
        const box = text.getBBox(), paper = text.ownerSVGElement.viewBox.baseVal;
        return box.x < 0 || box.y < 0 || box.x + box.width > paper.width || box.y + box.height > paper.height;
    }).map(text => text.textContent)""")
    assert outside == []


def test_the_answer_is_the_first_thing_that_a_phone_shows(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address)
    box = page.locator(".answer").bounding_box()
    assert page.locator(".answer").inner_text() == "No: Q2_K is not the model that was trained."
    assert box["y"] + box["height"] < 844


def test_it_prints_dark_on_white_even_in_the_dark(browser: Any, address: str) -> None:
    page = browser.new_context(color_scheme="dark").new_page()
    page.goto(address)
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


def contrast(text: str, behind: str) -> float:
    """Contrast of two colours as browsers write them, by WCAG's relative luminance."""
    light, dark = sorted((luminance(text), luminance(behind)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = json.loads(colour.replace("rgba(", "[").replace("rgb(", "[").replace(")", "]"))[:3]
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
