"""One change to attention, and how a list of changes is brought to the cheapest stages that express it.

Stages in their order within a call: q.pre k.pre (before RoPE), q, k, v, bias, scores, pattern, z, o. Edits at all but scores and
pattern keep the model's own fused attention; those two materialise [B, H, Q, K] at the sites concerned. Four laws move edits away
from them:

    scores + b                      = bias + b                 add, bias, mask at scores      -> bias
    (c·P) v                         = c·(P v)                  scale, zero of whole rows of P -> z
    (c·z) W_O                       = c·(z W_O)                scale, zero at o               -> z
    identity                        = identity                 scale(1), add(0), gate 0       -> nothing to compute

A scale of some keys only of the pattern is no scale of z and stays. An edit that moves must not change places with one that it
does not commute with (scores times 2, then plus 1); `schedule` then leaves it where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headscope.interventions.gates import Gate
from headscope.interventions.ops import Add, Assign, Bias, Call, Mask, Op, Renorm, Scale, hidden
from headscope.interventions.region import KEY_STAGES, QUERY_STAGES, SCORE_STAGES, Region
from headscope.interventions.select import Selector, select
from headscope.kernels.errors import EditError, NonFiniteError
from headscope.probe.call import OUTSIDE, STAGES, AttentionCall

EVERYTHING = select()


@dataclass(frozen=True)
class Edit:
    """One operation, at one stage, on what a selector names.

    Attributes:
        stage: `pos`, `q.pre`, `k.pre`, `q`, `k`, `v`, `kv`, `bias`, `scores`, `pattern`, `z`, `o`, `attn_out`, `resid` or `out`.
        op: what to do, such as `scale(0.0)`.
        selector: where; everywhere if left out.
        gate: how much of it: value + gate · (edited - value). 1 is all, 0 nothing; or a `Gate`, which says it for each token and head.

    Raises:
        EditError: an operation or a selector that the stage cannot express.
    """

    stage: str
    op: Op
    selector: Selector = EVERYTHING
    gate: float | Gate = 1.0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise EditError(f"no stage {self.stage!r}: the stages are {', '.join(STAGES)}")
        if not isinstance(self.op, Op):
            raise EditError(f"op={self.op!r}: give an operation such as scale(0.0) or bias(-2.0)")
        if not isinstance(self.selector, Selector):
            raise EditError(f"selector={self.selector!r}: give select(...)")
        if not isinstance(self.gate, Gate):
            if isinstance(self.gate, bool) or not isinstance(self.gate, (int, float)):
                raise EditError(
                    f"gate={self.gate!r}: the gate is a number, 1 for all of the edit and 0 for none, or a Gate such as risk(...)"
                )
            if not math.isfinite(self.gate):
                raise NonFiniteError(f"gate={self.gate!r}: the gate is a finite number, 1 for all of the edit and 0 for none")
            object.__setattr__(self, "gate", float(self.gate))
        self._check_stage()

    def _check_stage(self) -> None:
        op, stage = self.op, self.stage
        if stage not in op.stages:
            allowed = ", ".join(name for name in STAGES if name in op.stages)
            instead = (
                "; to remove keys from the pattern use assign(0.0), then renorm()" if isinstance(op, Mask) and stage == "pattern" else ""
            )
            raise EditError(f"{op} cannot be done at {stage}: it works at {allowed}{instead}")
        if isinstance(op, Assign) and op.mean and stage in SCORE_STAGES:
            raise EditError(
                f"{op} cannot be done at {stage}: a mean over queries would show some of them keys they cannot see; "
                "use it at q, k, v, z or o"
            )
        if isinstance(op, Mask) and self.gate != 1.0:
            raise EditError(f"gate={self.gate!r}: a key is masked or not; use bias() for something in between")
        if isinstance(self.gate, Gate) and stage in ("pos", "kv", *SCORE_STAGES):
            raise EditError(
                f"gate={self.gate} at {stage}: a gate reads the token it stands at; use it at q, k, v, z, o and outside the door"
            )
        if stage in OUTSIDE and (self.selector.heads is not None or self.selector.kv_groups is not None):
            raise EditError(f"heads= at stage {stage}: there all heads are summed; select heads at z or o")
        if stage == "out" and self.selector.sites is None:
            raise EditError("stage out without sites=: it is the output of any module, so name those that are meant, such as sites='*.mlp'")
        if self.selector.keys is not None and stage in QUERY_STAGES and stage != "pos":
            raise EditError(f"keys= at stage {stage}: it has queries but no keys; use queries=, or an edit at scores or pattern")
        if self.selector.queries is not None and stage in KEY_STAGES:
            raise EditError(f"queries= at stage {stage}: it has keys but no queries; use keys=, or an edit at scores or pattern")
        if isinstance(op, Renorm) and self.selector.keys is not None:
            raise EditError("keys= with renorm(): a row is renormalised as a whole; leave keys out")

    @property
    def identity(self) -> bool:
        """Whether it certainly changes nothing."""
        return (isinstance(self.gate, float) and self.gate == 0.0) or self.op.identity

    def __str__(self) -> str:
        gate = "" if self.gate == 1.0 else f", gate {self.gate}"
        return f"{self.stage} {self.op} on {self.selector}{gate}"


@dataclass(frozen=True, eq=False)
class Step:
    """An edit and the stage it is carried out at. `owner` counts the plans that are active together, `index` the edits of a plan."""

    edit: Edit
    stage: str
    owner: int = 0
    index: int = 0


def lower(edit: Edit) -> str:
    """The cheapest stage at which an edit alone can be carried out with the same result; see the laws in the module docstring."""
    if edit.identity:
        return "z" if edit.stage in (*SCORE_STAGES, "o") else edit.stage
    if edit.stage == "scores" and isinstance(edit.op, (Add, Bias, Mask)):
        return "bias"
    if isinstance(edit.gate, Gate):  # it reads the value of its own stage
        return edit.stage
    linear = isinstance(edit.op, Scale) or (isinstance(edit.op, Assign) and edit.op.zero)
    if linear and (edit.stage == "o" or (edit.stage == "pattern" and edit.selector.keys is None)):
        return "z"
    return edit.stage


def schedule(plans: Sequence[Sequence[tuple[int, Edit]]]) -> list[Step]:
    """The order in which edits that meet at one site are carried out, each at the cheapest stage that leaves the result as written.

    As written, all edits at a stage come before those at the next, within a stage those of the plan entered first, within a plan
    in its order. They run by the stage they were brought to, then plan, then as written.

    Args:
        plans: for each active plan, in the order they were entered, its edits that match the site and their indices.

    Returns:
        The steps, sorted by stage, plan and written order.
    """
    written = sorted(
        (Step(edit, edit.stage, owner, index) for owner, edits in enumerate(plans) for index, edit in edits),
        key=lambda step: (STAGES.index(step.edit.stage), step.owner, step.index),
    )
    stages = [lower(step.edit) for step in written]
    order: list[tuple[int, int, int]] = []
    settled = False
    while not settled:
        order = [(STAGES.index(stage), step.owner, place) for place, (stage, step) in enumerate(zip(stages, written, strict=True))]
        settled = True
        for first in range(len(written)):
            for second in range(first + 1, len(written)):
                if order[first] < order[second] or _commute(written[first].edit, written[second].edit):
                    continue
                moved = [place for place in (first, second) if stages[place] != written[place].stage]
                for place in moved:
                    stages[place] = written[place].stage
                settled = settled and not moved
    steps = [Step(written[place].edit, stages[place], written[place].owner, written[place].index) for _, _, place in sorted(order)]
    return [replace(step, stage=side) for step in steps for side in _sides(step)]


def _sides(step: Step) -> tuple[str, ...]:
    """Where a step is carried out: a change of position at the queries that it names, the keys that it names, or at both."""
    if step.stage != "pos":
        return (step.stage,)
    selector = step.edit.selector
    if (selector.queries is None) == (selector.keys is None):
        return ("q", "k")
    return ("q",) if selector.keys is None else ("k",)


def _commute(one: Edit, other: Edit) -> bool:
    """Whether the order of two edits cannot matter, at whatever stages they are."""
    if one.identity or other.identity:
        return True
    if isinstance(one.op, Call) or isinstance(other.op, Call):  # may read heads other than those it changes
        return False
    heads = (one.selector.heads, other.selector.heads)
    if heads[0] is not None and heads[1] is not None and set(heads[0]).isdisjoint(heads[1]):
        return True
    added = all(edit.stage in ("bias", "scores") and isinstance(edit.op, (Add, Bias, Mask)) for edit in (one, other))
    scaled = all(edit.stage in ("pattern", "z", "o") and isinstance(edit.op, Scale) for edit in (one, other))
    return added or scaled


def change(edit: Edit, stage: str, value: Tensor, call: AttentionCall, region: Region | None) -> Tensor:
    """The value after an edit; `value` itself, the same tensor, where the edit changes nothing.

    Entries that are not selected keep every bit and their gradient; nothing is changed in place.

    Args:
        edit: the edit.
        stage: where it is carried out.
        value: the stage's tensor.
        call: the call it belongs to.
        region: the selected entries; None for all.
    """
    if edit.identity:
        return value
    if region is None or not (edit.op.per_head or isinstance(edit.gate, Gate)):
        return _changed(edit, stage, value, call, None if region is None else region.mask(value.device))
    mask = region.within_cuts.mask(value.device)
    return _cut(value, region.cuts(value.device), lambda part: _changed(edit, stage, part, call, mask))


def _cut(value: Tensor, cuts: Sequence[tuple[int, Tensor]], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A change of the chosen heads and positions alone, as (axis, indices), put back where they were."""
    if not cuts:
        return change(value)
    axis, chosen = cuts[0]
    return value.index_copy(axis, chosen, _cut(value.index_select(axis, chosen), cuts[1:], change))


def _changed(edit: Edit, stage: str, value: Tensor, call: AttentionCall, mask: Tensor | None) -> Tensor:
    gate = edit.gate if isinstance(edit.gate, float) else edit.gate.strength(value, call, stage)
    new = edit.op.gated(value, gate, call, stage)
    if stage in ("bias", "scores") and edit.op.keeps_masked:
        new = torch.where(hidden(value), value, new)
    return new if mask is None else torch.where(mask, new, value)
