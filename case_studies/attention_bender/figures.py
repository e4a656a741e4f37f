"""Pictures as SVG: rows of small greyscale images with a label each, and maps in colour."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

Image = Sequence[Sequence[float]]
COLD, HOT = (247, 244, 236), (178, 34, 34)  # the lowest and the highest value of a map
CELL, GAP, LABEL = 36, 4, 230


@dataclass(frozen=True)
class Row:
    """A line of pictures; those of a map are coloured between their own lowest and highest value."""

    label: str
    images: Sequence[Image]
    map: bool = False


def write_figure(path: Path, rows: Sequence[Row], heads: Sequence[str] = (), group: int = 0) -> None:
    """One SVG. `heads` stand above the columns; a wider gap follows each `group` columns."""
    columns = max(len(row.images) for row in rows)
    wide = LABEL + columns * (CELL + GAP) + (columns // group * 3 * GAP if group else 0) + GAP
    top = 22 if heads else GAP
    high = top + len(rows) * (CELL + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="#fff"/>',
    ]

    def left(column: int) -> int:
        return LABEL + column * (CELL + GAP) + (column // group * 3 * GAP if group else 0)

    for column, head in enumerate(heads):
        parts.append(f'<text x="{left(column)}" y="15" fill="#333">{escape(head)}</text>')
    for line, row in enumerate(rows):
        y = top + line * (CELL + GAP)
        parts.append(f'<text x="{GAP}" y="{y + CELL / 2 + 4}" fill="#333">{escape(row.label)}</text>')
        for column, image in enumerate(row.images):
            parts.append(
                f'<image x="{left(column)}" y="{y}" width="{CELL}" height="{CELL}" style="image-rendering:pixelated" '
                f'preserveAspectRatio="none" href="data:image/png;base64,{base64.b64encode(png(image, row.map)).decode()}"/>'
            )
            parts.append(f'<rect x="{left(column)}" y="{y}" width="{CELL}" height="{CELL}" fill="none" stroke="#bbb"/>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def png(image: Image, coloured: bool) -> bytes:
    """An image from -1 (paper) to 1 (ink), or a map, as a PNG file."""
    low, high = min(map(min, image)), max(map(max, image))
    lines = []
    for row in image:
        line = b""
        for value in row:
            share = (value - low) / (high - low) if coloured and high > low else min(max((value + 1) / 2, 0.0), 1.0)
            ends = (COLD, HOT) if coloured else ((255, 255, 255), (0, 0, 0))
            line += bytes(round(a + share * (b - a)) for a, b in zip(*ends, strict=True))
        lines.append(b"\0" + line)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", len(image[0]), len(image), 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"".join(lines), 9)) + chunk(b"IEND", b"")
