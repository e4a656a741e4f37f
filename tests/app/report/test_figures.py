"""Pictures in SVG: points where the numbers are, no style attributes, names that cannot break out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as tree

import pytest

from headscope.app.report import figures

SHARES = [0.0, 0.5, 1.0]
BAND = ([0.0, -1.0, -1.0], [1.0, 0.0, -1.0], [2.0, 1.0, -1.0])


def drawn(line: figures.Line) -> str:
    return figures.curves("a <title>", SHARES, [line], BAND, figures.ends([line], BAND))


def test_points_lie_where_the_numbers_are() -> None:
    points = re.findall(r"<polyline class=l0 points='([^']*)'", drawn(figures.Line("m", [3.0, 1.0, -1.0])))[0].split()
    places = [tuple(map(int, point.split(","))) for point in points]
    right, bottom = figures.WIDE - figures.RIGHT, figures.HIGH - figures.BOTTOM
    assert places[0] == (figures.LEFT, figures.TOP)
    assert places[2] == (right, bottom)
    assert places[1] == (round((figures.LEFT + right) / 2), round((figures.TOP + bottom) / 2))


def test_a_picture_is_well_formed_has_a_name_and_no_styles() -> None:
    svg = re.sub(r"=([\w-]+)(?=[\s/>])", r'="\1"', drawn(figures.Line("m", [1.0, 1.0, 1.0])))
    root = tree.fromstring(svg)
    assert root.attrib["aria-label"] == "a <title>"
    assert root.attrib["role"] == "img"
    assert "style" not in svg


def test_every_line_has_a_dash_of_its_own() -> None:
    from importlib.resources import files

    style = files("headscope.app.report").joinpath("assets/report.css").read_text(encoding="utf-8")
    dashes = re.findall(r"\.l(\d)\{stroke:var\(--c\d\)(?:;stroke-dasharray:([\d ]+))?\}", style)
    assert [int(place) for place, _ in dashes] == list(range(figures.LINES))
    assert len({dash for _, dash in dashes}) == figures.LINES


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (-0.0, "0"), (-1.23456, "−1.235"), (1e-7, "1e−07"), (3, "3"), (123456.0, "1.235e+05")]
)
def test_numbers_have_four_digits_and_a_real_minus(value: float, text: str) -> None:
    assert figures.shown(value) == text


@pytest.mark.parametrize(("value", "start", "size"), [(1.0, 80, 80), (-0.5, 40, 40), (0.0, 80, 0), (9.0, 80, 80)])
def test_a_bar_grows_from_the_middle(value: float, start: int, size: int) -> None:
    assert f"M{start} 1h{size}v10" in figures.bar(value, 1.0)
