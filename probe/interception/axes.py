"""Which axis is which: names that follow a tensor through reshapes, permutations and slices.

Attention code moves its axes around freely: batch and heads fused, windows split off, queries before or after keys.
Each dimension of a tracked tensor carries the atoms it is made of; a reshape regroups atoms, a permutation moves them,
and whatever came of it, `arrange` brings the tensor into a canonical order and `restore` takes it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Atom:
    """One elementary axis.

    Attributes:
        key: identity; splitting an atom appends to it, so sorting by key is memory order.
        size: its length now.
        lead: index at which the original position 0 now stands (negative after a slice that cut it off).
    """

    key: tuple[str | int, ...]
    size: int
    lead: int = 0


Axes = tuple[tuple[Atom, ...], ...]  # per dimension, the atoms it consists of, slowest first


def size_of(atoms: Sequence[Atom]) -> int:
    return prod(atom.size for atom in atoms)


def reshape(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Axes after a reshape to `shape`; None where it mixes atoms that cannot be told apart."""
    if 0 in shape:  # nothing tells which axes were merged into an empty one
        return axes if [size_of(dim) for dim in axes] == list(shape) else None
    pending = [atom for dim in axes for atom in dim]
    result: list[tuple[Atom, ...]] = []
    for size in shape:
        taken: list[Atom] = []
        have = 1
        while pending and (have < size or (have == size and pending[0].size == 1 and not taken)):
            atom = pending.pop(0)
            if size % (have * atom.size) == 0:
                taken.append(atom)
                have *= atom.size
                continue
            need = size // have
            if size % have or atom.size % need or atom.lead:
                return None
            taken.append(Atom((*atom.key, 0), need))
            pending.insert(0, Atom((*atom.key, 1), atom.size // need))
            have = size
        if have != size:
            return None
        result.append(tuple(taken))
    if any(atom.size != 1 for atom in pending):
        return None
    if result and pending:
        result[-1] = (*result[-1], *pending)
    return tuple(result)


def permute(axes: Axes, order: Sequence[int]) -> Axes:
    return tuple(axes[i] for i in order)


def swap(axes: Axes, first: int, second: int) -> Axes:
    order = list(range(len(axes)))
    order[first], order[second] = order[second], order[first]
    return permute(axes, order)


def squeeze(axes: Axes, dims: Sequence[int]) -> Axes:
    """Drop dimensions of size one; their atoms move to a neighbour, where they change nothing."""
    kept = [list(dim) for i, dim in enumerate(axes) if i not in dims]
    loose = [atom for i, dim in enumerate(axes) if i in dims for atom in dim]
    if kept:
        kept[-1].extend(loose)
    return tuple(tuple(dim) for dim in kept)


def resized(dim: tuple[Atom, ...], size: int, shift: int) -> tuple[Atom, ...] | None:
    """A dimension after slicing or padding: `size` entries left, position p now at p + shift."""
    if size == size_of(dim) and shift == 0:
        return dim
    large = [atom for atom in dim if atom.size != 1]
    if len(large) > 1:
        return None
    target = large[0] if large else (dim[-1] if dim else None)
    if target is None:
        return None
    return tuple(replace(a, size=size, lead=a.lead + shift) if a is target else a for a in dim)


def index(axes: Axes, shape: Sequence[int], key: object) -> Axes | None:
    """Axes after `tensor[key]` with integers, slices, None and Ellipsis; None for anything else."""
    parts = list(key) if isinstance(key, tuple) else [key]
    if any(not (p is None or p is Ellipsis or isinstance(p, slice | int)) or isinstance(p, bool) for p in parts):
        return None
    named = sum(p is not None and p is not Ellipsis for p in parts)
    full: list[object] = []
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    for part in parts:
        full.extend([slice(None)] * (len(axes) - named) if part is Ellipsis else [part])
    result: list[tuple[Atom, ...]] = []
    dim = 0
    for part in full:
        if part is None:
            result.append(())
            continue
        if isinstance(part, slice):
            start, stop, step = part.indices(shape[dim])
            if step != 1:
                return None
            cut = resized(axes[dim], max(0, stop - start), -start)
            if cut is None:
                return None
            result.append(cut)
        elif any(atom.size != 1 for atom in axes[dim]):
            return None  # one position of a real axis: no longer the whole map
        dim += 1
    return tuple(result)


def refine(atoms: Sequence[Atom], finer: Sequence[Atom]) -> list[Atom]:
    """Replace each atom by the pieces that `finer` has split it into, if any."""
    result: list[Atom] = []
    for atom in atoms:
        pieces = sorted((f for f in finer if f.key != atom.key and f.key[: len(atom.key)] == atom.key), key=lambda f: f.key)
        result.extend(pieces if pieces and size_of(pieces) == atom.size else [atom])
    return result


def arrange(tensor: Tensor, axes: Axes, groups: Sequence[Sequence[Atom]], expand: bool = False) -> Tensor:
    """The tensor with one dimension per group, in that order.

    Args:
        axes: what the dimensions of `tensor` are made of.
        groups: atoms of each wanted dimension; an atom the tensor lacks was broadcast there.
        expand: give missing atoms their full size (a view) instead of leaving them out.
    """
    finer = [atom for group in groups for atom in group]
    atoms = refine([atom for dim in axes for atom in dim], finer)
    position = {atom.key: i for i, atom in enumerate(atoms)}
    flat = tensor.reshape([atom.size for atom in atoms])
    order = [position[atom.key] for group in groups for atom in group if atom.key in position]
    missing = [i for i in range(len(atoms)) if i not in order]
    if any(atoms[i].size != 1 for i in missing):
        raise ValueError("an axis of the tensor belongs to no group")
    flat = flat.permute(order + missing)
    flat = flat.reshape([atoms[i].size for i in order])
    if expand:
        sizes, here = [], 0
        for group in groups:
            for atom in group:
                present = atom.key in position
                if not present:
                    flat = flat.unsqueeze(here)
                sizes.append(atom.size)
                here += 1
        flat = flat.expand(sizes)
    return flat.reshape([size_of([a for a in group if expand or a.key in position]) for group in groups])


def restore(value: Tensor, like: Tensor, axes: Axes, groups: Sequence[Sequence[Atom]]) -> Tensor:
    """Undo `arrange`: `value` in the shape and order of `like`."""
    finer = [atom for group in groups for atom in group]
    atoms = refine([atom for dim in axes for atom in dim], finer)
    position = {atom.key: i for i, atom in enumerate(atoms)}
    wanted = [atom for group in groups for atom in group if atom.key in position]
    flat = value.reshape([atom.size for atom in wanted])
    spot = {atom.key: i for i, atom in enumerate(wanted)}
    loose = [atom for atom in atoms if atom.key not in spot]
    flat = flat.reshape([*flat.shape, *(1 for _ in loose)])
    spot.update({atom.key: len(wanted) + i for i, atom in enumerate(loose)})
    return flat.permute([spot[atom.key] for atom in atoms]).reshape(like.shape)
