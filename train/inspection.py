"""What of a base training, conversion or serving would stumble over, told from its files before any of them begins."""

import ast
import logging
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.error import reason
from pipeline.load import MOST_CHARACTERS, plain_yaml
from pipeline.model import on_meta, unread
from pipeline.recipe import Lora
from pipeline.rows import heldout, rendered
from setup.install import find_converter
from train.packing import cannot_pack, refused

log = logging.getLogger("truetune")

# Settings of quantizers, in config.json (MLX's is the second) or beside it.
QUANTIZED_KEYS = ("quantization_config", "quantization", "compression_config")
QUANTIZED_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Of a Hub id, what names the way in which its weights were quantized.
QUANTIZED_NAME = re.compile(
    r"[-_.](?:unsloth|bnb|\d(?:\.\d+)?-?bits?|gptq|awq|fp8|nvfp4|mxfp4|nf4|int\d|w\d+a\d+|eetq|hqq|aqlm|quantized).*",
    re.I,
)
NARROW = re.compile(r"F[48]|F6|U8|I8|U16|I16|U32|I32")  # safetensors' names of types that hold no weight as it is
WEIGHT = re.compile(r"weight(?:_packed)?$|qweight$|scales?$|experts\.\w+_proj(?:_blocks)?$")
SCALED = ("linear", "yarn")  # rope types that stretch the positions for which the base was trained


def refuse(recipe: Recipe, config: Any, folder: Path | None = None) -> None:
    """Say what is wrong between the recipe and the base of this config, and with the settings in `folder`.

    Raises:
        UserError: a problem a line: quantized weights, an architecture, positions or packing that do not do, targets
            of LoRA that it has not.
    """
    quantized = quantization(recipe.base_model, config, folder)
    problems = [quantized] if quantized else []
    problems += _unconvertible(recipe, config)
    problems += too_long(recipe, positions(config))
    if recipe.train.packing == "on" and (why := cannot_pack(config)):
        problems.append(refused(recipe, why))
    if not quantized:
        problems += wrong_targets(recipe, config)
    if problems:
        raise UserError(*problems)


def quantization(base: str, config: Any, folder: Path | None = None) -> str:
    """That the base's weights are quantized, and which base is not, or nothing."""
    places = (config, config.get_text_config())
    stated = next((found for of in places for key in QUANTIZED_KEYS if (found := getattr(of, key, None))), None)
    if stated is None and folder is not None:
        stated = next(
            ({"quant_method": how} for name, how in QUANTIZED_FILES.items() if (folder / name).exists()), None
        )
    if stated is None:
        return ""
    said = stated if isinstance(stated, dict) else getattr(stated, "to_dict", dict)()
    how = str(getattr(said.get("quant_method"), "value", said.get("quant_method")) or "a quantizer")
    return _quantized(base, how, folder)


def _quantized(base: str, how: str, folder: Path | None) -> str:
    return (
        f"base {base!r}: its weights are quantized ({how}), which training and merging would round once more: use "
        f"{_unquantized(base, folder)}"
    )


def _unquantized(base: str, folder: Path | None) -> str:
    """The base that this one was quantized from, as its card or its name says."""

    stated = card(folder / "README.md").get("base_model") if folder else None
    names = stated if isinstance(stated, list) else [stated]
    if name := next((name for name in names if isinstance(name, str) and "/" in name and name != base), ""):
        return f"{name}, from which they were made"
    plain = QUANTIZED_NAME.sub("", base)
    if "/" in base and plain != base and not Path(base).exists():
        return f"the unquantized one from which they were made, perhaps {plain}"
    return "the unquantized base from which they were made"


def _unconvertible(recipe: Recipe, config: Any) -> list[str]:
    """That llama.cpp has no such architecture, where GGUF files are to be made."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    name = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__  # as the merged folder will say
    known = _convertible()
    if not recipe.gguf.types or known is None or name in known:
        return []
    return [
        f"base {recipe.base_model!r} is a {name}, which llama.cpp cannot convert: use another base, or train it for "
        "vLLM alone with gguf.types=[]"
    ]


@cache
def _convertible() -> frozenset[str] | None:
    """The architectures that llama.cpp's converter takes, by transformers' names of their classes.

    Read from its table, without running it; None where it is not installed.
    """
    found = find_converter()
    if found is None:
        return None
    table = found.with_name("conversion") / "__init__.py"
    for statement in ast.parse(table.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "TEXT_MODEL_MAP":
            return frozenset(ast.literal_eval(statement.value))
    raise RuntimeError(f"{table} has no TEXT_MODEL_MAP")


def positions(config: Any) -> int | None:
    """How many tokens of one conversation the base knows, its rope's scaling counted; None if it sets no limit.

    Those of a scaled rope are what vLLM derives (vllm/config/model.py).
    """
    text = config.get_text_config()
    stated = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    known = next((number for number in stated if isinstance(number, int) and number > 0), None)
    if known is None or text.model_type.startswith("gemma3"):  # whose positions are those of the scaled rope
        return known
    for rope in _ropes(text):
        if rope.get("rope_type", rope.get("type")) in SCALED:
            trained = rope.get("original_max_position_embeddings") or known
            known = max(known, int(trained * (rope.get("factor") or 1)))
    return known


def _ropes(text: Any) -> list[dict[str, Any]]:
    """The rope's parameters, one of each kind of layer where they differ."""
    stated = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return (
        [stated]
        if "rope_type" in stated or "type" in stated
        else [of for of in stated.values() if isinstance(of, dict)]
    )


def too_long(recipe: Recipe, known: int | None) -> list[str]:
    """Which lengths of the recipe are beyond the positions that the base knows."""
    wanted = {"train.max_length": recipe.train.max_length, "serve.context": recipe.serve.context}
    return [
        f"{key}: {tokens} is more than the {known} tokens that base {recipe.base_model!r} knows: set {key}={known}"
        for key, tokens in wanted.items()
        if known is not None and tokens > known
    ]


def refuse_long_questions(recipe: Recipe, run: Run) -> None:
    """Say which held-out question leaves no room for its answer.

    Raises:
        UserError: the base knows fewer tokens than the longest of them has with its answer.
    """
    from transformers import AutoTokenizer

    known, questions = run.receipt("base").metrics.get("positions"), heldout(run.path("data"))
    if not known or not questions:
        return
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    prompts = [rendered(tokenizer, row["messages"], row.get("tools"), prompt=True) for row in questions]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    longest, room = max(lengths), recipe.train.max_new_tokens
    if longest + room > known:
        raise UserError(
            f"data.heldout: question {lengths.index(longest) + 1} has {longest} tokens, with an answer of "
            f"train.max_new_tokens={room} more than the {known} that base {recipe.base_model!r} knows: shorten it or "
            "lower the key"
        )


def wrong_targets(recipe: Recipe, config: Any) -> list[str]:
    """Which of `train.lora.targets` the base has not, or cannot give an adapter."""
    from train.tuners import TUNERS, wrap

    wanted = recipe.train.lora.targets
    if TUNERS[recipe.train.tuner].config is None and wanted == Lora.targets:
        return []  # others are judged though the tuner has no adapter: the plan shows LoRA beside it
    model = on_meta(config)
    layers = {name: module for name, module in model.named_modules() if name}
    tied = _tied(model)
    fit = sorted({name.rpartition(".")[2] for name, layer in layers.items() if not _unfit(config, name, layer, tied)})
    have = f"this base has {', '.join(fit)}; all-linear takes them all"
    if wanted == ("all-linear",):
        return [] if fit else ["train.lora.targets: all-linear finds no layer that takes an adapter: use another base"]
    problems = []
    for target in wanted:
        found = {name: layer for name, layer in layers.items() if name == target or name.endswith(f".{target}")}
        if not found:
            problems.append(f"train.lora.targets: {target!r} is no layer: {have}")
        elif why := next((why for name, layer in found.items() if (why := _unfit(config, name, layer, tied))), ""):
            problems.append(f"train.lora.targets: {target!r} {why}: {have}")
    if not problems:
        try:
            wrap(recipe, model, [])
        except (ValueError, TypeError, NotImplementedError) as error:
            problems.append(f"train.lora.targets: PEFT cannot adapt {', '.join(wanted)} ({reason(error)}): {have}")
    return problems


def _unfit(config: Any, name: str, layer: Any, tied: Iterable[Any]) -> str:
    """Why a layer takes no adapter, or nothing."""
    from torch.nn import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    from train.tuners import read_past_adapters

    if any(layer is other for other in tied):
        return "is tied, embedding and head in one: an adapter on one of them would change both"
    if not isinstance(layer, Linear | Conv1D | Embedding):
        return f"is a {type(layer).__name__}, which takes no adapter"
    if name.rpartition(".")[2] in (read_past_adapters(config) or ()):
        return "is read past its adapter by Mamba's kernels"
    return ""


def _tied(model: Any) -> list[Any]:
    """Embedding and head, where they are the same weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding, head] if head is not None and head.weight is embedding.weight else []


def refuse_weights(base: str, folder: Path, headers: Iterable[dict[str, Any]]) -> None:
    """Say what of the safetensors in `folder` transformers would not read as this model's weights.

    Raises:
        UserError: they are quantized, have other shapes or lack some, which would be random.
    """
    for header in headers:
        for name, entry in header.items():
            if name != "__metadata__" and WEIGHT.search(name) and NARROW.match(entry["dtype"]):
                raise UserError(_quantized(base, f"{name} is {entry['dtype']}", folder))
    try:
        found = unread(folder)
    except Exception as error:  # of the model's own code
        raise UserError(f"base {base!r}: transformers does not load it ({reason(error)}): use another base") from None
    if shapes := sorted(found["mismatched_keys"]):
        name, *sizes = shapes[0]
        raise UserError(
            f"base {base!r}: {name} has the shape {tuple(sizes[0])}, by its config.json {tuple(sizes[1])}: fetch "
            "config and weights of the same model"
        )
    if lacking := sorted(found["missing_keys"]):
        raise UserError(
            f"base {base!r}: {_some(lacking)} not in its weights, and would be random: fetch config and weights of the "
            "same model"
        )
    if spare := sorted(found["unexpected_keys"]):
        log.warning("base: transformers does not read %s: left out of what is trained", _some(spare, "are"))


def _some(names: list[str], verb: str = "is") -> str:
    more = f" and {len(names) - 1:,} more" if names[1:] else ""
    return f"{names[0]}{more}" if verb == "are" else f"{names[0]}{more} {'are' if more else 'is'}"


def card(path: Path) -> dict[str, Any]:
    """The YAML between the two lines of dashes that open a model card; nothing if it is no such card."""
    try:
        with path.open(encoding="utf-8") as file:
            opening, _, rest = file.read(MOST_CHARACTERS).partition("---\n")
        loaded = plain_yaml(rest.partition("\n---")[0]) if not opening.strip() else None
    except (OSError, ValueError, UserError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
