"""Comparing two models: against dense float64 code written here, on small patterns where the answer is known, and on bad input."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from headscope.interventions import Edit, Plan, assign, bias, scale, select
from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.probe.health.cka import linear_cka
from headscope.probe.health.compare import compare_health
from headscope.probe.health.comparison import HEAD_NUMBERS, HealthComparison

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def llama(seed: int, attention: str = "sdpa", **changes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}, attn_implementation=attention)).double().eval()


def ids(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 31, (batch, count), generator=torch.Generator().manual_seed(seed))


def maps(model: nn.Module, tokens: Tensor, **inputs: Tensor) -> list[Tensor]:
    """[B, H, N, N] of every layer, by the model's own eager code, kept from rounding its softmax to float32."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    softmax = nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
        return list(twin(input_ids=tokens, output_attentions=True, **inputs).attentions)


def naive(a: Tensor, b: Tensor, rows: list[tuple[int, int]]) -> dict[str, Tensor]:
    """The four numbers [H] of two patterns [B, H, Q, K] over rows (sample, query), cell by cell."""
    heads = a.shape[1]
    found = {name: torch.zeros(heads, dtype=torch.float64) for name in HEAD_NUMBERS}
    for head in range(heads):
        sums = [0.0, 0.0, 0.0]
        cosine = 0.0
        for sample in {s for s, _ in rows}:
            mine = [i for s, i in rows if s == sample]
            ab = aa = bb = 0.0
            for i in mine:
                p, q = a[sample, head, i].tolist(), b[sample, head, i].tolist()
                for x, y in zip(p, q, strict=True):
                    m = (x + y) / 2
                    sums[0] += x * math.log(x / y) if x else 0.0
                    sums[1] += y * math.log(y / x) if y else 0.0
                    sums[2] += (x * math.log(x / m) if x else 0.0) / 2 + (y * math.log(y / m) if y else 0.0) / 2
                    ab, aa, bb = ab + x * y, aa + x * x, bb + y * y
            cosine += len(mine) * ab / math.sqrt(aa * bb)
        for name, value in zip(HEAD_NUMBERS, (*sums, cosine), strict=True):
            found[name][head] = value / len(rows)
    return found


def assert_close(comparison: HealthComparison, a: list[Tensor], b: list[Tensor], rows: list[tuple[int, int]], rtol: float = 1e-9) -> None:
    assert len(comparison.heads) == len(a)
    for one, first, second in zip(comparison.heads, a, b, strict=True):
        for name, value in naive(first, second, rows).items():
            assert torch.allclose(getattr(one, name), value, rtol=rtol, atol=1e-2 * rtol), (one.site.name, name)
        assert one.rows == len(rows)


def test_the_numbers_of_heads_are_those_of_dense_float64_code() -> None:
    a, b = llama(0), llama(1)
    tokens = ids(9, batch=2)
    found = compare_health(a, b, {"input_ids": tokens})
    assert_close(found, maps(a, tokens), maps(b, tokens), [(s, i) for s in range(2) for i in range(9)])


def test_it_makes_no_difference_whether_the_model_forms_its_maps_itself() -> None:
    a, b = llama(0, "eager"), llama(1)
    tokens = ids(8)
    found = compare_health(a, b, {"input_ids": tokens})
    assert_close(found, maps(a, tokens), maps(b, tokens), [(0, i) for i in range(8)], rtol=1e-5)  # its softmax is float32


def test_padding_is_not_counted() -> None:
    a, b = llama(0), llama(1)
    tokens = ids(6)
    alone = compare_health(a, b, {"input_ids": tokens})
    padded = torch.cat([torch.full((1, 3), 3), tokens], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(tokens)], 1)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    found = compare_health(a, b, {"input_ids": padded, "attention_mask": mask, "position_ids": place})
    for one, other in zip(found.heads, alone.heads, strict=True):
        assert one.rows == other.rows == 6
        for name in HEAD_NUMBERS:
            assert torch.allclose(getattr(one, name), getattr(other, name), **EXACT)
    for left, right in zip(found.streams, alone.streams, strict=True):
        assert left.tokens == 6
        assert left.cka == pytest.approx(right.cka, rel=1e-9)
        assert left.change == pytest.approx(right.change, rel=1e-9)


def test_batches_and_their_order_do_not_matter() -> None:
    a, b = llama(0), llama(1)
    tokens = ids(7, batch=3)
    whole = compare_health(a, b, {"input_ids": tokens})
    split = compare_health(a, b, [{"input_ids": tokens[2:]}, {"input_ids": tokens[:2]}])
    for one, other in zip(split.heads, whole.heads, strict=True):
        for name in HEAD_NUMBERS:
            assert torch.allclose(getattr(one, name), getattr(other, name), **EXACT)
    assert split.streams[-1].cka == pytest.approx(whole.streams[-1].cka, rel=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_and_itself_differ_by_exactly_nothing(attention: str, dtype: torch.dtype) -> None:
    model = llama(0, attention).to(dtype)
    found = compare_health(model, copy.deepcopy(model), {"input_ids": ids(13, batch=2)})
    assert found.unchanged
    for one in found.heads:
        assert one.divergence.eq(0).all()
        assert one.reverse.eq(0).all()
        assert one.jensen_shannon.eq(0).all()
        assert one.cosine.eq(1).all()
    assert [one.change for one in found.streams] == [0.0] * len(found.streams)
    assert [one.cka for one in found.streams] == [1.0] * len(found.streams)
    assert "nothing differs" in str(found)


def test_before_and_after_an_edit_only_what_comes_after_it_changes() -> None:
    model = llama(0)
    plan = Plan([Edit("z", scale(0.0), select(layer=0, head=1))])
    found = compare_health(model, None, {"input_ids": ids(9)}, within=lambda: plan.on(model))
    assert not found.unchanged
    assert found.heads[0].jensen_shannon.eq(0).all()  # the edit comes after the pattern of its own layer
    assert found.heads[1].jensen_shannon.gt(0).all()
    assert found.streams[0].change == 0
    assert found.streams[1].change > 0
    assert found.changed_most(1)[0][0] == found.heads[1].site.name
    assert compare_health(model, None, {"input_ids": ids(9)}).unchanged  # and the model is as it was


def test_an_edit_of_the_scores_is_seen_in_the_pattern() -> None:
    model = llama(0)
    plan = Plan([Edit("scores", bias(-1.5), select(layer=1, heads=[2], keys=[3]))])
    found = compare_health(model, None, {"input_ids": ids(9)}, within=lambda: plan.on(model))
    assert found.heads[1].divergence.gt(0).tolist() == [False, False, True, False]
    before = maps(model, ids(9))[1]
    scores = before.log()
    scores[:, 2, :, 3] -= 1.5
    expected = naive(before, scores.softmax(-1), [(0, i) for i in range(9)])
    for name in HEAD_NUMBERS:
        assert torch.allclose(getattr(found.heads[1], name), expected[name], **EXACT)


class Attends(nn.Module):
    """One layer whose scores are given."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        q = torch.zeros(1, self.scores.shape[0], x.shape[1], 4, dtype=x.dtype)
        return scaled_dot_product_attention(q, q, q, attn_mask=self.scores)


def test_known_patterns_give_known_numbers() -> None:
    n = 8
    uniform, one_key = torch.zeros(1, n, n), torch.full((1, n, n), -torch.inf)
    one_key[..., 2] = 0
    x = torch.zeros(1, n, 4)
    found = compare_health(Attends(one_key).eval(), Attends(uniform).eval(), x).heads[0]
    assert float(found.divergence) == pytest.approx(math.log(n))
    assert math.isinf(float(found.reverse))
    assert "hides" in found.undefined["reverse"]
    js = 0.5 * math.log(1 / ((1 + 1 / n) / 2)) + 0.5 * ((1 / n) * math.log((1 / n) / ((1 + 1 / n) / 2)) + (n - 1) / n * math.log(2))
    assert float(found.jensen_shannon) == pytest.approx(js)
    assert float(found.cosine) == pytest.approx(1 / math.sqrt(n))


def test_a_probability_that_underflows_is_not_taken_for_a_hidden_key() -> None:
    scores = torch.zeros(1, 4, 4)
    scores[..., 1] = -2000.0
    found = compare_health(Attends(torch.zeros(1, 4, 4)).eval(), Attends(scores).eval(), torch.zeros(1, 4, 4)).heads[0]
    assert float(found.divergence) == pytest.approx(500 + math.log(3 / 4), rel=1e-6)


@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.1, 20))
@settings(max_examples=25, deadline=None)
def test_divergences_are_in_their_ranges_and_symmetric_where_they_should_be(seed: int, n: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(2, n, n, generator=generator) * size for _ in range(2))
    x = torch.zeros(1, n, 4)
    found = compare_health(Attends(first).eval(), Attends(second).eval(), x).heads[0]
    back = compare_health(Attends(second).eval(), Attends(first).eval(), x).heads[0]
    assert torch.allclose(found.divergence, back.reverse, rtol=1e-12)
    assert torch.allclose(found.jensen_shannon, back.jensen_shannon, rtol=1e-9, atol=1e-12)
    assert found.jensen_shannon.ge(0).all()
    assert found.jensen_shannon.le(math.log(2) + 1e-12).all()
    assert found.divergence.ge(0).all()
    assert found.cosine.gt(0).all()
    assert found.cosine.le(1 + 1e-12).all()


def test_a_negative_probability_makes_the_divergence_undefined_with_a_reason() -> None:
    model = llama(0)
    plan = Plan([Edit("pattern", assign(-0.1), select(layer=0, heads=[0], keys=[0]))])
    found = compare_health(model, None, {"input_ids": ids(6)}, within=lambda: plan.on(model)).heads[0]
    assert math.isnan(found.jensen_shannon[0])
    assert "negative" in found.undefined["jensen_shannon"]
    assert found.jensen_shannon[1:].lt(1e-15).all()  # not exactly 0: an edited pattern is read as it stands


def hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """Song et al. 2012, equation 5, with n × n matrices."""
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    one = torch.ones(n, dtype=k.dtype)
    whole = (k @ l).trace() + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return float(whole) / (n * (n - 3))


@given(st.integers(0, 10**6), st.integers(4, 30), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_cka_is_the_debiased_one_of_the_paper(seed: int, n: int, d: int, e: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=generator, dtype=torch.float64) + 3 for width in (d, e))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    own = hsic(k, k) * hsic(l, l)
    found = linear_cka(x, y)
    if own <= 0 or hsic(k, k) <= 1e-12:
        return
    assert found == pytest.approx(hsic(k, l) / math.sqrt(own), rel=1e-6, abs=1e-6)


def test_cka_does_not_see_rotation_size_and_shift_and_is_near_zero_for_independent_states() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    assert linear_cka(x, x) == 1.0
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1.0, abs=1e-12)
    independent = [linear_cka(*torch.randn(2, 10, 20, generator=generator, dtype=torch.float64)) for _ in range(200)]
    assert abs(sum(independent) / 200) < 0.05  # the plain estimate gives 0.7 here
    assert math.isnan(linear_cka(x[:3], x[:3]))
    assert math.isnan(linear_cka(torch.full((9, 3), 0.1), x[:9]))
    with pytest.raises(ShapeError, match=r"\[40, 6\] and \[39, 6\]"):
        linear_cka(x, x[1:])


def test_relative_change_is_that_of_the_hidden_states() -> None:
    a, b = llama(0), llama(1)
    tokens = ids(7)
    with torch.no_grad():
        first, second = (m(input_ids=tokens, output_hidden_states=True).hidden_states for m in (a, b))
    found = compare_health(a, b, {"input_ids": tokens})
    states = [(first[0], second[0]), (first[1], second[1])]  # the last one that transformers gives is behind the final norm
    for one, (x, y) in zip(found.streams, states, strict=False):
        assert one.change == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-9)
    assert [one.place for one in found.streams] == ["input", "output", "output"]


def test_few_tokens_in_many_dimensions_are_warned_of() -> None:
    model = llama(0)
    assert any("16 dimensions" in text for text in compare_health(model, llama(1), {"input_ids": ids(7)}).warnings)
    assert not compare_health(model, llama(1), {"input_ids": ids(20)}).warnings


def test_models_with_other_sites_are_refused_by_name() -> None:
    with pytest.raises(SelectionError, match=r"b has model.layers.2.self_attn#0, which a has not"):
        compare_health(llama(0), llama(0, num_hidden_layers=3), {"input_ids": ids(5)})
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)).eval()
    with pytest.raises(SelectionError, match="sites are matched by their names"):
        compare_health(llama(0), bert, {"input_ids": ids(5)})


def test_other_shapes_and_modes_are_refused_with_what_to_do() -> None:
    with pytest.raises(ShapeError, match=r"\[1, 4, 5, 5\] and \[1, 2, 5, 5\]"):
        compare_health(llama(0), llama(0, num_attention_heads=2), {"input_ids": ids(5)})
    with pytest.raises(InputError, match="two different names"):
        compare_health(llama(0), None, {"input_ids": ids(5)}, names=("a", "a"))
    with pytest.raises(InputError, match="training mode"):
        compare_health(llama(0), llama(0).train(), {"input_ids": ids(5)})


def test_numbers_that_are_not_finite_are_undefined_with_a_reason() -> None:
    model, broken = llama(0), llama(0)
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight.fill_(torch.nan)
        broken.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    found = compare_health(model, broken, {"input_ids": ids(6)})
    assert found.heads[0].divergence.eq(0).all()
    assert found.heads[1].divergence.isnan().all()
    assert "not finite" in found.heads[1].undefined["divergence"]
    assert math.isnan(found.streams[-1].change)


def test_one_token_is_compared_with_itself() -> None:
    found = compare_health(llama(0), llama(1), {"input_ids": ids(1)})
    assert found.heads[0].cosine.eq(1).all()
    assert found.heads[0].divergence.eq(0).all()
    assert math.isnan(found.streams[0].cka)
    assert "fewer than 4" in found.streams[0].undefined["cka"]


def test_the_result_is_plain_json_tables_and_a_figure() -> None:
    found = compare_health(llama(0), llama(1), {"input_ids": ids(6)}, names=("before", "after"))
    record = json.loads(found.to_json())
    assert record["info"]["a"] == "before"
    assert len(record["heads"]) == 2
    assert len(record["heads"][0]["divergence"]) == 4
    assert len(found.to_frame()) == 8
    assert len(found.to_frame("streams")) == 3
    assert len(found.plot().data) == 3
    assert "<table" in found._repr_html_()
    assert "<script" not in found._repr_html_()
    with pytest.raises(SelectionError, match="no number 'kl'"):
        found.changed_most(by="kl")
    with pytest.raises(SelectionError, match="no table 'x'"):
        found.rows("x")
