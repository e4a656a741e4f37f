"""Scores of heads: each method against surgery or plain autograd, and what is known of the embedded model's heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from headscope.kernels.errors import InputError, NotIntercepted, SelectionError
from headscope.probe import load
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.correlation import correlation, ranks
from headscope.probe.attribution.head_ranking import HeadRanking
from headscope.probe.attribution.heads import rank_heads
from headscope.probe.attribution.target import Target

EXACT = {"rtol": 1e-9, "atol": 1e-11}
IDS = {"input_ids": torch.tensor([[5, 17, 2, 28, 9, 11, 4]])}
OTHER = {"input_ids": torch.tensor([[5, 17, 6, 28, 9, 12, 4]])}
INDUCTION, PREVIOUS = {(5, 2), (5, 3), (5, 6)}, {(3, 6), (2, 4), (3, 7)}  # of embedded:lm, by where they look (see its card)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def copying(count: int, period: int, methods: Sequence[str], *, whole: bool) -> HeadRanking:
    """Scores for the next token of spans of random tokens that come a second time.

    In the corrupted twin the first copy is another span as a whole, so that nothing predicts; or only the token to be copied is.
    """
    model, tokenizer = load("embedded:lm")
    generator = torch.Generator().manual_seed(0)
    begin, rest = torch.zeros(1, 1, dtype=torch.long), period - 4
    inputs, corrupted, targets = [], [], []
    for _ in range(count):
        span, other = (torch.randint(3, len(tokenizer), (1, period), generator=generator) for _ in range(2))
        first = other if whole else span.clone()
        if not whole:
            first[0, rest] = other[0, 0]
        inputs.append({"input_ids": torch.cat([begin, span, span[:, :rest]], 1)})
        corrupted.append({"input_ids": torch.cat([begin, first, span[:, :rest]], 1)})
        targets.append(Target((int(span[0, rest]),), () if whole else (int(other[0, 0]),)))
    return rank_heads(model, inputs, targets, methods, corrupted=corrupted)


@pytest.fixture(scope="module")
def one_token() -> HeadRanking:
    return copying(3, 16, ["attnlrp", "zero-ablation", "mean-ablation", "activation-patching", "relp"], whole=False)


@pytest.fixture(scope="module")
def whole_span() -> HeadRanking:
    return copying(4, 24, ["activation-patching", "attribution-patching", "relp"], whole=True)


def logit(model: nn.Module, inputs: dict[str, Tensor], token: int = 3) -> float:
    with torch.no_grad():
        return float(model(**inputs).logits[0, -1, token])


def surgery(model: LlamaForCausalLM, layer: int, head: int, put: Any) -> float:
    """The logit with one head's slice of the output projection's input replaced."""

    def change(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[..., head * 4 : head * 4 + 4] = put(layer, head)
        return (x,)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(change)
    try:
        return logit(model, IDS)
    finally:
        handle.remove()


def z_of(model: LlamaForCausalLM, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The input of every output projection, in the graph."""
    kept: list[Tensor] = []
    handles = [layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: kept.append(args[0])) for layer in model.model.layers]
    output = model(**inputs)
    for handle in handles:
        handle.remove()
    return [*kept, output.logits[0, -1, 3]]


# -- each method against a twin ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attnlrp", "cp-lrp", "gim"])
def test_relevance_is_that_of_attribute(llama: LlamaForCausalLM, method: str) -> None:
    found = rank_heads(llama, IDS, 3, method)
    torch.testing.assert_close(found.scores[method], attribute(llama, IDS, 3, method).of_heads(), **EXACT)
    assert [site.layer for site in found.sites] == [0, 1]


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_ablation_is_surgery_at_the_output_projection(llama: LlamaForCausalLM, batch: int) -> None:
    *z, _ = z_of(llama, IDS)
    found = rank_heads(llama, IDS, 3, ["zero-ablation", "mean-ablation", "activation-patching"], corrupted=OTHER, batch=batch)
    other = [x.detach() for x in z_of(llama, OTHER)[:-1]]
    puts = {
        "zero-ablation": lambda layer, head: 0.0,
        "mean-ablation": lambda layer, head: z[layer].detach()[..., head * 4 : head * 4 + 4].mean(1, keepdim=True),
        "activation-patching": lambda layer, head: other[layer][..., head * 4 : head * 4 + 4],
    }
    for name, put in puts.items():
        wanted = [[logit(llama, IDS) - surgery(llama, layer, head, put) for head in range(4)] for layer in range(2)]
        torch.testing.assert_close(found.scores[name], torch.tensor(wanted, dtype=torch.float64), **EXACT)


def test_the_mean_of_an_ablation_is_over_all_examples(llama: LlamaForCausalLM) -> None:
    means = torch.stack([torch.cat([x.detach() for x in z_of(llama, inputs)[:-1]]) for inputs in (IDS, OTHER)]).mean((0, 2))  # [L, H·V]
    wanted = logit(llama, IDS) - surgery(llama, 1, 2, lambda layer, head: means[layer, 8:12])
    found = rank_heads(llama, [IDS, OTHER], 3, "mean-ablation")
    assert float(found.examples["mean-ablation"][0, 1, 2]) == pytest.approx(wanted, abs=1e-10)


def test_first_order_methods_are_plain_gradients(llama: LlamaForCausalLM) -> None:
    *z, value = z_of(llama, IDS)
    gradients = torch.autograd.grad(value, z)
    gates = torch.stack([(x * g).reshape(7, 4, 4).sum((0, 2)) for x, g in zip(z, gradients, strict=True)]).detach()
    steps = torch.stack([
        ((x - y) * g).reshape(7, 4, 4).sum((0, 2)) for x, y, g in zip(z, z_of(llama, OTHER)[:-1], gradients, strict=True)
    ]).detach()  # fmt: skip
    found = rank_heads(llama, IDS, 3, ["michel", "attribution-patching"], corrupted=OTHER)
    torch.testing.assert_close(found.scores["michel"], gates.abs(), **EXACT)
    torch.testing.assert_close(found.scores["attribution-patching"], steps, **EXACT)


def test_relp_on_a_zero_input_would_be_relevance_and_is_linear_in_the_difference(llama: LlamaForCausalLM) -> None:
    """RelP's coefficients are those of the clean run: Σ z·c - Σ z'·c, the first term being cp-lrp's relevance."""
    found = rank_heads(llama, IDS, 3, ["relp", "cp-lrp"], corrupted=IDS)
    assert float(found.scores["relp"].abs().max()) < 1e-6  # the rules keep float64 where the model's norms round to float32
    there = rank_heads(llama, IDS, 3, "relp", corrupted=OTHER).scores["relp"]
    before = z_of(llama, IDS)[:-1]
    after = z_of(llama, OTHER)[:-1]
    assert float(there[0].abs().sum()) > 0
    same = [(a - b).detach().reshape(7, 4, 4).abs().sum((0, 2)) for a, b in zip(before, after, strict=True)]
    assert all(float(there[layer, head]) == 0 for layer in range(2) for head in range(4) if float(same[layer][head]) == 0)


def test_michel_takes_the_size_of_each_example_before_the_mean(llama: LlamaForCausalLM) -> None:
    found = rank_heads(llama, [IDS, OTHER], 3, "michel")
    alone = torch.stack([rank_heads(llama, one, 3, "michel").scores["michel"] for one in (IDS, OTHER)])
    torch.testing.assert_close(found.scores["michel"], alone.mean(0), **EXACT)
    assert bool((found.scores["michel"] >= 0).all())


def test_a_batch_is_as_many_examples(llama: LlamaForCausalLM) -> None:
    both = {"input_ids": torch.cat([IDS["input_ids"], OTHER["input_ids"]])}
    for method in ("attnlrp", "zero-ablation"):
        together = rank_heads(llama, both, None, method)
        apart = rank_heads(llama, [IDS, OTHER], None, method)
        torch.testing.assert_close(together.examples[method], apart.examples[method], **EXACT)
        assert together.settings["examples"] == 2


def test_the_largest_logit_is_that_of_the_intact_input(llama: LlamaForCausalLM) -> None:
    largest, changed = int(llama(**IDS).logits[0, -1].argmax()), False
    for layer in range(2):
        for head in range(4):
            with torch.no_grad():
                handle = llama.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(_without(head))
                changed |= int(llama(**IDS).logits[0, -1].argmax()) != largest
                handle.remove()
    assert changed, "some head decides the largest logit, or this would test nothing"
    named, open_ = (rank_heads(llama, IDS, target, "zero-ablation").scores["zero-ablation"] for target in (largest, None))
    torch.testing.assert_close(named, open_, rtol=0, atol=0)


def _without(head: int) -> Any:
    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[..., head * 4 : head * 4 + 4] = 0
        return (x,)

    return cut


def test_images_and_functions_as_targets_are_ranked_too() -> None:
    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    vit.double().eval()
    image = {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64)}
    for method in ("attnlrp", "michel", "zero-ablation"):
        named = rank_heads(vit, image, 1, method)
        by_hand = rank_heads(vit, image, lambda output: output.logits[0, 1], method)
        torch.testing.assert_close(named.scores[method], by_hand.scores[method], **EXACT)


# -- going on after a stop ---------------------------------------------------------------------------------------------


def test_a_stopped_ranking_goes_on_where_it_was(llama: LlamaForCausalLM) -> None:
    remembered: dict[tuple[str, int], Tensor] = {}
    runs = 0

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal runs
        runs += 1

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    whole = rank_heads(llama, [IDS, OTHER], 3, "zero-ablation", batch=2)
    with pytest.raises(KeyboardInterrupt):
        rank_heads(llama, [IDS, OTHER], 3, "zero-ablation", batch=2, progress=stop, remember=remembered)
    assert int(remembered["zero-ablation", 1].isnan().sum()) == 4
    told: list[tuple[int, int]] = []
    handle = llama.register_forward_pre_hook(count, with_kwargs=True)
    again = rank_heads(llama, [IDS, OTHER], 3, "zero-ablation", batch=2, remember=remembered, progress=lambda a, b: told.append((a, b)))
    handle.remove()
    assert torch.equal(again.scores["zero-ablation"], whole.scores["zero-ablation"])
    assert runs == 1 + 1 + 2  # the sites, the intact value of the second example, two batches of heads
    assert told[-1] == (8, 8)


# -- what is known of a trained model ----------------------------------------------------------------------------------


def named(found: HeadRanking, method: str, count: int) -> set[tuple[int | None, int]]:
    return {(site.layer, head) for site, head, _ in found.top(method, count)}


def test_relevance_and_ablation_agree_better_than_chance(one_token: HeadRanking) -> None:
    pairs = {(pair.first, pair.second): pair for pair in one_token.agreement(top=8)}
    for name in ("zero-ablation", "mean-ablation"):  # measured: Spearman 0.76 and 0.72, Pearson 0.71 and 0.75, 5 of 8 heads
        pair = pairs["attnlrp", name]
        assert pair.spearman is not None
        assert pair.pearson is not None
        assert pair.spearman > 0.5  # ±0.29 holds 95 % of random rankings of 48 heads
        assert pair.pearson > 0.5
        assert pair.overlap > 2 * pair.chance


def test_who_copies_the_token_are_the_induction_heads(one_token: HeadRanking) -> None:
    for method in ("activation-patching", "attnlrp", "relp"):
        assert named(one_token, method, 8) >= INDUCTION, method
    effects = one_token.scores["activation-patching"]
    assert all(abs(float(effects[place])) < 0.05 for place in PREVIOUS), "what came before that token is the same in both"


def test_where_to_copy_from_is_found_by_heads_that_look_at_the_token_before(whole_span: HeadRanking) -> None:
    assert named(whole_span, "activation-patching", 2) == {(3, 6), (3, 7)}  # 6.9 and 7.5 logits


def test_relp_mends_the_signs_of_attribution_patching_but_not_its_sizes(whole_span: HeadRanking) -> None:
    pairs = {(pair.first, pair.second): pair for pair in whole_span.agreement()}
    gradient, relp = (pairs["activation-patching", name] for name in ("attribution-patching", "relp"))
    assert gradient.pearson is not None
    assert relp.pearson is not None
    assert relp.pearson > 0.2 > gradient.pearson  # measured: 0.41, and -0.47 for the gradient
    assert gradient.spearman is not None
    assert relp.spearman is not None
    assert gradient.spearman > relp.spearman > 0.5  # measured: 0.92 and 0.74


# -- results and errors ------------------------------------------------------------------------------------------------


def test_ranks_share_ties_and_correlation_is_pearsons() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    a, b = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert correlation(a, b) == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))
    assert correlation(a, torch.ones_like(a)) is None


def test_results_become_frames_json_and_figures(llama: LlamaForCausalLM) -> None:
    found = rank_heads(llama, [IDS, OTHER], 3, ["attnlrp", "michel"])
    frame = found.to_frame()
    assert list(frame.columns) == ["site", "layer", "head", "attnlrp", "attnlrp error", "michel", "michel error"]
    assert len(frame) == 8
    spread = found.examples["attnlrp"][:, 1, 3]
    assert frame["attnlrp error"].iloc[-1] == pytest.approx(float((spread[0] - spread[1]).abs() / 2))
    assert '"agreement": [{"first": "attnlrp", "second": "michel"' in found.to_json()
    figure = found.plot()
    assert [trace.z.shape if hasattr(trace.z, "shape") else (len(trace.z), len(trace.z[0])) for trace in figure.data] == [(2, 4)] * 2
    site, head, score = found.top("michel", 1)[0]
    assert score == float(found.scores["michel"].max())
    assert found.scores["michel"][found.sites.index(site), head] == score


def test_errors_say_what_is_allowed(llama: LlamaForCausalLM) -> None:
    with pytest.raises(SelectionError, match=r"no method 'lrp' to rank heads: there are attnlrp, .*relp"):
        rank_heads(llama, IDS, 3, "lrp")
    with pytest.raises(SelectionError, match="no method to rank heads: choose among"):
        rank_heads(llama, IDS, 3, [])
    with pytest.raises(InputError, match="relp compares with another input: give corrupted="):
        rank_heads(llama, IDS, 3, ["attnlrp", "relp"])
    with pytest.raises(InputError, match=r"input_ids of input 0 is \[1, 7\], of its corrupted twin \[1, 6\]: give the same shape"):
        rank_heads(llama, IDS, 3, "relp", corrupted={"input_ids": IDS["input_ids"][:, 1:]})
    with pytest.raises(InputError, match="2 inputs and 1 corrupted ones: give one for each"):
        rank_heads(llama, [IDS, OTHER], 3, "relp", corrupted=[IDS])
    with pytest.raises(InputError, match="3 targets for 2 inputs"):
        rank_heads(llama, [IDS, OTHER], [1, 2, 3])
    with pytest.raises(InputError, match="no inputs: give at least one example"):
        rank_heads(llama, [], 3)
    with pytest.raises(InputError, match="batch=0: give 1 or more"):
        rank_heads(llama, IDS, 3, batch=0)
    with pytest.raises(SelectionError, match="no scores by 'gim': there are attnlrp"):
        rank_heads(llama, IDS, 3).top("gim")

    class NoHeads(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.flatten(1) * 2

    with pytest.raises(NotIntercepted, match="no heads to rank"):
        rank_heads(NoHeads().eval(), {"pixel_values": torch.randn(1, 1, 2, 2)}, 1)
