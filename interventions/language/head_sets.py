"""Sets of heads taken out of a model, each set in a copy of its own of one prompt, and what the model then says and holds.

Letters: n sets, V vocabulary, E width of the residual stream, L sites, H heads of a site, D width of a value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headscope.interventions.edit import Edit
from headscope.interventions.language.prompts import Inputs, Reading, blocks_of, copies, last_logits, last_token, read_states, sites_of
from headscope.interventions.ops import Op, assign, scale
from headscope.interventions.plan import Plan
from headscope.interventions.select import select
from headscope.kernels.errors import EditError, InputError
from headscope.probe.call import AttentionSite

Head = tuple[str, int]  # a site's name, and which of its query heads
REMOVALS = ("query", "key", "value", "zero", "mean")
STAGE_OF = {"query": "q", "key": "k", "value": "z", "zero": "z", "mean": "z"}


@dataclass(frozen=True, eq=False)
class Removal:
    """How a head is taken out.

    - `query`, `key`: q or k times ε, so that the head attends to all that it may see alike (undifferentiated attention); where query
      heads share keys, `query` is the same edit for one of them alone.
    - `value`: v times ε; carried out on z, which is the same to rounding and fits one query head.
    - `zero`, `mean`: z set to zero, or to its mean over prompts and positions.

    Attributes:
        kind: one of the above.
        epsilon: ε.
        means: for `mean`, [H, D] by site.
    """

    kind: str = "query"
    epsilon: float = 1e-4
    means: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.kind not in REMOVALS:
            raise EditError(f"removal={self.kind!r}: choose {', '.join(REMOVALS)}")
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, (int, float)) or not 0 <= self.epsilon < 1:
            raise EditError(f"epsilon={self.epsilon!r}: give a number from 0 up, well below 1")
        if (self.kind == "mean") != (self.means is not None):
            raise EditError(f"removal {self.kind!r} and {'no ' if self.means is None else ''}means: mean-removal needs them, no other")

    def op(self, head: Head) -> Op:
        """What is done at a head."""
        if self.kind == "mean":
            assert self.means is not None
            return assign(self.means[head[0]][head[1]])
        return scale(0.0 if self.kind == "zero" else float(self.epsilon))

    def edits(self, heads: Collection[Head], samples: int | None = None) -> list[Edit]:
        """The edits that take heads out, of one row of the batch or of all."""
        stage = STAGE_OF[self.kind]
        if self.kind == "mean":
            return [Edit(stage, self.op(head), select(sites=head[0], head=head[1], samples=samples)) for head in sorted(heads)]
        sites: dict[str, list[int]] = {}
        for name, head in sorted(heads):
            sites.setdefault(name, []).append(head)
        return [Edit(stage, self.op((name, own[0])), select(sites=name, heads=own, samples=samples)) for name, own in sites.items()]

    def plan(self, heads: Collection[Head]) -> Plan:
        """A plan that takes heads out."""
        return Plan(self.edits(heads))


def removal_of(kind: str, epsilon: float, model: nn.Module, samples: Sequence[Inputs]) -> Removal:
    """A removal; the means of `mean` are taken over the prompts."""
    means = mean_outputs(model, samples) if kind == "mean" else None
    return Removal(kind, epsilon, means)


def mean_outputs(model: nn.Module, samples: Sequence[Inputs]) -> dict[str, Tensor]:
    """z of every head, [H, D] by site, its mean over samples and positions."""
    names = [site.name for site in sites_of(model, samples[0])]
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for inputs in samples:
        found, _ = read_states(model, inputs, "z", names)
        for name, z in found.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + z.double().sum((0, 2)).cpu()
            counts[name] = counts.get(name, 0) + z.shape[0] * z.shape[2]
    return {name: (total / counts[name]).float() for name, total in sums.items()}


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model said and held at the last token, for each of n sets of heads.

    Attributes:
        logits: [n, V], float64.
        states: [n, E], float64, what left the last block; None where it was not asked for.
    """

    logits: Tensor
    states: Tensor | None


def without_heads(
    model: nn.Module, inputs: Inputs, sets: Sequence[Collection[Head]], removal: Removal, block: str | None = None
) -> Answers:
    """One sample without each of n sets of heads, all in one forward; an empty set leaves its copy as it was.

    Args:
        model: in eval mode.
        inputs: one sample.
        sets: the heads to take out.
        removal: how.
        block: the path of a block whose output is read too.
    """
    plan = Plan([edit for place, heads in enumerate(sets) for edit in removal.edits(heads, place)])
    many = copies(inputs, len(sets))
    reading = None if block is None else Reading("resid", (block,))
    with torch.no_grad(), plan.on(model):
        if reading is None:
            output = model(**many)
        else:
            with reading.plan.on(model):
                output = model(**many)
    states = None
    if reading is not None and block is not None:
        value = reading.found[block]
        states = value[:, 0, last_token(inputs, value.shape[2])].double().cpu()
    return Answers(last_logits(output, inputs).cpu(), states)


def last_block(sites: Sequence[AttentionSite]) -> str:
    """The block that the last site stands in."""
    return blocks_of(sites)[-1]


def checked_model(model: nn.Module) -> nn.Module:
    """The model, if it is in eval mode.

    Raises:
        InputError: it is training.
    """
    if model.training:
        raise InputError("the model is in training mode, where dropout makes results random: call model.eval() first")
    return model
