"""Edits of the part of a token that lies in a subspace: take it away, keep it alone, rotate it.

Letters: B batch, N selected heads, S tokens, D width, R rank of the subspace. Bases are [D, R] for all heads or [N, D, R].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interventions.gates import finite, fitted, orthonormal
from headscope.interventions.ops import LINEAR_STAGES, Op
from headscope.kernels.errors import EditError, ShapeError
from headscope.probe.call import AttentionCall

SKEW = 1e-4  # how far A + Aᵀ may be from 0, relative to A


@dataclass(frozen=True, eq=False)
class Project(Op):
    """x - strength · U Uᵀ x, or with `keep` the part in the subspace alone.

    Attributes:
        basis: U, orthonormal.
        strength: a number, or one for each column of U, [R]: x - U diag(s) Uᵀ x.
        keep: take away what is outside of the subspace.
        renormalise: give the result the length that x had; where nothing is left it stays zero.
    """

    basis: Tensor
    strength: float | Tensor = 1.0
    keep: bool = False
    renormalise: bool = False
    name: ClassVar[str] = "project"
    stages: ClassVar[frozenset[str]] = LINEAR_STAGES
    per_head: ClassVar[bool] = True

    @property
    def identity(self) -> bool:
        return isinstance(self.strength, float) and self.strength == 0.0

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        x = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        basis = fitted(self.basis, x)
        if isinstance(self.strength, Tensor):
            new = x - ((x @ basis) * self.strength.to(x)) @ basis.mT
        else:
            inside = (x @ basis) @ basis.mT
            new = x - self.strength * (x - inside if self.keep else inside)
        if self.renormalise:
            left = new.norm(dim=-1, keepdim=True)
            new = new * (x.norm(dim=-1, keepdim=True) / left.masked_fill(left == 0, 1))
        return new.to(value.dtype)


@dataclass(frozen=True, eq=False)
class Rotate(Op):
    """x turned inside a subspace: U exp(g A) Uᵀ x + (x - U Uᵀ x), A skew-symmetric, g the gate (SafeRoPE, arXiv 2604.01826).

    exp(g A) is orthogonal to the bit that A is skew: with iA = V diag(λ) Vᴴ, once for each head, exp(g A) c = V (exp(-i λ g) · Vᴴ c), so
    that each token costs R² and not a matrix exponential. Norms are kept, and the part outside the subspace.

    Attributes:
        basis: U, orthonormal.
        skew: A, [R, R] or [N, R, R].
    """

    basis: Tensor
    skew: Tensor
    name: ClassVar[str] = "rotate"
    stages: ClassVar[frozenset[str]] = LINEAR_STAGES
    per_head: ClassVar[bool] = True

    @property
    def identity(self) -> bool:
        return self._zero

    @cached_property
    def _zero(self) -> bool:
        return not self.skew.requires_grad and not bool(self.skew.any())

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        return self.gated(value, 1.0, call, stage)

    def gated(self, value: Tensor, gate: float | Tensor, call: AttentionCall, stage: str) -> Tensor:
        """The rotation by exp(gate · A): half a gate is half the angle, and every one keeps the norm."""
        return turn(value, self.basis, self.skew, gate)


def turn(value: Tensor, basis: Tensor, skew: Tensor, gate: float | Tensor) -> Tensor:
    """x + U (exp(g A) - 1) Uᵀ x for each token, differentiable in all four.

    Args:
        value: [B, N, S, D].
        basis: [D, R] or [N, D, R].
        skew: [R, R] or [N, R, R].
        gate: a number, or [B, N, S, 1]; where it is 0 the token comes back to the bit.
    """
    x = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    basis = fitted(basis, x)
    skew = skew.to(x)
    if skew.shape[-1] != basis.shape[-1] or (skew.ndim == 3 and skew.shape[0] not in (1, x.shape[1])):
        raise ShapeError(
            f"a rotation of {list(skew.shape)} for a basis of {list(basis.shape)} and {x.shape[1]} selected heads: "
            f"give [{basis.shape[-1]}, {basis.shape[-1]}], or one for each head"
        )
    c = x @ basis  # [B, N, S, R]
    if isinstance(gate, float) or skew.requires_grad:
        moved = _by_exponential(c, skew, gate)
    else:
        moved = _by_eigenvectors(c, skew, gate)
    return (moved @ basis.mT).add_(x).to(value.dtype)  # in place: the product is ours alone, and as large as x


def _by_exponential(c: Tensor, skew: Tensor, gate: float | Tensor) -> Tensor:
    """(exp(g A) - 1) c: one exponential for each head where the gate is a number, else one for each token. It has a derivative everywhere,
    unlike eigenvectors, which have none where eigenvalues meet: so while A is learned it goes this way."""
    if isinstance(gate, float):
        rotation: Tensor = torch.linalg.matrix_exp(gate * skew)
        return c @ rotation.mT - c
    rotations: Tensor = torch.linalg.matrix_exp(gate[..., None] * (skew if skew.ndim == 2 else skew[:, None]))  # [B, N, S, R, R]
    return (rotations @ c[..., None])[..., 0] - c


def _by_eigenvectors(c: Tensor, skew: Tensor, gate: float | Tensor) -> Tensor:
    """(exp(g A) - 1) c = V ((exp(-i λ g) - 1) · Vᴴ c), real."""
    wide = skew.double()
    values, vectors = torch.linalg.eigh(1j * wide)  # [.., R], [.., R, R]
    vectors = vectors.to(torch.complex128 if c.dtype == torch.float64 else torch.complex64)
    angle = gate * values.to(c.dtype)[..., None, :]  # [B, N, S, R]
    inside = c.to(vectors.dtype) @ vectors.conj()  # Vᴴ c as rows
    turned = inside * torch.complex(torch.cos(angle) - 1, -torch.sin(angle))
    found: Tensor = (turned @ vectors.mT).real
    return found.masked_fill(gate == 0, 0.0) if isinstance(gate, Tensor) else found


def project(basis: Tensor, strength: float | Tensor = 1.0, *, keep: bool = False, renormalise: bool = False) -> Project:
    """Take the part in a subspace away, x - strength · U Uᵀ x, or with `keep` all but that part.

    Args:
        basis: U, [D, R] or one for each selected head [N, D, R], orthonormal columns; a single direction may be [D], of any length.
        strength: 1 takes all of it, 0 nothing, 2 mirrors it, -1 doubles it; or one for each column, [R].
        keep: take away what is outside of the subspace.
        renormalise: give every token the length back that it had.

    Raises:
        EditError: a basis that is not orthonormal, or of a rank above the width.
    """
    if isinstance(basis, Tensor) and basis.ndim == 1:
        size = float(finite("basis", basis).double().norm())
        if not size:
            raise EditError("project() of the zero direction: give a direction of some length")
        basis = (basis.double() / size).to(basis.dtype)[:, None]
    basis = orthonormal(basis)
    if isinstance(strength, Tensor):
        finite("strength", strength)
        if keep or strength.shape != basis.shape[-1:]:
            raise EditError(
                f"project(strength {list(strength.shape)}{', keep=True' if keep else ''}): one for each column of the basis is "
                f"[{basis.shape[-1]}], and without keep"
            )
        return Project(basis, strength, False, bool(renormalise))
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) < float("inf"):
        raise EditError(f"project(strength={strength!r}): give a finite number; 1 takes the whole part away")
    return Project(basis, float(strength), bool(keep), bool(renormalise))


def rotate(basis: Tensor, skew: Tensor) -> Rotate:
    """Turn the part in a subspace by exp(A), exactly orthogonal; with a gate g by exp(g A).

    Args:
        basis: U, [D, R] or [N, D, R], orthonormal columns.
        skew: A, [R, R] or [N, R, R], with Aᵀ = -A.

    Raises:
        EditError: a basis that is not orthonormal, a rank above the head's width, a matrix that is not skew-symmetric.
    """
    basis = orthonormal(basis)
    finite("skew", skew)
    rank = basis.shape[-1]
    if skew.ndim not in (2, 3) or skew.shape[-2:] != (rank, rank):
        raise ShapeError(f"a rotation of {list(skew.shape)} in a subspace of rank {rank}: give [{rank}, {rank}], or one for each head")
    size = float(skew.detach().abs().max())
    if float((skew + skew.mT).detach().abs().max()) > SKEW * size:
        raise EditError("the matrix is not skew-symmetric, so its exponential would not be orthogonal: give S - Sᵀ")
    return Rotate(basis, (skew - skew.mT) / 2)
