"""Curves of a sum of known parts are known exactly, and the measures say what their definitions say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headscope.kernels.errors import InputError, NonFiniteError, ShapeError
from headscope.probe.attribution.correlation import correlation, rank_correlation
from headscope.probe.attribution.curves import (
    Curves,
    area,
    draw_subsets,
    measure_curves,
    points,
    ranking,
    without,
)

Read = Callable[[Tensor], tuple[Tensor, Tensor]]
PARTS = torch.tensor([4.0, -1.0, 2.0, 0.5, 3.0, -2.0, 1.0, 0.25, 0.75, 1.5], dtype=torch.float64)


def additive(parts: Tensor, base: float = 0.5) -> Read:
    """A target that is a sum over the units that are left; its probability is the logistic function of it."""

    def read(keep: Tensor) -> tuple[Tensor, Tensor]:
        values = base + keep.double() @ parts
        return values, values.sigmoid()

    return read


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_curves_of_a_sum_are_its_partial_sums() -> None:
    found = measure_curves(additive(PARTS), PARTS, steps=10)
    down = sorted(PARTS.tolist(), reverse=True)
    total = 0.5 + sum(down)
    assert found.removed == tuple(range(11))
    assert found.most_first == pytest.approx([total - sum(down[:k]) for k in range(11)], abs=1e-12)
    assert found.least_first == pytest.approx([total - sum(down[10 - k :]) for k in range(11)], abs=1e-12)
    assert found.most_first_chance == pytest.approx([logistic(y) for y in found.most_first], abs=1e-12)


def test_the_area_between_the_curves_of_a_sum_is_known() -> None:
    # A unit of rank r (0 first) is gone on 1 - (r + ½)/U of the axis under MoRF, and on (r + ½)/U under LeRF.
    found = measure_curves(additive(PARTS), PARTS, steps=10)
    down = sorted(PARTS.tolist(), reverse=True)
    expected = sum(part * (1 - 2 * (rank + 0.5) / 10) for rank, part in enumerate(down))
    assert found.delta_area == pytest.approx(expected, abs=1e-12)


def test_comprehensiveness_and_sufficiency_by_hand() -> None:
    parts = torch.tensor([2.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    found = measure_curves(additive(parts, 0.0), parts, shares=(0.01, 0.5, 0.6))  # 1, 2 and 3 of 4 units
    assert found.comprehensive == pytest.approx([logistic(2) - logistic(0), logistic(2) - logistic(-1), logistic(2) - logistic(-1)])
    assert found.sufficient == pytest.approx([logistic(2) - logistic(2), logistic(2) - logistic(3), logistic(2) - logistic(3)])
    assert found.comprehensiveness == pytest.approx(logistic(2) - (logistic(0) + 2 * logistic(-1)) / 3)
    assert found.sufficiency == pytest.approx(2 * (logistic(2) - logistic(3)) / 3)


def test_deletion_and_insertion_are_areas_of_the_probability() -> None:
    found = measure_curves(additive(PARTS), PARTS, steps=10)
    order = PARTS.argsort(descending=True)
    gone, back = [], []
    for k in range(11):
        keep = torch.ones(1, 10, dtype=torch.bool)
        keep[0, order[:k]] = False
        gone.append(float(additive(PARTS)(keep)[1]))
        back.append(float(additive(PARTS)(~keep)[1]))
    trapezoid = [sum(row) / 10 - (row[0] + row[-1]) / 20 for row in (gone, back)]
    assert found.deletion == pytest.approx(trapezoid[0], abs=1e-12)
    assert found.insertion == pytest.approx(trapezoid[1], abs=1e-12)


def test_the_true_parts_are_perfectly_sensitive() -> None:
    read = additive(PARTS)
    subsets = draw_subsets(read, 10, 12, seed=3)
    assert measure_curves(read, PARTS, subsets=subsets).sensitivities == pytest.approx([1.0] * 5)
    assert measure_curves(read, -PARTS, subsets=subsets).sensitivity == pytest.approx(-1.0)
    other = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = measure_curves(read, other, subsets=subsets).sensitivities
    for sizes, drops, value in zip(subsets.removed, subsets.drops, found, strict=True):
        sums = [sum(other[place].item() for place in range(10) if row[place]) for row in sizes]
        a, b = [x - sum(sums) / 12 for x in sums], [x - float(drops.mean()) for x in drops.tolist()]
        expected = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        assert value == pytest.approx(expected, abs=1e-12)


def test_subsets_have_the_size_they_are_meant_to_have_and_drops_are_those_of_the_target() -> None:
    read = additive(PARTS)
    subsets = draw_subsets(read, 10, 6, seed=1)
    assert subsets.removed.sum(-1).tolist() == [[size] * 6 for size in (1, 3, 5, 7, 9)]
    torch.testing.assert_close(subsets.drops, subsets.removed.double() @ PARTS, atol=1e-12, rtol=0)
    assert torch.equal(subsets.removed, draw_subsets(read, 10, 6, seed=1).removed)
    assert not torch.equal(subsets.removed, draw_subsets(read, 10, 6, seed=2).removed)


# -- invariances ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda r: 7 * r, lambda r: r.exp(), lambda r: r + 100])
def test_only_the_order_of_relevance_counts(change: Callable[[Tensor], Tensor]) -> None:
    assert measure_curves(additive(PARTS), change(PARTS)) == measure_curves(additive(PARTS), PARTS)


def test_the_opposite_relevance_swaps_the_curves() -> None:
    found, opposite = (measure_curves(additive(PARTS), sign * PARTS) for sign in (1, -1))
    assert opposite.most_first == found.least_first
    assert opposite.delta_area == pytest.approx(-found.delta_area, abs=1e-12)


def test_the_order_of_the_units_does_not_count() -> None:
    shuffle = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    found, shuffled = measure_curves(additive(PARTS), PARTS), measure_curves(additive(PARTS[shuffle]), PARTS[shuffle])
    assert shuffled.most_first == pytest.approx(found.most_first, abs=1e-12)
    assert shuffled.sufficient == pytest.approx(found.sufficient, abs=1e-12)


def test_an_area_does_not_depend_on_the_number_of_units() -> None:
    # A target that falls evenly has a mean height of half, whatever it is cut into.
    for units, steps in ((4, 4), (7, 3), (50, 20), (50, 50), (3, 20)):
        parts = torch.full((units,), 1 / units, dtype=torch.float64)
        found = measure_curves(additive(parts, 0.0), torch.arange(units).double(), steps=steps)
        assert found.area_most_first == pytest.approx(0.5, abs=1e-12)
        assert found.delta_area == pytest.approx(0, abs=1e-12)


def test_no_order_has_a_larger_area_than_the_true_one_on_a_sum() -> None:
    parts = torch.tensor([2.0, -1.0, 0.5, 1.0, -0.25], dtype=torch.float64)
    best = measure_curves(additive(parts), parts).delta_area
    orders = torch.tensor(list(itertools.permutations(range(5)))).double()
    found = [measure_curves(additive(parts), relevance).delta_area for relevance in orders]
    assert max(found) == pytest.approx(best, abs=1e-12)
    assert sum(found) / len(found) == pytest.approx(0, abs=1e-12)


def test_equal_relevances_favour_no_place() -> None:
    assert sorted(ranking(torch.zeros(6), 0).tolist()) == list(range(6))
    firsts = [int(ranking(torch.zeros(4), seed)[0]) for seed in range(400)]
    assert min(firsts.count(place) for place in range(4)) > 60
    assert ranking(torch.tensor([1.0, 1.0, 5.0, 1.0]), 3)[0] == 2


def test_one_unit_has_two_points_and_no_sensitivity() -> None:
    read = additive(torch.tensor([2.0], dtype=torch.float64), 1.0)
    found = measure_curves(read, torch.tensor([0.3]), subsets=draw_subsets(read, 1, 4))
    assert (found.removed, found.most_first, found.least_first) == ((0, 1), (3.0, 1.0), (3.0, 1.0))
    assert (found.delta_area, found.sensitivity) == (0.0, None)
    assert found.comprehensive == pytest.approx([logistic(3) - logistic(1)] * 5)


def test_no_set_is_run_twice() -> None:
    ran: list[Tensor] = []

    def read(keep: Tensor) -> tuple[Tensor, Tensor]:
        ran.append(keep)
        return additive(PARTS)(keep)

    measure_curves(read, PARTS)
    (keep,) = ran
    assert len(keep) == len({tuple(row) for row in keep.tolist()}) == 20  # 2 · 11 points less the shared ends, and no others


def test_curves_survive_being_written() -> None:
    read = additive(PARTS)
    found = measure_curves(read, PARTS, subsets=draw_subsets(read, 10, 3))
    assert Curves.from_dict(found.to_dict()) == found


# -- pieces --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "steps"), [(1, 1), (5, 20), (20, 20), (21, 20), (512, 10), (7, 3)])
def test_points_rise_from_none_to_all_as_evenly_as_whole_numbers_can(units: int, steps: int) -> None:
    found = points(units, steps)
    count = min(units, steps)
    assert (found[0], found[-1], len(found)) == (0, units, count + 1)
    assert all(abs(point - place * units / count) <= 0.5 for place, point in enumerate(found))


def test_without_takes_the_first_of_an_order() -> None:
    assert without(torch.tensor([2, 0, 1]), [0, 1, 3]).tolist() == [[True] * 3, [True, True, False], [False] * 3]


def test_an_area_is_the_mean_height() -> None:
    assert area([0, 1, 4], [2.0, 4.0, 0.0]) == pytest.approx((3 * 1 + 2 * 3) / 4)


def test_rank_correlation_shares_ranks_among_equals() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([10.0, 0.0, 30.0, 40.0])
    ranks_a, ranks_b = torch.tensor([1.0, 2.5, 2.5, 4.0]), torch.tensor([2.0, 1.0, 3.0, 4.0])
    expected = float(torch.corrcoef(torch.stack([ranks_a, ranks_b]))[0, 1])
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-6)
    assert rank_correlation(a, torch.ones(4)) is None


def test_correlation_is_none_where_nothing_varies_and_knows_small_numbers() -> None:
    a = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert correlation(a, torch.full((3,), 0.1, dtype=torch.float64)) is None
    assert correlation(1e-30 * a, -1e30 * a) == pytest.approx(-1.0)
    assert correlation(1e12 + a, a) == pytest.approx(1.0, abs=1e-3)


# -- bad input -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_relevance_without_a_rank_is_refused(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="1 of 3 relevances are NaN or infinite"):
        measure_curves(additive(PARTS[:3]), torch.tensor([1.0, bad, 0.0]))


def test_what_makes_no_curve_is_refused() -> None:
    read = additive(PARTS)
    with pytest.raises(ShapeError, match=r"relevance is \[2, 5\]; give one number a unit"):
        measure_curves(read, torch.zeros(2, 5))
    with pytest.raises(ShapeError, match="give one number a unit"):
        measure_curves(read, torch.zeros(0))
    with pytest.raises(InputError, match="at least one step, and shares above 0"):
        measure_curves(read, PARTS, steps=0)
    with pytest.raises(InputError, match="shares"):
        measure_curves(read, PARTS, shares=(0.1, 1.5))
    with pytest.raises(InputError, match="1 sets of a size: give 2 or more"):
        draw_subsets(read, 10, 1)
    with pytest.raises(ShapeError, match="subsets of 10 units, relevance of 3"):
        measure_curves(additive(PARTS[:3]), PARTS[:3], subsets=draw_subsets(read, 10, 2))
