"""DAAM's read-out, against maps added up, enlarged and cut off by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from headscope.interventions import find_roles, select
from headscope.interventions.diffusion.maps import MapReader, TokenMaps, token_maps, watch_maps
from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.probe import AttentionSite, Capture, Keep, Probe
from tests.models import diffusion
from tests.models.entry import Entry

pytest.importorskip("diffusers")
MADE = {"text": "encoder_hidden_states", "image": "hidden_states"}
Model = tuple[nn.Module, dict[str, Any]]


def made(name: str) -> Model:
    entry: Entry = next(entry for entry in diffusion.ENTRIES if entry.name.startswith(name))
    torch.manual_seed(0)
    model, inputs = entry.make()
    return model.eval(), inputs


@pytest.fixture(scope="module")
def flux() -> Model:
    return made("Flux (joint")


@pytest.fixture(scope="module")
def wan() -> Model:
    return made("Wan")


def run(model: nn.Module, inputs: dict[str, Any], steps: int = 1) -> None:
    with torch.no_grad():
        for step in range(steps):
            model(**inputs | {"timestep": inputs["timestep"] * (1 - step / 4)})


def kept(model: nn.Module, inputs: dict[str, Any], steps: int = 1) -> Capture:
    with Probe(model).capture(Keep(pattern=True)) as seen:
        run(model, inputs, steps)
    return seen


@pytest.mark.parametrize("name", ["Wan", "SD3", "UNet", "PixArt"])
def test_before_enlarging_the_maps_of_all_words_sum_to_the_share_of_the_text(name: str) -> None:
    """To 1 in cross-attention, where there is nothing else to look at."""
    model, inputs = made(name)
    grid = {"Wan": (2, 4, 4), "SD3": (4, 4), "UNet": (8, 8), "PixArt": (4, 4)}[name]
    where = None if name != "UNet" else select(sites=["down_blocks.0*attn2*", "up_blocks.1*attn2*"])
    words = range(16, 22) if name == "SD3" else range(6)  # SD3 puts the text behind the image
    with watch_maps(model, words, grid=grid, where=where) as watched:
        run(model, inputs, 2)
    found = watched.maps()
    assert found.maps.shape == (1, 6, *grid)
    total = found.maps.sum(1)
    if name == "SD3":
        seen = kept(model, inputs, 2)
        expected = torch.stack(
            [seen.pattern(site=s.name, step=t)[:, :, :16, 16:].sum(-1).mean(1) for s in seen.sites for t in range(2)]
        ).mean(0)
        torch.testing.assert_close(total.flatten(1), expected, rtol=1e-5, atol=1e-6)
        assert (total < 1).all()
    else:
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.share.sum(1), total.flatten(1).mean(1), rtol=1e-5, atol=1e-6)


def test_a_map_is_the_mean_of_enlarged_maps_of_heads_cut_off_at_zero(wan: Model) -> None:
    model, inputs = wan
    seen = kept(model, inputs, 3)
    found = token_maps(seen, {"ship": [2, 3]}, grid=(2, 4, 4), size=(16, 12))
    heads = []
    for site in ("blocks.0.attn2#0", "blocks.1.attn2#0"):
        patterns = torch.stack([seen.pattern(site=site, step=step).double() for step in range(3)]).mean(0)  # [1, 2, 32, 6]
        for head in range(2):
            word = (patterns[:, head, :, 2] + patterns[:, head, :, 3]).reshape(1, 2, 4, 4)
            heads.append(functional.interpolate(word, size=(16, 12), mode="bicubic", align_corners=False).clamp(min=0))
    torch.testing.assert_close(found.of("ship").double(), torch.stack(heads).mean(0), rtol=1e-5, atol=1e-7)
    assert found.sites == ("blocks.0.attn2#0", "blocks.1.attn2#0")
    assert found.calls == 6


def test_reading_while_the_model_runs_is_reading_what_was_kept_and_changes_nothing(wan: Model) -> None:
    model, inputs = wan
    with torch.no_grad():
        plain = model(**inputs).sample
        with watch_maps(model, {"ship": 2}, grid=(2, 4, 4)) as watched:
            assert torch.equal(model(**inputs).sample, plain)
            run(model, inputs, 2)
    streamed = token_maps(watched, size=(8, 8))
    with Probe(model).capture(Keep(pattern=True)) as seen:
        run(model, inputs)
        run(model, inputs, 2)
    whole = token_maps(seen, {"ship": 2}, grid=(2, 4, 4), size=(8, 8))
    torch.testing.assert_close(streamed.maps, whole.maps, rtol=1e-5, atol=1e-7)


def test_a_reader_holds_no_more_for_more_steps(wan: Model) -> None:
    model, inputs = wan
    held = []
    for steps in (1, 5):
        with watch_maps(model, [2], grid=(2, 4, 4)) as watched:
            run(model, inputs, steps)
        held.append(sum(value.numel() for value in watched._sums.values()))
    assert held == [2 * 2 * 32] * 2


def test_a_large_call_is_read_head_by_head_with_the_same_result(wan: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wan
    found = []
    for most in (1 << 26, 1):
        monkeypatch.setattr("headscope.interventions.diffusion.maps.MOST_CELLS", most)
        with watch_maps(model, [0, 5], grid=(2, 4, 4), where=select(heads=[1])) as watched:
            run(model, inputs)
        found.append(watched.maps().maps)
    torch.testing.assert_close(*found)


def test_roles_find_the_words_in_blocks_that_joined_their_streams_before(flux: Model) -> None:
    model, inputs = flux
    roles = find_roles(model, inputs, MADE)
    seen = kept(model, inputs)
    found = token_maps(seen, {"ship": 1, "last": -1}, grid=(4, 4), roles=roles)
    assert found.sites == ("transformer_blocks.0.attn#0", "single_transformer_blocks.0.attn#0")
    patterns = [seen.pattern(site=site)[:, :, 6:] for site in found.sites]
    for name, key in (("ship", 1), ("last", 5)):
        expected = torch.cat([pattern[..., key] for pattern in patterns], 1).mean(1).reshape(1, 4, 4)
        torch.testing.assert_close(found.of(name), expected, rtol=1e-5, atol=1e-7)
    by_offset = token_maps(seen, {"ship": 1, "last": 5}, grid=(4, 4), offset=6, where=select(sites="*"))
    torch.testing.assert_close(by_offset.maps, found.maps)
    assert token_maps(seen, [1], grid=(4, 4), offset=6).sites == ("transformer_blocks.0.attn#0",)


def test_guidance_is_read_in_its_conditional_half_alone(wan: Model) -> None:
    model, inputs = wan
    torch.manual_seed(1)
    both = {name: torch.cat([torch.randn_like(value), value]) for name, value in inputs.items() if value.ndim > 1}
    doubled = both | {"timestep": inputs["timestep"].expand(2)}
    found = []
    for given, where in ((inputs, None), (doubled, select(branch="cond")), (doubled, select(samples=[1]))):
        with watch_maps(model, [2], grid=(2, 4, 4), where=where) as watched:
            run(model, given)
        found.append(watched.maps().maps)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-7)
    with pytest.raises(SelectionError, match="has no two halves"), watch_maps(model, [2], grid=(2, 4, 4), where=select(branch="cond")):
        run(model, inputs)


def test_steps_layers_and_timesteps_choose_what_is_read(wan: Model) -> None:
    model, inputs = wan
    seen = kept(model, inputs, 3)
    with watch_maps(model, [2], grid=(2, 4, 4), where=select(layer=1, timesteps=(5.0, 6.0))) as watched:
        run(model, inputs, 3)  # at 7, 5.25 and 3.5
    expected = seen.pattern(site="blocks.1.attn2", step=1)[..., 2].mean(1).reshape(1, 1, 2, 4, 4)
    torch.testing.assert_close(watched.maps().maps, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(token_maps(seen, [2], grid=(2, 4, 4), where=select(layer=1, steps=[1])).maps, expected, rtol=1e-5, atol=1e-7)


def test_coarser_sites_are_enlarged_to_the_finest_grid() -> None:
    model, inputs = made("UNet")
    with watch_maps(model, [0], grid=(8, 8)) as watched:
        run(model, inputs)
    assert set(watched._grids.values()) == {(8, 8), (4, 4)}
    found = watched.maps()
    assert found.maps.shape == (1, 1, 8, 8)
    assert (found.maps >= 0).all()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: MapReader([1], grid=(4,)), InputError, r"give \(rows, columns\)"),
        (lambda: MapReader([], grid=(4, 4)), InputError, "no words"),
        (lambda: MapReader({"ship": "ship"}, grid=(4, 4)), InputError, "give the positions of its tokens"),
        (lambda: MapReader([1], grid=(4, 4), where=select(keys=1)), InputError, "the words are the keys"),
        (lambda: MapReader([1], grid=(4, 4), roles={"text": range(3)}), InputError, "must name text and image"),
        (lambda: MapReader([1], grid=(4, 4)).maps(), SelectionError, "no attention from image to text was seen"),
        (lambda: token_maps(Capture(Keep())), InputError, "say which words and which grid"),
    ],
)
def test_what_cannot_be_read_is_refused(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_grid_or_word_that_a_site_has_not_is_named_with_what_it_has(wan: Model) -> None:
    model, inputs = wan
    with (
        pytest.raises(ShapeError, match=r"blocks.0.attn2#0 has 32 image queries: neither"),
        watch_maps(model, [2], grid=(3, 4, 4)),
    ):
        run(model, inputs)
    with pytest.raises(SelectionError, match="has 6 text tokens, 0 to 5"), watch_maps(model, [6], grid=(2, 4, 4)):
        run(model, inputs)


def example() -> TokenMaps:
    maps = torch.arange(2 * 2 * 2 * 2 * 2, dtype=torch.float32).reshape(2, 2, 2, 2, 2)
    return TokenMaps(("a", "ship"), maps, torch.tensor([[0.1, 0.2], [0.3, 0.4]]), ("attn",), 3)


def test_maps_are_told_in_words_json_lines_and_pictures() -> None:
    found = example()
    assert str(found) == "maps of 2×2×2 from 3 calls of 1 sites; share of attention: a 20.0%, ship 30.0%"
    assert json.loads(found.to_json())["maps"][1][1][0][1] == [26.0, 27.0]
    frame = pytest.importorskip("pandas") and found.to_frame()
    assert frame.query("sample == 1 and word == 'ship' and frame == 0 and row == 1 and column == 1")["value"].item() == 27.0
    pytest.importorskip("plotly")
    figure = found.plot(torch.rand(2, 2, 8, 8), sample=1)
    assert len(figure.data) == 2 * 2 * 2
    assert [list(row) for row in figure.data[-1].z] == [[28.0, 29.0], [30.0, 31.0]]
    with pytest.raises(ShapeError, match="the pictures have 1 frames and the maps 2"):
        found.plot(torch.rand(2, 8, 8))
    with pytest.raises(SelectionError, match="no map of 'sea': there are a, ship"):
        found.of("sea")


def test_the_picture_and_the_map_cover_the_same_square() -> None:
    pytest.importorskip("plotly")
    single: Tensor = torch.rand(1, 1, 4, 4)
    figure = TokenMaps(("ship",), single, torch.tensor([[0.1]]), ("attn",), 1).plot(torch.rand(1, 8, 8))
    for trace, side in zip(figure.data, (8, 4), strict=True):
        assert trace.x0 - trace.dx / 2 == pytest.approx(0)
        assert trace.x0 + (side - 0.5) * trace.dx == pytest.approx(1)


def test_each_head_is_cut_off_at_zero_before_heads_are_averaged() -> None:
    """A spike enlarged bicubically rings below zero; another head's map must not fill that in."""
    site = AttentionSite("cross#0", "cross", 0, 0, "cross", 2, 2, 4, 4, "sdpa")
    spike, flat = torch.zeros(16, dtype=torch.float64), torch.full((16,), 0.5, dtype=torch.float64)
    spike[5] = 1.0
    reader = MapReader([0], grid=(4, 4))
    reader.add(site, 0, torch.stack([spike, flat])[None, :, :, None])
    found = reader.maps(size=(16, 16)).maps[0, 0]
    large = functional.interpolate(spike.reshape(1, 1, 4, 4), size=(16, 16), mode="bicubic", align_corners=False)[0, 0]
    assert large.min() < -0.01
    torch.testing.assert_close(found, (large.clamp(min=0) + 0.5) / 2, rtol=1e-12, atol=1e-12)
