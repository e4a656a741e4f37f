"""What removing units in the order of their relevance does to a target, for one sample.

MoRF removes the most relevant units first, LeRF the least relevant first (Samek et al. 2017; Achtibat et al. 2024).
Conventions: units rank by signed relevance, equal ones in an order drawn by the seed; a curve begins with nothing removed and ends
with everything removed; an area is the curve's mean height over the share removed, by the trapezoid rule, so it is in the unit of what
is read and does not depend on the number of units or steps.

Letters: U units, P points of a curve, n sets of units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.kernels.errors import InputError, NonFiniteError, ShapeError
from headscope.probe.attribution.correlation import correlation

Read = Callable[[Tensor], tuple[Tensor, Tensor]]  # keep [n, U] -> the target's value [n], its probability [n]

SHARES = (0.01, 0.05, 0.10, 0.20, 0.50)  # DeYoung et al. 2020
SIZES = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the units in the subsets of sensitivity-n


@dataclass(frozen=True)
class Subsets:
    """Random sets of units, and how far the target falls without each; the same for every ranking of a sample.

    Attributes:
        removed: [sets, n, U] bool, sets of one size in a row.
        drops: [sets, n], value of the intact input minus the value with the set removed.
    """

    removed: Tensor
    drops: Tensor


@dataclass(frozen=True)
class Curves:
    """What one ranking of one sample's units does.

    The measures in words: `delta_area` is the area under LeRF minus that under MoRF, in the target's unit. The others read the
    probability of the target where there is one (else the target). `deletion` is the area while the most relevant units go,
    `insertion` the area while they come back into an input that lost everything (Petsiuk et al. 2018). `comprehensiveness` is the
    fall without the most relevant share of the units, `sufficiency` the fall with nothing but them (DeYoung et al. 2020);
    both are means over the shares, of ⌈share · U⌉ units each. `sensitivity` is the correlation of the relevance of a random set with
    the fall of the target when it goes (sensitivity-n, Ancona et al. 2018), the mean over sizes; None where there is none.

    Attributes:
        removed: how many units are gone at each point, [P], from 0 to U.
        most_first: the target with so many of the most relevant gone, [P].
        least_first: of the least relevant, [P].
        most_first_chance, least_first_chance: its probability, [P]; the value again where it has none.
        shares: of the units, for comprehensiveness and sufficiency.
        comprehensive: the fall without the most relevant, by share.
        sufficient: the fall with only the most relevant, by share.
        sensitivities: the correlation by size of the sets; None where relevance or falls are all equal.
    """

    removed: tuple[int, ...]
    most_first: tuple[float, ...]
    least_first: tuple[float, ...]
    most_first_chance: tuple[float, ...]
    least_first_chance: tuple[float, ...]
    shares: tuple[float, ...]
    comprehensive: tuple[float, ...]
    sufficient: tuple[float, ...]
    sensitivities: tuple[float | None, ...]

    @property
    def area_most_first(self) -> float:
        return area(self.removed, self.most_first)

    @property
    def area_least_first(self) -> float:
        return area(self.removed, self.least_first)

    @property
    def delta_area(self) -> float:
        return self.area_least_first - self.area_most_first

    @property
    def deletion(self) -> float:
        return area(self.removed, self.most_first_chance)

    @property
    def insertion(self) -> float:
        """Bringing back the k most relevant leaves the U - k least relevant removed: the same sets as LeRF, read from its end."""
        return area(self.removed, self.least_first_chance)

    @property
    def comprehensiveness(self) -> float:
        return math.fsum(self.comprehensive) / len(self.comprehensive)

    @property
    def sufficiency(self) -> float:
        return math.fsum(self.sufficient) / len(self.sufficient)

    @property
    def sensitivity(self) -> float | None:
        known = [value for value in self.sensitivities if value is not None]
        return math.fsum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {name: list(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Curves:
        return cls(**{name: tuple(given[name]) for name in cls.__dataclass_fields__})


def measure_curves(
    read: Read,
    relevance: Tensor,
    *,
    steps: int = 20,
    shares: Sequence[float] = SHARES,
    subsets: Subsets | None = None,
    seed: int = 0,
) -> Curves:
    """Remove units in the order of relevance [U] and see what becomes of the target.

    Args:
        read: value and probability of the target for sets of kept units; a `Value`'s `read`.
        relevance: one number a unit.
        steps: points of a curve after the first, evenly spaced; one a unit where there are fewer units.
        shares: of the units, for comprehensiveness and sufficiency.
        subsets: from `draw_subsets`; None leaves sensitivity-n out.
        seed: of the order among equal relevances.

    Raises:
        ShapeError: relevance is no [U], or of another U than the subsets.
        NonFiniteError: relevance is NaN or infinite.
        InputError: no steps, or shares outside (0, 1].
    """
    check_relevance(relevance)
    if steps < 1 or not shares or not all(0 < share <= 1 for share in shares):
        raise InputError(f"steps={steps}, shares={tuple(shares)}: give at least one step, and shares above 0 and up to 1")
    units, removed = len(relevance), points(len(relevance), steps)
    order = ranking(relevance, seed)
    tops = [math.ceil(share * units - 1e-9) for share in shares]
    least_first = without(order.flip(0), removed)
    keep = torch.cat([without(order, removed), least_first, without(order, tops), ~without(order, tops)])
    unique, place = torch.unique(keep, dim=0, return_inverse=True)  # the curves share their ends, and points with the shares
    values, chances = (found[place] for found in read(unique))
    most, least, missing, only = torch.split(chances, [len(removed), len(removed), len(tops), len(tops)])
    return Curves(
        removed=tuple(removed),
        most_first=_plain(values[: len(removed)]),
        least_first=_plain(values[len(removed) : 2 * len(removed)]),
        most_first_chance=_plain(most),
        least_first_chance=_plain(least),
        shares=tuple(shares),
        comprehensive=_plain(most[0] - missing),
        sufficient=_plain(most[0] - only),
        sensitivities=() if subsets is None else _sensitivities(relevance, subsets),
    )


def draw_subsets(read: Read, units: int, count: int, *, sizes: Sequence[float] = SIZES, seed: int = 0) -> Subsets:
    """`count` random sets of units of each size, and what the target loses without them.

    Args:
        read: as in `measure_curves`.
        units: U.
        count: sets of each size.
        sizes: shares of the units; rounded to at least one and at most U - 1 units, equal ones once.
        seed: of the drawing.

    Raises:
        InputError: fewer than two sets of a size, which correlate with nothing.
    """
    if count < 2:
        raise InputError(f"{count} sets of a size: give 2 or more, or leave sensitivity-n out")
    generator = torch.Generator().manual_seed(seed)
    numbers = sorted({min(max(1, round(size * units)), units - 1) for size in sizes} - {0})
    removed = torch.zeros(len(numbers), count, units, dtype=torch.bool)
    for row, number in enumerate(numbers):
        for place in range(count):
            removed[row, place, torch.randperm(units, generator=generator)[:number]] = True
    flat = torch.cat([torch.ones(1, units, dtype=torch.bool), ~removed.flatten(0, 1)])
    values = read(flat)[0]
    return Subsets(removed, (values[0] - values[1:]).reshape(len(numbers), count))


def check_relevance(relevance: Tensor) -> None:
    """Raises ShapeError where relevance is no [U], NonFiniteError where it cannot be ranked."""
    if relevance.dim() != 1 or not len(relevance):
        raise ShapeError(f"relevance is {list(relevance.shape)}; give one number a unit, [U]")
    if not bool(torch.isfinite(relevance).all()):
        bad = int((~torch.isfinite(relevance)).sum())
        raise NonFiniteError(f"{bad} of {len(relevance)} relevances are NaN or infinite, which have no rank: attribute again in float32")


def ranking(relevance: Tensor, seed: int = 0) -> Tensor:
    """[U], units from the most to the least relevant; equal ones in an order drawn by the seed, so that no place is favoured."""
    shuffled = torch.randperm(len(relevance), generator=torch.Generator().manual_seed(seed))
    return shuffled[relevance.cpu()[shuffled].argsort(descending=True, stable=True)]


def points(units: int, steps: int) -> list[int]:
    """How many units are gone at each point of a curve: from none to all in so many steps, or one by one where that is fewer."""
    steps = min(steps, units)
    return [(2 * step * units + steps) // (2 * steps) for step in range(steps + 1)]


def without(order: Tensor, numbers: Sequence[int]) -> Tensor:
    """[n, U] bool: all units but the first so many of an order."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return rank[None] >= torch.tensor(list(numbers))[:, None]


def area(removed: Sequence[int], heights: Sequence[float]) -> float:
    """Mean height of a curve over the share removed, by the trapezoid rule."""
    slices = [(right - left) * (a + b) / 2 for left, right, a, b in zip(removed[:-1], removed[1:], heights[:-1], heights[1:], strict=True)]
    return math.fsum(slices) / (removed[-1] - removed[0])


def _sensitivities(relevance: Tensor, subsets: Subsets) -> tuple[float | None, ...]:
    if subsets.removed.shape[-1] != len(relevance):
        raise ShapeError(f"subsets of {subsets.removed.shape[-1]} units, relevance of {len(relevance)}: draw them for this sample")
    sums = subsets.removed.double() @ relevance.double().cpu()  # [sets, n]
    return tuple(correlation(a, b) for a, b in zip(sums, subsets.drops, strict=True))


def _plain(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
