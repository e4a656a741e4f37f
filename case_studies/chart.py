"""Line charts as SVG: panels side by side, each line with the band of its interval and its name beside its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0b5394", "#c2410c", "#15803d", "#7e22ce", "#b8860b", "#0e7490", "#be123c", "#525252")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2", "1 3", "12 3", "4 4")
PANEL, HEIGHT, NAMES, LEFT, TOP, BOTTOM = 262, 250, 205, 62, 44, 44


@dataclass(frozen=True)
class Line:
    """One line: places, values, and the ends of their intervals; a place without a value ends the line.

    Attributes:
        name: said beside the end.
        xs, ys: as many of each.
        lows, highs: of the band; empty: no band.
        rings, dots: places where a ring or a dot is drawn.
        style: which colour and dash; None: its place among the panel's lines.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()
    rings: Sequence[float] = ()
    dots: Sequence[float] = ()
    style: int | None = None


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title, x, y: of the chart and its axes; the values are logarithms where `decades` is true, and the axis says 10^n.
        lines: at least one, with a value each.
        low, high: ends of the y axis; a line is cut where it leaves.
        ticks: the places named on the x axis; None: a few whole numbers.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    low: float
    high: float
    decades: bool = True
    ticks: Sequence[float] | None = None


def draw(panels: Sequence[Panel], columns: int = 2) -> str:
    """An SVG of all panels, row by row."""
    wide = LEFT + PANEL + NAMES
    tall = TOP + HEIGHT + BOTTOM
    width, height = wide * min(columns, len(panels)), tall * math.ceil(len(panels) / columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        "<style>text{font:12px sans-serif;fill:#222}.title{font-weight:bold;font-size:13px}.tick{font-size:11px;fill:#555}"
        ".grid{stroke:#e5e5e5}.axis{stroke:#888}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for place, panel in enumerate(panels):
        parts.append(f'<g transform="translate({wide * (place % columns)} {tall * (place // columns)})">')
        parts += _panel(panel, place)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, number: int) -> list[str]:
    places = [x for line in panel.lines for x in line.xs]
    first, last = min(places), max(places)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (y - panel.low) / (panel.high - panel.low)
        return LEFT + (x - first) / (last - first) * PANEL, TOP + HEIGHT * (1 - share)

    parts = [f'<text x="{LEFT}" y="22" class="title">{escape(panel.title)}</text>']
    step = _step(panel.high - panel.low, whole=panel.decades)
    tick = math.ceil(panel.low / step - 1e-9) * step
    while tick <= panel.high + 1e-9:
        y = at(first, tick)[1]
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + PANEL}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end" class="tick">{_tick(tick, panel.decades)}</text>')
        tick += step
    for x in panel.ticks if panel.ticks is not None else _whole(first, last):
        across = at(x, panel.low)[0]
        parts.append(f'<text x="{across:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle" class="tick">{x:g}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{LEFT + PANEL}" y1="{TOP + HEIGHT}" y2="{TOP + HEIGHT}" class="axis"/>')
    parts.append(f'<text x="{LEFT + PANEL / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">{escape(panel.x)}</text>')
    middle = TOP + HEIGHT / 2
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(panel.y)}</text>')
    parts.append(
        f'<clipPath id="panel{number}"><rect x="{LEFT - 5}" y="{TOP - 5}" width="{PANEL + 10}" height="{HEIGHT + 10}"/></clipPath>'
    )
    ends = []
    for index, line in enumerate(panel.lines):
        style = (index if line.style is None else line.style) % len(COLOURS)
        colour = COLOURS[style]
        points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if y is not None]
        end = _leaves(points, panel.low)
        points = [*((x, y) for x, y in points if x < end[0]), end]
        if line.lows:
            band = [
                (x, low, high) for x, low, high in zip(line.xs, line.lows, line.highs, strict=True) if low is not None and high is not None
            ]
            outline = [at(x, high) for x, _, high in band] + [at(x, low) for x, low, _ in reversed(band)]
            parts.append(f'<polygon points="{_join(outline)}" fill="{colour}" fill-opacity="0.15" clip-path="url(#panel{number})"/>')
        drawn = [at(x, y) for x, y in points]
        dash = f' stroke-dasharray="{DASHES[style]}"' if DASHES[style] else ""
        parts.append(
            f'<polyline points="{_join(drawn)}" fill="none" stroke="{colour}" stroke-width="2"{dash} clip-path="url(#panel{number})"/>'
        )
        for x, y in points:
            across, down = at(x, y)
            if x in line.rings and y >= panel.low:
                parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5.5" fill="none" stroke="{colour}" stroke-width="2"/>')
            if x in line.dots and y >= panel.low:
                parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{colour}"/>')
        ends.append((at(*end), line.name, colour))
    return parts + _names(ends)


def _leaves(points: Sequence[tuple[float, float]], low: float) -> tuple[float, float]:
    """The last point of a line, or where it first crosses the lower end of the axis."""
    for (x, y), (after, below) in zip(points[:-1], points[1:], strict=True):
        if below < low:
            return (x + (after - x) * (y - low) / (y - below), low) if y > low else (x, low)
    return points[-1]


def _names(ends: Sequence[tuple[tuple[float, float], str, str]]) -> list[str]:
    """The names right of the panel, in the order of the lines' ends, pushed apart where they would overlap."""
    rows = sorted(ends, key=lambda row: (row[0][1], -row[0][0]))
    heights: list[float] = []
    for (_, down), _, _ in rows:
        heights.append(max(down, heights[-1] + 15 if heights else TOP))
    overflow = max(0.0, heights[-1] - (TOP + HEIGHT))
    for place in reversed(range(len(heights))):
        limit = TOP + HEIGHT if place == len(heights) - 1 else heights[place + 1] - 15
        heights[place] = min(heights[place], limit) if overflow else heights[place]
    parts = []
    for ((across, down), name, colour), height in zip(rows, heights, strict=True):
        x = LEFT + PANEL + 16
        parts.append(
            f'<polyline points="{across + 3:.1f},{down:.1f} {x - 3},{height:.1f}" fill="none" stroke="{colour}" stroke-opacity="0.45"/>'
        )
        parts.append(f'<text x="{x}" y="{height + 4:.1f}" style="fill:{colour}">{escape(name)}</text>')
    return parts


def _join(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _step(span: float, *, whole: bool) -> float:
    """A step of 1, 2 or 5 times a power of ten that gives at most seven ticks."""
    power = 10.0 ** math.floor(math.log10(span))
    for step in (power / 10, power / 5, power / 2, power, 2 * power):
        if span / step <= 7 and (not whole or step >= 1):
            return step
    return 2 * power


def _tick(value: float, decades: bool) -> str:
    if not decades:
        return f"{value:g}" if abs(value) > 1e-9 else "0"
    return f'10<tspan dy="-4" font-size="9">{"−" if value < -1e-9 else ""}{abs(value):.0f}</tspan>' if abs(value) > 1e-9 else "1"


def _whole(first: float, last: float) -> list[float]:
    step = max(1, round((last - first) / 6))
    return [float(x) for x in range(math.ceil(first), math.floor(last) + 1, step)]
