"""Bring the base model into one plain folder:  python -m train.base RECIPE

Whatever the recipe's `base` names (the packaged model, random weights, a Hub id, a folder, a GGUF file), the result is
`runs/<recipe>/base/`: config, tokenizer with its chat template, generation config, safetensors. Later stages read that.
"""

import difflib
import json
import logging
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

from pipeline import Made, Recipe, Run, UserError, command
from pipeline.files import fingerprint, fresh_folder, put_in_place, read_json, read_object, write_whole
from pipeline.gguf_head import read_head
from pipeline.model import stored
from pipeline.run import Fingerprints
from train.config import (
    PACKAGED,
    PACKAGED_MODEL,
    RANDOM,
    config_in,
    config_named,
    packaged_gguf,
    random_config,
    refuse_code,
)
from train.hub import fetched, without_waiting
from train.inspection import SCALED, card, positions, refuse, refuse_weights
from train.tokenizer import prepare_tokenizer

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the one or the other
NO_MODEL = "{} holds no model: it needs config.json and *.safetensors (adapters are no base)"
ADAPTER, ADAPTER_CONFIG = "adapter_", "adapter_config.json"
OBJECTS = (ADAPTER_CONFIG, INDEX, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*")

log = logging.getLogger("truetune")


def base(recipe: Recipe, run: Run) -> Made:
    """Write the base folder.

    Raises:
        UserError: unknown model, pickled weights, remote code, damaged weights, a chat template without an end of turn.
    """
    folder = fresh_folder(run.path(".base.tmp"))
    named = Path(recipe.base_model)
    if recipe.base_model in (RANDOM, PACKAGED) or (named.suffix == ".gguf" and named.is_file()):
        refuse(recipe, config_named(recipe.base_model))
        inputs = (
            _from_random(folder, recipe.seed) if recipe.base_model == RANDOM else _from_gguf(recipe.base_model, folder)
        )
    elif named.is_dir():
        inputs = _from_folder(recipe, named, folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", recipe.base_model) and not recipe.base_model.startswith(
        (".", "/")
    ):
        inputs = _from_hub(recipe, folder)
    else:
        raise UserError(_unknown(recipe.base_model))
    prepared = prepare_tokenizer(folder, recipe.chat_template, recipe.system, recipe.chat_template_arguments)
    known = write_positions(folder)
    packaged = recipe.base_model == PACKAGED
    stated = origin(packaged_gguf() if packaged else named if named.suffix == ".gguf" else folder)
    if packaged or (not named.exists() and "/" in recipe.base_model):
        stated["model"] = PACKAGED_MODEL if packaged else recipe.base_model.partition("@")[0]
    put_in_place(folder, run.path("base"))
    if recipe.chat_template:
        inputs[recipe.chat_template] = fingerprint(Path(recipe.chat_template))
    return Made(
        outputs=[run.path("base")],
        metrics={"parameters": parameters(run.path("base")), "end_of_turn": prepared.end_of_turn}
        | {"added_tokens": prepared.added, "system": prepared.system, "positions": known}
        | stated,
        inputs=inputs,
        packages=("transformers", "torch", "tokenizers", "gguf"),
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


def _from_gguf(name: str, folder: Path) -> Fingerprints:
    """Dequantize a GGUF to float32 safetensors."""
    from transformers import AutoTokenizer

    source = packaged_gguf() if name == PACKAGED else Path(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = stored(source)
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError, struct.error) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source} is not a whole GGUF model that transformers reads ({reason}): fetch it again"
        ) from None
    _save(model, tokenizer, folder)
    return {name: fingerprint(source)}


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_folder(recipe: Recipe, source: Path, folder: Path) -> Fingerprints:
    """Link a folder's safetensors and copy its settings, after the checks that need no loading."""
    refuse_settings(recipe, source)
    weights = [source / name for name in weight_files(source)]
    left = sorted(set(source.glob("*.safetensors")).difference(weights, source.glob(f"{ADAPTER}*")))
    for file in weights:
        if not file.is_file() and file.name != WHOLE:
            raise UserError(f"{file} is missing, which {INDEX} names: fetch it again")
        if not file.is_file() and left:
            raise UserError(f"{left[0]} is not read by transformers, which needs {WHOLE} or {INDEX}: fetch those")
        if not file.is_file():
            raise UserError(NO_MODEL.format(source))
    headers = [safetensors_header(file) for file in weights if file.suffix == ".safetensors"]
    for file in weights:
        _link(file.resolve(), folder / file.name)
    settings = sorted({file for pattern in SETTINGS for file in source.glob(pattern) if file.is_file()} - set(weights))
    settings = [file for file in settings if not file.name.startswith(ADAPTER) and not file.name.endswith(INDEX)]
    for file in settings:
        shutil.copy(file, folder / file.name)
    clean_generation(folder)
    refuse_weights(recipe.base_model, folder, headers)
    if (source / ADAPTER_CONFIG).is_file():
        log.warning(
            "base: the adapter beside the weights is left out (%s): merge it first to train on it", ADAPTER_CONFIG
        )
    if left:
        log.info("base: transformers does not read %s: left out", ", ".join(file.name for file in left))
    return {str(file): fingerprint(file) for file in weights + settings}


def weight_files(source: Path) -> list[str]:
    """The names of a folder's safetensors that transformers reads, with their index; adapters and copies in other
    namings are not among them. They need not be there yet.

    Raises:
        UserError: the index names what is no file of its folder.
    """
    index = source / INDEX
    if (source / WHOLE).is_file() or not index.exists():
        return [WHOLE]
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index} does not name the file of each weight: fetch it again")
    for name in sorted(set(named.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is no .safetensors file in its folder: fetch it again")
    return [INDEX, *sorted(set(named.values()))]


def _from_hub(recipe: Recipe, folder: Path) -> Fingerprints:
    """Download a Hub model's settings and, if they do, the safetensors that transformers reads; nothing else."""
    for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.pop(bars, None)  # a download of gigabytes shows its progress
    from huggingface_hub import HfApi, snapshot_download

    repository, _, revision = recipe.base_model.partition("@")
    without_waiting(HfApi.model_info, repository, revision or None)

    def bring(revision: str | None, names: list[str]) -> Path:
        return fetched(
            recipe.base_model, lambda: snapshot_download(repository, revision=revision, allow_patterns=names)
        )

    found = bring(revision or None, [INDEX, *SETTINGS])
    refuse_settings(recipe, found)
    found = bring(found.name, [WHOLE, *weight_files(found)])
    made_from = _from_folder(recipe, found, folder)
    return {f"{repository}@{found.name}/{Path(file).name}": mark for file, mark in made_from.items()}


def refuse_settings(recipe: Recipe, source: Path) -> None:
    """Refuse a folder by what is read before its weights are: its names and its settings.

    Raises:
        UserError: it is no model, would run code when loaded, or is one that the recipe cannot train.
    """
    for settings in sorted(source.glob("*.json")):
        loaded = read_object(settings) if settings.name in OBJECTS else read_json(settings)
        refuse_code(settings, loaded)
    there = {file.name for file in source.iterdir()}
    pickled = sorted(name for name in there if name.endswith(PICKLED))
    if pickled and not any(name.endswith(".safetensors") for name in there):
        raise UserError(
            f"{source / pickled[0]} is a pickle, which can run code when loaded: use a base with *.safetensors"
        )
    if ADAPTER_CONFIG in there and "config.json" not in there:
        of = read_object(source / ADAPTER_CONFIG).get("base_model_name_or_path") or "that it was trained on"
        raise UserError(f"{source} is an adapter, which is no base: merge it first, or use the base {of}")
    if "config.json" not in there:
        raise UserError(NO_MODEL.format(source))
    refuse(recipe, config_in(source, recipe.base_model), source)


def clean_generation(folder: Path) -> None:
    """Leave out of generation_config.json what contradicts itself, with which no model could be loaded or saved."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    stated = read_object(file) if file.is_file() else {}
    kept: dict[str, Any] = {}
    for key in sorted(stated, key=lambda key: key not in ("do_sample", "num_beams")):  # on which others depend
        try:
            GenerationConfig(**kept, **{key: stated[key]}).validate(strict=True)
            kept[key] = stated[key]
        except (ValueError, TypeError, AttributeError):
            continue
    if left := [key for key in stated if key not in kept]:
        log.warning("base: %s contradicts itself: %s left out", file.name, ", ".join(left))
        write_whole(file, json.dumps(kept, indent=2) + "\n")


def write_positions(folder: Path) -> int | None:
    """Put the positions that a model knows into its config, where every engine looks for them; their number."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    known, stated = positions(config), getattr(config.get_text_config(), "max_position_embeddings", None)
    written = read_object(folder / "config.json")
    before = json.dumps(written)
    if "n_positions" in written:
        written.setdefault("n_ctx", written["n_positions"])  # as llama.cpp's converter calls those of GPT-2
    one_head = written.get("multi_query") and not written.get("new_decoder_architecture")
    if written.get("model_type") == "falcon" and one_head:
        written["num_kv_heads"] = 1  # transformers has one whatever is written, llama.cpp's converter what is
    if known and stated and known > stated:
        text = written.get("text_config") or written
        for key in ("rope_parameters", "rope_scaling"):
            for rope in [text[key], *text[key].values()] if isinstance(text.get(key), dict) else []:
                if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in SCALED:
                    rope.setdefault("original_max_position_embeddings", stated)
        text["max_position_embeddings"] = known
        log.info("base: its rope is scaled, so it knows %d tokens, not %d", known, stated)
    if json.dumps(written) != before:
        write_whole(folder / "config.json", json.dumps(written, indent=2) + "\n")
    return known


def origin(source: Path) -> dict[str, Any]:
    """`license` and `languages` as a GGUF's header or the model card in a folder states them; the rest is absent."""
    stated = _header(source) if source.suffix == ".gguf" else card(source / "README.md")
    languages = stated.get("languages") or stated.get("language") or []
    found = {
        "license": _text(stated.get("license")),
        "languages": [
            text for each in (languages if isinstance(languages, list) else [languages]) if (text := _text(each))
        ],
    }
    return {key: value for key, value in found.items() if value}


def _header(path: Path) -> dict[str, Any]:
    values = read_head(path).values
    return {name: values.get(f"general.{name}") for name in ("license", "languages")}


def _text(stated: Any) -> str:
    """A text, whether it is text or, as those of a GGUF's lists, bytes."""
    return stated.decode(errors="replace") if isinstance(stated, bytes) else stated if isinstance(stated, str) else ""


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
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        if not all(
            isinstance(entry["dtype"], str) and all(length >= 0 for length in entry["shape"]) for entry in tensors
        ):
            raise ValueError("a tensor without type or shape")
        end = max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}): fetch it again") from None
    if size != 8 + length + end:
        raise UserError(f"{file} has {size} bytes, its header says {8 + length + end}: it is truncated, fetch it again")
    return header


def _link(source: Path, target: Path) -> None:
    """The same bytes under another name, never a copy: a base may have hundreds of gigabytes."""
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, (PACKAGED, RANDOM), 1)
    hint = f"did you mean '{near[0]}'? Or " if near else ""
    return (
        f"base_model: unknown model {name!r}: {hint}give {PACKAGED!r}, a Hub id (owner/name), a folder or a .gguf file"
    )


if __name__ == "__main__":
    command("base", base)
