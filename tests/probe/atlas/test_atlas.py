"""The atlas as a result: labels follow from numbers by rules, and what is written is read back as it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headscope.kernels.errors import InputError, SelectionError, StoreError
from headscope.probe.atlas.atlas import HeadAtlas
from headscope.probe.atlas.card import RULES, rules_of, write_card
from headscope.probe.atlas.circuits import Circuits
from headscope.probe.atlas.composition import Composed
from headscope.probe.atlas.directions import Direction, Pole
from headscope.probe.atlas.redundancy import Redundancy
from headscope.probe.call import AttentionSite

HOSTILE = "<script>alert(1)</script>"


def site(layer: int | None, heads: int = 2, name: str | None = None) -> AttentionSite:
    return AttentionSite(name or f"layers.{layer}#0", f"layers.{layer}", 0, layer, "self", heads, heads, 4, 4, "sdpa")


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def atlas(**named: object) -> HeadAtlas:
    one, two = site(0), site(1)
    heads = ((one.name, 0), (one.name, 1), (two.name, 0), (two.name, 1))
    pole = Pole(((HOSTILE, 1.5), (" the", 1.0)), (("b", 0.5),))
    given = dict(
        sites=(one, two),
        scores={
            "induction": table([0.0, 0.02], [0.9, math.nan]), "previous": table([1.0, 0.1], [0.0, math.nan]),
            "importance": table([0.5, 2.0], [1.0, 0.1]), "copying": table([0.0, -0.7], [0.8, math.nan]),
        },
        uniform={"induction": table([0.01, 0.01], [0.01, math.nan]), "previous": table([0.04, 0.04], [0.04, math.nan])},
        sink_key=torch.tensor([[0, 3], [0, -1]]),
        on={"induction": "random tokens"},
        undefined={"positional": "one sample"},
        redundancy=Redundancy(heads, torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64), ((0, 2),), queries=7),
        circuits=Circuits(
            (Composed("k", one.name, 0, two.name, 0, 0.3, 0.2),), {(two.name, 0): (Direction("ov", 2.0, 0.5, (pole, pole)),)},
            {two.name: "no v"},
        ),
        warnings=(HOSTILE,),
        info={"model": HOSTILE, "seed": 0, "detectors": []},
    )  # fmt: skip
    return HeadAtlas(**{**given, **named})  # type: ignore[arg-type]


def test_labels_follow_from_numbers() -> None:
    found = atlas()
    assert found.card(0, 0).labels == ("previous-token",)
    assert found.card(0, 1).labels == ("anti-copying",)
    assert found.card(1, 0).labels == ("induction", "copying")
    assert found.card(1, 1).labels == ("undefined",)
    assert found.card(1, 0).text == (
        "1.0 induction, copying: 0.90 of its attention follows a repeat (uniform 0.01); copies what it attends to (OV score +0.80); "
        "importance rank 2 of 4; alike: 0.0"
    )
    assert {label: [card.name for card in cards] for label, cards in found.labels().items()} == {
        "induction": ["1.0"], "previous-token": ["0.0"], "copying": ["1.0"], "anti-copying": ["0.1"], "undefined": ["1.1"],
    }  # fmt: skip


def test_a_threshold_is_the_way_from_uniform_to_all() -> None:
    rules = rules_of({"induction": 0.5})
    for score, named in ((0.61, True), (0.59, False)):
        card = write_card("s", 0, 0, rules, {"induction": score}, {"induction": 0.2})
        assert ("induction" in card.labels) is named  # 0.6 is half way from 0.2 to 1
    card = write_card("s", 3, 4, rules, {"induction": 0.3, "previous": 0.1}, {"induction": 0.2, "previous": 0.1})
    assert card.labels == ("unnamed",)
    assert card.text == "3.4 unnamed: no pattern that has a name; at most 0.30 of its attention follows a repeat (uniform 0.20)"


def test_thresholds_are_the_users_and_are_checked() -> None:
    strict = atlas().relabel({"induction": 0.95, "previous-token": 1.1})
    assert strict.card(1, 0).labels == ("copying",)
    assert strict.card(0, 0).labels == ("unnamed",)
    assert atlas().relabel({"anti-copying": -0.8}).card(0, 1).labels == ("unnamed",)
    with pytest.raises(SelectionError, match="no label 'shy': there are induction"):
        atlas().relabel({"shy": 1})
    with pytest.raises(InputError, match="the threshold of induction is nan"):
        atlas().relabel({"induction": math.nan})
    assert all(rule.source for rule in RULES.values())


def test_a_rule_that_another_score_rules_out_gives_no_label() -> None:
    scores = {"positional": 0.99, "first": 0.9}
    labels = write_card("s", 0, 0, rules_of(None), scores, {"first": 0.1}).labels
    assert "first-token" in labels
    assert "positional" not in labels


def test_heads_are_ranked_and_lifted() -> None:
    found = atlas()
    assert found.top("induction", 2) == [(1, 0, 0.9), (0, 1, 0.02)]
    assert float(found.lift("induction")[1, 0]) == pytest.approx(0.89)
    with pytest.raises(SelectionError, match="no score 'shy': there are induction, previous"):
        found.top("shy")
    with pytest.raises(SelectionError, match="importance has no uniform baseline"):
        found.lift("importance")
    with pytest.raises(SelectionError, match="no head 2: layer 1 has 2 heads"):
        found.card(1, 2)
    with pytest.raises(SelectionError, match="no layer 7: there are 0, 1"):
        found.describe(7, 0)


def test_sites_without_a_layer_of_their_own_are_called_by_their_place() -> None:
    both = (site(0), site(0, name="layers.0.cross#0"))
    assert atlas(sites=both, redundancy=None, circuits=None).layers == (0, 1)
    assert atlas(sites=(site(4), site(9)), redundancy=None, circuits=None).layers == (4, 9)


def test_a_head_is_described_with_its_reasons_and_its_wiring() -> None:
    text = atlas().describe(1, 0)
    assert "K: 0.0 → 1.0  0.300, +0.200 from unrelated heads" in text
    assert "OV σ 2 (50% of the whole)" in text
    assert "alike    0.0" in text
    assert "undefined: not for this head" in atlas().describe(1, 1)


def test_what_is_saved_is_read_back_as_it_was(tmp_path: Path) -> None:
    found = atlas(thresholds={"induction": 0.4})
    again = HeadAtlas.load(found.save(tmp_path / "atlas.json"))
    assert again.to_dict() == found.to_dict()
    assert again.cards() == found.cards()
    assert again.circuits == found.circuits
    for name, value in found.scores.items():
        torch.testing.assert_close(again.scores[name], value, rtol=0, atol=0, equal_nan=True)
    plain = replace(found, redundancy=None, circuits=None)
    assert HeadAtlas.load(plain.save(tmp_path / "plain.json")).redundancy is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["atlas.json", "plain.json"]


def test_the_file_follows_its_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from headscope.probe.atlas import atlas_file

    schema = json.loads(Path(atlas_file.__file__).with_name("atlas.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = json.loads(atlas().to_json())
    validator.validate(document)
    for key in schema["required"]:
        assert not validator.is_valid({name: value for name, value in document.items() if name != key}), key


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": "headscope.atlas/v9"}, "this version reads 'headscope.atlas/v1'"),
        ({"scores": {"induction": [[1.0, 2.0]]}}, "no table of 2 × 2 numbers"),
        ({"scores": {"induction": [["a", 2.0], [1.0, 1.0]]}}, "hold 'a'"),
        ({"sites": [{"name": 3}]}, "damaged"),
        ({"thresholds": {"shy": 1}}, "no label 'shy'"),
        ({"more": 1}, "unknown 'more'"),
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "atlas.json"
    path.write_text(json.dumps({**atlas().to_dict(), **change}), encoding="utf-8")
    with pytest.raises(StoreError, match=reason):
        HeadAtlas.load(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        HeadAtlas.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="is no JSON"):
        HeadAtlas.load(tmp_path / "text.json")
    with pytest.raises(StoreError, match="cannot be written"):
        atlas().save(tmp_path / "no" / "atlas.json")


def test_the_page_is_static_and_hostile_text_does_nothing(tmp_path: Path) -> None:
    page = atlas().save_html(tmp_path / "atlas.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page
    assert "0.90 of its attention follows a repeat" in page
    assert atlas()._repr_html_() in page


def test_figures_and_frames_hold_the_numbers() -> None:
    pytest.importorskip("plotly")
    pandas = pytest.importorskip("pandas")
    found = atlas()
    drawn = found.plot("induction")
    assert [list(row) for row in drawn.data[0].z] == [[0.0, 0.02], [0.9, None]]
    assert len(found.plot().data) == 4
    with pytest.raises(SelectionError, match="no score 'shy'"):
        found.plot("shy")
    frame = found.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["labels"]) == ["previous-token", "anti-copying", "induction, copying", "undefined"]
    assert frame["induction"][2] == 0.9
    assert "0.0" in str(found)
