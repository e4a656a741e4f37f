"""The rows of one call's pattern in float64, some at a time, whatever made them.

Letters: B batch, H query heads, Q queries, K keys, R rows of one panel.

Where the pattern follows from q and k, a panel is made from them and nothing of size Q × K is held. Where the model's own code or an edit
wrote the whole pattern, that pattern is held while its rows are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels import reference
from headscope.probe.record import Record

CELLS = 1 << 20  # of one panel


@dataclass(frozen=True, eq=False)
class Panel:
    """Some rows of a pattern.

    Attributes:
        log: [B, H, R, K], log of the probabilities renormalised over the real keys, -inf where a key is not seen; NaN where a probability
            is negative, which only an edit can make.
        share: [B, H, R], what the real keys get in all: 1, less where a sink takes a part, anything for normalisers other than softmax.
        alive: [B, H, R], bool: rows that see a key.
    """

    log: Tensor
    share: Tensor
    alive: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """A pattern to be read row by row.

    Attributes:
        shape: B, H, Q, K.
        device: where its numbers are.
        read: the rows from one query position to another.
    """

    shape: tuple[int, int, int, int]
    device: torch.device
    read: Callable[[int, int], Panel]


def rows_of(record: Record) -> Rows:
    """The rows of a call of which a `Capture` with `Keep()` kept what the pattern follows from."""
    if record.has("pattern") or record.replay is not None:
        pattern = record.pattern(None, None)

        def of_pattern(start: int, stop: int) -> Panel:
            return _normalised(_exact(pattern[:, :, start:stop]))

        batch, heads, queries, keys = pattern.shape
        return Rows((batch, heads, queries, keys), pattern.device, of_pattern)
    q = _exact(record.get("q"))
    k = reference.repeat_heads(_exact(record.get("k")), q.shape[1])
    bias, mask, sink = (record.get(name) if record.has(name) else None for name in ("bias", "mask", "sink"))

    def of_scores(start: int, stop: int) -> Panel:
        products = q[:, :, start:stop] @ k.mT * record.scale
        place = torch.arange(start, stop, device=q.device)
        added, seen = _cut(bias, start, stop), _cut(mask, start, stop)
        scores = reference.finish_scores(
            products, place, bias=added, mask=seen, is_causal=record.is_causal, softcap=record.softcap
        )  # causal from the top left, as torch counts
        return _softmaxed(scores, None if sink is None else _exact(sink))

    return Rows((q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.device, of_scores)


def panels_of(shape: tuple[int, int, int, int]) -> Iterator[tuple[int, int]]:
    """Query positions from and to, so that a panel has few cells."""
    batch, heads, queries, keys = shape
    step = max(1, CELLS // max(1, batch * heads * keys))
    for start in range(0, queries, step):
        yield start, min(start + step, queries)


def _exact(tensor: Tensor) -> Tensor:
    """In float64; in float32 on devices that have no float64."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _cut(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    """The rows of a mask or bias that broadcasts to [B, H, Q, K]."""
    return tensor if tensor is None or tensor.dim() < 2 or tensor.shape[-2] == 1 else tensor[..., start:stop, :]


def _softmaxed(scores: Tensor, sink: Tensor | None) -> Panel:
    lse = scores.logsumexp(dim=-1)  # [B, H, R]
    alive = ~torch.isneginf(lse)
    log = scores - lse.masked_fill(~alive, 0.0)[..., None]
    share = alive.to(scores.dtype) if sink is None else torch.sigmoid(lse - sink[:, None]).masked_fill(~alive, 0.0)
    return Panel(log, share, alive)


def _normalised(pattern: Tensor) -> Panel:
    share = pattern.sum(dim=-1)
    alive = (pattern != 0).any(dim=-1)
    return Panel((pattern / share.masked_fill(~alive, 1.0)[..., None]).log(), share, alive)
