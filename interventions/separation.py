"""TS-Attn (arXiv 2604.19473): each event of a prompt to the frames in which it is to happen, by a bias that reads the scores themselves.

Letters: B samples, H heads, Q queries, K keys, F frames, n image tokens (F·Y·X), E keys of all events.

With a row s of scores (scaled, and masked where the model masks), over the text keys that may be seen,

    B⁺ = max s - mean s        r⁺ = 1 + ½ (1 - p′)        for keys of the events of the token's frame
    B⁻ = min s - mean s        r⁻ = 1 + ½ p′              for keys of events of other frames
    p  = softmax s             p′ = (p - min p) / (max p - min p)

and s + M · r · B is what the softmax gets; keys of no event stay. M is 1 on tokens of the subject: those whose attention to the
subject's words (mean over heads) is above a threshold, eroded by 3 × 3 in each frame. Every row and key that M or the events leave out
is not computed. Scaling by 1/√d commutes with all of it, so that it does not matter that the paper adds the bias before it.

The paper's released code differs: it uses r⁺ for both signs. Here each sign has its own, as in the formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from headscope.interventions.ops import Op, _number, hidden
from headscope.kernels.errors import EditError, ShapeError
from headscope.probe.call import AttentionCall


@dataclass(frozen=True, eq=False)
class Separate(Op):
    """The bias above, of one set of events.

    Attributes:
        keys: [E], where the words of events stand.
        signs: [F, E], 1 where the frame is the event's, -1 where it is another's, 0 where neither.
        grid: (frames, rows, columns) of image tokens.
        subject: keys of the subject's words; None: every image token.
        text: the keys that a row's max, min, mean and p run over; None: all.
        offset: queries that stand before the image.
        threshold: of the subject's map; None: the mean of its larger half, for each sample.
        erosion: side of the square that has to lie in the subject around a token; 1 erodes nothing.
        strength: multiplies the bias.
    """

    keys: Tensor
    signs: Tensor
    grid: tuple[int, ...]
    subject: Tensor | None = None
    text: Tensor | None = None
    offset: int = 0
    threshold: float | None = None
    erosion: int = 3
    strength: float = 1.0
    name: ClassVar[str] = "separate"
    stages: ClassVar[frozenset[str]] = frozenset({"scores"})

    @property
    def identity(self) -> bool:
        return self.strength == 0.0 or not bool(self.signs.any())

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        size = math.prod(self.grid)
        last = max(int(places.max()) for places in (self.keys, self.subject, self.text) if places is not None)
        if self.offset + size > value.shape[2] or last >= value.shape[3]:
            raise ShapeError(
                f"{self} at {call.site.name}: a grid of {'×'.join(map(str, self.grid))} tokens after {self.offset} and key {last}; "
                f"the call has {value.shape[2]} queries and {value.shape[3]} keys"
            )
        rows = value[:, :, self.offset : self.offset + size]  # [B, H, n, K]
        frame = torch.arange(size, device=value.device) // (size // self.grid[0])
        chosen = self.subject_tokens(rows) & self.signs.to(value.device).any(1)[frame]  # [B, n]
        sample, token = chosen.nonzero(as_tuple=True)
        if not len(sample):
            return value
        keys = self.keys.to(value.device)
        found = rows[sample, :, token]  # [m, H, K]: the rows that change, and no other
        change = self._bias(found, keys, self.signs.to(value.device)[frame[token]])
        edited = found.index_add(-1, keys, change)
        return value.index_put((sample[:, None], torch.arange(value.shape[1], device=value.device), self.offset + token[:, None]), edited)

    def subject_tokens(self, rows: Tensor) -> Tensor:
        """Which image tokens are the subject's, [B, n], from their scores [B, H, n, K]."""
        if self.subject is None:
            return torch.ones(rows.shape[0], rows.shape[2], dtype=torch.bool, device=rows.device)
        looked = _softmax(rows)[..., self.subject.to(rows.device)].sum(-1).mean(1)  # [B, n]
        if self.threshold is None:
            limit = looked.sort(dim=1, descending=True).values[:, : -(-looked.shape[1] // 2)].mean(1, keepdim=True)
        else:
            limit = torch.full_like(looked[:, :1], self.threshold)
        inside = (looked > limit).float().reshape(-1, 1, *self.grid[1:])  # [B·F, 1, Y, X]
        if self.erosion > 1:  # what is outside of the picture counts as inside
            inside = -functional.max_pool2d(-inside, self.erosion, stride=1, padding=self.erosion // 2)
        return inside.reshape(looked.shape) > 0.5

    def _bias(self, rows: Tensor, keys: Tensor, signs: Tensor) -> Tensor:
        """[m, H, E] for rows [m, H, K] and signs [m, E]."""
        text = rows if self.text is None else rows[..., self.text.to(rows.device)]
        gone = hidden(text)
        count = (~gone).sum(-1, keepdim=True).clamp_min(1)
        mean = text.masked_fill(gone, 0).sum(-1, keepdim=True) / count
        high = text.masked_fill(gone, -math.inf).amax(-1, keepdim=True) - mean
        low = text.masked_fill(gone, math.inf).amin(-1, keepdim=True) - mean
        p = _softmax(text)
        least, most = p.masked_fill(gone, math.inf).amin(-1, keepdim=True), p.amax(-1, keepdim=True)
        own = _softmax_at(rows, keys, text)
        share = (own - least) / (most - least).masked_fill(most <= least, 1.0)
        toward = (1 + 0.5 * (1 - share)) * high
        away = (1 + 0.5 * share) * low
        sign = signs[:, None].to(rows.dtype)  # [m, 1, E]
        found = torch.where(sign > 0, toward, torch.where(sign < 0, away, torch.zeros_like(away)))
        seen = (~gone).any(-1, keepdim=True) & ~hidden(rows[..., keys])
        return torch.where(seen, self.strength * found, torch.zeros_like(found)).to(rows.dtype)


def separate(
    keys: Tensor, signs: Tensor, grid: Sequence[int], subject: Tensor | None = None, text: Tensor | None = None, offset: int = 0,
    threshold: float | None = None, erosion: int = 3, strength: float = 1.0,
) -> Separate:  # fmt: skip
    """The operation from its numbers, which are checked; `temporal.separate_events` makes them of a prompt's events. See `Separate`.

    Raises:
        EditError: no grid of frames, signs for other frames or keys, an erosion that is even.
    """
    shape = tuple(grid)
    if len(shape) != 3 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in shape):
        raise EditError(f"grid={grid!r}: give (frames, rows, columns) of image tokens, each at least 1")
    for name, places in (("keys", keys), ("subject", subject), ("text", text)):
        if places is None:
            continue
        if not isinstance(places, Tensor) or places.is_floating_point() or places.ndim != 1 or not len(places) or int(places.min()) < 0:
            raise EditError(f"{name}={places!r}: give the positions of its keys, a tensor of ints from 0")
        if len(set(places.tolist())) != len(places):
            raise EditError(f"{name}={places.tolist()}: a key stands there twice")
    if text is not None and not bool(torch.isin(keys, text).all()):
        raise EditError(f"keys={keys.tolist()} of events are not all among the text's keys")
    if signs.shape != (shape[0], len(keys)) or not bool(torch.isin(signs, torch.tensor([-1, 0, 1], dtype=signs.dtype)).all()):
        raise EditError(f"signs {list(signs.shape)}: give [{shape[0]} frames, {len(keys)} keys] of -1, 0 and 1")
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise EditError(f"offset={offset!r}: give how many tokens stand before the grid, 0 or more")
    if isinstance(erosion, bool) or not isinstance(erosion, int) or erosion < 1 or erosion % 2 == 0:
        raise EditError(f"erosion={erosion!r}: give an odd side, 1 for none")
    limit = None if threshold is None else _number("separate", "threshold", threshold)
    return Separate(keys, signs, shape, subject, text, offset, limit, erosion, _number("separate", "strength", strength))


def _softmax(scores: Tensor) -> Tensor:
    """Over the last axis; a row with nothing to see is 0."""
    gone = hidden(scores)
    dead = gone.all(-1, keepdim=True)
    return scores.masked_fill(gone, -math.inf).masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)


def _softmax_at(rows: Tensor, keys: Tensor, text: Tensor) -> Tensor:
    """The softmax over `text` at some keys of the rows, all of which are among the text."""
    gone = hidden(text)
    total = text.masked_fill(gone, -math.inf).logsumexp(-1, keepdim=True)
    some = rows[..., keys]
    return torch.where(hidden(some) | (total == -math.inf), torch.zeros_like(some), (some - total).exp())
