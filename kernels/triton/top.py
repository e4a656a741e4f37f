"""The keys with the largest probabilities of each row.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, t keys asked for.

A score and its key are one whole number: the score in the upper half, in an order that whole numbers share, and in the lower half
what is left to the largest key number, so that of equal scores the lowest key is the largest number. No two are equal, and the t
largest are the same in whatever order they are met.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton.common import finish_scores, multiply, read_block


@triton.jit
def _in_order(bits):
    """Bits of a float32 <-> a whole number that grows as the float does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def top_kernel(
    q, k, first, stop, scales, bias, mask, key_bias, frame_max, frame_weight, top_keys, top_weights,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, key_bias_b, key_bias_h, key_bias_k,
    heads, shared, n_queries, n_keys, width, count, softcap,
    D: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, EVEN_D: tl.constexpr, WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head against all keys they see, T at least `count` of the best kept.

    Written: top_keys and top_weights [B, H, Q, count], largest first.
    """
    tiles = tl.cdiv(n_queries, ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = entry // heads, entry % heads
    group = head // shared
    row_start = tile * ROWS
    row = tl.arange(0, ROWS)
    query = row_start + row
    there = query < n_queries
    begin = tl.load(first + query, mask=there, other=0)
    end = tl.load(stop + query, mask=there, other=0)
    lowest = tl.min(tl.where(there, begin, n_keys)) // KEYS * KEYS
    highest = tl.max(end)
    q_tile = read_block(q + batch * q_b + head * q_h, row_start, q_n, q_d, n_queries, width, ROWS, D, False, EVEN_D, WIDE)
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

    nothing = tl.full([1], -0x8000000000000000, tl.int64)
    least = tl.full([1], -0x7F800001, tl.int64) << 32  # below every number that a score above -inf gives
    slot = tl.arange(0, T)
    best = tl.zeros([ROWS, T], tl.int64) + (nothing + slot)[None, :]  # places are told apart while they are empty too
    for start in tl.range(lowest, highest, KEYS):
        key = tl.arange(0, KEYS)
        k_tile = read_block(k, start, k_n, k_d, n_keys, width, KEYS, D, False, EVEN_D, WIDE)
        raw = multiply(q_tile, tl.trans(k_tile), INTERPRETED)
        x = finish_scores(
            raw, row_start, row[:, None], start, key[None, :], begin[:, None], end[:, None], n_queries, n_keys, factor, softcap,
            bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, True, WIDE,
        )  # fmt: skip
        x = tl.where(x == 0.0, 0.0, x)  # -0 is 0
        ordered = _in_order(x.to(tl.int32, bitcast=True)).to(tl.int64)
        number = (ordered << 32) + (0x7FFFFFFF - start - key).to(tl.int64)[None, :]
        number = tl.where(x == float("-inf"), nothing[None, :], number)
        largest = tl.max(number, 1)
        smallest = tl.min(best, 1)
        while tl.max((largest > smallest).to(tl.int32), 0) > 0:  # as often as the row that gains most has new ones
            taken = largest > smallest
            best = tl.where((best == smallest[:, None]) & taken[:, None], largest[:, None], best)
            number = tl.where(number == largest[:, None], nothing[None, :], number)
            largest = tl.max(number, 1)
            smallest = tl.min(best, 1)

    highest_score = tl.load(frame_max + entry * n_queries + query, mask=there, other=float("inf"))
    weight = tl.load(frame_weight + entry * n_queries + query, mask=there, other=0.0)
    broken = weight != weight
    places = (entry * n_queries + query) * count
    for rank in tl.range(0, count):
        largest = tl.max(best, 1)
        best = tl.where(best == largest[:, None], nothing[None, :], best)
        found = (largest >= least) & (weight == weight)
        score = _in_order((largest >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        p = tl.exp2(tl.where(found, score, 0.0) * unit - tl.where(found, highest_score, 0.0)) * weight
        tl.store(top_keys + places + rank, tl.where(found, 0x7FFFFFFF - (largest & 0xFFFFFFFF), -1), mask=there)
        tl.store(top_weights + places + rank, tl.where(found | broken, p, 0.0), mask=there)
