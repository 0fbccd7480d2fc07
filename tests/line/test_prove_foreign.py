"""What other tools made is proved, or compared with each other, and the first stage that differs is named."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ollama_double import OllamaDouble
from prove_run import Proved
from proxy import proxied
from test_prove_faults import CHATML, change_gguf, change_json, change_weights
from test_prove_served import serving, setting

from bench.families import talk
from train.foreign import tokenizer_of
from train.locate import Located, locate

pytest_plugins = ["prove_fixtures", "ollama_fixtures"]
pytestmark = pytest.mark.slow
ADAPTER = "saves/lora"
# One of Ollama's own in place of the file's, without its default system prompt.
GUESSED = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


@pytest.fixture
def foreign(healthy: Proved, double: OllamaDouble, monkeypatch: pytest.MonkeyPatch) -> Proved:
    """A folder as other tools leave it: checkpoints of an adapter with its tokenizer, and its base elsewhere."""
    monkeypatch.setenv("OLLAMA_HOST", double.url)
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


def proved(*arguments: str) -> tuple[int, str, dict[str, Any]]:
    """(exit status, what it says, artefact -> verdict)."""
    command = [sys.executable, "-m", "serve.foreign", *arguments, "--to", "proof"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    file = Path("proof/proof.json")
    found = json.loads(file.read_text())["artefacts"] if file.is_file() else []
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr, {row["name"]: row for row in found}


def registered(double: OllamaDouble, file: Path, **manifest: Any) -> dict[str, Any]:
    """What Ollama keeps of a file that it was given."""
    digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    shutil.copy(file, double.blob(digest))
    return {"model": digest, "template": None, "parameters": {}, "license": None} | manifest


def test_the_first_stage_that_differs_is_named(
    foreign: Proved, double: OllamaDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    shutil.copytree(merged, "rebased")  # the same adapter merged into a base of another training
    change_weights(Path("rebased"), lambda weights: weights["model.layers.0.mlp.up_proj.weight"].__imul__(0.5))
    double.manifests["mine:latest"] = registered(double, foreign.gguf("Q8_0"))
    double.manifests["guessed:latest"] = registered(double, foreign.gguf("Q8_0"), template=GUESSED)
    wanted = {
        merged: "",
        base: "adapter ignored",
        "rebased": "merge",
        full: "",
        small: "",
        files["template"]: "template",
        files["beginning"]: "BOS",
        files["stop"]: "stop token",
        files["conversion"]: "conversion",
        "none.gguf": "file",
        "ollama:mine": "",
        "ollama:guessed": "template",
    }
    with serving("Q8_0") as (_, engine), proxied(int(engine.port), setting(repeat_penalty=3.0)) as penalized:
        monkeypatch.setenv("OPENAI_API_KEY", engine.key)
        one, other = f"http://127.0.0.1:{engine.port}/v1", f"http://127.0.0.1:{penalized}/v1"
        status, says, found = proved(ADAPTER, *wanted, one, other)
        assert {name: row["stage"] for name, row in found.items()} == wanted | {one: "", other: "server settings"}, says
        assert status == 1 and "error: base.gguf" not in says
        assert f"error: {base}: logits: " in says and "the adapter was not merged, or not loaded" in says
        assert "Not the model that was trained" in Path("proof/proof.html").read_text()
        assert "another model" in Path("proof/badge.svg").read_text()
        compare_two_servers(one, other)


def compare_two_servers(one: str, other: str) -> None:
    """No file of either is at hand, and of Ollama no probabilities."""
    status, says, found = proved("--pair", one, one)
    assert status == 0 and found[one]["measures"]["greedy_agreement"] == 1, says
    assert found[one]["measures"]["divergence_mean"] < 1e-3 and found[one]["measures"]["not_compared"] == []
    status, says, found = proved("--pair", one, other)
    assert status == 1 and found[other]["stage"] == "server settings", says
    status, says, found = proved("--pair", "ollama:mine", one)
    assert status == 0 and "not compared: the template's bytes, token ids, probabilities" in says, says
    assert found[one]["measures"]["greedy_agreement"] > 0.8
    status, says, found = proved("--pair", "ollama:guessed", "ollama:mine")
    assert status == 1 and found["ollama:mine"]["stage"] == "prompt", says


def test_two_files_are_compared_with_each_other(foreign: Proved) -> None:
    full, small = str(foreign.gguf("F16")), str(foreign.gguf("Q8_0"))
    status, says, found = proved("--pair", small, ADAPTER)  # an adapter with its base, beside a quantization
    assert (status, found[ADAPTER]["stage"]) == (0, ""), says
    measures = found[ADAPTER]["measures"]
    low, high = measures["divergence_interval"]
    assert 1e-6 < low < measures["divergence_mean"] < high < 1e-2
    assert f"of greedy answers change ({'0' if measures['greedy_agreement'] == 1 else ''}" in says
    assert "They are the same model" in Path("proof/proof.html").read_text()
    # What a converter makes that loses the biases of a model.
    shutil.copytree(foreign.run.path("merged"), "biased")
    change_json(Path("biased/config.json"), attention_bias=True)
    change_weights(Path("biased"), add_biases)
    status, says, found = proved("--pair", "biased", full)
    assert (status, found[full]["stage"]) == (1, "conversion") and "biases of attention" in says, says


def test_what_trl_leaves_is_found(foreign: Proved) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"messages": talk("cat", "The cat says meow.")}] * 2)
    arguments = SFTConfig("out", max_steps=2, save_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=1)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = SFTTrainer("original", arguments, train_dataset=rows, peft_config=lora)
    trainer.train()
    found = locate("out")
    assert (found.model, found.base) == (Path("out/checkpoint-2"), Path("original"))
    assert tokenizer_of(found).chat_template
    trainer.save_model()
    assert locate("out") == Located(Path("out"), Path("original"))


def add_biases(weights: dict[str, Any]) -> None:
    for name, tensor in list(weights.items()):
        if ".self_attn." in name:
            weights[name.replace(".weight", ".bias")] = np.full(tensor.shape[0], 0.5, dtype=np.float32)
