"""From the gradient of an attention's output to those of its inputs, under a rule, in plain torch: dense, by panels, or as torch does it.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, P queries of one panel, W keys a panel can see, D width of a
query or key, V width of a value.

Every implementation, the Triton one too, has one signature:

    backward(problem, z, lse, grad, rule) -> Relevance

with z [B, H, Q, V] the output before the gate, lse [B, H, Q] as in `Statistics` (over the real keys, -inf in a dead row), and grad
[B, H, Q, V] the gradient with respect to z. `headscope.kernels.relevance` holds the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from headscope.kernels import reference
from headscope.kernels.errors import InputError
from headscope.kernels.problem import Problem, Wanted
from headscope.kernels.reference import repeat_heads

_CELLS, _ROWS = 1 << 18, 64  # scores worked on at once, and queries of a panel, on a CPU: larger ones leave the cache
_DEVICE_CELLS, _DEVICE_ROWS = 1 << 24, 256  # elsewhere: smaller ones leave the device idle


@dataclass(frozen=True)
class Rule:
    """How what arrives at a product or at a softcap is passed on.

    Attributes:
        splits: True for AttnLRP, where the two factors of a product share what arrives; False for the ordinary gradient.
        epsilon: takes in relevance where an output is near 0; in the unit of v.
        epsilon_scores: the same for the products q·k, before scale; in the unit of q·k.

    Raises:
        InputError: an epsilon that is negative or not finite, or one beside the ordinary gradient.
    """

    splits: bool
    epsilon: float = 0.0
    epsilon_scores: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("epsilon_scores", self.epsilon_scores)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} {value}: give 0 or a positive number")
            if value and not self.splits:
                raise InputError(f"{name} {value} beside rule='gradient', which has none: leave it at 0")

    @property
    def part(self) -> float:
        """What each factor of a product gets."""
        return 0.5 if self.splits else 1.0


GRADIENT = Rule(splits=False)


@dataclass(frozen=True, eq=False)
class Relevance:
    """What arrives at the inputs of an attention.

    Attributes:
        q: [B, H, Q, D], k: [B, G, K, D], v: [B, G, K, V], modified gradients g in the dtype of the inputs. The relevance of an input x
            is x * g. Under the rule "gradient" they are the ordinary gradients.
        rows: [B, H, Q], the relevance of each row of the pattern, summed over the keys.
        columns: [B, H, K], the relevance of each column of the pattern, summed over the queries; it is also the relevance that v
            gets through this query head, summed over V.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    columns: Tensor


Backward: TypeAlias = Callable[[Problem, Tensor, Tensor, Tensor, Rule], Relevance]


def ungated(problem: Problem, output: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """z and its gradient, from an output that the gate has multiplied and the gradient of that; a gate is a constant factor.

    Behind a gate of 0 z is not known; it is given as 0, which changes nothing, since the gradient of z is 0 there.
    """
    if problem.gate is None:
        return output, grad
    gate = problem.gate.to(problem.precision)[:, None, None]
    z = output / gate.masked_fill(gate == 0, torch.inf)
    return z.to(output.dtype), (grad * gate).to(grad.dtype)


def passed_on(x: Tensor, epsilon: float) -> Tensor:
    """|x| / (|x| + ε/2): the part of what arrives at x that is not taken in by ε. 0 at x = 0."""
    size = x.abs()
    return size / (size + epsilon / 2).masked_fill(size == 0, 1.0)


def pattern_lse(problem: Problem, lse: Tensor) -> Tensor:
    """[B, H, Q]: exp(score - it) is the pattern. The sink is in it; in a dead row it is +inf, which makes the pattern 0."""
    dead = torch.isneginf(lse)
    full = lse.to(problem.precision)
    if problem.sink is not None:
        full = torch.logaddexp(full, problem.sink.to(full.dtype)[:, None])
    return full.masked_fill(dead, torch.inf)


def dense(problem: Problem, z: Tensor, lse: Tensor, grad: Tensor, rule: Rule) -> Relevance:
    """The rules in the form in which they are published, relevance by relevance, in float64 and with the whole pattern held.

    The ordinary gradient is autograd's. z and lse are not looked at: they come from the inputs.
    """
    del z, lse
    values = _values(problem)
    q, k, v = (tensor.detach().double().requires_grad_(not rule.splits) for tensor in (problem.q, problem.k, values))
    queries, grad = q.shape[2], grad.double()
    exact = replace(problem, q=q, k=k, v=v, gate=None, features=None)
    with torch.set_grad_enabled(not rule.splits):
        made, statistics = reference.run(exact, Wanted(rows=tuple(range(queries))))
    assert made is not None
    assert statistics.rows is not None
    z, pattern = made, statistics.rows
    heads, shared = q.shape[1], problem.shared
    if not rule.splits:
        to_q, to_k, to_v = torch.autograd.grad(z, (q, k, v), grad)
        of_pattern = (pattern * (grad @ repeat_heads(v, heads).mT)).detach()
        return _result(problem, to_q, to_k, to_v, of_pattern.sum(dim=-1), of_pattern.sum(dim=-2))

    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    # z = pattern @ v: each gets its terms' share of R_z / 2z.
    of_z = z * grad
    quotient = _quotient(of_z, 2 * z, rule.epsilon, grad / 2)  # [B, H, Q, V]
    of_pattern = pattern * (quotient @ v.mT)  # R_P
    to_v = pattern.mT @ quotient  # R_V = v * it
    # softmax: R of a score is score * (R_P - P ΣR_P); of a sum of scores, each summand gets its own part of that.
    of_row = of_pattern.sum(dim=-1, keepdim=True)
    of_unit_score = of_pattern - pattern * of_row
    products = q @ k.mT  # [B, H, Q, K]
    scales = problem.head_scales(torch.float64)[:, None, None]
    scores = products * scales
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    of_scores = scores * of_unit_score
    # softcap and scale have one input each, which gets everything; then q kᵀ shares as z did.
    quotient = _quotient(of_scores, 2 * products, rule.epsilon_scores, scales * of_unit_score / 2)
    to_q, to_k = quotient @ k, quotient.mT @ q
    to_k, to_v = (_add_shared(tensor, shared) for tensor in (to_k, to_v))
    return _result(problem, to_q, to_k, to_v, of_row[..., 0], of_pattern.sum(dim=-2))


def _quotient(above: Tensor, below: Tensor, epsilon: float, limit: Tensor) -> Tensor:
    """above / (below + ε·sign(below)); without ε, where both are 0, its limit."""
    stable = below + torch.full_like(below, epsilon).copysign(below)
    gone = stable == 0
    return torch.where(gone, limit, above / stable.masked_fill(gone, 1.0))


def blockwise(problem: Problem, z: Tensor, lse: Tensor, grad: Tensor, rule: Rule) -> Relevance:
    """By panels of queries, with the pattern computed anew: memory grows with panel × K, not with Q × K. Any device."""
    batch, heads, queries, keys = problem.shape
    dtype, shared = problem.precision, problem.shared
    q, k, v, z, grad = (tensor.to(dtype) for tensor in (problem.q, problem.k, _values(problem), z, grad))
    arriving = grad * rule.part
    if rule.epsilon:
        arriving = arriving * passed_on(z, rule.epsilon)
    rows = (arriving * z).sum(dim=-1)  # [B, H, Q]
    lse, scales = pattern_lse(problem, lse), problem.head_scales(dtype)
    to_q, to_k, to_v = (torch.zeros(tensor.shape, dtype=dtype, device=q.device) for tensor in (q, k, v))
    columns = q.new_zeros(batch, heads, keys)
    for panel in _panels(problem):
        sample, some, groups, mine, seen = panel.sample, panel.heads, panel.groups, panel.rows, panel.keys
        count = panel.stop_group - panel.first_group

        def shape_as_pattern(x: Tensor, groups: int = count) -> Tensor:
            return x.view(groups * shared, -1, x.shape[-1])  # [G, H/G * P, W] -> [H, P, W]

        def shape_as_keys(x: Tensor, groups: int = count) -> Tensor:
            return x.reshape(groups, -1, x.shape[-1])  # back

        own_q, own_arriving = shape_as_keys(q[sample, some, mine]), shape_as_keys(arriving[sample, some, mine])
        own_k, own_v = k[sample, groups, seen], v[sample, groups, seen]
        products = shape_as_pattern(own_q @ own_k.mT)
        scores = products * scales[some, None, None]
        slope = None
        if problem.softcap is not None:
            capped = problem.softcap * torch.tanh(scores / problem.softcap)
            if rule.splits:
                slope = torch.where(scores == 0, 1.0, capped / scores.masked_fill(scores == 0, 1.0))
            else:
                slope = 1 - (capped / problem.softcap).square()
            scores = capped
        pattern = (panel.hide(problem, scores) - lse[sample, some, mine, None]).exp_()
        of_cells = shape_as_pattern(own_arriving @ own_v.mT)
        columns[sample, some, seen] += (pattern * of_cells).sum(dim=-2)
        to_v[sample, groups, seen] += shape_as_keys(pattern).mT @ own_arriving
        weights = pattern * of_cells.sub_(rows[sample, some, mine, None]) * (scales * rule.part)[some, None, None]
        if slope is not None:
            weights *= slope
        if rule.epsilon_scores:
            weights *= passed_on(products, rule.epsilon_scores)
        weights = shape_as_keys(weights)
        to_q[sample, some, mine] = shape_as_pattern(weights @ own_k)
        to_k[sample, groups, seen] += weights.mT @ own_q
    return _result(problem, to_q, to_k, to_v, rows, columns)


@dataclass(frozen=True)
class _Panel:
    """Consecutive queries of some heads of one batch entry, and the keys that any of them can see."""

    sample: int
    first_group: int
    stop_group: int
    shared: int
    rows: slice
    keys: slice
    even: bool  # each of these queries sees all these keys, as far as causality, window and packing go

    @property
    def groups(self) -> slice:
        return slice(self.first_group, self.stop_group)

    @property
    def heads(self) -> slice:
        return slice(self.first_group * self.shared, self.stop_group * self.shared)

    def hide(self, problem: Problem, scores: Tensor) -> Tensor:
        """[H, P, W]: the scores with biases added, -inf where a key may not be seen."""
        if problem.bias is not None:
            scores = scores + self._cut(problem.bias).to(scores.dtype)
        if problem.key_bias is not None:
            scores = scores + self._cut(problem.key_bias[:, :, None]).to(scores.dtype)
        if problem.mask is not None:
            scores = scores.masked_fill(~self._cut(problem.mask), -torch.inf)
        if not self.even:
            key = torch.arange(self.keys.start, self.keys.stop, dtype=torch.int32, device=scores.device)
            first, stop = problem.first[self.rows, None], problem.stop[self.rows, None]
            scores = scores.masked_fill((key < first) | (key >= stop), -torch.inf)
        return scores

    def _cut(self, extra: Tensor) -> Tensor:
        """The part of [B or 1, H or 1, Q or 1, K or 1] over this panel, broadcastable to [H, P, W]."""
        part = extra[self.sample if extra.shape[0] > 1 else 0]
        own = (self.heads, self.rows, self.keys)
        return part[tuple(cut if size > 1 else slice(None) for size, cut in zip(part.shape, own, strict=True))]


def _panels(problem: Problem) -> Iterator[_Panel]:
    """All of [B, H, Q, K] that may be seen; query heads that share a key head stay together."""
    batch, _, queries, keys = problem.shape
    shared, groups = problem.shared, problem.k.shape[1]
    cells, rows = (_CELLS, _ROWS) if problem.q.device.type == "cpu" else (_DEVICE_CELLS, _DEVICE_ROWS)
    together = max(1, cells // max(1, shared * rows * keys))
    first, stop = problem.first.tolist(), problem.stop.tolist()
    for start in range(0, queries, rows):
        end = min(start + rows, queries)
        seen = slice(first[start], stop[end - 1])
        even = first[end - 1] == first[start] and stop[end - 1] == stop[start]
        if seen.start >= seen.stop:
            continue
        for sample in range(batch):
            for group in range(0, groups, together):
                yield _Panel(sample, group, min(group + together, groups), shared, slice(start, end), seen, even)


def stock_refuses(problem: Problem, rule: Rule) -> str | None:
    """Why torch's own backward does not give this; None if it does."""
    extras = ("softcap", "bias", "mask", "key_bias", "temperature", "sink")
    given = [name for name in extras if getattr(problem, name) is not None]
    if given:
        return f"{given[0]} changes the scores, and torch's attention knows none here"
    if rule.epsilon_scores:
        return f"epsilon_scores {rule.epsilon_scores} acts inside the softmax"
    if problem.q.shape[3] != _values(problem).shape[3]:
        return "values of another width than queries make torch hold the whole pattern"
    if problem.q.dtype == torch.float64 and problem.q.device.type != "cpu":
        return "float64 makes torch hold the whole pattern on this device"
    if not problem.whole and not _is_triangle(problem):
        return "torch's attention knows no window, packing or causality other than that of as many queries as keys"
    return None


def _is_triangle(problem: Problem) -> bool:
    _, _, queries, keys = problem.shape
    ends = torch.arange(1, queries + 1, dtype=torch.int32, device=problem.q.device)
    return queries == keys and bool((problem.first == 0).all()) and torch.equal(problem.stop, ends)


def stock(problem: Problem, z: Tensor, lse: Tensor, grad: Tensor, rule: Rule) -> Relevance:
    """By the backward of `torch.nn.functional.scaled_dot_product_attention`, for what `stock_refuses` lets through.

    Without softcap and ε on the products, AttnLRP is the ordinary backward from a changed gradient, with half of it for q and k.
    z and lse are not looked at: torch's own forward is run.
    """
    del z, lse
    heads, shared, dtype = problem.q.shape[1], problem.shared, problem.precision
    q, k, v = (repeat_heads(tensor.detach(), heads).clone().requires_grad_() for tensor in (problem.q, problem.k, _values(problem)))
    with torch.enable_grad():
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=not problem.whole, scale=problem.scale)
    z = output.detach().to(dtype)
    arriving = grad.to(dtype) * rule.part
    if rule.epsilon:
        arriving = arriving * passed_on(z, rule.epsilon)
    to_q, to_k, to_v = (found.to(dtype) for found in torch.autograd.grad(output, (q, k, v), arriving.to(output.dtype)))
    columns = (v.detach().to(dtype) * to_v).sum(dim=-1)
    to_k, to_v = (_add_shared(tensor, shared) for tensor in (to_k, to_v))
    return _result(problem, to_q * rule.part, to_k * rule.part, to_v, (arriving * z).sum(dim=-1), columns)


def _add_shared(x: Tensor, shared: int) -> Tensor:
    """[B, H, K, D] -> [B, G, K, D]: what the query heads send to the key/value head they share."""
    batch, heads, keys, width = x.shape
    return x.reshape(batch, heads // shared, shared, keys, width).sum(dim=2)


def _values(problem: Problem) -> Tensor:
    assert problem.v is not None  # `relevance` has asked for them
    return problem.v


def _result(problem: Problem, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Relevance:
    given = problem.q.dtype
    return Relevance(q.to(given), k.to(given), v.to(given), rows.to(problem.precision), columns.to(problem.precision))
