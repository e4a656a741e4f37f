"""Which rows of a call count and which keys they see, as far as that can be said without looking at scores.

Letters: B batch, H query heads, Q queries, K keys, n rows that count, m keys that some of them see.

Most masks say one of two things about the real tokens: every query sees every key, or every query sees the keys up to its own. With the
padding left out such a call needs no mask, and everything about it can be computed in O(N).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headscope.kernels.checks import full_rank
from headscope.probe.call import AttentionCall
from headscope.probe.record import compact

HIDDEN = -9000.0  # nats: a score or bias below it hides a key; models write -10000, or the least number of a dtype


@dataclass(frozen=True, eq=False)
class View:
    """Samples of a call whose real tokens see one another in the same simple way.

    Attributes:
        samples: which.
        rows: [n], the query positions that count, ascending.
        keys: [m], the key positions that some of them see, ascending.
        causal: a row sees the keys up to its own position, and its own is among `keys`; else it sees all of `keys`.
    """

    samples: tuple[int, ...]
    rows: Tensor
    keys: Tensor
    causal: bool


@dataclass(frozen=True, eq=False)
class Terms:
    """Mask and bias of a call in their plainest form.

    Attributes:
        mask: bool [B or 1, H or 1, Q or 1, K or 1]; None where nothing is hidden.
        key_bias: [B or 1, H or 1, K or 1], added to the scores of a key.
        bias: [B or 1, H or 1, Q, K or 1], what else is added; None where nothing is.
    """

    mask: Tensor | None
    key_bias: Tensor | None
    bias: Tensor | None


@dataclass(eq=False)
class Views:
    """Views of calls. Layers share their mask, so what was found for one is remembered."""

    _seen: list[tuple[tuple[object, ...], tuple[Tensor | None, ...], list[View] | None]] = field(default_factory=list, repr=False)
    _terms: list[tuple[tuple[object, ...], tuple[Tensor | None, ...], Terms]] = field(default_factory=list, repr=False)

    def terms(self, call: AttentionCall) -> Terms:
        """A bias that only hides becomes a mask, one that is the same for all queries a bias over keys."""
        key = (_identity(call.mask), _identity(call.bias))
        for known, _, found in self._terms:
            if known == key:
                return found
        found = _terms(call)
        self._terms = [*self._terms[-3:], (key, (call.mask, call.bias), found)]
        return found

    def of(self, call: AttentionCall, counted: Tensor | None) -> list[View] | None:
        """All samples of a call in views; None where it has to be looked at row by row.

        Args:
            counted: [B, Q], bool, the queries that count; None for all. Rows that see no key never count.
        """
        terms = self.terms(call)
        mask = terms.mask
        if call.softcap is not None or terms.bias is not None or (mask is not None and mask.shape[1] > 1):
            return None
        shape = (call.q.shape[0], call.queries, call.keys, call.is_causal, call.site.kind == "cross")
        key = (_identity(call.mask), _identity(call.bias), _identity(counted), *shape)
        for known, _, views in self._seen:
            if known == key:
                return views
        found = _views(call, mask, counted)
        self._seen = [*self._seen[-7:], (key, (call.mask, call.bias, counted), found)]
        return found


def same_tokens(call: AttentionCall) -> bool:
    """Whether query i and key i are one token."""
    return call.queries == call.keys and call.site.kind != "cross"


def _identity(tensor: Tensor | None) -> tuple[object, ...] | None:
    """What tells whether two tensors are the same memory; they are held as long as this is used, so that it is not used again."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, None if tensor.is_inference() else tensor._version


def _terms(call: AttentionCall) -> Terms:
    mask = None if call.mask is None else full_rank(compact(call.mask))
    if call.bias is None:
        return Terms(mask, None, None)
    bias = full_rank(compact(call.bias))
    assert bias is not None
    hidden = bias < HIDDEN
    if bool(hidden.any()):
        mask = ~hidden if mask is None else mask & ~hidden
        bias = bias.masked_fill(hidden, 0.0)
    if not bool(bias.any()):
        return Terms(mask, None, None)
    return Terms(mask, bias[:, :, 0], None) if bias.shape[2] == 1 else Terms(mask, None, bias)


def _views(call: AttentionCall, mask: Tensor | None, counted: Tensor | None) -> list[View] | None:
    found: list[View] = []
    for sample in range(call.q.shape[0]):
        if sample and counted is None and (mask is None or mask.shape[0] == 1):
            found[0] = replace(found[0], samples=(*found[0].samples, sample))
            continue
        rows = torch.arange(call.queries, device=call.q.device) if counted is None else counted[sample].nonzero()[:, 0].to(call.q.device)
        own = None if mask is None else mask[sample if mask.shape[0] > 1 else 0, 0]
        view = _view(call, own, rows, sample)
        if view is None:
            return None
        twin = next((i for i, other in enumerate(found) if _alike(view, other)), None)
        if twin is None:
            found.append(view)
        else:
            found[twin] = replace(found[twin], samples=(*found[twin].samples, sample))
    return found


def _alike(a: View, b: View) -> bool:
    return a.causal == b.causal and torch.equal(a.rows, b.rows) and torch.equal(a.keys, b.keys)


def _view(call: AttentionCall, mask: Tensor | None, rows: Tensor, sample: int) -> View | None:
    """One sample, its mask [Q or 1, K or 1]; None where its rows see keys in no simple way."""
    keys = torch.arange(call.keys, device=rows.device)
    if mask is not None and mask.shape[0] == 1:
        keys = keys[mask[0].expand(call.keys)]
        mask = None
    if mask is None and not call.is_causal:
        causal = False
        rows = rows if len(keys) else rows[:0]
    elif mask is None:
        rows = rows[rows >= keys[0]] if len(keys) else rows[:0]
        keys = keys[keys <= rows[-1]] if len(rows) else keys[:0]
        causal = True
    else:
        seen = mask[rows].expand(len(rows), call.keys)
        if call.is_causal:
            seen = seen & (keys <= rows[:, None])
        alive = seen.any(dim=1)
        rows, seen = rows[alive], seen[alive]
        keys = keys[seen.any(dim=0)]
        seen = seen[:, keys]
        causal = not bool(seen.all())
        if causal and not torch.equal(seen, keys <= rows[:, None]):
            return None
    if causal and len(rows) == 1:  # a single row sees all that it sees
        causal = False
    if causal and call.queries < call.keys and not call.is_causal:
        return None  # behind a cache: the queries of the first keys are not there
    if (causal or same_tokens(call)) and not bool(torch.isin(rows, keys).all()):
        return None
    return View((sample,), rows, keys, causal)
