"""What a monitor saw in the course of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.health.findings import Finding
from headscope.probe.health.measures import HeadMeasures, plain
from headscope.probe.health.report import HealthReport
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

MEANS = ("entropy_share", "diffuse", "routing", "hub", "p_max", "row_residual")  # of a layer's heads
LARGEST = ("sink", "max_score", "score_variance")
OF_STREAMS = ("residual", "cosine", "effective_rank_centred")


@dataclass(frozen=True)
class Moment:
    """One measurement.

    Attributes:
        step: of the training.
        seconds: that it took.
        worst: the severest finding.
        numbers: `routing/3` and the like, see `numbers_of`.
        findings: what the rules found.
    """

    step: int
    seconds: float
    worst: str
    numbers: Mapping[str, float]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return {
            "step": self.step, "seconds": self.seconds, "worst": self.worst, "findings": [one.to_dict() for one in self.findings],
            "numbers": {name: plain(value) for name, value in self.numbers.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class MonitorHistory:
    """All measurements of a run, in order."""

    moments: tuple[Moment, ...]

    def steps(self) -> list[int]:
        """The steps that were measured."""
        return [moment.step for moment in self.moments]

    def curve(self, name: str) -> list[float]:
        """One number at every measured step; NaN where it was not measured.

        Raises:
            SelectionError: no measurement has it.
        """
        known = list(dict.fromkeys(key for moment in self.moments for key in moment.numbers))
        if name not in known:
            some = ", ".join(known[:12]) or "none; nothing was measured yet"
            raise SelectionError(f"no curve {name!r}: there are {some}{', …' if len(known) > 12 else ''}")
        return [moment.numbers.get(name, math.nan) for moment in self.moments]

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return {"moments": [moment.to_dict() for moment in self.moments]}

    def to_frame(self) -> DataFrame:
        """One line for each measurement, one column for each number; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        return pandas.DataFrame([{"step": one.step, "seconds": one.seconds, "worst": one.worst, **one.numbers} for one in self.moments])

    def plot(self, name: str = "routing") -> Figure:
        """The curves of a number over the steps, one for each layer, as a Plotly figure; findings of warn and alarm are marked.

        Args:
            name: what stands before the slash, such as `routing`, `hub`, `sink`, `entropy_share`, `max_score`, `residual`.

        Raises:
            HeadscopeError: plotly is not installed.
            SelectionError: no such number.
        """
        curves = list(dict.fromkeys(key for one in self.moments for key in one.numbers if key.partition("/")[0] == name))
        if not curves:
            known = ", ".join(dict.fromkeys(key.partition("/")[0] for one in self.moments for key in one.numbers))
            raise SelectionError(f"no curves of {name!r}: there are {known or 'none; nothing was measured yet'}")
        try:
            from plotly.graph_objects import Figure, Scatter
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]', or use to_dict()") from error
        found = Figure()
        steps = self.steps()
        for place, key in enumerate(curves):
            share = place / max(1, len(curves) - 1)
            colour = f"hsl({round(210 - 190 * share)},70%,42%)"  # from blue, the first layer, to orange, the last
            title = markup(key.partition("/")[2] or key)
            values = [plain(value) for value in self.curve(key)]
            found.add_trace(Scatter(x=steps, y=values, mode="lines+markers", name=title, line_color=colour))
        for moment in self.moments:
            if moment.worst in ("warn", "alarm"):
                found.add_vline(x=moment.step, line_dash="dot", line_color="#b00" if moment.worst == "alarm" else "#c80")
        found.update_layout(
            title=markup(name.replace("_", " ")), xaxis_title="step", template="plotly_white", height=420, legend_title="layer"
        )
        return found

    def __str__(self) -> str:
        if not self.moments:
            return "MonitorHistory(nothing measured yet)"
        return f"MonitorHistory({len(self.moments)} measurements, steps {self.moments[0].step} to {self.moments[-1].step})"


def numbers_of(report: HealthReport) -> dict[str, float]:
    """The few numbers of a report that are worth a curve, `number/place`; what is undefined is left out.

    Of each site the means over its heads and, for sinks and scores, the largest; of the hidden states what tells collapse; and how many
    findings there are of each severity. A place is the layer's number where that names one site, else the site's name.
    """
    found: dict[str, float] = {}
    layers = [one.site.layer for one in report.heads]
    for one in report.heads:
        place = one.site.name if one.site.layer is None or layers.count(one.site.layer) > 1 else str(one.site.layer)
        found |= _of_heads(one, place)
    names = [one.layer for one in report.streams if one.place == "output"]
    for stream in report.streams:
        where = stream.name if names.count(stream.layer) > 1 else str(stream.layer)
        where = "input" if stream.place == "input" else where
        where = f"{where}.{stream.stream}" if stream.stream else where
        found |= {f"{name}/{where}": getattr(stream, name) for name in OF_STREAMS if math.isfinite(getattr(stream, name))}
    for severity in ("info", "warn", "alarm"):
        found[f"findings/{severity}"] = float(sum(one.severity == severity for one in report.findings))
    return found


def _of_heads(one: HeadMeasures, place: str) -> dict[str, float]:
    found = {}
    for name in (*MEANS, *LARGEST):
        values = getattr(one, name)
        known = values[values.isfinite()]
        if len(known):
            found[f"{name}/{place}"] = float(known.max() if name in LARGEST else known.mean())
    return found
