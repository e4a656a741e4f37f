"""The attention budget of every head as PNG: layers downward, heads to the right, each a bar of three parts.

Letters: L layers, H heads.
"""

from __future__ import annotations

import io
import math

from PIL import Image, ImageDraw, ImageFont

from headscope.app.escape import visible
from headscope.probe.health.report import HealthReport
from headscope.probe.health.report_file import places
from headscope.probe.health.report_words import verdict

COLOURS = {"diffuse": (185, 191, 200), "routing": (0, 114, 178), "hub": (224, 138, 0)}  # told apart with every common colour blindness
WORDS = {"diffuse": "diffuse: undecided", "routing": "routing: depends on the query", "hub": "hub: shared by all queries"}
INK, SOFT, WARN = (17, 17, 17), (90, 96, 105), (179, 38, 30)
BAR, HIGH, STEP, GAP, MARGIN, LETTERS = 92, 18, 44, 10, 16, 14  # pixels
MOST = 64  # heads of a row


def budget(report: HealthReport) -> bytes:
    """The picture. Under each bar stands its routing; heads with a warning or an alarm are framed."""
    font, small = ImageFont.load_default(LETTERS), ImageFont.load_default(LETTERS - 2)
    names = [f"layer {name}" if name.isdigit() else visible(name) for name in places(report.heads)]
    widest = min(MOST, max((one.heads for one in report.heads), default=0))
    left = int(max((font.getlength(name) for name in names), default=0)) + 2 * MARGIN
    title = verdict(report)
    legend = sum(font.getlength(text) + 44 for text in WORDS.values())
    width = int(max(left + widest * (BAR + GAP), font.getlength(title) + 2 * MARGIN, legend + 2 * MARGIN))
    top = 4 * MARGIN + 2 * LETTERS + 10
    image = Image.new("RGB", (width, top + STEP * len(names) + MARGIN), "white")
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN), title, fill=INK, font=font)
    x = float(MARGIN)
    for kind, text in WORDS.items():
        pen.rectangle((x, 2 * MARGIN + LETTERS, x + 14, 2 * MARGIN + LETTERS + 14), fill=COLOURS[kind])
        pen.text((x + 20, 2 * MARGIN + LETTERS), text, fill=INK, font=font)
        x += font.getlength(text) + 44
    for head in range(widest):
        pen.text((left + head * (BAR + GAP) + BAR / 2, top - 12), f"head {head}", fill=SOFT, font=small, anchor="mm")
    framed = _framed(report)
    for line, (name, one) in enumerate(zip(names, report.heads, strict=True)):
        y = top + STEP * line
        pen.text((MARGIN, y + HIGH / 2), name, fill=INK, font=font, anchor="lm")
        for head in range(min(widest, one.heads)):
            at = left + head * (BAR + GAP)
            shares = [float(getattr(one, kind)[head]) for kind in COLOURS]
            if not all(map(math.isfinite, shares)):
                pen.rectangle((at, y, at + BAR, y + HIGH), outline=SOFT)
                pen.text((at + BAR / 2, y + HIGH / 2), "undefined", fill=SOFT, font=small, anchor="mm")
                continue
            start = float(at)
            for kind, value in zip(COLOURS, shares, strict=True):
                end = start + max(0.0, value) * BAR
                if end - start >= 0.5:
                    pen.rectangle((start, y, max(start, end - 1), y + HIGH), fill=COLOURS[kind])
                start = end
            pen.text((at + BAR / 2, y + HIGH + 10), f"{shares[1]:.2f}", fill=SOFT, font=small, anchor="mm")
            if (one.site.name, head) in framed:
                pen.rectangle((at - 3, y - 3, at + BAR + 2, y + HIGH + 3), outline=WARN, width=2)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _framed(report: HealthReport) -> set[tuple[str, int]]:
    return {
        (one.site, head)
        for one in report.findings
        if one.severity in ("warn", "alarm")
        for head in (one.heads if one.head is None else (one.head,))
    }
