"""The arguments of a torch call: which are weights, which depend on the input, what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headscope.probe.attribution import functions

# What is no weight and is made of none.
BARE = frozenset({Tensor, int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size, slice})


def base(name: str) -> str:
    """`add` for `add_`."""
    return name if name.endswith("__") else name.removesuffix("_")


def bare(value: Any) -> Any:
    """A weight as a constant; everything else as it is."""
    kind = type(value)
    if kind in BARE:
        return value
    if isinstance(value, nn.Parameter):
        return value.detach()
    if kind in (list, tuple) and any(isinstance(item, nn.Parameter) for item in value):
        return kind(bare(item) for item in value)
    return value


def leading(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with its first arguments, of these names, by position."""
    if len(args) >= len(names):
        return args, kwargs
    missing = names[len(args) :]
    return (*args, *(kwargs[key] for key in missing)), {key: value for key, value in kwargs.items() if key not in missing}


def share(value: Any, part: float) -> Any:
    """A factor whose gradient is multiplied by its part."""
    if isinstance(value, Tensor) and value.requires_grad:
        return functions.Scaled.apply(value, part)  # type: ignore[no-untyped-call]
    return type(value)(share(item, part) for item in value) if type(value) in (list, tuple) else value


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some arguments and in the lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def depends(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether any tensor among the arguments depends on the input."""
    return any(tensor.requires_grad for tensor in tensors_in((*args, *kwargs.values())))


def in_place(name: str) -> bool:
    """`add_`, `__iadd__`, `__setitem__`; not `__add__`."""
    if not name.endswith("__"):
        return name.endswith("_")
    return name == "__setitem__" or (name.startswith("__i") and name not in ("__init__", "__index__", "__int__", "__invert__"))


def widened(name: str, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with every narrower dtype widened: a float64 model that rounds on its way could not close its books to 1e-10."""
    args = tuple(torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a for a in args)
    kwargs = {key: torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v for key, v in kwargs.items()}
    if name in ("to", "type_as") and len(args) > 1 and isinstance(args[1], Tensor) and args[1].is_floating_point():
        args = (args[0], torch.empty(0, dtype=torch.float64, device=args[1].device), *args[2:])
    elif kind in ("affine", "norm", "product", "fused_product", "join", "attention") and not in_place(name):
        args = tuple(wide(a) for a in args)
        kwargs = {key: wide(value) for key, value in kwargs.items()}
    return args, kwargs


def wide(value: Any) -> Any:
    """A tensor, or each in a list, in float64 where it is real and narrower."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(wide(item) for item in value) if type(value) in (list, tuple) else value
