"""Inference-time intervention: what its probes find, and what its shift is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interventions import Plan
from headscope.interventions.language.inference_time import TruthHeads, fit_truth_heads
from headscope.kernels.errors import InputError
from headscope.probe import Keep, Probe
from tests.interventions.small_models import HEADS, LAYERS, WIDTH, changed, llama, prompts

pytest.importorskip("sklearn")


def labelled(count: int = 16) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Prompts whose label is the token that fills their second half, so that heads which look around know it."""
    found, labels = prompts(*[6] * count, seed=5), [i % 2 for i in range(count)]
    for prompt, label in zip(found, labels, strict=True):
        prompt["input_ids"][0, 3:] = 11 if label else 22
    return found, labels


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def fitted(model: Any) -> TruthHeads:
    return fit_truth_heads(model, *labelled())


def last_z(model: Any, layer: int) -> Tensor:
    """[N, H, D] at the last token."""
    rows = []
    for prompt in labelled()[0]:
        with torch.no_grad(), Probe(model).capture(Keep(z=True)) as seen:
            model(**prompt)
        rows.append(seen.z(layer=layer)[0, :, -1])
    return torch.stack(rows)


def test_the_direction_is_the_difference_of_the_means_and_the_spread_that_along_it(model: Any, fitted: TruthHeads) -> None:
    truth = torch.tensor(labelled()[1])
    for layer in range(LAYERS):
        z = last_z(model, layer)
        for head in range(HEADS):
            theta = z[truth == 1, head].mean(0) - z[truth == 0, head].mean(0)
            theta = theta / theta.norm()
            torch.testing.assert_close(fitted.directions[layer][head].double(), theta, atol=1e-6, rtol=1e-5)
            along = z[:, head] @ theta
            wanted = float(((along - along.mean()).square().sum() / (len(along) - 1)).sqrt())
            assert float(fitted.spread[layer, head]) == pytest.approx(wanted, rel=1e-6)


def test_probes_know_what_is_there_and_nothing_of_labels_at_random(model: Any, fitted: TruthHeads) -> None:
    assert float(fitted.accuracy.max()) == 1.0
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.tensor(labelled()[1])[torch.randperm(16, generator=generator)].tolist()
    assert float(fit_truth_heads(model, labelled()[0], shuffled).accuracy.mean()) < 0.7
    assert fitted.top(3)[0][2] == 1.0
    assert fitted.to_frame()["accuracy"].tolist() == fitted.accuracy.flatten().tolist()


def test_a_probe_s_direction_separates_the_labels(model: Any) -> None:
    found = fit_truth_heads(model, *labelled(), direction="probe")
    place, head, accuracy = found.top(1)[0]
    along = last_z(model, place)[:, head] @ found.directions[place][head].double()
    truth = torch.tensor(labelled()[1])
    assert accuracy == 1.0
    assert float(along[truth == 1].min()) > float(along[truth == 0].max())


def test_at_all_positions_it_is_a_bias_of_the_output_projection(model: Any, fitted: TruthHeads) -> None:
    plan = fitted.plan(heads=5, strength=7.0, queries=None)
    shifts = torch.zeros(LAYERS, HEADS * WIDTH, dtype=torch.float64)
    for place, head, _ in fitted.top(5):
        theta = fitted.directions[place][head].double()
        shifts[place, head * WIDTH : (head + 1) * WIDTH] = 7.0 * fitted.spread[place, head] * theta

    def change(other: Any) -> None:
        for place, layer in enumerate(other.model.layers):
            projection = layer.self_attn.o_proj
            projection.bias = torch.nn.Parameter(projection.weight @ shifts[place])

    prompt = labelled()[0][0]
    with torch.no_grad(), plan.on(model):
        found = model(**prompt).logits
    with torch.no_grad():
        wanted, plain = changed(model, change)(**prompt).logits, model(**prompt).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert (wanted - plain).abs().max() > 1e-3


def test_by_default_the_last_token_of_a_call_alone_is_shifted_and_the_recipe_says_so(
    model: Any, fitted: TruthHeads, tmp_path: Path
) -> None:
    plan = fitted.plan(heads=4, strength=5.0)
    plan.save(tmp_path / "recipe.yaml")
    assert Plan.load(tmp_path / "recipe.yaml") == plan
    prompt = labelled()[0][0]
    with torch.no_grad(), plan.on(model):
        found = model(**prompt).logits
    plain = model(**prompt).logits
    assert torch.equal(found[:, :-1], plain[:, :-1])
    assert (found[:, -1] - plain[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda m: fit_truth_heads(m, labelled()[0], [1] * 16), "0 prompts of the rarer label"),
        (lambda m: fit_truth_heads(m, labelled()[0], [1, 0]), "labels of shape"),
        (lambda m: fit_truth_heads(m, *labelled(), direction="best"), "choose mass-mean or probe"),
    ],
)
def test_bad_input_is_named(model: Any, act: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        act(model)
