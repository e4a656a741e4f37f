"""What all kernels share: reading a tile, one product, and the score of a query and a key.

Letters: B batch, H query heads, Q queries, K keys, D width of a query or key.

A score is kept as x, from which unit · x is the score in base 2. Where nothing is added or capped, x is the bare product, and unit
holds scale, temperature and log2(e): then exp2(unit · x - m) is one fused multiply and add for each pair. Elsewhere x is the score in
nats and unit is log2(e).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def is_interpreted(kernel: Any) -> bool:
    """Whether the kernel runs in triton's interpreter, on a CPU: so if TRITON_INTERPRET=1 was set when it was imported."""
    return isinstance(kernel, InterpretedFunction)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of infinities and NaN; a GPU does not, and nothing is changed for it."""
    if not is_interpreted(multiply):
        yield
        return
    with numpy.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@triton.jit
def widen(offsets, WIDE: tl.constexpr):
    """Offsets within a tile: 64 bits wide where a stride is so large that 32 might not do. Those to a tile always are."""
    if WIDE:
        offsets = offsets.to(tl.int64)
    return offsets


@triton.jit
def read_tile(
    base, rows, columns, row_stride, column_stride, height, width, ROWS_FIT: tl.constexpr, COLUMNS_FIT: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """[rows, columns] of a matrix; 0 outside of height × width."""
    places = base + widen(rows, WIDE)[:, None] * row_stride + widen(columns, WIDE)[None, :] * column_stride
    if ROWS_FIT:
        if COLUMNS_FIT:
            tile = tl.load(places)
        else:
            tile = tl.load(places, mask=columns[None, :] < width, other=0.0)
    else:
        if COLUMNS_FIT:
            tile = tl.load(places, mask=rows[:, None] < height, other=0.0)
        else:
            tile = tl.load(places, mask=(rows[:, None] < height) & (columns[None, :] < width), other=0.0)
    return tile


@triton.jit
def read_block(
    base, start, row_stride, column_stride, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_FIT: tl.constexpr,
    COLUMNS_FIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS rows from `start` on, [ROWS, COLUMNS]; 0 outside of height × width."""
    own = base + tl.cast(start, tl.int64) * row_stride
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return read_tile(own, rows, columns, row_stride, column_stride, height - start, width, ROWS_FIT, COLUMNS_FIT, WIDE)


@triton.jit
def multiply(left, right, INTERPRETED: tl.constexpr):
    """left @ right, summed in float32; the interpreter would multiply the bits of bfloat16 as if they were whole numbers."""
    if INTERPRETED:
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(left, right, input_precision="ieee")
    return product


@triton.jit
def add_product(left, right, total, INTERPRETED: tl.constexpr):
    """total + left @ right; left is taken to the dtype of right first, except in the interpreter, whose cast does not round."""
    if INTERPRETED:
        total = tl.dot(left, right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left.to(right.dtype), right, total, input_precision="ieee")
    return total


@triton.jit
def finish_scores(
    raw, query_start, query, key_start, key, first, stop, n_queries, n_keys, factor, softcap,
    bias, bias_q, bias_k, mask, mask_q, mask_k, key_bias, key_bias_k, EDGE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x of each query and key from the products; -inf where the key may not be seen.

    query and key are counted from query_start and key_start. They, first and stop are two-dimensional, so that a tile may lie either
    way. Where EDGE is off, every key is in range, and seen as far as the intervals say.
    """
    x = raw
    if softcap is not None:
        x = softcap - 2.0 * softcap / (tl.exp2(x * factor) + 1.0)  # tanh, finite wherever x is
    elif bias is not None or key_bias is not None:
        x = x * factor
    if key_bias is not None:
        places = key_bias + tl.cast(key_start, tl.int64) * key_bias_k + widen(key, WIDE) * key_bias_k
        if EDGE:
            added = tl.load(places, mask=key_start + key < n_keys, other=0.0)
        else:
            added = tl.load(places)
        x = x + added.to(tl.float32)
    if bias is not None or mask is not None:
        inside = query_start + query < n_queries
        if EDGE:
            inside = inside & (key_start + key < n_keys)
        if bias is not None:
            places = bias + tl.cast(query_start, tl.int64) * bias_q + tl.cast(key_start, tl.int64) * bias_k
            added = tl.load(places + widen(query, WIDE) * bias_q + widen(key, WIDE) * bias_k, mask=inside, other=0.0)
            x = x + added.to(tl.float32)
        if mask is not None:
            places = mask + tl.cast(query_start, tl.int64) * mask_q + tl.cast(key_start, tl.int64) * mask_k
            allowed = tl.load(places + widen(query, WIDE) * mask_q + widen(key, WIDE) * mask_k, mask=inside, other=0)
            x = tl.where(allowed != 0, x, float("-inf"))
    if EDGE:
        x = tl.where((key_start + key >= first) & (key_start + key < stop), x, float("-inf"))
    return x
