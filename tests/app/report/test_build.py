"""`build_report`: what was measured is what a second, independent measurement gives; a ledger that does not close is FAIL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headscope.app
from headscope.app.report import html
from headscope.app.report.build import Report, build_report
from headscope.app.report.measures import Settings
from headscope.app.report.prompts import Prompt
from headscope.interventions import Edit, Plan, scale, select
from headscope.kernels.errors import InputError, NotIntercepted
from headscope.probe import Probe, load
from headscope.probe.attribution import attribute as module
from headscope.probe.attribution.attribute import attribute
from headscope.probe.models import tokenize
from tests.app.report.conftest import QUICK, Small
from tests.app.test_cli import needs

TEXT = "the cat sat"


def text_of(report: Report) -> str:
    return html.pages(report.document, "r.html")["r.html"].decode()


def test_it_is_reached_from_the_package() -> None:
    assert headscope.app.build_report is build_report
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        headscope.app.nothing  # noqa: B018


def test_relevance_value_and_books_are_those_of_attribute(report: Report, small: Small) -> None:
    record = report.document["examples"][1]
    own = attribute(small.model, tokenize(small.tokenizer, record["text"], small.model), tokenizer=small.tokenizer)
    assert record["value"] == own.value
    assert record["relevance"] == pytest.approx(own.of_tokens()[0].tolist(), rel=1e-8)
    assert own.ledger is not None
    assert record["ledger"]["absorbed"] == own.ledger.absorbed
    assert record["ledger"]["inputs"] + record["ledger"]["absorbed"] == pytest.approx(record["value"], rel=1e-5)
    assert record["heads"] == pytest.approx(own.of_heads().flatten().tolist(), rel=1e-6)


def test_the_effect_of_a_head_is_what_a_plan_without_it_takes_away(report: Report, small: Small) -> None:
    record = report.document["examples"][1]
    inputs = tokenize(small.tokenizer, record["text"], small.model)
    token = record["target"]["ids"][0]
    with torch.no_grad():
        before = float(small.model(**inputs).logits[0, -1, token])
        for place, (layer, head) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            with Plan([Edit("z", scale(0.0), select(layer=layer, head=head))]).on(small.model):
                after = float(small.model(**inputs).logits[0, -1, token])
            assert record["head_effects"][place] == pytest.approx(before - after, abs=1e-5)


def test_the_heads_ablated_together_are_the_leading_ones(report: Report, small: Small) -> None:
    found = report.document["heads"]
    assert [row[2] for row in found["together"]["heads"]] == [row["head"] for row in found["rows"][:2]]
    record = report.document["examples"][1]
    inputs = tokenize(small.tokenizer, record["text"], small.model)
    plan = Plan([Edit("z", scale(0.0), select(layer=row["layer"], head=row["head"])) for row in found["rows"][:2]])
    with torch.no_grad(), plan.on(small.model):
        after = float(small.model(**inputs).logits[0, -1, record["target"]["ids"][0]])
    assert found["together"]["by_example"][1] == pytest.approx(record["value"] - after, abs=1e-5)


def test_a_ledger_that_does_not_close_is_fail_and_is_shown(small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(module.TOLERANCE, torch.float32, 0.0)
    broken = build_report(small.model, small.tokenizer, TEXT, settings=QUICK)
    assert not broken.passed
    assert broken.document["conservation"]["open"] == ["1"]
    assert broken.document["checks"][0]["passed"] is False
    page = text_of(broken)
    assert "0 Verdict: FAIL" in page
    assert "The books do not close" in page
    assert page.count("✗ FAIL") >= 2
    broken.save(tmp_path / "r.html")


def test_two_runs_give_the_same_report_but_for_the_time(small: Small) -> None:
    found = [build_report(small.model, small.tokenizer, TEXT, settings=QUICK).document for _ in range(2)]
    for document in found:
        document["created"], document["runtime"], record = "", {}, document["examples"][0]
        record["seconds"] = record["method_seconds"] = record["run_sha256"] = document["claims"][0]["run_sha256"] = None
        for method in document["faithfulness"]["methods"]:
            method["seconds"] = None
    assert found[0] == found[1]


def test_nothing_of_the_model_changes(small: Small) -> None:
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    inputs = tokenize(small.tokenizer, TEXT, small.model)
    with torch.no_grad():
        logits = small.model(**inputs).logits
        build_report(small.model, small.tokenizer, TEXT, settings=QUICK)
        assert torch.equal(small.model(**inputs).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())
    assert all(parameter.grad is None for parameter in small.model.parameters())


def test_one_token_is_enough(small: Small, tmp_path: Path) -> None:
    report = build_report(small.model, small.tokenizer, "a", settings=QUICK)
    assert report.document["examples"][0]["tokens"] == ["a"]
    report.save(tmp_path / "r.html")


def test_one_example_has_neither_intervals_nor_p_values(small: Small) -> None:
    report = build_report(small.model, small.tokenizer, TEXT, settings=replace(QUICK, draws=19))
    assert all(row["p"] is None and row["effect"]["low"] is None for row in report.document["heads"]["rows"])
    assert "there are no intervals and no p-values" in text_of(report)
    faithful = next(check for check in report.document["checks"] if check["name"] == "faithfulness")
    assert faithful["value"] in [pytest.approx(count / 20) for count in range(1, 21)]


def test_a_target_by_name_and_a_contrast_are_what_is_explained(small: Small) -> None:
    given = Prompt("a", TEXT, target="b", against=99)
    found = build_report(small.model, small.tokenizer, [given], settings=QUICK).document["examples"][0]
    ids = small.tokenizer.encode("b", add_special_tokens=False)
    assert (found["target"]["ids"], found["target"]["against"]) == (ids, [99])
    with torch.no_grad():
        logits = small.model(**tokenize(small.tokenizer, TEXT, small.model)).logits[0, -1]
    assert found["value"] == pytest.approx(float(logits[ids[0]] - logits[99]), abs=1e-5)


def test_a_method_that_keeps_no_books_has_no_verdict_on_them(small: Small) -> None:
    report = build_report(small.model, small.tokenizer, TEXT, settings=replace(QUICK, method="gradient-x-input", compared=()))
    checks = {check["name"]: check for check in report.document["checks"]}
    assert checks["conservation"]["passed"] is None
    assert "complete" not in text_of(report).split("</style>")[1]
    assert any("conservation" in line for line in report.document["not_tested"])


@pytest.mark.parametrize(("order", "expected"), [("first", ["1", "2"]), ("random", None), ("worst", None)])
def test_the_examples_shown_are_chosen_by_the_rule_that_is_stated(report: Report, small: Small, order: str, expected: Any) -> None:
    texts = [record["text"] for record in report.document["examples"]]
    found = build_report(small.model, small.tokenizer, texts, settings=QUICK, shown=2, order=order).document
    assert found["shown"]["n"] == len(found["shown"]["examples"]) == 2
    assert len(found["examples"]) == 3
    if expected is not None:
        assert found["shown"]["examples"] == expected
    if order == "worst":
        margins = {row["example"]: row["margin"] for row in found["counter"]["rows"]}
        assert [margins[id] for id in found["shown"]["examples"]] == sorted(margins.values())[:2]
    page = html.pages(found, "r.html")["r.html"].decode()
    assert "Showing <i>2</i> of <i>3</i> examples" in page


def test_only_the_first_examples_are_measured_and_the_rest_is_disclosed(small: Small) -> None:
    found = build_report(small.model, small.tokenizer, ["a b", "c d", "e f"], settings=QUICK, examples=1).document
    assert (found["data"]["n"], found["data"]["total"]) == (1, 3)
    assert "2 further examples of Python" in found["not_tested"]


def test_images_are_reported_by_patches() -> None:
    needs("vit")
    model, processor = load("embedded:vit")
    found = build_report(model, processor, [Prompt("digit", image=3)], settings=replace(QUICK, compared=())).document
    record = found["examples"][0]
    rows, columns = record["grid"]
    assert rows * columns == len(record["relevance"])
    assert record["ledger"]["inputs"] == pytest.approx(record["sum"], abs=1e-5)
    assert found["model"]["tokenizer_sha256"] is None


class Bag(nn.Module):
    """A model without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(300, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.head(self.table(input_ids).mean(1))
        return found


def test_a_model_without_attention_is_refused(small: Small) -> None:
    with pytest.raises(NotIntercepted, match="0 attention sites"):
        build_report(Bag().eval(), small.tokenizer, TEXT, settings=QUICK)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "no examples"), ("", "example '1': the text is empty"), (["a", ""], "example '2': the text is empty"),
        ([3], "example 1 is int"), (7, "data is int"), ([Prompt("x", "a"), Prompt("x", "b")], "the same id"),
        (["a" * 300], "example '1': the text has 300 tokens"),
        ([Prompt("x", "a", target="bc")], "example 'x': the target 'bc' is 2 tokens"),
        ([Prompt("x", "a", against=3)], "against needs a target"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_reported_on_is_refused_before_any_work(small: Small, data: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        build_report(small.model, small.tokenizer, data, settings=QUICK)


def test_a_text_for_a_model_without_tokenizer_is_refused(small: Small) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        build_report(small.model, None, TEXT, settings=QUICK)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"draws": 0}, "draws 0: give 1 or more"), ({"resamples": 1}, "resamples 1"), ({"compared": ("attnlrp",)}, "name methods once"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Settings(**settings)


def test_what_is_left_open_is_settled_by_the_sites_and_the_number_of_examples(report: Report, small: Small) -> None:
    sites = tuple(Probe(small.model).sites(**tokenize(small.tokenizer, TEXT, small.model)))
    assert Settings().settled(sites, 1) == Settings(compared=("gradient-x-input", "rollout"), draws=20)
    assert Settings().settled(sites, 100).draws == 8
    assert Settings(method="rollout").settled(sites, 1).compared == ("gradient-x-input",)
    crossed = [replace(sites[0], kind="cross"), *sites]
    assert Settings().settled(crossed, 1).compared == ("gradient-x-input",)
    assert Settings(compared=(), draws=3).settled(sites, 1) == Settings(compared=(), draws=3)


def test_unknown_methods_and_orders_are_refused(small: Small) -> None:
    with pytest.raises(InputError, match="no method 'magic': there are attnlrp"):
        build_report(small.model, small.tokenizer, TEXT, settings=replace(QUICK, method="magic"))
    with pytest.raises(InputError, match="one of first, random, worst"):
        build_report(small.model, small.tokenizer, TEXT, settings=QUICK, order="best")
