"""One direction of the residual stream that stands for a concept, such as refusing: find it, choose it, take it away, add it.

Arditi et al. 2024 (arXiv 2406.11717): the difference of the means of two sets of prompts, at each block and each of the last tokens; of
these candidates the one whose removal lowers the behaviour most, among those that also induce it where it is added, do not stand in the
last fifth of the blocks, and leave harmless answers nearly as they were (KL at most 0.1).

Letters: L blocks, P positions, E width of the residual stream, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headscope.interventions.edit import Edit
from headscope.interventions.language.head_sets import checked_model
from headscope.interventions.language.prompts import Prompts, blocks_of, divergence, last_logits, read_tokens, samples_of, sites_of
from headscope.interventions.ops import add
from headscope.interventions.plan import Plan
from headscope.interventions.positions import Role, Span
from headscope.interventions.select import IndicesLike, select
from headscope.interventions.subspace import project
from headscope.kernels.errors import HeadscopeError, InputError, SelectionError

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

Score = Callable[[Tensor], Tensor]  # logits [B, V] after the last token -> [B], larger where the behaviour is stronger


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction of the residual stream.

    Attributes:
        vector: the difference of the means, [E], in the length that it has; removal uses its direction alone.
        block: the path of the block after which it was found.
        layer: the place of that block among the blocks.
        position: of the token, counted from the last.
    """

    vector: Tensor
    block: str
    layer: int
    position: int = -1

    def ablate(self, also: Sequence[str] = ()) -> Plan:
        """Take it away everywhere: x - r̂ r̂ᵀ x at what leaves every block and what attention writes, at all positions.

        Args:
            also: globs of modules whose output writes to the stream, such as `("*embed_tokens", "*.mlp")`. The embedding is needed
                to keep it from the first block; the output of a feed-forward layer is covered by that of its block.
        """
        edits = [Edit("resid", project(self.vector)), Edit("attn_out", project(self.vector))]
        return Plan(edits + [Edit("out", project(self.vector), select(sites=glob)) for glob in also])

    def add(self, strength: float = 1.0, queries: IndicesLike | Span | Role | None = None) -> Plan:
        """Add it where it was found: x + strength · r, at all positions or some."""
        return Plan([Edit("resid", add(strength * self.vector), select(sites=self.block, queries=queries))])

    def sparse(self, share: float) -> Direction:
        """Only its largest entries, a share of them; the others are zero.

        Raises:
            InputError: a share that leaves none, or is above 1.
        """
        if not 0 < share <= 1:
            raise InputError(f"share={share}: give more than 0 and at most 1 of the entries")
        kept = max(1, round(share * self.vector.numel()))
        left = torch.zeros_like(self.vector)
        places = self.vector.abs().topk(kept).indices
        left[places] = self.vector[places]
        return Direction(left, self.block, self.layer, self.position)

    def to_dict(self) -> dict[str, object]:
        return {"block": self.block, "layer": self.layer, "position": self.position, "vector": self.vector.tolist()}

    def __str__(self) -> str:
        return f"direction of length {float(self.vector.norm()):.3g} after {self.block}, at token {self.position}"


@dataclass(frozen=True, eq=False)
class Directions:
    """Candidates: the difference of means at every block and position.

    Attributes:
        vectors: [L, P, E], float64.
        blocks: the paths of the blocks.
        positions: counted from the last token.
        separation: [L, P], the distance between the means over the pooled spread along that line (d').
    """

    vectors: Tensor
    blocks: tuple[str, ...]
    positions: tuple[int, ...]
    separation: Tensor

    def at(self, layer: int, position: int = -1) -> Direction:
        """One of them; `layer` counts the blocks.

        Raises:
            SelectionError: it is not there.
        """
        if not 0 <= layer < len(self.blocks) or position not in self.positions:
            raise SelectionError(
                f"no direction at block {layer}, token {position}: there are blocks 0 to {len(self.blocks) - 1} and tokens "
                f"{', '.join(map(str, self.positions))}"
            )
        return Direction(self.vectors[layer, self.positions.index(position)].float(), self.blocks[layer], layer, position)


def find_directions(
    model: nn.Module, positive: Prompts, negative: Prompts, *, positions: Sequence[int] = (-1,),
    progress: Callable[[int, int], None] | None = None,
) -> Directions:  # fmt: skip
    """The difference of the means of two sets of prompts after every block.

    Args:
        model: in eval mode.
        positive: prompts that have the concept, such as harmful requests; keyword inputs, or a list of them.
        negative: prompts that have not.
        positions: of tokens, counted from the last of each prompt.
        progress: told (prompts done, prompts in all).

    Raises:
        InputError: an empty set, or a prompt that is too short.
        SelectionError: attention that stands in no numbered block.
    """
    sets = samples_of(positive, "positive"), samples_of(negative, "negative")
    places = _positions(positions)
    blocks = blocks_of(sites_of(checked_model(model), sets[0][0]))
    total, states = len(sets[0]) + len(sets[1]), []
    for number, samples in enumerate(sets):
        before = number * len(sets[0])

        def tell(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        found = read_tokens(model, samples, "resid", blocks, places, tell)
        states.append(torch.stack([found[block][:, :, 0] for block in blocks]))  # [L, N, P, E]
    means = [one.mean(1) for one in states]
    vectors = means[0] - means[1]
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    spreads = [((one - mean[:, None]) * unit[:, None]).sum(-1).square().mean(1) for one, mean in zip(states, means, strict=True)]
    separation = vectors.norm(dim=-1) / ((spreads[0] + spreads[1]) / 2).sqrt().clamp(min=1e-30)
    return Directions(vectors, blocks, places, separation)


@dataclass(frozen=True)
class Candidate:
    """What a direction does.

    Attributes:
        layer, position: where it is from.
        ablated: mean score of the behaviour on positive prompts with it taken away; the lower the better.
        induced: mean score on negative prompts with it added.
        divergence: mean KL in nats on negative prompts with it taken away.
        dropped: why it is no choice; empty where it is one.
    """

    layer: int
    position: int
    ablated: float
    induced: float
    divergence: float
    dropped: str


@dataclass(frozen=True, eq=False)
class Choice:
    """The direction that was chosen, and how all candidates did.

    Attributes:
        direction: the best.
        candidates: all.
        positive, negative: mean score of the behaviour on either set without any edit.
        settings: thresholds, ready for JSON.
    """

    direction: Direction
    candidates: tuple[Candidate, ...]
    positive: float
    negative: float
    settings: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return {
            "direction": self.direction.to_dict(),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "positive": self.positive,
            "negative": self.negative,
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line a candidate; needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        return pandas.DataFrame([asdict(candidate) for candidate in self.candidates])

    def plot(self) -> Figure:
        """Ablated and induced scores by layer, a line a position; needs plotly."""
        try:
            from plotly.graph_objects import Figure
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]'") from error
        figure = Figure()
        for position in sorted({candidate.position for candidate in self.candidates}):
            own = [candidate for candidate in self.candidates if candidate.position == position]
            for name in ("ablated", "induced"):
                figure.add_scatter(x=[c.layer for c in own], y=[getattr(c, name) for c in own], name=f"{name}, token {position}")
        figure.update_xaxes(title_text="block")
        figure.update_yaxes(title_text="score of the behaviour")
        return figure

    def __str__(self) -> str:
        best = next(c for c in self.candidates if (c.layer, c.position) == (self.direction.layer, self.direction.position))
        return (
            f"{self.direction}\npositive prompts {self.positive:.3g}, without it {best.ablated:.3g}; "
            f"negative prompts {self.negative:.3g}, with it added {best.induced:.3g}; KL {best.divergence:.3g} nats"
        )


def choose_direction(
    model: nn.Module,
    directions: Directions,
    positive: Prompts,
    negative: Prompts,
    behaviour: Sequence[int] | Score,
    *,
    most_divergence: float = 0.1,
    last_share: float = 0.2,
    least_induced: float = 0.0,
    also: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """Choose by what each candidate does on prompts that it was not found on.

    Args:
        model: in eval mode.
        directions: the candidates.
        positive, negative: held-out prompts of both kinds.
        behaviour: tokens or classes that show it, scored by their log-odds, or a function of the logits [B, V] after the last token.
        most_divergence: KL in nats on negative prompts that is allowed; 0.1 is published.
        last_share: the share of last blocks that are no choice; 0.2 is published.
        least_induced: score on negative prompts that adding has to exceed; 0, even odds, is published.
        also: as in `Direction.ablate`.
        progress: told (candidates done, candidates in all).

    Raises:
        InputError: an empty set, or a behaviour that is none.
        SelectionError: no candidate is a choice; the message says why each was dropped.
    """
    score = behaviour if callable(behaviour) else _log_odds(behaviour)
    sets = samples_of(positive, "positive"), samples_of(negative, "negative")
    plain = [_logits(checked_model(model), samples, None) for samples in sets]
    limit = len(directions.blocks) - int(last_share * len(directions.blocks) + 0.5)
    found = []
    every = [(layer, position) for layer in range(len(directions.blocks)) for position in directions.positions]
    for number, (layer, position) in enumerate(every):
        direction = directions.at(layer, position)
        if not float(direction.vector.norm()):
            found.append(Candidate(layer, position, float("inf"), float("-inf"), float("inf"), "the means are equal"))
            continue
        without = direction.ablate(also)
        ablated = float(score(_logits(model, sets[0], without)).mean())
        harmless = _logits(model, sets[1], without)
        moved = float(divergence(plain[1], harmless).mean())
        induced = float(score(_logits(model, sets[1], direction.add())).mean())
        why = []
        if layer >= limit:
            why.append("in the last blocks")
        if moved > most_divergence:
            why.append(f"KL {moved:.3g} above {most_divergence:g}")
        if induced <= least_induced:
            why.append(f"induces {induced:.3g}, not above {least_induced:g}")
        found.append(Candidate(layer, position, ablated, induced, moved, "; ".join(why)))
        if progress is not None:
            progress(number + 1, len(every))
    left = [candidate for candidate in found if not candidate.dropped]
    if not left:
        reasons = "; ".join(f"block {c.layer} token {c.position}: {c.dropped}" for c in found[:12])
        raise SelectionError(f"no direction is a choice ({reasons}); loosen most_divergence, last_share or least_induced")
    best = min(left, key=lambda candidate: candidate.ablated)
    settings = {"most_divergence": most_divergence, "last_share": last_share, "least_induced": least_induced, "also": list(also)}
    return Choice(
        directions.at(best.layer, best.position), tuple(found), float(score(plain[0]).mean()), float(score(plain[1]).mean()), settings
    )


def _positions(positions: Sequence[int]) -> tuple[int, ...]:
    found = tuple(sorted(set(positions)))
    if not found or any(isinstance(p, bool) or not isinstance(p, int) or p >= 0 for p in found):
        raise InputError(f"positions={list(positions)!r}: count tokens from the last, such as (-1,) or range(-5, 0)")
    return found


def _log_odds(tokens: Sequence[int]) -> Score:
    """log p - log(1 - p), p the probability of any of the tokens."""
    chosen = sorted(set(tokens))
    if not chosen:
        raise InputError("behaviour=[]: give the tokens that show it, such as those that refusals begin with")

    def score(logits: Tensor) -> Tensor:
        if chosen[-1] >= logits.shape[-1] or chosen[0] < 0:
            raise InputError(f"behaviour={chosen}: there are {logits.shape[-1]} tokens, 0 to {logits.shape[-1] - 1}")
        rest = [place for place in range(logits.shape[-1]) if place not in set(chosen)]
        return logits[:, chosen].logsumexp(-1) - logits[:, rest].logsumexp(-1)

    return score


def _logits(model: nn.Module, samples: Sequence[Mapping[str, Any]], plan: Plan | None) -> Tensor:
    """[N, V] after the last token of every sample."""
    found = []
    with torch.no_grad():
        for inputs in samples:
            if plan is None:
                output = model(**inputs)
            else:
                with plan.on(model):
                    output = model(**inputs)
            found.append(last_logits(output, inputs)[0].cpu())
    return torch.stack(found)
