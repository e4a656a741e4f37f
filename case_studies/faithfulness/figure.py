"""The study's figure: for every model, each method's area between the curves with its interval, above the band of random orders."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, LEFT, RIGHT, ROW, TOP = 900, 190, 30, 22, 46


def draw(panels: Sequence[tuple[str, Sequence[tuple[str, float, float, float]], tuple[float, float]]]) -> str:
    """An SVG.

    Args:
        panels: title; (method, mean, low, high) for each method; lowest and highest of the random orders.
    """
    parts, y = [], 0
    for title, rows, band in panels:
        ends = [value for _, *numbers in rows for value in numbers] + [*band, 0.0]
        low, high = min(ends), max(ends)
        scale = (WIDTH - LEFT - RIGHT) / (high - low)

        def x(value: float, low: float = low, scale: float = scale) -> float:
            return LEFT + (value - low) * scale

        bottom = y + TOP + ROW * len(rows)
        parts.append(f'<text x="10" y="{y + 24}" font-weight="bold">{escape(title)}</text>')
        box = f'x="{x(band[0]):.1f}" y="{y + TOP - 8}" width="{(band[1] - band[0]) * scale:.1f}" height="{bottom - y - TOP}"'
        parts.append(f'<rect {box} class="band"/>')
        parts.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{y + TOP - 8}" y2="{bottom - 8}" class="axis"/>')
        for place, (name, mean, left, right) in enumerate(sorted(rows, key=lambda row: -row[1])):
            line = y + TOP + ROW * place + 4
            parts.append(f'<text x="{LEFT - 12}" y="{line + 4}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<line x1="{x(left):.1f}" x2="{x(right):.1f}" y1="{line}" y2="{line}" class="range"/>')
            parts.append(f'<circle cx="{x(mean):.1f}" cy="{line}" r="4"/>')
        for value in (low, 0.0, high):
            parts.append(f'<text x="{x(value):.1f}" y="{bottom + 8}" text-anchor="middle" class="tick">{value:.1f}</text>')
        y = bottom + 20
    style = (
        "text{font:13px sans-serif;fill:#222}.tick{font-size:11px;fill:#555}.band{fill:#ddd}.axis{stroke:#888}"
        ".range{stroke:#00589c;stroke-width:2}circle{fill:#00589c}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">'
    return "\n".join([head, f"<style>{style}</style>", f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>', *parts, "</svg>", ""])
