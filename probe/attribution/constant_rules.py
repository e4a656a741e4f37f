"""Sums, masks and joins: where a constant stands beside data, it absorbs what reaches it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headscope.probe.attribution import functions
from headscope.probe.attribution.booking import Booking, Rule
from headscope.probe.attribution.calls import depends, in_place, leading, tensors_in
from headscope.probe.attribution.ledger import inner


def add(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Summands pass relevance on as they contribute; a constant one absorbs its part."""
    first = args[0] if args else kwargs.get("input")
    second = args[1] if len(args) > 1 else kwargs.get("other")
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    fixed = not (isinstance(first, Tensor) and first.requires_grad)
    value = first.clone() if fixed and isinstance(first, Tensor) and in_place(name) else first  # afterwards it is the sum
    result: Tensor = func(*args, **kwargs)
    minus = -1 if "sub" in name else 1
    own, other = (1, minus * alpha) if name not in ("rsub", "__rsub__") else (-alpha, 1)
    if fixed:
        mode.book_constant("constant", name, result, value, own)
    elif not (isinstance(second, Tensor) and second.requires_grad):
        mode.book_constant("constant", name, result, second, other)
    return result


def fill(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where a mask puts a number, that number's part is absorbed; -inf has none."""
    names = ("condition", "input", "other") if name == "where" else ("input", "mask", "value")
    (one, two, three), kwargs = leading(args, kwargs, *names)
    if name == "where" and isinstance(two, Tensor) and not isinstance(one, Tensor | bool):
        one, two = two, one
    parts = ((one, two), (~one, three)) if name == "where" else ((~two, one), (two, three))
    if name == "where" and not (isinstance(one, Tensor) and one.dtype == torch.bool):
        return mode.tapped("constant", func, name, args, kwargs)
    fixed = [(mask, v.clone() if in_place(name) and v is one else v) for mask, v in parts if not depends((v,), {})]
    result: Tensor = func(one, two, three, **kwargs)
    for mask, value in fixed:
        mode.book_constant("constant", name, result, value, mask)
    return result


def join(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Constants that are laid beside data, or written into it, absorb what reaches them."""
    books = mode.books
    if books is None:
        return func(*args, **kwargs)
    if "prod" in (*args, kwargs.get("reduce")):
        return mode.tapped("unruled", func, name, args, kwargs)
    path = mode.path()
    anchor = next(tensor for tensor in tensors_in((*args, *kwargs.values())) if tensor.requires_grad)

    def tap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return type(value)(tap(item) for item in value) if type(value) in (list, tuple) else value
        if value.requires_grad or not (value.is_floating_point() or value.is_complex()):
            return value
        held = mode.hold(value)
        return functions.Noted.apply(value, anchor, lambda g: books.add("constant", name, path, inner(held.value, g)))  # type: ignore[no-untyped-call]

    first, rest = args[:1], args[1:]
    if not in_place(name):
        first = tuple(tap(a) for a in first)
    elif name != "copy_" and not first[0].requires_grad and bool((first[0] != 0).any()):
        kept = first[0].clone()
        noted = functions.Noted.apply(kept, anchor, lambda g: books.add("constant", name, path, inner(kept, g)))  # type: ignore[no-untyped-call]
        first[0].copy_(noted)  # what was there before is a constant, and stays one where nothing is written
    return func(*first, *(tap(a) for a in rest), **{key: tap(value) for key, value in kwargs.items()})


def mostly(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions that are linear, unless an argument makes them something else."""
    second = args[1] if len(args) > 1 else kwargs.get("other")
    if name in ("max", "min") and isinstance(second, Tensor):
        return mode.tapped("clamp", func, name, args, kwargs)
    if name.startswith("grid_sampler") and isinstance(second, Tensor) and second.requires_grad:
        return mode.tapped("gate", func, name, args, kwargs)
    if name in ("max", "min") or name.startswith("grid_sampler") or not any(args[1:]) and not kwargs:
        return mode.linear(func, name, args, kwargs)
    value = kwargs.get("value", args[-1] if len(args) > 2 else None)
    if "pad" in name and not (isinstance(value, int | float) and value):
        return mode.linear(func, name, args, kwargs)
    return mode.tapped("constant", func, name, args, kwargs)


RULES: dict[str, Rule] = {
    "add": add, "fill": fill, "join": join, "mostly": mostly,
}  # fmt: skip
