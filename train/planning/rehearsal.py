"""The forward half of a training step on tensors without data: what it keeps for the backward half, to the byte."""

import copy
import weakref
from dataclasses import dataclass
from typing import Any

from recipe import Recipe
from train.planning.architecture import on_meta

FEW, MORE = 4, 8  # layers that are rehearsed; the others are like the last of these


@dataclass(frozen=True)
class Rehearsal:
    """What one step of one device holds beside weights, gradients and optimizer; `trained` are weights."""

    trained: int
    whole_bytes: int  # at the peak, where every layer is kept and the loss's gradient is there
    layer_bytes: int  # of one layer
    depth: int
    inputs_bytes: int  # the layers' inputs, which checkpointing keeps instead of the layers

    def bytes(self, checkpointing: bool) -> int:
        """At the peak: all layers, or their inputs and the one that is being recomputed."""
        if not checkpointing:
            return self.whole_bytes
        return max(0, self.whole_bytes - self.depth * self.layer_bytes) + self.inputs_bytes + self.layer_bytes


def rehearse(config: Any, recipe: Recipe | None, tokens: int, supervised: int, autocast: bool, dtype: str) -> Rehearsal:
    """Run a model of `config` over a row of `tokens` of which `supervised` get logits; no recipe trains every weight.

    `dtype` is that of the weights, `autocast` multiplies in bfloat16. The model is built by transformers and PEFT as
    training builds it, so any architecture counts as it is; only the fused attention of the processor stands for that
    of a GPU, which keeps the same tensors.
    """
    depth = config.get_text_config().num_hidden_layers
    few, more = min(FEW, depth), min(MORE, depth)
    if few == more:  # layers cannot be told from the head: with so few of them the head is nearly all
        few = max(1, depth // 2)
    trained, peak = _step(_shortened(config, more), recipe, tokens, supervised, autocast, dtype)
    trained_few, peak_few = _step(_shortened(config, few), recipe, tokens, supervised, autocast, dtype)
    layers = max(1, more - few)
    layer, trained_layer = (peak - peak_few) / layers, (trained - trained_few) / layers
    width = 4 if dtype == "float32" else 2
    return Rehearsal(
        trained=round(trained + trained_layer * (depth - more)),
        whole_bytes=round(peak + layer * (depth - more)),
        layer_bytes=round(layer),
        depth=depth,
        inputs_bytes=width * depth * tokens * config.get_text_config().hidden_size,
    )


def _step(
    config: Any, recipe: Recipe | None, tokens: int, supervised: int, autocast: bool, dtype: str
) -> tuple[int, int]:
    """(trained weights, bytes at the peak, where the loss's gradient is there and nothing is freed)."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.functional import cross_entropy

    model = on_meta(config, dtype)
    if recipe:
        from peft import get_peft_model

        from train.adapter import lora_config

        model = get_peft_model(model, lora_config(recipe, model, []))
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fake_weights(model)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        mask = torch.ones(1, tokens, dtype=torch.long)
        with _held_bytes()(model) as held:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                fields = {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "attention_mask": mask}
                logits = model(**fields, use_cache=False, logits_to_keep=supervised).logits.flatten(0, 1)
                loss = cross_entropy(logits.float(), ids[0, :supervised], reduction="sum")
            torch.autograd.grad(loss, logits)
    return sum(weights.numel() for weights in model.parameters() if weights.requires_grad), held.peak


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
