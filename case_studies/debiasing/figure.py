"""The study's figure: one panel a measure, one row an arm, a dot with its interval."""

from __future__ import annotations

import math
import statistics
from html import escape
from typing import Any

from tables import summary

PANELS = (
    ("unseen", "|log p(he) − log p(she)|, unseen occupations", False),
    ("gap unseen", "stereotype gap, unseen occupations", False),
    ("new anchors", "log-odds of the right pronoun, new anchors", False),
    ("spectrum", "spectrum distance, share of planted", True),
    ("hidden", "hidden distance, share of planted", True),
    ("cost", "cost on other text, nats a token", False),
)
NAMES, WIDE, ROW, TOP, GAP = 150, 250, 26, 40, 60


def draw(report: dict[str, Any]) -> str:
    """An SVG of two rows of three panels."""
    found = summary(report)
    arms = list(found)
    tall = TOP + ROW * len(arms) + GAP
    width, height = NAMES + 3 * (WIDE + 40), 2 * tall
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        "<style>text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.tick{font-size:11px;fill:#555}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for place, (name, title, decades) in enumerate(PANELS):
        left, top = NAMES + (place % 3) * (WIDE + 40), (place // 3) * tall + TOP
        rows = []
        for arm in arms:
            value = found[arm][name]
            if isinstance(value, list):
                rows.append((statistics.fmean(value), min(value), max(value)))
            else:
                low, high = (value.mean if end is None else end for end in (value.low, value.high))
                rows.append((value.mean, low, high))
        if decades:
            rows = [tuple(math.log10(max(x, 1e-12)) for x in row) for row in rows]  # type: ignore[misc]
        ends = [x for row in rows for x in row] + [0.0]
        first, last = (math.floor(min(ends)), math.ceil(max(ends))) if decades else (min(ends), max(ends) or 1.0)
        last = last if last > first else first + 1

        def at(x: float, left: int = left, first: float = first, last: float = last) -> float:
            return left + WIDE * (x - first) / (last - first)

        parts.append(f'<text x="{left}" y="{top - 16}" class="title">{escape(title)}</text>')
        bottom = top + ROW * len(arms)
        step = next(s for s in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0) if (last - first) / s <= 6)
        ticks = [step * i for i in range(math.ceil(first / step), math.floor(last / step) + 1)]
        if decades:
            ticks = [float(x) for x in range(int(first), int(last) + 1, max(1, int(last - first) // 5))]
        for tick in ticks:
            said = f"1e{int(tick)}" if decades and tick else "1" if decades else f"{tick:.2g}"
            parts.append(f'<line x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{top - 6}" y2="{bottom}" stroke="#e5e5e5"/>')
            parts.append(f'<text x="{at(tick):.1f}" y="{bottom + 15}" text-anchor="middle" class="tick">{said}</text>')
        parts.append(f'<line x1="{at(0):.1f}" x2="{at(0):.1f}" y1="{top - 6}" y2="{bottom}" stroke="#999"/>')
        for row, (arm, (mean, low, high)) in enumerate(zip(arms, rows, strict=True)):
            y = top + ROW * row + ROW / 2
            colour = "#c2410c" if arm in ("logit", "both") else "#0b5394" if arm == "graph" else "#525252"
            if place % 3 == 0:
                parts.append(f'<text x="{NAMES - 10}" y="{y + 4}" text-anchor="end">{escape(arm)}</text>')
            parts.append(f'<line x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{at(mean):.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>", ""])
