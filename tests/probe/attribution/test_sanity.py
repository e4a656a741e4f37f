"""Drawing weights anew goes from the output down, leaves the model itself alone, and tells maps of the model from maps of the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from headscope.kernels.errors import InputError, NonFiniteError, SelectionError, ShapeError
from headscope.probe.attribution.sanity import draw_anew, layers_down, randomise_layers, similarity


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, num_labels=4,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


IMAGE = {"pixel_values": torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


def show_input(model: nn.Module, inputs: Mapping[str, Any], target: Any) -> Tensor:
    """A map that has nothing to do with the model."""
    image: Tensor = inputs["pixel_values"]
    return image


def test_layers_go_from_the_output_down_and_miss_no_weight() -> None:
    model = vit()
    found = layers_down(model, IMAGE)
    assert list(found)[:4] == ["classifier", "vit.layernorm", "vit.layers.1", "vit.layers.0"]
    assert list(found)[-1].startswith("vit.embeddings")
    weights = [id(weight) for group in found.values() for weight in group]
    assert sorted(weights) == sorted(id(weight) for weight in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_the_model_itself_keeps_its_weights() -> None:
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    randomise_layers(model, IMAGE, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_map_of_the_input_stays_the_same_and_one_of_the_model_does_not() -> None:
    blind = randomise_layers(vit(), IMAGE, 1, show_input)
    assert all((step.spearman, step.absolute) == pytest.approx((1, 1)) for step in blind.steps)
    assert all(step.ssim == pytest.approx(1) for step in blind.steps)
    seeing = randomise_layers(vit(), IMAGE, 1)
    assert len(seeing.steps) == len(blind.steps)
    assert abs(seeing.steps[-1].spearman or 0) < 0.6
    assert seeing == randomise_layers(vit(), IMAGE, 1)
    assert seeing != randomise_layers(vit(), IMAGE, 1, seed=1)
    assert "vit.layers.1: spearman" in str(seeing)
    assert seeing.to_dict()["steps"][0]["module"] == "classifier"


def test_new_weights_have_the_mean_and_spread_of_the_old_and_shared_ones_are_drawn_once() -> None:
    layer = nn.Linear(200, 100)
    with torch.no_grad():
        layer.weight.mul_(3).add_(2)
        layer.bias.fill_(0.5)
    old, drawn = layer.weight.detach().clone(), set[int]()
    draw_anew(list(layer.parameters()), torch.Generator().manual_seed(0), drawn)
    assert layer.weight.mean().item() == pytest.approx(old.mean().item(), abs=0.01)
    assert layer.weight.std().item() == pytest.approx(old.std().item(), rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([layer.weight.detach().flatten(), old.flatten()]))[0, 1])) < 0.03
    assert torch.allclose(layer.bias, torch.full((100,), 0.5))
    again = layer.weight.detach().clone()
    draw_anew(list(layer.parameters()), torch.Generator().manual_seed(1), drawn)
    assert torch.equal(layer.weight, again)


def test_text_has_no_structural_similarity_and_progress_counts_layers() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    seen: list[tuple[int, int]] = []
    found = randomise_layers(
        LlamaForCausalLM(config).eval(), {"input_ids": torch.tensor([[5, 3, 4, 9, 6]])}, progress=lambda *n: seen.append(n)
    )
    assert [step.module for step in found.steps] == ["lm_head", "model.norm", "model.layers.1", "model.layers.0", "model.embed_tokens"]
    assert {step.ssim for step in found.steps} == {None}
    assert seen == [(done, 5) for done in range(1, 6)]


def test_similarity_is_the_written_out_mean_over_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(9, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    found = similarity(5 * a - 1, b)
    a, b = ((x - x.min()) / (x.max() - x.min()) for x in (a, b))
    expected = []
    for top in range(3):
        for left in range(2):
            x, y = (m[top : top + 7, left : left + 7].flatten() for m in (a, b))
            mx, my = x.mean(), y.mean()
            vx, vy, c = ((x - mx) ** 2).sum() / 48, ((y - my) ** 2).sum() / 48, ((x - mx) * (y - my)).sum() / 48
            expected.append((2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert found == pytest.approx(float(sum(expected) / 6), abs=1e-12)  # type: ignore[arg-type]
    assert similarity(a, a) == pytest.approx(1)
    with pytest.raises(ShapeError, match="give two of one shape"):
        similarity(a, a[:5])


def test_what_cannot_be_checked_is_refused() -> None:
    class Plain(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.sum((1, 2, 3))[:, None].expand(-1, 2)

    with pytest.raises(InputError, match="Plain has no weights that could be drawn anew"):
        randomise_layers(Plain().eval(), IMAGE, 0)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        randomise_layers(vit(), IMAGE, 0, lambda model, inputs, target: inputs["pixel_values"] / 0)
    with pytest.raises(SelectionError, match="which input"):
        randomise_layers(vit(), IMAGE, 0, name="input_ids")
