"""Attention as palette PNG: one picture for the whole grid of heads, with names beside it or without, one for a single head.

Letters: H heads, Q queries, K keys. Indices 0 to 254 of the palette run along cividis; 255 is transparent and stands for
cells that the model masked, so that the page can hatch them instead of showing them as a small probability.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from headscope.kernels.errors import InputError

Indices = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

MASKED = 255
TOP = 254
SCALES = ("linear", "sqrt", "log")
LOG_FLOOR = 1e-6  # the log scale runs from here to 1
GAP = 2  # pixels between two thumbnails
SMALLEST = 96  # pixels of a map's longer side in an atlas, at least
MARGIN = 12  # pixels around the names of an atlas
GREY = 127  # the middle of the palette: can be read on white and on black

# Cividis (Nuñez, Anderton, Renslow 2018), every fifth of its 256 colours.
STOPS = [
    "00224e",
    "002656",
    "002a5f",
    "002d68",
    "003070",
    "083370",
    "163770",
    "203a6f",
    "273e6e",
    "2e416d",
    "34456c",
    "3a486c",
    "3f4c6c",
    "444f6c",
    "49536c",
    "4e566c",
    "535a6d",
    "575d6d",
    "5c616e",
    "60646f",
    "656870",
    "696b71",
    "6d6f72",
    "727274",
    "767676",
    "7a7a78",
    "7e7d78",
    "838179",
    "888578",
    "8d8878",
    "928c78",
    "969077",
    "9b9476",
    "a09875",
    "a59c74",
    "aaa073",
    "afa471",
    "b5a86f",
    "baac6d",
    "bfb06b",
    "c4b468",
    "c9b965",
    "cfbd62",
    "d4c15f",
    "dac65b",
    "dfca57",
    "e5cf52",
    "ead34c",
    "f0d846",
    "f6dd3f",
    "fce236",
    "fee838",
]


def palette() -> Indices:
    """The colours [256, 3]; the last one is never seen."""
    stops = np.array([[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in STOPS], dtype=np.float64)
    places = np.linspace(0, len(STOPS) - 1, TOP + 1)
    colours = np.stack([np.interp(places, np.arange(len(STOPS)), stops[:, channel]) for channel in range(3)], axis=1)
    return np.concatenate([np.rint(colours), [[128, 128, 128]]]).astype(np.uint8)


def place(probability: Floats, scale: str) -> Floats:
    """Where a probability lies on the colour bar, from 0 to 1."""
    if scale == "linear":
        return probability
    if scale == "sqrt":
        root: Floats = np.sqrt(probability)
        return root
    if scale == "log":
        logarithm: Floats = (np.log10(np.maximum(probability, LOG_FLOOR)) / -np.log10(LOG_FLOOR) + 1).astype(np.float32)
        return logarithm
    raise InputError(f"no colour scale {scale!r}: there are {', '.join(SCALES)}")


def indices(probability: Floats, scale: str) -> Indices:
    """Palette indices of probabilities of any shape; NaN marks a masked cell."""
    masked = np.isnan(probability)
    placed = place(np.where(masked, np.float32(0), np.clip(probability, 0, 1)), scale)
    return np.where(masked, np.uint8(MASKED), np.rint(placed * TOP).astype(np.uint8))


def thumbnail(probability: Floats, side: int) -> Floats:
    """One head's pattern [Q, K] as [side, side]: max-pooled where it is larger, repeated where it is smaller.

    A pooled cell is masked (NaN) only where everything under it is.
    """
    return _resize(_resize(probability, side, 0), side, 1)


def grid(heads: Sequence[Sequence[Floats]], scale: str) -> bytes:
    """A PNG of all heads: one row for each site, one square thumbnail [side, side] for each of its heads."""
    side = heads[0][0].shape[0]
    widest = max(len(row) for row in heads)
    sheet = np.full((len(heads) * (side + GAP) - GAP, widest * (side + GAP) - GAP), np.nan, dtype=np.float32)
    for i, row in enumerate(heads):
        for j, picture in enumerate(row):
            sheet[i * (side + GAP) : i * (side + GAP) + side, j * (side + GAP) : j * (side + GAP) + side] = picture
    return encode(indices(sheet, scale))


def atlas(heads: Sequence[Sequence[Floats]], names: Sequence[str], scale: str) -> bytes:
    """A PNG of all heads for people to look at: as `grid`, with the names of the sites at the left and the heads' numbers on top.

    Args:
        heads: for each site the maps of its heads, [Q, K], of any size; a cell becomes a square of whole pixels.
        names: of the sites.
        scale: one of `SCALES`.
    """
    larger = max(max(picture.shape) for row in heads for picture in row)
    enlarged = [[_enlarge(picture, -(-SMALLEST // larger)) for picture in row] for row in heads]
    high, wide = (max(picture.shape[axis] for row in enlarged for picture in row) for axis in (0, 1))
    letters = max(14, wide // 12)
    font = ImageFont.load_default(letters)
    left = int(max(font.getlength(name) for name in names)) + 2 * MARGIN
    top = letters + 2 * MARGIN
    step_down, step_right = high + 4 * GAP, wide + 4 * GAP
    sheet = np.full((top + len(heads) * step_down, left + max(len(row) for row in heads) * step_right), np.nan, dtype=np.float32)
    for i, row in enumerate(enlarged):
        for j, picture in enumerate(row):
            y, x = top + i * step_down, left + j * step_right
            sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    image = _image(indices(sheet, scale))
    pen = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        pen.text((MARGIN, top + i * step_down + high / 2), name, fill=GREY, font=font, anchor="lm")
    for j in range(max(len(row) for row in heads)):
        pen.text((left + j * step_right + wide / 2, top / 2), f"head {j}", fill=GREY, font=font, anchor="mm")
    return _png(image)


def encode(cells: Indices) -> bytes:
    """Palette indices [rows, columns] as a PNG with transparency for masked cells."""
    return _png(_image(cells))


def _enlarge(cells: Floats, times: int) -> Floats:
    larger: Floats = cells.repeat(times, axis=0).repeat(times, axis=1)
    return larger


def _image(cells: Indices) -> Image.Image:
    image = Image.new("P", (cells.shape[1], cells.shape[0]))
    image.frombytes(np.ascontiguousarray(cells).tobytes())
    image.putpalette(palette().tobytes())
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1, transparency=MASKED)
    return buffer.getvalue()


def _resize(cells: Floats, length: int, axis: int) -> Floats:
    present = cells.shape[axis]
    if present <= length:
        repeated: Floats = np.take(cells, np.arange(length) * present // length, axis=axis)
        return repeated
    starts = np.arange(length) * present // length
    pooled: Floats = np.fmax.reduceat(cells, starts, axis=axis)  # fmax: NaN only where all are
    return pooled
