"""An attribution can be shown, drawn, saved and read back; what it shows of foreign text does nothing."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor

from headscope.kernels.errors import HeadscopeError, NonFiniteError, SelectionError, ShapeError, StoreError
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.ledger import Entry, Ledger
from headscope.probe.call import AttentionSite

SCHEMA = json.loads(files("headscope.probe").joinpath("attribution", "attribution.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
HOSTILE = ["<script>alert(1)</script>", "\u202eevil", "a\nb", '"><img src=x onerror=alert(1)>', " ", "&lt;", "\x00", "{{7*7}}"]


def site(layer: int, heads: int = 2) -> AttentionSite:
    return AttentionSite(f"layers.{layer}.attn#0", f"layers.{layer}.attn", 0, layer, "self", heads, heads, 4, 4, "sdpa", softcap=30.0)


def made(dtype: torch.dtype = torch.float32, *, closes: bool = True, **changes: Any) -> Attribution:
    count = len(HOSTILE)
    torch.manual_seed(0)
    entries = (Entry("softmax", "softmax", "layers.0.attn", 1.25), Entry("bias", "linear", "layers.0.mlp", -0.25))
    given: dict[str, Any] = {
        "method": "attnlrp",
        "target": "logit of '<b>'",
        "value": 3.5,
        "inputs": {"input_ids": torch.randn(1, count, dtype=dtype)},
        "heads": {f"layers.{layer}.attn#0": torch.randn(1, 2, count, dtype=dtype) for layer in range(2)},
        "blocks": {"layers.0": torch.randn(1, count, dtype=dtype)},
        "parts": {"layers.0.mlp": torch.randn(1, count, dtype=dtype)},
        "sites": (site(0), site(1)),
        "ledger": Ledger(3.5, 2.0 if closes else 1.0, {"wpe": 0.5}, entries, 1e-4),
        "unruled": (("odd", "layers.0", 2),),
        "warnings": ("a <i>warning</i>",),
        "tokens": [HOSTILE],
        "pieces": [[*HOSTILE[:-1], "\udce2"]],
        "special": torch.tensor([[True] + [False] * (count - 1)]),
        "settings": {"rules": "attnlrp", "seconds": 0.5, "target": {"ids": [1], "against": []}},
    }
    return Attribution(**{**given, **changes})


def same(a: Attribution, b: Attribution) -> bool:
    def tables(x: Attribution) -> list[tuple[str, Tensor]]:
        return [(key, value) for name in ("inputs", "heads", "blocks", "parts") for key, value in getattr(x, name).items()]

    plain = ("method", "target", "value", "sites", "ledger", "unruled", "warnings", "tokens", "pieces", "settings")
    return (
        all(getattr(a, name) == getattr(b, name) for name in plain)
        and [key for key, _ in tables(a)] == [key for key, _ in tables(b)]
        and all(x.dtype == y.dtype and torch.equal(x, y) for (_, x), (_, y) in zip(tables(a), tables(b), strict=True))
        and (a.special is b.special is None or torch.equal(a.special, b.special))  # type: ignore[arg-type]
    )


# -- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_saved_is_read_back_equal_and_fits_the_schema(dtype: torch.dtype, tmp_path: Path) -> None:
    given = made(dtype)
    path = given.save(tmp_path / "a.json")
    assert same(Attribution.load(path), given)
    VALIDATOR.validate(json.loads(path.read_text()))
    assert path.read_bytes().isascii()


@pytest.mark.parametrize(
    "changes",
    [
        {"ledger": None, "tokens": None, "pieces": None, "special": None, "sites": (), "heads": {}, "blocks": {}, "parts": {}},
        {"inputs": {"pixel_values": torch.randn(2, 1, 4, 4)}, "tokens": None, "pieces": None, "special": None},
        {"inputs": {}, "heads": {}, "blocks": {}, "parts": {}},
    ],
)
def test_a_result_with_less_in_it_is_read_back_too(changes: dict[str, Any], tmp_path: Path) -> None:
    given = made(**changes)
    assert same(Attribution.load(given.save(tmp_path / "a.json")), given)
    VALIDATOR.validate(given.to_dict())


def test_the_schema_is_itself_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_json_and_file_say_the_same(tmp_path: Path) -> None:
    given = made()
    assert json.loads(given.to_json()) == json.loads(given.save(tmp_path / "a.json").read_text()) == json.loads(json.dumps(given.to_dict()))


def put(document: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    for key in way:
        document = document[int(key) if isinstance(document, list) else key]
    document[int(last) if isinstance(document, list) else last] = value  # type: ignore[index]


DAMAGES: list[tuple[str, Callable[[dict[str, Any]], Any], str, bool]] = [
    # what, how, message, whether the schema refuses it too (what it cannot say: sums, rectangles)
    ("another version", lambda d: put(d, "schema", "headscope.attribution/v2"), "this version reads 'headscope.attribution/v1'", True),
    ("a key too many", lambda d: put(d, "extra", 1), "the file has unknown 'extra'", True),
    ("a key too few", lambda d: d.pop("heads"), "the file has no heads", True),
    ("a value as text", lambda d: put(d, "value", "3.5"), "value is '3.5': expected a number", True),
    ("a flag as number", lambda d: put(d, "value", True), "value is True: expected a number", True),
    ("no floating type", lambda d: put(d, "dtype", "int64"), "dtype is 'int64'", True),
    ("a function as type", lambda d: put(d, "dtype", "load"), "dtype is 'load'", True),
    ("text in a table", lambda d: put(d, "inputs.input_ids", [["x"]]), "inputs of input_ids hold 'x'", True),
    ("a flag in a table", lambda d: put(d, "inputs.input_ids", [[True]]), "inputs of input_ids hold True", True),
    ("a ragged table", lambda d: put(d, "inputs.input_ids", [[1.0], [1.0, 2.0]]), "are no table: a list has 2 entries", False),
    ("a mixed table", lambda d: put(d, "inputs.input_ids", [1.0, [1.0]]), "inputs of input_ids", False),
    ("an empty table", lambda d: put(d, "inputs.input_ids", []), "a list has 0 entries", True),
    ("heads of two axes", lambda d: put(d, "heads", {"a": [[1.0]]}), "heads of a have 2 axes: expected 3", True),
    ("a huge number", lambda d: put(d, "inputs.input_ids", [[10**400]]), "too large", False),
    ("a changed verdict", lambda d: put(d, "passed", False), "passed is False, but the books say otherwise", False),
    ("a changed residual", lambda d: put(d, "ledger.residual", 1.0), "the ledger says residual 1.0", False),
    ("a changed entry", lambda d: put(d, "ledger.entries.0.amount", 9.0), "the ledger says absorbed 1.0, its entries 8.75", False),
    ("an entry too long", lambda d: d["ledger"]["entries"][0].update(more=1), "an entry has unknown 'more'", True),
    ("a site too short", lambda d: d["sites"][0].pop("fold"), "a site has no fold", True),
    ("a site with text for a number", lambda d: put(d, "sites.0.fold", "1"), "a site has fold '1': expected int", True),
    ("unruled of two cells", lambda d: put(d, "unruled", [["a", "b"]]), "expected [operation, module, calls]", True),
    ("tokens of numbers", lambda d: put(d, "tokens", [[1]]), "tokens is 1: expected text", True),
    ("special of numbers", lambda d: put(d, "special", [[1]]), "special holds 1", True),
    ("warnings as text", lambda d: put(d, "warnings", "no"), "warnings is str: expected a list", True),
    ("settings as list", lambda d: put(d, "settings", []), "settings is list: expected a mapping", True),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says", "by_schema"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_a_changed_file_is_refused(change: Callable[[dict[str, Any]], Any], says: str, by_schema: bool, tmp_path: Path) -> None:
    document = copy.deepcopy(made().to_dict())
    change(document)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError) as error:
        Attribution.load(path)
    assert "a.json: " in str(error.value)
    assert says in str(error.value)
    assert VALIDATOR.is_valid(document) is not by_schema


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no JSON"),
        (b"[]", "the file is list: expected a mapping"),
        (b'{"schema": "headscope.attribution/v1", "schema": 1}', "'schema' stands there twice"),
        (b'{"value": NaN}', "it holds NaN"),
        ("{é}".encode(), "is not ASCII"),
        (b"[" * 100_000, "is no JSON"),
    ],
)
def test_what_is_no_attribution_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(StoreError) as error:
        Attribution.load(path)
    assert says in str(error.value)


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        Attribution.load(tmp_path / "none.json")
    with pytest.raises(StoreError, match="cannot be written: No such file"):
        made().save(tmp_path / "none" / "a.json")


def test_a_file_is_whole_or_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made().save(tmp_path / "a.json")
    before = path.read_bytes()

    def stop(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        made(closes=False).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_cannot_say_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="inputs of input_ids are not finite"):
        made(inputs={"input_ids": torch.tensor([[float("nan")]])}).to_dict()
    with pytest.raises(ShapeError, match="complex"):
        made(inputs={"x": torch.zeros(1, 1, dtype=torch.complex64)}).to_dict()


# -- html ----------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.boxes: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "span":
            self.boxes.append("")
            self.depth = 1

    def handle_endtag(self, tag: str) -> None:
        self.depth = 0 if tag in ("span", "sub") else self.depth

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.boxes[-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def test_a_page_has_no_script_no_link_and_every_token_literal() -> None:
    page = made(pieces=None)._repr_html_()
    found = read(page)
    assert found.tags <= {"div", "p", "b", "span", "sub", "br", "table", "tr", "th", "td"}
    assert found.attributes == {"style"}
    texts = [re.sub(r"(0|[+−]\d)$", "", box) for box in found.boxes]
    assert texts == [
        "<script>alert(1)</script>", "\\u202eevil", "a⏎b", '"><img src=x onerror=alert(1)>', "␣", "&lt;", "\\u0000", "{{7*7}}",
    ]  # fmt: skip
    assert "a &lt;i&gt;warning" in page
    assert "\u202e" not in page


def test_relevance_is_told_by_sign_and_digit_not_by_colour_alone() -> None:
    numbers = torch.tensor([[9.0, -9.0, 4.6, -0.4, 0.0, 1.0, -1.0, 0.5]])
    found = read(made(inputs={"input_ids": numbers}, pieces=None)._repr_html_())
    assert [re.search(r"(0|[+−]\d)$", box)[0] for box in found.boxes] == ["+9", "−9", "+5", "0", "0", "+1", "−1", "0"]  # type: ignore[index]


def test_the_books_stand_in_the_page_with_their_verdict() -> None:
    page = made()._repr_html_()
    assert "Books: PASS" in page
    assert "absorbed: softmax" in page
    assert "constants" in page
    assert "Books: FAIL" in made(closes=False)._repr_html_()
    assert "keeps none" in made(ledger=None)._repr_html_()


def test_half_characters_are_shown_as_bytes() -> None:
    assert "\\xe2" in made()._repr_html_()


def test_images_batches_and_long_texts_have_pages_too() -> None:
    image = made(inputs={"pixel_values": torch.randn(12, 3, 40, 24)}, tokens=None, pieces=None, special=None)._repr_html_()
    assert "8 of 12 samples are shown" in image
    assert read(image).tags >= {"table", "td"}
    long = made(inputs={"input_ids": torch.ones(1, 3000)}, tokens=None, pieces=None, special=None)._repr_html_()
    assert "2000 of 3000 tokens are shown" in long
    assert "[2, 2], from +1 to +1" in made(inputs={"x": torch.ones(1, 2, 2)}, tokens=None, pieces=None)._repr_html_()
    assert len(read(made(inputs={"a": torch.ones(3, 2)})._repr_html_()).boxes) == 6  # more samples than there are texts


def test_sums_over_tiles_of_a_page_keep_the_sum() -> None:
    from headscope.probe.attribution.as_html import _pooled

    image = torch.randn(37, 20, dtype=torch.float64)
    sums = _pooled(image)
    assert max(sums.shape) <= 16
    assert float(sums.sum()) == pytest.approx(float(image.sum()), abs=1e-12)


# -- figure --------------------------------------------------------------------------------------------------------------


def test_a_figure_has_tokens_heads_and_books() -> None:
    found = made().plot()
    kinds = [type(trace).__name__ for trace in found.data]
    assert kinds == ["Heatmap", "Heatmap", "Bar"]
    tokens, heads, books = found.data
    cells = [cell for row in tokens.z for cell in row if cell is not None]
    assert cells == pytest.approx(made().inputs["input_ids"][0].tolist())
    assert list(heads.y) == ["layer 0", "layer 1"]
    assert heads.z[1][0] == pytest.approx(float(made().heads["layers.1.attn#0"][0, 0].double().sum()))
    assert dict(zip(books.y, books.x, strict=True)) == {"inputs": 2.0, "constants": 0.5, "softmax": 1.25, "bias": -0.25, "residual": 0.0}
    assert tokens.zmax == -tokens.zmin
    text = json.dumps(found.to_plotly_json(), default=str)
    assert "<script>" not in text.replace("&lt;script&gt;", "")
    assert "PASS" in text


def test_a_figure_of_an_image_shows_its_pixels() -> None:
    image = torch.randn(2, 3, 4, 5)
    found = made(inputs={"pixel_values": image}, heads={}, ledger=None).plot(sample=1)
    assert torch.allclose(torch.tensor(found.data[0].z), image[1].sum(0))


def test_what_cannot_be_drawn_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SelectionError, match="nothing in this attribution can be drawn"):
        made(inputs={}, heads={}, ledger=None).plot()
    two = made(inputs={"input_ids": torch.ones(2, 3)}, tokens=None, pieces=None)
    with pytest.raises(SelectionError, match="which sample\\? there are 2: give sample="):
        two.plot()
    with pytest.raises(SelectionError, match="no sample 2: there are 2"):
        two.plot(2)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(HeadscopeError, match=r"plot\(\) needs plotly, which is not installed: pip install 'headscope\[app\]'"):
        made().plot()


# -- reading -------------------------------------------------------------------------------------------------------------


def test_tokens_are_found_by_name() -> None:
    two = made(inputs={"input_ids": torch.ones(1, 2), "decoder_input_ids": torch.zeros(1, 3), "x": torch.ones(1, 2, 2)})
    assert two.of_tokens().shape == (1, 2)
    assert two.of_tokens("decoder_input_ids").shape == (1, 3)
    with pytest.raises(SelectionError, match="no input 'x' is a text: of tokens \\[B, S\\] there are input_ids, decoder_input_ids"):
        two.of_tokens("x")
    with pytest.raises(SelectionError, match="no input is a text"):
        made(inputs={"x": torch.ones(1, 2, 2)}).of_tokens()
    with pytest.raises(SelectionError, match="which text\\?"):
        made(inputs={"a": torch.ones(1, 2), "b": torch.ones(1, 2)}).of_tokens()


def test_heads_are_summed_over_batch_and_positions() -> None:
    found = made()
    expected = [[float(found.heads[f"layers.{layer}.attn#0"][:, head].sum()) for head in range(2)] for layer in range(2)]
    assert torch.allclose(found.of_heads(), torch.tensor(expected))
    with pytest.raises(SelectionError, match="no relevance of heads was kept"):
        made(heads={}).of_heads()
    with pytest.raises(SelectionError, match="differ in their number of heads"):
        made(heads={"a": torch.ones(1, 2, 3), "b": torch.ones(1, 3, 3)}).of_heads()


def test_maps_are_made_on_demand_and_never_saved(tmp_path: Path) -> None:
    asked: list[Any] = []

    def maps(name: str, rows: Any) -> Tensor:
        asked.append((name, rows))
        return torch.ones(1)

    found = made(maps=maps)
    found.map("layers.0.attn#0", [1])
    assert asked == [("layers.0.attn#0", [1])]
    with pytest.raises(SelectionError, match="no site 'x': there are layers.0.attn#0, layers.1.attn#0"):
        found.map("x")
    with pytest.raises(SelectionError, match="a saved result never holds them"):
        Attribution.load(found.save(tmp_path / "a.json")).map("layers.0.attn#0")


def test_a_frame_has_a_line_for_each_token() -> None:
    frame = made().to_frame()
    assert list(frame["token"]) == HOSTILE
    assert list(frame["relevance"]) == pytest.approx(made().inputs["input_ids"][0].tolist())


def test_the_verdict_is_in_the_text() -> None:
    assert str(made()) == "Attribution(attnlrp, logit of '<b>' = 3.5, 2 sites, books close, 1 operations without a rule)"
    assert "BOOKS DO NOT CLOSE" in str(made(closes=False))
    assert "no books" in str(made(ledger=None))
