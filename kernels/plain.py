"""A problem in the form that a bare kernel can be asked about, and how it is asked.

Letters: B batch, H query heads, Q queries, K keys, D width of a query or key, F columns.

A kernel with the signature of `headscope.kernels.lse_attention.LseAttention` knows q, k, v, a scale and square causality. What else a
problem has is brought to that: biases become columns of k, a diagonal at the bottom right becomes a square and what lies before it,
and rows that see nothing never reach the kernel's answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from headscope.kernels.errors import InputError
from headscope.kernels.lse_attention import LseAttention, call
from headscope.kernels.problem import Problem
from headscope.kernels.reference import repeat_heads

_FLOOR = -1e6  # nats; next to it float32 rounds by a sixteenth


@dataclass(frozen=True, eq=False)
class Plain:
    """A problem that a bare kernel can be asked about.

    Attributes:
        q: [B, H, Q, D], divided by the temperature, with the sign of the scale; 0 where a query does not count.
        k: [B, H, K, D], repeated for the heads that share it; 0 where a key is hidden, for padding may hold anything.
        scale: factor on q·k, positive.
        causal: query i sees keys 0 to i + K - Q.
        key_bias: [B or 1, H or 1, K], -inf hides a key.
        counted: [B or 1, H or 1, Q], bool, False makes a row dead.
    """

    q: Tensor
    k: Tensor
    scale: float
    causal: bool
    key_bias: Tensor | None
    counted: Tensor | None

    @property
    def half(self) -> bool:
        return self.q.dtype in (torch.float16, torch.bfloat16)

    @property
    def precision(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def hidden_keys(self) -> Tensor:
        """[B or 1, H or 1, K], bool."""
        if self.key_bias is None:
            return torch.zeros(1, 1, self.k.shape[2], dtype=torch.bool, device=self.k.device)
        return torch.isneginf(self.key_bias)

    def seen(self, which: Tensor) -> Tensor:
        """How many of these keys, bool [.., K], each query may see as far as causality goes: int64 [.., Q]."""
        before = pad(which.long().cumsum(dim=-1), (1, 0))  # [.., K + 1]
        queries, keys = self.q.shape[2], self.k.shape[2]
        stop = torch.full((queries,), keys, device=which.device)
        if self.causal:
            stop = (torch.arange(queries, device=which.device) + (keys - queries + 1)).clamp(0, keys)
        return before[..., stop]

    def alive(self) -> Tensor:
        """[B, H, Q], bool: rows that count and see a key."""
        found = self.seen(~self.hidden_keys()) > 0
        return (found if self.counted is None else found & self.counted).expand(self.q.shape[:3])

    def add(self, key_bias: Tensor) -> Plain:
        """With something added to the scores of the keys, [B or 1, H or 1, K]."""
        return replace(self, key_bias=key_bias if self.key_bias is None else self.key_bias + key_bias)

    def hide(self, hidden: Tensor) -> Plain:
        """With more keys hidden, bool [B or 1, H or 1, K]."""
        bias = torch.zeros(1, 1, self.k.shape[2], dtype=self.precision, device=self.k.device) if self.key_bias is None else self.key_bias
        return replace(self, k=self.k.masked_fill(hidden[..., None], 0.0), key_bias=bias.masked_fill(hidden, -torch.inf))


def make_plain(problem: Problem) -> Plain:
    """The problem in this form, or why it has none.

    Raises:
        InputError: a softcap, sink, window, packed lengths, or a bias or mask over pairs; a key bias of NaN or inf; in half precision a
            temperature that would round the queries.
    """
    bias, mask = problem.bias, problem.mask
    refused = {
        "a softcap": problem.softcap is not None,
        "a sink": problem.sink is not None,
        "a bias over pairs of query and key": bias is not None and bias.shape[2] > 1,
        "a mask over pairs of query and key": mask is not None and mask.shape[2] > 1 and mask.shape[3] > 1,
    }
    for name, found in refused.items():
        if found:
            raise InputError(f"the problem has {name}, which identities cannot honour; use headscope.kernels.attention.attention")
    _, heads, queries, keys = problem.shape
    precision = problem.precision
    q, k, scale = problem.q, repeat_heads(problem.k, heads), problem.scale
    if scale <= 0:  # a kernel that scales after it has hidden the later keys makes inf of them
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    if problem.temperature is not None:
        if q.dtype in (torch.float16, torch.bfloat16) and bool((problem.temperature.double().frexp()[0] != 0.5).any()):
            raise InputError(f"a temperature that is no power of two would round queries of {q.dtype}; give q and k in float32")
        q = q / problem.temperature.to(q.dtype)[:, None, None]
    key_bias = None if problem.key_bias is None else problem.key_bias.to(precision)
    if bias is not None:
        over_keys = bias[:, :, 0].to(precision)  # [B or 1, H or 1, K or 1]
        key_bias = over_keys.expand(-1, -1, keys) if key_bias is None else key_bias + over_keys
    if key_bias is not None and bool((key_bias.isnan() | torch.isposinf(key_bias)).any()):
        raise InputError("key_bias holds NaN or inf; give finite numbers, or -inf to hide a key")
    plain = Plain(q, k, scale, _is_causal(problem), key_bias, None)
    if key_bias is not None:
        plain = plain.hide(torch.isneginf(key_bias))
    if mask is not None and mask.shape[2] == 1:
        plain = plain.hide(~mask[:, :, 0].expand(-1, -1, keys))
    elif mask is not None:
        counted = mask[..., 0]  # [B or 1, H or 1, Q]
        plain = replace(plain, q=plain.q.masked_fill(~counted[..., None], 0.0), counted=counted)
    return plain


def _is_causal(problem: Problem) -> bool:
    """Raises InputError where the keys that a query may see are neither all nor those up to the bottom-right diagonal."""
    _, _, queries, keys = problem.shape
    from_start = bool((problem.first == 0).all())
    if problem.whole or (from_start and bool((problem.stop == keys).all())):
        return False
    diagonal = (torch.arange(queries, device=problem.stop.device) + (keys - queries + 1)).clamp(0, keys)
    if from_start and bool((problem.stop == diagonal).all()):
        return True
    raise InputError(
        "the problem has a window, packed lengths or an offset other than K - Q, which identities cannot honour; "
        "use headscope.kernels.attention.attention"
    )


def log_sums(kernel: LseAttention, plain: Plain, factor: float = 1.0) -> Tensor:
    """[B, H, Q], log Σ_j exp(factor · s_ij)."""
    return _call(kernel, plain, None, factor)[1]


def means(kernel: LseAttention, plain: Plain, x: Tensor) -> Tensor:
    """[B, H, Q, F], P x, with x [B or 1, H or 1, K, F] in the dtype of q."""
    x = x.masked_fill(plain.hidden_keys()[..., None], 0.0)  # 0 * NaN is NaN
    return _call(kernel, plain, x.expand(*plain.q.shape[:2], *x.shape[2:]), 1.0)[0]


def _call(kernel: LseAttention, plain: Plain, x: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    """P x [B, H, Q, F] and lse [B, H, Q] at `factor` times the scores, dead rows set."""
    q, k, level = _with_bias(plain.q, plain.k, plain.key_bias, plain.scale)
    # A kernel whose values must be as wide as its keys is spared the padding where only lse is wanted.
    output, lse = _aligned(kernel, q, k, k if x is None else x, plain.scale * factor, plain.causal)
    alive = plain.alive()
    if level is not None and bool((alive & (lse < max(level * factor + 60, _FLOOR * factor))).any()):
        lowest = float(lse[alive].amin()) / factor
        raise InputError(
            f"a row whose scores are all {lowest:.3g} nats or less, too low for {q.dtype} to tell them apart; hide keys with a bias of "
            "-inf or a mask, not with a low number, or give q and k in float32"
        )
    return output.masked_fill(~alive[..., None], 0.0), lse.masked_fill(~alive, -torch.inf)


def _aligned(kernel: LseAttention, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and lse with the diagonal at the bottom right, from a kernel that knows only full and square causal ones; dead rows are 0."""
    queries, keys = q.shape[2], k.shape[2]
    if not causal:
        return _filled(kernel, q, k, v, scale, False)
    if queries > keys:
        output, lse = _filled(kernel, q[:, :, queries - keys :], k, v, scale, True)
        return pad(output, (0, 0, queries - keys, 0)), pad(lse, (queries - keys, 0))
    before = keys - queries
    inside, lse_inside = _filled(kernel, q, k[:, :, before:], v[:, :, before:], scale, True)
    if not before:
        return inside, lse_inside
    outside, lse_outside = _filled(kernel, q, k[:, :, :before], v[:, :, :before], scale, False)
    lse = torch.logaddexp(lse_inside, lse_outside)
    return inside * (lse_inside - lse).exp()[..., None] + outside * (lse_outside - lse).exp()[..., None], lse


def _filled(kernel: LseAttention, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """A call of the kernel, unless there is nothing to ask it."""
    if q.shape[0] and q.shape[1] and q.shape[2] and k.shape[2]:
        if not q.shape[3]:
            q, k = pad(q, (0, 1)), pad(k, (0, 1))
        if v.shape[3]:
            return call(kernel, q, k, v, scale=scale, causal=causal)
        output, lse = call(kernel, q, k, k, scale=scale, causal=causal)
        return output[..., :0], lse
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full(q.shape[:3], -torch.inf, dtype=precision, device=q.device)
    return lse.new_zeros(*q.shape[:3], v.shape[3]), lse


def _with_bias(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor, float | None]:
    """q and k with further columns, so that scale · q·k has the bias in it; and the score of a hidden key, None without a bias.

    The column of q is a power of two u near 1 / scale, that of k is bias / (scale · u); both are exact but for the rounding of the
    latter, which in half precision is spread over three columns. Instead of -inf, which breaks many kernels, a hidden key has a very
    low score, exp(-60) and less of any other.
    """
    if bias is None:
        return q, k, None
    unit = 2.0 ** min(15, max(-14, round(-math.log2(scale))))
    low = 3e4 if k.dtype == torch.float16 else 1e30
    rest = (bias.double() / (scale * unit)).clamp_min(-low).expand(k.shape[:3])  # [B, H, K]
    columns = []
    for _ in range(3 if k.dtype in (torch.float16, torch.bfloat16) else 1):
        part = rest.to(k.dtype)
        rest = rest - part.double()
        columns.append(part)
    extra = torch.stack(columns, dim=-1)  # [B, H, K, 1 or 3]
    if k.dtype == torch.float16 and bool(extra.isinf().any()):
        raise InputError(
            f"a bias of up to {float(bias[bias.isfinite()].abs().max()):.3g} at scale {scale:.3g} overflows float16; use bfloat16"
        )
    ones = torch.full((*q.shape[:3], extra.shape[3]), unit, dtype=q.dtype, device=q.device)
    return torch.cat([q, ones], dim=-1), torch.cat([k, extra], dim=-1), -low * scale * unit


def transposed(kernel: LseAttention, plain: Plain, u: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor]:
    """c [B, H, K] and (P^T u) / c [B, H, K, F]: keys in the role of queries."""
    alive = plain.alive()
    # A dead query is a hidden key here, and 0, so that its score is that of a hidden one whatever it held.
    asked, answering, _ = _with_bias(
        plain.k, plain.q.masked_fill(~alive[..., None], 0.0), (-lse).masked_fill(~alive, -torch.inf), plain.scale
    )
    values = answering if u is None else u.masked_fill(~alive[..., None], 0.0).expand(*plain.q.shape[:2], *u.shape[2:])
    queries, keys = plain.q.shape[2], plain.k.shape[2]
    if not plain.causal:
        output, logs = _filled(kernel, asked, answering, values, plain.scale, False)
    else:
        answering, values = (x[:, :, max(0, queries - keys) :] for x in (answering, values))  # the others are dead
        before = max(0, keys - queries)
        outside, logs_outside = _filled(kernel, asked[:, :, :before], answering, values, plain.scale, False)
        # Key j is seen by the queries from j on; read backwards, by those up to it.
        asked, answering, values = asked[:, :, before:].flip(2), answering.flip(2), values.flip(2)
        inside, logs_inside = (x.flip(2) for x in _filled(kernel, asked, answering, values, plain.scale, True))
        output, logs = torch.cat([outside, inside], dim=2), torch.cat([logs_outside, logs_inside], dim=2)
    if plain.key_bias is not None:
        logs = logs + plain.key_bias
    return logs.exp(), output


def add_scores(a: Plain, b: Plain, factor: float) -> Plain:
    """The scores of a plus `factor` times those of b, over the keys that both see.

    Raises:
        InputError: in half precision, scales whose ratio would round the queries.
    """
    ratio = factor * b.scale / a.scale
    if a.half and abs(math.frexp(ratio)[0]) != 0.5:
        raise InputError(f"scales {a.scale:.6g} and {b.scale:.6g}: their ratio would round queries of {a.q.dtype}; give q and k in float32")
    q = torch.cat([a.q, b.q * ratio], dim=-1)
    k = torch.cat([a.k, b.k], dim=-1)
    found = replace(a, q=q, k=k, causal=a.causal or b.causal)
    if b.key_bias is not None:
        hidden = torch.isneginf(b.key_bias)
        found = found.add(factor * b.key_bias.masked_fill(hidden, 0.0)).hide(hidden)  # a negative factor would make inf of -inf
    if b.counted is not None:
        found = replace(found, counted=b.counted if a.counted is None else a.counted & b.counted)
    return found
