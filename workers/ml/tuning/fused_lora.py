"""A linear layer with its LoRA factors as one operation instead of five.

PEFT computes `base(x) + B(A(x)) * scaling` as separate steps, each of which writes a tensor as large as the layer's
output, forwards and backwards. Here the small product is added inside the matrix multiplication, and the backward
pass reuses what it has. The mathematics is the same; only the order of rounding differs.

Knows: plain LoRA without dropout on `nn.Linear`.
Refuses to know: everything else (it leaves PEFT's own forward in place there), and when to be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.nn import functional

Forward = Callable[..., Tensor]


class _FusedLora(torch.autograd.Function):
    """y = x W^T + bias + scaling * (x A^T) B^T, with gradients for x, A and B. W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        a, b = a.to(x.dtype), b.to(x.dtype)  # bf16 arithmetic over a bf16 base; the fp32 originals get the gradient
        hidden = flat @ a.t()  # (tokens, rank)
        out = functional.linear(flat, weight, bias).addmm_(hidden, b.t(), alpha=scaling)  # (tokens, out)
        ctx.save_for_backward(flat, weight, a, b, hidden)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, hidden = ctx.saved_tensors
        out = gradients[0].reshape(-1, weight.shape[0])  # (tokens, out)
        inner = (out @ b).mul_(ctx.scaling)  # (tokens, rank)
        for_a = (inner.t() @ flat).float()
        for_b = (out.t() @ hidden).mul_(ctx.scaling).float()
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = (out @ weight).addmm_(inner, a).view(*gradients[0].shape[:-1], flat.shape[1])
        return for_x, None, None, for_a, for_b, None


def fused_forwards(model: PeftModel) -> list[tuple[torch.nn.Module, Forward]]:
    """For every layer that allows it: the layer and its fused forward."""
    return [
        (module, _fused(module, module.active_adapters[0]))
        for module in model.modules()
        if isinstance(module, LoraLinear) and _is_plain(module)
    ]


@contextmanager
def fused(forwards: list[tuple[torch.nn.Module, Forward]]) -> Iterator[None]:
    """Use the fused forwards for a while; PEFT's own come back whatever happens."""
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            del module.forward  # the class's own method shows again


def _is_plain(module: LoraLinear) -> bool:
    adapters = module.active_adapters
    return (
        len(adapters) == 1
        and adapters[0] in module.lora_A
        and adapters[0] not in module.lora_variant
        and type(module.base_layer) is torch.nn.Linear
        and isinstance(module.lora_dropout[adapters[0]], torch.nn.Identity)
        and module.lora_A[adapters[0]].bias is None
        and module.lora_B[adapters[0]].bias is None
    )


def _fused(module: LoraLinear, adapter: str) -> Forward:
    base, a, b = module.base_layer, module.lora_A[adapter], module.lora_B[adapter]
    plain: Forward = type(module).forward.__get__(module)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if module.disable_adapters or module.merged or args or kwargs:
            return plain(x, *args, **kwargs)
        # torch declares `apply` without types.
        result: Tensor = _FusedLora.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, a.weight, b.weight, module.scaling[adapter]
        )
        return result

    return forward
