"""Scores of heads as they add up: a number per row, averaged over the rows that count.

Letters: B samples, H query heads, K keys, R query rows at a time, L sites.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headscope.kernels.errors import ShapeError
from headscope.probe.atlas.rows import AttentionRows

Detector = Callable[[AttentionRows], Tensor]  # [B, H, R], a number per row; NaN where a row does not count

REGISTERS = (0, 1, 2, 5)  # tokens that vision models put before their patches: none, a class token, one more, four registers
SEEN = 0.25  # a key can be a sink if at least this share of the rows may see it: the last key of a causal map is seen by one


class Tally:
    """Sums of detectors over many panels of rows, for all sites."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], Tensor] = {}  # [H] by score and site
        self.weights: dict[tuple[str, str], Tensor] = {}
        self.rows: dict[tuple[str, str], int] = {}
        self.received: dict[tuple[str, int, int], tuple[Tensor, Tensor, int]] = {}

    def add(self, name: str, rows: AttentionRows, values: Tensor, weights: Tensor | None = None, keys: int = 2) -> None:
        """Add one panel: Σ values / Σ weights is the score.

        Args:
            values: [B, H or 1, R]; NaN is not counted.
            weights: of each value, as many; None for 1.
            keys: rows that see fewer do not count: with one key, attention has no choice.

        Raises:
            ShapeError: values of another shape.
        """
        batch, heads, height, _ = rows.pattern.shape
        fits = values.dim() == 3 and all(size in (1, full) for size, full in zip(values.shape, (batch, heads, height), strict=True))
        if not fits:
            raise ShapeError(
                f"the detector {name!r} returned {list(values.shape)}: give a number per row, [B, H, R] = {[batch, heads, height]}, NaN "
                "where a row does not count"
            )
        counted = (rows.alive(keys) & ~values.isnan()).expand(batch, heads, height)
        weight = counted.double() if weights is None else weights.double().masked_fill(~counted, 0.0)
        key = (name, rows.site.name)
        for table, number in ((self.sums, values.double().masked_fill(~counted, 0.0)), (self.weights, weight)):
            table[key] = table.get(key, 0.0) + number.expand(batch, heads, height).sum((0, 2)).cpu()
        self.rows[key] = self.rows.get(key, 0) + int(counted[:, 0].sum())

    def receive(self, rows: AttentionRows, step: int) -> None:
        """Add one panel to what each key of its samples gets."""
        live = rows.alive()[..., None]
        got = (rows.pattern * live).sum(2).double()  # [B, H, K]
        able = (rows.visible & live).sum(2).double().expand_as(got)
        key = (rows.site.name, rows.example, step)
        old = self.received.get(key)
        count = int(rows.counted.sum(-1).amax())
        self.received[key] = (got, able, count) if old is None else (old[0] + got, old[1] + able, old[2] + count)

    def mean(self, name: str, site: str, least: float = 1e-3) -> Tensor | None:
        """[H], NaN where the weights say that hardly anything was there to average; None where the score was never added."""
        key = (name, site)
        if key not in self.sums:
            return None
        enough = self.weights[key] > least * max(1, self.rows[key])
        return torch.where(enough, self.sums[key] / self.weights[key].clamp_min(1e-300), torch.nan)

    def sinks(self, site: str) -> tuple[Tensor, Tensor] | None:
        """[H] each: the largest share of the rows' attention that one key gets, mean over samples, and the commonest such key."""
        found, keys = [], []
        for (name, _, _), (got, able, count) in self.received.items():
            if name == site and count > 1:
                share = (got / able.clamp_min(1)).masked_fill(able < max(2.0, SEEN * count), 0.0)
                best = share.max(-1)
                found.append(best.values)
                keys.append(best.indices)
        return (torch.cat(found).mean(0).cpu(), torch.cat(keys).mode(0).values.cpu()) if found else None


# -- detectors ---------------------------------------------------------------------------------------------------------


def offset(distance: int, start: int = 0) -> Detector:
    """The probability of the key so many positions before, for rows from `start` on; 0 is the row's own."""

    def detect(rows: AttentionRows) -> Tensor:
        if not rows.square:
            return _nothing(rows)
        return rows.at(torch.where(rows.queries >= start, rows.queries - distance, -1))

    return detect


def first(rows: AttentionRows) -> Tensor:
    """The probability of the first key, for all rows but the first."""
    return rows.at(torch.where(rows.queries >= 1, 0, -1)) if rows.square else _nothing(rows)


def confidence(rows: AttentionRows) -> Tensor:
    """The largest probability of a row (Voita et al. 2019)."""
    return rows.pattern.amax(-1)


def entropy(rows: AttentionRows) -> Tensor:
    """Of a row, nats; over the real keys where a sink takes its share."""
    share = rows.pattern.double() / rows.pattern.double().sum(-1, keepdim=True).clamp_min(1e-300)
    found: Tensor = torch.special.entr(share).sum(-1)
    return found


def spread(rows: AttentionRows) -> Tensor:
    """Entropy as a share of that of uniform attention over the keys that a row may see; rows with one key do not count."""
    number = rows.visible.sum(-1)  # [B or 1, H or 1, R]
    found: Tensor = entropy(rows) / number.clamp_min(2).log()
    return found.masked_fill(number < 2, torch.nan)


def distance(rows: AttentionRows) -> Tensor:
    """Σ_j p_ij |i - j| in tokens; in an image between the centres of patches, in patches (Dosovitskiy et al. 2021)."""
    if not rows.square:
        return _nothing(rows)
    wide = rows.pattern.shape[-1]
    before, side = grid_of(wide) if rows.image else (0, None)
    places = torch.arange(wide, device=rows.pattern.device)
    if side is None:
        apart = (rows.queries[:, None] - places).abs().to(rows.pattern.dtype)
        return (rows.pattern * apart).sum(-1)
    cells = torch.stack([(places - before) // side, (places - before) % side], dim=-1).to(rows.pattern.dtype)  # [K, 2]
    apart = torch.cdist(cells[rows.queries], cells).masked_fill(places < before, 0.0)
    mass = rows.pattern[..., before:].sum(-1)
    return ((rows.pattern * apart).sum(-1) / mass.clamp_min(1e-12)).masked_fill(rows.queries < before, torch.nan)


def grid_of(count: int) -> tuple[int, int | None]:
    """How many tokens stand before the patches of a square image, and its side in patches; None where no square fits."""
    for before in REGISTERS:
        side = round(max(0, count - before) ** 0.5)
        if side >= 2 and side * side == count - before:
            return before, side
    return 0, None


def _nothing(rows: AttentionRows) -> Tensor:
    return torch.full(rows.pattern.shape[:-1], torch.nan, device=rows.pattern.device, dtype=torch.float64)
