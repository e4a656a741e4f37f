"""Stability of token choices: against a dense computation written here, and on hand-made attention where the answer is known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from headscope.kernels.errors import InputError, NotIntercepted
from headscope.probe.health.stability import TokenStability, measure_stability

EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24, initializer_range=0.5,
        attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).double().eval()


def spearman(a: list[float], b: list[float]) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank; the slow way."""

    def rank(values: list[float]) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    x, y = rank(a), rank(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return top / math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))


def dense(model: BertModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer: norms of the attention output before the residual [N], and received attention [N], from the model's own outputs."""
    outputs: list[Tensor] = []
    hooks = [layer.attention.output.dense.register_forward_hook(lambda m, i, o: outputs.append(o[0])) for layer in model.encoder.layer]
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    return [o.norm(dim=-1) for o in outputs], [m[0].mean(0).sum(0) / ids.shape[1] for m in maps]


def test_the_numbers_are_those_of_a_dense_computation(bert: BertModel) -> None:
    ids = torch.randint(0, 40, (1, 11), generator=torch.Generator().manual_seed(1))
    norms, received = dense(bert, ids)
    found = measure_stability(bert, {"input_ids": ids}, share=0.3)
    keep = [set(n.topk(4).indices.tolist()) for n in norms]
    for a in range(3):
        for b in range(3):
            assert float(found.overlap[a, b]) == pytest.approx(len(keep[a] & keep[b]) / 4)
            if b > a:
                assert float(found.agreement[a, b]) == pytest.approx(spearman(norms[a].tolist(), received[b].tolist()), abs=1e-9)
            else:
                assert math.isnan(found.agreement[a, b])
    later = (received[1] + received[2]) / 2
    assert float(found.foresight[0]) == pytest.approx(spearman(norms[0].tolist(), later.tolist()), abs=1e-9)
    assert float(found.kept_mass[0]) == pytest.approx(float(later[list(keep[0])].sum() / later.sum()))
    assert torch.allclose(found.norm, torch.stack([n.mean() for n in norms]), **EXACT)
    assert torch.allclose(found.variation, torch.stack([n.std(correction=0) / n.mean() for n in norms]), **EXACT)
    assert float(found.stays[0]) == pytest.approx(float(found.overlap[0, 1:].mean()))
    assert all(math.isnan(getattr(found, name)[-1]) for name in ("stays", "foresight", "kept_mass"))


def test_padding_changes_nothing(bert: BertModel) -> None:
    ids = torch.randint(1, 40, (1, 9), generator=torch.Generator().manual_seed(2))
    alone = measure_stability(bert, {"input_ids": ids})
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=torch.long)], 1)
    found = measure_stability(bert, {"input_ids": padded, "attention_mask": mask})
    assert found.tokens == 9
    for name in ("norm", "overlap", "foresight", "kept_mass"):
        assert torch.allclose(getattr(found, name), getattr(alone, name), equal_nan=True, **EXACT)


def test_the_order_of_samples_does_not_matter_and_batches_are_averaged(bert: BertModel) -> None:
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    both = measure_stability(bert, {"input_ids": ids})
    for given in ({"input_ids": ids.flip(0)}, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]):
        found = measure_stability(bert, given)
        assert torch.allclose(found.agreement, both.agreement, equal_nan=True, **EXACT)
        assert torch.allclose(found.overlap, both.overlap, **EXACT)


class Marked(nn.Module):
    """Two layers of attention in which one token is both written to and attended to: Δ and what is received agree by construction."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(), _Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 1e-3 * layer(x)
        return x


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8, bias=False)
        self.proj.weight.data = torch.eye(8)

    def forward(self, x: Tensor) -> Tensor:
        heads = x[:, None]
        size = x.norm(dim=-1)[:, None, None, :]  # every query prefers the larger keys, and the larger queries get the larger values
        bias = size - (size.mT - size).abs() * 50
        z = nn.functional.scaled_dot_product_attention(heads * 1e-6, heads, heads, attn_mask=bias.expand(-1, 1, x.shape[1], -1))
        return self.proj(z[:, 0])


def test_where_large_tokens_attend_to_themselves_everything_stays() -> None:
    x = torch.eye(8)[:, :8].repeat(1, 1)[None] * torch.arange(1.0, 9.0)[:, None]
    found = measure_stability(Marked().eval(), x, share=0.25)
    assert found.overlap.eq(1).all()
    assert float(found.stays[0]) == 1
    assert float(found.norm[0]) == pytest.approx(4.5, rel=1e-2)


def test_a_causal_model_counts_received_attention_per_query_that_sees_the_key() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.4, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    ids = torch.randint(3, 20, (1, 7), generator=torch.Generator().manual_seed(0))
    norms: list[Tensor] = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, i, o: norms.append(o[0].norm(dim=-1)))
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    hook.remove()
    received = maps[1][0].mean(0).sum(0) / torch.arange(7, 0, -1)
    found = measure_stability(model, {"input_ids": ids})
    assert float(found.agreement[0, 1]) == pytest.approx(spearman(norms[0].tolist(), received.tolist()), abs=1e-9)


def test_the_result_is_plain_json_a_table_and_a_figure(bert: BertModel) -> None:
    found = measure_stability(bert, {"input_ids": torch.arange(9)[None]})
    record = json.loads(found.to_json())
    assert record["stays"][-1] is None
    assert len(found.to_frame()) == 3
    assert len(found.plot().data) == 2
    assert "<table" in found._repr_html_()
    assert "3 sites, 9 tokens" in str(found)


def test_bad_input_is_refused_with_what_to_do(bert: BertModel) -> None:
    with pytest.raises(InputError, match="share=1.5: give the share"):
        measure_stability(bert, {"input_ids": torch.arange(9)[None]}, share=1.5)
    with pytest.raises(InputError, match="no sample has 4 tokens"):
        measure_stability(bert, {"input_ids": torch.arange(2)[None]})
    with pytest.raises(InputError, match="training mode"):
        measure_stability(Marked(), torch.zeros(1, 4, 8))
    with pytest.raises(NotIntercepted):
        measure_stability(nn.Linear(4, 4).eval(), torch.zeros(1, 4, 4))


def test_constant_tokens_have_no_foresight() -> None:
    found = measure_stability(Marked().eval(), torch.ones(1, 6, 8))
    assert isinstance(found, TokenStability)
    assert found.foresight.isnan().all()
    assert float(found.variation[0]) == pytest.approx(0, abs=1e-6)
