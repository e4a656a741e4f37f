"""A health report as Plotly figures. Letters: L layers, H heads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.health.measures import HEAD_FIELDS
from headscope.probe.health.report_file import places
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Heatmap

    from headscope.probe.health.report import HealthReport

WHATS = ("budget", "streams", "heads:<field>")
BLUE, GREY, RED = "#0072b2", "#777e88", "#b3261e"
SCALE = [[0.0, "#ffffff"], [0.5, "#7fb0e0"], [1.0, "#00468c"]]  # one hue: read without telling colours apart
WRITTEN = 16  # heads beyond which numbers are not written into the cells
STATES = (
    ("residual", "residual-warn", "what tells tokens apart"),
    ("cosine", "cosine", "mean cosine"),
    ("stable_rank", None, "stable rank"),
)


def figure(report: HealthReport, what: str) -> Figure:
    """See `HealthReport.plot`.

    Raises:
        HeadscopeError: plotly is not installed.
        SelectionError: no such figure, or nothing to draw.
    """
    name, _, field = what.partition(":")
    if what not in ("budget", "streams") and name != "heads":
        raise SelectionError(f"no figure {what!r}: there are {', '.join(WHATS)}")
    if name == "heads" and field not in HEAD_FIELDS:
        raise SelectionError(f"no field {field!r} of heads: there are {', '.join(HEAD_FIELDS)}")
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]', or use rows()") from error
    if what == "streams":
        found = _streams(report)
    else:
        if not report.heads:
            raise SelectionError("no heads were measured, so there is nothing to draw")
        found = _heads(report, ("diffuse", "routing", "hub") if what == "budget" else (field,))
    return found


def _heads(report: HealthReport, fields: tuple[str, ...]) -> Figure:
    from plotly.subplots import make_subplots

    found = make_subplots(rows=1, cols=len(fields), subplot_titles=[field.replace("_", " ") for field in fields], shared_yaxes=True)
    for column, field in enumerate(fields, 1):
        found.add_trace(_map(report, field), row=1, col=column)
        found.update_xaxes(title_text="head", dtick=max(1, max(one.heads for one in report.heads) // 16), row=1, col=column)
        found.update_yaxes(autorange="reversed", row=1, col=column)
    found.update_layout(height=140 + 34 * len(report.heads), template="plotly_white", title="Attention budget" if len(fields) > 1 else None)
    return found


def _map(report: HealthReport, field: str) -> Heatmap:
    from plotly.graph_objects import Heatmap

    rows = [[value if math.isfinite(value) else None for value in getattr(one, field).tolist()] for one in report.heads]
    widest = max(map(len, rows))
    padded = [[*row, *[None] * (widest - len(row))] for row in rows]
    names = [f"layer {name}" if name.isdigit() else markup(name) for name in places(report.heads)]
    finite = [value for row in rows for value in row if value is not None]
    shares = field in ("diffuse", "routing", "hub") or (bool(finite) and min(finite) >= 0 and max(finite) <= 1)
    top = 1.0 if shares else max(finite, default=1.0)
    text = [["" if value is None else f"{value:.2f}" if shares else f"{value:.3g}" for value in row] for row in padded]
    written = dict(text=text, texttemplate="%{text}") if widest <= WRITTEN else {}
    return Heatmap(
        z=padded, y=names, zmin=min(0.0, *finite) if finite else 0.0, zmax=top, colorscale=SCALE, showscale=False, xgap=1, ygap=1, **written
    )


def _streams(report: HealthReport) -> Figure:
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    states = [one for one in report.streams if not one.stream]
    if not states:
        raise SelectionError("no hidden states were measured, so there is nothing to draw")
    found = make_subplots(rows=1, cols=len(STATES), subplot_titles=[title for _, _, title in STATES])
    labels = ["in" if one.place == "input" else str(one.layer) for one in states]
    fresh = [report.baselines.fresh_stream(one) for one in states]
    for column, (field, limit, _) in enumerate(STATES, 1):
        own = [getattr(one, field) for one in states]
        base = [math.nan if one is None else getattr(one, field) for one in fresh]
        first = column == 1
        mark = dict(color=BLUE)
        found.add_trace(
            Scatter(x=labels, y=own, name="this model", mode="lines+markers", line=mark, showlegend=first, legendgroup="own"),
            row=1,
            col=column,
        )
        if any(map(math.isfinite, base)):
            dashed = dict(color=GREY, dash="dash")
            found.add_trace(
                Scatter(x=labels, y=base, name="freshly initialised", mode="lines", line=dashed, showlegend=first, legendgroup="base"),
                row=1,
                col=column,
            )
        if limit is not None:
            found.add_hline(report.thresholds[limit], line=dict(color=RED, dash="dot"), row=1, col=column)
        if field == "residual" and 0 < min((value for value in own if math.isfinite(value)), default=1.0) < 0.03:
            found.update_yaxes(type="log", row=1, col=column)
        found.update_xaxes(title_text="layer", row=1, col=column)
    found.update_layout(height=360, template="plotly_white", legend=dict(orientation="h", y=-0.25))
    return found
