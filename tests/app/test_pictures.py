"""Pictures: palette PNG, masked cells apart from small ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from headscope.app import pictures
from headscope.kernels.errors import InputError


def read(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def test_masked_cells_are_transparent_and_zero_is_not() -> None:
    cells = np.array([[1.0, np.nan], [0.0, 0.25]], dtype=np.float32)
    shown = read(pictures.encode(pictures.indices(cells, "linear")))
    assert shown[..., 3].tolist() == [[255, 0], [255, 255]]
    assert shown[1, 0, :3].tolist() == [0x00, 0x22, 0x4E]
    assert shown[0, 0, :3].tolist() == [0xFE, 0xE8, 0x38]


@pytest.mark.parametrize(("scale", "places"), [("linear", [0, 64, 254]), ("sqrt", [0, 127, 254]), ("log", [0, 229, 254])])
def test_scales_run_from_end_to_end_of_the_palette(scale: str, places: list[int]) -> None:
    found = pictures.indices(np.array([0, 0.25, 1], dtype=np.float32), scale)
    assert np.abs(found.astype(int) - places).max() <= 1


def test_an_unknown_scale_is_named() -> None:
    with pytest.raises(InputError, match="no colour scale 'jet': there are linear, sqrt, log"):
        pictures.indices(np.zeros(1, dtype=np.float32), "jet")


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 9), (100, 100), (200, 7)])
def test_a_thumbnail_keeps_the_largest_value_and_hides_only_what_is_hidden(shape: tuple[int, int]) -> None:
    cells = np.random.default_rng(0).random(shape, dtype=np.float32)
    cells[0, -1] = 2
    small = pictures.thumbnail(cells, 16)
    assert small.shape == (16, 16)
    assert small.max() == 2
    cells[:] = np.nan
    assert np.isnan(pictures.thumbnail(cells, 16)).all()
    cells[-1, -1] = 0.5
    assert np.nanmax(pictures.thumbnail(cells, 16)) == 0.5


def test_the_grid_has_a_square_for_every_head() -> None:
    heads = [[np.full((8, 8), 0.5, dtype=np.float32)] * count for count in (3, 1)]
    shown = read(pictures.grid(heads, "linear"))
    assert shown.shape[:2] == (8 + 2 + 8, 3 * 10 - 2)
    assert shown[0, 8, 3] == 0  # the gap
    assert shown[12, 12, 3] == 0  # no second head in the second row
    assert shown[12, 2, 3] == 255


def test_the_palette_gets_steadily_lighter() -> None:
    light = pictures.palette()[:255].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > -0.6).all()
    assert light[-1] - light[0] > 180


def test_an_atlas_shows_every_map_at_whole_pixels_with_names_beside_it() -> None:
    generator = np.random.default_rng(0)
    heads = [[generator.random((30, 20), dtype=np.float32) for _ in range(count)] for count in (3, 1)]
    heads[0][0][0] = np.nan
    png = pictures.atlas(heads, ["layer 0", "blocks.1.attention"], "sqrt")
    with Image.open(io.BytesIO(png)) as image:
        shown = np.asarray(image)
    for picture in (head for row in heads for head in row):
        block = pictures.indices(picture, "sqrt").repeat(4, axis=0).repeat(4, axis=1)  # 30 × 4 ≥ SMALLEST
        starts = np.argwhere(shown == block[-1, 0])
        assert any(np.array_equal(shown[y - 119 : y + 1, x : x + 80], block) for y, x in starts if y >= 119)
    left, top = shown[:, :60], shown[:20]
    assert set(np.unique(left)) <= {pictures.GREY, pictures.MASKED}
    assert set(np.unique(top)) <= {pictures.GREY, pictures.MASKED}
    assert (left == pictures.GREY).any()
    assert (top == pictures.GREY).any()
