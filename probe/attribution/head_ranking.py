"""Scores of heads by several methods, and how far the methods agree.

Letters: N examples, L sites in execution order, H query heads of a site.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from torch import Tensor

from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.attribution.correlation import correlation, rank_correlation
from headscope.probe.call import AttentionSite

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Agreement:
    """How far two methods rank heads alike.

    Attributes:
        first, second: the methods.
        spearman: rank correlation of the sizes |score|; None where a method finds all heads equal.
        pearson: correlation of the signed scores; None likewise.
        overlap: share of the `top` heads by size that both name.
        chance: what that share is for two random rankings.
        top: how many heads that is.
    """

    first: str
    second: str
    spearman: float | None
    pearson: float | None
    overlap: float
    chance: float
    top: int

    def to_dict(self) -> dict[str, object]:
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class HeadRanking:
    """Scores of all heads by several methods.

    A positive score says that the head raises the target. Of relevance, ablation and patching it is in the target's unit; that of
    `michel` is a size without sign.

    Attributes:
        scores: by method, [L, H], mean over examples.
        examples: by method, [N, L, H].
        sites: the L sites.
        settings: how it was made, ready for JSON.
    """

    scores: Mapping[str, Tensor]
    examples: Mapping[str, Tensor]
    sites: tuple[AttentionSite, ...]
    settings: Mapping[str, object] = field(default_factory=dict)

    def top(self, method: str, count: int = 10) -> list[tuple[AttentionSite, int, float]]:
        """The heads with the largest |score|: site, head, score.

        Raises:
            SelectionError: the method was not asked for.
        """
        scores = self._of(method)
        order = scores.abs().flatten().argsort(descending=True, stable=True)[:count].tolist()
        wide = scores.shape[1]
        return [(self.sites[i // wide], i % wide, float(scores[i // wide, i % wide])) for i in order]

    def agreement(self, top: int = 10) -> tuple[Agreement, ...]:
        """Every two methods compared, over all heads."""
        found = []
        for first, second in combinations(self.scores, 2):
            a, b = self.scores[first].flatten().double(), self.scores[second].flatten().double()
            count = min(top, len(a))
            best = [set(x.abs().argsort(descending=True, stable=True)[:count].tolist()) for x in (a, b)]
            found.append(
                Agreement(
                    first, second, rank_correlation(a.abs(), b.abs()), correlation(a, b),
                    len(best[0] & best[1]) / count, count / len(a), count,
                )
            )  # fmt: skip
        return tuple(found)

    def to_dict(self) -> dict[str, object]:
        return {
            "sites": [site.to_dict() for site in self.sites],
            "scores": {name: value.tolist() for name, value in self.scores.items()},
            "examples": {name: value.tolist() for name, value in self.examples.items()},
            "agreement": [pair.to_dict() for pair in self.agreement()],
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line a head: site, layer, head, and each method's mean and standard error over examples; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        rows: list[dict[str, object]] = []
        for place, site in enumerate(self.sites):
            for head in range(site.query_heads):
                row: dict[str, object] = {"site": site.name, "layer": site.layer, "head": head}
                for name, value in self.scores.items():
                    own = self.examples[name][:, place, head]
                    row[name] = float(value[place, head])
                    row[f"{name} error"] = float(own.std() / len(own) ** 0.5) if len(own) > 1 else None
                rows.append(row)
        return pandas.DataFrame(rows)

    def plot(self) -> Figure:
        """A heat map of layers and heads for each method; red raises the target, blue lowers it. Needs plotly.

        Raises:
            HeadscopeError: plotly is not installed.
        """
        try:
            from plotly.subplots import make_subplots
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]'") from error
        figure: Figure = make_subplots(rows=1, cols=len(self.scores), subplot_titles=list(self.scores), shared_yaxes=True)
        labels = [site.name if site.layer is None else str(site.layer) for site in self.sites]
        for column, (name, value) in enumerate(self.scores.items(), 1):
            limit = float(value.abs().max()) or 1.0
            figure.add_heatmap(
                z=value.tolist(), y=labels, zmin=-limit, zmax=limit, colorscale="RdBu_r", showscale=False, row=1, col=column,
                hovertemplate=f"layer %{{y}}, head %{{x}}: %{{z:.4g}}<extra>{name}</extra>",
            )  # fmt: skip
        figure.update_xaxes(title_text="head")
        figure.update_yaxes(title_text="layer", col=1, type="category")
        return figure

    def _of(self, method: str) -> Tensor:
        if method not in self.scores:
            raise SelectionError(f"no scores by {method!r}: there are {', '.join(self.scores)}")
        return self.scores[method]
