"""Baselines: uniform attention in closed form against dense matrices, and the freshly initialised network, which touches nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from headscope.kernels.errors import InputError
from headscope.probe.health.baselines import fresh_copy, measure_baselines, uniform_attention, uniform_baseline
from headscope.probe.health.measures import HeadMeasures, StreamMeasures
from tests.probe.health.made import head_measures, stream_measures

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


def dense(tokens: int, causal: bool) -> dict[str, float]:
    """The numbers of the matrix itself, by their definitions."""
    seen = torch.ones(tokens, tokens, dtype=torch.float64)
    seen = seen.tril() if causal else seen
    p = seen / seen.sum(1, keepdim=True)
    received = p.sum(0)
    entropy = [-sum(x * math.log(x) for x in row if x > 0) for row in p.tolist()]
    spread = -sum(x / tokens * math.log(x / tokens) for x in received.tolist())
    diffuse, total = sum(entropy) / tokens, math.log(tokens)
    pairs = [
        float(p[i] @ p[j] / (p[i].norm() * p[j].norm())) for i in range(tokens) for j in range(tokens) if i != j
    ]  # fmt: skip
    place = torch.arange(tokens, dtype=torch.float64)
    found = {
        "entropy": diffuse,
        "diffuse": diffuse / total,
        "routing": (spread - diffuse) / total,
        "hub": (total - spread) / total,
        "p_max": float(p.amax(1).mean()),
        "effective_keys": float((1 / p.square().sum(1)).mean()),
        "sum_squares": float(p.square().sum(1).mean()),
        "sink": float((received / seen.sum(0)).max()),
        "first_mass": float(p[:, 0].mean()),
        "distance": float((p * (place[:, None] - place).abs()).sum(1).mean()),
        "own": float(p.diagonal().mean()),
        "previous": float(p.diagonal(-1).mean()),
        "row_residual": 1 - float(received.square().sum() / (tokens * p.square().sum())),
        "row_cosine": sum(pairs) / len(pairs),
        "column_deviation": float((received - 1).abs().mean()),
    }
    if causal:
        found["contraction"] = float(p.diagonal()[1:].max())
    return found


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(2, 40), causal=st.booleans())
def test_uniform_attention_is_what_the_matrix_says(tokens: int, causal: bool) -> None:
    found = uniform_attention(tokens, causal)
    for name, value in dense(tokens, causal).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert found["diffuse"] + found["routing"] + found["hub"] == pytest.approx(1, abs=1e-12)
    assert found["entropy_share"] == found["effective_share"] == 1


def test_two_causal_tokens_by_hand() -> None:
    found = uniform_attention(2, True)  # P = [[1, 0], [1/2, 1/2]], c = [3/2, 1/2]
    assert found["entropy"] == pytest.approx(math.log(2) / 2)
    assert found["sink"] == found["own"] == 0.75
    assert found["previous"] == 0.5
    assert found["column_deviation"] == 0.5
    assert found["row_residual"] == pytest.approx(1 - 2.5 / 3)


def test_uniform_attention_over_one_token_is_refused() -> None:
    with pytest.raises(InputError, match="over 1 tokens: give 2 or more"):
        uniform_attention(1, False)


@pytest.mark.parametrize(("causal", "keys", "tokens"), [(True, 20.5, 40), (False, 40.0, 40)])
def test_the_number_of_tokens_follows_from_the_visible_keys(causal: bool, keys: float, tokens: int) -> None:
    assert uniform_baseline(head_measures(causal=causal, keys=keys)) == uniform_attention(tokens, causal)


def test_of_queries_that_are_not_the_keys_nothing_positional_is_said() -> None:
    found = uniform_baseline(head_measures(square=False, keys=9.0))
    assert not {"distance", "own", "previous", "column_deviation"} & found.keys()
    assert found["p_max"] == pytest.approx(1 / 9)


def measures(_: nn.Module) -> tuple[tuple[HeadMeasures, ...], tuple[StreamMeasures, ...]]:
    return (head_measures(),), (stream_measures(),)


def test_both_baselines_or_those_that_are_wanted() -> None:
    model, heads = nn.Linear(2, 2), (head_measures(keys=16.0),)
    both = measure_baselines(model, heads, measures)
    assert set(both.uniform) == {heads[0].site.name}
    assert both.fresh_head(heads[0].site) is both.heads[0]
    assert both.fresh_stream(stream_measures()) is both.streams[0]
    assert not both.absent
    only = measure_baselines(model, heads, measures, ("uniform",))
    assert only.uniform
    assert not only.heads
    assert only.absent == {"fresh": "not asked for"}
    none = measure_baselines(model, heads, measures, False)
    assert not none.uniform
    assert set(none.absent) == {"uniform", "fresh"}
    with pytest.raises(InputError, match="no baseline 'trained': there are uniform, fresh"):
        measure_baselines(model, heads, measures, ("trained",))


def test_a_baseline_that_cannot_be_made_is_absent_with_the_reason() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    found = measure_baselines(nn.Sequential(Silent()), (head_measures(keys=1.0),), measures)
    assert "no reset_parameters()" in found.absent["fresh"]
    assert "over 1 tokens" in found.absent[head_measures().site.name]
    assert not found.heads


def tiny(kind: str) -> nn.Module:
    made: dict[str, nn.Module] = {
        "bert": BertModel(BertConfig(vocab_size=20, **SMALL)),
        "gpt2": GPT2Model(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)),
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=20, **SMALL)),
        "vit": ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)),
        "torch": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2)),
    }
    return made[kind].eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit", "torch"])
def test_a_fresh_copy_has_new_weights_and_the_model_keeps_its_own(kind: str) -> None:
    model = tiny(kind).double()
    before, state = weights(model), torch.get_rng_state()
    fresh, other = fresh_copy(model, 3), fresh_copy(model, 4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    matrices = [name for name, value in model.named_parameters() if value.dim() > 1]
    parameters = dict(fresh.named_parameters())
    assert all(not torch.equal(parameters[name], value) for name, value in model.named_parameters() if name in matrices)
    assert any(not torch.equal(parameters[name], value) for name, value in other.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in fresh_copy(model, 3).named_parameters())
    assert next(fresh.parameters()).dtype == torch.float64
    assert not fresh.training


def test_a_model_that_its_config_no_longer_makes_is_refused() -> None:
    model = tiny("llama")
    del model.model.layers[1]  # type: ignore[union-attr]
    with pytest.raises(InputError, match="was changed since it was made"):
        fresh_copy(model)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="no parameters"):
        fresh_copy(nn.ReLU())
