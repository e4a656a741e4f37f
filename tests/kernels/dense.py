"""Attention and its statistics as a textbook would compute them: NumPy, float64, one head after another, the whole pattern held.

It shares no code with the kernels it judges. Which query sees which key is decided pair by pair in plain Python.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, F features,
R rows asked for, t side of a tile or number of top keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Array = np.ndarray


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    *,
    scale: float | None = None,
    causal: bool = False,
    offset: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    top: int = 0,
    pooled: int | None = None,
) -> tuple[Array | None, dict[str, Array]]:
    """The output [B, H, Q, V] (None without v) and every statistic by name, in float64 and int64.

    Args: as `headscope.kernels.attention.attention`. Beside the statistics the answer holds `scores` and `pattern`, [B, H, Q, K].
    """
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if scale is None:
        scale = 1 / np.sqrt(width) if width else 1.0
    seen = visible(queries, keys, causal, offset, window, lengths, key_lengths)
    q_, k_, v_ = numbers(q), numbers(k), None if v is None else numbers(v)
    bias_ = None if bias is None else np.broadcast_to(numbers(bias), (batch, heads, queries, keys))
    mask_ = None if mask is None else np.broadcast_to(mask.numpy(), (batch, heads, queries, keys))
    key_bias_ = None if key_bias is None else np.broadcast_to(numbers(key_bias), (batch, heads, keys))

    scores = np.full((batch, heads, queries, keys), -np.inf)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            s = q_[b, h] @ k_[b, g].T * scale
            if temperature is not None:
                s = s / numbers(temperature)[h]
            if softcap is not None:
                s = softcap * np.tanh(s / softcap)
            if bias_ is not None:
                s = s + bias_[b, h]
            if key_bias_ is not None:
                s = s + key_bias_[b, h][None, :]
            allowed = seen if mask_ is None else seen & mask_[b, h]
            scores[b, h] = np.where(allowed, s, -np.inf)

    sinks = np.full(heads, -np.inf) if sink is None else numbers(sink)
    pattern = np.zeros_like(scores)
    found: dict[str, Array] = {name: np.zeros((batch, heads, queries)) for name in ("lse", "entropy", "p_max", "max_score", "sum_squares")}
    found["argmax"] = np.zeros((batch, heads, queries), dtype=np.int64)
    found["top_keys"] = np.full((batch, heads, queries, top), -1)
    found["top_weights"] = np.zeros((batch, heads, queries, top))
    for place in np.ndindex(batch, heads, queries):
        row = one_row(scores[place], float(sinks[place[1]]), top)
        pattern[place] = row.pop("pattern")
        for name, value in row.items():
            found[name][place] = value

    found["received"] = pattern.sum(axis=2)
    found["scores"], found["pattern"] = scores, pattern
    if pooled is not None:
        found["pooled"] = tile_mass(pattern, pooled)
    if rows is not None:
        found["rows"] = np.stack([pattern[:, :, row] for row in rows], axis=2) if len(rows) else pattern[:, :, :0]
    if features is not None:
        features_ = np.broadcast_to(numbers(features), (batch, heads, keys, features.shape[-1]))
        found["moments"] = np.zeros((batch, heads, queries, features.shape[-1]))
        for b, h in np.ndindex(batch, heads):
            found["moments"][b, h] = pattern[b, h] @ features_[b, h]
    if not top:
        del found["top_keys"], found["top_weights"]
    if v_ is None:
        return None, found
    output = np.zeros((batch, heads, queries, v_.shape[3]))
    for b, h in np.ndindex(batch, heads):
        output[b, h] = pattern[b, h] @ v_[b, h // (heads // groups)]
        if gate is not None:
            output[b, h] *= numbers(gate)[h]
    return output, found


def visible(
    queries: int,
    keys: int,
    causal: bool = False,
    offset: int | None = None,
    window: int | None = None,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
) -> Array:
    """[Q, K], bool: may this query see this key, as far as causality, window and packing go?"""
    own_queries = [queries] if lengths is None else list(lengths)
    own_keys = [keys] if lengths is None else list(lengths if key_lengths is None else key_lengths)
    seen = np.zeros((queries, keys), dtype=bool)
    query_start = key_start = 0
    for n_queries, n_keys in zip(own_queries, own_keys, strict=True):
        ahead = n_keys - n_queries if offset is None else offset  # the last query stands at the last key
        for i in range(n_queries):
            for j in range(n_keys):
                behind = i + ahead - j  # how far the key lies behind the query's own place
                hidden = (causal and behind < 0) or (window is not None and abs(behind) >= window)
                seen[query_start + i, key_start + j] = not hidden
        query_start += n_queries
        key_start += n_keys
    return seen


def one_row(scores: Array, sink: float, top: int) -> dict[str, Array | float | int]:
    """The pattern [K] of one query from its scores [K], and the numbers about it. A sink of -inf is none."""
    keys = len(scores)
    dead = {"pattern": np.zeros(keys), "lse": -np.inf, "entropy": 0.0, "p_max": 0.0, "argmax": -1, "max_score": -np.inf, "sum_squares": 0.0}
    top_keys, top_weights = np.full(top, -1), np.zeros(top)
    if not np.any(scores != -np.inf):  # also where there are no keys; NaN is not -inf
        return {**dead, "top_keys": top_keys, "top_weights": top_weights}
    if np.isnan(scores).any() or np.isposinf(scores).any():
        lost = dict.fromkeys(("lse", "entropy", "p_max", "max_score", "sum_squares"), np.nan)
        return {"pattern": np.full(keys, np.nan), "argmax": -1, "top_keys": top_keys, "top_weights": np.full(top, np.nan), **lost}
    highest = scores.max()
    exponentials = np.exp(scores - highest)
    real = exponentials.sum()
    alone = exponentials / real
    # exp(sink - highest) may overflow: then the sink takes everything.
    with np.errstate(over="ignore"):
        pattern = exponentials / (real + np.exp(sink - highest))
    positive = alone[alone > 0]
    order = sorted(np.flatnonzero(scores != -np.inf), key=lambda key: (-scores[key], key))[:top]
    top_keys[: len(order)] = order
    top_weights[: len(order)] = pattern[order]
    return {
        "pattern": pattern,
        "lse": highest + np.log(real),
        "entropy": -np.sum(positive * np.log(positive)),
        "p_max": pattern.max(),
        "argmax": min(np.flatnonzero(scores == highest)),
        "max_score": highest,
        "sum_squares": np.sum(alone**2),
        "top_keys": top_keys,
        "top_weights": top_weights,
    }


def tile_mass(pattern: Array, tile: int) -> Array:
    """[B, H, ceil(Q/t), ceil(K/t)]: the sum of the pattern in each tile."""
    batch, heads, queries, keys = pattern.shape
    mass = np.zeros((batch, heads, -(-queries // tile), -(-keys // tile)))
    for place in np.ndindex(mass.shape[2:]):
        down, across = place
        part = pattern[:, :, down * tile : (down + 1) * tile, across * tile : (across + 1) * tile]
        mass[:, :, down, across] = part.sum(axis=(2, 3))
    return mass


def numbers(tensor: torch.Tensor) -> Array:
    """The same numbers in float64."""
    return tensor.detach().to(torch.float64).cpu().numpy()
