"""What a model is made of, and what training and serving it hold and compute: counts, from its config alone.

The formulas are those of the papers, in bytes and FLOPs.
"""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.model import on_meta

# Configs name a mixture's experts, and those that one token meets, in several ways.
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk", "moe_top_k")
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight, a scale for 64 of them, a scale for 256 scales (QLoRA, section 3)
ADAM_BYTES = 8  # two moments in float32
STEP_TUNERS = ("full", "lora", "qlora")


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


def state_bytes(
    parameters: int, trained: int, linear: int, tuner: str, width: int, devices: int = 1, zero: int = 0
) -> dict[str, float]:
    """Bytes a device of weights, gradients and optimizer; `width` is bytes a weight, `zero` the stage of ZeRO.

    A full tuning has 16 bytes a weight: 2 + 2 + 12 in mixed precision, whose optimizer keeps a float32 copy, or 4 + 4
    + 8 in float32 (ZeRO, arXiv 1910.02054, section 3.1). An adapter's weights are float32, the base below them is
    frozen. Stage 1 spreads the optimizer over the devices, 2 the gradients too, 3 the weights too.
    """
    weights: float
    if tuner == "full":
        weights, gradients, optimizer = width * parameters, width * parameters, (16 - 2 * width) * parameters
    else:
        frozen = NF4_BITS / 8 * linear + width * (parameters - linear) if tuner == "qlora" else width * parameters
        weights, gradients, optimizer = frozen + 4 * trained, 4 * trained, ADAM_BYTES * trained
    shares = [devices if zero >= stage else 1 for stage in (3, 2, 1)]
    return {
        "weights": weights / shares[0],
        "gradients": gradients / shares[1],
        "optimizer": optimizer / shares[2],
    }


def whole_bytes(of: Architecture, weights: float, tuner: str, width: int, zero: int) -> float:
    """Weights that a device has whole for a moment, of a model whose weights together have `weights` bytes.

    By ZeRO stage 3 that of the part that computes and of the next one, a layer or the head; by QLoRA a layer's largest
    matrix, which bitsandbytes expands to multiply.
    """
    part = max((of.parameters - of.head - of.looked_up) // of.depth, of.head)
    gathered = 2 * part * weights / of.parameters if zero == 3 else 0
    return gathered + (width * of.largest if tuner == "qlora" else 0)


def checkpoint_bytes(parameters: int, trained: int, tuner: str, width: int) -> int:
    """One checkpoint: an adapter with its optimizer, or all weights with the float32 copy where there is one."""
    if tuner == "full":
        return (width + (4 if width == 2 else 0) + ADAM_BYTES) * parameters
    return (4 + ADAM_BYTES) * trained


def cache_bytes(config: object, tokens: int, width: int = 2, whole: bool = False) -> int:
    """Keys and values of one conversation of `tokens`; layers with a window keep no more than it, unless `whole`.

    A state, which does not grow, is left out.
    """
    text = config.get_text_config()  # type: ignore[attr-defined]
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:  # Mamba
        return 0
    groups = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        groups = 1
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    values = 2 * groups * head
    if latent := getattr(text, "kv_lora_rank", None):  # of multi-head latent attention, which llama.cpp caches so
        values = latent + text.qk_rope_head_dim
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = tokens if whole else getattr(text, "sliding_window", None) or tokens
    kept = {"full_attention": tokens, "sliding_attention": min(window, tokens)}
    return sum(kept.get(kind, 0) for kind in kinds) * values * width


def token_flops(of: Architecture, attended: float, supervised: float) -> float:
    """FLOPs of one token's forward pass, `attended` tokens being before it, a share `supervised` getting logits.

    2 a weight that multiplies, and 2 a layer for each token attended to and each of its width (arXiv 2001.08361, 2.1).
    """
    multiplied = of.active - of.looked_up - of.head + supervised * of.head
    return 2 * multiplied + 2 * of.depth * attended * of.width


def training_flops(forward: float, tuner: str, checkpointing: bool) -> float:
    """A training step's FLOPs: backward costs as much again for the inputs, and again for weights where they train."""
    return forward * ((3 if tuner == "full" else 2) + checkpointing)
