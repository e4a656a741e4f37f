"""Activations written as modules of their own: recognised by what they do, not by their name.

A module without parameters and children that maps each element by itself, and zero to zero, gets the identity rule as a whole, however
its code is written (Achtibat et al. 2024, equation 9). Seen from inside, x·(1 + tanh(…)) would be a product with a constant that absorbs.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headscope.probe.attribution import functions

STANDARD = frozenset(vars(nn.Module()))  # what every module holds
STEP = 1e-3  # of the difference quotient for the slope at 0


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Give every such module of the model the identity rule while the block runs."""
    slopes: dict[object, float | None] = {}

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> Tensor | None:
        if not (len(args) == 1 and isinstance(args[0], Tensor) and isinstance(result, Tensor) and result is not args[0]):
            return None
        with torch._C.DisableTorchFunction():  # no rule sees this, nor an autograd function that the module may be made of
            if not args[0].requires_grad or not result.requires_grad or result.shape != args[0].shape:
                return None
            if _ruled(args[0], result):
                return None
            key = _alike(module)
            if key not in slopes:
                slopes[key] = slope_at_zero(module, args[0])
            slope = slopes[key]
            if slope is None:
                return None
            return functions.Settled.apply(args[0], result.detach(), slope)  # type: ignore[no-any-return, no-untyped-call]

    with ExitStack() as stack:
        for module in model.modules():
            if not _plain(module):
                continue
            stack.callback(module.register_forward_hook(after).remove)
        yield


def slope_at_zero(module: nn.Module, like: Tensor) -> float | None:
    """f'(0) of a module that works element by element and maps 0 to 0; None for any other."""
    with torch.no_grad():
        points = torch.linspace(-3, 3, 12, dtype=like.dtype, device=like.device).reshape(1, 3, 4)
        try:
            whole, zero = module.forward(points), module.forward(torch.zeros_like(points))
            moved = points.clone()
            moved[0, 1, 2] += 1
            again = module.forward(moved)
            near = torch.full_like(points, STEP)
            slope = (module.forward(near) - module.forward(-near)) / (2 * STEP)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None  # it wants another shape: no element-wise function does
        if not all(isinstance(t, Tensor) and t.shape == points.shape for t in (whole, zero, again)):
            return None
        changed = (again != whole).flatten().nonzero().flatten().tolist()
        if bool((zero != 0).any()) or changed not in ([], [6]):
            return None
        return float(slope[0, 0, 0])


def _ruled(x: Tensor, y: Tensor) -> bool:
    """Whether y was made of x by one function that has the identity rule already."""
    made = y.grad_fn
    if made is None or getattr(type(made), "_forward_cls", None) is not functions.Identity:
        return False
    before, place = made.next_functions[0]
    if x.grad_fn is None:
        return getattr(before, "variable", None) is x
    return before is x.grad_fn and place == x.output_nr


def _alike(module: nn.Module) -> object:
    """The same for modules that do the same: of one class, with equal settings."""
    own = tuple((name, value) for name, value in vars(module).items() if name not in STANDARD)
    simple = all(isinstance(value, bool | int | float | str | types.FunctionType | types.BuiltinFunctionType) for _, value in own)
    return (type(module), own) if simple and "forward" not in vars(module) else id(module)


def _plain(module: nn.Module) -> bool:
    """A module of somebody's own without parameters, buffers and children; torch's own ones are functions that have their rules."""
    if type(module).__module__.startswith("torch."):
        return False
    own = (*module._modules.values(), *module._parameters.values(), *module._buffers.values())
    return all(value is None for value in own)
