"""What is trained of a model: all of it, or an adapter by one of PEFT's configurations."""

from dataclasses import dataclass
from typing import Any

from pipeline import Recipe, Run
from pipeline.files import fresh_folder, put_in_place
from pipeline.model import Trained, copy_settings, load_base
from train.launch import SHARED, is_launched

MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
MAMBA_LAYERS = ("out_proj", "conv1d")


@dataclass(frozen=True)
class Tuner:
    """`config` are PEFT's settings beside LoRA's own, None where every weight is trained.

    Args:
        four_bits: the frozen base lies in 4 bits while its adapter is trained.
        mergeable: the adapter can become part of the base's weights.
    """

    config: dict[str, Any] | None
    four_bits: bool = False
    mergeable: bool = True


TUNERS = {
    "full": Tuner(None),
    "lora": Tuner({}),  # arXiv 2106.09685
    "qlora": Tuner({}, four_bits=True),  # arXiv 2305.14314
    "dora": Tuner({"use_dora": True}),  # arXiv 2402.09353
    "rslora": Tuner({"use_rslora": True}),  # arXiv 2312.03732
}


def base_to_train(recipe: Recipe, run: Run) -> Any:
    """The run's base as its tuner needs it, before anything is added to it."""
    tuner = TUNERS[recipe.train.tuner]
    shared = is_launched() and recipe.launch.strategy in SHARED
    return load_base(recipe, run, frozen=tuner.config is not None, four_bits=tuner.four_bits, shared=shared)


def model_to_train(recipe: Recipe, run: Run) -> Any:
    """The run's base with what its tuner adds, which begins as random numbers of the recipe's seed."""
    from transformers import set_seed

    base, added = base_to_train(recipe, run), run.receipt("base").metrics.get("added_tokens", {})
    set_seed(recipe.seed)
    return wrap(recipe, base, list(added.values()))


def wrap(recipe: Recipe, model: Any, added: list[int]) -> Any:
    """The model as it is trained; `added` are the ids of tokens that the base never saw.

    Beside an adapter their rows of the input embedding are trained, and of the output embedding where it is a matrix of
    its own; PEFT keeps tied ones tied (`trainable_token_indices`).
    """
    tuner = TUNERS[recipe.train.tuner]
    if tuner.config is None:
        return model
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from train.lora import FusedLinear

    lora = recipe.train.lora
    targets = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    embeddings = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        embeddings.append(model.get_output_embeddings())
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in embeddings]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it only divides by it
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layers are transposed
        exclude_modules=read_past_adapters(model.config) if targets == "all-linear" else None,
        trainable_token_indices={name: added for name in names} if added else None,
        **tuner.config,
    )
    if not tuner.four_bits:  # whose layers are of torch's class too
        config._register_custom_module({torch.nn.Linear: FusedLinear})
    return get_peft_model(model, config)


def read_past_adapters(config: Any) -> list[str] | None:
    """Linear layers whose weights the kernels of Mamba read past an adapter, which PEFT therefore refuses."""
    return list(MAMBA_LAYERS) if config.get_text_config().model_type in MAMBA else None


def save(recipe: Recipe, model: Any, run: Run, weights: dict[str, Any] | None = None) -> None:
    """Write `trained/`: the adapter, or the weights with all that a model folder has; `kind.json` says which.

    Args:
        weights: by name, where several processes share the model's.
    """
    tuner, folder = TUNERS[recipe.train.tuner], fresh_folder(run.path(".trained.tmp"))
    if tuner.config is None:
        copy_settings(run.path("base"), folder)
        model.config.use_cache = True  # the trainer switched it off
    else:
        config = model.peft_config["default"]
        config.base_model_name_or_path = str(run.path("base"))
        config.target_modules = sorted(config.target_modules)  # a set: each process would write it in another order
    if weights:  # gathered, tied ones lie there twice
        tied = getattr(model, "all_tied_weights_keys", {})
        weights = {name: values for name, values in weights.items() if name not in tied}
    model.save_pretrained(folder, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    kind = "weights" if tuner.config is None else "adapter"
    Trained(kind, recipe.train.tuner, tuner.mergeable).write(folder)
    put_in_place(folder, run.path("trained"))
