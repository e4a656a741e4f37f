"""Which layers carry information from some tokens to others: hide the ones from the others in a window of layers, and see what is lost
(Geva et al. 2023, arXiv 2304.14767).

Letters: N examples, W windows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headscope.interventions.edit import Edit
from headscope.interventions.language.head_sets import checked_model
from headscope.interventions.language.prompts import copies, last_logits, samples_of, sites_of
from headscope.interventions.ops import mask
from headscope.interventions.plan import Plan
from headscope.interventions.positions import Role, Span
from headscope.interventions.select import IndicesLike, select
from headscope.kernels.errors import HeadscopeError, InputError, SelectionError
from headscope.probe.attribution.interval import Interval, bootstrap

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


def knock_out(
    queries: IndicesLike | Span | Role, keys: IndicesLike | Span | Role, *, layers: IndicesLike | None = None, kind: str | None = None
) -> Plan:  # fmt: skip
    """Hide keys from queries, at some layers or all; a query that sees nothing else gives zero there."""
    return Plan([Edit("scores", mask(), select(layers=layers, queries=queries, keys=keys, kind=kind))])


@dataclass(frozen=True, eq=False)
class Flow:
    """One example: does what these keys hold reach these queries?

    Attributes:
        inputs: keyword inputs of one sample.
        queries: positions that should receive; negative ones count from the end.
        keys: positions that should send.
        target: the token or class whose probability is followed; None for the most likely.
    """

    inputs: Mapping[str, Any]
    queries: Sequence[int]
    keys: Sequence[int]
    target: int | None = None


@dataclass(frozen=True, eq=False)
class FlowCurve:
    """What the target's probability loses when an edge is cut in a window of layers.

    Attributes:
        windows: the layers of each window.
        whole: [N], the probability with nothing cut.
        cut: [N, W], with the window cut.
        settings: how it was made, ready for JSON.
    """

    windows: tuple[tuple[int, ...], ...]
    whole: Tensor
    cut: Tensor
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def change(self) -> Tensor:
        """[N, W], (cut - whole) / whole; -1 where nothing is left."""
        return self.cut / self.whole[:, None] - 1

    def intervals(self) -> list[Interval]:
        """Mean change of each window, with its interval over examples."""
        return [bootstrap(self.change[:, place].tolist()) for place in range(len(self.windows))]

    def worst(self) -> tuple[int, ...]:
        """The window whose cut costs most."""
        return self.windows[int(self.change.mean(0).argmin())]

    def to_dict(self) -> dict[str, object]:
        return {
            "windows": [list(window) for window in self.windows],
            "whole": self.whole.tolist(),
            "cut": self.cut.tolist(),
            "change": [interval.to_dict() for interval in self.intervals()],
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line a window; needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        rows = [
            {"first": window[0], "last": window[-1], "change": own.mean, "low": own.low, "high": own.high}
            for window, own in zip(self.windows, self.intervals(), strict=True)
        ]
        return pandas.DataFrame(rows)

    def plot(self) -> Figure:
        """The mean change by window with its interval; needs plotly."""
        try:
            from plotly.graph_objects import Figure
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]'") from error
        middles = [(window[0] + window[-1]) / 2 for window in self.windows]
        own = self.intervals()
        figure = Figure()
        for values, name in (([i.high for i in own], "high"), ([i.low for i in own], "low")):
            if None not in values:
                fill = {"fill": "tonexty"} if name == "low" else {}
                figure.add_scatter(x=middles, y=values, mode="lines", line_width=0, showlegend=False, **fill)
        figure.add_scatter(x=middles, y=[i.mean for i in own], mode="lines+markers", name="mean")
        figure.update_xaxes(title_text="middle of the window of layers")
        figure.update_yaxes(title_text="change of the target's probability", tickformat=".0%")
        return figure

    def __str__(self) -> str:
        rows = [f"layers {w[0]} to {w[-1]}: {own}" for w, own in zip(self.windows, self.intervals(), strict=True)]
        return "change of the target's probability\n" + "\n".join(rows)


def sweep_windows(
    model: nn.Module,
    examples: Sequence[Flow],
    *,
    width: int = 3,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
    remember: MutableMapping[int, Tensor] | None = None,
) -> FlowCurve:
    """Cut the edges of each example in every window of `width` layers, one window at a time.

    Args:
        model: in eval mode.
        examples: what is cut and followed.
        width: layers of a window; a window around every layer, shorter at both ends.
        batch: windows that are cut together, each in a copy of the example.
        progress: told (examples done, examples in all).
        remember: [1 + W] probabilities by number of the example, the intact one first; what stands there is not computed again.

    Raises:
        InputError: no examples, a width below 1, positions or a target that are not there.
        SelectionError: sites without a layer.
    """
    if not examples or width < 1 or batch < 1:
        raise InputError(f"{len(examples)} examples, width={width}, batch={batch}: give 1 or more of each")
    kept = {} if remember is None else remember
    sites = sites_of(checked_model(model), samples_of(examples[0].inputs, "inputs")[0])
    layers = sorted({site.layer for site in sites if site.layer is not None})
    if not layers:
        raise SelectionError("no site of this model has a layer number, so there are no windows of layers: use select(sites=...)")
    before = (width - 1) // 2
    windows = tuple(
        tuple(layers[max(0, place - before) : max(0, place - before) + width - max(0, before - place)]) for place in range(len(layers))
    )
    rows = []
    for number, example in enumerate(examples):
        row = kept.get(number)
        if row is None:
            row = kept[number] = _follow(model, example, windows, batch)
        rows.append(row)
        if progress is not None:
            progress(number + 1, len(examples))
    found = torch.stack(rows)
    return FlowCurve(windows, found[:, 0], found[:, 1:], {"width": width, "examples": len(examples)})


def _follow(model: nn.Module, example: Flow, windows: Sequence[Sequence[int]], batch: int) -> Tensor:
    """[1 + W]: the target's probability intact and with each window cut."""
    samples = samples_of(example.inputs, "inputs")
    if len(samples) != 1 or not list(example.queries) or not list(example.keys):
        raise InputError(f"a flow of {len(samples)} samples: give one sample, and at least one query and one key")
    inputs = samples[0]
    found: list[Tensor] = []
    target = example.target
    for start in range(0, len(windows), batch):
        chosen = windows[start : start + batch]
        edits = [
            Edit("scores", mask(), select(layers=list(window), queries=list(example.queries), keys=list(example.keys), samples=copy))
            for copy, window in enumerate(chosen, 1)
        ]
        with torch.no_grad(), Plan(edits).on(model):
            logits = last_logits(model(**copies(inputs, len(chosen) + 1)), inputs).cpu()
        target = int(logits[0].argmax()) if target is None else target
        if not 0 <= target < logits.shape[-1]:
            raise InputError(f"target={target}: there are {logits.shape[-1]} tokens or classes, from 0")
        found.append(logits.softmax(-1)[:, target])
    return torch.cat([found[0][:1], *(part[1:] for part in found)])
