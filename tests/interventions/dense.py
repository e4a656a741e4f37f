"""Attention written out, with a plan's edits applied as they are written: the twin that the real thing is compared with.

Nothing here uses the selection, the operations or the scheduling of headscope.interventions; entries are visited one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from headscope.interventions.edit import Edit
from headscope.interventions.ops import Add, Assign, Bias, Mask, Patch, Renorm, Scale
from headscope.interventions.positions import Stretch
from headscope.interventions.select import Selector
from headscope.probe.call import AttentionCall, AttentionSite, Handler

ORDER = ("q", "k", "v", "bias", "scores", "pattern", "z", "o")


def make_site(
    name: str = "model.layers.3.self_attn#0", *, heads: int = 4, groups: int = 2, layer: int | None = 3, kind: str = "self", fold: int = 1
) -> AttentionSite:
    return AttentionSite(name, name.partition("#")[0], 0, layer, kind, heads, groups, 6, 5, "sdpa", fold=fold)


def make_call(
    site: AttentionSite | None = None, *, batch: int = 2, queries: int = 5, keys: int = 5, step: int = 0, seed: int = 0
) -> AttentionCall:
    site = site or make_site()
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int, width: int) -> Tensor:
        return torch.randn(batch, heads, length, width, generator=generator, dtype=torch.float64)

    q, k, v = (
        draw(site.query_heads, queries, site.key_dim),
        draw(site.kv_heads, keys, site.key_dim),
        draw(site.kv_heads, keys, site.value_dim),
    )
    return AttentionCall(site, step, q, k, v, scale=1 / math.sqrt(site.key_dim))


def projection(site: AttentionSite) -> Tensor:
    """W_O per head, [H, V, E]."""
    return torch.randn(site.query_heads, site.value_dim, 7, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def attend(call: AttentionCall, change: Callable[[str, Tensor], Tensor], *, causal: bool = True) -> dict[str, Tensor]:
    """Every stage of a call, each after `change`."""
    site, seen = call.site, {}
    shared = site.query_heads // site.kv_heads

    def at(stage: str, value: Tensor) -> Tensor:
        seen[stage] = change(stage, value)
        return seen[stage]

    q, k = at("q", call.q), at("k", call.k)
    assert call.v is not None
    v = at("v", call.v)
    scores = q @ k.repeat_interleave(shared, 1).transpose(-1, -2) * call.scale
    if causal:
        visible = torch.arange(call.keys)[None] <= torch.arange(call.queries)[:, None] + (call.keys - call.queries)
        scores = scores.masked_fill(~visible, -math.inf)
    scores = at("scores", scores + at("bias", torch.zeros((), dtype=torch.float64)))
    dead = (scores == -math.inf).all(-1, keepdim=True)
    pattern = at("pattern", scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0))
    z = at("z", pattern @ v.repeat_interleave(shared, 1))
    at("o", torch.einsum("bhqv,hve->bhqe", z, projection(site)))
    return seen


def run(handler: Handler, call: AttentionCall, *, causal: bool = True) -> dict[str, Tensor]:
    """The call as an interception lets a handler change it."""
    stages = handler.stages(call.site)
    return attend(call, lambda stage, value: handler.change(call, stage, value) if stage in stages else value, causal=causal)


def as_written(edits: Iterable[Edit], call: AttentionCall, *, causal: bool = True) -> dict[str, Tensor]:
    """The call with each edit applied at the stage it names, entry by entry."""

    def change(stage: str, value: Tensor) -> Tensor:
        for edit in edits:
            if edit.stage == stage and edit.selector.matches(call.site):
                value = naive_edit(edit, value, call)
        return value

    return attend(call, change, causal=causal)


def naive_edit(edit: Edit, value: Tensor, call: AttentionCall) -> Tensor:
    """One edit, one entry at a time, float64."""
    if edit.stage == "bias":
        value = value.expand(call.q.shape[0], call.q.shape[1], call.queries, call.keys)
    result = value.clone()
    for place in itertools.product(*map(range, value.shape)):
        if not selected(edit.selector, edit.stage, place, value, call):
            continue
        old = value[place]
        if edit.stage in ("bias", "scores") and old == -math.inf and not isinstance(edit.op, Patch):
            continue
        new = naive_op(edit, old, value, place)
        result[place] = new if edit.gate == 1 or new == old else (1 - edit.gate) * old + edit.gate * new
    return result


def naive_op(edit: Edit, old: Tensor, value: Tensor, place: tuple[int, ...]) -> Tensor:
    op = edit.op
    b, h, row, column = place
    if isinstance(op, Scale):
        return old * op.factor
    if isinstance(op, (Add, Bias)):
        return old + (op.amount if isinstance(op.amount, float) else op.amount.expand(value.shape)[place])
    if isinstance(op, Mask):
        return torch.tensor(-math.inf, dtype=torch.float64)
    if isinstance(op, Assign) and isinstance(op.value, str):
        entries = [value[other, h, position, column] for other in range(value.shape[0]) for position in range(value.shape[2])]
        return torch.stack(entries).sum() / len(entries)
    if isinstance(op, Assign):
        return torch.as_tensor(op.value, dtype=torch.float64).expand(value.shape)[place]
    if isinstance(op, Patch):
        assert isinstance(op.source, Tensor)
        return op.source[place]
    assert isinstance(op, Renorm)
    total = sum(float(value[b, h, row, key]) for key in range(value.shape[3]))
    return old / total if total else old


def selected(selector: Selector, stage: str, place: tuple[int, ...], value: Tensor, call: AttentionCall) -> bool:
    """Whether an entry of a stage is one that the selector names."""
    b, h, row, column = place
    site = call.site
    shared = site.query_heads // site.kv_heads
    heads = set(range(h * shared, (h + 1) * shared)) if stage in ("k", "v") else {h}
    if selector.heads is not None and not heads <= set(selector.heads):
        return False
    if selector.kv_groups is not None and min(heads) // shared not in selector.kv_groups:
        return False
    if selector.steps is not None and not (isinstance(selector.steps, tuple) and call.step in selector.steps):
        return False
    samples = call.q.shape[0] // site.fold
    sample = b // site.fold
    if selector.samples is not None and sample not in selector.samples:
        return False
    if selector.branch is not None and (sample < samples // 2) != (selector.branch == "uncond"):
        return False
    axes = {"k": [("keys", row)], "v": [("keys", row)], "z": [("queries", row)], "o": [("queries", row)], "q": [("queries", row)]}
    for axis, index in axes.get(stage, [("queries", row), ("keys", column)]):
        positions = getattr(selector, axis)
        if positions is None:
            continue
        length = call.queries if axis == "queries" else call.keys
        absolute = index + (call.keys - call.queries if axis == "queries" and site.kind == "self" else 0)
        total = absolute - index + length
        if isinstance(positions, Stretch):
            if absolute not in range(total)[slice(positions.start, positions.stop, positions.step)]:
                return False
        elif absolute not in positions and index - length not in positions:
            return False
    return True
