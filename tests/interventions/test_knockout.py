"""Knock-out of information flow, against masks that transformers itself is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headscope.interventions.language.knockout import Flow, knock_out, sweep_windows
from headscope.kernels.errors import InputError
from tests.interventions.small_models import LAYERS, bert, last, llama, prompts

PROMPT = prompts(8)[0]


def test_a_cut_everywhere_is_a_mask_given_to_the_model() -> None:
    model = llama()
    allowed = torch.ones(8, 8, dtype=torch.bool).tril()
    allowed[6:, 2:4] = False
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    with torch.no_grad():
        wanted = model(**PROMPT, attention_mask=mask).logits
        with knock_out([6, 7], [2, 3]).on(model):
            found = model(**PROMPT).logits
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-8)
    assert (found - model(**PROMPT).logits).abs().max() > 1e-4


def test_a_token_that_nobody_may_see_is_forgotten() -> None:
    model = llama()
    other = {"input_ids": PROMPT["input_ids"].clone()}
    other["input_ids"][0, 3] = 49
    with knock_out(slice(4, None), 3).on(model):
        assert torch.equal(last(model, PROMPT), last(model, other))
    assert not torch.equal(last(model, PROMPT), last(model, other))


@pytest.mark.parametrize(("width", "windows"), [(1, [(0,), (1,), (2,)]), (2, [(0, 1), (1, 2), (2,)]), (3, [(0, 1), (0, 1, 2), (1, 2)])])
def test_the_sweep_is_every_window_alone(width: int, windows: list[tuple[int, ...]]) -> None:
    model = llama()
    examples = [Flow(p, [-1], [1, 2], target) for p, target in zip(prompts(6, 8), (5, None), strict=True)]
    found = sweep_windows(model, examples, width=width, batch=2)
    assert found.windows == tuple(windows)
    for number, example in enumerate(examples):
        plain = last(model, dict(example.inputs)).softmax(-1)
        target = int(plain.argmax()) if example.target is None else example.target
        assert float(found.whole[number]) == pytest.approx(float(plain[target]), rel=1e-9)
        for place, window in enumerate(windows):
            with knock_out([-1], [1, 2], layers=list(window)).on(model):
                wanted = float(last(model, dict(example.inputs)).softmax(-1)[target])
            assert float(found.cut[number, place]) == pytest.approx(wanted, rel=1e-9)
            assert float(found.change[number, place]) == pytest.approx(wanted / float(plain[target]) - 1, rel=1e-6, abs=1e-9)
    assert len(found.to_frame()) == LAYERS
    assert found.worst() in windows


def test_an_encoder_s_tokens_are_cut_too_and_examples_are_remembered() -> None:
    model = bert()
    kept: dict[int, torch.Tensor] = {}
    first = sweep_windows(model, [Flow(PROMPT, [0], [1, 2])], remember=kept)
    kept[0] = kept[0] + 1
    again = sweep_windows(model, [Flow(PROMPT, [0], [1, 2])], remember=kept)
    torch.testing.assert_close(again.cut, first.cut + 1)
    assert float(first.change.abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("examples", "says"),
    [([], "0 examples"), ([Flow(PROMPT, [], [1])], "at least one query"), ([Flow(PROMPT, [-1], [1], 99)], "there are 50 tokens")],
)
def test_bad_input_is_named(examples: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        sweep_windows(llama(), examples)
