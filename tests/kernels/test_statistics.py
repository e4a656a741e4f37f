"""Statistics by panels against a twin that holds the whole pattern, in NumPy float64, from the definitions."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.kernels import panels
from headscope.kernels.attention import attention
from headscope.kernels.errors import HeadscopeError, InputError, SelectionError, ShapeError
from headscope.kernels.panels import statistics_of_pattern
from headscope.kernels.statistics import NAMES, Statistics

INF = float("inf")


def statistics(q: Tensor, k: Tensor, *, is_causal: bool = False, want: Any = NAMES, **more: Any) -> Statistics:
    """By panels, with causality counted from the top left."""
    return attention(q, k, None, keep=want, causal=is_causal, offset=0, implementation="blockwise", **more)[1]


def rows(q: Tensor, k: Tensor, queries: Any, **more: Any) -> Tensor:
    found = statistics(q, k, want=(), rows=queries, **more).rows
    assert found is not None
    return found


def definitions(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    tile: int = 2,
) -> dict[str, np.ndarray]:
    """Every statistic from its definition, with the whole pattern at hand."""
    Q, K = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    keys = np.stack([k[:, h // groups].double().numpy() for h in range(q.shape[1])], axis=1)
    s = np.einsum("bhqd,bhkd->bhqk", q.double().numpy(), keys) * scale
    if softcap is not None:
        s = np.tanh(s / softcap) * softcap
    if bias is not None:
        s = s + bias.double().numpy()
    if mask is not None:
        s = np.where(mask.numpy(), s, -np.inf)
    if is_causal:
        s = np.where(np.tri(Q, K, dtype=bool), s, -np.inf)
    dead = np.isneginf(s).all(-1)
    top = np.where(dead, 0.0, s.max(-1, initial=-np.inf))
    e = np.exp(s - top[..., None])
    total = e.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = top + np.log(total)
        alone = np.where(dead[..., None], 0.0, e / total[..., None])
        entropy = -np.where(alone > 0, alone * np.log(np.where(alone > 0, alone, 1.0)), 0.0).sum(-1)
    if sink is not None:
        total = total + np.exp(sink.double().numpy()[:, None] - top)
    p = np.where(dead[..., None], 0.0, e / np.where(total > 0, total, 1.0)[..., None])
    pooled = np.zeros((*p.shape[:2], math.ceil(Q / tile), math.ceil(K / tile)))
    for i in range(Q):
        for j in range(K):
            pooled[:, :, i // tile, j // tile] += p[:, :, i, j]
    return {
        "lse": lse,
        "entropy": entropy,
        "p_max": p.max(-1, initial=0.0),
        "argmax": np.where(dead, -1, np.argmax(s, -1)) if K else np.full(dead.shape, -1),
        "max_score": s.max(-1, initial=-np.inf),
        "sum_squares": (alone**2).sum(-1),
        "received": p.sum(-2),
        "pooled": pooled,
        "pattern": p,
    }


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    B, G, repeat = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    Q, K, D = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    H = G * repeat
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def broadcast() -> list[int]:
        shape = [draw(st.sampled_from([1, n])) for n in (B, H, Q, K)]
        return shape[draw(st.integers(0, 3)) :] if draw(st.booleans()) else shape

    bias = normal(*broadcast()) * 3 if draw(st.booleans()) else None
    if bias is not None and draw(st.booleans()):
        bias = torch.where(normal(*bias.shape) > 0.5, -INF, bias)
    return {
        "q": normal(B, H, Q, D) * draw(st.sampled_from([1.0, 40.0])),
        "k": normal(B, G, K, D),
        "scale": draw(st.sampled_from([0.3, -2.0])),
        "bias": bias,
        "mask": normal(*broadcast()) > -0.5 if draw(st.booleans()) else None,
        "is_causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "sink": normal(H) * 5 if draw(st.booleans()) else None,
    }


def same(got: dict[str, Tensor], want: dict[str, np.ndarray], tolerance: float) -> None:
    """Equal up to rounding; under a saturated softcap rounding also decides which of several largest keys argmax names."""
    for name, value in got.items():
        if name == "argmax":
            index = value.numpy()
            np.testing.assert_array_equal(index < 0, want["argmax"] < 0)
            largest = np.take_along_axis(want["pattern"], np.maximum(index, 0)[..., None], -1)[..., 0]
            np.testing.assert_allclose(largest, want["p_max"], rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_allclose(value.numpy(), want[name], rtol=tolerance, atol=tolerance, err_msg=name)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 60, 1 << 18]))
def test_every_statistic_agrees_with_its_definition_however_it_is_cut(problem: dict[str, Any], panel: int, tile: int, block: int) -> None:
    want = definitions(**problem, tile=tile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "_CPU_CELLS", block)
        patch.setattr(panels, "_CPU_ROWS", panel)
        got = statistics(**problem, pooled=tile).tensors()
    assert set(got) == {*NAMES, "pooled"}
    for name, value in got.items():
        assert value.dtype == (torch.int64 if name == "argmax" else torch.float64)
    same(got, want, 1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 5))
def test_statistics_of_a_pattern_agree_with_the_definitions(problem: dict[str, Any], tile: int) -> None:
    want = definitions(**problem, tile=tile)
    got = statistics_of_pattern(torch.from_numpy(want["pattern"]), pooled=tile).tensors()
    assert set(got) == {*NAMES, "pooled"} - {"lse", "max_score"}
    same(got, want, 1e-8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.data())
def test_chosen_rows_are_the_rows_of_the_whole_pattern(problem: dict[str, Any], data: st.DataObject) -> None:
    count = problem["q"].shape[2]
    chosen = data.draw(st.lists(st.integers(-count, count - 1), max_size=5))
    got = rows(queries=chosen, **problem)
    np.testing.assert_allclose(got.numpy(), definitions(**problem)["pattern"][:, :, chosen], rtol=1e-9, atol=1e-12)


def test_a_tie_goes_to_the_lowest_key() -> None:
    k = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]).view(1, 1, 5, 1).repeat(1, 1, 20, 1)
    found = statistics(torch.ones(1, 1, 100, 1), k, scale=1.0, is_causal=True, want=["argmax"])
    assert found.argmax is not None
    assert found.argmax[0, 0].tolist() == [0] + [1] * 99
    weights = torch.tensor([0.1, 0.4, 0.1, 0.4]).view(1, 1, 1, 4)
    from_pattern = statistics_of_pattern(weights, want=["argmax"]).argmax
    assert from_pattern is not None
    assert from_pattern.item() == 1


def test_the_first_causal_row_sees_exactly_one_key() -> None:
    found = statistics(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), scale=1.0, is_causal=True)
    assert found.entropy is not None
    assert found.received is not None
    torch.testing.assert_close(found.entropy[0, 0], torch.tensor([1.0, 2.0, 3.0]).log())
    torch.testing.assert_close(found.received[0, 0], torch.tensor([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3]))


def test_query_heads_are_measured_against_the_key_head_of_their_own_group() -> None:
    found = statistics(torch.ones(1, 6, 1, 1), torch.tensor([1.0, 10.0]).view(1, 2, 1, 1), scale=1.0, want="lse")
    assert found.lse is not None
    assert found.lse.flatten().tolist() == [1, 1, 1, 10, 10, 10]


def test_a_sink_shrinks_what_is_received_and_leaves_entropy_alone() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    without, with_sink = (statistics(q, k, scale=1.0, sink=sink, pooled=9) for sink in (None, torch.tensor([0.0, 3.0])))
    torch.testing.assert_close(without.entropy, with_sink.entropy)
    torch.testing.assert_close(without.sum_squares, with_sink.sum_squares)
    torch.testing.assert_close(without.lse, with_sink.lse)
    assert with_sink.lse is not None
    assert with_sink.pooled is not None
    assert without.pooled is not None
    kept = 1 - torch.sigmoid(torch.tensor([0.0, 3.0])[:, None] - with_sink.lse)  # [B, H, Q]
    torch.testing.assert_close(with_sink.pooled[..., 0, 0], kept.sum(-1))
    torch.testing.assert_close(without.pooled[..., 0, 0], torch.full((1, 2), 3.0))


@pytest.mark.parametrize("sink", [None, torch.tensor([1.0])])
def test_a_dead_row_has_the_values_of_a_dead_row_and_gives_nothing_to_columns(sink: Tensor | None) -> None:
    mask = torch.tensor([[True, True], [False, False]])
    found = statistics(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1), scale=1.0, mask=mask, sink=sink, pooled=1)
    values = {name: value[0, 0, 1].tolist() for name, value in found.tensors().items() if name != "received"}
    assert values == {"lse": -INF, "entropy": 0, "p_max": 0, "argmax": -1, "max_score": -INF, "sum_squares": 0, "pooled": [0, 0]}
    assert found.received is not None
    assert found.received.sum() <= 1


def test_a_row_masked_with_the_smallest_float_is_uniform_not_dead() -> None:
    found = statistics(torch.ones(1, 1, 1, 1), torch.randn(1, 1, 4, 1), scale=1.0, bias=torch.full((1, 4), torch.finfo(torch.float32).min))
    assert found.entropy is not None
    assert found.entropy.item() == pytest.approx(math.log(4))


def test_nan_shows_as_nan_in_its_own_row_only() -> None:
    q = torch.ones(1, 1, 3, 1)
    q[0, 0, 1] = float("nan")
    found = statistics(q, torch.ones(1, 1, 2, 1), scale=1.0)
    assert found.argmax is not None
    assert found.argmax.flatten().tolist() == [0, -1, 0]
    for value in (found.lse, found.entropy, found.p_max, found.max_score, found.sum_squares):
        assert value is not None
        assert value.isnan().flatten().tolist() == [False, True, False]
    from_pattern = statistics_of_pattern(torch.tensor([[0.5, 0.5], [float("nan"), 0.5]]).view(1, 1, 2, 2))
    assert from_pattern.argmax is not None
    assert from_pattern.entropy is not None
    assert from_pattern.argmax.flatten().tolist() == [0, -1]
    assert from_pattern.entropy.isnan().flatten().tolist() == [False, True]


def test_a_common_offset_of_ten_thousand_costs_the_entropy_no_accuracy() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 512, 8)
    scores = (q.double() @ k.double().transpose(-2, -1)).float()
    plain = statistics_of_pattern(scores.double().softmax(-1), want=["entropy"]).entropy
    # Queries and keys of width 1 more, whose product is the offset, on scores rounded to what float32 holds at 1e4.
    one = torch.ones(1, 1, 512, 1) * 1e4
    shifted = statistics(torch.cat([q, torch.ones(1, 1, 4, 1)], -1), torch.cat([k, one], -1), scale=1.0, want=["entropy"]).entropy
    assert plain is not None
    assert shifted is not None
    assert (shifted - plain).abs().max() < 2e-3  # the scores' own rounding; lse - sum(p s) loses ten times this


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 300, 16).to(dtype), torch.randn(1, 2, 300, 16).to(dtype)
    want = definitions(q, k, scale=0.25, is_causal=True, tile=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = statistics(q, k, scale=0.25, is_causal=True, pooled=64)
        row = rows(q, k, [-1], scale=0.25, is_causal=True)
    assert row.dtype == torch.float32
    np.testing.assert_allclose(row.numpy(), want["pattern"][:, :, [-1]], atol=1e-6)
    for name, value in got.tensors().items():
        assert value.dtype in (torch.float32, torch.int64)
        np.testing.assert_allclose(value.numpy(), want[name], rtol=2e-6, atol=2e-6, err_msg=name)


def test_scores_in_the_hundreds_stay_accurate_in_float32() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 130, 16) * 20, torch.randn(1, 1, 130, 16)
    want, got = definitions(q, k, scale=1.0), statistics(q, k, scale=1.0, pooled=2)
    for name, value in got.tensors().items():
        np.testing.assert_allclose(value.numpy(), want[name], rtol=2e-6, atol=1e-4, err_msg=name)


class _Watch(TorchDispatchMode):
    """Notes each operation and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        self.names.append(func.__name__.split(".")[0])
        return out


@pytest.mark.parametrize(("batch", "queries"), [(1, 4096), (64, 512)])
def test_no_tensor_of_queries_times_keys_is_ever_made_nor_one_of_many_batches(batch: int, queries: int) -> None:
    q, k = torch.randn(batch, 8, queries, 1), torch.randn(batch, 2, queries, 1)
    with _Watch() as watch:
        statistics(q, k, scale=1.0, pooled=256)
    assert watch.largest <= 2 * max(
        4 * 128 * queries, 1 << 19
    )  # two panels of the heads that share keys, or of a few more; the maps are 2**27


def test_only_what_is_asked_for_is_computed() -> None:
    q = torch.randn(1, 1, 8, 2)
    seen: dict[str, list[str]] = {}
    for want in NAMES:
        with _Watch() as watch:
            found = statistics(q, q, scale=1.0, want=[want])
        assert set(found.tensors()) == {want}
        seen[want] = watch.names
    assert "exp" not in seen["argmax"]
    assert {want for want, names in seen.items() if "bmm" in names} == {"received"}  # the scores come from baddbmm
    assert {want for want, names in seen.items() if "argmax" in names} == {"argmax"}
    assert "exp" not in seen["max_score"]


def test_gradients_agree_with_those_of_the_whole_pattern() -> None:
    torch.manual_seed(0)
    start = [torch.randn(1, 4, 5, 2), torch.randn(1, 2, 5, 2), torch.randn(4) * 2]
    mask = torch.tensor([True, True, True, False, True]).view(5, 1).expand(5, 5)  # row 3 is dead

    def total(found: Statistics) -> Tensor:
        return torch.stack([(x.double() * torch.arange(x.numel()).view_as(x).sin()).sum() for x in found.tensors().values()]).sum()

    def by_panels(q: Tensor, k: Tensor, sink: Tensor) -> Tensor:
        want = ["entropy", "p_max", "sum_squares", "received"]
        return total(statistics(q, k, scale=1.0, is_causal=True, mask=mask, sink=sink, want=want, pooled=2))

    inputs = [x.double().requires_grad_() for x in start]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "_CPU_ROWS", 2)
        assert torch.autograd.gradcheck(by_panels, inputs)

    def from_scores(s: Tensor) -> Tensor:
        dead = torch.zeros(1, 1, 5, 3, dtype=torch.float64)
        dead[:, :, 3] = -INF
        p = (s + dead).masked_fill(dead == -INF, 0).softmax(-1) * (dead == 0)
        return total(statistics_of_pattern(p, scores=s, pooled=2))

    assert torch.autograd.gradcheck(from_scores, torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True))


def test_gradients_stay_finite_beside_hidden_keys_zero_probabilities_and_great_sinks() -> None:
    q = (torch.randn(1, 2, 3, 2) * 200).requires_grad_()
    sink = torch.tensor([-INF, 1e4], requires_grad=True)
    found = statistics(q, q, scale=1.0, is_causal=True, sink=sink, pooled=2)
    sum(x.sum() * 100 for x in found.tensors().values() if x.requires_grad).backward()  # type: ignore[union-attr]
    p = (torch.randn(1, 1, 3, 3) * 200).requires_grad_()
    entropy = statistics_of_pattern(p.softmax(-1), want=["entropy"]).entropy
    assert entropy is not None
    entropy.sum().backward()
    for x in (q, sink, p):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_what_only_scores_tell_is_given_only_with_scores() -> None:
    s = torch.tensor([[0.0, 1.0], [-INF, -INF], [0.0, INF]]).view(1, 1, 3, 2)
    p = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]).view(1, 1, 3, 2)
    alone = statistics_of_pattern(p)
    assert alone.lse is None
    assert alone.max_score is None
    found = statistics_of_pattern(p, scores=s)
    assert found.lse is not None
    assert found.max_score is not None
    assert found.lse.flatten().tolist() == pytest.approx([math.log(1 + math.e), -INF, math.nan], nan_ok=True)
    assert found.max_score.flatten().tolist() == pytest.approx([1.0, -INF, math.nan], nan_ok=True)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_empty_axes_and_single_tokens_keep_their_shapes(batch: int, queries: int, keys: int, is_causal: bool) -> None:
    q, k = torch.ones(batch, 4, queries, 2), torch.ones(batch, 2, keys, 2)
    found = statistics(q, k, scale=1.0, is_causal=is_causal, pooled=2, sink=torch.zeros(4))
    from_pattern = statistics_of_pattern(torch.ones(batch, 4, queries, keys), pooled=2)
    for value in (found.lse, found.entropy, found.argmax, from_pattern.entropy):
        assert value is not None
        assert value.shape == (batch, 4, queries)
    for one in (found, from_pattern):
        assert one.received is not None
        assert one.pooled is not None
        assert one.received.shape == (batch, 4, keys)
        assert one.pooled.shape == (batch, 4, -(-queries // 2), -(-keys // 2))
    if not keys:
        assert found.lse is not None
        assert found.argmax is not None
        assert (found.lse == -INF).all()
        assert (found.argmax == -1).all()
    assert rows(q, k, [], scale=1.0).shape == (batch, 4, 0, keys)


def test_rows_take_tensors_and_refuse_positions_that_are_not_there() -> None:
    q = torch.randn(1, 2, 3, 2)
    torch.testing.assert_close(rows(q, q, torch.tensor([-1, 0]), scale=1.0), rows(q, q, [2, 0], scale=1.0))
    for query in (3, -4):
        with pytest.raises(SelectionError, match=f"no query at position {query}: there are 3 queries, positions -3 to 2"):
            rows(q, q, [0, query], scale=1.0)
    with pytest.raises(LookupError, match="positions none"):
        rows(q[:, :, :0], q, [0], scale=1.0)


def test_wrong_requests_are_refused_with_what_there_is() -> None:
    q = torch.randn(1, 2, 3, 2)
    with pytest.raises(
        SelectionError, match="no statistic 'budget': there are lse, entropy, p_max, argmax, max_score, sum_squares, received$"
    ):
        statistics(q, q, scale=1.0, want=["lse", "budget"])
    with pytest.raises(SelectionError, match="give its tile, pooled=16"):
        statistics_of_pattern(torch.ones(1, 1, 1, 1), want=["pooled"])
    with pytest.raises(InputError, match="tiles of side 0"):
        statistics(q, q, scale=1.0, pooled=0)
    with pytest.raises(ShapeError, match="2 query heads cannot share 3"):
        statistics(q, torch.randn(1, 3, 3, 2), scale=1.0)
    with pytest.raises(ShapeError, match="must be equal"):
        statistics_of_pattern(torch.ones(1, 1, 2, 2), scores=torch.ones(1, 1, 2, 3))
    with pytest.raises(ShapeError, match=r"the pattern is \[2, 2\]"):
        statistics_of_pattern(torch.ones(2, 2))


def test_selected_heads_come_in_the_order_given() -> None:
    found = statistics(torch.randn(2, 4, 3, 2), torch.randn(2, 2, 3, 2), scale=1.0, want=["entropy", "received"])
    assert found.entropy is not None
    chosen = found.select([3, -4])
    torch.testing.assert_close(chosen.entropy, found.entropy[:, [3, 0]])
    assert chosen.lse is None
    one = found.select(1).received
    assert one is not None
    assert one.shape == (2, 1, 3)
    with pytest.raises(SelectionError, match="no head 4: there are 4 heads, 0 to 3"):
        found.select([0, 4])


def test_the_dict_is_json_without_infinities() -> None:
    mask = torch.tensor([[True], [False]])
    found = statistics(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 1, 1), scale=1.0, mask=mask, want=["lse", "argmax"])
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == {"lse": [[[1.0, None]]], "argmax": [[[0, -1]]]}


def test_the_frame_has_a_line_per_position_whichever_axis_is_longer() -> None:
    pytest.importorskip("pandas")
    q, k = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 5, 2)
    found = statistics(q, k, scale=1.0, pooled=2, rows=[0], top=1, features=torch.ones(5, 1))
    frame = found.to_frame()
    assert list(frame.columns) == ["batch", "head", "position", *NAMES]
    assert len(frame) == 2 * 3 * 5
    line = frame[(frame["batch"] == 1) & (frame["head"] == 2)].set_index("position")
    assert found.entropy is not None
    assert found.received is not None
    assert line["entropy"][3] == pytest.approx(found.entropy[1, 2, 3].item())
    assert line["received"][4] == pytest.approx(found.received[1, 2, 4].item())
    assert line["argmax"].isna().tolist() == [False] * 4 + [True]


def test_the_frame_names_pandas_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(HeadscopeError, match="pip install pandas"):
        Statistics().to_frame()
