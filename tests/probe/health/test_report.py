"""A health report: read back as it was written, shown without scripts, and never with a number that is none."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from headscope.kernels.errors import InputError, SelectionError, StoreError
from headscope.probe.health import report_words
from headscope.probe.health.baselines import Baselines, uniform_baseline
from headscope.probe.health.findings import Finding, find
from headscope.probe.health.measures import HEAD_FIELDS, GradientMeasures
from headscope.probe.health.report import TABLES, HealthReport
from headscope.probe.health.thresholds import Thresholds, thresholds_of
from tests.probe.health.made import head_measures, site, stream_measures

HOSTILE = '<img src=x onerror="alert(1)">\u202e</style><script>alert(1)</script>\'\x1b[31m'


def made(thresholds: dict[str, float] | None = None, name: str = "a model") -> HealthReport:
    heads = (
        head_measures(0, routing=[0.9, 0.3, 0.3, 0.3], previous=[0.9, 0.1, 0.1, 0.1], entropy_share=[0.05, 0.6, 0.6, 0.6]),
        head_measures(1, max_score=[8.0, 300.0, 8.0, 8.0]),
        head_measures(2, 2, entropy_share=math.nan, routing=math.nan),
    )
    streams = (
        stream_measures(0, "input"),
        stream_measures(0),
        stream_measures(1, residual=0.05),
        stream_measures(2, cosine=math.nan, undefined={"cosine": "a row is 0"}),
    )
    ratio = torch.tensor([0.5, 1e-4, 0.5, math.nan], dtype=torch.float64)
    gradients = (GradientMeasures(site(1), ratio, ratio, ratio, ratio, {"ratio": "no gradient"}),)
    baselines = Baselines({heads[0].site.name: uniform_baseline(heads[0])}, heads[:1], streams[:2], {"fresh": "of one layer only"}, 5)
    limits = thresholds_of(thresholds)
    found = find(heads, streams, gradients, baselines, limits)
    info: dict[str, object] = {"model": "Made", "name": name, "tokens": 64, "seed": 0, "versions": {"torch": "2"}}
    return HealthReport(heads, streams, gradients, baselines, found, limits, info)


def test_what_is_saved_is_read_back_as_it_was(tmp_path: Path) -> None:
    report = made({"sink": 0.4})
    path = report.save(tmp_path / "health.json")
    found = HealthReport.load(path)
    assert found.to_dict() == report.to_dict()
    assert found.findings == report.findings
    assert found.thresholds == report.thresholds == thresholds_of({"sink": 0.4})
    assert found.baselines.absent == {"fresh": "of one layer only"}
    for name in HEAD_FIELDS:
        for a, b in zip(found.heads, report.heads, strict=True):
            assert torch.equal(getattr(a, name).nan_to_num(-7), getattr(b, name).nan_to_num(-7)), name
    assert [p.name for p in tmp_path.iterdir()] == ["health.json"]


def schema() -> Any:
    return json.loads(files("headscope.probe.health").joinpath("health.schema.json").read_text(encoding="utf-8"))


def test_the_document_is_what_the_schema_says() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    checker = jsonschema.Draft202012Validator(schema())
    document = json.loads(made().to_json())
    checker.validate(document)
    checker.validate(json.loads(HealthReport(()).to_json()))
    for spoil in ({"worst": "bad"}, {"schema": "headscope.health/v2"}, {"more": 1}):
        assert not checker.is_valid({**document, **spoil})
    document["heads"][0]["entropy"][0] = "much"
    assert not checker.is_valid(document)


def test_the_schema_knows_every_field_that_is_measured() -> None:
    assert set(HEAD_FIELDS) <= set(schema()["$defs"]["heads"]["properties"])


def test_what_is_undefined_is_null_with_its_reason() -> None:
    document = json.loads(made().to_json(), parse_constant=lambda text: pytest.fail(text))
    assert document["heads"][2]["routing"] == [None, None]
    assert document["heads"][2]["undefined"]["routing"] == "made up"
    assert document["streams"][3]["cosine"] is None
    assert document["layers"][2]["routing"] is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found.update(schema="headscope.health/v9"), "this version reads"),
        (lambda found: found.pop("heads"), "it has no heads"),
        (lambda found: found.update(more=1), "unknown 'more'"),
        (lambda found: found["heads"][0].update(entropy=[1.0]), "damaged"),
        (lambda found: found["heads"][0]["site"].update(kin="self"), "other fields"),
        (lambda found: found.update(worst="ok"), "the file was changed"),
        (lambda found: found["findings"][0].update(severity="grave"), "none of info, warn, alarm"),
        (lambda found: found["thresholds"][0].update(name="snik"), "no threshold 'snik'"),
        (lambda found: found.update(streams=3), "damaged"),
    ],
)
def test_a_damaged_file_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    document = json.loads(made().to_json())
    change(document)
    path = tmp_path / "health.json"
    path.write_text(json.dumps(document), encoding="ascii")
    with pytest.raises(StoreError, match=reason):
        HealthReport.load(path)


@pytest.mark.parametrize(("content", "reason"), [(b"{", "no JSON"), (b"\xff", "not ASCII"), (b"[NaN]", "NaN"), (b"[]", "schema is 'list'")])
def test_a_file_that_is_none_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "health.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=reason):
        HealthReport.load(path)
    with pytest.raises(StoreError, match="cannot be read"):
        HealthReport.load(tmp_path / "none.json")
    with pytest.raises(StoreError, match="cannot be written"):
        made().save(tmp_path / "no" / "health.json")


def test_the_worst_finding_and_those_from_a_severity_on() -> None:
    report = made()
    assert report.worst == "warn"
    assert {one.rule for one in report.at_least("warn")} == {"logit-growth", "token-collapse", "gradient-vanishing"}
    assert report.at_least("alarm") == ()
    assert replace(report, findings=()).worst == "ok"
    with pytest.raises(InputError, match="no severity 'bad': there are info, warn, alarm"):
        report.at_least("bad")
    assert str(report) == "HealthReport(warn: 3 warnings; 10 heads in 3 layers)"


def test_tables_have_a_line_for_everything() -> None:
    report = made()
    count = {"heads": 10, "streams": 4, "gradients": 4, "findings": len(report.findings), "notes": len(report.notes), "layers": 3}
    assert count.keys() == set(TABLES)
    for what, rows in count.items():
        assert len(report.rows(what)) == len(report.to_frame(what)) == rows
    assert report.to_frame("heads").loc[0, "routing"] == 0.9
    row = report.rows("layers")[1]
    assert (row["state_residual"], row["max_score"]) == (0.05, 300.0)
    with pytest.raises(SelectionError, match="no table 'head': there are heads"):
        report.rows("head")
    assert report.of(report.heads[1].site.name) is report.heads[1]
    with pytest.raises(SelectionError, match="no site 'x'"):
        report.of("x")


class Reader(HTMLParser):
    """Tags, texts and whatever could fetch or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.suspect: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.suspect += [(name, value) for name, value in attrs if name in ("src", "href", "style") or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_has_no_script_and_asks_for_nothing(tmp_path: Path) -> None:
    page = made().save_html(tmp_path / "health.html").read_text(encoding="utf-8")
    found = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(found.tags)
    assert found.suspect == []
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<table") == page.count("</table>")
    with pytest.raises(StoreError, match="cannot be written"):
        made().save_html(tmp_path / "no" / "health.html")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    report = made(name=HOSTILE)
    bad = replace(report.heads[0], site=report.heads[0].site.named(name=HOSTILE, layer=None), undefined={"sink": HOSTILE})
    finding = Finding("warn", HOSTILE, None, HOSTILE, 0, ((HOSTILE, 1.0, 2.0),), HOSTILE, (HOSTILE,), HOSTILE)
    report = replace(report, heads=(bad, *report.heads[1:]), findings=(finding, *report.findings))
    for page in (report._repr_html_(), report.save_html(tmp_path / "x.html").read_text(encoding="utf-8")):
        found = Reader(page)
        assert found.tags.count("style") == 1
        assert not {"script", "img"} & set(found.tags)
        assert found.suspect == []
        assert "\u202e" not in page
        assert "\x1b" not in page


def test_the_page_says_the_numbers() -> None:
    report = made()
    text = " ".join(Reader(report._repr_html_()).words)
    assert "warn: 3 warnings; 10 heads in 3 layers" in text
    assert "previous-token" in text
    assert "0.90" in text
    assert "of one layer only" in text
    assert "made up" in text
    for one in report.findings:
        assert one.rule in text
        assert all(remedy.partition("(")[0].strip() in text for remedy in one.remedies)


def test_a_report_of_nothing_can_be_shown() -> None:
    empty = HealthReport(())
    assert "undefined: no attention could be measured" in empty._repr_html_()
    assert empty.worst == "ok"
    with pytest.raises(SelectionError, match="nothing to draw"):
        empty.plot()
    with pytest.raises(SelectionError, match="nothing to draw"):
        empty.plot("streams")


def test_figures_hold_the_numbers() -> None:
    report = made()
    budget = report.plot("budget")
    assert [trace.z[0][0] for trace in budget.data] == [0.6, 0.9, 0.1]
    assert [trace.z[2][0] for trace in budget.data] == [0.6, None, 0.1]
    sinks = report.plot("heads:max_score")
    assert sinks.data[0].z[1][1] == 300.0
    assert sinks.data[0].text[1][1] == "300"
    streams = report.plot("streams")
    assert list(streams.data[0].y) == [0.9, 0.9, 0.05, 0.9]
    assert report.plot("heads:sink").data[0].zmax == 1.0


@pytest.mark.parametrize(
    ("what", "reason"), [("heads", "no field ''"), ("heads:snik", "no field 'snik'"), ("x", "no figure 'x': there are budget")]
)
def test_a_figure_that_there_is_not_is_named(what: str, reason: str) -> None:
    with pytest.raises(SelectionError, match=reason):
        made().plot(what)


def test_numbers_are_written_as_people_read_them() -> None:
    assert [report_words.number(value) for value in (0.0, 3, -2.0, 0.12345, 1580.32, 2.5e-5, None, math.nan)] == [
        "0", "3", "−2", "0.123", "1580", "2.50e−05", "–", "–",
    ]  # fmt: skip
    assert report_words.spans([0, 2, 3, 4, 7]) == "0, 2–4, 7"
    assert Thresholds() == made().thresholds


def test_a_rule_that_fires_in_many_layers_is_told_once_with_the_worst_first() -> None:
    states = (stream_measures(0, "input"), *(stream_measures(layer, residual=0.5**layer / 6) for layer in range(1, 9)))
    every = find((), states, (), Baselines(), Thresholds())
    assert len(every) == 8
    (one,) = report_words.told(every)
    assert (one.severity, one.rule, one.places) == ("alarm", "token-collapse", "layers 1–8")
    assert one.why.startswith("layer 8 – the tokens")
    assert len(one.evidence) == 8
    report = HealthReport((head_measures(),), states, findings=every)
    assert report_words.verdict(report) == "alarm: 1 alarm; 4 heads in 1 layer"
