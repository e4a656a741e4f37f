"""A health report as JSON: what is written can be read back, and nothing else is read. `health.schema.json` says the same in JSON Schema.

NaN, which JSON cannot say, is written as null; the reason stands under `undefined`, by the name of the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.kernels.errors import HeadscopeError, StoreError
from headscope.probe.call import AttentionSite
from headscope.probe.document import read_document, write_document
from headscope.probe.health.baselines import Baselines
from headscope.probe.health.findings import SEVERITIES, Finding, worst
from headscope.probe.health.measures import GradientMeasures, HeadMeasures, Plain, StreamMeasures, plain
from headscope.probe.health.thresholds import Thresholds, thresholds_of

if TYPE_CHECKING:
    from headscope.probe.health.report import HealthReport

SCHEMA = "headscope.health/v1"
KEYS = ("schema", "info", "worst", "findings", "notes", "layers", "heads", "streams", "gradients", "baselines", "thresholds")
MEANS = (
    "entropy_share", "diffuse", "routing", "hub", "p_max", "effective_share", "sink", "first_mass", "distance", "own", "previous",
    "row_residual", "row_cosine",
)  # fmt: skip
STATES = ("residual", "cosine", "cosine_centred", "effective_rank_centred", "stable_rank", "participation_centred", "update")


def encode(report: HealthReport) -> dict[str, object]:
    """Everything as plain values."""
    return {
        "schema": SCHEMA,
        "info": dict(report.info),
        "worst": report.worst,
        "findings": [one.to_dict() for one in report.findings],
        "notes": [one.to_dict() for one in report.notes],
        "layers": layer_rows(report),
        "heads": [one.to_dict() for one in report.heads],
        "streams": [one.to_dict() for one in report.streams],
        "gradients": [one.to_dict() for one in report.gradients],
        "baselines": report.baselines.to_dict(),
        "thresholds": report.thresholds.rows(),
    }


def decode(document: object) -> dict[str, Any]:
    """The fields of the report that `encode` wrote; what follows from them is computed again.

    Raises:
        StoreError: of another version, or damaged.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        told = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise StoreError(f"schema is {told!r}: this version reads {SCHEMA!r}")
    if missing := [key for key in KEYS if key not in document]:
        raise StoreError(f"it has no {', '.join(missing)}")
    if extra := sorted(document.keys() - set(KEYS)):
        raise StoreError(f"it has unknown {', '.join(map(repr, extra))}")
    try:
        found: dict[str, Any] = {
            "heads": tuple(HeadMeasures.from_dict(_site(row)) for row in document["heads"]),
            "streams": tuple(StreamMeasures.from_dict(row) for row in document["streams"]),
            "gradients": tuple(GradientMeasures.from_dict(_site(row)) for row in document["gradients"]),
            "baselines": _baselines(document["baselines"]),
            "findings": tuple(Finding.from_dict(row) for row in document["findings"]),
            "thresholds": _thresholds(document["thresholds"]),
            "info": dict(document["info"]),
        }
    except StoreError:
        raise
    except (HeadscopeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"it is damaged ({type(error).__name__}: {error})") from error
    if any(one.severity not in SEVERITIES[1:] for one in found["findings"]):
        raise StoreError(f"a finding has a severity that is none of {', '.join(SEVERITIES[1:])}")
    if document["worst"] != worst(found["findings"]):
        raise StoreError(f"worst is {document['worst']!r}, but the findings say otherwise: the file was changed")
    return found


def _baselines(given: Mapping[str, Any]) -> Baselines:
    fresh = given["fresh"]
    return Baselines(
        uniform={
            site: {name: math.nan if value is None else float(value) for name, value in row.items()}
            for site, row in given["uniform"].items()
        },
        heads=tuple(HeadMeasures.from_dict(_site(row)) for row in fresh["heads"]),
        streams=tuple(StreamMeasures.from_dict(row) for row in fresh["streams"]),
        absent=dict(given["absent"]),
        seed=int(given["seed"]),
    )


def _thresholds(given: Iterable[Mapping[str, Any]]) -> Thresholds:
    return thresholds_of({row["name"]: row["value"] for row in given})


def _site(row: Mapping[str, Any]) -> Mapping[str, Any]:
    names = {one.name for one in fields(AttentionSite)}
    if not isinstance(row["site"], dict) or set(row["site"]) != names:
        raise StoreError("a site has other fields than this version knows")
    return row


def save(report: HealthReport, path: Path) -> Path:
    """Write the file; it is whole or absent.

    Raises:
        StoreError: the folder takes no file.
    """
    return write_document(path, encode(report))


def load(path: Path) -> dict[str, Any]:
    """The fields of the report in a file.

    Raises:
        StoreError: there is none, or it is no report of this version.
    """
    return read_document(path, "health report", decode)


def places(heads: Sequence[HeadMeasures]) -> list[str]:
    """What to call each site: its layer where that is enough, else its name."""
    numbers = [one.site.layer for one in heads]
    if None not in numbers and len(set(numbers)) == len(numbers):
        return [str(number) for number in numbers]
    return [one.site.name for one in heads]


def layer_rows(report: HealthReport) -> list[dict[str, Plain]]:
    """One line for each site: means over its heads, and the hidden states behind its block where it is the only site of its layer."""
    layers = [one.site.layer for one in report.heads]
    rows = []
    for name, one in zip(places(report.heads), report.heads, strict=True):
        row: dict[str, Plain] = {"place": name, "site": one.site.name, "layer": one.site.layer, "heads": one.heads}
        row |= {field: plain(float(getattr(one, field).nanmean())) for field in MEANS}
        row["max_score"] = plain(float(one.max_score.nan_to_num(-math.inf).amax()))
        alone = one.site.layer is not None and layers.count(one.site.layer) == 1
        state = next((s for s in report.streams if alone and s.place == "output" and s.layer == one.site.layer and not s.stream), None)
        row |= {f"state_{field}": None if state is None else plain(getattr(state, field)) for field in STATES}
        rows.append(row)
    return rows


def finding_row(one: Finding) -> dict[str, Plain]:
    """A finding as one line of a table: its first evidence in columns of its own."""
    name, value, limit = one.evidence[0] if one.evidence else ("", math.nan, None)
    return {
        "severity": one.severity, "rule": one.rule, "layer": one.layer, "site": one.site, "head": one.head, "place": one.place,
        "evidence": name, "value": plain(value), "threshold": limit, "why": one.why, "remedies": "; ".join(one.remedies),
        "source": one.source,
    }  # fmt: skip
