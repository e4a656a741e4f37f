"""Edits of the rotary embedding of one head: turn its planes, weigh its frequencies, move a token to another position.

Letters: N selected heads, S tokens, D width, P planes, T positions of a table.

A rotary embedding turns P planes, pairs of the D dimensions, by an angle that depends on the position; the other dimensions pass. Which
pairs those are, and by which angles, `headscope.probe.rotary.read_rotary` reads off a model of any convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headscope.interventions.gates import finite
from headscope.interventions.ops import Op
from headscope.kernels.errors import EditError, SelectionError, ShapeError
from headscope.probe.call import AttentionCall

if TYPE_CHECKING:
    from headscope.probe.rotary import Rotary

QK = frozenset({"q.pre", "k.pre", "q", "k"})


@dataclass(frozen=True, eq=False)
class Phase(Op):
    """Each plane turned by an angle of its own. Only the difference between queries and keys matters: the same at both is no change.

    Attributes:
        planes: [P, 2], int64, the pairs of dimensions, the second a quarter turn ahead of the first.
        angles: [P] or [N, P], radians.
    """

    planes: Tensor
    angles: Tensor
    name: ClassVar[str] = "phase"
    stages: ClassVar[frozenset[str]] = QK
    per_head: ClassVar[bool] = True

    @property
    def identity(self) -> bool:
        return not self.angles.requires_grad and not bool(self.angles.any())

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        return self.gated(value, 1.0, call, stage)

    def gated(self, value: Tensor, gate: float | Tensor, call: AttentionCall, stage: str) -> Tensor:
        """The turn by gate · angles."""
        angles = _numbers("angles", self.angles, value)[..., None, :]  # [N or 1, 1, P]
        return turned(value, self.planes, gate * angles)


@dataclass(frozen=True, eq=False)
class Band(Op):
    """Each plane's length multiplied by a gain of its own, such as less of the fast ones (Untwisting RoPE, arXiv 2602.05013).

    Attributes:
        planes: as in `Phase`.
        gains: [P] or [N, P].
    """

    planes: Tensor
    gains: Tensor
    name: ClassVar[str] = "band"
    stages: ClassVar[frozenset[str]] = QK
    per_head: ClassVar[bool] = True

    @property
    def identity(self) -> bool:
        return not self.gains.requires_grad and bool((self.gains == 1).all())

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        gains = _numbers("gains", self.gains, value)[..., None, :]  # [N or 1, 1, P]
        _check_planes(self.planes, value)
        changed = value.clone()
        for side in self.planes.to(value.device).unbind(1):
            changed[..., side] = value[..., side] * gains
        return changed


@dataclass(frozen=True, eq=False)
class Reposition(Op):
    """Tokens moved to other positions: what the rotary embedding did is undone, and done again for the new place.

    Attributes:
        planes: as in `Phase`.
        table: [T, P], radians, by how much each plane is turned at each position.
        positions: [S], the new position of each token; None where all move by `shift`.
        shift: how far they move.
    """

    planes: Tensor
    table: Tensor
    positions: Tensor | None = None
    shift: int = 0
    name: ClassVar[str] = "reposition"
    stages: ClassVar[frozenset[str]] = frozenset({"pos"})

    @property
    def identity(self) -> bool:
        return self.positions is None and self.shift == 0

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        count = value.shape[2]
        first = max(call.keys - call.injected - count, 0) if stage == "q" and call.site.kind == "self" else 0
        now = torch.arange(first, first + count)
        new = now + self.shift
        if self.positions is not None:
            if first + count > len(self.positions):
                raise SelectionError(
                    f"positions for {len(self.positions)} tokens, and {call.site.name} has {first + count}: give one for each token"
                )
            new = self.positions[first : first + count]
        for name, places in (("stands at", now), ("is to stand at", new)):
            if count and not 0 <= int(places.min()) <= int(places.max()) < len(self.table):
                raise SelectionError(
                    f"a token of {call.site.name} {name} position {int(places.min())} to {int(places.max())}: the table that was read has "
                    f"0 to {len(self.table) - 1}; read the rotary embedding on a longer input"
                )
        angles = (self.table[new] - self.table[now]).to(value.device, torch.float32)  # [S, P]
        return turned(value, self.planes, angles)


def turned(value: Tensor, planes: Tensor, angles: Tensor) -> Tensor:
    """[B, N, S, D] with each plane turned by an angle that broadcasts to [B, N, S, P]."""
    _check_planes(planes, value)
    first, second = planes.to(value.device).unbind(1)
    x = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    cos, sin = torch.cos(angles.to(x)), torch.sin(angles.to(x))
    one, two = x[..., first], x[..., second]
    changed = x.clone()
    changed[..., first] = one * cos - two * sin
    changed[..., second] = one * sin + two * cos
    return changed.to(value.dtype)


def phase(planes: Tensor | Rotary, angles: Tensor) -> Phase:
    """Turn each rotary plane by an angle, radians. Angles of δ · frequency at q are a shift of the queries by δ positions.

    Args:
        planes: [P, 2] pairs of dimensions, or what `read_rotary` found.
        angles: [P], or [N, P] for each selected head.

    Raises:
        ShapeError: they do not fit together.
    """
    found = _planes(planes)
    return Phase(found, _fits("angles", finite("angles", angles), found))


def band(planes: Tensor | Rotary, gains: Tensor) -> Band:
    """Multiply the length of each rotary plane. Args and Raises as `phase`."""
    found = _planes(planes)
    return Band(found, _fits("gains", finite("gains", gains), found))


def reposition(rotary: Rotary, positions: Sequence[int] | Tensor | None = None, *, shift: int = 0) -> Reposition:
    """Move tokens to other positions, at stage `pos`: `queries=` and `keys=` say which, and on which side.

    Args:
        rotary: what `read_rotary` found.
        positions: the new position of every token of the sequence, selected or not.
        shift: how far all selected tokens move, where no positions are given.

    Raises:
        EditError: neither, or both.
    """
    if (positions is None) == (shift == 0):
        raise EditError("reposition(): give positions=, one for each token, or a shift= other than 0")
    new = None if positions is None else torch.as_tensor(positions, dtype=torch.int64).reshape(-1)
    return Reposition(rotary.planes, rotary.angles, new, int(shift))


def _planes(planes: Tensor | Rotary) -> Tensor:
    return checked_planes(planes if isinstance(planes, Tensor) else planes.planes)


def checked_planes(found: Tensor) -> Tensor:
    """[P, 2], int64.

    Raises:
        ShapeError: they are no pairs, or share a dimension.
    """
    if found.ndim != 2 or found.shape[1] != 2 or found.is_floating_point() or len(set(found.flatten().tolist())) != found.numel():
        raise ShapeError(f"planes {list(found.shape)} of {found.dtype}: give [P, 2], each dimension in one pair at most")
    return found.long()


def _fits(name: str, numbers: Tensor, planes: Tensor) -> Tensor:
    if numbers.ndim not in (1, 2) or numbers.shape[-1] != len(planes):
        raise ShapeError(f"{name} {list(numbers.shape)} for {len(planes)} planes: give [{len(planes)}], or [heads, {len(planes)}]")
    return numbers


def _check_planes(planes: Tensor, value: Tensor) -> None:
    if planes.numel() and int(planes.max()) >= value.shape[-1]:
        raise ShapeError(f"a plane of dimension {int(planes.max())} in heads of width {value.shape[-1]}: read the planes off this model")


def _numbers(name: str, numbers: Tensor, value: Tensor) -> Tensor:
    if numbers.ndim == 2 and numbers.shape[0] not in (1, value.shape[1]):
        raise ShapeError(f"{name} {list(numbers.shape)} for {value.shape[1]} selected heads: give one row for each")
    return numbers.to(value if value.dtype == torch.float64 else torch.float32)
