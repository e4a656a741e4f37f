"""How alike two sets of hidden states are, whatever basis each is written in.

Letters: n tokens, d and e widths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headscope.kernels.errors import ShapeError

LEAST = 4  # tokens; the unbiased estimate divides by n - 3


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of two sets of states of the same tokens, 1 where one is a rotation and a multiple of the other.

    Unlike the plain estimate it is near 0 for independent states, also where there are more dimensions than tokens, and may fall below 0.
    NaN for fewer than 4 tokens, and where the states of one are all alike.

    Args:
        x: [n, d], floating point.
        y: [n, e], of the same tokens.

    Raises:
        ShapeError: not two matrices with as many rows.

    Source: Kornblith et al. 2019, section 3; the unbiased estimate by Song et al. 2012, eq. 5.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ShapeError(f"states are {list(x.shape)} and {list(y.shape)}; give [n, d] and [n, e] of the same n tokens")
    if x.shape[0] < LEAST or not x.shape[1] or not y.shape[1]:
        return math.nan
    a, b = _centred(x), _centred(y)
    own, other = _dependence(a, a), _dependence(b, b)
    if not (own > 0 and other > 0):
        return math.nan
    return _dependence(a, b) / math.sqrt(own * other)


def _centred(x: Tensor) -> Tensor:
    """In float64 and without the mean, which the estimate does not see and which costs digits; 0 where all rows are equal."""
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    spread = (x - x[:1]).abs().amax()
    return x - x.mean(dim=0) if bool(spread > 0) else torch.zeros_like(x)


def _dependence(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion with linear kernels, without an n × n matrix."""
    n = x.shape[0]
    inner_x, inner_y = x.square().sum(dim=1), y.square().sum(dim=1)  # the kernels' diagonals, [n]
    rows_x, rows_y = x @ x.sum(dim=0) - inner_x, y @ y.sum(dim=0) - inner_y  # row sums without them
    trace = (x.T @ y).square().sum() - (inner_x * inner_y).sum()
    sums = rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2))
    cross = 2 * (rows_x * rows_y).sum() / (n - 2)
    return float((trace + sums - cross) / (n * (n - 3)))
