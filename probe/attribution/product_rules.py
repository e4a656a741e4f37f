"""Linear maps, and products of data with data: what is shared among factors, and what a bias absorbs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headscope.probe.attribution import functions, rules
from headscope.probe.attribution.booking import Booking, Rule
from headscope.probe.attribution.calls import base, in_place, leading, share, tensors_in
from headscope.probe.attribution.ledger import on_gradient
from headscope.probe.interception.tape import base_name


def product(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product of n data-dependent factors gives each 1/n of its relevance."""
    tensors = list(tensors_in((*args, *kwargs.values())))
    count = sum(tensor.requires_grad for tensor in tensors)
    table = next((t for t in tensors if mode.angles.get(t)), None) if count == 1 and mode.angles else None
    if table is not None and not in_place(name):
        result = func(*(share(a, 0.5) for a in args), **{key: share(value, 0.5) for key, value in kwargs.items()})
        mode.book_position(name, result, table, 0.5)
        return result
    if count < 2 or not mode.rules.split:
        return mode.linear(func, name, args, kwargs)
    if in_place(name):
        result = func(*args, **kwargs)
        on_gradient(result, lambda g: g / count)
        return result
    if outgrows(name, args):
        return func(*(share(a, 1 / count) for a in args), **{key: share(value, 1 / count) for key, value in kwargs.items()})
    return share(func(*args, **kwargs), 1 / count)  # the gradients of the factors are linear in that of the product


def outgrows(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a matrix product has more numbers than its factors, as scores have: then their gradients are quicker to share."""
    if name not in ("matmul", "__matmul__", "bmm", "mm") or len(args) < 2 or args[0].dim() < 2 or args[1].dim() < 2:
        return False
    (rows, between), columns = args[0].shape[-2:], args[1].shape[-1]
    return bool(rows * columns > between * (rows + columns))


def factors(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`prod`: each of the n numbers that are multiplied is a factor."""
    (x, *rest), kwargs = leading(args, kwargs, "input")
    dim = kwargs.get("dim", rest[0] if rest and isinstance(rest[0], int) else None)
    count = x.numel() if dim is None else x.shape[dim]
    return func(share(x, 1 / count) if mode.rules.split and count else x, *rest, **kwargs)


def fused_product(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """summand + factor · factor in one call."""
    order = rules.FUSED_PRODUCT[base(name)]
    args, kwargs = (*args, *(kwargs[key] for key in order[len(args) :])), {key: v for key, v in kwargs.items() if key not in order}
    summand, factors = args[0], args[1:3]
    count = sum(isinstance(f, Tensor) and f.requires_grad for f in factors)
    beta = kwargs.get("beta", 1)
    fixed = not summand.requires_grad and beta != 0
    value = summand.clone() if fixed and in_place(name) else summand
    if count > 1 and mode.rules.split:
        args = (summand, *(share(f, 1 / count) for f in factors), *args[3:])
    result: Tensor = func(*args, **kwargs)
    if fixed:
        mode.book_constant("bias", name, result, value, beta)
    return result


def affine(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x W + b: linear in x, b absorbs ⟨b, g⟩; a weight that depends on the data is a factor."""
    names = ("input1", "input2", "weight") if name == "bilinear" else ("input", "weight")
    args, kwargs = leading(args, kwargs, *names)
    rest = args[len(names) :]
    bias = rest[0] if rest else kwargs.get("bias")
    count = sum(factor.requires_grad for factor in args[: len(names)])
    if count > 1 and mode.rules.split:
        args = (*(share(factor, 1 / count) for factor in args[: len(names)]), *rest)
    result: Tensor = func(*args, **kwargs)
    x, weight = args[:2]
    if mode.rules.gamma and x.requires_grad and count == 1 and name != "bilinear":
        return gamma(mode, func, x, weight, bias, rest[1:], kwargs, result)
    if isinstance(bias, Tensor) and not bias.requires_grad:
        shape = (-1, *([1] * (weight.dim() - 2))) if name.startswith("conv") else (-1,)
        mode.book_constant("bias", name, result, bias.reshape(shape), 1)
    return result


def gamma(
    mode: Booking, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
) -> Tensor:
    """The γ rule: positive contributions to a positive output weigh 1 + γ, and so do negative ones to a negative output.

    Forward is y to the bit; backward is that of y_γ · (y / y_γ) with the quotient held fixed.
    """
    gamma = mode.rules.gamma
    options = {key: value for key, value in kwargs.items() if key != "bias"}
    source = share(x, 1.0)
    positive, negative = source.clamp(min=0), source.clamp(max=0)
    up, down = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
    raised, lowered = (None, None) if bias is None else (bias + gamma * bias.clamp(min=0), bias + gamma * bias.clamp(max=0))
    above = func(positive, up, raised, *rest, **options) + func(negative, down, None, *rest, **options)
    below = func(positive, down, lowered, *rest, **options) + func(negative, up, None, *rest, **options)
    changed = torch.where(y > 0, above, below)
    floor = torch.finfo(y.dtype).eps
    safe = torch.where(changed.abs() < floor, torch.where(changed < 0, -floor, floor), changed).detach()
    result: Tensor = functions.Replaced.apply(changed * (y.detach() / safe), y)  # type: ignore[no-untyped-call]
    mode.book("bias", base_name(func), [source], result, (1.0,))
    return result


def divide(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The denominator is a constant: it normalises."""
    if kwargs.get("rounding_mode") is not None:
        return mode.tapped("gate", func, name, args, kwargs)
    if mode.rules.frozen:
        args = (args[0], *(a.detach() if isinstance(a, Tensor) else a for a in args[1:]))
        kwargs = {key: value.detach() if key == "other" and isinstance(value, Tensor) else value for key, value in kwargs.items()}
    return mode.linear(func, name, args, kwargs)


RULES: dict[str, Rule] = {
    "product": product, "factors": factors, "fused_product": fused_product, "affine": affine, "divide": divide,
}  # fmt: skip
