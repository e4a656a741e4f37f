"""A whole pattern by query panels: the same numbers as `reference`, without the temporaries of a dense softmax.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, P queries of one panel.

A panel of scores stays in the processor's cache, a causal panel looks only at the keys it can see, and nothing of the size of
the map is held beside the map itself. Not differentiable in place: where gradients are wanted, use `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.kernels.reference import check_call, check_sink, finish_scores, repeat_heads

_CELLS = 1 << 18  # scores worked on at once on a CPU: about a mebibyte in float32


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
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    check_sink(sink, heads, q.device)
    # Merged [B·H, ·, ·], which matmul takes without a further copy.
    columns = repeat_heads(k, heads).reshape(batch * heads, keys, width).transpose(1, 2)
    rows = (q * scale).reshape(batch * heads, queries, width)
    result = q.new_empty(batch, heads, queries, keys)
    flat = result.view(batch * heads, queries, keys)
    on_cpu = q.device.type == "cpu"
    panel = max(16, min(256, _CELLS // max(1, keys))) if on_cpu else max(1, queries)
    plain = on_cpu and bias is None and mask is None and softcap is None and sink is None
    for start in range(0, queries, panel):
        stop = min(start + panel, queries)
        seen = min(stop, keys) if is_causal else keys
        positions = torch.arange(start, stop, device=q.device)
        if plain:  # one head at a time: its panel is written where it belongs
            hidden = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device).triu(start + 1) if is_causal else None
            for one in range(batch * heads):
                scores = torch.mm(rows[one, start:stop], columns[one, :, :seen])
                if hidden is not None:
                    scores.masked_fill_(hidden, float("-inf"))
                flat[one, start:stop, :seen] = scores.softmax(-1)
        else:
            scores = torch.bmm(rows[:, start:stop], columns[:, :, :seen]).view(batch, heads, stop - start, seen)
            cut = [_cut(extra, start, stop, seen) for extra in (bias, mask)]
            scores = finish_scores(scores, positions, bias=cut[0], mask=cut[1], is_causal=is_causal, softcap=softcap)
            result[:, :, start:stop, :seen] = _softmax(scores, sink)
        flat[:, start:stop, seen:] = 0
    return result


def _cut(extra: Tensor | None, start: int, stop: int, seen: int) -> Tensor | None:
    """Rows and keys of one panel of something that broadcasts to [B, H, Q, K]."""
    if extra is None:
        return None
    extra = extra.reshape((1,) * (4 - extra.ndim) + tuple(extra.shape))
    extra = extra if extra.shape[2] == 1 else extra[:, :, start:stop]
    return extra if extra.shape[3] == 1 else extra[..., :seen]


def _softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    dead = torch.isneginf(scores.amax(dim=-1, keepdim=True))
    if sink is None:
        found = scores.softmax(-1)
    else:
        column = sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        found = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return found.masked_fill_(dead, 0.0) if bool(dead.any()) else found
