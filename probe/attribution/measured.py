"""What `measure_faithfulness` found: every sample's curves, and the figures over the samples.

Letters: U units, P points of a curve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.attribution.curves import Curves
from headscope.probe.attribution.interval import Interval, bootstrap

if TYPE_CHECKING:
    from pandas import DataFrame

MEASURES = ("delta_area", "area_most_first", "area_least_first", "deletion", "insertion", "comprehensiveness", "sufficiency", "sensitivity")
RANDOM, POSITION = "random order", "position only"  # the controls


@dataclass(frozen=True)
class Measured:
    """One ranking of one sample's units, under one removal.

    Attributes:
        sample: its place in the data.
        removal: how units were removed.
        method: name of the ranking.
        draw: which of the random orders; 0 for other methods.
        units: U.
        intact: the target with nothing removed.
        empty: with everything removed.
        seconds: that the attribution took; None where it was given or needs none.
        curves: what the removals did.
    """

    sample: int
    removal: str
    method: str
    draw: int
    units: int
    intact: float
    empty: float
    seconds: float | None
    curves: Curves

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"curves": self.curves.to_dict()}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Measured:
        return cls(**{**given, "curves": Curves.from_dict(given["curves"])})


@dataclass(frozen=True)
class Faithfulness:
    """What was measured, sample by sample, and the figures over the samples.

    Attributes:
        samples: one entry a sample, removal, method and random draw.
        settings: how it was measured, ready for JSON.
    """

    samples: tuple[Measured, ...]
    settings: Mapping[str, Any]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the rankings, the controls last."""
        return tuple(dict.fromkeys(entry.method for entry in self.samples))

    @property
    def removals(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.removal for entry in self.samples))

    def values(self, measure: str, method: str, removal: str | None = None) -> dict[int, float]:
        """A measure by sample, the mean over random draws; samples for which it is not defined are left out.

        Args:
            measure: one of `MEASURES`.
            method: one of `methods`.
            removal: one of `removals`; None for the first.

        Raises:
            SelectionError: there is no such measure, method or removal.
        """
        if measure not in MEASURES:
            raise SelectionError(f"no measure {measure!r}: there are {', '.join(MEASURES)}")
        found: dict[int, list[float]] = {}
        for entry in self._of(method, removal):
            value = getattr(entry.curves, measure)
            if value is not None:
                found.setdefault(entry.sample, []).append(value)
        return {sample: sum(values) / len(values) for sample, values in found.items()}

    def interval(self, measure: str, method: str, removal: str | None = None) -> Interval | None:
        """Mean and bootstrap interval over the samples; None where the measure is defined for none.

        Raises:
            SelectionError: as `values`.
        """
        values = list(self.values(measure, method, removal).values())
        return self._bootstrap(values) if values else None

    def difference(self, measure: str, method: str, other: str, removal: str | None = None) -> Interval | None:
        """Mean of `method` minus `other` over the samples that both have, and its interval; it leaves 0 out where they differ.

        Raises:
            SelectionError: as `values`.
        """
        ours, theirs = self.values(measure, method, removal), self.values(measure, other, removal)
        values = [ours[sample] - theirs[sample] for sample in ours if sample in theirs]
        return self._bootstrap(values) if values else None

    def band(self, measure: str, removal: str | None = None) -> tuple[float, float] | None:
        """Lowest and highest mean over the samples among the random draws; None where there were none.

        Raises:
            SelectionError: as `values`.
        """
        if RANDOM not in self.methods:
            return None
        self.values(measure, RANDOM, removal)
        by_draw: dict[int, list[float]] = {}
        for entry in self._of(RANDOM, removal):
            value = getattr(entry.curves, measure)
            if value is not None:
                by_draw.setdefault(entry.draw, []).append(value)
        means = [sum(values) / len(values) for values in by_draw.values()]
        return (min(means), max(means)) if means else None

    def seconds(self, method: str) -> float | None:
        """Mean time of an attribution; None where they were given."""
        taken = [entry.seconds for entry in self._of(method, None) if entry.seconds is not None]
        return sum(taken) / len(taken) if taken else None

    def curve(self, method: str, removal: str | None = None, points: int = 21) -> dict[str, list[float]]:
        """Mean curves over samples and draws: `removed` as a share, from 0 to 1, `most_first` and `least_first`, each [points].

        Raises:
            SelectionError: as `values`.
        """
        grid = np.linspace(0, 1, points)
        found = {"removed": grid.tolist()}
        entries = self._of(method, removal)
        for side in ("most_first", "least_first"):
            rows = [
                np.interp(grid, np.array(entry.curves.removed) / entry.curves.removed[-1], getattr(entry.curves, side)) for entry in entries
            ]
            found[side] = np.mean(rows, axis=0).tolist()
        return found

    def summary(self) -> list[dict[str, Any]]:
        """One line per removal and method: every measure's mean and interval, and the seconds of an attribution."""
        return [
            {"removal": removal, "method": method, "seconds": self.seconds(method)}
            | {name: None if (found := self.interval(name, method, removal)) is None else found.to_dict() for name in MEASURES}
            for removal in self.removals
            for method in self.methods
            if any(entry.method == method and entry.removal == removal for entry in self.samples)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        bands = {removal: {name: self.band(name, removal) for name in MEASURES} for removal in self.removals}
        return {
            "settings": dict(self.settings),
            "summary": self.summary(),
            "random_band": {removal: {k: None if v is None else list(v) for k, v in found.items()} for removal, found in bands.items()},
            "samples": [entry.to_dict() for entry in self.samples],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line per sample, removal, method and draw; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        fields = ("sample", "removal", "method", "draw", "units", "intact", "empty", "seconds")
        return pandas.DataFrame(
            [
                {name: getattr(entry, name) for name in fields} | {name: getattr(entry.curves, name) for name in MEASURES}
                for entry in self.samples
            ]
        )

    def plot(self, removal: str | None = None) -> Any:
        """A Plotly figure of the mean curves: most relevant first drawn through, least relevant first dashed; needs plotly.

        Raises:
            HeadscopeError: plotly is not installed.
            SelectionError: there is no such removal.
        """
        try:
            import plotly.graph_objects as objects
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install plotly, or use curve()") from error
        removal = self.removals[0] if removal is None else removal
        figure = objects.Figure()
        for number, method in enumerate(self.methods):
            found = self.curve(method, removal)
            colour = f"hsl({number * 360 // len(self.methods)},60%,40%)"
            for side, dash in (("most_first", "solid"), ("least_first", "dash")):
                figure.add_scatter(
                    x=found["removed"], y=found[side], name=method, legendgroup=method, showlegend=side == "most_first",
                    mode="lines", line={"color": colour, "dash": dash},
                )  # fmt: skip
        figure.update_layout(
            title=f"most relevant first (drawn through), least relevant first (dashed); removal: {removal}",
            xaxis_title="share of the units removed", yaxis_title="target",
        )  # fmt: skip
        return figure

    def __str__(self) -> str:
        lines = [f"{len({entry.sample for entry in self.samples})} samples"]
        for removal in self.removals:
            lines.append(f"removal {removal}: area between the curves, comprehensiveness")
            for method in self.methods:
                figures = (str(self.interval(measure, method, removal)) for measure in ("delta_area", "comprehensiveness"))
                lines.append(f"  {method}: {', '.join(figures)}")
        return "\n".join(lines)

    def _of(self, method: str, removal: str | None) -> list[Measured]:
        removal = self.removals[0] if removal is None and self.removals else removal
        found = [entry for entry in self.samples if entry.method == method and entry.removal == removal]
        if not found:
            raise SelectionError(
                f"nothing measured for method {method!r}, removal {removal!r}: there are {', '.join(self.methods)}, "
                f"and the removals {', '.join(self.removals)}"
            )
        return found

    def _bootstrap(self, values: Sequence[float]) -> Interval:
        return bootstrap(values, level=self.settings["level"], resamples=self.settings["resamples"], seed=self.settings["seed"])
