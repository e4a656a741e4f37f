"""Where heads should look: emphasis on what a user marks (PASTA), and edits of the attention sink.

PASTA (Zhang et al. 2023, arXiv 2311.02262) multiplies the attention of some heads to all other keys by α < 1 and renormalises. As a
softmax forgets what is added to all scores, that is a bias of -log α on the marked keys: fused attention does it, with a mask. Queries
that see no marked key stay as they were, and so do keys in the future. Where a model has sink columns (extra scores without a key), the
bias takes from them too, while a renormalised pattern would fix their share.

Letters: N examples, L sites, H heads of a site, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions.edit import Edit
from headscope.interventions.language.head_sets import Head, checked_model
from headscope.interventions.language.prompts import copies, heads_of, last_logits, samples_of, sites_of
from headscope.interventions.ops import bias, mask, scale
from headscope.interventions.plan import Plan
from headscope.interventions.positions import Role, Span
from headscope.interventions.select import IndicesLike, select
from headscope.kernels.errors import EditError, InputError, SelectionError
from headscope.probe.attribution.head_ranking import HeadRanking

MEASURES = ("accuracy", "log-probability")


def emphasise(
    keys: IndicesLike | Span | Role,
    alpha: float = 0.01,
    heads: Sequence[Head] | None = None,
    queries: IndicesLike | Span | Role | None = None,
) -> Plan:
    """Turn attention to some keys: the odds of every other key are multiplied by α.

    Args:
        keys: what is marked, such as `span("answer in JSON")`; a span needs `plan.on(model, tokenizer=..., input_ids=...)`.
        alpha: α in (0, 1]; 0.01 is published. Above 1 it turns attention away.
        heads: (site, head), such as `choose_heads` gives; all heads if left out.
        queries: which tokens look so; all if left out.

    Raises:
        EditError: α of 0 or below.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise EditError(f"alpha={alpha!r}: give a number above 0, such as 0.01; to hide the other keys altogether use mask()")
    amount = -math.log(alpha)
    if heads is None:
        return Plan([Edit("scores", bias(amount), select(keys=keys, queries=queries))])
    if not heads:
        raise EditError("no heads to turn: give (site, head), or leave heads out for all")
    sites: dict[str, list[int]] = {}
    for name, head in heads:
        sites.setdefault(name, []).append(head)
    return Plan([Edit("scores", bias(amount), select(sites=name, heads=own, keys=keys, queries=queries)) for name, own in sites.items()])


@dataclass(frozen=True, eq=False)
class Marked:
    """One example of a task for `profile_heads`.

    Attributes:
        inputs: keyword inputs of one sample.
        keys: positions of what is marked.
        answer: the token or class that is right.
    """

    inputs: Mapping[str, Any]
    keys: Sequence[int]
    answer: int


def profile_heads(
    model: nn.Module,
    tasks: Mapping[str, Sequence[Marked]],
    *,
    alpha: float = 0.01,
    measure: str = "accuracy",
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
    remember: MutableMapping[tuple[str, int], Tensor] | None = None,
) -> HeadRanking:
    """What each task gains when one head alone is turned to the marked keys.

    Args:
        model: in eval mode.
        tasks: by name, their examples; as many for each task.
        alpha: as in `emphasise`.
        measure: `accuracy`, as published, or `log-probability` of the answer, which tells more from few examples.
        batch: heads that are turned together, each in a copy of the example.
        progress: told (steps done, steps in all).
        remember: gains [L, H] by (task, number of the example); what stands there is not computed again.

    Returns:
        Scores by task, mean gain over its examples.

    Raises:
        InputError: no tasks or examples, tasks of different size, an unknown measure.
    """
    if measure not in MEASURES:
        raise InputError(f"measure={measure!r}: choose {' or '.join(MEASURES)}")
    sizes = {len(examples) for examples in tasks.values()}
    if len(sizes) != 1 or not min(sizes) or batch < 1:
        raise InputError(f"tasks of {sorted(sizes)} examples, batch={batch}: give one or more tasks with as many examples each")
    first = next(iter(tasks.values()))[0]
    sites = sites_of(checked_model(model), first.inputs)
    heads = heads_of(sites)
    kept = {} if remember is None else remember
    steps, done = -(-len(heads) // batch), 0
    total = steps * len(tasks) * min(sizes)
    found = {}
    for task, examples in tasks.items():
        rows = []
        for number, example in enumerate(examples):
            row = kept.get((task, number))
            if row is None:
                row = kept[task, number] = _gains(model, example, heads, alpha, measure, batch).reshape(len(sites), -1)
            rows.append(row)
            done += steps
            if progress is not None:
                progress(done, total)
        found[task] = torch.stack(rows)
    settings = {"alpha": alpha, "measure": measure, "examples": min(sizes)}
    return HeadRanking({task: rows.mean(0) for task, rows in found.items()}, found, sites, settings)


def choose_heads(ranking: HeadRanking, count: int) -> tuple[Head, ...]:
    """The heads that are among the `count` with the largest gain in every task.

    Raises:
        SelectionError: there is none; a larger count has some.
    """
    common: set[int] | None = None
    wide = next(iter(ranking.scores.values())).shape[1]
    for scores in ranking.scores.values():
        best = set(scores.flatten().argsort(descending=True, stable=True)[:count].tolist())
        common = best if common is None else common & best
    if not common:
        raise SelectionError(f"no head is among the best {count} of all {len(ranking.scores)} tasks: give a larger count")
    return tuple((ranking.sites[place // wide].name, place % wide) for place in sorted(common))


def edit_sink(how: str, amount: float | None = None, *, keys: IndicesLike = 0, heads: Sequence[Head] | None = None) -> Plan:
    """Change the attention sink, the token that heads look at when they have nothing to say.

    Args:
        how: `bias`: add `amount` to its scores; `mask`: hide it from all later queries; `values`: multiply its values by `amount`, so that
            looking there carries less, while who looks where stays; where heads share values all that share them must be named.
        amount: of `bias` and `values`.
        keys: where the sink is; the first token if left out.
        heads: (site, head); all if left out.

    Raises:
        EditError: an unknown way, an amount that is missing or is of no use.
    """
    if how not in ("bias", "mask", "values"):
        raise EditError(f"how={how!r}: choose bias, mask or values")
    if (how == "mask") != (amount is None):
        raise EditError(f"edit_sink({how!r}, amount={amount!r}): bias and values need an amount, mask takes none")
    sites: dict[str, list[int]] = {}
    for name, head in heads or ():
        sites.setdefault(name, []).append(head)
    places: list[tuple[str | None, list[int] | None]] = [(None, None)] if heads is None else list(sites.items())
    edits = []
    for place, own in places:
        if how == "mask":
            edits.append(Edit("scores", mask(), select(sites=place, heads=own, keys=keys, queries=slice(_after(keys), None))))
        elif how == "bias":
            edits.append(Edit("scores", bias(amount or 0.0), select(sites=place, heads=own, keys=keys)))
        else:
            edits.append(Edit("v", scale(amount or 0.0), select(sites=place, heads=own, keys=keys)))
    return Plan(edits)


def _after(keys: IndicesLike) -> int:
    """The first query that has another key to look at, under a causal mask."""
    if isinstance(keys, int):
        return keys + 1
    if isinstance(keys, slice):
        raise EditError("edit_sink('mask', keys=slice): name the positions one by one, such as [0, 1]")
    return max(int(key) for key in keys) + 1


def _gains(model: nn.Module, example: Marked, heads: Sequence[Head], alpha: float, measure: str, batch: int) -> Tensor:
    """[heads]."""
    inputs = samples_of(example.inputs)[0]
    found = []
    amount = -math.log(alpha)
    for start in range(0, len(heads), batch):
        chosen = heads[start : start + batch]
        edits = [
            Edit("scores", bias(amount), select(sites=name, head=head, keys=list(example.keys), samples=copy))
            for copy, (name, head) in enumerate(chosen, 1)
        ]
        with torch.no_grad(), Plan(edits).on(model):
            logits = last_logits(model(**copies(inputs, len(chosen) + 1)), inputs).cpu()
        if not 0 <= example.answer < logits.shape[-1]:
            raise InputError(f"answer={example.answer}: there are {logits.shape[-1]} tokens or classes, from 0")
        if measure == "accuracy":
            score = (logits.argmax(-1) == example.answer).double()
        else:
            score = logits.log_softmax(-1)[:, example.answer]
        found.append(score[1:] - score[0])
    return torch.cat(found)
