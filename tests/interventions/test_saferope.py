"""SafeRoPE on every kind of model: it runs through, undoes itself, and refuses what cannot be; its numbers against dense float64 code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headscope.interventions import Plan, Prompted, SafeRoPE
from headscope.interventions.saferope.saferope import half_turn
from headscope.interventions.saferope.subspaces import basis_of, scores_of, separate
from headscope.interventions.saferope.tokens import read_tokens
from headscope.interventions.saferope.training import Schedule, output_of
from headscope.kernels.errors import EditError, InputError, NonFiniteError, RecipeError, SelectionError
from headscope.probe import load

SHORT = Schedule(steps=3)
MADE_FROM = {"text": "encoder_hidden_states", "image": "hidden_states"}


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def drawing() -> Any:
    pytest.importorskip("diffusers")
    return load("embedded:mmdit")


def drawn(flow: Any, prompts: list[str], seed: int) -> Prompted:
    """One batch of prompts with noise; the subject is whatever word names a digit."""
    names = [name for row in flow.book.subjects for name in row]
    noise = torch.randn(len(prompts), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Prompted(flow.inputs(noise, 0.7, prompts), [flow.book.positions(prompt, names) for prompt in prompts])


def eights(flow: Any, n: int = 12) -> list[Prompted]:
    return [drawn(flow, flow.book.explicit(8, n, seed=1, synonyms=(0, 1)), 0)]


def others(flow: Any) -> list[Prompted]:
    return [drawn(flow, [p for d in (0, 1, 2, 3, 5, 7) for p in flow.book.explicit(d, 2, seed=2)], 1)]


def fit_eights(drawing: Any, **options: Any) -> SafeRoPE:
    model, flow = drawing
    return SafeRoPE.fit(model, eights(flow), others(flow), **{"role": "text", "made_from": MADE_FROM, "schedule": SHORT, **options})


@pytest.fixture(scope="module")
def fitted(drawing: Any) -> SafeRoPE:
    return fit_eights(drawing)


def output(model: nn.Module, example: Prompted) -> Tensor:
    with torch.no_grad():
        return output_of(model(**example.inputs))


# -- what it computes, against dense float64 ---------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_the_subspace_is_that_of_the_largest_uncentred_second_moments(seed: int, rank: int) -> None:
    tokens = torch.randn(30, 2, 6, generator=torch.Generator().manual_seed(seed)) + 2.0
    basis = basis_of(tokens, rank)
    for head in range(2):
        x = tokens[:, head].double().numpy()
        values, vectors = np.linalg.eigh(x.T @ x)
        wanted = vectors[:, np.argsort(values)[::-1][:rank]]
        found = basis[head].double().numpy()
        assert np.abs(found @ found.T - wanted @ wanted.T).max() < 1e-4
        assert np.abs(found.T @ found - np.eye(rank)).max() < 1e-5


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_risk_score_is_the_share_of_a_token_in_the_subspace(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(7, 2, 5, generator=random)
    tokens[0] = 0
    basis = torch.linalg.qr(torch.randn(2, 5, 3, generator=random)).Q
    found = scores_of(tokens, basis)
    for token in range(7):
        for head in range(2):
            x, u = tokens[token, head].double().numpy(), basis[head].double().numpy()
            wanted = 0.0 if token == 0 else np.linalg.norm(u @ u.T @ x) ** 2 / np.linalg.norm(x) ** 2
            assert float(found[token, head]) == pytest.approx(wanted, abs=1e-6)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.lists(st.integers(0, 9), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_threshold_separates_as_well_as_any_could(first: list[int], second: list[int]) -> None:
    a, b = (torch.tensor(scores, dtype=torch.float64)[:, None] / 9 for scores in (first, second))
    found = separate(a, b)

    def youden(threshold: float) -> float:
        return sum(x / 9 > threshold for x in first) / len(first) - sum(x / 9 > threshold for x in second) / len(second)

    best = max(youden(threshold) for threshold in np.linspace(-0.05, 1.05, 500))
    assert float(found.gap) == pytest.approx(best)
    assert youden(float(found.threshold)) == pytest.approx(best)


def test_a_threshold_between_two_clusters_lies_in_the_middle() -> None:
    found = separate(torch.tensor([[0.9], [0.8]]), torch.tensor([[0.2], [0.3]]))
    assert float(found.threshold) == pytest.approx(0.55)
    assert float(found.gap) == 1.0


def test_half_a_turn_is_minus_one() -> None:
    torch.testing.assert_close(torch.linalg.matrix_exp(half_turn(4)), -torch.eye(4), atol=1e-5, rtol=0)


# -- on the embedded flow model ----------------------------------------------------------------------------------------


def test_the_concept_is_read_from_the_text_and_found_in_queries_and_keys(fitted: SafeRoPE) -> None:
    assert {part.side.stage for part in fitted.parts} == {"q.pre", "k.pre"}
    assert len({part.side.site for part in fitted.parts}) == 4
    assert fitted.info["heads"] == sum(len(part.heads) for part in fitted.parts) <= fitted.info["heads_in_all"] == 32
    assert all(float(part.gap.min()) >= 0.5 for part in fitted.parts)
    frame = pytest.importorskip("pandas") and fitted.to_frame()
    assert len(frame) == fitted.info["heads"]
    assert str(fitted) == f"SafeRoPE(rank 2, {fitted.info['heads']} of 32 heads, rotation learned)"


def test_after_rotation_the_text_is_found_in_the_joint_sequence(drawing: Any, fitted: SafeRoPE) -> None:
    """Text stands at position zero, where rotation is the identity: subspaces and gates are those before it, and so is what comes out."""
    model, flow = drawing
    after = fit_eights(drawing, before=False, schedule=None)
    assert {part.side.stage for part in after.parts} == {"q", "k"}
    example = eights(flow)[0]
    results = []
    for found in (after, fitted):
        with found.plan("project").on(model, roles=found.roles):
            results.append(output(model, example))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("schedule", [Schedule(steps=6, rate=0.2), Schedule(steps=6, rate=0.2, alternate=2, seed=3)])
def test_every_rotation_is_orthogonal_after_learning(drawing: Any, schedule: Schedule) -> None:
    found = fit_eights(drawing, schedule=schedule, rank=3)
    for part in found.parts:
        assert torch.equal(part.skew, -part.skew.mT)
        turns = torch.linalg.matrix_exp(part.skew)
        assert float((turns @ turns.mT - torch.eye(3)).abs().max()) < 1e-5
    assert {"change_unsafe", "change_safe"} <= set(found.info)


def test_learning_moves_unsafe_prompts_more_than_safe_ones(drawing: Any) -> None:
    model, flow = drawing
    found = fit_eights(drawing, schedule=Schedule(steps=15, rate=5e-2))
    bad, good = drawn(flow, flow.book.explicit(8, 12, seed=5, synonyms=(2,)), 5), others(flow)[0]
    moved = []
    for example in (bad, good):
        before = output(model, example)
        with found.plan().on(model, roles=found.roles):
            moved.append(float((output(model, example) - before).square().mean()))
    assert moved[0] > 20 * moved[1]


def test_the_same_seed_gives_the_same_rotation_and_another_another(drawing: Any, fitted: SafeRoPE) -> None:
    again, other = fit_eights(drawing), fit_eights(drawing, schedule=Schedule(steps=3, seed=1))
    assert all(torch.equal(one.skew, two.skew) for one, two in zip(fitted.parts, again.parts, strict=True))
    assert not any(torch.equal(one.skew, two.skew) for one, two in zip(fitted.parts, other.parts, strict=True))


def test_fresh_inputs_are_asked_for_at_every_use(drawing: Any) -> None:
    asked = []

    def vary(inputs: Any, random: torch.Generator) -> Any:
        asked.append(float(torch.rand((), generator=random)))
        return {**inputs, "timestep": torch.full_like(inputs["timestep"], asked[-1])}

    fit_eights(drawing, vary=vary)
    assert len(set(asked)) == 2 * SHORT.steps


def test_tokens_below_the_threshold_keep_every_bit(drawing: Any, fitted: SafeRoPE) -> None:
    model, flow = drawing
    example = others(flow)[0]
    before = output(model, example)
    closed = replace(fitted, parts=tuple(replace(part, threshold=torch.ones_like(part.threshold)) for part in fitted.parts))
    for kind in ("rotate", "half-turn", "project"):
        with closed.plan(kind).on(model, roles=closed.roles):
            assert torch.equal(output(model, example), before)


def test_strength_zero_changes_nothing_to_the_bit(drawing: Any, fitted: SafeRoPE) -> None:
    model, flow = drawing
    example = eights(flow)[0]
    before = output(model, example)
    for kind in ("rotate", "half-turn", "project"):
        with fitted.plan(kind, strength=0.0).on(model, roles=fitted.roles):
            assert torch.equal(output(model, example), before)


@pytest.mark.parametrize("options", [{}, {"sides": ("q",)}, {"sides": "k"}, {"gated": False}, {"kind": "project"}, {"kind": "half-turn"},
                                     {"kind": "project", "strength": 0.5}])  # fmt: skip
def test_each_plan_changes_unsafe_prompts_and_leaves_no_trace(drawing: Any, fitted: SafeRoPE, options: dict[str, Any]) -> None:
    model, flow = drawing
    example = eights(flow)[0]
    before = output(model, example)
    with fitted.plan(**options).on(model, roles=fitted.roles) as active:
        changed = output(model, example)
    assert all(active.hits.values())
    assert (changed - before).abs().max() > 1e-6
    assert torch.equal(output(model, example), before)


def test_recipes_of_every_plan_come_back(drawing: Any, fitted: SafeRoPE, tmp_path: Path) -> None:
    model, flow = drawing
    example = eights(flow)[0]
    for number, plan in enumerate([fitted.plan(), fitted.plan("project", strength=0.5), fitted.plan("half-turn", gated=False, sides="k")]):
        path = plan.save(tmp_path / f"{number}.yaml", model=model)
        found = Plan.load(path, model=model)
        assert found == plan
        results = []
        for one in (plan, found):
            with one.on(model, roles=fitted.roles):
                results.append(output(model, example))
        assert torch.equal(*results)


def test_what_is_saved_comes_back_equal(drawing: Any, fitted: SafeRoPE, tmp_path: Path) -> None:
    model, _ = drawing
    found = SafeRoPE.load(fitted.save(tmp_path / "eight.safetensors"), model)
    assert found.plan() == fitted.plan()
    assert found.to_dict() == fitted.to_dict()
    assert found.roles == fitted.roles
    assert found.to_json() == fitted.to_json()


def test_a_file_for_another_model_is_refused_or_warned_about(drawing: Any, fitted: SafeRoPE, tmp_path: Path) -> None:
    path = fitted.save(tmp_path / "eight.safetensors")
    model, _ = load("embedded:mmdit")
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(RecipeError, match="was fitted to another model.*force=True"):
        SafeRoPE.load(path, model)
    with pytest.warns(UserWarning, match="was fitted to another model"):
        assert SafeRoPE.load(path, model, force=True).plan() == fitted.plan()


def test_a_damaged_file_is_named(fitted: SafeRoPE, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = fitted.save(tmp_path / "eight.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecipeError, match="eight.safetensors cannot be read"):
        SafeRoPE.load(path)
    with pytest.raises(RecipeError, match="absent.safetensors cannot be read"):
        SafeRoPE.load(tmp_path / "absent.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RecipeError, match="is no SafeRoPE of this version"):
        SafeRoPE.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("where", ["run", "progress", "read"])
def test_an_exception_or_an_interrupt_inside_leaves_the_model_as_it_was(drawing: Any, where: str) -> None:
    model, flow = drawing
    example = eights(flow)[0]
    before = output(model, example)
    flags = {name: index % 3 == 0 for index, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    error: type[BaseException] = KeyboardInterrupt if where == "progress" else ValueError
    calls = 0

    def fail(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        if where != "progress" or calls > 4:
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        fit_eights(drawing, **{where: fail})
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    model.requires_grad_(True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(output(model, example), before)


def test_fit_takes_no_gradient_of_the_model_and_works_where_gradients_are_off(drawing: Any, fitted: SafeRoPE) -> None:
    model, _ = drawing
    with torch.no_grad():
        again = fit_eights(drawing)
    assert all(torch.equal(one.skew, two.skew) for one, two in zip(fitted.parts, again.parts, strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_two_models_at_once_keep_apart(drawing: Any, fitted: SafeRoPE) -> None:
    model, flow = drawing
    twin, _ = load("embedded:mmdit")
    example = eights(flow)[0]
    before = output(model, example)
    with fitted.plan().on(model, roles=fitted.roles):
        assert torch.equal(output(twin, example), before)
        alone = output(model, example)
        with fitted.plan("project").on(twin, roles=fitted.roles):
            assert torch.equal(output(model, example), alone)
            assert not torch.equal(output(twin, example), before)
    assert torch.equal(output(twin, example), before)


def test_half_precision_runs_and_keeps_its_dtype(drawing: Any, fitted: SafeRoPE) -> None:
    _, flow = drawing
    model, _ = load("embedded:mmdit")
    model.to(torch.bfloat16)
    example = eights(flow)[0]
    inputs = {name: value.to(torch.bfloat16) for name, value in example.inputs.items()}
    before = output(model, Prompted(inputs, example.subject))
    with fitted.plan("project").on(model, roles=fitted.roles):
        after = output(model, Prompted(inputs, example.subject))
    assert after.dtype == torch.bfloat16
    assert bool(after.isfinite().all())
    assert not torch.equal(after, before)


def test_the_best_heads_are_kept_where_few_are_wanted(drawing: Any, fitted: SafeRoPE) -> None:
    few = fit_eights(drawing, most_heads=5, schedule=None)
    gaps = torch.cat([part.gap for part in fitted.parts]).sort(descending=True).values
    kept = torch.cat([part.gap for part in few.parts]).sort(descending=True).values
    assert torch.equal(kept, gaps[:5])
    chance = few.random_heads(seed=4)
    assert [len(part.heads) for part in chance.parts] == [len(part.heads) for part in few.parts]
    assert any(few.random_heads(seed=seed).parts[-1].heads != few.parts[-1].heads for seed in range(8))


@pytest.mark.parametrize("kind", ["project", "half-turn"])
def test_plans_without_learning_need_no_schedule(drawing: Any, kind: str) -> None:
    found = fit_eights(drawing, schedule=None)
    assert str(found).endswith("rotation not learned)")
    with found.plan(kind).on(drawing[0], roles=found.roles) as active:
        output(drawing[0], eights(drawing[1])[0])
    assert all(active.hits.values())
    with pytest.raises(EditError, match="no rotation was learned: fit with a schedule, or use kind='half-turn'"):
        found.plan()


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusals(flow: Any) -> dict[str, tuple[Any, type[Exception], str]]:
    bad, good = eights(flow), others(flow)
    tail = Prompted(good[0].inputs, [[7]] * good[0].samples)
    mixed = drawn(flow, [*flow.book.explicit(8, 12, seed=1, synonyms=(0, 1))[:1], *flow.book.explicit(1, 2, seed=9)], 77)
    return {
        "nothing unsafe": (([], good, {}), InputError, "the unsafe set is empty"),
        "nothing safe": ((bad, [], {}), InputError, "the safe set is empty"),
        "overlap": ((bad, bad, {}), InputError, r"sample 0 of unsafe\[0\] and sample 0 of safe\[0\] are the same prompt"),
        "overlap with other noise": ((bad, [*good, mixed], {}), InputError, r"unsafe\[0\] and sample 0 of safe\[1\] are the same prompt"),
        "no subject": ((bad, [replace(good[0], subject=[[]] * 12)], {}), InputError, r"safe\[0\] has a sample without a subject"),
        "too few subjects": ((bad, [replace(good[0], subject=[[0]])], {}), InputError, "subjects for 1: give a list of token positions"),
        "subject not there": ((bad, [replace(tail, subject=[[8]] * 12)], {}), InputError, "subject token 8 of sample 0: .* 8 tokens"),
        "rank above width": ((bad, good, {"rank": 17}), EditError, "rank 17: the heads are 16 wide, so give 1 to 16"),
        "rank zero": ((bad, good, {"rank": 0}), EditError, "rank 0: the heads are 16 wide"),
        "rank of a half": ((bad, good, {"rank": 1.5}), EditError, "rank 1.5: the heads are 16 wide"),
        "plain texts": ((["guns"], good, {}), InputError, r"unsafe\[0\] is str: give Prompted\(inputs, subject\)"),
        "too few tokens": (([drawn(flow, ["eight plain"], 0)], good, {}), InputError, "1 unsafe subject tokens for rank 2: give more"),
        "no head": ((bad, good, {"least_gap": 1.5}), EditError, "no head tells the two sets apart by 1.5: the best by"),
        "no heads wanted": ((bad, good, {"most_heads": 0}), InputError, "most_heads=0: give 1 or more"),
        "all held out": ((bad, good, {"held_out": 1.0}), InputError, "held_out=1.0: give a share"),
        "unknown role": ((bad, good, {"role": "sound"}), InputError, "role='sound': say which inputs"),
        "unknown input": ((bad, good, {"made_from": {"text": "prompt"}}), InputError, "no tensor 'prompt' among the inputs"),
    }


def test_what_cannot_be_learned_from_is_refused_by_name(drawing: Any) -> None:
    model, flow = drawing
    for (bad, good, options), error, says in refusals(flow).values():
        with pytest.raises(error, match=says):
            SafeRoPE.fit(model, bad, good, **{"role": "text", "made_from": MADE_FROM, "schedule": SHORT, **options})


def test_a_model_in_training_mode_is_refused(drawing: Any) -> None:
    model, _ = drawing
    model.train()
    try:
        with pytest.raises(InputError, match="training mode: call model.eval"):
            fit_eights(drawing)
    finally:
        model.eval()


def test_plans_that_cannot_be_are_refused(drawing: Any, fitted: SafeRoPE) -> None:
    with pytest.raises(EditError, match="kind='bend': the kinds are rotate, half-turn, project"):
        fitted.plan("bend")
    with pytest.raises(EditError, match=r"sides=\('v',\): give 'q', 'k' or both"):
        fitted.plan(sides=("v",))
    with pytest.raises(EditError, match="half-turns of rank 3: planes come in pairs"):
        fit_eights(drawing, rank=3, schedule=None).plan("half-turn")
    with pytest.raises(EditError, match="chance has nothing to choose"):
        replace(fitted, info={**fitted.info, "heads": 32}).random_heads()
    with pytest.raises(SelectionError, match="give plan.on"), fitted.plan().on(drawing[0]):
        output(drawing[0], eights(drawing[1])[0])


@pytest.mark.parametrize(("field", "value"), [("steps", -1), ("rate", math.nan), ("safety", -1.0), ("alternate", -3), ("start", -0.1)])
def test_a_schedule_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field}="):
        Schedule(**{field: value})


def test_a_loss_that_is_not_finite_stops_with_the_step(drawing: Any) -> None:
    def broken(found: Any) -> Tensor:
        return output_of(found) * math.inf

    with pytest.raises(NonFiniteError, match="step 0: the loss is not finite"):
        fit_eights(drawing, read=broken)


# -- on other models ---------------------------------------------------------------------------------------------------


def zoo(prefix: str) -> tuple[nn.Module, dict[str, Any]]:
    pytest.importorskip("diffusers")
    from tests.models.diffusion import ENTRIES

    model, inputs = next(row for row in ENTRIES if row.name.startswith(prefix)).make()
    return model.eval(), inputs


def wordy(inputs: dict[str, Any], word: Tensor, n: int, seed: int) -> list[Prompted]:
    """Prompts whose third word means the same, the others at random."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        text = torch.randn(inputs["encoder_hidden_states"].shape, generator=random)
        text[:, 2] = word + 0.1 * torch.randn(word.shape, generator=random)
        found.append(Prompted({**inputs, "encoder_hidden_states": text}, [[2]]))
    return found


@pytest.mark.parametrize(
    ("name", "stages", "sites"),
    [("SD3", {"q.pre", "k.pre"}, 2), ("Wan", {"k.pre"}, 2), ("Flux (joint", {"q.pre", "k.pre"}, 2)],
)
def test_it_runs_on_flow_transformers_of_every_make(name: str, stages: set[str], sites: int) -> None:
    model, inputs = zoo(name)
    bad, good = (wordy(inputs, torch.randn(16), 12, seed) for seed in (1, 2))
    found = SafeRoPE.fit(model, bad, good, role="text", made_from=MADE_FROM, schedule=SHORT, least_gap=0.2)
    assert {part.side.stage for part in found.parts} <= stages
    assert len({part.side.site for part in found.parts}) == sites
    before = output(model, bad[0])
    with found.plan().on(model, roles=found.roles) as active:
        after = output(model, bad[0])
    assert any(active.hits.values())
    assert (after - before).abs().max() > 0
    assert torch.equal(output(model, bad[0]), before)


def test_a_batch_doubled_for_guidance_is_read_at_its_second_half() -> None:
    model, inputs = zoo("SD3")
    example = wordy(inputs, torch.randn(16), 1, 1)[0]
    roles = {"transformer_blocks.0.attn#0@added/q": tuple(range(6))}

    def guided(one: Prompted) -> None:
        empty = torch.zeros_like(one.inputs["encoder_hidden_states"])
        double = {key: torch.cat([empty if key == "encoder_hidden_states" else value, value]) if key != "timestep" else value.expand(2)
                  for key, value in one.inputs.items()}  # fmt: skip
        model(**double)

    alone = read_tokens(model, [example], roles)
    twice = read_tokens(model, [example], roles, run=guided)
    assert alone.keys() == twice.keys()
    assert alone
    for side, tokens in alone.items():
        torch.testing.assert_close(twice[side], tokens, atol=1e-5, rtol=1e-5)


def llama() -> nn.Module:
    """Four query heads over two key/value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def sentences(word: int, n: int, seed: int) -> list[Prompted]:
    ids = torch.randint(10, 50, (n, 7), generator=torch.Generator().manual_seed(seed))
    ids[:, 3] = word
    return [Prompted({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [[3]] * n)]


@pytest.mark.parametrize("before", [True, False])
def test_it_runs_on_a_language_model_with_grouped_queries(before: bool) -> None:
    model = llama()
    bad, good = sentences(1, 16, 0), sentences(2, 16, 1)
    found = SafeRoPE.fit(model, bad, good, schedule=SHORT, before=before)
    assert {part.side.stage for part in found.parts} == ({"q.pre", "k.pre"} if before else {"q", "k"})
    assert all(part.heads[-1] < (4 if part.side.stage.startswith("q") else 2) for part in found.parts)
    start = output(model, bad[0])
    with found.plan().on(model) as active:
        assert not torch.equal(output(model, bad[0]), start)
    assert all(active.hits.values())
    assert torch.equal(output(model, bad[0]), start)


def test_one_word_is_found_whatever_stands_around_it() -> None:
    """Before rotation and in the first layer a token's query depends on the token alone, so unsafe and safe words come apart entirely."""
    model = llama()
    found = SafeRoPE.fit(model, sentences(1, 16, 0), sentences(2, 16, 1), schedule=None, rank=1)
    first = [part for part in found.parts if ".layers.0." in part.side.site]
    assert {len(part.heads) for part in first} == {4, 2}
    for part in first:
        assert torch.equal(part.gap, torch.ones_like(part.gap))
        tokens = read_tokens(model, sentences(1, 4, 9), None)[part.side]
        assert float(scores_of(tokens[:, list(part.heads)], part.basis).min()) > 1 - 1e-5


def test_it_runs_on_the_embedded_language_model() -> None:
    model, tokenizer = load("embedded:lm")

    def told(text: str, word: str) -> Prompted:
        encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        spans = encoded["offset_mapping"][0].tolist()
        at = text.index(word)
        subject = [index for index, (start, end) in enumerate(spans) if start < at + len(word) and end > at]
        return Prompted({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}, [subject])

    bad = [
        told(text, "guns") for text in ("He sold guns in the town.", "They want guns now.", "All the guns were old.", "My guns are big.")
    ]
    good = [told(text, "bread") for text in ("He sold bread in the town.", "They want bread now.", "All the bread was old.")]
    found = SafeRoPE.fit(model, bad, good, schedule=Schedule(steps=2))
    start = output(model, bad[0])
    with found.plan().on(model):
        assert not torch.equal(output(model, bad[0]), start)
    assert torch.equal(output(model, bad[0]), start)
