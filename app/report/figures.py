"""Pictures as SVG that is part of the page: curves with a band, and signed bars. Plain shapes, no script, no style attributes.

Colours and dashes come from the page's style sheet by class; every line differs in dash as well as in colour. Numbers at the axes are
numbers of the sidecar, in the class `n`.

Letters: P points of a curve.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

LINES = 6  # classes l0 to l5
WIDE, HIGH, LEFT, TOP, RIGHT, BOTTOM = 420, 240, 52, 12, 10, 40


@dataclass(frozen=True)
class Line:
    """One method's curve."""

    name: str
    heights: Sequence[float]


Band = tuple[Sequence[float], Sequence[float], Sequence[float]]  # low, mean, high


def ends(lines: Sequence[Line], band: Band) -> tuple[float, float]:
    """The lowest and the highest point of curves and their band."""
    every = [height for heights in (*(line.heights for line in lines), band[0], band[2]) for height in heights]
    return min(every), max(every)


def curves(title: str, shares: Sequence[float], lines: Sequence[Line], band: Band, limits: tuple[float, float]) -> str:
    """Curves [P] over the share of units removed, with the band of random orders behind them.

    Args:
        title: what the picture shows; read out in its place.
        shares: of the units that are gone, [P], from 0 to 1.
        lines: the curves.
        band: lower end, mean and upper end of random orders, each [P].
        limits: of the upright axis.
    """
    low, mean, high = band
    bottom, top = limits
    span = (top - bottom) or 1.0

    def x(share: float) -> int:
        return round(LEFT + share * (WIDE - LEFT - RIGHT))

    def y(height: float) -> int:
        return round(TOP + (top - height) / span * (HIGH - TOP - BOTTOM))

    def points(heights: Sequence[float]) -> str:
        return " ".join(f"{x(share)},{y(height)}" for share, height in zip(shares, heights, strict=True))

    there = points(high)
    back = " ".join(reversed(points(low).split(" ")))
    parts = [
        f'<svg viewBox="0 0 {WIDE} {HIGH}" width={WIDE} height={HIGH} role=img aria-label="{html.escape(title)}">',
        f"<path class=a d='M{LEFT} {TOP}V{HIGH - BOTTOM}H{WIDE - RIGHT}'/>",
        f"<polygon class=band points='{there} {back}'/><polyline class=lr points='{points(mean)}'/>",
        *(f"<polyline class=l{min(place, LINES - 1)} points='{points(line.heights)}'/>" for place, line in enumerate(lines)),
        *(_label(LEFT - 6, y(height) + 4, height, "end") for height in dict.fromkeys((top, bottom))),
        *(_label(x(share), HIGH - BOTTOM + 16, share, "middle") for share in (shares[0], shares[len(shares) // 2], shares[-1])),
        f"<text class=soft x={(LEFT + WIDE) // 2} y={HIGH - 6} text-anchor=middle>share of the units removed</text></svg>",
    ]
    return "".join(parts)


def key(place: int | None) -> str:
    """A piece of line for a legend; None is the band."""
    if place is None:
        return "<svg width=28 height=12 aria-hidden=true><path class=band d='M0 2h28v8H0z'/><polyline class=lr points='0,6 28,6'/></svg>"
    return f"<svg width=28 height=12 aria-hidden=true><polyline class=l{min(place, LINES - 1)} points='0,6 28,6'/></svg>"


def bar(value: float, largest: float) -> str:
    """A signed bar beside a number: right of the middle where it is positive."""
    half = 80
    size = round(half * min(1.0, abs(value) / largest)) if largest else 0
    start = half if value >= 0 else half - size
    side = "pos" if value >= 0 else "neg"
    return (
        f"<svg width={2 * half} height=12 aria-hidden=true><path class={side} d='M{start} 1h{size}v10h-{size}z'/>"
        f"<path class=z d='M{half} 0v12'/></svg>"
    )


def shown(value: float) -> str:
    """A number as people read it: four digits, a real minus sign."""
    return f"{value:.4g}".replace("-", "−") if value else "0"


def _label(x: int, y: int, value: float, anchor: str) -> str:
    return f"<text x={x} y={y} text-anchor={anchor} class=n>{shown(value)}</text>"
