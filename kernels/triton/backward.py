"""From the gradient of an attention's output to those of its inputs, in Triton: three kernels, no atomics, the pattern computed anew.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value; M queries and
N keys of one tile.

`_delta` changes the incoming gradient under the rule and sums it over each row. `_to_keys` owns a tile of keys and goes over the
queries that may see it, for every query head that shares it; `_to_queries` owns a tile of queries and goes over the keys it may see.
So each result is written by one program, in one order: the same inputs give the same bits. The formulas stand in
`headscope.kernels.relevance`; the part 1/2 that each factor of q·k gets is multiplied in at the end.

A tile in which every query sees every key needs no test of visibility, so there are two loops: over the tiles before and behind
those, and over those. Scores are in bits (times log2 e), as the hardware's exponential is.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from headscope.kernels.backward import Relevance, Rule, pattern_lse
from headscope.kernels.problem import Problem
from headscope.kernels.triton.common import is_interpreted, quiet
from headscope.kernels.triton.specimens import Specimen

WIDEST = 256
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_REACH = 1 << 22  # a stride up to this keeps offsets within a tile in 32 bits


@triton.jit
def _operand(x, LIKE: tl.constexpr, UPCAST: tl.constexpr):
    """A factor of a product. The interpreter multiplies bfloat16 by its bits, so there everything is float32."""
    if UPCAST:
        return x.to(tl.float32)
    else:
        return x.to(LIKE)


@triton.jit
def _tanh_share(x):
    """tanh(x) / x; a series near 0, where the quotient would lose its digits."""
    square = x * x
    near = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    size = tl.maximum(tl.abs(x), 0.25)
    far = (1 - 2 / (tl.exp2(tl.minimum(size, 20.0) * 2.8853900817779268) + 1)) / size
    return tl.where(square < 0.0625, near, far)


@triton.jit
def _tile(base, rows, row_stride, column_stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED] of a matrix, 0 where there is none."""
    across = tl.arange(0, PADDED)
    places = base + rows[:, None] * row_stride + across[None, :] * column_stride
    if WIDTH == PADDED:
        return tl.load(places, mask=inside[:, None], other=0)
    else:
        return tl.load(places, mask=inside[:, None] & (across < WIDTH)[None, :], other=0)


@triton.jit
def _store_tile(base, rows, value, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Writes [rows, PADDED] to a contiguous matrix."""
    across = tl.arange(0, PADDED)
    value = value.to(base.dtype.element_ty)
    if WIDTH == PADDED:
        tl.store(base + rows[:, None] * WIDTH + across[None, :], value, mask=inside[:, None])
    else:
        tl.store(base + rows[:, None] * WIDTH + across[None, :], value, mask=inside[:, None] & (across < WIDTH)[None, :])


@triton.jit
def _passed_on(x, half_epsilon):
    size = tl.abs(x)
    return size / tl.where(size == 0, 1.0, size + half_epsilon)


@triton.jit
def _delta(
    z, grad, arriving, delta,
    z_b, z_h, z_m, z_d, grad_b, grad_h, grad_m, grad_d,
    HEADS, QUERIES, half_epsilon, part,
    V: tl.constexpr, VP: tl.constexpr, EPSILON: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(QUERIES, M)
    pid = tl.program_id(0)
    batch_head = (pid // blocks).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    rows = (pid % blocks).to(tl.int64) * M + tl.arange(0, M)
    inside = rows < QUERIES
    own = _tile(z + batch * z_b + head * z_h, rows, z_m, z_d, inside, V, VP).to(tl.float32)
    given = _tile(grad + batch * grad_b + head * grad_h, rows, grad_m, grad_d, inside, V, VP)
    result = given.to(tl.float32) * part
    if EPSILON:
        result *= _passed_on(own, half_epsilon)
    result = result.to(arriving.dtype.element_ty)  # rounded before it is summed, so that a row of P·(G vᵀ - δ) sums to 0
    _store_tile(arriving, batch_head * QUERIES + rows, result, inside, V, VP)
    tl.store(delta + batch_head * QUERIES + rows, tl.sum(result.to(tl.float32) * own, axis=1), mask=inside)


@triton.jit
def _cells(
    products, of_cells, row_lse, row_delta, extra_bias, extra_mask, visible, scale, inverse_cap, half_epsilon,
    SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, EPSILON: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """The pattern and the weights W of one tile, without the part 1/2 and without the scale; rows or columns first."""
    if SOFTCAP:
        small = products * (scale * inverse_cap)
        share = _tanh_share(small)
        scores = products * share * (scale * _LOG2E)
    else:
        scores = products * (scale * _LOG2E)
    if BIAS:
        scores += extra_bias * _LOG2E
    if MASK:
        scores = tl.where(extra_mask, scores, float("-inf"))
    if HIDES:
        scores = tl.where(visible, scores, float("-inf"))
    pattern = tl.exp2(scores - row_lse)
    weights = pattern * (of_cells - row_delta)
    if SOFTCAP:
        if SPLITS:
            weights *= share
        else:
            capped = small * share
            weights *= 1 - capped * capped
    if EPSILON:
        weights *= _passed_on(products, half_epsilon)
    return pattern, weights


@triton.jit
def _key_tile(
    to_k, to_v, sums, own_k, own_v, own_bias, first, stop, q, arriving, lse, delta, bias, mask,
    q_m, q_d, bias_m, mask_m, at_n_bias, at_n_mask, keys_inside, m, QUERIES, scale, inverse_cap, half_epsilon,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr,
    EPSILON: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEY_BIAS: tl.constexpr, HIDES: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to g_k [N, D], g_v [N, V] and the columns [N]. The pattern lies with keys first, [N, M]."""
    like: tl.constexpr = q.dtype.element_ty
    row = tl.arange(0, M)
    rows_inside = m + row < QUERIES
    start = tl.cast(m, tl.int64)
    own_q = _operand(_tile(q + start * q_m, row, q_m, q_d, rows_inside, D, DP), like, UPCAST)
    own_arriving = _operand(_tile(arriving + start * V, row, V, 1, rows_inside, V, VP), like, UPCAST)
    row_lse = tl.load(lse + m + row, mask=rows_inside, other=float("inf"))[None, :]
    row_delta = tl.load(delta + m + row, mask=rows_inside, other=0)[None, :]
    cells_inside = keys_inside[:, None] & rows_inside[None, :]
    extra_bias, extra_mask, visible = 0.0, True, True
    if BIAS:
        extra_bias = tl.load(bias + start * bias_m + at_n_bias[:, None] + row[None, :] * bias_m, mask=cells_inside, other=0).to(tl.float32)
    if KEY_BIAS:
        extra_bias += own_bias[:, None]
    if MASK:
        extra_mask = tl.load(mask + start * mask_m + at_n_mask[:, None] + row[None, :] * mask_m, mask=cells_inside, other=0) != 0
    if HIDES:
        own_first = tl.load(first, mask=keys_inside, other=QUERIES)  # read in each such tile: held, they would take registers from all
        own_stop = tl.load(stop, mask=keys_inside, other=0)
        visible = (m + row[None, :] >= own_first[:, None]) & (m + row[None, :] < own_stop[:, None])
    products = tl.dot(own_k, tl.trans(own_q), input_precision=PRECISION)  # [N, M]
    of_cells = tl.dot(own_v, tl.trans(own_arriving), input_precision=PRECISION)
    pattern, weights = _cells(
        products, of_cells, row_lse, row_delta, extra_bias, extra_mask, visible, scale, inverse_cap, half_epsilon,
        SOFTCAP, SPLITS, EPSILON, BIAS or KEY_BIAS, MASK, HIDES,
    )  # fmt: skip
    to_v = tl.dot(_operand(pattern, like, UPCAST), own_arriving, to_v, input_precision=PRECISION)
    to_k = tl.dot(_operand(weights, like, UPCAST), own_q, to_k, input_precision=PRECISION)
    return to_k, to_v, sums + tl.sum(pattern * of_cells, axis=1)


@triton.jit
def _to_keys(
    q, k, v, arriving, lse, delta, bias, mask, key_bias, temperature, first, stop, to_k, to_v, columns,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    bias_b, bias_h, bias_m, bias_n, mask_b, mask_h, mask_m, mask_n, key_bias_b, key_bias_h, key_bias_n,
    GROUPS, SHARED, QUERIES, KEYS, scale, part, inverse_cap, half_epsilon,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr,
    EPSILON: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    like: tl.constexpr = k.dtype.element_ty
    BIAS: tl.constexpr = bias is not None
    MASK: tl.constexpr = mask is not None
    KEY_BIAS: tl.constexpr = key_bias is not None
    TEMPERATURE: tl.constexpr = temperature is not None
    blocks = tl.cdiv(KEYS, N)
    pid = tl.program_id(0)
    n = (pid % blocks) * N
    batch_group = (pid // blocks).to(tl.int64)
    batch, group = batch_group // GROUPS, batch_group % GROUPS
    heads = GROUPS * SHARED
    key = tl.arange(0, N)
    inside = n + key < KEYS
    start = n.to(tl.int64)
    v_at = v + batch * v_b + group * v_h + start * v_n
    own_k = _operand(_tile(k + batch * k_b + group * k_h + start * k_n, key, k_n, k_d, inside, D, DP), like, UPCAST)
    own_v = _operand(_tile(v_at, key, v_n, v_d, inside, V, VP), like, UPCAST)

    # Queries from `low` to `high` may see something here; those from `full` to `full_stop` see the whole tile.
    last = tl.minimum(n + N, KEYS) - 1
    if WHOLE:
        low, high, full, full_stop = 0, QUERIES, 0, QUERIES
    else:
        low, high = tl.load(first + n), tl.load(stop + last)
        full, full_stop = tl.load(first + last), tl.load(stop + n)
    if n + N > KEYS:
        full = high  # the last tile has keys that do not exist
    middle = low + tl.cdiv(tl.maximum(full - low, 0), M) * M
    # Queries that do not exist have a pattern of 0, so the last tile of queries may be counted as full.
    end = tl.where(full_stop >= QUERIES, tl.cdiv(tl.maximum(QUERIES - middle, 0), M), tl.maximum(full_stop - middle, 0) // M) * M + middle
    partial = middle - low + tl.maximum(high - end, 0)

    g_k = tl.zeros([N, DP], dtype=tl.float32)
    g_v = tl.zeros([N, VP], dtype=tl.float32)
    heat = tl.full([], 1.0, dtype=tl.float32)
    for member in range(SHARED):
        head = group * SHARED + member
        row = (batch * heads + head) * QUERIES
        sums = tl.zeros([N], dtype=tl.float32)
        own_scale = scale
        if TEMPERATURE:
            # g_k is held times the temperature of the head at hand: W needs no factor then.
            next_heat = tl.load(temperature + head)
            g_k *= next_heat / heat
            heat = next_heat
            own_scale = scale / heat
        own_bias, bias_at, mask_at, at_n_bias, at_n_mask = key, bias, mask, key, key
        if BIAS:
            bias_at = bias + batch * bias_b + head * bias_h + start * bias_n
            at_n_bias = key * bias_n
        if MASK:
            mask_at = mask + batch * mask_b + head * mask_h + start * mask_n
            at_n_mask = key * mask_n
        if KEY_BIAS:
            own_bias = tl.load(key_bias + batch * key_bias_b + head * key_bias_h + (start + key) * key_bias_n, mask=inside, other=0)
            own_bias = own_bias.to(tl.float32)
        q_at = q + batch * q_b + head * q_h
        for step in range(0, partial, M):
            m = tl.where(low + step < middle, low + step, end + (low + step - middle))
            g_k, g_v, sums = _key_tile(
                g_k, g_v, sums, own_k, own_v, own_bias, first + n + key, stop + n + key, q_at, arriving + row * V, lse + row, delta + row,
                bias_at, mask_at, q_m, q_d, bias_m, mask_m, at_n_bias, at_n_mask, inside, m, QUERIES, own_scale, inverse_cap, half_epsilon,
                D, DP, V, VP, SOFTCAP, SPLITS, EPSILON, BIAS, MASK, KEY_BIAS, True, UPCAST, PRECISION, M,
            )  # fmt: skip
        for m in range(middle, end, M):
            g_k, g_v, sums = _key_tile(
                g_k, g_v, sums, own_k, own_v, own_bias, first + n + key, stop + n + key, q_at, arriving + row * V, lse + row, delta + row,
                bias_at, mask_at, q_m, q_d, bias_m, mask_m, at_n_bias, at_n_mask, inside, m, QUERIES, own_scale, inverse_cap, half_epsilon,
                D, DP, V, VP, SOFTCAP, SPLITS, EPSILON, BIAS, MASK, KEY_BIAS, False, UPCAST, PRECISION, M,
            )  # fmt: skip
        tl.store(columns + (batch * heads + head) * KEYS + start + key, sums, mask=inside)
    g_k *= scale * part / heat
    keys = batch_group * KEYS + start + key
    _store_tile(to_k, keys, g_k, inside, D, DP)
    _store_tile(to_v, keys, g_v, inside, V, VP)


@triton.jit
def _query_tile(
    to_q, own_q, own_arriving, row_lse, row_delta, own_first, own_stop, k, v, bias, mask, key_bias,
    k_n, k_d, v_n, v_d, bias_n, mask_n, key_bias_n, at_m_bias, at_m_mask, rows_inside, n, KEYS, scale, inverse_cap, half_epsilon,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr,
    EPSILON: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEY_BIAS: tl.constexpr, HIDES: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to g_q [M, D]."""
    like: tl.constexpr = k.dtype.element_ty
    key = tl.arange(0, N)
    inside = n + key < KEYS
    start = tl.cast(n, tl.int64)
    own_k = _operand(_tile(k + start * k_n, key, k_n, k_d, inside, D, DP), like, UPCAST)
    own_v = _operand(_tile(v + start * v_n, key, v_n, v_d, inside, V, VP), like, UPCAST)
    cells_inside = rows_inside[:, None] & inside[None, :]
    extra_bias, extra_mask, visible = 0.0, True, True
    if BIAS:
        extra_bias = tl.load(bias + start * bias_n + at_m_bias[:, None] + key[None, :] * bias_n, mask=cells_inside, other=0).to(tl.float32)
    if KEY_BIAS:
        extra_bias += tl.load(key_bias + (start + key) * key_bias_n, mask=inside, other=0).to(tl.float32)[None, :]
    if MASK:
        extra_mask = tl.load(mask + start * mask_n + at_m_mask[:, None] + key[None, :] * mask_n, mask=cells_inside, other=0) != 0
    if HIDES:
        visible = (n + key[None, :] >= own_first[:, None]) & (n + key[None, :] < own_stop[:, None])
    products = tl.dot(own_q, tl.trans(own_k), input_precision=PRECISION)  # [M, N]
    of_cells = tl.dot(own_arriving, tl.trans(own_v), input_precision=PRECISION)
    _, weights = _cells(
        products, of_cells, row_lse[:, None], row_delta[:, None], extra_bias, extra_mask, visible, scale, inverse_cap, half_epsilon,
        SOFTCAP, SPLITS, EPSILON, BIAS or KEY_BIAS, MASK, HIDES,
    )  # fmt: skip
    return tl.dot(_operand(weights, like, UPCAST), own_k, to_q, input_precision=PRECISION)


@triton.jit
def _to_queries(
    q, k, v, arriving, lse, delta, bias, mask, key_bias, temperature, first, stop, to_q,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    bias_b, bias_h, bias_m, bias_n, mask_b, mask_h, mask_m, mask_n, key_bias_b, key_bias_h, key_bias_n,
    HEADS, SHARED, QUERIES, KEYS, scale, part, inverse_cap, half_epsilon,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr,
    EPSILON: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    like: tl.constexpr = q.dtype.element_ty
    BIAS: tl.constexpr = bias is not None
    MASK: tl.constexpr = mask is not None
    KEY_BIAS: tl.constexpr = key_bias is not None
    blocks = tl.cdiv(QUERIES, M)
    pid = tl.program_id(0)
    m = (blocks - 1 - pid % blocks) * M  # under causality the last queries have most to do: they begin
    batch_head = (pid // blocks).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    group = head // SHARED
    row = tl.arange(0, M)
    inside = m + row < QUERIES
    start = m.to(tl.int64)
    rows = batch_head * QUERIES + start + row
    own_q = _operand(_tile(q + batch * q_b + head * q_h + start * q_m, row, q_m, q_d, inside, D, DP), like, UPCAST)
    own_arriving = _operand(_tile(arriving, rows, V, 1, inside, V, VP), like, UPCAST)
    row_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + rows, mask=inside, other=0)
    own_scale = scale
    if temperature is not None:
        own_scale = scale / tl.load(temperature + head)

    # Keys from `low` to `high` may be seen by some of these queries; those from `full` to `full_stop` by all of them.
    last = tl.minimum(m + M, QUERIES) - 1
    own_first = tl.load(first + m + row, mask=inside, other=0)
    own_stop = tl.load(stop + m + row, mask=inside, other=0)
    if WHOLE:
        low, high, full, full_stop = 0, KEYS, 0, KEYS
    else:
        low, high = tl.load(first + m), tl.load(stop + last)
        full, full_stop = tl.load(first + last), tl.load(stop + m)
    middle = low + tl.cdiv(tl.maximum(full - low, 0), N) * N
    end = middle + tl.maximum(full_stop - middle, 0) // N * N

    bias_at, mask_at, key_bias_at, at_m_bias, at_m_mask = bias, mask, key_bias, row, row
    if BIAS:
        bias_at = bias + batch * bias_b + head * bias_h + start * bias_m
        at_m_bias = row * bias_m
    if MASK:
        mask_at = mask + batch * mask_b + head * mask_h + start * mask_m
        at_m_mask = row * mask_m
    if KEY_BIAS:
        key_bias_at = key_bias + batch * key_bias_b + head * key_bias_h
    k_at, v_at = k + batch * k_b + group * k_h, v + batch * v_b + group * v_h
    g_q = tl.zeros([M, DP], dtype=tl.float32)
    for step in range(0, middle - low + tl.maximum(high - end, 0), N):
        n = tl.where(low + step < middle, low + step, end + (low + step - middle))
        g_q = _query_tile(
            g_q, own_q, own_arriving, row_lse, row_delta, own_first, own_stop, k_at, v_at, bias_at, mask_at, key_bias_at,
            k_n, k_d, v_n, v_d, bias_n, mask_n, key_bias_n, at_m_bias, at_m_mask, inside, n, KEYS, own_scale, inverse_cap,
            half_epsilon, D, DP, V, VP, SOFTCAP, SPLITS, EPSILON, BIAS, MASK, KEY_BIAS, True, UPCAST, PRECISION, N,
        )  # fmt: skip
    for n in range(middle, end, N):
        g_q = _query_tile(
            g_q, own_q, own_arriving, row_lse, row_delta, own_first, own_stop, k_at, v_at, bias_at, mask_at, key_bias_at,
            k_n, k_d, v_n, v_d, bias_n, mask_n, key_bias_n, at_m_bias, at_m_mask, inside, n, KEYS, own_scale, inverse_cap,
            half_epsilon, D, DP, V, VP, SOFTCAP, SPLITS, EPSILON, BIAS, MASK, KEY_BIAS, False, UPCAST, PRECISION, N,
        )  # fmt: skip
    g_q *= own_scale * part
    _store_tile(to_q, rows, g_q, inside, D, DP)


INTERPRETED = is_interpreted(_to_keys)


def why_not(problem: Problem) -> str | None:
    """Why these kernels cannot do this; None if they can."""
    if problem.q.dtype == torch.float64:
        return "Triton's products have no float64"
    if problem.q.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {problem.q.device}, and Triton needs a GPU (or TRITON_INTERPRET=1 from the start, to try it out)"
    widest = max(problem.q.shape[3], 0 if problem.v is None else problem.v.shape[3])
    if widest > WIDEST:
        return f"heads are {widest} wide, and its tiles hold {WIDEST}"
    return None


def backward(problem: Problem, z: Tensor, lse: Tensor, grad: Tensor, rule: Rule) -> Relevance:
    """Modified or ordinary gradients of q, k and v.

    Args:
        problem: what was computed on; its gate is not looked at.
        z: [B, H, Q, V], the output before the gate.
        lse: [B, H, Q], as `Statistics` gives it, over the real keys; a sink is added here.
        grad: [B, H, Q, V], the gradient with respect to z.
        rule: AttnLRP or the ordinary gradient.
    """
    assert problem.v is not None
    batch, heads, queries, keys = problem.shape
    q, k, v = (_near(tensor) for tensor in (problem.q, problem.k, problem.v))
    groups, width, value_width = k.shape[1], q.shape[3], v.shape[3]
    device = q.device
    rows = torch.zeros(batch, heads, queries, dtype=torch.float32, device=device)
    columns = torch.zeros(batch, heads, keys, dtype=torch.float32, device=device)
    to_q, to_k, to_v = (torch.zeros(tensor.shape, dtype=q.dtype, device=device) for tensor in (q, k, v))
    found = Relevance(to_q, to_k, to_v, rows, columns)
    if 0 in (batch, heads, queries, keys):
        return found
    arriving = torch.empty(batch, heads, queries, value_width, dtype=q.dtype, device=device)
    half_epsilon, half_epsilon_scores = rule.epsilon / 2, rule.epsilon_scores / 2
    z, grad = _near(z), _near(grad)
    value_padded = _padded(value_width)
    delta_rows = 16 if INTERPRETED else 64
    with quiet():
        _delta[(triton.cdiv(queries, delta_rows) * batch * heads,)](
            z, grad, arriving, rows, *z.stride(), *grad.stride(), heads, queries, half_epsilon, rule.part,
            V=value_width, VP=value_padded, EPSILON=rule.epsilon > 0, M=delta_rows, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    bits = pattern_lse(problem, lse) * math.log2(math.e)
    bias, mask, key_bias = _over_cells(problem.bias, problem.shape), _over_cells(problem.mask, problem.shape), problem.key_bias
    if key_bias is not None:
        key_bias = key_bias.expand(batch, heads, keys)
    temperature = None if problem.temperature is None else problem.temperature.to(torch.float32).contiguous()
    inputs = (q, k, v, arriving, bits.contiguous(), rows, bias, mask if mask is None else mask.view(torch.uint8), key_bias, temperature)
    strides = (*q.stride(), *k.stride(), *v.stride(), *_strides(bias, 4), *_strides(mask, 4), *_strides(key_bias, 3))
    numbers = (queries, keys, problem.scale, rule.part, 1 / (problem.softcap or 1.0), half_epsilon_scores)
    constants = dict(
        D=width, DP=_padded(width), V=value_width, VP=value_padded, SOFTCAP=problem.softcap is not None, SPLITS=rule.splits,
        EPSILON=rule.epsilon_scores > 0, WHOLE=problem.whole, UPCAST=INTERPRETED, PRECISION="ieee", enable_fp_fusion=True,
    )  # fmt: skip
    acting = (problem.softcap, rule.epsilon_scores or None, bias, mask, key_bias)
    crowded = sum(part is not None for part in acting) > 1
    tiles = _tiles(max(_padded(width), value_padded), q.dtype, crowded, torch.version.hip is not None)
    seen_first, seen_stop = problem.visible_queries()
    shared = problem.shared
    m, n, warps, stages = tiles["key"]
    with quiet():
        _to_keys[(triton.cdiv(keys, n) * batch * groups,)](
            *inputs, seen_first, seen_stop, found.k, found.v, columns, *strides, groups, shared, *numbers,
            **constants, M=m, N=n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        m, n, warps, stages = tiles["query"]
        _to_queries[(triton.cdiv(queries, m) * batch * heads,)](
            *inputs, problem.first, problem.stop, found.q, *strides, heads, shared, *numbers,
            **constants, M=m, N=n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return found


def _tiles(padded: int, dtype: torch.dtype, crowded: bool, amd: bool) -> dict[str, tuple[int, int, int, int]]:
    """Queries and keys of a tile, warps, and stages of each kernel: the largest that were seen to compile on sm_90 without a spill.

    Args:
        padded: D or V, the larger, as a power of two.
        dtype: of the inputs.
        crowded: two or more of softcap, ε_s, bias, mask and key bias act on the scores, and want registers.
        amd: there is less shared memory.
    """
    if INTERPRETED:
        return {"key": (16, 32, 1, 1), "query": (32, 16, 1, 1)}
    if dtype == torch.float32 or padded > 128:
        return {"key": (32, 32, 4, 1), "query": (32, 32, 4, 1)}
    if amd:
        return {"key": (32, 64, 4, 1), "query": (64, 32, 4, 1)}
    if crowded:
        return {"key": (16, 64, 8, 1), "query": (128, 16, 8, 2)}
    return {"key": (32, 128, 8, 2), "query": (128, 32, 8, 2)}


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length() if width else 0)


def _near(tensor: Tensor) -> Tensor:
    """The same tensor, copied if its layout is one whose offsets within a tile do not fit 32 bits."""
    return tensor if max(tensor.stride()[2:]) <= _REACH else tensor.contiguous()


def _over_cells(tensor: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    return None if tensor is None else _near(tensor).expand(shape)


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()


def specimens(width: int, dtype: str = "bf16", maker: str = "nvidia") -> list[Specimen]:
    """The kernels as a causal call compiles them, contiguous, bare and with everything that acts on scores, for the compile gate.

    Args:
        width: D and V.
        dtype: of the inputs, in Triton's letters.
        maker: of the GPU, "nvidia" or "amd".
    """
    padded = _padded(width)
    bare, crowded = (_tiles(padded, torch.float32 if dtype == "fp32" else torch.bfloat16, some, maker == "amd") for some in (False, True))
    pointers = dict.fromkeys(("q", "k", "v", "z", "grad", "arriving", "bias", "to_q", "to_k", "to_v"), f"*{dtype}")
    pointers |= dict.fromkeys(("lse", "delta", "key_bias", "temperature", "columns"), "*fp32")
    pointers |= {"mask": "*u8", "first": "*i32", "stop": "*i32"}
    units = {"q_d", "k_d", "v_d", "z_d", "grad_d", "bias_n", "mask_n", "key_bias_n"}
    numbers = {"scale", "part", "inverse_cap", "half_epsilon"}

    def specimen(name: str, kernel: JITFunction, tile: tuple[int, int, int, int], everything: bool) -> Specimen:
        m, n, warps, stages = tile
        constants: dict[str, object] = {
            "D": width, "DP": padded, "V": width, "VP": padded, "SOFTCAP": everything, "SPLITS": True, "EPSILON": everything,
            "WHOLE": False, "UPCAST": False, "PRECISION": "ieee", "M": m, "N": n,
        }  # fmt: skip
        constants |= dict.fromkeys(units, 1)
        if not everything:
            constants |= dict.fromkeys(("bias", "mask", "key_bias", "temperature"))
        constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
        signature = {
            argument: "constexpr" if argument in constants else pointers.get(argument, "fp32" if argument in numbers else "i32")
            for argument in kernel.arg_names
        }
        aligned = tuple(
            argument for argument, kind in signature.items() if kind.startswith("*") or argument[-2:] in ("_b", "_h", "_m", "_n")
        )
        return Specimen(name, kernel, signature, constants, warps, stages, tuple(a for a in aligned if a not in constants))

    return [
        specimen("backward-delta", _delta, (64, 0, 4, 1), False),
        specimen("backward-keys", _to_keys, bare["key"], False),
        specimen("backward-keys-everything", _to_keys, crowded["key"], True),
        specimen("backward-queries", _to_queries, bare["query"], False),
        specimen("backward-queries-everything", _to_queries, crowded["query"], True),
    ]
