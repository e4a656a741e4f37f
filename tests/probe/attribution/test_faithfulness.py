"""What is measured over samples is what the curves of each sample say, beside controls that know nothing; interrupted runs go on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.kernels.errors import InputError, NonFiniteError, SelectionError, ShapeError, StoreError
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.curves import measure_curves
from headscope.probe.attribution.faithfulness import measure_faithfulness, relevance_of
from headscope.probe.attribution.measured import MEASURES, POSITION, RANDOM, Faithfulness
from headscope.probe.attribution.target import Target
from headscope.probe.attribution.units import Units, patch_units, token_units
from headscope.probe.attribution.value import Value


class Sum(nn.Module):
    """The logits of two classes: the sum over the tokens of what a table says of them."""

    def __init__(self, tokens: int = 30) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(tokens, 2, dtype=torch.float64)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(tokens, 2, generator=generator))
            self.table.weight[0] = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.table(input_ids).sum(1)
        return found


class Picture(nn.Module):
    """The logits of two classes: weighted sums of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", pixel_values, self.weights)


def oracle(model: nn.Module, inputs: Mapping[str, Any], target: Any) -> Tensor:
    """[1, S], what each token adds to the target."""
    assert isinstance(target, Target)
    assert target.ids is not None
    table: Tensor = model.table.weight.detach()  # type: ignore[union-attr, assignment]
    return table[inputs["input_ids"], target.ids[0]]


def samples(count: int = 12, length: int = 9) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 30, (1, length + place % 3), generator=generator)} for place in range(count)]


def measured(**changes: Any) -> Faithfulness:
    given: dict[str, Any] = {"attribution": {"oracle": oracle}, "target": 0, "replacement": 0, "subsets": 4, "draws": 3, "steps": 5}
    model, inputs = changes.pop("model", None) or Sum().eval(), changes.pop("inputs", None) or samples()
    return measure_faithfulness(model, inputs, **{**given, **changes})


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


# -- figures -------------------------------------------------------------------------------------------------------------------------


def test_an_oracle_beats_random_orders_and_position() -> None:
    found = measured()
    for control in (RANDOM, POSITION):
        difference = found.difference("delta_area", "oracle", control)
        assert difference is not None
        assert difference.low is not None
        assert difference.low > 0
    band = found.band("delta_area")
    best = found.interval("delta_area", "oracle")
    assert band is not None
    assert best is not None
    assert best.mean > band[1]
    assert found.interval("sensitivity", "oracle").mean == pytest.approx(1.0)  # type: ignore[union-attr]


def test_every_sample_is_measured_as_one_by_itself_would_be() -> None:
    model, inputs = Sum().eval(), samples(3)
    found = [entry for entry in measured(model=model, inputs=inputs).samples if entry.method == "oracle"]
    for entry, sample in zip(found, inputs, strict=True):
        value = Value(model, sample, 0, replacement=0)
        curves = measure_curves(value.read, oracle(model, sample, value.target)[0], steps=5)
        assert entry.curves.most_first == pytest.approx(curves.most_first, abs=1e-12)
        assert entry.curves.comprehensive == pytest.approx(curves.comprehensive, abs=1e-12)
        assert entry.units == sample["input_ids"].shape[1]
        assert (entry.intact, entry.empty) == pytest.approx((value.whole(), 0.0), abs=1e-12)


def test_means_are_over_samples_and_random_draws_are_averaged_within() -> None:
    found = measured()
    entries = [entry for entry in found.samples if entry.method == RANDOM]
    by_sample = [sum(e.curves.delta_area for e in entries if e.sample == place) / 3 for place in range(12)]
    assert list(found.values("delta_area", RANDOM).values()) == pytest.approx(by_sample)
    interval = found.interval("delta_area", RANDOM)
    assert interval is not None
    assert (interval.mean, interval.n) == (pytest.approx(sum(by_sample) / 12), 12)
    by_draw = [sum(e.curves.delta_area for e in entries if e.draw == draw) / 12 for draw in range(3)]
    assert found.band("delta_area") == pytest.approx((min(by_draw), max(by_draw)))


def test_a_difference_is_taken_sample_by_sample() -> None:
    found = measured(attribution={"oracle": oracle, "better": lambda m, i, t: oracle(m, i, t) + 5})
    difference = found.difference("delta_area", "better", "oracle")
    assert difference is not None
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_mean_curve_runs_over_the_share_removed() -> None:
    found = measured(inputs=samples(2), steps=100)
    curve = found.curve("oracle", points=3)
    own = [entry.curves for entry in found.samples if entry.method == "oracle"]
    middles = []
    for curves in own:
        place = curves.removed[-1] / 2
        a, b = curves.most_first[math.floor(place)], curves.most_first[math.ceil(place)]
        middles.append(a + (b - a) * (place - math.floor(place)))
    assert curve["removed"] == [0, 0.5, 1]
    assert curve["most_first"][1] == pytest.approx(sum(middles) / 2, abs=1e-12)
    assert curve["most_first"][0] == curve["least_first"][0]


def test_position_ranks_the_end_of_a_text_and_the_middle_of_an_image_first() -> None:
    model, inputs = Sum().eval(), samples(1)[0]
    entry = measured(model=model, inputs=inputs, steps=100).samples[-1]
    value = Value(model, inputs, 0, replacement=0)
    expected = measure_curves(value.read, torch.arange(9).double(), steps=100)
    assert entry.method == POSITION
    assert entry.curves.most_first == pytest.approx(expected.most_first)
    image = {"pixel_values": torch.randn(1, 1, 4, 4, dtype=torch.float64)}
    pixels = patch_units(image, 1)
    found = measured(model=Picture().eval(), inputs=image, attribution=torch.randn(1, 1, 4, 4), units=pixels, replacement=None)
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, [5, 6, 9, 10]] = False  # the four in the middle: a fifth of 16 units, rounded up
    chances = Value(Picture().eval(), image, 0, units=pixels).read(keep)[1]
    assert found.samples[-1].curves.comprehensive[3] == pytest.approx((chances[0] - chances[1]).item(), abs=1e-12)


@pytest.mark.parametrize("removal", ["token", "delete", "zero-embedding", "mean-embedding", "heads"])
def test_every_removal_measures_a_language_model(removal: str) -> None:
    inputs = {"input_ids": torch.tensor([[0, 5, 3, 4, 9, 6]])}
    units = None if removal == "heads" else Units("input_ids", tuple((place,) for place in range(1, 6)), tuple("abcde"), (6,))
    found = measured(model=llama(), inputs=inputs, attribution="attnlrp", removal=removal, units=units)
    assert found.removals == (removal,)
    assert found.methods == ("attnlrp", RANDOM, POSITION)
    entry = found.samples[0]
    assert entry.units == (8 if removal == "heads" else 5)
    assert entry.seconds is not None
    assert entry.seconds > 0
    assert found.seconds("attnlrp") == entry.seconds


def test_heads_are_removed_in_the_order_of_their_relevance() -> None:
    model, inputs = llama(), {"input_ids": torch.tensor([[5, 3, 4, 9, 6]])}
    attribution = attribute(model, inputs, 4)
    found = measured(model=model, inputs=inputs, attribution=attribution, target=4, removal="heads").samples[0]
    value = Value(model, inputs, 4, removal="heads")
    expected = measure_curves(value.read, attribution.of_heads().flatten(), steps=5)
    assert found.curves.most_first == pytest.approx(expected.most_first, abs=1e-12)
    assert found.curves.least_first == pytest.approx(expected.least_first, abs=1e-12)


def test_several_removals_share_one_attribution() -> None:
    calls = []

    def counted(model: nn.Module, inputs: Mapping[str, Any], target: Any) -> Tensor:
        calls.append(target)
        return oracle(model, inputs, target)

    found = measured(attribution=counted, inputs=samples(2), removal=["token", "zero-embedding"])
    assert len(calls) == 2
    assert found.removals == ("token", "zero-embedding")
    assert found.methods[0] == "counted"
    assert found.values("delta_area", "counted", "token") == pytest.approx(found.values("delta_area", "counted", "zero-embedding"))


def test_targets_may_differ_by_sample_and_default_to_the_largest_logit() -> None:
    model, inputs = Sum().eval(), samples(4)
    best = [int(model(**sample).argmax()) for sample in inputs]
    assert len(set(best)) == 2
    own = measured(model=model, inputs=inputs, target=best)
    assert own.samples == measured(model=model, inputs=inputs, target=None).samples or [e.curves for e in own.samples] == [
        e.curves for e in measured(model=model, inputs=inputs, target=None).samples
    ]


# -- going on ------------------------------------------------------------------------------------------------------------------------


def timeless(found: Faithfulness) -> list[dict[str, Any]]:
    return [{**entry.to_dict(), "seconds": None} for entry in found.samples]


def test_a_run_that_was_cut_off_goes_on_and_gives_the_same_numbers(tmp_path: Path) -> None:
    path, whole = tmp_path / "entries.jsonl", measured(inputs=samples(4))

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise Stopped

    with pytest.raises(Stopped):
        measured(inputs=samples(4), path=path, progress=stop)
    lines = path.read_text().splitlines()
    assert len(lines) == 8
    path.write_text("\n".join(lines[:7]) + "\n" + lines[7][:40])  # cut off while it was written
    assert timeless(measured(inputs=samples(4), path=path)) == timeless(whole)
    assert len(path.read_text().splitlines()) == len(whole.samples)


def test_a_finished_run_is_read_back_whole_and_attributes_nothing(tmp_path: Path) -> None:
    calls = []

    def counted(model: nn.Module, inputs: Mapping[str, Any], target: Any) -> Tensor:
        calls.append(target)
        return oracle(model, inputs, target)

    path = tmp_path / "entries.jsonl"
    first = measured(attribution=counted, path=path)
    assert measured(attribution=counted, path=path) == first
    assert len(calls) == 12


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"steps": 6}, {"target": 1}, {"subsets": 5}, {"removal": "zero-embedding"}, {"replacement": 3}, {"shares": (0.3,)}],
)
def test_an_entry_of_other_settings_is_not_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "entries.jsonl"
    measured(inputs=samples(2), path=path)
    assert timeless(measured(inputs=samples(2), path=path, **changes)) == timeless(measured(inputs=samples(2), **changes))


def test_an_entry_of_another_model_or_attribution_is_not_taken(tmp_path: Path) -> None:
    path, inputs = tmp_path / "entries.jsonl", samples(1)[0]
    measured(inputs=inputs, attribution=torch.arange(9.0), path=path)
    other = Sum().eval()
    with torch.no_grad():
        other.table.weight[5:] += 1
    for changes in ({"attribution": -torch.arange(9.0)}, {"attribution": torch.arange(9.0), "model": other}):
        assert timeless(measured(inputs=inputs, path=path, **changes)) == timeless(measured(inputs=inputs, **changes))


def test_more_methods_and_draws_take_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "entries.jsonl"
    measured(path=path)
    before = len(path.read_text().splitlines())
    found = measured(path=path, attribution={"oracle": oracle, "gradient-x-input": "gradient-x-input"}, draws=4)
    assert len(path.read_text().splitlines()) == before + 24
    assert found.values("delta_area", "oracle") == pytest.approx(found.values("delta_area", "gradient-x-input"))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n")
    with pytest.raises(StoreError, match=r"notes\.txt, line 1, is no entry of a faithfulness measurement"):
        measured(path=path)
    assert path.read_text() == "dear diary\n"


def test_progress_counts_every_entry() -> None:
    seen: list[tuple[int, int]] = []
    measured(inputs=samples(2), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 10) for done in range(1, 11)]


# -- results -------------------------------------------------------------------------------------------------------------------------


def test_a_result_is_plain_json_and_a_table() -> None:
    found = measured(inputs=samples(3))
    document = json.loads(found.to_json())
    assert [row["method"] for row in document["summary"]] == ["oracle", RANDOM, POSITION]
    assert set(MEASURES) <= set(document["summary"][0])
    assert document["random_band"]["token"]["delta_area"] == pytest.approx(list(found.band("delta_area") or ()))
    frame = found.to_frame()
    assert len(frame) == len(found.samples) == 15
    assert frame["delta_area"].tolist() == [entry.curves.delta_area for entry in found.samples]
    assert "oracle: " in str(found)


def test_a_plot_has_two_lines_a_method() -> None:
    pytest.importorskip("plotly")
    figure = measured(inputs=samples(2)).plot()
    assert [line.line.dash for line in figure.data] == ["solid", "dash"] * 3


def test_what_was_not_measured_is_named() -> None:
    found = measured(inputs=samples(2))
    with pytest.raises(SelectionError, match="no measure 'speed': there are delta_area"):
        found.values("speed", "oracle")
    with pytest.raises(SelectionError, match="method 'lime', removal 'token': there are oracle, random order, position only"):
        found.interval("delta_area", "lime")
    with pytest.raises(SelectionError, match="removal 'delete'"):
        found.interval("delta_area", "oracle", "delete")


def test_without_subsets_there_is_no_sensitivity_and_without_draws_no_band() -> None:
    found = measured(inputs=samples(2), subsets=0, draws=0)
    assert found.interval("sensitivity", "oracle") is None
    assert found.difference("sensitivity", "oracle", POSITION) is None
    assert found.band("delta_area") is None
    json.loads(found.to_json())


# -- bad input -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"attribution": torch.tensor([1.0, float("nan")] + [0.0] * 7)}, NonFiniteError, "1 of 9 relevances are NaN or infinite"),
        ({"attribution": torch.zeros(8)}, ShapeError, r"relevance is \[8\]; its last axes must be \[9\]"),
        ({"attribution": torch.zeros(2, 9)}, ShapeError, r"relevance is \[2, 9\]: give that of one sample"),
        ({"attribution": []}, InputError, "0 attributions for 1 samples"),
        ({"attribution": {}}, InputError, "give at least one attribution"),
        ({"attribution": {RANDOM: oracle}}, InputError, "'random order' is the name of a control"),
        ({"attribution": {"none": None}}, InputError, "NoneType ranks nothing"),
        ({"attribution": "astrology"}, SelectionError, "'astrology'"),
        ({"target": [0, 1]}, InputError, "2 targets for 1 samples"),
        ({"removal": []}, InputError, "1 samples, 0 removals"),
        ({"draws": -1}, InputError, "no negative number"),
        ({"removal": "blur"}, InputError, "cannot be removed by 'blur'"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        measured(inputs=samples(1)[0], **changes)


def test_one_attribution_for_several_samples_is_refused() -> None:
    with pytest.raises(InputError, match="one attribution for 12 samples: give a sequence"):
        measured(attribution=torch.zeros(9))


def test_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match="units are cut in one sample"):
        measured(inputs={"input_ids": torch.ones(2, 4, dtype=torch.long)})


def test_relevance_of_heads_must_have_been_kept() -> None:
    model, inputs = llama(), {"input_ids": torch.tensor([[5, 3, 4]])}
    units = Value(model, inputs, 4, removal="heads").units
    with pytest.raises(SelectionError, match="attnlrp kept no relevance of heads: attribute"):
        relevance_of(attribute(model, inputs, 4, heads=False), units)
    with pytest.raises(SelectionError, match="no relevance of pixel_values: there are input_ids"):
        relevance_of(attribute(model, inputs, 4), Units("pixel_values", ((0,),), ("a",), (1,)))
    assert relevance_of(torch.ones(2, 4), units).shape == (8,)
    assert relevance_of(attribute(model, inputs, 4), token_units(inputs)).shape == (3,)
