"""Claims about an evaluation that either hold or not, such as `accuracy>=0.9` or `benign.kl<=0.2`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from headscope.interventions.evaluation.evaluation import Evaluation
from headscope.kernels.errors import InputError

RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
MOMENTS = ("before", "after", "difference")
CLAIM = re.compile(
    r"\s*(?P<benign>benign\.)?(?P<metric>[A-Za-z][A-Za-z0-9_-]*)(?:\.(?P<moment>before|after|difference))?\s*"
    r"(?P<relation>>=|<=|==|>|<)\s*(?P<number>[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*"
)


@dataclass(frozen=True)
class Assertion:
    """A claim about the mean of a metric.

    Attributes:
        metric: its name.
        relation: `>=`, `<=`, `==`, `>` or `<`.
        number: what it is compared with.
        moment: `after` the edits, `before`, or their `difference`.
        benign: on the benign examples.
    """

    metric: str
    relation: str
    number: float
    moment: str = "after"
    benign: bool = False

    @property
    def name(self) -> str:
        """The metric as `Evaluation[...]` knows it."""
        return f"{'benign.' if self.benign else ''}{self.metric}"

    def __str__(self) -> str:
        return f"{self.name}{'' if self.moment == 'after' else f'.{self.moment}'}{self.relation}{self.number!r}"

    def check(self, evaluation: Evaluation) -> Verdict:
        """Whether it holds. Where an example has no number it does not.

        Raises:
            SelectionError: the metric was not measured.
        """
        row = evaluation[self.name]
        mean = getattr(row, self.moment)
        value = None if mean is None else float(mean.mean)
        if row.undefined or value is None:
            return Verdict(self, value, False, row.trouble())
        return Verdict(self, value, RELATIONS[self.relation](value, self.number), "")


@dataclass(frozen=True)
class Verdict:
    """An assertion, the number that was found, whether it holds, and why nothing can be said if so."""

    assertion: Assertion
    value: float | None
    passed: bool
    trouble: str

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {"assertion": str(self.assertion), "value": self.value, "passed": self.passed, "trouble": self.trouble}

    def __str__(self) -> str:
        found = self.trouble or f"it is {self.value:.6g}"
        return f"{'PASS' if self.passed else 'FAIL'} {self.assertion}: {found}"


def parse_assertion(text: str) -> Assertion:
    """`accuracy>=0.9`, `target-probability.difference<-0.1`, `benign.kl<=0.2`.

    Raises:
        InputError: anything else.
    """
    match = CLAIM.fullmatch(text)
    number = math.inf if match is None else float(match["number"])
    if match is None or not math.isfinite(number):
        raise InputError(
            f"assertion {text!r}: write METRIC>=NUMBER, with >=, <=, ==, > or <, such as accuracy>=0.9; before the metric may stand "
            "benign. and behind it .before or .difference"
        )
    return Assertion(match["metric"], match["relation"], number, match["moment"] or "after", match["benign"] is not None)
