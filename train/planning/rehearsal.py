"""A training step on tensors without data: what it keeps beside weights, gradients and optimizer, to the byte."""

import copy
import logging
import weakref
from dataclasses import dataclass
from typing import Any

from pipeline import Recipe, UserError
from pipeline.error import reason
from pipeline.model import on_meta

log = logging.getLogger("truetune")
ALIKE, TURNS = (1, 2), (4, 8)  # layers that are rehearsed where all are alike, and where they take turns
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # which keep the same tensors


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
