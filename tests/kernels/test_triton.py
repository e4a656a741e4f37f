"""The Triton kernels, in the interpreter, against the dense twin: every statistic, every feature, blocks that do and do not fit.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.kernels.problem import Wanted, make_problem
from headscope.kernels.statistics import NAMES
from headscope.kernels.triton import configurations, launch
from headscope.kernels.triton.configurations import Configuration
from tests.kernels.dense import dense, numbers

Q, K = 37, 53  # three blocks of 16 queries and four of 16 keys, the last of each cut


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "find", lambda *_: Configuration(rows=16, keys=16, warps=4, stages=1))


def example(queries: int = Q, keys: int = K, dtype: torch.dtype = torch.float32, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Two query heads that share a key head."""
    random = torch.Generator().manual_seed(7)
    q = 2 * torch.randn(1, 2, queries, width, generator=random)
    k, v = torch.randn(1, 1, keys, width, generator=random), torch.randn(1, 1, keys, 20, generator=random)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check(
    q: Tensor, k: Tensor, v: Tensor | None, *, rows: tuple[int, ...] | None = None, top: int = 0, pooled: int | None = None,
    tolerance: float = 2e-6, rough: float = 0.0, **structure: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Everything agrees with the twin: to `tolerance`, the output and moments to `rough` more; keys agree exactly."""
    problem = make_problem(q, k, v, **structure)
    wanted = Wanted(frozenset(NAMES), pooled, rows, top)
    assert launch.why_not(problem, wanted) is None
    output, statistics = launch.run(problem, wanted)
    expected_output, expected = dense(q, k, v, rows=rows, top=top, pooled=pooled, **structure)
    found = {name: numbers(value) for name, value in statistics.tensors().items()}
    assert set(found) == set(expected) - {"scores", "pattern"}
    if output is not None:
        assert output.dtype == q.dtype
        found["output"], expected["output"] = numbers(output), expected_output
    for name, value in found.items():
        if name in ("argmax", "top_keys"):
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        else:
            loose = tolerance * (8 if name in ("received", "pooled") else 1) + (rough if name in ("output", "moments") else 0)
            np.testing.assert_allclose(value, expected[name], rtol=loose, atol=loose, err_msg=name)
    return found


STRUCTURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal from the top left": {"causal": True, "offset": 0},
    "dead rows": {"causal": True, "offset": -20},
    "more queries than keys": {"causal": True, "offset": -3, "window": 9},
    "window": {"window": 11, "causal": True},
    "window both ways": {"window": 18},
    "packed": {"causal": True, "lengths": [18, 0, 19], "key_lengths": [30, 3, 20]},
    "negative scale": {"scale": -0.4},
    "no scale": {"scale": 0.0},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_agree_with_the_twin(name: str) -> None:
    check(*example(), **STRUCTURES[name], rows=(0, 36, 17, 17), pooled=16)


@pytest.mark.parametrize("name", ["causal", "full"])
def test_all_that_changes_scores_or_weights_agrees(name: str) -> None:
    random = torch.Generator().manual_seed(2)
    bias = torch.randn(1, 2, Q, K, generator=random)
    bias[:, :, :, 5] = -torch.inf
    bias[:, :, 9] = -torch.inf
    check(
        *example(),
        **STRUCTURES[name],
        softcap=3.0,
        bias=bias.transpose(2, 3).contiguous().transpose(2, 3),
        mask=torch.rand(Q, K, generator=random) < 0.8,
        key_bias=torch.randn(K, generator=random),
        temperature=torch.tensor([0.5, 2.0]),
        gate=torch.tensor([-1.5, 0.0]),
        sink=torch.tensor([1.0, 30.0]),
        features=torch.randn(K, 3, generator=random),
        rows=(3, 9),
        pooled=32,
        top=3,
    )


@pytest.mark.parametrize("tile", [1, 3, 7, 16, 20, 32, 64])
def test_tiles_of_any_side_hold_the_mass_of_their_cells(tile: int) -> None:
    q, k, _ = example()
    q = q[:, :1]
    problem = make_problem(q, k, causal=True, window=30)
    _, statistics = launch.run(problem, Wanted(tile=tile))
    _, expected = dense(q, k, None, causal=True, window=30, pooled=tile)
    assert set(statistics.tensors()) == {"pooled"}
    np.testing.assert_allclose(numbers(statistics.pooled), expected["pooled"], atol=2e-5)


@pytest.mark.parametrize(("rows", "keys"), [(32, 16), (16, 32), (64, 64)])
def test_blocks_of_any_shape_give_the_same(monkeypatch: pytest.MonkeyPatch, rows: int, keys: int) -> None:
    monkeypatch.setattr(configurations, "find", lambda *_: Configuration(rows, keys, warps=4, stages=1))
    q, k, v = example()
    for tile in (16, 64):
        check(q[:, :1], k, v, causal=True, pooled=tile, rows=tuple(range(Q)), top=2 if tile == 16 else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    features = torch.cat([torch.arange(K)[:, None] + 1000.0, torch.ones(K, 1)], dim=1)
    q, k, v = example(dtype=dtype)
    found = check(q, k, v, causal=True, pooled=16, rows=(5,), features=features / 1000, rough=8e-3)
    problem = make_problem(q, k, causal=True, features=features)
    moments = launch.run(problem, Wanted())[1].moments
    assert moments is not None
    np.testing.assert_allclose(numbers(moments), found["moments"] * 1000, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 16, 33])
def test_widths_need_not_fit(width: int) -> None:
    check(*example(width=width), causal=True, rows=(4,), top=1)


def test_memory_may_lie_in_any_way() -> None:
    q, k, v = example()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    v = torch.stack([torch.full_like(v, torch.nan), v], dim=-1)[..., 1]
    bias = torch.randn(Q, 1).expand(Q, K)
    check(q, k, v, bias=bias, mask=(torch.arange(2 * K) % 5 > 0)[::2], rows=(1,), top=2, pooled=16)


def test_offsets_of_64_bits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_REACH", 1)
    check(*example(), causal=True, bias=torch.randn(Q, K), rows=(4, 2), top=1, pooled=16)


def test_of_equal_scores_the_lowest_key_is_named_and_the_lowest_come_first() -> None:
    q, k = torch.ones(1, 1, 40, 4), torch.ones(1, 1, 60, 4)
    k[:, :, 20] = k[:, :, 50] = 2
    k[:, :, 30:35] = -0.0
    found = check(q, k, None, top=5, window=30, offset=10)
    assert found["top_keys"][0, 0, 0].tolist() == [20, 0, 1, 2, 3]
    found = check(torch.zeros(1, 1, 40, 4), torch.randn(1, 1, 60, 4), None, top=3, causal=True)
    assert (found["argmax"] == 0).all()
    assert found["top_keys"][0, 0, -1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("top", [1, 6, 70])
def test_top_keys_agree_with_the_twin(top: int) -> None:
    q, k, _ = example()
    check(q[:, :1], k, None, causal=True, offset=-2, top=top)


def test_a_common_offset_of_scores_leaves_entropy_its_digits() -> None:
    """Scores that base 2 holds exactly: whatever is lost is lost by the sums. Σ p·s - lse would be off by 1e-3 here."""
    random = torch.Generator().manual_seed(4)
    k = torch.randint(-8, 9, (1, 1, K, 4), generator=random).float()
    q = torch.randint(-2, 3, (1, 1, Q, 4), generator=random).float()
    scale = 1 / (16 * 1.4426950408889634)
    q[..., 0], k[..., 1] = 0, 16
    moved = q.clone()
    moved[..., 1] += 14500  # 1e4 nats on each score
    found = check(q, k, None, scale=scale, tolerance=1e-5)
    problem = make_problem(moved, k, scale=scale)
    statistics = launch.run(problem, Wanted(frozenset(NAMES)))[1].tensors()
    for name in ("entropy", "sum_squares", "p_max", "received"):
        np.testing.assert_allclose(numbers(statistics[name]), found[name], atol=1e-5, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(numbers(statistics["lse"]), found["lse"] + 14500 / 1.4426950408889634, rtol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_shows_in_its_rows_alone(value: float) -> None:
    q, k, v = example()
    bias = torch.zeros(Q, K)
    bias[20, 3] = value
    structure: dict[str, Any] = {"rows": (19, 20), "top": 2, "pooled": 16, "causal": True, "features": torch.randn(K, 1)}
    problem = make_problem(q, k, v, bias=bias, causal=True, features=structure["features"])
    output, statistics = launch.run(problem, Wanted(frozenset(NAMES), 16, (19, 20), 2))
    clean_output, clean = dense(q, k, v, **structure)
    clean["output"] = clean_output
    assert output is not None
    found = {name: numbers(x) for name, x in statistics.tensors().items()} | {"output": numbers(output)}
    others = [row for row in range(Q) if row != 20]
    for name in ("lse", "entropy", "p_max", "max_score", "sum_squares", "moments", "top_weights", "output"):
        assert np.isnan(found[name][:, :, 20]).all(), name
        np.testing.assert_allclose(found[name][:, :, others], clean[name][:, :, others], atol=2e-6, err_msg=name)
    for name in ("argmax", "top_keys"):
        assert (found[name][:, :, 20] == -1).all()
        np.testing.assert_array_equal(found[name][:, :, others], clean[name][:, :, others])
    assert np.isnan(found["rows"][:, :, 1]).all()
    np.testing.assert_allclose(found["rows"][:, :, 0], clean["rows"][:, :, 0], atol=2e-6)
    assert np.isnan(found["received"][..., :36]).all()
    assert np.isnan(found["pooled"][:, :, 1, :2]).all()
    np.testing.assert_allclose(found["pooled"][:, :, [0, 2]], clean["pooled"][:, :, [0, 2]], atol=2e-5)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (1, 0, 3), (1, 3, 0)])
def test_nothing_gives_nothing(batch: int, queries: int, keys: int) -> None:
    q, k, v = (x.expand(batch, *x.shape[1:]) if not batch else x for x in example(queries, keys))
    check(q, k, v, pooled=2, rows=(0,) if queries else (), top=2, features=torch.ones(keys, 2))


def test_rows_alone_need_no_other_row() -> None:
    q, k, _ = example()
    _, expected = dense(q, k, None, causal=True, rows=[30, 2, 2])
    _, statistics = launch.run(make_problem(q, k, causal=True), Wanted(rows=(30, 2, 2)))
    assert set(statistics.tensors()) == {"rows"}
    np.testing.assert_allclose(numbers(statistics.rows), expected["rows"], atol=1e-6)


def test_what_is_not_wanted_is_not_there() -> None:
    q, k, v = example(5, 6)
    output, statistics = launch.run(make_problem(q, k, v), Wanted(frozenset({"entropy"})))
    assert output is not None
    assert set(statistics.tensors()) == {"entropy"}
    assert launch.run(make_problem(q, k), Wanted())[1].tensors() == {}


def test_the_same_call_gives_the_same_bits() -> None:
    problem = make_problem(*example(20, 40))
    wanted = Wanted(frozenset(NAMES), 16, None, 0)
    first, second = (launch.run(problem, wanted)[1].tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_output_has_the_gradient_of_the_definition() -> None:
    q, k, v = (x.requires_grad_() for x in example(20, 24))
    gate = torch.tensor([0.0, 2.0], requires_grad=True)
    given = torch.randn(1, 2, 20, 20, generator=torch.Generator().manual_seed(1))
    output, statistics = launch.run(make_problem(q, k, v, causal=True, gate=gate), Wanted(frozenset({"entropy"})))
    assert output is not None
    assert statistics.entropy is not None
    assert not statistics.entropy.requires_grad
    found = torch.autograd.grad(output, (q, k, v, gate), given)
    q_, k_, v_, gate_ = (x.detach().double().requires_grad_() for x in (q, k, v, gate))
    scores = q_ @ k_.transpose(2, 3) / 12**0.5
    hidden = torch.ones(20, 24, dtype=torch.bool).triu(5)
    expected_output = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_ * gate_[:, None, None]
    expected = torch.autograd.grad(expected_output, (q_, k_, v_, gate_), given.double())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


Q_, K_, V_ = example(3, 4)
CANNOT: dict[str, tuple[dict[str, Any], Wanted, str]] = {
    "float64": ({"q": Q_.double(), "k": K_.double()}, Wanted(), "float64"),
    "too wide": ({"v": torch.zeros(1, 1, 4, 1025)}, Wanted(), "1025 wide"),
    "too many top keys": ({}, Wanted(top=129), "128 top keys"),
    "gradient of a bias": ({"bias": torch.zeros(3, 4, requires_grad=True)}, Wanted(), "bias requires one"),
    "gradient of a sink": ({"sink": torch.zeros(2, requires_grad=True)}, Wanted(), "sink requires one"),
    "gradient of statistics": ({"q": Q_.clone().requires_grad_(), "v": None}, Wanted(), "no gradients of statistics"),
    "gradient of wide heads": ({"v": torch.zeros(1, 1, 4, 512, requires_grad=True)}, Wanted(), "512 wide"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_done_is_said(name: str) -> None:
    changed, wanted, text = CANNOT[name]
    tensors = {"q": Q_, "k": K_, "v": V_} | changed
    if tensors["q"].dtype == torch.float64:
        tensors["v"] = V_.double()
    reason = launch.why_not(make_problem(**tensors), wanted)
    assert reason is not None
    assert text in reason


def test_without_a_gpu_and_without_the_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert "needs a GPU" in str(launch.why_not(make_problem(Q_, K_, V_), Wanted()))


def test_every_recorded_configuration_is_one_that_a_kernel_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for kernel in ("forward", "forward-biased", "columns", "rows", "top", "tiles"):
        for target in ("nvidia", "amd", "interpreter"):
            for dtype in (torch.float32, torch.bfloat16):
                for width in (1, 16, 64, 65, 128, 1024):
                    found = configurations.find(kernel, width, target, dtype)
                    for number, least in ((found.rows, 16), (found.keys, 16), (found.warps, 1), (found.stages, 1)):
                        assert number >= least
                    assert all(number & (number - 1) == 0 for number in (found.rows, found.keys, found.warps))
