"""Every identity equals what the whole pattern says, for kernels that know nothing of statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.kernels import identities
from headscope.kernels.attention import attention
from headscope.kernels.errors import InputError, ShapeError
from headscope.kernels.lse_attention import LseAttention, ours, stock
from headscope.kernels.problem import Problem, make_problem

torch.set_num_threads(1)


def naive(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Somebody's kernel: it can do what `LseAttention` promises to ask of it, and no more."""
    assert min(q.numel(), k.numel(), v.numel()) > 0
    assert scale > 0
    assert q.shape[:2] == k.shape[:2] == v.shape[:2]
    assert q.dtype == k.dtype == v.dtype
    assert not any(x.isinf().any() for x in (q, k, v))
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k, v))
    scores = (q.float() @ k.float().mT if q.dtype != torch.float64 else q @ k.mT) * scale
    if causal:
        assert q.shape[2] == k.shape[2]
        scores = scores.masked_fill(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v), scores.logsumexp(-1)


KERNELS: dict[str, LseAttention] = {"stock": stock(), "blockwise": ours("blockwise"), "naive": naive}


@dataclass(frozen=True)
class Dense:
    """The twin: scores and pattern in float64, held whole."""

    scores: Tensor
    pattern: Tensor
    lse: Tensor

    @property
    def alive(self) -> Tensor:
        return self.lse != -torch.inf


def dense(problem: Problem, causal: bool, counted: Tensor | None = None, hidden: Tensor | None = None) -> Dense:
    """From the inputs as given; `counted` [B, Q] and `hidden` [B, K] say again what a mask says."""
    batch, heads, queries, _ = problem.q.shape
    keys = problem.k.shape[2]
    scores = torch.full((batch, heads, queries, keys), -torch.inf, dtype=torch.float64)
    for head in range(heads):
        k = problem.k[:, head // (heads // problem.k.shape[1])].double()
        scale = problem.scale / (1.0 if problem.temperature is None else float(problem.temperature[head]))
        scores[:, head] = scale * torch.einsum("bqd,bkd->bqk", problem.q[:, head].double(), k)
    if problem.key_bias is not None:
        scores = torch.where(torch.isneginf(problem.key_bias)[:, :, None], -torch.inf, scores + problem.key_bias.double()[:, :, None])
    for i in range(queries if causal else 0):
        scores[:, :, i, max(0, i + keys - queries + 1) :] = -torch.inf
    if hidden is not None:
        scores[hidden[:, None, None].expand_as(scores)] = -torch.inf
    if counted is not None:
        scores[~counted[:, None, :, None].expand_as(scores)] = -torch.inf
    if not keys:
        return Dense(scores, scores, scores.new_full(scores.shape[:3], -torch.inf))
    top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    pattern = torch.where(total > 0, weights / total, 0.0)
    return Dense(scores, pattern, (top + total.log())[..., 0])


@dataclass(frozen=True)
class Case:
    """How a problem is made; `size` is the standard deviation of q and k."""

    queries: int = 40
    keys: int = 40
    groups: int = 2
    causal: bool = False
    size: float = 1.0
    hide: int = 0  # keys at the end of the last batch entry, which hold NaN
    bias: bool = False
    temperature: bool = False


CASES = {
    "random": Case(),
    "causal": Case(causal=True),
    "sharp": Case(causal=True, size=6.6),
    "padded": Case(hide=13),
    "padded causal": Case(causal=True, hide=13, bias=True),
    "one key/value head": Case(groups=1, causal=True),
    "fewer queries": Case(queries=17, causal=True, bias=True),
    "more queries": Case(queries=40, keys=23, causal=True),
    "one query": Case(queries=1, causal=True),
    "temperature": Case(temperature=True, bias=True),
}


def build(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, case.queries, 16, generator=made, dtype=torch.float64) * case.size
    k = torch.randn(2, case.groups, case.keys, 16, generator=made, dtype=torch.float64) * case.size
    key_bias = torch.randn(2, 4, case.keys, generator=made) * 2 if case.bias else torch.zeros(2, 1, case.keys)
    if case.hide:
        key_bias[-1, :, case.keys - case.hide :] = -torch.inf
        k[-1, :, case.keys - case.hide :] = torch.nan
    return make_problem(
        q.to(dtype),
        k.to(dtype),
        causal=case.causal,
        key_bias=key_bias if case.bias or case.hide else None,
        temperature=torch.tensor([0.5, 1.0, 2.0, 4.0]) if case.temperature else None,
    )


def columns(count: int) -> Tensor:
    return torch.randn(1, 1, count, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def members(keys: int) -> Tensor:
    return torch.stack([torch.arange(keys) < 3, torch.arange(keys) % 2 == 0, torch.zeros(keys, dtype=torch.bool)])


def shifted(pattern: Tensor, offset: int) -> Tensor:
    """[B, H, Q], the probability of the key `offset` before the query's own, pair by pair."""
    queries, keys = pattern.shape[2:]
    found = torch.zeros(pattern.shape[:3], dtype=torch.float64)
    for i in range(queries):
        if 0 <= i + keys - queries - offset < keys:
            found[:, :, i] = pattern[:, :, i, i + keys - queries - offset]
    return found


def renyi(pattern: Tensor, order: float) -> Tensor:
    power = pattern.pow(order).sum(-1)
    return torch.where(power > 0, power.log() / (1 - order), 0.0)


# What is derived, what the whole pattern says, and the size of its largest possible value for K keys.
NUMBERS: dict[str, tuple[Callable[[LseAttention, Problem], Tensor], Callable[[Dense], Tensor], Callable[[int], float]]] = {
    "log_sum_exp": (identities.log_sum_exp, lambda d: d.lse, lambda n: 1),
    "entropy": (identities.entropy, lambda d: torch.special.entr(d.pattern).sum(-1), lambda n: 1),
    "sum_squares": (identities.sum_squares, lambda d: d.pattern.square().sum(-1), lambda n: 1),
    "renyi 0.5": (lambda kernel, p: identities.renyi_entropy(kernel, p, 0.5), lambda d: renyi(d.pattern, 0.5), lambda n: 1),
    "renyi 3": (lambda kernel, p: identities.renyi_entropy(kernel, p, 3.0), lambda d: renyi(d.pattern, 3.0), lambda n: 1),
    "effective_keys": (identities.effective_keys, lambda d: torch.where(d.alive, renyi(d.pattern, 2.0).exp(), 0.0), lambda n: n),
    "apply": (
        lambda kernel, p: identities.apply(kernel, p, columns(p.shape[3])),
        lambda d: d.pattern @ columns(d.pattern.shape[3]),
        lambda n: 3,
    ),
    "apply_transposed": (
        lambda kernel, p: identities.apply_transposed(kernel, p, columns(p.shape[2])),
        lambda d: d.pattern.mT @ columns(d.pattern.shape[2]),
        lambda n: 10,
    ),
    "received": (identities.received, lambda d: d.pattern.sum(-2), lambda n: 10),
    "segment_mass": (
        lambda kernel, p: identities.segment_mass(kernel, p, members(p.shape[3])),
        lambda d: torch.stack([d.pattern[..., row].sum(-1) for row in members(d.pattern.shape[3])], dim=-1),
        lambda n: 1,
    ),
    "mean_key": (identities.mean_key, lambda d: d.pattern @ torch.arange(d.pattern.shape[3]).double(), lambda n: n),
    "previous": (
        lambda kernel, p: identities.offset_probability(p, identities.log_sum_exp(kernel, p), 1),
        lambda d: shifted(d.pattern, 1),
        lambda n: 1,
    ),
    "next": (
        lambda kernel, p: identities.offset_probability(p, identities.log_sum_exp(kernel, p), -1),
        lambda d: shifted(d.pattern, -1),
        lambda n: 1,
    ),
}


def assert_near(found: Tensor, wanted: Tensor, near: float, name: str = "") -> None:
    assert found.shape == wanted.shape, name
    torch.testing.assert_close(found.double(), wanted, atol=near, rtol=near, msg=lambda text: f"{name}: {text}")


def tolerance(dtype: torch.dtype, scores: Tensor) -> float:
    """Float32 knows q·k to about 1e-7 of the largest score, so a number of it no better."""
    if dtype == torch.float64:
        return 3e-13
    return 1e-6 * max(2.0, float(scores[scores.isfinite()].abs().max()) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_an_identity_equals_the_whole_pattern(case: str, kernel: str, dtype: torch.dtype) -> None:
    problem = build(CASES[case], dtype)
    twin = dense(problem, CASES[case].causal)
    near = tolerance(dtype, twin.scores)
    for name, (derive, wanted, largest) in NUMBERS.items():
        assert_near(derive(KERNELS[kernel], problem), wanted(twin), near * largest(problem.shape[3]), name)


# Half precision rounds inputs before both; what is left is the kernel's own arithmetic, whose exp() is coarse on a CPU.
HALF = {
    "log_sum_exp": 1e-4, "entropy": 2e-3, "sum_squares": 1e-4, "renyi 0.5": 3e-4, "renyi 3": 3e-4, "effective_keys": 2e-4, "apply": 2e-2,
    "apply_transposed": 3e-2, "received": 3e-4, "segment_mass": 2e-4, "mean_key": 5e-4, "previous": 1e-4, "next": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_half_precision_keeps_what_lse_keeps(case: str, kernel: str, dtype: torch.dtype) -> None:
    problem = build(CASES[case], dtype)
    twin = dense(problem, CASES[case].causal)
    for name, (derive, wanted, largest) in NUMBERS.items():
        found = derive(KERNELS[kernel], problem)
        assert found.dtype == torch.float32
        assert_near(found, wanted(twin), HALF[name] * (largest(problem.shape[3]) if name in ("mean_key", "effective_keys") else 1), name)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 2),
    groups=st.integers(1, 2),
    share=st.integers(1, 3),
    queries=st.integers(0, 9),
    keys=st.integers(0, 9),
    width=st.integers(0, 5),
    causal=st.booleans(),
    masked=st.sampled_from(["nothing", "keys", "queries"]),
    scale=st.sampled_from([0.4, -0.7, 0.0, 3.0]),
    kernel=st.sampled_from(sorted(KERNELS)),
    seed=st.integers(0, 2**16),
)
def test_any_shape_has_its_numbers(
    batch: int,
    groups: int,
    share: int,
    queries: int,
    keys: int,
    width: int,
    causal: bool,
    masked: str,
    scale: float,
    kernel: str,
    seed: int,
) -> None:
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, groups * share, width, generator=made, dtype=torch.float64).transpose(1, 2)
    k = torch.randn(batch, groups, width, keys, generator=made, dtype=torch.float64).mT  # the last axis is not contiguous
    hidden = torch.rand(batch, keys, generator=made) > 0.6
    counted = torch.rand(batch, queries, generator=made) > 0.2
    mask = {"keys": ~hidden[:, None, None], "queries": counted[:, None, :, None]}.get(masked)
    problem = make_problem(q, k, scale=scale, causal=causal, mask=mask)
    twin = dense(problem, causal, counted if masked == "queries" else None, hidden if masked == "keys" else None)
    for name, (derive, wanted, _) in NUMBERS.items():
        assert_near(derive(KERNELS[kernel], problem), wanted(twin), 1e-11, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["random", "causal", "sharp", "padded causal", "fewer queries", "more queries", "temperature"])
def test_two_patterns_compare_as_their_maps_do(case: str, kernel: str, dtype: torch.dtype) -> None:
    a, b = build(CASES[case], dtype, 1), build(replace(CASES[case], groups=4), dtype, 2)
    first, second = dense(a, CASES[case].causal), dense(b, CASES[case].causal)
    largest = max(float(d.scores[d.scores.isfinite()].abs().max()) for d in (first, second))
    near = 5e-4 * max(4.0, largest) if dtype == torch.bfloat16 else 2 * max(tolerance(dtype, first.scores), tolerance(dtype, second.scores))
    seen = first.pattern > 0
    kl = torch.where(seen, first.pattern * (first.scores - second.scores), 0.0).sum(-1)
    kl = torch.where(first.alive, kl - first.lse + second.lse, 0.0)
    product = (first.pattern * second.pattern).sum(-1)
    norms = first.pattern.square().sum((-2, -1)).sqrt() * second.pattern.square().sum((-2, -1)).sqrt()
    assert_near(identities.divergence(KERNELS[kernel], a, b), kl, near)
    assert_near(identities.overlap(KERNELS[kernel], a, b), product, near)
    assert_near(identities.map_cosine(KERNELS[kernel], a, b), product.sum(-1) / norms, near)


def test_patterns_of_other_scale_and_width_compare_too() -> None:
    made = torch.Generator().manual_seed(3)
    a = make_problem(*torch.randn(2, 1, 2, 20, 8, generator=made, dtype=torch.float64), scale=0.3, causal=True)
    b = make_problem(*torch.randn(2, 1, 2, 20, 5, generator=made, dtype=torch.float64), scale=-0.9, causal=True)
    product = (dense(a, True).pattern * dense(b, True).pattern).sum(-1)
    assert_near(identities.overlap(stock(), a, b), product, 1e-13)
    b = replace(b, scale=0.9)
    with pytest.raises(InputError, match=r"scales 0.3 and 0.9"):
        identities.overlap(stock(), replace(a, q=a.q.half(), k=a.k.half()), replace(b, q=b.q.half(), k=b.k.half()))


def test_a_pattern_is_one_with_itself() -> None:
    problem = build(CASES["padded causal"], torch.float64)
    assert_near(identities.map_cosine(naive, problem, problem), torch.ones(2, 4, dtype=torch.float64), 1e-13)
    assert_near(identities.divergence(naive, problem, problem), torch.zeros(2, 4, 40, dtype=torch.float64), 1e-13)


def test_divergence_is_infinite_exactly_where_a_key_is_hidden_from_the_second() -> None:
    q, k = torch.randn(2, 1, 1, 6, 4, dtype=torch.float64)
    full, causal = make_problem(q, k), make_problem(q, k, causal=True)
    hiding = make_problem(q, k, causal=True, mask=(torch.arange(6) != 2)[None, None, None])
    assert torch.isinf(identities.divergence(naive, full, causal)).flatten().tolist() == [True] * 5 + [False]
    assert torch.isinf(identities.divergence(naive, causal, hiding)).flatten().tolist() == [False] * 2 + [True] * 4
    assert torch.isfinite(identities.divergence(naive, hiding, causal)).all()
    dead = make_problem(q, k, mask=(torch.arange(6) != 1)[None, None, :, None])
    assert torch.isinf(identities.divergence(naive, full, dead)).flatten().tolist() == [False, True, False, False, False, False]
    assert identities.divergence(naive, dead, full)[0, 0, 1] == 0
    assert torch.isfinite(identities.divergence(naive, causal, full)).all()


def test_two_patterns_overlap_where_both_see_the_key() -> None:
    q, k = torch.randn(2, 1, 1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visible = (torch.arange(6) != 2)[None, None, None]
    full, causal, hiding = make_problem(q, k), make_problem(q, k, causal=True), make_problem(q, k, causal=True, mask=visible)
    maps = [dense(full, False), dense(causal, True), dense(hiding, True, hidden=~visible[0, 0])]
    for a, first in zip((full, causal, hiding), maps, strict=True):
        for b, second in zip((full, causal, hiding), maps, strict=True):
            assert_near(identities.overlap(naive, a, b), (first.pattern * second.pattern).sum(-1), 1e-13)


def test_only_equal_shapes_compare() -> None:
    a, b = build(CASES["random"], torch.float32), build(CASES["more queries"], torch.float32)
    with pytest.raises(ShapeError, match=r"\[2, 4, 40, 40\].*\[2, 4, 40, 23\]"):
        identities.overlap(stock(), a, b)


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
@pytest.mark.parametrize("case", ["random", "sharp", "padded causal", "fewer queries", "more queries"])
def test_identities_equal_the_statistics_of_one_pass(case: str, implementation: str) -> None:
    problem = build(replace(CASES[case], hide=0), torch.float32)
    twin = dense(problem, CASES[case].causal)
    _, statistics = attention(
        problem.q, problem.k, None, causal=CASES[case].causal, key_bias=problem.key_bias, keep="all", implementation=implementation
    )
    for derive, name in (
        (identities.log_sum_exp, "lse"),
        (identities.entropy, "entropy"),
        (identities.sum_squares, "sum_squares"),
        (identities.received, "received"),
    ):
        once = getattr(statistics, name)
        assert_near(derive(stock(), problem), once.double(), 10 * tolerance(torch.float32, twin.scores))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_constant_added_to_a_row_changes_lse_alone(kernel: str) -> None:
    made = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 2, 30, 8, generator=made, dtype=torch.float64)
    more = torch.cat([q, 50 * torch.rand(1, 2, 30, 1, generator=made, dtype=torch.float64)], dim=-1)
    ones = torch.cat([k, torch.ones(1, 2, 30, 1, dtype=torch.float64)], dim=-1)
    plain, moved = make_problem(q, k, scale=0.5), make_problem(more, ones, scale=0.5)
    assert_near(identities.log_sum_exp(KERNELS[kernel], moved) - 0.5 * more[..., -1], identities.log_sum_exp(KERNELS[kernel], plain), 1e-13)
    for name in ("entropy", "sum_squares", "received", "apply", "mean_key"):
        assert_near(NUMBERS[name][0](KERNELS[kernel], moved), NUMBERS[name][0](KERNELS[kernel], plain), 1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_order_of_the_keys_does_not_matter(kernel: str) -> None:
    problem = build(Case(bias=True), torch.float64)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert problem.key_bias is not None
    moved = make_problem(problem.q, problem.k[:, :, order], key_bias=problem.key_bias[:, :, order])
    for name in ("log_sum_exp", "entropy", "sum_squares"):
        assert_near(NUMBERS[name][0](KERNELS[kernel], moved), NUMBERS[name][0](KERNELS[kernel], problem), 1e-13)
    assert_near(identities.received(KERNELS[kernel], moved), identities.received(KERNELS[kernel], problem)[:, :, order], 1e-13)


def test_given_lse_saves_the_call_and_changes_nothing() -> None:
    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        calls.append(scale)
        return naive(q, k, v, scale=scale, causal=causal)

    problem = build(CASES["causal"], torch.float32)
    lse = identities.log_sum_exp(counted, problem)
    for cost, half_cost, derive in (
        (1, 4, identities.entropy),
        (1, 1, identities.sum_squares),
        (1, 1, identities.effective_keys),
        (1, 1, identities.received),
    ):
        for asked, wanted in ((problem, cost), (replace(problem, q=problem.q.bfloat16(), k=problem.k.bfloat16()), half_cost)):
            lse = identities.log_sum_exp(naive, asked)
            calls.clear()
            found = derive(counted, asked, lse=lse)
            assert len(calls) == wanted
            assert torch.equal(found, derive(naive, asked))


def test_scores_of_heads_are_means_of_their_stripes() -> None:
    problem = build(CASES["padded causal"], torch.float64)
    twin, lse = dense(problem, True), identities.log_sum_exp(stock(), problem)
    visible = twin.pattern > 0
    for found, offset, first in (
        (identities.previous_token_score(problem, lse), 1, 1),
        (identities.duplicate_score(problem, lse, 10), 10, 10),
        (identities.induction_score(problem, lse, 10), 9, 10),
    ):
        rows = torch.arange(first, 40)
        wanted = twin.pattern[:, :, rows, rows - offset].sum(-1) / visible[:, :, rows, rows - offset].sum(-1)
        assert_near(found, wanted, 1e-13)


def test_an_induction_head_scores_one_and_nothing_else_does() -> None:
    period, keys = 6, 18
    place = torch.eye(keys, dtype=torch.float64) * 40
    asked = torch.roll(place, -(period - 1), dims=0)  # query i holds the place i - (period - 1) of a key
    asked[period - 1 :] = place[: keys - period + 1]
    problem = make_problem(asked[None, None], place[None, None], scale=1.0, causal=True)
    lse = identities.log_sum_exp(stock(), problem)
    assert identities.induction_score(problem, lse, period).item() == pytest.approx(1.0)
    assert identities.duplicate_score(problem, lse, period).item() == pytest.approx(0.0)
    assert identities.previous_token_score(problem, lse).item() < 0.2
    with pytest.raises(InputError, match="period 0"):
        identities.induction_score(problem, lse, 0)


def test_a_stripe_that_no_row_reaches_scores_zero() -> None:
    problem = make_problem(*torch.randn(2, 1, 2, 1, 4), causal=True)
    lse = identities.log_sum_exp(stock(), problem)
    assert torch.equal(identities.previous_token_score(problem, lse), torch.zeros(1, 2))
    assert torch.equal(identities.duplicate_score(problem, lse, 5), torch.zeros(1, 2))


def test_chosen_pairs_have_the_probabilities_of_the_map() -> None:
    problem = build(CASES["padded causal"], torch.float64)
    twin, lse = dense(problem, True), identities.log_sum_exp(stock(), problem)
    queries, keys = torch.arange(40).repeat_interleave(40), torch.arange(40).repeat(40)
    found = identities.pair_probability(problem, lse, queries, keys)
    assert_near(found.unflatten(-1, (40, 40)), twin.pattern, 1e-13)
    with pytest.raises(InputError, match="no key at 40 or at 40: there are 40"):
        identities.pair_probability(problem, lse, torch.tensor([0]), torch.tensor([40]))
    with pytest.raises(ShapeError, match="one length"):
        identities.pair_probability(problem, lse, queries, keys[:3])


def test_distance_is_counted_from_where_a_query_stands() -> None:
    for case in ("causal", "fewer queries", "more queries"):
        problem = build(CASES[case], torch.float64)
        twin = dense(problem, True)
        queries, keys = twin.pattern.shape[2:]
        apart = (torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)).double()
        assert_near(identities.mean_distance(stock(), problem), (twin.pattern * apart).sum(-1), 1e-11)
    with pytest.raises(InputError, match="not causal"):
        identities.mean_distance(stock(), build(CASES["random"], torch.float64))


def test_far_positions_are_kept_apart_in_half_precision() -> None:
    made = torch.Generator().manual_seed(0)
    problem = make_problem(*torch.randn(2, 1, 1, 1500, 16, generator=made).bfloat16(), causal=True)
    wanted = dense(problem, True).pattern @ torch.arange(1500).double()
    assert (identities.mean_key(stock(), problem) - wanted).abs().max() < 0.3  # 1024 and 1028 are neighbours in bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_budget_adds_up_to_the_log_of_the_number_of_keys(dtype: torch.dtype) -> None:
    for case in CASES.values():
        problem = build(case, dtype)
        lse = identities.log_sum_exp(stock(), problem)
        visible = None if problem.key_bias is None else ~torch.isneginf(problem.key_bias)
        spent = identities.budget(identities.entropy(stock(), problem), identities.received(stock(), problem), lse=lse, keys=visible)
        near = 3e-3 if dtype == torch.bfloat16 else 1e-4 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(spent.diffuse + spent.routing + spent.hub, spent.total, atol=1e-5, rtol=0)
        count = case.keys - torch.tensor([0, case.hide])[:, None].expand(2, 4)
        torch.testing.assert_close(spent.total, count.to(spent.total.dtype).log())
        assert all(bool((part > -near).all()) for part in (spent.diffuse, spent.routing, spent.hub))
        mean = dense(problem, case.causal)
        flat = (mean.pattern.sum(-2) / mean.alive.sum(-1, keepdim=True)).double()
        torch.testing.assert_close(spent.hub.double(), count.double().log() - torch.special.entr(flat).sum(-1), atol=near, rtol=0)


def test_the_three_ways_to_spend_a_budget() -> None:
    keys = 12
    place = torch.eye(keys, dtype=torch.float64) * 40
    uniform = make_problem(torch.zeros(1, 1, keys, keys, dtype=torch.float64), place[None, None])
    moved = make_problem(place[torch.randperm(keys, generator=torch.Generator().manual_seed(0))][None, None], place[None, None])
    sink = make_problem(place[4].expand(1, 1, keys, keys), place[None, None])
    for problem, wanted in ((uniform, [1.0, 0.0, 0.0]), (moved, [0.0, 1.0, 0.0]), (sink, [0.0, 0.0, 1.0])):
        spent = identities.budget(identities.entropy(naive, problem), identities.received(naive, problem))
        assert spent.shares()[0, 0].tolist() == pytest.approx(wanted, abs=1e-12)


def test_a_budget_of_nothing_is_zero() -> None:
    one = identities.budget(torch.zeros(1, 1, 3), torch.full((1, 1, 1), 3.0))
    assert one.shares().tolist() == [[[0.0, 0.0, 0.0]]]
    dead = identities.budget(torch.zeros(1, 1, 3), torch.zeros(1, 1, 4), lse=torch.full((1, 1, 3), -torch.inf))
    assert dead.shares().tolist() == [[[0.0, 0.0, 0.0]]]
    with pytest.raises(ShapeError, match=r"entropy is \[1, 3\]"):
        identities.budget(torch.zeros(1, 3), torch.zeros(1, 1, 4))


def test_nan_in_a_query_stays_in_its_row() -> None:
    problem = build(CASES["random"], torch.float64)
    clean = identities.entropy(naive, problem)
    problem.q[0, 1, 7, 3] = torch.nan
    found = identities.entropy(naive, problem)
    assert found[0, 1, 7].isnan()
    assert found.isnan().sum() == 1
    assert torch.equal(found[1], clean[1])


def test_a_kernel_with_a_softcap_of_its_own_is_found_by_an_impossible_entropy() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        scores = 5 * torch.tanh(scale * q @ k.mT / 5)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    with pytest.raises(InputError, match=r"an entropy of -.* nats over 40 keys"):
        identities.entropy(capped, build(Case(size=4.0), torch.float32))


def test_columns_and_members_that_do_not_fit_are_refused() -> None:
    problem = build(CASES["random"], torch.float32)
    with pytest.raises(ShapeError, match=r"x is \[2, 3, 40, 1\]"):
        identities.apply(stock(), problem, torch.zeros(2, 3, 40, 1))
    with pytest.raises(ShapeError, match=r"u is \[2, 4, 39, 1\]"):
        identities.apply_transposed(stock(), problem, torch.zeros(2, 4, 39, 1))
    with pytest.raises(ShapeError, match="give bool"):
        identities.segment_mass(stock(), problem, torch.zeros(2, 40))
    with pytest.raises(ShapeError, match=r"lse is \[1, 4, 40\]; give that of the same problem, \[B, H, Q\] = \[2, 4, 40\]"):
        identities.received(stock(), problem, lse=torch.zeros(1, 4, 40))
    with pytest.raises(InputError, match="order -1"):
        identities.renyi_entropy(stock(), problem, -1)


def test_order_one_is_the_entropy() -> None:
    problem = build(CASES["causal"], torch.float64)
    assert torch.equal(identities.renyi_entropy(stock(), problem, 1), identities.entropy(stock(), problem))
    near_one = identities.renyi_entropy(stock(), problem, 1 + 1e-6)
    torch.testing.assert_close(near_one, identities.entropy(stock(), problem), atol=1e-5, rtol=0)


def test_effective_keys_of_a_uniform_row_are_all_it_sees() -> None:
    problem = make_problem(torch.zeros(1, 1, 5, 4), torch.randn(1, 1, 5, 4), causal=True)
    torch.testing.assert_close(identities.effective_keys(stock(), problem)[0, 0], torch.arange(1.0, 6.0))
    assert math.log(5) == pytest.approx(identities.entropy(stock(), problem)[0, 0, -1].item(), abs=1e-6)
