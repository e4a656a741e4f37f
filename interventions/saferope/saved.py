"""A SafeRoPE on disk: one safetensors file, its facts in the header."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from headscope.interventions.recipe_file import write as write_whole
from headscope.interventions.saferope.tokens import Side
from headscope.kernels.errors import RecipeError
from headscope.probe.models import model_fingerprint

if TYPE_CHECKING:
    from headscope.interventions.saferope.saferope import SafeRoPE

SCHEMA = "headscope-saferope/1"
FIELDS = ("basis", "threshold", "gap", "skew")
Part = tuple[Side, tuple[int, ...], Tensor, Tensor, Tensor, Tensor]


def write(saferope: SafeRoPE, path: Path) -> Path:
    """The file, replaced whole if it exists."""
    tensors: dict[str, Tensor] = {}
    parts = []
    for index, part in enumerate(saferope.parts):
        parts.append({"site": part.side.site, "stage": part.side.stage, "heads": list(part.heads)})
        for field in FIELDS:
            tensors[f"{index}.{field}"] = getattr(part, field).detach().cpu().contiguous()
    roles = None if saferope.roles is None else {name: _plain(places) for name, places in saferope.roles.items()}
    facts = {"schema": SCHEMA, "role": saferope.role, "roles": roles, "parts": parts, "info": dict(saferope.info)}
    write_whole(path, safetensors.torch.save(tensors, metadata={"saferope": json.dumps(facts)}))
    return path


def read(path: Path, model: nn.Module | None, force: bool) -> tuple[list[Part], str | None, Any, dict[str, Any]]:
    """Parts, role, roles and info of a file; see `SafeRoPE.load`."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("saferope", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path.name} cannot be read as a SafeRoPE: {error}") from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise RecipeError(f"{path.name} is no SafeRoPE of this version: its header does not say {SCHEMA}")
    if model is not None:
        _compare(facts["info"], model, force)
    parts: list[Part] = []
    try:
        for index, entry in enumerate(facts["parts"]):
            basis, threshold, gap, skew = (tensors[f"{index}.{field}"] for field in FIELDS)
            parts.append((Side(entry["site"], entry["stage"]), tuple(entry["heads"]), basis, threshold, gap, skew))
        roles = facts["roles"]
        if roles is not None:
            roles = {name: {place: tuple(found) for place, found in places.items()} for name, places in roles.items()}
        return parts, facts["role"], roles, facts["info"]
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path.name} is damaged: {error!r}") from error


def _plain(places: Any) -> dict[str, list[int]]:
    return {place: list(found) for place, found in places.items()}


def _compare(info: dict[str, Any], model: nn.Module, force: bool) -> None:
    found, expected = model_fingerprint(model), info.get("fingerprint")
    if found == expected:
        return
    message = f"this SafeRoPE was fitted to another model: it names {str(expected)[:19]}…, this {type(model).__name__} is {found[:19]}…"
    if not force:
        raise RecipeError(f"{message}; load that model, or use force=True if the heads mean the same")
    warnings.warn(message, stacklevel=4)
