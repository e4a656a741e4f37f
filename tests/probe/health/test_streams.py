"""Numbers of hidden states are those of the definitions, and the hooks catch what goes into and comes out of every block."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headscope.kernels.errors import ShapeError
from headscope.probe.health.blocks import State, watch_states, watched_states
from headscope.probe.health.streams import average_streams, measure_stream

torch.set_num_threads(1)


def dense(x: Tensor) -> dict[str, float]:
    """The definitions, by singular values of the whole matrix in float64."""
    a = x.double().numpy()
    n = len(a)
    r = a - a.mean(0)

    def composite(m: np.ndarray) -> float:
        return math.sqrt(np.linalg.norm(m, 1) * np.linalg.norm(m, np.inf))

    def cosine(m: np.ndarray) -> float:
        u = m / np.linalg.norm(m, axis=1, keepdims=True)
        return float(np.mean([u[i] @ u[j] for i in range(n) for j in range(n) if i != j]))

    found = {
        "residual": np.linalg.norm(r) / np.linalg.norm(a),
        "residual_composite": composite(r) / composite(a),
        "cosine": cosine(a),
        "cosine_centred": cosine(r),
        "rank_limit": min(n - 1, a.shape[1]),
    }
    for suffix, m in (("", a), ("_centred", r)):
        s = np.linalg.svd(m, compute_uv=False)
        s = s[s > 1e-7 * s[0]]
        p = s / s.sum()
        found["effective_rank" + suffix] = math.exp(-(p * np.log(p)).sum())
        found["stable_rank" + suffix] = (s**2).sum() / s[0] ** 2
        found["participation" + suffix] = (s**2).sum() ** 2 / (s**4).sum()
    return {name: float(value) for name, value in found.items()}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 12), width=st.integers(2, 15), offset=st.sampled_from((0.0, 1.0, 30.0)))
def test_states_have_the_numbers_of_their_definitions(seed: int, n: int, width: int, offset: float) -> None:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=made, dtype=torch.float64) + offset * torch.randn(width, generator=made, dtype=torch.float64)
    found = measure_stream(x[None])
    for name, value in dense(x).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("rogue", [1.0, 1e3])
@pytest.mark.parametrize("decay", [0.0, 2.0, 6.0])
def test_wide_states_have_the_ranks_of_their_definitions(offset: float, rogue: float, decay: float) -> None:
    """Wide enough that the ranks of the raw states are told by few steps, or, where the spectrum runs to 0, by all eigenvalues."""
    made, near = (
        torch.Generator().manual_seed(0),
        2e-6 if decay < 6 and rogue * offset < 1e5 else 2e-3,
    )  # Gram matrices do not tell σ below 1e-8 σ₁
    x = torch.randn(420, 210, generator=made, dtype=torch.float64) * torch.logspace(0, -decay, 210, dtype=torch.float64)
    x = x + offset * torch.randn(210, generator=made, dtype=torch.float64)
    x[:, 3] *= rogue
    found = measure_stream(x[None])
    for suffix, matrix in (("", x), ("_centred", x - x.mean(dim=0))):
        s = torch.linalg.svdvals(matrix)
        p = s / s.sum()
        assert getattr(found, "effective_rank" + suffix) == pytest.approx(float(torch.special.entr(p).sum().exp()), rel=near)
        assert getattr(found, "stable_rank" + suffix) == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-9)
        assert getattr(found, "participation" + suffix) == pytest.approx(float(s.square().sum() ** 2 / s.pow(4).sum()), rel=1e-9)


def test_the_identity_has_a_composite_residual_above_one() -> None:
    found = measure_stream(torch.eye(4)[None])
    assert found.residual_composite == pytest.approx(1.5)
    assert found.residual == pytest.approx(math.sqrt(3) / 2)
    assert found.effective_rank == pytest.approx(4)
    assert found.stable_rank_centred == pytest.approx(3)
    assert found.cosine == pytest.approx(0, abs=1e-12)
    assert found.cosine_centred == pytest.approx(-1 / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_collapsed_states_give_the_floor_of_their_dtype_and_name_no_rank(dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(1, 5, 8).to(dtype)
    found = measure_stream(x)
    assert found.floored
    assert found.residual == pytest.approx(10 * torch.finfo(dtype).eps)
    for name in ("effective_rank", "stable_rank", "participation_centred", "cosine_centred"):
        assert math.isnan(getattr(found, name)), name
        assert "resolves" in found.undefined[name]
    assert found.cosine == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        (torch.randn(1, 1, 4), "fewer than two tokens"),
        (torch.zeros(1, 5, 4), "the hidden states are all 0"),
        (torch.full((1, 5, 4), math.nan), "NaN or infinity in the hidden states"),
        (torch.full((1, 5, 4), math.inf), "NaN or infinity in the hidden states"),
    ],
)
def test_states_that_say_nothing_are_undefined_with_the_reason(states: Tensor, reason: str) -> None:
    found = measure_stream(states, before=states)
    for name in ("residual", "effective_rank", "cosine"):
        assert math.isnan(getattr(found, name)), name
        assert found.undefined[name] == reason
    assert not found.floored


def test_padding_and_batch_order_change_nothing() -> None:
    x = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    real = torch.arange(9)[None] < torch.tensor([[9], [4], [6]])
    junk = x.clone()
    junk[~real] = 1e6
    found = measure_stream(junk, real)
    turned = measure_stream(junk.flip(0), real.flip(0))
    each = [measure_stream(x[b : b + 1, :n]) for b, n in enumerate((9, 4, 6))]
    for name in ("residual", "cosine", "effective_rank_centred", "rank_limit"):
        assert getattr(found, name) == pytest.approx(getattr(turned, name)), name
        assert getattr(found, name) == pytest.approx(sum(getattr(one, name) * one.tokens for one in each) / 19), name
    assert found.tokens == 19


def test_one_sample_of_nan_is_not_averaged_away() -> None:
    x = torch.randn(2, 5, 4)
    x[1, 2, 0] = math.nan
    assert measure_stream(x).undefined["residual"] == "NaN or infinity in the hidden states"


def test_scale_changes_nothing_and_large_states_do_not_overflow() -> None:
    x = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain, large = measure_stream(x), measure_stream(x * 1e200)
    assert large.residual == pytest.approx(plain.residual)
    assert large.participation == pytest.approx(plain.participation)


def test_update_and_step_relate_a_block_to_the_state_before_it() -> None:
    before = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    found = measure_stream(torch.tensor([[[6.0, 8.0], [2.0, 0.0]]]), before=before, update=torch.tensor([[[0.0, 5.0], [1.0, 0.0]]]))
    assert found.update == pytest.approx((1 + 0.5) / 2)
    assert found.step_cosine == pytest.approx((1 + 0) / 2)
    with pytest.raises(ShapeError, match="before is"):
        measure_stream(torch.ones(1, 2, 3), before=torch.ones(1, 2, 4))


class Block(nn.Module):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.fails = fails

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x += self.attn(x, x, x, need_weights=False)[0]  # in place: what was caught must not change with it
        if self.fails:
            raise RuntimeError("on purpose")
        return x + self.mlp(x), x.new_ones(x.shape[0])


class Stack(nn.Module):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block(fails)])
        self.tail = nn.Sequential(nn.Sequential(nn.Linear(8, 8)))  # numbered too, but it does not attend

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return self.tail(x)


def test_every_block_that_attends_is_caught_with_what_went_in_and_what_attention_gave() -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    found: list[State] = []
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), watch_states(model, found.append):
        model(x.clone())
    places = [(f"blocks.{i}", place, i, 0) for i, place in ((0, "input"), (0, "output"), (1, "output"), (2, "output"))]
    assert [one.key for one in found] == places
    assert torch.equal(found[0].states, x)
    assert found[2].before is not None
    assert torch.equal(found[2].before, found[1].states)
    block = model.blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        given = block.attn(x, x, x, need_weights=False)[0]
        wanted = block.mlp(x + given) + x + given
    torch.testing.assert_close(found[1].states, wanted)
    assert found[1].update is not None
    torch.testing.assert_close(found[1].update, given)


def test_nothing_is_left_in_the_model_after_an_exception() -> None:
    model = Stack(fails=True).eval()
    with pytest.raises(RuntimeError, match="on purpose"), watched_states(model) as states:
        model(torch.randn(1, 4, 8))
    assert ("blocks.1", "output", 1, 0) in states
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_sequence_first_encoders_give_batch_first_states() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad(), watched_states(model) as states:
        model(torch.randn(7, 3, 8))
    assert {tuple(value.shape) for value in states.values()} == {(3, 7, 8)}
    assert len(states) == 3


class Map(nn.Module):
    """Attention over the places of a convolution's map, [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2).transpose(1, 2)
        return x + self.attn(flat, flat, flat, need_weights=False)[0].transpose(1, 2).view_as(x)


def test_maps_become_tokens_in_reading_order() -> None:
    model = nn.ModuleDict({"layers": nn.Sequential(Map(), Map())}).eval()
    model.forward = lambda x: model["layers"](x)  # type: ignore[method-assign]
    x = torch.randn(2, 6, 3, 4)
    with torch.no_grad(), watched_states(model) as states:
        model(x)
    assert torch.equal(states["layers.0", "input", 0, 0], x.flatten(2).transpose(1, 2))


def test_averages_of_calls_are_weighted_by_their_tokens() -> None:
    one, other = measure_stream(torch.randn(1, 4, 3)), measure_stream(torch.randn(1, 8, 3))
    both = average_streams([one, other])
    assert both.residual == pytest.approx((4 * one.residual + 8 * other.residual) / 12)
    assert both.tokens == 12
