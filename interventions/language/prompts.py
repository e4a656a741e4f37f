"""Prompts one by one, and what a model says and holds at their last token.

Letters: B samples, S tokens, V classes or tokens of the vocabulary, E width of the residual stream, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions.edit import Edit
from headscope.interventions.ops import call
from headscope.interventions.plan import Plan
from headscope.interventions.select import select
from headscope.kernels.errors import InputError, NonFiniteError, NotIntercepted, SelectionError
from headscope.probe.attribution.head_removal import Seen
from headscope.probe.attribution.question import copied
from headscope.probe.attribution.target import logits_of
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception import intercept
from headscope.probe.interception.outside import block_of

Inputs = Mapping[str, Any]
Prompts = Inputs | Sequence[Inputs]


def samples_of(prompts: Prompts, what: str = "prompts") -> list[dict[str, Any]]:
    """Every sample of every batch alone, as keyword inputs of a batch of one.

    Raises:
        InputError: nothing, or what is no keyword inputs.
    """
    given = [prompts] if isinstance(prompts, Mapping) else list(prompts)
    found: list[dict[str, Any]] = []
    for inputs in given:
        if not isinstance(inputs, Mapping):
            raise InputError(
                f"{what} holds {type(inputs).__name__}: give the model's keyword inputs, such as tokenizer(text, return_tensors='pt')"
            )
        size = next((value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 0)
        for place in range(size):
            found.append({name: value[place : place + 1] if _batched(value, size) else value for name, value in inputs.items()})
    if not found:
        raise InputError(f"{what} is empty: give at least one prompt")
    return found


def copies(inputs: Inputs, count: int) -> dict[str, Any]:
    """One sample, count times."""
    return {name: copied(value, count, 1) for name, value in inputs.items()}


def last_token(inputs: Inputs, tokens: int) -> int:
    """The place of the last token of one sample that is no padding, among so many."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[-1] == tokens:
        return int(mask[0].nonzero().max())
    return tokens - 1


def last_logits(output: Any, inputs: Inputs) -> Tensor:
    """[B, V] in float64: logits after the last token, or those of a classifier.

    Raises:
        InputError: logits of another shape.
        NonFiniteError: they overflowed.
    """
    found = logits_of(output)
    if found.ndim == 3:
        found = found[:, last_token(inputs, found.shape[1])]
    if found.ndim != 2:
        raise InputError(f"logits of {list(found.shape)}: expected [batch, tokens, vocabulary] or [batch, classes]")
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError("a logit is not finite: the model overflows; use float32 instead of half precision")
    return found.double()


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(softmax before ‖ softmax after) in nats, over the last axis."""
    first, second = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).clamp(min=0.0)


def sites_of(model: nn.Module, inputs: Inputs) -> tuple[AttentionSite, ...]:
    """The sites in the order in which they run; one forward.

    Raises:
        NotIntercepted: no attention ran, or what cannot be followed.
    """
    seen = Seen()
    with torch.no_grad(), intercept(model, seen):
        model(**inputs)
    if not seen.sites:
        raise NotIntercepted(f"no attention was caught in {type(model).__name__}, so it has no heads to change")
    return tuple(seen.sites.values())


def heads_of(sites: Sequence[AttentionSite]) -> tuple[tuple[str, int], ...]:
    """(site, head) of every head, for scores that make a table [L, H].

    Raises:
        SelectionError: the sites differ in their number of heads.
    """
    sizes = {site.query_heads for site in sites}
    if len(sizes) > 1:
        raise SelectionError(f"the sites have {', '.join(map(str, sorted(sizes)))} heads: their scores make no table [L, H]")
    return tuple((site.name, head) for site in sites for head in range(site.query_heads))


def blocks_of(sites: Sequence[AttentionSite]) -> tuple[str, ...]:
    """The paths of the blocks that the sites stand in, in order.

    Raises:
        SelectionError: a site that stands in no numbered block.
    """
    found: dict[str, None] = {}
    for site in sites:
        block = block_of(site.module)
        if block is None:
            raise SelectionError(f"{site.name} stands in no numbered block, so there is no residual stream to name: use stage='out'")
        found[block] = None
    return tuple(found)


@dataclass(eq=False)
class Reading:
    """A plan that changes nothing and keeps what a stage holds at each site, detached: [B, H or 1, S, D] of the last call."""

    stage: str
    sites: tuple[str, ...]

    def __post_init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.plan = Plan([Edit(self.stage, call(self._keep), select(sites=self.sites))])

    def _keep(self, value: Tensor, made: AttentionCall) -> Tensor:
        self.found[made.site.name] = value.detach()
        return value


def read_states(
    model: nn.Module, inputs: Inputs, stage: str, sites: Sequence[str], plan: Plan | None = None
) -> tuple[dict[str, Tensor], Any]:
    """What a stage holds at sites (blocks at `resid`, modules at `out`), and the output; one forward, perhaps with a plan on.

    Raises:
        SelectionError: no such site.
    """
    reading = Reading(stage, tuple(sites))
    with torch.no_grad():
        if plan is None:
            with reading.plan.on(model):
                output = model(**inputs)
        else:
            with plan.on(model), reading.plan.on(model):
                output = model(**inputs)
    return reading.found, output


def read_tokens(
    model: nn.Module, samples: Sequence[Inputs], stage: str, sites: Sequence[str], positions: Sequence[int] = (-1,),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """For each site [N, P, H or 1, D] in float64: what the stage holds at some tokens of every sample, counted from its last.

    Raises:
        InputError: a sample that is too short.
    """
    rows: dict[str, list[Tensor]] = {}
    for number, inputs in enumerate(samples):
        found, _ = read_states(model, inputs, stage, sites)
        for name, value in found.items():
            last = last_token(inputs, value.shape[2])
            places = [last + 1 + position for position in positions]
            if min(places) < 0:
                raise InputError(f"prompt {number} has {last + 1} tokens, so there is no position {min(positions)} in it")
            rows.setdefault(name, []).append(value[0, :, places].double().cpu().transpose(0, 1))  # [P, H, D]
        if progress is not None:
            progress(number + 1, len(samples))
    return {name: torch.stack(values) for name, values in rows.items()}


def _batched(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
