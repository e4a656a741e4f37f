"""One pass over the keys: the output, and every statistic of a row, each only where it is asked for.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, F features,
R rows worked on (all queries, or chosen ones).

Running sums of a row, with m its largest score so far in base 2, t = score - m and p = 2^t:

    l = Σ p,   u = Σ p·t,   s = Σ p²,   values = Σ p·v,   averages = Σ p·features

When m grows by -d, all of them are brought to the new frame: u <- 2^d (u + d·l), s <- 2^2d s, the others <- 2^d. In this frame
entropy = ln 2 · (log2 l - u / l) loses nothing to a common offset of the scores. The first feature is 1 for every key: what the
product with features loses by rounding p, the sum of this column loses too, and dividing by it takes the loss out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton.common import add_product, finish_scores, multiply, read_block, read_tile


@triton.jit
def _take_block(
    q_tile, k, v, features, start, row_start, row, first, stop, n_queries, n_keys, width, value_width, factor, unit, softcap,
    bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, k_n, k_d, v_n, v_d,
    x_max, m, total, shifted, squares, best, values, averages,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, KEYS: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
    ARGMAX: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, EDGE: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The running sums with one more block of keys in them."""
    HOLES: tl.constexpr = EDGE or bias is not None or mask is not None or key_bias is not None
    key = tl.arange(0, KEYS)
    k_tile = read_block(k, start, k_n, k_d, n_keys, width, KEYS, D, not EDGE, EVEN_D, WIDE)
    raw = multiply(q_tile, tl.trans(k_tile), INTERPRETED)
    x = finish_scores(
        raw, row_start, row[:, None], start, key[None, :], first[:, None], stop[:, None], n_queries, n_keys, factor, softcap,
        bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, EDGE, WIDE,
    )  # fmt: skip
    block_max = tl.max(x, 1)
    new_max = tl.maximum(x_max, block_max)
    new_m = new_max * unit
    if ARGMAX:
        nearest = start + tl.min(tl.where(x == block_max[:, None], key[None, :], KEYS), 1)
        better = (block_max > x_max) | ((block_max == x_max) & (nearest < best))
        best = tl.where(better, nearest, best)
    if HOLES:
        new_m = tl.where(new_max == float("-inf"), 0.0, new_m)  # nothing seen yet: p becomes 0, not NaN
    d = tl.where(x_max == float("-inf"), 0.0, m - new_m)
    t = x * unit - new_m[:, None]
    if HOLES:
        t = tl.maximum(t, -256.0, propagate_nan=tl.PropagateNan.ALL)  # 0 · -inf would be NaN
    p = tl.exp2(t)
    a = tl.exp2(d)
    if ENTROPY:
        shifted = a * (shifted + d * total) + tl.sum(p * t, 1)
    if SQUARES:
        squares = a * a * squares + tl.sum(p * p, 1)
    total = a * total + tl.sum(p, 1)
    if v is not None:
        v_tile = read_block(v, start, v_n, v_d, n_keys, value_width, KEYS, V, not EDGE, EVEN_V, WIDE)
        values = add_product(p, v_tile, values * a[:, None], INTERPRETED)
    if features is not None:
        f_tile = read_block(features, start, F, 1, n_keys, F, KEYS, F, not EDGE, True, False)
        averages = add_product(p, f_tile, averages * a[:, None], INTERPRETED)
    return new_max, new_m, total, shifted, squares, best, values, averages


@triton.jit
def forward_kernel(
    q, k, v, features, first, stop, positions, scales, bias, mask, key_bias, sink,
    output, lse, entropy, p_max, argmax, max_score, sum_squares, moments, frame_max, frame_weight,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, f_b, f_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, key_bias_b, key_bias_h, key_bias_k,
    heads, shared, n_rows, n_queries, n_keys, width, value_width, softcap,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one head against all keys they see. Pointers that are None cost nothing.

    WIDE is needed for positions. Written, all contiguous: output [B, H, R, V], moments [B, H, R, F] (column 0 is to be dropped), the
    others [B, H, R].
    frame_max and frame_weight are what other passes need: the pattern is 2^(unit·x - frame_max) · frame_weight.
    """
    tiles = tl.cdiv(n_rows, ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the last rows see most keys: they start first
    entry = tl.program_id(0) // tiles
    batch, head = (entry // heads).to(tl.int64), (entry % heads).to(tl.int64)
    group = head // shared
    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < n_rows
    if positions is None:
        row_start = tile * ROWS
        own = tl.arange(0, ROWS)
    else:
        row_start = tile * 0
        own = tl.where(there, tl.load(positions + row, mask=there, other=0), n_queries)
    query = row_start + own
    begin = tl.load(first + query, mask=there, other=0)
    end = tl.load(stop + query, mask=there, other=0)
    lowest = tl.min(tl.where(there, begin, n_keys)) // KEYS * KEYS
    highest = tl.max(end)
    inner_low = tl.cdiv(tl.max(begin), KEYS) * KEYS
    inner_high = tl.min(tl.where(there, end, n_keys)) // KEYS * KEYS
    inner_low = tl.minimum(inner_low, tl.cdiv(highest, KEYS) * KEYS)
    inner_high = tl.maximum(inner_high, inner_low)

    q_tile = read_tile(q + batch * q_b + head * q_h, query, tl.arange(0, D), q_n, q_d, n_queries, width, False, EVEN_D, True)
    factor = tl.load(scales + head)
    unit = tl.load(scales + heads + head)
    if softcap is None and bias is None and key_bias is None:
        q_tile = (q_tile * factor).to(q_tile.dtype)  # by 1, 0 or -1: unit is positive
    k += batch * k_b + group * k_h
    if v is not None:
        v += batch * v_b + group * v_h
    if features is not None:
        features += batch * f_b + head * f_h
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    if mask is not None:
        mask += batch * mask_b + head * mask_h
    if key_bias is not None:
        key_bias += batch * key_bias_b + head * key_bias_h

    x_max = tl.full([ROWS], float("-inf"), tl.float32)
    m = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    shifted = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], 2147483647, tl.int32)
    values = tl.zeros([ROWS, V], tl.float32)
    averages = tl.zeros([ROWS, F], tl.float32)
    ENTROPY: tl.constexpr = entropy is not None
    SQUARES: tl.constexpr = sum_squares is not None
    ARGMAX: tl.constexpr = argmax is not None
    for start in tl.range(inner_low, inner_high, KEYS):
        x_max, m, total, shifted, squares, best, values, averages = _take_block(
            q_tile, k, v, features, start, row_start, own, begin, end, n_queries, n_keys, width, value_width, factor, unit, softcap,
            bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, k_n, k_d, v_n, v_d,
            x_max, m, total, shifted, squares, best, values, averages,
            D, V, F, KEYS, ENTROPY, SQUARES, ARGMAX, EVEN_D, EVEN_V, False, WIDE, INTERPRETED,
        )  # fmt: skip
    gap = inner_high - inner_low
    for place in tl.range(lowest, highest - gap, KEYS):
        start = tl.where(place < inner_low, place, place + gap)  # the blocks on either side of the inner ones
        x_max, m, total, shifted, squares, best, values, averages = _take_block(
            q_tile, k, v, features, start, row_start, own, begin, end, n_queries, n_keys, width, value_width, factor, unit, softcap,
            bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, k_n, k_d, v_n, v_d,
            x_max, m, total, shifted, squares, best, values, averages,
            D, V, F, KEYS, ENTROPY, SQUARES, ARGMAX, EVEN_D, EVEN_V, True, WIDE, INTERPRETED,
        )  # fmt: skip

    dead = total == 0.0
    broken = total != total
    m = tl.where(dead, 0.0, m)
    share = tl.where(dead, 1.0, total)
    everything = share
    if sink is not None:
        everything = share + tl.exp2(tl.load(sink + head).to(tl.float32) * 1.4426950408889634 - m)
    weight = tl.where(dead, 0.0, 1.0 / everything)
    place = entry.to(tl.int64) * n_rows + row
    if output is not None:
        column = tl.arange(0, V)
        places = output + place[:, None] * value_width + column[None, :]
        result = (values * weight[:, None]).to(output.dtype.element_ty)
        tl.store(places, result, mask=there[:, None] & (column[None, :] < value_width))
    if lse is not None:
        tl.store(lse + place, tl.where(dead, float("-inf"), (m + tl.log2(share)) * 0.6931471805599453), mask=there)
    if entropy is not None:
        tl.store(entropy + place, (tl.log2(share) - shifted / share) * 0.6931471805599453, mask=there)
    if p_max is not None:
        tl.store(p_max + place, tl.where(dead, 0.0, tl.exp2(tl.where(dead, 0.0, x_max * unit - m)) * weight), mask=there)
    if argmax is not None:
        tl.store(argmax + place, tl.where(dead | broken, -1, best).to(tl.int64), mask=there)
    if max_score is not None:
        tl.store(max_score + place, tl.where(broken, total, x_max * unit * 0.6931471805599453), mask=there)
    if sum_squares is not None:
        tl.store(sum_squares + place, squares / (share * share), mask=there)
    if moments is not None:
        column = tl.arange(0, F)
        ones = tl.sum(tl.where(column[None, :] == 0, averages, 0.0), 1)
        averages = averages * (tl.where(dead, 0.0, share * weight / tl.where(dead, 1.0, ones)))[:, None]
        tl.store(moments + place[:, None] * F + column[None, :], averages, mask=there[:, None])
    if frame_max is not None:
        # Nothing less infinity is 2^-inf = 0, whatever the score: a dead row takes no part in later passes.
        tl.store(frame_max + place, tl.where(dead, float("inf"), m), mask=there)
        tl.store(frame_weight + place, weight, mask=there)
