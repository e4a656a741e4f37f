"""Rows of attention patterns, some at a time, with what a score needs to know beside them.

Letters: B samples, H query heads, Q queries, K keys, R query rows at a time, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headscope.probe.call import AttentionSite
from headscope.probe.record import Record, Terms

CELLS = 1 << 21  # of a pattern that are held at once


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Some rows of one site's pattern.

    Attributes:
        site: where.
        example: number of the first sample among all that are looked at; a windowed site counts its windows.
        queries: [R], int64, which rows.
        pattern: [B, H, R, K].
        visible: [B or 1, H or 1, R, K], bool, the keys that each row may see.
        counted: [B or 1, R], bool, the rows that count: not padding, not special tokens.
        tokens: [B, S], the token ids; None where the model reads none, or the site does not attend to them one by one.
        square: queries and keys are the same positions, so that "the token before" means something.
        image: positions after the first few are the patches of an image.
    """

    site: AttentionSite
    example: int
    queries: Tensor
    pattern: Tensor
    visible: Tensor
    counted: Tensor
    tokens: Tensor | None
    square: bool
    image: bool = False

    def at(self, keys: Tensor) -> Tensor:
        """[B, H, R], the probability that each row gives to one key; NaN where there is no such key, or it may not be seen.

        Args:
            keys: [R] or [B, R], int64; negative where a row has none.
        """
        wide = self.pattern.shape[-1]
        there = (keys >= 0) & (keys < wide)
        place = torch.where(there, keys, 0).expand(self.pattern.shape[0], -1)[:, None, :, None]  # [B, 1, R, 1]
        found = self.pattern.gather(-1, place.expand(*self.pattern.shape[:3], 1))[..., 0]
        seen = self.visible.expand(place.shape[0], *self.visible.shape[1:])
        seen = seen.gather(-1, place.expand(*seen.shape[:3], 1))[..., 0]
        return found.masked_fill(~(seen & there.expand(place.shape[0], -1)[:, None]), torch.nan)

    def uniform(self) -> AttentionRows:
        """The same rows with attention spread evenly over what each may see: the baseline of its own mask, causal or not.

        Its pattern is [B, H or 1, R, K]: one head stands for all where all have one mask.
        """
        even = self.visible.to(self.pattern.dtype) / self.visible.sum(-1, keepdim=True).clamp_min(1)
        return replace(self, pattern=even.expand(self.pattern.shape[0], *even.shape[1:]))

    def alive(self, keys: int = 1) -> Tensor:
        """[B or 1, H or 1, R], bool: rows that count and see so many keys or more."""
        return (self.visible.sum(-1) >= keys) & self.counted[:, None]


def stream_rows(
    record: Record,
    counted: Tensor | None = None,
    tokens: Tensor | None = None,
    *,
    example: int = 0,
    image: bool = False,
    cells: int = CELLS,
) -> Iterator[AttentionRows]:
    """All rows of a captured call, in panels. Only where the model's own code has to be run again is its map held whole, one site's.

    Args:
        record: of a capture with `Keep()`.
        counted: [B, S], bool, the rows that count; None for all.
        tokens: [B, S], the token ids.
        example, image: as in `AttentionRows`.
        cells: how many numbers of the pattern are held at once.
    """
    site = record.site
    whole = None if record.replay is None and record.has("q") else record.pattern(None, None)  # [B, H, Q, K]
    if whole is not None:
        batch, heads, queries, keys = whole.shape
        seen = _seen_by_replay(record, whole)
    else:
        terms = _terms(record)
        batch, heads, queries, keys = *terms.q.shape[:3], terms.k.shape[2]
        blank = _blank(terms)
    square = queries == keys and site.kind != "cross"
    own = tokens if tokens is not None and square and tokens.shape == (batch, queries) else None
    kept = counted if counted is not None and counted.shape == (batch, queries) else None
    height = max(1, min(queries, cells // max(1, batch * heads * keys)))
    for start in range(0, queries, height):
        rows = list(range(start, min(queries, start + height)))
        if whole is not None:
            pattern, visible = whole[:, :, start : start + height], seen[:, :, start : start + height]
        else:
            pattern, visible = terms.rows(rows), blank.rows(rows) > 0
        every = torch.ones(1, len(rows), dtype=torch.bool, device=pattern.device)
        yield AttentionRows(
            site, example, torch.tensor(rows, device=pattern.device), pattern, visible,
            every if kept is None else kept[:, rows].to(pattern.device), None if own is None else own.to(pattern.device), square, image,
        )  # fmt: skip


def _terms(record: Record) -> Terms:
    mask, bias, sink = (record.get(name) if record.has(name) else None for name in ("mask", "bias", "sink"))
    return Terms(record.get("q"), record.get("k"), record.scale, bias, mask, record.is_causal, record.softcap, sink)


def _seen_by_replay(record: Record, whole: Tensor) -> Tensor:
    """[B, H, Q, K], bool. Where queries are zero, every key that may be seen gets a share; an edited map tells only by its zeros."""
    if record.replay is None:
        return whole > 0
    return record.replay.pattern(torch.zeros_like(record.get("q")), record.get("k")) > 0


def _blank(terms: Terms) -> Terms:
    """The same masks with queries of zero, over one head and one sample where all have the same mask. A bias counts as a mask if -inf."""
    extras = [extra for extra in (terms.mask, terms.bias) if extra is not None]
    heads = slice(None) if any(extra.shape[1] > 1 for extra in extras) else slice(0, 1)
    batch = slice(None) if any(extra.shape[0] > 1 for extra in extras) else slice(0, 1)
    bias = None if terms.bias is None else terms.bias.masked_fill(terms.bias > torch.finfo(terms.bias.dtype).min / 2, 0.0)
    keys = terms.k[batch, heads] if heads.stop == 1 else terms.k[batch]
    return Terms(torch.zeros_like(terms.q[batch, heads]), keys, 1.0, bias, terms.mask, terms.is_causal, None, None)
