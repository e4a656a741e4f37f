"""Rows and columns normalised in turn, by hand in numpy, say what both forms of Sinkhorn attention have to give."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from headscope.kernels.errors import InputError, ShapeError
from headscope.kernels.sinkhorn import convergence, sinkhorn, sinkhorn_attention

torch.set_num_threads(1)


def by_hand(scores: Tensor, half_steps: int, hidden: Tensor | None = None) -> NDArray[numpy.float64]:
    """One matrix [Q, K], divided by its row sums and by its column sums in turn; no logarithm in sight."""
    s = scores.double().numpy()
    p = numpy.exp(s - s.max())
    if hidden is not None:
        p[hidden.expand(scores.shape).numpy()] = 0.0
    rows, columns = (p.sum(1) > 0).sum(), (p.sum(0) > 0).sum()
    for step in range(half_steps):
        total = p.sum(1 - step % 2, keepdims=True)
        total[total == 0] = 1.0
        p = p / total * (rows / columns if step % 2 else 1.0)
    return p


def drawn(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


@pytest.mark.parametrize("half_steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (5, 9), (9, 5), (1, 4), (4, 1), (1, 1)])
def test_the_pattern_is_that_of_dividing_by_sums_in_turn(half_steps: int, queries: int, keys: int) -> None:
    scores = drawn(2, queries, keys, size=2.0)
    for found, each in zip(sinkhorn(scores, half_steps), scores, strict=True):
        numpy.testing.assert_allclose(found.numpy(), by_hand(each, half_steps), rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 12), keys=st.integers(1, 12), half_steps=st.integers(1, 9), seed=st.integers(0, 999),
    size=st.sampled_from([0.0, 0.5, 3.0, 10.0]), share=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_any_mask_and_size_gives_what_dividing_by_sums_gives(
    queries: int, keys: int, half_steps: int, seed: int, size: float, share: float
) -> None:
    scores, hidden = drawn(queries, keys, seed=seed, size=size), drawn(queries, keys, seed=seed + 1).sigmoid() < share
    found = sinkhorn(scores, half_steps, ~hidden, allow_causal=True) if not lower(hidden) else sinkhorn(scores, half_steps := 1, ~hidden)
    numpy.testing.assert_allclose(found.numpy(), by_hand(scores, half_steps, hidden), rtol=1e-9, atol=1e-14)
    assert not found[hidden].any()


def lower(hidden: Tensor) -> bool:
    return hidden.shape[0] == hidden.shape[1] and not bool((~hidden).triu(1).any())


def test_one_half_step_is_softmax_and_an_odd_number_ends_on_rows() -> None:
    scores = drawn(3, 8, 8, size=3.0)
    torch.testing.assert_close(sinkhorn(scores, 1), scores.softmax(-1), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(sinkhorn(scores, 5).sum(-1), torch.ones(3, 8, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(sinkhorn(scores, 4).sum(-2), torch.ones(3, 8, dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_limit_is_doubly_stochastic_and_blind_to_what_is_added_to_rows_and_columns() -> None:
    scores = drawn(4, 16, 16)
    limit = sinkhorn(scores, 201)
    ones = torch.ones(4, 16, dtype=torch.float64)
    torch.testing.assert_close(limit.sum(-1), ones, rtol=1e-13, atol=0)
    torch.testing.assert_close(limit.sum(-2), ones, rtol=1e-13, atol=0)
    moved = scores + drawn(4, 16, 1, seed=1) + drawn(4, 1, 16, seed=2)
    torch.testing.assert_close(sinkhorn(moved, 201), limit, rtol=1e-11, atol=1e-14)
    assert (moved.softmax(-1) - scores.softmax(-1)).abs().max() > 0.05  # the first half-step alone sees the columns' shift


def test_the_pattern_of_softmax_has_the_same_sinkhorn_as_its_scores() -> None:
    scores = drawn(2, 7, 7, size=2.0)
    torch.testing.assert_close(sinkhorn(scores.softmax(-1).log(), 3), sinkhorn(scores, 3), rtol=1e-13, atol=1e-15)


def test_exact_small_matrices() -> None:
    uniform = sinkhorn(torch.zeros(4, 4, dtype=torch.float64), 3)
    assert torch.equal(uniform, torch.full((4, 4), 0.25, dtype=torch.float64))
    # exp(s) = [[1, 2], [3, 4]]; its doubly stochastic form has p / (1 - p) = sqrt(1 * 4 / (2 * 3)) on the diagonal.
    odds = (4 / 6) ** 0.5
    expected = torch.tensor([[odds, 1.0], [1.0, odds]], dtype=torch.float64) / (1 + odds)
    found = sinkhorn(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).log(), 61)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    sink = torch.zeros(5, 5, dtype=torch.float64)
    sink[:, 0] = 30.0  # all queries at one key: after the columns' turn nothing of the sink is left
    torch.testing.assert_close(sinkhorn(sink, 3), torch.full((5, 5), 0.2, dtype=torch.float64), rtol=1e-9, atol=0)


def test_the_report_gives_the_deviation_after_each_half_step() -> None:
    scores = drawn(2, 3, 10, 10, size=1.5)
    report = convergence(scores, 6)
    assert report.half_steps == 6
    for step in range(6):
        p = numpy.stack([by_hand(each, step + 1) for each in scores.flatten(0, 1)]).reshape(2, 3, 10, 10)
        numpy.testing.assert_allclose(report.row_deviation[step].numpy(), abs(p.sum(-1) - 1).mean(-1), rtol=1e-9, atol=1e-14)
        numpy.testing.assert_allclose(report.column_deviation[step].numpy(), abs(p.sum(-2) - 1).mean(-1), rtol=1e-9, atol=1e-14)
    assert torch.equal(report.reached, report.row_deviation[5])
    within = report.enough(float(report.row_deviation[3].max()))
    assert within == 4
    assert report.enough(0.0) is None
    assert report.to_dict()["half_steps"] == 6
    assert report.to_dict()["column_deviation"] == pytest.approx(report.column_deviation.mean((1, 2)).tolist())


@pytest.mark.parametrize(("size", "rounds", "below", "above"), [(1.0, 5, 1e-6, 1e-8), (4.0, 20, 2e-3, 2e-5), (8.0, 200, 5e-3, 1e-7)])
def test_flat_scores_converge_in_a_few_rounds_and_sharp_ones_slowly(size: float, rounds: int, below: float, above: float) -> None:
    reached = float(convergence(drawn(8, 64, 64, size=size), 2 * rounds + 1).column_deviation[-1].median())
    assert above < reached < below


CASES = {
    "plain": {},
    "scaled": {"scale": 0.9},
    "keys hidden": {"mask": torch.arange(21)[None, None, None] < 17},
    "padding": {"mask": (torch.arange(14)[:, None] < 11) & (torch.arange(21) < 17)},
    "pairs hidden": {"mask": drawn(2, 4, 14, 21, seed=9) < 1.0},
}


@pytest.mark.parametrize("half_steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_streamed_output_and_report_are_those_of_the_whole_pattern(case: str, half_steps: int) -> None:
    q, k, v = drawn(2, 4, 14, 6), drawn(2, 2, 21, 6, seed=1), drawn(2, 2, 21, 3, seed=2)
    output, report = sinkhorn_attention(q, k, v, half_steps=half_steps, **CASES[case])  # type: ignore[arg-type]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k[:, [0, 0, 1, 1]]) * (0.9 if case == "scaled" else 6**-0.5)
    hidden = ~CASES[case].get("mask", torch.tensor(True)).expand(scores.shape)  # type: ignore[attr-defined]
    for b in range(2):
        for h in range(4):
            expected = by_hand(scores[b, h], half_steps, hidden[b, h]) @ v[b, h // 2].numpy()
            numpy.testing.assert_allclose(output[b, h].numpy(), expected, rtol=1e-11, atol=1e-13)
    whole = convergence(scores, half_steps, ~hidden)
    torch.testing.assert_close(report.row_deviation, whole.row_deviation, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(report.column_deviation, whole.column_deviation, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision_stays_within_its_rounding(dtype: torch.dtype, near: float) -> None:
    q, k, v = (drawn(1, 2, 80, 16, seed=seed).to(dtype) for seed in range(3))
    found, _ = sinkhorn_attention(q, k, v, half_steps=3)
    right, _ = sinkhorn_attention(q.double(), k.double(), v.double(), half_steps=3)
    assert found.dtype == dtype
    assert float((found.double() - right).abs().max()) < near
    assert sinkhorn((q @ k.mT) / 4, 3).dtype == dtype


def test_both_forms_have_the_right_gradient() -> None:
    scores = drawn(2, 4, 5).requires_grad_()
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[0, 1], mask[1, :, 2], mask[0, 2, 3] = False, False, False  # a dead row, a dead column, a pair
    for half_steps in (1, 2, 3, 4):
        assert torch.autograd.gradcheck(lambda s, n=half_steps: sinkhorn(s, n, mask), [scores])
    q, k, v = (drawn(1, 1, n, 2, seed=seed).requires_grad_() for seed, n in enumerate((3, 4, 4)))
    for half_steps in (1, 2, 3):

        def output(q: Tensor, k: Tensor, v: Tensor, n: int = half_steps) -> Tensor:
            found: Tensor = sinkhorn_attention(q, k, v, half_steps=n)[0]
            return found

        assert torch.autograd.gradcheck(output, [q, k, v])


def test_a_gradient_through_dead_rows_is_finite() -> None:
    q, k, v = (drawn(1, 1, 4, 3, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1], mask[:, 2] = False, False
    output, _ = sinkhorn_attention(q, k, v, half_steps=4, mask=mask)
    output.square().sum().backward()
    assert not output[0, 0, 1].any()
    for x in (q, k, v):
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())


def test_padding_changes_nothing_if_its_queries_are_hidden_too() -> None:
    scores = drawn(6, 6)
    wide = torch.nn.functional.pad(scores, (0, 3, 0, 3), value=4.0)
    living = torch.arange(9) < 6
    found = sinkhorn(wide, 5, living[:, None] & living)
    torch.testing.assert_close(found[:6, :6], sinkhorn(scores, 5), rtol=1e-14, atol=1e-15)
    assert not found[6:].any()
    assert not found[:, 6:].any()


def test_no_row_or_column_at_all_is_an_empty_pattern() -> None:
    assert sinkhorn(torch.zeros(2, 0, 3), 3).shape == (2, 0, 3)
    assert sinkhorn(torch.zeros(2, 3, 0), 3).shape == (2, 3, 0)
    hidden = convergence(torch.zeros(3, 3), 3, torch.zeros(3, 3, dtype=torch.bool))
    assert bool(hidden.column_deviation.isnan().any())


def test_causal_scores_are_refused_with_the_reason() -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    q = drawn(1, 1, 6, 4)
    with pytest.raises(InputError, match="the only lower-triangular matrix that is doubly stochastic is the identity"):
        sinkhorn(drawn(6, 6), 3, causal)
    with pytest.raises(InputError, match=r"use half_steps=1, which is softmax, or allow_causal=True"):
        sinkhorn(drawn(6, 6).masked_fill(~causal, -torch.inf), 2)
    with pytest.raises(InputError, match="half_steps=3 on causal scores"):
        sinkhorn_attention(q, q, q, causal=True)
    torch.testing.assert_close(sinkhorn(drawn(6, 6), 1, causal), drawn(6, 6).masked_fill(~causal, -torch.inf).softmax(-1))
    assert sinkhorn(drawn(6, 6), 3, torch.eye(6, dtype=torch.bool)).equal(torch.eye(6, dtype=torch.float64))  # the fixed point itself


def test_causal_attention_that_is_allowed_tends_to_the_identity() -> None:
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    with pytest.warns(UserWarning, match="tells a query of later ones"):
        near, far = (sinkhorn(drawn(8, 8), steps, causal, allow_causal=True) for steps in (201, 2001))
    gaps = [float((p - torch.eye(8, dtype=torch.float64)).abs().max()) for p in (near, far)]
    assert gaps[1] < gaps[0] / 8  # as 1 / rounds
    assert gaps[1] < 0.01
    q, k, v = (drawn(1, 1, 8, 4, seed=seed) for seed in range(3))
    scores = (q @ k.mT / 2)[0, 0]
    for mask in (None, torch.arange(8) != 3):
        with pytest.warns(UserWarning, match="half_steps=4"):
            output, _ = sinkhorn_attention(q, k, v, half_steps=4, causal=True, mask=mask, allow_causal=True)
        hidden = ~causal if mask is None else ~(causal & mask)
        numpy.testing.assert_allclose(output[0, 0].numpy(), by_hand(scores, 4, hidden) @ v[0, 0].numpy(), rtol=1e-11, atol=1e-14)
    with pytest.warns(UserWarning, match="half_steps=3"):
        output, _ = sinkhorn_attention(q[:, :, 3:], k, v, half_steps=3, causal=True, allow_causal=True)  # as after a cache
    numpy.testing.assert_allclose(output[0, 0].numpy(), by_hand(scores[3:], 3, ~causal[3:]) @ v[0, 0].numpy(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("half_steps", [0, -1, 2.0, True])
def test_a_number_of_half_steps_that_makes_no_sense_is_refused(half_steps: int) -> None:
    with pytest.raises(InputError, match="give 1 or more; 1 is softmax"):
        sinkhorn(drawn(3, 3), half_steps)


def test_scores_and_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"scores are \[3\] of torch.float64; give floating-point \[..., Q, K\]"):
        sinkhorn(drawn(3))
    with pytest.raises(ShapeError, match="torch.int64"):
        sinkhorn(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="give a bool mask"):
        sinkhorn(drawn(3, 3), 3, torch.ones(3, 3))
    with pytest.raises(ShapeError, match=r"mask is \[2, 3\] on cpu; it must broadcast to the scores, \[3, 3\]"):
        sinkhorn(drawn(3, 3), 3, torch.ones(2, 3, dtype=torch.bool))


def test_nan_shows_and_never_turns_into_a_number() -> None:
    scores = drawn(4, 4)
    scores[1, 2] = torch.nan
    assert bool(sinkhorn(scores, 3).isnan().all())
    assert bool(convergence(scores, 3).reached.isnan())


def test_the_streamed_form_holds_no_map() -> None:
    q, k, v = (drawn(1, 1, 6000, 4, seed=seed).float() for seed in range(3))
    seen: list[int] = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            return out

    with Largest():
        sinkhorn_attention(q, k, v, half_steps=2)
    assert max(seen) < 6000 * 6000 // 20
