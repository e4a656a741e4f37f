"""`scaled_dot_product_attention`, under each of its names, as an attention call.

Edits are lowered to the cheapest level: q, k, v and z keep the model's own kernel, an additive bias keeps it with a mask,
and only scores and pattern make this one call write its map out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headscope.kernels import reference
from headscope.kernels.checks import full_rank
from headscope.probe.call import AttentionCall, Extension
from headscope.probe.interception.axes import Atom, Axes
from headscope.probe.interception.candidate import Candidate, Grouping, describe, expand_batch, head_count
from headscope.probe.interception.guard import guarded, refuse_reentrant
from headscope.probe.interception.place import Place, locate
from headscope.probe.interception.session import Session
from headscope.probe.interception.tape import Node

if TYPE_CHECKING:
    from headscope.probe.interception.tracker import Tracker

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Fold:
    """How the tensors of one fused call map to canonical ones.

    Attributes:
        shape: of the query as the model gave it.
        batch, heads: B and H.
        packed: query heads per key head that were folded into the query axis, 1 for none.
    """

    shape: torch.Size
    batch: int
    heads: int
    packed: int = 1

    def query(self, q: Tensor) -> Tensor:
        return q.reshape(self.batch, self.heads, self.shape[-2] // self.packed, q.shape[-1])

    def shared(self, k: Tensor) -> Tensor:
        """k or v: [B, G, K, D], where G is whatever head axis it has."""
        if len(self.shape) >= 4:
            return k.reshape(math.prod(k.shape[:-3]), *k.shape[-3:])
        if len(self.shape) == 3:
            return k.reshape(self.batch, k.shape[0] // self.batch if self.batch else self.heads, *k.shape[-2:])
        return k[None, None]

    def mask(self, mask: Tensor) -> Tensor:
        """Broadcastable to [B, H, Q, K]."""
        if len(self.shape) == 3 and mask.ndim == 3 and mask.shape[0] == self.shape[0]:
            return mask.reshape(self.batch, self.heads, *mask.shape[-2:])
        if self.packed > 1 and mask.ndim == 4 and mask.shape[2] == self.packed:
            return mask.reshape(mask.shape[0], self.heads, 1, mask.shape[-1])
        if mask.ndim > 4:
            lead = self.shape[:-3]
            return mask.expand(*lead, *mask.shape[-3:]).reshape(self.batch, *mask.shape[-3:])
        if len(self.shape) == 3 and mask.ndim == 3:
            return mask[:, None]
        return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))

    def unmask(self, mask: Tensor) -> Tensor:
        """A [B, H, Q, K] mask as the model's own call takes it."""
        if len(self.shape) == 4 and self.packed == 1:
            return mask
        full = mask.expand(self.batch, self.heads, -1, -1)
        return full.reshape(*self.shape[:-1], full.shape[-1])

    def axes(self, width: int) -> tuple[Axes, Grouping]:
        """Atoms of the output, in the model's own layout."""
        batch, head, value = Atom(("b",), self.batch), Atom(("h",), self.heads), Atom(("v",), width)
        query = Atom(("q",), self.shape[-2] // self.packed)
        grouping = Grouping((batch,), (head,), (query,), (), True)
        if len(self.shape) == 2:
            return ((query,), (value,)), Grouping((), (), (query,), (), True)
        if len(self.shape) == 3:
            return ((batch, head), (query,), (value,)), grouping
        lead = tuple((Atom(("b", i), n),) for i, n in enumerate(self.shape[:-3]))
        groups = Grouping(tuple(a for dim in lead for a in dim), (head,), (query,), (), True)
        if self.packed > 1:
            outer, inner = Atom(("h", 0), self.shape[-3]), Atom(("h", 1), self.packed)
            return (*lead, (outer,), (inner, query), (value,)), Grouping(groups.batch, (outer, inner), (query,), (), True)
        return (*lead, (head,), (query,), (value,)), groups


def fold_of(q: Tensor, place: Place, session: Session, fused_heads: int | None) -> Fold:
    """Read batch and heads off the query's shape, the module's head count and, for packed decoding, its caller."""
    shape = q.shape
    if len(shape) == 2:
        return Fold(shape, 1, 1)
    if len(shape) == 3:
        heads = fused_heads or head_count(place.module) or 1
        fused = (
            fused_heads is not None
            or heads > 1
            and shape[0] % heads == 0
            and (session.batch is None or shape[0] != session.batch or heads == session.batch)
        )
        return Fold(shape, shape[0] // heads, heads) if fused else Fold(shape, shape[0], 1)
    batch = math.prod(shape[:-3])
    length = (
        place.frame.f_locals.get("q_length") if place.frame is not None and place.frame.f_code.co_name == "sdpa_attention_forward" else None
    )
    groups = getattr(place.module, "num_key_value_groups", 1)
    if length == 1 and shape[-2] == groups > 1:
        return Fold(shape, batch, shape[-3] * groups, groups)
    return Fold(shape, batch, shape[-3])


def run(tracker: Tracker, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One fused call: shown to the handlers, edited, computed by the model's own kernel wherever that can express it."""
    bound = dict(zip(PARAMETERS, args, strict=False)) | kwargs
    place = locate(tracker.mode.sessions)
    if place is None or not isinstance(bound.get("query"), Tensor):
        return func(*args, **kwargs)
    if bound["query"].is_nested:
        complaint = f"{place.path or 'the model'}: attention over nested tensors, whose rows differ in length: pad them and pass a mask"
        place.session.pending.append(Candidate(place.session, place, place.path, "nested", None, complaint))
        return func(*args, **kwargs)
    query, key, value = bound["query"], bound["key"], bound["value"]
    session = place.session
    fold = fold_of(query, place, session, tracker.fused_heads(query))
    q, k, v = fold.query(query), fold.shared(key), fold.shared(value)
    batch = max(q.shape[0], k.shape[0])
    q, k, v = (expand_batch(x, batch) for x in (q, k, v))
    repeated = tracker.repeats(key)
    if not (repeated > 1 and k.shape[1] == q.shape[1] and k.shape[1] % repeated == 0):
        repeated = 1
    if repeated > 1:
        k, v = k[:, ::repeated], v[:, ::repeated]
    attn_mask: Tensor | None = bound.get("attn_mask")
    causal = bool(bound.get("is_causal", False))
    scale = bound.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    mask = bias = None
    if attn_mask is not None:
        shaped = fold.mask(attn_mask)
        mask, bias = (shaped, None) if shaped.dtype == torch.bool else (None, shaped)
    ordinal = session.claim(place.path)
    name = session.site_name(place.path, ordinal)
    site = session.site(
        name,
        lambda: describe(
            session, place, place.path, ordinal, q, k, v.shape[-1], mechanism="sdpa", causal=causal, bias=attn_mask is not None
        ),
    )
    step = session.next_step(name, place.recomputed)
    call = AttentionCall(site, step, q, k, v, scale, mask, bias, causal, recomputed=place.recomputed)
    stages = session.stages(site)
    if not stages & {"q", "k", "v", "kv", "bias", "scores", "pattern"}:
        result = func(*args, **kwargs)
    else:
        refuse_reentrant(session, place)
        result = _edited(session, call, stages, fold, func, bound, repeated)
    z = fold.query(result)
    if "z" in stages:
        refuse_reentrant(session, place)
        changed = session.change(call, "z", z)
        if changed is not z:
            result, z = changed.to(result.dtype).reshape(result.shape), changed
    call.z = z
    session.finish(call)
    result = guarded(result, session, place, name)
    if site.output_projection is not None and not stages & {"o", "attn_out"}:
        return result
    z_axes, grouping = fold.axes(result.shape[-1])  # on to W_O: to learn which it is, or to edit what it writes
    candidate = Candidate(session, place, place.path, "softmax", grouping, None, call=call.spent(), confirmed=True, stages=stages)
    tracker.track(result, Node("z", z_axes, candidate=candidate))
    return result


def _edited(
    session: Session,
    call: AttentionCall,
    stages: frozenset[str],
    fold: Fold,
    func: Callable[..., Any],
    bound: dict[str, Any],
    repeated: int,
) -> Any:
    """The output of a call whose q, k, v, scores or pattern are edited."""
    q, k, v = call.q, call.k, call.v
    assert v is not None
    if "q" in stages:
        call.q = session.change(call, "q", q)
    if "k" in stages:
        call.k = session.change(call, "k", k)
    if "v" in stages:
        call.v = session.change(call, "v", v)
    for extension in session.extend(call) if "kv" in stages else ():
        _extend(call, extension)
    if "bias" in stages:
        zero = torch.zeros((), dtype=q.dtype, device=q.device)
        added = session.change(call, "bias", zero)
        if added is not zero:
            call.bias = added if call.bias is None else call.bias + added
            if call.bias.ndim < 4:
                call.bias = full_rank(call.bias)
    if stages & {"scores", "pattern"}:
        return dense(session, call, stages, fold, float(bound.get("dropout_p", 0.0)))
    new = dict(bound)
    if call.q is not q:
        new["query"] = call.q.to(q.dtype).reshape(bound["query"].shape)
    for name, old, changed in (("key", k, call.k), ("value", v, call.v)):
        if changed is not old and changed is not None:
            whole = changed.repeat_interleave(repeated, dim=1) if repeated > 1 else changed
            new[name] = whole.to(old.dtype).reshape(*bound[name].shape[:-2], *whole.shape[-2:])
    if call.injected:
        new["is_causal"] = False
        new["attn_mask"] = None if call.mask is None else fold.unmask(call.mask)
    if ("bias" in stages or call.injected) and call.bias is not None:
        joined = call.bias.to(call.q.dtype)
        if call.mask is not None:
            joined = torch.where(call.mask, joined, -math.inf)
        if call.is_causal:
            visible = torch.ones(call.queries, call.keys, dtype=torch.bool, device=q.device).tril()
            joined = torch.where(visible, joined, -math.inf)
            new["is_causal"] = False
        new["attn_mask"] = fold.unmask(joined)
    return func(**new)


def _extend(call: AttentionCall, extension: Extension) -> None:
    """Put keys and values in front of those of the call; its mask, bias and causality go on to mean the same pairs."""
    assert call.v is not None
    extra, queries, keys = extension.k.shape[2], call.queries, call.keys
    visible = extension.visible
    hides = visible is not None and not bool(visible.all())
    if call.is_causal or call.mask is not None or hides:
        own = full_rank(call.mask)
        own = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=call.q.device) if own is None else own
        own = own.tril() if call.is_causal else own
        front = torch.ones(1, extra, dtype=torch.bool, device=call.q.device) if visible is None else visible.to(call.q.device)
        shape = (max(own.shape[0], front.shape[0]), own.shape[1], own.shape[2])
        call.mask = torch.cat([front[:, None, None].expand(*shape, extra), own.expand(*shape, keys)], dim=-1)
        call.is_causal = False
    bias = full_rank(call.bias)
    if bias is not None:
        call.bias = torch.cat([bias.new_zeros(*bias.shape[:3], extra), bias.expand(*bias.shape[:3], keys)], dim=-1)
    call.k = torch.cat([extension.k.to(call.k), call.k], dim=2)
    call.v = torch.cat([extension.v.to(call.v), call.v], dim=2)
    call.injected += extra


def dense(session: Session, call: AttentionCall, stages: frozenset[str], fold: Fold, dropout: float) -> Tensor:
    """The call written out: scores and pattern exist and may be edited. Half precision is computed in float32."""
    assert call.v is not None
    work = torch.float32 if call.q.dtype in (torch.float16, torch.bfloat16) else call.q.dtype
    bias = call.bias.to(work) if call.bias is not None else None
    scores = reference.scores(
        call.q.to(work), call.k.to(work), scale=call.scale, bias=bias, mask=call.mask, is_causal=call.is_causal, softcap=call.softcap
    )
    if "scores" in stages:
        scores = session.change(call, "scores", scores)
    call.rewritten = True
    call.materialised_scores = scores
    pattern = reference.pattern(scores, sink=call.sink)
    if "pattern" in stages:
        pattern = session.change(call, "pattern", pattern)
    call.materialised = pattern
    used = torch.nn.functional.dropout(pattern, dropout) if dropout else pattern
    z = used @ reference.repeat_heads(call.v.to(work), call.q.shape[1])
    return z.to(call.q.dtype).reshape(*fold.shape[:-1], z.shape[-1])
