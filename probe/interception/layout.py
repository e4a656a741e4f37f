"""Axes through a torch call: what its output's dimensions are made of, given those of its tracked input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headscope.probe.interception import axes as ax
from headscope.probe.interception.axes import Axes
from headscope.probe.interception.tape import TRANSPOSES

RESHAPE = frozenset({"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "_unsafe_view"})
SWAP = frozenset({"transpose", "swapaxes", "swapdims", "transpose_"})
SCRAMBLE = frozenset({
    "sort", "roll", "flip", "fliplr", "flipud", "rot90", "cumsum", "cumprod", "gather", "index_select", "take", "take_along_dim",
    "as_strided",
})  # fmt: skip


def layout(
    name: str,
    axes: Axes,
    shape: torch.Size,
    tensor: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    pick: int | None,
) -> Axes | None:
    """Axes of a call's output from those of its tracked input; None where they cannot be told."""
    rest = args[1:]

    def number(position: int, key: str, default: Any = None) -> Any:
        return kwargs.get(key, rest[position] if len(rest) > position else default)

    if name in RESHAPE:
        return ax.reshape(axes, output.shape)
    if name in SWAP:
        return ax.swap(axes, number(0, "dim0") % len(axes), number(1, "dim1") % len(axes)) if isinstance(number(0, "dim0"), int) else None
    if name in TRANSPOSES:
        return ax.swap(axes, -2, -1) if len(axes) == 2 or (len(axes) > 2 and name not in ("T", "H", "t")) else None
    if name in ("permute", "movedim", "moveaxis"):
        probe = torch.empty([1] * len(axes)).as_strided([1] * len(axes), list(range(len(axes))))
        moved = getattr(torch.Tensor, name)(probe, *rest, **kwargs)
        return ax.permute(axes, list(moved.stride()))
    if name == "unsqueeze":
        dim = number(0, "dim") % (len(axes) + 1)
        return (*axes[:dim], (), *axes[dim:])
    if name == "squeeze":
        dim = number(0, "dim")
        dims = (
            [i for i, n in enumerate(shape) if n == 1] if dim is None else [d % len(axes) for d in ([dim] if isinstance(dim, int) else dim)]
        )
        return ax.squeeze(axes, [d for d in dims if shape[d] == 1])
    if name == "__getitem__":
        return ax.index(axes, shape, rest[0])
    if name in ("narrow", "split", "chunk", "split_with_sizes", "tensor_split"):
        if name == "narrow":
            dim = number(0, "dim") % len(axes)
            start = int(number(1, "start")) % max(1, shape[dim])
        else:
            dim = number(1, "dim", 0) % len(axes)
            if pick is None:
                return None
            start = _offset(args, kwargs, name, pick, shape[dim])
        cut = ax.resized(axes[dim], output.shape[dim], -start)
        return None if cut is None else (*axes[:dim], cut, *axes[dim + 1 :])
    if name in ("cat", "concat", "concatenate"):
        parts = args[0] if args else kwargs["tensors"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % len(axes)
        before = 0
        for part in parts:
            if part is tensor:
                break
            before += part.shape[dim] if part.ndim == tensor.ndim else 0  # torch allows an empty [0] among them
        grown = ax.resized(axes[dim], output.shape[dim], before)
        return None if grown is None else (*axes[:dim], grown, *axes[dim + 1 :])
    if name == "pad":
        amounts = list(number(0, "pad"))
        result = list(axes)
        for i in range(len(amounts) // 2):
            dim = len(axes) - 1 - i
            changed = ax.resized(axes[dim], output.shape[dim], amounts[2 * i])
            if changed is None:
                return None
            result[dim] = changed
        return tuple(result)
    if output.shape == shape and name not in SCRAMBLE:
        return axes
    if (
        output.ndim > len(axes)
        and output.shape[output.ndim - len(axes) :] == shape
        and all(n == 1 for n in output.shape[: output.ndim - len(axes)])
    ):
        return (*((),) * (output.ndim - len(axes)), *axes)
    return None


def _offset(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, pick: int, total: int) -> int:
    """Where the `pick`-th part of a split begins along an axis of `total` entries."""
    keys = ("split_size_or_sections", "split_size", "split_sizes", "chunks", "tensor_indices_or_sections", "indices", "sections")
    sizes: Any = args[1] if len(args) > 1 else next(kwargs[k] for k in keys if k in kwargs)
    if isinstance(sizes, Tensor):
        sizes = sizes.tolist()
    if name == "tensor_split":  # takes places to cut at, or a number of parts of which the first are one longer
        if isinstance(sizes, list | tuple):
            return slice(sizes[pick - 1] if pick else 0, None).indices(total)[0]
        return pick * (total // int(sizes)) + min(pick, total % int(sizes))
    if isinstance(sizes, list | tuple):
        return sum(int(n) for n in sizes[:pick])
    return pick * (-(-total // int(sizes)) if name == "chunk" else int(sizes))
