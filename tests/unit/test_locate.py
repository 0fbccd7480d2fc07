"""Which model a name means: the folders that tools of training leave, the Hub's cache; and what cannot be one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_fixture import write_gguf

from pipeline import UserError
from train.foreign import asked_in, tokenizer_of
from train.locate import Located, locate

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT and transformers save: `base`, `adapter` and `merged`; and a GGUF."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("made")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    write_gguf(folder / "model.gguf")
    return folder


# Tool -> what it leaves (a place and what is there), what is named, and what is meant.
LAYOUTS: dict[str, tuple[dict[str, str], str, str]] = {
    "TRL": ({"out": "adapter", "out/checkpoint-9": "adapter", "out/checkpoint-10": "adapter"}, "out", "out"),
    "TRL, interrupted": ({"out/checkpoint-9": "adapter", "out/checkpoint-10": "adapter"}, "out", "out/checkpoint-10"),
    "TRL, all weights": ({"out": "merged", "out/checkpoint-10": "merged"}, "out", "out"),
    "LLaMA-Factory": (
        {"saves/llama/lora/one": "adapter", "saves/llama/lora/one/checkpoint-500": "adapter"},
        "saves/llama",
        "saves/llama/lora/one",
    ),
    "Axolotl": (
        {"out/lora": "adapter", "out/lora/checkpoint-7": "adapter", "out/lora/merged": "merged"},
        "out",
        "out/lora",
    ),
    "ms-swift": (
        {"output/m/v0-1/checkpoint-10": "adapter", "output/m/v0-1/checkpoint-10-merged": "merged"},
        "output/m",
        "output/m/v0-1/checkpoint-10",
    ),
    "Unsloth's GGUF": ({"m_gguf/unsloth.Q4_K_M.gguf": "model.gguf"}, "m_gguf", "m_gguf/unsloth.Q4_K_M.gguf"),
    "Unsloth's GGUF beside": ({"m": "merged", "m/unsloth.Q4_K_M.gguf": "model.gguf"}, "m", "m"),
    "beside one another": ({"run/adapter": "adapter", "run/merged": "merged"}, "run", "run/adapter"),
    "with a projector": ({"m/a.gguf": "model.gguf", "m/mmproj-F16.gguf": "model.gguf"}, "m", "m/a.gguf"),
}


def leave(made: Path, places: dict[str, str]) -> None:
    for place, what in places.items():
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        if what.endswith(".gguf"):
            shutil.copy(made / what, place)
        else:
            shutil.copytree(made / what, place, dirs_exist_ok=True)
            Path(place, "training_args.bin").write_bytes(b"not read")


@pytest.mark.parametrize("tool", LAYOUTS)
def test_the_folder_that_a_tool_left_is_read_as_its_person_means_it(made: Path, tool: str) -> None:
    places, named, meant = LAYOUTS[tool]
    leave(made, places)
    found = locate(named)
    assert found.model == Path(meant)
    assert found.base == (made / "base" if places.get(meant) == "adapter" else None)


def test_of_several_models_none_is_chosen(made: Path) -> None:
    leave(made, {"saves/lora/one": "adapter", "saves/lora/two": "adapter"})
    with pytest.raises(UserError) as raised:
        locate("saves")
    assert str(raised.value) == "saves holds several models: name one of saves/lora/one, saves/lora/two"


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def setting(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        loaded = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(loaded | values))

    return change


def damaged(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text("{")

    return change


def naming(base: str | None) -> Callable[[Path], None]:
    return setting("adapter_config.json", base_model_name_or_path=base)


# What is at `given`, what is wrong with it, and how its line begins.
REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "pickled": ("adapter", without("adapter_model.safetensors"), "given has no adapter_model.safetensors: pickled"),
    "no base named": ("adapter", naming(None), "given does not name its base: name"),
    "base gone": ("adapter", naming("/none/x"), "/none/x is to be the base of given, "),
    "no JSON": ("adapter", damaged("adapter_config.json"), "given/adapter_config.json is"),
    "no weights": ("merged", without("model.safetensors"), "given holds no model: it has no adapter_config.json, no"),
    "four bits": ("merged", setting("config.json", quantization_config={}, x=1), ""),
    "a GGUF of text": ("text.gguf", lambda file: None, "given.gguf is not a whole GGUF file (it does not begin with"),
    "a file": ("text.txt", lambda file: None, "given.txt is neither a folder nor a .gguf file: name the folder that"),
    "nothing": ("", lambda file: None, "nonsense is no file, no folder and no Hub id (owner/name): correct the path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_is_one_line_with_its_fix(made: Path, case: str) -> None:
    what, change, line = REFUSED[case]
    given = Path("given" + Path(what).suffix) if what else Path("nonsense")
    if given.suffix:
        given.write_text("some text\n" * 9)
    elif what:
        shutil.copytree(made / what, given)
    change(given)
    if not line:  # an empty object is no quantization
        assert locate(str(given)) == Located(given)
        setting("config.json", quantization_config={"bits": 4})(given)
        line = "given has quantized weights: name the same model without quantization"
    with pytest.raises(UserError) as raised:
        locate(str(given))
    assert str(raised.value).startswith(line)


def test_a_cut_gguf_has_nothing_to_ask(made: Path) -> None:
    content = (made / "model.gguf").read_bytes()
    Path("cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"^cut.gguf has no tokenizer .*: fetch the file again if it is damaged or cut"):
        tokenizer_of(locate("cut.gguf"))


def test_base_says_where_the_base_of_an_adapter_is(made: Path) -> None:
    leave(made, {"lora": "adapter", "moved": "base"})
    naming("../moved")(Path("lora"))
    assert locate("lora").base == Path("lora/../moved")
    naming("gone/away")(Path("lora"))
    assert locate("lora", "moved").base == Path("moved")


ASKING = """
import sys
from train.locate import locate
for name in sys.argv[1:]:
    try:
        print(locate(name))
    except Exception as error:
        print(repr(error))
"""


def test_a_model_of_the_hub_is_read_from_its_cache(made: Path) -> None:
    """In the layout of huggingface_hub's cache; the Hub itself does not answer."""
    commit = "a" * 40
    kept = Path("home/hub/models--owner--tuned")
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text(commit)
    leave(made, {str(kept / "snapshots" / commit): "adapter"})
    environment = os.environ | {"HF_HOME": str(Path("home").absolute()), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", ASKING, "owner/tuned", "owner/other"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    there, never = done.stdout.splitlines()
    assert f"snapshots/{commit}" in there and str(made / "base") in there, done.stderr
    assert "owner/other is no folder here, and the Hugging Face Hub gives no model of that name" in never


def test_prompts_are_texts_or_conversations() -> None:
    given = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    lines = [
        "Who are you?",
        "",
        json.dumps({"messages": given[:1]}),
        json.dumps({"messages": given}),
    ]
    Path("asked").write_text("\n".join(lines))
    answer = {"role": "assistant", "content": ""}
    asked = {"role": "user", "content": "Who are you?"}
    assert [row["messages"] for row in asked_in("asked")] == [[asked, answer], [given[0], answer], [given[0], answer]]


def test_every_bad_line_of_prompts_is_told_with_its_place() -> None:
    Path("asked.jsonl").write_text(
        'fine\n{"messages": \n{"messages": []}\n{"messages": [{"role": "system", "content": "x"}]}\n'
    )
    with pytest.raises(UserError) as raised:
        asked_in("asked.jsonl")
    assert [problem.partition(" (")[0].partition(": give")[0] for problem in raised.value.problems] == [
        "asked.jsonl:2: is no JSON",
        "asked.jsonl:3: has no `messages`",
        "asked.jsonl:4: has no question",
    ]
    for name, text in {"none": None, "empty": "\n \n"}.items():
        if text:
            Path(name).write_text(text)
        with pytest.raises(UserError, match=f"PROMPTS={name} (cannot be read|is empty)"):
            asked_in(name)
