"""Attention and whole patterns by panels of queries, in plain torch: any device, in memory that grows with panel × K.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, F features,
P queries of one panel, W keys a panel looks at, t number of top keys. Lower-case b, h and g are those of one group.

A panel looks only at the keys that its queries can see. Where gradients are wanted the graph keeps no panel: the backward pass
makes each one again. Where they are not, all panels are worked off in the same two pieces of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headscope.kernels.panels import Group, Results, blank, column_sums, groups, panel_height, panels
from headscope.kernels.problem import Problem, Wanted, make_problem
from headscope.kernels.statistics import Statistics

_FLOOR = -1000.0  # its exp() is 0 in float32 and float64; unlike -inf it can be multiplied by that 0
_RUN = 64  # keys among which the largest is looked for at once


def run(problem: Problem, wanted: Wanted) -> tuple[Tensor | None, Statistics]:
    """Output and statistics of a whole attention.

    Args:
        problem: what is computed on.
        wanted: what is computed.

    Returns:
        The output [B, H, Q, V] in the dtype of q, and the statistics in float32, float64 for float64 inputs. Differentiable in every
        tensor of the problem but the mask.
    """
    found: dict[str, Tensor] = {}
    if wanted.names or wanted.tile is not None or wanted.top or problem.v is not None or problem.features is not None:
        found = _by_panels(problem, replace(wanted, rows=None))
    if wanted.rows is not None:
        found |= _by_panels(_only(problem, wanted.rows), Wanted(rows=wanted.rows))
    return found.pop("output", None), Statistics(**found)


@torch.no_grad()
def pattern(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """The whole pattern: the numbers of the reference without its temporaries, and without gradients.

    Args:
        q: [B, H, Q, D].
        k: [B, G, K, D].
        scale, bias, mask, is_causal, softcap: as in `headscope.kernels.reference.scores`.
        sink: as in `headscope.kernels.reference.pattern`.

    Returns:
        [B, H, Q, K] in the dtype of q; a dead row is 0.

    Raises:
        ShapeError, InputError: as the reference.
    """
    problem = make_problem(q, k, scale=scale, bias=bias, mask=mask, causal=is_causal, offset=0, softcap=softcap, sink=sink)
    result = q.new_empty(problem.shape)
    if not result.numel():
        return result
    cut = _panels(problem, None)
    with torch.autocast(q.device.type, enabled=False):  # it would take float32 products back to half
        for part in _parts(problem, Wanted(), cut):
            for panel in cut:
                scores = part.scores(panel)
                dead = None if bias is None and mask is None else torch.isneginf(scores.amax(dim=-1, keepdim=True))
                if part.sink is None:
                    weights = torch.softmax(scores, dim=-1, out=scores)
                else:
                    column = part.sink[..., None].expand(*scores.shape[:-1], 1)
                    weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
                block = result[part.group.batch, part.group.heads, panel.rows]
                block[..., : panel.keys.start] = 0
                block[..., panel.keys] = weights if dead is None else weights.masked_fill_(dead, 0.0)
                block[..., panel.keys.stop :] = 0
    return result


def _only(problem: Problem, rows: Sequence[int]) -> Problem:
    """The statistics of some queries alone, in any order."""
    chosen = torch.tensor(rows, dtype=torch.int64, device=problem.q.device)

    def picked(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[2] == 1 else tensor[:, :, chosen]

    return replace(
        problem, q=problem.q[:, :, chosen], v=None, features=None, first=problem.first[chosen], stop=problem.stop[chosen],
        bias=picked(problem.bias), mask=picked(problem.mask),
    )  # fmt: skip


def _by_panels(problem: Problem, wanted: Wanted) -> dict[str, Tensor]:
    """The statistics and, with v, `output`, all by name."""
    results = Results(_blank(problem, wanted), wanted.tile)
    if 0 not in problem.shape:
        cut = _panels(problem, wanted.tile)
        for part in _parts(problem, wanted, cut):
            for panel in cut:
                if problem.needs_gradient:
                    values, sums = checkpoint(part.measure, panel, use_reentrant=False, preserve_rng_state=False)
                else:
                    values, sums = part.measure(panel)
                results.add_rows(values)
                if sums is not None:
                    results.add_columns(part.group, panel.rows, panel.keys, sums)
            results.join(part.group)
    _spread_nan(results.found, wanted.tile)
    return results.found


@dataclass(frozen=True)
class _Panel:
    """Some consecutive queries and the keys that they can see.

    Attributes:
        rows, keys: which.
        common: those of the keys, counted from the first of them, that no query of these is kept from by `first` or `stop`.
    """

    rows: slice
    keys: slice
    common: slice


def _panels(problem: Problem, tile: int | None) -> list[_Panel]:
    queries, keys = problem.shape[2:]
    first, stop = problem.first.tolist(), problem.stop.tolist()
    found = []
    for rows in panels(queries, panel_height(queries, problem.q.device), tile):
        begin = min(*first[rows], keys - 1)  # one key at least, even if none of them sees it
        end = max(*stop[rows], begin + 1)
        common = slice(min(max(first[rows]), end) - begin, max(min(stop[rows]), begin) - begin)
        found.append(_Panel(rows, slice(begin, end), common))
    return found


def _parts(problem: Problem, wanted: Wanted, cut: list[_Panel]) -> Iterator[_Part]:
    """The problem in groups of batch entries and heads that are worked on together."""
    batch, heads, _, _ = problem.shape
    one_head = max((panel.rows.stop - panel.rows.start) * (panel.keys.stop - panel.keys.start) for panel in cut)
    scratch = None
    for group in groups(batch, heads, problem.shared, one_head, problem.q.device):
        if scratch is None and not problem.needs_gradient:
            scratch = torch.empty(2, group.size * one_head, dtype=problem.precision, device=problem.q.device)
        yield _Part(problem, wanted, group, scratch)


class _Part:
    """Some batch entries and heads of a problem, in the precision of its sums.

    Attributes:
        group: which.
        sink: [h, 1]; None where there is none.
    """

    def __init__(self, problem: Problem, wanted: Wanted, group: Group, scratch: Tensor | None) -> None:
        dtype, shared = problem.precision, problem.shared
        pairs = (group.batch, slice(group.heads.start // shared, group.heads.stop // shared))
        self.problem, self.wanted, self.group, self.dtype = problem, wanted, group, dtype
        self.q = problem.q[group.batch, group.heads]  # [b, h, Q, D]
        self.k = problem.k[pairs].to(dtype).flatten(0, 1)  # [b·g, K, D]
        self.v = None if problem.v is None else problem.v[pairs].to(dtype).flatten(0, 1)  # [b·g, K, V]
        self.temperature = None if problem.temperature is None else problem.temperature[group.heads, None, None].to(dtype)
        self.sink = None if problem.sink is None else problem.sink[group.heads, None].to(dtype)
        self.gate = None if problem.gate is None else problem.gate[group.heads, None, None].to(dtype)
        self._nothing = self.k.new_zeros(1, 1, 1)
        self._scratch = scratch  # [2, cells]; None where a graph will need what is computed

    def scores(self, panel: _Panel) -> Tensor:
        """[b, h, P, W], -inf where a key may not be seen."""
        problem, keys, common = self.problem, panel.keys, panel.common
        q = self.q[:, :, panel.rows].to(self.dtype)  # [b, h, P, D]
        k = self.k[:, keys]  # [b·g, W, D]
        width = k.shape[1]
        together = q.reshape(len(k), -1, q.shape[3])  # [b·g, H/G·P, D]: heads that share keys as one head of more queries
        place = self._place(0, (*together.shape[:2], width))
        nothing = self._nothing if place is None else place
        # The scale comes after the product, not on q, so that equal products stay equal.
        seen = torch.baddbmm(nothing, together, k.transpose(1, 2), beta=0, alpha=problem.scale, out=place).view(*q.shape[:3], width)
        if self.temperature is not None:
            seen = torch.div(seen, self.temperature, out=self._over(seen))
        if problem.softcap is not None:
            seen = seen.div_(problem.softcap).tanh_()
            seen = torch.mul(seen, problem.softcap, out=self._over(seen))
        if problem.bias is not None:
            seen.add_(self._cut(problem.bias, panel.rows, keys))
        if problem.key_bias is not None:
            seen.add_(self._cut(problem.key_bias[:, :, None], panel.rows, keys))
        if problem.mask is not None:
            seen.masked_fill_(~self._cut(problem.mask, panel.rows, keys), -torch.inf)
        if common.start > 0:
            key = torch.arange(keys.start, keys.start + common.start, device=q.device)
            seen[..., : common.start].masked_fill_(key < problem.first[panel.rows, None], -torch.inf)
        if common.stop < width:
            key = torch.arange(keys.start + common.stop, keys.stop, device=q.device)
            seen[..., common.stop :].masked_fill_(key >= problem.stop[panel.rows, None], -torch.inf)
        return seen

    def measure(self, panel: _Panel) -> tuple[dict[str, Tensor], Tensor | None]:
        """What a panel tells of its queries, [b, h, P, ...] by name, and of its keys, as `column_sums` does."""
        problem, wanted, names, keys = self.problem, self.wanted, self.wanted.names, panel.keys
        found: dict[str, Tensor] = {}
        scores = self.scores(panel)
        top, place = _largest(scores, "argmax" in names)  # [b, h, P]
        top = top.masked_fill(torch.isposinf(top), torch.nan)  # it has no softmax
        dead, broken = torch.isneginf(top), top.isnan()
        if place is not None:
            found["argmax"] = (place + keys.start).masked_fill(dead | broken, -1)
        if "max_score" in names:
            found["max_score"] = top
        shift = top.masked_fill(dead, 0.0)
        mixes = self.v is not None or problem.features is not None or wanted.rows is not None or wanted.tile is not None
        if not (mixes or wanted.top or names - {"argmax", "max_score"}):
            return found, None
        if wanted.top:
            places = _top_places(scores, broken, min(wanted.top, scores.shape[3]))
            chosen = scores.gather(-1, places) - shift[..., None]
        shifted = torch.sub(scores, shift[..., None], out=self._over(scores))  # a frame in which a common offset costs no accuracy
        p = torch.exp(shifted, out=self._place(1, shifted.shape))  # [b, h, P, W], largest 1; 0 in dead rows
        total = p.sum(dim=-1).masked_fill(dead, 1.0)
        log_total = total.log()
        if "lse" in names:
            found["lse"] = (shift + log_total).masked_fill(dead, -torch.inf)
        if "entropy" in names:
            shifted = torch.clamp_min(shifted, _FLOOR, out=self._over(shifted))
            found["entropy"] = log_total - torch.mul(p, shifted, out=self._over(shifted)).sum(dim=-1) / total
        if "sum_squares" in names:
            found["sum_squares"] = torch.mul(p, p, out=self._over(shifted)).sum(dim=-1) / total.square()
        if self.sink is not None:
            log_total = torch.logaddexp(log_total, self.sink - shift)
        weight = (-log_total).exp().masked_fill(dead, 0.0)  # the pattern is weight · p
        if "p_max" in names:
            found["p_max"] = weight
        if self.v is not None:
            output = torch.bmm(p.view(len(self.v), -1, p.shape[3]), self.v[:, keys])
            output = output.view(*p.shape[:3], self.v.shape[2]) * weight[..., None]
            found["output"] = (output if self.gate is None else output * self.gate).to(problem.q.dtype)
        if problem.features is not None:
            found["moments"] = p @ self._cut(problem.features, keys, slice(None)) * weight[..., None]
        if wanted.rows is not None:
            found["rows"] = _whole_rows(p, weight, keys, problem.shape[3])
        if wanted.top:
            found |= _top(places, chosen, weight, keys.start, wanted.top)
        if wanted.tile is None and "received" not in names:
            return found, None
        found["broken"] = weight.isnan()
        return found, column_sums(p, weight, wanted.tile)

    def _cut(self, tensor: Tensor, third: slice, fourth: slice) -> Tensor:
        """The part of [B or 1, H or 1, ·, ·] that lies over this one and two slices; an axis of 1 lies everywhere."""
        where = (self.group.batch, self.group.heads, third, fourth)
        mine = tensor[tuple(slice(None) if size == 1 else part for size, part in zip(tensor.shape, where, strict=True))]
        return mine if mine.dtype == torch.bool else mine.to(self.dtype)

    def _place(self, number: int, shape: Sequence[int]) -> Tensor | None:
        """Where a new result of this shape may be written; None for new memory."""
        return None if self._scratch is None else self._scratch[number, : math.prod(shape)].view(shape)

    def _over(self, old: Tensor) -> Tensor | None:
        """Where a result may be written that replaces this one; None for new memory."""
        return None if self._scratch is None else old


def _largest(scores: Tensor, with_place: bool) -> tuple[Tensor, Tensor | None]:
    """The largest score of each row [b, h, P], and the first place that has it.

    torch finds a place ten times slower than a value, so it is looked for only in the first run of keys that has the largest.
    """
    if not with_place:
        return scores.amax(dim=-1), None
    width = scores.shape[3]
    whole = width // _RUN * _RUN
    runs = scores[..., :whole].view(*scores.shape[:3], whole // _RUN, _RUN).amax(dim=-1)
    if whole < width:
        runs = torch.cat([runs, scores[..., whole:].amax(dim=-1, keepdim=True)], dim=-1)
    run = runs.argmax(dim=-1, keepdim=True)
    places = (run * _RUN + torch.arange(_RUN, device=scores.device)).clamp_max(width - 1)  # [b, h, P, 64]
    return runs.amax(dim=-1), run.squeeze(-1) * _RUN + scores.gather(-1, places).argmax(dim=-1)


@torch.no_grad()
def _top_places(scores: Tensor, broken: Tensor, count: int) -> Tensor:
    """Where the largest scores of each row are, [b, h, P, count], the largest first; the lowest place on a tie, unlike torch.topk."""
    seen = scores.masked_fill(broken[..., None], 0.0)
    least = seen.topk(count).values[..., -1:]
    above, level = seen > least, seen == least
    chosen = above | (level & (level.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))
    places = chosen.nonzero()[:, -1].view(*scores.shape[:-1], count)  # from low to high
    return places.gather(-1, seen.gather(-1, places).argsort(dim=-1, descending=True, stable=True))


def _top(places: Tensor, shifted: Tensor, weight: Tensor, first: int, count: int) -> dict[str, Tensor]:
    """Top keys and weights, [b, h, P, count], of which there may be fewer: `places` counted from the first key, scores as `shifted`."""
    hidden = torch.isneginf(shifted) | weight.isnan()[..., None]
    weights = shifted.clamp_min(_FLOOR).exp() * weight[..., None]
    missing = count - places.shape[-1]
    nothing = (weight * 0)[..., None].expand(*weight.shape, missing)
    return {
        "top_keys": torch.nn.functional.pad((places + first).masked_fill(hidden, -1), (0, missing), value=-1),
        "top_weights": torch.cat([weights, nothing], dim=-1),
    }


def _whole_rows(p: Tensor, weight: Tensor, keys: slice, count: int) -> Tensor:
    """[b, h, P, K], rows of the pattern; the keys that were not looked at get 0, and NaN in a row of NaN."""
    nothing = (weight * 0)[..., None]
    before, after = nothing.expand(*weight.shape, keys.start), nothing.expand(*weight.shape, count - keys.stop)
    return torch.cat([before, p * weight[..., None], after], dim=-1)


def _blank(problem: Problem, wanted: Wanted) -> dict[str, Tensor]:
    """All results as they are where every row is dead; `broken` marks the rows of NaN."""
    (batch, heads, queries, keys), q, dtype = problem.shape, problem.q, problem.precision
    found = blank(problem.shape, wanted.names, wanted.tile, dtype, q.device)
    if problem.v is not None:
        found["output"] = q.new_zeros(batch, heads, queries, problem.v.shape[3])
    if problem.features is not None:
        found["moments"] = q.new_zeros(batch, heads, queries, problem.features.shape[3], dtype=dtype)
    if wanted.rows is not None:
        found["rows"] = q.new_zeros(batch, heads, queries, keys, dtype=dtype)
    if wanted.top:
        found["top_keys"] = q.new_full((batch, heads, queries, wanted.top), -1, dtype=torch.int64)
        found["top_weights"] = q.new_zeros(batch, heads, queries, wanted.top, dtype=dtype)
    if wanted.tile is not None or "received" in wanted.names:
        found["broken"] = q.new_zeros(batch, heads, queries, dtype=torch.bool)
    return found


def _spread_nan(found: dict[str, Tensor], tile: int | None) -> None:
    """A row of NaN makes NaN of every key and tile it gives to, also where no panel has looked."""
    broken = found.pop("broken", None)
    if broken is not None and "received" in found:
        found["received"] = found["received"].masked_fill(broken.any(dim=-1, keepdim=True), torch.nan)
    if broken is not None and tile is not None:
        tiles = found["pooled"].shape[2]
        full = torch.nn.functional.pad(broken, (0, tiles * tile - broken.shape[2]))
        found["pooled"] = found["pooled"].masked_fill(full.view(*full.shape[:2], tiles, tile).any(dim=-1)[..., None], torch.nan)
