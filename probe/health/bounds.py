"""What the scores alone say about a pattern: how low its entropy and how high its largest probability can be.

Letters: n visible keys of a row.

Both hold for every single row of any softmax, and each is reached by some row, so neither can be made sharper. They turn a number about
scores, which a training run can watch or limit, into one about attention: while a row's spread stays small its entropy cannot collapse,
and while its range stays bounded its attention must thin out as keys are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.kernels.checks import shown
from headscope.kernels.errors import InputError, ShapeError


def entropy_floor(spread: Tensor, keys: Tensor | int) -> Tensor:
    """The least entropy that a row can have, nats: log(1 + (n-1)β) + σ sqrt(n(n-1)) β / (1 + (n-1)β), β = exp(-σ sqrt(n / (n-1))).

    Reached by a row with one score above n - 1 equal ones. From log n at σ = 0 it falls to 0. σReparam keeps σ small through
    σ <= scale · ‖W_Q W_Kᵀ‖₂ ‖X Xᵀ‖₂. Source: Zhai et al. 2023, theorem 3.1.

    Args:
        spread: [...], σ = ‖s_i - mean(s_i)‖₂ over the visible scores of a row, sqrt(n) times their standard deviation.
        keys: [...], n; broadcastable to the spread.

    Returns:
        [...], float64. 0 for one key; NaN for none, and where the spread is NaN or infinite.

    Raises:
        InputError: a spread below 0.
        ShapeError: shapes that do not fit.
    """
    sigma, n = _together("spread", spread, keys)
    others = (n - 1).clamp_min(1.0)
    beta = (-sigma * (n / others).sqrt()).exp()
    total = 1 + others * beta
    floor = total.log() + sigma * (n * others).sqrt() * beta / total
    return floor.masked_fill(n == 1, 0.0).masked_fill((n < 1) | ~sigma.isfinite(), torch.nan)


def top_probability_ceiling(score_range: Tensor, keys: Tensor | int) -> Tensor:
    """The largest probability that a row can give to one key: e^Δ / (n - 1 + e^Δ).

    Reached by a row with one score Δ above n - 1 equal ones. Where Δ is bounded it falls as 1 / n: attention dilutes. Source: Veličković
    et al. 2024, "softmax is not enough".

    Args:
        score_range: [...], Δ, the largest visible score of a row less its smallest.
        keys: [...], n; broadcastable to the range.

    Returns:
        [...], float64. 1 for one key; NaN for none, and where the range is NaN or infinite.

    Raises:
        InputError: a range below 0.
        ShapeError: shapes that do not fit.
    """
    delta, n = _together("score_range", score_range, keys)
    ceiling = (delta - (n - 1).clamp_min(1.0).log()).sigmoid()
    return ceiling.masked_fill(n == 1, 1.0).masked_fill((n < 1) | ~delta.isfinite(), torch.nan)


def _together(name: str, value: Tensor, keys: Tensor | int) -> tuple[Tensor, Tensor]:
    if bool((value < 0).any()):
        raise InputError(f"{name} {float(value.amin()):.4g}: a distance between scores is 0 or more")
    counts = torch.as_tensor(keys, device=value.device)
    try:
        shape = torch.Size(torch.broadcast_shapes(value.shape, counts.shape))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ShapeError(f"{name} is {shown(value)} and keys are {shown(counts)}; they must broadcast to one shape") from None
    return value.double().expand(shape), counts.double().expand(shape)
