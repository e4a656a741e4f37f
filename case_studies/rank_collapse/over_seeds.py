"""Means over seeds with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t

from headscope.probe.attribution.interval import Interval


def over_seeds(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of one number a seed and Student's interval: with three to five seeds the bootstrap's would be too narrow."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    reach = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach, len(values))


def spoken(interval: Interval, digits: int = 2) -> str:
    """The mean and the interval's ends; "−0.00" is "0.00"."""
    if interval.low is None or interval.high is None:
        return number(interval.mean, digits)
    return f"{number(interval.mean, digits)} [{number(interval.low, digits)}, {number(interval.high, digits)}]"


def number(value: float, digits: int = 2) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if not float(text) else text.replace("-", "−")
