"""A head atlas as a Plotly figure. Letters: L sites, H query heads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from headscope.probe.atlas.atlas import HeadAtlas

TELLING = ("induction", "previous", "duplicate", "current", "first", "positional", "local", "spread", "importance", "copying")
SIGNED = ("copying",)
SHARES = ("induction", "previous", "duplicate", "current", "first", "sink", "positional", "local", "spread", "confidence")  # 0 to 1
PER_ROW = 3
WRITTEN = 16  # heads in a layer beyond which no numbers are written into the cells


def figure(atlas: HeadAtlas, score: str | None = None) -> Figure:
    """See `HeadAtlas.plot`."""
    try:
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]', or use to_dict()") from error
    names = [name for name in TELLING if name in atlas.scores and not bool(atlas.scores[name].isnan().all())] if score is None else [score]
    if not names:
        raise SelectionError("nothing in this atlas can be drawn: every score is undefined")
    across = min(PER_ROW, len(names))
    down = -(-len(names) // across)
    drawn: Figure = make_subplots(
        rows=down, cols=across, subplot_titles=[markup(name) for name in names], horizontal_spacing=0.06, vertical_spacing=0.28 / down
    )
    layers = [f"layer {layer}" for layer in atlas.layers]
    labels = {(card.layer, card.head): ", ".join(card.labels) for card in atlas.cards()}
    wide = max(site.query_heads for site in atlas.sites)
    for number, name in enumerate(names):
        rows = [[None if math.isnan(cell) else cell for cell in row] for row in atlas.scores[name].tolist()]
        known = [cell for row in rows for cell in row if cell is not None]
        largest = 1.0 if name in SHARES else max(map(abs, known), default=1.0) or 1.0
        signed = name in SIGNED or min(known, default=0.0) < 0
        hover = [
            [f"{layer}.{head} {labels.get((layer, head), '')}<br>{markup(name)} {_told(cell)}" for head, cell in enumerate(row)]
            for layer, row in zip(atlas.layers, rows, strict=True)
        ]
        drawn.add_heatmap(
            z=rows, y=layers, zmin=-largest if signed else 0.0, zmax=largest, colorscale="RdBu" if signed else "Blues", showscale=False,
            hovertext=hover, hoverinfo="text", xgap=1, ygap=1, text=[[_told(cell) for cell in row] for row in rows],
            texttemplate="%{text}" if wide <= (WRITTEN if across == 1 else WRITTEN // 2) else None, row=number // across + 1,
            col=number % across + 1,
        )  # fmt: skip
        drawn.update_yaxes(autorange="reversed", showticklabels=number % across == 0, row=number // across + 1, col=number % across + 1)
        drawn.update_xaxes(tick0=0, dtick=max(1, wide // 8), row=number // across + 1, col=number % across + 1)
    drawn.update_layout(
        title=f"heads of {markup(str(atlas.info.get('model', 'the model')))}: columns are heads", template="plotly_white",
        height=110 + down * max(170, 26 * len(layers) + 70),
    )  # fmt: skip
    return drawn


def _told(cell: float | None) -> str:
    if cell is None:
        return "–"
    return f"{cell:.2f}" if abs(cell) < 10 else f"{cell:.3g}"
