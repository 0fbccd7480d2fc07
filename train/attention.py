"""Attention of packed rows on a processor: each conversation by itself, so that none is multiplied with another.

A mask over the whole row costs the square of its length, of which conversations are a small part.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_of_each_conversation"


def attend_apart(model: Any) -> None:
    """Let a model on a processor, whose attention is torch's own, compute the conversations of a packed row apart."""
    config = model.config.get_text_config()
    known = {*(getattr(config, "layer_types", None) or ())} <= {"full_attention", "sliding_attention"}
    usual = model.device.type == "cpu" and config._attn_implementation == "sdpa" and known
    if usual and model._can_set_attn_implementation():  # else it warns, and leaves it
        model.set_attn_implementation(NAME)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' `sdpa` gives, of a row whose conversations begin at `cu_seq_lens_q`.

    Args:
        query: (1, heads, time, width); keys and values may have fewer heads.

    Returns:
        (1, time, heads, width), and no weights.
    """
    lengths = _lengths(cu_seq_lens_q) if cu_seq_lens_q is not None else []
    window = more.get("sliding_window") or getattr(module.config, "sliding_window", None) or query.shape[2]
    if (
        sum(lengths) != query.shape[2]
        or query.shape != (1, query.shape[1], key.shape[2], query.shape[3])
        or max(lengths) > window
        or not getattr(module, "is_causal", True)
        or more.keys() & {"softcap", "position_bias", "cache"}
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    key, value = (repeat_kv(each, query.shape[1] // each.shape[1]) for each in (key, value))
    parts = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    found = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True) for q, k, v in parts
    ]
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def _lengths(bounds: torch.Tensor) -> list[int]:
    """Of each conversation; neighbours of one token, as padding is, are taken together: they have nothing to learn."""
    found: list[int] = []
    single = False
    for length in bounds.diff().tolist():
        if length == 1 and single:
            found[-1] += 1
        else:
            found.append(length)
        single = length == 1
    return found


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
