"""One property of each published system, on a toy-sized model: what the vocabulary must be able to say.

Ships, Sahara, refusal directions, SEA and ITI have tests of their own beside the methods, and so have the differentiable losses (UGID,
cognitive alignment). Of AMIA, L3TR and VT-WAM only the abstract was at hand, so their tests take the idea, not the protocol.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from headscope.interventions import (
    Edit,
    Plan,
    add,
    bias,
    call,
    freeze,
    gates,
    grid,
    inject,
    mask,
    noise,
    renorm,
    reposition,
    rotate,
    scale,
    select,
)  # fmt: skip
from headscope.interventions.diffusion.bender import bend
from headscope.interventions.diffusion.head_noise import find_anchors, noise_heads
from headscope.interventions.diffusion.maps import watch_maps
from headscope.interventions.diffusion.style import mix_style
from headscope.interventions.diffusion.temporal import separate_events
from headscope.interventions.edit import change
from headscope.interventions.gates import risk_score
from headscope.interventions.subspace import turn
from headscope.probe import Keep, Probe
from headscope.probe.rotary import read_rotary
from tests.interventions.dense import make_call
from tests.models import diffusion

IDS = torch.randint(3, 50, (1, 10), generator=torch.Generator().manual_seed(1))
Model = tuple[nn.Module, dict[str, Any]]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=50,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data *= 5
    return model


@pytest.fixture(scope="module")
def wan() -> Model:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, inputs = next(entry for entry in diffusion.ENTRIES if entry.name.startswith("Wan")).make()
    return model.eval(), inputs


def logits(model: nn.Module, plan: Plan | None = None, **inputs: Any) -> Tensor:
    with torch.no_grad():
        if plan is None:
            return model(**inputs).logits
        with plan.on(model):
            return model(**inputs).logits


# -- steering, emphasis, safety ----------------------------------------------------------------------------------------


def test_saferope_turns_are_orthogonal_leave_riskless_tokens_and_equal_the_matrix_exponential() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 16, 4, dtype=torch.float64)).Q
    free = torch.randn(3, 4, 4, dtype=torch.float64)
    skew = (free - free.mT) / 2
    x = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    x[:, :, 0] -= ((x[:, :, 0, None] @ basis) @ basis.mT)[:, :, 0]  # nothing in the subspace
    score = risk_score(x, basis)
    fast = turn(x, basis, skew, score)
    assert torch.equal(gates.risk(basis, 0.3).strength(x, make_call(), "q") > 0, score > 0.3)
    for head in range(3):
        u = basis[head]
        whole = u @ torch.linalg.matrix_exp(skew[head]) @ u.mT + torch.eye(16, dtype=torch.float64) - u @ u.mT
        torch.testing.assert_close(whole @ whole.mT, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
        for sample in range(2):
            for token in range(7):
                rotation = torch.linalg.matrix_exp(score[sample, head, token, 0] * skew[head])
                expected = u @ rotation @ u.mT @ x[sample, head, token] + x[sample, head, token] - u @ u.mT @ x[sample, head, token]
                torch.testing.assert_close(fast[sample, head, token], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast[:, :, 0], x[:, :, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)
    still = Edit("q", rotate(basis, torch.zeros(4, 4, dtype=torch.float64)), gate=gates.risk(basis))
    assert change(still, "q", x, make_call(), None) is x
    closed = Edit("q", rotate(basis, skew), gate=gates.risk(basis, 1.0))  # no score is above 1
    assert torch.equal(change(closed, "q", x, make_call(), None), x)


def test_what_drives_steering_a_frozen_pattern_is_the_clean_one_to_the_bit_while_values_flow(llama: nn.Module) -> None:
    probe = Probe(llama)
    with torch.no_grad(), probe.capture(Keep(pattern=True, z=True)) as clean:
        llama(input_ids=IDS)
    steer = Edit("resid", add(2 * torch.randn(32, generator=torch.Generator().manual_seed(2))), select(layer=0))
    steered, frozen = Plan([steer]), Plan([steer, Edit("pattern", freeze(clean))])
    seen = []
    for plan in (steered, frozen):
        with torch.no_grad(), plan.on(llama), probe.capture(Keep(pattern=True, z=True)) as run:
            llama(input_ids=IDS)
        seen.append(run)
    assert not torch.equal(seen[0].pattern(layer=1), clean.pattern(layer=1))
    assert torch.equal(seen[1].pattern(layer=1), clean.pattern(layer=1))
    assert (seen[1].z(layer=1) - clean.z(layer=1)).abs().max() > 1e-2


@pytest.mark.parametrize("alpha", [0.01, 0.5, 3.0])
def test_pasta_emphasis_by_a_bias_is_scaling_the_rest_and_renormalising(llama: nn.Module, alpha: float) -> None:
    rest = [key for key in range(10) if key not in (2, 3)]
    heads = select(layer=1, heads=[0, 3], keys=rest)
    by_pattern = Plan([Edit("pattern", scale(alpha), heads), Edit("pattern", renorm(), select(layer=1, heads=[0, 3]))])
    by_bias = Plan([Edit("scores", bias(math.log(alpha)), heads)])
    found = [logits(llama, plan, input_ids=IDS) for plan in (by_pattern, by_bias)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert (found[0] - logits(llama, input_ids=IDS)).abs().max() > 1e-3


# -- knowledge and ranking ---------------------------------------------------------------------------------------------


def test_kvi_a_real_prefix_injected_is_the_prefix_in_front_and_padding_takes_no_mass(llama: nn.Module) -> None:
    prefix, text = IDS[:, :4], IDS[:, 4:]
    with torch.no_grad(), Probe(llama).capture(Keep(qk=True, v=True)) as seen:
        llama(input_ids=prefix)
    whole = logits(llama, input_ids=IDS)[:, 4:]
    positions = torch.arange(4, 10)[None]

    def injected(padding: int) -> Tensor:
        edits = []
        for layer in range(2):
            k, v = (functional.pad(part(layer), (0, 0, 0, padding)) for part in (seen.k, seen.v))
            edits.append(Edit("kv", inject(k, v, lengths=[4]), select(layer=layer)))
        return logits(llama, Plan(edits), input_ids=text, position_ids=positions)

    torch.testing.assert_close(injected(0), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(injected(3), whole, rtol=1e-5, atol=1e-5)  # keys of zeros would have scores of 0, and a share
    zeros = [Edit("kv", inject(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)), select(layer=layer)) for layer in range(2)]
    plain = logits(llama, input_ids=text)
    assert (logits(llama, Plan(zeros), input_ids=text) - plain).abs().max() > 1e-3


def test_l3tr_candidates_that_do_not_see_each_other_and_count_alike_score_alike_in_any_order(llama: nn.Module) -> None:
    question, size, count = 4, 3, 3
    candidates = [torch.randint(3, 50, (size,), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    spans = [range(question + size * n, question + size * (n + 1)) for n in range(count)]
    rotary = list(read_rotary(llama, {"input_ids": torch.randint(3, 50, (1, question + size * count))}).values())
    local = [*range(question), *(question + place for _ in range(count) for place in range(size))]
    edits = [Edit("scores", mask(), select(queries=mine, keys=other)) for mine in spans for other in spans if other.start < mine.start]
    masked = Plan(edits)
    plan = Plan([*edits, *(Edit("pos", reposition(rotary[layer], local), select(layer=layer)) for layer in range(2))])

    def scores(order: tuple[int, ...], plan: Plan | None) -> Tensor:
        ids = torch.cat([IDS[0, :question], *(candidates[n] for n in order)])[None]
        found = logits(llama, plan, input_ids=ids)[0]
        return torch.stack([found[spans[order.index(n)].stop - 1] for n in range(count)])

    first, second = (0, 1, 2), (2, 0, 1)
    torch.testing.assert_close(scores(first, plan), scores(second, plan), rtol=1e-5, atol=1e-5)
    for without in (None, masked):
        assert (scores(first, without) - scores(second, without)).abs().max() > 1e-3


def test_vt_wam_a_masked_edge_between_modalities_carries_no_gradient(llama: nn.Module) -> None:
    vision, touch = range(5), range(5, 10)
    embedded = llama.get_input_embeddings()(IDS).detach()  # type: ignore[operator]

    def gradient(plan: Plan) -> Tensor:
        given = embedded.clone().requires_grad_()
        with plan.on(llama, strict=False):
            llama(inputs_embeds=given).logits[:, touch].square().sum().backward()
        llama.zero_grad()
        assert given.grad is not None
        return given.grad[0]

    free, directed = gradient(Plan([])), gradient(Plan([Edit("scores", mask(), select(queries=touch, keys=vision))]))
    assert free[: vision.stop].abs().max() > 1e-4
    assert torch.equal(directed[: vision.stop], torch.zeros(5, 32))
    assert directed[touch.start :].abs().max() > 1e-4


class InContext(nn.Module):
    """A classifier that looks its answer up among labelled examples, as tabular foundation models do: queries, context, labels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        for layer in (self.to_q, self.to_k):
            layer.weight.data = 2.0 * torch.eye(width)

    def forward(self, queries: Tensor, context: Tensor, labels: Tensor) -> Tensor:
        q, k = self.to_q(queries)[:, None], self.to_k(context)[:, None]
        return functional.scaled_dot_product_attention(q, k, labels[:, None])[:, 0]


def test_amia_concentrated_attention_tells_members_until_their_keys_are_merged() -> None:
    generator = torch.Generator().manual_seed(0)
    members, strangers = (4 * functional.normalize(torch.randn(1, 60, 8, generator=generator), dim=-1) for _ in range(2))
    labels = functional.one_hot(torch.randint(0, 2, (60,), generator=generator), 2).float()[None]
    model = InContext(8)

    def merged(k: Tensor, attention_call: Any) -> Tensor:
        """Each key with its nearest neighbour that is left: 2-anonymous."""
        near = torch.cdist(k[0, 0], k[0, 0]).fill_diagonal_(math.inf)
        result, left = k.clone(), set(range(k.shape[2]))
        while len(left) > 1:
            one = min(left)
            left.remove(one)
            other = min(left, key=lambda place: float(near[one, place]))
            left.remove(other)
            result[:, :, [one, other]] = k[:, :, [one, other]].mean(2, keepdim=True)
        return result

    def attack(plan: Plan) -> float:
        """The share of pairs of a member and a stranger in which the member's attention has the larger maximum."""
        largest = []
        for queries in (members, strangers):
            with torch.no_grad(), plan.on(model, strict=False), Probe(model).capture(Keep(pattern=True)) as seen:
                model(queries, members, labels)
            largest.append(seen.pattern(site=seen.sites[0].name)[0, 0].max(-1).values)
        return float((largest[0][:, None] > largest[1][None]).double().mean())

    open_model, defended = attack(Plan([])), attack(Plan([Edit("k", call(merged))]))
    assert open_model > 0.7
    assert abs(defended - 0.5) < abs(open_model - 0.5) - 0.1


# -- pictures and videos -----------------------------------------------------------------------------------------------


def test_daam_maps_of_all_words_sum_to_one_before_they_are_enlarged(wan: Model) -> None:
    model, inputs = wan
    with torch.no_grad(), watch_maps(model, range(6), grid=(2, 4, 4)) as watched:
        model(**inputs)
    torch.testing.assert_close(watched.maps().maps.sum(1), torch.ones(1, 2, 4, 4), rtol=1e-5, atol=0)
    assert (watched.maps(size=(16, 16)).maps >= 0).all()


def test_attention_bender_no_turn_is_no_edit_two_flips_are_none_and_rows_sum_to_one_only_if_renormalised(wan: Model) -> None:
    model, inputs = wan
    where: dict[str, Any] = {"grid": (2, 4, 4), "tokens": 2, "kind": "cross"}
    flip = bend("flip-h", **where)
    with torch.no_grad():
        plain = model(**inputs).sample
        for nothing in (bend("rotate", 0.0, **where), bend("scale", 1.0, renormalise=True, **where)):
            with nothing.on(model):
                assert torch.equal(model(**inputs).sample, plain)
        with Plan([*flip, *flip]).on(model):
            torch.testing.assert_close(model(**inputs).sample, plain, rtol=1e-5, atol=1e-6)
    for renormalise in (False, True):
        amplified = bend("amplify", 4.0, renormalise=renormalise, **where)
        with torch.no_grad(), amplified.on(model), Probe(model).capture(Keep(pattern=True), sites="*attn2*") as seen:
            model(**inputs)
        sums = seen.pattern(site="blocks.0.attn2").sum(-1)
        assert ((sums - 1).abs().max() < 1e-5) == renormalise


def test_ts_attn_is_the_dense_formula_on_a_whole_row() -> None:
    """The formula with M, R and B as matrices; `test_temporal` has it entry by entry."""
    value = torch.randn(1, 2, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = separate_events([((1, 2), [0]), ((4,), [1])], grid=(2, 2, 2), steps=1)
    found = change(plan.edits[0], "scores", value, make_call(queries=8, keys=6), None)
    first = torch.arange(8)[:, None] < 4
    sign = torch.zeros(8, 6, dtype=torch.float64)
    sign[:, [1, 2]], sign[:, 4] = torch.where(first, 1.0, -1.0).double(), torch.where(first[:, 0], -1.0, 1.0).double()
    p = value.softmax(-1)
    low, high, mean = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True), value.mean(-1, keepdim=True)
    share = (p - p.amin(-1, keepdim=True)) / (p.amax(-1, keepdim=True) - p.amin(-1, keepdim=True))
    b = torch.where(sign > 0, high - mean, low - mean)
    r = torch.where(sign > 0, 1 + 0.5 * (1 - share), 1 + 0.5 * share)
    torch.testing.assert_close(found, value + sign.abs() * r * b, rtol=1e-12, atol=1e-12)


def test_ham_without_alpha_and_beta_is_the_model_as_it_was(wan: Model) -> None:
    model, inputs = wan
    runs = []
    for seed in (1, 2):
        with torch.no_grad(), Probe(model).capture(Keep(qk=True, v=True)) as seen:
            model(**inputs | {"hidden_states": torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(seed))})
        runs.append(seen)
    with torch.no_grad():
        plain = model(**inputs).sample
        for alpha, same in ((0.0, True), (0.5, False)):
            with mix_style(*runs, alpha=alpha, beta=0.0).on(model):
                assert torch.allclose(model(**inputs).sample, plain, rtol=0, atol=0) == same


def test_uvr_noise_falls_on_the_image_tokens_that_point_at_the_anchor_and_on_no_other(wan: Model) -> None:
    model, inputs = wan
    site = "blocks.1.attn1#0"
    with torch.no_grad(), Probe(model).capture(Keep(z=True)) as clean:
        model(**inputs)
    z = clean.z(site=site)
    anchor = {site: find_anchors(clean, queries=grid((2, 4, 4), frames=0))[site]}
    likeness = functional.cosine_similarity(z, anchor[site][None, :, None], dim=-1)  # [1, H, Q]
    threshold = float(likeness.median()) + 1e-4
    plan = noise_heads(anchor, threshold=threshold, queries=grid((2, 4, 4), frames=0), seed=1)
    edited = change(plan.edits[0], "z", z, make_call(), None)
    assert torch.equal(edited[likeness <= threshold], z[likeness <= threshold])
    kept = functional.cosine_similarity(edited, z, dim=-1)[likeness > threshold]
    assert kept.abs().mean() < 0.5 < 0.9
    with torch.no_grad():
        plain = model(**inputs).sample
        with noise_heads(anchor, threshold=1.1).on(model):
            torch.testing.assert_close(model(**inputs).sample, plain, rtol=0, atol=0)
        with plan.on(model) as on:
            assert not torch.equal(model(**inputs).sample, plain)
    assert on.hits == {0: 1}
    assert isinstance(plan.edits[0].op, type(noise(1.0)))
