"""Every number of a head equals what the whole map says in float64, whatever the model did to hide, share or pad its tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.health.heads import average, measure_call, summaries
from headscope.probe.health.inputs import Tokens
from headscope.probe.health.measures import HEAD_FIELDS, HeadMeasures
from headscope.probe.health.visibility import Views

torch.set_num_threads(1)

N = 8
BOUNDED = ("sigma_low", "sigma_high", "contrast_low", "contrast_high")


def call_of(q: Tensor, k: Tensor, *, kind: str = "self", **more: object) -> AttentionCall:
    site = AttentionSite("layers.0.attn#0", "layers.0.attn", 0, 0, kind, q.shape[1], k.shape[1], q.shape[3], q.shape[3], "sdpa")
    return AttentionCall(site, 0, q, k, None, **more)  # type: ignore[arg-type]


def call_with(scores: Tensor, causal: bool = False) -> AttentionCall:
    """One sample and one head whose scores are these: the keys are the unit vectors."""
    return call_of(scores[None, None].clone(), torch.eye(scores.shape[1], dtype=scores.dtype)[None, None], is_causal=causal)


def dense(scores: Tensor, seen: Tensor, special: Tensor | None = None, square: bool = True) -> dict[str, float]:
    """All numbers of one head from its scores [n, m] and what may be seen of them: rows and columns that do not count are cut out."""
    s, v = scores.double().numpy(), seen.numpy()
    n, m = s.shape
    p = np.zeros((n, m))
    for i in range(n):
        e = np.exp(s[i, v[i]] - s[i, v[i]].max())
        p[i, v[i]] = e / e.sum()
    visible = v.sum(1)
    entropy = np.array([-sum(x * math.log(x) for x in row if x > 0) for row in p])
    many = visible > 1
    c = p.sum(0)
    used = v.any(0)
    mean = c / c.sum()
    spread = -sum(x * math.log(x) for x in mean if x > 0)
    total = math.log(used.sum())
    by = v.sum(0)
    alpha = np.where(by * 4 >= by.max(), c / np.maximum(by, 1), 0)
    squares = (p**2).sum(1)
    between = p @ p.T / np.sqrt(np.outer(squares, squares))
    cosines = between[~np.eye(n, dtype=bool)]
    variance = np.array([s[i, v[i]].var() for i in range(n)])
    floors = []
    for i in range(n):
        t, sigma = visible[i], math.sqrt(visible[i] * variance[i])
        if t > 1:
            beta = math.exp(-sigma * math.sqrt(t / (t - 1)))
            floors.append(math.log(1 + (t - 1) * beta) + sigma * math.sqrt(t * (t - 1)) * beta / (1 + (t - 1) * beta))
    distance = np.array([[abs(i - j) for j in range(m)] for i in range(n)])
    found = {
        "entropy": entropy.mean(),
        "entropy_share": (entropy[many] / np.log(visible[many])).mean(),
        "diffuse": entropy.mean() / total,
        "routing": (spread - entropy.mean()) / total,
        "hub": (total - spread) / total,
        "p_max": p.max(1).mean(),
        "effective_keys": (1 / squares).mean(),
        "effective_share": (1 / squares / visible)[many].mean(),
        "sum_squares": squares.mean(),
        "sink": alpha.max(),
        "first_mass": p[:, int(used.argmax())].mean(),
        "row_residual": 1 - (c**2).sum() / (n * squares.sum()),
        "row_cosine": float(cosines.mean()),
        "sigma": np.linalg.svd(p)[1][0],
        "contrast": np.linalg.svd(p - p.mean(0))[1][0],
        "max_score": s[v].max(),
        "score_variance": variance[many].mean(),
        "entropy_floor": float(np.mean(floors)),
    }
    if special is not None:
        found["special_mass"] = p[:, special.numpy()].sum(1).mean()
    if square:
        below = [p[i, i - 1] for i in range(1, n) if v[i, i - 1]]
        found |= {
            "distance": (p * distance).sum(1).mean(),
            "own": np.diag(p).mean(),
            "previous": float(np.mean(below)) if below else math.nan,
            "column_deviation": np.abs(c - 1).mean(),
        }
        if not np.triu(v, 1).any():
            found["contraction"] = np.diag(p)[many].max()
    return {name: float(value) for name, value in found.items()}


def agree(measured: HeadMeasures, head: int, wanted: dict[str, float], near: float) -> None:
    numbers = {name: float(value[head]) for name, value in measured.numbers().items()}
    for name, value in wanted.items():
        if name in ("sigma", "contrast"):
            assert numbers[f"{name}_low"] <= value + 30 * near, name
            assert value <= numbers[f"{name}_high"] + max(30 * near, near**0.5), name
        else:
            assert numbers[name] == pytest.approx(value, abs=near * max(1, abs(value))), name
    for name in set(HEAD_FIELDS) - set(wanted) - set(BOUNDED) - {"sink_key"}:
        assert math.isnan(numbers[name]), name
        assert measured.undefined[name], name


def lower(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def patterns() -> dict[str, tuple[Tensor, bool]]:
    uniform, identity, sink, previous = (torch.zeros(N, N, dtype=torch.float64) for _ in range(4))
    identity.fill_diagonal_(800.0)  # exp(-800) is 0 in float64: the pattern is exact
    sink[:, 0] = 800.0
    previous[torch.arange(1, N), torch.arange(N - 1)] = 800.0
    return {
        "uniform": (uniform, False),
        "identity": (identity, False),
        "sink": (sink, False),
        "causal uniform": (uniform, True),
        "previous token": (previous, True),
    }


@pytest.mark.parametrize("name", patterns())
def test_a_pattern_known_in_advance_has_the_numbers_that_the_whole_map_has(name: str) -> None:
    scores, causal = patterns()[name]
    seen = lower(N) if causal else torch.ones(N, N, dtype=torch.bool)
    agree(measure_call(call_with(scores, causal), steps=4), 0, dense(scores, seen), 1e-12)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("uniform", {"diffuse": 1, "routing": 0, "hub": 0, "row_cosine": 1, "sink": 1 / N, "sigma_high": 1, "distance": 2.625}),
        ("identity", {"diffuse": 0, "routing": 1, "hub": 0, "row_cosine": 0, "own": 1, "distance": 0, "row_residual": 1 - 1 / N}),
        ("sink", {"diffuse": 0, "routing": 0, "hub": 1, "sink": 1, "sink_key": 0, "row_residual": 0, "sigma_low": N**0.5}),
        ("causal uniform", {"entropy_share": 1, "contraction": 0.5, "distance": 1.75, "effective_share": 1, "keys": 4.5}),
        ("previous token", {"previous": 1, "distance": 7 / 8, "p_max": 1, "contraction": 0, "first_mass": 0.25}),
    ],
)
def test_numbers_that_can_be_said_by_hand(name: str, known: dict[str, float]) -> None:
    scores, causal = patterns()[name]
    found = measure_call(call_with(scores, causal))
    for field, value in known.items():
        got = found.keys if field == "keys" else float(found.numbers()[field][0])
        assert got == pytest.approx(value, abs=1e-12), field


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from((2, 3, 9, 70)),
    causal=st.booleans(),
    sharp=st.sampled_from((0.3, 2.0, 8.0)),
    exact=st.booleans(),
)
def test_random_heads_with_shared_keys_equal_the_whole_map(seed: int, size: int, causal: bool, sharp: float, exact: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if exact else torch.float32
    q = (torch.randn(2, 4, size, 5, generator=made, dtype=torch.float64) * sharp).to(dtype)
    k = (torch.randn(2, 2, size, 5, generator=made, dtype=torch.float64) + 1).to(dtype)
    seen = lower(size) if causal else torch.ones(size, size, dtype=torch.bool)
    special = torch.rand(2, size, generator=made) < 0.3
    summed = summaries(call_of(q, k, is_causal=causal, scale=0.4), Tokens(special=special), steps=2, seed=0, views=Views())
    site = call_of(q, k).site
    scores = 0.4 * q.double() @ k.double().repeat_interleave(2, dim=1).mT
    near = 1e-9 if exact else 3e-6 * max(2.0, float(scores.abs().max()) / 2)
    for head in range(4):
        each = [dense(scores[b, head], seen, special[b]) for b in range(2)]
        both = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
        both["max_score"] = max(one["max_score"] for one in each)
        agree(average(site, summed, 1), head, both, near)


def by_mask(q: Tensor, k: Tensor, seen: Tensor, **more: object) -> AttentionCall:
    return call_of(q, k, mask=seen[:, None], **more)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("as_bias", [True, False])
def test_padding_on_either_side_changes_no_number(causal: bool, left: bool, as_bias: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 3, 9, 4), torch.randn(1, 3, 9, 4)
    alone = measure_call(call_of(q, k, is_causal=causal), steps=2)
    junk = torch.randn(2, 1, 3, 4, 4) * 50
    q4, k4 = (torch.cat([junk[i], x] if left else [x, junk[i]], dim=2) for i, x in enumerate((q, k)))
    real = torch.ones(1, 13, dtype=torch.bool)
    real[:, :4] = not left
    real[:, 9:] &= left
    real[:, 4:9] = True
    real = torch.arange(13)[None] >= 4 if left else torch.arange(13)[None] < 9
    seen = real[:, None] & (lower(13) if causal else torch.ones(13, 13, dtype=torch.bool))  # padding rows see keys too
    if as_bias:
        bias = torch.zeros(1, 1, 13, 13).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
        padded = call_of(q4, k4, bias=bias)
    else:
        padded = by_mask(q4, k4, seen)
    found = measure_call(padded, Tokens(counts=real), steps=2)
    assert (found.queries, found.causal, found.square) == (9, causal, True)
    for name in set(HEAD_FIELDS) - {"sink_key"}:
        torch.testing.assert_close(found.numbers()[name], alone.numbers()[name], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(found.sink_key, alone.sink_key + (4 if left else 0))


def test_batch_order_changes_nothing_and_samples_of_any_length_are_weighted_by_their_rows() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(3, 2, 10, 4, dtype=torch.float64), torch.randn(3, 2, 10, 4, dtype=torch.float64)
    real = torch.arange(10)[None] < torch.tensor([[10], [4], [7]])
    seen = real[:, None] & lower(10)
    one = measure_call(by_mask(q, k, seen), Tokens(counts=real))
    turned = measure_call(by_mask(q.flip(0), k.flip(0), seen.flip(0)), Tokens(counts=real.flip(0)))
    singles = [measure_call(by_mask(q[b : b + 1], k[b : b + 1], seen[b : b + 1]), Tokens(counts=real[b : b + 1])) for b in range(3)]
    for name in set(HEAD_FIELDS) - {"sink_key", "max_score", "special_mass"}:
        torch.testing.assert_close(one.numbers()[name], turned.numbers()[name])
        mean = sum(single.queries * single.numbers()[name] for single in singles) / 21
        torch.testing.assert_close(one.numbers()[name], mean)
    assert one.queries == 21


def test_repeating_the_keys_of_a_group_changes_nothing() -> None:
    torch.manual_seed(2)
    q, k = torch.randn(1, 6, 12, 4, dtype=torch.float64), torch.randn(1, 2, 12, 4, dtype=torch.float64)
    shared, repeated = measure_call(call_of(q, k, is_causal=True)), measure_call(call_of(q, k.repeat_interleave(3, 1), is_causal=True))
    for name in HEAD_FIELDS:
        torch.testing.assert_close(shared.numbers()[name], repeated.numbers()[name], equal_nan=True)


def test_a_common_offset_of_the_scores_changes_only_the_largest_score() -> None:
    scores = torch.randn(N, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain, moved = (measure_call(call_with(s, True)) for s in (scores, scores + 3.0))
    for name in set(HEAD_FIELDS) - {"max_score"}:
        torch.testing.assert_close(plain.numbers()[name], moved.numbers()[name], equal_nan=True)
    torch.testing.assert_close(plain.max_score + 3.0, moved.max_score)


@pytest.mark.parametrize("what", ["window", "packed", "bias", "softcap", "materialised"])
def test_structure_that_needs_the_rows_gives_the_same_numbers_as_the_whole_map(what: str) -> None:
    made = torch.Generator().manual_seed(4)
    q, k = (torch.randn(1, 2, 40, 6, generator=made, dtype=torch.float64) * 2 for _ in range(2))
    scores, seen = q @ k.mT * 0.5, lower(40)
    place = torch.arange(40)
    more: dict[str, object] = {"scale": 0.5}
    if what == "window":
        seen = seen & (place[:, None] - place < 5)
    elif what == "packed":
        seen = seen & (place[:, None] // 16 == place // 16)
    elif what == "bias":
        more["bias"] = torch.randn(1, 2, 40, 40, generator=made, dtype=torch.float64)
        scores = scores + more["bias"]
    elif what == "softcap":
        more["softcap"] = 3.0
        scores = 3.0 * (scores / 3.0).tanh()
    call = by_mask(q, k, seen[None], **more)
    if what == "materialised":
        call = call_of(q, k)
        call.rewritten = True
        call.materialised_scores = scores.masked_fill(~seen, torch.finfo(torch.float64).min)
        call.materialised = call.materialised_scores.softmax(-1)
    found = measure_call(call, steps=3)
    assert found.causal
    for head in range(2):
        agree(found, head, dense(scores[0, head], seen), 1e-10)


def test_panels_of_any_height_agree_with_the_streamed_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    q, k = torch.randn(2, 2, 30, 4, dtype=torch.float64), torch.randn(2, 2, 30, 4, dtype=torch.float64)
    streamed = measure_call(call_of(q, k), steps=2)
    monkeypatch.setattr("headscope.probe.health.panel_readings._CELLS", 0)  # 8 rows at a time
    walked = measure_call(call_of(q, k, bias=torch.randn(1, 1, 30, 1, dtype=torch.float64).expand(1, 1, 30, 30)), steps=2)
    for name in set(HEAD_FIELDS) - {"max_score"}:
        torch.testing.assert_close(streamed.numbers()[name], walked.numbers()[name], equal_nan=True)


def test_special_queries_can_be_left_out_while_their_keys_stay() -> None:
    made = torch.Generator().manual_seed(6)
    scores = torch.randn(N, N, generator=made, dtype=torch.float64)
    special = torch.tensor([[True, *[False] * 6, True]])
    for causal in (False, True):
        seen = lower(N) if causal else torch.ones(N, N, dtype=torch.bool)
        found = measure_call(call_with(scores, causal), Tokens(special=special, ignore_special=True))
        wanted = dense(scores[1:7], seen[1:7], special[0], square=False)
        assert found.queries == 6
        for name in ("entropy", "routing", "sink", "row_residual", "row_cosine", "special_mass", "score_variance", "max_score"):
            assert float(found.numbers()[name][0]) == pytest.approx(wanted[name], abs=1e-12), name
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)[1:7]
        place = torch.arange(N)
        assert float(found.distance) == pytest.approx(float((p * (place[1:7, None] - place).abs()).sum(1).mean()), abs=1e-12)
        assert "do not count" in found.undefined["column_deviation"]


def test_a_sink_column_is_no_key_and_its_share_is_the_special_mass() -> None:
    made = torch.Generator().manual_seed(7)
    scores = torch.randn(N, N, generator=made, dtype=torch.float64)
    plain, sunk = call_with(scores, True), call_with(scores, True)
    sunk.sink = torch.tensor([1.5], dtype=torch.float64)
    without, found = measure_call(plain), measure_call(sunk)
    for name in set(HEAD_FIELDS) - {"special_mass"}:
        torch.testing.assert_close(without.numbers()[name], found.numbers()[name])
    lse = scores.masked_fill(~lower(N), -torch.inf).logsumexp(-1)
    assert float(found.special_mass) == pytest.approx(float(torch.sigmoid(1.5 - lse).mean()), abs=1e-12)


def test_cross_attention_has_no_distances_and_says_so() -> None:
    torch.manual_seed(8)
    found = measure_call(call_of(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 9, 4), kind="cross"))
    for name in ("distance", "own", "previous", "column_deviation"):
        assert found.undefined[name] == "queries and keys are not the same tokens"
    assert found.undefined["contraction"] == "the attention is not causal"
    assert not found.square
    assert bool(found.entropy.isfinite().all())


def test_one_token_and_dead_rows_are_undefined_with_a_reason_and_not_a_number_about_health() -> None:
    one = measure_call(call_of(torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4), is_causal=True), steps=2)
    for name in ("entropy_share", "diffuse", "routing", "hub", "row_cosine", "contrast_low", "score_variance"):
        assert bool(getattr(one, name).isnan().all()), name
        assert "one" in one.undefined[name]
    dead = measure_call(by_mask(torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)))
    assert dead.queries == 0
    assert "no row counts" in dead.undefined["entropy"]
    assert dead.sink_key.tolist() == [-1, -1]


@pytest.mark.parametrize("way", ["streamed", "panels"])
def test_one_head_of_nan_is_undefined_and_the_others_keep_their_numbers(way: str) -> None:
    torch.manual_seed(9)
    q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    q[0, 1, 3, 0] = math.nan
    call = call_of(q, k, is_causal=True) if way == "streamed" else call_of(q, k, is_causal=True, softcap=50.0)
    found = measure_call(call, steps=2)
    for name in ("entropy", "routing", "row_cosine", "sigma_high", "distance", "max_score"):
        value = getattr(found, name)
        assert not value[0].isnan(), name
        assert value[1].isnan(), name
        assert found.undefined[name] == "NaN or infinity in the queries or keys"
    assert found.sink_key[1] == -1


def test_a_step_behind_a_cache_stands_at_its_last_key() -> None:
    torch.manual_seed(10)
    k = torch.randn(1, 1, 7, 4, dtype=torch.float64)
    q = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    found = measure_call(call_of(q, k))
    p = (q @ k.mT).softmax(-1)[0, 0, 0]
    assert float(found.own) == pytest.approx(float(p[6]))
    assert float(found.previous) == pytest.approx(float(p[5]))
    assert float(found.distance) == pytest.approx(float((p * torch.arange(6, -1, -1)).sum()))
    assert found.causal


def test_measures_survive_being_written_and_read() -> None:
    torch.manual_seed(11)
    found = measure_call(call_of(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)))
    again = HeadMeasures.from_dict(found.to_dict())
    for name in HEAD_FIELDS:
        torch.testing.assert_close(again.numbers()[name], found.numbers()[name], equal_nan=True)
    assert again.undefined == found.undefined
    assert replace(again, calls=1).site == found.site
