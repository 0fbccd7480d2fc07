"""What cannot be compared by the proof of others' models is one line with its fix; what can is named by its stage."""

import argparse
import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import UserError
from pipeline.proof import Comparison
from serve.asking.reached import reach
from serve.foreign import foreign, parsed, stage_of

REPOSITORY = Path(__file__).parents[2]
ALIVE = "http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of two models: under /locked it wants another key, under /page it is no API."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = 401 if "locked" in self.path else 200 if self.path.endswith("/v1/models") else 404
            body = "<html>It works!" if "page" in self.path else json.dumps({"data": [{"id": "a"}, {"id": "b"}]})
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET  # which is no answer, so that nothing is told of it

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


# Arguments -> how the line begins, and what it tells to do.
REFUSED: dict[str, tuple[str, str]] = {
    "": ("nothing to compare: ", "name both, as in make prove REFERENCE="),
    "lora": ("nothing to compare lora with: ", "A=one.gguf B=other.gguf"),
    "--pair one.gguf": ("nothing to compare one.gguf with: ", "A=one.gguf B=other.gguf"),
    "nonsense x.gguf": ("nonsense is no file, no folder and no Hub id", "correct the path"),
    "text.gguf x.gguf": ("text.gguf is not a whole GGUF file", "fetch it or make it again"),
    "lora x.gguf --prompts none": ("PROMPTS=none cannot be read", "give a text file with a prompt a line"),
    "lora http://127.0.0.1:9": ("http://127.0.0.1:9: no API of OpenAI's answers there", "start it, or correct the"),
    f"lora {ALIVE}/page/v1": (f"{ALIVE}/page/v1: no API of OpenAI's answers there", "correct the address"),
    f"lora {ALIVE}/locked": (f"{ALIVE}/locked refuses the key, or wants one", "set OPENAI_API_KEY to its key"),
    f"lora {ALIVE}/v1": (f"{ALIVE}/v1 serves a, b", f"name one, as {ALIVE}/v1#a"),
    f"lora {ALIVE}/v1#c": (f"{ALIVE}/v1#c has no model 'c': it lists a, b", "give the address"),
    "lora ollama:mine": ("no Ollama answers at http://127.0.0.1:9", "start it with 'ollama serve', or set OLLAMA_HOST"),
    f"{ALIVE}/v1#a x.gguf": (f"{ALIVE}/v1#a shows too little to be the reference of files", "as A=... B=..."),
    "--unknown": ("unrecognized arguments: --unknown", "usage: python -m serve.foreign"),
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_be_compared_is_one_line_with_its_fix(
    given: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Path("text.gguf").write_text("no model\n" * 9)
    begins, fix = (text.format(port=port) for text in REFUSED[given])
    monkeypatch.setattr("sys.argv", ["foreign", *given.format(port=port).split()])
    with pytest.raises((UserError, SystemExit)) as raised:
        foreign(parsed())
    said = f"error: {raised.value}\n" if isinstance(raised.value, UserError) else capfd.readouterr().err
    assert said.startswith(f"error: {begins}") and fix in said and said.count("\n") == 1
    assert not list(Path().glob("proof-*"))


def test_all_servers_that_do_not_answer_are_told_at_once() -> None:
    given = argparse.Namespace(reference="lora", artefacts=["http://127.0.0.1:9", "http://127.0.0.1:8"], pair=False)
    with pytest.raises(UserError) as raised:
        foreign(given)
    assert len(raised.value.problems) == 2


def test_a_server_of_several_models_is_asked_for_the_one_that_is_named(port: int) -> None:
    found = reach(f"http://127.0.0.1:{port}/v1#b")
    assert (found.kind, found.model, found.tells) == ("openai", "b", False)


@pytest.mark.parametrize(
    ("given", "does"),
    [
        (["REFERENCE=saves/lora", "ARTEFACT=a.gguf b.gguf"], '-- "${REFERENCE-}" ${ARTEFACT-}'),
        (["ARTEFACT=a.gguf"], '-- "${REFERENCE-}" ${ARTEFACT-}'),
        (
            ["A=a.gguf", "B=b.gguf"],
            '--pair ${BASE:+--base "$BASE"} ${PROMPTS:+--prompts "$PROMPTS"} -- "${A-}" "${B-}"',
        ),
        (["A=a.gguf"], '-- "${A-}" "${B-}"'),
    ],
)
def test_make_prove_compares_what_is_given(given: list[str], does: str) -> None:
    done = subprocess.run(["make", "--dry-run", "prove", *given], cwd=REPOSITORY, capture_output=True, text=True)
    [line] = [line for line in done.stdout.splitlines() if "serve." in line]
    assert line.startswith(".venv/bin/python -m serve.foreign ") and line.endswith(does)


# What a comparison found first -> the stage that it shows.
STAGES = {
    "token ids: probe 'plain', position 0: '<s>' (1) is added before all that it was trained with": "BOS",
    "token ids: probe 'plain', position 0: 'x' (5), trained with '<s>' (1)": "BOS",
    "token ids: probe 'plain', position 3: 'x' (5), trained with 'y' (1)": "token ids",
    "token ids: probe 'plain' has 15 when chatting, trained with 14: something": "BOS",
    "token ids: probe 'plain' has 35 when chatting, trained with 14: something": "token ids",
    "stop token: the trained model ends its turn with [2], this one stops at [0]": "stop token",
    "another file: base is served under this name": "adapter ignored",
    "answers: 9 of 15 are others": "server",
}


@pytest.mark.parametrize("problem", STAGES)
def test_the_stage_is_that_of_what_differs_first(problem: str) -> None:
    assert stage_of(Comparison("ollama:mine"), problem, has_base=True) == STAGES[problem]


def test_a_number_of_tokens_alone_says_that_the_prompt_is_another() -> None:
    problem = "token ids: probe 'plain' has 15 when chatting, trained with 14: something is added on the way"
    for name, unseen in (("ollama:mine", ["the template's bytes"]), ("http://x/v1", [])):
        assert stage_of(Comparison(name, {"not_compared": unseen}), problem, has_base=True) == "prompt"
