"""The base: what is refused before it is loaded, and one plain folder from whatever the recipe names."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from conftest import MODEL_FILES
from gguf_fixture import write_gguf

from pipeline import Recipe, Run, UserError
from pipeline.recipe import Data, Serve, Train
from train.base import base, origin, parameters, safetensors_header
from train.config import packaged_gguf


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(base_folder: Path) -> Path:
    """A user's model folder; its files are links, to be replaced and never changed."""
    folder = Path("model")
    folder.mkdir()
    for file in base_folder.iterdir():
        os.link(file, folder / file.name)
    return folder


def made(name: str | Path):
    knobs = {"train": Train(max_length=16), "serve": Serve(context=64)}
    return base(Recipe("mine", base_model=str(name), data=Data(("talks.jsonl",)), **knobs), Run("mine"))


def refused(name: str | Path) -> str:
    """What is said of a base that is refused; nothing is put in place."""
    with pytest.raises(UserError) as raised:
        made(name)
    assert not Path("runs/mine/base").exists()
    [said] = str(raised.value).splitlines()
    return said


def test_the_random_base_has_these_files(base_folder: Path) -> None:
    assert {path.name for path in base_folder.iterdir()} == MODEL_FILES


def test_the_random_base_takes_k_quants(base_folder: Path) -> None:
    header = safetensors_header(base_folder / "model.safetensors")
    matrices = [entry["shape"] for entry in header.values() if len(entry.get("shape", ())) == 2]
    assert matrices and all(shape[-1] % 256 == 0 for shape in matrices)


def test_a_folder_becomes_a_base_with_these_files(model: Path) -> None:
    (model / "notes.md").write_text("not needed")
    (model / "pytorch_model.bin").write_bytes(b"\x80")  # beside safetensors a pickle is left where it is
    made(model)
    assert {path.name for path in Path("runs/mine/base").iterdir()} == MODEL_FILES


def test_what_a_folder_states_of_its_licence_stays_with_it(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n# Model\n")
    (model / "LICENSE").write_text("Permission is hereby granted")
    found = made(model)
    assert {path.name for path in Path("runs/mine/base").iterdir()} == MODEL_FILES | {"README.md", "LICENSE"}
    assert (found.metrics["license"], found.metrics["languages"]) == ("mit", ["en", "de"])


@pytest.mark.parametrize(
    "text", ["", "# Model", "---\n- a list\n---\n", "---\nlicense: [\n---\n", "---\nno: licence\n---\n", "\xff\xfe"]
)
def test_a_card_that_states_nothing_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert origin(tmp_path) == {}


def test_one_language_is_a_list_too(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlanguage: zh\n---\n")
    assert origin(tmp_path) == {"languages": ["zh"]}


def test_the_packaged_base_states_its_licence() -> None:
    assert origin(packaged_gguf()) == {"license": "apache-2.0", "languages": ["en"]}


def test_the_weights_of_a_folder_are_linked_not_copied(model: Path) -> None:
    made(model)
    assert Path("runs/mine/base/model.safetensors").samefile(model / "model.safetensors")


def test_the_settings_of_a_folder_are_copied_not_linked(model: Path) -> None:
    before = (model / "config.json").read_bytes()
    made(model)
    assert not Path("runs/mine/base/config.json").samefile(model / "config.json")
    assert (model / "config.json").read_bytes() == before


def test_every_file_of_a_folder_that_is_used_is_an_input(model: Path) -> None:
    assert set(made(model).inputs) == {f"model/{name}" for name in MODEL_FILES}


def test_the_parameters_are_counted(model: Path) -> None:
    import torch
    from safetensors.torch import save_file

    Path("weights").mkdir()
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7), "c": torch.zeros(())}, "weights/1.safetensors")
    save_file({"d": torch.zeros(2, 2)}, "weights/2.safetensors")
    assert parameters(Path("weights")) == 15 + 7 + 1 + 4


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_by_name(name: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    assert refused(model) == (
        f"model/{name} is a pickle, which can run code when loaded: use a base with *.safetensors"
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_of_the_model_s_own_is_refused_by_name(
    name: str, model: Path, replace: Callable[[Path, bytes], None]
) -> None:
    (model / name).touch()
    replace(model / name, b'{"auto_map": {"AutoModel": "modeling_evil.Model"}}')
    assert refused(model) == (
        f"model/{name} asks to run the model's own code (auto_map), which is never done: use a base without it"
    )


def test_settings_that_are_no_json_are_refused_by_name(model: Path, replace: Callable[[Path, bytes], None]) -> None:
    replace(model / "config.json", b"{")
    assert refused(model).startswith("model/config.json is not JSON (")


@pytest.mark.parametrize("kept", [-1, -1_000_000, 1000, 8, 3, 0])
def test_truncated_safetensors_are_refused_by_name(
    kept: int, model: Path, replace: Callable[[Path, bytes], None]
) -> None:
    weights = model / "model.safetensors"
    replace(weights, weights.read_bytes()[:kept])
    said = refused(model)
    assert said.startswith("model/model.safetensors ")
    assert said.endswith("fetch it again")


def test_safetensors_that_are_too_long_are_refused(model: Path, replace: Callable[[Path, bytes], None]) -> None:
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    replace(weights, weights.read_bytes() + b"x")
    assert refused(model).startswith(f"model/model.safetensors has {size + 1} bytes, its header says {size}")


def test_garbage_as_safetensors_is_refused(model: Path, replace: Callable[[Path, bytes], None]) -> None:
    replace(model / "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is not a whole safetensors file" in refused(model)


def test_a_missing_part_of_the_weights_is_refused_by_name(model: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    said = "model/model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names: fetch it again"
    assert refused(model) == said


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(missing: str, model: Path) -> None:
    (model / missing).unlink()
    assert refused(model) == "model holds no model: it needs config.json and *.safetensors (adapters are no base)"


def test_an_empty_folder_is_refused() -> None:
    Path("empty").mkdir()
    assert refused("empty").startswith("empty holds no model")


UNKNOWN = {
    "smollm2-135": "base_model: unknown model 'smollm2-135': did you mean 'smollm2-135m'? Or give 'smollm2-135m', "
    "a Hub id ",
    "randm": "base_model: unknown model 'randm': did you mean 'random'? Or give 'smollm2-135m', a Hub id ",
    "zebra": "base_model: unknown model 'zebra': give 'smollm2-135m', a Hub id ",
    "./no/such": "base_model: unknown model './no/such': give 'smollm2-135m', a Hub id ",
    "/no/such.gguf": "base_model: unknown model '/no/such.gguf': give 'smollm2-135m', a Hub id ",
    "no-such.gguf": "base_model: unknown model 'no-such.gguf': give 'smollm2-135m', a Hub id ",
    "a/b/c": "base_model: unknown model 'a/b/c': give 'smollm2-135m', a Hub id ",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_is_told(name: str) -> None:
    assert refused(name) == UNKNOWN[name] + "(owner/name), a folder or a .gguf file"


@pytest.mark.parametrize("name", ["nobody/no-such-model", "nobody/no-such-model@v1"])
def test_a_hub_id_out_of_reach_is_one_line(name: str) -> None:
    said = refused(name)
    assert said.startswith(f"base {name!r} cannot be fetched from the Hugging Face Hub (")
    assert said.endswith(
        "): check the name and the network, for gated models set HF_TOKEN, or use base_model: smollm2-135m"
    )


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.1, 0.001])
def test_a_truncated_gguf_is_refused_by_name(kept: float) -> None:
    write_gguf(Path("cut.gguf"))
    whole = Path("cut.gguf").read_bytes()
    Path("cut.gguf").write_bytes(whole[: int(len(whole) * kept)])
    said = refused("cut.gguf")
    assert said.startswith("cut.gguf is not a whole GGUF ")
    assert said.endswith((": fetch it again", ": fetch it or make it again"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 999, b"not a model" * 99])
def test_garbage_as_gguf_is_refused_by_name(content: bytes) -> None:
    Path("garbage.gguf").write_bytes(content)
    assert refused("garbage.gguf").startswith("garbage.gguf is not a whole GGUF file (")


def test_a_base_that_fails_keeps_the_one_in_place(model: Path, replace: Callable[[Path, bytes], None]) -> None:
    made(model)
    before = sorted(Path("runs/mine/base").iterdir())
    replace(model / "model.safetensors", b"")
    with pytest.raises(UserError):
        made(model)
    assert sorted(Path("runs/mine/base").iterdir()) == before


@pytest.mark.slow
def test_a_gguf_becomes_a_base_with_the_same_weights() -> None:
    """The packaged one, whose Q8_0 weights must come out as float32 that no loader takes for quantized."""
    import torch
    from safetensors import safe_open

    result = made("smollm2-135m")
    assert {path.name for path in Path("runs/mine/base").iterdir()} == MODEL_FILES
    assert {"parameters": 134_515_008, "end_of_turn": "<|im_end|>"}.items() <= result.metrics.items()
    assert "quantization_config" not in json.loads(Path("runs/mine/base/config.json").read_text())

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(packaged_gguf()).tensors}
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
    }
    with safe_open("runs/mine/base/model.safetensors", "pt") as weights:
        for ours, theirs in pairs.items():
            wanted = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            assert weights.get_tensor(ours).dtype == torch.float32
            assert torch.equal(weights.get_tensor(ours), torch.from_numpy(wanted))
