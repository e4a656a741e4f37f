"""Attention written out in full: the readable twin of every faster kernel, and the path an edit of scores or pattern takes.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.
Everything is differentiable and stays in the dtype it came in; under `torch.autocast` the matrix products follow autocast's
rules, as the model's own would.

The order of the terms is fixed: scale, softcap, bias, then mask, causality and window.
A row in which every score is -inf is dead: its pattern, and so its output, is 0. Only -inf kills a row. A row filled with the
smallest number of a dtype, as some models mask, is uniform, just as in torch's own attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.kernels.checks import check_call, check_sink, shown
from headscope.kernels.errors import ShapeError
from headscope.kernels.problem import Problem, Wanted
from headscope.kernels.statistics import Statistics


def scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """What the softmax sees: scaled dot products with cap, bias and mask applied; -inf where a key may not be seen.

    Args:
        q: [B, H, Q, D].
        k: [B, G, K, D]; query head h uses key head h // (H / G).
        scale: factor on q·k.
        bias: added after the softcap; broadcastable to [B, H, Q, K], taken to the dtype of q.
        mask: bool, True = may be seen; broadcastable to [B, H, Q, K].
        is_causal: query i sees keys 0 to i, counted from the top left as in torch's `is_causal`.
        softcap: c of c·tanh(s / c).
        window: query i sees keys i-w+1 to i, and as many on the other side where not causal.

    Returns:
        [B, H, Q, K], in the dtype of q.

    Raises:
        ShapeError: tensors that do not fit together; the message gives both.
        InputError: a softcap or window that is not positive.
    """
    check_call(q, k, bias=bias, mask=mask, softcap=softcap, window=window)
    k = repeat_heads(k, q.shape[1])  # [B, G, K, D] -> [B, H, K, D]
    products = q @ k.transpose(-2, -1) * scale  # [B, H, Q, K]
    positions = torch.arange(q.shape[2], device=q.device)
    return finish_scores(products, positions, bias=bias, mask=mask, is_causal=is_causal, softcap=softcap, window=window)


def pattern(scores: Tensor, *, sink: Tensor | None = None) -> Tensor:
    """Softmax over the keys; a dead row is 0 everywhere, and passes no gradient.

    Args:
        scores: [B, H, Q, K].
        sink: [H], the score of one more column per head that takes its share and is then dropped, so rows sum to less than 1.

    Returns:
        [B, H, Q, K], in the dtype of the scores.

    Raises:
        ShapeError: scores without four axes, or a sink that is not [H].
    """
    if scores.dim() != 4:
        raise ShapeError(f"scores are {shown(scores)}; give [B, H, Q, K]")
    if not scores.is_floating_point():
        raise ShapeError(f"scores are {scores.dtype}; give floating-point scores")
    check_sink(sink, scores.shape[1], scores.device)
    dead = torch.isneginf(scores).all(dim=-1, keepdim=True)  # [B, H, Q, 1]
    alive = scores.masked_fill(dead, 0.0)  # softmax of -inf only is NaN, and its gradient stays NaN after a mask
    if sink is None:
        return alive.softmax(dim=-1).masked_fill(dead, 0.0)
    column = sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([alive, column], dim=-1).softmax(dim=-1)[..., :-1].masked_fill(dead, 0.0)  # [B, H, Q, K+1] -> K


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One whole attention, with its pattern.

    Args:
        q, k, scale, bias, mask, is_causal, softcap, window: as in `scores`.
        v: [B, G, K, V].
        sink: as in `pattern`.

    Returns:
        z [B, H, Q, V], per head and before the output projection, and the pattern [B, H, Q, K].

    Raises:
        ShapeError, InputError: as `scores` and `pattern`; also where v does not lie beside k.
    """
    check_call(q, k, v=v, sink=sink)
    seen = scores(q, k, scale=scale, bias=bias, mask=mask, is_causal=is_causal, softcap=softcap, window=window)
    weights = pattern(seen, sink=sink)
    return weights @ repeat_heads(v, q.shape[1]), weights


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, G, K, D] -> [B, H, K, D]: each key/value head repeated for the query heads that share it; `x` itself if H = G."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def finish_scores(
    products: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Softcap, bias, mask, causality and window, in this order, on some rows of scaled products.

    Args:
        products: [B, H, P, K], scale · q·k of P queries.
        positions: [P], where these queries stand among all.
        bias, mask: broadcastable to [B, H, P, K], already cut to these queries.
        is_causal, softcap, window: as in `scores`.
    """
    seen = products
    if softcap is not None:
        seen = softcap * torch.tanh(seen / softcap)
    if bias is not None:
        seen = seen + bias.to(seen.dtype)
    if mask is not None:
        seen = seen.masked_fill(~mask, float("-inf"))
    if is_causal or window is not None:
        # How far the key lies behind the query; negative in the future.
        behind = positions[:, None] - torch.arange(products.shape[-1], device=products.device)  # [P, K]
        if is_causal:
            seen = seen.masked_fill(behind < 0, float("-inf"))
        if window is not None:
            seen = seen.masked_fill(behind.abs() >= window, float("-inf"))
    return seen


def run(problem: Problem, wanted: Wanted) -> tuple[Tensor | None, Statistics]:
    """Output and statistics of a whole attention from their definitions, dense, in float64.

    Args:
        problem: what is computed on.
        wanted: what is computed.

    Returns:
        The output [B, H, Q, V] in the dtype of q, and the statistics in float32, float64 for float64 inputs. Differentiable.
    """
    _, heads, queries, keys = problem.shape
    q, k = problem.q.double(), repeat_heads(problem.k.double(), heads)
    seen = q @ k.transpose(-2, -1) * problem.head_scales(torch.float64)[:, None, None]  # [B, H, Q, K]
    if problem.softcap is not None:
        seen = problem.softcap * torch.tanh(seen / problem.softcap)
    if problem.bias is not None:
        seen = seen + problem.bias.double()
    if problem.key_bias is not None:
        seen = seen + problem.key_bias.double()[:, :, None]
    if problem.mask is not None:
        seen = seen.masked_fill(~problem.mask, float("-inf"))
    key = torch.arange(keys, device=q.device)
    seen = seen.masked_fill((key < problem.first[:, None]) | (key >= problem.stop[:, None]), float("-inf"))

    seen = seen.masked_fill(torch.isposinf(seen), torch.nan)  # it has no softmax

    dead = torch.isneginf(seen).all(dim=-1)  # [B, H, Q]
    broken = seen.isnan().any(dim=-1)
    alone = pattern(seen)  # over the real keys
    weights = alone if problem.sink is None else pattern(seen, sink=problem.sink.double())
    found: dict[str, Tensor] = {}
    if keys:
        found["max_score"] = seen.amax(dim=-1)
        found["p_max"] = weights.amax(dim=-1)
        found["argmax"] = seen.argmax(dim=-1).masked_fill(dead | broken, -1)  # the lowest key on a tie
    else:
        nothing = seen.sum(dim=-1)
        found |= {"max_score": nothing - torch.inf, "p_max": nothing, "argmax": nothing.long() - 1}
    found["lse"] = torch.logsumexp(seen.masked_fill(dead[..., None], 0.0), dim=-1).masked_fill(dead, float("-inf"))
    found["entropy"] = _entropy(alone)
    found["sum_squares"] = alone.square().sum(dim=-1)
    found["received"] = weights.sum(dim=-2)
    result = {name: found[name] for name in wanted.names}
    if wanted.tile is not None:
        result["pooled"] = _tile_mass(weights, wanted.tile)
    if problem.features is not None:
        result["moments"] = weights @ problem.features.double()
    if wanted.rows is not None:
        result["rows"] = weights[:, :, list(wanted.rows)]
    if wanted.top:
        result["top_keys"], result["top_weights"] = _top(weights, seen, wanted.top)
    made = {name: value if value.dtype == torch.int64 else value.to(problem.precision) for name, value in result.items()}
    output = None
    if problem.v is not None:
        output = weights @ repeat_heads(problem.v.double(), heads)
        if problem.gate is not None:
            output = output * problem.gate.double()[:, None, None]
        output = output.to(problem.q.dtype)
    return output, Statistics(**made)


def _entropy(p: Tensor) -> Tensor:
    """-Σ p log p; 0 log 0 is 0, and so is its gradient."""
    positive = p.masked_fill(p == 0, 1.0)
    return -(positive * positive.log()).sum(dim=-1)


def _tile_mass(weights: Tensor, tile: int) -> Tensor:
    queries, keys = weights.shape[2:]
    rows, columns = -(-queries // tile), -(-keys // tile)
    full = torch.nn.functional.pad(weights, (0, columns * tile - keys, 0, rows * tile - queries))
    return full.reshape(*weights.shape[:2], rows, tile, columns, tile).sum(dim=(3, 5))


def _top(weights: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keys [B, H, Q, t] and probabilities, largest first; a stable sort leaves the lowest key first on a tie."""
    short = max(0, count - seen.shape[-1])
    order = torch.nn.functional.pad(seen, (0, short), value=-torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :count]
    missing = torch.nn.functional.pad(torch.isneginf(seen), (0, short), value=True).gather(-1, order)
    broken = seen.isnan().any(dim=-1, keepdim=True)
    found = torch.nn.functional.pad(weights, (0, short)).gather(-1, order)
    return order.masked_fill(missing | broken, -1), found.masked_fill(missing & ~broken, 0.0).masked_fill(broken, torch.nan)
