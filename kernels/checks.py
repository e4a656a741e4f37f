"""What must hold between the parts of one attention, checked once, at the border.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.kernels.errors import InputError, ShapeError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def full_rank(tensor: Tensor | None) -> Tensor | None:
    """A mask or bias with axes of 1 in front until there are four."""
    return None if tensor is None else tensor[(None,) * (4 - tensor.dim())]


def check_call(
    q: Tensor,
    k: Tensor,
    *,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> None:
    """Everything that must hold between the parts of one call.

    Raises:
        ShapeError: tensors whose shapes, dtypes or devices do not fit together.
        InputError: a softcap or window that is not positive.
    """
    if q.dim() != 4 or k.dim() != 4:
        raise ShapeError(f"q is {shown(q)} and k is {shown(k)}; give q as [B, H, Q, D] and k as [B, G, K, D]")
    if q.dtype not in DTYPES:
        raise ShapeError(f"q is {q.dtype}; attention needs floating-point queries and keys: float16, bfloat16, float32 or float64")
    for name, tensor in (("k", k), ("v", v)):
        if tensor is not None and (tensor.dtype != q.dtype or tensor.device != q.device):
            raise ShapeError(
                f"q is {q.dtype} on {q.device} and {name} is {tensor.dtype} on {tensor.device}; bring them to one dtype and one device"
            )
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch:
        raise ShapeError(f"q is {shown(q)} and k is {shown(k)}: batches of {batch} and {k.shape[0]}; they must be equal")
    if k.shape[3] != width:
        raise ShapeError(f"q is {shown(q)} and k is {shown(k)}: queries of width {width}, keys of width {k.shape[3]}; they must be equal")
    if groups == 0 or heads % groups:
        raise ShapeError(
            f"q is {shown(q)} and k is {shown(k)}: {heads} query heads cannot share {groups} key/value heads; H must be a multiple of G"
        )
    if v is not None and (v.dim() != 4 or v.shape[:3] != k.shape[:3]):
        raise ShapeError(f"v is {shown(v)} beside k {shown(k)}; give v as [{batch}, {groups}, {keys}, V]")
    if mask is not None and mask.dtype != torch.bool:
        raise ShapeError(f"mask is {mask.dtype}; give a bool mask (True = may be seen), or pass numbers to be added as bias")
    if bias is not None and not bias.is_floating_point():
        raise ShapeError(f"bias is {bias.dtype}; give floating-point numbers to be added to the scores, or pass a bool tensor as mask")
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is not None:
            check_broadcast(name, tensor, (batch, heads, queries, keys), q.device)
    check_sink(sink, heads, q.device)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise InputError(f"softcap {softcap}: give a positive number, or None for no cap")
    if window is not None and window < 1:
        raise InputError(f"window {window}: give at least 1 (each query sees itself), or None for no window")


def check_sink(sink: Tensor | None, heads: int, device: torch.device) -> None:
    """A sink is one floating-point number per query head, on the device of the scores.

    Raises:
        ShapeError: it is not.
    """
    if sink is None:
        return
    if sink.dim() != 1 or sink.shape[0] != heads or not sink.is_floating_point():
        raise ShapeError(f"sink is {shown(sink)} of {sink.dtype}; give one floating-point number per query head, [{heads}]")
    if sink.device != device:
        raise ShapeError(f"sink is on {sink.device} and the scores are on {device}; bring them to one device")


def check_broadcast(name: str, tensor: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> None:
    fits = tensor.dim() <= 4 and all(given in (1, wanted) for given, wanted in zip(reversed(tensor.shape), reversed(shape), strict=False))
    if not fits:
        raise ShapeError(f"{name} is {shown(tensor)}; it must broadcast to [B, H, Q, K] = {list(shape)}")
    if tensor.device != device:
        raise ShapeError(f"{name} is on {tensor.device} and q is on {device}; bring them to one device")


def shown(tensor: Tensor) -> str:
    return str(list(tensor.shape))
