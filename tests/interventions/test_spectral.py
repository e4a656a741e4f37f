"""Spectral editing against its formula in numpy, and the projection that carries it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from headscope.interventions import Edit, Plan, project
from headscope.interventions.edit import change
from headscope.interventions.language.spectral import fit_spectral
from headscope.kernels.errors import EditError, InputError
from tests.interventions.dense import make_call
from tests.interventions.small_models import EMBED, LAYERS, hooked, llama, prompts

N = 12
NEUTRAL, GOOD, BAD = prompts(*[6] * N, seed=1), prompts(*[7] * N, seed=2), prompts(*[5] * N, seed=3)
MLPS = [f"model.layers.{layer}.mlp" for layer in range(LAYERS)]


def states(model: Any, path: str, own: list[dict[str, Tensor]]) -> np.ndarray:
    rows: list[np.ndarray] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, o: rows.append(o[0, -1].numpy()))
    with torch.no_grad():
        for prompt in own:
            model(**prompt)
    handle.remove()
    return np.stack(rows)


def published(model: Any, path: str, explained: float) -> Any:
    """x -> (U₊U₊ᵀ + Ū₋Ū₋ᵀ) x, rescaled, from covariances in numpy."""
    neutral, good, bad = (states(model, path, own) for own in (NEUTRAL, GOOD, BAD))

    def split(other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left, sizes, _ = np.linalg.svd(neutral.T @ other / N)
        total, count = 0.0, 0
        while total < explained * float((sizes**2).sum()) - 1e-12:
            total, count = total + float(sizes[count] ** 2), count + 1
        return left[:, :count], left[:, count:]

    plus, minus = split(good)[0], split(bad)[1]

    def act(x: Tensor) -> Tensor:
        new = torch.from_numpy(x.numpy() @ (plus @ plus.T + minus @ minus.T).T)
        return new * (x.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True))

    return act


@pytest.mark.parametrize("explained", [0.8, 0.99])
def test_the_edit_is_the_published_projection_with_its_length_restored(explained: float) -> None:
    model = llama()
    found = fit_spectral(model, NEUTRAL, GOOD, BAD, modules=MLPS, explained=explained)
    with torch.no_grad(), found.plan(last=1).on(model):
        logits = model(**NEUTRAL[0]).logits
    wanted = hooked(model, MLPS[-1:], published(model, MLPS[-1], explained), NEUTRAL[0])
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert (wanted - model(**NEUTRAL[0]).logits).abs().max() > 1e-2


def test_every_token_keeps_its_length_after_the_blocks_too() -> None:
    model = llama()
    found = fit_spectral(model, NEUTRAL, GOOD, BAD)
    (edit,) = found.plan(last=1).edits
    x = torch.randn(2, 1, 5, EMBED, dtype=torch.float64)
    new = change(edit, "resid", x, make_call(), None)
    torch.testing.assert_close(new.norm(dim=-1), x.norm(dim=-1), atol=1e-9, rtol=1e-9)
    assert (new - x).abs().max() > 1e-2


def test_good_prompts_that_are_the_bad_ones_change_nothing() -> None:
    found = fit_spectral(llama(), NEUTRAL, GOOD, GOOD)
    assert [own.numel() for own in found.strengths] == [0] * LAYERS
    assert found.kept == found.dropped


def test_the_recipe_holds_one_strength_for_each_direction_and_the_schema_allows_it(tmp_path: Path) -> None:
    model = llama()
    plan = fit_spectral(model, NEUTRAL, GOOD, BAD, explained=0.5).plan(last=2)
    plan.save(tmp_path / "recipe.yaml")
    loaded = Plan.load(tmp_path / "recipe.yaml")
    assert loaded == plan
    document = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    schema = Path(__file__).parents[2] / "interventions/recipe.schema.json"
    jsonschema.validate(document, yaml.safe_load(schema.read_text()))
    assert document["edits"][0]["value"]["renormalise"] is True
    names: dict[str, Any] = {}
    exec(plan.to_python(), names)
    assert names["plan"] == plan


def test_a_projection_takes_from_each_direction_what_its_strength_says() -> None:
    basis = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
    strength = torch.tensor([0.25, -1.0], dtype=torch.float64)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    wanted = torch.empty_like(x)
    for place in np.ndindex(2, 3, 4):
        v = x[place]
        wanted[place] = v - sum(strength[i] * (basis[:, i] @ v) * basis[:, i] for i in range(2))
    torch.testing.assert_close(change(Edit("q", project(basis, strength)), "q", x, make_call(), None), wanted, atol=1e-12, rtol=1e-12)
    scaled = change(Edit("q", project(basis, strength, renormalise=True)), "q", x, make_call(), None)
    torch.testing.assert_close(
        scaled, wanted * (x.norm(dim=-1) / wanted.norm(dim=-1))[..., None], atol=1e-12, rtol=1e-12
    )  # fmt: skip


def test_a_token_of_which_nothing_is_left_stays_zero() -> None:
    basis = torch.eye(3, dtype=torch.float64)[:, :1]
    x = torch.tensor([2.0, 0, 0], dtype=torch.float64).expand(1, 1, 1, 3)
    assert not bool(change(Edit("q", project(basis, renormalise=True)), "q", x, make_call(), None).any())


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (lambda: fit_spectral(llama(), NEUTRAL, GOOD[:3], BAD), InputError, "12, 3, 12 neutral, positive and negative"),
        (lambda: fit_spectral(llama(), NEUTRAL, GOOD, BAD, explained=0.0), InputError, "a share above 0"),
        (lambda: project(torch.eye(4)[:, :2], torch.ones(3)), EditError, "one for each column of the basis"),
        (lambda: project(torch.eye(4)[:, :2], torch.ones(2), keep=True), EditError, "without keep"),
    ],
)
def test_bad_input_is_named(act: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        act()
