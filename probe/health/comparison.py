"""What a comparison of two models found: head by head and block by block. Letters: H query heads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.attribution.as_html import table
from headscope.probe.call import AttentionSite
from headscope.probe.health.measures import Plain, plain
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

HEAD_NUMBERS = ("divergence", "reverse", "jensen_shannon", "cosine")
STREAM_NUMBERS = ("cka", "change")
SHOWN = 10  # heads of the page
WRITTEN = 16  # heads in a row beyond which their numbers are not written into the cells


@dataclass(frozen=True, eq=False)
class HeadDifference:
    """How far the patterns of one site differ between a and b, per head; all [H], float64 on the CPU, NaN where undefined.

    Attributes:
        site: where the heads are.
        calls: how many calls of each were compared.
        rows: rows compared, over all samples: those that see a key in both and are not padding.
        divergence: mean over rows of KL(a ‖ b), nats; inf where a row of a gives something to a key that b hides.
        reverse: KL(b ‖ a), likewise.
        jensen_shannon: mean Jensen-Shannon divergence, nats, 0 to log 2.
        cosine: of the two patterns as flat vectors, 0 to 1; a mean over the samples, weighted by their rows.
        undefined: field -> why it, or some heads of it, is NaN or infinite.
    """

    site: AttentionSite
    calls: int
    rows: int
    divergence: Tensor
    reverse: Tensor
    jensen_shannon: Tensor
    cosine: Tensor
    undefined: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON; None for what is not finite."""
        lists = {name: [plain(one) for one in getattr(self, name).tolist()] for name in HEAD_NUMBERS}
        return {"site": self.site.to_dict(), "calls": self.calls, "rows": self.rows, **lists, "undefined": dict(self.undefined)}

    def table(self) -> list[dict[str, Plain]]:
        """One line for each head."""
        lists = {name: getattr(self, name).tolist() for name in HEAD_NUMBERS}
        return [
            {"site": self.site.name, "layer": self.site.layer, "head": head, **{name: value[head] for name, value in lists.items()},
             "rows": self.rows}
            for head in range(self.site.query_heads)
        ]  # fmt: skip


@dataclass(frozen=True)
class StreamDifference:
    """How far the hidden states at one place differ between a and b.

    Attributes:
        name: path of the block.
        place: `input` of the first block, or `output`.
        layer: its number.
        stream: which of several hidden states.
        tokens: tokens compared, over all samples.
        width: of the states.
        cka: debiased linear CKA, 1 for the same up to rotation and size, near 0 for unrelated ones.
        change: ‖X_b - X_a‖_F / ‖X_a‖_F.
        undefined: field -> why it is NaN.
    """

    name: str
    place: str
    layer: int
    stream: int
    tokens: int
    width: int
    cka: float
    change: float
    undefined: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON; None for what is not finite."""
        return {**self.table(), "cka": plain(self.cka), "change": plain(self.change), "undefined": dict(self.undefined)}

    def table(self) -> dict[str, Plain]:
        """One line of a table."""
        names = ("name", "place", "layer", "stream", "tokens", "width", *STREAM_NUMBERS)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class HealthComparison:
    """Two models on the same inputs, or one model before and after an edit.

    Attributes:
        heads: one for each site, in execution order.
        streams: one for each place between the blocks.
        warnings: what a reader should know, in words.
        info: what was compared, ready for JSON.
    """

    heads: tuple[HeadDifference, ...]
    streams: tuple[StreamDifference, ...]
    warnings: tuple[str, ...] = ()
    info: Mapping[str, object] = field(default_factory=dict)

    @property
    def unchanged(self) -> bool:
        """Whether nothing differs at all: every number is exactly 0, or 1, or undefined."""
        zeros = [getattr(one, name) for one in self.heads for name in HEAD_NUMBERS if name != "cosine"]
        same = all(bool(((value == 0) | value.isnan()).all()) for value in zeros)
        same = same and all(bool(((one.cosine == 1) | one.cosine.isnan()).all()) for one in self.heads)
        return same and all(one.change == 0 or math.isnan(one.change) for one in self.streams)

    def changed_most(self, count: int = SHOWN, by: str = "jensen_shannon") -> list[tuple[str, int, float]]:
        """(site, head, number) of the heads that differ most; least alike first where `by` is the cosine.

        Raises:
            SelectionError: no such number.
        """
        if by not in HEAD_NUMBERS:
            raise SelectionError(f"no number {by!r} of a head: there are {', '.join(HEAD_NUMBERS)}")
        every = [(one.site.name, head, number) for one in self.heads for head, number in enumerate(getattr(one, by).tolist())]
        known = [row for row in every if not math.isnan(row[2])]
        return sorted(known, key=lambda row: row[2] if by == "cosine" else -row[2])[:count]

    def rows(self, what: str = "heads") -> list[dict[str, Plain]]:
        """Lines of a table of plain values, one for each head or place.

        Raises:
            SelectionError: `what` is neither `heads` nor `streams`.
        """
        if what == "heads":
            return [row for one in self.heads for row in one.table()]
        if what == "streams":
            return [one.table() for one in self.streams]
        raise SelectionError(f"no table {what!r}: there are heads, streams")

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values, ready for JSON."""
        return {
            "schema": "headscope.comparison/v1", "info": dict(self.info), "warnings": list(self.warnings),
            "heads": [one.to_dict() for one in self.heads], "streams": [one.to_dict() for one in self.streams],
        }  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self, what: str = "heads") -> DataFrame:
        """The lines of `rows` as a data frame; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
            SelectionError: `what` is neither `heads` nor `streams`.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        return pandas.DataFrame(self.rows(what))

    def plot(self, number: str = "jensen_shannon") -> Figure:
        """Site by head as a heat map, and CKA and change from block to block, as a Plotly figure.

        Args:
            number: of the heads: `jensen_shannon`, `divergence`, `reverse` or `cosine`.

        Raises:
            HeadscopeError: plotly is not installed.
            SelectionError: no such number.
        """
        if number not in HEAD_NUMBERS:
            raise SelectionError(f"no number {number!r} of a head: there are {', '.join(HEAD_NUMBERS)}")
        try:
            from plotly.graph_objects import Heatmap, Scatter
            from plotly.subplots import make_subplots
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]', or use to_dict()") from error
        titles = [f"heads: {number.replace('_', ' ')}", "hidden states"]
        found = make_subplots(rows=2, cols=1, subplot_titles=titles, row_heights=[0.65, 0.35], vertical_spacing=0.14)
        lists = [[plain(value) for value in getattr(one, number).tolist()] for one in self.heads]
        widest = max((len(row) for row in lists), default=0)
        cells = [[*row, *[None] * (widest - len(row))] for row in lists]
        text = [["" if value is None else f"{value:.2g}" for value in row] for row in cells]
        names = [markup(one.site.name) for one in self.heads]
        written = "%{text}" if widest <= WRITTEN else None
        found.add_trace(Heatmap(z=cells, y=names, text=text, texttemplate=written, colorscale="Oranges", showscale=False), row=1, col=1)
        found.update_yaxes(autorange="reversed", row=1, col=1)
        found.update_xaxes(title_text="head", dtick=max(1, widest // 16), row=1, col=1)
        places = [markup(f"{one.name} {one.place}") for one in self.streams]
        for name, title in (("cka", "CKA"), ("change", "relative change")):
            values = [plain(getattr(one, name)) for one in self.streams]
            found.add_trace(Scatter(x=places, y=values, mode="lines+markers", name=title), row=2, col=1)
        found.update_layout(height=260 + 26 * max(8, len(names)), template="plotly_white", title=markup(str(self)))
        return found

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{markup(str(self))}</b></p>"]
        parts += [f"<p><b>Warning:</b> {markup(text)}</p>" for text in self.warnings]
        most = [(name, str(head), f"{number:.4g}") for name, head, number in self.changed_most()]
        parts.append("<p><b>Heads that differ most</b>, by their mean Jensen-Shannon divergence</p>")
        parts.append(table(("site", "head", "nats"), most))
        if self.streams:
            lines = [(f"{one.name} {one.place}", f"{one.cka:.4g}", f"{one.change:.4g}") for one in self.streams]
            parts += ["<p><b>Hidden states</b></p>", table(("where", "CKA", "relative change"), lines)]
        style = "font-family:system-ui,sans-serif;font-size:14px;line-height:1.5;color:#111;background:#fff;padding:.5em"
        return f'<div style="{style}">{"".join(parts)}</div>'

    def __str__(self) -> str:
        count = sum(one.site.query_heads for one in self.heads)
        sizes = [row[2] for row in self.changed_most(1)]
        most = f", at most {sizes[0]:.3g} nats apart" if sizes and not self.unchanged else ""
        state = "nothing differs" if self.unchanged else "they differ"
        return f"{self.info.get('a', 'a')} and {self.info.get('b', 'b')}: {len(self.heads)} sites, {count} heads, {state}{most}"
