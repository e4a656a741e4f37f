"""Attention kernels that return lse, whoever wrote them, under one signature.

Letters: B batch, H query heads, Q queries, K keys, D width of a query or key, V width of a value.

`headscope.kernels.identities` derives its numbers from such a kernel. `stock`, `flex` and `ours` make one; a function of your own
with this signature is one too, and `verify` says whether it keeps what it has to promise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.functional import pad

from headscope.kernels.attention import attention
from headscope.kernels.errors import InputError, ShapeError

_LOG = logging.getLogger("headscope.kernels")


class LseAttention(Protocol):
    """softmax(scale · q kᵀ) v and the log of its denominators.

    Little is asked of it. Its k and v come with as many heads as q, no tensor is empty, the scale is positive, no row sees nothing and
    no bias is infinite. Its causal calls are square, Q = K, so that it does not matter at which corner its diagonal starts. It must take
    v of another width than k, and k a few columns wider than the model's (twice as wide to compare two patterns). It must not apply a
    softcap, bias, sink or dropout of its own.

    Args:
        q: [B, H, Q, D], the last axis contiguous, as in k and v.
        k: [B, H, K, D].
        v: [B, H, K, V].
        scale: factor on q·k, positive.
        causal: query i sees keys 0 to i; only where Q = K.

    Returns:
        output [B, H, Q, V], and lse [B, H, Q], in nats and at least float32.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]: ...


def stock() -> LseAttention:
    """torch's own fused attention, by the operators under `scaled_dot_product_attention` that also return lse.

    They are private to torch. On a CPU it is the flash operator, in any floating dtype; on CUDA flash for float16 and bfloat16 up to
    width 256, else the memory-efficient one. Where this torch lacks the operator, `ours()` computes and one line in the log says so.

    Raises:
        InputError: (when called) float64 on CUDA, or another device.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        operator = _operator(q.device, q.dtype, max(q.shape[3], v.shape[3]))
        if operator is None:
            return ours()(q, k, v, scale=scale, causal=causal)
        return _fused(operator, q, k, v, scale, causal)

    return attend


def _fused(operator: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    unit = 1 if q.device.type == "cpu" else 8  # CUDA loads whole words
    width = -(-max(q.shape[3], v.shape[3]) // unit) * unit
    # Rows of any other stride give wrong numbers on a CPU, without an error.
    wide = [pad(x, (0, width - x.shape[3])).contiguous() for x in (q, k, v)]
    arguments: dict[str, Any] = {"is_causal": causal, "scale": scale}
    if operator is _find("_scaled_dot_product_efficient_attention"):
        arguments |= {"attn_bias": None, "compute_log_sumexp": True}
    output, lse = operator(*wide, **arguments)[:2]
    return output[..., : v.shape[3]], lse[..., : q.shape[2]]  # lse of the efficient operator is padded to whole blocks


def _operator(device: torch.device, dtype: torch.dtype, width: int) -> Callable[..., Any] | None:
    if device.type == "cpu":
        name = "_scaled_dot_product_flash_attention_for_cpu"
    elif device.type == "cuda" and dtype != torch.float64:
        flash = dtype != torch.float32 and width <= 256
        name = "_scaled_dot_product_flash_attention" if flash else "_scaled_dot_product_efficient_attention"
    else:
        raise InputError(f"stock(): torch has no fused attention for {dtype} on {device} that returns lse; use ours()")
    return _find(name)


@cache
def _find(name: str) -> Callable[..., Any] | None:
    packet: Any = getattr(torch.ops.aten, name, None)
    if packet is None:
        _LOG.info("torch %s has no aten.%s; headscope's own attention computes instead", torch.__version__, name)
        return None
    found: Callable[..., Any] = packet.default
    return found


def flex(function: Callable[..., Any] | None = None) -> LseAttention:
    """torch's flex_attention.

    Args:
        function: `flex_attention`, compiled as you like; None compiles it with the defaults, for CUDA. Compiled for a CPU it returns
            no lse; not compiled it runs anywhere, but holds the whole Q × K.

    Raises:
        InputError: (when called) tensors on a CPU, and no function given.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        if function is None and q.device.type == "cpu":
            raise InputError("flex(): flex_attention compiled for a CPU returns no lse; use stock(), or give a function that does")
        run = _compiled_flex() if function is None else function
        blocks = None
        if causal:
            blocks = flex_module.create_block_mask(_not_later, None, None, q.shape[2], k.shape[2], device=str(q.device))
        if hasattr(flex_module, "AuxRequest"):
            output, more = run(q, k, v, scale=scale, block_mask=blocks, return_aux=flex_module.AuxRequest(lse=True))
            return output, more.lse
        output, lse = run(q, k, v, scale=scale, block_mask=blocks, return_lse=True)
        return output, lse

    return attend


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_module.flex_attention)


def _not_later(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def ours(implementation: str | None = None) -> LseAttention:
    """`headscope.kernels.attention.attention`.

    Args:
        implementation: one of `headscope.kernels.choose.NAMES`; None takes the fastest that can do it.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        output, found = attention(q, k, v, keep="lse", scale=scale, causal=causal, implementation=implementation)
        assert found.lse is not None
        return output, found.lse

    return attend


def call(kernel: LseAttention, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One call of a kernel, with what it returned checked and taken to float32, float64 for float64.

    Raises:
        ShapeError: it did not return an output [B, H, Q, V] and an lse [B, H, Q] of at least float32.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):  # it would take float32 products back to half
        output, lse = kernel(q, k, v, scale=scale, causal=causal)
    wanted = [*q.shape[:3], v.shape[3]]
    if list(output.shape) != wanted or list(lse.shape) != wanted[:3] or lse.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"the kernel returned an output {list(output.shape)} and an lse {list(lse.shape)} of {lse.dtype}; give {wanted} and "
            f"{wanted[:3]}, the lse in float32 or float64"
        )
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    return output.to(precision), lse.to(precision)


@torch.no_grad()
def verify(kernel: LseAttention, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Run a kernel on small tensors and compare it with the definition: natural logarithm, scale, widths, causality.

    Args:
        device, dtype: of the tensors it is given.

    Raises:
        InputError: its numbers are not those of plain attention; the message says which, and what it may be.
        ShapeError: what it returned has the wrong shape.
    """
    made = torch.Generator().manual_seed(0)
    near = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    for queries, keys, width, values, causal in ((9, 9, 8, 8, False), (9, 9, 9, 5, True), (6, 9, 8, 20, False), (1, 9, 16, 1, False)):
        q, k, v = (
            (torch.randn(2, 3, n, d, generator=made) * 2).to(device, dtype) for n, d in ((queries, width), (keys, width), (keys, values))
        )
        output, lse = (x.double().cpu() for x in call(kernel, q, k, v, scale=0.4, causal=causal))
        scores = 0.4 * (q.double() @ k.double().mT).cpu()
        if causal:
            scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), -torch.inf)
        right = scores.logsumexp(-1)
        case = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, {dtype}, scale=0.4, causal={causal}"
        if not _close(lse, right, near):
            hint = "it returns logarithms to base 2" if _close(lse * math.log(2), right, near) else "its scores are not scale · q·k"
            raise InputError(f"the kernel's lse is off by up to {_gap(lse, right):.2g} nats ({case}): {hint}; mind softcap, bias and sink")
        mean = scores.softmax(-1) @ v.double().cpu()
        if not _close(output, mean, near):
            raise InputError(
                f"the kernel's output is off by up to {_gap(output, mean):.2g} ({case}) and its lse is not: turn dropout off, and give "
                "softmax(scores) v without a gate or sink"
            )


def _close(found: Tensor, wanted: Tensor, near: float) -> bool:
    return bool(torch.isclose(found, wanted, rtol=0, atol=near).all())


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())
