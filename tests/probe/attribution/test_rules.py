"""Every rule is the one in its paper: naive twins in terms of relevance R, not gradients; float64, number by number, no shared code.

Letters: B batch, H heads, Q queries, K keys, D width of a head. R_y is the relevance of an output, R_x that of an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope.kernels.errors import SelectionError
from headscope.probe.attribution import functions
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.rules import GAMMA, IDENTITY, RULE_SETS, rule_set


class Run(nn.Module):
    """A function of named tensors as a model; the extra output makes no difference to relevance."""

    def __init__(self, run: Callable[..., Tensor], **weights: Tensor) -> None:
        super().__init__()
        self.run = run
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight))

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.run(**inputs, **dict(self.named_parameters()))


def ours(run: Callable[..., Tensor], method: str = "attnlrp", weights: dict[str, Tensor] | None = None, **inputs: Tensor) -> Any:
    """(R of every input, R_y): the target is Σ w·y with random w, so that R_y = w·y."""
    model = Run(run, **(weights or {})).eval()
    with torch.no_grad():
        y = model(**inputs)
    w = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    result = attribute(model, inputs, lambda out: (out * w).sum(), method, heads=False, layers=False)
    assert result.ledger is None or result.ledger.closes, result.ledger
    return result, y * w


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# -- the rules, naive ------------------------------------------------------------------------------------------------


def linear_rule(x: Tensor, weight: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """R_i = Σ_j W_ji x_i / y_j R_j for one row x [I], weight [J, I]: Achtibat et al. 2024, equation 5 (ε → 0)."""
    return torch.stack([sum(weight[j, i] * x[i] / y[j] * r[j] for j in range(len(y))) for i in range(len(x))])  # type: ignore[arg-type]


def gamma_rule(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, r: Tensor, gamma: float) -> Tensor:
    """Montavon et al. 2019, section 10.2.3, for signed inputs: contributions of the output's own sign weigh 1 + γ."""
    found = torch.zeros_like(x)
    for j in range(len(y)):
        parts = [float(weight[j, i] * x[i]) for i in range(len(x))] + [float(bias[j])]
        weighed = [z * (1 + gamma) if z * float(y[j]) > 0 else z for z in parts]
        for i in range(len(x)):
            found[i] += weighed[i] / sum(weighed) * r[j]
    return found


def softmax_rule(x: Tensor, r: Tensor) -> Tensor:
    """R_i = x_i (R_i - s_i Σ_j R_j): Achtibat et al. 2024, equation 13 (proposition 3.1)."""
    s = torch.exp(x) / torch.exp(x).sum()
    return torch.stack([x[i] * (r[i] - s[i] * r.sum()) for i in range(len(x))])


def product_rule(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """O = A B: R_A[i, k] = Σ_j A_ik B_kj R_ij / (2 O_ij), and so for B: equation 15 (proposition 3.3)."""
    o = a @ b
    ra, rb = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(a.shape[0]):
        for k in range(a.shape[1]):
            for j in range(b.shape[1]):
                part = a[i, k] * b[k, j] * r[i, j] / (2 * o[i, j])
                ra[i, k] += part
                rb[k, j] += part
    return ra, rb


def rows(rule: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """A rule on every row of [.., I]."""
    flat = [t.reshape(-1, t.shape[-1]) for t in (x, *others)]
    return torch.stack([rule(*row) for row in zip(*flat, strict=True)]).reshape(x.shape)


# -- one operation at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_map_passes_relevance_as_it_contributes(biased: bool) -> None:
    x, weight, bias = draw(3, 5), draw(4, 5, seed=1), draw(4, seed=2) if biased else torch.zeros(4, dtype=torch.float64)
    result, r = ours(lambda x, w, b: F.linear(x, w, b), weights={"w": weight, "b": bias}, x=x)
    y = x @ weight.T + bias
    assert close(result.inputs["x"], rows(lambda a, y, r: linear_rule(a, weight, y, r), x, y, r))
    kept = sum(bias[j] / y[i, j] * r[i, j] for i in range(3) for j in range(4))
    assert abs(result.ledger.by_kind().get("bias", 0.0) - float(kept)) < 1e-10


def test_a_convolution_is_the_linear_map_that_it_is() -> None:
    x, weight, bias = draw(1, 2, 6, 6), draw(3, 2, 3, 3, seed=1), draw(3, seed=2)
    result, r = ours(lambda x, w, b: F.conv2d(x, w, b, stride=3), weights={"w": weight, "b": bias}, x=x)
    basis = torch.eye(72, dtype=torch.float64).reshape(72, 2, 6, 6)
    matrix = F.conv2d(basis, weight, None, stride=3).reshape(72, -1).T  # [outputs, 72]
    y = F.conv2d(x, weight, bias, stride=3).flatten()
    assert close(result.inputs["x"].flatten(), linear_rule(x.flatten(), matrix, y, r.flatten()))


@pytest.mark.parametrize("convolution", [True, False])
def test_the_gamma_rule_favours_contributions_of_the_sign_of_the_output(convolution: bool) -> None:
    x, weight, bias = draw(1, 2, 4, 4), draw(3, 2, 2, 2, seed=1), draw(3, seed=2)
    if convolution:
        result, r = ours(lambda x, w, b: F.conv2d(x, w, b, 2), "attnlrp-gamma", {"w": weight, "b": bias}, x=x)
        matrix = F.conv2d(torch.eye(32, dtype=torch.float64).reshape(32, 2, 4, 4), weight, None, 2).reshape(32, -1).T
        y, wide = F.conv2d(x, weight, bias, 2).flatten(), bias.repeat_interleave(4)
    else:
        x, matrix, wide = draw(1, 6), draw(4, 6, seed=1), draw(4, seed=2)
        result, r = ours(lambda x, w, b: F.linear(x, w, b), "attnlrp-gamma", {"w": matrix, "b": wide}, x=x)
        y = (x @ matrix.T + wide).flatten()
    assert close(result.inputs["x"].flatten(), gamma_rule(x.flatten(), matrix, wide, y, r.flatten(), GAMMA))


def test_softmax_is_expanded_at_its_scores_and_absorbs_the_rest() -> None:
    x = draw(3, 6)
    result, r = ours(lambda x: x.softmax(-1), x=x)
    expected = rows(softmax_rule, x, r)
    assert close(result.inputs["x"], expected)
    assert abs(result.ledger.by_kind()["softmax"] - float(r.sum() - expected.sum())) < 1e-10


def test_cp_lrp_stops_at_the_softmax() -> None:
    x, v = draw(3, 4), draw(4, 2, seed=1)
    result, r = ours(lambda x, v: x.softmax(-1) @ v, "cp-lrp", x=x, v=v)
    assert not result.inputs["x"].any()
    p = x.softmax(-1)
    expected = torch.stack([sum(p[i, k] * v[k] / (p @ v)[i] * r[i] for i in range(3)) for k in range(4)])  # type: ignore[arg-type]
    assert close(result.inputs["v"], expected)


@pytest.mark.parametrize("how", ["matmul", "bmm", "einsum", "baddbmm"])
def test_a_product_of_two_data_splits_evenly(how: str) -> None:
    a, b = draw(3, 4), draw(4, 2, seed=1)
    run = {
        "matmul": lambda a, b: a @ b,
        "bmm": lambda a, b: torch.bmm(a[None], b[None])[0],
        "einsum": lambda a, b: torch.einsum("ik,kj->ij", a, b),
        "baddbmm": lambda a, b: torch.baddbmm(torch.zeros(1, 1, 1, dtype=torch.float64), a[None], b[None])[0],
    }[how]
    result, r = ours(run, a=a, b=b)
    ra, rb = product_rule(a, b, r)
    assert close(result.inputs["a"], ra)
    assert close(result.inputs["b"], rb)


def test_a_product_of_n_factors_gives_each_a_share_and_constants_none() -> None:
    x, y, z = draw(5), draw(5, seed=1), draw(5, seed=2)
    result, r = ours(lambda x, y, c: x * c * y, weights={"c": z}, x=x, y=y)
    assert close(result.inputs["x"], r / 2)
    assert close(result.inputs["y"], r / 2)
    result, r = ours(lambda x, y, z: torch.einsum("i,i,i->i", x, y, z), x=x, y=y, z=z)
    assert all(close(result.inputs[name], r / 3) for name in "xyz")
    result, r = ours(lambda x: x.prod().reshape(1), x=x)
    assert close(result.inputs["x"], (r / 5).expand(5))


@pytest.mark.parametrize("form", ["function", "written"])
def test_layer_norm_holds_its_scale_fixed(form: str) -> None:
    x, gain, shift = draw(3, 6), draw(6, seed=1), draw(6, seed=2)

    def written(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b

    result, r = ours((lambda x, w, b: F.layer_norm(x, (6,), w, b)) if form == "function" else written, weights={"w": gain, "b": shift}, x=x)
    expected = []
    for row, rr in zip(x, r, strict=True):
        sigma = math.sqrt(float(((row - row.mean()) ** 2).mean()) + 1e-5)
        matrix = torch.stack([(torch.eye(6, dtype=torch.float64)[j] - 1 / 6) * gain[j] / sigma for j in range(6)])
        expected.append(linear_rule(row, matrix, matrix @ row + shift, rr))
    assert close(result.inputs["x"], torch.stack(expected), 1e-8)


@pytest.mark.parametrize("form", ["function", "written"])
def test_rms_norm_is_the_identity_to_relevance(form: str) -> None:
    x, gain = draw(3, 6), draw(6, seed=1)
    run = lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w  # noqa: E731
    result, r = ours((lambda x, w: F.rms_norm(x, (6,), w, 1e-6)) if form == "function" else run, weights={"w": gain}, x=x)
    assert close(result.inputs["x"], r)
    assert result.ledger.entries == ()


@pytest.mark.parametrize("kind", ["group", "instance"])
def test_normalisation_over_channels_centres_each_group(kind: str) -> None:
    x, gain, shift = draw(2, 4, 3), draw(4, seed=1), draw(4, seed=2)
    if kind == "group":
        result, r = ours(lambda x, w, b: F.group_norm(x, 2, w, b), weights={"w": gain, "b": shift}, x=x)
    else:
        result, r = ours(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), weights={"w": gain, "b": shift}, x=x)
    size = 2 if kind == "group" else 1  # channels in a group
    expected = torch.zeros_like(x)
    for n in range(2):
        for c in range(0, 4, size):
            group, rr = x[n, c : c + size].flatten(), r[n, c : c + size].flatten()
            w, b = gain[c : c + size].repeat_interleave(3), shift[c : c + size].repeat_interleave(3)
            sigma = math.sqrt(float(((group - group.mean()) ** 2).mean()) + 1e-5)
            matrix = (torch.eye(len(group), dtype=torch.float64) - 1 / len(group)) * w[:, None] / sigma
            expected[n, c : c + size] = linear_rule(group, matrix, matrix @ group + b, rr).reshape(size, 3)
    assert close(result.inputs["x"], expected, 1e-8)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "tanh": torch.tanh, "relu": F.relu,
    "elu": F.elu, "mish": F.mish, "softsign": F.softsign, "hardswish": F.hardswish, "square": torch.square, "power": lambda x: x**3,
    "silu in place": lambda x: F.silu(x.clone(), inplace=True), "erf": torch.erf, "sin": torch.sin, "selu": F.selu,
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_through_the_origin_passes_relevance_on_whole(name: str) -> None:
    x = draw(4, 5)
    result, r = ours(lambda x: ACTIVATIONS[name](x), x=x)
    assert close(result.inputs["x"], r)
    assert result.ledger.entries == ()


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in ("relu", "silu in place", "elu", "selu")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_at_zero_the_quotient_is_the_slope(name: str, dtype: torch.dtype) -> None:
    key = {"gelu tanh": "gelu", "power": "square"}.get(name, name)
    x = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 1e-40], dtype=dtype, requires_grad=True)
    y = functions.Identity.apply(x, ACTIVATIONS[name], IDENTITY[key])  # type: ignore[no-untyped-call]
    (g,) = torch.autograd.grad(y.sum(), x)
    step = torch.tensor(1e-6, dtype=torch.float64)
    slope = float((ACTIVATIONS[name](step) - ACTIVATIONS[name](-step)) / (2 * step))
    assert torch.isfinite(g).all()
    assert (g.double() - slope).abs().max() < (2e-2 if dtype == torch.float16 else 1e-5)


def test_a_gate_that_is_not_zero_at_zero_keeps_what_its_gradient_does_not_pass() -> None:
    x = draw(5)
    result, r = ours(lambda x: x.sigmoid(), x=x)
    s = 1 / (1 + torch.exp(-x))
    assert close(result.inputs["x"], x * (1 - s) * r)  # x f'(x) / f(x)
    assert abs(result.ledger.by_kind()["gate"] - float((r - result.inputs["x"]).sum())) < 1e-10


def test_a_gated_mlp_splits_between_gate_and_value() -> None:
    x, up, gate, down = draw(2, 4), draw(6, 4, seed=1), draw(6, 4, seed=2), draw(3, 6, seed=3)
    result, r = ours(lambda x, u, g, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d), weights={"u": up, "g": gate, "d": down}, x=x)
    expected = []
    for row, rr in zip(x, r, strict=True):
        g, u = gate @ row, up @ row
        hidden = g / (1 + torch.exp(-g)) * u
        rh = linear_rule(hidden, down, down @ hidden, rr)
        expected.append(linear_rule(row, gate, g, rh / 2) + linear_rule(row, up, u, rh / 2))
    assert close(result.inputs["x"], torch.stack(expected))


def test_glu_is_its_written_form() -> None:
    x = draw(3, 8)
    fused, r = ours(lambda x: F.glu(x), x=x)
    plain, _ = ours(lambda x: x[:, :4] * torch.sigmoid(x[:, 4:]), x=x)
    assert close(fused.inputs["x"], plain.inputs["x"])
    assert close(fused.inputs["x"][:, :4], r / 2)


def test_a_router_shares_the_product_with_its_experts_and_its_normaliser_is_a_constant() -> None:
    """y = Σ_e (p_e / Σ p) E_e(x) over the chosen experts; R of p_e is half of that product's, then through the softmax."""
    x, router, experts = draw(3, 4), draw(5, 4, seed=1), draw(5, 4, 4, seed=2)

    def run(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
        weight, chosen = F.linear(x, router).softmax(-1).topk(2)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in range(5):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out.index_add_(0, token, F.linear(x[token], experts[e]) * weight[token, slot, None])
        return out

    result, r = ours(run, weights={"router": router, "experts": experts}, x=x)
    expected = torch.zeros_like(x)
    for t in range(3):
        logits = router @ x[t]
        p = torch.exp(logits) / torch.exp(logits).sum()
        best = sorted(range(5), key=lambda e: -float(p[e]))[:2]
        total = sum(p[e] for e in best)
        y = sum(p[e] / total * (experts[e] @ x[t]) for e in best)
        rp = torch.zeros(5, dtype=torch.float64)
        for e in best:
            part = p[e] / total * (experts[e] @ x[t]) / y * r[t]  # what this expert's summand gets
            rp[e] = part.sum() / 2
            expected[t] += linear_rule(x[t], experts[e], experts[e] @ x[t], part / 2)
        expected[t] += linear_rule(x[t], router, logits, softmax_rule(logits, rp))
    assert close(result.inputs["x"], expected)


def test_a_residual_shares_by_contribution() -> None:
    a, b = draw(4), draw(4, seed=1)
    result, r = ours(lambda a, b: a + b, a=a, b=b)
    assert close(result.inputs["a"], a / (a + b) * r)
    assert close(result.inputs["b"], b / (a + b) * r)


@pytest.mark.parametrize(
    "form", ["add", "iadd to a constant", "rsub", "where", "cat", "setitem into a constant", "masked_fill", "maximum", "pad"]
)
def test_constants_absorb_their_part_whatever_brings_them(form: str) -> None:
    x, c = draw(4), draw(4, seed=1)
    mask = torch.tensor([True, False, True, False])

    def into(x: Tensor, c: Tensor) -> Tensor:
        kept = c.detach().clone()
        kept[:2] = x[:2]
        return kept

    run: Callable[[Tensor, Tensor], Tensor] = {
        "add": lambda x, c: x + c,
        "iadd to a constant": lambda x, c: c.detach().clone().add_(x),
        "rsub": lambda x, c: 1.5 - x,
        "where": lambda x, c: torch.where(mask, x, c),
        "cat": lambda x, c: torch.cat([x, c]),
        "setitem into a constant": into,
        "masked_fill": lambda x, c: x.masked_fill(mask, 2.5),
        "maximum": lambda x, c: torch.maximum(x, c),
        "pad": lambda x, c: F.pad(x, (1, 1), value=3.0),
    }[form]
    result, r = ours(run, weights={"c": c}, x=x)
    came = float(result.inputs["x"].sum())
    assert abs(came - float(r.sum())) > 1e-3
    assert abs(result.ledger.absorbed - (float(r.sum()) - came)) < 1e-10
    assert set(result.ledger.by_kind()) <= {"constant", "clamp"}


# -- attention -------------------------------------------------------------------------------------------------------


def attention_rule(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, mask: Tensor | None = None, data: str = "qkv", stop: bool = False
) -> dict[str, Tensor]:
    """R of q [Q, D], k and v [K, D], step by step: O = P V, P = softmax(S), S = q kᵀ / √D. A factor that is no data takes no share."""
    scale = 1 / math.sqrt(q.shape[-1])
    s = q @ k.T * scale
    p = (s if mask is None else s.masked_fill(~mask, float("-inf"))).softmax(-1)
    o = p @ v
    scored = not stop and ("q" in data or "k" in data)
    share = 0.5 if scored and "v" in data else 1.0
    found = {name: torch.zeros_like(t) for name, t in (("q", q), ("k", k), ("v", v))}
    rp = torch.zeros_like(p)
    for i in range(len(q)):
        for j in range(len(k)):
            part = p[i, j] * v[j] / o[i] * r[i] * share
            found["v"][j] += part
            rp[i, j] = part.sum()
    if scored:
        both = 0.5 if "q" in data and "k" in data else 1.0
        for i in range(len(q)):
            for j in range(len(k)):
                if mask is not None and not mask[i, j]:
                    continue
                rs = s[i, j] * (rp[i, j] - p[i, j] * rp[i].sum())
                part = q[i] * k[j] * scale / s[i, j] * rs * both
                found["q"][i] += part
                found["k"][j] += part
    return {name: t for name, t in found.items() if name in data}


@pytest.mark.parametrize("data", ["qkv", "qk", "kv", "qv", "q", "k", "v"])
@pytest.mark.parametrize("how", ["sdpa", "written", "causal", "mask"])
def test_attention_composes_softmax_and_products_and_constants_take_no_share(data: str, how: str) -> None:
    tensors = {"q": draw(4, 3), "k": draw(4, 3, seed=1), "v": draw(4, 3, seed=2)}
    mask = torch.ones(4, 4).tril().bool() if how == "causal" else torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, 0] = True

    def run(**given: Tensor) -> Tensor:
        q, k, v = (given[name][None, None] for name in "qkv")
        if how == "written":
            return ((q @ k.mT / math.sqrt(3)).softmax(-1) @ v)[0, 0]
        return F.scaled_dot_product_attention(q, k, v, mask if how == "mask" else None, is_causal=how == "causal")[0, 0]

    weights = {name: t for name, t in tensors.items() if name not in data}
    result, r = ours(run, weights=weights, **{name: t for name, t in tensors.items() if name in data})
    expected = attention_rule(**tensors, r=r, mask=mask if how in ("causal", "mask") else None, data=data)
    for name, value in expected.items():
        assert close(result.inputs[name], value, 1e-8), name


def test_cp_lrp_treats_attention_weights_as_constants() -> None:
    tensors = {"q": draw(4, 3), "k": draw(4, 3, seed=1), "v": draw(4, 3, seed=2)}
    result, r = ours(lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None])[0], "cp-lrp", **tensors)
    expected = attention_rule(**tensors, r=r, stop=True)
    assert close(result.inputs["v"], expected["v"])
    assert not result.inputs["q"].any()


def test_grouped_heads_sum_the_relevance_of_their_copies() -> None:
    q, k, v = draw(1, 4, 3, 2), draw(1, 2, 3, 2, seed=1), draw(1, 2, 3, 2, seed=2)
    result, r = ours(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q=q, k=k, v=v)
    expected = torch.zeros_like(k)
    for head in range(4):
        expected[0, head // 2] += attention_rule(q[0, head], k[0, head // 2], v[0, head // 2], r[0, head])["k"]
    assert close(result.inputs["k"], expected, 1e-8)


def test_a_bias_made_of_data_is_a_summand_of_the_scores() -> None:
    q, k, v, bias = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2), draw(4, 4, seed=3)
    fused, _ = ours(lambda q, k, v, b: F.scaled_dot_product_attention(q[None], k[None], v[None], b[None])[0], q=q, k=k, v=v, b=bias)
    plain, _ = ours(lambda q, k, v, b: ((q @ k.T / math.sqrt(3)) + b).softmax(-1) @ v, q=q, k=k, v=v, b=bias)
    assert all(close(fused.inputs[name], plain.inputs[name]) for name in "qkvb")


@pytest.mark.parametrize("how", ["sdpa", "written"])
def test_gim_uses_the_jacobian_of_a_warmer_softmax(how: str) -> None:
    q, k, v = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2)
    run = {
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None])[0],
        "written": lambda q, k, v: (q @ k.T / math.sqrt(3)).softmax(-1) @ v,
    }[how]
    result, r = ours(run, "gim", q=q, k=k, v=v)
    s = q @ k.T / math.sqrt(3)
    p, warm = s.softmax(-1), (s / 2).softmax(-1)
    g = r / (p @ v)
    gp = g @ v.T / 2
    gs = torch.stack([(torch.diag(row) - torch.outer(row, row)) @ gr for row, gr in zip(warm, gp, strict=True)])
    assert close(result.inputs["v"], v * (p.T @ g) / 2)
    assert close(result.inputs["q"], q * (gs @ k) / math.sqrt(3) / 2)
    assert close(result.inputs["k"], k * (gs.T @ q) / math.sqrt(3) / 2)


def test_gim_keeps_the_true_slope_of_an_activation() -> None:
    x = draw(5)
    result, r = ours(lambda x: torch.tanh(x), "gim", x=x)
    assert close(result.inputs["x"], x * (1 - torch.tanh(x) ** 2) / torch.tanh(x) * r)


def test_positions_get_half_of_what_a_rotary_table_multiplies() -> None:
    x = draw(1, 5, 4)

    def run(x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(5, dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64)).repeat(1, 2)
        turned = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x * angles.cos() + turned * angles.sin()

    plain, _ = ours(run, x=x)
    result, r = ours(run, "attnlrp-position", x=x)
    assert close(result.inputs["x"], plain.inputs["x"] / 2)
    assert abs(result.ledger.by_kind()["position"] - float(r.sum()) / 2) < 1e-10


def test_gradient_times_input_is_that() -> None:
    x, weight = draw(3, 4), draw(4, 4, seed=1)
    result, _ = ours(lambda x, w: F.layer_norm(F.silu(F.linear(x, w)), (4,)).softmax(-1), "gradient-x-input", {"w": weight}, x=x)
    leaf = x.clone().requires_grad_()
    y = F.layer_norm(F.silu(leaf @ weight.T), (4,)).softmax(-1)
    w = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    (g,) = torch.autograd.grad((y * w).sum(), leaf)
    assert close(result.inputs["x"], x * g)
    assert result.ledger is None


def test_every_rule_set_is_named_and_sourced() -> None:
    assert set(RULE_SETS) == {"attnlrp", "cp-lrp", "relp", "gim", "attnlrp-position", "attnlrp-gamma", "gradient-x-input"}
    assert all(rules.source for rules in RULE_SETS.values())
    with pytest.raises(SelectionError, match="no rules 'lrp': there are attnlrp, cp-lrp"):
        rule_set("lrp")
