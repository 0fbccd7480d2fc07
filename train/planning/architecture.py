"""What a base model is made of, from its config alone: counts of weights, without one of them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.files import read_object
from train.packaged import PACKAGED, RANDOM, packaged_gguf, random_config
from train.reach import without_waiting

# Configs name a mixture's experts, and those that one token meets, in several ways.
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk", "moe_top_k")
MOST = {"num_hidden_layers": 1000, "hidden_size": 2**17, "vocab_size": 2**22, "num_attention_heads": 2**12}
MEND = "mend its config.json or use another base"
NOT_GENERATING = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification")


@dataclass(frozen=True)
class Architecture:
    """Numbers of weights by what becomes of them; `width` is a layer's hidden size, `depth` the layers."""

    parameters: int
    active: int  # that one token meets: of a mixture's experts only its own
    linear: int  # in the linear layers between embedding and head, which QLoRA keeps in 4 bits
    largest: int  # in the largest of these
    experts: int  # of a mixture, where they are fused to one tensor a layer, which bitsandbytes leaves as they are
    head: int  # of the output head, multiplied only where the assistant speaks
    looked_up: int  # of the embedding, which nothing multiplies; 0 where the head is tied to it
    depth: int
    width: int
    vocabulary: int


def read_config(recipe: Recipe, run: Run) -> Any:
    """transformers' config of the recipe's base; of a Hub id no other file is fetched.

    Raises:
        UserError: the base is unknown, out of reach, of an unknown kind, or does not generate text.
    """
    made, named = run.find_receipt("base"), Path(recipe.base_model)
    if made and made.recipe.get("base_model") == recipe.base_model and run.path("base", "config.json").is_file():
        return config_in(run.path("base"), recipe.base_model)
    if recipe.base_model in (RANDOM, PACKAGED) or (named.suffix == ".gguf" and named.is_file()):
        return config_named(recipe.base_model)
    return config_in(named if named.is_dir() else _config_of_hub(recipe.base_model), recipe.base_model)


def config_named(name: str) -> Any:
    """transformers' config of a base that is no folder: the random one, the packaged one or a GGUF file.

    Raises:
        UserError: the file is no whole GGUF, or no model that generates text.
    """
    from train.planning.gguf_config import gguf_config

    with _understood(name):
        if name == RANDOM:
            return random_config(gguf_config(packaged_gguf()).vocab_size)
        config = gguf_config(packaged_gguf() if name == PACKAGED else Path(name))
    return _checked(config, name)


def config_in(folder: Path, name: str) -> Any:
    """transformers' config of the base `name`, whose config.json lies in `folder`.

    Raises:
        UserError: it is not there, not understood, or of a model that does not generate text.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json, by which a model is planned: name a model's folder")
    read_object(folder / "config.json")
    with _understood(name):
        # A config may name code of its own; it is never run, and most such models are known without it.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return _checked(config, name)


@contextmanager
def _understood(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever class of config a stranger's file names
        raise UserError(f"base {name!r}: its config is not understood ({reason(error)}): {MEND}") from None


def _checked(config: Any, name: str) -> Any:
    """The config, if it is of a model that can be and that generates text."""
    from transformers import PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if absurd := _absurd(config.get_text_config()):
        raise UserError(f"base {name!r}: its config has {absurd}: {MEND}")
    kinds = [str(kind) for kind in config.architectures or ()]
    generates = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not any(k.endswith(NOT_GENERATING) for k in kinds)
    if not generates or not isinstance(config, PretrainedConfig):
        raise UserError(
            f"base {name!r} is a {config.model_type} ({', '.join(kinds) or 'no architecture named'}), which "
            "does not generate text: use a base whose architecture ends with ForCausalLM"
        )
    return config


def architecture(config: Any) -> Architecture:
    """Counts of the very model that transformers would build, on the meta device, where tensors have no data."""
    import torch
    from transformers.pytorch_utils import Conv1D

    model = on_meta(config)
    text = config.get_text_config()
    sizes = {name: weights.numel() for name, weights in model.named_parameters()}  # tied ones once
    output = model.get_output_embeddings()
    head = output.weight.numel() if output is not None else 0
    embedding = model.get_input_embeddings().weight
    tied = output is not None and output.weight is embedding
    linear = [
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
    ]
    routed = {name: size for name, size in sizes.items() if re.search(r"\bexperts\.", name)}
    places = (text, getattr(text, "ffn_config", None))
    count, chosen = (next((int(value) for of in places for name in names if (value := getattr(of, name, None))), 0)
                     for names in (EXPERTS, CHOSEN))  # fmt: skip
    asleep = sum(routed.values()) * (count - chosen) // count if count else 0
    return Architecture(
        parameters=sum(sizes.values()),
        active=sum(sizes.values()) - asleep,
        linear=sum(linear),
        largest=max(linear, default=0),
        experts=sum(size for name, size in routed.items() if not name.endswith(".weight")) if count else 0,
        head=head,
        looked_up=0 if tied else embedding.numel(),
        depth=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
    )


def on_meta(config: Any, dtype: str = "float32") -> Any:
    """The model of a config, on the meta device.

    Raises:
        UserError: transformers cannot build it from this config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except Exception as error:  # of the model's own code
        raise UserError(f"a {config.model_type} cannot be built from its config ({reason(error)}): {MEND}") from None


def reason(error: Exception) -> str:
    """What a library says in its last line, short enough for a message of one line."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return said[-1][:200] if said else type(error).__name__


def _absurd(text: Any) -> str:
    """What no model can have, as `key=value`, or nothing."""
    for key, most in MOST.items():
        value = getattr(text, key, None)
        if value is not None and not (isinstance(value, int) and 1 <= value <= most):
            return f"{key}={value!r}, where 1 to {most:,} are known"
    heads = getattr(text, "num_attention_heads", None) or 1
    groups = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(groups, int) or groups < 1 or heads % groups:
        return f"num_key_value_heads={groups!r}, which does not divide num_attention_heads={heads}"
    return ""


def _config_of_hub(name: str) -> Path:
    """The folder of a Hub model's config.json, the one file that is fetched."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    without_waiting(HfApi.model_info, repository, revision or None)
    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision or None)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"base {name!r}: its config.json cannot be fetched ({str(error).strip().splitlines()[0]}): check the name "
            f"and the network, for gated models set HF_TOKEN, or use base_model: {PACKAGED}"
        ) from None
