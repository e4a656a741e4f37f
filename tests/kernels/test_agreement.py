"""Every implementation gives what the definitions give, for any call; and refuses what makes no sense in the same words.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from headscope.kernels.attention import attention
from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.kernels.relevance import relevance
from headscope.kernels.statistics import NAMES, Statistics
from tests.kernels.dense import dense, numbers
from tests.kernels.strategies import Call, Limits, calls

SINGLE = (torch.float32, torch.bfloat16, torch.float16)
LIMITS = {
    "reference": Limits(),
    "blockwise": Limits(),
    "cpu": Limits(dtypes=SINGLE, top=False),
    "triton": Limits(dtypes=SINGLE, size=40),
}
EXAMPLES = {"reference": 60, "blockwise": 150, "cpu": 150, "triton": 16}

# Largest error of a score, in nats, by dtype: relative to the size of what was added up to get it. With it a probability p is off by
# at most 2·p·error, so every other error follows. Half precision is accumulated in float32.
SCORE_ERROR = {torch.float64: 2e-15, torch.float32: 5e-7, torch.bfloat16: 5e-7, torch.float16: 5e-7}
# The smallest size of a score that counts: what exp and log err by themselves.
LEAST_SIZE = 4.0
# Rounding of a product of pattern and values, and of the output, relative to the largest value.
OUTPUT_ERROR = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def compute(name: str, call: Call) -> tuple[Tensor | None, Statistics]:
    return attention(call.q, call.k, call.v, keep=NAMES, implementation=name, **call.structure, **call.wanted)


def error_of_scores(call: Call) -> float:
    """Nats that a score may be off by: in proportion to the largest sum of absolute terms."""
    q, k = abs(numbers(call.q)), abs(numbers(call.k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scale = call.structure.get("scale", q.shape[3] ** -0.5)
    size = q @ np.swapaxes(k, 2, 3) * abs(scale)
    if "temperature" in call.structure:
        size = size / numbers(call.structure["temperature"])[:, None, None]
    largest = size.max(initial=LEAST_SIZE)
    for name in ("bias", "key_bias"):
        if name in call.structure:
            largest += np.abs(np.nan_to_num(numbers(call.structure[name]), posinf=0, neginf=0)).max(initial=0)
    return float(SCORE_ERROR[call.q.dtype] * max(largest, call.structure.get("softcap", 0.0)))


def assert_agrees(name: str, call: Call) -> None:
    output, statistics = compute(name, call)
    expected_output, expected = dense(call.q, call.k, call.v, **call.structure, **call.wanted)
    error = error_of_scores(call)
    precision = torch.float64 if call.q.dtype == torch.float64 else torch.float32

    found = {field: numbers(value) for field, value in statistics.tensors().items()}
    for field, value in statistics.tensors().items():
        assert value.shape == expected[field].shape, field
        assert value.dtype == (torch.int64 if field in ("argmax", "top_keys") else precision), field
    assert set(found) == set(expected) - {"scores", "pattern"}

    def close(field: str, tolerance: Any) -> None:
        with np.errstate(invalid="ignore"):  # infinity less infinity
            difference = np.abs(found[field] - expected[field])
        both = (found[field] == expected[field]) | (np.isnan(found[field]) & np.isnan(expected[field]))  # the same infinity, or NaN
        wrong = ~both & ~(difference <= tolerance)
        assert not wrong.any(), (
            f"{name} {field} at {np.argwhere(wrong)[0]}: {found[field][wrong][0]} instead of {expected[field][wrong][0]}, "
            f"off by {np.max(difference[wrong])}, score error {error}"
        )

    for field in ("lse", "max_score"):
        close(field, 2 * error)
    for field in ("p_max", "sum_squares", "rows", "received", "pooled", "top_weights"):
        if field in found:
            close(field, 2 * error * (1 + np.nan_to_num(np.abs(expected[field]))))
    close("entropy", 2 * error * (1 + np.nan_to_num(expected["entropy"])))
    for field, largest in (("moments", call.structure.get("features")),):
        if largest is not None:
            close(field, (2 * error + OUTPUT_ERROR[call.q.dtype]) * np.abs(numbers(largest)).max(initial=0))
    assert_keys(call, found["argmax"][..., None], expected, expected["argmax"][..., None], 2 * error)
    if call.top:
        assert_keys(call, found["top_keys"], expected, expected["top_keys"], 2 * error)

    if call.v is None:
        assert output is None
        return
    assert output is not None
    assert output.dtype == call.q.dtype
    found["output"], expected["output"] = numbers(output), expected_output
    gate = np.abs(numbers(call.structure["gate"])).max() if "gate" in call.structure else 1.0
    close("output", (2 * error + OUTPUT_ERROR[call.q.dtype]) * gate * np.abs(numbers(call.v)).max(initial=0) + 1e-7)


def assert_keys(call: Call, found: np.ndarray, expected: dict[str, np.ndarray], wanted: np.ndarray, tolerance: float) -> None:
    """The same keys; where scores are rounded, keys whose scores are those of the wanted ones to rounding, none of them twice."""
    keys = found.astype(np.int64)
    if call.exact:
        np.testing.assert_array_equal(keys, wanted)
        return
    np.testing.assert_array_equal(keys < 0, wanted < 0)
    for place in np.ndindex(keys.shape[:-1]):
        some = keys[place][keys[place] >= 0]
        assert len(set(some)) == len(some)
        scores = expected["scores"][place]
        np.testing.assert_allclose(scores[some], scores[wanted[place][wanted[place] >= 0]], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", LIMITS)
def test_any_call_gives_what_the_definitions_give(name: str) -> None:
    @settings(max_examples=EXAMPLES[name], deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(calls(LIMITS[name]))
    def agrees(call: Call) -> None:
        assert_agrees(name, call)

    agrees()


@pytest.mark.parametrize("structure", ["full", "causal", "window", "packed", "everything"])
@pytest.mark.parametrize("name", [name for name in LIMITS if name != "triton"])
def test_calls_of_many_panels_agree(name: str, structure: str) -> None:
    torch.manual_seed(5)
    q, k, v = torch.randn(1, 4, 333, 40), torch.randn(1, 2, 301, 40), torch.randn(1, 2, 301, 24)
    options: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": 130, "offset": 0},
        "packed": {"causal": True, "lengths": [100, 0, 130, 103], "key_lengths": [90, 1, 110, 100]},
        "everything": {
            "window": 200,
            "softcap": 20.0,
            "bias": torch.randn(4, 333, 301),
            "mask": torch.rand(333, 301) < 0.7,
            "key_bias": torch.randn(301),
            "temperature": torch.rand(4) + 0.5,
            "gate": torch.randn(4),
            "sink": torch.randn(4),
            "features": torch.randn(301, 5),
        },
    }
    assert_agrees(name, Call(q, k, v, options[structure], rows=[0, 332, 64, 63], pooled=48))


def example(batch: int = 1, queries: int = 21, keys: int = 37, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of four heads that share two key heads."""
    random = torch.Generator().manual_seed(3)
    shapes = (batch, 4, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 6)
    q, k, v = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return 3 * q, k, v


def run(name: str, q: Tensor, k: Tensor, v: Tensor | None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    output, statistics = attention(q, k, v, keep=NAMES, implementation=name, **options)
    return torch.empty(0) if output is None else output, statistics.tensors()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert set(found) == set(expected)
    for field, value in expected.items():
        torch.testing.assert_close(
            found[field], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text, field=field: f"{field}: {text}"
        )


everywhere = pytest.mark.parametrize("name", LIMITS)


@everywhere
@pytest.mark.parametrize("causal", [False, True])
def test_all_mass_is_counted_once(name: str, causal: bool) -> None:
    q, k, v = example(queries=40)  # 3 rows are dead where causal
    _, found = run(name, q, k, v, causal=causal, rows=list(range(40)), pooled=16, features=torch.ones(37, 1))
    alive = torch.ones(1, 4, 40)
    alive[:, :, :3] = float(not causal)
    torch.testing.assert_close(found["rows"].sum(-1), alive)
    torch.testing.assert_close(found["moments"][..., 0], alive)
    torch.testing.assert_close(found["received"].sum(-1), alive.sum(-1))
    torch.testing.assert_close(found["pooled"].sum((-1, -2)), alive.sum(-1))
    torch.testing.assert_close(found["pooled"].sum(2), torch.nn.functional.pad(found["received"], (0, 11)).reshape(1, 4, 3, 16).sum(-1))


@everywhere
@pytest.mark.parametrize("tile", [7, 32, 64])
def test_tiles_of_any_side_hold_their_mass(name: str, tile: int) -> None:
    random = torch.Generator().manual_seed(6)
    q, k = torch.randn(1, 2, 130, 8, generator=random), torch.randn(1, 1, 110, 8, generator=random)
    assert_agrees(name, Call(q, k, None, {"causal": True, "window": 80, "offset": -10}, rows=[129, 11], pooled=tile))


@everywhere
def test_a_sink_takes_the_share_that_its_score_says(name: str) -> None:
    q, k, v = example()
    sink = torch.tensor([-2.0, 0.0, 3.0, 9.0])
    plain_output, plain = run(name, q, k, v, rows=[4], pooled=8, features=torch.ones(37, 1))
    output, found = run(name, q, k, v, rows=[4], pooled=8, features=torch.ones(37, 1), sink=sink)
    left = 1 - torch.sigmoid(sink[:, None] - plain["lse"])  # [B, H, Q]
    for field in ("lse", "entropy", "sum_squares", "max_score", "argmax"):
        torch.testing.assert_close(found[field], plain[field])
    torch.testing.assert_close(found["p_max"], plain["p_max"] * left)
    torch.testing.assert_close(found["moments"][..., 0], left)
    torch.testing.assert_close(found["rows"], plain["rows"] * left[:, :, 4:5, None])
    torch.testing.assert_close(found["received"].sum(-1), left.sum(-1))
    torch.testing.assert_close(found["pooled"].sum((-1, -2)), left.sum(-1))
    torch.testing.assert_close(output, plain_output * left[..., None])


@everywhere
def test_the_order_of_the_keys_does_not_matter(name: str) -> None:
    q, k, v = example()
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    features, key_bias = torch.randn(37, 3), torch.randn(37)
    output, found = run(name, q, k, v, rows=[2], features=features, key_bias=key_bias)
    turned_output, turned = run(name, q, k[:, :, order], v[:, :, order], rows=[2], features=features[order], key_bias=key_bias[order])
    found["received"], found["rows"] = found["received"][..., order], found["rows"][..., order]
    turned["argmax"] = order[turned["argmax"]]
    assert_same(turned, found)
    torch.testing.assert_close(turned_output, output, rtol=2e-5, atol=2e-5)


@everywhere
def test_a_bias_on_all_keys_moves_lse_and_the_largest_score_alone(name: str) -> None:
    q, k, v = example()
    output, found = run(name, q, k, v, causal=True, pooled=8, rows=[3])
    moved_output, moved = run(name, q, k, v, causal=True, pooled=8, rows=[3], key_bias=torch.full((37,), 2.5))
    found["lse"], found["max_score"] = found["lse"] + 2.5, found["max_score"] + 2.5
    assert_same(moved, found)
    torch.testing.assert_close(moved_output, output, rtol=2e-5, atol=2e-5)


@everywhere
@pytest.mark.parametrize("window", [None, 9])
def test_packed_sequences_are_separate_calls(name: str, window: int | None) -> None:
    q, k, v = example()
    lengths, key_lengths = [5, 0, 16], [20, 4, 13]  # the last has more queries than keys
    options: dict[str, Any] = {"causal": True, "window": window}
    output, found = run(name, q, k, v, lengths=lengths, key_lengths=key_lengths, **options)
    query_start = key_start = 0
    for queries, keys in zip(lengths, key_lengths, strict=True):
        mine, theirs = slice(query_start, query_start + queries), slice(key_start, key_start + keys)
        own_output, own = run(name, q[:, :, mine], k[:, :, theirs], v[:, :, theirs], **options)
        own["argmax"] = torch.where(own["argmax"] < 0, -1, own["argmax"] + key_start)
        part = {field: value[:, :, theirs if field == "received" else mine] for field, value in found.items()}
        assert_same(part, own)
        torch.testing.assert_close(output[:, :, mine], own_output, rtol=2e-5, atol=2e-5)
        query_start, key_start = query_start + queries, key_start + keys


@everywhere
def test_entries_of_a_batch_do_not_know_each_other(name: str) -> None:
    q, k, v = example(batch=3)
    bias, order = torch.randn(3, 1, 21, 37), torch.tensor([2, 0, 1])
    output, found = run(name, q, k, v, causal=True, pooled=16, bias=bias)
    turned_output, turned = run(name, q[order], k[order], v[order], causal=True, pooled=16, bias=bias[order])
    assert_same(turned, {field: value[order] for field, value in found.items()})
    torch.testing.assert_close(turned_output, output[order], rtol=2e-5, atol=2e-5)


@everywhere
def test_shared_key_heads_are_repeated_key_heads(name: str) -> None:
    q, k, v = example()
    output, found = run(name, q, k, v, causal=True, pooled=16, rows=[20])
    repeated_output, repeated = run(name, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), causal=True, pooled=16, rows=[20])
    assert_same(repeated, found)
    torch.testing.assert_close(repeated_output, output, rtol=2e-5, atol=2e-5)


@everywhere
@pytest.mark.parametrize("cut", [1, 16, 20])
def test_queries_may_come_in_parts(name: str, cut: int) -> None:
    q, k, v = example()
    options: dict[str, Any] = {"causal": True, "window": 12}
    output, whole = run(name, q, k, v, **options)
    head_output, head = run(name, q[:, :, :cut], k, v, offset=16, **options)
    tail_output, tail = run(name, q[:, :, cut:], k, v, **options)  # ends with the last key, as the whole does
    joined = {field: torch.cat([head[field], tail[field]], dim=2) for field in whole if field != "received"}
    assert_same({**joined, "received": head["received"] + tail["received"]}, whole)
    torch.testing.assert_close(torch.cat([head_output, tail_output], dim=2), output, rtol=2e-5, atol=2e-5)


@everywhere
@pytest.mark.parametrize("cut", [1, 16, 33])
def test_keys_may_come_in_parts_that_lse_joins(name: str, cut: int) -> None:
    q, k, v = example()
    output, whole = run(name, q, k, v)
    near_output, near = run(name, q, k[:, :, :cut], v[:, :, :cut])
    far_output, far = run(name, q, k[:, :, cut:], v[:, :, cut:])
    share = torch.sigmoid(near["lse"] - far["lse"])
    torch.testing.assert_close(torch.logaddexp(near["lse"], far["lse"]), whole["lse"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(share[..., None] * near_output + (1 - share)[..., None] * far_output, output, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        share.square() * near["sum_squares"] + (1 - share).square() * far["sum_squares"], whole["sum_squares"], rtol=2e-5, atol=2e-5
    )
    chosen = torch.where(near["max_score"] >= far["max_score"], near["argmax"], far["argmax"] + cut)
    torch.testing.assert_close(chosen, whole["argmax"])


@everywhere
def test_of_keys_that_are_alike_the_lowest_is_named(name: str) -> None:
    q = torch.ones(1, 1, 50, 4)
    k = torch.ones(1, 1, 70, 4)
    _, found = run(name, q, k, None)
    assert found["argmax"].unique().tolist() == [0]
    k[:, :, 5] = k[:, :, 40] = k[:, :, 69] = 2
    _, found = run(name, q, k, None, window=30, offset=20)  # query i sees the keys i - 9 to i + 49
    expected = [5 if row <= 14 else 40 for row in range(50)]
    assert found["argmax"][0, 0].tolist() == expected
    k = torch.ones(1, 1, 1100, 4)
    k[:, :, 300] = k[:, :, 700] = k[:, :, 1090] = 2  # beyond any block
    _, found = run(name, q[:, :, :3], k, None)
    assert found["argmax"][0, 0].tolist() == [300, 300, 300]


@pytest.mark.parametrize("name", [name for name, limits in LIMITS.items() if limits.top])
def test_of_top_keys_that_are_alike_the_lowest_comes_first(name: str) -> None:
    _, found = run(name, torch.ones(1, 1, 20, 4), torch.ones(1, 1, 40, 4), None, top=4, causal=True)
    for row in range(20):
        assert found["top_keys"][0, 0, row].tolist() == [0, 1, 2, 3]
    _, found = run(name, torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), None, top=4, causal=True)
    assert found["top_keys"][0, 0].tolist() == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]]
    torch.testing.assert_close(found["top_weights"][0, 0, 1], torch.tensor([0.5, 0.5, 0.0, 0.0]))


# Scores in units of log 2 are rounded once more.
@pytest.mark.parametrize(("name", "tolerance"), [("reference", 1e-6), ("blockwise", 4e-6), ("cpu", 4e-6), ("triton", 3e-4)])
def test_entropy_keeps_its_digits_where_all_scores_are_large(name: str, tolerance: float) -> None:
    """lse and Σ p·s agree in their first digits here, so their difference has lost them; a sum of p·(s - max) has not."""
    random = torch.Generator().manual_seed(2)
    q, k = (torch.randint(-3, 4, (1, 4, 60, 8), generator=random).float() for _ in range(2))
    _, found = run(name, q, k, None, scale=0.125)
    _, moved = run(name, q, k, None, scale=0.125, key_bias=torch.full((60,), 4096.0))  # exact in float32
    torch.testing.assert_close(moved["entropy"], found["entropy"], rtol=0, atol=tolerance)
    torch.testing.assert_close(moved["sum_squares"], found["sum_squares"], rtol=0, atol=tolerance)


@everywhere
def test_one_query_and_one_key_are_certain(name: str) -> None:
    q, k, v = example(queries=1, keys=1)
    output, found = run(name, q, k, v, causal=True, pooled=64, rows=[0], features=torch.tensor([[7.0]]))
    torch.testing.assert_close(output, v.repeat_interleave(2, 1))
    score = (q * k.repeat_interleave(2, 1)).sum(-1) / 8**0.5
    torch.testing.assert_close(found["lse"], score, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["max_score"], score, rtol=1e-5, atol=1e-5)
    for field, value in {
        "p_max": 1.0,
        "sum_squares": 1.0,
        "received": 1.0,
        "rows": 1.0,
        "pooled": 1.0,
        "moments": 7.0,
        "entropy": 0.0,
    }.items():
        torch.testing.assert_close(found[field], torch.full_like(found[field], value), rtol=1e-6, atol=1e-6)
    assert not found["argmax"].any()


@everywhere
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_nothing_gives_nothing(name: str, batch: int, queries: int, keys: int) -> None:
    q, k, v = example(batch, queries, keys)
    output, found = run(name, q, k, v, pooled=2, causal=True, features=torch.ones(keys, 2))
    assert output.shape == (batch, 4, queries, 6)
    assert not output.any()
    assert found["pooled"].shape == (batch, 4, -(-queries // 2), -(-keys // 2))
    dead = {"lse": -torch.inf, "max_score": -torch.inf, "argmax": -1}
    if not keys or not queries or not batch:
        for field, value in found.items():
            assert (value == dead.get(field, 0)).all(), field


@everywhere
@pytest.mark.parametrize("hidden_by", ["mask", "bias", "key_bias", "causality", "window"])
@pytest.mark.parametrize("sink", [False, True])
def test_a_row_that_sees_no_key_is_dead(name: str, hidden_by: str, sink: bool) -> None:
    q, k, v = example(queries=20, keys=20)
    never = torch.full((20, 20), -torch.inf)
    options: dict[str, Any] = {
        "mask": {"mask": torch.zeros(20, 20, dtype=torch.bool)},
        "bias": {"bias": never},
        "key_bias": {"key_bias": never[0]},
        "causality": {"causal": True, "offset": -20},
        "window": {"window": 2, "offset": 21},
    }[hidden_by]
    if sink:
        options["sink"] = torch.zeros(4)
    output, found = run(name, q, k, v, **options, rows=[0, 7], pooled=16, features=torch.ones(20, 3))
    assert not output.any()
    dead = {"lse": -torch.inf, "max_score": -torch.inf, "argmax": -1}
    for field, value in found.items():
        assert (value == dead.get(field, 0)).all(), field


@everywhere
@pytest.mark.parametrize("place", ["query", "key", "bias"])
def test_nan_shows_in_the_rows_that_see_it_and_nowhere_else(name: str, place: str) -> None:
    q, k, v = example(queries=20, keys=20)
    options: dict[str, Any] = {
        "causal": True,
        "pooled": 20,
        "rows": list(range(20)),
        "features": torch.ones(20, 1),
        "bias": torch.zeros(20, 20),
    }
    clean_output, clean = run(name, q, k, v, **options)
    lost = torch.zeros(1, 4, 20, dtype=torch.bool)
    if place == "query":
        q[0, 1, 6] = torch.nan
        lost[0, 1, 6] = True
    elif place == "key":
        k[0, 1, 6] = torch.nan
        lost[0, 2:, 6:] = True
    else:
        options["bias"][6, 2] = torch.inf  # as good as NaN: it has no softmax
        lost[0, :, 6] = True
    output, found = run(name, q, k, v, **options)
    assert output.isnan()[lost].all()
    torch.testing.assert_close(output[~lost], clean_output[~lost], rtol=2e-5, atol=2e-5)
    for field in ("lse", "entropy", "p_max", "max_score", "sum_squares", "moments", "rows"):
        seen = found[field][lost] if field != "rows" else found["rows"][lost][:, 0]
        assert seen.isnan().all(), field
        torch.testing.assert_close(found[field][~lost], clean[field][~lost], rtol=2e-5, atol=2e-5)
    assert (found["argmax"][lost] == -1).all()
    torch.testing.assert_close(found["argmax"][~lost], clean["argmax"][~lost])
    touched = lost.any(-1)
    assert found["received"][touched][:, :7].isnan().all()
    assert found["pooled"][touched].isnan().all()
    torch.testing.assert_close(found["received"][~touched], clean["received"][~touched], rtol=2e-5, atol=2e-5)


@everywhere
def test_nan_behind_a_mask_is_not_seen(name: str) -> None:
    q, k, v = example()
    allowed = torch.ones(37, dtype=torch.bool)
    allowed[4] = False
    clean_output, clean = run(name, q, k, v, mask=allowed)
    k[:, :, 4] = torch.nan
    output, found = run(name, q, k, v, mask=allowed)
    torch.testing.assert_close(output, clean_output, rtol=2e-5, atol=2e-5)
    assert_same(found, clean)


@pytest.mark.parametrize("name", [name for name, limits in LIMITS.items() if limits.top])
def test_nan_has_no_top_keys(name: str) -> None:
    q, k, v = example()
    q[0, 3, 5] = torch.nan
    _, found = run(name, q, k, v, top=3)
    lost = torch.zeros(1, 4, 21, dtype=torch.bool)
    lost[0, 3, 5] = True
    assert (found["top_keys"][lost] == -1).all()
    assert found["top_weights"][lost].isnan().all()
    assert (found["top_keys"][~lost] >= 0).all()
    assert found["top_weights"][~lost].isfinite().all()


@everywhere
def test_numbers_that_overflow_half_precision_are_held(name: str) -> None:
    """Scores of some hundred thousand nats: above float16's largest number, and no reason for NaN."""
    q, k, v = (x.half() for x in example())
    output, found = run(name, q * 1000, k * 40, v, causal=True, scale=1.0)
    assert output.isfinite().all()
    assert all(value.isfinite().all() for value in found.values())
    torch.testing.assert_close(found["p_max"], torch.ones_like(found["p_max"]))


Q, K, V = example(batch=2, queries=3, keys=5)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q of three axes": ({"q": Q[0]}, ShapeError, r"q is \[4, 3, 8\].*give q as \[B, H, Q, D\]"),
    "k of five axes": ({"k": K[None]}, ShapeError, r"k is \[1, 2, 2, 5, 8\]"),
    "v of three axes": ({"v": V[0]}, ShapeError, r"v is \[2, 5, 6\].*give v as \[2, 2, 5, V\]"),
    "heads that cannot be shared": ({"q": Q[:, :3]}, ShapeError, "3 query heads cannot share 2 key/value heads"),
    "no key heads": ({"k": K[:, :0], "v": V[:, :0]}, ShapeError, "4 query heads cannot share 0"),
    "other batches": ({"k": K[:1], "v": V[:1]}, ShapeError, "batches of 2 and 1"),
    "other widths": ({"k": K[..., :7]}, ShapeError, "queries of width 8, keys of width 7"),
    "k and v of other lengths": ({"v": V[:, :, :4]}, ShapeError, r"v is \[2, 2, 4, 6\] beside k \[2, 2, 5, 8\]"),
    "k and v of other heads": ({"v": V[:, :1]}, ShapeError, r"v is \[2, 1, 5, 6\] beside k"),
    "integers": ({"q": Q.int()}, ShapeError, "q is torch.int32; attention needs floating-point"),
    "complex numbers": ({"q": Q.cfloat()}, ShapeError, "q is torch.complex64"),
    "float8": ({"q": Q.to(torch.float8_e4m3fn)}, ShapeError, "q is torch.float8_e4m3fn"),
    "mixed dtypes": ({"k": K.double()}, ShapeError, "bring them to one dtype"),
    "a mask of another shape": ({"mask": torch.ones(4, 5, dtype=torch.bool)}, ShapeError, r"mask is \[4, 5\]; it must broadcast"),
    "a mask of five axes": ({"mask": torch.ones(1, 1, 1, 1, 5, dtype=torch.bool)}, ShapeError, "mask is"),
    "a mask of numbers": ({"mask": torch.ones(3, 5)}, ShapeError, "give a bool mask"),
    "a bias of truths": ({"bias": torch.ones(3, 5, dtype=torch.bool)}, ShapeError, "pass a bool tensor as mask"),
    "a bias of another shape": ({"bias": torch.ones(3, 4)}, ShapeError, r"bias is \[3, 4\]; it must broadcast"),
    "a key bias of another length": ({"key_bias": torch.ones(4)}, ShapeError, r"key_bias is \[4\]"),
    "features of another length": ({"features": torch.ones(4, 2)}, ShapeError, r"features is \[4, 2\]"),
    "features without an axis": ({"features": torch.ones(5)}, ShapeError, r"features is \[5\]"),
    "a sink per key head": ({"sink": torch.ones(2)}, ShapeError, r"sink is \[2\]"),
    "a temperature per key head": ({"temperature": torch.ones(2)}, ShapeError, r"temperature is \[2\]"),
    "a temperature of zero": ({"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, InputError, "every head needs a positive one"),
    "a gate of whole numbers": ({"gate": torch.ones(4, dtype=torch.long)}, ShapeError, "gate is"),
    "a window of zero": ({"window": 0}, InputError, "window 0: give at least 1"),
    "a negative window": ({"window": -3}, InputError, "window -3"),
    "a softcap of zero": ({"softcap": 0.0}, InputError, "softcap 0.0"),
    "a softcap of NaN": ({"softcap": float("nan")}, InputError, "softcap nan"),
    "an infinite scale": ({"scale": float("inf")}, InputError, "scale inf"),
    "lengths in a batch": ({"lengths": [3]}, InputError, "lengths with a batch of 2"),
    "lengths that do not add up": ({"q": Q[:1], "k": K[:1], "v": V[:1], "lengths": [1, 1]}, InputError, r"lengths \[1, 1\] add up to 2"),
    "negative lengths": ({"q": Q[:1], "k": K[:1], "v": V[:1], "lengths": [4, -1], "key_lengths": [5, 0]}, InputError, "must be 0 or more"),
    "key lengths alone": ({"key_lengths": [5]}, InputError, "key_lengths without lengths"),
    "more lengths than key lengths": (
        {"q": Q[:1], "k": K[:1], "v": V[:1], "lengths": [1, 2], "key_lengths": [5]}, InputError, "2 sequences in lengths and 1",
    ),
    "tiles of zero": ({"pooled": 0}, InputError, "tiles of side 0"),
    "a negative top": ({"top": -1}, InputError, "top -1"),
    "a row that is not there": ({"rows": [3]}, SelectionError, "no query at position 3: there are 3 queries, positions -3 to 2"),
    "an unknown statistic": ({"keep": "variance"}, SelectionError, "no statistic 'variance'"),
}  # fmt: skip


@everywhere
@pytest.mark.parametrize("wrong", WRONG)
def test_what_makes_no_sense_is_refused(name: str, wrong: str) -> None:
    given_, error, text = WRONG[wrong]
    call: dict[str, Any] = {"q": Q, "k": K, "v": V, **given_}
    with pytest.raises(error, match=text):
        attention(call.pop("q"), call.pop("k"), call.pop("v"), implementation=name, **call)


def test_an_implementation_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SelectionError, match="triton, cpu, blockwise, reference"):
        attention(Q, K, V, implementation="flash")


@pytest.mark.parametrize(("name", "dtype", "top"), [("cpu", torch.float32, 2), ("cpu", torch.float64, 0), ("triton", torch.float64, 0)])
def test_an_implementation_that_cannot_do_it_says_so(name: str, dtype: torch.dtype, top: int) -> None:
    with pytest.raises(InputError, match=f"implementation '{name}' cannot do this: .+; choose another"):
        attention(Q.to(dtype), K.to(dtype), V.to(dtype), implementation=name, top=top)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_relevance_of_many_panels_agrees(softcap: float | None) -> None:
    random = torch.Generator().manual_seed(4)
    q, k, v, grad = (
        torch.randn(1, heads, count, 8, generator=random, dtype=torch.float64) for heads, count in ((4, 200), (2, 170), (2, 170), (4, 200))
    )
    found, expected = (
        relevance(q, k, v, grad, causal=True, window=90, softcap=softcap, epsilon=0.1, implementation=name)
        for name in ("blockwise", "reference")
    )
    for field in ("q", "k", "v", "rows", "columns"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-10, atol=1e-10)
