"""How the numbers of an operation or a gate stand in a recipe: one mapping, its fields by name, tensors by reference.

value: {basis: {tensor: edit0.basis}, skew: {tensor: edit0.skew}}
gate: {kind: risk, basis: {tensor: edit0.gate.basis}, threshold: 0.7}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor

from headscope.interventions import injection, mixing, normaliser, rotary, separation, subspace, warping
from headscope.interventions.gates import GATES, Gate
from headscope.interventions.gates import MAKERS as GATE_MAKERS
from headscope.interventions.ops import Op
from headscope.kernels.errors import RecipeError


def _reposition(planes: Tensor, table: Tensor, positions: Tensor | None = None, shift: int = 0) -> Op:
    return rotary.Reposition(rotary.checked_planes(planes), table, positions, shift)


# Operations of several numbers; those of one are written as that number. The maker takes the fields by their names.
MAKERS: dict[str, Callable[..., Op]] = {
    "project": subspace.project,
    "rotate": subspace.rotate,
    "inject": injection.inject,
    "mix": mixing.mix,
    "noise": mixing.noise,
    "phase": rotary.phase,
    "band": rotary.band,
    "reposition": _reposition,
    "warp": warping.warp,
    "sinkhorn": normaliser.sinkhorn,
    "separate": separation.separate,
}
KINDS = {
    kind.name: kind
    for kind in (
        subspace.Project, subspace.Rotate, injection.Inject, mixing.Mix, mixing.Noise, rotary.Phase, rotary.Band, rotary.Reposition,
        warping.Warp, normaliser.Sinkhorn, separation.Separate,
    )
}  # fmt: skip


def encode_fields(holder: Op | Gate, prefix: str, tensors: dict[str, Tensor]) -> dict[str, object]:
    """The fields that differ from their defaults, as plain values; tensors are added under `prefix.field` and referred to."""
    found: dict[str, object] = {}
    for field in fields(holder):
        value = getattr(holder, field.name)
        if isinstance(value, Tensor):
            name = f"{prefix}.{field.name}"
            tensors[name] = value.detach().cpu().contiguous().clone()
            found[field.name] = {"tensor": name}
        elif field.default is MISSING or value != field.default:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    if isinstance(holder, warping.Warp) and holder.motion not in warping.PLAIN:
        del found["amount"]
    return found


def encode_gate(gate: Gate, prefix: str, tensors: dict[str, Tensor]) -> dict[str, object]:
    """A gate as a recipe has it.

    Raises:
        RecipeError: a gate that is a function.
    """
    if type(gate) not in GATES.values():
        raise RecipeError(f"the gate {gate} cannot be saved: a recipe holds no code; use {', '.join(GATES)}")
    return {"kind": gate.name, **encode_fields(gate, f"{prefix}.gate", tensors)}


def decode_op(name: str, value: object, tensor: Callable[[Mapping[str, object]], Tensor]) -> Op:
    """The operation that `encode_fields` wrote."""
    return MAKERS[name](**_arguments(name, KINDS[name], value, tensor))


def decode_gate(value: object, tensor: Callable[[Mapping[str, object]], Tensor]) -> Gate:
    """The gate that `encode_gate` wrote.

    Raises:
        RecipeError: no such gate, or fields that it has not.
    """
    if not isinstance(value, Mapping) or value.get("kind") not in GATES:
        raise RecipeError(f"gate is {value!r}: it is a number, or a mapping whose kind is one of {', '.join(GATES)}")
    kind = str(value["kind"])
    rest = {key: entry for key, entry in value.items() if key != "kind"}
    return GATE_MAKERS[kind](**_arguments(kind, GATES[kind], rest, tensor))


def _arguments(
    name: str, kind: type[Op] | type[Gate], value: object, tensor: Callable[[Mapping[str, object]], Tensor]
) -> dict[str, Any]:  # fmt: skip
    """The fields by name, tensors read, each of a type that some operation takes."""
    names = [field.name for field in fields(kind)]
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} takes a mapping with the keys {', '.join(names)}, not {value!r}")
    for key in value:
        if key not in names:
            raise RecipeError(f"unknown key {key!r} of {name}: the keys are {', '.join(names)}")
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in value]
    if isinstance(value.get("motion"), str) and value["motion"] not in warping.PLAIN:
        missing = [field for field in missing if field != "amount"]
    if missing:
        raise RecipeError(f"{name} needs {', '.join(missing)}")
    given = {key: tensor(entry) if isinstance(entry, Mapping) else entry for key, entry in value.items()}
    for key, entry in given.items():
        if not isinstance(value[key], Mapping) and not isinstance(entry, (int, float, str, list, type(None))):
            raise RecipeError(f"{key} of {name} is {entry!r}: it is a number, a word, a list or {{tensor: name}}")
    return given
