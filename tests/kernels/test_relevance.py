"""Relevance and gradients through one attention are those of the published rules, whatever computes them, and are conserved.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.kernels import reference
from headscope.kernels.backward import GRADIENT, Relevance, Rule
from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.kernels.problem import Wanted, make_problem
from headscope.kernels.relevance import NAMES, choose_backward, relevance
from tests.kernels.dense import dense, numbers, visible
from tests.kernels.strategies import Call, Limits, calls
from tests.kernels.test_agreement import error_of_scores

FIELDS = ("q", "k", "v", "rows", "columns")
FAST = ("blockwise", "triton")
RULES: dict[str, dict[str, Any]] = {
    "gradient": {"rule": "gradient"},
    "plain": {},
    "stabilised": {"epsilon": 0.3, "epsilon_scores": 0.5},
}
# B, H, G, Q, K, D, V
SIZES = {
    "square": (2, 4, 2, 40, 40, 8, 8),
    "wide": (1, 3, 1, 19, 50, 5, 7),
    "tall": (1, 2, 2, 50, 19, 16, 20),
    "small": (1, 2, 1, 20, 20, 8, 8),
}


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(size: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, groups, queries, keys, width, value_width = SIZES[size]
    shapes = (batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, value_width)
    q, k, v, grad = (randoms(*shape, seed=seed).to(dtype) for seed, shape in enumerate((*shapes, (batch, heads, queries, value_width))))
    return q, k, v, grad


def size_for(name: str) -> str:
    """Triton's interpreter is slow."""
    return "small" if name == "triton" else "square"


def structure(feature: str, size: str) -> dict[str, Any]:
    batch, heads, _, queries, keys, _, _ = SIZES[size]
    found: dict[str, dict[str, Any]] = {
        "nothing": {},
        "scale": {"scale": -0.7},
        "causal": {"causal": True},
        "offset": {"causal": True, "offset": 3},
        "window": {"causal": True, "window": 7},
        "two-sided window": {"window": 5},
        "softcap": {"softcap": 1.5},
        "bias": {"bias": randoms(1, heads, queries, keys, seed=7)},
        "mask": {"mask": randoms(batch, 1, queries, keys, seed=8) > 0, "causal": True},
        "dead rows": {"mask": randoms(1, 1, queries, 1, seed=9) > 0, "sink": randoms(heads)},
        "key bias": {"key_bias": randoms(batch, 1, keys, seed=10)},
        "temperature": {"temperature": torch.linspace(0.5, 2, heads), "scale": 1.0},
        "gate": {"gate": torch.linspace(-1, 1, heads + 1)[:-1].double()},
        "sink": {"sink": randoms(heads, seed=11), "causal": True},
        "everything": {
            "causal": True, "window": 20, "softcap": 2.0, "bias": randoms(1, 1, queries, keys, seed=12),
            "mask": randoms(1, 1, 1, keys) > -1,
            "key_bias": randoms(keys, seed=13), "temperature": torch.linspace(0.5, 2, heads), "gate": randoms(heads, seed=14),
            "sink": randoms(heads, seed=15),
        },
    }  # fmt: skip
    if batch == 1:
        found["packed"] = {
            "causal": True,
            "lengths": [queries // 3, 0, queries - queries // 3],
            "key_lengths": [keys // 2, 1, keys - keys // 2 - 1],
        }
    return found.get(feature, {"causal": True})


FEATURES = (
    "nothing", "scale", "causal", "offset", "window", "two-sided window", "softcap", "bias", "mask", "dead rows", "key bias", "temperature",
    "gate", "sink", "everything", "packed",
)  # fmt: skip


def assert_same(found: Relevance, expected: Relevance, tolerance: float, least: float = 1e-3) -> None:
    """Equal to `tolerance` of the largest entry of each field."""
    for field in FIELDS:
        one, other = numbers(getattr(found, field)), numbers(getattr(expected, field))
        assert one.shape == other.shape
        largest = max(least, np.abs(other).max(initial=0))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * largest, err_msg=field)


def rules_in_full(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, epsilon: float, epsilon_scores: float, **given: Any) -> dict[str, Any]:
    """Relevance of q, k, v, of the rows and columns of the pattern, of biases and the sink, head by head, each rule as it is published.

    A product z = Σ_j a_j b_j: a_j and b_j get a_j b_j / (2z + ε sign z) of the relevance of z. Softmax: x_j (R_j - p_j ΣR).
    """
    found = dense(q, k, v, **given)[1]
    q_, k_, v_, grad_ = (numbers(tensor) for tensor in (q, k, v, grad))
    of_q, of_k, of_v = np.zeros_like(q_), np.zeros_like(k_), np.zeros_like(v_)
    rows, columns = np.zeros(q_.shape[:3]), np.zeros((*q_.shape[:2], k_.shape[2]))
    taken = {"in": 0.0, "epsilon": 0.0, "softmax": 0.0, "added": 0.0, "sink": 0.0}
    scale = given.get("scale", q.shape[3] ** -0.5)

    def share(relevance: Any, whole: Any, epsilon: float) -> Any:
        return relevance / (2 * whole + epsilon * np.where(whole < 0, -1, 1))

    for b, h in np.ndindex(q_.shape[:2]):
        g = h // (q_.shape[1] // k_.shape[1])
        p = found["pattern"][b, h]
        z = p @ v_[b, g]
        r_z = z * grad_[b, h] * (numbers(given["gate"])[h] if "gate" in given else 1)
        part = share(r_z, np.where(z == 0, 1, z), epsilon)
        terms = p[:, :, None] * v_[b, g][None] * part[:, None, :]  # [Q, K, V]
        r_p = terms.sum(axis=2)
        of_v[b, g] += terms.sum(axis=0)
        rows[b, h], columns[b, h] = r_p.sum(axis=1), r_p.sum(axis=0)
        u = q_[b, h] @ k_[b, g].T
        s = u * scale / (numbers(given["temperature"])[h] if "temperature" in given else 1)
        if "softcap" in given:
            s = given["softcap"] * np.tanh(s / given["softcap"])
        flow = r_p - p * r_p.sum(axis=1, keepdims=True)  # times a score: what it gets
        whole = np.where(np.isneginf(found["scores"][b, h]), 0, found["scores"][b, h])
        r_s = s * flow
        terms = q_[b, h][:, None, :] * k_[b, g][None] * share(r_s, u, epsilon_scores)[:, :, None]  # [Q, K, D]
        of_q[b, h], of_k[b, g] = terms.sum(axis=1), of_k[b, g] + terms.sum(axis=0)
        lost_sink = 0.0
        if "sink" in given:
            alive = p.sum(axis=1) > 0
            lost_sink = float((numbers(given["sink"])[h] * np.where(alive, 1 - p.sum(axis=1), 0) * -r_p.sum(axis=1)).sum())
        taken["in"] += r_z.sum()
        taken["epsilon"] += r_z.sum() - 2 * r_p.sum() + r_s.sum() - 2 * terms.sum()
        taken["softmax"] += r_p.sum() - (whole * flow).sum() - lost_sink
        taken["added"] += ((whole - s) * np.where(p == 0, 0, flow)).sum()
        taken["sink"] += lost_sink
    return {"q": of_q, "k": of_k, "v": of_v, "rows": rows, "columns": columns, "taken": taken}


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    """An attention to differentiate: float64, the whole pattern, every factor written out."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    k, v = (torch.repeat_interleave(tensor, heads // k.shape[1], dim=1) for tensor in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * given.get("scale", q.shape[3] ** -0.5)
    if "temperature" in given:
        scores = scores / given["temperature"].double()[:, None, None]
    if "softcap" in given:
        scores = torch.tanh(scores / given["softcap"]) * given["softcap"]
    if "bias" in given:
        scores = scores + given["bias"].double()
    if "key_bias" in given:
        key_bias = given["key_bias"].double()
        scores = scores + (key_bias if key_bias.dim() == 1 else key_bias[:, :, None, :])
    allowed = torch.from_numpy(
        visible(
            queries,
            keys,
            **{name: given.get(name) for name in ("offset", "window", "lengths", "key_lengths")},
            causal=given.get("causal", False),
        )
    )
    if "mask" in given:
        allowed = allowed & given["mask"]
    weights = torch.exp(scores - scores.detach().amax(dim=-1, keepdim=True)) * allowed
    total = weights.sum(dim=-1, keepdim=True)
    if "sink" in given:
        total = total + torch.exp(given["sink"].double()[:, None, None] - scores.detach().amax(dim=-1, keepdim=True))
    z = (weights / torch.where(total == 0, 1.0, total)) @ v
    return z * given["gate"].double()[:, None, None] if "gate" in given else z


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_is_that_of_autograd(size: str, feature: str) -> None:
    q, k, v, grad = inputs(size)
    given = structure(feature, size)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    expected = torch.autograd.grad(softmax_attention(*leaves, **given), leaves, grad)
    for name in ("reference", "blockwise", *(["stock"] if "stock" in possible(size, feature, "gradient") else [])):
        found = relevance(q, k, v, grad, rule="gradient", implementation=name, **given)
        for one, other in zip((found.q, found.k, found.v), expected, strict=True):
            np.testing.assert_allclose(numbers(one), numbers(other), rtol=0, atol=1e-12, err_msg=name)
        torch.testing.assert_close(found.rows.sum(dim=(0, 2)), found.columns.sum(dim=(0, 2)))


def possible(size: str, feature: str, rule: str) -> list[str]:
    """The implementations that take this call."""
    q, k, v, grad = inputs(size)
    found = []
    for name in NAMES[1:]:
        try:
            relevance(q, k, v, grad, implementation=name, **RULES[rule], **structure(feature, size))
        except InputError:
            continue
        found.append(name)
    return found


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("epsilons", [(0.0, 0.0), (0.3, 0.0), (0.2, 0.7)])
@pytest.mark.parametrize("size", ["square", "wide"])
def test_the_relevance_is_that_of_the_published_rules(size: str, feature: str, epsilons: tuple[float, float]) -> None:
    q, k, v, grad = inputs(size)
    given = structure(feature, size)
    expected = rules_in_full(q, k, v, grad, *epsilons, **given)
    for name in ("reference", "blockwise"):
        found = relevance(q, k, v, grad, epsilon=epsilons[0], epsilon_scores=epsilons[1], implementation=name, **given)
        of_inputs = {"q": q * found.q, "k": k * found.k, "v": v * found.v, "rows": found.rows, "columns": found.columns}
        for field, value in of_inputs.items():
            np.testing.assert_allclose(numbers(value), expected[field], rtol=0, atol=1e-11, err_msg=f"{name} {field}")


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("epsilons", [(0.0, 0.0), (0.3, 0.5)])
def test_what_arrives_is_passed_on_or_taken_in_by_a_named_place(feature: str, epsilons: tuple[float, float]) -> None:
    q, k, v, grad = inputs("square")
    given = structure(feature, "square")
    taken = rules_in_full(q, k, v, grad, *epsilons, **given)["taken"]
    found = relevance(q, k, v, grad, epsilon=epsilons[0], epsilon_scores=epsilons[1], implementation="blockwise", **given)
    of_q, of_k, of_v = (float((x * g).sum()) for x, g in ((q, found.q), (k, found.k), (v, found.v)))
    losses = sum(taken[name] for name in ("epsilon", "softmax", "added", "sink"))
    assert of_q + of_k + of_v == pytest.approx(taken["in"] - losses, abs=1e-10)
    assert of_q == pytest.approx(of_k, abs=1e-11)
    assert of_v == pytest.approx(float(found.rows.sum()), abs=1e-11)
    assert of_v == pytest.approx(float(found.columns.sum()), abs=1e-11)
    if epsilons == (0.0, 0.0):
        assert taken["epsilon"] == pytest.approx(0, abs=1e-10)
        assert of_v == pytest.approx(taken["in"] / 2, abs=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", SIZES)
def test_torch_by_itself_gives_the_same_where_it_can(size: str, rule: str) -> None:
    taken = 0
    for feature in ("nothing", "scale", "causal", "gate"):
        if "stock" in possible(size, feature, rule):
            given = structure(feature, size) | RULES[rule]
            q, k, v, grad = inputs(size)
            assert_same(
                relevance(q, k, v, grad, implementation="stock", **given),
                relevance(q, k, v, grad, implementation="reference", **given),
                1e-13,
            )
            taken += 1
    assert taken == {"square": 4, "wide": 0, "tall": 0, "small": 4}[size] * (rule != "stabilised")


@pytest.mark.parametrize("rule", ["gradient", "stabilised"])
@pytest.mark.parametrize("feature", FEATURES)
def test_triton_gives_the_same(feature: str, rule: str) -> None:
    size = "tall" if feature in ("causal", "dead rows") else "wide"
    given = structure(feature, size) | RULES[rule]
    q, k, v, grad = inputs(size, torch.float32)
    expected = relevance(q, k, v, grad, implementation="reference", **given)
    assert_same(relevance(q, k, v, grad, implementation="triton", **given), expected, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["triton", "stock", "blockwise"])
def test_half_precision_is_kept_and_summed_in_single(name: str, dtype: torch.dtype) -> None:
    q, k, v, grad = inputs(size_for(name), dtype)
    found = relevance(q, k, v, grad, causal=True, implementation=name)
    assert {found.q.dtype, found.k.dtype, found.v.dtype} == {dtype}
    assert {found.rows.dtype, found.columns.dtype} == {torch.float32}
    expected = relevance(q, k, v, grad, causal=True, implementation="reference")
    assert_same(found, expected, 4e-2 if dtype == torch.bfloat16 else 3e-3)


def assert_any_call_agrees(name: str, call: Call, rule: dict[str, Any], seed: int) -> None:
    assume(call.v is not None)
    assert call.v is not None
    given = {key: value for key, value in call.structure.items() if key != "features"} | rule
    grad = randoms(*call.q.shape[:3], call.v.shape[3], seed=seed).to(call.q.dtype)
    found = relevance(call.q, call.k, call.v, grad, implementation=name, **given)
    expected = relevance(call.q, call.k, call.v, grad, implementation="reference", **given)
    # P is off by at most twice the error of a score; all else is a sum of products with P.
    half = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}.get(call.q.dtype, 1e-6 if call.q.dtype == torch.float32 else 1e-14)
    gate = float(call.structure["gate"].abs().max()) if "gate" in call.structure else 1.0
    q, k, v, g = (float(tensor.abs().max()) if tensor.numel() else 0.0 for tensor in (call.q, call.k, call.v, grad * gate))
    error = 4 * error_of_scores(call) + half
    if rule.get("epsilon"):
        error *= 1 + 2 * v / rule["epsilon"]
    if rule.get("epsilon_scores"):
        error *= 1 + 2e-5 * q * k * call.q.shape[3] / rule["epsilon_scores"]
    factor = abs(call.structure.get("scale", call.q.shape[3] ** -0.5)) * 2
    cells, sums = 2 * call.v.shape[3] * g * v, call.q.shape[2] * (call.q.shape[1] // call.k.shape[1])
    sizes = {"q": factor * cells * k, "k": factor * cells * q * sums, "v": g * sums, "rows": cells, "columns": cells * call.q.shape[2]}
    for field, size in sizes.items():
        one, other = getattr(found, field), getattr(expected, field)
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_allclose(numbers(one), numbers(other), rtol=0, atol=error * size + 1e-30, err_msg=field)


@pytest.mark.parametrize(("name", "dtypes", "size", "examples"), [
    ("blockwise", (torch.float64, torch.float32, torch.bfloat16), 70, 120), ("triton", (torch.float32, torch.bfloat16), 34, 12),
])  # fmt: skip
def test_any_call_gives_what_the_reference_gives(name: str, dtypes: tuple[torch.dtype, ...], size: int, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(calls(Limits(dtypes=dtypes, size=size, top=False)), st.sampled_from(sorted(RULES)), st.integers(0, 99))
    def agrees(call: Call, rule: str, seed: int) -> None:
        assert_any_call_agrees(name, call, RULES[rule], seed)

    agrees()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["plain", "stabilised"])
def test_zeros_in_half_precision_pass_finite_numbers(name: str, rule: str) -> None:
    if name == "stock" and rule == "stabilised":
        pytest.skip("torch's own backward has no epsilon_scores")
    q, k, v, grad = inputs(size_for(name), torch.float16)
    for zero in ("v", "all") if name == "triton" else ("q", "k", "v", "all"):
        some = [torch.zeros_like(tensor) if zero in (key, "all") else tensor for key, tensor in (("q", q), ("k", k), ("v", v))]
        found = relevance(*some, grad, implementation=name, **RULES[rule])
        assert all(bool(getattr(found, field).isfinite().all()) for field in FIELDS)


@pytest.mark.parametrize("name", ["triton", "blockwise", "reference"])
def test_epsilon_takes_everything_in_where_the_output_is_zero_and_without_it_the_limit_is_half(name: str) -> None:
    q, k, v, grad = inputs(size_for(name), torch.float32)
    none = relevance(q, k, torch.zeros_like(v), grad, epsilon=1e-3, implementation=name)
    assert all(not getattr(none, field).any() for field in FIELDS)
    flat = torch.zeros_like(q)
    none = relevance(flat, k, v, grad, epsilon_scores=1e-3, implementation=name)
    assert not none.q.any()
    assert none.v.any()
    for softcap in (None, 2.0):  # at q = 0 the cap has slope 1 under either rule
        limit = relevance(flat, k, v, grad, softcap=softcap, implementation=name)
        whole = relevance(flat, k, v, grad, softcap=softcap, rule="gradient", implementation=name)
        torch.testing.assert_close(limit.q, whole.q / 4, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(limit.v, whole.v / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["triton", "blockwise", "reference"])
def test_a_tiny_negative_output_is_passed_on_like_a_positive_one(name: str) -> None:
    q, k, v, grad = inputs(size_for(name), torch.float32)
    epsilon = 1e-6
    found = relevance(q, k, v * 1e-7, grad, epsilon=epsilon, implementation=name)
    other = relevance(q, k, v * -1e-7, grad, epsilon=epsilon, implementation=name)
    assert_same(found, Relevance(-other.q, -other.k, other.v, -other.rows, -other.columns), 1e-5, least=1e-12)
    assert float((v * 1e-7 * found.v).abs().sum()) < float(grad.abs().sum()) * 1e-6  # no division by 2z + ε that is nearly 0


@pytest.mark.parametrize("name", ["triton", "blockwise", "reference"])
@pytest.mark.parametrize("rule", ["gradient", "plain"])
def test_dead_rows_pass_nothing_on(name: str, rule: str) -> None:
    q, k, v, grad = inputs(size_for(name), torch.float32)
    mask = torch.ones(1, 1, q.shape[2], 1, dtype=torch.bool)
    mask[:, :, 3:17] = False
    found = relevance(q, k, v, grad, mask=mask, implementation=name, **RULES[rule])
    assert not found.q[:, :, 3:17].any()
    assert not found.rows[:, :, 3:17].any()
    alone = [torch.cat([tensor[:, :, :3], tensor[:, :, 17:]], dim=2) for tensor in (q, grad)]
    expected = relevance(alone[0], k, v, alone[1], implementation="reference", **RULES[rule])
    for field in ("k", "v", "columns"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_a_query_stays_in_its_row_and_in_the_keys_it_sees(name: str) -> None:
    q, k, v, grad = inputs("square", torch.float32)
    q[1, 2, 9, 0] = torch.nan
    found = relevance(q, k, v, grad, causal=True, implementation=name)
    row = torch.zeros(2, 4, 40, dtype=torch.bool)
    row[1, 2, 9] = True
    assert torch.equal(found.q.isnan().any(dim=-1), row)
    assert torch.equal(found.rows.isnan(), row)
    for tensor in (found.k, found.v):
        broken = tensor.isnan().any(dim=-1)  # [B, G, K]
        assert broken[1, 1, :10].all()
        assert not broken[0].any()
        assert not broken[1, 0].any()


def test_a_gate_of_zero_passes_nothing_on_and_the_rest_as_a_factor() -> None:
    q, k, v, grad = inputs("square")
    gate = torch.tensor([0.0, 1.0, -2.0, 0.0], dtype=torch.float64)
    found = relevance(q, k, v, grad, gate=gate, epsilon=0.1)
    assert not found.q[:, [0, 3]].any()
    expected = relevance(q, k, v, grad * gate[:, None, None], epsilon=0.1)
    assert_same(found, expected, 1e-13)


@pytest.mark.parametrize("name", ["triton", "blockwise"])
def test_an_output_and_lse_that_are_given_are_not_computed_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = inputs(size_for(name), torch.float32)
    given: dict[str, Any] = {"causal": True, "gate": torch.tensor([0.0, 1.0, -2.0, 0.5])[: q.shape[1]], "sink": torch.zeros(q.shape[1])}
    output, statistics = reference.run(make_problem(q, k, v, **given), Wanted(frozenset({"lse"})))
    expected = relevance(q, k, v, grad, implementation=name, **given)
    monkeypatch.setattr("headscope.kernels.choose.choose", None)
    assert_same(relevance(q, k, v, grad, output=output, lse=statistics.lse, implementation=name, **given), expected, 1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that any operator returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return found


@pytest.mark.parametrize(("name", "given"), [("blockwise", {"causal": True, "softcap": 3.0}), ("stock", {"causal": True})])
def test_memory_does_not_grow_with_the_map(name: str, given: dict[str, Any]) -> None:
    length = 2048
    q, k, v, grad = (randoms(1, 2, length, 16, seed=seed).float() for seed in range(4))
    with LargestTensor() as seen:
        relevance(q, k, v, grad, implementation=name, epsilon=0.1, **given)
    assert 2 * length * 16 <= seen.largest < length * length // 2


def test_triton_gives_the_same_bits_each_time() -> None:
    q, k, v, grad = inputs("tall", torch.float32)
    first, second = (relevance(q, k, v, grad, causal=True, implementation="triton") for _ in range(2))
    assert all(torch.equal(getattr(first, field), getattr(second, field)) for field in FIELDS)


@pytest.mark.parametrize("name", ["triton", "blockwise"])
def test_tensors_may_lie_in_any_order_in_memory(name: str) -> None:
    q, k, v, grad = (tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in inputs(size_for(name), torch.float32))
    heads, length = q.shape[1:3]
    bias = randoms(length, length, heads).permute(2, 0, 1)[None]
    found = relevance(q, k, v, grad, bias=bias, mask=bias > -1, implementation=name)
    plain = [tensor.contiguous() for tensor in (q, k, v, grad)]
    assert_same(found, relevance(*plain, bias=bias, mask=bias > -1, implementation="reference"), 3e-6)


def test_the_result_belongs_to_no_graph_and_leaves_the_inputs_alone() -> None:
    q, k, v, grad = inputs("square")
    for tensor in (q, k, v):
        tensor.requires_grad_()
    for name in ("stock", "blockwise", "reference"):
        found = relevance(q, k, v, grad, implementation=name, rule="gradient")
        assert not any(getattr(found, field).requires_grad for field in FIELDS)
        assert all(tensor.grad is None for tensor in (q, k, v))


def test_autocast_does_not_reach_in() -> None:
    q, k, v, grad = inputs("square", torch.float32)
    expected = relevance(q, k, v, grad)
    with torch.autocast("cpu", torch.bfloat16):
        found = relevance(q, k, v, grad)
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
@pytest.mark.parametrize("name", [None, "triton", "stock", "blockwise", "reference"])
def test_nothing_gives_nothing(name: str | None, empty: str) -> None:
    batch, queries, keys = (0 if empty == axis else 3 for axis in ("batch", "queries", "keys"))
    q, k, v, grad = (torch.ones(batch, 2, length, 4) for length in (queries, keys, keys, queries))
    found = relevance(q, k, v, grad, implementation=name)
    assert (found.q.shape, found.k.shape, found.v.shape) == (q.shape, k.shape, v.shape)
    assert not any(getattr(found, field).any() for field in FIELDS)


def test_the_fastest_that_can_do_it_is_chosen() -> None:
    q, k, v, _ = inputs("square")

    def chosen(rule: Rule | None = None, **structure: Any) -> str:
        return choose_backward(make_problem(q, k, v, **structure), rule or Rule(splits=True))

    assert chosen() == chosen(causal=True) == chosen(Rule(True, epsilon=0.1)) == chosen(GRADIENT) == "stock"
    assert chosen(Rule(True, epsilon_scores=0.1)) == "blockwise"
    for structure in ({"softcap": 1.0}, {"window": 3}, {"causal": True, "offset": 2}):
        assert chosen(**structure) == "blockwise"


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"rule": "cp"}, SelectionError, "no rule 'cp': there are attnlrp, gradient"),
        ({"implementation": "flash"}, SelectionError, "no implementation 'flash': there are triton, stock, blockwise, reference"),
        ({"epsilon": -1.0}, InputError, "epsilon -1.0: give 0 or a positive number"),
        ({"epsilon_scores": float("nan")}, InputError, "epsilon_scores nan: give 0 or a positive number"),
        ({"rule": "gradient", "epsilon": 0.1}, InputError, "epsilon 0.1 beside rule='gradient', which has none: leave it at 0"),
        ({"implementation": "stock", "softcap": 1.0}, InputError, "implementation 'stock' cannot do this: softcap changes the scores"),
        ({"implementation": "stock", "window": 2}, InputError, "knows no window, packing or causality other than"),
        ({"implementation": "triton"}, InputError, "implementation 'triton' cannot do this: Triton's products have no float64"),
        ({"grad": torch.ones(2, 4, 40, 7).double()}, ShapeError, "grad is [2, 4, 40, 7] of torch.float64 on cpu; give [2, 4, 40, 8]"),
        ({"grad": torch.ones(2, 4, 40, 8)}, ShapeError, "of torch.float32 on cpu; give [2, 4, 40, 8] of torch.float64 on cpu"),
        ({"lse": torch.ones(2, 4, 39)}, ShapeError, "lse is [2, 4, 39] of torch.float32 on cpu; give [2, 4, 40] of torch.float32"),
        ({"output": torch.ones(1, 4, 40, 8)}, ShapeError, "output is [1, 4, 40, 8]"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_in_words(given: dict[str, Any], error: type[Exception], text: str) -> None:
    q, k, v, grad = inputs("square")
    with pytest.raises(error) as caught:
        relevance(q, k, v, given.pop("grad", grad), **given)
    assert text in str(caught.value)
