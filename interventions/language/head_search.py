"""The set of heads whose removal moves a model most on some prompts: greedy as in Sahara, or all heads at once.

Greedy (Zhou et al. 2024, arXiv 2410.13708): add the head that moves it most given those that are out already. It cannot see two heads
that stand in for one another: without either nothing happens. The joint search can (in the spirit of arXiv 2601.15801): every head is
taken out in part, strengths r in [0, 1] that sum to `count`, and the gradient of the objective says where to take more; then heads
of the set are exchanged for others one at a time, while that helps.

Letters: n prompts, V vocabulary, E width of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headscope.interventions.edit import Edit
from headscope.interventions.language.head_sets import STAGE_OF, Head, Removal, checked_model, last_block, removal_of, without_heads
from headscope.interventions.language.prompts import Inputs, Prompts, divergence, last_logits, last_token, samples_of, sites_of
from headscope.interventions.language.safety_heads import Progress, angle, check_space, span_of
from headscope.interventions.ops import call
from headscope.interventions.plan import Plan
from headscope.interventions.select import select
from headscope.kernels.errors import HeadscopeError, InputError
from headscope.probe.call import AttentionCall, AttentionSite

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

OBJECTIVES = {"ships": "nats", "sahara": "degrees"}
STRATEGIES = ("greedy", "joint")
STEP = 0.3  # of the ascent, at the head with the largest gradient
SWEEPS = 3


@dataclass(frozen=True, eq=False)
class HeadSet:
    """Heads that together move a model, the most important first.

    Attributes:
        heads: (site, head).
        values: the objective with the first, the first two, … of them out: mean KL in nats, or the angle in degrees.
        objective: `ships` or `sahara`.
        strategy: `greedy` or `joint`.
        removal: how they are taken out.
        settings: how it was made, ready for JSON.
    """

    heads: tuple[Head, ...]
    values: tuple[float, ...]
    objective: str
    strategy: str
    removal: Removal
    settings: Mapping[str, object] = field(default_factory=dict)

    def plan(self) -> Plan:
        """A plan that takes them out."""
        return self.removal.plan(self.heads)

    def to_dict(self) -> dict[str, object]:
        return {
            "heads": [list(head) for head in self.heads],
            "values": list(self.values),
            "unit": OBJECTIVES[self.objective],
            "objective": self.objective,
            "strategy": self.strategy,
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line a head, in order; needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        rows = [{"site": name, "head": head, self.objective: value} for (name, head), value in zip(self.heads, self.values, strict=True)]
        return pandas.DataFrame(rows)

    def plot(self) -> Figure:
        """How the objective grows with the set; needs plotly."""
        try:
            from plotly.graph_objects import Figure
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]'") from error
        figure = Figure()
        labels = [f"{name.removesuffix('#0')} head {head}" for name, head in self.heads]
        figure.add_scatter(x=list(range(1, len(labels) + 1)), y=list(self.values), text=labels, mode="lines+markers")
        figure.update_xaxes(title_text="heads taken out")
        figure.update_yaxes(title_text=f"{self.objective}, {OBJECTIVES[self.objective]}")
        return figure

    def __str__(self) -> str:
        parts = [f"{name.removesuffix('#0')} head {head}: {value:.4g}" for (name, head), value in zip(self.heads, self.values, strict=True)]
        return f"{self.strategy} {self.objective}, {OBJECTIVES[self.objective]} with heads out so far\n" + "\n".join(parts)


def search_heads(
    model: nn.Module,
    prompts: Prompts,
    count: int,
    *,
    objective: str = "sahara",
    strategy: str = "greedy",
    removal: str = "query",
    epsilon: float = 1e-5,
    space: str = "directions",
    rank: int = 1,
    ascents: int = 20,
    batch: int = 16,
    progress: Progress | None = None,
    remember: MutableMapping[tuple[str, int], Tensor] | None = None,
) -> HeadSet:
    """Find `count` heads whose removal together moves the answers or states on some prompts most.

    Args:
        model: in eval mode; nothing of it is changed.
        prompts: keyword inputs, or a list of them; the samples of a batch are prompts of their own.
        count: how many heads.
        objective: `ships`, mean KL in nats, or `sahara`, the angle in degrees.
        strategy: `greedy` or `joint`.
        removal, epsilon: as in `score_ships`.
        space, rank: as in `score_sahara`.
        ascents: steps of the joint search.
        batch: heads that are taken out together.
        progress: told (steps done, steps in all).
        remember: for the greedy search the values of all heads, one step after the other, by ("greedy", step); give one that outlives the
            process to go on after a stop.

    Raises:
        InputError: an unknown objective or strategy, more heads than there are, no prompts.
        EditError: as in `score_ships`.
    """
    if objective not in OBJECTIVES or strategy not in STRATEGIES:
        raise InputError(f"objective={objective!r}, strategy={strategy!r}: choose {' or '.join(OBJECTIVES)}, {' or '.join(STRATEGIES)}")
    samples = samples_of(prompts)
    sites = sites_of(checked_model(model), samples[0])
    heads = [(site.name, head) for site in sites for head in range(site.query_heads)]
    if not 1 <= count <= len(heads) or batch < 1 or ascents < 1:
        raise InputError(f"count={count}, batch={batch}, ascents={ascents}: give 1 or more each, and at most {len(heads)} heads")
    if objective == "sahara":
        check_space(space, rank, len(samples))
    how = removal_of(removal, epsilon, model, samples)
    measure = _Measure(model, samples, sites, how, objective, space, rank, batch)
    if strategy == "greedy":
        found, values = _greedy(measure, heads, count, progress, {} if remember is None else remember)
    else:
        strengths = _ascend(measure, heads, count, ascents, progress)
        order = sorted(range(len(heads)), key=lambda place: (-float(strengths[place]), place))[:count]
        found = _exchange(measure, heads, [heads[place] for place in order])
        values = measure.of([found[: place + 1] for place in range(count)]).tolist()
    settings: dict[str, object] = {"prompts": len(samples), "count": count, "removal": removal, "epsilon": epsilon}
    settings |= {"space": space, "rank": rank} if objective == "sahara" else {}
    return HeadSet(tuple(found), tuple(values), objective, strategy, how, settings)


@dataclass(frozen=True, eq=False)
class _Measure:
    """The objective of sets of heads; `soft` is its differentiable twin for heads that are out in part."""

    model: nn.Module
    samples: Sequence[Inputs]
    sites: tuple[AttentionSite, ...]
    removal: Removal
    objective: str
    space: str
    rank: int
    batch: int

    def of(self, sets: Sequence[Sequence[Head]], step: Callable[[], None] = lambda: None) -> Tensor:
        """[sets]."""
        block = last_block(self.sites) if self.objective == "sahara" else None
        rows, spread = [], []
        for inputs in self.samples:
            parts = []
            for start in range(0, len(sets), self.batch):
                parts.append(without_heads(self.model, inputs, [(), *sets[start : start + self.batch]], self.removal, block))
                step()
            if block is None:
                spread.append(torch.cat([divergence(part.logits[0], part.logits[1:]) for part in parts]))
            else:
                states = [part.states for part in parts if part.states is not None]
                rows.append(torch.cat([states[0][:1], *(part[1:] for part in states)]))  # [1 + sets, E]
        if block is None:
            return torch.stack(spread).mean(0)
        together = torch.stack(rows)  # [n, 1 + sets, E]
        whole = span_of(together[:, 0], self.space, self.rank)
        angles = [angle(whole, span_of(together[:, place], self.space, self.rank)) for place in range(1, len(sets) + 1)]
        return torch.tensor(angles, dtype=torch.float64)

    def soft(self, strengths: Mapping[str, Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """Logits [V] and states [E] of every sample with heads out in part; gradients flow where there are strengths."""
        kept: list[Tensor] = []

        def keep(value: Tensor, made: AttentionCall) -> Tensor:
            kept.append(value)
            return value

        edits = [] if strengths is None else [self._partly(name, own) for name, own in strengths.items()]
        if self.objective == "sahara":
            edits.append(Edit("resid", call(keep), select(sites=last_block(self.sites))))
        logits, states = [], []
        with nullcontext() if strengths is not None else torch.no_grad():
            for inputs in self.samples:
                kept.clear()
                with Plan(edits).on(self.model):
                    output = self.model(**inputs)
                logits.append(last_logits(output, inputs)[0])
                if kept:
                    value = kept[-1]
                    states.append(value[0, 0, last_token(inputs, value.shape[2])].double())
        return logits, states

    def _partly(self, name: str, own: Tensor) -> Edit:
        removal = self.removal
        means = None if removal.means is None else removal.means[name][None, :, None]  # [1, H, 1, D]
        left = 0.0 if removal.kind == "zero" else removal.epsilon

        def change(value: Tensor, made: AttentionCall) -> Tensor:
            r = own.to(value)[None, :, None, None]  # [1, H, 1, 1]
            if value.shape[1] != own.shape[0]:
                raise InputError(f"{name} has {own.shape[0]} query heads that share {value.shape[1]} keys: use removal='query'")
            return value + r * (means.to(value) - value) if means is not None else value * (1 - r * (1 - left))

        return Edit(STAGE_OF[removal.kind], call(change), select(sites=name))

    def distance(self, strengths: Mapping[str, Tensor], before: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        """Mean KL, or 1 - σ_max² of the two spans."""
        logits, states = self.soft(strengths)
        if self.objective == "ships":
            return torch.stack([divergence(a, b) for a, b in zip(before[0], logits, strict=True)]).mean()
        one, other = (span_of(torch.stack(rows), self.space, self.rank) for rows in (before[1], states))
        overlap: Tensor = torch.linalg.matrix_norm(one.mT @ other, ord=2)
        return 1 - overlap**2


def _greedy(
    measure: _Measure, heads: Sequence[Head], count: int, progress: Progress | None, kept: MutableMapping[tuple[str, int], Tensor]
) -> tuple[list[Head], list[float]]:
    found: list[Head] = []
    values: list[float] = []
    done, total = 0, count * len(measure.samples) * -(-len(heads) // measure.batch)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, total), total)

    for number in range(count):
        scores = kept.get(("greedy", number))
        if scores is None:
            left = [head for head in heads if head not in found]
            own = dict(zip(left, measure.of([[*found, head] for head in left], step).tolist(), strict=True))
            scores = kept["greedy", number] = torch.tensor([own.get(head, float("-inf")) for head in heads], dtype=torch.float64)
        best = int(scores.argmax())
        found.append(heads[best])
        values.append(float(scores[best]))
    if progress is not None:
        progress(total, total)
    return found, values


def _ascend(measure: _Measure, heads: Sequence[Head], count: int, ascents: int, progress: Progress | None) -> Tensor:
    """[heads], how strongly each is out: projected gradient ascent from all alike, with steps that shrink."""
    before = measure.soft(None)
    r = torch.full((len(heads),), count / len(heads), dtype=torch.float64)
    for number in range(ascents):
        variable = r.clone().requires_grad_()
        shares = torch.split(variable, [site.query_heads for site in measure.sites])
        parts = dict(zip((site.name for site in measure.sites), shares, strict=True))
        (gradient,) = torch.autograd.grad(measure.distance(parts, before), [variable])
        size = float(gradient.abs().max())
        if size == 0:
            break
        r = capped(r + STEP * (1 - number / ascents) * gradient / size, count)
        if progress is not None:
            progress(number + 1, ascents)
    return r


def _exchange(measure: _Measure, heads: Sequence[Head], found: list[Head]) -> list[Head]:
    """The set after every exchange of one head for another that raises the objective."""
    best = float(measure.of([found])[0])
    for _ in range(SWEEPS):
        changed = False
        for place in range(len(found)):
            others = [head for head in heads if head not in found]
            if not others:
                return found
            values = measure.of([[*found[:place], head, *found[place + 1 :]] for head in others])
            if float(values.max()) > best:
                best, changed = float(values.max()), True
                found = [*found[:place], others[int(values.argmax())], *found[place + 1 :]]
        if not changed:
            break
    return found


def capped(values: Tensor, total: float) -> Tensor:
    """The nearest point with entries in [0, 1] that sum to `total`."""
    low, high = float(values.min()) - 1, float(values.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((values - middle).clamp(0, 1).sum()) > total else (low, middle)
    return (values - (low + high) / 2).clamp(0, 1)
