"""Intervals of a mean by the bootstrap: how much a figure would move with other samples.

Letters: n samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from headscope.kernels.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class Interval:
    """A mean over samples, and its percentile interval.

    Attributes:
        mean: over the samples.
        low, high: ends of the interval; None where there is one sample, which says nothing about others.
        n: how many samples.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.low is None or self.high is None else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile interval of the mean (Efron, Tibshirani 1993, chapter 13).

    Args:
        values: one number a sample, [n].
        level: share of the resampled means that the interval holds.
        resamples: how often n samples are drawn with replacement.
        seed: of the drawing.

    Raises:
        InputError: no values, or a level or number of resamples that makes no interval.
        NonFiniteError: a value is NaN or infinite.
    """
    if not len(values):
        raise InputError("no samples to take a mean of: give at least one")
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"level {level} of {resamples} resamples: give a level between 0 and 1, and at least one resample")
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise NonFiniteError(f"{int((~np.isfinite(numbers)).sum())} of {len(numbers)} values are NaN or infinite: leave those samples out")
    if len(numbers) == 1:
        return Interval(float(numbers[0]), None, None, 1)
    drawn = np.random.default_rng(seed).integers(0, len(numbers), size=(resamples, len(numbers)))
    low, high = np.quantile(numbers[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))
