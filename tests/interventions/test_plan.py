"""Plans on a real model: a tiny Llama whose two key/value heads are shared by two query heads each."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.interventions import Edit, Plan, Selector, add, assign, bias, call, freeze, mask, patch, renorm, scale, select, span
from headscope.interventions.edit import lower
from headscope.kernels.errors import ClosedError, EditError, HeadscopeError, InputError, SelectionError, ShapeError
from headscope.probe import Keep, Probe
from headscope.probe.call import AttentionCall

HEADS, GROUPS, WIDTH, LENGTH = 4, 2, 8, 7
IDS = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=50,
        max_position_embeddings=64,
    )
    made = LlamaForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if "proj" in name:
            parameter.data *= 8  # so that attention is not uniform and every edit shows
    return made


def logits(model: nn.Module, plan: Plan | None = None, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        if plan is None:
            return model(input_ids=ids).logits
        with plan.on(model):
            return model(input_ids=ids).logits


@pytest.fixture(autouse=True)
def unchanged(model: LlamaForCausalLM) -> Iterator[None]:
    """After every test the model is as it was, to the bit."""
    before, hooks = logits(model), sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    yield
    assert torch.equal(logits(model), before)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks


@contextmanager
def sliced(model: LlamaForCausalLM, layer: int, head: int, factor: float) -> Iterator[None]:
    """Scale a head's slice of what goes into the output projection, by a plain hook."""

    def scaled(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., head * WIDTH : (head + 1) * WIDTH] *= factor
        return (z,)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(scaled)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("factor", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("stage", ["z", "pattern", "o"])
def test_scaling_a_head_equals_scaling_its_slice_before_the_output_projection(model: LlamaForCausalLM, stage: str, factor: float) -> None:
    with sliced(model, 1, 2, factor):
        expected = logits(model)
    found = logits(model, Plan([Edit(stage, scale(factor), select(layer=1, head=2))]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.equal(found, logits(model))


def test_scaling_a_value_group_equals_scaling_the_heads_that_share_it(model: LlamaForCausalLM) -> None:
    group = logits(model, Plan([Edit("v", scale(0.3), select(layer=0, kv_group=1))]))
    heads = logits(model, Plan([Edit("z", scale(0.3), select(layer=0, heads=[2, 3]))]))
    torch.testing.assert_close(group, heads, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, Plan([Edit("v", scale(0.3), select(layer=0, heads=[2, 3]))])), group, rtol=0, atol=0)


@pytest.mark.parametrize(
    "selector", [select(keys=1), select(layer=1, head=3, keys=[0, 2], queries=range(2, 7)), select(samples=1, keys=slice(0, 3))], ids=str
)
def test_a_bias_equals_adding_to_the_scores_in_dense_attention(model: LlamaForCausalLM, selector: Selector) -> None:
    def add_two(value: Tensor, made: AttentionCall) -> Tensor:
        return value - 2.0

    fused = Plan([Edit("scores", bias(-2.0), selector)])
    dense = Plan([Edit("scores", call(add_two), selector)])
    assert [lower(edit) for edit in fused] == ["bias"]
    assert [lower(edit) for edit in dense] == ["scores"]
    torch.testing.assert_close(logits(model, fused), logits(model, dense), rtol=0, atol=1e-5)


def test_a_masked_key_is_as_if_it_were_not_there(model: LlamaForCausalLM) -> None:
    plan = Plan([Edit("scores", mask(), select(keys=0, queries=range(1, LENGTH)))])
    other = IDS.clone()
    other[:, 0] = (other[:, 0] + 1) % 50
    torch.testing.assert_close(logits(model, plan)[:, 1:], logits(model, plan, other)[:, 1:], rtol=0, atol=1e-5)


def test_a_bias_equals_a_scaled_and_renormalised_pattern(model: LlamaForCausalLM) -> None:
    pasta = Plan([Edit("pattern", scale(0.01), select(layer=0, keys=[1, 2])), Edit("pattern", renorm(), select(layer=0))])
    shifted = Plan([Edit("scores", bias(math.log(0.01)), select(layer=0, keys=[1, 2]))])
    torch.testing.assert_close(logits(model, pasta), logits(model, shifted), rtol=0, atol=1e-5)


def test_scores_scaled_by_zero_give_uniform_attention_over_what_is_visible(model: LlamaForCausalLM) -> None:
    with (
        torch.no_grad(),
        Plan([Edit("scores", scale(0.0), select(layer=0, head=1))]).on(model),
        Probe(model).capture(Keep(pattern=True)) as seen,
    ):
        model(input_ids=IDS)
    expected = torch.ones(LENGTH, LENGTH).tril() / torch.arange(1, LENGTH + 1)[:, None]
    torch.testing.assert_close(seen.pattern(layer=0)[:, 1], expected.expand(2, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "edit",
    [
        *(
            Edit(stage, scale(1.0), select(head=1) if stage in ("q", "z", "o", "scores", "pattern") else select())
            for stage in ("q", "k", "v", "scores", "pattern", "z", "o")
        ),
        Edit("scores", bias(0.0), select(keys=2)),
        Edit("pattern", scale(1.0), select(keys=2)),
        Edit("z", assign("mean"), gate=0.0),
    ],
    ids=str,
)
def test_an_identity_edit_changes_no_bit_of_the_logits(model: LlamaForCausalLM, edit: Edit) -> None:
    with torch.no_grad(), Plan([edit]).on(model) as active:
        found = model(input_ids=IDS).logits
    assert torch.equal(found, logits(model))
    assert active.hits[0] == 2


def test_a_frozen_pattern_is_that_of_the_other_run_while_values_flow(model: LlamaForCausalLM) -> None:
    other = torch.randint(0, 50, IDS.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), Probe(model).capture(Keep(pattern=True, qk=True)) as clean:
        model(input_ids=IDS)
    with torch.no_grad(), Plan([Edit("pattern", freeze(clean))]).on(model), Probe(model).capture(Keep(pattern=True)) as frozen:
        changed = model(input_ids=other).logits
    for layer in (0, 1):
        assert torch.equal(frozen.pattern(layer=layer), clean.pattern(layer=layer))
    assert not torch.allclose(changed, logits(model), atol=1e-3)
    through_qk = logits(model, Plan([Edit("q", freeze(clean)), Edit("k", freeze(clean))]), other)
    torch.testing.assert_close(through_qk, changed, rtol=0, atol=1e-4)


def test_patching_every_z_gives_the_other_run_from_there_on(model: LlamaForCausalLM) -> None:
    other = torch.randint(0, 50, IDS.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), Probe(model).capture(Keep(z=True)) as clean:
        model(input_ids=IDS)
    plan = Plan([Edit("z", patch(clean), select(layer=1, head=2, queries=-1))])
    with torch.no_grad(), plan.on(model), Probe(model).capture(Keep(z=True)) as seen:
        model(input_ids=other)
    assert torch.equal(seen.z(layer=1)[:, 2, -1], clean.z(layer=1)[:, 2, -1])
    assert not torch.equal(seen.z(layer=1)[:, 2, -2], clean.z(layer=1)[:, 2, -2])
    with pytest.raises(ShapeError, match=r"the other run has \[2, 4, 7, 8\], this call \[2, 4, 5, 8\]"):
        logits(model, plan, other[:, :5])


def test_a_saved_patch_needs_no_capture(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with torch.no_grad(), Probe(model).capture(Keep(z=True)) as clean:
        model(input_ids=IDS.flip(1))
    plan = Plan([Edit("z", patch(clean), select(layer=1, heads=[0, 3]))])
    stored = Plan.load(plan.save(tmp_path / "r.yaml", model), model)
    assert torch.equal(logits(model, stored), logits(model, plan))


@pytest.mark.parametrize("where", ["the forward", "an edit", "the block"])
def test_an_exception_leaves_the_model_as_it_was(model: LlamaForCausalLM, where: str) -> None:
    def fail(value: Tensor, made: AttentionCall) -> Tensor:
        raise ZeroDivisionError

    def stop(*_: object) -> None:
        raise ZeroDivisionError

    plan = Plan(
        [
            Edit("z", call(fail) if where == "an edit" else scale(0.0), select(layer=1)),
            Edit("pattern", assign(0.0), select(layer=0, keys=0)),
        ]
    )
    handle = model.model.layers[1].mlp.register_forward_hook(stop) if where == "the forward" else None
    with pytest.raises(ZeroDivisionError), plan.on(model):
        stop() if where == "the block" else model(input_ids=IDS)
    if handle is not None:
        handle.remove()
    # the fixture compares outputs and hooks


def test_plans_nest_and_the_inner_acts_after_the_outer(model: LlamaForCausalLM) -> None:
    first, second = Edit("z", add(1.0), select(layer=0)), Edit("z", scale(0.5), select(layer=0))
    with torch.no_grad(), Plan([first]).on(model), Plan([second]).on(model):
        nested = model(input_ids=IDS).logits
    assert torch.equal(nested, logits(model, Plan([first, second])))
    assert not torch.equal(nested, logits(model, Plan([second, first])))


def test_plans_that_are_lowered_mean_the_same_nested_as_together(model: LlamaForCausalLM) -> None:
    pairs = [
        (Edit("scores", scale(2.0), select(layer=0)), Edit("scores", bias(1.0), select(layer=0, keys=1))),
        (Edit("z", add(1.0), select(layer=0)), Edit("pattern", scale(0.5), select(layer=0, head=1))),
        (Edit("pattern", scale(0.5), select(layer=0)), Edit("pattern", renorm(), select(layer=0))),
    ]
    for first, second in pairs:
        with torch.no_grad(), Plan([first]).on(model), Plan([second]).on(model):
            nested = model(input_ids=IDS).logits
        torch.testing.assert_close(nested, logits(model, Plan([first, second])), rtol=0, atol=1e-6)


def test_plans_may_be_left_in_any_order(model: LlamaForCausalLM) -> None:
    one, two = Plan([Edit("z", scale(0.0), select(layer=0))]), Plan([Edit("z", scale(0.0), select(layer=1))])
    both = logits(model, Plan([*one, *two]))
    assert one.attach(model) is one
    two.attach(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, both)
        one.detach(model)
        only = model(input_ids=IDS).logits
    two.detach()
    assert torch.equal(only, logits(model, two))


def test_a_plan_is_on_once_at_a_model(model: LlamaForCausalLM) -> None:
    plan = Plan([Edit("z", scale(0.0))])
    with torch.no_grad(), plan.on(model):
        model(input_ids=IDS)
        with pytest.raises(EditError, match="this plan is already on at this LlamaForCausalLM"):
            plan.attach(model)


def test_detaching_what_is_not_attached_is_refused(model: LlamaForCausalLM) -> None:
    plan = Plan([Edit("z", scale(0.0))])
    with pytest.raises(ClosedError, match="the plan is not attached to a model"):
        plan.detach()
    plan.attach(model)
    logits(model)
    plan.detach()
    with pytest.raises(ClosedError, match="not attached to this LlamaForCausalLM"):
        plan.detach(model)


def test_two_plans_that_overwrite_the_same_entries_are_refused_whenever_that_shows(model: LlamaForCausalLM) -> None:
    sure = Plan([Edit("z", assign("mean"), select(layer=0, head=1))])
    with torch.no_grad(), Plan([Edit("z", assign(0.0), select(layer=0))]).on(model):
        model(input_ids=IDS)
        with (
            pytest.raises(EditError, match=r"in two plans that are active together: \(z set\(0.0\) on layers 0\) and \(z set\('mean'\)"),
            sure.on(model),
        ):
            pass
    unsure = Plan([Edit("z", assign("mean"), select("*.0.self_attn", queries=-1))])
    outer = Plan([Edit("z", assign(0.0), select(layer=0, queries=6))])
    with pytest.raises(EditError, match="at model.layers.0"), torch.no_grad(), outer.on(model), unsure.on(model):
        model(input_ids=IDS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            Edit("z", scale(0.0), select(layer=9)),
            "edit 1 (z scale(0.0) on layers 9) changed nothing: no site matches. "
            "Sites seen: model.layers.0.self_attn#0 (layer 0, 4 heads), model.layers.1",
        ),
        (
            Edit("z", scale(0.0), select(queries=40)),
            "2 sites match, but none of their steps, samples or positions (seen: steps 0 to 0, up to 7 queries and 7 keys)",
        ),
        (Edit("z", scale(0.0), select(layer=0, steps=[3])), "1 site matches, but none of their steps"),
        (Edit("z", scale(1.0), select(kind="cross")), "no site matches"),
        (Edit("z", scale(0.0), select(head=4)), "no head 4: this site has 4 heads, 0 to 3 (model.layers.0.self_attn#0"),
        (Edit("z", scale(0.0), select(samples=2)), "no sample 2: this call has a batch of 2, 0 to 1"),
        (Edit("k", scale(0.0), select(kv_group=2)), "no kv group 2: this site has 2 kv groups, 0 to 1"),
    ],
    ids=str,
)  # fmt: skip
def test_an_edit_that_hits_nothing_says_why(model: LlamaForCausalLM, edit: Edit, message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        logits(model, Plan([Edit("z", scale(0.5)), edit]))
    assert message in str(caught.value)


def test_strict_off_lets_an_edit_miss(model: LlamaForCausalLM) -> None:
    with torch.no_grad(), Plan([Edit("z", scale(0.0), select(layer=9))]).on(model, strict=False) as active:
        found = model(input_ids=IDS).logits
    assert torch.equal(found, logits(model))
    assert active.hits[0] == 0


def test_a_block_in_which_nothing_ran_raises(model: LlamaForCausalLM) -> None:
    with pytest.raises(HeadscopeError), Plan([Edit("z", scale(0.0))]).on(model):
        pass
    with Plan([Edit("z", scale(0.0))]).on(model, strict=False):
        pass


def test_an_exception_is_not_hidden_by_an_edit_that_did_not_hit(model: LlamaForCausalLM) -> None:
    with pytest.raises(KeyError), Plan([Edit("z", scale(0.0), select(layer=9))]).on(model):
        raise KeyError("mine")


class Letters:
    """Token i is the i-th letter."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)


def test_a_span_is_edited_where_its_tokens_are(model: LlamaForCausalLM) -> None:
    text = Letters().decode(IDS[0].tolist())
    plan = Plan([Edit("scores", bias(-3.0), select(keys=span(text[2:4]))), Edit("z", scale(0.5), select(queries=span(text[2:4])))])
    with torch.no_grad(), plan.on(model, tokenizer=Letters(), input_ids=IDS[:1]):
        found = model(input_ids=IDS[:1]).logits
    assert torch.equal(
        found,
        logits(model, Plan([Edit("scores", bias(-3.0), select(keys=[2, 3])), Edit("z", scale(0.5), select(queries=[2, 3]))]), IDS[:1]),
    )
    with (
        pytest.raises(SelectionError, match="does not occur in the text given"),
        Plan([Edit("k", scale(0.0), select(keys=span("XX")))]).on(model, tokenizer=Letters(), input_ids=IDS),
    ):
        pass
    with pytest.raises(SelectionError, match="needs the tokens it stands in"), plan.on(model):
        pass


@pytest.mark.parametrize(
    "edit",
    [
        Edit("z", scale(0.2), select(queries=[2, 8])),
        Edit("scores", bias(-2.0), select(keys=1)),
        Edit("pattern", scale(0.1), select(keys=[0, 3])),
    ],
    ids=str,
)
def test_a_cached_generation_is_edited_at_the_same_tokens_as_a_whole_forward(model: LlamaForCausalLM, edit: Edit) -> None:
    with Plan([edit]).on(model):
        made = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    whole = logits(model, Plan([edit]), made.sequences[:, :-1])
    torch.testing.assert_close(torch.stack(made.logits, 1), whole[:, LENGTH - 1 :], rtol=0, atol=1e-4)
    assert not torch.allclose(whole, logits(model, ids=made.sequences[:, :-1]), atol=1e-3)


@pytest.mark.parametrize(
    ("before", "after", "selector"),
    [
        ("q.pre", "q", select(layer=0, head=1)),
        ("q.pre", "q", select(queries=[2, -1])),
        ("k.pre", "k", select(kv_group=1, keys=[0, 3])),
        ("k.pre", "k", select(heads=[0, 1], samples=1)),
    ],
    ids=str,
)
def test_a_scale_before_rope_equals_one_after_it(model: LlamaForCausalLM, before: str, after: str, selector: Selector) -> None:
    first, second = (Plan([Edit(stage, scale(0.3), selector)]) for stage in (before, after))
    torch.testing.assert_close(logits(model, first), logits(model, second), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model, first), logits(model), atol=1e-3)


def test_a_position_before_rope_is_refused_once_a_cache_moves_it(model: LlamaForCausalLM) -> None:
    def generate(edit: Edit) -> Tensor:
        with Plan([edit]).on(model):
            return model.generate(
                IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
            )

    for edit in (Edit("k.pre", scale(0.3), select(keys=[0, 8])), Edit("q.pre", scale(0.3), select(queries=slice(0, 2)))):
        with pytest.raises(EditError, match=r"counts positions, but model.layers.0.self_attn#0 at step 1 continues a cache of 7 keys"):
            generate(edit)
    edit = Edit("k.pre", scale(0.3), select(kv_group=1))
    made = generate(edit)
    torch.testing.assert_close(
        torch.stack(made.logits, 1), logits(model, Plan([edit]), made.sequences[:, :-1])[:, LENGTH - 1 :], rtol=0, atol=1e-4
    )


def test_the_gradient_through_a_plan_is_that_of_the_changed_model(model: LlamaForCausalLM) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return found

    with sliced(model, 0, 1, 0.3):
        expected = gradients()
    with Plan([Edit("pattern", scale(0.3), select(layer=0, head=1))]).on(model):
        found = gradients()
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_plan_switched_on_in_inference_mode_can_be_trained_through_afterwards(model: LlamaForCausalLM) -> None:
    with Plan([Edit("q", scale(0.5), select(head=1)), Edit("scores", bias(-1.0), select(keys=0))]).on(model):
        with torch.inference_mode():
            model(input_ids=IDS)
        model(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad()


def test_two_threads_keep_their_plans_apart(model: LlamaForCausalLM) -> None:
    factors, found = (0.0, 3.0), {}
    barrier = threading.Barrier(2)

    def work(factor: float) -> None:
        with torch.no_grad(), Plan([Edit("z", scale(factor), select(layer=0))]).on(model):
            barrier.wait(20)
            found[factor] = model(input_ids=IDS).logits
            barrier.wait(20)

    workers = [threading.Thread(target=work, args=(factor,)) for factor in factors]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for factor in factors:
        assert torch.equal(found[factor], logits(model, Plan([Edit("z", scale(factor), select(layer=0))])))


def test_the_cost_names_the_sites_that_leave_the_fused_path(model: LlamaForCausalLM) -> None:
    plan = Plan(
        [
            Edit("pattern", scale(0.5), select(layer=0)),
            Edit("pattern", assign(0.0), select(layer=1, keys=0)),
            Edit("scores", bias(1.0), select(layer=0, keys=span("a"))),
        ]
    )
    with pytest.raises(SelectionError):
        plan.cost(model, input_ids=IDS)
    cost = Plan(plan.edits[:2]).cost(model, input_ids=IDS, repeats=2)
    assert [(edit.stage, edit.lowered, edit.calls) for edit in cost.edits] == [("pattern", "z", 1), ("pattern", "pattern", 1)]
    assert [(site.site, site.stages, site.leaves_fused) for site in cost.sites] == [
        ("model.layers.0.self_attn#0", ("z",), False),
        ("model.layers.1.self_attn#0", ("pattern",), True),
    ]
    assert cost.overhead == cost.seconds_with / cost.seconds_without > 0
    assert json.loads(cost.to_json()) == json.loads(json.dumps(cost.to_dict()))
    assert "leaves fused attention" in str(cost)
    assert "<pre>" in cost._repr_html_()
    with pytest.raises(InputError, match="repeats=0"):
        plan.cost(model, input_ids=IDS, repeats=0)


@pytest.mark.parametrize("bare", ["stages", "change"])
def test_a_plan_is_itself_a_handler(model: LlamaForCausalLM, bare: str) -> None:
    from headscope.probe.interception import intercept

    plan = Plan([Edit("z", scale(0.0), select(layer=1))])
    with torch.no_grad(), intercept(model, plan):
        found = model(input_ids=IDS).logits
    assert torch.equal(found, logits(model, plan))
