"""Every row keeps to its bounds, and some row reaches each of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.kernels.errors import InputError, ShapeError
from headscope.probe.health.bounds import entropy_floor, top_probability_ceiling

torch.set_num_threads(1)


def entropy(scores: list[float]) -> float:
    """Nats, from the definition."""
    weights = [math.exp(s - max(scores)) for s in scores]
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights if w > 0)


def spread(scores: list[float]) -> Tensor:
    mean = math.fsum(scores) / len(scores)
    return torch.tensor(math.sqrt(math.fsum((s - mean) ** 2 for s in scores)), dtype=torch.float64)


def test_the_floor_of_sixteen_keys_at_a_spread_of_three() -> None:
    assert float(entropy_floor(torch.tensor(3.0, dtype=torch.float64), 16)) == pytest.approx(1.767525914651892, abs=1e-14)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=1, max_size=40))
def test_no_row_falls_below_the_floor_or_rises_above_the_ceiling(scores: list[float]) -> None:
    assert entropy(scores) >= float(entropy_floor(spread(scores), len(scores))) - 1e-9
    weights = [math.exp(s - max(scores)) for s in scores]
    width = torch.tensor(max(scores) - min(scores), dtype=torch.float64)
    assert max(weights) / sum(weights) <= float(top_probability_ceiling(width, len(scores))) + 1e-12


@settings(max_examples=60, deadline=None)
@given(
    keys=st.integers(2, 64), size=st.floats(0.01, 30), seed=st.integers(0, 99), common=st.integers(1, 63),
    jitter=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_rows_with_few_high_scores_stay_above_the_floor(keys: int, size: float, seed: int, common: int, jitter: float) -> None:
    made = torch.Generator().manual_seed(seed)
    scores = torch.where(torch.arange(keys) < min(common, keys - 1), size, 0.0) + torch.randn(keys, generator=made) * jitter
    assert entropy(scores.tolist()) >= float(entropy_floor(spread(scores.tolist()), keys)) - 1e-9


@pytest.mark.parametrize("keys", [2, 3, 16, 331])
@pytest.mark.parametrize("gap", [0.0, 0.7, 5.0, 20.0])
def test_one_score_above_equal_ones_reaches_both(keys: int, gap: float) -> None:
    scores = [gap, *[0.0] * (keys - 1)]
    assert float(entropy_floor(spread(scores), keys)) == pytest.approx(entropy(scores), rel=1e-9, abs=1e-12)
    ceiling = top_probability_ceiling(torch.tensor(gap, dtype=torch.float64), keys)
    assert float(ceiling) == pytest.approx(math.exp(gap) / (keys - 1 + math.exp(gap)), rel=1e-12)


def test_a_flat_row_may_not_be_anything_but_uniform() -> None:
    keys = torch.tensor([1, 2, 10, 4096])
    assert entropy_floor(torch.zeros(4), keys).tolist() == pytest.approx([0.0, math.log(2), math.log(10), math.log(4096)])
    assert top_probability_ceiling(torch.zeros(4), keys).tolist() == pytest.approx([1.0, 0.5, 0.1, 1 / 4096])


def test_a_bounded_range_of_scores_dilutes_as_one_over_the_keys() -> None:
    delta = torch.tensor(4.0, dtype=torch.float64)
    short, long = (float(top_probability_ceiling(delta, n)) for n in (10**6, 10**7))
    assert long == pytest.approx(short / 10, rel=1e-4)


def test_huge_spreads_and_ranges_neither_overflow_nor_turn_negative() -> None:
    assert float(entropy_floor(torch.tensor(1e30), 100)) == 0.0
    assert float(top_probability_ceiling(torch.tensor(1e30), 100)) == 1.0


def test_what_cannot_be_told_is_nan() -> None:
    odd = torch.tensor([math.nan, math.inf, 1.0])
    keys = torch.tensor([5, 5, 0])
    assert bool(entropy_floor(odd, keys).isnan().all())
    assert bool(top_probability_ceiling(odd, keys).isnan().all())


def test_negative_distances_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="spread -1: a distance between scores is 0 or more"):
        entropy_floor(torch.tensor([2.0, -1.0]), 4)
    with pytest.raises(InputError, match="score_range -0.5"):
        top_probability_ceiling(torch.tensor(-0.5), 4)
    with pytest.raises(ShapeError, match=r"spread is \[3\] and keys are \[2\]"):
        entropy_floor(torch.zeros(3), torch.tensor([1, 2]))
