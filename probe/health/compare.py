"""Two models on the same inputs, or one before and after an edit: what changed in which head, and what between the blocks.

Letters: B batch, H query heads, Q queries, K keys, R rows of one panel, N tokens.

Both models run once for each batch; queries and keys are kept, and their patterns are compared some rows at a time, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.probe.health.blocks import Key, watched_states
from headscope.probe.health.cka import LEAST, linear_cka
from headscope.probe.health.comparison import HeadDifference, HealthComparison, StreamDifference
from headscope.probe.health.differences import HeadSums
from headscope.probe.health.inputs import Batch, Inputs, Tokens, batches_of, refuse_training
from headscope.probe.health.kept import Kept
from headscope.probe.interception import check_model, intercept
from headscope.probe.models import model_fingerprint
from headscope.probe.record import Record, spoken

MANY = 6  # names in a message


def compare_health(
    model_a: nn.Module,
    model_b: nn.Module | None,
    inputs: Inputs,
    *,
    within: Callable[[], AbstractContextManager[Any]] | None = None,
    tokens: Tensor | Sequence[Tensor] | None = None,
    names: tuple[str, str] = ("a", "b"),
    progress: Callable[[int, int], None] | None = None,
) -> HealthComparison:
    """Compare the attention and the hidden states of two models, or of one model before and after an edit.

    For every head: KL(a ‖ b) and KL(b ‖ a), Jensen-Shannon divergence, and the cosine of the two patterns. Rows are renormalised over the
    real keys for the divergences; the cosine takes what the model multiplies values by. Between the blocks: linear CKA and the relative
    change. A model and itself give exactly 0 and 1.

        after = compare_health(model, None, inputs, within=lambda: plan.on(model))

    Args:
        model_a: in evaluation mode; nothing of it is changed.
        model_b: with the same sites under the same names, such as another checkpoint; None for `model_a` once more.
        inputs: keyword inputs, a list of them (several batches), or a tensor, the first positional input.
        within: makes the context in which `model_b` runs.
        tokens: bool [B, N], True = counts; for several batches a list with one for each. By default the inputs' `attention_mask`.
        names: what to call the two.
        progress: told (batches done, batches in all).

    Raises:
        InputError: a model in training mode; inputs that are none.
        SelectionError: a site that only one of the two has.
        ShapeError: sites or hidden states of different shape.
        NotIntercepted: no attention was caught.
    """
    check_model(model_a)
    if names[0] == names[1]:
        raise InputError(f"names={names}: give the two different names")
    other = model_a if model_b is None else check_model(model_b)
    batches = batches_of(model_a, inputs, tokens=tokens)
    for model in (model_a, other):
        refuse_training(model)
    within = within or nullcontext
    heads: dict[str, HeadSums] = {}
    states: dict[Key, list[tuple[Tensor, Tensor]]] = {}
    with torch.no_grad():
        for number, batch in enumerate(batches):
            first = _run(model_a, batch)
            with within():
                second = _run(other, batch)
            _check_sites(first.capture, second.capture, names)
            for record_a, record_b in _pairs(first.capture, second.capture, names):
                heads.setdefault(record_a.site.name, HeadSums(record_a.site)).add(
                    record_a, record_b, first.capture.rows[record_a.site.name, record_a.step]
                )
            for name, reason in (first.capture.broken | second.capture.broken).items():
                heads.setdefault(name, HeadSums(first.capture.seen_site(name))).broken = reason
            for key, state in first.states.items():
                states.setdefault(key, []).append(_counted(key, state, second.states.get(key), batch.tokens, names))
            if progress is not None:
                progress(number + 1, len(batches))
    found = tuple(sums.result() for sums in heads.values())
    streams = tuple(_stream(key, pairs) for key, pairs in states.items())
    same = model_b is None or model_b is model_a
    info = {
        "a": names[0], "b": names[1], "same_model": same, "batches": len(batches),
        "models": [type(model_a).__name__, type(other).__name__],
        "fingerprints": [model_fingerprint(model_a), model_fingerprint(other)],
    }  # fmt: skip
    return HealthComparison(found, streams, _warnings(found, streams), info)


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Run:
    """What one model did with one batch."""

    capture: Kept
    states: dict[Key, Tensor]


def _run(model: nn.Module, batch: Batch) -> _Run:
    kept = Kept(batch.tokens)
    with intercept(model, kept) as session, watched_states(model) as states:
        batch.run(model)
    if kept.records:
        kept.finish(session.sites)
    return _Run(kept, dict(states))


def _check_sites(a: Kept, b: Kept, names: tuple[str, str]) -> None:
    """Raises SelectionError for a site that only one of the two has."""
    found = {names[0]: [site.name for site in a.sites], names[1]: [site.name for site in b.sites]}
    for here, there in (names, names[::-1]):
        alone = [name for name in found[here] if name not in found[there]]
        if alone:
            raise SelectionError(
                f"{here} has {spoken(alone)}, which {there} has not: sites are matched by their names, and {there} has "
                f"{spoken(found[there][:MANY])}; compare two models of the same class"
            )


def _pairs(a: Kept, b: Kept, names: tuple[str, str]) -> Iterator[tuple[Record, Record]]:
    """The calls that both made.

    Raises:
        SelectionError: one called a site more often.
    """
    broken = a.broken | b.broken
    for (name, step), record in a.records.items():
        if name in broken:
            continue
        if (name, step) not in b.records:
            raise SelectionError(f"{names[0]} calls {name} more than {step} times, {names[1]} does not: give inputs that both treat alike")
        yield record, b.records[name, step]
    extra = [name for name, step in b.records if (name, step) not in a.records and name not in broken]
    if extra:
        raise SelectionError(f"{names[1]} calls {extra[0]} more often than {names[0]}: give inputs that both treat alike")


# -- hidden states -----------------------------------------------------------------------------------------------------


def _counted(key: Key, a: Tensor, b: Tensor | None, tokens: Tokens, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """[n, d] of both, the tokens that count.

    Raises:
        ShapeError: one lacks the place, or has other tokens there.
    """
    if b is None or a.shape[:-1] != b.shape[:-1]:
        other = "nothing" if b is None else str(list(b.shape))
        raise ShapeError(f"the hidden states at {key[0]} ({key[1]}) are {list(a.shape)} in {names[0]} and {other} in {names[1]}")
    mask = tokens.of_states(a.shape[0], a.shape[1], key[0]) if a.dim() == 3 else None
    if mask is not None:
        return a[mask.to(a.device)], b[mask.to(b.device)]
    return a.flatten(0, -2), b.flatten(0, -2)


def _stream(key: Key, pairs: list[tuple[Tensor, Tensor]]) -> StreamDifference:
    a, b = (torch.cat([pair[side].cpu().double() for pair in pairs]) for side in (0, 1))
    undefined: dict[str, str] = {}
    cka = linear_cka(a, b) if bool(a.isfinite().all() and b.isfinite().all()) else math.nan
    if math.isnan(cka):
        few = f"fewer than {LEAST} tokens" if len(a) < LEAST else "the tokens' states are all alike, or not finite"
        undefined["cka"] = few
    size = float(a.norm())
    change = math.nan
    if a.shape != b.shape:
        undefined["change"] = f"widths {a.shape[1]} and {b.shape[1]}"
    elif not 0 < size < math.inf or not bool(b.isfinite().all()):
        undefined["change"] = "the states of the first are 0, or those of one are not finite"
    else:
        change = float((b - a).norm()) / size
    return StreamDifference(key[0], key[1], key[2], key[3], len(a), a.shape[1], cka, change, undefined)


def _warnings(heads: Sequence[HeadDifference], streams: Sequence[StreamDifference]) -> tuple[str, ...]:
    found = []
    few = [one for one in streams if one.tokens <= one.width]
    if few:
        found.append(
            f"CKA of {few[0].tokens} tokens in {few[0].width} dimensions says little: give more tokens than the hidden states are wide"
        )
    hidden = sorted({one.site.name for one in heads if any("infinite" in reason for reason in one.undefined.values())})
    if hidden:
        found.append(f"one of the two hides keys that the other sees, at {spoken(hidden)}: KL is infinite there")
    return tuple(found)
