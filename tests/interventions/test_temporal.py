"""TS-Attn: the sparse bias against the formula written out for every row and key, in float64, and in a real video model."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from torch import Tensor, nn

from headscope.interventions import Edit, Plan
from headscope.interventions.diffusion.temporal import separate_events
from headscope.interventions.edit import change
from headscope.interventions.separation import separate
from headscope.kernels.errors import EditError, SelectionError, ShapeError
from headscope.probe import Keep, Probe
from tests.interventions.dense import make_call
from tests.models import diffusion

FRAMES, ROWS, COLUMNS, KEYS = 4, 4, 5, 9
SIZE = FRAMES * ROWS * COLUMNS
EVENTS = [((2, 3), range(2)), ((5,), range(2, 4))]
SUBJECT, PADDING = 1, (7, 8)


def scores(before: int = 0, seed: int = 0) -> Tensor:
    """[2, 3, before + n, K] with padding that may not be seen, and a subject that stands in a region."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, 3, before + SIZE, KEYS, generator=generator, dtype=torch.float64)
    body = torch.zeros(FRAMES, ROWS, COLUMNS, dtype=torch.float64)
    body[:, :, 1:] = 4.0
    drawn[:, :, before:, SUBJECT] = body.flatten() + 0.1 * drawn[:, :, before:, SUBJECT]
    drawn[..., list(PADDING)] = -math.inf
    return drawn


def dense(value: Tensor, threshold: float | None, erosion: int, text: range, before: int = 0, strength: float = 1.0) -> Tensor:
    """s + M ∘ R ∘ B with M, R and B as whole matrices, one entry after the other."""
    result = value.clone()
    for sample in range(value.shape[0]):
        full = torch.stack([torch.softmax(value[sample, head, before:], -1)[:, SUBJECT] for head in range(value.shape[1])])
        looked = full.mean(0)
        half = sorted(looked.tolist(), reverse=True)[: math.ceil(SIZE / 2)]
        limit = sum(half) / len(half) if threshold is None else threshold
        inside = {divmod(token, ROWS * COLUMNS) for token in range(SIZE) if looked[token] > limit}
        reach = erosion // 2
        subject = set()
        for frame, place in inside:
            y, x = divmod(place, COLUMNS)
            around = [
                (frame, b * COLUMNS + a)
                for b in range(y - reach, y + reach + 1) for a in range(x - reach, x + reach + 1)
                if 0 <= b < ROWS and 0 <= a < COLUMNS
            ]  # fmt: skip
            if all(cell in inside for cell in around):
                subject.add((frame, place))
        for head in range(value.shape[1]):
            for frame, place in subject:
                query = before + frame * ROWS * COLUMNS + place
                row = [float(value[sample, head, query, key]) for key in text]
                seen = [s for s in row if s > -math.inf]
                mean = sum(seen) / len(seen)
                weights = [math.exp(s - max(seen)) if s > -math.inf else 0.0 for s in row]
                p = [w / sum(weights) for w in weights]
                visible = [a for a, s in zip(p, row, strict=True) if s > -math.inf]
                for words, frames in EVENTS:
                    for key in words:
                        share = (p[key - text.start] - min(visible)) / (max(visible) - min(visible))
                        positive, negative = 1 + 0.5 * (1 - share), 1 + 0.5 * share
                        bias = positive * (max(seen) - mean) if frame in frames else negative * (min(seen) - mean)
                        result[sample, head, query, key] += strength * bias
    return result


@pytest.mark.parametrize(
    ("threshold", "erosion", "before", "strength"), [(None, 1, 0, 1.0), (0.2, 1, 3, 1.0), (0.4, 3, 3, 1.0), (0.05, 3, 0, 0.5)]
)
def test_the_sparse_bias_is_the_dense_formula(threshold: float | None, erosion: int, before: int, strength: float) -> None:
    value = scores(before)
    plan = separate_events(
        EVENTS, grid=(FRAMES, ROWS, COLUMNS), steps=10, subject=[SUBJECT], offset=before, threshold=threshold, erosion=erosion,
        strength=strength,
    )  # fmt: skip
    call = make_call(queries=before + SIZE, keys=KEYS)
    found = change(plan.edits[0], "scores", value, call, None)
    expected = dense(value, threshold, erosion, range(KEYS), before, strength)
    assert not torch.equal(expected, value)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_in_joint_attention_the_row_is_that_of_the_text_alone() -> None:
    value = scores()
    op = separate_events(
        EVENTS, grid=(FRAMES, ROWS, COLUMNS), steps=1, subject=[SUBJECT], text=range(1, 6), threshold=0.3, erosion=1
    ).edits[0]
    found = change(op, "scores", value, make_call(queries=SIZE, keys=KEYS), None)
    torch.testing.assert_close(found, dense(value, 0.3, 1, range(1, 6)), rtol=1e-12, atol=1e-12)


def test_words_of_no_event_padding_and_frames_of_no_event_stay() -> None:
    value = scores()
    edit = separate_events([((2,), [0]), ((5,), [1])], grid=(FRAMES, ROWS, COLUMNS), steps=1).edits[0]
    found = change(edit, "scores", value, make_call(queries=SIZE, keys=KEYS), None)
    assert torch.equal(found[..., [0, 1, 3, 4, 6, 7, 8]], value[..., [0, 1, 3, 4, 6, 7, 8]])
    cells = ROWS * COLUMNS
    assert torch.equal(found[:, :, 2 * cells :], value[:, :, 2 * cells :])
    assert (found[:, :, :cells, 2] >= value[:, :, :cells, 2]).all()
    assert (found[:, :, :cells, 5] <= value[:, :, :cells, 5]).all()
    assert (found[:, :, cells : 2 * cells, 5] >= value[:, :, cells : 2 * cells, 5]).all()


def test_no_strength_and_no_event_are_no_edit() -> None:
    value = scores()
    none = separate_events(EVENTS, grid=(FRAMES, ROWS, COLUMNS), steps=1, strength=0.0).edits[0]
    assert change(none, "scores", value, make_call(queries=SIZE, keys=KEYS), None) is value
    high = separate_events(EVENTS, grid=(FRAMES, ROWS, COLUMNS), steps=1, subject=[SUBJECT], threshold=2.0).edits[0]
    assert torch.equal(change(high, "scores", value, make_call(queries=SIZE, keys=KEYS), None), value)


@pytest.mark.parametrize(("share", "steps", "first"), [(0.2, 50, 10), (0.4, 20, 8), (0.2, 3, 1), (1.0, 4, 4)])
def test_only_the_first_share_of_the_steps_is_edited(share: float, steps: int, first: int) -> None:
    plan = separate_events(EVENTS, grid=(FRAMES, ROWS, COLUMNS), steps=steps, share=share)
    assert plan.edits[0].selector.steps == tuple(range(first))


@pytest.fixture(scope="module")
def wan() -> tuple[nn.Module, dict[str, Any]]:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, inputs = next(entry for entry in diffusion.ENTRIES if entry.name.startswith("Wan")).make()
    return model.eval(), inputs


def test_in_a_video_model_each_frame_comes_to_look_at_its_event(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = wan
    plan = separate_events([((1,), [0]), ((4,), [1])], grid=(2, 4, 4), steps=5, kind="cross", layers=[0])
    with torch.no_grad(), Probe(model).capture(Keep(pattern=True), sites="blocks.0.attn2*") as plain:
        model(**inputs)
    with torch.no_grad(), plan.on(model) as on, Probe(model).capture(Keep(pattern=True), sites="blocks.0.attn2*") as seen:
        model(**inputs)
        model(**inputs)
    assert on.hits == {0: 1}
    before, after = plain.pattern(layer=0), seen.pattern(layer=0, step=0)
    for frame, own, other in ((slice(0, 16), 1, 4), (slice(16, 32), 4, 1)):
        assert (after[:, :, frame, own] > before[:, :, frame, own]).all()
        assert (after[:, :, frame, other] < before[:, :, frame, other]).all()
    torch.testing.assert_close(seen.pattern(layer=0, step=1), before)


def test_the_plan_is_kept_as_a_recipe_that_fits_the_schema_and_as_a_script(tmp_path: Path) -> None:
    plan = separate_events(EVENTS, grid=(FRAMES, 4, 5), steps=10, subject=[1], text=range(9), threshold=0.3, kind="cross")
    path = plan.save(tmp_path / "events.yaml")
    assert Plan.load(path) == plan
    schema = json.loads(files("headscope.interventions").joinpath("recipe.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text()))
    names: dict[str, Any] = {}
    exec(plan.to_python(), names)
    assert names["plan"] == plan


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: separate_events([], grid=(2, 4, 4), steps=10), "events is empty"),
        (lambda: separate_events([((1,), [2])], grid=(2, 4, 4), steps=10), "frames from 0 to 1"),
        (lambda: separate_events([((1,), [0]), ((1,), [1])], grid=(2, 4, 4), steps=10), "a key stands there twice"),
        (lambda: separate_events([((1,), [0])], grid=(4, 4), steps=10), r"give \(frames, rows, columns\)"),
        (lambda: separate_events([((1,), [0])], grid=(2, 4, 4), steps=0), "give how many steps"),
        (lambda: separate_events([((1,), [0])], grid=(2, 4, 4), steps=10, erosion=2), "give an odd side"),
        (lambda: separate_events([((1,), [0])], grid=(2, 4, 4), steps=10, text=[2, 3]), "not all among the text's keys"),
        (lambda: separate(torch.tensor([1]), torch.tensor([[2], [0]]), (2, 4, 4)), "of -1, 0 and 1"),
        (lambda: Edit("pattern", separate(torch.tensor([1]), torch.tensor([[1], [0]]), (2, 4, 4))), "it works at scores"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written(make: Any, says: str) -> None:
    with pytest.raises((EditError, SelectionError), match=says):
        make()


def test_a_grid_that_the_call_has_not_is_named_with_both_sizes() -> None:
    edit = separate_events([((1,), [0]), ((2,), [1])], grid=(9, 9, 9), steps=1).edits[0]
    with pytest.raises(ShapeError, match="a grid of 9×9×9 tokens after 0 and key 2; the call has 80 queries and 9 keys"):
        change(edit, "scores", scores(), make_call(queries=SIZE, keys=KEYS), None)


def test_gradients_through_the_bias_are_those_of_the_formula() -> None:
    value = scores()[:1, :1, :, :7].clone()  # without padding
    edit = separate_events(EVENTS, grid=(FRAMES, ROWS, COLUMNS), steps=1).edits[0]
    value.requires_grad_()
    change(edit, "scores", value, make_call(batch=1, queries=SIZE, keys=7), None).softmax(-1)[..., 2].sum().backward()
    assert value.grad is not None
    assert bool(torch.isfinite(value.grad).all())
    direction = torch.randn_like(value) * 1e-6
    with torch.no_grad():
        ends = [
            change(edit, "scores", value + sign * direction, make_call(batch=1, queries=SIZE, keys=7), None).softmax(-1)[..., 2].sum()
            for sign in (1, -1)
        ]
    assert float((ends[0] - ends[1]) / 2) == pytest.approx(float((value.grad * direction).sum()), rel=1e-4)
