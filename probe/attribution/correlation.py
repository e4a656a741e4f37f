"""How far two lists of numbers agree. Letters: n numbers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's, of two [n] in float64; None where one of them does not vary beyond rounding."""
    a, b = a.double(), b.double()
    noise = [1e-12 * math.sqrt(len(x)) * float(x.abs().max()) for x in (a, b)]
    a, b = a - a.mean(), b - b.mean()
    sizes = float(a.norm()), float(b.norm())
    if sizes[0] <= noise[0] or sizes[1] <= noise[1]:
        return None
    return max(-1.0, min(1.0, float((a / sizes[0]) @ (b / sizes[1]))))


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's, of two [n]; equal numbers share their mean rank."""
    return correlation(ranks(a), ranks(b))


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, [n] in float64; equal numbers share their mean rank."""
    _, inverse, counts = np.unique(values.detach().cpu().double().numpy(), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return torch.from_numpy((ends - (counts - 1) / 2)[inverse])
