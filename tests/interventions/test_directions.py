"""Directions of the residual stream: found, chosen, taken away, added; against transformers' own hidden states and changed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interventions import Plan
from headscope.interventions.language.directions import Direction, choose_direction, find_directions
from headscope.interventions.language.prompts import read_states
from headscope.kernels.errors import InputError, SelectionError
from tests.interventions.small_models import EMBED, LAYERS, bert, changed, gpt2, hooked, kl, last, llama, prompts

POSITIVE, NEGATIVE = prompts(6, 9, 7, 5, seed=1), prompts(5, 8, 6, seed=2)
BLOCKS = [f"model.layers.{layer}" for layer in range(LAYERS)]


def outputs_of_blocks(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """[S, E] after every block, by hooks of torch."""
    found: list[Tensor] = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, a, o: found.append((o if isinstance(o, Tensor) else o[0])[0]))
        for path in BLOCKS
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def test_a_direction_is_the_difference_of_the_means_at_its_block_and_token() -> None:
    model = llama()
    found = find_directions(model, POSITIVE, NEGATIVE, positions=(-1, -3))
    assert found.positions == (-3, -1)
    for layer in range(LAYERS):
        for place, position in enumerate(found.positions):
            means = [torch.stack([outputs_of_blocks(model, p)[layer][position] for p in own]).mean(0) for own in (POSITIVE, NEGATIVE)]
            torch.testing.assert_close(found.vectors[layer, place], means[0] - means[1], atol=1e-10, rtol=1e-10)


def test_padding_on_the_right_is_no_last_token() -> None:
    model = llama()
    ids = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for row, prompt in enumerate(POSITIVE[:2]):
        length = prompt["input_ids"].shape[1]
        ids[row, :length], mask[row, :length] = prompt["input_ids"][0], 1
    padded = find_directions(model, {"input_ids": ids, "attention_mask": mask}, NEGATIVE)
    plain = find_directions(model, POSITIVE[:2], NEGATIVE)
    torch.testing.assert_close(padded.vectors, plain.vectors, atol=1e-9, rtol=1e-9)


def test_ablated_nothing_of_the_direction_is_left_after_any_block() -> None:
    model = llama()
    direction = find_directions(model, POSITIVE, NEGATIVE).at(1)
    unit = direction.vector.double() / direction.vector.double().norm()
    states, _ = read_states(model, POSITIVE[1], "resid", BLOCKS, direction.ablate(("*embed_tokens", "*.mlp")))
    plain, _ = read_states(model, POSITIVE[1], "resid", BLOCKS)
    for block in BLOCKS:
        assert float((states[block] @ unit).abs().max()) < 1e-6
        assert float((plain[block] @ unit).abs().max()) > 1e-2


def test_ablation_is_a_model_whose_weights_cannot_write_the_direction() -> None:
    model = llama()
    direction = find_directions(model, POSITIVE, NEGATIVE).at(1)
    unit = direction.vector.double() / direction.vector.double().norm()
    away = torch.eye(EMBED, dtype=torch.float64) - torch.outer(unit, unit)

    def change(other: Any) -> None:
        other.model.embed_tokens.weight.copy_(other.model.embed_tokens.weight @ away)
        for layer in other.model.layers:
            layer.self_attn.o_proj.weight.copy_(away @ layer.self_attn.o_proj.weight)
            layer.mlp.down_proj.weight.copy_(away @ layer.mlp.down_proj.weight)

    with torch.no_grad(), direction.ablate(("*embed_tokens", "*.mlp")).on(model):
        found = model(**POSITIVE[0]).logits
    with torch.no_grad():
        wanted = changed(model, change)(**POSITIVE[0]).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert (found - model(**POSITIVE[0]).logits).abs().max() > 1e-3


def test_adding_is_a_hook_on_the_block_where_it_was_found() -> None:
    model = llama()
    direction = find_directions(model, POSITIVE, NEGATIVE).at(1)
    with torch.no_grad(), direction.add(2.5).on(model):
        found = model(**NEGATIVE[0]).logits
    torch.testing.assert_close(found, hooked(model, [BLOCKS[1]], lambda x: x + 2.5 * direction.vector, NEGATIVE[0]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("make", [gpt2, bert])
def test_other_models_work_by_the_same_call(make: Any) -> None:
    model = make()
    directions = find_directions(model, POSITIVE, NEGATIVE)
    choice = choose_direction(
        model, directions, POSITIVE, NEGATIVE, [0], most_divergence=1e9, least_induced=-1e9, last_share=0.0
    )  # fmt: skip
    assert len(choice.candidates) == len(directions.blocks)


def test_the_choice_follows_the_published_rules() -> None:
    """The numbers of every candidate by hooks alone; then: not among the last blocks, little KL, induces; then the lowest."""
    model = llama()
    directions = find_directions(model, POSITIVE, NEGATIVE)
    tokens = [3, 7]

    def score(logits: Tensor) -> float:
        p = float(logits.softmax(-1)[tokens].sum())
        return float(torch.log(torch.tensor(p / (1 - p), dtype=torch.float64)))

    wanted = []
    for layer in range(LAYERS):
        vector = directions.vectors[layer, 0].float().double()
        unit = vector / vector.norm()
        paths = [*BLOCKS, *(f"{block}.self_attn" for block in BLOCKS)]
        gone = [hooked(model, paths, lambda x, u=unit: x - (x @ u)[..., None] * u, p)[0, -1] for p in (*POSITIVE, *NEGATIVE)]
        more = [hooked(model, [BLOCKS[layer]], lambda x, v=vector: x + v, p)[0, -1] for p in NEGATIVE]
        plain = [last(model, p) for p in NEGATIVE]
        wanted.append((
            sum(map(score, gone[: len(POSITIVE)])) / len(POSITIVE),
            sum(map(score, more)) / len(NEGATIVE),
            sum(kl(a, b) for a, b in zip(plain, gone[len(POSITIVE) :], strict=True)) / len(NEGATIVE),
        ))  # fmt: skip
    loose = {"most_divergence": 1e9, "least_induced": -1e9}
    choice = choose_direction(model, directions, POSITIVE, NEGATIVE, tokens, last_share=1 / 3, **loose)
    for candidate, numbers in zip(choice.candidates, wanted, strict=True):
        torch.testing.assert_close((candidate.ablated, candidate.induced, candidate.divergence), numbers, atol=1e-6, rtol=1e-4)
    assert [c.dropped for c in choice.candidates] == ["", "", "in the last blocks"]
    assert choice.direction.layer == min((0, 1), key=lambda layer: wanted[layer][0])
    middle = sorted(numbers[2] for numbers in wanted)[1]
    strict = choose_direction(model, directions, POSITIVE, NEGATIVE, tokens, last_share=0.0, most_divergence=middle, least_induced=-1e9)
    assert [bool(c.dropped) for c in strict.candidates] == [numbers[2] > middle for numbers in wanted]
    with pytest.raises(SelectionError, match="no direction is a choice .*induces .*not above 1000"):
        choose_direction(model, directions, POSITIVE, NEGATIVE, tokens, least_induced=1000, most_divergence=1e9)
    assert choice.to_frame()["ablated"].tolist() == [candidate.ablated for candidate in choice.candidates]
    assert "negative prompts" in str(choice)


def test_plans_of_a_direction_are_saved_and_come_back(tmp_path: Path) -> None:
    model = llama()
    direction = find_directions(model, POSITIVE, NEGATIVE).at(1)
    for plan in (direction.ablate(("*embed_tokens",)), direction.add(3.0, queries=slice(-2, None))):
        plan.save(tmp_path / "recipe.yaml", model=model)
        loaded = Plan.load(tmp_path / "recipe.yaml", model=model)
        assert loaded == plan
        names: dict[str, Any] = {}
        exec(plan.to_python(), names)
        for other in (loaded, names["plan"]):
            with torch.no_grad(), plan.on(model):
                wanted = model(**POSITIVE[0]).logits
            with torch.no_grad(), other.on(model):
                assert torch.equal(model(**POSITIVE[0]).logits, wanted)


def test_a_sparse_direction_keeps_its_largest_entries() -> None:
    vector = torch.tensor([3.0, -5.0, 1.0, 0.5, -0.1, 4.0, 0.0, 2.0])
    assert Direction(vector, "b", 0).sparse(0.25).vector.tolist() == [0, -5, 0, 0, 0, 4, 0, 0]


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: find_directions(llama(), [], NEGATIVE), "positive is empty"),
        (lambda: find_directions(llama(), POSITIVE, NEGATIVE, positions=(0,)), "count tokens from the last"),
        (lambda: find_directions(llama(), POSITIVE, NEGATIVE, positions=(-6,)), "has 5 tokens, so there is no position -6"),
        (lambda: Direction(torch.ones(4), "b", 0).sparse(0.0), "more than 0 and at most 1"),
    ],
)
def test_bad_input_is_named(act: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        act()
