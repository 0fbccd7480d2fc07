"""What is trained: a LoRA on the layers, and the embeddings of tokens that were added for the chat template."""

from typing import Any

from pipeline import Recipe

MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
MAMBA_LAYERS = ("out_proj", "conv1d")


def lora_config(recipe: Recipe, model: Any, added: list[int]) -> Any:
    """PEFT's configuration; `added` are the ids of tokens that the base never saw.

    Their rows of the input embedding are trained, and of the output embedding where it is a matrix of its own; PEFT
    keeps tied ones tied (`trainable_token_indices`).
    """
    from peft import LoraConfig

    lora = recipe.train.lora
    targets = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    embeddings = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        embeddings.append(model.get_output_embeddings())
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in embeddings]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=read_past_adapters(model.config) if targets == "all-linear" else None,
        trainable_token_indices={name: added for name in names} if added else None,
    )


def read_past_adapters(config: Any) -> list[str] | None:
    """Linear layers whose weights the kernels of Mamba read past an adapter, which PEFT therefore refuses."""
    return list(MAMBA_LAYERS) if config.get_text_config().model_type in MAMBA else None
