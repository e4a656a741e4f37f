"""HAM: queries, keys and values of parallel runs mixed in a real video model and a joint model, against the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headscope.interventions import Plan
from headscope.interventions.diffusion.style import adain, mix_style
from headscope.kernels.errors import EditError, ShapeError
from headscope.probe import Capture, Keep, Probe
from tests.models import diffusion

pytest.importorskip("diffusers")
Model = tuple[nn.Module, dict[str, Any]]
WHOLE = Keep(qk=True, v=True)


def made(name: str) -> Model:
    torch.manual_seed(0)
    model, inputs = next(entry for entry in diffusion.ENTRIES if entry.name.startswith(name)).make()
    return model.eval(), inputs


@pytest.fixture(scope="module")
def wan() -> Model:
    return made("Wan")


@pytest.fixture(scope="module")
def flux() -> Model:
    return made("Flux (joint")


def other(inputs: dict[str, Any], seed: int, *names: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return inputs | {name: torch.randn(inputs[name].shape, generator=generator) for name in names}


def kept(model: nn.Module, *inputs: dict[str, Any], plan: Plan | None = None) -> Capture:
    with torch.no_grad(), Probe(model).capture(WHOLE) as seen:
        for each in inputs:
            if plan is None:
                model(**each)
            else:
                with plan.on(model):
                    model(**each)
    return seen


def restyled(content: Tensor, style: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    c, s = content.double().numpy(), style.double().numpy()
    normal = (c - c.mean(2, keepdims=True)) / np.sqrt(c.var(2, keepdims=True) + 1e-5)
    found: np.ndarray[Any, np.dtype[np.float64]] = normal * np.sqrt(s.var(2, keepdims=True) + 1e-5) + s.mean(2, keepdims=True)
    return found


def test_adain_gives_each_channel_the_styles_mean_and_spread_and_keeps_the_contents_order() -> None:
    content, style = torch.randn(2, 3, 40, 5, dtype=torch.float64), 4 + 3 * torch.randn(1, 3, 25, 5, dtype=torch.float64)
    found = adain(content, style)
    np.testing.assert_allclose(found.numpy(), restyled(content, style), rtol=1e-12)
    torch.testing.assert_close(found.mean(2), style.mean(2).expand(2, 3, 5), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argsort(2), content.argsort(2))
    torch.testing.assert_close(adain(content, content), content, rtol=1e-12, atol=1e-12)
    flat = adain(torch.ones(1, 1, 4, 2), torch.randn(1, 1, 4, 2))
    assert bool(flat.isfinite().all())


def test_weights_of_zero_change_nothing_to_the_bit(wan: Model) -> None:
    model, inputs = wan
    content, style = (kept(model, other(inputs, seed, "hidden_states", "encoder_hidden_states")) for seed in (1, 2))
    with torch.no_grad():
        plain = model(**inputs).sample
        with mix_style(content, style, alpha=0.0, beta=0.0, words=0.0).on(model):
            assert torch.equal(model(**inputs).sample, plain)
        with mix_style(content, style, alpha=0.0, beta=0.0).on(model):
            assert not torch.equal(model(**inputs).sample, plain)


def test_without_alpha_and_beta_a_style_of_the_same_words_changes_nothing(wan: Model) -> None:
    """Keys and values of cross-attention come from the words alone."""
    model, inputs = wan
    content, style = (kept(model, other(inputs, seed, "hidden_states")) for seed in (1, 2))
    with torch.no_grad():
        plain = model(**inputs).sample
        with mix_style(content, style, alpha=0.0, beta=0.0).on(model):
            torch.testing.assert_close(model(**inputs).sample, plain, rtol=0, atol=0)


def test_self_attention_gets_the_restyled_content_and_cross_attention_the_styles_words(wan: Model) -> None:
    model, inputs = wan
    runs = [kept(model, other(inputs, seed, "hidden_states", "encoder_hidden_states")) for seed in (1, 2)]
    own, (content, style) = kept(model, inputs), runs
    plan = mix_style(content, style, alpha=0.7, beta=0.4, layers=[0])
    mixed = kept(model, inputs, plan=plan)
    site = "blocks.0.attn1#0"
    for name in "qkv":
        own_value, c, s = (getattr(run, name)(site=site) for run in (own, content, style))
        expected = 0.7 * restyled(c, s) + 0.3 * own_value.double().numpy()
        np.testing.assert_allclose(getattr(mixed, name)(site=site).numpy(), expected, rtol=1e-4, atol=1e-5)
    site = "blocks.0.attn2#0"
    for name in "kv":
        torch.testing.assert_close(getattr(mixed, name)(site=site), getattr(style, name)(site=site), rtol=1e-6, atol=1e-6)
    unmixed = kept(model, inputs, plan=mix_style(content, style, alpha=0.7, beta=0.0, layers=[0]))  # the query before it is mixed
    expected_q = 0.4 * content.q(site=site) + 0.6 * unmixed.q(site=site)
    torch.testing.assert_close(mixed.q(site=site), expected_q, rtol=1e-5, atol=1e-6)


def test_each_step_is_mixed_with_the_same_step_of_the_other_runs(wan: Model) -> None:
    model, inputs = wan
    steps = [inputs, inputs | {"timestep": inputs["timestep"] / 2}]
    content = kept(model, *(other(step, 1, "hidden_states") for step in steps))
    style = kept(model, *(other(step, 2, "hidden_states") for step in steps))
    with torch.no_grad(), mix_style(content, style, alpha=1.0, beta=0.0, layers=[0]).on(model), Probe(model).capture(WHOLE) as seen:
        for step in steps:
            model(**step)
    for step in range(2):
        c, s = (run.v(site="blocks.0.attn1#0", step=step) for run in (content, style))
        np.testing.assert_allclose(seen.v(site="blocks.0.attn1#0", step=step).numpy(), restyled(c, s), rtol=1e-4, atol=1e-5)


def test_in_joint_attention_only_image_tokens_are_mixed_and_only_they_give_statistics(flux: Model) -> None:
    model, inputs = flux
    content, style = (kept(model, other(inputs, seed, "hidden_states")) for seed in (1, 2))
    mixed = kept(model, inputs, plan=mix_style(content, style, alpha=1.0, beta=0.0, image=range(6, 22)))
    site = "transformer_blocks.0.attn#0"
    for name in "qkv":
        found, c, s, own = (getattr(run, name)(site=site) for run in (mixed, content, style, kept(model, inputs)))
        np.testing.assert_allclose(found[:, :, 6:].numpy(), restyled(c[:, :, 6:], s[:, :, 6:]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[:, :, :6], own[:, :, :6], rtol=1e-6, atol=1e-6)


def test_a_mix_is_kept_as_a_recipe_with_the_tensors_of_both_runs(wan: Model, tmp_path: Path) -> None:
    model, inputs = wan
    content, style = (kept(model, other(inputs, seed, "hidden_states", "encoder_hidden_states")) for seed in (1, 2))
    plan = mix_style(content, style, alpha=0.5, beta=0.5)
    again = Plan.load(plan.save(tmp_path / "style.yaml"))
    with torch.no_grad():
        outputs = []
        for each in (plan, again):
            with each.on(model):
                outputs.append(model(**inputs).sample)
    assert torch.equal(*outputs)


def test_what_cannot_be_mixed_is_refused(wan: Model, flux: Model) -> None:
    content = kept(*wan)
    with pytest.raises(EditError, match="chooses kinds and positions itself"):
        mix_style(content, content, alpha=1.0, beta=0.0, kind="self")
    joint = kept(*made("SD3"))
    both = {site.kind for site in joint.sites}
    assert both == {"joint"}
    with pytest.raises(EditError, match="the content run kept joint attention"):
        mix_style(joint, joint, alpha=1.0, beta=0.0)
    model, inputs = wan
    tall = {name: torch.cat([value, value]) for name, value in inputs.items()}
    plan = mix_style(content, kept(model, inputs | tall), alpha=1.0, beta=0.0)
    with pytest.raises(ShapeError, match="differ in more than their tokens"), torch.no_grad(), plan.on(model):
        model(**inputs)
