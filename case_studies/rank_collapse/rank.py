"""How far a matrix is from rank one, in the measures that the literature uses; each [..., N, E] -> [...].

Letters: N tokens (rows), E columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centred(x: Tensor) -> Tensor:
    """The rows minus their mean: the residual Π x."""
    return x - x.mean(-2, keepdim=True)


def composite(x: Tensor) -> Tensor:
    """sqrt(‖x‖₁ ‖x‖_∞), the "norm" of Dong et al. 2021 (it is not one; the triangle inequality fails)."""
    return (x.abs().sum(-2).amax(-1) * x.abs().sum(-1).amax(-1)).sqrt()


def residual(x: Tensor) -> Tensor:
    """‖Π x‖_F / ‖x‖_F, in [0, 1]: 0 where all rows are equal."""
    return torch.linalg.matrix_norm(centred(x)) / torch.linalg.matrix_norm(x)


def residual_composite(x: Tensor) -> Tensor:
    """The same in the composite norm, in [0, 2)."""
    return composite(centred(x)) / composite(x)


def numerical_rank(x: Tensor, share: float = 1e-2) -> Tensor:
    """How many singular values exceed a share of the largest."""
    values = torch.linalg.svdvals(x)
    return (values > share * values[..., :1]).sum(-1).to(x.dtype)


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the singular values (not their squares) as shares of their sum (Roy, Vetterli 2007)."""
    values = torch.linalg.svdvals(x)
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


def column_deviation(pattern: Tensor) -> Tensor:
    """Mean |c_j - 1| of the column sums of a square pattern: 0 where it is doubly stochastic."""
    return (pattern.sum(-2) - 1).abs().mean(-1)
