"""Attention written in many ways, and one dense twin of all of them: float64, head by head, sharing no code with the package.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LENGTH, CAP = 16, 4, 7, 3.0


@dataclass(frozen=True)
class Way:
    """How an attention is written, and what its scores go through."""

    attend: Callable[[Attention, Tensor, Tensor, Tensor], Tensor]
    groups: int = HEADS
    causal: bool = False
    bias: bool = False
    cap: bool = False
    sink: bool = False
    padded: bool = False


class Attention(nn.Module):
    """Projections as everywhere; what lies between them is the way's."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way, self.num_heads, self.groups, self.size = way, HEADS, way.groups, WIDTH // HEADS
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, way.groups * self.size) for _ in range(2))
        self.relative = nn.Parameter(torch.randn(HEADS, 2 * LENGTH, 2 * LENGTH))
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        found = [p(x).view(b, t, n, self.size) for p, n in ((self.q_proj, HEADS), (self.k_proj, self.groups), (self.v_proj, self.groups))]
        return found[0].transpose(1, 2), found[1].transpose(1, 2), found[2].transpose(1, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.lengths = lengths
        z = self.way.attend(self, *self.project(x))
        out: Tensor = self.o_proj(z.transpose(1, 2).reshape(x.shape))
        return out

    def bias(self, t: int) -> Tensor:
        return self.relative[:, :t, :t]

    def visible(self, t: int) -> Tensor:
        """[B, 1, 1, K] bool: the first `lengths` keys of each sample."""
        assert self.lengths is not None
        return (torch.arange(t) < self.lengths[:, None])[:, None, None, :]


class Net(nn.Module):
    """Two such layers with a residual stream."""

    def __init__(self, way: Way, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(way) for _ in range(layers))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, lengths)
        return x


def tril(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool).tril()


def products(m: Attention, q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(m.size)


def fused(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=m.groups != HEADS)


def fused_causal(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=m.groups != HEADS)


def fused_bool(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=tril(q.shape[2]))


def fused_float(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias(q.shape[2]).to(q.dtype))


def fused_padded(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.visible(k.shape[2]))


def repeat_kv(x: Tensor, n: int) -> Tensor:
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, n, t, d).reshape(b, g * n, t, d)


def fused_expanded(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = HEADS // m.groups
    return F.scaled_dot_product_attention(q, repeat_kv(k, n), repeat_kv(v, n), is_causal=True)


def fused_interleaved(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = HEADS // m.groups
    return F.scaled_dot_product_attention(q, k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1))


def eager(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return products(m, q, k).softmax(-1) @ v


def eager_causal(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return products(m, q, k).masked_fill(~tril(q.shape[2]), -math.inf).softmax(-1) @ v


def eager_bias(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (products(m, q, k) + m.bias(q.shape[2])).softmax(-1) @ v


def eager_padded(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(m.visible(k.shape[2]), products(m, q, k), torch.finfo(q.dtype).min).softmax(-1) @ v


def eager_expanded(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = HEADS // m.groups
    return eager_causal(m, q, repeat_kv(k, n), repeat_kv(v, n))


def eager_interleaved(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = HEADS // m.groups
    return eager(m, q, k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1))


def eager_grouped(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, d = q.shape
    q = q.reshape(b, m.groups, h // m.groups, t, d)
    return (products(m, q, k[:, :, None]).softmax(-1) @ v[:, :, None]).reshape(b, h, t, d)


def softcap(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = CAP * torch.tanh(products(m, q, k) / CAP)
    return scores.masked_fill(~tril(q.shape[2]), -math.inf).softmax(-1) @ v


def sinks(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = products(m, q, k).masked_fill(~tril(q.shape[2]), -math.inf)
    column = m.sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1] @ v


def einsum(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(1 / math.sqrt(m.size)).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def baddbmm(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, d = q.shape
    flat_q, flat_k, flat_v = (x.reshape(b * h, t, d) for x in (q, k, v))
    bias = m.bias(t).expand(b, h, t, t).reshape(b * h, t, t)
    scores = torch.baddbmm(bias, flat_q, flat_k.transpose(1, 2), alpha=1 / math.sqrt(d))
    return torch.bmm(scores.softmax(-1), flat_v).view(b, h, t, d)


WAYS = {
    "fused": Way(fused),
    "fused causal": Way(fused_causal, causal=True),
    "fused with a bool mask": Way(fused_bool, causal=True),
    "fused with a float mask": Way(fused_float, bias=True),
    "fused with padding": Way(fused_padded, padded=True),
    "fused grouped": Way(fused_causal, groups=2, causal=True),
    "fused grouped by expand": Way(fused_expanded, groups=2, causal=True),
    "fused grouped by repeat_interleave": Way(fused_interleaved, groups=2),
    "fused multi-query": Way(fused, groups=1),
    "eager": Way(eager),
    "eager causal": Way(eager_causal, causal=True),
    "eager with a bias": Way(eager_bias, bias=True),
    "eager with padding": Way(eager_padded, padded=True),
    "eager grouped by expand": Way(eager_expanded, groups=2, causal=True),
    "eager grouped by repeat_interleave": Way(eager_interleaved, groups=2),
    "eager grouped by broadcast": Way(eager_grouped, groups=2),
    "eager multi-query": Way(eager, groups=1),
    "softcap": Way(softcap, causal=True, cap=True),
    "sinks": Way(sinks, causal=True, sink=True),
    "einsum": Way(einsum),
    "baddbmm": Way(baddbmm, bias=True),
}


def net(way: str | Way, layers: int = 2) -> Net:
    torch.manual_seed(0)
    return Net(WAYS[way] if isinstance(way, str) else way, layers).double().eval()


def inputs(batch: int = 2, tokens: int = LENGTH) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def arguments(model: Net, batch: int = 2, tokens: int = LENGTH) -> tuple[Tensor, ...]:
    """Inputs of a model, with lengths where it pads."""
    x = inputs(batch, tokens)
    return (x, torch.arange(tokens - 2, tokens - 2 + batch)) if model.layers[0].way.padded else (x,)


@dataclass(frozen=True)
class Twin:
    """What one attention layer computes, [B, H, Q, K] and so on."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    pattern: Tensor
    z: Tensor


def twin(m: Attention, x: Tensor, lengths: Tensor | None = None) -> Twin:
    """The layer on its own input, written out."""
    q, k, v = m.project(x)
    b, _, t, _ = q.shape
    scores, pattern, z = [], [], []
    for sample in range(b):
        for head in range(HEADS):
            group = head // (HEADS // m.groups)
            s = torch.einsum("qd,kd->qk", q[sample, head], k[sample, group]) / m.size**0.5
            if m.way.cap:
                s = CAP * torch.tanh(s / CAP)
            if m.way.bias:
                s = s + m.relative[head, :t, :t]
            hidden = torch.zeros(t, t, dtype=torch.bool)
            if m.way.causal:
                hidden |= torch.arange(t)[None, :] > torch.arange(t)[:, None]
            if m.way.padded:
                assert lengths is not None
                hidden |= torch.arange(t)[None, :] >= lengths[sample]
            weight = torch.where(hidden, 0.0, torch.exp(s))
            total = weight.sum(-1, keepdim=True) + (torch.exp(m.sinks[head]) if m.way.sink else 0.0)
            scores.append(torch.where(hidden, -math.inf, s))
            pattern.append(weight / total)
            z.append(pattern[-1] @ v[sample, group])
    return Twin(q, k, v, *(torch.stack(x).unflatten(0, (b, HEADS)) for x in (scores, pattern, z)))


def twins(model: Net, x: Tensor, lengths: Tensor | None = None) -> list[Twin]:
    """Every layer's, each on the residual stream it sees."""
    found = []
    for layer in model.layers:
        found.append(twin(layer, x, lengths))
        x = x + layer.o_proj(found[-1].z.transpose(1, 2).reshape(x.shape))
    return found


def statistics(pattern: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Row and column statistics of a dense pattern; entropy and sum_squares renormalise over the real keys."""
    share = pattern / pattern.sum(-1, keepdim=True)
    return {
        "lse": torch.logsumexp(scores, -1),
        "entropy": -(share * torch.where(share > 0, share, 1.0).log()).sum(-1),
        "p_max": pattern.max(-1).values,
        "argmax": pattern.argmax(-1),
        "max_score": scores.max(-1).values,
        "sum_squares": (share**2).sum(-1),
        "received": pattern.sum(-2),
    }


def pooled(pattern: Tensor, tile: int) -> Tensor:
    """Mass per tile."""
    b, h, q, k = pattern.shape
    out = torch.zeros(b, h, -(-q // tile), -(-k // tile), dtype=pattern.dtype)
    for i in range(q):
        for j in range(k):
            out[:, :, i // tile, j // tile] += pattern[:, :, i, j]
    return out
