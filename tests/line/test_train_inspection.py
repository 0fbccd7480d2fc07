"""The inspection of a base: what training, conversion or serving would stumble over is one line before any begins."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import Recipe, Run, UserError
from pipeline.recipe import Data, Gguf, Lora, Serve, Train
from train.base import base, safetensors_header, weight_files, write_positions
from train.inspection import positions, quantization, refuse, refuse_long_questions, refuse_weights
from train.tokenizer import prepare_tokenizer

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def config(family: str = "Llama", **keys: Any) -> Any:
    import transformers

    sizes = SMALL if family == "Llama" else {"num_hidden_layers": 2, "vocab_size": 99}
    return getattr(transformers, f"{family}Config")(**(sizes | keys))


def recipe(
    *targets: str, max_tokens: int = 16, context: int = 64, types: tuple[str, ...] = ("Q8_0",), tuner: str = "lora"
) -> Recipe:
    return Recipe(
        "mine",
        base_model="mine/base",
        data=Data(("talks.jsonl",)),
        train=Train(tuner=tuner, max_length=max_tokens, lora=Lora(targets=targets or ("all-linear",))),
        gguf=Gguf(types=types),
        serve=Serve(context=context),
    )


def problems(of: Recipe, config: Any, folder: Path | None = None) -> list[str]:
    try:
        refuse(of, config, folder)
    except UserError as error:
        return list(error.problems)
    return []


QUANTIZED = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
    "a quantizer": {"quantization": {"group_size": 64, "bits": 4}},  # MLX's
}


@pytest.mark.parametrize("how", QUANTIZED)
def test_quantized_weights_are_refused_by_the_config_alone(how: str) -> None:
    [said] = problems(recipe(), config(**QUANTIZED[how]))
    assert said == (
        f"base 'mine/base': its weights are quantized ({how}), which training and merging would round once more: use "
        "the unquantized base from which they were made"
    )


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "unsloth/Llama-3.2-1B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("casperhansen/mistral-7b-awq", "casperhansen/mistral-7b"),
        ("mlx-community/Qwen3-4B-4bit", "mlx-community/Qwen3-4B"),
        ("neuralmagic/Meta-Llama-3-8B-quantized.w8a8", "neuralmagic/Meta-Llama-3-8B"),
    ],
)
def test_the_unquantized_base_is_named_by_the_quantized_one_s_name(name: str, plain: str) -> None:
    assert quantization(name, config(**QUANTIZED["gptq"])).endswith(f"were made, perhaps {plain}")


def test_the_unquantized_base_is_named_by_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: meta/Plain-1B\nlicense: mit\n---\n")
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    [said] = problems(recipe(), config(), tmp_path)
    assert "(gptq)" in said and said.endswith("use meta/Plain-1B, from which they were made")


ROPES = {
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}, 1024),
    "linear": ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 512),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 256),  # llama.cpp has none
    "default": ({"rope_type": "default", "rope_theta": 1e4}, 256),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
        | {"original_max_position_embeddings": 128},
        256,
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_positions_count_the_scaling_of_the_rope(kind: str) -> None:
    rope, known = ROPES[kind]
    assert positions(config(max_position_embeddings=256, rope_parameters=rope)) == known


def test_positions_are_found_by_every_name_and_may_be_without_limit() -> None:
    assert positions(config("GPT2", n_positions=128)) == 128
    assert positions(config("Mamba")) is None and positions(config("Bloom")) is None


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_the_positions_are_written_where_every_engine_looks(kind: str, tmp_path: Path) -> None:
    """And the model is the same: its logits do not move."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rope, known = ROPES[kind]
    config(max_position_embeddings=256, rope_parameters=rope).save_pretrained(tmp_path)
    ids, logits = torch.arange(90)[None], []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.inference_mode():
            logits.append(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()(ids).logits)
        assert write_positions(tmp_path) == known
        assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == known
    assert torch.equal(*logits)


def test_lengths_beyond_the_positions_are_told_together() -> None:
    assert problems(recipe(max_tokens=256, context=512), config("GPT2", n_positions=128)) == [
        "train.max_length: 256 is more than the 128 tokens that base 'mine/base' knows: set train.max_length=128",
        "serve.context: 512 is more than the 128 tokens that base 'mine/base' knows: set serve.context=128",
    ]


def test_what_llama_cpp_cannot_convert_trains_without_gguf_only() -> None:
    [said] = problems(recipe(), config("OPT"))
    assert said == (
        "base 'mine/base' is a OPTForCausalLM, which llama.cpp cannot convert: use another base, or train it for vLLM "
        "alone with gguf.types=[]"
    )
    assert problems(recipe(types=()), config("OPT")) == []


@pytest.mark.parametrize("room", [4, 4000])
def test_held_out_questions_leave_room_for_their_answers(room: int, trained: Any) -> None:
    from dataclasses import replace

    of = replace(trained.recipe, train=replace(trained.recipe.train, max_new_tokens=room))
    if room == 4:
        refuse_long_questions(of, trained.run)
        return
    with pytest.raises(
        UserError, match=r"^data\.heldout: question \d+ has \d+ tokens, with an answer of train\.max_new_"
    ):
        refuse_long_questions(of, trained.run)


def test_positions_of_gpt_2_have_llama_cpp_s_name_too(tmp_path: Path) -> None:
    config("GPT2", n_positions=128).save_pretrained(tmp_path)
    assert write_positions(tmp_path) == 128
    assert json.loads((tmp_path / "config.json").read_text())["n_ctx"] == 128


@pytest.mark.parametrize(("new", "written"), [(False, 1), (True, 2)])
def test_falcon_s_one_head_of_keys_is_written_for_llama_cpp(new: bool, written: int, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 2, "num_kv_heads": 2, "multi_query": True, "new_decoder_architecture": new}
    config("Falcon", **heads).save_pretrained(tmp_path)
    write_positions(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_kv_heads"] == written


TARGETS: dict[str, tuple[tuple[str, ...], dict[str, Any], list[str]]] = {
    "all": (("all-linear",), {}, []),
    "some": (("q_proj", "v_proj"), {}, []),
    "a whole path": (("model.layers.0.mlp.up_proj",), {}, []),
    "an untied head": (("lm_head",), {}, []),
    "another family's": (("c_attn",), {}, ["'c_attn' is no layer"]),
    "a norm": (("norm",), {}, ["'norm' is a LlamaRMSNorm, which takes no adapter"]),
    "a block": (("mlp",), {}, ["'mlp' is a LlamaMLP, which takes no adapter"]),
    "all among others": (("q_proj", "all-linear"), {}, ["'all-linear' is no layer"]),
    "a tied head": (
        ("q_proj", "lm_head"),
        {"tie_word_embeddings": True},
        ["'lm_head' is tied, embedding and head in one: an adapter on one of them would change both"],
    ),
    "two": (("c_attn", "norm"), {}, ["'c_attn' is no layer", "'norm' is a LlamaRMSNorm, which takes no adapter"]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_impossible_targets_are_told_with_the_base_s_own_layers(case: str) -> None:
    targets, keys, wanted = TARGETS[case]
    said = problems(recipe(*targets), config(**keys))
    assert [line.partition(": this base has ")[0] for line in said] == [f"train.lora.targets: {why}" for why in wanted]
    assert all(LINEAR.split(", ")[0] in line and "q_proj" in line for line in said)


def test_impossible_targets_are_told_under_a_tuner_without_an_adapter() -> None:
    """The plan shows LoRA beside it."""
    [told] = problems(recipe("wrong_proj", tuner="full"), config())
    assert told.startswith("train.lora.targets: 'wrong_proj' is no layer")


@pytest.mark.parametrize(("family", "transposed"), [("GPT2", True), ("Llama", False)])
def test_layers_that_are_transposed_are_told_to_peft(
    family: str, transposed: bool, recwarn: pytest.WarningsRecorder
) -> None:
    from pipeline.model import on_meta
    from train.tuners import wrap

    keys = {"n_layer": 1, "n_embd": 32, "n_head": 2} if transposed else {"num_hidden_layers": 1}
    adapted = wrap(recipe(), on_meta(config(family, **keys)), [])
    assert adapted.peft_config["default"].fan_in_fan_out == transposed
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]


def test_an_adapter_on_transposed_layers_and_a_plain_head_is_merged_as_it_answers() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from train.tuners import wrap

    torch.manual_seed(0)
    keys = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 99, "tie_word_embeddings": False}
    base = AutoModelForCausalLM.from_config(config("GPT2", **keys))
    adapted = wrap(recipe("c_attn", "lm_head"), base, []).eval()
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        told = adapted(ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, told, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "FalconMamba"])
def test_all_linear_leaves_out_what_mamba_s_kernels_read(family: str) -> None:
    from pipeline.model import on_meta
    from train.tuners import wrap

    keys = {"num_hidden_layers": 1, "vocab_size": 99, "hidden_size": 64, "head_dim": 16, "num_heads": 8}
    of = config(family, **keys)
    assert problems(recipe(), of) == []
    model = on_meta(of)
    adapted = wrap(recipe(), model, [])
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert "in_proj" in trained and "out_proj" not in trained
    [said] = problems(recipe("out_proj"), of)
    assert said.startswith("train.lora.targets: 'out_proj' is read past its adapter by Mamba's kernels: this base has")


@pytest.fixture
def model(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's model folder; its files are links, to be replaced and never changed."""
    monkeypatch.chdir(tmp_path)
    folder = Path("model")
    folder.mkdir()
    for file in base_folder.iterdir():
        os.link(file, folder / file.name)
    return folder


def made(name: str = "model") -> set[str]:
    """Names of the files of the base that is made of a folder."""
    from dataclasses import replace

    base(replace(recipe(), base_model=name), Run("mine"))
    return {path.name for path in Path("runs/mine/base").iterdir()}


def refused(name: str = "model") -> str:
    with pytest.raises(UserError) as raised:
        made(name)
    [said] = raised.value.problems
    return said


def test_an_adapter_beside_the_weights_is_left_out_and_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    os.link(model / "model.safetensors", model / "adapter_model.safetensors")
    assert not [name for name in made() if name.startswith("adapter")]
    assert "the adapter beside the weights is left out (adapter_config.json)" in caplog.text


def test_an_adapter_alone_is_refused_with_its_base(model: Path) -> None:
    (model / "config.json").rename(model / "old.txt")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    assert refused() == "model is an adapter, which is no base: merge it first, or use the base x/y"


def test_a_second_copy_in_another_naming_is_left_out_and_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.link(model / "model.safetensors", model / "consolidated.safetensors")
    with caplog.at_level("INFO"):
        assert "consolidated.safetensors" not in made()
    assert "base: transformers does not read consolidated.safetensors: left out" in caplog.text


def test_weights_in_another_naming_alone_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    assert refused() == (
        "model/consolidated.safetensors is not read by transformers, which needs model.safetensors or "
        "model.safetensors.index.json: fetch those"
    )


def test_a_contradictory_generation_config_is_cleaned_and_told(
    model: Path, replace: Callable[[Path, bytes], None], caplog: pytest.LogCaptureFixture
) -> None:
    stated = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "num_return_sequences": 4, "early_stopping": "no"}
    stated |= {"max_new_tokens": -1, "repetition_penalty": 1.1, "eos_token_id": [2, "x"]}
    replace(model / "generation_config.json", json.dumps(stated).encode())
    made()
    left = "early_stopping, max_new_tokens, num_return_sequences, temperature, top_p"
    [told] = [record.getMessage() for record in caplog.records if "contradicts itself" in record.getMessage()]
    assert sorted(told.split(": ")[2].removesuffix(" left out").split(", ")) == left.split(", ")
    written = json.loads(Path("runs/mine/base/generation_config.json").read_text())
    assert written["repetition_penalty"] == 1.1 and "temperature" not in written
    assert all(isinstance(stop, int) for stop in written["eos_token_id"])


def folder_of(tmp_path: Path, base_folder: Path, **keys: Any) -> Path:
    """A tiny model with the tokenizer of the tiny base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    of = config(**({"vocab_size": len(tokenizer), "hidden_size": 16} | keys))
    AutoModelForCausalLM.from_config(of).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_token_too_many_gets_its_row(tmp_path: Path, base_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of(tmp_path, base_folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.save_pretrained(folder)
    assert prepare_tokenizer(folder, None).added == {"<|extra|>": rows}
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.shape[0] == rows + 1
    assert "base: its embedding has no row for <|extra|>: it gets one, which is trained too" in caplog.text


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, base_folder: Path) -> None:
    folder = folder_of(tmp_path, base_folder, vocab_size=100)
    with pytest.raises(UserError, match=r"^the tokenizer has [\d,]+ tokens, the embedding 100 rows: they are of diff"):
        prepare_tokenizer(folder, None)


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Refuse the folder's weights after a change of its tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refuse_weights("mine/base", folder, [safetensors_header(folder / "model.safetensors")])


def test_weights_that_would_be_random_or_rounded_are_refused(
    tmp_path: Path, base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    folder, name = folder_of(tmp_path, base_folder), "model.layers.1.mlp.up_proj.weight"
    changed(folder, lambda tensors: tensors.update({"transformer.h.0.weight": torch.zeros(3)}))
    assert "base: transformers does not read transformer.h.0.weight: left out" in caplog.text
    with pytest.raises(UserError, match=r"up_proj\.weight has the shape \(95, 16\), by its config\.json \(96, 16\)"):
        changed(folder, lambda tensors: tensors.update({name: torch.zeros(95, 16)}))
    with pytest.raises(UserError, match=r"up_proj\.weight is not in its weights, and would be random"):
        changed(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(
        UserError, match=r"its weights are quantized \(model\.layers\.1\.mlp\.up_proj\.weight is F8_E4M"
    ):
        changed(folder, lambda tensors: tensors.update({name: torch.zeros(96, 16).to(torch.float8_e4m3fn)}))


INDEXES = {
    "outside": (
        '{"weight_map": {"a": "../../x.safetensors"}}',
        "names '../../x.safetensors', which is no .safetensors",
    ),
    "elsewhere": (
        '{"weight_map": {"a": "/etc/x.safetensors"}}',
        "names '/etc/x.safetensors', which is no .safetensors",
    ),
    "a pickle": ('{"weight_map": {"a": "x.bin"}}', "names 'x.bin', which is no .safetensors file in its folder"),
    "objects": ('{"weight_map": {"a": {"b": 1}}}', "does not name the file of each weight"),
    "a list": ('{"weight_map": [1]}', "does not name the file of each weight"),
    "nothing": ("{}", "does not name the file of each weight"),
    "no object": ("[]", "holds no JSON object but a list"),
    "depth": ("[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_lies_is_refused_by_name(case: str, tmp_path: Path) -> None:
    text, why = INDEXES[case]
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError) as raised:
        weight_files(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/model.safetensors.index.json {why}")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "why"),
    [("[" * 100_000, "is not JSON"), ("[1]", "holds no JSON object but a list"), (None, "is no file")],
)
def test_settings_that_are_no_settings_are_refused_by_name(
    name: str, content: str | None, why: str, model: Path
) -> None:
    (model / name).unlink()
    (model / name).mkdir() if content is None else (model / name).write_text(content)
    assert refused().startswith(f"model/{name} {why}")


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": []}, "list indices"),
        ({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, "'>=' not supported"),
        ({"a": {"dtype": 7, "shape": [1], "data_offsets": [0, 4]}}, "without type or shape"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "without type or shape"),
        ("[" * 10_000, "recursion"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, why: str, model: Path) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    said = refused()
    assert said.startswith("model/model.safetensors is not a whole safetensors file (") and why in said


TEMPLATES = {
    "a loop without end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "not done",
    ),
    "words without end": ("{% for a in range(99999) %}{{ 'x' * 9999999 }}{% endfor %}", "MemoryError"),
    "a word of ten gigabytes": ("{{ 'x' * 10000000000 }}", "MemoryError"),
    "a macro of its own": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "loops in loops": ("{% for a in [1] %}" * 40 + "{% endfor %}" * 40, "too many statically nested blocks"),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "lines": ("{{ raise_exception('a\nb' * 999) }}", "a ba b"),
    "a book": ("x" * 200_000 + "{{ messages[0].content }}<|im_end|>", "writes 200,"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_is_held_to_seconds_and_to_one_line(case: str, base_folder: Path) -> None:
    import time

    from transformers import AutoTokenizer

    from pipeline.machine import at_most_more
    from train.tokenizer import TEMPLATE_BYTES, end_of_turn

    text, why = TEMPLATES[case]
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = text
    start = time.process_time()
    with pytest.raises(UserError) as raised, at_most_more(TEMPLATE_BYTES):
        end_of_turn(tokenizer)
    assert time.process_time() - start < 10
    [said] = raised.value.problems
    assert why in said and "\n" not in said and len(said) < 400
