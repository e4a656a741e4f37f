"""Operations whose backward pass is a relevance rule; the forward pass is the model's own, to the bit.

`g` is the modified gradient: the relevance of x is x·g (Arras et al. 2025, section 3). Every class has a naive twin in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Identity(Function):
    """y = f(x), element by element, with f(0) = 0: R_x = R_y, so g_x = f(x) / x · g_y, and f'(0) · g_y at 0.

    Achtibat et al. 2024, equation 9. A quotient of denormal numbers is not trusted: below the smallest normal number the slope stands in.
    The quotient is kept, not x and y: the model may write into either.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor], slope: float) -> Tensor:
        y = f(x)
        ctx.save_for_backward(quotient(x, y, slope))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return g * ratio, None, None


class Power(Function):
    """The identity rule for y = xⁿ with n ≥ 1, whose quotient y / x is the power below, at 0 too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], exponent: float) -> Tensor:
        ctx.save_for_backward(x.clone() if exponent == 2 else x.pow(exponent - 1))
        return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return g * ratio, None, None


class Settled(Function):
    """The identity rule for a value that was already computed: y belongs to x as f(x) does, whatever code made it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(quotient(x, y, slope))
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return g * ratio, None, None


def quotient(x: Tensor, y: Tensor, slope: float) -> Tensor:
    """y / x, and the slope where x is nothing."""
    smallest = torch.finfo(x.dtype).tiny
    if x.device.type == "cpu" and x.numel() and bool(x.abs().min() >= smallest):  # to ask costs less than to choose
        return y / x
    tiny = x.abs() < smallest
    return torch.where(tiny, slope, y / torch.where(tiny, 1.0, x))


class LayerNorm(Function):
    """(x - mean) / σ · γ + β with σ held fixed: centring and γ are linear, β absorbs ⟨β, g⟩ (Achtibat et al. 2024, Proposition 3.4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, _, inverse = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(inverse, weight)
        ctx.dims = tuple(range(x.dim() - len(shape), x.dim()))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, weight = ctx.saved_tensors
        scaled = (g if weight is None else g * weight) * inverse
        return (scaled - scaled.mean(ctx.dims, keepdim=True)).to(g.dtype), None, None, None, None


class RootMeanSquare(Function):
    """x / rms(x) · γ with the root mean square held fixed: linear, nothing is absorbed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], dims: tuple[int, ...], weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward((at_least_float32(x).square().mean(dims, keepdim=True) + eps).rsqrt(), weight)
        return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, weight = ctx.saved_tensors
        return ((g if weight is None else g * weight) * inverse).to(g.dtype), None, None, None, None


class GroupNorm(Function):
    """Layer normalisation over groups of channels of [N, C, …], σ held fixed. Instance normalisation has a group for each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], groups: int, weight: Tensor | None, eps: float) -> Tensor:
        variance = at_least_float32(x).reshape(x.shape[0], groups, -1).var(-1, unbiased=False, keepdim=True)
        ctx.save_for_backward((variance + eps).rsqrt(), weight)
        ctx.groups = groups
        return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, weight = ctx.saved_tensors
        scaled = g if weight is None else g * weight.reshape(1, -1, *([1] * (g.dim() - 2)))
        grouped = scaled.reshape(g.shape[0], ctx.groups, -1) * inverse
        return (grouped - grouped.mean(-1, keepdim=True)).reshape(g.shape).to(g.dtype), None, None, None, None


def at_least_float32(x: Tensor) -> Tensor:
    """Squares of half-precision numbers overflow."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Tempered(Function):
    """A softmax with the Jacobian diag(p) - p pᵀ of the probabilities at another temperature, which spreads saturated gradients.

    Edin et al. 2025, section 4.1; the inner derivative 1 / T is left out, as in the authors' own code.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], dim: int, temperature: float) -> Tensor:
        y = run(x)
        ctx.save_for_backward((x / temperature).softmax(dim))
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (p,) = ctx.saved_tensors
        return p * (g - (p * g).sum(ctx.dim, keepdim=True)), None, None, None


class Scaled(Function):
    """x itself, with its gradient multiplied by a number: the share of one factor in a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.detach()  # no view to autograd, which would forbid the model to write into x afterwards

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g if ctx.share == 1 else g * ctx.share, None


class Replaced(Function):
    """The number of one tensor with the gradient of another that equals it up to rounding."""

    @staticmethod
    def forward(ctx: Any, follows: Tensor, shown: Tensor) -> Tensor:
        return shown.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class Noted(Function):
    """A constant that stands beside data: its gradient is shown to the books. The anchor ties it to a part of the graph that is walked."""

    @staticmethod
    def forward(ctx: Any, constant: Tensor, anchor: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        ctx.note = note
        return constant.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None]:
        ctx.note(g)
        return None, None, None
