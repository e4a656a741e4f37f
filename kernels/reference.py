"""Attention written out in full: the readable twin of every faster kernel, and the path an edit of scores or pattern takes.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.
Everything is differentiable and stays in the dtype it came in; under `torch.autocast` the matrix products follow autocast's
rules, as the model's own would.

The order of the terms is fixed: scale, softcap, bias, then mask, causality and window.
A row in which every score is -inf is dead: its pattern, and so its output, is 0. Only -inf kills a row. A row filled with the
smallest number of a dtype, as some models mask, is uniform, just as in torch's own attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.kernels.errors import InputError, ShapeError


def scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """What the softmax sees: scaled dot products with cap, bias and mask applied; -inf where a key may not be seen.

    Args:
        q: [B, H, Q, D].
        k: [B, G, K, D]; query head h uses key head h // (H / G).
        scale: factor on q·k.
        bias: added after the softcap; broadcastable to [B, H, Q, K], taken to the dtype of q.
        mask: bool, True = may be seen; broadcastable to [B, H, Q, K].
        is_causal: query i sees keys 0 to i, counted from the top left as in torch's `is_causal`.
        softcap: c of c·tanh(s / c).
        window: query i sees keys i-w+1 to i, and as many on the other side where not causal.

    Returns:
        [B, H, Q, K], in the dtype of q.

    Raises:
        ShapeError: tensors that do not fit together; the message gives both.
        InputError: a softcap or window that is not positive.
    """
    check_call(q, k, bias=bias, mask=mask, softcap=softcap, window=window)
    k = repeat_heads(k, q.shape[1])  # [B, G, K, D] -> [B, H, K, D]
    products = q @ k.transpose(-2, -1) * scale  # [B, H, Q, K]
    positions = torch.arange(q.shape[2], device=q.device)
    return finish_scores(products, positions, bias=bias, mask=mask, is_causal=is_causal, softcap=softcap, window=window)


def pattern(scores: Tensor, *, sink: Tensor | None = None) -> Tensor:
    """Softmax over the keys; a dead row is 0 everywhere, and passes no gradient.

    Args:
        scores: [B, H, Q, K].
        sink: [H], the score of one more column per head that takes its share and is then dropped, so rows sum to less than 1.

    Returns:
        [B, H, Q, K], in the dtype of the scores.

    Raises:
        ShapeError: scores without four axes, or a sink that is not [H].
    """
    if scores.dim() != 4:
        raise ShapeError(f"scores are {_shape(scores)}; give [B, H, Q, K]")
    if not scores.is_floating_point():
        raise ShapeError(f"scores are {scores.dtype}; give floating-point scores")
    check_sink(sink, scores.shape[1], scores.device)
    dead = torch.isneginf(scores).all(dim=-1, keepdim=True)  # [B, H, Q, 1]
    alive = scores.masked_fill(dead, 0.0)  # softmax of -inf only is NaN, and its gradient stays NaN after a mask
    if sink is None:
        return alive.softmax(dim=-1).masked_fill(dead, 0.0)
    column = sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([alive, column], dim=-1).softmax(dim=-1)[..., :-1].masked_fill(dead, 0.0)  # [B, H, Q, K+1] -> K


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One whole attention, with its pattern.

    Args:
        q, k, scale, bias, mask, is_causal, softcap, window: as in `scores`.
        v: [B, G, K, V].
        sink: as in `pattern`.

    Returns:
        z [B, H, Q, V], per head and before the output projection, and the pattern [B, H, Q, K].

    Raises:
        ShapeError, InputError: as `scores` and `pattern`; also where v does not lie beside k.
    """
    check_call(q, k, v=v, sink=sink)
    seen = scores(q, k, scale=scale, bias=bias, mask=mask, is_causal=is_causal, softcap=softcap, window=window)
    weights = pattern(seen, sink=sink)
    return weights @ repeat_heads(v, q.shape[1]), weights


def full_rank(tensor: Tensor | None) -> Tensor | None:
    """A mask or bias with axes of 1 in front until there are four."""
    return None if tensor is None else tensor[(None,) * (4 - tensor.dim())]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, G, K, D] -> [B, H, K, D]: each key/value head repeated for the query heads that share it; `x` itself if H = G."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def finish_scores(
    products: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Softcap, bias, mask, causality and window, in this order, on some rows of scaled products.

    Args:
        products: [B, H, P, K], scale · q·k of P queries.
        positions: [P], where these queries stand among all.
        bias, mask: broadcastable to [B, H, P, K], already cut to these queries.
        is_causal, softcap, window: as in `scores`.
    """
    seen = products
    if softcap is not None:
        seen = softcap * torch.tanh(seen / softcap)
    if bias is not None:
        seen = seen + bias.to(seen.dtype)
    if mask is not None:
        seen = seen.masked_fill(~mask, float("-inf"))
    if is_causal or window is not None:
        # How far the key lies behind the query; negative in the future.
        behind = positions[:, None] - torch.arange(products.shape[-1], device=products.device)  # [P, K]
        if is_causal:
            seen = seen.masked_fill(behind < 0, float("-inf"))
        if window is not None:
            seen = seen.masked_fill(behind.abs() >= window, float("-inf"))
    return seen


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
    """Everything that must hold between the parts of one call, checked once, at the border.

    Raises:
        ShapeError: tensors whose shapes, dtypes or devices do not fit together.
        InputError: a softcap or window that is not positive.
    """
    if q.dim() != 4 or k.dim() != 4:
        raise ShapeError(f"q is {_shape(q)} and k is {_shape(k)}; give q as [B, H, Q, D] and k as [B, G, K, D]")
    if not q.is_floating_point():
        raise ShapeError(f"q is {q.dtype}; attention needs floating-point queries and keys")
    for name, tensor in (("k", k), ("v", v)):
        if tensor is not None and (tensor.dtype != q.dtype or tensor.device != q.device):
            raise ShapeError(
                f"q is {q.dtype} on {q.device} and {name} is {tensor.dtype} on {tensor.device}; bring them to one dtype and one device"
            )
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch:
        raise ShapeError(f"q is {_shape(q)} and k is {_shape(k)}: batches of {batch} and {k.shape[0]}; they must be equal")
    if k.shape[3] != width:
        raise ShapeError(f"q is {_shape(q)} and k is {_shape(k)}: queries of width {width}, keys of width {k.shape[3]}; they must be equal")
    if groups == 0 or heads % groups:
        raise ShapeError(
            f"q is {_shape(q)} and k is {_shape(k)}: {heads} query heads cannot share {groups} key/value heads; H must be a multiple of G"
        )
    if v is not None and (v.dim() != 4 or v.shape[:3] != k.shape[:3]):
        raise ShapeError(f"v is {_shape(v)} beside k {_shape(k)}; give v as [{batch}, {groups}, {keys}, V]")
    if mask is not None and mask.dtype != torch.bool:
        raise ShapeError(f"mask is {mask.dtype}; give a bool mask (True = may be seen), or pass numbers to be added as bias")
    if bias is not None and not bias.is_floating_point():
        raise ShapeError(f"bias is {bias.dtype}; give floating-point numbers to be added to the scores, or pass a bool tensor as mask")
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is not None:
            _check_broadcast(name, tensor, (batch, heads, queries, keys), q.device)
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
        raise ShapeError(f"sink is {_shape(sink)} of {sink.dtype}; give one floating-point number per query head, [{heads}]")
    if sink.device != device:
        raise ShapeError(f"sink is on {sink.device} and the scores are on {device}; bring them to one device")


def _check_broadcast(name: str, tensor: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> None:
    fits = tensor.dim() <= 4 and all(given in (1, wanted) for given, wanted in zip(reversed(tensor.shape), reversed(shape), strict=False))
    if not fits:
        raise ShapeError(f"{name} is {_shape(tensor)}; it must broadcast to [B, H, Q, K] = {list(shape)}")
    if tensor.device != device:
        raise ShapeError(f"{name} is on {tensor.device} and q is on {device}; bring them to one device")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
