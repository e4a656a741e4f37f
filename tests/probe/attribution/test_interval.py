"""An interval covers the true mean as often as it says, and is the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from headscope.kernels.errors import InputError, NonFiniteError
from headscope.probe.attribution.interval import Interval, bootstrap


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_an_interval_covers_the_mean_about_as_often_as_its_level(level: float) -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        found = bootstrap((3 + generator.normal(size=40)).tolist(), level=level, resamples=400, seed=trial)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 3 <= found.high
    assert abs(hits / 300 - level) < 0.06


def test_an_interval_is_about_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap(values.tolist(), resamples=4000)
    assert found.high is not None
    assert found.low is not None
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=30).tolist()
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_one_sample_says_nothing_about_others() -> None:
    assert bootstrap([2.5]) == Interval(2.5, None, None, 1)
    assert str(bootstrap([2.5])) == "2.500"
    assert str(Interval(1, 0.5, 1.25, 9)) == "1.000 [0.500, 1.250]"


def test_equal_samples_have_an_interval_of_no_width() -> None:
    assert bootstrap([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 3)


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(InputError, match="no samples to take a mean of"):
        bootstrap([])
    with pytest.raises(InputError, match="level 1.0 of 2000 resamples: give a level between 0 and 1"):
        bootstrap([1.0, 2.0], level=1.0)
    with pytest.raises(InputError, match="at least one resample"):
        bootstrap([1.0, 2.0], resamples=0)
    with pytest.raises(NonFiniteError, match="1 of 2 values are NaN or infinite"):
        bootstrap([1.0, float("nan")])
