"""Projections and rotations in a subspace, and the gates that say how much of them a token gets; against dense float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.interventions import Edit, Plan, gates, project, rotate, select
from headscope.interventions.edit import change
from headscope.interventions.region import Region
from headscope.interventions.subspace import turn
from headscope.kernels.errors import EditError, NonFiniteError, ShapeError
from tests.interventions.dense import make_call

BATCH, HEADS, TOKENS, WIDTH, RANK = 2, 3, 5, 12, 4


def basis(*lead: int, rank: int = RANK, seed: int = 0) -> Tensor:
    drawn = torch.randn(*lead, WIDTH, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn).Q


def skew(*lead: int, rank: int = RANK, seed: int = 1, size: float = 1.0) -> Tensor:
    drawn = size * torch.randn(*lead, rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn - drawn.mT


def tokens(seed: int = 2) -> Tensor:
    return torch.randn(BATCH, HEADS, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(x: Tensor, u: Tensor, a: Tensor, gate: Tensor) -> Tensor:
    """U exp(g A) Uᵀ x + (1 - U Uᵀ) x, one token at a time."""
    found = torch.empty_like(x)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            own = u if u.ndim == 2 else u[h]
            generator = a if a.ndim == 2 else a[h]
            for s in range(x.shape[2]):
                whole = own @ torch.linalg.matrix_exp(gate[b, h, s, 0] * generator) @ own.T + torch.eye(WIDTH) - own @ own.T
                found[b, h, s] = whole @ x[b, h, s]
    return found


@given(seed=st.integers(0, 10_000), each=st.booleans(), size=st.floats(0.01, 20))
@settings(max_examples=25, deadline=None)
def test_a_rotation_is_the_exponential_of_its_gate_times_its_matrix(seed: int, each: bool, size: float) -> None:
    lead = (HEADS,) if each else ()
    u, a, x = basis(*lead, seed=seed), skew(*lead, seed=seed + 1, size=size), tokens(seed)
    gate = torch.rand(BATCH, HEADS, TOKENS, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    wanted = by_definition(x, u, a, gate)
    torch.testing.assert_close(turn(x, u, a, gate), wanted, atol=1e-9, rtol=1e-9)  # by eigenvectors
    torch.testing.assert_close(turn(x, u, a.clone().requires_grad_(), gate).detach(), wanted, atol=1e-9, rtol=1e-9)  # by exponentials
    torch.testing.assert_close(turn(x, u, a, 0.5), by_definition(x, u, a, torch.full_like(gate, 0.5)), atol=1e-9, rtol=1e-9)


@given(seed=st.integers(0, 10_000), gate=st.floats(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_rotation_keeps_every_norm_and_what_lies_outside(seed: int, gate: float) -> None:
    u, a, x = basis(seed=seed), skew(seed=seed + 1, size=5), tokens(seed)
    moved = turn(x, u, a, torch.full((BATCH, HEADS, TOKENS, 1), gate, dtype=torch.float64))
    torch.testing.assert_close(moved.norm(dim=-1), x.norm(dim=-1), atol=1e-10, rtol=1e-10)
    outside = torch.eye(WIDTH, dtype=torch.float64) - u @ u.T
    torch.testing.assert_close(moved @ outside, x @ outside, atol=1e-10, rtol=1e-10)


def test_no_gate_no_matrix_no_change_to_the_bit() -> None:
    x = tokens().float()
    u, a = basis().float(), skew().float()
    assert torch.equal(turn(x, u, a, torch.zeros(BATCH, HEADS, TOKENS, 1)), x)
    assert torch.equal(turn(x, u, torch.zeros_like(a), torch.ones(BATCH, HEADS, TOKENS, 1)), x)
    still = Edit("q", rotate(u, torch.zeros_like(a)))
    assert still.identity
    assert change(still, "q", x, make_call(), None) is x


def test_turning_queries_and_keys_alike_changes_no_score_and_turning_one_does() -> None:
    q, k = tokens(1), tokens(2)
    u, a = basis(HEADS), skew(HEADS)
    scores = q @ k.mT
    torch.testing.assert_close(turn(q, u, a, 0.7) @ turn(k, u, a, 0.7).mT, scores, atol=1e-9, rtol=1e-9)
    assert (turn(q, u, a, 0.7) @ k.mT - scores).abs().max() > 0.1


def test_the_gradient_of_a_rotation_is_right() -> None:
    u, a, x = basis(), skew().requires_grad_(), tokens().requires_grad_()
    gate = torch.rand(BATCH, HEADS, TOKENS, 1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, x, gate: turn(x, u, (a - a.mT) / 2, gate), (a, x, gate))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_keeps_its_dtype_and_the_norm(dtype: torch.dtype) -> None:
    x = tokens().to(dtype)
    moved = turn(x, basis(), skew(), 1.0)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved.float().norm(dim=-1), x.float().norm(dim=-1), rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=0)


@pytest.mark.parametrize(("strength", "keep"), [(1.0, False), (0.5, False), (2.0, False), (1.0, True)])
def test_a_projection_takes_what_its_definition_says(strength: float, keep: bool) -> None:
    u, x = basis(HEADS), tokens()
    inside = torch.einsum("hdr,her,bhse->bhsd", u, u, x)
    wanted = x - strength * ((x - inside) if keep else inside)
    torch.testing.assert_close(
        change(Edit("z", project(u, strength, keep=keep)), "z", x, make_call(), None), wanted, atol=1e-12, rtol=1e-12
    )


def test_after_a_projection_nothing_is_left_in_the_direction() -> None:
    direction = 7 * torch.randn(WIDTH, dtype=torch.float64)
    found = change(Edit("resid", project(direction)), "resid", tokens()[:, :1], make_call(), None)
    assert (found @ direction).abs().max() < 1e-12


def test_tensors_of_some_heads_go_with_the_heads_that_are_selected() -> None:
    u, a, x = basis(2), skew(2), tokens()
    edit = Edit("q", rotate(u, a), select(heads=[0, 2]))
    region = Region(None, torch.tensor([True, False, True]), None, None)
    found = change(edit, "q", x, make_call(), region)
    torch.testing.assert_close(found[:, [0, 2]], by_definition(x[:, [0, 2]], u, a, torch.ones(BATCH, 2, TOKENS, 1, dtype=torch.float64)))
    assert torch.equal(found[:, 1], x[:, 1])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: rotate(torch.randn(4, 5), torch.zeros(5, 5)), EditError, "rank 5 in heads of width 4: give 1 to 4 columns"),
        (lambda: rotate(2 * basis(), skew()), EditError, "not orthonormal: orthonormalise it"),
        (lambda: rotate(basis(), torch.ones(RANK, RANK)), EditError, "not skew-symmetric.*give S - S"),
        (lambda: rotate(basis(), skew(rank=3)), ShapeError, r"a rotation of \[3, 3\] in a subspace of rank 4"),
        (lambda: rotate(basis() * math.nan, skew()), NonFiniteError, "NaN or infinity"),
        (lambda: project(torch.zeros(WIDTH)), EditError, "zero direction"),
        (lambda: project(basis(), math.inf), EditError, "finite number"),
        (lambda: gates.risk(basis(), math.nan), EditError, "finite number"),
        (lambda: gates.cosine("up"), EditError, "give a tensor"),
        (lambda: Edit("scores", rotate(basis(), skew())), EditError, "cannot be done at scores"),
        (lambda: Edit("pattern", project(basis())), EditError, "cannot be done at pattern"),
        (lambda: Edit("scores", rotate, gate=gates.risk(basis())), EditError, "give an operation"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_basis_for_other_heads_is_refused_when_it_comes_by() -> None:
    with pytest.raises(ShapeError, match="for 3 selected heads of width 12"):
        change(Edit("q", rotate(basis(2), skew(2))), "q", tokens(), make_call(), None)


# -- gates -------------------------------------------------------------------------------------------------------------


def scores_of(x: Tensor, u: Tensor) -> Tensor:
    """‖Uᵀx‖² / ‖x‖², one token at a time."""
    return torch.stack(
        [torch.stack([torch.stack([(u.T @ t).square().sum() / t.square().sum() for t in head]) for head in one]) for one in x]
    )[..., None]


def test_the_risk_score_is_the_share_of_a_token_in_the_subspace() -> None:
    x, u = tokens(), basis()
    torch.testing.assert_close(gates.risk_score(x, u), scores_of(x, u), atol=1e-12, rtol=1e-12)
    inside = (torch.randn(BATCH, HEADS, TOKENS, RANK, dtype=torch.float64)) @ u.T
    torch.testing.assert_close(gates.risk_score(inside, u), torch.ones(BATCH, HEADS, TOKENS, 1, dtype=torch.float64))
    assert torch.equal(gates.risk_score(torch.zeros_like(x), u), torch.zeros(BATCH, HEADS, TOKENS, 1, dtype=torch.float64))


def test_a_gate_below_its_threshold_leaves_a_token_to_the_bit() -> None:
    x, u = tokens(), basis()
    score = scores_of(x, u)
    threshold = float(score.median())
    edit = Edit("q", rotate(u, skew()), gate=gates.risk(u, threshold))
    found = change(edit, "q", x, make_call(), None)
    closed = (score <= threshold).expand_as(x)
    assert torch.equal(found[closed], x[closed])
    torch.testing.assert_close(found, by_definition(x, u, skew(), score * (score > threshold)), atol=1e-9, rtol=1e-9)


def test_thresholds_and_sharpness_are_counted_by_head() -> None:
    x, u = tokens(), basis(HEADS)
    score = torch.stack([scores_of(x[:, h : h + 1], u[h])[:, 0] for h in range(HEADS)], dim=1)
    threshold = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
    gate = gates.risk(u, threshold, sharpness=20.0, weighted=False)
    wanted = torch.sigmoid(20 * (score - threshold[None, :, None, None]))
    torch.testing.assert_close(gate.strength(x, make_call(), "q"), wanted, atol=1e-10, rtol=1e-10)


def test_the_cosine_and_linear_gates_are_their_formulas() -> None:
    x, anchor = tokens(), torch.randn(WIDTH, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(x, anchor.expand_as(x), dim=-1)[..., None]
    assert torch.equal(gates.cosine(anchor, 0.1).strength(x, make_call(), "z"), (cosine > 0.1).double())
    logit = (x @ anchor)[..., None] - 0.3
    torch.testing.assert_close(gates.linear(anchor, -0.3).strength(x, make_call(), "z"), torch.sigmoid(logit))
    assert torch.equal(gates.linear(anchor, -0.3, hard=True).strength(x, make_call(), "z"), (logit > 0).double())


def test_a_gate_of_ones_own_is_called_with_the_value_and_checked() -> None:
    x, u = tokens(), basis()
    whole = Edit("z", project(u), gate=gates.function(lambda value, call: torch.ones_like(value[..., :1])))
    torch.testing.assert_close(change(whole, "z", x, make_call(), None), change(Edit("z", project(u)), "z", x, make_call(), None))
    with pytest.raises(ShapeError, match=r"return \[batch, head, token, 1\]"):
        change(Edit("z", project(u), gate=gates.function(lambda value, call: value)), "z", x, make_call(), None)


def test_a_gated_plan_is_no_recipe_if_its_gate_is_code(tmp_path: Any) -> None:
    plan = Plan([Edit("z", project(basis()), gate=gates.function(lambda value, call: value[..., :1]))])
    with pytest.raises(Exception, match="a recipe holds no code"):
        plan.save(tmp_path / "recipe.yaml")
    assert not list(tmp_path.iterdir())
