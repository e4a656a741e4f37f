"""Statistics panel by panel: what is shared by whatever computes them from some rows of the map at a time.

Letters: B batch, H query heads, Q queries, K keys, P queries of one panel, W keys a panel looks at, t side of a tile.
Lower-case b and h are the batch entries and heads of one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels.errors import ShapeError
from headscope.kernels.statistics import NAMES, ROW_NAMES, Statistics, check_names

OF_SCORES = frozenset(("lse", "max_score"))  # what a pattern alone does not tell

# Scores worked on at once, and queries of one panel. On a CPU more of them leave the cache; on a GPU fewer idle it.
_CPU_CELLS, _CPU_ROWS = 1 << 19, 128
_CELLS, _ROWS = 1 << 24, 256


def statistics_of_pattern(
    pattern: Tensor, want: Sequence[str] = NAMES, pooled: int | None = None, scores: Tensor | None = None
) -> Statistics:
    """The same statistics from a pattern that is already there, whatever normaliser or edit made it.

    Rows need not sum to 1: entropy and sum_squares renormalise them. A row of zeros is dead. Entries below 0, which only an
    edit can make, have no entropy: NaN.

    Args:
        pattern: [B, H, Q, K].
        want: names out of `NAMES`. `lse` and `max_score` are given only with `scores`, else None: a pattern does not determine them.
        pooled: side t of the tiles of the pooled map; None for no map.
        scores: [B, H, Q, K], what the softmax saw.

    Raises:
        ShapeError: not four axes, or scores of another shape.
        InputError: a tile that is not positive.
        SelectionError: a statistic that does not exist.
    """
    if pattern.dim() != 4 or not pattern.is_floating_point():
        raise ShapeError(f"the pattern is {list(pattern.shape)} of {pattern.dtype}; give floating-point [B, H, Q, K]")
    if scores is not None and scores.shape != pattern.shape:
        raise ShapeError(f"the scores are {list(scores.shape)} and the pattern is {list(pattern.shape)}; they must be equal")
    names = check_names(want, pooled)
    if scores is None:
        names -= OF_SCORES
    dtype = torch.float64 if pattern.dtype == torch.float64 else torch.float32
    batch, heads, queries, keys = pattern.shape
    shape = (batch, heads, queries, keys)
    results = Results(blank(shape, names, pooled, dtype, pattern.device), pooled)
    if 0 in shape:
        return Statistics(**results.found)
    every_key = slice(0, keys)
    with torch.autocast(pattern.device.type, enabled=False):
        height = panel_height(queries, pattern.device)
        for group in groups(batch, heads, 1, height * keys, pattern.device):
            for rows in panels(queries, height, pooled):
                index = (group.batch, group.heads, rows)
                p = pattern[index].to(dtype)
                values = _of_pattern(p, names)
                if scores is not None:
                    values |= _of_scores(scores[index].to(dtype), names)
                results.add_rows(values)
                if pooled is not None or "received" in names:
                    results.add_columns(group, rows, every_key, column_sums(p, None, pooled))
            results.join(group)
    return Statistics(**results.found)


def _of_pattern(p: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
    """Row statistics of one panel of a pattern [b, h, P, K], K > 0; all but those of scores."""
    found: dict[str, Tensor] = {}
    dead = (p == 0).all(dim=-1)  # [b, h, P]
    if "argmax" in names:
        found["argmax"] = p.argmax(dim=-1).masked_fill(dead | p.isnan().any(dim=-1), -1)
    if "p_max" in names:
        found["p_max"] = p.amax(dim=-1)
    if not names.isdisjoint(("entropy", "sum_squares")):
        share = p / p.sum(dim=-1, keepdim=True).masked_fill(dead[..., None], 1.0)
        if "entropy" in names:
            counted = share.masked_fill(share == 0, 1.0)  # 0 log 0 is 0, and so is its gradient
            found["entropy"] = -(counted * counted.log()).sum(dim=-1)
        if "sum_squares" in names:
            found["sum_squares"] = share.square().sum(dim=-1)
    return found


def _of_scores(scores: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
    """Of one panel of scores [b, h, P, K], K > 0, what the pattern does not tell. +inf has no softmax: NaN."""
    found: dict[str, Tensor] = {}
    top = scores.amax(dim=-1)
    top = top.masked_fill(torch.isposinf(top), torch.nan)
    dead = torch.isneginf(top)  # logsumexp gives such a row a gradient of NaN
    if "max_score" in names:
        found["max_score"] = top
    if "lse" in names:
        alive = scores.masked_fill(dead[..., None], 0.0).logsumexp(dim=-1).masked_fill(dead, -torch.inf)
        found["lse"] = alive.masked_fill(top.isnan(), torch.nan)
    return found


@dataclass(frozen=True)
class Group:
    """Some batch entries and heads that are worked on together."""

    batch: slice
    heads: slice

    @property
    def size(self) -> int:
        """b · h."""
        size: int = (self.batch.stop - self.batch.start) * (self.heads.stop - self.heads.start)
        return size


def groups(batch: int, heads: int, shared: int, one_head: int, device: torch.device) -> Iterator[Group]:
    """All batch entries and heads in groups of a good size, the largest first.

    Args:
        shared: how many neighbouring heads stay together.
        one_head: the scores of one panel of one head.
    """
    cells = _CPU_CELLS if device.type == "cpu" else _CELLS
    batch_step = max(1, cells // (heads * one_head))
    head_step = max(1, cells // (shared * one_head)) * shared
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            yield Group(slice(b, min(b + batch_step, batch)), slice(h, min(h + head_step, heads)))


def panel_height(queries: int, device: torch.device) -> int:
    """How many queries a panel may have."""
    return min(queries, _CPU_ROWS if device.type == "cpu" else _ROWS)


def panels(queries: int, height: int, tile: int | None) -> Iterator[slice]:
    """All queries in panels of at most that height, each within one row of tiles or made of whole rows of tiles."""
    step = height if tile is None or tile > height else height // tile * tile
    for first in range(0, queries, queries if tile is None else max(tile, step)):
        last = queries if tile is None else min(queries, first + max(tile, step))
        whole = last if tile is None or tile > step else last // tile * tile  # a row of tiles that is cut off comes alone
        for start in range(first, whole, step):
            yield slice(start, min(start + step, whole))
        if whole < last:
            yield slice(whole, last)


def column_sums(p: Tensor, weight: Tensor | None, tile: int | None) -> Tensor:
    """What a panel [b, h, P, W] gives to its keys, [b, h, R, W], for each of the R rows of tiles that it is made of.

    Args:
        p: the pattern, to be multiplied by weight.
        weight: [b, h, P]; None for 1.
        tile: None for R = 1.
    """
    batch, heads, height, width = p.shape
    parts = 1 if tile is None or height <= tile else height // tile
    if weight is None:
        weight = torch.ones((), dtype=p.dtype, device=p.device).expand(p.shape[:-1])
    # [b, h, R, 1, P/R] @ [b, h, R, P/R, W]. The rows of one tile alone are summed, so that a NaN stays among them.
    sums = weight.reshape(batch, heads, parts, 1, height // parts) @ p.reshape(batch, heads, parts, height // parts, width)
    return sums.squeeze(-2)


def blank(
    shape: tuple[int, int, int, int], names: frozenset[str], tile: int | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The named statistics of a map in which every row is dead."""
    batch, heads, queries, keys = shape
    found: dict[str, Tensor] = {}
    for name in ROW_NAMES:
        if name in names:
            value = {"lse": -torch.inf, "max_score": -torch.inf, "argmax": -1}.get(name, 0)
            kind = torch.int64 if name == "argmax" else dtype
            found[name] = torch.full((batch, heads, queries), value, dtype=kind, device=device)
    if "received" in names:
        found["received"] = torch.zeros(batch, heads, keys, dtype=dtype, device=device)
    if tile is not None:
        found["pooled"] = torch.zeros(batch, heads, -(-queries // tile), -(-keys // tile), dtype=dtype, device=device)
    return found


class Results:
    """Statistics as they come in, panel by panel."""

    def __init__(self, found: dict[str, Tensor], tile: int | None) -> None:
        self.found = found  # [B, H, ...] by name
        self.tile = tile
        self._pieces: dict[str, list[Tensor]] = {}

    def add_rows(self, values: dict[str, Tensor]) -> None:
        """What one more panel of a group has to say about its queries, [b, h, P, ...] by name."""
        for name, value in values.items():
            self._pieces.setdefault(name, []).append(value)

    def join(self, group: Group) -> None:
        """All panels of a group have been added."""
        for name, pieces in self._pieces.items():
            self.found[name][group.batch, group.heads] = torch.cat(pieces, dim=2)
        self._pieces.clear()

    def add_columns(self, group: Group, rows: slice, keys: slice, sums: Tensor) -> None:
        """What one panel gives to its keys, [b, h, R, W] as `column_sums` makes it."""
        if "received" in self.found:
            self.found["received"][group.batch, group.heads, keys] += sums.sum(dim=2)
        if self.tile is not None:
            down, across = rows.start // self.tile, keys.start // self.tile
            before = keys.start - across * self.tile
            tiles = -(-(before + sums.shape[-1]) // self.tile)
            full = torch.nn.functional.pad(sums, (before, tiles * self.tile - before - sums.shape[-1]))
            mass = full.view(*full.shape[:3], tiles, self.tile).sum(dim=-1)  # [b, h, R, W] -> [b, h, R, T]
            self.found["pooled"][group.batch, group.heads, down : down + mass.shape[2], across : across + tiles] += mass
