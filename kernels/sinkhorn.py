"""Sinkhorn attention: scores turned into a pattern whose rows and columns both sum alike, by normalising them in turn.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, T half-steps.

    pattern = sinkhorn(scores, half_steps=3)
    output, report = sinkhorn_attention(q, k, v, half_steps=3)

Half-steps are counted as in Sinkformers: 1 normalises the rows and is softmax, 2 the columns after them, 3 the rows again. An odd number
ends with rows that sum to 1; columns tend to a sum of Q / K, counted over the living ones, so that a square pattern becomes doubly
stochastic. Written as P_ij = exp(s_ij + f_i + g_j), a half-step sets one of the two potentials,

    f_i = -log Σ_j exp(s_ij + g_j)        g_j = log(Q / K) - log Σ_i exp(s_ij + f_i),

so the streamed form needs two lse passes of attention a round and holds f and g, not P. The limit does not depend on what was added to
whole rows or columns of the scores. It is reached fast where scores are flat (standard deviation 1: 1e-7 after 5 rounds) and slowly where
they are sharp (8: 1e-4 after 200).

A causal pattern has no use of it. A lower-triangular matrix that is doubly stochastic is the identity, so every head ends up looking at
itself alone; and before that a column sum counts the later queries, so that a query learns of the future. Both functions refuse it.

A row or column that sees nothing is 0 throughout. Where a mask hides single pairs there may be no pattern with such sums; the report
shows how far it came. Source: Sinkhorn 1964; Sander et al. 2022 (Sinkformers), section 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from headscope.kernels.attention import attention
from headscope.kernels.checks import check_call, full_rank, shown
from headscope.kernels.errors import InputError, ShapeError
from headscope.kernels.reference import repeat_heads

Sums: TypeAlias = Callable[[Tensor], Tensor]  # a potential of one side -> the log of the sums over that side, for the other


@dataclass(frozen=True, eq=False)
class SinkhornReport:
    """How doubly stochastic a pattern was after each half-step.

    Attributes:
        half_steps: T.
        row_deviation: [T, ...], mean |row sum - 1| over the living rows; 0 by construction after an odd half-step. NaN where none lives.
        column_deviation: [T, ...], mean |column sum / (Q / K) - 1| over the living columns; 0 by construction after an even one.
    """

    half_steps: int
    row_deviation: Tensor
    column_deviation: Tensor

    @property
    def reached(self) -> Tensor:
        """[...], the larger of both deviations after the last half-step."""
        return torch.maximum(self.row_deviation[-1], self.column_deviation[-1])

    def enough(self, tolerance: float = 1e-3) -> int | None:
        """After how many half-steps every pattern deviated by no more than this; None if that was never so."""
        worst = torch.maximum(self.row_deviation, self.column_deviation).flatten(1)  # [T, ...]
        within = (worst <= tolerance).all(dim=1).nonzero()
        return int(within[0]) + 1 if len(within) else None

    def to_dict(self) -> dict[str, int | list[float]]:
        """The means over all patterns after each half-step, ready for JSON."""
        rows, columns = (x.flatten(1).double().nanmean(dim=1).tolist() for x in (self.row_deviation, self.column_deviation))
        return {"half_steps": self.half_steps, "row_deviation": rows, "column_deviation": columns}


def sinkhorn(scores: Tensor, half_steps: int = 3, mask: Tensor | None = None, *, allow_causal: bool = False) -> Tensor:
    """The pattern after some half-steps; differentiable in the scores.

    Args:
        scores: [..., Q, K], floating-point; -inf hides a pair.
        half_steps: 1 or more; 1 is softmax.
        mask: bool, True = may be seen; broadcastable to the scores. Hide the queries of padding too: columns count every row.
        allow_causal: warn instead of refusing scores of which no query sees a later key.

    Returns:
        [..., Q, K] in the dtype of the scores, 0 where nothing may be seen. NaN anywhere in the scores spreads through the columns.

    Raises:
        InputError: half_steps below 1; more than 1 of them on causal scores.
        ShapeError: scores with fewer than two axes or no floating-point numbers; a mask that is not bool or does not fit.
    """
    seen = _visible(scores, half_steps, mask, allow_causal)
    f, g, _ = _balance(*_dense_sums(seen), seen.new_zeros(seen.shape[:-2] + seen.shape[-1:]), half_steps, watch=False)
    return (seen + f[..., None] + g[..., None, :]).exp().to(scores.dtype)


@torch.no_grad()
def convergence(scores: Tensor, half_steps: int = 11, mask: Tensor | None = None, *, allow_causal: bool = False) -> SinkhornReport:
    """How far rows and columns are from their sums after each half-step. Args and Raises as `sinkhorn`."""
    seen = _visible(scores, half_steps, mask, allow_causal)
    return _report(_balance(*_dense_sums(seen), seen.new_zeros(seen.shape[:-2] + seen.shape[-1:]), half_steps, watch=True)[2])


def sinkhorn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    half_steps: int = 3,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    allow_causal: bool = False,
) -> tuple[Tensor, SinkhornReport]:
    """sinkhorn(scale · q kᵀ) v without the pattern: T + 1 calls of attention, memory that grows with Q + K. Differentiable.

    Args:
        q: [B, H, Q, D].
        k: [B, G, K, D]; query head h uses key/value head h // (H / G).
        v: [B, G, K, V].
        half_steps: 1 or more; 1 is softmax.
        scale: factor on q·k; None means 1 / sqrt(D).
        causal: query i sees keys 0 to i + K - Q; refused for more than one half-step.
        mask: bool, True = may be seen; broadcastable to [B, H, Q, K]. Hide the queries of padding too: columns count every row.
        allow_causal: warn instead of refusing `causal` with more than one half-step.

    Returns:
        The output [B, H, Q, V] in the dtype of q, and the report, whose deviations are [T, B, H] and carry no gradient.

    Raises:
        InputError: half_steps below 1; more than 1 of them with `causal`.
        ShapeError: tensors that do not fit together.
    """
    _check_half_steps(half_steps)
    check_call(q, k, v=v, mask=mask)
    if causal and half_steps > 1:
        _question_causal(half_steps, allow_causal)
    streamed = _Streamed(q, k, v, scale, causal, full_rank(mask), left=half_steps // 2)
    start = torch.zeros(*q.shape[:2], k.shape[2], device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    f, _, deviations = _balance(streamed.over_keys, streamed.over_queries, start, half_steps, watch=True)
    output, lse = streamed.output, streamed.lse
    assert output is not None
    assert lse is not None
    if half_steps % 2:
        return output, _report(deviations)
    share = (lse + f).exp()  # what a row sums to after the columns; attention has normalised it
    return (output * share[..., None]).to(q.dtype), _report(deviations)


@dataclass(eq=False)
class _Streamed:
    """The two kinds of pass over one attention; the last over the keys makes the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    causal: bool
    mask: Tensor | None
    left: int  # passes over the keys before the last
    output: Tensor | None = None
    lse: Tensor | None = None

    def over_keys(self, g: Tensor) -> Tensor:
        """[B, H, Q], log Σ_j exp(s_ij + g_j)."""
        self.left -= 1
        if self.left >= 0:
            _, found = attention(self.q, self.k, None, keep="lse", scale=self.scale, causal=self.causal, mask=self.mask, key_bias=g)
        else:
            self.output, found = attention(
                self.q, self.k, self.v, keep="lse", scale=self.scale, causal=self.causal, mask=self.mask, key_bias=g
            )
        assert found.lse is not None
        self.lse = found.lse
        return found.lse

    def over_queries(self, f: Tensor) -> Tensor:
        """[B, H, K], log Σ_i exp(s_ij + f_i): keys ask and queries answer."""
        asking, answering, mask = repeat_heads(self.k, self.q.shape[1]), self.q, None if self.mask is None else self.mask.mT
        if self.causal:  # key j is seen by the queries from j on; read backwards, by those up to it
            asking, answering, f, mask = asking.flip(2), answering.flip(2), f.flip(2), None if mask is None else mask.flip(2, 3)
        _, found = attention(asking, answering, None, keep="lse", scale=self.scale, causal=self.causal, offset=0, mask=mask, key_bias=f)
        assert found.lse is not None
        return found.lse.flip(2) if self.causal else found.lse


def _dense_sums(seen: Tensor) -> tuple[Sums, Sums]:
    """The same two passes over scores [..., Q, K] that are held."""
    return lambda g: _log_sums(seen + g[..., None, :], -1), lambda f: _log_sums(seen + f[..., None], -2)


def _log_sums(scores: Tensor, axis: int) -> Tensor:
    """logsumexp; -inf where everything is, which torch gives a gradient of NaN."""
    if not scores.shape[axis]:
        return scores.sum(axis).fill_(-torch.inf)
    dead = (scores == -torch.inf).all(dim=axis, keepdim=True)
    return scores.masked_fill(dead, 0.0).logsumexp(axis).masked_fill(dead.squeeze(axis), -torch.inf)


def _balance(over_keys: Sums, over_queries: Sums, g: Tensor, half_steps: int, *, watch: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Both potentials, [..., Q] and [..., K], and what each half-step did to the sums that it did not set, [...].

    A half-step needs the sums that the one before left, so its deviation costs nothing; but for the last, whose sums are taken only to
    `watch`.
    """
    rows = over_keys(g)  # [..., Q]
    living_rows = rows != -torch.inf
    f = (-rows).masked_fill(~living_rows, 0.0)
    if half_steps == 1 and not watch:
        return f, g, []
    columns = over_queries(f)  # [..., K]
    living_columns = columns != -torch.inf
    count, among = (living.sum(dim=-1, keepdim=True).to(g.dtype) for living in (living_rows, living_columns))
    target = count.log() - among.log()  # [..., 1]
    deviations = [_deviation(columns + g - target, living_columns)]
    for step in range(2, half_steps + 1):
        last = step == half_steps
        if step % 2:
            f = (-rows).masked_fill(~living_rows, 0.0)
            if not last or watch:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not last):  # the last one only shows how far it came
                    columns = over_queries(f)
                deviations.append(_deviation(columns + g - target, living_columns))
        else:
            g = (target - columns).masked_fill(~living_columns, 0.0)
            if not last or watch:
                rows = over_keys(g)
                deviations.append(_deviation(rows + f, living_rows))
    return f, g, deviations


def _report(deviations: list[Tensor]) -> SinkhornReport:
    zero = torch.zeros_like(deviations[0])
    columns = [zero if step % 2 else deviation for step, deviation in enumerate(deviations)]
    rows = [deviation if step % 2 else zero for step, deviation in enumerate(deviations)]
    return SinkhornReport(len(deviations), torch.stack(rows), torch.stack(columns))


def _deviation(logs: Tensor, living: Tensor) -> Tensor:
    """[...], mean |exp(logs) - 1| over what lives."""
    off = (logs.detach().exp() - 1).abs().masked_fill(~living, 0.0).sum(dim=-1)
    return off / living.sum(dim=-1)


def _visible(scores: Tensor, half_steps: int, mask: Tensor | None, allow_causal: bool) -> Tensor:
    """The scores in float32 or float64, -inf where hidden, after all checks."""
    _check_half_steps(half_steps)
    if scores.dim() < 2 or not scores.is_floating_point():
        raise ShapeError(f"scores are {shown(scores)} of {scores.dtype}; give floating-point [..., Q, K]")
    seen = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ShapeError(f"mask is {mask.dtype}; give a bool mask, True = may be seen")
        fits = mask.dim() <= scores.dim() and all(
            given in (1, whole) for given, whole in zip(mask.shape[::-1], scores.shape[::-1], strict=False)
        )
        if not fits or mask.device != scores.device:
            raise ShapeError(f"mask is {shown(mask)} on {mask.device}; it must broadcast to the scores, {shown(scores)} on {scores.device}")
        seen = seen.masked_fill(~mask, -torch.inf)
    queries, keys = seen.shape[-2:]
    if half_steps > 1 and queries == keys:
        pairs = (seen.detach() != -torch.inf).flatten(0, -3).any(dim=0) if seen.dim() > 2 else seen.detach() != -torch.inf
        if bool(pairs.tril(-1).any()) and not bool(pairs.triu(1).any()):
            _question_causal(half_steps, allow_causal)
    return seen


def _check_half_steps(half_steps: int) -> None:
    if isinstance(half_steps, bool) or not isinstance(half_steps, int) or half_steps < 1:
        raise InputError(f"half_steps={half_steps!r}: give 1 or more; 1 is softmax, 3 is rows, columns and rows again")


def _question_causal(half_steps: int, allowed: bool) -> None:
    reason = (
        f"half_steps={half_steps} on causal scores: the only lower-triangular matrix that is doubly stochastic is the identity, and on the "
        "way there a column's sum tells a query of later ones"
    )
    if not allowed:
        raise InputError(f"{reason}; use half_steps=1, which is softmax, or allow_causal=True to watch it happen")
    warnings.warn(reason, stacklevel=3)
