"""What each operation does, against a twin that visits every entry; and where an edit is carried out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.interventions import Edit, Plan, add, assign, bias, call, freeze, mask, patch, renorm, scale, select
from headscope.interventions.edit import change, lower, schedule
from headscope.interventions.ops import Op
from headscope.kernels.errors import EditError, HeadscopeError, NonFiniteError, ShapeError
from headscope.probe.call import AttentionCall
from tests.interventions.dense import ORDER, as_written, make_call, make_site, run, selected

generator = torch.Generator().manual_seed(5)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


ALL_HEADS = [select(), select(kv_group=1), select(samples=1)]
EXAMPLES = [
    *(
        Edit(stage, op, where)
        for stage in ("q", "k", "v", "z", "o")
        for op in (scale(0.3), scale(0.0), add(0.5), assign("mean"), assign(2.0))
        for where in ALL_HEADS
    ),
    Edit("z", assign(draw(5)), select(head=2, queries=[1, -1])),
    Edit("q", add(draw(4, 1, 6)), select(heads=[0, 3])),
    Edit("q", patch(draw(2, 4, 5, 6)), select(head=1, queries=slice(2, None))),
    Edit("v", patch(draw(2, 2, 5, 5)), select(keys=[0, 2])),
    Edit("q", freeze(draw(2, 4, 5, 6))),
    Edit("scores", bias(-2.0), select(head=1, keys=[0, 3])),
    Edit("scores", bias(draw(1, 4, 1, 5)), select(queries=3)),
    Edit("bias", bias(0.7), select(queries=2)),
    Edit("bias", scale(2.0)),
    Edit("bias", assign(1.0), select(keys=1)),
    Edit("scores", mask(), select(heads=[1, 2], keys=0)),
    Edit("scores", mask(), select(queries=0)),
    Edit("bias", mask(), select(keys=range(5), head=0)),
    Edit("scores", scale(0.0), select(head=3)),
    Edit("scores", scale(-1.5)),
    Edit("scores", add(0.4), select(keys=-1)),
    Edit("scores", assign(0.3), select(queries=[2, 3], keys=[0, 1])),
    Edit("scores", patch(draw(2, 4, 5, 5)), select(queries=1)),
    Edit("pattern", scale(0.5), select(head=2)),
    Edit("pattern", scale(0.5), select(head=2, keys=1)),
    Edit("pattern", scale(0.0), select(queries=2)),
    Edit("pattern", add(0.1), select(keys=0)),
    Edit("pattern", assign(0.0), select(kv_group=0)),
    Edit("pattern", assign(0.2)),
    Edit("pattern", patch(draw(2, 4, 5, 5).softmax(-1)), select(head=1)),
    Edit("pattern", freeze(draw(2, 4, 5, 5).softmax(-1))),
    Edit("pattern", renorm(), select(head=1)),
    Edit("z", scale(3.0), select(head=1), gate=0.25),
    Edit("v", assign("mean"), select(keys=0), gate=0.5),
    Edit("scores", bias(1.0), select(keys=0), gate=0.5),
    Edit("scores", assign(1.0), gate=0.5),
]


def close(one: dict[str, Tensor], other: dict[str, Tensor], *stages: str) -> None:
    for stage in stages:
        torch.testing.assert_close(
            one[stage].expand(other[stage].shape), other[stage], rtol=1e-12, atol=1e-12, msg=lambda text, at=stage: f"{at}: {text}"
        )


@pytest.mark.parametrize(
    ("edit", "causal"),
    [(edit, True) for edit in EXAMPLES] + [(edit, False) for edit in EXAMPLES if edit.stage in ("bias", "scores", "pattern")],
    ids=str,
)
def test_an_edit_does_what_its_twin_does_entry_by_entry(edit: Edit, causal: bool) -> None:
    close(run(Plan([edit]), make_call(), causal=causal), as_written([edit], make_call(), causal=causal), "o" if edit.stage == "o" else "z")


@pytest.mark.parametrize("edit", [edit for edit in EXAMPLES if "tensor [2, 4" not in str(edit)], ids=str)
def test_an_edit_reaches_the_same_entries_in_a_cached_decode_step(edit: Edit) -> None:
    decode = make_call(queries=1, keys=5)
    close(run(Plan([edit]), decode), as_written([edit], decode), "o" if edit.stage == "o" else "z")


edits = st.one_of(
    st.sampled_from([edit for edit in EXAMPLES if edit.stage in ("bias", "scores", "pattern", "z", "o")]),
    st.builds(
        lambda stage, factor: Edit(stage, scale(factor)),
        st.sampled_from(["scores", "pattern", "z", "o"]),
        st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    ),
    st.builds(lambda stage, key: Edit(stage, bias(0.5), select(keys=key)), st.sampled_from(["bias", "scores"]), st.integers(0, 4)),
    st.sampled_from([Edit("z", add(1.0)), Edit("o", add(1.0)), Edit("pattern", renorm()), Edit("pattern", scale(0.5), select(keys=0))]),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(edits, min_size=2, max_size=5))
def test_a_plan_means_what_is_written_wherever_its_edits_are_carried_out(listed: list[Edit]) -> None:
    try:
        found = run(Plan(listed), make_call())
    except EditError as error:
        if "two edits overwrite the same entries" not in str(error):
            raise
        return
    close(found, as_written(listed, make_call()), "o")


@pytest.mark.parametrize(
    ("edit", "stage"),
    [
        (Edit("scores", bias(-2.0), select(keys=0)), "bias"),
        (Edit("scores", add(1.0)), "bias"),
        (Edit("scores", mask(), select(queries=1)), "bias"),
        (Edit("scores", scale(2.0)), "scores"),
        (Edit("scores", assign(0.0)), "scores"),
        (Edit("pattern", scale(0.5), select(head=1, queries=3)), "z"),
        (Edit("pattern", assign("zero"), select(head=1)), "z"),
        (Edit("pattern", assign(0.5), select(head=1)), "pattern"),
        (Edit("pattern", scale(0.5), select(keys=[0])), "pattern"),
        (Edit("pattern", renorm()), "pattern"),
        (Edit("o", scale(0.5)), "z"),
        (Edit("o", add(0.5)), "o"),
        (Edit("pattern", scale(1.0), select(keys=[0])), "z"),
        (Edit("scores", add(0.0)), "z"),
        (Edit("o", add(3.0), gate=0.0), "z"),
        (Edit("q", scale(1.0)), "q"),
        (Edit("v", scale(0.0)), "v"),
        (Edit("k.pre", scale(0.5)), "k.pre"),
    ],
    ids=str,
)
def test_an_edit_goes_to_the_cheapest_stage_that_expresses_it(edit: Edit, stage: str) -> None:
    assert lower(edit) == stage


@pytest.mark.parametrize(
    ("plans", "stages"),
    [
        ([[Edit("scores", scale(2.0)), Edit("scores", bias(1.0))]], ["scores", "scores"]),
        ([[Edit("scores", bias(1.0)), Edit("scores", scale(2.0))]], ["bias", "scores"]),
        ([[Edit("scores", scale(2.0), select(head=0)), Edit("scores", bias(1.0), select(head=1))]], ["bias", "scores"]),
        ([[Edit("pattern", scale(2.0)), Edit("pattern", renorm())]], ["pattern", "pattern"]),
        ([[Edit("pattern", renorm()), Edit("pattern", scale(2.0))]], ["pattern", "z"]),
        ([[Edit("z", add(1.0)), Edit("pattern", scale(2.0))]], ["z", "z"]),
        ([[Edit("z", add(1.0))], [Edit("pattern", scale(2.0))]], ["pattern", "z"]),
        ([[Edit("o", add(1.0)), Edit("o", scale(2.0))]], ["o", "o"]),
        ([[Edit("scores", bias(1.0))], [Edit("bias", assign(0.0))]], ["bias", "scores"]),
    ],
)
def test_an_edit_does_not_change_places_with_one_it_does_not_commute_with(plans: list[list[Edit]], stages: list[str]) -> None:
    assert [step.stage for step in schedule([list(enumerate(edits)) for edits in plans])] == stages


@pytest.mark.parametrize("op", [scale(1.0), add(0.0), bias(0.0)], ids=str)
@pytest.mark.parametrize("stage", ORDER)
def test_an_identity_edit_gives_the_very_same_tensor(stage: str, op: Op) -> None:
    if stage not in op.stages:
        return
    value = draw(2, 4, 5, 5)
    assert change(Edit(stage, op, select(head=1)), stage, value, make_call(), None) is value
    assert change(Edit(stage, add(5.0), gate=0.0), stage, value, make_call(), None) is value


SHAPES = {"q": (2, 4, 5, 6), "k": (2, 2, 5, 6), "v": (2, 2, 5, 5), "z": (2, 4, 5, 5), "scores": (2, 4, 5, 5), "pattern": (2, 4, 5, 5)}
WHERE = {
    "q": [select(heads=[0, 3], queries=1), select(samples=1)],
    "k": [select(kv_group=0, keys=[1, -1]), select(heads=[2, 3])],
    "scores": [select(head=1, queries=1), select(heads=[0], keys=slice(2, None), samples=0)],
}
WHERE |= {"v": WHERE["k"], "z": WHERE["q"], "pattern": WHERE["scores"]}


@settings(deadline=None)
@given(
    st.sampled_from([op for op in {str(edit.op): edit.op for edit in EXAMPLES}.values() if "tensor" not in str(op)]),
    st.sampled_from(sorted(SHAPES)),
    st.integers(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1.0, 0.5]),
)
def test_what_is_not_selected_keeps_every_bit(op: Op, stage: str, which: int, dtype: torch.dtype, gate: float) -> None:
    where = WHERE[stage][which]
    try:
        edit = Edit(stage, op, where, gate)
    except EditError:
        return
    value = torch.randn(SHAPES[stage], generator=torch.Generator().manual_seed(1)).to(dtype)
    value[0, 0], value[0, 1, 1], value[1, 1, 4, 2] = math.nan, -math.inf, -0.0
    before = value.clone()
    after = Plan([edit]).change(make_call(), lower(edit), value)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(value.view(bits), before.view(bits)), "the model's own tensor was changed in place"
    kept = torch.ones(SHAPES[stage], dtype=torch.bool)
    for place in itertools.product(*map(range, SHAPES[stage])):
        kept[place] = not selected(where, stage, place, value, make_call())
    assert after.dtype == dtype
    assert torch.equal(after.view(bits)[kept], before.view(bits)[kept])


def test_scaling_by_zero_assigns_zero_where_there_was_nan() -> None:
    value = torch.full((2, 4, 5, 5), math.nan)
    assert torch.equal(Plan([Edit("z", scale(0.0))]).change(make_call(), "z", value), torch.zeros(2, 4, 5, 5))


def test_a_removed_pattern_row_does_not_leak_nan_from_v() -> None:
    made = make_call()
    assert made.v is not None
    made.v[:, 0] = math.nan
    assert torch.equal(
        run(Plan([Edit("pattern", scale(0.0), select(kv_group=0))]), made)["z"][:, :2], torch.zeros(2, 2, 5, 5, dtype=torch.float64)
    )


@pytest.mark.parametrize("op", [scale(0.0), scale(-2.0), add(3.0), assign(5.0), bias(4.0)], ids=str)
@pytest.mark.parametrize("masked", [-math.inf, torch.finfo(torch.float32).min])
def test_no_operation_on_scores_shows_the_future(op: Op, masked: float) -> None:
    scores = torch.randn(2, 4, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), masked)
    changed = change(Edit("scores", op), "scores", scores, make_call(), None)
    assert (changed.softmax(-1).triu(1) == 0).all()
    assert torch.isfinite(changed.softmax(-1)).all()


def test_bias_equals_scaling_the_pattern_and_renormalising() -> None:
    pasta = Plan([Edit("pattern", scale(0.01), select(head=1, keys=[0, 2])), Edit("pattern", renorm(), select(head=1))])
    close(run(Plan([Edit("scores", bias(math.log(0.01)), select(head=1, keys=[0, 2]))]), make_call()), run(pasta, make_call()), "z")


def test_a_query_with_no_key_left_gives_zero() -> None:
    z = run(Plan([Edit("scores", mask(), select(queries=3))]), make_call())["z"]
    assert (z[:, :, 3] == 0).all()
    assert torch.isfinite(z).all()


@pytest.mark.parametrize(
    "edit",
    [
        Edit("q", scale(0.5), select(head=1)),
        Edit("v", assign("mean"), select(keys=0)),
        Edit("scores", scale(2.0), select(keys=0)),
        Edit("scores", bias(1.0), select(head=1)),
        Edit("pattern", scale(0.2), select(keys=0)),
        Edit("pattern", renorm()),
        Edit("z", scale(0.0), select(head=1)),
        Edit("z", add(1.0), gate=0.3),
        Edit("scores", assign(0.5), select(keys=1), gate=0.5),
        Edit("z", call(lambda value, _: value.tanh()), select(head=0)),
    ],
    ids=str,
)
def test_the_gradient_through_an_edit_is_right(edit: Edit) -> None:
    def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = make_call(batch=1, queries=3, keys=3)
        made.q, made.k, made.v = q, k, v
        return run(Plan([edit]), made)["z"]

    made = make_call(batch=1, queries=3, keys=3)
    assert made.v is not None
    assert torch.autograd.gradcheck(output, tuple(tensor.requires_grad_() for tensor in (made.q, made.k, made.v)))


def test_a_function_sees_the_value_and_the_call() -> None:
    def halve(value: Tensor, made: AttentionCall) -> Tensor:
        assert made.site.layer == 3
        return value / 2

    close(
        run(Plan([Edit("pattern", call(halve), select(head=1))]), make_call()),
        run(Plan([Edit("z", scale(0.5), select(head=1))]), make_call()),
        "z",
    )


def bad_shape(value: Tensor, made: AttentionCall) -> Tensor:
    return value[:, :1]


def bad_dtype(value: Tensor, made: AttentionCall) -> Tensor:
    return value.float()


def forgetful(value: Tensor, made: AttentionCall) -> None:
    return None


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            Edit("z", call(bad_shape)),
            ShapeError,
            "call(bad_shape) at z of model.layers.3.self_attn#0 returned [2, 1, 5, 5] torch.float64 on cpu, it was given [2, 4, 5, 5]",
        ),
        (Edit("z", call(bad_dtype)), ShapeError, "torch.float32"),
        (Edit("z", call(forgetful)), EditError, "returned NoneType"),  # type: ignore[arg-type]
        (Edit("z", patch(torch.zeros(2, 4, 6, 5))), ShapeError, "the other run has [2, 4, 6, 5], this call [2, 4, 5, 5]"),
        (Edit("z", add(torch.zeros(6))), ShapeError, "the tensor's shape [6] does not broadcast to [2, 4, 5, 5]"),
        (Edit("bias", bias(torch.zeros(2, 2, 5, 5))), ShapeError, "the tensor's shape [2, 2, 5, 5] does not broadcast to [2, 4, 5, 5]"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_both_named(edit: Edit, error: type[HeadscopeError], message: str) -> None:
    with pytest.raises(error) as caught:
        run(Plan([edit]), make_call())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Edit("zz", scale(0.0)),
            EditError,
            "no stage 'zz': the stages are pos, q.pre, k.pre, q, k, v, kv, bias, scores, pattern, z, o, attn_out, resid, out",
        ),
        (lambda: Edit("z", 0.0), EditError, "op=0.0: give an operation such as scale(0.0)"),
        (lambda: Edit("z", scale(0.0), 3), EditError, "selector=3: give select(...)"),
        (lambda: Edit("z", bias(1.0)), EditError, "bias(1.0) cannot be done at z: it works at bias, scores"),
        (lambda: Edit("pattern", mask()), EditError, "use assign(0.0), then renorm()"),
        (lambda: Edit("z", renorm()), EditError, "renorm() cannot be done at z: it works at pattern"),
        (lambda: Edit("pattern", assign("mean")), EditError, "a mean over queries would show some of them keys they cannot see"),
        (lambda: Edit("z", scale(0.0), select(keys=0)), EditError, "keys= at stage z: it has queries but no keys"),
        (lambda: Edit("v", scale(0.0), select(queries=0)), EditError, "queries= at stage v: it has keys but no queries"),
        (lambda: Edit("pattern", renorm(), select(keys=0)), EditError, "a row is renormalised as a whole"),
        (lambda: Edit("scores", mask(), gate=0.5), EditError, "gate=0.5: a key is masked or not"),
        (lambda: Edit("z", scale(0.0), gate="half"), EditError, "gate='half': the gate is a number"),
        (lambda: Edit("z", scale(0.0), gate=math.nan), NonFiniteError, "gate=nan"),
        (lambda: scale(math.inf), NonFiniteError, "scale(inf): the factor is a finite number"),
        (lambda: scale("0.5"), EditError, "scale('0.5'): the factor is a number"),
        (lambda: bias(-math.inf), NonFiniteError, "to hide keys use mask()"),
        (lambda: add(torch.tensor([math.nan])), NonFiniteError, "it holds NaN or infinity"),
        (lambda: assign("median"), EditError, 'the words are "zero" and "mean"'),
        (lambda: patch(3), EditError, "patch(int): give a Capture of another run, or a tensor"),
        (lambda: freeze(None), EditError, "freeze(NoneType)"),
        (lambda: call(3), EditError, "call(3): give a function(value, call)"),
        (lambda: Plan([scale(0.0)]), EditError, "a plan is a list of Edit(stage, op, select(...))"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_when_it_is_written(make: object, error: type[HeadscopeError], message: str) -> None:
    with pytest.raises(error) as caught:
        make()  # type: ignore[operator]
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Edit("z", assign(0.0), select(head=1)), Edit("z", assign("mean"), select(heads=[1, 2]))),
        (Edit("scores", mask(), select(keys=0)), Edit("scores", assign(1.0), select(queries=1))),
        (Edit("q", patch(draw(2, 4, 5, 6))), Edit("q", freeze(draw(2, 4, 5, 6)), select(layer=3))),
    ],
)
def test_two_edits_that_surely_overwrite_the_same_entries_make_no_plan(one: Edit, other: Edit) -> None:
    with pytest.raises(EditError) as caught:
        Plan([one, other])
    assert f"({one}) and ({other})" in str(caught.value)


def test_two_edits_that_turn_out_to_overwrite_the_same_entries_are_refused_at_the_call() -> None:
    plan = Plan([Edit("z", assign(0.0), select(layer=3, queries=-1)), Edit("z", assign(1.0), select("*self_attn*", queries=4))])
    with pytest.raises(EditError, match="overwrite the same entries at model.layers.3.self_attn#0, step 0"):
        run(plan, make_call())
    run(plan, make_call(queries=3, keys=3))  # here the last query is another


def test_edits_that_compose_are_no_conflict() -> None:
    Plan([Edit("z", scale(0.5)), Edit("z", add(1.0)), Edit("z", scale(0.5))])
    Plan([Edit("scores", mask(), select(keys=[0, 1])), Edit("scores", mask(), select(keys=[1, 2]))])
    plan = Plan([Edit("z", assign(0.0), select(head=0)), Edit("z", assign("mean"), select(head=1)), Edit("v", assign(0.0), select(keys=0))])
    close(run(plan, make_call()), as_written(plan, make_call()), "z")


def test_a_site_without_groups_takes_heads_at_k_and_v() -> None:
    made = make_call(make_site(groups=4))
    edit = Edit("v", scale(0.0), select(head=2))
    close(run(Plan([edit]), made), as_written([edit], made), "z")
