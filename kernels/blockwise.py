"""A whole pattern by query panels: the same numbers as `reference`, without the temporaries of a dense softmax.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, P queries of one panel.

A panel of scores stays in the processor's cache, a causal panel looks only at the keys it can see, and nothing of the size of
the map is held beside the map itself. Not differentiable in place: where gradients are wanted, use `reference`.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from headscope.kernels.reference import check_call, check_sink, full_rank, repeat_heads

_CELLS = 1 << 18  # scores worked on at once on a CPU: about a mebibyte in float32
_ROWS = 64  # queries of one panel: larger ones waste more of the causal triangle


@torch.no_grad()
def pattern(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Softmax probabilities [B, H, Q, K] in the dtype of q; a dead row is 0.

    Args:
        q: [B, H, Q, D].
        k: [B, G, K, D].
        scale, bias, mask, is_causal, softcap: as in `headscope.kernels.reference.scores`.
        sink: as in `headscope.kernels.reference.pattern`.

    Raises:
        ShapeError, InputError: as the reference.
    """
    check_call(q, k, bias=bias, mask=mask, softcap=softcap)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    check_sink(sink, heads, q.device)
    on_cpu = q.device.type == "cpu"
    rows = max(1, min(queries, _ROWS) if on_cpu else queries)
    together = max(1, min(heads, _CELLS // max(1, rows * keys))) if on_cpu else max(1, heads)
    columns = repeat_heads(k, heads).transpose(2, 3)  # [B, H, D, K]
    bias, mask = full_rank(bias), full_rank(mask)
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1) if is_causal else None
    result = q.new_empty(batch, heads, queries, keys)
    scratch = q.new_empty(together * rows * keys)
    for sample, first in product(range(batch), range(0, heads, together)):
        some = slice(first, first + together)
        mine, theirs, out = q[sample, some], columns[sample, some], result[sample, some]
        for start in range(0, queries, rows):
            stop = min(start + rows, queries)
            seen = min(stop, keys) if is_causal else keys
            scores = scratch[: len(mine) * (stop - start) * seen].view(len(mine), stop - start, seen)
            torch.baddbmm(scores, mine[:, start:stop], theirs[:, :, :seen], beta=0, alpha=scale, out=scores)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            if bias is not None:
                scores += _cut(bias, sample, some, start, stop, seen)
            if mask is not None:
                scores.masked_fill_(~_cut(mask, sample, some, start, stop, seen), -math.inf)
            if future is not None and start < seen:  # what lies before the panel is visible to all of it
                scores[..., start:].masked_fill_(future[: stop - start, : seen - start], -math.inf)
            dead = None if bias is None and mask is None else torch.isneginf(scores.amax(-1, keepdim=True))
            if sink is None:
                weights = torch.softmax(scores, -1, out=scores)
            else:
                column = sink[some].to(scores.dtype).view(-1, 1, 1).expand(-1, stop - start, 1)
                weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
            out[:, start:stop, :seen] = weights if dead is None else weights.masked_fill_(dead, 0.0)
            out[:, start:stop, seen:] = 0
    return result


def _cut(extra: Tensor, sample: int, heads: slice, start: int, stop: int, seen: int) -> Tensor:
    """The part of a bias or mask, broadcastable to [B, H, Q, K], that one panel needs: broadcastable to [heads, P, K]."""
    part = extra[sample if extra.shape[0] > 1 else 0]
    part = part[heads] if part.shape[0] > 1 else part
    part = part[:, start:stop] if part.shape[1] > 1 else part
    return part[..., :seen] if part.shape[2] > 1 else part
