"""The largest singular value of a pattern, and of what it leaves of the differences between tokens, each between two proven bounds.

Letters: B batch, H query heads, Q queries, K keys, F columns, T steps. P [Q, K] has rows that sum to 1; Π = I - 11ᵀ/Q; c = Pᵀ1.

σ₁(P) says how much a head can enlarge a hidden state, ‖ΠP‖₂ how much it can enlarge what distinguishes tokens. No map is held: only P x
and Pᵀu are asked for. With T = 0 nothing is asked, and c and ‖P‖_F give

    ‖c‖ / √Q  ≤  σ₁(P)  ≤  min(√(max c), ‖P‖_F)          ‖ΠP‖_F² = ‖P‖_F² - ‖c‖² / Q
    ‖ΠP‖_F / √(min(Q, K) - 1)  ≤  ‖ΠP‖₂  ≤  min(‖ΠP‖_F, upper bound of σ₁)

T steps of Golub and Kahan's bidiagonalisation (1965) make A Vₜ = Uₜ Bₜ and Aᵀ Uₜ = Vₜ Bₜᵀ + β v eₜᵀ. In the bases U and V, A is

    [ Bₜ  β eₜ vᵀ ]        ‖E‖_F² = ‖A‖_F² - ‖Bₜ‖_F² - β²
    [ 0   E       ]

so that ‖A‖₂ is at least the norm of [Bₜ, β eₜ] and at most that of the same matrix with ‖E‖_F in the place of E: unlike the residual of
a power iteration, which proves that some singular value is near, the upper bound holds for the largest. Where the rest of the spectrum is
heavy it stays above the free one, and the free one is given.

The bounds hold up to the rounding of P x and Pᵀu. ‖ΠP‖_F² is a difference: below √(eps) of the dtype a contrast is not resolved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels import identities
from headscope.kernels.errors import InputError, ShapeError
from headscope.kernels.lse_attention import LseAttention, ours
from headscope.kernels.problem import Problem

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Bounds, [B, H] in float64: sigma_low <= σ₁(P) <= sigma_high and contrast_low <= ‖ΠP‖₂ <= contrast_high."""

    sigma_low: Tensor
    sigma_high: Tensor
    contrast_low: Tensor
    contrast_high: Tensor


def free_spectrum(received: Tensor, squares: Tensor, rows: int | Tensor, keys: int | Tensor) -> Spectrum:
    """The bounds that need no product with P.

    Args:
        received: [B, H, K], c, 0 for keys that no row sees.
        squares: [B, H], ‖P‖_F².
        rows: Q, the rows that count; int or [B, H].
        keys: how many keys some row sees; int or [B, H].
    """
    received, squares = received.double(), squares.double()
    count = torch.as_tensor(rows, dtype=torch.float64, device=squares.device).expand_as(squares)
    seen = torch.as_tensor(keys, dtype=torch.float64, device=squares.device).expand_as(squares)
    mean = received.square().sum(dim=-1) / count  # ‖11ᵀP / Q‖_F²
    rest = (squares - mean).clamp_min(0.0)
    rank = torch.minimum(count, seen)
    sigma_high = torch.minimum(received.amax(dim=-1), squares).sqrt()
    sigma_low = torch.minimum(torch.maximum(mean, squares / rank).sqrt(), sigma_high)
    contrast_high = torch.minimum(rest.sqrt(), sigma_high)
    contrast_low = torch.minimum((rest / (rank - 1).clamp_min(1.0)).sqrt(), contrast_high)
    return Spectrum(sigma_low, sigma_high, contrast_low, contrast_high)


def bracket(
    apply: Product, apply_transposed: Product, received: Tensor, squares: Tensor, rows: int, steps: int, *, seed: int = 0
) -> Spectrum:
    """The bounds after `steps` products with P and as many with Pᵀ.

    Args:
        apply: x [B, H, K, 2] -> P x [B, H, Q, 2].
        apply_transposed: u [B, H, Q, 2] -> Pᵀu [B, H, K, 2].
        received: [B, H, K], c = Pᵀ1.
        squares: [B, H], ‖P‖_F².
        rows: Q.
        steps: T, 0 or more.
        seed: of the part of the start that is random; the same for all heads and batch entries.

    Raises:
        InputError: a negative number of steps.
    """
    if steps < 0:
        raise InputError(f"{steps} steps: give 0 for the bounds that cost nothing, or more")
    free = free_spectrum(received, squares, rows, (received > 0).sum(dim=-1))
    if steps == 0:
        return free
    received, squares = received.double(), squares.double()
    total = torch.stack([squares, (squares - received.square().sum(dim=-1) / rows).clamp_min(0.0)], dim=-1)  # [B, H, 2], ‖A‖_F²
    low, high = _bidiagonalise(_Pair(apply, apply_transposed), _start(received, seed), total, min(steps, rows, received.shape[-1]))
    sigma_high = torch.minimum(free.sigma_high, high[..., 0])
    contrast_high = torch.minimum(torch.minimum(free.contrast_high, high[..., 1]), sigma_high)
    return Spectrum(
        torch.minimum(torch.maximum(free.sigma_low, low[..., 0]), sigma_high),
        sigma_high,
        torch.minimum(torch.maximum(free.contrast_low, low[..., 1]), contrast_high),
        contrast_high,
    )


@torch.no_grad()
def spectrum(
    problem: Problem,
    steps: int = 8,
    *,
    kernel: LseAttention | None = None,
    lse: Tensor | None = None,
    received: Tensor | None = None,
    sum_squares: Tensor | None = None,
    seed: int = 0,
) -> Spectrum:
    """The bounds for an attention, streamed: 2 calls of the kernel for each step, and one for each of the numbers not handed in.

    Args:
        problem: every query sees a key, and no query is masked out.
        kernel: any attention that returns lse; None takes `ours()`.
        lse, sum_squares: [B, H, Q], and received: [B, H, K], of the same problem.
        seed: of the random part of the start.

    Raises:
        InputError: as `headscope.kernels.identities`; a negative number of steps; a row that sees no key.
        ShapeError: there is no query or no key.
    """
    if 0 in problem.shape:
        raise ShapeError(f"a pattern of {problem.shape[2]} queries and {problem.shape[3]} keys has no singular values")
    kernel = ours() if kernel is None else kernel
    lse = identities.log_sum_exp(kernel, problem) if lse is None else lse
    if bool(torch.isneginf(lse).any()):
        raise InputError("a query sees no key: leave out the rows that see none, they are no part of the pattern")
    squares = identities.sum_squares(kernel, problem, lse=lse) if sum_squares is None else sum_squares
    columns = identities.received(kernel, problem, lse=lse) if received is None else received

    def apply(x: Tensor) -> Tensor:
        return identities.apply(kernel, problem, x)

    def apply_transposed(u: Tensor) -> Tensor:
        return identities.apply_transposed(kernel, problem, u, lse=lse)

    return bracket(apply, apply_transposed, columns, squares.double().sum(dim=-1), problem.shape[2], steps, seed=seed)


@dataclass(frozen=True)
class _Pair:
    """P and ΠP beside one another: the first column of a product is that of P, the second that of ΠP."""

    apply: Product
    apply_transposed: Product

    def forth(self, x: Tensor) -> Tensor:
        """[B, H, K, 2] -> [B, H, Q, 2]."""
        return _centred(self.apply(x).double())

    def back(self, u: Tensor) -> Tensor:
        """[B, H, Q, 2] -> [B, H, K, 2]."""
        return self.apply_transposed(_centred(u)).double()


def _centred(u: Tensor) -> Tensor:
    """Π times the second column."""
    return torch.stack([u[..., 0], u[..., 1] - u[..., 1].mean(dim=-1, keepdim=True)], dim=-1)


def _start(received: Tensor, seed: int) -> Tensor:
    """[B, H, K, 2]: Pᵀ1 for P, for which it is never orthogonal to the first singular vector, both being non-negative.

    ΠP has the constant vector in its kernel. Its own start mixes what its first singular vector often is, near and far (a ramp) and much
    and little received, with noise, which nothing is orthogonal to.
    """
    seen = received > 0
    noise = torch.randn(received.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(received.device)
    ramp = torch.arange(received.shape[-1], dtype=torch.float64, device=received.device)
    count = seen.sum(dim=-1, keepdim=True).clamp_min(1)
    mixed = torch.zeros_like(received)
    for part in (noise.expand_as(received), ramp.expand_as(received), received):
        apart = (part - (part * seen).sum(dim=-1, keepdim=True) / count) * seen
        length = apart.norm(dim=-1, keepdim=True)
        mixed = mixed + apart / length.masked_fill(length == 0, 1.0)
    return torch.stack([received, mixed], dim=-1)


def _bidiagonalise(pair: _Pair, start: Tensor, total: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of ‖A‖₂, [B, H, 2] each, for both columns at once.

    Args:
        start: [B, H, K, 2].
        total: [B, H, 2], ‖A‖_F².
    """
    nothing = 1e-7 * total.sqrt()  # a new direction shorter than this is rounding
    matrix = total.new_zeros(*total.shape, steps + 1, steps + 1)  # B with β eₜ beside it and ‖E‖_F in the corner
    right, left = [_along(start, start.norm(dim=-2), start.new_zeros(total.shape))], list[Tensor]()
    for step in range(steps):
        u = _orthogonal(pair.forth(right[-1]), left)
        alpha = u.norm(dim=-2)
        left.append(_along(u, alpha, nothing))
        v = _orthogonal(pair.back(left[-1]), right)
        beta = v.norm(dim=-2)
        right.append(_along(v, beta, nothing))
        matrix[..., step, step], matrix[..., step, step + 1] = alpha, beta
    matrix[..., steps, steps] = (total - matrix.square().sum(dim=(-2, -1))).clamp_min(0.0).sqrt()
    broken = ~matrix.isfinite().all(dim=-1).all(dim=-1)  # [B, H, 2]; svdvals would refuse the others with them
    matrix = matrix.masked_fill(broken[..., None, None], 0.0)
    bounds = (torch.linalg.svdvals(part)[..., 0].masked_fill(broken, torch.nan) for part in (matrix[..., :steps, :], matrix))
    low, high = bounds
    return low, high


def _along(x: Tensor, length: Tensor, nothing: Tensor) -> Tensor:
    """x [B, H, N, 2] over its length [B, H, 2]; 0 where it is no longer than nothing."""
    small = length <= nothing
    return (x / length.masked_fill(small, 1.0)[..., None, :]).masked_fill(small[..., None, :], 0.0)


def _orthogonal(x: Tensor, basis: list[Tensor]) -> Tensor:
    """x without its part in the basis, taken out twice: once leaves what rounding puts back."""
    for _ in range(2 if basis else 0):
        for one in basis:
            x = x - one * (one * x).sum(dim=-2, keepdim=True)
    return x
