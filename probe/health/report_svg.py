"""Pictures of a health report as SVG that stands in the page: curves over the layers, and a bar of three parts for every head.

Plain shapes with classes; the page's style sheet gives the colours. Letters: L layers, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from headscope.probe.health.report_words import number
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from headscope.probe.health.measures import HeadMeasures, StreamMeasures
    from headscope.probe.health.report import HealthReport

WIDE, HIGH, LEFT, TOP, RIGHT, BOTTOM = 330, 190, 44, 10, 12, 34
BAR, ROW, GAP = 88, 26, 8  # of the budget's bars
MOST = 64
LOG_BELOW = 0.03  # curves that fall below this are drawn over a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """Numbers over layers; NaN where there is none."""

    kind: str  # own, base
    heights: Sequence[float]


def panels(report: HealthReport) -> list[str]:
    """The curves that can be drawn of this report."""
    found = []
    states = [one for one in report.streams if not one.stream]
    if len([one for one in states if math.isfinite(one.residual)]) > 1:
        fresh = [report.baselines.fresh_stream(one) for one in states]
        labels = ["in" if one.place == "input" else str(one.layer) for one in states]
        for title, limit, value in STATE_PANELS:
            own = Curve("own", [value(one) for one in states])
            base = Curve("base", [math.nan if one is None else value(one) for one in fresh])
            threshold = None if limit is None else report.thresholds[limit]
            found.append(curves(title, labels, [own, base], threshold=threshold, powers=limit == "residual-warn"))
    if len(report.heads) > 1:
        labels = [str(place if one.site.layer is None else one.site.layer) for place, one in enumerate(report.heads)]
        for title, field, kind in HEAD_PANELS:
            own = Curve("own", [_mean(getattr(one, field)) for one in report.heads])
            if not any(map(math.isfinite, own.heights)):
                continue
            base = Curve("base", [_baseline(report, one, field, kind) for one in report.heads])
            dots = [[value for value in getattr(one, field).tolist() if math.isfinite(value)] for one in report.heads]
            found.append(curves(title, labels, [own, base], dots=dots))
    return found


STATE_PANELS: tuple[tuple[str, str | None, Callable[[StreamMeasures], float]], ...] = (
    ("What still tells tokens apart (residual)", "residual-warn", lambda one: one.residual),
    ("Mean cosine between tokens", "cosine", lambda one: one.cosine),
    ("Directions in use (centred effective rank, share)", "effective-rank", lambda one: _ratio(one.effective_rank_centred, one.rank_limit)),
)
HEAD_PANELS = (
    ("Entropy of a query, share of log n", "entropy_share", "fresh"),
    ("Routing, share of the budget", "routing", "uniform"),
    ("Sink: what the favourite key gets", "sink", "uniform"),
)


def curves(
    title: str,
    labels: Sequence[str],
    lines: Sequence[Curve],
    *,
    dots: Sequence[Sequence[float]] = (),
    threshold: float | None = None,
    powers: bool = False,
) -> str:
    """A figure of curves over layers, from 0 to 1, or by powers of ten.

    Args:
        title: what it shows.
        labels: of the layers, [L].
        lines: the curves, each [L].
        dots: of each layer, the numbers of its heads.
        threshold: drawn across.
        powers: by powers of ten, where a curve falls far below 1.
    """
    own = [height for line in lines if line.kind == "own" for height in line.heights if math.isfinite(height)]
    if not own:
        return ""
    least = min(own)
    logarithmic = powers and 0 < least < LOG_BELOW
    decades = math.floor(math.log10(least)) if logarithmic else 0
    low = float(decades) if logarithmic else min(0.0, least)

    def y(height: float) -> float:
        part = (math.log10(max(height, 10.0**low)) - low) / -low if logarithmic else (height - low) / (1 - low)
        return round(TOP + (1 - min(1.0, part)) * (HIGH - TOP - BOTTOM), 1)

    def x(place: int) -> float:
        return round(LEFT + 8 + (place + 0.5 if len(labels) == 1 else place) * (WIDE - LEFT - RIGHT - 16) / max(1, len(labels) - 1), 1)

    parts = [f'<path class=axis d="M{LEFT} {TOP}V{HIGH - BOTTOM}H{WIDE - RIGHT}"/>']
    ticks = [10.0**power for power in range(0, decades - 1, -max(1, -decades // 4))] if logarithmic else [0.0, 0.5, 1.0]
    for tick in ticks:
        name = f"1e{round(math.log10(tick))}".replace("-", "−") if logarithmic and tick < 0.1 else f"{tick:g}"
        parts.append(
            f'<path class=axis d="M{LEFT - 3} {y(tick)}h3"/><text class=soft x={LEFT - 6} y={y(tick) + 4} text-anchor=end>{name}</text>'
        )
    step = -(-len(labels) // 13)
    for place, label in enumerate(labels):
        if place % step == 0:
            parts.append(f"<text class=soft x={x(place)} y={HIGH - BOTTOM + 14} text-anchor=middle>{markup(label)}</text>")
    parts.append(f"<text class=soft x={(LEFT + WIDE) // 2} y={HIGH - 4} text-anchor=middle>layer</text>")
    if threshold is not None:
        parts.append(f'<path class=limit d="M{LEFT} {y(threshold)}H{WIDE - RIGHT}"/>')
    for place, heights in enumerate(dots):
        parts += [f'<circle class=dot cx="{x(place)}" cy="{y(height)}" r="2.5"/>' for height in heights[:MOST]]
    for line in sorted(lines, key=lambda one: one.kind == "own"):
        for run in _runs(line.heights):
            points = " ".join(f"{x(place)},{y(line.heights[place])}" for place in run)
            parts.append(f'<polyline class={line.kind} points="{points}"/>')
            if line.kind == "own":
                parts += [f'<circle class=point cx="{x(place)}" cy="{y(line.heights[place])}" r="3"/>' for place in run]
    told = ", ".join(f"{label}: {number(height)}" for label, height in zip(labels, lines[0].heights, strict=True))
    return f"<figure><figcaption>{markup(title)}</figcaption>{_svg(WIDE, HIGH, f'{title}. {told}', parts)}</figure>"


def budget_bars(names: Sequence[str], rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> str:
    """Of every head a bar of three parts: layers downward, heads to the right; the share of routing is written into it.

    Args:
        names: of the layers.
        rows: diffuse, routing and hub of each layer, each [H]; NaN leaves an empty place.
    """
    widest = min(MOST, max(len(row[0]) for row in rows))
    bar = BAR if widest <= 12 else max(26, 960 // widest)
    left = 12 + 7 * max(len(name) for name in names)
    width, height = left + widest * (bar + GAP), 22 + len(rows) * (ROW + GAP)
    parts = [
        f"<text class=soft x={left + place * (bar + GAP) + bar / 2:g} y=12 text-anchor=middle>{place}</text>" for place in range(widest)
    ]
    for line, (name, row) in enumerate(zip(names, rows, strict=True)):
        y = 20 + line * (ROW + GAP)
        parts.append(f"<text x=0 y={y + ROW / 2 + 4:g}>{markup(name)}</text>")
        for place, shares in enumerate(zip(*(part.tolist()[:widest] for part in row), strict=True)):
            x = left + place * (bar + GAP)
            if not all(map(math.isfinite, shares)):
                parts.append(f'<rect class=axis x="{x}" y="{y}" width="{bar}" height="{ROW}"/>')
                continue
            told = ", ".join(f"{kind} {value:.2f}" for kind, value in zip(KINDS, shares, strict=True))
            parts.append(f"<g><title>{markup(name)} head {place}: {told}</title>")
            start = float(x)
            for kind, value in zip(KINDS, shares, strict=True):
                size = max(0.0, value) * bar
                parts.append(f'<rect class={kind} x="{start:.1f}" y="{y}" width="{size:.1f}" height="{ROW - 12}"/>')
                start += size
            parts.append(f"<text class=soft x={x + bar / 2:g} y={y + ROW - 2} text-anchor=middle>{shares[1]:.2f}</text></g>")
    label = "Attention budget of every head: diffuse, routing and hub; the number is routing"
    return _svg(width, height + 6, label, parts)


KINDS = ("diffuse", "routing", "hub")


def swatch(kind: str) -> str:
    return f'<svg width="14" height="14" aria-hidden="true"><rect class={kind} width="14" height="14"/></svg>'


def line(kind: str) -> str:
    dot = '<circle class=point cx="14" cy="6" r="3"/>' if kind == "own" else ""
    return f'<svg width="28" height="12" aria-hidden="true"><path class={kind} d="M0 6h28"/>{dot}</svg>'


def _runs(heights: Sequence[float]) -> list[list[int]]:
    """Neighbouring places that have a number."""
    found: list[list[int]] = [[]]
    for place, height in enumerate(heights):
        if math.isfinite(height):
            found[-1].append(place)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def _baseline(report: HealthReport, one: HeadMeasures, field: str, kind: str) -> float:
    if kind == "uniform":
        return report.baselines.uniform.get(one.site.name, {}).get(field, math.nan)
    fresh = report.baselines.fresh_head(one.site)
    return math.nan if fresh is None else _mean(getattr(fresh, field))


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if values.numel() else math.nan


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img" aria-label="{_quoted(label)}">{"".join(parts)}</svg>'


def _quoted(text: str) -> str:
    return markup(text).replace('"', "&quot;")
