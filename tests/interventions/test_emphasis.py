"""PASTA and sink edits, against patterns scaled and renormalised entry by entry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from headscope.interventions import Plan
from headscope.interventions.language.emphasis import Marked, choose_heads, edit_sink, emphasise, profile_heads
from headscope.kernels.errors import EditError, InputError, SelectionError
from headscope.probe import Keep, Probe
from tests.interventions.small_models import HEADS, LAYERS, bert, changed, last, llama, prompts

PROMPT = prompts(8)[0]
SITES = [f"model.layers.{layer}.self_attn#0" for layer in range(LAYERS)]


def pattern(model: Any, plan: Plan | None, layer: int = 0) -> torch.Tensor:
    """[H, Q, K]."""
    probe = Probe(model)
    with torch.no_grad(), probe.capture(Keep(pattern=True)) as seen:
        if plan is None:
            model(**PROMPT)
        else:
            with plan.on(model):
                model(**PROMPT)
    return seen.pattern(layer=layer)[0]


@pytest.mark.parametrize("alpha", [0.01, 0.3, 5.0])
def test_emphasis_is_the_pattern_scaled_at_the_other_keys_and_renormalised(alpha: float) -> None:
    model = llama()
    before, after = pattern(model, None), pattern(model, emphasise([2, 5], alpha, [(SITES[0], 1), (SITES[0], 3)]))
    for head in range(HEADS):
        for query in range(8):
            row = before[head, query].clone()
            if head in (1, 3):
                for key in range(8):
                    row[key] *= 1.0 if key in (2, 5) else alpha
                row = row / row.sum()
            torch.testing.assert_close(after[head, query], row, atol=1e-10, rtol=1e-8)
    assert (before - after).abs().max() > 0.05


def test_emphasis_keeps_the_fused_path() -> None:
    cost = emphasise([2], 0.01).cost(llama(), repeats=1, **PROMPT)
    assert [site.leaves_fused for site in cost.sites] == [False] * LAYERS


@pytest.mark.parametrize("measure", ["accuracy", "log-probability"])
def test_profiling_is_one_head_at_a_time(measure: str) -> None:
    model = llama()
    tasks = {name: [Marked(p, [1, 2], 3 + place) for place, p in enumerate(prompts(6, 7, seed=seed))] for seed, name in enumerate("ab")}
    best = int(last(model, tasks["a"][0].inputs).argmax())
    tasks["a"][0] = Marked(tasks["a"][0].inputs, [1, 2], best)
    found = profile_heads(model, tasks, alpha=0.001, measure=measure, batch=5)
    for name, examples in tasks.items():
        for number, example in enumerate(examples):
            plain = last(model, example.inputs)
            for layer in range(LAYERS):
                for head in range(HEADS):
                    with emphasise([1, 2], 0.001, [(SITES[layer], head)]).on(model):
                        logits = last(model, example.inputs)
                    if measure == "accuracy":
                        wanted = float(int(logits.argmax()) == example.answer) - float(int(plain.argmax()) == example.answer)
                    else:
                        wanted = float(logits.log_softmax(-1)[example.answer] - plain.log_softmax(-1)[example.answer])
                    assert float(found.examples[name][number, layer, head]) == pytest.approx(wanted, abs=1e-9)
    assert float(found.scores["b"].abs().max()) > 0 or measure == "accuracy"


def test_chosen_heads_are_among_the_best_of_every_task() -> None:
    model = llama()
    tasks = {name: [Marked(p, [1], 4) for p in prompts(6, seed=seed)] for seed, name in enumerate("ab")}
    found = profile_heads(model, tasks, measure="log-probability")
    orders = [[(SITES[i // HEADS], i % HEADS) for i in found.scores[name].flatten().argsort(descending=True).tolist()] for name in "ab"]
    for count in (6, 12):
        assert set(choose_heads(found, count)) == set(orders[0][:count]) & set(orders[1][:count])
    alone = next((count for count in range(1, 12) if not set(orders[0][:count]) & set(orders[1][:count])), None)
    if alone is not None:
        with pytest.raises(SelectionError, match="give a larger count"):
            choose_heads(found, alone)


def test_a_hidden_sink_has_no_share_left_but_its_own_row() -> None:
    model = llama()
    found = pattern(model, edit_sink("mask"), layer=1)
    assert not bool(found[:, 1:, 0].any())
    assert bool((found[:, 0, 0] == 1).all())
    torch.testing.assert_close(found.sum(-1), torch.ones(HEADS, 8, dtype=torch.float64))


def test_a_biased_sink_has_its_odds_times_exp_of_the_bias() -> None:
    model = llama()
    before, after = pattern(model, None), pattern(model, edit_sink("bias", -2.0, heads=[(SITES[0], 2)]))
    odds = [p[2, 1:, 0] / (1 - p[2, 1:, 0]) for p in (before, after)]
    torch.testing.assert_close(odds[1], odds[0] * math.exp(-2), atol=1e-10, rtol=1e-7)
    assert torch.equal(before[1], after[1])


def test_a_sink_without_values_is_looked_at_as_before_and_carries_nothing() -> None:
    model = bert()

    def read(plan: Plan | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad(), Probe(model).capture(Keep(pattern=True, z=True, v=True)) as seen:
            if plan is None:
                model(**PROMPT)
            else:
                with plan.on(model):
                    model(**PROMPT)
        return seen.pattern(layer=0)[0], seen.v(layer=0)[0], seen.z(layer=0)[0]

    before, v, z = read(None)
    after, _, less = read(edit_sink("values", 0.0))
    assert torch.equal(before, after)
    torch.testing.assert_close(less, z - before[:, :, :1] * v[:, :1], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (lambda: emphasise([0], 0.0), EditError, "give a number above 0"),
        (lambda: edit_sink("bias"), EditError, "need an amount"),
        (lambda: edit_sink("mask", 1.0), EditError, "mask takes none"),
        (lambda: edit_sink("forget"), EditError, "choose bias, mask or values"),
        (lambda: profile_heads(llama(), {}), InputError, "give one or more tasks"),
        (lambda: profile_heads(llama(), {"a": [Marked(PROMPT, [1], 50)]}), InputError, "there are 50 tokens or classes"),
    ],
)
def test_bad_input_is_named(act: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        act()


def test_the_weights_are_as_they_were() -> None:
    model = llama()
    before = changed(model, lambda other: None).state_dict()
    with emphasise([0]).on(model):
        last(model, PROMPT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
