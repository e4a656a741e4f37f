"""Statistics of a pattern from any attention that returns lse, so also where the kernel is somebody else's.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, F columns, S segments, N pairs.

    problem = make_problem(q, k, causal=True)
    lse = log_sum_exp(stock(), problem)
    entropy(stock(), problem, lse=lse)

With scores s_ij and P_ij = exp(s_ij - lse_i), each number is an exact identity over one or a few calls of the kernel on other inputs:
other values, another scale, queries and keys in swapped roles, or the factors of two patterns side by side. Nothing here holds Q × K.

| number | identity | kernel calls (half precision) |
|---|---|---|
| log_sum_exp | | 1 |
| entropy | lse - E[s], E[s]_i = scale · q_i·(P K)_i; half: d lse(βs) / dβ at β = 1 | 1 (4) |
| sum_squares | exp(lse(2s) - 2 lse(s)) | 1 |
| renyi_entropy, effective_keys | (lse(αs) - α lse(s)) / (1 - α) | 1 |
| apply, segment_mass, mean_key, mean_distance | P x, x the values | 1 (1, S, 4, 4) |
| received, apply_transposed | exp(LSE_i(s_ij - lse_i)), then P^T u = received · output | 1 |
| pair_probability, offset_probability, the scores of heads | exp(s_ij - lse_i) | 0 |
| overlap, map_cosine | exp(lse(s + s') - lse - lse') | 1, 3 |
| divergence | E[s] - E[s'] - lse + lse' | 1 (8) |
| budget | from entropy and received | 0 |

Add 1 for each lse that is not handed in. Causal calls with Q < K count double: the kernel is given what lies before the first query
and the square after it one by one, and the two are merged.

Beside q and k a problem may have: causality at the bottom right, GQA, a temperature, a key bias, a bias or mask over the keys alone
([.., 1, K]; padding), a mask over the queries alone ([.., Q, 1]; its hidden rows count as dead). Biases enter as further columns of k,
so the kernel need not know of them. Everything else would need the kernel to know, and is refused with an InputError: softcap, window,
packed lengths, sinks, bias or mask over pairs. A softcap, bias, sink or dropout inside the kernel cannot be seen from here; it makes
the numbers wrong. `verify` in `headscope.kernels.lse_attention` finds it, and an impossible entropy is refused.

In float64 the error is 1e-13 and less; in float32, 1e-6 · max(2, max|s| / 2), because q·k itself is not known better. float16 and
bfloat16 kernels round P and the output, but not lse, so there everything comes from lse alone (the third column; `apply` and
`apply_transposed` cannot): 1e-3 nats and less for the entropy, 5e-4 · max(4, max|s|) for the divergence, 1e-4 relative for the rest.

A dead row is 0 throughout, lse -inf. Results are float32, float64 for float64 inputs, and carry no gradient: kernels have none for lse.
Sources: Milakov & Gimelshein 2018 and Dao et al. 2022 for lse; the identities follow from the definition of softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headscope.kernels.checks import shown
from headscope.kernels.errors import InputError, ShapeError
from headscope.kernels.lse_attention import LseAttention
from headscope.kernels.plain import Plain, add_scores, log_sums, make_plain, means, transposed
from headscope.kernels.problem import Problem
from headscope.kernels.reference import repeat_heads

_STEP = 1 / 16  # of the numeric derivatives: a power of two, so that a half-precision query times it is exact


@torch.no_grad()
def log_sum_exp(kernel: LseAttention, problem: Problem) -> Tensor:
    """[B, H, Q], log Σ_j exp(s_ij), nats; -inf in a dead row. One call.

    Raises:
        InputError: the problem has structure that no identity can honour; see the head of this module.
    """
    return log_sums(kernel, make_plain(problem))


@torch.no_grad()
def entropy(kernel: LseAttention, problem: Problem, *, lse: Tensor | None = None) -> Tensor:
    """[B, H, Q], H_i = -Σ_j P_ij log P_ij = lse_i - E_i[s], nats.

    One call with the keys for values gives E_i[s] = scale · q_i·(P K)_i. In half precision the kernel's rounding of P K would cost
    up to 0.1 nats, so there E[s] is d lse(βs) / dβ at β = 1: four calls, central differences, Richardson's extrapolation (error
    about 1e-3 nats). A common offset of a row's scores cancels between the two terms and costs digits.

    Args:
        lse: [B, H, Q], of the same problem, to save a call.

    Raises:
        InputError: as `log_sum_exp`; also where the result is below 0 or above log K by more than rounding, which means that the
            kernel's scores are not scale · q·k.
        ShapeError: an lse of another shape.
    """
    plain = make_plain(problem)
    lse = _given(kernel, plain, lse)
    found = (lse - _mean_scores(kernel, plain, [plain])[0]).masked_fill(~plain.alive(), 0.0)
    slack = 1e-3 * ((300 if plain.half else 1) + lse.masked_fill(~plain.alive(), 0.0).abs())
    wrong = (found < -slack) | (found > math.log(max(1, plain.k.shape[2])) + slack)
    if bool(wrong.any()):
        raise InputError(
            f"an entropy of {float(found[wrong][0]):.4g} nats over {plain.k.shape[2]} keys: the kernel's scores are not scale · q·k; "
            "mind a softcap, bias or sink inside the kernel"
        )
    return found.clamp_min(0.0)


@torch.no_grad()
def sum_squares(kernel: LseAttention, problem: Problem, *, lse: Tensor | None = None) -> Tensor:
    """[B, H, Q], Σ_j P_ij² = exp(lse_i(2s) - 2 lse_i(s)). One call, at twice the scale; Args and Raises as `entropy`."""
    plain = make_plain(problem)
    lse = _given(kernel, plain, lse)
    return (log_sums(kernel, plain, 2.0) - 2 * lse).exp().masked_fill(~plain.alive(), 0.0)


@torch.no_grad()
def renyi_entropy(kernel: LseAttention, problem: Problem, order: float, *, lse: Tensor | None = None) -> Tensor:
    """[B, H, Q], log(Σ_j P_ij^α) / (1 - α) = (lse_i(αs) - α lse_i(s)) / (1 - α), nats (Rényi 1961). One call at α times the scale.

    Args:
        order: α, positive and finite. At 1 this is `entropy`; near 1 the difference quotient loses digits.
        lse: [B, H, Q], of the same problem, to save a call.

    Raises:
        InputError: as `log_sum_exp`; also an order that is not positive.
    """
    if not 0 < order < math.inf:
        raise InputError(f"order {order}: give a positive, finite number; 1 is Shannon's entropy, 2 goes with sum_squares")
    if order == 1:
        return entropy(kernel, problem, lse=lse)
    plain = make_plain(problem)
    lse = _given(kernel, plain, lse)
    return ((log_sums(kernel, plain, order) - order * lse) / (1 - order)).masked_fill(~plain.alive(), 0.0)


@torch.no_grad()
def effective_keys(kernel: LseAttention, problem: Problem, order: float = 2.0, *, lse: Tensor | None = None) -> Tensor:
    """[B, H, Q], exp(Rényi entropy): over how many keys a row is spread, 1 to K; 0 in a dead row. At order 2, 1 / sum_squares.

    Args and Raises as `renyi_entropy`.
    """
    found = renyi_entropy(kernel, problem, order, lse=lse).exp()
    return found.masked_fill(~make_plain(problem).alive(), 0.0)


@torch.no_grad()
def apply(kernel: LseAttention, problem: Problem, x: Tensor) -> Tensor:
    """[B, H, Q, F], P x. One call; in half precision with the kernel's own rounding, about 1e-2 of the largest |x|.

    Args:
        x: [B or 1, H or G or 1, K, F], taken to the dtype of q.

    Raises:
        InputError: as `log_sum_exp`.
        ShapeError: x does not fit the keys.
    """
    plain = make_plain(problem)
    return means(kernel, plain, _columns("x", x, plain, plain.k.shape[2], "K"))


@torch.no_grad()
def apply_transposed(kernel: LseAttention, problem: Problem, u: Tensor, *, lse: Tensor | None = None) -> Tensor:
    """[B, H, K, F], P^T u: keys ask, queries answer, with -lse as a bias; the received probability multiplies the output.

    One call, causal ones with both sides flipped. In half precision with the kernel's own rounding.

    Args:
        u: [B or 1, H or G or 1, Q, F], taken to the dtype of q.
        lse: [B, H, Q], of the same problem, to save a call.

    Raises:
        InputError: as `log_sum_exp`.
        ShapeError: u does not fit the queries.
    """
    plain = make_plain(problem)
    lse = _given(kernel, plain, lse)
    weights, output = transposed(kernel, plain, _columns("u", u, plain, plain.q.shape[2], "Q"), lse)
    return weights[..., None] * output


@torch.no_grad()
def received(kernel: LseAttention, problem: Problem, *, lse: Tensor | None = None) -> Tensor:
    """[B, H, K], c_j = Σ_i P_ij = exp(LSE_i(s_ij - lse_i)), the probability each key receives from all queries; sums to the living rows.

    One call in swapped roles, -lse riding in one more column; in half precision it is split over three, because one would round it
    by up to 0.2 nats. Args and Raises as `entropy`.
    """
    plain = make_plain(problem)
    lse = _given(kernel, plain, lse)
    return transposed(kernel, plain, None, lse)[0]


@torch.no_grad()
def segment_mass(kernel: LseAttention, problem: Problem, members: Tensor, *, lse: Tensor | None = None) -> Tensor:
    """[B, H, Q, S], Σ_{j in S} P_ij: how much of a row goes to a sink, to special tokens, to a sentence.

    One call with the members as values. In half precision S calls, exp(lse over the members - lse), which round nothing.

    Args:
        members: [S, K] or [B, S, K], bool; segments may overlap.
        lse: [B, H, Q], of the same problem, to save a call (half precision only).

    Raises:
        InputError: as `log_sum_exp`.
        ShapeError: members are not bool, or not over the keys.
    """
    plain = make_plain(problem)
    keys = plain.k.shape[2]
    each = members[None] if members.dim() == 2 else members
    if each.dim() != 3 or each.shape[0] not in (1, plain.q.shape[0]) or each.shape[2] != keys or each.dtype != torch.bool:
        raise ShapeError(f"members are {shown(members)} of {members.dtype}; give bool [S, K] or [B, S, K], K = {keys}")
    if not plain.half:
        return means(kernel, plain, each.mT[:, None].to(plain.q.dtype))
    lse = _given(kernel, plain, lse)
    parts = [lse.new_zeros(*lse.shape, 0)]
    for segment in each.unbind(1):
        own = plain.hide(~segment[:, None])
        parts.append((log_sums(kernel, own) - lse).exp().masked_fill(~own.alive(), 0.0)[..., None])
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def mean_key(kernel: LseAttention, problem: Problem) -> Tensor:
    """[B, H, Q], E_i[j] = Σ_j P_ij j, positions counted from 0; 0 in a dead row.

    One call with the positions as values. In half precision positions beyond 256 are not even numbers of the dtype, so there E[j]
    is d lse(s + εj) / dε at 0: four calls, error about 1e-4 · K.

    Raises:
        InputError: as `log_sum_exp`.
    """
    plain = make_plain(problem)
    keys = plain.k.shape[2]
    place = torch.arange(keys, device=plain.q.device, dtype=plain.precision).expand(1, 1, keys)
    if not plain.half:
        return means(kernel, plain, place[..., None])[..., 0]
    unit = 4 / max(1, keys)  # a slope that moves the scores by less than one nat
    found = _slope(lambda step: log_sums(kernel, plain.add(place * (unit * step)))) / unit
    return found.masked_fill(~plain.alive(), 0.0)


@torch.no_grad()
def mean_distance(kernel: LseAttention, problem: Problem) -> Tensor:
    """[B, H, Q], Σ_j P_ij (i' - j), in positions, where i' = i + K - Q is the key at which query i stands; 0 in a dead row.

    Only of causal patterns: with keys on both sides |i' - j| is not a mean of a column. Calls as `mean_key`.

    Raises:
        InputError: as `log_sum_exp`; also a pattern that is not causal.
    """
    plain = make_plain(problem)
    queries, keys = plain.q.shape[2], plain.k.shape[2]
    if not plain.causal and not queries <= 1:
        raise InputError("mean_distance of a pattern that is not causal: |i - j| needs a kernel that knows positions; use mean_key")
    place = torch.arange(queries, device=plain.q.device) + (keys - queries)
    return (place - mean_key(kernel, problem)).masked_fill(~plain.alive(), 0.0)


@torch.no_grad()
def pair_probability(problem: Problem, lse: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """[B, H, N], P_ij = exp(s_ij - lse_i) of N pairs; 0 where the key may not be seen. No call, N · D work.

    The product is taken in float32 here, and half-precision kernels accumulate in float32 too, so both terms fit together.

    Args:
        lse: [B, H, Q], of the same problem.
        queries, keys: [N], int64, from 0.

    Raises:
        InputError: as `log_sum_exp`; also positions that do not exist.
        ShapeError: queries and keys are not of one length, or the lse is of another problem.
    """
    plain = make_plain(problem)
    _check_lse(plain, lse)
    if queries.dim() != 1 or queries.shape != keys.shape:
        raise ShapeError(f"queries are {shown(queries)} and keys are {shown(keys)}; give two lists of one length")
    for name, index, count in (("query", queries, plain.q.shape[2]), ("key", keys, plain.k.shape[2])):
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < count):
            raise InputError(f"no {name} at {int(index.min())} or at {int(index.max())}: there are {count}, from 0")
    seen = plain.q[:, :, queries].to(plain.precision) * plain.k[:, :, keys].to(plain.precision)  # [B, H, N, D]
    scores = seen.sum(dim=-1) * plain.scale
    hidden = ~plain.alive()[:, :, queries]
    if plain.key_bias is not None:
        scores = scores + plain.key_bias[:, :, keys]
    if plain.causal:
        hidden = hidden | (keys > queries + (plain.k.shape[2] - plain.q.shape[2]))
    return (scores - lse[:, :, queries]).exp().masked_fill(hidden, 0.0)


@torch.no_grad()
def offset_probability(problem: Problem, lse: Tensor, offset: int) -> Tensor:
    """[B, H, Q], the probability that a query gives to the key `offset` before it: 0 its own, 1 the one before; negative: after.

    0 where there is no such key or it may not be seen. Query i stands at key i + K - Q. No call. Args and Raises as `pair_probability`.
    """
    queries, keys = problem.shape[2], problem.shape[3]
    rows = torch.arange(queries, device=problem.q.device)
    columns = rows + (keys - queries - offset)
    there = (columns >= 0) & (columns < keys)
    found = lse.new_zeros(lse.shape)
    found[:, :, there] = pair_probability(problem, lse, rows[there], columns[there])
    return found


@torch.no_grad()
def previous_token_score(problem: Problem, lse: Tensor) -> Tensor:
    """[B, H], the mean probability of the token before, over the rows that can see one. No call.

    Args and Raises as `pair_probability`. Source: Elhage et al. 2021.
    """
    return _stripe(problem, lse, 1, 1)


@torch.no_grad()
def duplicate_score(problem: Problem, lse: Tensor, period: int) -> Tensor:
    """[B, H], on a block of `period` tokens repeated: the mean probability of the same token one block before. No call.

    Mean over the rows from the second block on that can see it. Args and Raises as `pair_probability`; InputError for a period below 1.
    """
    return _stripe(problem, lse, _period(period), period)


@torch.no_grad()
def induction_score(problem: Problem, lse: Tensor, period: int) -> Tensor:
    """[B, H], on a block of `period` tokens repeated: the mean probability of what followed the same token one block before. No call.

    Mean over the rows from the second block on that can see it. Args and Raises as `pair_probability`; InputError for a period below 1.
    Source: Olsson et al. 2022.
    """
    return _stripe(problem, lse, _period(period) - 1, period)


@torch.no_grad()
def overlap(kernel: LseAttention, a: Problem, b: Problem, *, lse_a: Tensor | None = None, lse_b: Tensor | None = None) -> Tensor:
    """[B, H, Q], Σ_j A_ij B_ij of two patterns = exp(lse_i(s + s') - lse_i - lse'_i). One call, with the widths of both side by side.

    Heads, layers or checkpoints are compared by giving their q and k; both need the same B, H, Q and K.

    Args:
        lse_a, lse_b: [B, H, Q], of a and of b, to save a call each.

    Raises:
        InputError: as `log_sum_exp`; also, in half precision, scales whose ratio is not a power of two.
        ShapeError: the two differ in shape, dtype or device.
    """
    first, second = _pair(a, b)
    lse_a = _given(kernel, first, lse_a)
    lse_b = _given(kernel, second, lse_b)
    both = add_scores(first, second, 1.0)
    return (log_sums(kernel, both) - lse_a - lse_b).exp().masked_fill(~both.alive(), 0.0)


@torch.no_grad()
def map_cosine(kernel: LseAttention, a: Problem, b: Problem, *, lse_a: Tensor | None = None, lse_b: Tensor | None = None) -> Tensor:
    """[B, H], <A, B> / (||A|| ||B||) of two patterns as flat vectors, 0 to 1; 0 where one has no living row. Three calls.

    Args and Raises as `overlap`.
    """
    lse_a = log_sum_exp(kernel, a) if lse_a is None else lse_a
    lse_b = log_sum_exp(kernel, b) if lse_b is None else lse_b
    product = overlap(kernel, a, b, lse_a=lse_a, lse_b=lse_b).sum(dim=-1)
    squares = sum_squares(kernel, a, lse=lse_a).sum(dim=-1) * sum_squares(kernel, b, lse=lse_b).sum(dim=-1)
    return product / squares.sqrt().masked_fill(squares == 0, 1.0)


@torch.no_grad()
def divergence(kernel: LseAttention, a: Problem, b: Problem, *, lse_a: Tensor | None = None, lse_b: Tensor | None = None) -> Tensor:
    """[B, H, Q], KL(A_i || B_i) = E_A[s] - E_A[s'] - lse_i + lse'_i, nats; inf where A sees a key that B hides; 0 where A is dead.

    One call with the keys of both as values; in half precision eight, both means by derivatives as in `entropy`.
    Args and Raises as `overlap`. Source: Kullback & Leibler 1951.
    """
    first, second = _pair(a, b)
    lse_a = _given(kernel, first, lse_a)
    lse_b = _given(kernel, second, lse_b)
    own, other = _mean_scores(kernel, first, [first, second])
    alive = first.alive()
    rest = (lse_b - lse_a).masked_fill(~alive, 0.0)
    return (own - other + rest).masked_fill(_beyond(first, second), torch.inf).masked_fill(~alive, 0.0)


@dataclass(frozen=True, eq=False)
class Budget:
    """Where the log of the number of keys goes; the parts are not negative and add up to `total`. All [B, H], nats.

    Attributes:
        diffuse: mean entropy of a row: what a query does not decide.
        routing: mutual information between query and key: what depends on the query.
        hub: KL of the mean row from uniform: what all queries share, such as a sink.
        total: log of the number of keys.
    """

    diffuse: Tensor
    routing: Tensor
    hub: Tensor
    total: Tensor

    def shares(self) -> Tensor:
        """[B, H, 3], the parts as fractions of the total; 0 where there is but one key."""
        return torch.stack([self.diffuse, self.routing, self.hub], dim=-1) / self.total.masked_fill(self.total == 0, 1.0)[..., None]


def budget(entropy: Tensor, received: Tensor, *, lse: Tensor | None = None, keys: Tensor | None = None) -> Budget:
    """log K = diffuse + routing + hub: uniform attention is (1, 0, 0), a permutation (0, 1, 0), a sink (0, 0, 1). No call.

    With m = received / its sum, the mean row: diffuse = mean H_i, routing = H(m) - diffuse, hub = log K - H(m). The numbers may come
    from here or from `headscope.kernels.attention.attention`; without a sink, for a sink takes its share of `received`.

    Args:
        entropy: [B, H, Q], nats.
        received: [B, H, K].
        lse: [B, H, Q]; rows of -inf are dead and not counted. None: every row counts.
        keys: bool, broadcastable to [B, H, K]: keys that can be seen at all. None: every key.

    Raises:
        ShapeError: shapes that do not fit together.
    """
    if (
        entropy.dim() != 3
        or received.dim() != 3
        or entropy.shape[:2] != received.shape[:2]
        or (lse is not None and lse.shape != entropy.shape)
    ):
        raise ShapeError(
            f"entropy is {shown(entropy)}, received is {shown(received)} and lse is {None if lse is None else shown(lse)}; "
            "give [B, H, Q], [B, H, K] and [B, H, Q]"
        )
    alive = torch.ones_like(entropy, dtype=torch.bool) if lse is None else ~torch.isneginf(lse)
    living = alive.sum(dim=-1)  # [B, H]
    diffuse = entropy.masked_fill(~alive, 0.0).sum(dim=-1) / living.clamp_min(1)
    counted = torch.ones_like(received, dtype=torch.bool) if keys is None else keys.expand_as(received)
    total = counted.sum(dim=-1).clamp_min(1).to(entropy.dtype).log().masked_fill(living == 0, 0.0)
    mean = received / received.sum(dim=-1, keepdim=True).masked_fill(living[..., None] == 0, 1.0)  # [B, H, K]
    spread = torch.special.entr(mean).sum(dim=-1)  # H(m)
    return Budget(diffuse, spread - diffuse, total - spread, total)


def _given(kernel: LseAttention, plain: Plain, lse: Tensor | None) -> Tensor:
    """The lse that was handed in, or one call."""
    if lse is None:
        return log_sums(kernel, plain)
    _check_lse(plain, lse)
    return lse


def _check_lse(plain: Plain, lse: Tensor) -> None:
    if lse.shape != plain.q.shape[:3]:
        raise ShapeError(f"lse is {shown(lse)}; give that of the same problem, [B, H, Q] = {list(plain.q.shape[:3])}")


def _slope(function: Callable[[float], Tensor], step: float = _STEP) -> Tensor:
    """d function / dx at 0, error step^4 / 30 times the fifth derivative (Richardson 1911)."""
    near = (function(step) - function(-step)) / (2 * step)
    far = (function(2 * step) - function(-2 * step)) / (4 * step)
    return (4 * near - far) / 3


def _mean_scores(kernel: LseAttention, plain: Plain, others: Sequence[Plain]) -> list[Tensor]:
    """[B, H, Q] each, Σ_j P_ij s'_ij: its own scores or those of others averaged by a pattern. Dead rows hold anything."""
    if plain.half:
        return [_slope(partial(_shifted, kernel, plain, other), _STEP if other is plain else _small_step(other)) for other in others]
    values = []
    for other in others:
        bias = other.k.new_zeros(1, 1, 1) if other.key_bias is None else other.key_bias.masked_fill(torch.isneginf(other.key_bias), 0.0)
        values.append(torch.cat([other.k, bias.expand(other.k.shape[:3])[..., None].to(other.k.dtype)], dim=-1))  # [B, H, K, D + 1]
    averages = torch.split(means(kernel, plain, torch.cat(values, dim=-1)), [value.shape[3] for value in values], dim=-1)
    found = zip(others, averages, strict=True)
    return [other.scale * (other.q * average[..., :-1]).sum(dim=-1) + average[..., -1] for other, average in found]


def _shifted(kernel: LseAttention, plain: Plain, other: Plain, step: float) -> Tensor:
    """lse(s + step · s'), [B, H, Q]; its slope at 0 is the mean of s'."""
    return log_sums(kernel, plain, 1 + step) if other is plain else log_sums(kernel, add_scores(plain, other, step))


def _small_step(other: Plain) -> float:
    """A power of two that moves the scores of `other` by less than a nat, so that the slope is that of a line.

    A pattern's own scores need no such care: where they lie far apart, the lower ones have no weight.
    """
    apart = (other.k - other.k.mean(dim=2, keepdim=True)).norm(dim=-1).amax() if other.k.numel() else other.k.new_zeros(())
    reach = abs(other.scale) * float(apart) * float(other.q.norm(dim=-1).amax() if other.q.numel() else 0.0)
    if other.key_bias is not None and other.key_bias.numel():
        reach += float(other.key_bias.masked_fill(torch.isneginf(other.key_bias), 0.0).abs().amax())
    return _STEP if not 8 < reach < math.inf else 2.0 ** math.floor(math.log2(0.5 / reach))


def _pair(a: Problem, b: Problem) -> tuple[Plain, Plain]:
    if a.shape != b.shape or a.q.dtype != b.q.dtype or a.q.device != b.q.device:
        raise ShapeError(
            f"patterns of B, H, Q, K = {list(a.shape)} in {a.q.dtype} on {a.q.device} and of {list(b.shape)} in {b.q.dtype} on "
            f"{b.q.device}; only equal shapes in one dtype on one device can be compared"
        )
    return make_plain(a), make_plain(b)


def _beyond(a: Plain, b: Plain) -> Tensor:
    """[B, H, Q], bool: rows of a that see a key which the same row of b does not."""
    visible = ~a.hidden_keys()
    return a.alive() & ((a.seen(visible) > b.seen(visible)) | (a.seen(visible & b.hidden_keys()) > 0) | ~b.alive())


def _stripe(problem: Problem, lse: Tensor, offset: int, first: int) -> Tensor:
    """[B, H], the mean of offset_probability over the living queries that stand at key `first` or later and may see their key."""
    plain = make_plain(problem)
    queries, keys = problem.shape[2:]
    place = torch.arange(queries, device=plain.q.device) + (keys - queries)  # [Q]
    target = place - offset
    there = (place >= first) & (target >= 0)
    visible = ~plain.hidden_keys()[..., target.clamp(0)] if keys else there
    counted = plain.alive() & there & visible
    found = offset_probability(problem, lse, offset).masked_fill(~counted, 0.0).sum(dim=-1)
    return found / counted.sum(dim=-1).clamp_min(1)


def _period(period: int) -> int:
    if period < 1:
        raise InputError(f"period {period}: give the length of the repeated block, 1 or more")
    return period


def _columns(name: str, x: Tensor, plain: Plain, count: int, axis: str) -> Tensor:
    """[B or 1, H or 1, count, F] in the dtype of q."""
    batch, heads = plain.q.shape[:2]
    fits = x.dim() == 4 and x.shape[0] in (1, batch) and x.shape[1] > 0 and heads % x.shape[1] == 0 and x.shape[2] == count
    if not fits or not x.is_floating_point() or x.device != plain.q.device:
        raise ShapeError(
            f"{name} is {shown(x)} of {x.dtype} on {x.device}; give floating-point [B, H, {axis}, F] with B {batch} or 1, "
            f"H {heads}, a divisor of it or 1, {axis} {count}, on {plain.q.device}"
        )
    x = x.to(plain.q.dtype)
    return x if x.shape[1] == 1 else repeat_heads(x, heads)
