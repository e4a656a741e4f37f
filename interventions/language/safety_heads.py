"""Which heads a model's refusals hang on: Ships and Sahara (Zhou et al. 2024, arXiv 2410.13708).

Ships of a prompt and a head: KL(p ‖ p without the head), p the softmax after the last token. Sahara of a set of prompts and a head: the
angle between the subspaces that the last block's states of the prompts span, with and without the head.

The released code of Sahara takes the left singular vectors of the states M [n, E], which lie in the space of the n prompts; the angle
between directions of the residual stream is that of the right ones. Both are here, as space="prompts" and space="directions".

Letters: n prompts, E width of the residual stream, L sites, H heads of a site, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions.language.head_sets import Head, Removal, checked_model, last_block, removal_of, without_heads
from headscope.interventions.language.prompts import Inputs, Prompts, divergence, heads_of, samples_of, sites_of
from headscope.kernels.errors import InputError
from headscope.probe.attribution.head_ranking import HeadRanking
from headscope.probe.call import AttentionSite

Progress = Callable[[int, int], None]
Memory = MutableMapping[tuple[str, int], Tensor]
SPACES = ("directions", "prompts")


def score_ships(
    model: nn.Module,
    prompts: Prompts,
    *,
    removal: str = "query",
    epsilon: float = 1e-4,
    batch: int = 16,
    progress: Progress | None = None,
    remember: Memory | None = None,
) -> HeadRanking:
    """How far the answer to each prompt moves without each head, in nats.

    Args:
        model: in eval mode; nothing of it is changed.
        prompts: keyword inputs, or a list of them; the samples of a batch are prompts of their own.
        removal: `query` or `key` (undifferentiated attention), `value`, `zero` or `mean`; see `Removal`.
        epsilon: what queries, keys or values are multiplied by.
        batch: heads that are taken out together, each in a copy of the prompt.
        progress: told (steps done, steps in all).
        remember: scores [L, H] by ("ships", number of the prompt) as they are made, NaN for heads still to come; what stands there is not
            computed again. Give one that outlives the process to go on after a stop.

    Returns:
        Scores by "ships", mean over prompts; `examples` has every prompt's.

    Raises:
        InputError: no prompts, a model in training mode.
        EditError: no such removal, or one that a head that shares its keys cannot have.
        SelectionError: sites that differ in their number of heads.
        NonFiniteError: the model overflows.
    """
    samples = samples_of(prompts)
    sites, heads, how = _begin(model, samples, removal, epsilon, batch)
    kept = {} if remember is None else remember
    steps = -(-len(heads) // batch)
    found = []
    for number, inputs in enumerate(samples):
        flat = _known(kept.get(("ships", number)), len(heads))
        left = [place for place in range(len(heads)) if math.isnan(float(flat[place]))]
        for start in range(0, len(left), batch):
            places = left[start : start + batch]
            logits = without_heads(model, inputs, [(), *([heads[place]] for place in places)], how).logits
            flat[places] = divergence(logits[0], logits[1:])
            kept["ships", number] = flat.reshape(len(sites), -1).clone()
            _tell(progress, number * steps + start // batch + 1, len(samples) * steps)
        found.append(flat.reshape(len(sites), -1))
    _tell(progress, len(samples) * steps, len(samples) * steps)
    examples = torch.stack(found)
    return HeadRanking({"ships": examples.mean(0)}, {"ships": examples}, sites, _settings(how, len(samples)))


def score_sahara(
    model: nn.Module,
    prompts: Prompts,
    *,
    removal: str = "query",
    epsilon: float = 1e-5,
    space: str = "directions",
    rank: int = 1,
    without: Sequence[Head] = (),
    batch: int = 16,
    progress: Progress | None = None,
    remember: Memory | None = None,
) -> HeadRanking:
    """By how many degrees the last block's states of all prompts turn without each head: arccos σ_max(U_rᵀ U_r').

    With a rank above 1 that is the smallest of the angles between the subspaces, as published, so 0 as soon as they share a direction.

    Args:
        model, prompts, removal, epsilon, batch, progress: as in `score_ships`.
        space: `directions` of the residual stream, or `prompts`, as the released code has it.
        rank: R.
        without: heads, (site, head), that are taken out in all cases but the intact one, as the greedy search needs.
        remember: states [prompts done, 1 + L·H, E] by ("sahara", number of the prompt); as in `score_ships`.

    Returns:
        Scores by "sahara", [L, H] in degrees; there is one example, all prompts together. Heads in `without` score 0.

    Raises:
        InputError: no prompts, an unknown space, a rank that so few prompts do not have.
        EditError, SelectionError, NonFiniteError: as in `score_ships`.
    """
    samples = samples_of(prompts)
    sites, heads, how = _begin(model, samples, removal, epsilon, batch)
    check_space(space, rank, len(samples))
    fixed = tuple(without)
    candidates = [head for head in heads if head not in fixed]
    block = last_block(sites)
    states = read_without(
        model, samples, [(), *((*fixed, head) for head in candidates)], how, block, batch=batch, progress=progress, remember=remember
    )
    whole = span_of(states[:, 0], space, rank)
    degrees = {head: angle(whole, span_of(states[:, place], space, rank)) for place, head in enumerate(candidates, 1)}
    scores = torch.tensor([degrees.get(head, 0.0) for head in heads], dtype=torch.float64).reshape(len(sites), -1)
    settings = {**_settings(how, len(samples)), "space": space, "rank": rank, "without": [list(head) for head in fixed]}
    return HeadRanking({"sahara": scores}, {"sahara": scores[None]}, sites, settings)


def read_without(
    model: nn.Module, samples: Sequence[Inputs], sets: Sequence[Sequence[Head]], removal: Removal, block: str, *, batch: int = 16,
    progress: Progress | None = None, remember: Memory | None = None,
) -> Tensor:  # fmt: skip
    """[prompts, sets, E]: the last token's state after a block, for every prompt without each set of heads."""
    kept = {} if remember is None else remember
    steps = -(-len(sets) // batch)
    rows = []
    for number, inputs in enumerate(samples):
        row = kept.get(("sahara", number))
        if row is None or row.shape[0] != len(sets):
            parts = []
            for start in range(0, len(sets), batch):
                states = without_heads(model, inputs, sets[start : start + batch], removal, block).states
                assert states is not None
                parts.append(states)
                _tell(progress, number * steps + start // batch + 1, len(samples) * steps)
            row = kept["sahara", number] = torch.cat(parts)
        rows.append(row)
    return torch.stack(rows)


def span_of(states: Tensor, space: str, rank: int) -> Tensor:
    """An orthonormal basis of the leading `rank` singular vectors of states M [n, E], not centred: [E, R], or [n, R] of prompts."""
    left, _, right = torch.linalg.svd(states, full_matrices=False)
    found: Tensor = right[:rank].mT if space == "directions" else left[:, :rank]
    return found


def angle(one: Tensor, other: Tensor) -> float:
    """arccos σ_max(UᵀU') in degrees, of two orthonormal bases; exact for small angles too."""
    cosine = float(torch.linalg.matrix_norm(one.mT @ other, ord=2))
    outside = other - one @ (one.mT @ other)
    sine = float(torch.linalg.svdvals(outside)[-1]) if outside.shape[1] <= outside.shape[0] else 0.0
    return math.degrees(math.atan2(min(sine, 1.0), min(cosine, 1.0)))


def check_space(space: str, rank: int, prompts: int) -> None:
    """Raises InputError for a space that is none, or a rank that so few prompts do not span."""
    if space not in SPACES:
        raise InputError(f"space={space!r}: choose {' or '.join(SPACES)}")
    if not 1 <= rank <= prompts:
        raise InputError(f"rank={rank} of the states of {prompts} prompts: give 1 to {prompts}")
    if space == "prompts" and rank == prompts:
        raise InputError(f"rank={rank} of {prompts} prompts in their own space: all angles are 0; give more prompts or a smaller rank")


def _begin(
    model: nn.Module, samples: Sequence[Inputs], removal: str, epsilon: float, batch: int
) -> tuple[tuple[AttentionSite, ...], tuple[Head, ...], Removal]:
    if batch < 1:
        raise InputError(f"batch={batch}: give 1 or more heads to take out together")
    sites = sites_of(checked_model(model), samples[0])
    return sites, heads_of(sites), removal_of(removal, epsilon, model, samples)


def _settings(removal: Removal, prompts: int) -> dict[str, Any]:
    return {"removal": removal.kind, "epsilon": removal.epsilon, "prompts": prompts}


def _known(scores: Tensor | None, heads: int) -> Tensor:
    return torch.full((heads,), float("nan"), dtype=torch.float64) if scores is None else scores.flatten().clone()


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
