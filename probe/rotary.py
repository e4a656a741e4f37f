"""The rotary embedding of a model, read off it as numbers: which dimensions it pairs, and by which angle it turns them where.

A rotary embedding is linear, whatever its convention: half-split, interleaved, partial, of several axes, with scaled lengths. So the
queries before it are replaced by basis vectors, one for each head of each copy of the input, and what comes out at the door are the
columns of its matrix at every position. No name of a function or a module of any model is looked at.

Letters: B batch, H query heads, S positions, D width of a head, P planes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception import intercept

SMALL = 1e-7  # of an entry of the matrix, beside a gain of about 1: the slowest planes hardly turn, and all others are exactly 0


@dataclass(frozen=True, eq=False)
class Rotary:
    """What one site does to its queries between projection and attention.

    Attributes:
        site: its name.
        planes: [P, 2], int64, pairs of dimensions; the second is where a positive angle turns the first to.
        angles: [S, P], radians, by how much each plane is turned at each position; not reduced to one turn where positions are regular.
        gain: the length of a vector in these planes after it, over that before: not 1 in YaRN.
        passing: dimensions that are left alone.
    """

    site: str
    planes: Tensor
    angles: Tensor
    gain: float
    passing: tuple[int, ...]

    @property
    def frequencies(self) -> Tensor:
        """[P], radians a position, from the first two positions."""
        if len(self.angles) < 2:
            raise InputError(f"{self.site}: one position tells no frequency; read the rotary embedding on a longer input")
        return self.angles[1] - self.angles[0]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "site": self.site, "planes": self.planes.tolist(), "angles": self.angles.tolist(), "gain": self.gain,
            "passing": list(self.passing),
        }  # fmt: skip


def read_rotary(model: nn.Module, inputs: Mapping[str, Any], *, tolerance: float = 1e-3) -> dict[str, Rotary]:
    """The rotary embedding of every site that has one, by the site's name.

    Args:
        model: in eval mode; nothing of it is changed. Its queries before rotation have to be the output of a module of their own.
        inputs: keyword inputs of one sample; as many positions are read as they have.
        tolerance: how far the matrix may be from rotations in planes.

    Raises:
        InputError: more than one sample.
        SelectionError: no site whose queries before rotation could be reached.
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    if any(value.shape[0] != 1 for value in tensors):
        raise InputError("read_rotary() takes one sample: give inputs whose first axis is 1")
    plain = _Columns(0)
    _run(model, inputs, plain)
    if not plain.before:
        raise SelectionError(
            "no site of this model has a query projection of its own, so what stands between it and attention is not known"
        )
    widths = {name: value.shape[-1] for name, value in plain.before.items()}
    heads = {name: value.shape[1] for name, value in plain.before.items()}
    matrices: dict[str, list[Tensor]] = {name: [] for name in widths}
    for round_ in range(max(-(-widths[name] // heads[name]) for name in widths)):
        columns = _Columns(round_, basis=True)
        _run(model, inputs, columns)
        for name, after in columns.after.items():
            if name in matrices:
                matrices[name].append(after[0])  # [H, S, D]
    found = {}
    for name, parts in matrices.items():
        if parts:
            matrix = torch.cat(parts)[: widths[name]].double()  # [D, S, D], row e: what became of basis vector e
            rotary = _planes(name, matrix, tolerance)
            if rotary is not None:
                found[name] = rotary
    return found


def _run(model: nn.Module, inputs: Mapping[str, Any], handler: _Columns) -> None:
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), torch.no_grad(), intercept(model, handler, strict=False):
        model(**inputs)


@dataclass(eq=False)
class _Columns:
    """A handler that puts basis vectors in the place of queries before rotation, and keeps what comes to the door."""

    round: int
    basis: bool = False
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    changes: bool = True

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"q.pre"}) if site.mechanism == "module" or site.name in self.before else frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        self.before[call.site.name] = value
        if not self.basis:
            return value
        heads, width = value.shape[1], value.shape[-1]
        rows = torch.zeros(heads, width, dtype=value.dtype, device=value.device)
        for head in range(heads):
            if self.round * heads + head < width:
                rows[head, self.round * heads + head] = 1
        return rows[None, :, None].expand_as(value).contiguous()

    def see(self, call: AttentionCall) -> None:
        if call.site.name in self.before and call.step == 0:
            self.after[call.site.name] = call.q.detach().clone()


def _planes(name: str, matrix: Tensor, tolerance: float) -> Rotary | None:
    """Planes and angles of matrices [D, S, D]; None where they are the same at all positions, or no rotations in planes."""
    width, positions = matrix.shape[:2]
    reached = (matrix.abs() > SMALL).any(1)  # [D, D], which dimensions each one gets to
    moving = [e for e in range(width) if bool((matrix[e] - matrix[e, :1]).abs().max() > SMALL)]
    if not moving:
        return None
    partners = {}
    for e in moving:
        others = [int(d) for d in reached[e].nonzero().flatten() if int(d) != e]
        if len(others) == 1:
            partners[e] = others[0]
    pairs = sorted({(min(e, d), max(e, d)) for e, d in partners.items() if partners.get(d) == e})
    if not pairs:
        return None
    angles, oriented, gains = [], [], []
    for one, two in pairs:
        cosine, sine = matrix[one, :, one], matrix[one, :, two]  # basis vector `one` goes to cos · one + sin · two
        angle = torch.atan2(sine, cosine)
        gain = torch.hypot(cosine, sine)
        if bool((matrix[two, :, one] + sine).abs().max() > tolerance) or bool((matrix[two, :, two] - cosine).abs().max() > tolerance):
            return None
        turns = torch.cat([angle[:1], angle[:1] + torch.cumsum(torch.remainder(angle.diff() + torch.pi, 2 * torch.pi) - torch.pi, 0)])
        backwards = positions > 1 and float(turns[1] - turns[0]) < 0
        oriented.append((two, one) if backwards else (one, two))
        angles.append(-turns if backwards else turns)
        gains.append(gain)
    gain_of_all = torch.stack(gains)
    paired = {e for pair in pairs for e in pair}
    return Rotary(
        name,
        torch.tensor(oriented),
        torch.stack(angles, dim=1),
        float(gain_of_all.mean()),
        tuple(e for e in range(width) if e not in paired),
    )
