"""GGUF: the type that was asked for, tensors that fell back are counted, and tokens as in training."""

from collections.abc import Callable
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import gguf as writer
import numpy as np
import pytest
from gguf_fixture import write_gguf

from convert.evaluator import read_header
from convert.gguf import check_range, gguf, report
from convert.quantizer import file_type, quantize
from pipeline import UserError
from pipeline.recipe import QUANTIZATIONS
from train.config import packaged_gguf

CORPUS = [
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "1234567890 3.14159 1,000,000 0x1F",
    "don't I'll we've THEY'RE",
    "def f(x):\n    return {'a': [x**2, -1]}  # 100%\n",
    "Grüße aus Köln, naïve café, Ångström",
    "世界 こんにちは 안녕하세요 שלום مرحبا नमस्ते ไทย",
    "e\u0301 vs \u00e9, \u200bzero width\u00a0space",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 \U0001d518\U0001d52b",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|endoftext|><|im_start|>",
    "< |im_end| > <|im_end <|im_end|",
    "a" * 300,
    "http://example.org/a?b=c&d=%20#e",
    "\x00\x01\x7f control",
    "",
]


def test_gguf_has_these_files_each_made_once(converted: Any) -> None:
    assert converted.recipe.gguf.types == ("Q8_0", "F16", "Q4_K_M", "Q8_0")
    assert converted.files("gguf") == {"line-F16.gguf", "line-Q8_0.gguf", "line-Q4_K_M.gguf", "imatrix.gguf"}


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_the_file_is_of_the_type_that_its_name_says(kind: str, converted: Any) -> None:
    path = converted.run.path("gguf", f"line-{kind}.gguf")
    header = read_header(path)
    assert header.file_type == file_type(kind)
    metrics = converted.receipt("gguf")["metrics"][kind]
    assert metrics["bytes"] == path.stat().st_size
    assert metrics["tensor_types"] == header.tensor_types


TENSORS = {
    "F16": {"F16": 15, "F32": 5},
    "Q8_0": {"F32": 5, "Q8_0": 15},
    "Q4_K_M": {"F32": 5, "Q4_K": 12, "Q6_K": 3},
}


@pytest.mark.parametrize("kind", TENSORS)
def test_the_tensors_are_these(kind: str, converted: Any) -> None:
    metrics = converted.receipt("gguf")["metrics"][kind]
    assert (metrics["tensor_types"], metrics["tensors"]) == (TENSORS[kind], 20)


def test_no_tensor_of_the_tiny_model_falls_back(converted: Any) -> None:
    metrics = converted.receipt("gguf")["metrics"]
    assert {kind: (made["fallback_tensors"], made["fallbacks"]) for kind, made in metrics.items()} == dict.fromkeys(
        TENSORS, (0, {})
    )


def test_the_bits_a_weight_are_the_type_s(converted: Any) -> None:
    metrics = converted.receipt("gguf")["metrics"]
    assert metrics["F16"]["bits_per_weight"] == pytest.approx(16, abs=0.1)
    assert metrics["Q8_0"]["bits_per_weight"] == pytest.approx(8.5, abs=0.1)
    assert 4.5 < metrics["Q4_K_M"]["bits_per_weight"] < 6.57, "nine tenths are the vocabulary, in Q6_K"


def test_the_gguf_carries_the_template_and_the_end_of_turn(converted: Any, tokenizer: Any) -> None:
    for path in converted.run.path("gguf").glob("line-*.gguf"):
        header = read_header(path)
        assert header.chat_template == converted.run.path("base", "chat_template.jinja").read_text()
        assert header.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_tokens_are_those_of_training(converted: Any, tokenizer: Any) -> None:
    import llama_cpp

    llama = llama_cpp.Llama(str(converted.run.path("gguf", "line-Q8_0.gguf")), vocab_only=True, verbose=False)
    texts = [
        *CORPUS,
        *(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) for text in CORPUS),
    ]
    ours = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    theirs = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    llama.close()
    assert theirs == ours


def write_matrix(path: Path, width: int, kind: str = "llama") -> None:
    """An F16 GGUF of one layer whose rows have so many columns."""
    made = writer.GGUFWriter(path, kind)
    made.add_block_count(1)
    made.add_file_type(file_type("F16"))
    made.add_embedding_length(width)
    made.add_head_count(1)
    made.add_head_count_kv(1)
    made.add_feed_forward_length(256)
    made.add_context_length(64)
    made.add_layer_norm_rms_eps(1e-5)
    random = np.random.default_rng(0)
    for name, shape in {
        "token_embd": (32, width), "blk.0.attn_q": (width, width), "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width), "blk.0.ffn_down": (width, 256),
    }.items():  # fmt: skip
        made.add_tensor(f"{name}.weight", random.normal(0, 1, shape).astype(np.float16))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


# llama.cpp gives the vocabulary Q8_0 of its own accord where Q6_K cannot be, and does not count that.
WIDTHS = {
    256: {},
    96: {"Q4_K -> Q5_0": 2, "Q6_K -> Q8_0": 1},
    100: {"Q4_K -> F16": 2, "Q6_K -> F16": 1, "Q8_0 -> F16": 1},
}


@pytest.mark.parametrize("width", WIDTHS)
def test_tensors_that_fall_back_are_counted(width: int, tmp_path: Path) -> None:
    write_matrix(tmp_path / "full.gguf", width)
    assert dict(quantize(tmp_path / "full.gguf", tmp_path / "small.gguf", "Q4_K_M").fallbacks) == WIDTHS[width]


def test_the_header_agrees_with_another_reader(tmp_path: Path) -> None:
    write_matrix(tmp_path / "full.gguf", 256)
    quantize(tmp_path / "full.gguf", tmp_path / "small.gguf", "Q4_K_M")
    header, reader = read_header(tmp_path / "small.gguf"), writer.GGUFReader(tmp_path / "small.gguf")
    assert header.tensors == len(reader.tensors) == 5
    assert header.parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert header.tensor_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)


def test_the_fallbacks_stand_in_the_report(tmp_path: Path) -> None:
    write_matrix(tmp_path / "full.gguf", 96)
    said = quantize(tmp_path / "full.gguf", tmp_path / "small.gguf", "Q4_K_M")
    made = report(tmp_path / "small.gguf", "Q4_K_M", dict(said.fallbacks), 0.0)
    assert (made["fallback_tensors"], made["tensors"]) == (3, 5)


@pytest.mark.slow
def test_of_the_packaged_model_two_thirds_fall_back(tmp_path: Path) -> None:
    """Golden: its width of 576 is no multiple of 256, so Q4_K_M keeps 180 of its 272 tensors in wider types."""
    reader = writer.GGUFReader(packaged_gguf())
    full = writer.GGUFWriter(tmp_path / "full.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("llama.") and field.types[0] != writer.GGUFValueType.ARRAY:
            full.add_key_value(field.name, field.contents(), field.types[0])
    full.add_file_type(file_type("F16"))
    for tensor in reader.tensors:
        wide = writer.dequantize(tensor.data, tensor.tensor_type)
        full.add_tensor(tensor.name, wide if wide.ndim == 1 else wide.astype(np.float16))
    full.write_header_to_file()
    full.write_kv_data_to_file()
    full.write_tensors_to_file()
    full.close()
    said = quantize(tmp_path / "full.gguf", tmp_path / "small.gguf", "Q4_K_M")
    made = report(tmp_path / "small.gguf", "Q4_K_M", dict(said.fallbacks), 0.0)
    assert (made["fallback_tensors"], made["tensors"]) == (180, 272)


def test_another_type_than_asked_for_is_refused(converted: Any) -> None:
    path = converted.run.path("gguf", "line-Q8_0.gguf")
    with pytest.raises(UserError) as raised:
        report(path, "Q6_K", {}, 0.0)
    assert str(raised.value) == f"{path} is of llama.cpp's type 7, asked for was Q6_K: choose another type"


def test_llama_cpp_has_every_type_of_the_schema() -> None:
    assert all(file_type(kind) >= 0 for kind in QUANTIZATIONS)


def test_the_type_numbers_are_llama_cpp_s() -> None:
    assert [file_type(kind) for kind in ("F32", "F16", "Q8_0", "Q4_K_M", "BF16")] == [0, 1, 7, 15, 32]


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_a_truncated_gguf_is_refused(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    write_gguf(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(
        UserError, match=r"cut\.gguf (is not a whole GGUF file|has \d+ bytes, its header says \d+): delete"
    ):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 99, b"not a model" * 99])
def test_garbage_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "garbage.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"garbage\.gguf is not a whole GGUF file: delete it and run make again$"):
        read_header(tmp_path / "garbage.gguf")


@pytest.mark.parametrize("missing", ["none.gguf", "."])
def test_what_is_no_file_is_refused(missing: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        read_header(tmp_path / missing)


@pytest.mark.parametrize("largest", [65505.0, 1e9, float("inf"), float("nan")])
def test_weights_too_large_for_f16_are_refused(largest: float) -> None:
    with pytest.raises(UserError, match=r"^a weight of .* does not fit F16 \(up to 65504\): set gguf\.full=BF16$"):
        check_range("F16", largest)


@pytest.mark.parametrize(("full", "largest"), [("F16", 65504.0), ("BF16", 1e9), ("F32", 1e9)])
def test_weights_that_fit_pass(full: str, largest: float) -> None:
    check_range(full, largest)


def test_the_merge_s_largest_weight_is_asked_before_anything_is_written(merged: Any) -> None:
    receipt = merged.run.receipt("merge")
    merged.run.write_receipt(changed(receipt, metrics=receipt.metrics | {"largest_weight": 70000.0}))
    with pytest.raises(UserError, match="a weight of 70000 does not fit F16"):
        gguf(merged.recipe, merged.run)
    assert not merged.run.path("gguf").exists() and not merged.run.path(".gguf.tmp").exists()


def test_a_model_that_the_converter_refuses_is_one_line_and_its_log_is_kept(
    merged: Any, replace: Callable[[Path, bytes], None]
) -> None:
    replace(merged.run.path("merged", "config.json"), b'{"architectures": ["NoSuchModel"], "model_type": "no_such"}')
    with pytest.raises(UserError) as raised:
        gguf(merged.recipe, merged.run)
    [said] = str(raised.value).splitlines()
    assert said.startswith("llama.cpp cannot convert runs/line/merged (")
    assert Path(said.rpartition("see ")[2]).is_file()
    assert not merged.run.path("gguf").exists()


def test_a_source_that_cannot_be_quantized_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "garbage.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError) as raised:
        quantize(tmp_path / "garbage.gguf", tmp_path / "small.gguf", "Q8_0")
    [said] = str(raised.value).splitlines()
    assert said.startswith(f"llama.cpp cannot quantize {tmp_path / 'garbage.gguf'} to Q8_0 (")
