"""Signed numbers as PNG: orange for, blue against, white for nothing, and the number written where there is room.

Letters: L layers, H heads, Q queries, K keys.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from headscope.probe.attribution.as_html import AGAINST, FOR

Numbers = npt.NDArray[np.float64]
Colours = npt.NDArray[np.uint8]

CELL, LETTERS, MARGIN = 64, 14, 12  # pixels
INK = (17, 17, 17)
LARGEST = 1024  # pixels of a map's longer side, about
FADE = 0.35  # how much of an image's ink is seen under its relevance


def table(rows: Sequence[Sequence[float]], names: Sequence[str], columns: Sequence[str]) -> bytes:
    """A PNG of numbers in coloured cells, with names at the left and on top; rows may differ in length.

    Args:
        rows: the numbers, such as [L, H].
        names: of the rows.
        columns: their names, as many as the longest row has cells.
    """
    font = ImageFont.load_default(LETTERS)
    left = int(max(font.getlength(name) for name in names)) + 2 * MARGIN
    top = LETTERS + 2 * MARGIN
    largest = max(abs(number) for row in rows for number in row)
    image = Image.new("RGB", (left + CELL * len(columns), top + CELL // 2 * len(rows)), "white")
    pen = ImageDraw.Draw(image)
    for j, name in enumerate(columns):
        pen.text((left + CELL * (j + 0.5), top / 2), name, fill=INK, font=font, anchor="mm")
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        y = top + CELL // 2 * i
        pen.text((MARGIN, y + CELL / 4), name, fill=INK, font=font, anchor="lm")
        for j, (number, fill) in enumerate(zip(row, colours(np.array(row), largest).tolist(), strict=True)):
            x = left + CELL * j
            pen.rectangle((x, y, x + CELL - 2, y + CELL // 2 - 2), fill=tuple(fill))
            pen.text((x + CELL / 2, y + CELL / 4), written(number), fill=INK, font=font, anchor="mm")
    return _png(image)


def matrix(cells: Numbers) -> bytes:
    """A PNG of numbers [Q, K] without names: queries downward, keys to the right, a square of whole pixels each."""
    times = max(1, LARGEST // max(cells.shape))
    return _png(Image.fromarray(colours(cells, float(np.abs(cells).max())).repeat(times, 0).repeat(times, 1)))


def over_image(ink: Numbers, patches: Numbers) -> bytes:
    """A PNG of an image, and beside it the same in grey under the relevance of its patches, each with its number.

    Args:
        ink: [height, width], 0 is paper and 1 is ink.
        patches: [rows, columns], relevance; the patches tile the image.
    """
    rows, columns = patches.shape
    side = CELL * max(rows, columns)
    high, wide = ink.shape
    tile = (-(-high // rows), -(-wide // columns))  # pixels of the image to a patch
    times = max(1, side // max(high, wide))
    plain = np.repeat((255 * (1 - np.clip(ink, 0, 1)))[..., None], 3, axis=-1)
    tint = colours(patches, float(np.abs(patches).max())).repeat(tile[0], 0).repeat(tile[1], 1)[:high, :wide]
    mixed = tint * (1 - FADE * np.clip(ink, 0, 1)[..., None])
    both = np.concatenate([plain, np.full((high, 1, 3), 255.0), mixed], axis=1)
    image = Image.fromarray(np.rint(both).astype(np.uint8).repeat(times, 0).repeat(times, 1))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(LETTERS)
    for i in range(rows):
        for j in range(columns):
            place = ((wide + 1 + tile[1] * (j + 0.5)) * times, tile[0] * (i + 0.5) * times)
            pen.text(place, written(float(patches[i, j])), fill=INK, font=font, anchor="mm", stroke_width=2, stroke_fill="white")
    return _png(image)


def colours(numbers: Numbers, largest: float) -> Colours:
    """[…, 3], white at 0, the full colour at `largest`."""
    share = np.clip(numbers / largest if largest else np.zeros_like(numbers), -1, 1)[..., None]
    ends = np.where(share > 0, np.array(FOR, dtype=np.float64), np.array(AGAINST, dtype=np.float64))
    found: Colours = np.rint(255 + 0.8 * np.abs(share) * (ends - 255)).astype(np.uint8)
    return found


def written(number: float) -> str:
    """A number in a cell: sign and two or three digits."""
    return f"{number:+.2f}" if abs(number) >= 0.005 or not number else f"{number:+.0e}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
