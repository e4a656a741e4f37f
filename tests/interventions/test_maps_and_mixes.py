"""Maps as pictures, mixes with other runs, noise, roles and grids."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headscope.interventions import Edit, Plan, bias, find_roles, grid, mix, noise, renorm, role, scale, select, sinkhorn, warp
from headscope.interventions.edit import change
from headscope.interventions.region import Region
from headscope.kernels.errors import EditError, InputError, SelectionError, ShapeError
from headscope.probe import Keep, Probe
from tests.interventions.dense import make_call

ROWS, COLUMNS, FRAMES, KEYS = 4, 5, 2, 3


def pattern(frames: int = 1, before: int = 0, seed: int = 0) -> Tensor:
    drawn = torch.randn(2, 2, before + frames * ROWS * COLUMNS, KEYS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.softmax(-1)


def warped(value: Tensor, motion: str, amount: float | None = None, **more: Any) -> Tensor:
    return change(Edit("pattern", warp(motion, amount, **({"grid": (ROWS, COLUMNS)} | more))), "pattern", value, make_call(), None)


@pytest.mark.parametrize(
    ("motion", "amount"), [("rotate", 0.0), ("scale", 1.0), ("translate-x", 0.0), ("blur", 0.0), ("sharpen", 0.0), ("amplify", 1.0)]
)
def test_an_amount_of_nothing_is_no_edit(motion: str, amount: float) -> None:
    value = pattern()
    assert warped(value, motion, amount) is value


@pytest.mark.parametrize("motion", ["flip-h", "flip-v"])
def test_flipping_twice_gives_the_map_back_and_once_moves_each_cell(motion: str) -> None:
    value = pattern()
    once = warped(value, motion)
    torch.testing.assert_close(warped(once, motion), value)
    cell = (1, 2)
    mirrored = (cell[0], COLUMNS - 1 - cell[1]) if motion == "flip-h" else (ROWS - 1 - cell[0], cell[1])
    torch.testing.assert_close(once[:, :, cell[0] * COLUMNS + cell[1]], value[:, :, mirrored[0] * COLUMNS + mirrored[1]])


def test_moving_by_whole_cells_moves_whole_cells() -> None:
    value = pattern()
    found = warped(value, "translate-x", 2 / COLUMNS).reshape(2, 2, ROWS, COLUMNS, KEYS)
    given = value.reshape(2, 2, ROWS, COLUMNS, KEYS)
    torch.testing.assert_close(found[:, :, :, 2:], given[:, :, :, :-2], atol=1e-6, rtol=1e-6)
    assert (found[:, :, :, :2] < 1e-6).all()
    down = warped(value, "translate-y", 1 / ROWS).reshape(2, 2, ROWS, COLUMNS, KEYS)
    torch.testing.assert_close(down[:, :, 1:], given[:, :, :-1], atol=1e-6, rtol=1e-6)


def test_a_quarter_turn_of_a_square_map_is_a_transpose_and_a_flip() -> None:
    value = torch.rand(1, 1, 16, 2, dtype=torch.float64)
    found = change(Edit("pattern", warp("rotate", 90.0, grid=(4, 4))), "pattern", value, make_call(), None).reshape(4, 4, 2)
    square = value.reshape(4, 4, 2)
    turns = [square.rot90(1), square.rot90(-1)]
    assert min(float((found - turn).abs().max()) for turn in turns) < 1e-5
    half = change(Edit("pattern", warp("rotate", 180.0, grid=(4, 4))), "pattern", value, make_call(), None).reshape(4, 4, 2)
    torch.testing.assert_close(half, square.rot90(2), atol=1e-5, rtol=1e-5)


@given(spread=st.floats(0.3, 2.0))
@settings(max_examples=10, deadline=None)
def test_blurring_keeps_a_flat_map_and_evens_out_any_other(spread: float) -> None:
    flat = torch.full((1, 1, ROWS * COLUMNS, 1), 0.3, dtype=torch.float64)
    torch.testing.assert_close(warped(flat, "blur", spread), flat, atol=1e-6, rtol=1e-6)
    value = pattern()
    assert warped(value, "blur", spread).var(dim=2).mean() < value.var(dim=2).mean()


def test_frames_are_changed_one_by_one_and_tokens_before_the_grid_are_not() -> None:
    value = pattern(FRAMES, before=2)
    found = warped(value, "flip-v", grid=(FRAMES, ROWS, COLUMNS), offset=2)
    assert torch.equal(found[:, :, :2], value[:, :, :2])
    frame = warped(value[:, :, 2 + ROWS * COLUMNS :], "flip-v")
    torch.testing.assert_close(found[:, :, 2 + ROWS * COLUMNS :], frame)


def test_only_the_selected_keys_are_changed_and_rows_sum_to_one_after_renorm_alone() -> None:
    value = pattern()
    region = Region(None, None, None, torch.tensor([[False, True, False]]))
    found = change(Edit("pattern", warp("amplify", 3.0, grid=(ROWS, COLUMNS)), select(keys=1)), "pattern", value, make_call(), region)
    assert torch.equal(found[..., [0, 2]], value[..., [0, 2]])
    torch.testing.assert_close(found[..., 1], 3 * value[..., 1])
    assert (found.sum(-1) - 1).abs().max() > 0.1
    again = change(Edit("pattern", renorm()), "pattern", found, make_call(), None)
    torch.testing.assert_close(again.sum(-1), torch.ones(2, 2, ROWS * COLUMNS, dtype=torch.float64))
    odds = (value.log() + torch.tensor([0.0, math.log(3.0), 0.0])).softmax(-1)  # amplifying and renormalising is a bias of the scores
    torch.testing.assert_close(again, odds)


def test_half_a_strength_is_half_way() -> None:
    value = pattern()
    torch.testing.assert_close(warped(value, "flip-h", strength=0.5), (value + warped(value, "flip-h")) / 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: warp("twist", 1.0, grid=(2, 2)), "the motions are scale, rotate"),
        (lambda: warp("rotate", grid=(2, 2)), "give an amount"),
        (lambda: warp("flip-h", 1.0, grid=(2, 2)), "a flip takes no amount"),
        (lambda: warp("scale", 0.0, grid=(2, 2)), "give a positive number"),
        (lambda: warp("flip-h", grid=(2,)), r"give \(rows, columns\)"),
        (lambda: warp("flip-h", grid=(2, 2), pad="wrap"), "the ways to pad are"),
        (lambda: warp("flip-h", grid=(2, 2), offset=-1), "0 or more"),
        (lambda: noise(1.0, seed=-1), "the seed is an int"),
        (lambda: noise("loud"), "the scale is a number"),
        (lambda: mix(torch.zeros(1), 0.5, style="cubist"), "the styles are plain, adain"),
        (lambda: sinkhorn(0), "1 or more"),
        (lambda: Edit("scores", warp("flip-h", grid=(2, 2))), "cannot be done at scores"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written(make: Any, says: str) -> None:
    with pytest.raises(EditError, match=says):
        make()


def test_a_grid_that_is_larger_than_the_call_is_refused_with_both_sizes() -> None:
    with pytest.raises(ShapeError, match="a grid of 9×9 = 81 tokens after 0, and the call has 20 queries"):
        warped(pattern(), "flip-h", grid=(9, 9))


# -- mixes and noise ---------------------------------------------------------------------------------------------------


def test_a_mix_is_its_two_shares_and_the_weight_left_out_is_the_rest() -> None:
    one, two = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3)
    found = change(Edit("v", mix(two, 0.25)), "v", one, make_call(), None)
    torch.testing.assert_close(found, 0.75 * one + 0.25 * two)
    assert change(Edit("v", mix(two, 0.0)), "v", one, make_call(), None) is one


def test_adain_takes_on_the_mean_and_spread_of_the_other_run() -> None:
    one, two = torch.randn(2, 2, 30, 3), 5 + 3 * torch.randn(2, 2, 30, 3)
    found = change(Edit("v", mix(two, 1.0, style="adain")), "v", one, make_call(), None)
    torch.testing.assert_close(found.mean(2), two.mean(2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.std(2, correction=0), two.std(2, correction=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(  # the order of the tokens along each channel is the own one
        found.argsort(2), one.argsort(2)
    )


def test_noise_is_the_same_for_a_seed_a_site_and_a_step_and_of_the_size_that_is_asked() -> None:
    value = 4 * torch.randn(1, 2, 500, 8)
    op = Edit("z", noise(0.5, seed=3))
    first = change(op, "z", value, make_call(), None)
    assert torch.equal(first, change(op, "z", value, make_call(), None))
    assert not torch.equal(first, change(Edit("z", noise(0.5, seed=4)), "z", value, make_call(), None))
    assert not torch.equal(first, change(op, "z", value, make_call(step=1), None))
    torch.testing.assert_close((first - value).std(dim=(2, 3)), 0.5 * value.std(dim=(2, 3)), rtol=0.1, atol=0)


# -- roles, grids, times -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux() -> tuple[nn.Module, dict[str, Any]]:
    pytest.importorskip("diffusers")
    from tests.models import diffusion

    rows = [row for value in vars(diffusion).values() if isinstance(value, (list, tuple)) for row in value if hasattr(row, "make")]
    torch.manual_seed(0)
    model, inputs = next(row for row in rows if row.name.startswith("Flux (joint")).make()
    return model.eval(), inputs


MADE = {"text": "encoder_hidden_states", "image": "hidden_states"}


def test_roles_are_read_off_a_joint_model_whatever_its_order(flux: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = flux
    roles = find_roles(model, inputs, MADE)
    text, image = inputs["encoder_hidden_states"].shape[1], inputs["hidden_states"].shape[1]
    for site in Probe(model).sites(**inputs):
        assert roles["text"][f"{site.name}/k"] == tuple(range(text))
        assert roles["image"][f"{site.name}/k"] == tuple(range(text, text + image))
    assert roles["text"]["transformer_blocks.0.attn#0@added/q"] == tuple(range(text))
    assert roles["image"]["transformer_blocks.0.attn#0@main/q"] == tuple(range(image))


def test_an_edit_of_a_role_before_rotation_is_that_of_its_positions_after_it(flux: tuple[nn.Module, dict[str, Any]]) -> None:
    """Text tokens of Flux stand at position zero, so their rotation is none, and both stages mean the same there."""
    model, inputs = flux
    roles = find_roles(model, inputs, MADE)
    amount = torch.randn(Probe(model).sites(**inputs)[0].key_dim)
    from headscope.interventions import add

    def run(stage: str, roles: Any) -> Tensor:
        with torch.no_grad(), Plan([Edit(stage, add(amount), select(keys=role("text")))]).on(model, roles=roles):
            return model(**inputs).sample

    before = run("k.pre", roles)
    torch.testing.assert_close(before, run("k", roles), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before, run("k", {"text": range(inputs["encoder_hidden_states"].shape[1])}), atol=1e-5, rtol=1e-5)
    with pytest.raises(SelectionError, match="projects its streams one by one"):
        run("k.pre", {"text": range(6)})


def test_roles_that_are_not_known_are_asked_for(flux: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = flux
    with (
        pytest.raises(SelectionError, match=r"role\('text'\): none were given"),
        Plan([Edit("k", scale(0.5), select(keys=role("text")))]).on(model),
    ):
        model(**inputs)
    with pytest.raises(InputError, match="no tensor 'prompt' among the inputs"):
        find_roles(model, inputs, {"text": "prompt"})


def test_timesteps_choose_the_calls_of_a_denoiser(flux: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = flux
    plan = Plan([Edit("z", scale(0.0), select(timesteps=(0.5, 1.0)))])
    with torch.no_grad():
        plain = [model(**inputs | {"timestep": torch.tensor([t])}).sample for t in (0.2, 0.7)]
        with plan.on(model):
            edited = [model(**inputs | {"timestep": torch.tensor([t])}).sample for t in (0.2, 0.7)]
    assert torch.equal(plain[0], edited[0])
    assert not torch.equal(plain[1], edited[1])


def test_timesteps_of_a_model_without_any_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    ).eval()
    with (
        pytest.raises(SelectionError, match="was not given: use steps="),
        Plan([Edit("z", scale(0.0), select(timesteps=(0, 1)))]).on(model),
    ):
        model(torch.ones(1, 3, dtype=torch.long))


def test_a_grid_names_the_tokens_of_a_box() -> None:
    assert grid((3, 4), rows=1) == (4, 5, 6, 7)
    assert grid((3, 4), rows=slice(1, None), columns=-1, offset=1) == (8, 12)
    assert grid((2, 3, 4), frames=1, rows=0, columns=slice(0, 2)) == (12, 13)
    for wrong in (lambda: grid((3,)), lambda: grid((3, 4), frames=0), lambda: grid((3, 4), rows=3), lambda: grid((3, 4), rows=slice(2, 2))):
        with pytest.raises(SelectionError):
            wrong()


def test_a_sinkhorn_pattern_is_doubly_stochastic_in_a_real_encoder() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=2, num_channels=1
        )
    )
    model.eval()
    plan = Plan([Edit("pattern", sinkhorn(41), select(layer=1))])
    with torch.no_grad(), plan.on(model), Probe(model).capture(Keep(pattern=True)) as seen:
        model(torch.randn(2, 1, 8, 8))
    balanced, plain = seen.pattern(layer=1), seen.pattern(layer=0)
    torch.testing.assert_close(balanced.sum(-1), torch.ones(2, 4, 17), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(balanced.sum(-2), torch.ones(2, 4, 17), atol=1e-4, rtol=1e-4)
    assert (plain.sum(-2) - 1).abs().max() > 1e-3


def test_a_bias_of_scores_still_meets_a_warp_of_the_pattern_in_order() -> None:
    """Stages keep their order in a plan that is written the other way round."""
    edits = [Edit("pattern", warp("flip-h", grid=(ROWS, COLUMNS))), Edit("scores", bias(1.0), select(keys=0))]
    stages = [step.stage for step in __import__("headscope.interventions.edit", fromlist=["schedule"]).schedule([list(enumerate(edits))])]
    assert stages == ["bias", "pattern"]
