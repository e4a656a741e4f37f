"""Attention as people write it themselves; each spelling comes with a twin that says what its pattern is, in float64.

Letters: B batch, S tokens, H query heads, G key/value heads, Q queries, K keys, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.entry import Entry, Inputs

WIDTH, HEADS, HEAD = 32, 4, 8
LENGTH = 7


class Attention(nn.Module):
    """Projections around an attention that a subclass spells out. Each spelling takes and returns [B, S, H, D]."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(WIDTH, WIDTH)
        self.wk = nn.Linear(WIDTH, self.kv_heads * HEAD)
        self.wv = nn.Linear(WIDTH, self.kv_heads * HEAD)
        self.wo = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.wq(x).reshape(*x.shape[:2], -1, HEAD)
        k = self.wk(x).reshape(*x.shape[:2], -1, HEAD)
        v = self.wv(x).reshape(*x.shape[:2], -1, HEAD)
        out: Tensor = self.wo(self.attend(q, k, v).flatten(-2))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention itself, as somebody might write it."""
        raise NotImplementedError

    def weights(self, scores: Tensor) -> Tensor:
        """The twin: unscaled q·kᵀ in float64, [B, H, Q, K], to the pattern."""
        return _softmax(scores / HEAD**0.5)

    def twin(self, x: Tensor) -> Tensor:
        """The pattern [B, H, Q, K] for the module's input [B, S, E], in float64 and without the spelling."""
        x = x.double()
        q = (x @ self.wq.weight.double().T + self.wq.bias.double()).reshape(*x.shape[:2], -1, HEAD)
        k = (x @ self.wk.weight.double().T + self.wk.bias.double()).reshape(*x.shape[:2], -1, HEAD)
        k = k.repeat_interleave(HEADS // self.kv_heads, dim=2)
        return self.weights(torch.einsum("bqhd,bkhd->bhqk", q, k))


def _softmax(scores: Tensor) -> Tensor:
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def _past(length: int) -> Tensor:
    """What each query may see, [Q, K]."""
    return torch.arange(length)[:, None] >= torch.arange(length)[None, :]


class Fused(Attention):
    """F.scaled_dot_product_attention, causal."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def weights(self, scores: Tensor) -> Tensor:
        return _softmax((scores / HEAD**0.5).masked_fill(~_past(scores.shape[-1]), -math.inf))


class FusedGrouped(Fused):
    """The same with grouped heads, by enable_gqa."""

    kv_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class Matmul(Attention):
    """q @ kᵀ, masked_fill, softmax, @ v."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(HEAD)
        scores = scores.masked_fill(~_past(scores.shape[-1]), float("-inf"))
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    weights = Fused.weights


class Folded(Attention):
    """Heads in the batch, [B·H, S, D], with bmm."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, s = q.shape[:2]
        q, k, v = (t.transpose(1, 2).reshape(b * HEADS, s, HEAD) for t in (q, k, v))
        weights = F.softmax(torch.bmm(q * HEAD**-0.5, k.transpose(1, 2)), dim=-1)
        return torch.bmm(weights, v).reshape(b, HEADS, s, HEAD).transpose(1, 2)


class Added(Attention):
    """Heads in the batch, with baddbmm onto a bias of distances."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, s = q.shape[:2]
        q, k, v = (t.transpose(1, 2).reshape(b * HEADS, s, HEAD) for t in (q, k, v))
        bias = -0.3 * (torch.arange(s)[:, None] - torch.arange(s)[None, :]).abs().to(q.dtype)
        scores = torch.baddbmm(bias.expand(b * HEADS, s, s), q, k.transpose(1, 2), beta=1.0, alpha=HEAD**-0.5)
        return torch.bmm(torch.softmax(scores, -1), v).reshape(b, HEADS, s, HEAD).transpose(1, 2)

    def weights(self, scores: Tensor) -> Tensor:
        s = torch.arange(scores.shape[-1])
        return _softmax(scores / HEAD**0.5 - 0.3 * (s[:, None] - s[None, :]).abs())


class Einsum(Attention):
    """einsum in the order of the projections, no transposes."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD**-0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class EinsumGrouped(Attention):
    """einsum with an axis for the groups that share a key head."""

    kv_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.reshape(*q.shape[:2], self.kv_heads, -1, HEAD)
        scores = torch.einsum("bqgrd,bkgd->bgrqk", q, k) * HEAD**-0.5
        return torch.einsum("bgrqk,bkgd->bqgrd", scores.softmax(-1), v).flatten(2, 3)


class Sigmoid(Attention):
    """Sigmoid in the place of softmax; rows do not sum to 1."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) * HEAD**-0.5 - math.log(LENGTH)
        return (torch.sigmoid(scores) @ v).transpose(1, 2)

    def weights(self, scores: Tensor) -> Tensor:
        return torch.reciprocal(1 + (math.log(LENGTH) - scores / HEAD**0.5).exp())


class Relu(Attention):
    """relu, divided by the length."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(q, k.transpose(-2, -1)) * HEAD**-0.5
        return (F.relu(scores) / LENGTH @ v).transpose(1, 2)

    def weights(self, scores: Tensor) -> Tensor:
        return torch.clamp(scores / HEAD**0.5, min=0) / LENGTH


class ExpSum(Attention):
    """Softmax written out: exp, sum, divide."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) * HEAD**-0.5
        raised = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        return ((raised / raised.sum(dim=-1, keepdim=True)) @ v).transpose(1, 2)


class Flex(Attention):
    """flex_attention, uncompiled: a score_mod and a causal block mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=q.device)
        out = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - 0.2 * (i - j), block_mask=block_mask)
        return out.transpose(1, 2)

    def weights(self, scores: Tensor) -> Tensor:
        s = torch.arange(scores.shape[-1])
        scores = scores / HEAD**0.5 - 0.2 * (s[:, None] - s[None, :])
        return _softmax(scores.masked_fill(~_past(scores.shape[-1]), -math.inf))


class Single(Attention):
    """One head, and no axis for it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(-2) for t in (q, k, v))
        weights = F.softmax(q @ k.transpose(-2, -1) / WIDTH**0.5, dim=-1)
        return (weights @ v).unsqueeze(-2)

    def twin(self, x: Tensor) -> Tensor:
        x = x.double()
        q = x @ self.wq.weight.double().T + self.wq.bias.double()
        k = x @ self.wk.weight.double().T + self.wk.bias.double()
        return _softmax(torch.einsum("bqd,bkd->bqk", q, k) / WIDTH**0.5).unsqueeze(1)


class Transposed(Attention):
    """k @ qᵀ, normalised over the axis before the last."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(k, q.transpose(-2, -1)) * HEAD**-0.5  # [B, H, K, Q]
        return torch.matmul(scores.softmax(dim=-2).transpose(-2, -1), v).transpose(1, 2)


class Alibi(Attention):
    """A slope of distance for each head, and the future masked in place."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(q, k.mT) / HEAD**0.5
        scores += self.slopes(scores.dtype)
        scores.masked_fill_(~_past(scores.shape[-1]), torch.finfo(scores.dtype).min)
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v).transpose(1, 2)

    def slopes(self, dtype: torch.dtype) -> Tensor:
        """The bias [H, Q, K]."""
        s = torch.arange(LENGTH)
        return (-(0.5 ** torch.arange(1, HEADS + 1))[:, None, None] * (s[:, None] - s[None, :]).abs()).to(dtype)

    def weights(self, scores: Tensor) -> Tensor:
        return _softmax((scores / HEAD**0.5 + self.slopes(torch.float64)).masked_fill(~_past(scores.shape[-1]), -math.inf))


class RelativeBias(Attention):
    """A learned bias by distance, with the mask added."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * LENGTH - 1, HEADS))

    def bias(self) -> Tensor:
        """The bias [H, Q, K]."""
        s = torch.arange(LENGTH)
        return self.table[s[:, None] - s[None, :] + LENGTH - 1].permute(2, 0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q * HEAD**-0.5, k, v))
        return ((q @ k.transpose(-2, -1) + self.bias()).softmax(-1) @ v).transpose(1, 2)

    def weights(self, scores: Tensor) -> Tensor:
        return _softmax(scores / HEAD**0.5 + self.bias().double())


class Sinks(Attention):
    """A learned column beside the keys, dropped after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) * HEAD**-0.5
        column = self.sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
        return (weights @ v).transpose(1, 2)

    def weights(self, scores: Tensor) -> Tensor:
        column = self.sink.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return _softmax(torch.cat([scores / HEAD**0.5, column], dim=-1))[..., :-1]


class TalkingHeads(Attention):
    """Heads mixed before and after the softmax (Shazeer et al. 2020); the pattern is what the softmax gives."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.randn(HEADS, HEADS)), nn.Parameter(torch.randn(HEADS, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD**-0.5
        weights = torch.einsum("bhqk,hi->biqk", scores, self.before).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bhqk,hi->biqk", weights, self.after), v)

    def weights(self, scores: Tensor) -> Tensor:
        return _softmax(torch.einsum("bhqk,hi->biqk", scores / HEAD**0.5, self.before.double()))


class Softcap(Matmul):
    """Scores bent by c·tanh(s/c) before the mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.tanh(q @ k.transpose(-2, -1) * HEAD**-0.5 / 1.5) * 1.5
        scores = torch.where(_past(scores.shape[-1]), scores, torch.tensor(float("-inf")))
        return torch.einsum("bhqk,bhkd->bqhd", torch.softmax(scores, dim=-1), v)

    def weights(self, scores: Tensor) -> Tensor:
        return _softmax((1.5 * (scores / HEAD**0.5 / 1.5).tanh()).masked_fill(~_past(scores.shape[-1]), -math.inf))


class Packed(Attention):
    """q, k and v cut from one projection, as in nanoGPT."""

    past: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("past", torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.wqkv(x).split(WIDTH, dim=2)
        q, k, v = (z.view(b, t, HEADS, HEAD).transpose(1, 2) for z in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.past[:, :, :t, :t] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        out: Tensor = self.wo(y.transpose(1, 2).contiguous().view(b, t, c))
        return out

    def twin(self, x: Tensor) -> Tensor:
        projected = x.double() @ self.wqkv.weight.double().T + self.wqkv.bias.double()
        q, k, _ = (part.reshape(*x.shape[:2], -1, HEAD) for part in projected.chunk(3, dim=2))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
        return _softmax(scores.masked_fill(~_past(LENGTH), -math.inf))


class Stack(nn.Module):
    """Two residual layers of one spelling."""

    def __init__(self, attention: Callable[[], Attention]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(attention() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return x


@torch.no_grad()
def twins(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The twin's pattern of each layer, for the input that the layer got."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.twin(args[0]).float()))
        for layer in model.modules()
        if isinstance(layer, Attention)
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def stack(name: str, attention: type[Attention], *, differentiable: bool = True, note: str = "") -> Entry:
    """An entry of two layers of one spelling."""

    def make() -> tuple[nn.Module, Inputs]:
        return Stack(attention), {"x": torch.randn(2, LENGTH, WIDTH)}

    return Entry(
        name, "hand-written", make, 2, twins, projections="layers.{}.wo", tolerance=1e-6, differentiable=differentiable, note=note
    )


ENTRIES = [
    stack("SDPA", Fused),
    stack("SDPA (enable_gqa)", FusedGrouped),
    stack("matmul, softmax", Matmul),
    stack("nanoGPT (one qkv map)", Packed),
    stack("bmm on [B·H, S, D]", Folded),
    stack("baddbmm with a bias", Added),
    stack("einsum bqhd,bkhd->bhqk", Einsum),
    stack("einsum with groups (GQA)", EinsumGrouped),
    stack("sigmoid", Sigmoid, note="rows do not sum to 1"),
    stack("relu", Relu, note="rows do not sum to 1"),
    stack("exp / sum", ExpSum),
    stack("softcap, torch.where", Softcap),
    stack("flex_attention", Flex, differentiable=False, note="uncompiled; torch has no backward for it on a CPU"),
    stack("single head, no head axis", Single),
    stack("softmax over dim=-2", Transposed),
    stack("ALiBi, masked in place", Alibi),
    stack("relative bias table", RelativeBias),
    stack("sink column by cat", Sinks, note="rows sum to less than 1"),
    stack("talking heads", TalkingHeads, note="the pattern is the softmax's output, before heads are mixed again"),
]
