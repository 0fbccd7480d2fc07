"""What a model is made of, and what training and serving it hold and compute, from its config alone.

The formulas are those of the papers, in bytes and FLOPs. What a step keeps beside weights, gradients and optimizer is
rehearsed on tensors without data, to the byte.
"""

import copy
import logging
import re
import weakref
from dataclasses import dataclass
from typing import Any

from pipeline import Recipe, UserError
from pipeline.error import reason
from pipeline.model import on_meta

# Configs name a mixture's experts, and those that one token meets, in several ways.
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk", "moe_top_k")
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight, a scale for 64 of them, a scale for 256 scales (QLoRA, section 3)
ADAM_BYTES = 8  # two moments in float32
STEP_TUNERS = ("full", "lora", "qlora")
ALIKE, TURNS = (1, 2), (4, 8)  # layers that are rehearsed where all are alike, and where they take turns
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # which keep the same tensors

log = logging.getLogger("truetune")


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


@dataclass(frozen=True)
class Rehearsal:
    """What one step of one device has; `trained` are weights, `bytes` its peak without gradients of weights."""

    trained: int
    bytes: int


def rehearse(
    config: Any,
    recipe: Recipe | None,
    tokens: int,
    supervised: int,
    autocast: bool,
    dtype: str,
    checkpointing: bool = False,
) -> Rehearsal:
    """Run a model of `config` forward and back over a row of `tokens` of which `supervised` get logits; no recipe
    trains every weight.

    `dtype` is that of the weights, `autocast` multiplies in bfloat16. The model is built by transformers and PEFT as
    training builds it, so any architecture counts as it is; only the fused attention of the processor stands for that
    of a GPU, which keeps the same tensors.

    Raises:
        UserError: transformers cannot build it.
    """
    depth = config.get_text_config().num_hidden_layers
    few, more = (min(layers, depth) for layers in (ALIKE if _alike(config) else TURNS))
    if few == more:  # layers cannot be told from the head: with so few of them the head is nearly all
        few = max(1, depth // 2)
    row = (tokens, supervised, autocast, dtype, checkpointing)
    try:
        trained, *peaks = _step(_shortened(config, more), recipe, *row)
        trained_few, *peaks_few = _step(_shortened(config, few), recipe, *row)
    except UserError:
        raise
    except Exception as error:  # of a model's code that looks at its tensors' values
        log.warning("a %s cannot be rehearsed (%s): its activations are by formula", config.model_type, reason(error))
        return _by_formula(config, recipe, *row)
    layers = max(1, more - few)
    layer = [(peak - peak_few) / layers for peak, peak_few in zip(peaks, peaks_few, strict=True)]
    return Rehearsal(
        trained=round(trained + (trained - trained_few) / layers * (depth - more)),
        bytes=round(max(peak + each * (depth - more) for peak, each in zip(peaks, layer, strict=True))),
    )


def fused(config: Any) -> Any:
    """A copy of the config for a GPU, whose attention drops out in its kernel; the processor's keeps scores."""
    same = copy.deepcopy(config)
    for name in ("attention_dropout", "attn_pdrop", "attn_dropout"):
        if getattr(same.get_text_config(), name, None):
            setattr(same.get_text_config(), name, 0.0)
    return same


def _alike(config: Any) -> bool:
    """Whether all layers are of one kind, as far as a config tells."""
    text = config.get_text_config()
    depth = text.num_hidden_layers
    kinds = [set(map(str, value)) for value in vars(text).values() if isinstance(value, list) and len(value) == depth]
    turns = ("first_k_dense_replace", "decoder_sparse_step", "interleave_moe_layer_step", "attn_layer_period")
    return all(len(kind) == 1 or kind <= ATTENTION for kind in kinds) and not any(
        (getattr(text, name, None) or 0) > 1 for name in turns
    )


def _step(
    config: Any,
    recipe: Recipe | None,
    tokens: int,
    supervised: int,
    autocast: bool,
    dtype: str,
    checkpointing: bool,
) -> tuple[int, int, int]:
    """(trained weights, bytes at the peak up to the loss's gradient, and after it, each weight's gradient let go)."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.functional import cross_entropy

    model = _adapted(on_meta(config, dtype), recipe)
    if checkpointing and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fake_weights(model)
        for weights in model.parameters():
            if weights.requires_grad:
                weights.register_post_accumulate_grad_hook(lambda weights: setattr(weights, "grad", None))
        ids = torch.zeros(1, tokens, dtype=torch.long)
        mask = torch.ones(1, tokens, dtype=torch.long)
        with _held_bytes()(model) as held:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                fields = {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "attention_mask": mask}
                logits = model(**fields, use_cache=False, logits_to_keep=supervised).logits.flatten(0, 1)
                loss = cross_entropy(logits.float(), ids[0, :supervised], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, logits)
            forward, held.peak = held.peak, held.now
            del loss
            logits.backward(gradient)
    return _trained(model), forward, held.peak


def _by_formula(
    config: Any, recipe: Recipe | None, tokens: int, supervised: int, autocast: bool, dtype: str, checkpointing: bool
) -> Rehearsal:
    """34 bytes a layer for each token and each of its width in 16 bits (arXiv 2205.05198, equation 2 without scores),
    checkpointed 2 of them and one layer; logits in 16 bits, in float32 and their gradient."""
    text = config.get_text_config()
    state = tokens * text.hidden_size * (2 if dtype == "float32" and not autocast else 1)
    layers = 2 * text.num_hidden_layers + 34 if checkpointing else 34 * text.num_hidden_layers
    trained = _trained(_adapted(on_meta(config, dtype), recipe))
    return Rehearsal(trained, state * layers + 10 * supervised * text.vocab_size)


def _adapted(model: Any, recipe: Recipe | None) -> Any:
    """The model as the recipe's tuner trains it, or itself."""
    if not recipe:
        return model
    from train.tuners import wrap

    return wrap(recipe, model, [])


def _trained(model: Any) -> int:
    return sum(weights.numel() for weights in model.parameters() if weights.requires_grad)


def _shortened(config: Any, depth: int) -> Any:
    """A copy of the config with its first layers only."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):  # layer_types and the like
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return short


def _fake_weights(model: Any) -> None:
    """Put weights that a FakeTensorMode knows in place of the meta device's, tied ones still tied."""
    import torch

    fakes: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, real in held.items():
                if real is None:
                    continue
                if id(real) not in fakes:
                    fake = torch.empty(real.shape, dtype=real.dtype)
                    trained = real.requires_grad
                    fakes[id(real)] = torch.nn.Parameter(fake, trained) if held is module._parameters else fake
                held[name] = fakes[id(real)]


def _held_bytes() -> Any:
    """A mode of torch that sums the storages that are alive, the model's own left out."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class HeldBytes(TorchDispatchMode):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.now = self.peak = 0
            self.own = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
            self.alive: dict[int, int] = {}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if hasattr(tensor, "untyped_storage"):
                    storage = tensor.untyped_storage()
                    if id(storage) not in self.alive and id(storage) not in self.own:
                        self.alive[id(storage)] = storage.nbytes()
                        self.now += storage.nbytes()
                        self.peak = max(self.peak, self.now)
                        weakref.finalize(storage, self._free, id(storage))
            return made

        def _free(self, key: int) -> None:
            self.now -= self.alive.pop(key)

    return HeldBytes
