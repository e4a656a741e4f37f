"""Ships, Sahara and the searches, against copies of the model with changed weights and plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope.interventions.language.ablation import ablate_heads
from headscope.interventions.language.head_search import capped, search_heads
from headscope.interventions.language.head_sets import Removal
from headscope.interventions.language.safety_heads import score_sahara, score_ships
from headscope.kernels.errors import EditError, InputError, SelectionError
from headscope.probe import Keep, Probe
from tests.interventions.small_models import HEADS, LAYERS, WIDTH, bert, changed, gpt2, kl, last, llama, prompts, rows

PROMPTS = prompts(6, 9, 7)


def without_query(model: Any, layer: int, head: int, epsilon: float) -> Any:
    def change(other: Any) -> None:
        other.model.layers[layer].self_attn.q_proj.weight[rows(head)] *= epsilon

    return changed(model, change)


def without_output(model: Any, layer: int, head: int) -> Any:
    def change(other: Any) -> None:
        other.model.layers[layer].self_attn.o_proj.weight[:, rows(head)] = 0

    return changed(model, change)


def test_ships_is_the_divergence_from_a_model_whose_query_weights_are_scaled() -> None:
    model = llama()
    found = score_ships(model, PROMPTS, epsilon=1e-4, batch=5)
    for layer in range(LAYERS):
        for head in range(HEADS):
            other = without_query(model, layer, head, 1e-4)
            wanted = [kl(last(model, p), last(other, p)) for p in PROMPTS]
            torch.testing.assert_close(found.examples["ships"][:, layer, head].tolist(), wanted, atol=1e-12, rtol=1e-4)
    assert float(found.scores["ships"].min()) > 1e-6  # no head is idle, so that equality says something


@pytest.mark.parametrize(("removal", "factor"), [("zero", 0.0), ("value", 1e-2)])
def test_a_head_without_values_is_one_whose_output_weights_are_scaled(removal: str, factor: float) -> None:
    model = llama()
    found = score_ships(model, PROMPTS[:1], removal=removal, epsilon=1e-2)

    def change(other: Any) -> None:
        other.model.layers[1].self_attn.o_proj.weight[:, rows(2)] *= factor

    wanted = kl(last(model, PROMPTS[0]), last(changed(model, change), PROMPTS[0]))
    assert float(found.scores["ships"][1, 2]) == pytest.approx(wanted, rel=1e-6)


def test_removal_by_key_is_removal_by_query_and_refused_where_heads_share_keys() -> None:
    model = llama(groups=HEADS)
    by_query, by_key = (score_ships(model, PROMPTS[:1], removal=side, epsilon=1e-3).scores["ships"] for side in ("query", "key"))
    torch.testing.assert_close(by_query, by_key, atol=1e-10, rtol=1e-8)
    with pytest.raises(EditError, match="k of head 0 alone cannot be edited"):
        score_ships(llama(), PROMPTS[:1], removal="key")


def test_a_head_whose_queries_vanish_attends_to_all_that_it_sees_alike() -> None:
    model = llama()
    plan = Removal("query", 1e-9).plan([("model.layers.1.self_attn#0", 2)])
    with torch.no_grad(), plan.on(model), Probe(model).capture(Keep(pattern=True)) as seen:
        model(**PROMPTS[0])
    pattern = seen.pattern(layer=1)[0, 2]
    counts = torch.arange(1, 7, dtype=torch.float64)[:, None]
    wanted = torch.ones(6, 6, dtype=torch.float64).tril() / counts
    torch.testing.assert_close(pattern, wanted, atol=1e-7, rtol=0)
    assert (seen.pattern(layer=1)[0, 1] - wanted).abs().max() > 0.05


def test_the_mean_of_a_head_is_taken_over_all_prompts_and_positions() -> None:
    model = gpt2()
    with torch.no_grad():
        z = []
        for p in PROMPTS:
            with Probe(model).capture(Keep(z=True)) as seen:
                model(**p)
            z.append(seen.z(layer=0)[0, 3])
    mean = torch.cat(z).mean(0)

    def replace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[..., rows(3)] = mean
        return (x, *args[1:])

    handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(replace)
    wanted = last(model, PROMPTS[1])
    handle.remove()
    found = score_ships(model, PROMPTS, removal="mean").examples["ships"][1, 0, 3]
    assert float(found) == pytest.approx(kl(last(model, PROMPTS[1]), wanted), rel=1e-4)  # the means are kept in float32
    with torch.no_grad(), ablate_heads(model, [(0, 3)], PROMPTS, "mean").on(model):
        torch.testing.assert_close(model(**PROMPTS[1]).logits[0, -1], wanted, atol=1e-5, rtol=1e-5)


def test_a_classifier_is_judged_by_its_classes() -> None:
    model = bert()

    def change(other: Any) -> None:
        other.bert.encoder.layer[1].attention.output.dense.weight[:, rows(1)] = 0

    found = score_ships(model, PROMPTS, removal="zero").examples["ships"][:, 1, 1]
    other = changed(model, change)
    torch.testing.assert_close(found.tolist(), [kl(last(model, p), last(other, p)) for p in PROMPTS], atol=1e-10, rtol=1e-6)


def test_what_was_done_before_a_stop_is_not_done_again() -> None:
    model = llama()
    whole = score_ships(model, PROMPTS, batch=5).scores["ships"]
    kept: dict[tuple[str, int], Tensor] = {}

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 3 * math.ceil(LAYERS * HEADS / 5)
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        score_ships(model, PROMPTS, batch=5, progress=stop, remember=kept)
    assert sorted(kept) == [("ships", 0), ("ships", 1)]
    assert int(kept["ships", 1].isnan().sum()) == LAYERS * HEADS - 10
    kept["ships", 0] += 100
    again = score_ships(model, PROMPTS, batch=5, remember=kept)
    torch.testing.assert_close(again.scores["ships"] - 100 / 3, whole, atol=1e-9, rtol=1e-9)


# -- Sahara ------------------------------------------------------------------------------------------------------------


def states(model: Any) -> np.ndarray:
    """[n, E]: what leaves the last block, at the last token, before the last norm."""
    rows: list[np.ndarray] = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda m, a, o: rows.append((o if isinstance(o, Tensor) else o[0])[0, -1].numpy())
    )
    with torch.no_grad():
        for p in PROMPTS:
            model(**p)
    handle.remove()
    return np.stack(rows)


@pytest.mark.parametrize("space", ["directions", "prompts"])
@pytest.mark.parametrize("rank", [1, 2])
def test_sahara_is_the_angle_between_singular_vectors(space: str, rank: int) -> None:
    model = llama()
    found = score_sahara(model, PROMPTS, epsilon=1e-5, space=space, rank=rank, batch=7).scores["sahara"]

    def basis(matrix: np.ndarray) -> np.ndarray:
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        return right[:rank].T if space == "directions" else left[:, :rank]

    whole = basis(states(model))
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        other = basis(states(without_query(model, layer, head, 1e-5)))
        cosine = np.linalg.svd(whole.T @ other, compute_uv=False)[0]
        assert float(found[layer, head]) == pytest.approx(np.degrees(np.arccos(min(1.0, cosine))), abs=1e-5)


def test_the_greedy_search_adds_the_head_that_turns_the_states_most_given_those_before() -> None:
    model = llama()
    found = search_heads(model, PROMPTS, 2, objective="sahara", removal="zero")
    first = score_sahara(model, PROMPTS, removal="zero")
    (site, head, degrees), *_ = first.top("sahara", 1)
    assert found.heads[0] == (site.name, head)
    assert found.values[0] == pytest.approx(degrees)
    second = score_sahara(model, PROMPTS, removal="zero", without=[found.heads[0]])
    (site, head, degrees), *_ = second.top("sahara", 1)
    assert found.heads[1] == (site.name, head)
    assert found.values[1] == pytest.approx(degrees)
    assert len(found.plan()) == len({name for name, _ in found.heads})
    assert found.to_frame()["sahara"].tolist() == list(found.values)


class Twins(nn.Module):
    """Heads 0 and 1 stand in for one another: the answer hangs on their sum, which saturates. Head 2 does a little, head 3 nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        nn.init.ones_(self.embed.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        v = self.embed(input_ids)[..., None].transpose(1, 2)  # [B, 4, S, 1]
        q = torch.zeros_like(v)
        z = F.scaled_dot_product_attention(q, q, v)[:, :, -1, 0]  # [B, 4]
        answer = 3 * torch.tanh(4 * (z[:, 0] + z[:, 1])) + 0.3 * z[:, 2]
        return torch.stack([answer, torch.zeros_like(answer)], -1)


def test_the_joint_search_finds_two_heads_that_stand_in_for_one_another_where_the_greedy_one_does_not() -> None:
    model = Twins().eval()
    inputs = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    greedy, joint = (
        {head for _, head in search_heads(model, inputs, 2, objective="ships", strategy=strategy, removal="zero").heads}
        for strategy in ("greedy", "joint")
    )
    assert joint == {0, 1}
    assert 2 in greedy


def test_strengths_are_projected_to_the_nearest_point_that_sums_to_the_count() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.randn(9, generator=generator, dtype=torch.float64)
        found = capped(values, 3)
        assert float(found.sum()) == pytest.approx(3)
        assert bool(((found >= 0) & (found <= 1)).all())
        for _ in range(20):  # no other allowed point is nearer
            other = capped(torch.randn(9, generator=generator, dtype=torch.float64), 3)
            assert float((other - values).norm()) >= float((found - values).norm()) - 1e-9


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (lambda: score_ships(llama(), []), InputError, "prompts is empty"),
        (lambda: score_ships(llama(), PROMPTS, removal="none"), EditError, "choose query, key, value, zero, mean"),
        (lambda: score_ships(llama().train(), PROMPTS), InputError, "training mode"),
        (lambda: score_sahara(llama(), PROMPTS, space="tokens"), InputError, "choose directions or prompts"),
        (lambda: score_sahara(llama(), PROMPTS, rank=4), InputError, "give 1 to 3"),
        (lambda: search_heads(llama(), PROMPTS, 13), InputError, "at most 12 heads"),
        (lambda: ablate_heads(llama(), [(7, 0)], PROMPTS), SelectionError, "no attention in layer 7; the layers are"),
    ],
)
def test_bad_input_is_named(act: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        act()


def test_resampled_heads_have_the_output_of_the_other_input() -> None:
    model = llama()
    one, other = prompts(8, 8, seed=3)
    with torch.no_grad(), Probe(model).capture(Keep(z=True)) as seen:
        model(**other)
    with torch.no_grad(), ablate_heads(model, [(1, 2)], other, "resample").on(model), Probe(model).capture(Keep(z=True)) as now:
        model(**one)
    assert torch.equal(now.z(layer=1)[:, 2], seen.z(layer=1)[:, 2])
    assert not torch.equal(now.z(layer=1)[:, 1], seen.z(layer=1)[:, 1])
    assert now.z(layer=1).shape[-1] == WIDTH
