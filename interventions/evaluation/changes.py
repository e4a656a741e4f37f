"""The parts of an evaluation: what one metric did, what one example gave, what the plan costs.

Letters: n examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headscope.interventions.cost import PlanCost
from headscope.probe.attribution.interval import Interval, bootstrap


@dataclass(frozen=True)
class Change:
    """One metric without and with the plan.

    Intervals are percentile intervals of the mean over examples, 95 %, by the bootstrap; that of the difference is paired: it resamples
    the examples' own differences. Examples where the metric has no number, before or after, are in none of them.

    Attributes:
        metric: its name.
        before, after, difference: means; None where no example has a number.
        undefined_before, undefined_after: examples where the metric is NaN or infinite, as it is when an edit breaks the model.
        first_undefined: the first of them.
    """

    metric: str
    before: Interval | None
    after: Interval | None
    difference: Interval | None
    undefined_before: int = 0
    undefined_after: int = 0
    first_undefined: str | None = None

    @property
    def undefined(self) -> bool:
        """Whether some example has no number."""
        return bool(self.undefined_before or self.undefined_after)

    def trouble(self) -> str:
        """What is undefined, in words; empty if nothing is."""
        counts = {"before": self.undefined_before, "after": self.undefined_after}
        said = " and ".join(f"{count} {'examples' if count > 1 else 'example'} {when}" for when, count in counts.items() if count)
        return f"{self.metric} is NaN or infinite in {said} the edits (first: {self.first_undefined!r})" if said else ""


@dataclass(frozen=True)
class Result:
    """One example: each metric before and after, NaN where it has no number.

    Attributes:
        id: of the example.
        benign: whether it is one of those that should not change.
        before, after: by the name of the metric.
        hits: for each edit, whether it changed something here.
    """

    id: str
    benign: bool
    before: Mapping[str, float]
    after: Mapping[str, float]
    hits: tuple[bool, ...]


@dataclass(frozen=True)
class Price:
    """What the plan costs, on the longest example that most of its edits apply to.

    Attributes:
        example: its id.
        cost: seconds without and with, taken in turns, and the sites that leave the fused path.
        bytes_without, bytes_with: how far a run raised the memory in use; None where that cannot be measured.
    """

    example: str
    cost: PlanCost
    bytes_without: int | None
    bytes_with: int | None


def cells(row: Change) -> tuple[str, str, str]:
    """Before, after and difference, with four digits."""
    return written(row.before), written(row.after), written(row.difference, "+")


def written(value: Interval | None, sign: str = "") -> str:
    """A mean and its interval."""
    if value is None:
        return "undefined"
    if value.low is None or value.high is None:
        return f"{value.mean:{sign}.4g}"
    return f"{value.mean:{sign}.4g} [{value.low:{sign}.4g}, {value.high:{sign}.4g}]"


def change_of(metric: str, results: Sequence[Result], seed: int) -> Change:
    """A metric over the results that have it."""
    having = [one for one in results if metric in one.before]
    broken = {when: {one.id for one in having if not math.isfinite(getattr(one, when)[metric])} for when in ("before", "after")}
    either = broken["before"] | broken["after"]
    first = next((one.id for one in having if one.id in either), None)
    pairs = [(one.before[metric], one.after[metric]) for one in having if one.id not in either]
    if not pairs:
        return Change(metric, None, None, None, len(broken["before"]), len(broken["after"]), first)
    before, after = [one for one, _ in pairs], [two for _, two in pairs]
    differences = [two - one for one, two in pairs]
    first_mean, second_mean, shift = (bootstrap(values, seed=seed) for values in (before, after, differences))
    return Change(metric, first_mean, second_mean, shift, len(broken["before"]), len(broken["after"]), first)
