"""The largest singular value of a pattern lies between its bounds, whatever the pattern, and the bounds close on it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.kernels.errors import InputError, ShapeError
from headscope.kernels.lse_attention import ours
from headscope.kernels.problem import Problem, make_problem
from headscope.kernels.spectrum import bracket, free_spectrum, spectrum

torch.set_num_threads(1)


def problem_of(scores: Tensor, causal: bool = False) -> Problem:
    """One head with these scores: its keys are the unit vectors."""
    return make_problem(scores[None, None], torch.eye(scores.shape[1], dtype=scores.dtype)[None, None], None, scale=1.0, causal=causal)


def truth(scores: Tensor, causal: bool = False) -> tuple[float, float]:
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    p = scores.double().softmax(-1)
    return float(torch.linalg.matrix_norm(p, 2)), float(torch.linalg.matrix_norm(p - p.mean(0), 2))


def exact(n: int) -> dict[str, tuple[Tensor, bool, float, float]]:
    """Patterns whose σ₁(P) and ‖ΠP‖₂ are known."""
    zero = torch.zeros(n, n, dtype=torch.float64)
    identity, sink, shift = zero.clone(), zero.clone(), zero.clone()
    identity.fill_diagonal_(800.0)
    sink[:, 0] = 800.0
    shift[torch.arange(n), (torch.arange(n) - 1) % n] = 800.0
    return {
        "uniform": (zero, False, 1.0, 0.0),
        "identity": (identity, False, 1.0, 1.0),
        "sink": (sink, False, math.sqrt(n), 0.0),
        "cyclic shift": (shift, False, 1.0, 1.0),
    }


@pytest.mark.parametrize("name", exact(6))
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_exact_patterns_lie_within_the_bounds(name: str, steps: int) -> None:
    scores, causal, sigma, contrast = exact(6)[name]
    found = spectrum(problem_of(scores, causal), steps)
    assert float(found.sigma_low) - 1e-12 <= sigma <= float(found.sigma_high) + 1e-12
    assert float(found.contrast_low) - 1e-7 <= contrast <= float(found.contrast_high) + 1e-7
    if steps:
        assert float(found.sigma_high) == pytest.approx(sigma, abs=1e-7)
        assert float(found.sigma_low) == pytest.approx(sigma, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), queries=st.integers(1, 20), keys=st.integers(1, 20), sharp=st.sampled_from((0.1, 1.0, 4.0, 30.0)),
    causal=st.booleans(), steps=st.integers(0, 6),
)  # fmt: skip
def test_random_patterns_lie_within_the_bounds(seed: int, queries: int, keys: int, sharp: float, causal: bool, steps: int) -> None:
    keys = queries if causal else keys
    scores = torch.randn(queries, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharp
    sigma, contrast = truth(scores, causal)
    found = spectrum(problem_of(scores, causal), steps)
    assert float(found.sigma_low) <= sigma + 1e-9
    assert sigma <= float(found.sigma_high) + 1e-9
    assert float(found.contrast_low) <= contrast + 1e-7
    assert contrast <= float(found.contrast_high) + 1e-7


def test_more_steps_never_widen_the_bounds_and_as_many_as_keys_close_them() -> None:
    scores = torch.randn(14, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, contrast = truth(scores)
    found = [spectrum(problem_of(scores), steps) for steps in (0, 1, 2, 4, 8, 14)]
    for narrower, wider in zip(found[1:], found, strict=False):
        assert float(narrower.sigma_low) >= float(wider.sigma_low) - 1e-12
        assert float(narrower.contrast_low) >= float(wider.contrast_low) - 1e-12
        assert float(narrower.sigma_high) <= float(wider.sigma_high) + 1e-12
    for low, high, true in (
        (found[-1].sigma_low, found[-1].sigma_high, sigma), (found[-1].contrast_low, found[-1].contrast_high, contrast)
    ):  # fmt: skip
        assert float(low) == pytest.approx(true, abs=1e-10)
        assert float(high) == pytest.approx(true, abs=1e-7)


def test_float32_kernels_and_handed_in_numbers_give_the_same_bounds() -> None:
    made = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 3, 33, 8, generator=made, dtype=torch.float64) for _ in range(2))
    exact_one = spectrum(make_problem(q, k, None, causal=True), 4)
    single = spectrum(make_problem(q.float(), k.float(), None, causal=True), 4, kernel=ours())
    for name in ("sigma_low", "sigma_high", "contrast_low", "contrast_high"):
        torch.testing.assert_close(getattr(single, name), getattr(exact_one, name), rtol=1e-4, atol=1e-5)


def test_a_head_of_nan_does_not_spoil_the_others() -> None:
    p = torch.rand(1, 2, 5, 5, dtype=torch.float64).softmax(-1)
    p[0, 1, 2] = math.nan
    found = bracket(lambda x: p @ x, lambda u: p.mT @ u, p.sum(-2), p.square().sum((-2, -1)), 5, 3)
    assert float(found.sigma_high[0, 0]) >= 1.0
    assert bool(found.sigma_high[0, 1].isnan())


def test_the_free_bounds_need_only_sums() -> None:
    p = torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64).mul(5).softmax(-1)
    found = free_spectrum(p.sum(-2), p.square().sum((-2, -1)), 7, 7)
    assert float(found.sigma_low) <= float(torch.linalg.matrix_norm(p[0, 0], 2)) <= float(found.sigma_high)


def test_what_has_no_bounds_is_refused_in_words() -> None:
    problem = problem_of(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(InputError, match="-1 steps"):
        spectrum(problem, -1)
    with pytest.raises(ShapeError, match="no singular values"):
        spectrum(make_problem(torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 3, 2), None), 1)
    hidden = make_problem(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 2), None, mask=torch.tensor([True, False])[:, None])
    with pytest.raises(InputError, match="sees no key"):
        spectrum(hidden, 1)
