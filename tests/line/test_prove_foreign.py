"""What other tools made is proved from its adapter, and the first stage that differs is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prove_run import REPOSITORY, Proved
from proxy import proxied
from test_prove_faults import CHATML, change_gguf
from test_prove_served import serving, setting

pytest_plugins = ["prove_fixtures"]
pytestmark = pytest.mark.slow
ADAPTER = "saves/lora"


@pytest.fixture
def foreign(healthy: Proved) -> Proved:
    """A folder as other tools leave it: checkpoints of an adapter with its tokenizer, and its base elsewhere."""
    run = healthy.run
    for step in (9, 10):
        shutil.copytree(run.path("trained"), Path(ADAPTER, f"checkpoint-{step}"))
    last = Path(ADAPTER, "checkpoint-10")
    (last / "kind.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(run.path("base", name), last)
    shutil.copytree(run.path("base"), "original")
    settings = json.loads((last / "adapter_config.json").read_text())
    (last / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "original"}))
    return healthy


def proved(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """(exit status, what it says, artefact -> verdict)."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    command = [sys.executable, "-m", "serve.foreign", ADAPTER, *arguments, "--to", "proof"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    file = Path("proof/proof.json")
    found = json.loads(file.read_text())["artefacts"] if file.is_file() else []
    return done.returncode, done.stdout + done.stderr, {row["name"]: row for row in found}


def test_the_first_stage_that_differs_is_named(foreign: Proved, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: f"{name}.gguf" for name in ("template", "beginning", "stop", "conversion")}
    for file in files.values():
        shutil.copy(foreign.gguf("F16"), file)
    change_gguf(Path(files["template"]), tokenizer__chat_template=CHATML)
    change_gguf(Path(files["beginning"]), tokenizer__ggml__add_bos_token=True, tokenizer__ggml__bos_token_id=0)
    change_gguf(Path(files["stop"]), tokenizer__ggml__eos_token_id=0)
    change_gguf(Path(files["conversion"]), llama__rope__freq_base=100.0)
    merged, base, full, small = (
        str(foreign.run.path(name)) for name in ("merged", "base", "gguf/healthy-F16.gguf", "gguf/healthy-Q8_0.gguf")
    )
    wanted = {
        merged: "",
        base: "adapter ignored",
        full: "",
        small: "",
        files["template"]: "template",
        files["beginning"]: "BOS",
        files["stop"]: "stop token",
        files["conversion"]: "conversion",
        "none.gguf": "file",
    }
    with serving("Q8_0") as (_, engine):
        monkeypatch.setenv("OPENAI_API_KEY", engine.key)

        def without_probabilities(asked: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in asked.items() if "logprobs" not in key}

        with (
            proxied(int(engine.port), setting()) as plain,
            proxied(int(engine.port), setting(repeat_penalty=3.0)) as penalized,
            proxied(int(engine.port), without_probabilities) as silent,
        ):
            wanted |= {f"http://127.0.0.1:{engine.port}/v1": "", f"http://127.0.0.1:{plain}/v1": ""}
            wanted |= {f"http://127.0.0.1:{penalized}/v1": "server settings", f"http://127.0.0.1:{silent}/v1": ""}
            status, says, found = proved(monkeypatch, *wanted)
    assert {name: row["stage"] for name, row in found.items()} == wanted, says
    assert status == 1 and "error: base.gguf" not in says
    assert f"error: {base}: logits: " in says and "the adapter was not merged, or not loaded" in says
    assert "Not the model that was trained" in Path("proof/proof.html").read_text()
    assert "another model" in Path("proof/badge.svg").read_text()


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda last: (last / "adapter_model.safetensors").unlink(), "pickled adapters are not read"),
        (lambda last: shutil.rmtree("original"), "name the adapter's base with BASE=..."),
    ],
)
def test_what_cannot_be_a_reference_is_one_line(
    foreign: Proved, change: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(Path(ADAPTER, "checkpoint-10"))
    status, said, found = proved(monkeypatch, "none.gguf")
    assert (status, found) == (1, {}) and says in said and "Traceback" not in said
