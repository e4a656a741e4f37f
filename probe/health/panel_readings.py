"""Readings of rows that see keys in no simple way: the pattern itself, some rows at a time.

Letters: H query heads, K keys, n rows that count, P rows of one panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels import reference
from headscope.kernels.spectrum import bracket
from headscope.probe.call import AttentionCall
from headscope.probe.health.readings import Readings, undefined_like
from headscope.probe.health.visibility import HIDDEN, Terms, same_tokens

_CELLS = 1 << 20  # scores of one panel

Panel = tuple[Tensor, Tensor | None, Tensor]  # pattern and scores [H, P, K], and which of it may be seen


@dataclass(frozen=True, eq=False)
class Source:
    """The rows of one sample's pattern, a few at a time.

    Attributes:
        rows: [n], the query positions that count.
        heads, keys: H and K.
        read: some of those rows -> the panel.
        exact: in which precision it is worked on.
    """

    rows: Tensor
    heads: int
    keys: int
    read: Callable[[Tensor], Panel]
    exact: torch.dtype

    def panels(self) -> Iterator[Panel]:
        """All rows in order; patterns with rows that sum to 1, or are 0 where nothing is seen."""
        height = max(8, _CELLS // max(1, self.heads * self.keys))
        for start in range(0, len(self.rows), height):
            rows = self.rows[start : start + height]
            p, scores, seen = self.read(rows)
            p = p.masked_fill(~seen, 0.0)
            total = p.sum(dim=-1, keepdim=True)
            yield p / total.masked_fill(total == 0, 1.0), scores, seen

    def forth(self, x: Tensor) -> Tensor:
        """P x, x [1, H, K, F] -> [1, H, n, F]."""
        return torch.cat([p @ x[0].to(p.dtype) for p, _, _ in self.panels()], dim=1)[None]

    def back(self, u: Tensor) -> Tensor:
        """Pᵀu, u [1, H, n, F] -> [1, H, K, F]."""
        total, start = u.new_zeros(self.heads, self.keys, u.shape[3]), 0
        for p, _, _ in self.panels():
            total += p.mT @ u[0, :, start : start + p.shape[1]].to(p.dtype)
            start += p.shape[1]
        return total[None]


def source_of(call: AttentionCall, sample: int, rows: Tensor, terms: Terms) -> Source:
    """Where the rows of a sample's pattern come from: what the model formed, its own code run again, or its queries and keys."""
    exact = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    heads, keys = call.q.shape[1], call.keys
    pattern, scores = call.materialised, call.materialised_scores
    if pattern is None and call.replay is not None:
        pattern, scores = call.replay.pattern(call.q, call.k), call.replay.scores(call.q, call.k)
    if pattern is not None:
        whole, before = pattern.detach()[sample], None if scores is None else scores.detach()[sample]

        def formed(some: Tensor) -> Panel:
            p = whole[:, some].to(exact)
            if before is None:
                return p, None, p > 0
            s = before[:, some].to(exact)
            return p, s, (s > HIDDEN) | s.isnan()

        return Source(rows, heads, keys, formed, exact)
    q, k = call.q.detach()[sample : sample + 1].to(exact), call.k.detach()[sample : sample + 1].to(exact)
    mask, bias, over_keys = (
        None if x is None else x.detach()[sample if x.shape[0] > 1 else 0][None] for x in (terms.mask, terms.bias, terms.key_bias)
    )

    def made(some: Tensor) -> Panel:
        cut = (None if x is None else x if x.shape[2] == 1 else x[:, :, some] for x in (mask, bias))
        own_mask, own_bias = cut
        s = reference.scores(q[:, :, some], k, scale=call.scale, softcap=call.softcap, bias=own_bias, mask=own_mask)[0]
        if over_keys is not None:
            s = s + over_keys[0][:, None].to(exact)
        if call.is_causal:
            s = s.masked_fill(torch.arange(keys, device=s.device) > some[:, None], -torch.inf)
        seen = (s > HIDDEN) | s.isnan()
        return reference.pattern(s[None])[0], s, seen

    return Source(rows, heads, keys, made, exact)


def read_source(call: AttentionCall, sample: int, source: Source, steps: int, seed: int) -> Readings:
    """The readings of one sample from its rows."""
    numbers: dict[str, list[Tensor]] = {}
    shape = (source.heads, source.keys)
    received, directions = (torch.zeros(shape, dtype=torch.float64, device=call.q.device) for _ in range(2))
    seen_by = torch.zeros(shape, dtype=torch.int64, device=call.q.device)
    place = torch.arange(source.keys, device=call.q.device)
    start, later, plain = 0, False, True
    for p, scores, seen in source.panels():
        rows = source.rows[start : start + p.shape[1]]
        start += p.shape[1]
        at = rows if same_tokens(call) or call.is_causal else _last(seen)
        plain = plain and at is not None
        squares = p.square().sum(dim=-1)
        panel = {
            "visible": seen.sum(dim=-1),
            "entropy": torch.special.entr(p).sum(dim=-1),
            "p_max": p.amax(dim=-1),
            "squares": squares,
        }
        panel |= _of_scores(scores, seen, panel["visible"])
        if call.site.kind != "cross" and at is not None:
            later = later or bool((seen & (place > at[:, None])).any())
            panel["distance"] = torch.einsum("hpk,pk->hp", p, (at[:, None] - place).abs().to(p.dtype))
            for name, back in (("own", 0), ("previous", 1)):
                key = (at - back).clamp(0, source.keys - 1)
                there = (at >= back) & seen.expand_as(p).gather(-1, key[None, :, None].expand(len(p), -1, 1))[..., 0]
                panel[name] = p.gather(-1, key[None, :, None].expand(len(p), -1, 1))[..., 0].masked_fill(~there, torch.nan)
        if call.site.sinks and call.materialised is not None:
            panel["beyond"] = 1 - call.materialised.detach()[sample][:, rows].to(p.dtype).sum(dim=-1)
        elif call.sink is not None and scores is not None:
            lse = scores.masked_fill(~seen, -torch.inf).logsumexp(dim=-1)
            panel["beyond"] = torch.sigmoid(call.sink[:, None].to(lse.dtype) - lse)
        for name, value in panel.items():
            numbers.setdefault(name, []).append(value)
        received += p.sum(dim=1)
        directions += (p * squares.rsqrt().masked_fill(squares == 0, 0.0)[..., None]).sum(dim=1)
        seen_by += seen.sum(dim=1)
    joined = {name: torch.cat(parts, dim=-1)[None] for name, parts in numbers.items()}
    alive = joined["visible"] > 0
    real = {name: value.double() for name, value in joined.items() if name != "visible"}
    ordered = plain and call.site.kind != "cross"
    distance = undefined_like(received[None, :, 0])
    if ordered:
        distance = real["distance"].masked_fill(~alive, 0.0).sum(dim=-1) / alive.sum(dim=-1)
    nothing = undefined_like(real["entropy"])
    total = real["squares"].sum(dim=-1)
    return Readings(
        samples=(sample,),
        rows=source.rows,
        keys=place,
        alive=alive,
        visible=joined["visible"],
        entropy=real["entropy"],
        p_max=real["p_max"],
        squares=real["squares"],
        max_score=real.get("max_score", nothing),
        variance=real.get("variance", nothing),
        own=real["own"] if ordered else nothing,
        previous=real["previous"] if ordered else nothing,
        distance=distance,
        received=received[None],
        seen_by=seen_by[None],
        directions=directions[None],
        beyond=real.get("beyond"),
        causal=ordered and not later,
        square=same_tokens(call),
        spectrum=bracket(source.forth, source.back, received[None], total, len(source.rows), steps, seed=seed),
    )


def _last(seen: Tensor) -> Tensor | None:
    """[P], the last key each row sees, where that is another one for each row: behind a cache a row stands there."""
    last = seen.any(dim=0).long().cumsum(dim=-1).argmax(dim=-1)
    return last if bool((last.diff() > 0).all()) else None


def _of_scores(scores: Tensor | None, seen: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """The largest visible score of each row, and their variance."""
    if scores is None:
        return {}
    count = visible.clamp_min(1)
    clean = scores.masked_fill(~seen, 0.0)
    mean = clean.sum(dim=-1) / count
    apart = (clean - mean[..., None]).masked_fill(~seen, 0.0)
    return {"max_score": scores.masked_fill(~seen, -torch.inf).amax(dim=-1), "variance": apart.square().sum(dim=-1) / count}
