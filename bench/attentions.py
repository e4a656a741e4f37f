"""Ways to compute one attention on a CPU with more or less said about its pattern, each as one function.

Letters: B batch, H heads, N queries and as many keys, D width of a head. Every function returns what it computed, so that its size
can be counted. All see the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headscope.kernels.attention import attention
from headscope.kernels.relevance import relevance
from headscope.kernels.statistics import ROW_NAMES

HEADS, WIDTH = 8, 64


@dataclass(frozen=True, eq=False)
class Inputs:
    """q, k, v and a gradient of the output, each [1, H, N, D] in float32, from one seed."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor
    causal: bool

    @property
    def length(self) -> int:
        """N."""
        return self.q.shape[2]

    @property
    def visible(self) -> int:
        """How many scores the softmax sees, over all heads."""
        return self.q.shape[1] * (self.length * (self.length + 1) // 2 if self.causal else self.length**2)

    @cached_property
    def graph(self) -> tuple[list[Tensor], Tensor]:
        """Leaves for q, k and v, and torch's fused attention of them, ready to be differentiated."""
        with torch.enable_grad():
            leaves = [tensor.clone().requires_grad_() for tensor in (self.q, self.k, self.v)]
            return leaves, scaled_dot_product_attention(*leaves, is_causal=self.causal)

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor]:
        """The output, and the lse that a backward pass of our own starts from."""
        output, found = attention(self.q, self.k, self.v, causal=self.causal, keep="lse")
        assert found.lse is not None
        return output, found.lse


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: key in the results and on the command line.
        label: what is computed.
        run: does it once.
        most: the longest sequence on which it is run.
    """

    name: str
    label: str
    run: Callable[[Inputs], Any]
    most: int = 8192


def make_inputs(length: int, causal: bool, heads: int = HEADS, width: int = WIDTH) -> Inputs:
    draw = torch.Generator().manual_seed(length)
    q, k, v, gradient = (torch.randn(1, heads, length, width, generator=draw) for _ in range(4))
    return Inputs(q, k, v, gradient, causal)


def sdpa(x: Inputs) -> Tensor:
    return scaled_dot_product_attention(x.q, x.k, x.v, is_causal=x.causal)


def ours(implementation: str, keep: str | tuple[str, ...]) -> Callable[[Inputs], Any]:
    """Headscope's op with one implementation and some statistics."""

    def run(x: Inputs) -> Any:
        return attention(x.q, x.k, x.v, causal=x.causal, keep=keep, implementation=implementation)

    return run


def dense_scores(x: Inputs) -> Tensor:
    """[1, H, N, N], as eager attention of model libraries writes them."""
    scores = x.q @ x.k.transpose(-2, -1) * x.q.shape[-1] ** -0.5
    if x.causal:
        scores += torch.full((x.length, x.length), -torch.inf).triu_(1)
    return scores


def eager(x: Inputs) -> tuple[Tensor, Tensor]:
    pattern = dense_scores(x).softmax(-1)
    return pattern @ x.v, pattern


def eager_statistics(x: Inputs) -> tuple[Tensor, ...]:
    """The row statistics as one would write them down with the pattern at hand."""
    scores = dense_scores(x)
    pattern = scores.softmax(-1)
    p_max, argmax = pattern.max(-1)
    entropy = -torch.special.xlogy(pattern, pattern).sum(-1)
    return pattern @ x.v, scores.logsumexp(-1), entropy, p_max, argmax, scores.amax(-1), pattern.square().sum(-1)


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(length: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(past, None, None, length, length, device="cpu")


def flex(x: Inputs) -> Any:
    """torch's own compiled attention; its block mask is made once, outside of the timing."""
    return _flex()(x.q, x.k, x.v, block_mask=_block_mask(x.length) if x.causal else None)


def flex_lse(x: Inputs) -> Any:
    from torch.nn.attention.flex_attention import AuxRequest

    return _flex()(x.q, x.k, x.v, block_mask=_block_mask(x.length) if x.causal else None, return_aux=AuxRequest(lse=True))


def backward(x: Inputs) -> tuple[Tensor, ...]:
    leaves, output = x.graph
    return torch.autograd.grad(output, leaves, x.gradient, retain_graph=True)


def forward_backward(x: Inputs) -> tuple[Tensor, ...]:
    leaves, _ = x.graph
    with torch.enable_grad():
        return torch.autograd.grad(scaled_dot_product_attention(*leaves, is_causal=x.causal), leaves, x.gradient)


def relevance_by(implementation: str) -> Callable[[Inputs], Any]:
    """AttnLRP through the attention, from its output and lse."""

    def run(x: Inputs) -> Any:
        output, lse = x.forward
        found = relevance(x.q, x.k, x.v, x.gradient, causal=x.causal, output=output, lse=lse, implementation=implementation)
        return found.q, found.k, found.v, found.rows, found.columns

    return run


FORWARD = [
    Variant("sdpa", "torch's fused attention, output only", sdpa),
    Variant("sdpa-again", "the same once more: the noise of this table", sdpa),
    Variant("cpu", "Headscope `cpu`, all row statistics", ours("cpu", ROW_NAMES)),
    Variant("cpu-all", "Headscope `cpu`, row statistics, received attention, pooled map", ours("cpu", "all")),
    Variant("cpu-nothing", "Headscope `cpu`, output only", ours("cpu", ())),
    Variant("blockwise", "Headscope `blockwise`, all row statistics", ours("blockwise", ROW_NAMES)),
    Variant("eager", "pattern written out, then times v", eager, 4096),
    Variant("eager-statistics", "the same, and row statistics from the pattern", eager_statistics, 4096),
    Variant("flex", "`torch.compile(flex_attention)`, output only", flex, 2048),
    Variant("flex-lse", "the same, with lse", flex_lse, 2048),
]

BACKWARD = [
    Variant("backward", "torch's fused backward alone", backward),
    Variant("backward-again", "the same once more: the noise of this table", backward),
    Variant("forward-backward", "torch's fused attention and its backward", forward_backward),
    Variant("relevance-stock", "AttnLRP by torch's fused attention and its backward", relevance_by("stock")),
    Variant("relevance-blockwise", "AttnLRP by panels of queries, output and lse given", relevance_by("blockwise")),
]
