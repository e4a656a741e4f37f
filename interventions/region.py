"""Which entries of one stage's tensor a selector names, worked out at a call.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, N heads of the stage (H, or G for k and v).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headscope.interventions.positions import Positions, Role, Span, Stretch
from headscope.interventions.select import Selector
from headscope.kernels.errors import EditError, SelectionError, ShapeError
from headscope.probe.call import OUTSIDE, AttentionCall, AttentionSite

QUERY_STAGES = ("q.pre", "q", "z", "o", *OUTSIDE)  # [B, H, Q, *]; outside the door there is one head: all of them
KEY_STAGES = ("k.pre", "k", "v", "kv")  # [B, G, K, *]
SCORE_STAGES = ("bias", "scores", "pattern")  # [B, H, Q, K]

CPU = torch.device("cpu")

# For each span, the token positions it covers, one tuple for each row of the ids it was looked up in. For each role its positions,
# everywhere the same, or by the name of the site.
SpanPositions = Mapping[Span | Role, Sequence[tuple[int, ...]] | Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class Region:
    """The product of four conditions, each a bool tensor on the CPU or None for all.

    Attributes:
        batch: [B].
        heads: [N].
        rows: [B or 1, n]: queries, or keys at the stages k and v.
        columns: [B or 1, K]: keys, at the stages bias, scores and pattern.
    """

    batch: Tensor | None
    heads: Tensor | None
    rows: Tensor | None
    columns: Tensor | None

    @cached_property
    def within_cuts(self) -> Region:
        """What is left to tell where `cuts` has been taken out."""
        return Region(self.batch, None, self.rows if self.rows is not None and len(self.rows) > 1 else None, self.columns)

    def cuts(self, device: torch.device) -> list[tuple[int, Tensor]]:
        """(axis, indices) of the selected heads, and of the selected rows where they are the same in all samples; nothing where all are."""
        heads, rows = self.heads, self.rows[0] if self.rows is not None and len(self.rows) == 1 else None
        parts = [(axis, chosen) for axis, chosen in ((2, rows), (1, heads)) if chosen is not None and not bool(chosen.all())]
        return [(axis, chosen.nonzero().flatten().to(device)) for axis, chosen in parts]

    def mask(self, device: torch.device = CPU) -> Tensor | None:
        """True at the selected entries, as small as it broadcasts to [B, N, rows, columns]; None for all of them. Made once per device."""
        if device not in self._masks:
            with torch.inference_mode(False):  # a mask made in inference mode could not be saved for a later backward
                whole = self._mask()
                self._masks[device] = None if whole is None else whole.to(device)
        return self._masks[device]

    @cached_property
    def _masks(self) -> dict[torch.device, Tensor | None]:
        return {}

    def _mask(self) -> Tensor | None:
        parts = (
            None if self.batch is None else self.batch[:, None, None, None],
            None if self.heads is None else self.heads[None, :, None, None],
            None if self.rows is None else self.rows[:, None, :, None],
            None if self.columns is None else self.columns[:, None, None, :],
        )
        whole: Tensor | None = None
        for part in parts:
            if part is not None:
                whole = part if whole is None else whole & part
        return whole

    def meets(self, other: Region | None = None) -> bool:
        """Whether any entry is selected, by the other region too where one is given."""
        second = self if other is None else other
        if not bool(_both(self.heads, second.heads).any()):
            return False
        samples = _both(self.batch, second.batch)
        for mine, theirs in ((self.rows, second.rows), (self.columns, second.columns)):
            samples = samples & _both(mine, theirs).any(-1)  # [B or 1]
        return bool(samples.any())


def _both(one: Tensor | None, other: Tensor | None) -> Tensor:
    if one is None:
        return torch.ones(1, dtype=torch.bool) if other is None else other
    return one if other is None else one & other


def check_heads(selector: Selector, site: AttentionSite) -> None:
    """Raise unless the site has the heads and groups that the selector names.

    Raises:
        SelectionError: it has not; the message gives those that there are.
    """
    for name, indices, count in (("head", selector.heads, site.query_heads), ("kv group", selector.kv_groups, site.kv_heads)):
        if indices is not None and indices[-1] >= count:
            missing = next(index for index in indices if index >= count)
            raise SelectionError(
                f"no {name} {missing}: this site has {count} {name}{'s' if count > 1 else ''}, 0 to {count - 1} "
                f"({site.name}; choose other sites with sites= or layers= if it was not meant)"
            )


def find_region(selector: Selector, call: AttentionCall, stage: str, value: Tensor, spans: SpanPositions) -> Region | None:
    """The entries of `value` that the selector names, or None where this call holds none of them.

    Args:
        selector: one that matches the call's site.
        stage: the stage `value` is at; positions are looked up along its axes.
        value: [B, N, rows, columns]; at `bias` anything that broadcasts to [B, H, Q, K].
        spans: where the selector's text spans are.

    Raises:
        SelectionError: a head, group or sample that is not there, or a branch of a batch that has no halves.
        EditError: a query head selected at k or v whose group is not selected as a whole.
        ShapeError: spans that were looked up in another number of samples than the call has.
    """
    if stage not in OUTSIDE:
        check_heads(selector, call.site)
    if not takes(selector, call, value, stage):
        return None
    batch = call.q.shape[0] if stage == "bias" else value.shape[0]
    heads = call.q.shape[1] if stage == "bias" else value.shape[1]
    scores = stage in SCORE_STAGES
    rows = call.queries if stage == "bias" else value.shape[2]
    columns = call.keys if stage == "bias" else value.shape[3]
    cached = call.site.kind == "self"  # only there are fewer queries than keys the last ones
    last = max(call.keys - call.injected - rows, 0) if cached and stage not in KEY_STAGES else 0
    side = "k" if stage in KEY_STAGES else "q"
    with torch.inference_mode(False):  # a mask made in inference mode could not be saved for a later backward
        region = Region(
            batch=_samples(selector, batch, max(call.site.fold, 1)),
            heads=_heads(selector, call, stage, heads),
            rows=_positions(
                selector.keys if stage in KEY_STAGES else selector.queries, rows, last, batch, call.site.fold, spans, _place(call, side)
            ),
            columns=_columns(selector.keys, columns, call, batch, spans) if scores else None,
        )
    return region if region.meets() else None


def takes(selector: Selector, call: AttentionCall, value: Tensor, stage: str) -> bool:
    """Whether the step, timestep and phase of a call are selected. Before rotation the first call of a site begins a sequence."""
    if not selector.takes_step(call.step) or not selector.takes_time(call.timestep):
        return False
    if selector.phase is None:
        return True
    if stage in ("q.pre", "k.pre", *OUTSIDE):
        decoding = call.step > 0 and value.shape[2] == 1
    else:
        decoding = call.cached > 0
    return decoding == (selector.phase == "decode")


def _place(call: AttentionCall, side: str) -> str:
    """Under which name the roles of a call's queries (side q) or keys (k) are looked up."""
    return f"{call.site.name}{'@' + call.part if call.part else ''}/{side}"


def _columns(positions: Positions | None, columns: int, call: AttentionCall, batch: int, spans: SpanPositions) -> Tensor | None:
    """[B or 1, K]: selected keys; those that an edit put in front have no position."""
    found = _positions(positions, columns - call.injected, 0, batch, call.site.fold, spans, _place(call, "k"))
    return found if found is None or not call.injected else torch.nn.functional.pad(found, (call.injected, 0))


def _among(length: int, indices: Sequence[int] | range) -> Tensor:
    found = torch.zeros(length, dtype=torch.bool)
    if len(indices):
        found[torch.tensor(indices)] = True
    return found


def _samples(selector: Selector, batch: int, fold: int) -> Tensor | None:
    samples = batch // fold
    chosen: Sequence[int]
    if selector.samples is not None:
        chosen = selector.samples
        if chosen[-1] >= samples:
            raise SelectionError(f"no sample {chosen[-1]}: this call has a batch of {samples}, 0 to {samples - 1}")
    elif selector.branch is not None:
        if samples % 2:
            raise SelectionError(f"branch={selector.branch!r}: a batch of {samples} has no two halves, so it was not doubled for guidance")
        chosen = range(samples // 2) if selector.branch == "uncond" else range(samples // 2, samples)
    else:
        return None
    return _among(samples, chosen).repeat_interleave(fold)


def _heads(selector: Selector, call: AttentionCall, stage: str, count: int) -> Tensor | None:
    shared = call.site.query_heads // call.site.kv_heads
    if selector.kv_groups is not None:
        if stage in KEY_STAGES and count == call.site.kv_heads:
            return _among(count, selector.kv_groups)
        return _among(count, [head for group in selector.kv_groups for head in range(group * shared, (group + 1) * shared)])
    if selector.heads is None:
        return None
    if stage not in KEY_STAGES or count == call.site.query_heads:
        return _among(count, selector.heads)
    for head in selector.heads:
        group = head // shared
        if not set(range(group * shared, (group + 1) * shared)) <= set(selector.heads):
            raise EditError(
                f"{stage} of head {head} alone cannot be edited: heads {group * shared} to {(group + 1) * shared - 1} of {call.site.name} "
                f"share key/value group {group}; select kv_group={group} to edit it for all of them, or edit q or z of this head"
            )
    return _among(count, sorted({head // shared for head in selector.heads}))


def _positions(
    positions: Positions | None, count: int, offset: int, batch: int, fold: int, spans: SpanPositions, place: str
) -> Tensor | None:
    """[B or 1, count]: the entries of an axis that holds the absolute positions `offset` to `offset + count - 1`."""
    if positions is None:
        return None
    if isinstance(positions, Stretch):
        return _among(count, [position - offset for position in positions.indices(offset + count) if position >= offset])[None]
    if isinstance(positions, (Span, Role)):
        rows = _known(positions, spans, place)
        found = torch.stack([_among(count, _here(row, count, offset)) for row in rows])
        if found.shape[0] * fold == batch:
            return found.repeat_interleave(fold, 0)
        if found.shape[0] != 1:
            raise ShapeError(
                f"{positions} was looked up in {found.shape[0]} rows of input_ids, this call has a batch of {batch}: "
                "give one row for each, or one for all"
            )
        return found
    return _among(count, _here(positions, count, offset))[None]


def _known(positions: Span | Role, spans: SpanPositions, place: str) -> Sequence[tuple[int, ...]]:
    """Where a span or role is, one tuple for each row it was looked up in."""
    if positions not in spans:
        if isinstance(positions, Role):
            raise SelectionError(
                f"role({positions.name!r}) is not known: give plan.on(model, roles={{{positions.name!r}: range(...)}}), "
                "or what find_roles(model, inputs, ...) found"
            )
        raise SelectionError(f"span({positions.text!r}) has no place yet: give plan.on(model, tokenizer=..., input_ids=...)")
    rows = spans[positions]
    if not isinstance(rows, Mapping):
        if "@" in place:
            raise SelectionError(
                f"{positions} at {place}: before rotation this attention projects its streams one by one, so positions in the joint "
                "sequence do not fit; use what find_roles(model, inputs, ...) found"
            )
        return rows
    return [rows.get(place, ())]  # a role that a place does not know has no token there


def _here(positions: Sequence[int], count: int, offset: int) -> list[int]:
    local = [position + count if position < 0 else position - offset for position in positions]
    return [position for position in local if 0 <= position < count]
