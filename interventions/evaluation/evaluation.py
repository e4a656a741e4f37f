"""What a plan did to a model: its effect on the examples, its side effects on others, and its price."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.interventions.evaluation import evaluation_file
from headscope.interventions.evaluation.changes import Change, Price, Result, cells
from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.visible import markup, visible

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Evaluation:
    """What a plan did.

    Attributes:
        effect: the metrics that were asked for, on the examples.
        side_effects: on the benign examples: divergence, perplexity, accuracy, and the metrics that were asked for. Without benign
            examples the divergence and perplexity of the examples themselves.
        benign: how many benign examples there were.
        results: every example.
        edits: the plan's edits in words.
        hits: in how many examples each changed something.
        price: None where it was not measured.
        info: model, fingerprint, versions, seed.
    """

    effect: tuple[Change, ...]
    side_effects: tuple[Change, ...]
    benign: int
    results: tuple[Result, ...]
    edits: tuple[str, ...]
    hits: tuple[int, ...]
    price: Price | None = None
    info: Mapping[str, object] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Change:
        """The change of a metric, `accuracy`; or of one on the benign examples, `benign.kl`.

        Raises:
            SelectionError: it was not measured.
        """
        rows = {row.metric: row for row in self.effect} | {f"benign.{row.metric}": row for row in self.side_effects}
        if name not in rows:
            raise SelectionError(f"{name!r} was not measured: there are {', '.join(rows)}")
        return rows[name]

    @property
    def troubles(self) -> tuple[str, ...]:
        """What has no number, in words."""
        return tuple(row.trouble() for row in self.effect if row.undefined) + tuple(
            f"benign: {row.trouble()}" for row in self.side_effects if row.undefined
        )

    def to_dict(self) -> dict[str, object]:
        """The document that `save` writes; `evaluation.schema.json` describes it."""
        return evaluation_file.encode(self)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, schema `headscope.evaluation/v1`; it is whole or absent.

        Raises:
            StoreError: the folder takes no file.
        """
        return evaluation_file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """What `save` wrote.

        Raises:
            StoreError: there is no such file, or it is damaged or of another version.
        """
        return cls(**evaluation_file.load(Path(path)))

    def to_frame(self) -> DataFrame:
        """One line for each example and metric; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        rows = [
            {"id": one.id, "benign": one.benign, "metric": name, "before": one.before[name], "after": one.after[name]}
            for one in self.results
            for name in one.before
        ]
        return pandas.DataFrame(rows, columns=["id", "benign", "metric", "before", "after"])

    def plot(self) -> Figure:
        """Each metric before and after with its interval, as a Plotly figure.

        Raises:
            HeadscopeError: plotly is not installed.
        """
        try:
            from plotly.graph_objects import Scatter
            from plotly.subplots import make_subplots
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]', or use to_dict()") from error
        rows = [(row.metric, row) for row in self.effect] + [(f"{self.beside}: {row.metric}", row) for row in self.side_effects]
        across = min(4, len(rows))
        found = make_subplots(rows=-(-len(rows) // across), cols=across, subplot_titles=[markup(title) for title, _ in rows])
        for place, (_, row) in enumerate(rows):
            means = [(name, one) for name, one in (("before", row.before), ("after", row.after)) if one is not None]
            up = [0.0 if one.high is None else one.high - one.mean for _, one in means]
            down = [0.0 if one.low is None else one.mean - one.low for _, one in means]
            bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
            dots = Scatter(x=[name for name, _ in means], y=[one.mean for _, one in means], error_y=bars, mode="markers", marker_size=10)
            found.add_trace(dots, row=place // across + 1, col=place % across + 1)
        found.update_layout(template="plotly_white", showlegend=False, height=120 + 240 * -(-len(rows) // across))
        return found

    @property
    def beside(self) -> str:
        """What the side effects were measured on, in words."""
        return "benign" if self.benign else "data"

    def _repr_html_(self) -> str:
        lines = ["<table><tr><th></th><th>before</th><th>after</th><th>difference</th></tr>"]
        for title, rows in ((f"effect on {len(self.results) - self.benign} examples", self.effect), (self._side_title, self.side_effects)):
            lines.append(f"<tr><th colspan=4 style='text-align:left'>{html.escape(title)}</th></tr>")
            lines += [f"<tr><td>{markup(row.metric)}</td>{''.join(f'<td>{cell}</td>' for cell in cells(row))}</tr>" for row in rows]
        lines.append("</table>")
        lines += [f"<p><b>{markup(trouble)}</b></p>" for trouble in self.troubles]
        if self.price is not None:
            lines.append(f"<p>{html.escape(self.price.cost.overhead_in_words)}</p>")
        return "".join(lines)

    @property
    def _side_title(self) -> str:
        return f"side effects on {self.benign} benign examples" if self.benign else "side effects on the examples themselves"

    def __str__(self) -> str:
        lines = [f"effect on {len(self.results) - self.benign} examples"]
        lines += [f"  {visible(row.metric)}: {' -> '.join(cells(row)[:2])}, difference {cells(row)[2]}" for row in self.effect]
        lines += [self._side_title]
        lines += [f"  {visible(row.metric)}: {' -> '.join(cells(row)[:2])}, difference {cells(row)[2]}" for row in self.side_effects]
        lines += [f"  {visible(trouble)}" for trouble in self.troubles]
        return "\n".join(lines + ([] if self.price is None else [self.price.cost.overhead_in_words]))
