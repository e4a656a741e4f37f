"""What the workbench shows is what the Python interface gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.app.engine import Engine
from headscope.app.session import HeadScale
from headscope.kernels.errors import InputError, SelectionError
from headscope.probe import Keep, Probe
from headscope.probe.models import tokenize

TEXT = "The quick brown fox. The quick"


def test_rows_are_the_patterns_own_to_the_bit(engine: Engine) -> None:
    run = engine.run(TEXT, ())
    inputs = tokenize(engine.tokenizer, TEXT, engine.model)
    with torch.no_grad(), Probe(engine.model).capture(Keep()) as seen:
        engine.model(**inputs)
    pattern = seen.pattern(layer=3, heads=[5])[0, 0]
    for query in (0, 7, len(TEXT) - 1):
        row = np.frombuffer(engine.row(run, 3, 5, query), dtype="<f4")
        assert np.array_equal(row[: query + 1], pattern[query, : query + 1].numpy())
        assert np.isnan(row[query + 1 :]).all()


def test_patterns_equal_the_models_own_attentions(engine: Engine) -> None:
    run = engine.run(TEXT, ())
    engine.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            reference = engine.model(**tokenize(engine.tokenizer, TEXT, engine.model), output_attentions=True).attentions
    finally:
        engine.model.set_attn_implementation("sdpa")
    for row in range(6):
        for head in range(8):
            found = np.nan_to_num(engine.probabilities(run, row, head))
            assert np.abs(found - reference[row][0, head].numpy()).max() < 1e-5


def test_a_zeroed_head_is_its_slice_before_the_projection_set_to_zero(engine: Engine) -> None:
    edited = engine.run(TEXT, (HeadScale(3, 5, 0.0),))

    def zero(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        z = arguments[0].clone()
        z[..., 5 * 16 : 6 * 16] = 0
        return (z,)

    handle = engine.model.model.layers[3].self_attn.o_proj.register_forward_pre_hook(zero)
    try:
        with torch.no_grad():
            logits = engine.model(**tokenize(engine.tokenizer, TEXT, engine.model)).logits[0, -1]
    finally:
        handle.remove()
    assert torch.allclose(edited.answer, torch.log_softmax(logits.double(), -1), atol=1e-6)


def test_the_model_is_as_before_after_edits(engine: Engine) -> None:
    inputs = tokenize(engine.tokenizer, TEXT, engine.model)
    with torch.no_grad():
        before = engine.model(**inputs).logits
        engine.run(TEXT, (HeadScale(0, 0, 0.3), HeadScale(5, 7, 2.0)))
        after = engine.model(**inputs).logits
    assert torch.equal(before, after)
    assert all(not module._forward_pre_hooks for module in engine.model.modules())


def test_the_same_text_and_recipe_give_the_same_run_whatever_the_order(engine: Engine) -> None:
    first = engine.run(TEXT, (HeadScale(1, 2, 0.0), HeadScale(4, 4, 0.5)))
    assert engine.run(TEXT, (HeadScale(4, 4, 0.5), HeadScale(1, 2, 0.0))) is first
    assert engine.run(TEXT, (HeadScale(4, 4, 0.5),)).key != first.key


def test_a_comparison_with_itself_is_zero_and_with_an_edit_is_not(engine: Engine) -> None:
    plain, edited = engine.run(TEXT, ()), engine.run(TEXT, (HeadScale(0, 1, 0.0),))
    assert engine.compare(plain, plain).divergence == 0
    found = engine.compare(plain, edited)
    p, q = plain.answer.exp(), edited.answer.exp()
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-9)
    assert [row.before for row in found.rows] == sorted((row.before for row in found.rows), reverse=True)


def test_progress_is_told_layer_by_layer_and_stops_the_run(engine: Engine) -> None:
    told: list[str] = []
    engine.run("progress, told", (), told.append)
    assert told == [f"layer {layer} of 6" for layer in range(1, 7)]

    def stop(progress: str) -> None:
        if progress == "layer 3 of 6":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.run("progress, stopped", (HeadScale(0, 0, 0.0),), stop)
    assert all(not module._forward_pre_hooks for module in engine.model.modules())


def test_bad_text_and_places_are_named(engine: Engine) -> None:
    with pytest.raises(InputError, match="empty"):
        engine.run("", ())
    with pytest.raises(InputError, match="300 tokens.*256"):
        engine.run("x" * 300, ())
    run = engine.run(TEXT, ())
    with pytest.raises(SelectionError, match="no site 6: this model has 6, 0 to 5"):
        engine.row(run, 6, 0, 0)
    with pytest.raises(SelectionError, match="no head 8: site 0 has 8 heads, 0 to 7"):
        engine.row(run, 0, 8, 0)
    with pytest.raises(SelectionError, match="no query 30"):
        engine.row(run, 0, 0, 30)
    with pytest.raises(SelectionError, match="no longer in memory"):
        engine.find("nothing")


def test_old_runs_give_way_but_the_first_stays(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headscope.app.engine.MEMORY_CAP", 3 * engine.find(engine.first).capture.nbytes)
    for number in range(8):
        engine.run(f"{TEXT} {number}", ())
    assert engine.first in engine.runs
    assert len(engine.runs) <= 4


def test_some_queries_are_masked_like_all_of_them(engine: Engine) -> None:
    run = engine.run(TEXT, ())
    whole = engine.probabilities(run, 2, 3)
    some = engine.probabilities(run, 2, 3, [0, 5, 29])
    assert np.array_equal(np.isnan(some), np.isnan(whole[[0, 5, 29]]))
    assert np.nanmax(np.abs(some - whole[[0, 5, 29]])) < 1e-6


def test_the_grid_of_a_long_text_shows_some_queries(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run = engine.run(TEXT, ())
    whole = engine.grid(run, "sqrt")
    monkeypatch.setattr("headscope.app.engine.GRID_TOKENS", 8)
    assert engine.grid(run, "sqrt")[:32] == whole[:32]  # the same size
