"""The trial of llama.cpp's converter before training, and a run of which no GGUF is made."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convert.gguf import trial
from pipeline import Recipe, UserError
from pipeline.recipe import Gguf, Serve
from serve.api import refuse_unknown_positions
from serve.running.backend import chosen, refuse_without_gguf


def change(file: Path, **keys: Any) -> None:
    """Other keys in a JSON file, which may be a link."""
    written = json.loads(file.read_text()) | keys
    file.unlink()
    file.write_text(json.dumps(written))


@pytest.mark.slow
def test_a_base_that_llama_cpp_takes_passes_and_leaves_nothing(based: Any) -> None:
    before = based.files("")
    trial(based.recipe, based.run)
    assert based.files("") == before


def test_what_its_converter_refuses_is_one_line_before_training(based: Any) -> None:
    change(based.run.path("base", "config.json"), architectures=["OPTForCausalLM"])
    with pytest.raises(UserError) as raised:
        trial(based.recipe, based.run)
    [said] = raised.value.problems
    assert said == (
        "llama.cpp cannot convert runs/line/base (ERROR:hf-to-gguf:Model OPTForCausalLM is not supported): use another "
        "base, or set gguf.types=[]"
    )
    trial(replace(based.recipe, gguf=Gguf(types=())), based.run)  # which asks nothing of llama.cpp


@pytest.mark.slow
def test_a_context_beyond_what_llama_cpp_knows_is_told(based: Any) -> None:
    long = replace(based.recipe, serve=Serve(context=4096))
    with pytest.raises(UserError, match=r"^serve\.context: 4096 is more than the 2048 tokens that llama\.cpp knows"):
        trial(long, based.run)
    trial(replace(long, serve=Serve(context=4096, engine="vllm")), based.run)
    with pytest.raises(
        UserError, match=r"^serve\.context: 4096 is more than the 2048 tokens that base 'random' knows: set"
    ):
        refuse_unknown_positions(long, based.run)
    refuse_unknown_positions(replace(long, base_model="another"), based.run)  # which is judged when it is made


def test_without_a_gguf_only_vllm_serves(based: Any) -> None:
    none = replace(based.recipe, gguf=Gguf(types=()))
    assert (none.gguf.written, none.served_type) == ((), "")
    with pytest.raises(
        UserError, match=r"^gguf\.types is empty, so llamacpp has no GGUF to load: name a type, as SET='"
    ):
        chosen(none, based.run)
    with pytest.raises(UserError, match=r"^gguf\.types is empty, so Ollama has no GGUF to load"):
        refuse_without_gguf(none, "Ollama")
    served = replace(none, serve=Serve(engine="vllm"))
    assert chosen(served, based.run) == served


@pytest.mark.slow
def test_a_run_without_a_gguf_is_merged_and_compared(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("line.yaml").read_text()
    Path("line.yaml").write_text(text.replace("types: [Q8_0, F16, Q4_K_M, Q8_0]", "types: []"))
    assert trained.recipe.gguf == Gguf(types=())
    trained.make("reference", "merge", "gguf", "compare")
    assert not trained.run.path("gguf").exists()
    assert trained.receipt("compare")["metrics"]["passed"] == {"merge": True}
    assert trained.receipt("compare")["metrics"]["recommended"] is None


def test_a_recipe_without_a_gguf_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import load

    monkeypatch.chdir(tmp_path)
    Path("talks.jsonl").touch()
    Path("mine.yaml").write_text("data: {train: talks.jsonl}\ngguf: {types: []}\n")
    recipe: Recipe = load("mine.yaml")
    assert recipe.gguf.types == ()
