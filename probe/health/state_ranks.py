"""Ranks of hidden states: from the singular values of X and of X less its mean row.

Letters: n tokens, d width, X [n, d], m its mean row, R = X - 1mᵀ, σ singular values.

σ² are the eigenvalues of the smaller Gram matrix, in float64: σ below about 1e-8 of the largest are rounding. Where n > d, that of X is
XᵀX = RᵀR + n m mᵀ. How a rank-one term moves Σ f(λ) is told by few Lanczos steps from m, after which RᵀR is a small tridiagonal T and
XᵀX the same T with n‖m‖² added in its corner (Beckermann, Kressner and Schweitzer 2018). Where the steps have not settled to 1e-7
of the effective rank, as with a spectrum that runs far down, the eigenvalues are computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 192  # columns of a Gram matrix that are made at once
_STEPS = 64
_FEW = 16  # fewer steps, to see what the last ones have changed
_SETTLED = 1e-7
_SMALL = 3 * _STEPS  # a Gram matrix up to this wide is not worth the steps


class Ranks(NamedTuple):
    """Effective rank exp H(σ / Σσ), stable rank Σσ² / σ₁², participation ratio (Σσ²)² / Σσ⁴."""

    effective: float
    stable: float
    participation: float


class _Sums(NamedTuple):
    """Σσ, -Σσ log σ, σ₁²."""

    roots: float
    entropy: float
    largest: float

    @property
    def effective(self) -> float:
        """exp H(σ / Σσ)."""
        return math.exp(math.log(self.roots) + self.entropy / self.roots)


def ranks_of(x: Tensor, apart: Tensor, mean: Tensor) -> tuple[Ranks, Ranks]:
    """Of X less its mean row, and of X.

    Args:
        x: [n, d], float64.
        apart: [n, d], R.
        mean: [d], m.
    """
    if x.shape[1] >= x.shape[0]:
        centred, whole = gram(apart.mT), gram(x.mT)
        return _ranks(centred, _sums(centred)), _ranks(whole, _sums(whole))
    centred, vector = gram(apart), mean * math.sqrt(len(x))
    whole = centred + torch.outer(vector, vector)
    before = _sums(centred)
    return _ranks(centred, before), _ranks(whole, _moved(centred, vector, before) or _sums(whole))


def gram(x: Tensor) -> Tensor:
    """The lower triangle of XᵀX [d, d], for x [n, d]; what stands above it is not to be read."""
    width = x.shape[1]
    found = x.new_zeros(width, width)
    for start in range(0, width, _BLOCK):
        found[start:, start : start + _BLOCK] = x[:, start:].mT @ x[:, start : start + _BLOCK]
    return found


def _ranks(matrix: Tensor, sums: _Sums) -> Ranks:
    """From a lower triangle: the traces of it and of its square are Σσ² and Σσ⁴."""
    diagonal = matrix.diagonal()
    total = float(diagonal.sum())
    squares = float(2 * torch.tril(matrix, -1).square().sum() + diagonal.square().sum())
    return Ranks(sums.effective, total / sums.largest, total**2 / squares)


def _sums(matrix: Tensor) -> _Sums:
    return _summed(torch.linalg.eigvalsh(matrix))


def _summed(values: Tensor) -> _Sums:
    """From eigenvalues, ascending; those that are rounding count as 0."""
    roots = values.masked_fill(values < values[-1] * len(values) * torch.finfo(torch.float64).eps, 0.0).sqrt()
    return _Sums(float(roots.sum()), float(torch.special.entr(roots).sum()), float(values[-1]))


def _moved(matrix: Tensor, vector: Tensor, before: _Sums) -> _Sums | None:
    """The sums after vvᵀ was added to a matrix given by its lower triangle; None where the steps do not tell them."""
    length = float(vector.norm())
    if len(matrix) <= _SMALL or length == 0:
        return None
    diagonal, beside = _lanczos(torch.tril(matrix) + torch.tril(matrix, -1).mT, vector / length)
    steps, found = len(diagonal), list[_Sums]()
    for size in (max(1, steps - _FEW), steps):
        small = torch.diag(diagonal[:size]) + torch.diag(beside[: size - 1], -1)
        old = _summed(torch.linalg.eigvalsh(small))
        small[0, 0] += length**2
        new = _summed(torch.linalg.eigvalsh(small))
        change = (new.roots - old.roots, new.entropy - old.entropy)
        found.append(_Sums(before.roots + change[0], before.entropy + change[1], max(before.largest, new.largest)))
    few, all_steps = found
    return all_steps if abs(few.effective - all_steps.effective) <= _SETTLED * all_steps.effective else None


def _lanczos(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Of a symmetric matrix [d, d] in the space of t <= 64 steps, a tridiagonal: its diagonal [t], and what stands beside it [t - 1]."""
    basis = start.new_zeros(_STEPS, len(start))
    diagonal, beside = list[Tensor](), list[Tensor]()
    nothing = 1e-14 * float(matrix.diagonal().max())
    for step in range(_STEPS):
        basis[step] = start
        seen = basis[: step + 1]
        image = matrix @ start
        diagonal.append(image @ start)
        for _ in range(2):  # once leaves what rounding puts back
            image = image - (seen @ image) @ seen
        length = image.norm()
        if float(length) <= nothing:
            break
        beside.append(length)
        start = image / length
    return torch.stack(diagonal), torch.stack([*beside, start.new_zeros(())])[: len(diagonal) - 1]
