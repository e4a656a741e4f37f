"""An attribution as a Plotly figure. Letters: S tokens, L layers, H heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.attribution.as_html import AGAINST, FOR, digit, image_of, names_of, one_sample
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Heatmap

    from headscope.probe.attribution.attribution import Attribution

ACROSS = 12  # tokens in a line
WRITTEN = 600  # tokens beyond which they are not written into their cells
SCALE = [[0.0, "rgb({},{},{})".format(*AGAINST)], [0.5, "rgb(255,255,255)"], [1.0, "rgb({},{},{})".format(*FOR)]]


def figure(attribution: Attribution, sample: int | None = None) -> Figure:
    """See `Attribution.plot`.

    Raises:
        HeadscopeError: plotly is not installed.
        SelectionError: there are several samples to choose from, or no such sample.
    """
    try:
        from plotly.graph_objects import Bar
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]', or use to_dict()") from error
    which = one_sample(attribution, sample)
    panels: list[tuple[str, Any]] = []
    for name, value in attribution.inputs.items():
        drawn = _input(attribution, value[which], which) if value.dim() else None
        if drawn is not None:
            what = "tokens, each with sign and digit" if value[which].dim() == 1 else "pixels"
            panels.append((f"{what}: {markup(name)}", drawn))
    heads = _heads(attribution, which)
    if heads is not None:
        panels.append(("heads", heads))
    if attribution.ledger is not None:
        amounts = {"inputs": attribution.ledger.inputs, "constants": sum(attribution.ledger.constants.values())}
        amounts |= attribution.ledger.by_kind() | {"residual": attribution.ledger.residual}
        colours = [f"rgb{FOR}" if amount > 0 else f"rgb{AGAINST}" for amount in amounts.values()]
        text = [f"{amount:+.3g}" for amount in amounts.values()]
        bars = Bar(x=list(amounts.values()), y=list(amounts), orientation="h", marker_color=colours, text=text, name="books")
        state = "PASS" if attribution.ledger.closes else "FAIL"
        panels.append((f"books: {state}, target {attribution.ledger.target:.4g}", bars))
    if not panels:
        raise SelectionError("nothing in this attribution can be drawn: no text, no image, no heads and no books")
    found = make_subplots(rows=len(panels), cols=1, subplot_titles=[title for title, _ in panels])
    for row, (title, trace) in enumerate(panels, 1):
        found.add_trace(trace, row=row, col=1)
        if not title.startswith("books"):
            found.update_yaxes(autorange="reversed", row=row, col=1)
        if title == "heads":
            found.update_xaxes(title_text="head", tick0=0, dtick=max(1, len(trace.z[0]) // 16), row=row, col=1)
        elif title.startswith("tokens"):
            found.update_xaxes(showticklabels=False, showgrid=False, row=row, col=1)
            found.update_yaxes(showticklabels=False, showgrid=False, row=row, col=1)
        elif title.startswith("pixels"):
            found.update_yaxes(scaleanchor=f"x{row if row > 1 else ''}", constrain="domain", row=row, col=1)
            found.update_xaxes(constrain="domain", row=row, col=1)
    title = f"{markup(attribution.method)}: {markup(attribution.target)} = {attribution.value:.6g}"
    found.update_layout(title=title, height=120 + 300 * len(panels), template="plotly_white", showlegend=False)
    return found


def _input(attribution: Attribution, relevance: Tensor, sample: int) -> Heatmap | None:
    from plotly.graph_objects import Heatmap

    numbers = relevance.detach().double().cpu()
    largest = float(numbers.abs().max())
    if relevance.dim() == 1:
        names = names_of(attribution, sample, len(relevance))
        labels = [f"{markup(name)}<br>{digit(n, largest)}" for name, n in zip(names, numbers.tolist(), strict=True)]
        exact = [f"{place} {markup(name)}: {n:+.6g}" for place, (name, n) in enumerate(zip(names, numbers.tolist(), strict=True))]
        lines = range(0, len(labels), ACROSS)
        rows = [[*numbers[at : at + ACROSS].tolist(), *[None] * (ACROSS - len(labels[at : at + ACROSS]))] for at in lines]
        text, hover = ([[*words[at : at + ACROSS]] for at in lines] for words in (labels, exact))
        shown = dict(text=text, texttemplate="%{text}") if len(labels) <= WRITTEN else {}
        return Heatmap(z=rows, hovertext=hover, hoverinfo="text", xgap=2, ygap=2, **_signed(largest), **shown)
    image = image_of(relevance)
    if image is None:
        return None
    return Heatmap(z=image.tolist(), **_signed(float(image.abs().max())))


def _heads(attribution: Attribution, sample: int) -> Heatmap | None:
    from plotly.graph_objects import Heatmap

    rows = [value[sample].detach().double().sum(1).tolist() for value in attribution.heads.values() if sample < value.shape[0]]
    if not rows:
        return None
    widest, largest = max(map(len, rows)), max(abs(n) for row in rows for n in row)
    text = [[f"{n:+.2g}" for n in row] for row in rows]
    layers = {site.name: site.layer for site in attribution.sites}
    numbers = [layers.get(name) for name in attribution.heads]
    plain = None not in numbers and len(set(numbers)) == len(numbers)
    names = [f"layer {layer}" if plain else markup(name) for name, layer in zip(attribution.heads, numbers, strict=True)]
    padded = [[*row, *[None] * (widest - len(row))] for row in rows]
    return Heatmap(z=padded, y=names, text=text, texttemplate="%{text}" if widest <= 16 else None, **_signed(largest))


def _signed(largest: float) -> dict[str, object]:
    """A colour scale with white at zero."""
    edge = largest or 1.0
    return {"colorscale": SCALE, "zmin": -edge, "zmax": edge, "showscale": False}
