"""What was measured of a model's attention, and what is to be said of it.

Letters: L layers, H heads, N tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.kernels.errors import HeadscopeError, InputError, SelectionError
from headscope.probe.health import report_file
from headscope.probe.health.baselines import Baselines
from headscope.probe.health.findings import SEVERITIES, Finding, notes_of, worst
from headscope.probe.health.measures import GradientMeasures, HeadMeasures, Plain, StreamMeasures
from headscope.probe.health.report_figure import figure
from headscope.probe.health.report_html import fragment, page
from headscope.probe.health.report_words import verdict
from headscope.probe.health.thresholds import Thresholds
from headscope.probe.whole_file import write_whole

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

TABLES = ("heads", "streams", "gradients", "findings", "notes", "layers")


@dataclass(frozen=True, eq=False)
class HealthReport:
    """The health of a model's attention on some inputs.

    Attributes:
        heads: of every site, in execution order.
        streams: of the hidden states before the first block and behind every one.
        gradients: how much of the loss's gradient reaches queries, keys and values, where a loss was given.
        baselines: what the numbers are compared with.
        findings: what the rules found, the worst first.
        thresholds: where they fire.
        info: what was measured and how, ready for JSON: class of the model, fingerprint, versions, tokens, seed, warnings.
    """

    heads: tuple[HeadMeasures, ...]
    streams: tuple[StreamMeasures, ...] = ()
    gradients: tuple[GradientMeasures, ...] = ()
    baselines: Baselines = field(default_factory=Baselines)
    findings: tuple[Finding, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    info: Mapping[str, object] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The severest finding: `ok`, `info`, `warn` or `alarm`."""
        return worst(self.findings)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is well or worth knowing: heads that are sharp and healthy, such as previous-token heads, and uncommon patterns."""
        return notes_of(self.heads, self.findings, self.thresholds)

    def at_least(self, severity: str) -> tuple[Finding, ...]:
        """The findings of this severity or worse.

        Raises:
            InputError: no such severity.
        """
        if severity not in SEVERITIES[1:]:
            raise InputError(f"no severity {severity!r}: there are {', '.join(SEVERITIES[1:])}")
        return tuple(one for one in self.findings if SEVERITIES.index(one.severity) >= SEVERITIES.index(severity))

    def of(self, site: str) -> HeadMeasures:
        """The heads of a site.

        Raises:
            SelectionError: there is no such site.
        """
        found = {one.site.name: one for one in self.heads}
        if site not in found:
            raise SelectionError(f"no site {site!r}: there are {', '.join(found) or 'none'}")
        return found[site]

    def layers(self) -> list[dict[str, Plain]]:
        """One line for each site: means over its heads, and the hidden states behind its block."""
        return report_file.layer_rows(self)

    def save(self, path: str | Path) -> Path:
        """Write everything as a JSON file, schema `headscope.health/v1`; it is whole or absent.

        Raises:
            StoreError: the folder takes no file.
        """
        return report_file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> HealthReport:
        """What `save` wrote.

        Raises:
            StoreError: there is no such file, or it is damaged, or of another version.
        """
        return cls(**report_file.load(Path(path)))

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values: the document that `save` writes. What is undefined is None, with its reason beside it."""
        return report_file.encode(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def rows(self, what: str = "heads") -> list[dict[str, Plain]]:
        """A table as plain values.

        Args:
            what: `heads`, `streams`, `gradients`, `findings`, `notes` or `layers`.

        Raises:
            SelectionError: no such table.
        """
        if what == "heads":
            return [row for one in self.heads for row in one.rows()]
        if what == "streams":
            return [one.row() for one in self.streams]
        if what == "gradients":
            return [row for one in self.gradients for row in one.rows()]
        if what == "layers":
            return self.layers()
        if what not in TABLES:
            raise SelectionError(f"no table {what!r}: there are {', '.join(TABLES)}")
        return [report_file.finding_row(one) for one in (self.findings if what == "findings" else self.notes)]

    def to_frame(self, what: str = "heads") -> DataFrame:
        """The same as a data frame; needs pandas.

        Args:
            what: as of `rows`.

        Raises:
            HeadscopeError: pandas is not installed.
            SelectionError: no such table.
        """
        rows = self.rows(what)
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use rows()") from error
        return pandas.DataFrame(rows)

    def plot(self, what: str = "budget") -> Figure:
        """A Plotly figure.

        Args:
            what: `budget` (diffuse, routing and hub of every head), `streams` (curves over the layers, with baselines), or
                `heads:` and a field of `HeadMeasures`, such as `heads:sink`.

        Raises:
            HeadscopeError: plotly is not installed.
            SelectionError: no such figure, or nothing to draw.
        """
        return figure(self, what)

    def save_html(self, path: str | Path) -> Path:
        """Write a page with everything that is to be read: no script, nothing from outside; it is whole or absent.

        Raises:
            StoreError: the folder takes no file.
        """
        return write_whole(Path(path), page(self).encode("utf-8"))

    def _repr_html_(self) -> str:
        return fragment(self)

    def __str__(self) -> str:
        return f"HealthReport({verdict(self)})"
