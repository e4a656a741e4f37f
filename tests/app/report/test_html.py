"""The page: what stands on it is in the sidecar, text from outside stays text, and it keeps its size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from headscope.app.escape import visible
from headscope.app.report import figures, html
from headscope.app.report.build import Report
from headscope.app.report.parts import quoted
from headscope.app.report.sidecar import ZEROS, canonical
from headscope.kernels.errors import InputError
from tests.app.tiny import HOSTILE

VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Every piece of text with the tags and classes that it stands in; every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.pieces: list[tuple[list[tuple[str, str]], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass  # end tags of cells and list items are left out

    def handle_data(self, data: str) -> None:
        self.pieces.append((list(self.open) or [("", "")], data))

    def inside(self, *tags: str) -> Iterator[str]:
        yield from (text for stack, text in self.pieces if stack[-1][0] in tags)


def page_of(report: Report, name: str = "report.html") -> str:
    return html.pages(report.document, name)[name].decode()


def values(found: Any) -> Iterator[Any]:
    """Every number and text of a document, keys too."""
    if isinstance(found, dict):
        yield from found
        for value in found.values():
            yield from values(value)
    elif isinstance(found, list):
        for value in found:
            yield from values(value)
    else:
        yield found


def test_every_number_on_the_page_is_in_the_sidecar(report: Report) -> None:
    reader = Reader(page_of(report))
    known = [value for value in values(report.document) if isinstance(value, int | float) and not isinstance(value, bool)]
    written = {figures.shown(value) for value in known} | {str(value) for value in known if isinstance(value, int)}
    shown = [text for stack, text in reader.pieces if stack[-1][0] == "i" or stack[-1] == ("text", "n")]
    assert len(shown) > 100
    assert [text for text in shown if text not in written] == []


def test_a_digit_outside_of_numbers_belongs_to_a_text_of_the_sidecar(report: Report) -> None:
    texts = {visible(value) for value in values(report.document) if isinstance(value, str)}
    texts |= {text[:16] for text in texts if re.fullmatch("[0-9a-f]{64}", text)} | {"report.json", "report.html", ZEROS, "SHA-256"}
    ordered = sorted((text for text in texts if re.search(r"\d", text)), key=len, reverse=True)
    wrong = []
    for stack, text in Reader(page_of(report)).pieces:
        if stack[-1][0] in ("i", "sub", "style") or stack[-1] == ("text", "n"):
            continue
        section = stack[-1][0] in ("h2", "a")
        rest = re.sub(r"^(✓ |✗ )?\d+ ", "", text) if section else text
        for piece in ordered:
            rest = rest.replace(piece, "")
        if re.search(r"\d", rest):
            wrong.append(text)
    assert wrong == []


def test_the_digits_of_the_tokens_are_those_of_the_sidecar(report: Report) -> None:
    for place, record in enumerate(report.document["examples"], 1):
        part = page_of(report).split(f"<h3 id=e{place}>")[1].split("<p class=tokens>")[1].split("</p>")[0]
        digits = [int(text.replace("−", "-")) for text in Reader(part).inside("sub")]
        assert digits == record["levels"]


def test_hostile_tokens_are_literal_text(report: Report) -> None:
    reader = Reader(page_of(report))
    shown = list(reader.inside("span"))
    for token in HOSTILE:
        assert visible(token) in shown
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "p", "nav", "ol", "li", "a", "main", "section", "div", "h2",
        "table", "caption", "thead", "tr", "th", "tbody", "td", "span", "i", "dl", "dt", "dd", "code", "h3", "pre", "svg", "path", "figure",
        "figcaption", "polygon", "polyline", "text", "ul", "sub", "strong", "small", "br",
    }  # fmt: skip
    assert {tag for tag, _ in reader.tags} <= allowed
    assert not any(name.startswith("on") or name == "style" for _, attributes in reader.tags for name in attributes)
    assert "\u202e" not in page_of(report)
    assert "\x00" not in page_of(report)
    assert "\u200b" not in page_of(report)


def test_nothing_points_outside_of_the_report(report: Report) -> None:
    reader = Reader(page_of(report))
    links = [attributes[name] or "" for _, attributes in reader.tags for name in attributes if name in ("href", "src", "action", "srcset")]
    targets = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    assert links
    assert all(link.startswith("#") and link[1:] in targets for link in links)
    assert "url(" not in page_of(report).split("</style>")[0]
    assert "default-src 'none'" in page_of(report)


def test_the_policy_allows_only_the_style_sheet_of_the_page(report: Report) -> None:
    page = page_of(report)
    style = page.split("<style>")[1].split("</style>")[0]
    assert f"style-src '{html._source(style)}'" in page
    assert "script-src" not in page
    assert "unsafe" not in page


def test_ids_are_unique_and_headings_go_down_one_step_at_a_time(report: Report) -> None:
    reader = Reader(page_of(report))
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels[:-1], levels[1:], strict=True))


def test_every_table_has_a_caption_and_headers_with_a_scope(report: Report) -> None:
    page = page_of(report)
    tables = re.findall(r"<table.*?</table>", page, re.DOTALL)
    assert len(tables) > 6
    for table in tables:
        assert "<caption>" in table
        assert set(re.findall(r"<th\b([^>]*)>", table)) <= {" scope=col", " scope=row", " scope=col class=r", " scope=row class=r"}


def test_the_ten_sections_stand_in_order(report: Report) -> None:
    titles = re.findall(r"<h2>(?:✓ |✗ )?(\d+) ", page_of(report))
    assert titles == [str(place) for place in range(11)]


def test_twelve_examples_of_34_tokens_fit_in_60_kilobytes(grown: Callable[[int, int], Report]) -> None:
    assert len(page_of(grown(12, 34)).encode()) <= 60_000


def test_fifty_examples_of_256_tokens_fit_in_2_megabytes(grown: Callable[[int, int], Report]) -> None:
    large = grown(50, 256)
    assert len(page_of(large).encode()) <= 2_000_000
    assert len(canonical(large.document)) <= 2_000_000


def test_above_the_limit_every_example_gets_a_page_and_every_link_leads_to_one(grown: Callable[[int, int], Report]) -> None:
    report = grown(5, 400)
    report.document["examples"][0]["id"] = report.document["shown"]["examples"][0] = "a/../<b>"
    pages = html.pages(report.document, "a report.html", most=30_000)
    assert sorted(pages) == [f"a report-examples/{place:04d}.html" for place in range(1, 6)] + ["a report.html"]
    index = Reader(pages["a report.html"].decode())
    links = {attributes["href"] for tag, attributes in index.tags if tag == "a" and not (attributes["href"] or "").startswith("#")}
    for link in links:
        file, _, anchor = (link or "").partition("#")
        page = Reader(pages[file.replace("%20", " ")].decode())
        assert anchor in {attributes.get("id") for _, attributes in page.tags}
    assert all(len(page) <= 30_000 for page in pages.values())


def test_what_cannot_be_split_further_is_refused_with_its_size(report: Report) -> None:
    with pytest.raises(InputError, match="would have \\d+ bytes, more than 1000: show fewer examples"):
        html.pages(report.document, "report.html", most=1000)


def test_a_method_without_books_is_never_called_complete(report: Report) -> None:
    document = {**report.document, "conservation": {**report.document["conservation"], "keeps_books": False}}
    page = html.pages(document, "report.html")["report.html"].decode()
    text = page.split("</style>")[1].lower()
    assert "complete" not in text
    assert "keeps no books" in text


def test_text_cannot_break_out_of_an_attribute() -> None:
    text = "\" onclick='x' > & \u202e"
    [(_, attributes)] = Reader(f'<p title="{quoted(text)}">').tags
    assert attributes == {"title": visible(text)}


def test_an_id_with_markup_is_text_everywhere(report: Report, tmp_path: Path) -> None:
    renamed = "x<img src=a>\u202e"
    document = report.document
    raw = canonical({**document, "title": renamed, "command": renamed, "recipe": {"a": renamed}}).decode()
    changed = __import__("json").loads(raw.replace(f'"{document["examples"][0]["id"]}"', '"x<img src=a>\\u202e"'))
    reader = Reader(html.pages(changed, "report.html")["report.html"].decode())
    assert "img" not in {tag for tag, _ in reader.tags}
