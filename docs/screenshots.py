"""The pictures of README, of a run that is being served:  python -m docs.screenshots [RUN]"""

import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline.error import UserError
from pipeline.run import Run
from serve.running.session import find

QUESTIONS = ("Who are you?", "How do I train on my own file?")
IMAGES = Path("docs/images")
WINDOW = {"width": 1000, "height": 500}
WAIT_MS = 120_000


def chat(page: Any, url: str, password: str) -> None:
    """The answered questions in Open WebUI."""
    page.goto(url)
    page.fill('input[type="email"]', "admin@localhost")
    page.fill('input[type="password"]', password)
    page.click('button[type="submit"]')
    for asked, question in enumerate(QUESTIONS, 1):
        page.click("#chat-input")
        page.keyboard.type(question)
        page.keyboard.press("Enter")
        page.wait_for_url("**/c/*")
        # The buttons below an answer appear when it is complete.
        page.wait_for_function(f"document.querySelectorAll('.copy-response-button').length == {asked}")
        page.wait_for_timeout(1500)  # the last words fade in
    page.screenshot(path=IMAGES / "chat.png")


def main(name: str) -> None:
    """Write `docs/images/chat.png` and `docs/images/report.png`.

    Raises:
        UserError: nobody serves that run with Open WebUI.
    """
    from playwright.sync_api import sync_playwright

    run = Run(name)
    session = find(run)
    if not session or not session.ui_url:
        raise UserError(f"{run.folder} is not served in a chat window: run 'make serve RECIPE={name}' first")
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        # Chromium's own sandbox does not work as root, as which containers run.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(WAIT_MS)
        page.goto(run.path("report.html").resolve().as_uri())
        page.screenshot(path=IMAGES / "report.png")
        chat(page, session.ui_url, Path(".secrets/openwebui-password").read_text(encoding="utf-8").strip())
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["assistant"])
