"""Exact rows of the pattern for chosen queries, or a whole map.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, R rows asked for.

The frame of the forward pass says what a row weighs, so every piece can be written as soon as it is computed, once, in lines along
the keys. A program holds its queries and walks along the keys; what is spent beside the writing is one product for each piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton.common import finish_scores, multiply, read_block, read_tile, widen


@triton.jit
def rows_kernel(
    q, k, first, stop, positions, scales, bias, mask, key_bias, frame_max, frame_weight, output,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, key_bias_b, key_bias_h, key_bias_k,
    heads, shared, n_rows, n_queries, n_keys, width, span, softcap,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, EVEN_D: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS of the rows asked for and `span` blocks of KEYS keys. Written: output [B, H, R, K], contiguous, in full."""
    tiles = tl.cdiv(n_rows, ROWS)
    pieces = tl.cdiv(tl.cdiv(n_keys, KEYS), span)
    piece = tl.program_id(0) % pieces
    tile = tl.program_id(0) // pieces % tiles
    entry = (tl.program_id(0) // pieces // tiles).to(tl.int64)
    batch, head = entry // heads, entry % heads
    group = head // shared
    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < n_rows
    query = tl.where(there, tl.load(positions + row, mask=there, other=0), n_queries)
    begin = tl.load(first + query, mask=there, other=0)
    end = tl.load(stop + query, mask=there, other=0)
    highest = tl.load(frame_max + entry * n_rows + row, mask=there, other=float("inf"))
    weight = tl.load(frame_weight + entry * n_rows + row, mask=there, other=0.0)
    first_key = tl.min(tl.where(there, begin, n_keys))
    last_key = tl.max(end)
    q_tile = read_tile(q + batch * q_b + head * q_h, query, tl.arange(0, D), q_n, q_d, n_queries, width, False, EVEN_D, True)
    factor = tl.load(scales + head)
    unit = tl.load(scales + heads + head)
    if softcap is None and bias is None and key_bias is None:
        q_tile = (q_tile * factor).to(q_tile.dtype)
    k += batch * k_b + group * k_h
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    if mask is not None:
        mask += batch * mask_b + head * mask_h
    if key_bias is not None:
        key_bias += batch * key_bias_b + head * key_bias_h
    from_key, to_key = piece * span * KEYS, tl.minimum((piece + 1) * span * KEYS, n_keys)
    seen_from = tl.minimum(tl.maximum(first_key // KEYS * KEYS, from_key), to_key)
    seen_to = tl.maximum(tl.minimum(tl.cdiv(last_key, KEYS) * KEYS, to_key), seen_from)
    output += (entry * n_rows + tile * ROWS) * n_keys
    key = tl.arange(0, KEYS)
    lines = widen(tl.arange(0, ROWS), WIDE)[:, None] * n_keys + key[None, :]
    for start in tl.range(seen_from, seen_to, KEYS):
        k_tile = read_block(k, start, k_n, k_d, n_keys, width, KEYS, D, False, EVEN_D, WIDE)
        raw = multiply(q_tile, tl.trans(k_tile), INTERPRETED)
        x = finish_scores(
            raw, piece * 0, query[:, None], start, key[None, :], begin[:, None], end[:, None], n_queries, n_keys, factor, softcap,
            bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, True, True,
        )  # fmt: skip
        p = tl.exp2(x * unit - highest[:, None]) * weight[:, None]
        tl.store(output + start + lines, p, mask=there[:, None] & (start + key < n_keys)[None, :])
    gap = tl.cdiv(seen_to - seen_from, KEYS) * KEYS
    unseen = tl.zeros([ROWS, KEYS], tl.float32) * weight[:, None]  # 0, and NaN in a row of NaN
    for place in tl.range(from_key, to_key - gap, KEYS):
        start = tl.where(place < seen_from, place, place + gap)
        tl.store(output + start + lines, unseen, mask=there[:, None] & (start + key < n_keys)[None, :])
