"""A frozen matrix with LoRA's beside it, multiplied without a pass over the activations but for the products.

PEFT scales and adds in passes of their own, forward and backward, which took a tenth of a step on a processor.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear


class FusedLinear(Linear):
    """PEFT's layer, whose products are one function of autograd where they are plain: one adapter, one number type."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fan_in_fan_out = False  # GPT-2's own layers lie transposed, its head does not

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., in) to (..., out)."""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        [name] = self.active_adapters
        frozen, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        found: torch.Tensor = Product.apply(x, frozen.weight, frozen.bias, down, up, self.scaling[name])
        return found

    def _is_plain(self, x: torch.Tensor) -> bool:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or len(self.active_adapters) != 1 or names[0] in self.lora_variant:
            return False
        dropout, down, up = self.lora_dropout[names[0]], self.lora_A[names[0]], self.lora_B[names[0]]
        weight = self.base_layer.weight
        return (
            type(self.base_layer) is torch.nn.Linear
            and not weight.requires_grad
            and not (self.training and isinstance(dropout, torch.nn.Dropout))
            and up.bias is None
            and not isinstance(down.weight, DTensor)
            and x.dtype == weight.dtype == down.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )


class Product(torch.autograd.Function):
    """x W' + b + s (x A') B' of LoRA (arXiv 2106.09685), for a frozen W and b; `x` is (..., in)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        within = (rows @ down.T).mul_(scale)
        ctx.save_for_backward(rows, within, weight, down, up)
        ctx.scale = scale
        return linear(rows, weight, bias).addmm_(within, up.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, within, weight, down, up = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        inner = (flat @ up).mul_(ctx.scale)
        of_x = (flat @ weight).addmm_(inner, down).view(*gradient.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return of_x, None, None, inner.T @ rows, flat.T @ within, None
