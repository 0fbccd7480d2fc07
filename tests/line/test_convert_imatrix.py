"""The importance matrix is what torch computes, and every type takes it."""

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from prove_run import REPOSITORY

from bench.families import CORPUS, TEMPLATE, trained_tokenizer
from convert.evaluator import read_header
from convert.llamacpp import convert
from convert.quantizer import Importance, Tensor, chunks, file_type, imatrix, quantize, training_tokens, write_imatrix
from pipeline import UserError
from pipeline.recipe import NEEDS_IMATRIX, QUANTIZATIONS, WITHOUT_IMATRIX
from pipeline.rows import count

SIZES = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}  # fmt: skip
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}  # fmt: skip
SEQUENCES = [[int(token) for token in np.random.default_rng(seed).integers(3, 500, 30 + 300 * seed)] for seed in (0, 1)]


def made(folder: Path, kind: str, **sizes: Any) -> Any:
    """A random model, and its GGUF in F32 beside it."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer = trained_tokenizer(CORPUS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)  # where .cache is
        convert(folder / "model", folder / "full.gguf", "F32")
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, made(folder, "Llama", intermediate_size=512)


@pytest.fixture(scope="module")
def matrix(llama: tuple[Path, Any]) -> dict[str, Importance]:
    return imatrix(llama[0] / "full.gguf", SEQUENCES)


def inputs_of(model: Any, wanted: Any) -> dict[str, Any]:
    """What torch feeds to the modules that `wanted` accepts, (tokens, columns) by name."""
    import torch

    seen: dict[str, list[Any]] = {}

    def hook(name: str) -> Any:
        return lambda module, given: seen.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in model.named_modules() if wanted(name)]
    with torch.inference_mode():
        for ids in SEQUENCES:
            model(torch.tensor([ids]))
    for handle in hooks:
        handle.remove()
    return {name: torch.cat(rows).double().numpy() for name, rows in seen.items()}


def test_the_struct_is_as_large_as_ggml_s() -> None:
    from llama_cpp._ggml import libggml

    libggml.ggml_tensor_overhead.restype = ctypes.c_size_t
    assert ctypes.sizeof(Tensor) == libggml.ggml_tensor_overhead() - 32  # it counts `struct ggml_object` too


def test_each_column_has_the_mean_square_that_torch_computes(
    llama: tuple[Path, Any], matrix: dict[str, Importance]
) -> None:
    wanted = inputs_of(llama[1], lambda name: name.endswith("proj"))
    assert len(matrix) == len(wanted) == 14
    for name, importance in matrix.items():
        _, layer, tensor, _ = name.split(".")
        rows = wanted[f"model.layers.{layer}.{NAMES[tensor]}"]
        assert importance.counts.tolist() == [len(rows)] == [sum(map(len, SEQUENCES))]
        # llama.cpp adds in another order and rotates in its own precision: 1e-6 here, 1 of another layer.
        np.testing.assert_allclose(importance.means[0], (rows**2).mean(0), rtol=2e-3, atol=1e-7)


def test_experts_are_weighed_by_the_tokens_that_reach_them(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "intermediate_size": 256}
    model = made(tmp_path, "Qwen3Moe", head_dim=64, **sizes)
    found = imatrix(tmp_path / "full.gguf", SEQUENCES)["blk.0.ffn_gate_exps.weight"]
    rows = inputs_of(model, lambda name: name == "model.layers.0.mlp")["model.layers.0.mlp"]
    router = model.model.layers[0].mlp.gate.weight.double().detach().numpy()
    chosen = np.argsort(-(rows @ router.T), axis=-1)[:, :2]
    for expert in range(4):
        reached = rows[(chosen == expert).any(-1)]
        assert found.counts[expert] == pytest.approx(len(reached), abs=1)  # a near tie may fall otherwise
        np.testing.assert_allclose(found.means[expert], (reached**2).mean(0), rtol=0.05)
    assert found.counts.sum() == 2 * len(rows)


def test_an_expert_that_no_token_reached_counts_all_columns_alike() -> None:
    importance = Importance(np.array([[8.0, 2.0], [0.0, 0.0]]), np.array([2, 0]))
    assert importance.means.tolist() == [[4, 1], [1, 1]]


def test_the_file_has_llama_cpp_s_format(tmp_path: Path, matrix: dict[str, Importance]) -> None:
    write_imatrix(tmp_path / "imatrix.gguf", matrix)
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.type"] == "imatrix"
    assert values["imatrix.datasets"] == ["data/train.arrow"]
    assert (values["imatrix.chunk_count"], values["imatrix.chunk_size"]) == (1, 512)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    name = "blk.1.ffn_down.weight"
    np.testing.assert_allclose(tensors[f"{name}.in_sum2"], matrix[name].squares, rtol=1e-6)
    assert tensors[f"{name}.counts"].tolist() == [[360]]
    assert len(tensors) == 2 * len(matrix)


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_type_of_the_schema_is_written(
    kind: str, llama: tuple[Path, Any], matrix: dict[str, Importance], tmp_path: Path
) -> None:
    weighed = kind not in WITHOUT_IMATRIX
    quantize(llama[0] / "full.gguf", tmp_path / "made.gguf", kind, matrix if weighed else None)
    header = read_header(tmp_path / "made.gguf")
    assert (header.file_type, header.imatrix) == (file_type(kind), weighed)


@pytest.mark.parametrize("kind", sorted(NEEDS_IMATRIX))
def test_a_type_that_needs_a_matrix_says_so(kind: str, llama: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{kind} needs an importance matrix: set gguf.imatrix_tokens"):
        quantize(llama[0] / "full.gguf", tmp_path / "made.gguf", kind)


@pytest.mark.parametrize("kind", sorted(QUANTIZATIONS.keys() - WITHOUT_IMATRIX - NEEDS_IMATRIX))
def test_the_matrix_lowers_the_weighed_error(
    kind: str, llama: tuple[Path, Any], matrix: dict[str, Importance], tmp_path: Path
) -> None:
    """With one input a hundred times larger than the others, its column is the one to be rounded well."""
    name = "blk.0.attn_q.weight"
    means = np.ones((1, 256), np.float32)
    means[0, 7] = 1e4
    steep = matrix | {name: Importance(means, np.array([1]))}
    exact = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(llama[0] / "full.gguf").tensors}[name]
    errors = []
    for given in (steep, None):
        quantize(llama[0] / "full.gguf", tmp_path / "made.gguf", kind, given)
        [tensor] = [tensor for tensor in gguf.GGUFReader(tmp_path / "made.gguf").tensors if tensor.name == name]
        rounded = gguf.dequantize(tensor.data, tensor.tensor_type)
        errors.append(float((((rounded - exact) ** 2) * means).sum()))
    assert errors[0] < errors[1]


def test_the_text_is_the_training_s_within_the_limit(converted: Any) -> None:
    merged, data = converted.run.path("merged"), converted.run.path("data")
    some = training_tokens(merged, data, 50, 160)
    assert sum(map(len, some)) == 50
    every = training_tokens(merged, data, 10**6, 160)
    assert len(every) == count(data, "train")
    assert every[: len(some) - 1] == some[:-1]
    assert max(map(len, training_tokens(merged, data, 10**6, 7))) == 7


def test_chunks_are_rounded_up(matrix: dict[str, Importance]) -> None:
    assert chunks(matrix) == 1
    assert chunks({"x": Importance(np.zeros((1, 1)), np.array([513]))}) == 2


def test_the_run_keeps_the_matrix_and_says_which_types_it_weighed(converted: Any) -> None:
    reader = gguf.GGUFReader(converted.run.path("gguf", "imatrix.gguf"))
    assert len(reader.tensors) == 28
    metrics = converted.receipt("gguf")["metrics"]
    assert {kind: made["imatrix"] for kind, made in metrics.items()} == {"F16": False, "Q8_0": False, "Q4_K_M": True}
