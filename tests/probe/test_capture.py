"""What a capture keeps, reads back and stores equals attention written out, however the model writes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.interventions import Edit, Plan, add, bias, call, scale, select
from headscope.kernels.errors import BudgetError, ClosedError, InputError, SelectionError, StoreError
from headscope.probe import AttentionCall, Capture, Keep, Probe
from headscope.probe.record import Record
from headscope.probe.recorder import Recorder
from headscope.probe.store import Store
from tests.probe.written import HEADS, LENGTH, WAYS, Attention, Net, Way, arguments, inputs, net, pooled, products, statistics, twins

TIGHT = dict(atol=1e-12, rtol=0)
MIXED = ["fused grouped by expand", "fused with a float mask", "fused with padding", "eager grouped by expand", "sinks"]
DIFFERENTIABLE = ["fused causal", "fused with a float mask", "fused grouped by expand", "eager with a bias", "softcap", "sinks"]
GROUPED = ["fused grouped", "fused grouped by expand", "eager grouped by expand", "eager grouped by repeat_interleave"]
KINDS: dict[str, Keep] = {
    "q and k": Keep(),
    "pattern": Keep(pattern=True),
    "rows": Keep(rows=[0, -1, 3]),
    "pooled": Keep(pooled=3),
    "statistics": Keep(statistics=True),
    "some statistics": Keep(statistics=("entropy", "received")),
    "v": Keep(v=True),
    "scores": Keep(scores=True),
    "z": Keep(z=True),
    "everything": Keep(qk=True, pattern=True, rows=[1], pooled=2, statistics=True, v=True, scores=True, z=True),
}


def captured(model: Net, keep: Keep = Keep(), *, run: tuple[Tensor, ...] | None = None, **limits: Any) -> Capture:  # noqa: B008
    with torch.no_grad(), Probe(model).capture(keep, **limits) as seen:
        model(*(run or arguments(model)))
    return seen


def same(a: Tensor | None, b: Tensor | None, name: str) -> None:
    assert (a is None) == (b is None), name
    if a is not None and b is not None:
        torch.testing.assert_close(a, b, **TIGHT, msg=lambda m: f"{name}: {m}")


# -- what is read equals the dense twin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_pattern_computed_later_is_the_kept_one_and_the_dense_one(way: str) -> None:
    model = net(way)
    later, kept = captured(model), captured(model, Keep(pattern=True))
    for layer, expected in enumerate(twins(model, *arguments(model))):
        torch.testing.assert_close(later.pattern(layer), expected.pattern, **TIGHT)
        torch.testing.assert_close(kept.pattern(layer), expected.pattern, **TIGHT)
        torch.testing.assert_close(later.pattern(layer), kept.pattern(layer), **TIGHT)


@pytest.mark.parametrize("way", WAYS)
def test_statistics_computed_later_are_the_kept_ones_and_the_dense_ones(way: str) -> None:
    model = net(way)
    keeps = (Keep(), Keep(statistics=True), Keep(pattern=True, scores=True), Keep(pattern=True, statistics=True))
    ways = [captured(model, keep) for keep in keeps]
    for layer, expected in enumerate(twins(model, *arguments(model))):
        for name, value in statistics(expected.pattern, expected.scores).items():
            for seen in ways:
                same(getattr(seen.statistics(layer), name), value, name)


@pytest.mark.parametrize("way", WAYS)
def test_operands_scores_and_outputs_are_the_dense_ones(way: str) -> None:
    model = net(way)
    seen, later = captured(model, KINDS["everything"]), captured(model)
    for layer, expected in enumerate(twins(model, *arguments(model))):
        for name in ("q", "k", "v", "z"):
            same(getattr(seen, name)(layer), getattr(expected, name), name)
        visible = expected.scores > -math.inf
        for found in (seen.scores(layer), later.scores(layer)):
            torch.testing.assert_close(found[visible], expected.scores[visible], **TIGHT)
            assert bool((found[~visible] < -1e30).all())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tile", [1, 3, 64])
def test_a_pooled_map_holds_the_mass_of_each_tile(way: str, tile: int) -> None:
    model = net(way)
    later, kept = captured(model), captured(model, Keep(pooled=tile))
    expected = pooled(twins(model, *arguments(model))[0].pattern, tile)
    torch.testing.assert_close(later.pooled(0, tile=tile), expected, **TIGHT)
    torch.testing.assert_close(kept.pooled(0), expected, **TIGHT)
    torch.testing.assert_close(later.statistics(0, pooled=tile).pooled, expected, **TIGHT)


@pytest.mark.parametrize("way", ["fused grouped", "fused with a float mask", "eager grouped by expand", "sinks"])
@pytest.mark.parametrize("keep", [Keep(), Keep(pattern=True), Keep(rows=range(LENGTH))], ids=["q and k", "pattern", "rows"])
def test_heads_and_rows_come_in_the_order_asked(way: str, keep: Keep) -> None:
    model = net(way)
    seen, whole = captured(model, keep), twins(model, *arguments(model))[0].pattern
    torch.testing.assert_close(seen.pattern(0, heads=[3, 0], rows=[4, -1, 4]), whole[:, [3, 0]][:, :, [4, LENGTH - 1, 4]], **TIGHT)
    torch.testing.assert_close(seen.pattern(0, heads=2, rows=-2), whole[:, [2], LENGTH - 2 : LENGTH - 1], **TIGHT)


@pytest.mark.parametrize("way", ["fused grouped", "eager causal", "sinks"])
def test_kept_rows_are_counted_from_the_end_where_negative_and_others_are_refused(way: str) -> None:
    model = net(way)
    seen, whole = captured(model, Keep(rows=[-1, 2])), twins(model, *arguments(model))[0].pattern
    torch.testing.assert_close(seen.pattern(0), whole[:, :, [LENGTH - 1, 2]], **TIGHT)
    torch.testing.assert_close(seen.pattern(0, rows=[2, -1]), whole[:, :, [2, LENGTH - 1]], **TIGHT)
    with pytest.raises(SelectionError, match=rf"row 3 of layers.0#0 was not kept; kept are \[{LENGTH - 1}, 2\]"):
        seen.pattern(0, rows=3)


@pytest.mark.parametrize("way", [*GROUPED, "fused multi-query", "eager multi-query", "eager grouped by broadcast", "sinks"])
def test_a_choice_of_heads_keeps_the_keys_and_values_of_their_own_groups(way: str) -> None:
    model, heads = net(way), [3, 1]
    seen = captured(model, Keep(qk=True, v=True, z=True), heads=heads)
    expected = twins(model, *arguments(model))[1]
    group = HEADS // model.layers[0].groups
    shared = [0] if group == HEADS else [h // group for h in heads]
    torch.testing.assert_close(seen.q(1), expected.q[:, heads], **TIGHT)
    torch.testing.assert_close(seen.k(1), expected.k[:, shared], **TIGHT)
    torch.testing.assert_close(seen.v(1), expected.v[:, shared], **TIGHT)
    torch.testing.assert_close(seen.z(1), expected.z[:, heads], **TIGHT)
    torch.testing.assert_close(seen.pattern(1), expected.pattern[:, heads], **TIGHT)
    for head in heads:
        torch.testing.assert_close(seen.q(1, heads=head), expected.q[:, [head]], **TIGHT)
        torch.testing.assert_close(seen.pattern(1, heads=head, rows=2), expected.pattern[:, [head], 2:3], **TIGHT)
        torch.testing.assert_close(seen.statistics(1, heads=head).received, expected.pattern[:, [head]].sum(-2), **TIGHT)
    with pytest.raises(SelectionError, match=r"head 0 of layers.1#0 was not kept; kept are \[3, 1\]"):
        seen.pattern(1, heads=0)


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ("z", "v", "some statistics")])
@pytest.mark.parametrize("way", ["fused with a float mask", "eager with a bias", "fused grouped", "sinks"])
def test_every_kind_of_keeping_takes_a_choice_of_heads(way: str, kind: str) -> None:
    model = net(way)
    some, whole = captured(model, KINDS[kind], heads=[2, 0]), captured(model, KINDS[kind])
    for name, record in whole.records.items():
        for tensor in record.tensors:
            if tensor in ("queries", "mask", "bias", "sink") or (tensor in ("q", "k") and record.replay is not None):
                continue
            chosen = [1, 0] if record.tensors[tensor].shape[1] == 2 else [2, 0]
            torch.testing.assert_close(some.records[name].tensors[tensor], record.tensors[tensor][:, chosen], **TIGHT)


def test_statistics_count_visible_keys_only() -> None:
    for way in ("fused with padding", "eager with padding"):
        model = net(way)
        x, lengths = arguments(model)
        for seen in (captured(model), captured(model, Keep(statistics=True))):
            found = seen.statistics(0)
            assert found.entropy is not None
            assert found.received is not None
            assert found.argmax is not None
            for sample, length in enumerate(lengths.tolist()):
                assert float(found.entropy[sample].max()) <= math.log(length)
                assert float(found.received[sample, :, length:].abs().sum()) == 0
                assert int(found.argmax[sample].max()) < length


def test_statistics_that_were_not_kept_are_computed_from_what_was() -> None:
    model = net("fused causal")
    seen = captured(model, Keep(qk=True, statistics=("entropy",)))
    whole = captured(model, Keep(statistics=True)).statistics(0)
    for name in ("lse", "entropy", "received"):
        torch.testing.assert_close(getattr(seen.statistics(0), name), getattr(whole, name), **TIGHT)
    only = captured(model, Keep(statistics=("entropy",)))
    assert only.statistics(0).lse is None
    with pytest.raises(SelectionError, match=r"Keep\(pooled=4\)"):
        only.pooled(0, tile=4)


@pytest.mark.parametrize("way", ["fused causal", "eager causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_tensors_have_the_dtype_asked_for(way: str, dtype: torch.dtype) -> None:
    model = net(way)
    seen = captured(model, Keep(qk=True, pattern=True, z=True, statistics=True, dtype=dtype, device="cpu"))
    exact = twins(model, *arguments(model))[0]
    for value, expected in ((seen.q(0), exact.q), (seen.z(0), exact.z), (seen.pattern(0), exact.pattern)):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), expected, atol=0.02, rtol=0.01)
    found = seen.statistics(0)
    assert found.argmax is not None
    assert found.argmax.dtype == torch.int64
    later = captured(model, Keep(dtype=dtype)).pattern(0)
    torch.testing.assert_close(later.double(), exact.pattern, atol=0.02, rtol=0)


@pytest.mark.parametrize("way", ["fused causal", "fused with padding", "fused grouped by expand", "eager with a bias", "sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_shows_the_pattern_of_its_own_numbers(way: str, dtype: torch.dtype) -> None:
    model = net(way, layers=1).to(dtype)
    run = (inputs().to(dtype), *arguments(model)[1:])
    seen, kept = captured(model, run=run), captured(model, Keep(pattern=True, statistics=True), run=run)
    rounded = net(way, layers=1).to(dtype).double()
    exact = twins(rounded, run[0].double(), *run[1:])[0].pattern
    for found in (seen.pattern(0), kept.pattern(0), seen.pattern(0, rows=range(LENGTH))):
        torch.testing.assert_close(found.double(), exact, atol=0.02, rtol=0)
    for values in (seen.statistics(0), kept.statistics(0)):
        assert values.entropy is not None
        torch.testing.assert_close(values.entropy.double(), statistics(exact, exact)["entropy"], atol=0.03, rtol=0.02)


# -- normalisers that are no softmax, and code that changes what it made ----------------------------------------------------------------


def exp_masked_after(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = products(m, q, k).exp() * torch.ones(q.shape[2], q.shape[2], dtype=q.dtype).tril()
    m.real = weights / weights.sum(-1, keepdim=True)
    return m.real @ v


def exp_in_place(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = products(m, q, k)
    scores -= scores.amax(-1, keepdim=True)
    m.shifted = scores.clone()
    scores.exp_()
    m.real = scores / scores.sum(-1, keepdim=True)
    return m.real @ v


def divided_after_the_values(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = products(m, q, k).exp()
    z = weights @ v
    total = weights.sum(-1, keepdim=True)
    m.real = weights.detach().clone() / total
    return z / total


def sigmoid_masked_after(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    m.real = torch.sigmoid(products(m, q, k)) * torch.ones(q.shape[2], q.shape[2], dtype=q.dtype).tril()
    return m.real @ v


def relu(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    m.real = F.relu(products(m, q, k))
    return m.real @ v


def dropped_in_place(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = products(m, q, k).softmax(-1)
    m.real = weights.clone()
    return F.dropout(weights, 0.5, m.training, True) @ v


def dropped(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = products(m, q, k).softmax(-1)
    m.real = weights.clone()
    return F.dropout(weights, 0.5, m.training) @ v


def dropped_before(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    m.real = F.dropout(products(m, q, k), 0.5, m.training).softmax(-1)
    return m.real @ v


def written_into_a_buffer(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.zeros(q.shape[0], HEADS, q.shape[2], k.shape[2], dtype=q.dtype)
    scores += products(m, q, k)
    m.real = scores.softmax(-1)
    return m.real @ v


def dead_row(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    hidden[0] = True
    m.real = products(m, q, k).masked_fill(hidden, -math.inf).softmax(-1)
    return m.real.nan_to_num() @ v


def transposed_property(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    m.real = (k @ q.mT / math.sqrt(m.size)).mT.softmax(-1)
    return m.real @ v


ODD: list[Callable[[Attention, Tensor, Tensor, Tensor], Tensor]] = [
    exp_masked_after, exp_in_place, divided_after_the_values, sigmoid_masked_after, relu, dropped_in_place, dropped, dropped_before,
    written_into_a_buffer, dead_row, transposed_property,
]  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attend", ODD, ids=[f.__name__ for f in ODD])
def test_the_pattern_shown_is_the_one_the_code_made_before_dropout(attend: Any, training: bool) -> None:
    model = net(Way(attend), layers=1).train(training)
    for keep in (Keep(), Keep(pattern=True), Keep(qk=True), Keep(qk=True, rows=range(LENGTH))):
        seen = captured(model, keep, run=(inputs(),))
        torch.testing.assert_close(seen.pattern(0), model.layers[0].real, **TIGHT, equal_nan=True)
        torch.testing.assert_close(seen.pattern(0), seen.pattern(0), **TIGHT, equal_nan=True)


@pytest.mark.parametrize("attend", ODD, ids=[f.__name__ for f in ODD])
def test_an_unusual_attention_survives_the_disk(attend: Any, tmp_path: Path) -> None:
    model = net(Way(attend), layers=1)
    seen = captured(model, run=(inputs(),))
    seen.save(tmp_path / "run")
    torch.testing.assert_close(Capture.open(tmp_path / "run").pattern(0), model.layers[0].real, **TIGHT, equal_nan=True)


def test_scores_that_the_code_overwrites_are_kept_as_they_were() -> None:
    model = net(Way(exp_in_place), layers=1)
    seen = captured(model, Keep(scores=True), run=(inputs(),))
    torch.testing.assert_close(seen.scores(0), model.layers[0].shifted, **TIGHT)


def test_scores_that_cannot_be_made_again_say_so_and_a_later_write_into_a_mask_too() -> None:
    buffered = captured(net(Way(written_into_a_buffer), layers=1), Keep(qk=True), run=(inputs(),))
    with pytest.raises(SelectionError, match=r"do not follow from q and k.*Keep\(scores=True\)"):
        buffered.scores(0)

    def masked(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return products(m, q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v

    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    seen = captured(net(Way(masked), layers=1), run=(inputs(),))
    seen.pattern(0)
    hidden[0, 0] = True
    with pytest.raises(SelectionError, match=r"written into a mask.*Keep\(pattern=True\)"):
        seen.pattern(0)


def test_a_mask_that_is_filled_again_at_every_step_is_kept_as_it_was() -> None:
    mask = torch.zeros(1, 1, 1, LENGTH, dtype=torch.bool)

    def masked(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model, x = net(Way(masked)), inputs()
    with torch.no_grad(), Probe(model).capture() as seen, Probe(model).capture(Keep(pattern=True)) as kept:
        for visible in range(1, LENGTH):
            mask[..., :visible] = True
            model(x)
    for step in range(LENGTH - 1):
        torch.testing.assert_close(seen.pattern(0, step=step), kept.pattern(0, step=step), **TIGHT)
        assert float(seen.pattern(0, step=step)[..., step + 1 :].abs().sum()) == 0


def test_an_output_that_the_model_writes_over_is_kept_as_it_was() -> None:
    def gated(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).mul_(3.0)

    model, plain = net(Way(gated), layers=1), net("fused", layers=1)
    torch.testing.assert_close(captured(model, Keep(z=True)).z(0), captured(plain, Keep(z=True)).z(0), **TIGHT)


# -- gradients --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["pattern", "later", "z", "scores", "entropy", "rows", "q", "k", "v"])
@pytest.mark.parametrize("way", DIFFERENTIABLE)
def test_gradients_through_kept_tensors_are_those_of_the_dense_twin(way: str, what: str) -> None:
    model = net(way, layers=1)
    keep = Keep(pattern=what == "pattern", z=what == "z", scores=what == "scores", v=what == "v", gradient=True,
                statistics=("entropy",) if what == "entropy" else False, rows=range(LENGTH) if what == "rows" else None)  # fmt: skip

    def pick(seen: Any, dense: bool) -> Tensor:
        value: Tensor
        if what in ("pattern", "later", "rows"):
            value = seen.pattern if dense else seen.pattern(0)
        elif what == "entropy":
            value = statistics(seen.pattern, seen.scores)["entropy"] if dense else seen.statistics(0).entropy
        else:
            value = getattr(seen, what) if dense else getattr(seen, what)(0)
        return value.masked_fill(value < -1e30, 0.0)

    with Probe(model).capture(keep) as seen:
        model(*arguments(model))
    found = pick(seen, dense=False)
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(3))
    gradients = []
    for value in (found, pick(twins(model, *arguments(model))[0], dense=True)):
        model.zero_grad()
        (value * weights).sum().backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("way", ["fused with a float mask", "eager with a bias", "sinks"])
@pytest.mark.parametrize("kind", KINDS)
def test_by_default_looking_adds_nothing_to_the_graph(way: str, kind: str) -> None:
    model, saved = net(way), []

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(*arguments(model))
        plain = list(saved)
        saved.clear()
        with Probe(model).capture(KINDS[kind]) as seen:
            model(*arguments(model))
        assert saved == plain
        saved.clear()
        for read in (lambda: seen.pattern(0), lambda: seen.statistics(0).entropy, lambda: seen.scores(0)):
            try:
                value = read()
            except SelectionError:
                continue
            assert value is None or not value.requires_grad
        assert not saved
    assert not any(t.requires_grad for record in seen.records.values() for t in record.tensors.values())


# -- under a plan -----------------------------------------------------------------------------------------------------------------------

EDITS: dict[str, Edit] = {
    "q": Edit("q", scale(1.7), select(head=1)),
    "k": Edit("k", scale(-0.5), select(layer=0)),
    "bias": Edit("bias", bias(1.5), select(head=2, keys=[0])),
    "scores": Edit("scores", scale(0.3), select(head=3)),
    "pattern": Edit("pattern", call(lambda p, _: p * torch.linspace(0.1, 1.0, p.shape[-1], dtype=p.dtype)), select(layer=0, head=0)),
    "v": Edit("v", add(0.25), select(layer=1)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("way", ["fused", "fused causal", "fused with a float mask", "eager", "eager causal", "softcap", "sinks"])
def test_a_capture_under_a_plan_shows_the_pattern_that_multiplied_the_values(way: str, edit: str) -> None:
    model = net(way)
    run = arguments(model)
    with torch.no_grad(), Plan([EDITS[edit]]).on(model):
        with Probe(model).capture() as later:
            out = model(*run)
        with Probe(model).capture(Keep(pattern=True, v=True, z=True)) as kept:
            assert torch.equal(model(*run), out)
        with Probe(model).capture(Keep(statistics=True)) as numbers:
            model(*run)
    for layer in (0, 1):
        torch.testing.assert_close(later.pattern(layer), kept.pattern(layer), **TIGHT)
        torch.testing.assert_close(kept.pattern(layer) @ kept.v(layer), kept.z(layer), **TIGHT)
        torch.testing.assert_close(numbers.statistics(layer).received, kept.pattern(layer).sum(-2), **TIGHT)
    plain = captured(model, Keep(pattern=True, v=True))
    changed = [not torch.equal(plain.pattern(0), kept.pattern(0)), not torch.equal(plain.v(1), kept.v(1))]
    assert any(changed), "the edit did not show"


def test_q_and_k_asked_for_by_name_are_kept_beside_an_edited_pattern() -> None:
    for way in ("fused", "eager"):
        model = net(way)
        with torch.no_grad(), Plan([EDITS["pattern"]]).on(model), Probe(model).capture(Keep(qk=True)) as seen:
            model(inputs())
        expected = twins(model, inputs())[0]
        torch.testing.assert_close(seen.q(0), expected.q, **TIGHT)
        assert not torch.allclose(seen.pattern(0), expected.pattern)
        with pytest.raises(SelectionError, match="do not follow from q and k"):
            seen.scores(0)


# -- the budget -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "largest", "advice"),
    [
        (Keep(pattern=True, budget=1000), "the pattern", r"statistics=True, rows=\[…\] or pooled=64 instead"),
        (Keep(scores=True, budget=1000), "scores", "statistics=True"),
        (Keep(pooled=1, budget=1000), "the pooled map", "pooled=64"),
        (Keep(rows=range(LENGTH), budget=1000), "rows", "statistics=True"),
        (Keep(statistics=True, budget=1000), "statistics", "choose layers= and heads="),
        (Keep(budget=1000), "q and k", "choose layers= and heads="),
        (Keep(z=True, budget=1000), "z", "larger budget="),
        (Keep(v=True, budget=1000), "v", "larger budget="),
    ],
)
@pytest.mark.parametrize("way", ["fused", "eager"])
def test_a_budget_is_checked_before_anything_is_kept_and_the_message_says_what_to_do(
    way: str, keep: Keep, largest: str, advice: str
) -> None:
    model, x = net(way), inputs()
    before = model(x)
    scope = Probe(model).capture(keep)
    seen = scope.__enter__()
    with pytest.raises(BudgetError, match=rf"keeping {largest} of layers.0#0 .* over its budget of 1000 B: .*{advice}") as raised:
        model(x)
    assert not scope.__exit__(BudgetError, raised.value, None)
    assert seen.nbytes == 0
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("way", ["fused", "fused grouped", "eager", "sinks"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [None, [1]])
def test_a_capture_fits_in_a_budget_of_its_own_size_and_in_no_smaller_one(way: str, kind: str, heads: list[int] | None) -> None:
    from dataclasses import replace

    model = net(way)
    size = captured(model, KINDS[kind], heads=heads).nbytes
    exact = 8 * 2 * len(model.layers)  # `queries`, a number beside kept rows
    assert captured(model, replace(KINDS[kind], budget=size + exact), heads=heads).nbytes == size
    with pytest.raises(BudgetError):
        captured(model, replace(KINDS[kind], budget=size - exact - 1), heads=heads)


def test_memory_that_is_shared_is_counted_once_and_a_view_is_not_counted_for_the_whole() -> None:
    model = net("fused with a float mask", layers=1)
    mask = 8 * HEADS * LENGTH * LENGTH
    assert captured(model).nbytes == 2 * inputs().numel() * 8 + mask
    causal = captured(net("fused with a bool mask"))
    assert causal.nbytes == 4 * inputs().numel() * 8 + LENGTH * LENGTH


# -- no map -----------------------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes below autograd, in bytes of its own memory."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.nbytes = max([self.nbytes, *(t.untyped_storage().nbytes() for t in made if isinstance(t, Tensor))])
        return result


def without_map(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=m.way.causal)


def padded_everywhere(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    padding = (torch.arange(k.shape[2]) < k.shape[2] - 9)[None, None, None]  # [1, 1, 1, K]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=padding.expand(q.shape[0], HEADS, q.shape[2], k.shape[2]))


@pytest.mark.parametrize(
    "keep",
    [Keep(statistics=True), Keep(pooled=64), Keep(rows=[0, -1]), Keep(statistics=True, pooled=64, rows=[5]), Keep()],
    ids=["statistics", "pooled", "rows", "all three", "q and k"],
)
@pytest.mark.parametrize("attend", [without_map, padded_everywhere], ids=["causal", "padded"])
@pytest.mark.parametrize("heads", [None, [2, 0]])
@pytest.mark.parametrize("implementation", ["as chosen", "blockwise"])
def test_looking_never_makes_a_map(
    keep: Keep, attend: Any, heads: list[int] | None, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 2048
    if implementation == "blockwise":
        monkeypatch.setenv("HEADSCOPE_CPU_KERNEL", "0")
    model = net(Way(attend, causal=attend is without_map), layers=1).float()
    largest, record = Largest(), Recorder.record

    def watched(self: Recorder, call: AttentionCall) -> Record:  # what torch's own kernel makes of a mask is left out
        with largest:
            return record(self, call)

    monkeypatch.setattr(Recorder, "record", watched)
    seen = captured(model, keep, run=(inputs(1, tokens).float(),), heads=heads)
    with largest:
        if keep == Keep():
            assert seen.statistics(0).entropy is not None
            seen.pattern(0, rows=[-1, 3])
            seen.pooled(0, tile=128)
    assert 0 < largest.nbytes <= tokens * tokens  # one head's map in a byte a cell; in float32 it takes four times as many


@pytest.mark.parametrize("heads", [None, [3, 1]])
def test_a_padding_mask_that_is_spread_over_heads_and_queries_is_kept_as_it_was_written(heads: list[int] | None) -> None:
    tokens = 64
    model = net(Way(padded_everywhere), layers=2)
    run = (inputs(2, tokens),)
    seen, rest = captured(model, run=run, heads=heads), captured(net("fused", layers=2), run=run, heads=heads)
    assert seen.nbytes - rest.nbytes == tokens  # one bool per key, for both layers
    kept = captured(model, Keep(pattern=True, statistics=True), run=run, heads=heads)
    assert float(kept.pattern(0)[..., -9:].abs().sum()) == 0
    torch.testing.assert_close(seen.pattern(0), kept.pattern(0), **TIGHT)
    for name, value in kept.statistics(0).tensors().items():
        same(getattr(seen.statistics(0), name), value, name)


@pytest.mark.parametrize("way", ["fused causal", "fused with a float mask", "fused grouped by expand"])
def test_single_precision_takes_the_chosen_kernel_and_agrees_with_double(way: str) -> None:
    exact, model = net(way, layers=1), net(way, layers=1).float()
    run = arguments(exact)
    single = tuple(x.float() if x.is_floating_point() else x for x in run)
    keep = Keep(statistics=True, pooled=3, rows=[0, -1])
    found, expected = captured(model, keep, run=single), captured(exact, keep, run=run)
    for name, value in expected.statistics(0).tensors().items():
        number = found.statistics(0).tensors()[name]
        assert number.dtype == (torch.int64 if name == "argmax" else torch.float32)
        torch.testing.assert_close(number.double(), value.double(), atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(found.pattern(0).double(), expected.pattern(0), atol=1e-6, rtol=0)


# -- bad input --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Keep(statistics=("entropi",)), r"no statistic 'entropi': choose from lse, entropy"),
        (lambda: Keep(statistics="entropy"), r"give a tuple of names, such as \('entropy',\)"),
        (lambda: Keep(rows=3), r"rows=3: give a list of query positions, such as \[3\]"),
        (lambda: Keep(pooled=0), r"pooled=0: the side of a tile"),
        (lambda: Keep(budget=0), r"budget=0: give a positive number"),
        (lambda: Keep(dtype=torch.int8), r"dtype=torch.int8: .* floating-point"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_messages_about_a_wrong_choice_name_the_right_ones() -> None:
    model = net("fused grouped")
    with torch.no_grad(), Probe(model).capture() as seen:
        model(inputs())
        model(inputs())
    for read, message in [
        (lambda: seen.pattern(7, step=0), r"layer=7: captured layers are \[0, 1\]"),
        (lambda: seen.pattern(site="block*", step=0), r"site='block\*': captured sites are layers.0#0, layers.1#0"),
        (lambda: seen.pattern(site="layers*", step=0), r"2 sites match: layers.0#0, layers.1#0; say which with site="),
        (lambda: seen.pattern(0), r"layers.0#0 was called 2 times: say step=0 … step=1"),
        (lambda: seen.pattern(0, step=2), r"no step 2 of layers.0#0; kept are \[0, 1\]"),
        (lambda: seen.pattern(0, step=-3), r"no step -3 of layers.0#0; kept are \[0, 1\]"),
        (lambda: seen.pattern(0, step=0, heads=4), r"no head 4: layers.0#0 has 4 heads, 0 to 3"),
        (lambda: seen.pattern(0, step=0, heads=[]), r"heads=\[\] chooses no head"),
        (lambda: seen.pattern(0, step=0, rows=LENGTH), rf"no query position {LENGTH}: this call has {LENGTH}, 0 to {LENGTH - 1}"),
        (lambda: seen.v(0, step=0), r"v of layers.0#0 was not kept; kept are k, q: capture with Keep\(v=True\)"),
        (lambda: seen.z(0, step=0), r"Keep\(z=True\)"),
    ]:  # fmt: skip
        with pytest.raises(SelectionError, match=message):
            read()
    assert torch.equal(seen.pattern(0, step=-1), seen.pattern(0, step=1))
    nothing = captured(model, Keep(qk=False))
    with pytest.raises(SelectionError, match=r"only nothing was kept: capture with Keep\(\)"):
        nothing.pattern(0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (dict(layers=5), r"hit no site: layers=\[5\]; the model showed layers.0#0, layers.1#0"),
        (dict(sites="nothing.*"), r"hit no site: sites=\['nothing.\*'\]"),
        (dict(sites=[]), r"hit no site"),
        (dict(heads=4), r"no head 4: layers.0#0 has 4 heads, 0 to 3"),
        (dict(heads=-1), r"no head -1"),
        (dict(heads=[]), r"heads=\[\] chooses no head"),
        (dict(steps=3), r"steps=\[3\] were never reached"),
    ],
)
def test_a_selection_that_hits_nothing_raises(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        captured(net("fused"), **limits)


def test_layers_sites_and_steps_limit_what_is_kept() -> None:
    model = net("fused", layers=3)
    assert [s.layer for s in captured(model, layers=[2, 0]).sites] == [0, 2]
    assert [s.layer for s in captured(model, layers=range(1, 3)).sites] == [1, 2]
    assert [s.name for s in captured(model, sites=["layers.1", "*.2#0"]).sites] == ["layers.1#0", "layers.2#0"]
    with torch.no_grad(), Probe(model).capture(steps=[1]) as seen:
        for _ in range(3):
            model(inputs())
    assert seen.steps(layer=0) == [1]
    assert len(seen.records) == 3


def test_a_name_with_glob_characters_names_itself_and_is_escaped() -> None:
    hostile = "a[b]*<script>alert(1)</script>"
    inner = net("eager", layers=1).layers[0]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({hostile: inner, "other": net("eager", layers=1).layers[0]})

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.parts[hostile](self.parts["other"](x))
            return out

    seen = captured(Outer(), run=(inputs(),))  # type: ignore[arg-type]
    name = f"parts.{hostile}#0"
    assert seen.pattern(site=name).shape == (2, HEADS, LENGTH, LENGTH)
    assert f"{name}@0" in seen.to_xarray()
    page = seen._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_two_sites_in_one_layer_ask_which() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.cross_attn = (net("fused", layers=1).layers[0] for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.cross_attn(self.self_attn(x))
            return out

    seen = captured(nn.Sequential(Block(), Block()), run=(inputs(),))  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match=r"2 sites match: 1.self_attn#0, 1.cross_attn#0; say which with site="):
        seen.pattern(1)
    assert torch.equal(seen.pattern(1, site="*cross*"), seen.pattern(site="1.cross_attn"))


def test_a_closed_capture_is_not_read() -> None:
    seen = captured(net("fused"))
    seen.close()
    for read in (lambda: seen.pattern(0), lambda: seen.sites, lambda: seen.statistics(0), lambda: seen.save("x"), seen.to_xarray):
        with pytest.raises(ClosedError, match="capture was closed"):
            read()
    assert repr(seen).startswith("Capture(")


# -- on disk ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, [3, 1]])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", MIXED)
def test_what_is_saved_is_what_is_opened(way: str, kind: str, heads: list[int] | None, tmp_path: Path) -> None:
    seen = captured(net(way), KINDS[kind], heads=heads)
    seen.save(tmp_path / "run")
    opened = Capture.open(tmp_path / "run")
    opened.verify()
    opened.save(tmp_path / "again")
    assert opened.keep == Capture.open(tmp_path / "again").keep
    head = 1
    for there in (opened, Capture.open(tmp_path / "again")):
        assert [s.to_dict() for s in there.sites] == [s.to_dict() for s in seen.sites]
        for layer in (0, 1):
            for name in ("q", "k", "v", "z", "pattern"):
                try:
                    expected = getattr(seen, name)(layer)
                except SelectionError:
                    with pytest.raises(SelectionError):
                        getattr(there, name)(layer)
                    continue
                same(getattr(there, name)(layer), expected, name)
                if name not in ("k", "v"):
                    same(getattr(there, name)(layer, heads=head), getattr(seen, name)(layer, heads=head), name)
            try:
                expected_statistics = seen.statistics(layer).tensors()
            except SelectionError:
                continue
            for name, value in expected_statistics.items():
                same(there.statistics(layer).tensors()[name], value, name)


@pytest.mark.parametrize("way", ["fused with a float mask", "eager with a bias"])
def test_scores_of_an_opened_capture_are_right_or_refused(way: str, tmp_path: Path) -> None:
    seen = captured(net(way))
    seen.save(tmp_path / "run")
    opened = Capture.open(tmp_path / "run")
    if way.startswith("fused"):
        same(opened.scores(0), seen.scores(0), "scores")
    else:
        with pytest.raises(SelectionError, match=r"capture with Keep\(scores=True\)"):
            opened.scores(0)


@pytest.mark.parametrize("keep", [Keep(), Keep(pattern=True)], ids=["q and k", "pattern"])
@pytest.mark.parametrize("way", ["fused grouped", "fused with a bool mask", "eager grouped by expand"])
def test_one_head_is_read_without_the_rest(way: str, keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = captured(net(way), keep)
    seen.save(tmp_path / "run")
    opened, read = Capture.open(tmp_path / "run"), Store.read

    def only_masks(self: Store, shard: str, name: str) -> Tensor:
        assert shard == "shared", f"{name} was read whole"
        return read(self, shard, name)

    monkeypatch.setattr(Store, "read", only_masks)
    same(opened.pattern(0, heads=2), seen.pattern(0, heads=2), "pattern")
    same(opened.pattern(1, heads=[3, 0], rows=-1), seen.pattern(1, heads=[3, 0], rows=-1), "rows")


def test_a_mask_of_all_layers_lies_on_the_disk_once(tmp_path: Path) -> None:
    tokens, layers = 48, 4

    def masked(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(tokens, tokens, dtype=q.dtype).masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(2, 1, tokens, tokens))

    seen = captured(net(Way(masked), layers), run=(inputs(2, tokens),))
    operands, mask = 2 * layers * inputs(2, tokens).numel() * 8, tokens * tokens * 8
    assert seen.nbytes == operands + mask
    for folder in ("run", "again"):
        seen.save(tmp_path / folder)
        size = sum(f.stat().st_size for f in (tmp_path / folder).glob("*.safetensors"))
        assert operands + mask <= size < operands + mask * 1.2
        seen = Capture.open(tmp_path / folder)


def test_a_saved_capture_is_replaced_only_when_asked_and_damage_is_named(tmp_path: Path) -> None:
    model, folder = net("fused"), tmp_path / "run"
    first, second = captured(model), captured(model, Keep(pattern=True), run=(inputs(1),))
    first.save(folder)
    with pytest.raises(StoreError, match="overwrite=True"):
        second.save(folder)
    second.save(folder, overwrite=True)
    opened = Capture.open(folder)
    same(opened.pattern(0), second.pattern(0), "pattern")
    shard = max(folder.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="sha256"):
        opened.verify()
    damaged = Capture.open(folder)
    with pytest.raises(StoreError, match="damaged"):
        [damaged.pattern(layer) for layer in (0, 1)]
    shard.unlink()
    with pytest.raises(StoreError, match="missing"):
        Capture.open(folder)
    with pytest.raises(StoreError, match="no such capture"):
        Capture.open(tmp_path / "nothing")
    with pytest.raises(StoreError, match="in memory"):
        first.verify()


def test_an_empty_capture_is_not_saved_and_other_manifests_are_not_opened(tmp_path: Path) -> None:
    from headscope.probe.store import write

    with pytest.raises(StoreError, match="nothing was captured"):
        Capture(Keep()).save(tmp_path / "run")
    write(tmp_path / "other", {"x": {"y": torch.zeros(2)}}, {"calls": [{"site": 3}], "keep": {}})
    with pytest.raises(StoreError, match="not one of this version"):
        Capture.open(tmp_path / "other")


# -- views ------------------------------------------------------------------------------------------------------------------------------


def test_xarray_names_the_axes_and_keeps_the_values() -> None:
    seen = captured(net("fused grouped"), Keep(qk=True, pooled=3), heads=[3, 1])
    found = seen.to_xarray()
    one = found["layers.1#0@0"]
    assert one.dims == ("sample", "head:2", f"query:{LENGTH}", f"key:{LENGTH}")
    assert one.coords["head:2"].values.tolist() == [3, 1]
    assert (one.attrs["layer"], one.attrs["step"]) == (1, 0)
    assert torch.equal(torch.from_numpy(one.values), seen.pattern(1))
    assert torch.equal(torch.from_numpy(one.sel({"head:2": 1}).values), seen.pattern(1, heads=1)[:, 0])
    assert seen.to_xarray("received")["layers.0#0@0"].dims == ("sample", "head:2", f"key:{LENGTH}")
    assert seen.to_xarray("argmax")["layers.0#0@0"].dtype == "int64"
    assert seen.to_xarray("pooled")["layers.0#0@0"].dims == ("sample", "head:2", "query tile:3", "key tile:3")
    with pytest.raises(SelectionError, match="no 'entropi' of layers.0#0: choose pattern or one of lse"):
        seen.to_xarray("entropi")


def test_xarray_takes_calls_of_different_sizes_and_half_precision() -> None:
    model = net("fused").bfloat16()
    with torch.no_grad(), Probe(model).capture() as seen:
        model(inputs(2).bfloat16())
        model(inputs(3, 4).bfloat16())
    found = seen.to_xarray()
    assert found["layers.0#0@0"].dims[0] == "sample:2"
    assert found["layers.0#0@1"].dims == ("sample:3", f"head:{HEADS}", "query:4", "key:4")


def test_the_table_of_a_capture_lists_calls_and_stops_at_two_hundred() -> None:
    model = net("fused", layers=1)
    with torch.no_grad(), Probe(model).capture() as seen:
        for _ in range(203):
            model(inputs(1, 2))
    page = seen._repr_html_()
    assert page.count("<tr>") == 201
    assert "and 3 more calls" in page
