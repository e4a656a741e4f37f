"""A health report in words: the verdict in one line, and findings of one kind told together.

Letters: H heads, L layers.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headscope.probe.health.findings import SEVERITIES, Finding, worst

if TYPE_CHECKING:
    from headscope.probe.health.report import HealthReport

NAMED = {"alarm": ("alarm", "alarms"), "warn": ("warning", "warnings"), "info": ("observation", "observations")}
MOST = 12  # places that are named one by one


@dataclass(frozen=True)
class Told:
    """Findings of one rule, told together.

    Attributes:
        severity, rule, why, remedies, source: of the worst among them.
        places: where, in words: `layers 2–5`, `heads 3.1, 5.2`.
        evidence: of each: (place, what was measured, value, threshold).
    """

    severity: str
    rule: str
    places: str
    why: str
    evidence: tuple[tuple[str, str, float, float | None], ...]
    remedies: tuple[str, ...]
    source: str


def told(findings: Sequence[Finding]) -> list[Told]:
    """The findings by rule, the worst first; of the same rule in several layers only the worst is told in full."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for one in findings:
        groups[one.rule].append(one)
    found = []
    for rule, same in groups.items():
        severity = worst(same)
        first = decisive([one for one in same if one.severity == severity])
        evidence = tuple((one.place, *one.evidence[0]) for one in same if one.evidence)
        why = first.why if first.layer is None else f"{'head' if first.head is not None else ''} {first.place} {joined(first)}".strip()
        found.append(Told(severity, rule, placed(same), why, evidence, first.remedies, first.source))
    return sorted(found, key=lambda one: -SEVERITIES.index(one.severity))


def joined(one: Finding) -> str:
    """What is said of a head goes on from its name; what is said of a layer begins anew."""
    return one.why if one.head is not None else f"– {one.why}"


def decisive(same: Sequence[Finding]) -> Finding:
    """The finding that lies farthest beyond its threshold."""

    def beyond(one: Finding) -> float:
        _, value, limit = one.evidence[0] if one.evidence else ("", math.nan, None)
        return 0.0 if limit is None or not math.isfinite(value) else abs(math.log(max(value, 1e-30) / max(limit, 1e-30)))

    return max(same, key=beyond)


def placed(findings: Sequence[Finding]) -> str:
    """Where findings were made, in words."""
    heads = [one.place for one in findings if one.head is not None]
    layers = sorted({one.layer for one in findings if one.head is None and one.layer is not None})
    sites = sorted({one.site for one in findings if one.head is None and one.layer is None})
    parts = []
    if layers:
        parts.append(f"{'layer' if len(layers) == 1 else 'layers'} {spans(layers)}")
    if heads:
        parts.append(f"{'head' if len(heads) == 1 else 'heads'} {', '.join(heads[:MOST])}")
        if len(heads) > MOST:
            parts[-1] += f" and {len(heads) - MOST} more"
    return "; ".join(parts + sites)


def spans(numbers: Sequence[int]) -> str:
    """`0, 2–4` for 0, 2, 3, 4."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in found)


def verdict(report: HealthReport) -> str:
    """One line: how bad it is, how many findings of which kind, and over what."""
    kinds = Counter(one.severity for one in told(report.findings))
    words = [f"{kinds[name]} {NAMED[name][kinds[name] > 1]}" for name in reversed(SEVERITIES[1:]) if kinds[name]]
    count = sum(one.heads for one in report.heads)
    layers = {one.site.layer for one in report.heads} - {None}
    what = "layer" if len(layers) == len(report.heads) else "site"
    over = f"{count} {'head' if count == 1 else 'heads'} in {len(report.heads)} {what}{'' if len(report.heads) == 1 else 's'}"
    known = sum(int(one.queries > 0) for one in report.heads)
    if not known:
        return f"undefined: no attention could be measured ({over})"
    return f"{report.worst}: {', '.join(words) if words else 'nothing found'}; {over}"


def number(value: float | int | None) -> str:
    """A number as people read it; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int) or float(value).is_integer() and abs(value) < 1e4:
        return str(int(value)).replace("-", "−")
    size = abs(value)
    shown = f"{value:.2e}" if size < 1e-3 or size >= 1e5 else f"{value:.3g}" if size < 100 else f"{value:.0f}"
    return shown.replace("-", "−")


def share(value: float | int | None) -> str:
    """A number between 0 and 1, two digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.0e}".replace("-", "−")
