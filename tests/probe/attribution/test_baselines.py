"""The methods that stand beside the rules, each against a closed form or a twin written from its paper."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import combinations
from math import factorial
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SwinConfig, SwinForImageClassification, T5Config, T5ForConditionalGeneration

from headscope.kernels.errors import AttributionError, HeadscopeError, InputError, SelectionError
from headscope.probe import load
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.baselines import METHODS
from headscope.probe.attribution.target import Target
from headscope.probe.attribution.units import patch_units, word_units

EXACT = {"rtol": 1e-9, "atol": 1e-10}
SINGLE = {"rtol": 1e-6, "atol": 1e-7}  # Captum rounds its steps, and transformers its softmax, to float32


class Linear(nn.Module):
    """logits = W · pixels + b."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(2 * 4 * 6, 3).double()
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.out(pixel_values.flatten(1))


class Game(nn.Module):
    """logits of a text whose words add up, and, if `pairs`, whose neighbours multiply."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.pairs = nn.Embedding(11, 4).double(), pairs
        self.out = nn.Linear(4, 3).double()
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        total = x.sum(1)
        if self.pairs:
            total = total + (x[:, 1:] * x[:, :-1]).sum(1)
        return self.out(total)


IMAGE = {"pixel_values": torch.randn(1, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}
TEXT = {"input_ids": torch.tensor([[3, 7, 1, 9, 4]])}
OTHER = 0  # the id that stands in for a removed word


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.4, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


IDS = {"input_ids": torch.tensor([[5, 17, 2, 28, 9, 11, 4]])}


def with_attention(model: LlamaForCausalLM) -> tuple[list[Tensor], Tensor]:
    """The model's own eager patterns, in the graph, and its last logits."""
    model.set_attn_implementation("eager")
    try:
        output = model(**IDS, output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation("sdpa")
    return list(output.attentions), output.logits[0, -1]


# -- gradients along a path --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 20])
def test_integrated_gradients_of_a_linear_model_are_weights_times_the_difference(steps: int) -> None:
    model, x = Linear(), IMAGE["pixel_values"]
    weight = model.out.weight[2].reshape(x.shape).detach()
    for baseline, start in (("zero", torch.zeros_like(x)), ("mean", x.mean((2, 3), keepdim=True))):
        found = attribute(model, IMAGE, 2, "integrated-gradients", steps=steps, baseline=baseline)
        torch.testing.assert_close(found.inputs["pixel_values"], weight * (x - start), **SINGLE)
        assert abs(float(found.settings["completeness_delta"])) < 1e-6  # type: ignore[arg-type]
        assert found.settings["baseline"] == baseline
        assert found.ledger is None
        assert found.passed is None


@pytest.mark.parametrize("baseline", ["zero", "mean", "token"])
def test_integrated_gradients_of_products_share_them_equally(baseline: str) -> None:
    """On a straight line, ∫ of x·y's gradient gives each factor the mean of the two ends of the other."""
    model = Game(pairs=True)
    x = model.words(TEXT["input_ids"])[0].detach()
    start = {"zero": torch.zeros_like(x), "mean": x.mean(0).expand_as(x), "token": model.words.weight[OTHER].detach().expand_as(x)}[
        baseline
    ]
    middle = (x + start) / 2
    slope = torch.ones_like(x)
    slope[1:] += middle[:-1]
    slope[:-1] += middle[1:]
    wanted = ((x - start) * slope) @ model.out.weight[1].detach()
    found = attribute(model, TEXT, 1, "integrated-gradients", steps=4, baseline=baseline, replacement=OTHER)
    torch.testing.assert_close(found.of_tokens()[0], wanted, **SINGLE)


def test_integrated_gradients_follow_the_class_that_the_intact_input_has() -> None:
    model = Game(pairs=True)
    largest = int(model(**TEXT).argmax())
    first, second = (attribute(model, TEXT, t, "integrated-gradients", replacement=OTHER).of_tokens() for t in (None, largest))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_too_few_steps_are_reported(llama: LlamaForCausalLM) -> None:
    few, many = (attribute(llama, IDS, 3, "integrated-gradients", steps=n, replacement=1) for n in (1, 200))
    assert abs(float(few.settings["completeness_delta"])) > abs(float(many.settings["completeness_delta"]))  # type: ignore[arg-type]
    assert abs(float(many.settings["completeness_delta"])) < 1e-3  # type: ignore[arg-type]
    assert "give more steps, or another baseline" in few.warnings[0]
    assert many.warnings == ()


@pytest.mark.parametrize("method", ["integrated-gradients", "shapley-sampling", "rollout", "value-zeroing", "gradient-norm", "chefer"])
def test_a_batch_gives_what_its_samples_give(llama: LlamaForCausalLM, method: str) -> None:
    ids = torch.tensor([[5, 17, 2, 28], [9, 11, 4, 30]])
    options = {"integrated-gradients": {"steps": 5}}.get(method, {})
    together = attribute(llama, {"input_ids": ids}, None, method, **options)
    for place in range(2):
        if method == "shapley-sampling":
            options = {"seed": place}
        alone = attribute(llama, {"input_ids": ids[place : place + 1]}, None, method, **options)
        torch.testing.assert_close(together.of_tokens()[place], alone.of_tokens()[0], **EXACT)


def test_layer_methods_of_a_linear_layer_are_weights_times_its_output(llama: LlamaForCausalLM) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.first, self.second = nn.Linear(48, 5).double(), nn.Linear(5, 3).double()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.second(self.first(pixel_values.flatten(1)))

    two = Two().eval()
    out = two.first(IMAGE["pixel_values"].flatten(1)).detach()
    weight = two.second.weight[1].detach()
    path = attribute(two, IMAGE, 1, "layer-integrated-gradients", layer="first", steps=3)
    torch.testing.assert_close(path.parts["first"], weight * (out - two.first.bias.detach()), **SINGLE)
    point = attribute(two, IMAGE, 1, "layer-gradient-x-activation", layer="first")
    torch.testing.assert_close(point.parts["first"], weight * out, **EXACT)
    for parameter in two.parameters():
        parameter.requires_grad_(False)
    frozen = attribute(two, IMAGE, 1, "layer-gradient-x-activation", layer="first")
    torch.testing.assert_close(frozen.parts["first"], point.parts["first"], rtol=0, atol=0)
    blocks = attribute(llama, IDS, 1, "layer-integrated-gradients", layer="model.layers.1", steps=2)
    assert blocks.inputs == {}
    assert blocks.blocks["model.layers.1"].shape == (1, 7)


def test_gradient_norm_is_the_length_of_the_embeddings_gradient(llama: LlamaForCausalLM) -> None:
    x = llama.model.embed_tokens(IDS["input_ids"]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(llama(inputs_embeds=x).logits[0, -1, 8], x)
    found = attribute(llama, IDS, 8, "gradient-norm").of_tokens()
    torch.testing.assert_close(found, gradient.square().sum(-1).sqrt(), **EXACT)


# -- taking units away -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("shapley-sampling", {"samples": 2}), ("kernel-shap", {"samples": 40}), ("lime", {"samples": 60, "alpha": 1e-12}),
        ("feature-ablation", {}), ("occlusion", {"window": 1}),
    ],
)  # fmt: skip
def test_what_adds_up_is_attributed_exactly(method: str, options: dict[str, Any]) -> None:
    model = Game(pairs=False)
    table = model.words.weight @ model.out.weight[2]
    wanted = (table[TEXT["input_ids"][0]] - table[OTHER]).detach()
    found = attribute(model, TEXT, 2, method, replacement=OTHER, **options)
    torch.testing.assert_close(found.of_tokens()[0], wanted, rtol=1e-5, atol=1e-5 if method in ("lime", "kernel-shap") else 1e-12)
    assert found.settings["removal"] == "token"


def shapley(value: Callable[[set[int]], float], n: int) -> list[float]:
    """By the definition: every set of the others, weighted."""
    found = []
    for unit in range(n):
        others = [i for i in range(n) if i != unit]
        found.append(sum(
            factorial(size) * factorial(n - size - 1) / factorial(n) * (value({*chosen, unit}) - value(set(chosen)))
            for size in range(n) for chosen in combinations(others, size)
        ))  # fmt: skip
    return found


def test_shapley_methods_approach_the_definition_and_are_efficient() -> None:
    model = Game(pairs=True)
    ids = TEXT["input_ids"]

    def value(keep: set[int]) -> float:
        with torch.no_grad():
            return float(model(torch.tensor([[int(id) if i in keep else OTHER for i, id in enumerate(ids[0])]]))[0, 0])

    wanted = torch.tensor(shapley(value, 5), dtype=torch.float64)
    whole = value(set(range(5))) - value(set())
    for method, samples in (("shapley-sampling", 2000), ("kernel-shap", 2000)):
        found = attribute(model, TEXT, 0, method, replacement=OTHER, samples=samples, batch=200).of_tokens()[0]
        assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
        assert float(found.sum()) == pytest.approx(whole, abs=1e-4)  # the regression weighs the two ends a million, not infinity


def test_words_and_patches_spread_evenly_and_sum_to_their_relevance() -> None:
    model, x = Linear(), IMAGE["pixel_values"]
    weight = model.out.weight[0].reshape(x.shape).detach()
    units = patch_units(IMAGE, 2)
    found = attribute(model, IMAGE, 0, "feature-ablation", units=units, batch=4)
    assert found.inputs["pixel_values"].shape == x.shape
    torch.testing.assert_close(units.sums(found.inputs["pixel_values"].sum(1)), units.sums((weight * x).sum(1)), **EXACT)
    lm, tokenizer = load("embedded:lm")
    inputs = dict(tokenizer("The unbelievable misfortunes of Pinocchio", return_tensors="pt"))
    words = word_units(inputs, tokenizer)
    joined = attribute(lm, inputs, 5, "feature-ablation", units=words, tokenizer=tokenizer).of_tokens()[0]
    assert any(len(places) > 1 for places in words.places)
    assert all(len({float(joined[place]) for place in places}) == 1 for places in words.places)
    assert float(joined[0]) == 0  # the token that begins every text is no unit


def test_occlusion_is_the_mean_over_the_windows_that_cover_a_place() -> None:
    model, x = Linear(), IMAGE["pixel_values"]
    part = (model.out.weight[0].reshape(x.shape) * x).sum(1)[0].detach()  # what each pixel gives
    lost, count = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    for top in range(3):
        for left in range(5):
            lost[top : top + 2, left : left + 2] += part[top : top + 2, left : left + 2].sum()
            count[top : top + 2, left : left + 2] += 1
    found = attribute(model, IMAGE, 0, "occlusion", window=2, stride=1).inputs["pixel_values"].sum(1)[0]
    torch.testing.assert_close(found, lost / count, **SINGLE)


def test_progress_ends_with_all_sets_run() -> None:
    for method in ("shapley-sampling", "kernel-shap", "feature-ablation", "occlusion"):
        told: list[tuple[int, int]] = []
        attribute(Game(pairs=True), TEXT, 0, method, replacement=OTHER, batch=3, progress=lambda a, b, told=told: told.append((a, b)))  # type: ignore[misc]
        assert told[-1][0] == told[-1][1], method
        assert told == sorted(told), method


# -- reading attention -------------------------------------------------------------------------------------------------


def test_raw_attention_is_the_models_own(llama: LlamaForCausalLM) -> None:
    patterns = [p.detach() for p in with_attention(llama)[0]]
    last = attribute(llama, IDS, 3, "attention")
    torch.testing.assert_close(last.of_tokens(), patterns[-1].mean(1)[:, -1], **SINGLE)
    assert last.settings["positions_read"] == [[6]]
    every = attribute(llama, IDS, Target((3, 4), positions=(2, -1)), "attention", over="mean")
    torch.testing.assert_close(every.of_tokens(), torch.stack(patterns).mean((0, 2))[:, [2, 6]].mean(1), **SINGLE)
    assert every.settings["positions_read"] == [[2, 6]]


def test_rollout_is_the_product_written_in_numpy(llama: LlamaForCausalLM) -> None:
    product = np.eye(7)
    for pattern in with_attention(llama)[0]:
        product = (0.5 * pattern[0].detach().numpy().mean(0) + 0.5 * np.eye(7)) @ product
    found = attribute(llama, IDS, 3, "rollout").of_tokens()[0].numpy()
    np.testing.assert_allclose(found, product[-1], rtol=1e-6)


def test_flow_is_networkx_maximum_flow(llama: LlamaForCausalLM) -> None:
    graph = networkx.DiGraph()
    layers = with_attention(llama)[0]
    for depth, pattern in enumerate(layers):
        mixed = 0.5 * pattern[0].detach().numpy().mean(0) + 0.5 * np.eye(7)
        for upper in range(7):
            for lower in range(7):
                graph.add_edge((depth + 1, upper), (depth, lower), capacity=float(mixed[upper, lower]))
    wanted = [networkx.maximum_flow_value(graph, (len(layers), 6), (0, lower)) for lower in range(7)]
    np.testing.assert_allclose(attribute(llama, IDS, 3, "flow").of_tokens()[0].numpy(), wanted, atol=1e-7)


def test_chefer_is_the_recursion_on_the_models_own_patterns(llama: LlamaForCausalLM) -> None:
    patterns, logits = with_attention(llama)
    gradients = torch.autograd.grad(logits[3], patterns)
    relevance = torch.eye(7, dtype=torch.float64)
    for pattern, gradient in zip(patterns, gradients, strict=True):
        relevance = relevance + (pattern * gradient)[0].relu().mean(0).detach() @ relevance
    wanted = relevance[-1] - torch.eye(7, dtype=torch.float64)[-1]
    torch.testing.assert_close(attribute(llama, IDS, 3, "chefer").of_tokens()[0], wanted, **SINGLE)


def test_value_zeroing_is_surgery_at_the_value_projection(llama: LlamaForCausalLM) -> None:
    product = torch.eye(7, dtype=torch.float64)
    with torch.no_grad():
        for layer in llama.model.layers:
            kept: list[Tensor] = []
            handle = layer.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out))
            llama(**IDS)
            for place in range(7):

                def cut(module: nn.Module, args: Any, out: Tensor, place: int = place) -> Tensor:
                    changed = out.clone()
                    changed[:, place] = 0
                    return changed

                inner = layer.self_attn.v_proj.register_forward_hook(cut)
                llama(**IDS)
                inner.remove()
            handle.remove()
            whole, *others = [x.reshape(7, -1) for x in kept]
            cosines = [(a * whole).sum(-1) / (a.norm(dim=-1) * whole.norm(dim=-1)) for a in others]
            score = 1 - torch.stack(cosines, dim=1)  # [position, position whose value is gone]
            product = (score / score.sum(-1, keepdim=True)) @ product
    for batch in (3, 32):
        found = attribute(llama, IDS, 3, "value-zeroing", batch=batch)
        torch.testing.assert_close(found.of_tokens()[0], product[-1], rtol=1e-6, atol=1e-9)


def test_attention_on_patches_lands_on_their_pixels() -> None:
    model, _ = load("embedded:vit")
    image = {"pixel_values": torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))}
    model.set_attn_implementation("eager")
    pattern = model(**image, output_attentions=True).attentions[-1].detach().mean(1)[:, 0, 1:]  # the class token looks at 16 patches
    found = attribute(model, image, 3, "attention").inputs["pixel_values"]
    assert found.shape == (2, 1, 8, 8)
    sums = found[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).sum((-2, -1)).flatten(1)
    torch.testing.assert_close(sums, pattern.double(), rtol=1e-5, atol=1e-6)


def test_attention_methods_need_no_gradient_of_the_weights(llama: LlamaForCausalLM) -> None:
    before = {name: attribute(llama, IDS, 3, name).of_tokens() for name in ("chefer", "rollout")}
    llama.requires_grad_(False)
    try:
        for name, wanted in before.items():
            torch.testing.assert_close(attribute(llama, IDS, 3, name).of_tokens(), wanted, rtol=0, atol=0)
    finally:
        llama.requires_grad_(True)


def test_several_streams_and_windows_are_refused_by_name() -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[0, 6]])}
    with pytest.raises(AttributionError, match=r"EncDecAttention#0 is cross attention: choose another method"):
        attribute(t5, inputs, 3, "rollout")
    assert set(attribute(t5, inputs, 3, "gradient-norm").inputs) == {"input_ids", "decoder_input_ids"}
    swin = SwinForImageClassification(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4, num_labels=3)
    ).eval()
    with pytest.raises(AttributionError, match="is window attention"):
        attribute(swin, {"pixel_values": torch.randn(1, 3, 16, 16)}, 1, "attention")


def test_a_batch_that_stands_second_in_the_model_comes_back_first() -> None:
    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.words, self.out = nn.Embedding(11, 4).double(), nn.Linear(4, 3).double()

        def forward(self, input_ids: Tensor) -> Tensor:
            found = self.words(input_ids.T)
            found *= 2  # written into, as some models do
            return self.out(found.sum(0))

    model, ids = Second().eval(), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    table = (2 * model.words.weight @ model.out.weight[1]).detach()
    for method in ("integrated-gradients", "feature-ablation"):
        found = attribute(model, {"input_ids": ids}, 1, method, replacement=OTHER).of_tokens()
        torch.testing.assert_close(found, table[ids] - table[OTHER], **SINGLE)
    assert attribute(model, {"input_ids": ids}, 1, "gradient-norm").of_tokens().shape == (2, 4)


# -- controls, seeds, errors -------------------------------------------------------------------------------------------


def test_controls_know_only_seed_and_position() -> None:
    found = attribute(Game(pairs=True), TEXT, 0, "position")
    torch.testing.assert_close(found.of_tokens(), torch.tensor([[0.2, 0.4, 0.6, 0.8, 1.0]], dtype=torch.float64))
    assert "control" in found.warnings[0]
    start = attribute(Game(pairs=True), TEXT, 0, "position", towards="start").of_tokens()
    torch.testing.assert_close(start, found.of_tokens().flip(1))
    centre = attribute(Linear(), IMAGE, 0, "position").inputs["pixel_values"]
    assert float(centre[0, 0, 1, 2]) == 1.0
    torch.testing.assert_close(centre, centre.flip(2).flip(3))
    noise = [attribute(Game(pairs=True), TEXT, 0, "random", seed=seed).of_tokens() for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


@pytest.mark.parametrize("method", ["shapley-sampling", "kernel-shap", "lime"])
def test_the_seed_decides_and_the_global_generator_is_left_alone(method: str) -> None:
    model = Game(pairs=True)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    found = [attribute(model, TEXT, 0, method, replacement=OTHER, samples=8, seed=seed).of_tokens() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("method", ["attnlrp", "rollout", "integrated-gradients"])
def test_the_result_names_the_largest_logit_that_was_meant(llama: LlamaForCausalLM, method: str) -> None:
    largest = int(llama(**IDS).logits[0, -1].argmax())
    found = attribute(llama, IDS, None, method)
    assert found.target == f"logit of {largest}"
    assert isinstance(found.settings["target"], dict)
    assert found.settings["target"]["ids"] == [largest]
    two = {"input_ids": torch.cat([IDS["input_ids"], IDS["input_ids"].flip(1)])}
    assert attribute(llama, two, None, method).target == "largest logit"


def test_options_of_rules_change_their_rule_and_are_recorded(llama: LlamaForCausalLM) -> None:
    for method, option, value in (("attnlrp-gamma", "gamma", 0.05), ("gim", "temperature", 5.0)):
        usual, other = attribute(llama, IDS, 3, method), attribute(llama, IDS, 3, method, **{option: value})
        assert not torch.allclose(usual.of_tokens(), other.of_tokens())
        assert other.settings[option] == value
    plain = attribute(llama, IDS, 3, "attnlrp-gamma", gamma=0.0)
    torch.testing.assert_close(plain.of_tokens(), attribute(llama, IDS, 3).of_tokens(), **EXACT)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_leaves_the_model_as_it_was(method: str, llama: LlamaForCausalLM) -> None:
    options = {"layer": "model.layers.0"} if method.startswith("layer") else {}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()]
    before = llama(**IDS).logits.detach()
    found = attribute(llama, IDS, 3, method, **options)
    assert torch.equal(llama(**IDS).logits, before)
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()] == hooks
    assert found.method == method
    assert found.value == pytest.approx(float(before[0, -1, 3]))
    found.to_json()


def test_errors_say_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Game(pairs=True)
    with pytest.raises(SelectionError, match=r"no method 'roll-out': there are attnlrp, .*position; did you mean 'rollout'\?"):
        attribute(model, TEXT, 0, "roll-out")
    with pytest.raises(InputError, match=r"integrated-gradients has no option 'n_steps': it has steps, baseline, replacement, batch$"):
        attribute(model, TEXT, 0, "integrated-gradients", n_steps=3)
    with pytest.raises(InputError, match=r"attnlrp has no option 'steps': it has none$"):
        attribute(model, TEXT, 0, "attnlrp", steps=3)
    with pytest.raises(InputError, match=r"attnlrp-gamma has no option 'temperature': it has gamma$"):
        attribute(model, TEXT, 0, "attnlrp-gamma", temperature=3)
    with pytest.raises(InputError, match=r"layer-integrated-gradients needs layer="):
        attribute(model, TEXT, 0, "layer-integrated-gradients")
    with pytest.raises(SelectionError, match=r"no module 'words2' in Game: near are words"):
        attribute(model, TEXT, 0, "layer-gradient-x-activation", layer="words2")
    with pytest.raises(SelectionError, match=r"words is an embedding, .* choose integrated-gradients"):
        attribute(model, TEXT, 0, "layer-gradient-x-activation", layer="words")
    with pytest.raises(SelectionError, match=r"no baseline 'black': there are zero, mean, token"):
        attribute(model, TEXT, 0, "integrated-gradients", baseline="black")
    with pytest.raises(InputError, match=r"pixel_values has no tokens: choose the baseline zero or mean"):
        attribute(Linear(), IMAGE, 0, "integrated-gradients", baseline="token")
    with pytest.raises(InputError, match=r"steps=0: give 1 or more"):
        attribute(model, TEXT, 0, "integrated-gradients", steps=0)
    with pytest.raises(InputError, match=r"give replacement="):
        attribute(model, TEXT, 0, "integrated-gradients")
    with pytest.raises(SelectionError, match=r"no attention over 'first': there are last, mean"):
        attribute(model, TEXT, 0, "attention", over="first")
    with pytest.raises(InputError, match=r"rollout makes no maps"):
        attribute(model, TEXT, 0, "rollout", maps=True)
    with pytest.raises(InputError, match=r"2 samples one by one, but the target is a function .* give a Target"):
        attribute(model, {"input_ids": torch.tensor([[1, 2], [3, 4]])}, lambda out: out.sum(), "lime", replacement=0)
    with pytest.raises(InputError, match=r"kernel-shap fits a model on sets of units and there is 1: choose feature-ablation"):
        attribute(model, {"input_ids": torch.tensor([[1]])}, 0, "kernel-shap", replacement=0)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(HeadscopeError, match=r"occlusion needs captum, which is not installed: pip install 'headscope\[attribution\]'"):
        attribute(model, TEXT, 0, "occlusion")


def test_a_function_as_target_is_attributed_by_every_kind_of_method(llama: LlamaForCausalLM) -> None:
    def both(output: Any) -> Tensor:
        logits: Tensor = output.logits
        return logits[0, -1, 3] - logits[0, -1, 4]

    for method in ("integrated-gradients", "shapley-sampling", "rollout", "chefer", "gradient-norm", "value-zeroing"):
        options: dict[str, Any] = {"shapley-sampling": {"samples": 2}}.get(method, {})
        named = attribute(llama, IDS, Target((3,), (4,)), method, **options).of_tokens()
        torch.testing.assert_close(attribute(llama, IDS, both, method, **options).of_tokens(), named, **EXACT)
