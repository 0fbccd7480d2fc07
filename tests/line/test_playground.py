"""The playground's pure parts: what can be chosen, the tokens it shows, thumbs, the export, its door, bad input."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import read

from pipeline.error import UserError
from pipeline.model import Trained
from pipeline.run import Receipt, Run
from serve.comparing.page import Conversation, Made, Token, _texts, append, as_html
from serve.comparing.pool import Chunk, Sampling, artefacts, together
from serve.playground import TokenAuth

ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)


def finish(run: Run, stage: str, *outputs: str, **metrics: Any) -> None:
    """A receipt as the stage writes it, and its files."""
    for output in outputs:
        run.path(output).parent.mkdir(parents=True, exist_ok=True)
        run.path(output).write_bytes(b"x" * 2_000_000)
    marks = {str(run.path(output)): {"sha256": "", "bytes": 1} for output in outputs}
    run.write_receipt(Receipt(stage, {}, {}, marks, {}, metrics, "2026-01-01T00:00:00", 1, 1))


def answered() -> Conversation:
    """A conversation with one answer and a question that has none yet."""
    talk = Conversation()
    talk.add("user", "Who are you?")
    talk.add("assistant", "A model.", Made("mine/adapter", ASKED, "A model.", {"seed": 7}, "3 tokens"))
    talk.add("user", "And then?")
    return talk


def test_a_training_alone_can_be_asked() -> None:
    run = Run("mine")
    finish(run, "base", "base/config.json")
    finish(run, "train", "trained/adapter_config.json")
    Trained("adapter", "lora", True).write(run.path("trained"))
    assert list(artefacts("mine")) == ["mine/adapter", "mine/base"]
    adapter, base = artefacts("mine").values()
    assert adapter.place == base.place == "runs/mine/base" and adapter.adapter == "runs/mine/trained"


def test_whole_weights_are_a_model_of_their_own() -> None:
    run = Run("mine")
    finish(run, "base", "base/config.json")
    finish(run, "train", "trained/model.safetensors")
    Trained("weights", "full", True).write(run.path("trained"))
    trained, base = artefacts("mine").values()
    assert (trained.name, trained.place, trained.adapter) == ("mine/trained", "runs/mine/trained", "")
    assert (base.name, base.place, base.adapter) == ("mine/base", "runs/mine/base", "")


def test_before_training_there_is_the_base_alone() -> None:
    finish(Run("mine"), "base", "base/config.json")
    assert [(name, choice.adapter) for name, choice in artefacts("mine").items()] == [("mine/base", "")]


def test_every_quantization_that_is_on_the_disk_can_be_chosen() -> None:
    run = Run("mine")
    finish(run, "gguf", "gguf/mine-F16.gguf", "gguf/mine-Q4_K_M.gguf", "gguf/mine-Q8_0.gguf", "gguf/imatrix.gguf")
    run.path("gguf/mine-F16.gguf").unlink()
    found = artefacts("mine")
    assert list(found) == ["mine/Q4_K_M", "mine/Q8_0"]
    assert found["mine/Q8_0"].label("mine") == "Q8_0 · GGUF, 2 MB"


def test_other_recipes_come_after_and_are_named() -> None:
    finish(Run("another"), "merge", "merged/config.json")
    finish(Run("mine"), "merge", "merged/config.json")
    labels = [choice.label("mine") for choice in artefacts("mine").values()]
    assert labels == ["merged · one set of weights", "another: merged · one set of weights"]


def test_a_damaged_run_of_another_recipe_hides_only_itself() -> None:
    finish(Run("mine"), "merge", "merged/config.json")
    finish(Run("another"), "merge", "merged/config.json")
    Run("another").receipt_path("merge").write_text("{")
    assert list(artefacts("mine")) == ["mine/merged"]
    with pytest.raises(UserError, match="damaged"):
        artefacts("another")


def test_a_server_that_is_gone_cannot_be_chosen() -> None:
    finish(Run("mine"), "serve", url="http://127.0.0.1:9/v1", model="mine", type="Q8_0", port=9)
    Path(".secrets").mkdir()
    Path(".secrets/api-key").write_text("a-key")
    assert artefacts("mine") == {}


def test_a_key_is_in_no_text_of_a_choice() -> None:
    from serve.comparing.pool import Artefact

    assert "sesame" not in repr(Artefact("a", "b", "endpoint", "http://x/v1", "m", key="sesame"))


def test_the_export_is_what_make_train_reads(tmp_path: Path) -> None:
    path = tmp_path / "conversation.jsonl"
    path.write_text(answered().as_data(), encoding="utf-8")
    assert [row.value for row in read(path)] == [{"messages": [*ASKED, {"role": "assistant", "content": "A model."}]}]


def test_a_corrected_answer_is_exported_as_corrected() -> None:
    talk = answered()
    talk.correct(1, "The assistant.")
    assert json.loads(talk.as_data())["messages"][-1] == {"role": "assistant", "content": "The assistant."}


def test_a_conversation_without_an_answer_exports_nothing() -> None:
    talk = Conversation()
    talk.add("user", "Hello?")
    assert talk.as_data() == ""


def test_a_thumb_keeps_what_made_the_answer() -> None:
    talk = answered()
    talk.correct(1, "The assistant.")
    line = talk.rated(1, "down")
    assert (line["rating"], line["artefact"], line["messages"]) == ("down", "mine/adapter", ASKED)
    assert (line["answer"], line["correction"], line["settings"]) == ("A model.", "The assistant.", {"seed": 7})


@pytest.mark.parametrize("index", [0, 2, 99])
def test_only_an_answer_can_be_rated(index: int) -> None:
    with pytest.raises(UserError, match="no answer of a model"):
        answered().rated(index, "up")


def test_feedback_of_many_writers_stays_whole(tmp_path: Path) -> None:
    path, text = tmp_path / "feedback.jsonl", "é" * 5000
    writers = [threading.Thread(target=append, args=(path, {"n": n, "text": text})) for n in range(16)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(json.loads(line)["n"] for line in path.read_text().splitlines()) == list(range(16))


def test_feedback_after_a_line_that_a_kill_cut_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_text('{"n": 1}\n{"n": 2, "te')
    append(path, {"n": 3})
    assert json.loads(path.read_text().splitlines()[-1]) == {"n": 3}
    assert path.read_text().startswith('{"n": 1}\n')


def test_tokens_show_bounds_ids_and_which_are_special() -> None:
    shown = as_html([Token(1, "<|im_start|>", True), Token(9, "a <b>", False), Token(10, "\n", False)])
    titles = re.findall(r'class="token (\w+)" title="(\d+)"', shown)
    assert titles == [("special", "1"), ("shade1", "9"), ("shade0", "10")]
    assert "&lt;|im_start|&gt;" in shown and "a &lt;b&gt;" in shown and "↵" in shown and "[1, 9, 10]" in shown
    assert "<b>" not in shown


def test_a_character_of_several_tokens_is_shown_by_the_one_that_ends_it() -> None:
    first, second = "😀".encode()[:3], "😀".encode()[3:]
    pieces = [{"id": 1, "piece": list(first)}, {"id": 2, "piece": list(second)}, {"id": 3, "piece": "!"}]
    assert _texts(pieces) == [(1, ""), (2, "😀"), (3, "!")]


def test_an_endpoint_that_hides_its_prompt_is_said_to() -> None:
    assert "does not show its prompt" in as_html([])


@pytest.mark.parametrize(
    "given",
    [(3, 1, 0, 1, 0), (1, 0, 0, 1, 0), (1, 1, -1, 1, 0), (1, 1, 0, 0, 0), (1, 1, 0, 1, -1), (1, 1, 0, 1, None),
     ("hot", 1, 0, 1, 0), (float("nan"), 1, 0, 1, 0)],
)  # fmt: skip
def test_numbers_out_of_bounds_are_refused_in_one_sentence(given: tuple[Any, ...]) -> None:
    from serve.comparing.page import _sampling

    with pytest.raises(UserError, match="give a number from"):
        _sampling(*given)


def test_only_our_engines_are_told_what_openai_does_not_know() -> None:
    sampling = Sampling(0.5, 0.9, 0, 10, 1)
    assert sampling.arguments(is_ours=True)["extra_body"] == {"top_k": 0, "min_p": 0.0}
    assert sampling.arguments(is_ours=False)["extra_body"] == {}


@pytest.mark.parametrize("at_once", [True, False])
def test_both_answers_arrive_whole_and_a_failure_is_one_panes_own(at_once: bool) -> None:
    def fails() -> Any:
        yield Chunk("a", "answering")
        raise UserError("it broke")

    fine = iter([Chunk("b", "answering"), Chunk("bc", "", "2 tokens")])
    said = list(together([fails(), fine], at_once))
    assert [part for number, part in said if number == 1] == [Chunk("b", "answering"), Chunk("bc", "", "2 tokens")]
    assert [str(part) for number, part in said if number == 0][-1] == "it broke"
    assert at_once or [number for number, _ in said] == [0, 0, 1, 1]


@pytest.fixture
def door() -> Any:
    """A client in front of a page that says `inside`."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    inside = Starlette(routes=[Route("/{path:path}", lambda _: PlainTextResponse("inside"))])
    return TestClient(TokenAuth(inside, "sesame", 7860), base_url="http://127.0.0.1:7860", follow_redirects=False)


@pytest.mark.parametrize("path", ["/", "/gradio_api/info", "/config", "/?token=", "/?token=wrong", "/?token=%ff"])
def test_without_the_token_nothing_is_inside(door: Any, path: str) -> None:
    assert door.get(path).status_code == 401
    assert "inside" not in door.get(path).text


def test_the_token_opens_the_door_for_this_browser(door: Any) -> None:
    opened = door.get("/?token=sesame")
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    page = door.get("/anything")
    assert page.text == "inside" and "default-src 'self'" in page.headers["content-security-policy"]


def test_health_needs_no_token_and_tells_nothing(door: Any) -> None:
    assert door.get("/health").json() == {"status": "ok"}
