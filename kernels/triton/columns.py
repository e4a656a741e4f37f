"""A second pass, by keys: what each key receives from all queries, and the map of tile masses.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, t side of a tile.

What a row weighs is known only after its last key, so columns need the frame of the forward pass: the pattern is
2^(unit·x - frame_max) · frame_weight. Each program owns some keys of one head and goes over the queries that see them; nothing is
added from two programs, so the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton.common import finish_scores, multiply, read_block


@triton.jit
def _take_queries(
    k_tile, q, start, key_start, first, stop, frame_max, frame_weight, n_queries, n_keys, width, factor, unit, softcap,
    bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, q_n, q_d, pooled, tile_columns, received, mass,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, EVEN_D: tl.constexpr, EDGE: tl.constexpr,
    WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One block of queries: adds to received [KEYS] and to the row of tiles in the making, mass [KEYS / cell, tiles of a block]."""
    query = start + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    q_tile = read_block(q, start, q_n, q_d, n_queries, width, ROWS, D, not EDGE, EVEN_D, WIDE)
    if EDGE:
        there = query < n_queries
        begin = tl.load(first + query, mask=there, other=0)
        end = tl.load(stop + query, mask=there, other=0)
        highest = tl.load(frame_max + query, mask=there, other=float("inf"))
        weight = tl.load(frame_weight + query, mask=there, other=0.0)
    else:
        begin = query
        end = query
        highest = tl.load(frame_max + query)
        weight = tl.load(frame_weight + query)
    raw = multiply(k_tile, tl.trans(q_tile), INTERPRETED)  # [KEYS, ROWS]
    x = finish_scores(
        raw, start, tl.arange(0, ROWS)[None, :], key_start, key[:, None], begin[None, :], end[None, :], n_queries, n_keys, factor, softcap,
        bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, EDGE, WIDE,
    )  # fmt: skip
    p = tl.exp2(x * unit - highest[None, :]) * weight[None, :]
    if TILE == 0:
        received += tl.sum(p, 1)
    else:
        CELL: tl.constexpr = TILE if TILE < KEYS else KEYS
        if TILE >= ROWS:
            part = tl.sum(p, 1)
            received += part
            mass += tl.sum(tl.reshape(part, [KEYS // CELL, CELL]), 1)[:, None]
        else:
            parts = tl.sum(tl.reshape(p, [KEYS, ROWS // TILE, TILE]), 2)  # [KEYS, tiles]
            received += tl.sum(parts, 1)
            mass += tl.sum(tl.reshape(parts, [KEYS // CELL, CELL, ROWS // TILE]), 1)
        DOWN: tl.constexpr = ROWS // TILE if TILE < ROWS else 1
        complete = (start + ROWS) % TILE == 0  # the row of tiles ends with this block
        tile_row = start // TILE + tl.arange(0, DOWN)
        column = key_start // CELL + tl.arange(0, KEYS // CELL)
        inside = (tile_row[None, :] * TILE < n_queries) & (column[:, None] < tile_columns)
        places = pooled + tile_row.to(tl.int64)[None, :] * tile_columns + column[:, None]
        tl.store(places, mass, mask=inside & complete)
        mass = tl.where(complete, 0.0, mass)
    return received, mass


@triton.jit
def columns_kernel(
    q, k, first, stop, first_query, stop_query, scales, bias, mask, key_bias, frame_max, frame_weight, received, pooled,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, key_bias_b, key_bias_h, key_bias_k,
    heads, shared, n_queries, n_keys, width, tile_rows, tile_columns, softcap,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, EVEN_D: tl.constexpr, WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: KEYS keys of one head against all queries that see them.

    Written: received [B, H, K], and for TILE, a power of two, the masses of cells of TILE queries and min(TILE, KEYS) keys,
    pooled [B, H, tile_rows, tile_columns], where something is seen; elsewhere they stay as they are.
    """
    blocks = tl.cdiv(n_keys, KEYS)
    block = tl.program_id(0) % blocks  # where causal, the first keys are seen by most queries
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = entry // heads, entry % heads
    group = head // shared
    key_start = block * KEYS
    key = key_start + tl.arange(0, KEYS)
    there = key < n_keys
    begin = tl.load(first_query + key, mask=there, other=0)
    end = tl.load(stop_query + key, mask=there, other=0)
    STEP: tl.constexpr = TILE if TILE > ROWS else ROWS  # no row of tiles is divided between the two loops
    lowest = tl.min(tl.where(there, begin, n_queries)) // STEP * STEP
    highest = tl.cdiv(tl.max(end), STEP) * STEP
    inner_low = tl.minimum(tl.cdiv(tl.max(begin), STEP) * STEP, highest)
    inner_high = tl.min(tl.where(there, end, n_queries)) // STEP * STEP
    inner_high = tl.maximum(tl.where((block + 1) * KEYS > n_keys, inner_low, inner_high), inner_low)

    k_tile = read_block(k + batch * k_b + group * k_h, key_start, k_n, k_d, n_keys, width, KEYS, D, False, EVEN_D, WIDE)
    factor = tl.load(scales + head)
    unit = tl.load(scales + heads + head)
    if softcap is None and bias is None and key_bias is None:
        k_tile = (k_tile * factor).to(k_tile.dtype)
    q += batch * q_b + head * q_h
    frame_max += entry * n_queries
    frame_weight += entry * n_queries
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    if mask is not None:
        mask += batch * mask_b + head * mask_h
    if key_bias is not None:
        key_bias += batch * key_bias_b + head * key_bias_h
    CELL: tl.constexpr = TILE if TILE > 0 and TILE < KEYS else KEYS
    DOWN: tl.constexpr = ROWS // TILE if TILE > 0 and TILE < ROWS else 1
    if TILE != 0:
        pooled += entry * tile_rows * tile_columns
    sums = tl.zeros([KEYS], tl.float32)
    mass = tl.zeros([KEYS // CELL, DOWN], tl.float32)
    for start in tl.range(inner_low, inner_high, ROWS):
        sums, mass = _take_queries(
            k_tile, q, start, key_start, first, stop, frame_max, frame_weight, n_queries, n_keys, width, factor, unit, softcap,
            bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, q_n, q_d, pooled, tile_columns, sums, mass,
            D, ROWS, KEYS, TILE, EVEN_D, False, WIDE, INTERPRETED,
        )  # fmt: skip
    gap = inner_high - inner_low
    for place in tl.range(lowest, highest - gap, ROWS):
        start = tl.where(place < inner_low, place, place + gap)
        sums, mass = _take_queries(
            k_tile, q, start, key_start, first, stop, frame_max, frame_weight, n_queries, n_keys, width, factor, unit, softcap,
            bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, q_n, q_d, pooled, tile_columns, sums, mass,
            D, ROWS, KEYS, TILE, EVEN_D, True, WIDE, INTERPRETED,
        )  # fmt: skip
    if received is not None:
        tl.store(received + entry * n_keys + key, sums, mask=there)


@triton.jit
def tiles_kernel(
    q, k, first, stop, scales, bias, mask, key_bias, frame_max, frame_weight, pooled,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, key_bias_b, key_bias_h, key_bias_k,
    heads, shared, n_queries, n_keys, width, tile, tile_rows, tile_columns, softcap,
    D: tl.constexpr, SIDE: tl.constexpr, EVEN_D: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: a square of whole tiles of any side, SIDE queries by SIDE keys at a time.

    Written: pooled [B, H, tile_rows, tile_columns]. This is for tiles that do not fit the blocks of the column pass: the scores are
    computed once more, and memory stays O(1) all the same.
    """
    together = tl.maximum(SIDE // tile, 1)  # tiles along one side of the square
    span = together * tile
    down, across = tl.cdiv(tile_rows, together), tl.cdiv(tile_columns, together)
    square = tl.program_id(0) % (down * across)
    entry = (tl.program_id(0) // (down * across)).to(tl.int64)
    batch, head = entry // heads, entry % heads
    group = head // shared
    top, left = square // across * span, square % across * span
    factor = tl.load(scales + head)
    unit = tl.load(scales + heads + head)
    q += batch * q_b + head * q_h
    k += batch * k_b + group * k_h
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    if mask is not None:
        mask += batch * mask_b + head * mask_h
    if key_bias is not None:
        key_bias += batch * key_bias_b + head * key_bias_h
    step = tl.arange(0, SIDE)
    mass = tl.zeros([SIDE, SIDE], tl.float32)
    for below in tl.range(0, span, SIDE):
        query_start = top + below
        query_stop = tl.minimum(top + span, n_queries)  # the last square of a wide tile may be cut
        query = query_start + step
        here = query < query_stop
        begin = tl.load(first + query, mask=here, other=0)
        end = tl.load(stop + query, mask=here, other=0)
        highest = tl.load(frame_max + entry * n_queries + query, mask=here, other=float("inf"))
        weight = tl.load(frame_weight + entry * n_queries + query, mask=here, other=0.0)
        first_key = tl.min(tl.where(here, begin, n_keys))
        last_key = tl.max(end)
        q_tile = read_block(q, query_start, q_n, q_d, query_stop, width, SIDE, D, False, EVEN_D, WIDE)
        if softcap is None and bias is None and key_bias is None:
            q_tile = (q_tile * factor).to(q_tile.dtype)
        for beside in tl.range(0, span, SIDE):
            key_start = left + beside
            if (key_start < last_key) & (key_start + SIDE > first_key):
                key_stop = tl.minimum(left + span, n_keys)
                k_tile = read_block(k, key_start, k_n, k_d, key_stop, width, SIDE, D, False, EVEN_D, WIDE)
                raw = multiply(q_tile, tl.trans(k_tile), INTERPRETED)
                x = finish_scores(
                    raw, query_start, step[:, None], key_start, step[None, :], begin[:, None], tl.minimum(end, key_stop)[:, None],
                    query_stop, key_stop, factor, softcap,
                    bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, True, WIDE,
                )  # fmt: skip
                mass += tl.exp2(x * unit - highest[:, None]) * weight[:, None]
    pooled += entry * tile_rows * tile_columns
    own = tl.minimum(step // tile, together - 1)  # which tile of the square a line belongs to; a tile wider than SIDE is alone
    for number in tl.range(0, together):
        line = tl.sum(tl.where(own[:, None] == number, mass, 0.0), 0)  # [keys]; picked, not multiplied: NaN stays in its tiles
        cells = tl.sum(tl.where(own[None, :] == step[:, None], line[None, :], 0.0), 1)
        tile_row, column = top // tile + number, left // tile + step
        inside = (step < together) & (column < tile_columns) & (tile_row < tile_rows)
        tl.store(pooled + tile_row.to(tl.int64) * tile_columns + column, cells, mask=inside)
