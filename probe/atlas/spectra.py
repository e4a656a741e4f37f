"""Spectra of the two matrices of a head: what it attends by, W_Q W_Kᵀ, and what it moves, W_V W_O.

Both are E × E and of rank D at most; they are never formed. Letters: H heads, G key/value heads, D width of a head, E width of what is
read, F width of the other side, R = min(D, E, F).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels.errors import InputError, ShapeError
from headscope.probe.atlas.weights import HeadWeights
from headscope.probe.call import AttentionSite


@dataclass(frozen=True, eq=False)
class HeadSpectra:
    """Singular values of the heads of one site, in float64.

    Attributes:
        site: where.
        qk: [H, R], of W_Q W_Kᵀ, descending, without the scale of the scores; None where the weights were not found.
        ov: [H, R], of W_V W_O.
        undefined: why one of them is None.
    """

    site: AttentionSite
    qk: Tensor | None
    ov: Tensor | None
    undefined: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class StackSpectra:
    """Squared singular values of the three unfoldings of a site's stack of matrices [H, E, F], in float64, descending.

    Attributes:
        site: where.
        qk, ov: by head, by what is read (the query's side), by the other side (the key's, or what is written); None where undefined.
        undefined: why one of them is None.
    """

    site: AttentionSite
    qk: tuple[Tensor, Tensor, Tensor] | None
    ov: tuple[Tensor, Tensor, Tensor] | None
    undefined: Mapping[str, str]

    def ranks(self, circuit: str, share: float = 0.9) -> tuple[int, int, int] | None:
        """How many components of each mode hold a share of the energy: (heads, read, other side); None where undefined.

        The ranks of a Tucker decomposition that keeps this share in each mode. Their bounds are (H, E, E), with H·D in place of E where
        that is smaller, and G·D on the side of grouped keys or values.

        Raises:
            InputError: a circuit other than `qk` and `ov`, or a share outside (0, 1].
        """
        if circuit not in ("qk", "ov"):
            raise InputError(f"no circuit {circuit!r}: there are qk and ov")
        modes = self.qk if circuit == "qk" else self.ov
        if modes is None or any(float(mode.sum()) == 0 for mode in modes):
            return None
        first, second, third = (int(energy_ranks(mode.sqrt(), share)) for mode in modes)
        return first, second, third


def head_spectra(weights: HeadWeights) -> HeadSpectra:
    """Singular values of the two matrices of each head at a site.

    Args:
        weights: of `head_weights`; `weights.folded()` for those with the scale of the norm in front.
    """
    undefined: dict[str, str] = {}
    found: list[Tensor | None] = []
    for circuit in ("qk", "ov"):
        left, right, why = factors(weights, circuit)
        found.append(None if left is None or right is None else product_singular_values(left, right))
        if why:
            undefined[circuit] = why
    return HeadSpectra(weights.site, found[0], found[1], undefined)


def stack_spectra(weights: HeadWeights) -> StackSpectra:
    """Spectra of the heads of a site taken together, as a tensor [H, E, F]: what heads share.

    Args:
        weights: as for `head_spectra`.
    """
    undefined: dict[str, str] = {}
    found: list[tuple[Tensor, Tensor, Tensor] | None] = []
    for circuit in ("qk", "ov"):
        left, right, why = factors(weights, circuit)
        found.append(None if left is None or right is None else tucker_modes(left, right))
        if why:
            undefined[circuit] = why
    return StackSpectra(weights.site, found[0], found[1], undefined)


def factors(weights: HeadWeights, circuit: str) -> tuple[Tensor | None, Tensor | None, str]:
    """[H, D, E] and [H, D, F] in float64 whose product leftᵀ right is the head's matrix, or why there are none.

    Groups are repeated for the query heads that share them.
    """
    stages = ("q", "k") if circuit == "qk" else ("v", "o")
    why = weights.missing(*stages)
    if why is None and any(not bool(torch.isfinite(getattr(weights, stage)).all()) for stage in stages):
        why = "the weights are not finite"
    if why is not None:
        return None, None, why
    left, right = (getattr(weights, stage).double() for stage in stages)
    left, right = (x if x.shape[0] == weights.site.query_heads else x.repeat_interleave(weights.groups, dim=0) for x in (left, right))
    return left, right, ""


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """[..., R], singular values of leftᵀ right, descending: QR of both factors, then those of a matrix of D × D at most.

    Args:
        left: [..., D, E].
        right: [..., D, F].

    Raises:
        ShapeError: the factors differ in D.
    """
    _, core = _core(left, right)
    values: Tensor = torch.linalg.svdvals(core)
    return values


def product_singular_vectors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u [..., E, R], σ [..., R] and v [..., F, R] with leftᵀ right = u diag(σ) vᵀ; arguments and errors as above."""
    (basis, other), core = _core(left, right)
    u, values, vh = torch.linalg.svd(core, full_matrices=False)
    return basis @ u, values, other @ vh.mT


def _core(left: Tensor, right: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    if left.shape[:-1] != right.shape[:-1]:
        raise ShapeError(
            f"factors of {list(left.shape)} and {list(right.shape)}: all axes but the last must agree, [..., D, E] and [..., D, F]"
        )
    (basis, r), (other, s) = torch.linalg.qr(left.mT), torch.linalg.qr(right.mT)
    return (basis, other), r @ s.mT


def tucker_modes(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values of the three unfoldings of the stack of leftᵀ right, [H, E, F], which is not formed.

    With W_h = a_hᵀ b_h and b_h b_hᵀ = r_hᵀ r_h: ⟨W_h, W_g⟩ = Σ (a_h a_gᵀ) ⊙ (b_h b_gᵀ), and Σ_h W_h W_hᵀ = Σ_h (r_h a_h)ᵀ (r_h a_h), whose
    eigenvalues are the squared singular values of all r_h a_h under one another; likewise for the other side.

    Args:
        left: a, [H, D, E].
        right: b, [H, D, F].

    Returns:
        [H], [min(E, H·D)] and [min(F, H·D)], descending.
    """
    rows = [((left[h] @ left.mT) * (right[h] @ right.mT)).sum((1, 2)) for h in range(left.shape[0])]  # of [H, D, D] at a time
    between = torch.linalg.eigvalsh(torch.stack(rows)).flip(0).clamp_min(0)
    read, other = (torch.linalg.svdvals((triangle(b) @ a).flatten(0, 1)).square() for a, b in ((left, right), (right, left)))
    return between, read, other


def triangle(factor: Tensor) -> Tensor:
    """r with rᵀ r = b bᵀ, [H, min(D, F), D], for b [H, D, F]."""
    r: Tensor = torch.linalg.qr(factor.mT)[1]
    return r


# -- what a spectrum says -----------------------------------------------------------------------------------------------


def effective_ranks(values: Tensor) -> Tensor:
    """exp of the entropy of σ / Σσ (Roy and Vetterli 2007), [...]; NaN for a zero matrix.

    Args:
        values: singular values [..., R].
    """
    shares = values / values.sum(-1, keepdim=True)
    return torch.where(values.sum(-1) > 0, torch.special.entr(shares).sum(-1).exp(), torch.nan)


def stable_ranks(values: Tensor) -> Tensor:
    """Σσ² / σ₁², [...]; NaN for a zero matrix."""
    return values.square().sum(-1) / values.amax(-1).square()


def energy_ranks(values: Tensor, share: float = 0.9) -> Tensor:
    """The smallest r whose r largest σ² hold a share of Σσ², [...] int64; 0 for a zero matrix.

    Raises:
        InputError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"share={share}: give a share of the energy in (0, 1]")
    energy = values.square().sort(-1, descending=True).values
    total = energy.sum(-1, keepdim=True)
    reached = energy.cumsum(-1) >= share * total * (1 - 1e-12)
    return torch.where(total[..., 0] > 0, reached.to(torch.int64).argmax(-1) + 1, 0)


def report_ranks(values: Tensor, shares: Sequence[float] = (0.9,)) -> dict[str, Tensor]:
    """σ₁, effective rank, stable rank and energy ranks by name, each [...]."""
    return {
        "largest": values.amax(-1),
        "effective_rank": effective_ranks(values),
        "stable_rank": stable_ranks(values),
        **{f"energy_rank_{share:g}": energy_ranks(values, share) for share in shares},
    }
