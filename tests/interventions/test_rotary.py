"""The rotary embedding read off models of several conventions, and the edits that are made with it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headscope.interventions import Edit, Plan, band, phase, reposition, select
from headscope.interventions.rotary import Phase
from headscope.kernels.errors import EditError, InputError, SelectionError, ShapeError
from headscope.probe.rotary import Rotary, read_rotary

IDS = torch.randint(1, 50, (1, 10), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=50, head_dim=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
# name of config and model, more settings, planes by hand (first, second), dimensions that pass, gain
HALF = [[i, i + 8] for i in range(8)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "Llama": ({}, HALF, 0, 1.0),
    "Qwen3": ({}, HALF, 0, 1.0),
    "Cohere": ({}, [[2 * i, 2 * i + 1] for i in range(8)], 0, 1.0),
    "Glm": ({}, [[2 * i, 2 * i + 1] for i in range(4)], 8, 1.0),
    "GPTNeoX": ({"rotary_pct": 0.25}, [[0, 2], [1, 3]], 12, 1.0),  # one projection makes queries, keys and values
    "Phi3": ({}, HALF, 0, 1.0),
    "Llama, YaRN": ({"rope_scaling": YARN, "max_position_embeddings": 128}, HALF, 0, 1.1386),
}


def build(name: str, **more: Any) -> nn.Module:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    family = name.partition(",")[0]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | MODELS[name][0] | more))
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    model = build("Llama")
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data *= 5
    return model


def logits(model: nn.Module, plan: Plan | None = None, **inputs: Any) -> Tensor:
    inputs = {"input_ids": IDS} | inputs
    with torch.no_grad():
        if plan is None:
            return model(**inputs).logits
        with plan.on(model):
            return model(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_planes_angles_and_gain_are_read_off_any_convention(name: str) -> None:
    _, planes, passing, gain = MODELS[name]
    found = read_rotary(build(name), {"input_ids": IDS})
    assert len(found) == 2
    for rotary in found.values():
        assert sorted(sorted(pair) for pair in rotary.planes.tolist()) == planes
        assert len(rotary.passing) == passing
        assert rotary.gain == pytest.approx(gain, abs=1e-3)
        places = torch.arange(10, dtype=torch.float64)[:, None]
        torch.testing.assert_close(rotary.angles, places * rotary.frequencies, atol=1e-4, rtol=1e-4)
        assert float(rotary.frequencies.max()) == pytest.approx(1.0, abs=1e-4)


def test_a_model_without_a_rotary_embedding_has_none() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=32)).eval()
    assert read_rotary(model, {"input_ids": IDS}) == {}


def test_the_axes_of_a_picture_are_read_off_a_joint_model() -> None:
    """Text tokens stand at zero, image tokens at their row and column: of 12 rotating dimensions 6 turn with each."""
    pytest.importorskip("diffusers")
    from tests.models import diffusion

    rows = [row for value in vars(diffusion).values() if isinstance(value, (list, tuple)) for row in value if hasattr(row, "make")]
    torch.manual_seed(0)
    model, inputs = next(row for row in rows if row.name.startswith("Flux (joint")).make()
    found = read_rotary(model.eval(), {**inputs})
    text = inputs["encoder_hidden_states"].shape[1]
    for rotary in found.values():
        assert float(rotary.angles[:text].abs().max()) == 0
        places = inputs["img_ids"][:, 1:].double()  # [image tokens, row and column]
        fit = torch.linalg.lstsq(places, rotary.angles[text:]).solution
        torch.testing.assert_close(places @ fit, rotary.angles[text:], atol=1e-4, rtol=1e-4)
        assert ((fit.abs() > 1e-6).sum(0) == 1).all()  # each plane turns with one axis


def test_several_samples_are_refused(llama: nn.Module) -> None:
    with pytest.raises(InputError, match="one sample"):
        read_rotary(llama, {"input_ids": IDS.expand(2, -1)})


def test_reading_leaves_the_model_as_it_was(llama: nn.Module) -> None:
    before = logits(llama)
    state = torch.random.get_rng_state()
    read_rotary(llama, {"input_ids": IDS})
    assert torch.equal(logits(llama), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def read(model: nn.Module, length: int = 40) -> dict[int, Rotary]:
    found = read_rotary(model, {"input_ids": torch.ones(1, length, dtype=torch.long)})
    return {layer: found[f"model.layers.{layer}.self_attn#0"] for layer in range(2)}


def test_new_positions_are_what_the_model_does_with_those_position_ids(llama: nn.Module) -> None:
    rotary = read(llama)
    new = torch.tensor([3, 4, 9, 10, 11, 20, 21, 22, 30, 31])
    plan = Plan([Edit("pos", reposition(rotary[layer], new), select(layer=layer)) for layer in range(2)])
    torch.testing.assert_close(logits(llama, plan), logits(llama, position_ids=new[None]), atol=1e-4, rtol=1e-4)
    assert (logits(llama, plan) - logits(llama)).abs().max() > 1e-2


def test_moving_all_tokens_alike_changes_nothing_and_moving_queries_alone_does(llama: nn.Module) -> None:
    rotary = read(llama)
    both = Plan([Edit("pos", reposition(rotary[0], shift=7), select(layer=0))])
    torch.testing.assert_close(logits(llama, both), logits(llama), atol=1e-4, rtol=1e-4)
    one = Plan([Edit("pos", reposition(rotary[0], shift=7), select(layer=0, queries=slice(None)))])
    assert (logits(llama, one) - logits(llama)).abs().max() > 1e-2


def test_a_phase_of_the_frequencies_at_q_is_a_shift_of_the_keys_the_other_way(llama: nn.Module) -> None:
    rotary = read(llama)
    turned = Plan([Edit("q", phase(rotary[1], 3 * rotary[1].frequencies), select(layer=1))])
    moved = Plan([Edit("k", phase(rotary[1], -3 * rotary[1].frequencies), select(layer=1))])
    torch.testing.assert_close(logits(llama, turned), logits(llama, moved), atol=1e-4, rtol=1e-4)
    assert (logits(llama, turned) - logits(llama)).abs().max() > 1e-2


def test_the_same_phase_at_queries_and_keys_is_no_change(llama: nn.Module) -> None:
    rotary = read(llama)
    angles = torch.rand(2, 8) * 3
    groups = angles.repeat_interleave(2, 0)  # two query heads share a key head
    plan = Plan([Edit("q", phase(rotary[0], groups), select(layer=0)), Edit("k", phase(rotary[0], angles), select(layer=0))])
    torch.testing.assert_close(logits(llama, plan), logits(llama), atol=1e-4, rtol=1e-4)


def test_a_band_of_ones_is_nothing_and_of_a_factor_everywhere_a_temperature(llama: nn.Module) -> None:
    from headscope.interventions import scale

    rotary = read(llama)
    assert torch.equal(logits(llama, Plan([Edit("k", band(rotary[0], torch.ones(8)), select(layer=0))])), logits(llama))
    found = logits(llama, Plan([Edit("k", band(rotary[0], torch.full((8,), 0.5)), select(layer=0))]))
    torch.testing.assert_close(found, logits(llama, Plan([Edit("k", scale(0.5), select(layer=0))])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: phase(torch.tensor([[0, 1], [1, 2]]), torch.zeros(2)), ShapeError, "each dimension in one pair"),
        (lambda: phase(torch.tensor([[0, 1]]), torch.zeros(2)), ShapeError, r"angles \[2\] for 1 planes"),
        (lambda: reposition(Rotary("x", torch.tensor([[0, 1]]), torch.zeros(3, 1), 1.0, ())), EditError, "give positions=.*or a shift="),
        (lambda: Edit("z", Phase(torch.tensor([[0, 1]]), torch.ones(1))), EditError, "cannot be done at z"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_position_beyond_the_table_is_refused_with_its_range(llama: nn.Module) -> None:
    rotary = read(llama, 12)
    with pytest.raises(SelectionError, match="is to stand at position 7 to 16: the table that was read has 0 to 11"):
        logits(llama, Plan([Edit("pos", reposition(rotary[0], shift=7), select(layer=0))]))
