"""The rotary embedding of a model, read off it as numbers: which dimensions it pairs, and by which angle it turns them where.

A rotary embedding is linear, whatever its convention: half-split, interleaved, partial, of several axes, with scaled lengths. Where the
queries before it are the output of a module, basis vectors are put in their place, one for each head of each copy of the input, and what
comes out at the door are the columns of its matrix at every position. Where one projection makes queries, keys and values together, the
matrix is the derivative of a query with respect to its part of the projection. No name of a function or a module of any model is looked at.

Letters: B batch, H query heads, S positions, D width of a head, P planes, R rows and C columns of a projection's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from headscope.kernels.errors import InputError
from headscope.probe.atlas.maps import Unreadable, find_maps
from headscope.probe.atlas.weights import learning
from headscope.probe.call import AttentionCall, AttentionSite, Handler
from headscope.probe.interception import intercept

SMALL = 1e-7  # of an entry of the matrix, beside a gain of about 1: the slowest planes hardly turn, and all others are exactly 0


@dataclass(frozen=True, eq=False)
class Rotary:
    """What one site does to its queries between projection and attention.

    Attributes:
        site: its name.
        planes: [P, 2], int64, pairs of dimensions of the queries at the door; the second is where a positive angle turns the first to.
        angles: [S, P], radians, by how much each plane is turned at each position, beside the first; not reduced to one turn where
            positions are regular.
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
        model: in eval mode; nothing of it is changed.
        inputs: keyword inputs of one sample; as many positions are read as they have.
        tolerance: how far the matrix may be from rotations in planes.

    Raises:
        InputError: more than one sample.
        NotIntercepted: no attention was caught.
    """
    found = {}
    matrices = _by_basis(model, inputs)
    for name, matrix in {**_by_derivatives(model, inputs, set(matrices)), **matrices}.items():
        rotary = _planes(name, matrix.double(), tolerance)
        if rotary is not None:
            found[name] = rotary
    return found


def _by_basis(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """[S, D, D] by site, the columns of each position's matrix, where queries before rotation are the output of a module of their own."""
    plain = _Columns(0)
    _run(model, inputs, plain)
    if any(value.shape[0] != 1 for value in plain.before.values()):
        raise InputError("read_rotary() takes one sample: give inputs of batch 1")
    widths = {name: value.shape[-1] for name, value in plain.before.items()}
    heads = {name: value.shape[1] for name, value in plain.before.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in widths}
    for turn in range(max((-(-widths[name] // heads[name]) for name in widths), default=0)):
        columns = _Columns(turn, basis=True)
        _run(model, inputs, columns)
        for name, after in columns.after.items():
            if name in parts:
                parts[name].append(after[0])  # [H, S, D]
    return {name: torch.cat(found)[: widths[name]].permute(1, 2, 0) for name, found in parts.items() if found}


def _by_derivatives(model: nn.Module, inputs: Mapping[str, Any], known: set[str]) -> dict[str, Tensor]:
    """The same for the other sites: how the first head's query changes with its part of the projection that made it."""
    parameters = {id(p): name for name, p in model.named_parameters()}
    seen = _Queries()
    with learning(model), torch.enable_grad():
        _run(model, inputs, seen)
    found = {}
    for name, q in seen.found.items():
        if name in known or q.grad_fn is None:
            continue
        if q.shape[0] != 1:
            raise InputError("read_rotary() takes one sample: give inputs of batch 1")
        matrix = _derivative(q, parameters)
        if matrix is not None:
            found[name] = matrix
    return found


def _derivative(q: Tensor, parameters: Mapping[int, str]) -> Tensor | None:
    """[S, D, D] of queries [1, H, S, D] with their graph; None where no projection makes D numbers of the first head out of D."""
    try:
        maps = find_maps(q, parameters)
    except Unreadable:
        return None
    length, width = q.shape[2:]
    for item in maps:
        columns = []
        for dimension in range(width):
            asked = torch.zeros_like(q)
            asked[0, 0, :, dimension] = 1
            (gradient,) = torch.autograd.grad(q, [GradientEdge(item.node, 0)], asked, retain_graph=True, allow_unused=True)
            if gradient is None:
                break
            columns.append(item.rows(gradient))  # [R, C]
        if len(columns) < width or columns[0].shape[0] != length:
            continue
        whole = torch.stack(columns, dim=1)  # [S, D, C]
        used = (whole != 0).any(0).any(0).nonzero().flatten()
        if len(used) == width:
            return whole[..., used]
    return None


def _run(model: nn.Module, inputs: Mapping[str, Any], handler: Handler) -> None:
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    learning_now = isinstance(handler, _Queries)
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(learning_now), intercept(model, handler, strict=False):
        model(**inputs)


@dataclass(eq=False)
class _Queries:
    """A handler that keeps the queries of the first call of each site, with their graph."""

    found: dict[str, Tensor] = field(default_factory=dict)
    changes: bool = False

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        return value

    def see(self, call: AttentionCall) -> None:
        self.found.setdefault(call.site.name, call.q)


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
    """Planes and angles of matrices [S, D, D]; None where they are the same at all positions, or no rotations in planes.

    They are told beside the first position's, so that a model may also put dimensions in another order.
    """
    positions, width = matrix.shape[:2]
    if positions < 2 or float(torch.linalg.matrix_rank(matrix[0])) < width:
        return None
    turned = matrix @ torch.linalg.inv(matrix[0])  # [S, D, D]
    moving = ((turned - turned[:1]).abs() > SMALL).any(0).any(0).nonzero().flatten().tolist()
    if not moving:
        return None
    reached = (turned.abs() > SMALL).any(0)  # [D, D], to which dimensions each column gets
    partners = {}
    for e in moving:
        others = [d for d in reached[:, e].nonzero().flatten().tolist() if d != e]
        if len(others) != 1:
            return None
        partners[e] = others[0]
    if any(partners.get(d) != e for e, d in partners.items()):
        return None
    angles, oriented = [], []
    for one, two in sorted({(min(e, d), max(e, d)) for e, d in partners.items()}):
        cosine, sine = turned[:, one, one], turned[:, two, one]
        if float((turned[:, one, two] + sine).abs().max()) > tolerance or float((turned[:, two, two] - cosine).abs().max()) > tolerance:
            return None
        steps = torch.remainder(torch.atan2(sine, cosine).diff() + torch.pi, 2 * torch.pi) - torch.pi
        turns = torch.cat([steps.new_zeros(1), torch.cumsum(steps, 0)])
        backwards = float(turns[turns.nonzero().flatten()[0]]) < 0
        oriented.append((two, one) if backwards else (one, two))
        angles.append(-turns if backwards else turns)
    planes = torch.tensor(oriented)
    gain = float(matrix[0][planes.flatten()].norm(dim=1).mean())
    passing = tuple(e for e in range(width) if e not in set(planes.flatten().tolist()))
    return Rotary(name, planes, torch.stack(angles, dim=1), gain, passing)
