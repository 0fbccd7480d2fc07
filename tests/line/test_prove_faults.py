"""Faults that lose a model, planted one by one, are named where they are.

Receipts are signed again after each fault, so that no hash gives it away.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from prove_run import Proved

from bench.families import CORPUS, TEMPLATE, trained_tokenizer
from pipeline.proof import Comparison

pytest_plugins = ["prove_fixtures"]
pytestmark = pytest.mark.slow

Weights = dict[str, Any]
DROPPED = TEMPLATE.replace("You are a test.", "")
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TAGGED = TEMPLATE.replace("{% endfor %}", "{% generation %}{% endgeneration %}{% endfor %}")
TRIMMED = TEMPLATE.replace("message['content']", "(message['content'] | trim)")
OTHER_CORPUS = ["Ganz andere Wörter, und eine andere Reihenfolge der Paare. " * 3, *reversed(CORPUS)]


def failed(rows: dict[str, Comparison]) -> dict[str, str]:
    """The first problem of each artefact that has one."""
    return {name: row.problems[0] for name, row in rows.items() if row.problems}


def change_weights(folder: Path, change: Callable[[Weights], None]) -> None:
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    weights = {name: tensor.copy() for name, tensor in load_file(file).items()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def change_json(file: Path, **values: Any) -> None:
    loaded = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in loaded.items() if value is not None}))


def change_gguf(path: Path, tensors: Callable[[Weights], None] = lambda _: None, **values: Any) -> None:
    """Write the file anew; keys are given with '__' for '.', None drops one."""
    old = path.rename(path.with_suffix(".old"))
    reader = gguf.GGUFReader(old)
    wanted = {key.replace("__", "."): value for key, value in values.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in wanted:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for key, value in wanted.items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            inner = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
            writer.add_key_value(key, value, kind, sub_type=inner)
    loaded = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    tensors(loaded)
    for name, (data, kind) in loaded.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    old.unlink()


def swap(first: str, second: str) -> Callable[[Weights], None]:
    """Exchange two layers."""

    def swapping(weights: Weights) -> None:
        for name in [name for name in weights if f".{first}." in name]:
            other = name.replace(f".{first}.", f".{second}.")
            weights[name], weights[other] = weights[other], weights[name]

    return swapping


def merged_anew(run: Path, combine: Callable[[Any, Any], Any]) -> None:
    """The merged weights as another merge would have made them, of base and of what the adapter adds."""
    from safetensors.numpy import load_file

    base = load_file(run / "base/model.safetensors")

    def change(weights: Weights) -> None:
        for name, tensor in weights.items():
            weights[name] = combine(base[name], tensor - base[name]).astype(np.float32)

    change_weights(run / "merged", change)


def rounded(bits: int) -> Callable[[Any, Any], Any]:
    """Merging into a base whose rows were rounded to so many bits."""

    def combine(base: Any, adapter: Any) -> Any:
        scale = np.abs(base).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        return np.round(base / scale) * scale + adapter

    return combine


def untie(weights: Weights) -> None:
    """A head that stayed behind when the embedding was trained or resized."""
    weights["lm_head.weight"] = np.roll(weights["model.embed_tokens.weight"], 1, axis=0)


def cut_vocabulary(weights: Weights) -> None:
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-8].copy()


def only(part: str) -> Callable[[Path], None]:
    """The adapter is added to some layers; the others stay as the base has them."""

    def plant(run: Path) -> None:
        from safetensors.numpy import load_file

        base = load_file(run / "base/model.safetensors")
        change_weights(
            run / "merged", lambda weights: weights.update({name: base[name] for name in weights if part not in name})
        )

    return plant


def bfloat16(weights: Any) -> Any:
    """Rounded to 8 bits of mantissa."""
    import torch

    return torch.from_numpy(weights).bfloat16().float().numpy()


def interleave(weights: Weights, name: str, heads: int) -> None:
    """Queries or keys for the other of the two ways to rotate pairs."""
    tensor = weights[name]
    halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
    weights[name] = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def flip_bit(weights: Weights) -> None:
    """One bit in a hundred thousand weights, of an exponent."""
    weights["model.layers.0.mlp.up_proj.weight"].view(np.uint32)[100, 100] ^= 1 << 30


def unused_row(weights: Weights) -> None:
    """Of a token that no probe has; its column of the tied head says so."""
    weights["model.embed_tokens.weight"][0, 0] = np.nan


MERGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "adapter not applied": (lambda run: merged_anew(run, lambda base, _: base), "logits: mean divergence"),
    "adapter applied twice": (lambda run: merged_anew(run, lambda base, more: base + 2 * more), "logits: "),
    "adapter at half its scale": (lambda run: merged_anew(run, lambda base, more: base + more / 2), "logits: "),
    "base in 8 bits": (lambda run: merged_anew(run, rounded(8)), "logits: "),
    "base in 4 bits": (lambda run: merged_anew(run, rounded(4)), "logits: "),
    "one layer left out": (only("layers.0."), "logits: mean divergence"),
    "only attention merged": (only("self_attn"), "logits: mean divergence"),
    "scaled by the root of the rank": (
        lambda run: merged_anew(run, lambda base, more: base + more * 8**0.5),
        "logits: mean divergence",
    ),
    "base in bfloat16": (lambda run: merged_anew(run, lambda base, more: bfloat16(base) + more), "logits: mean"),
    "other rotation": (
        lambda run: change_weights(
            run / "merged", lambda weights: interleave(weights, "model.layers.0.self_attn.q_proj.weight", 4)
        ),
        "logits: mean divergence",
    ),
    "one bit": (lambda run: change_weights(run / "merged", flip_bit), "logits: "),
    "one tensor of zeros": (
        lambda run: change_weights(
            run / "merged", lambda weights: weights["model.layers.1.self_attn.k_proj.weight"].fill(0)
        ),
        "logits: mean divergence",
    ),
    "no number in an unused row": (
        lambda run: change_weights(run / "merged", unused_row),
        "logits: probe 'plain' has some that are no finite numbers",
    ),
    "smaller epsilon": (
        lambda run: change_json(run / "merged/config.json", rms_norm_eps=1e-3),
        "logits: mean divergence",
    ),
    "spaces trimmed by the template": (
        lambda run: (run / "merged/chat_template.jinja").write_text(TRIMMED),
        "chat template: code, character ",
    ),
    "layers exchanged": (lambda run: change_weights(run / "merged", swap("0", "1")), "logits: "),
    "not a number": (
        lambda run: change_weights(run / "merged", lambda weights: weights["model.norm.weight"].fill(np.nan)),
        "logits: probe 'plain' has some that are no finite numbers",
    ),
    "rope theta": (
        lambda run: change_json(
            run / "merged/config.json", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
        ),
        "logits: ",
    ),
    "rope scaling": (
        lambda run: change_json(
            run / "merged/config.json",
            rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0},
        ),
        "logits: ",
    ),
    "head not tied": (
        lambda run: (
            change_weights(run / "merged", untie),
            change_json(run / "merged/config.json", tie_word_embeddings=False),
        ),
        "logits: ",
    ),
    "vocabulary cut": (
        lambda run: (
            change_weights(run / "merged", cut_vocabulary),
            change_json(run / "merged/config.json", vocab_size=504),
        ),
        "runs/healthy/merged cannot be used: UserError: the tokenizer has 512 tokens, the weights fewer",
    ),
    "another tokenizer": (
        lambda run: (
            trained_tokenizer(OTHER_CORPUS).save_pretrained(run / "merged"),
            (run / "merged/chat_template.jinja").write_text(TEMPLATE),
        ),
        "token ids: probe 'plain', position 3: ",
    ),
    "default system prompt dropped": (
        lambda run: (run / "merged/chat_template.jinja").write_text(DROPPED),
        "chat template: plain, character 19: ",
    ),
    "template of another model": (
        lambda run: (run / "merged/chat_template.jinja").write_text(CHATML),
        "chat template: plain, character 12: ",
    ),
    "no template": (
        lambda run: (run / "merged/chat_template.jinja").unlink(),
        "runs/healthy/merged cannot be used: UserError: the chat template refuses",
    ),
    "generation tag": (
        lambda run: (run / "merged/chat_template.jinja").write_text(TAGGED),
        "chat template: has '{% generation %}'",
    ),
    "no stop token": (
        lambda run: change_json(run / "merged/generation_config.json", eos_token_id=None),
        "stop token: the trained model ends its turn with [2], this one stops at []",
    ),
    "weights cut off": (
        lambda run: (run / "merged/model.safetensors").write_bytes(
            (run / "merged/model.safetensors").read_bytes()[:-1000]
        ),
        "runs/healthy/merged cannot be used: SafetensorError",
    ),
    "weights missing": (
        lambda run: change_weights(run / "merged", lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight")),
        "logits: ",
    ),
}


@pytest.mark.parametrize("fault", MERGED)
def test_a_fault_of_the_merge_is_named_there(healthy: Proved, fault: str) -> None:
    plant, says = MERGED[fault]
    plant(healthy.run.folder)
    healthy.sign("merge")
    healthy.accept("gguf", "merge")
    found = failed(healthy.comparisons())
    assert list(found) == ["merge"]
    assert found["merge"].startswith(says)


def overflow(weights: Weights) -> None:
    weights["blk.0.ffn_down.weight"][0][0, 0] = np.inf


def tensor_exchange(weights: Weights) -> None:
    swap("0", "1")(weights)


def untied_head(weights: Weights) -> None:
    data, kind = weights["token_embd.weight"]
    weights["output.weight"] = (np.roll(data, 1, axis=0), kind)


def other_tokens(path: Path) -> None:
    other = trained_tokenizer(OTHER_CORPUS)
    tokens = [token for token, _ in sorted(other.get_vocab().items(), key=lambda pair: pair[1])]
    merges = [" ".join(pair) for pair in json.loads(other.backend_tokenizer.to_str())["model"]["merges"]]
    change_gguf(path, tokenizer__ggml__tokens=tokens, tokenizer__ggml__merges=merges)


def zeros(tensors: Weights) -> None:
    tensors["blk.1.attn_k.weight"][0][:] = 0


def scale_bit(tensors: Weights) -> None:
    """The highest bit of the exponent of one block's scale, in the middle of a tensor of Q8_0."""
    tensors["blk.0.ffn_up.weight"][0][100, 34 * 4 + 1] ^= 1 << 6


def rotate_otherwise(tensors: Weights) -> None:
    data, kind = tensors["blk.0.attn_q.weight"]
    changed = {"q": data}
    interleave(changed, "q", 4)
    tensors["blk.0.attn_q.weight"] = (changed["q"], kind)


def plain_tokens(path: Path) -> None:
    change_gguf(path, tokenizer__ggml__token_type=[1] * 512)


FILES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "rope base": ("F16", lambda path: change_gguf(path, llama__rope__freq_base=1e6), "logits: "),
    "rope scaling": (
        "F16",
        lambda path: change_gguf(path, llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0),
        "logits: ",
    ),
    "heads": ("F16", lambda path: change_gguf(path, llama__attention__layer_norm_rms_epsilon=0.1), "logits: "),
    "other rotation": ("F16", lambda path: change_gguf(path, rotate_otherwise), "logits: "),
    "half of each head rotated": (
        "F16",
        lambda path: change_gguf(path, llama__rope__dimension_count=32),
        "runs/healthy/gguf/healthy-F16.gguf cannot be used: ",
    ),
    "one tensor of zeros": ("F16", lambda path: change_gguf(path, zeros), "logits: "),
    "one bit": ("Q8_0", lambda path: change_gguf(path, scale_bit), "logits: "),
    "special tokens like others": ("F16", plain_tokens, "token ids: probe 'plain', position 0: "),
    "no merges": ("F16", lambda path: change_gguf(path, tokenizer__ggml__merges=["a b"]), "token ids: probe 'plain'"),
    "end of text added": (
        "Q8_0",
        lambda path: change_gguf(path, tokenizer__ggml__add_eos_token=True),
        "token ids: probe 'plain', position ",
    ),
    "another stop token": (
        "F16",
        lambda path: change_gguf(path, tokenizer__ggml__eos_token_id=0),
        "stop token: the trained model ends its turn with [2], this one stops at [0]",
    ),
    "layers exchanged": ("F16", lambda path: change_gguf(path, tensor_exchange), "logits: "),
    "head not tied": ("F16", lambda path: change_gguf(path, untied_head), "logits: "),
    "overflow": ("F16", lambda path: change_gguf(path, overflow), "logits: probe 'plain' has some that are no finite"),
    "another tokenizer": ("F16", other_tokens, "token ids: probe 'plain', position 3: "),
    "another pre-tokenizer": (
        "F16",
        lambda path: change_gguf(path, tokenizer__ggml__pre="qwen2"),
        "token ids: probe 'numbers', position 13: '1' (19), trained with '12' (272)",
    ),
    "beginning of text added": (
        "Q8_0",
        lambda path: change_gguf(path, tokenizer__ggml__add_bos_token=True, tokenizer__ggml__bos_token_id=0),
        "token ids: probe 'plain', position 0: '<|endoftext|>' (0) is added before all that it was",
    ),
    "template of another model": (
        "Q8_0",
        lambda path: change_gguf(path, tokenizer__chat_template=CHATML),
        "chat template: file, character 30: ",
    ),
    "default system prompt dropped": (
        "F16",
        lambda path: change_gguf(path, tokenizer__chat_template=DROPPED),
        "chat template: file, character ",
    ),
    "no template": (
        "F16",
        lambda path: change_gguf(path, tokenizer__chat_template=None),
        "chat template: file, character 0: ''",
    ),
    "generation tag": (
        "F16",
        lambda path: change_gguf(path, tokenizer__chat_template=TAGGED),
        "chat template: has '{% generation %}'",
    ),
    "no stop token": (
        "Q8_0",
        lambda path: change_gguf(path, tokenizer__ggml__eos_token_id=None),
        "stop token: the trained model ends its turn with [2], this one stops at []",
    ),
    "cut off": (
        "Q8_0",
        lambda path: path.write_bytes(path.read_bytes()[:-100_000]),
        "runs/healthy/gguf/healthy-Q8_0.gguf cannot be used: UserError: ",
    ),
    "no GGUF": ("Q8_0", lambda path: path.write_bytes(b"GGUF"), "runs/healthy/gguf/healthy-Q8_0.gguf cannot be used: "),
    "tensor missing": (
        "Q8_0",
        lambda path: change_gguf(path, lambda tensors: tensors.pop("blk.1.ffn_up.weight")),
        "runs/healthy/gguf/healthy-Q8_0.gguf cannot be used: UserError: llama.cpp cannot load",
    ),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_fault_of_a_file_is_named_there(healthy: Proved, fault: str) -> None:
    kind, plant, says = FILES[fault]
    plant(healthy.gguf(kind))
    healthy.sign("gguf")
    found = failed(healthy.comparisons())
    assert list(found) == [kind]
    assert found[kind].startswith(says)


@pytest.mark.parametrize("lying", [False, True])
def test_another_type_under_the_name_that_was_asked(healthy: Proved, lying: bool) -> None:
    from convert.quantizer import file_type, quantize

    healthy.gguf("Q8_0").unlink()
    quantize(healthy.gguf("F16"), healthy.gguf("Q8_0"), "Q4_0")
    if lying:
        change_gguf(healthy.gguf("Q8_0"), general__file_type=file_type("Q8_0"))
    healthy.sign("gguf")
    found = failed(healthy.comparisons())
    assert list(found) == ["Q8_0"]
    assert found["Q8_0"].startswith("type: ")
