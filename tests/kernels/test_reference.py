"""The dense reference against a twin written from the textbook: one query and one key at a time, in Python floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.kernels.errors import InputError, ShapeError
from headscope.kernels.reference import attend, pattern, scores

INF = float("inf")


def textbook(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale q·k)·v with each loop written out: z, pattern, scores."""
    B, H, Q, D = q.shape
    G, K = k.shape[1], k.shape[2]
    V = v.shape[3]
    every = (B, H, Q, K)
    added = [[0.0]] if bias is None else bias.double().expand(every)
    allowed = None if mask is None else mask.expand(every)
    S = torch.full(every, -INF, dtype=torch.float64)
    P = torch.zeros(every, dtype=torch.float64)
    Z = torch.zeros(B, H, Q, V, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h * G // H
            for i in range(Q):
                row = []
                for j in range(K):
                    s = scale * math.fsum(float(q[b, h, i, d]) * float(k[b, g, j, d]) for d in range(D))
                    if softcap is not None:
                        s = softcap * math.tanh(s / softcap)
                    if isinstance(added, Tensor):
                        s += float(added[b, h, i, j])
                    hidden = allowed is not None and not bool(allowed[b, h, i, j])
                    hidden = hidden or (is_causal and j > i)
                    if window is not None:
                        hidden = hidden or not i - window < j < i + window
                    row.append(-INF if hidden else s)
                top = max([*row, -INF if sink is None else float(sink[h])])
                if row and max(row) > -INF:
                    extra = 0.0 if sink is None else math.exp(float(sink[h]) - top)
                    total = math.fsum([math.exp(s - top) for s in row] + [extra])
                    for j, s in enumerate(row):
                        P[b, h, i, j] = math.exp(s - top) / total
                for j, s in enumerate(row):
                    S[b, h, i, j] = s
                    for e in range(V):
                        Z[b, h, i, e] += P[b, h, i, j] * v[b, g, j, e]
    return Z, P, S


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A small attention call with any mixture of terms."""
    size = st.integers(1, 4)
    B, G, repeat = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    Q, K, D, V = draw(size), draw(size), draw(size), draw(size)
    H = G * repeat
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def broadcast() -> tuple[int, ...]:
        shape = [draw(st.sampled_from([1, n])) for n in (B, H, Q, K)]
        while len(shape) > 1 and shape[0] == 1 and draw(st.booleans()):
            shape.pop(0)
        return tuple(shape)

    bias = normal(*broadcast()) * 3 if draw(st.booleans()) else None
    if bias is not None and draw(st.booleans()):
        bias = torch.where(normal(*bias.shape) > 0.5, -INF, bias)
    return {
        "q": normal(B, H, Q, D) * draw(st.sampled_from([1.0, 30.0])),
        "k": normal(B, G, K, D),
        "v": normal(B, G, K, V),
        "scale": draw(st.sampled_from([0.25, 1.0, -1.5])),
        "bias": bias,
        "mask": normal(*broadcast()) > -0.5 if draw(st.booleans()) else None,
        "is_causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 0.7, 20.0])),
        "window": draw(st.sampled_from([None, 1, 2, 3])),
        "sink": normal(H) * 4 if draw(st.booleans()) else None,
    }


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problems())
def test_every_mixture_of_terms_agrees_with_the_textbook(problem: dict[str, Any]) -> None:
    z, weights, seen = textbook(**problem)
    got_z, got_weights = attend(**problem)
    without = {name: value for name, value in problem.items() if name not in ("v", "sink")}
    torch.testing.assert_close(scores(**without), seen, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(got_weights, weights, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got_z, z, rtol=1e-11, atol=1e-11)


def test_query_heads_use_the_key_head_of_their_own_group() -> None:
    k = torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)  # the score tells which key head was used
    seen = scores(torch.ones(1, 6, 1, 1), k, scale=1.0)
    assert seen.flatten().tolist() == [1, 1, 1, 10, 10, 10]


@pytest.mark.parametrize(("queries", "keys"), [(3, 3), (2, 4), (4, 2)])
def test_causality_is_counted_from_the_top_left(queries: int, keys: int) -> None:
    seen = scores(torch.zeros(1, 1, queries, 1), torch.zeros(1, 1, keys, 1), scale=1.0, is_causal=True)
    assert (seen[0, 0] == 0).tolist() == [[j <= i for j in range(keys)] for i in range(queries)]


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_window_of_two_holds_the_query_and_its_neighbour(is_causal: bool) -> None:
    seen = scores(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1), scale=1.0, is_causal=is_causal, window=2)
    after = 0 if is_causal else 1
    assert (seen[0, 0] == 0).tolist() == [[i - 1 <= j <= i + after for j in range(4)] for i in range(4)]


def test_the_bias_is_added_after_the_cap_and_not_scaled() -> None:
    seen = scores(torch.full((1, 1, 1, 1), 100.0), torch.ones(1, 1, 1, 1), scale=2.0, bias=torch.tensor([[5.0]]), softcap=3.0)
    assert seen.item() == pytest.approx(3.0 + 5.0)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_output_equals_that_of_torch_on_the_cases_torch_can_do(is_causal: bool, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 7, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 5)
    mask = torch.rand(2, 1, 7, 9) > 0.4 if masked and not is_causal else None
    if mask is not None:
        mask[0, 0, 2] = False  # a dead row: torch gives 0 there as well
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=0.3, enable_gqa=True)
    got, _ = attend(q, k, v, scale=0.3, mask=mask, is_causal=is_causal)
    torch.testing.assert_close(got, want)


def test_only_infinity_kills_a_row() -> None:
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    bias = torch.tensor([[-INF], [torch.finfo(torch.float32).min]]).expand(2, 3)
    z, weights = attend(q, k, v, scale=1.0, bias=bias)
    assert weights[0, 0, 0].tolist() == [0, 0, 0]
    assert z[0, 0, 0].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(weights[0, 0, 1], torch.full((3,), 1 / 3))
    torch.testing.assert_close(z, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0))


@pytest.mark.parametrize("sink", [None, torch.tensor([-INF]), torch.tensor([2.0])])
def test_a_dead_row_is_zero_with_any_sink_and_its_gradients_are_zero(sink: Tensor | None) -> None:
    q, k, v = (torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3))
    bias = torch.zeros(2, 2)
    bias[0] = -INF
    bias.requires_grad_()
    z, weights = attend(q, k, v, scale=1.0, bias=bias, mask=torch.tensor([[True, True], [True, False]]), sink=sink)
    assert weights[0, 0, 0].tolist() == [0, 0]
    (z.sum() + weights.square().sum()).backward()
    for x in (q, k, v, bias):
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert q.grad is not None
    assert q.grad[0, 0, 0].tolist() == [0, 0, 0]


def test_gradients_agree_with_finite_differences_through_every_term() -> None:
    torch.manual_seed(1)

    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    q, k, v, bias, sink = double(1, 4, 3, 2), double(1, 2, 4, 2), double(1, 2, 4, 2), double(4, 3, 4), double(4)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, scale=0.7, bias=bias, is_causal=True, softcap=2.0, window=2, sink=sink)

    assert torch.autograd.gradcheck(run, (q, k, v, bias, sink))


def test_a_sink_takes_its_share_and_is_dropped() -> None:
    weights = pattern(torch.zeros(1, 2, 1, 3), sink=torch.tensor([0.0, -INF]))
    torch.testing.assert_close(weights[0, :, 0].sum(-1), torch.tensor([0.75, 1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_of_q_is_kept(dtype: torch.dtype) -> None:
    x = torch.ones(1, 2, 3, 4, dtype=dtype)
    z, weights = attend(x, x, x, scale=0.5, bias=torch.zeros(3, 3), sink=torch.zeros(2))
    assert (z.dtype, weights.dtype) == (dtype, dtype)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
def test_empty_axes_and_single_tokens_keep_their_shapes(batch: int, queries: int, keys: int) -> None:
    q, k, v = torch.ones(batch, 4, queries, 2), torch.ones(batch, 2, keys, 2), torch.ones(batch, 2, keys, 5)
    z, weights = attend(q, k, v, scale=1.0, is_causal=True, sink=torch.zeros(4))
    assert z.shape == (batch, 4, queries, 5)
    assert weights.shape == (batch, 4, queries, keys)
    assert z.isfinite().all()


def _call(**changes: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"q": torch.zeros(2, 8, 5, 16), "k": torch.zeros(2, 4, 7, 16), "v": torch.zeros(2, 4, 7, 3), "scale": 1.0}
    return call | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 3, 7, 16)}, "8 query heads cannot share 3 key/value heads; H must be a multiple of G"),
        ({"k": torch.zeros(2, 0, 7, 16)}, "8 query heads cannot share 0 key/value heads"),
        ({"k": torch.zeros(2, 4, 7, 15)}, "queries of width 16, keys of width 15"),
        ({"k": torch.zeros(3, 4, 7, 16)}, "batches of 2 and 3"),
        ({"q": torch.zeros(8, 5, 16)}, r"q is \[8, 5, 16\] .* give q as \[B, H, Q, D\]"),
        ({"v": torch.zeros(2, 4, 6, 3)}, r"give v as \[2, 4, 7, V\]"),
        ({"k": torch.zeros(2, 4, 7, 16).half()}, "q is torch.float32 on cpu and k is torch.float16 on cpu"),
        ({"q": torch.zeros(2, 8, 5, 16).long()}, "needs floating-point"),
        ({"mask": torch.zeros(5, 7)}, "give a bool mask"),
        ({"mask": torch.ones(5, 6, dtype=torch.bool)}, r"mask is \[5, 6\]; it must broadcast to \[B, H, Q, K\] = \[2, 8, 5, 7\]"),
        ({"bias": torch.zeros(2, 4, 5, 7)}, r"bias is \[2, 4, 5, 7\]; it must broadcast"),
        ({"bias": torch.zeros(1, 1, 1, 5, 7)}, "it must broadcast"),
        ({"bias": torch.ones(5, 7, dtype=torch.bool)}, "pass a bool tensor as mask"),
        ({"sink": torch.zeros(4)}, r"sink is \[4\] .* one floating-point number per query head, \[8\]"),
        ({"sink": torch.zeros(8, device="meta")}, "sink is on meta"),
        ({"bias": torch.zeros(5, 7, device="meta")}, "bias is on meta and q is on cpu"),
    ],
)
def test_what_does_not_fit_is_named_with_both_sides(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        attend(**_call(**changes))


@pytest.mark.parametrize(("changes", "message"), [({"softcap": 0.0}, "softcap 0.0"), ({"window": 0}, "window 0: give at least 1")])
def test_caps_and_windows_that_are_not_positive_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attend(**_call(**changes))


def test_a_pattern_of_scores_without_four_axes_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"scores are \[3, 3\]; give \[B, H, Q, K\]"):
        pattern(torch.zeros(3, 3))
