"""A head atlas as JSON: what is written can be read back as it was, and nothing else is read.

`atlas.schema.json` beside this file says the same in JSON Schema.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headscope.kernels.errors import HeadscopeError, StoreError
from headscope.probe.atlas.card import rules_of
from headscope.probe.atlas.circuits import Circuits
from headscope.probe.atlas.composition import KINDS, Composed
from headscope.probe.atlas.directions import Direction, Pole
from headscope.probe.atlas.redundancy import DISTANCES, Redundancy
from headscope.probe.call import AttentionSite
from headscope.probe.document import read_document, write_document

if TYPE_CHECKING:
    from headscope.probe.atlas.atlas import HeadAtlas

SCHEMA = "headscope.atlas/v1"
KEYS = (
    "schema", "sites", "scores", "uniform", "sink_key", "on", "undefined", "redundancy", "circuits", "thresholds", "warnings", "info",
    "cards",
)  # fmt: skip


def encode(atlas: HeadAtlas) -> dict[str, object]:
    """Everything as plain values; an undefined number is None. The cards are told beside the numbers they follow from."""
    return {
        "schema": SCHEMA,
        "sites": [site.to_dict() for site in atlas.sites],
        "scores": {name: _numbers(table) for name, table in atlas.scores.items()},
        "uniform": {name: _numbers(table) for name, table in atlas.uniform.items()},
        "sink_key": atlas.sink_key.tolist(),
        "on": dict(atlas.on),
        "undefined": dict(atlas.undefined),
        "redundancy": None if atlas.redundancy is None else _of_redundancy(atlas.redundancy),
        "circuits": None if atlas.circuits is None else _of_circuits(atlas.circuits),
        "thresholds": dict(atlas.thresholds),
        "warnings": list(atlas.warnings),
        "info": dict(atlas.info),
        "cards": [card.to_dict() for card in atlas.cards()],
    }


def decode(document: object) -> dict[str, Any]:
    """The fields of the atlas that `encode` wrote; the cards are made again from them.

    Raises:
        StoreError: of another version, or damaged.
    """
    found = _mapping(document, "the file")
    if found.get("schema") != SCHEMA:
        raise StoreError(f"schema is {found.get('schema')!r}: this version reads {SCHEMA!r}")
    if missing := sorted(set(KEYS) - found.keys()):
        raise StoreError(f"the file has no {', '.join(missing)}")
    if extra := sorted(found.keys() - set(KEYS)):
        raise StoreError(f"the file has unknown {', '.join(map(repr, extra))}")
    try:
        sites = tuple(AttentionSite(**_mapping(site, "a site")) for site in _list(found["sites"], "sites"))
        shape = (len(sites), max((site.query_heads for site in sites), default=0))
        rules_of(_mapping(found["thresholds"], "thresholds"))
        return {
            "sites": sites,
            "scores": _tables(found["scores"], "scores", shape),
            "uniform": _tables(found["uniform"], "uniform", shape),
            "sink_key": _table(found["sink_key"], "sink_key", shape).nan_to_num(nan=-1).long(),
            "on": _words(found["on"], "on"),
            "undefined": _words(found["undefined"], "undefined"),
            "redundancy": None if found["redundancy"] is None else _redundancy(_mapping(found["redundancy"], "redundancy")),
            "circuits": None if found["circuits"] is None else _circuits(_mapping(found["circuits"], "circuits")),
            "thresholds": _mapping(found["thresholds"], "thresholds"),
            "warnings": tuple(_word(text, "warnings") for text in _list(found["warnings"], "warnings")),
            "info": _mapping(found["info"], "info"),
        }
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, HeadscopeError) as error:
        raise StoreError(f"the file is damaged: {error}") from error


def save(atlas: HeadAtlas, path: Path) -> Path:
    """Write the file; it is whole or absent.

    Raises:
        StoreError: the folder takes no file.
    """
    return write_document(path, encode(atlas))


def load(path: Path) -> dict[str, Any]:
    """The fields of the atlas in a file.

    Raises:
        StoreError: there is none, or it is no atlas of this version.
    """
    return read_document(path, "atlas", decode)


def _of_redundancy(found: Redundancy) -> dict[str, object]:
    return {
        "heads": [list(head) for head in found.heads],
        "cosine": _numbers(found.cosine),
        "divergence": _numbers(found.divergence),
        "clusters": [list(group) for group in found.clusters],
        "distance": found.distance,
        "threshold": found.threshold,
        "queries": found.queries,
        "notes": list(found.notes),
    }


def _redundancy(found: Mapping[str, Any]) -> Redundancy:
    heads = tuple((_word(site, "heads"), int(head)) for site, head in _list(found["heads"], "heads"))
    shape = (len(heads), len(heads))
    clusters = tuple(tuple(int(place) for place in group) for group in _list(found["clusters"], "clusters"))
    if any(not 0 <= place < len(heads) for group in clusters for place in group):
        raise StoreError("clusters name a head that is not there")
    if found["distance"] not in DISTANCES:
        raise StoreError(f"distance is {found['distance']!r}: expected one of {', '.join(DISTANCES)}")
    return Redundancy(
        heads, _table(found["cosine"], "cosine", shape), _table(found["divergence"], "divergence", shape), clusters, found["distance"],
        float(found["threshold"]), int(found["queries"]), tuple(_word(text, "notes") for text in _list(found["notes"], "notes")),
    )  # fmt: skip


def _of_circuits(found: Circuits) -> dict[str, object]:
    rows = []
    for (site, head), own in found.directions.items():
        plain = [
            {"circuit": one.circuit, "value": one.value, "share": one.share, "poles": [_of_pole(pole) for pole in one.poles]} for one in own
        ]
        rows.append({"site": site, "head": head, "directions": plain})
    return {"compositions": [dict(vars(pair)) for pair in found.compositions], "directions": rows, "reasons": dict(found.reasons)}


def _of_pole(pole: Pole) -> dict[str, object]:
    return {"reads": [list(end) for end in pole.reads], "writes": [list(end) for end in pole.writes]}


def _circuits(found: Mapping[str, Any]) -> Circuits:
    pairs = tuple(Composed(**_mapping(pair, "a composition")) for pair in _list(found["compositions"], "compositions"))
    if wrong := [pair for pair in pairs if pair.kind not in KINDS or not math.isfinite(_cell(pair.excess, "compositions"))]:
        raise StoreError(f"compositions hold {wrong[0]}")
    directions = {
        (_word(row["site"], "site"), int(row["head"])): tuple(_direction(one) for one in _list(row["directions"], "directions"))
        for row in _list(found["directions"], "directions")
    }
    return Circuits(pairs, directions, _words(found["reasons"], "reasons"))


def _direction(found: Mapping[str, Any]) -> Direction:
    first, second = (
        Pole(*(tuple((_word(text, side), _cell(size, side)) for text, size in pole[side]) for side in ("reads", "writes")))
        for pole in _list(found["poles"], "poles")
    )
    value, share = _cell(found["value"], "value"), _cell(found["share"], "share")
    return Direction(_word(found["circuit"], "circuit"), value, share, (first, second))


def _numbers(table: Tensor) -> list[list[float | None]]:
    return [[cell if math.isfinite(cell) else None for cell in row] for row in table.tolist()]


def _tables(given: object, where: str, shape: tuple[int, int]) -> dict[str, Tensor]:
    return {name: _table(table, f"{where} of {name}", shape) for name, table in _mapping(given, where).items()}


def _table(given: object, where: str, shape: tuple[int, int]) -> Tensor:
    rows = [[_cell(cell, where) for cell in _list(row, where)] for row in _list(given, where)]
    if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
        raise StoreError(f"{where} are no table of {shape[0]} × {shape[1]} numbers")
    return torch.tensor(rows, dtype=torch.float64).reshape(shape)


def _cell(given: object, where: str) -> float:
    if given is None:
        return math.nan
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise StoreError(f"{where} hold {given!r}: expected a number or null")
    return float(given)


def _words(given: object, where: str) -> dict[str, str]:
    return {name: _word(text, where) for name, text in _mapping(given, where).items()}


def _mapping(given: object, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise StoreError(f"{where} is {type(given).__name__}: expected a mapping")
    return given


def _list(given: object, where: str) -> list[Any]:
    if not isinstance(given, list):
        raise StoreError(f"{where} is {type(given).__name__}: expected a list")
    return given


def _word(given: object, where: str) -> str:
    if not isinstance(given, str):
        raise StoreError(f"{where} is {given!r}: expected text")
    return given
