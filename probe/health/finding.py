"""One thing that a health report says, and how bad it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headscope.kernels.errors import InputError
from headscope.probe.health.measures import plain

SEVERITIES = ("ok", "info", "warn", "alarm")
Evidence = tuple[str, float, float | None]


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
        severity: `info`, `warn` or `alarm`; of a note `ok`.
        rule: its name, such as `token-collapse`.
        layer: the layer's number, where there is one.
        site: the name of the site, or the path of the block.
        head: None where it is said of the whole layer.
        evidence: (what was measured, its value, the threshold it passed or None), the decisive one first.
        why: what it means, in words.
        remedies: what may help, the likeliest first.
        source: where the rule comes from.
        heads: of a finding about a layer, the heads it was made from.
    """

    severity: str
    rule: str
    layer: int | None
    site: str
    head: int | None
    evidence: tuple[Evidence, ...]
    why: str
    remedies: tuple[str, ...] = ()
    source: str = ""
    heads: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """`3.5` for a head, `layer 3` for a layer, else the site."""
        where = self.site if self.layer is None else str(self.layer)
        return f"{where}.{self.head}" if self.head is not None else self.site if self.layer is None else f"layer {where}"

    def to_dict(self) -> dict[str, object]:
        return {
            "severity": self.severity, "rule": self.rule, "layer": self.layer, "site": self.site, "head": self.head,
            "evidence": [{"name": name, "value": plain(value), "threshold": limit} for name, value, limit in self.evidence],
            "why": self.why, "remedies": list(self.remedies), "source": self.source, "heads": list(self.heads),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Finding:
        """What `to_dict` wrote."""
        evidence = tuple((row["name"], math.nan if row["value"] is None else row["value"], row["threshold"]) for row in given["evidence"])
        rest = {name: given[name] for name in ("severity", "rule", "layer", "site", "head", "why", "source")}
        return cls(evidence=evidence, remedies=tuple(given["remedies"]), heads=tuple(given["heads"]), **rest)


def worst(findings: Iterable[Finding]) -> str:
    """The severest of them; `ok` where there are none."""
    return max((one.severity for one in findings), key=SEVERITIES.index, default="ok")


def severity_named(name: str) -> str:
    """A severity that can be asked for.

    Raises:
        InputError: there is none of that name.
    """
    if name not in SEVERITIES[1:]:
        raise InputError(f"no severity {name!r}: there are {', '.join(SEVERITIES[1:])}")
    return name
