"""An attribution as JSON: what is written can be read back as it was, and nothing else is read.

`attribution.schema.json` beside this file says the same in JSON Schema. Maps are not part of it: they are made on demand from tensors
that only the process that ran the model holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headscope.kernels.errors import NonFiniteError, ShapeError, StoreError
from headscope.probe.attribution.ledger import Entry, Ledger
from headscope.probe.call import AttentionSite
from headscope.probe.document import read_document, write_document

if TYPE_CHECKING:
    from headscope.probe.attribution.attribution import Attribution

SCHEMA = "headscope.attribution/v1"
KEYS = (
    "schema", "method", "target", "value", "passed", "dtype", "inputs", "heads", "blocks", "parts", "sites", "ledger", "unruled",
    "warnings", "tokens", "pieces", "special", "settings",
)  # fmt: skip
LEDGER = ("target", "inputs", "constants", "absorbed", "by_kind", "residual", "tolerance", "closes", "entries")
AXES = {"heads": 3, "blocks": None, "parts": None, "inputs": None}
SITE = {field.name: field.type for field in fields(AttentionSite)}  # annotations as text
TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (float, int)}


def encode(attribution: Attribution) -> dict[str, object]:
    """Everything but maps as plain values.

    Raises:
        NonFiniteError: a number is NaN or infinite, which JSON cannot say.
        ShapeError: a relevance is complex, or an axis has no entries.
    """
    tables = {name: dict(getattr(attribution, name)) for name in AXES}
    types = [tensor.dtype for table in tables.values() for tensor in table.values()] or [torch.float32]
    for name, table in tables.items():
        for key, tensor in table.items():
            if tensor.is_complex() or not tensor.numel():
                raise ShapeError(f"{name} of {key} are {list(tensor.shape)} of {tensor.dtype}: a file holds real numbers, at least one")
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{name} of {key} are not finite: they cannot be written as JSON")
    return {
        "schema": SCHEMA,
        "method": attribution.method,
        "target": attribution.target,
        "value": attribution.value,
        "passed": attribution.passed,
        "dtype": str(reduce(torch.promote_types, types)).removeprefix("torch."),
        **{name: {key: tensor.detach().cpu().tolist() for key, tensor in table.items()} for name, table in tables.items()},
        "sites": [site.to_dict() for site in attribution.sites],
        "ledger": None if attribution.ledger is None else attribution.ledger.to_dict(),
        "unruled": [list(row) for row in attribution.unruled],
        "warnings": list(attribution.warnings),
        "tokens": None if attribution.tokens is None else [list(row) for row in attribution.tokens],
        "pieces": None if attribution.pieces is None else [list(row) for row in attribution.pieces],
        "special": None if attribution.special is None else attribution.special.tolist(),
        "settings": dict(attribution.settings),
    }


def decode(document: object) -> dict[str, Any]:
    """The fields of the attribution that `encode` wrote.

    Raises:
        StoreError: of another version, damaged, or with books that say something else than their entries.
    """
    found = _mapping(document, "the file")
    if found.get("schema") != SCHEMA:
        raise StoreError(f"schema is {found.get('schema')!r}: this version reads {SCHEMA!r}")
    _check_keys(found, KEYS, "the file")
    dtype = getattr(torch, _word(found["dtype"], "dtype"), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise StoreError(f"dtype is {found['dtype']!r}: give a floating-point type such as 'float32'")
    tables = {
        name: {key: _tensor(value, dtype, f"{name} of {key}", axes) for key, value in _mapping(found[name], name).items()}
        for name, axes in AXES.items()
    }
    ledger = None if found["ledger"] is None else _ledger(found["ledger"])
    if found["passed"] is not (None if ledger is None else ledger.closes):
        raise StoreError(f"passed is {found['passed']!r}, but the books say otherwise: the file was changed")
    unruled = []
    for row in _list(found["unruled"], "unruled"):
        if not isinstance(row, list) or [type(cell) for cell in row] != [str, str, int]:
            raise StoreError(f"unruled holds {row!r}: expected [operation, module, calls]")
        unruled.append((row[0], row[1], row[2]))
    special = found["special"]
    if special is not None:
        rows = [[_flag(cell) for cell in _list(row, "special")] for row in _list(special, "special")]
        special = _rectangle(rows, torch.bool, "special")
    return {
        "method": _word(found["method"], "method"),
        "target": _word(found["target"], "target"),
        "value": _number(found["value"], "value"),
        **tables,
        "sites": tuple(_site(site) for site in _list(found["sites"], "sites")),
        "ledger": ledger,
        "unruled": tuple(unruled),
        "warnings": tuple(_word(text, "warnings") for text in _list(found["warnings"], "warnings")),
        "tokens": _texts(found["tokens"], "tokens"),
        "pieces": _texts(found["pieces"], "pieces"),
        "special": special,
        "settings": _mapping(found["settings"], "settings"),
    }


def save(attribution: Attribution, path: Path) -> Path:
    """Write the file; it is whole or absent.

    Raises:
        StoreError: the folder takes no file.
    """
    return write_document(path, encode(attribution))


def load(path: Path) -> dict[str, Any]:
    """The fields of the attribution in a file.

    Raises:
        StoreError: there is none, or it is no attribution of this version.
    """
    return read_document(path, "attribution", decode)


def _check_keys(given: Mapping[str, object], keys: Iterable[str], where: str) -> None:
    wanted = set(keys)
    if missing := sorted(wanted - given.keys()):
        raise StoreError(f"{where} has no {', '.join(missing)}")
    if extra := sorted(given.keys() - wanted):
        raise StoreError(f"{where} has unknown {', '.join(map(repr, extra))}")


def _tensor(given: object, dtype: torch.dtype, where: str, axes: int | None) -> Tensor:
    found = _rectangle(given, torch.float64, where)
    if axes is not None and found.dim() != axes:
        raise StoreError(f"{where} have {found.dim()} axes: expected {axes}")
    if not bool(torch.isfinite(found).all()):
        raise StoreError(f"{where} are not finite")
    return found.to(dtype)


def _rectangle(given: object, dtype: torch.dtype, where: str) -> Tensor:
    """A tensor from nested lists of numbers (or flags), all of one length."""

    def flat(value: object, depth: int) -> Iterable[float]:
        if isinstance(value, list):
            if depth == len(shape) and not deepest:
                shape.append(len(value))
            if not value or depth >= len(shape) or len(value) != shape[depth]:
                raise StoreError(f"{where} are no table: a list has {len(value)} entries")
            for entry in value:
                yield from flat(entry, depth + 1)
        elif depth != len(shape) or isinstance(value, bool) is not (dtype == torch.bool) or not isinstance(value, int | float):
            raise StoreError(f"{where} hold {value!r}")
        else:
            deepest.append(depth)
            yield float(value)

    shape: list[int] = []
    deepest: list[int] = []  # not empty once the first number was met: no further axis may begin
    try:
        numbers = list(flat(given, 0))
    except OverflowError as error:
        raise StoreError(f"{where} hold a number that is too large") from error
    return torch.tensor(numbers, dtype=torch.float64).to(dtype).reshape(shape)


def _ledger(given: object) -> Ledger:
    found = _mapping(given, "ledger")
    _check_keys(found, LEDGER, "ledger")
    entries = []
    for row in _list(found["entries"], "entries"):
        cells = _mapping(row, "an entry")
        _check_keys(cells, ("kind", "operation", "module", "amount"), "an entry")
        kind, operation, module = (_word(cells[key], key) for key in ("kind", "operation", "module"))
        entries.append(Entry(kind, operation, module, _number(cells["amount"], "amount")))
    ledger = Ledger(
        target=_number(found["target"], "target"),
        inputs=_number(found["inputs"], "inputs"),
        constants={key: _number(value, key) for key, value in _mapping(found["constants"], "constants").items()},
        entries=tuple(entries),
        tolerance=_number(found["tolerance"], "tolerance"),
    )
    told = ledger.to_dict()
    for key in ("absorbed", "by_kind", "residual", "closes"):
        if found[key] != told[key]:
            raise StoreError(f"the ledger says {key} {found[key]!r}, its entries {told[key]!r}: the file was changed")
    return ledger


def _site(given: object) -> AttentionSite:
    found = _mapping(given, "a site")
    _check_keys(found, SITE, "a site")
    for key, value in found.items():
        allowed = [kind for name in str(SITE[key]).split(" | ") for kind in TYPES.get(name, ())]
        if not (value is None and "None" in str(SITE[key])) and type(value) not in allowed:
            raise StoreError(f"a site has {key} {value!r}: expected {SITE[key]}")
    return AttentionSite(**found)


def _mapping(given: object, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise StoreError(f"{where} is {type(given).__name__}: expected a mapping")
    return given


def _list(given: object, where: str) -> list[Any]:
    if not isinstance(given, list):
        raise StoreError(f"{where} is {type(given).__name__}: expected a list")
    return given


def _texts(given: object, where: str) -> list[list[str]] | None:
    return None if given is None else [[_word(text, where) for text in _list(row, where)] for row in _list(given, where)]


def _word(given: object, where: str) -> str:
    if not isinstance(given, str):
        raise StoreError(f"{where} is {given!r}: expected text")
    return given


def _flag(given: object) -> bool:
    if not isinstance(given, bool):
        raise StoreError(f"special holds {given!r}: expected true or false")
    return given


def _number(given: object, where: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise StoreError(f"{where} is {given!r}: expected a number")
    return float(given)
