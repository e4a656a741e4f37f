"""A plan while it is switched on: the handler that an interception calls, and what it counted.

Plans that are active on one model in one thread know of each other, in the order they were entered: together they decide where each
edit is carried out, and edits of two plans that overwrite the same entries are refused.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

from headscope.interventions.edit import Edit, Step, change, lower, schedule
from headscope.interventions.injection import Inject
from headscope.interventions.ops import Mask, Scale
from headscope.interventions.region import Region, SpanPositions, find_region, takes
from headscope.kernels.errors import ClosedError, EditError, SelectionError
from headscope.probe.call import OUTSIDE, AttentionCall, AttentionSite, Extension

RegionKey = tuple[int, str, tuple[object, ...], tuple[int, ...], tuple[int, ...]]
MOST_REGIONS = 256
_serial = itertools.count()


@dataclass(frozen=True)
class _Scheduled:
    """What a plan does at one site, given the plans that are active with it."""

    site: AttentionSite
    peers: tuple[int, ...]
    steps: tuple[Step, ...]
    stages: frozenset[str]


class Activation:
    """The state of one `with plan.on(model):`.

    Attributes:
        plan: whose activation it is.
        edits: the plan's edits.
        hits: how many calls each edit changed something in; the second run of a checkpoint is not counted.
        sites: the sites that were run, by name.
        outside: those of the stages outside the door at which something is changed.
    """

    changes = True

    def __init__(self, plan: object, edits: Sequence[Edit], spans: SpanPositions, peers: Sequence[Activation] | None = None) -> None:
        self.plan = plan
        self.edits = tuple(edits)
        self.hits: Counter[int] = Counter()
        self.sites: dict[str, AttentionSite] = {}
        self._number = next(_serial)
        self._running: tuple[ReferenceType[AttentionCall], str, list[tuple[Edit, Region]]] | None = None
        self._longest = [0, 0, 0]  # step, queries, keys
        self._assumed: dict[str, tuple[Edit, int]] = {}  # site name -> a positional edit before RoPE, cached keys it reckoned with
        self._began: dict[str, tuple[Edit, int]] = {}  # site name -> an edit of what the cache will hold, keys it made at the first call
        self._written: dict[str, ReferenceType[AttentionCall]] = {}  # o and attn_out: the call that was last changed there
        self._reached: set[tuple[str, str]] = set()  # site name, stage
        self._places: dict[str, AttentionSite] = {}  # blocks and modules outside the door
        self._spans = spans
        self._peers = peers if peers is not None else (self,)  # live: plans entered later appear in it
        self._known: dict[str, _Scheduled] = {}
        self._regions: dict[RegionKey, Region | None] = {}
        self._by_role = any(edit.selector.roles() for edit in self.edits)
        self.outside = frozenset(edit.stage for edit in self.edits) & frozenset(OUTSIDE)

    def stages(self, site: AttentionSite) -> frozenset[str]:
        """The stages at which this plan changes something at the site."""
        return self._scheduled(site).stages

    def reads(self, site: AttentionSite) -> frozenset[str]:
        """Nothing: a plan looks at no finished call."""
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        """The stage's value after the edits that are carried out there, in order."""
        self._reached.add((call.site.name, stage))
        if stage in OUTSIDE:
            self._places[call.site.name] = call.site
        if stage in ("o", "attn_out"):
            self._refuse_second_map(call, stage)
        for step in self._scheduled(call.site).steps:
            if step.stage != stage:
                continue
            region = self._region(step, call, value)
            if stage in ("q.pre", "k.pre"):
                if step.edit.selector.counts_positions():
                    self._assumed[call.site.name] = (step.edit, max(call.keys - value.shape[2], 0))
                if stage == "k.pre" and not step.edit.identity and call.step == 0:
                    self._began[call.site.name] = (step.edit, value.shape[2])
            if region is None:
                continue
            if step.edit.op.overwrites:
                self._refuse_conflicts(step.edit, region, call, stage)
            self.hits[step.index] += not call.recomputed
            value = change(step.edit, stage, value, call, region)
        return value

    def _refuse_second_map(self, call: AttentionCall, stage: str) -> None:
        """Raise for a second output map beside the first, unless to edit both is to edit their sum."""
        before = self._written.get(stage)
        here = [step.edit for step in self._scheduled(call.site).steps if step.stage == stage]
        other = next((edit for edit in here if not (isinstance(edit.op, Scale) and isinstance(edit.gate, float))), None)
        if other is not None and before is not None and before() is call:
            raise EditError(
                f"({other}): {call.site.name} has several output maps side by side, as an adapter such as LoRA makes them, and what they "
                f"write is their sum: merge the adapter first (merge_and_unload()), or edit z, or what the module returns with "
                f"stage out and sites='*{(call.site.output_projection or 'o_proj').removesuffix('.base_layer').rpartition('.')[2]}'"
            )
        self._written[stage] = ref(call)

    def extend(self, call: AttentionCall) -> list[Extension]:
        """Keys and values to put in front of those of a call."""
        self._reached.add((call.site.name, "kv"))
        found = []
        for step in self._scheduled(call.site).steps:
            if step.stage == "kv" and isinstance(step.edit.op, Inject) and takes(step.edit.selector, call, call.k, "kv"):
                self.hits[step.index] += not call.recomputed
                found.append(step.edit.op.extension(call, step.edit.selector))
        return found

    def see(self, call: AttentionCall) -> None:
        """Note what was run, for `sites` and for the message of an edit that hit nothing.

        Raises:
            EditError: an edit before RoPE counted positions from where this call, as it turns out, does not start.
        """
        self.sites[call.site.name] = call.site
        early, before = self._began.pop(call.site.name, (None, 0))
        if early is not None and call.site.kind == "self" and call.keys - call.injected > before:
            raise EditError(
                f"({early}) was switched on in the middle of a cached generation: {call.site.name} already holds "
                f"{call.keys - call.injected - before} keys that were made without it, so its answer would be neither one nor the other; "
                "start the sequence anew inside the block, or edit k (after rotation) instead"
            )
        edit, cached = self._assumed.pop(call.site.name, (None, 0))
        if edit is not None and call.site.kind == "self" and call.keys - call.queries > cached:
            raise EditError(
                f"({edit}) counts positions, but {call.site.name} at step {call.step} continues a cache of "
                f"{call.keys - call.queries} keys, "
                "which cannot be seen before RoPE: edit q or k instead, count from the end, or switch the cache off"
            )
        self._longest = [max(pair) for pair in zip(self._longest, (call.step, call.queries, call.keys), strict=True)]

    def check_hits(self) -> None:
        """Raise unless every edit was hit.

        Raises:
            SelectionError: no attention was run, or the first edit that was not hit, with the sites there are.
        """
        if not self.edits:
            return
        if not self.sites:
            raise SelectionError("nothing ran: no attention was called while the plan was on; run the model inside `with plan.on(model):`")
        for index, edit in enumerate(self.edits):
            if self.hits[index]:
                continue
            raise SelectionError(f"edit {index} ({edit}) changed nothing: {self.why(index)}")

    def why(self, index: int) -> str:
        """Why an edit may have hit nothing so far, and the sites that were seen."""
        edit = self.edits[index]
        matching = self.matching(edit)
        return f"{self._why(edit, matching)}. Sites seen: {_spoken(self.sites.values())}"

    def matching(self, edit: Edit) -> list[AttentionSite]:
        """The sites seen so far that an edit selects."""
        everywhere = self._places if edit.stage in OUTSIDE else self.sites
        return [site for site in everywhere.values() if edit.selector.matches(site)]

    def _why(self, edit: Edit, matching: Sequence[AttentionSite]) -> str:
        """Why an edit hit nothing at the sites that it selects."""
        if not matching:
            return "no site matches"
        count = f"{len(matching)} site{'s match' if len(matching) > 1 else ' matches'}"
        stage = lower(edit)
        if not any(name == site.name and stage == at for site in matching for name, at in self._reached):
            mechanisms = ", ".join(sorted({site.mechanism for site in matching}))
            return f"{count}, but stage {stage} was not reached there (caught by {mechanisms})"
        step, queries, keys = self._longest
        return f"{count}, but none of their steps, samples or positions (seen: steps 0 to {step}, up to {queries} queries and {keys} keys)"

    def _scheduled(self, site: AttentionSite) -> _Scheduled:
        """This plan's steps at a site; worked out again when another plan was entered or left."""
        peers = tuple(peer._number for peer in self._peers)
        known = self._known.get(site.name)
        if known is not None and known.peers == peers and (known.site is site or known.site == site):
            return known
        if self._number not in peers:
            raise ClosedError("the plan was switched off, but is still asked to change attention: its block was left")
        matching = [[(index, edit) for index, edit in enumerate(peer.edits) if edit.selector.matches(site)] for peer in self._peers]
        mine = peers.index(self._number)
        steps = tuple(step for step in schedule(matching) if step.owner == mine)
        found = self._known[site.name] = _Scheduled(site, peers, steps, frozenset(step.stage for step in steps))
        return found

    def _region(self, step: Step, call: AttentionCall, value: Tensor) -> Region | None:
        if not takes(step.edit.selector, call, value, step.stage):
            return None
        site = call.site  # sites of one make share their regions, unless roles differ from site to site
        make = (site.query_heads, site.kv_heads, site.fold, site.kind, call.injected, *((site.name, call.part) if self._by_role else ()))
        key = (step.index, step.stage, make, tuple(value.shape), (*call.q.shape, *call.k.shape))
        if key not in self._regions:
            if len(self._regions) >= MOST_REGIONS:
                self._regions.clear()
            self._regions[key] = find_region(step.edit.selector, call, step.stage, value, self._spans)
        return self._regions[key]

    def _refuse_conflicts(self, edit: Edit, region: Region, call: AttentionCall, stage: str) -> None:
        """Note that an edit overwrites a region, and raise if one before it, of this plan or another, did so at this call."""
        for peer in self._peers:
            for other, theirs in peer._overwritten_at(call, stage):
                if contradict(other, edit) and region.meets(theirs):
                    raise conflict(other, edit, f"at {call.site.name}, step {call.step}")
            if peer is self:
                break
        self._overwritten_at(call, stage).append((edit, region))

    def _overwritten_at(self, call: AttentionCall, stage: str) -> list[tuple[Edit, Region]]:
        """What this plan overwrote so far at one stage of the running call."""
        if self._running is None or self._running[0]() is not call or self._running[1] != stage:
            self._running = (ref(call), stage, [])
        return self._running[2]


def contradict(one: Edit, other: Edit) -> bool:
    """Whether both overwrite what they find at the same stage; two masks agree."""
    if one.stage != other.stage or not (one.op.overwrites and other.op.overwrites):
        return False
    return not (isinstance(one.op, Mask) and isinstance(other.op, Mask))


def conflict(one: Edit, other: Edit, where: str) -> EditError:
    """The error for two edits of which the second undoes the first."""
    return EditError(
        f"two edits overwrite the same entries {where}: ({one}) and ({other}); "
        "keep one of them, or select different heads, positions or steps"
    )


def refuse_sure_conflicts(before: Iterable[Edit], edits: Sequence[Edit], where: str) -> None:
    """Raise if an edit certainly overwrites what one of `before`, or an earlier one of `edits`, has set.

    Raises:
        EditError: it names both edits.
    """
    earlier = list(before)
    for edit in edits:
        for other in earlier:
            if contradict(other, edit) and other.selector.surely_meets(edit.selector):
                raise conflict(other, edit, where)
        earlier.append(edit)


class _ActivePlans(threading.local):
    """For each model the activations entered in this thread, in their order."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[nn.Module, list[Activation]] = WeakKeyDictionary()


_active = _ActivePlans()


def enter(model: nn.Module, plan: object, edits: Sequence[Edit], spans: SpanPositions) -> Activation:
    """Register a plan's edits as active on a model.

    Raises:
        EditError: the plan is active there already, or its edits overwrite what those of another active plan certainly overwrite.
    """
    peers = _active.of.setdefault(model, [])
    if any(peer.plan is plan for peer in peers):
        raise EditError(
            f"this plan is already on at this {type(model).__name__}: a plan acts once on a model; leave its block or detach() first"
        )
    refuse_sure_conflicts((edit for peer in peers for edit in peer.edits), edits, "in two plans that are active together")
    activation = Activation(plan, edits, spans, peers)
    peers.append(activation)
    return activation


def leave(model: nn.Module, activation: Activation) -> None:
    """Take an activation off the model's list."""
    peers = _active.of.get(model, [])
    peers[:] = [peer for peer in peers if peer is not activation]


def _spoken(sites: Iterable[AttentionSite]) -> str:
    names = [f"{site.name} ({'' if site.layer is None else f'layer {site.layer}, '}{site.query_heads} heads)" for site in sites]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
