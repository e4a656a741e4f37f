"""Losses on attention: each term against code written out in float64, its gradient, and what padding, precision and checkpoints do."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headscope.interventions.losses.losses import (
    AttentionLoss,
    Run,
    edge_distance,
    entropies,
    entropy_band,
    entropy_distance,
    hidden_distance,
    keep_run,
    laplacian_spectrum,
    log_odds,
    log_odds_penalty,
    map_correlation,
    masked_divergence,
    patch_map,
    ranking_hinge,
    saliency_divergence,
    scanpath_saliency,
    shared_attention,
    spectrum_distance,
    token_map,
)
from headscope.kernels.errors import InputError, NonFiniteError, NotIntercepted, SelectionError, ShapeError
from headscope.probe import Keep, Probe

B, H, S, E, V = 2, 3, 6, 4, 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal(scores: Tensor) -> Tensor:
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def pattern(seed: int = 0) -> Tensor:
    return causal(draw(B, H, S, S, seed=seed))


# -- the spectrum ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_spectrum_is_that_of_the_laplacian(seed: int) -> None:
    a = pattern(seed)
    found = laplacian_spectrum(a)
    for b in range(B):
        for h in range(H):
            degrees = torch.zeros(S, S, dtype=torch.float64)
            for i in range(S):
                degrees[i, i] = sum(a[b, h, j, i] for j in range(i + 1, S)) / (S - i)
            values = torch.linalg.eigvals(degrees - a[b, h])
            assert float(values.imag.abs().max()) < 1e-9
            torch.testing.assert_close(found[b, h].sort().values, values.real.sort().values, atol=1e-9, rtol=0)


def test_the_spectrum_of_a_real_model_is_that_of_the_laplacian_in_single_precision() -> None:
    model = llama()
    with torch.no_grad(), keep_run(model) as run:
        model(input_ids=ids())
    for a in run.patterns.values():
        length = a.shape[-1]
        received = (a - torch.diag_embed(a.diagonal(dim1=-2, dim2=-1))).sum(-2) / (length - torch.arange(length))
        values = torch.linalg.eigvals((torch.diag_embed(received) - a).double()).real.sort(-1).values
        torch.testing.assert_close(laplacian_spectrum(a).double().sort(-1).values, values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("left", [0, 2], ids=["right", "left"])
def test_padding_changes_no_eigenvalue(left: int) -> None:
    a = pattern()
    wide = torch.full((B, H, S + 2, S + 2), 0.25, dtype=torch.float64).tril()
    wide[:, :, left : left + S] = 0.0
    wide[:, :, left : left + S, left : left + S] = a
    tokens = torch.zeros(B, S + 2, dtype=torch.bool)
    tokens[:, left : left + S] = True
    found = laplacian_spectrum(wide, tokens)
    torch.testing.assert_close(found[:, :, left : left + S], laplacian_spectrum(a), atol=1e-12, rtol=0)
    assert not found[..., ~tokens[0]].any()


def test_a_pattern_that_sees_the_future_has_no_such_spectrum() -> None:
    with pytest.raises(InputError, match="only in causal attention"):
        laplacian_spectrum(draw(B, H, S, S).softmax(-1))
    with pytest.raises(ShapeError, match="as many queries as keys"):
        laplacian_spectrum(torch.zeros(1, 1, 2, 5))


# -- each term against its formula ----------------------------------------------------------------------------------------------------


def test_shared_attention_is_the_mean_row_of_the_last_token_without_the_first_key() -> None:
    a, b = pattern(0), pattern(1)
    tokens = torch.ones(B, S, dtype=torch.bool)
    tokens[1, -2:] = False
    found = shared_attention(a, b, tokens)
    for sample, last in ((0, S - 1), (1, S - 3)):
        expected = (a[sample, :, last] + b[sample, :, last]) / 2
        expected[:, 0] = 0.0
        torch.testing.assert_close(found[sample], expected)


def test_the_spectrum_distance_is_the_weighted_sum_of_squares() -> None:
    a, b, w = pattern(0), pattern(1), draw(B, H, S, seed=2).abs()
    gap = laplacian_spectrum(a) - laplacian_spectrum(b)
    by_hand = sum(float(w[i, h, s] * gap[i, h, s] ** 2) for i in range(B) for h in range(H) for s in range(S)) / (B * H)
    assert float(spectrum_distance(a, b, w)) == pytest.approx(by_hand, rel=1e-12)
    assert float(spectrum_distance(a, b)) == pytest.approx(float(gap.square().mean()), rel=1e-12)


def test_the_hidden_distance_is_the_mean_squared_norm_over_counted_tokens() -> None:
    a, b = draw(B, S, E, seed=0), draw(B, S, E, seed=1)
    tokens = torch.tensor([[True] * S, [False] * 2 + [True] * (S - 2)])
    by_hand = (
        sum(sum(float((a[i, s] - b[i, s]).norm()) ** 2 for s in range(S) if tokens[i, s]) / int(tokens[i].sum()) for i in range(B)) / B
    )
    assert float(hidden_distance(a, b, tokens=tokens)) == pytest.approx(by_hand, rel=1e-12)
    weights = draw(B, S, seed=3).abs()
    by_hand = sum(float(weights[i, s] * (a[i, s] - b[i, s]).norm() ** 2) for i in range(B) for s in range(S)) / B
    assert float(hidden_distance(a, b, weights)) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("top", [1, 3, 50])
def test_the_edge_distance_is_over_the_reference_s_strongest_keys(top: int) -> None:
    a, r = pattern(0), pattern(1)
    gaps = []
    for b in range(B):
        for h in range(H):
            for q in range(S):
                keys = sorted(range(S), key=lambda k: -float(r[b, h, q, k]))[: min(top, S)]
                gaps.append(sum(abs(float(a[b, h, q, k] - r[b, h, q, k])) for k in keys) / len(keys))
    assert float(edge_distance(a, r, top)) == pytest.approx(sum(gaps) / len(gaps), rel=1e-10)


def test_entropies_are_in_nats_and_survive_zeros() -> None:
    a = pattern().requires_grad_()
    found = entropies(a)
    by_hand = -sum(p * math.log(p) for p in a[1, 2, 3].tolist() if p > 0)
    assert float(found[1, 2, 3].detach()) == pytest.approx(by_hand, rel=1e-12)
    found.sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


def test_the_entropy_band_is_zero_inside_and_the_square_of_what_is_missing_outside() -> None:
    even = torch.ones(1, 1, 4, 4, dtype=torch.float64).tril()
    even = even / even.sum(-1, keepdim=True)
    assert float(entropy_band(even)) == 0.0
    assert float(entropy_band(even, 0.2, 0.7)) == pytest.approx(0.3**2, rel=1e-12)
    sharp = torch.tensor([[0.5, 0.5 - 1e-9, 1e-9]], dtype=torch.float64)[None, None]
    assert float(entropy_band(sharp, 0.9, 1.0)) == pytest.approx((0.9 - math.log(2) / math.log(3)) ** 2, rel=1e-5)
    with pytest.raises(InputError, match="0 <= low <= high <= 1"):
        entropy_band(even, 0.8, 0.2)


def test_the_divergence_is_that_of_torch_and_leaves_out_what_is_not_counted() -> None:
    a, b = draw(B, S, V, seed=0), draw(B, S, V, seed=1)
    each = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=b), torch.distributions.Categorical(logits=a))
    tokens = draw(B, S, seed=2) > 0
    assert float(masked_divergence(a, b)) == pytest.approx(float(each.mean()), rel=1e-10)
    assert float(masked_divergence(a, b, tokens)) == pytest.approx(float(each[tokens].mean()), rel=1e-10)


def test_log_odds_are_those_of_the_softmax_at_the_position_asked() -> None:
    logits = draw(B, S, V)
    p = logits.softmax(-1)
    torch.testing.assert_close(log_odds(logits, 1, 4), (p[:, -1, 1] / p[:, -1, 4]).log())
    found = log_odds(logits, [1, 2], [4], torch.tensor([0, 3]))
    by_hand = [math.log(float(p[i, s, 1] + p[i, s, 2]) / float(p[i, s, 4])) for i, s in ((0, 0), (1, 3))]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-10)
    assert float(log_odds_penalty(logits, 1, 4)) == pytest.approx(float((p[:, -1, 1] / p[:, -1, 4]).log().square().mean()))
    with pytest.raises(InputError, match="have 6 positions"):
        log_odds(logits, 1, 4, at=6)
    with pytest.raises(InputError, match="of 0 to 6"):
        log_odds(logits, 1, 7)


def test_maps_agree_with_themselves_and_with_their_formulas() -> None:
    found, human = draw(B, 9).softmax(-1), draw(B, 9, seed=1).softmax(-1)
    assert float(saliency_divergence(human, human)) == 0.0
    assert float(saliency_divergence(found, human)) == pytest.approx(float((human * (human / found).log()).sum(-1).mean()), rel=1e-10)
    by_hand = sum(float(torch.corrcoef(torch.stack([found[i], human[i]]))[0, 1]) for i in range(B)) / B
    assert float(map_correlation(found, human)) == pytest.approx(by_hand, rel=1e-10)
    fixations = torch.zeros(B, 9, dtype=torch.float64)
    fixations[0, 2], fixations[1, [0, 8]] = 3, 1
    z = (found - found.mean(-1, keepdim=True)) / found.std(-1, unbiased=False, keepdim=True)
    assert float(scanpath_saliency(found, fixations)) == pytest.approx(float((z[0, 2] + (z[1, 0] + z[1, 8]) / 2) / 2), rel=1e-10)
    flat = torch.full((B, 9), 1 / 9, dtype=torch.float64, requires_grad=True)
    map_correlation(flat, human).backward()
    assert flat.grad is not None
    assert torch.isfinite(flat.grad).all()


def test_a_human_map_is_brought_to_the_patches_and_attention_to_a_map() -> None:
    image = torch.zeros(1, 4, 6)
    image[0, 0, 5], image[0, 3, 0] = 3.0, 1.0
    torch.testing.assert_close(patch_map(image, (2, 3)), torch.tensor([[0, 0, 0.75, 0.25, 0, 0]]))
    a = draw(B, H, 1 + 6, 1 + 6).softmax(-1)
    rows = a[:, [0, 2], 0, 1:].mean(1)
    torch.testing.assert_close(token_map(a, 0, slice(1, None), heads=[0, 2]), rows / rows.sum(-1, keepdim=True))
    with pytest.raises(InputError, match="nothing in it"):
        patch_map(torch.zeros(1, 4, 4), (2, 2))


def test_the_hinge_asks_for_a_margin_where_the_gate_is_open_and_nothing_elsewhere() -> None:
    a = draw(B, H, S, S).softmax(-1).requires_grad_()
    gate = torch.tensor([1.0, 0.0])
    found = ranking_hinge(a, [0, 1], [4, 5], margin=0.3, gate=gate, queries=[2, 3])
    by_hand, rows = 0.0, a.tolist()[0]
    for h in range(H):
        for q in (2, 3):
            by_hand += max(0.0, 0.3 - rows[h][q][0] - rows[h][q][1] + rows[h][q][4] + rows[h][q][5])
    assert float(found.detach()) == pytest.approx(by_hand / (B * H * 2), rel=1e-10)
    found.backward()
    assert a.grad is not None
    assert a.grad[0].any()
    assert not a.grad[1].any()


# -- gradients ------------------------------------------------------------------------------------------------------------------------

HUMAN = draw(B, S - 1, seed=9).softmax(-1)
TOKENS = torch.tensor([[True] * S, [False] + [True] * (S - 1)])
TERMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "spectrum": (lambda x: laplacian_spectrum(causal(x), TOKENS).square().sum(), (B, H, S, S)),
    "spectrum distance": (lambda x: spectrum_distance(causal(x), pattern(5), tokens=TOKENS), (B, H, S, S)),
    "hidden distance": (lambda x: hidden_distance(x, draw(B, S, E, seed=4), tokens=TOKENS), (B, S, E)),
    "edge distance": (lambda x: edge_distance(causal(x), pattern(5), 3, TOKENS), (B, H, S, S)),
    "entropy distance": (lambda x: entropy_distance(causal(x), pattern(5), TOKENS), (B, H, S, S)),
    "entropy band": (lambda x: entropy_band(causal(x), 0.45, 0.55, TOKENS), (B, H, S, S)),
    "divergence": (lambda x: masked_divergence(x, draw(B, S, V, seed=4), TOKENS), (B, S, V)),
    "log-odds": (lambda x: log_odds_penalty(x, [1, 2], 4, 2), (B, S, V)),
    "saliency divergence": (lambda x: saliency_divergence(token_map(x.softmax(-1), 0, slice(1, None)), HUMAN), (B, H, S, S)),
    "correlation": (lambda x: map_correlation(token_map(x.softmax(-1), 0, slice(1, None)), HUMAN), (B, H, S, S)),
    "scanpath saliency": (lambda x: scanpath_saliency(token_map(x.softmax(-1), 0, slice(1, None)), HUMAN), (B, H, S, S)),
    "hinge": (lambda x: ranking_hinge(x.softmax(-1), [0, 1], [2], margin=0.4, gate=TOKENS.double()), (B, H, S, S)),
}


@pytest.mark.parametrize("name", TERMS)
def test_every_gradient_is_that_of_finite_differences(name: str) -> None:
    term, shape = TERMS[name]
    x = draw(*shape, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(term, (x,), eps=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(term(x), x)
    assert float(gradient.abs().max()) > 1e-6


# -- on models ------------------------------------------------------------------------------------------------------------------------


def llama(attention: str = "sdpa", seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, attn_implementation=attention, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # sharper attention than a fresh model's
        parameter.data.mul_(4 if parameter.ndim == 2 and parameter.shape[0] != 40 else 1)
    return model


def checkpoint(model: Any, *, reentrant: bool = False) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the name before 5.23
    enable({"use_reentrant": reentrant})


def ids(seed: int = 0, length: int = 7) -> Tensor:
    return torch.randint(3, 40, (2, length), generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """4 heads that share 2 keys, written by hand or fused."""

    def __init__(self, fused: bool, is_causal: bool) -> None:
        super().__init__()
        self.fused, self.is_causal = fused, is_causal
        self.q, self.kv, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        if self.fused:
            z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, enable_gqa=True)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = q @ k.transpose(-1, -2) / 2
            z = (causal(scores) if self.is_causal else scores.softmax(-1)) @ v
        attended: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    def __init__(self, fused: bool, is_causal: bool) -> None:
        super().__init__()
        self.attention = Attention(fused, is_causal)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.attention(x))


class Small(nn.Module):
    """A stack of blocks over words, or over vectors that are given."""

    def __init__(self, fused: bool, *, is_causal: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(Block(fused, is_causal) for _ in range(3))
        self.head = nn.Linear(8, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = input_ids if input_ids.is_floating_point() else self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


EVERYTHING = AttentionLoss(
    spectrum=20, hidden=20, entropy=1, edges=5, divergence=1, log_odds=1, anchor=10, words=(5, (6, 7)), top=3
)  # fmt: skip


def whole_loss(model: Any, base: Any, loss: AttentionLoss = EVERYTHING, layers: Any = (1, 2), **inputs: Tensor) -> Tensor:
    """All terms of a batch against its counterfactual, whose last token is another."""
    inputs = inputs or {"input_ids": ids()}
    changed = inputs["input_ids"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 37 + 3
    with keep_run(model, layers=layers) as run:
        model(**inputs)
    with keep_run(model, layers=layers) as other:
        model(**{**inputs, "input_ids": changed})
    with torch.no_grad(), keep_run(base, layers=layers) as reference:
        base(**inputs)
    return loss(run, other, reference, at=-2, anchors=(run, reference)).total


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_what_is_kept_is_what_a_capture_shows_and_the_output_keeps_every_bit() -> None:
    model = llama()
    plain = model(input_ids=ids(), output_hidden_states=True)
    with keep_run(model, layers=(0, 2), v=True, z=True) as run:
        output = model(input_ids=ids())
    assert torch.equal(output.logits, plain.logits)
    assert torch.equal(run.logits, plain.logits)
    assert [name for name, _ in run.patterns] == ["model.layers.0.self_attn#0", "model.layers.2.self_attn#0"]
    assert torch.equal(run.hidden["model.layers.0", 0], plain.hidden_states[1])
    assert run.seen.v(layer=2).requires_grad
    assert run.seen.z(layer=0).requires_grad
    with Probe(model).capture(Keep(pattern=True)) as seen:
        model(input_ids=ids())
    torch.testing.assert_close(run.patterns["model.layers.2.self_attn#0", 0], seen.pattern(2))


def test_identical_runs_give_exactly_nothing() -> None:
    model = llama()
    with keep_run(model) as run:
        model(input_ids=ids())
    with keep_run(model) as again:
        model(input_ids=ids())
    internal = AttentionLoss(spectrum=20, hidden=20, entropy=1, edges=5)(run, again, again)
    assert internal.to_dict() == dict.fromkeys(("total", "spectrum", "hidden", "entropy", "edges"), 0.0)
    answers = AttentionLoss(divergence=1, anchor=10)(run, reference=again, anchors=(run, again))
    assert answers.to_dict() == dict.fromkeys(("total", "divergence", "anchor"), 0.0)
    internal.total.backward(retain_graph=True)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    answers.total.backward()  # a softmax less itself: rounding
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-5


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    model, base = llama(), llama(seed=1)
    with keep_run(model) as run:
        model(input_ids=ids())
    with torch.no_grad(), keep_run(base) as reference:
        base(input_ids=ids())
    found = AttentionLoss(edges=5, divergence=2, log_odds=0.5, words=(5, 6))(run, reference=reference).to_dict()
    assert set(found) == {"total", "edges", "divergence", "log_odds"}
    assert found["total"] == pytest.approx(5 * found["edges"] + 2 * found["divergence"] + 0.5 * found["log_odds"], rel=1e-6)
    by_hand = torch.stack([edge_distance(a, b) for a, b in zip(run.patterns.values(), reference.patterns.values(), strict=True)]).mean()
    assert found["edges"] == pytest.approx(float(by_hand.detach()), rel=1e-6)


@pytest.mark.parametrize("name", ["spectrum", "hidden", "entropy", "edges", "divergence", "log_odds", "anchor"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])
def test_a_term_s_gradient_at_the_weights_is_that_of_finite_differences(name: str, fused: bool) -> None:
    model, base = Small(fused).double(), Small(fused, seed=1).double()
    loss = AttentionLoss(**{name: 3.0}, words=(5, (6, 7)), top=3, weighted=False)  # type: ignore[arg-type]
    parameter = model.get_parameter("blocks.0.attention.q.weight")
    gradient = gradients(model, whole_loss(model, base, loss))["blocks.0.attention.q.weight"]
    direction = draw(*parameter.shape, seed=8)
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.add_(step * direction)
            ends.append(float(whole_loss(model, base, loss).detach()))
            parameter.sub_(step * direction)
    slope = (ends[0] - ends[1]) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-9)
    assert abs(slope) > 1e-6


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_neither_the_terms_nor_their_gradients(side: str) -> None:
    model, base = llama().double(), llama(seed=1).double()
    loss = AttentionLoss(spectrum=20, hidden=20, entropy=1, edges=5, divergence=1, top=3)
    found = []
    for pad in (0, 3):
        filler = torch.zeros(2, pad, dtype=torch.long)
        parts = [ids(), filler] if side == "right" else [filler, ids()]
        mask = torch.cat(
            [torch.ones_like(part) if part is parts[0 if side == "right" else 1] else torch.zeros_like(part) for part in parts], 1
        )
        places = (mask.cumsum(1) - 1).clamp(min=0)
        changed = [part if part is filler else ids(1) for part in parts]
        runs: list[Run] = []
        for net, tokens in ((model, parts), (model, changed), (base, parts)):
            with keep_run(net) as run:
                net(input_ids=torch.cat(tokens, 1), attention_mask=mask, position_ids=places)
            runs.append(run)
        value = loss(*runs)
        found.append((value.to_dict(), gradients(model, value.total)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-10, rtol=1e-8)


def test_gradient_checkpointing_gives_the_same_loss_and_gradients() -> None:
    base, found = llama(seed=1).double(), []
    for checkpointed in (False, True):
        model = llama().double().train()
        if checkpointed:
            checkpoint(model)
        value = whole_loss(model, base)
        found.append((float(value.detach()), gradients(model, value)))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-12, rtol=1e-9)


def test_backward_inside_the_block_is_as_good_as_after_it() -> None:
    model = llama().double().train()
    checkpoint(model)
    with keep_run(model, layers=1) as run:
        model(input_ids=ids())
        band = entropy_band(next(iter(run.patterns.values())), 0.9)
        inside = gradients(model, band)
    with keep_run(model, layers=1) as run:
        model(input_ids=ids())
    outside = gradients(model, entropy_band(next(iter(run.patterns.values())), 0.9))
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_a_reentrant_checkpoint_is_refused_with_the_way_out() -> None:
    model = llama().train()
    checkpoint(model, reentrant=True)
    embedded = model.get_input_embeddings()(ids())
    with pytest.raises(NotIntercepted, match=r"reentrant gradient checkpoint.*use_reentrant"), keep_run(model):
        model(inputs_embeds=embedded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_patterns_in_single(dtype: torch.dtype) -> None:
    exact, half = llama(), llama().to(dtype)
    value = whole_loss(half, llama(seed=1).to(dtype))
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(whole_loss(exact, llama(seed=1)).detach()), rel=0.1)
    assert all(torch.isfinite(g).all() for g in gradients(half, value).values())
    with keep_run(half) as run:
        half(input_ids=ids())
    rows = next(iter(run.patterns.values())).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-6, rtol=0)


def test_only_the_chosen_layers_hold_a_map() -> None:
    model = llama()
    with keep_run(model, layers=1, hidden=False) as run:
        model(input_ids=ids(length=50))
    assert run.seen.nbytes == 2 * 50 * (4 + 2) * 4 * 4  # q of 4 heads, k of the 2 they share, width 4, no map yet
    assert not run.hidden
    assert len(run.patterns) == 1


def test_attention_written_by_hand_learns_where_people_look() -> None:
    model, x = Small(fused=False, is_causal=False), torch.randn(4, 1 + 9, 8)
    human = torch.zeros(4, 9)
    human[:, 4] = 1.0
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    history = []
    for _ in range(60):
        with keep_run(model, sites="blocks.1.attention") as run:
            model(x)
        (attention,) = run.patterns.values()
        found = token_map(attention, 0, slice(1, None))
        value = saliency_divergence(found, human)
        history.append((float(value.detach()), float(scanpath_saliency(found, human).detach())))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert history[-1][0] < 0.2 < 1.5 < history[0][0]
    assert history[-1][1] > 2.5


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_trained_against_the_same_model_without_it() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    loss = AttentionLoss(edges=1.0)
    with keep_run(model, layers=(1, 2)) as run:
        model(input_ids=ids())
    with torch.no_grad(), model.disable_adapter(), keep_run(model, layers=(1, 2)) as reference:
        model(input_ids=ids())
    value = loss(run, reference=reference).total
    assert float(value.detach()) > 1e-4
    found = gradients(model, value)
    assert found
    assert all("lora" in name for name in found)
    assert any(g.any() for g in found.values())


# -- errors ---------------------------------------------------------------------------------------------------------------------------


def test_a_missing_run_or_another_selection_is_named() -> None:
    model = llama()
    with keep_run(model, layers=1) as run:
        model(input_ids=ids())
    with keep_run(model, layers=2) as other:
        model(input_ids=ids())
    with pytest.raises(InputError, match="'spectrum' compares two runs: pass other="):
        AttentionLoss(spectrum=1)(run)
    with pytest.raises(InputError, match="'edges' compares two runs: pass reference="):
        AttentionLoss(edges=1)(run)
    with keep_run(model, layers=1, hidden=False) as bare:
        model(input_ids=ids())
    with pytest.raises(SelectionError, match="no hidden states were kept"):
        AttentionLoss(hidden=1)(bare, bare)
    with pytest.raises(InputError, match="anchors="):
        AttentionLoss(anchor=1)(run)
    with pytest.raises(SelectionError, match="kept different calls"):
        AttentionLoss(spectrum=1)(run, other)
    with keep_run(model, layers=1) as longer:
        model(input_ids=ids(length=9))
    with pytest.raises(ShapeError, match="token by token|same shape"):
        AttentionLoss(spectrum=1)(run, longer)
    with keep_run(model), pytest.raises(InputError, match="ran twice"):
        [model(input_ids=ids()) for _ in range(2)]


def test_weights_that_make_no_loss_are_refused() -> None:
    with pytest.raises(InputError, match="all weights are 0"):
        AttentionLoss()
    with pytest.raises(InputError, match="negative weight"):
        AttentionLoss(edges=-1)
    with pytest.raises(NonFiniteError, match="finite number"):
        AttentionLoss(edges=math.nan)
    with pytest.raises(InputError, match="log_odds without words"):
        AttentionLoss(log_odds=1)


def test_a_term_that_is_not_finite_is_named() -> None:
    model = llama()
    with keep_run(model, layers=1) as run:
        model(input_ids=ids())
    run.output.logits = run.output.logits * math.inf
    with pytest.raises(NonFiniteError, match="'log_odds' is nan"):
        AttentionLoss(log_odds=1, words=(3, 4))(run)


def test_under_autocast_patterns_are_made_in_single_precision() -> None:
    model = llama()
    with torch.autocast("cpu", dtype=torch.bfloat16), keep_run(model, layers=1) as run:
        model(input_ids=ids())
        rows = next(iter(run.patterns.values())).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_encoders_and_encoder_decoders_are_kept_too() -> None:
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    small = {"vocab_size": 40, "num_heads": 2, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2}
    for model, sites, inputs in (
        (BertModel(BertConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)), 2, {}),
        (T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)), 6, {"decoder_input_ids": ids()}),
    ):
        with keep_run(model) as run:
            model(input_ids=ids(), **inputs)
        assert len(run.patterns) == sites
        value = torch.stack([entropy_band(p, 0.0, 0.1) for p in run.patterns.values()]).mean()
        assert any(g.any() for name, g in gradients(model, value).items() if "key" in name or name.endswith("k.weight"))
