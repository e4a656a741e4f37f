"""An evaluation as JSON: what is written can be read back, and nothing else is read. `evaluation.schema.json` says the same.

NaN and infinity, which JSON cannot say, are written as null: the metric has no number there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.interventions.cost import EditCost, PlanCost, SiteCost
from headscope.interventions.evaluation.changes import Change, Price, Result
from headscope.kernels.errors import StoreError
from headscope.probe.attribution.interval import Interval
from headscope.probe.document import read_document, write_document

if TYPE_CHECKING:
    from headscope.interventions.evaluation.evaluation import Evaluation

SCHEMA = "headscope.evaluation/v1"
KEYS = ("schema", "info", "edits", "hits", "benign", "effect", "side_effects", "price", "results")


def encode(found: Evaluation) -> dict[str, object]:
    """Everything as plain values."""
    return {
        "schema": SCHEMA,
        "info": dict(found.info),
        "edits": list(found.edits),
        "hits": list(found.hits),
        "benign": found.benign,
        "effect": [_change(row) for row in found.effect],
        "side_effects": [_change(row) for row in found.side_effects],
        "price": None if found.price is None else encode_price(found.price),
        "results": [encode_result(one) for one in found.results],
    }


def decode(document: object) -> dict[str, Any]:
    """The fields of the evaluation that `encode` wrote.

    Raises:
        StoreError: of another version, or damaged.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        told = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise StoreError(f"schema is {told!r}: this version reads {SCHEMA!r}")
    if set(document) != set(KEYS):
        odd = sorted(set(document) ^ set(KEYS))
        raise StoreError(f"it should have the keys {', '.join(KEYS)}; {', '.join(map(repr, odd))} is missing or unknown")

    def change(row: Mapping[str, Any]) -> Change:
        means = {name: None if row[name] is None else Interval(**row[name]) for name in ("before", "after", "difference")}
        return Change(**{**row, **means})

    try:
        return {
            "effect": tuple(map(change, document["effect"])),
            "side_effects": tuple(map(change, document["side_effects"])),
            "benign": int(document["benign"]),
            "results": tuple(map(decode_result, document["results"])),
            "edits": tuple(map(str, document["edits"])),
            "hits": tuple(map(int, document["hits"])),
            "price": None if document["price"] is None else decode_price(document["price"]),
            "info": dict(document["info"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"it is damaged ({type(error).__name__}: {error})") from error


def encode_result(one: Result) -> dict[str, Any]:
    """One example as plain values."""
    sides = {when: {name: value if math.isfinite(value) else None for name, value in getattr(one, when).items()} for when in SIDES}
    return {"id": one.id, "benign": one.benign, **sides, "hits": list(one.hits)}


def decode_result(row: Mapping[str, Any]) -> Result:
    """What `encode_result` wrote."""
    if set(row) != {field.name for field in fields(Result)}:
        raise ValueError("a result has other fields than this version knows")
    before, after = ({name: math.nan if value is None else float(value) for name, value in row[when].items()} for when in SIDES)
    return Result(str(row["id"]), bool(row["benign"]), before, after, tuple(map(bool, row["hits"])))


def encode_price(price: Price) -> dict[str, Any]:
    """A price as plain values."""
    cost = price.cost.to_dict() | {"edits": list(map(asdict, price.cost.edits))}
    cost["sites"] = [asdict(site) | {"stages": list(site.stages)} for site in price.cost.sites]
    return {
        "example": price.example, "cost": cost, "bytes_without": price.bytes_without, "bytes_with": price.bytes_with,
    }  # fmt: skip


def decode_price(row: Mapping[str, Any]) -> Price:
    """What `encode_price` wrote."""
    cost = dict(row["cost"])
    cost["edits"] = tuple(EditCost(**edit) for edit in cost["edits"])
    cost["sites"] = tuple(SiteCost(**{**site, "stages": tuple(site["stages"])}) for site in cost["sites"])
    return Price(str(row["example"]), PlanCost(**cost), row["bytes_without"], row["bytes_with"])


def save(found: Evaluation, path: Path) -> Path:
    """Write the file; it is whole or absent.

    Raises:
        StoreError: the folder takes no file.
    """
    return write_document(path, encode(found))


def load(path: Path) -> dict[str, Any]:
    """The fields of the evaluation in a file.

    Raises:
        StoreError: there is none, or it is no evaluation of this version.
    """
    return read_document(path, "evaluation", decode)


SIDES = ("before", "after")


def _change(row: Any) -> dict[str, object]:
    plain = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: value.to_dict() if isinstance(value, Interval) else value for name, value in plain.items()}
