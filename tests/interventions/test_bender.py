"""AttentionBender: maps of words bent in real models, against the pattern written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headscope.interventions import Plan, find_roles, grid, role, select
from headscope.interventions.diffusion.bender import bend
from headscope.interventions.diffusion.maps import watch_maps
from headscope.kernels.errors import EditError, SelectionError
from headscope.probe import Keep, Probe
from tests.models import diffusion
from tests.models.entry import Entry

pytest.importorskip("diffusers")


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    entry: Entry = next(entry for entry in diffusion.ENTRIES if entry.name.startswith(name))
    torch.manual_seed(0)
    model, inputs = entry.make()
    return model.eval(), inputs


@pytest.fixture(scope="module")
def flux() -> tuple[nn.Module, dict[str, Any]]:
    return made("Flux (joint")


@pytest.fixture(scope="module")
def wan() -> tuple[nn.Module, dict[str, Any]]:
    return made("Wan")


def patterns(model: nn.Module, inputs: dict[str, Any], plan: Plan | None = None, sites: str = "*") -> list[Tensor]:
    with torch.no_grad(), Probe(model).capture(Keep(pattern=True), sites=sites) as seen:
        if plan is None:
            model(**inputs)
        else:
            with plan.on(model):
                model(**inputs)
    return [seen.pattern(site=site.name) for site in seen.sites]


IDENTITIES = [
    ("rotate", 0.0),
    ("scale", 1.0),
    ("translate-x", 0.0),
    ("translate-y", 0.0),
    ("blur", 0.0),
    ("sharpen", 0.0),
    ("amplify", 1.0),
]


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("motion", "amount"), IDENTITIES)
def test_an_amount_of_nothing_leaves_a_video_model_to_the_bit(
    wan: tuple[nn.Module, dict[str, Any]], motion: str, amount: float, renormalise: bool
) -> None:
    model, inputs = wan
    plan = bend(motion, amount, grid=(2, 4, 4), tokens=2, kind="cross", renormalise=renormalise)
    with torch.no_grad():
        plain = model(**inputs).sample
        with plan.on(model):
            assert torch.equal(model(**inputs).sample, plain)


def test_in_cross_attention_each_frame_of_the_words_map_is_mirrored_and_nothing_else(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = wan
    where = {"sites": "blocks.0.attn2*", "grid": (2, 4, 4), "tokens": 2}
    plain, bent = (patterns(model, inputs, plan, "blocks.0.attn2*")[0] for plan in (None, bend("flip-h", **where)))
    expected = plain.double().reshape(1, 2, 2, 4, 4, 6).clone()
    expected[..., 2] = expected[..., 2].flip(4)
    torch.testing.assert_close(bent.double(), expected.reshape(plain.shape), rtol=1e-6, atol=1e-7)
    assert (bent.sum(-1) - 1).abs().max() > 1e-4
    again = patterns(model, inputs, bend("flip-h", renormalise=True, **where), "blocks.0.attn2*")[0].double()
    sums = expected.sum(-1, keepdim=True)
    torch.testing.assert_close(again, (expected / sums).reshape(plain.shape), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again.sum(-1), torch.ones(1, 2, 32, dtype=torch.float64), rtol=1e-6, atol=0)


def test_mirrored_twice_is_the_model_as_it_was(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = wan
    once = bend("flip-v", grid=(2, 4, 4), tokens=range(6), kind="cross")
    with torch.no_grad():
        plain = model(**inputs).sample
        with once.on(model):
            assert (model(**inputs).sample - plain).abs().max() > 1e-6
        with Plan([*once, *once]).on(model):
            torch.testing.assert_close(model(**inputs).sample, plain, rtol=1e-5, atol=1e-6)


def test_a_bend_of_a_joint_model_leaves_text_queries_and_image_keys_alone(flux: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = flux
    site = "transformer_blocks.0.attn"
    plain = patterns(model, inputs, None, site)[0]
    bent = patterns(model, inputs, bend("translate-x", 0.25, grid=(4, 4), offset=6, tokens=range(6), sites=site), site)[0]
    assert torch.equal(bent[:, :, :6], plain[:, :, :6])
    assert torch.equal(bent[..., 6:], plain[..., 6:])
    moved = plain[:, :, 6:, :6].reshape(1, 2, 4, 4, 6)
    torch.testing.assert_close(bent[:, :, 6:, :6].reshape(1, 2, 4, 4, 6)[:, :, :, 1:], moved[:, :, :, :-1], rtol=1e-5, atol=1e-6)
    assert (bent[:, :, 6:, :6].reshape(1, 2, 4, 4, 6)[:, :, :, 0].abs() < 1e-6).all()


def test_roles_name_the_words_of_a_joint_model(flux: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = flux
    roles = find_roles(model, inputs, {"text": "encoder_hidden_states", "image": "hidden_states"})
    by_role, by_place = (bend("flip-h", grid=(4, 4), offset=6, tokens=tokens) for tokens in (role("text"), range(6)))
    with torch.no_grad():
        with by_role.on(model, roles=roles):
            first = model(**inputs).sample
        with by_place.on(model):
            assert torch.equal(first, model(**inputs).sample)


def test_amplifying_everywhere_and_renormalising_is_a_bias_of_the_scores(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    from headscope.interventions import Edit, bias

    model, inputs = wan
    bent = bend("amplify", 3.0, grid=(2, 4, 4), tokens=1, kind="cross", renormalise=True)
    biased = Plan([Edit("scores", bias(math.log(3.0)), select(keys=1, kind="cross"))])
    with torch.no_grad():
        outputs = []
        for plan in (bent, biased):
            with plan.on(model):
                outputs.append(model(**inputs).sample)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_a_region_takes_on_the_new_map_and_the_rest_keeps_its_own(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = wan
    site = "blocks.0.attn2*"
    left = grid((2, 4, 4), columns=slice(0, 2))
    plain, bent = (
        patterns(model, inputs, plan, site)[0].reshape(1, 2, 2, 4, 4, 6)
        for plan in (None, bend("flip-h", grid=(2, 4, 4), tokens=2, sites=site, region=left))
    )
    assert torch.equal(bent[:, :, :, :, 2:], plain[:, :, :, :, 2:])
    torch.testing.assert_close(bent[:, :, :, :, :2, 2], plain[..., 2].flip(4)[:, :, :, :, :2])


def test_a_map_moved_by_a_cell_shows_in_the_read_out_moved_by_a_cell(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = wan
    where = select(sites="blocks.0.attn2*")
    found = []
    for plan in (Plan([]), bend("translate-y", 0.25, grid=(2, 4, 4), tokens=2, sites="blocks.0.attn2*")):
        with torch.no_grad(), plan.on(model, strict=False), watch_maps(model, [2], grid=(2, 4, 4), where=where) as watched:
            model(**inputs)
        found.append(watched.maps().maps[0, 0])
    torch.testing.assert_close(found[1][:, 1:], found[0][:, :-1], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_bent_is_refused_when_it_is_written(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    with pytest.raises(EditError, match="the motions are"):
        bend("twist", 1.0, grid=(4, 4))
    with pytest.raises(SelectionError, match="kind='sideways'"):
        bend("flip-h", grid=(4, 4), kind="sideways")
    model, inputs = wan
    with (
        pytest.raises(SelectionError, match="changed nothing"),
        torch.no_grad(),
        bend("flip-h", grid=(2, 4, 4), tokens=9, kind="cross").on(model),
    ):
        model(**inputs)


def test_a_bend_is_kept_as_a_recipe(tmp_path: Any) -> None:
    plan = bend("rotate", 90.0, grid=(2, 4, 4), tokens=role("text"), renormalise=True, layers=range(4), steps=[0, 1])
    assert Plan.load(plan.save(tmp_path / "bend.yaml")) == plan
    names: dict[str, Any] = {}
    exec(plan.to_python(), names)
    assert names["plan"] == plan
