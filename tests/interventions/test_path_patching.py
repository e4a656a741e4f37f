"""Path patching on a two-layer induction model made by hand, where the path is known, and attention held still."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope.interventions import Edit, Plan, add, bias, freeze, scale, select
from headscope.interventions.language.freezing import split_effect
from headscope.interventions.language.path_patching import Receiver, patch_paths, rank_paths
from headscope.kernels.errors import InputError, SelectionError
from headscope.probe import Keep, Probe
from headscope.probe.attribution.target import Target
from tests.interventions.small_models import HEADS, LAYERS, gpt2, llama, prompts

WORDS, LENGTH, SHARP = 7, 8, 40.0


class Heads(nn.Module):
    """Two heads that read and write one-hot parts of the stream: W_Q, W_K, W_V, W_O [H, E, E]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.register_parameter(name, nn.Parameter(torch.zeros(2, width, width, dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bse,hed->bhsd", x, getattr(self, name)) for name in "qkv")
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return torch.einsum("bhsd,hde->bse", z, self.o)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Heads(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Induction(nn.Module):
    """The stream holds the word, the position, the word before (written by head 0.0) and the answer (written by head 1.0).

    Head 0.0 looks at the position before and copies its word. Head 1.0 looks for places whose word before is the present word, by its
    keys, and copies their word to the answer. Heads 0.1 and 1.1 look everywhere alike and copy a little of the word to the answer.
    """

    def __init__(self) -> None:
        super().__init__()
        width = 3 * WORDS + LENGTH
        self.layers = nn.ModuleList([Layer(width), Layer(width)])
        word, place, before, answer = torch.split(torch.eye(width, dtype=torch.float64), [WORDS, LENGTH, WORDS, WORDS])
        self.read, self.places, self.write = word, place, answer
        with torch.no_grad():
            first, second = (layer.attn for layer in self.layers)
            first.q[0] = SHARP * place[1:].T @ place[:-1]
            first.k[0] = place.T @ place
            first.v[0] = first.v[1] = word.T @ word
            first.o[0] = word.T @ before
            first.o[1] = 0.1 * word.T @ answer
            second.q[0] = SHARP * word.T @ word
            second.k[0] = before.T @ word
            second.v[0] = second.v[1] = word.T @ word
            second.o[0] = word.T @ answer
            second.o[1] = 0.1 * word.T @ answer

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.read[input_ids] + self.places[torch.arange(input_ids.shape[1])]
        for layer in self.layers:
            x = layer(x)
        return x @ self.write.T


MODEL = Induction().eval()
IDS = torch.tensor([[3, 5, 1, 2, 4, 6, 0, 5]])  # after the second 5: 1
INPUTS = {"input_ids": IDS}
CORRUPTED = {"input_ids": torch.tensor([[3, 6, 1, 2, 4, 6, 0, 5]])}  # its first occurrence is gone
ONE = Target((1,))


def site(layer: int) -> str:
    return f"layers.{layer}.attn#0"


def test_the_model_does_induction() -> None:
    assert int(MODEL(IDS)[0, -1].argmax()) == 1
    assert int(MODEL(**CORRUPTED)[0, -1].argmax()) != 1


@pytest.mark.parametrize(("side", "share"), [("k", 1.0), ("q", 0.0), ("v", 0.0)])
def test_the_previous_token_head_acts_through_the_keys_of_the_induction_head(side: str, share: float) -> None:
    found = patch_paths(MODEL, INPUTS, CORRUPTED, [(site(0), 0)], [Receiver(site(1), 0, side)], ONE)
    assert found.intact > 0.9
    assert found.share == pytest.approx(share, abs=0.05)
    other = patch_paths(MODEL, INPUTS, CORRUPTED, [(site(0), 0)], [Receiver(site(1), 1, "k")], ONE)
    assert other.effect == pytest.approx(0, abs=1e-9)


def test_every_head_as_the_only_sender_to_those_keys() -> None:
    found = rank_paths(MODEL, INPUTS, CORRUPTED, [Receiver(site(1), 0, "k")], ONE, batch=3).scores["path-patching"]
    assert float(found[0, 0]) > 0.8
    assert found.flatten()[1:].abs().max() < 1e-9


def test_the_induction_head_acts_on_the_output_alone() -> None:
    direct = rank_paths(MODEL, INPUTS, CORRUPTED, (), ONE, output=True).scores["path-patching"]
    assert float(direct[1, 0]) > 0.8
    assert float(direct[0, 0]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("sender", [(site(0), 0), (site(0), 1)])
def test_all_paths_of_a_head_together_are_the_head_itself(sender: tuple[str, int]) -> None:
    everyone = [Receiver(site(1), head, side) for head in range(2) for side in "qkv"]
    found = patch_paths(MODEL, INPUTS, CORRUPTED, [sender], everyone, Target((1,), (5,)), output=True)
    with torch.no_grad(), Probe(MODEL).capture(Keep(z=True)) as seen:
        MODEL(**CORRUPTED)

    with torch.no_grad():  # by hand: the head's output of the corrupted input, everything after it as it comes
        x = MODEL.read[IDS] + MODEL.places[torch.arange(LENGTH)]
        first = MODEL.layers[0].attn
        q, k, v = (torch.einsum("bse,hed->bhsd", x, getattr(first, name)) for name in "qkv")
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        z[:, sender[1]] = seen.z(layer=0)[:, sender[1]]
        logits = (MODEL.layers[1](x + torch.einsum("bhsd,hde->bse", z, first.o)) @ MODEL.write.T)[0, -1]
    assert found.patched == pytest.approx(float(logits[1] - logits[5]), abs=1e-9)
    assert abs(found.effect) > 1e-3


def test_one_sender_at_a_time_equals_all_in_one_batch_in_a_real_model() -> None:
    model = llama()
    one, other = prompts(7, 7, seed=4)
    receivers = [Receiver("model.layers.2.self_attn#0", 1, "q"), Receiver("model.layers.2.self_attn#0", 3, "v")]
    table = rank_paths(model, one, other, receivers, Target((5,)), batch=5).scores["path-patching"]
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        alone = patch_paths(model, one, other, [(f"model.layers.{layer}.self_attn#0", head)], receivers, Target((5,)))
        assert float(table[layer, head]) == pytest.approx(alone.effect, abs=1e-9)
    assert float(table[2].abs().max()) < 1e-12  # heads of the receivers' layer come too late
    assert float(table[:2].abs().max()) > 1e-6


def test_nothing_goes_through_feed_forward_layers_that_are_held() -> None:
    """With all of them held and every head frozen, the direct effect is linear up to the last norm: that of W_O alone."""
    model = gpt2()
    one, other = prompts(7, 7, seed=4)
    sender = ("transformer.h.0.attn#0", 1)
    mlps = [f"transformer.h.{layer}.mlp" for layer in range(LAYERS)]
    found = patch_paths(model, one, other, [sender], (), Target((5,)), output=True, modules=mlps)
    with torch.no_grad():
        with Probe(model).capture(Keep(z=True)) as intact:
            states = model(**one, output_hidden_states=True).hidden_states
        with Probe(model).capture(Keep(z=True)) as gone:
            model(**other)
        difference = (gone.z(layer=0) - intact.z(layer=0))[0, 1]  # [S, D]
        added = difference @ model.transformer.h[0].attn.c_proj.weight[8:16]
        before: list[Tensor] = []
        handle = model.transformer.ln_f.register_forward_pre_hook(lambda m, a: before.append(a[0]))
        model(**one)
        handle.remove()
        wanted = model.lm_head(model.transformer.ln_f(before[0] + added))[0, -1, 5]
    assert found.patched == pytest.approx(float(wanted), abs=1e-9)
    loose = patch_paths(model, one, other, [sender], (), Target((5,)), output=True)
    assert abs(loose.patched - found.patched) > 1e-6
    assert len(states) == LAYERS + 1


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (lambda: patch_paths(MODEL, INPUTS, CORRUPTED, [(site(0), 0)]), InputError, "no receiver"),
        (lambda: patch_paths(MODEL, INPUTS, CORRUPTED, [(site(0), 9)], output=True), SelectionError, "no head 9"),
        (lambda: patch_paths(MODEL, INPUTS, {"input_ids": IDS[:, :5]}, [(site(0), 0)], output=True), InputError, "the same shape"),
        (lambda: patch_paths(MODEL, INPUTS, CORRUPTED, [("x", 0)], output=True), SelectionError, "no site 'x'"),
    ],
)
def test_bad_input_is_named(act: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        act()


# -- attention held still ------------------------------------------------------------------------------------------------


def logit(output: Any) -> Tensor:
    return output.logits[0, -1, 5]


def test_an_edit_of_who_looks_where_has_no_effect_while_patterns_are_held() -> None:
    plan = Plan([Edit("scores", bias(3.0), select(layer=1, keys=2))])
    found = split_effect(llama(), plan, prompts(7, 8, 6), logit)
    assert abs(found.effect.mean) > 1e-6
    assert found.kept("pattern").mean == pytest.approx(0, abs=1e-9)


def test_an_edit_of_the_last_layer_s_outputs_acts_past_every_pattern() -> None:
    plan = Plan([Edit("z", scale(0.0), select(layer=LAYERS - 1, head=HEADS - 1))])
    found = split_effect(llama(), plan, prompts(7, 8, 6), logit)
    for case in ("pattern", "values", "both"):
        assert found.kept(case).mean == pytest.approx(1, abs=1e-9)
    assert "kept with values held" in str(found)


def test_held_patterns_are_those_of_the_unedited_run_while_the_outputs_change() -> None:
    model, inputs = llama(), prompts(7)[0]
    plan = Plan([Edit("resid", add(torch.randn(32)), select(layer=0))])
    with torch.no_grad():
        with Probe(model).capture(Keep(pattern=True, z=True)) as clean:
            wanted = model(**inputs).logits
        frozen = Plan([Edit("pattern", freeze(clean))])
        with plan.on(model), frozen.on(model), Probe(model).capture(Keep(pattern=True, z=True)) as seen:
            found = model(**inputs).logits
    assert torch.equal(seen.pattern(layer=2), clean.pattern(layer=2))
    assert (seen.z(layer=2) - clean.z(layer=2)).abs().max() > 1e-3
    found_again = split_effect(model, plan, inputs, logit, cases=["pattern"])
    assert found_again.frozen["pattern"][0] == pytest.approx(float(found[0, -1, 5]), abs=1e-9)
    assert found_again.before[0] == pytest.approx(float(wanted[0, -1, 5]), abs=1e-12)
