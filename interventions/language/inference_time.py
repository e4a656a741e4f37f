"""Inference-time intervention: shift some heads along a direction that tells true from false (Li et al. 2023, arXiv 2306.03341).

z of head h ← z + α σ_h θ_h: θ the unit normal of a linear probe on z at the last token, or the difference of the classes' means; σ the
standard deviation of z along θ; the heads are those whose probes tell held-out samples best. With all positions it equals a bias of W_O.

Letters: N samples, L sites, H heads of a site, D width of a head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headscope.interventions.edit import Edit
from headscope.interventions.language.head_sets import checked_model
from headscope.interventions.language.prompts import Prompts, heads_of, read_tokens, samples_of, sites_of
from headscope.interventions.ops import add
from headscope.interventions.plan import Plan
from headscope.interventions.positions import Role, Span
from headscope.interventions.select import IndicesLike, select
from headscope.kernels.errors import HeadscopeError, InputError
from headscope.probe.attribution.question import needs
from headscope.probe.call import AttentionSite

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

DIRECTIONS = ("mass-mean", "probe")


@dataclass(frozen=True, eq=False)
class TruthHeads:
    """What heads know of a label, and the direction in which each says so.

    Attributes:
        accuracy: [L, H], of the head's probe on samples that it was not fitted on.
        directions: θ, [L][H, D], of length 1, towards label 1.
        spread: σ, [L, H].
        sites: the L sites.
        settings: how it was made, ready for JSON.
    """

    accuracy: Tensor
    directions: tuple[Tensor, ...]
    spread: Tensor
    sites: tuple[AttentionSite, ...]
    settings: Mapping[str, object] = field(default_factory=dict)

    def top(self, count: int) -> list[tuple[int, int, float]]:
        """The heads with the best probes: place of the site, head, accuracy; equal ones in order.

        Raises:
            InputError: more heads than there are.
        """
        if not 1 <= count <= self.accuracy.numel():
            raise InputError(f"{count} heads: give 1 to {self.accuracy.numel()}")
        order = self.accuracy.flatten().argsort(descending=True, stable=True)[:count].tolist()
        wide = self.accuracy.shape[1]
        return [(place // wide, place % wide, float(self.accuracy[place // wide, place % wide])) for place in order]

    def plan(self, heads: int = 48, strength: float = 15.0, queries: IndicesLike | Span | Role | None = -1) -> Plan:
        """z ← z + α σ θ at the best heads.

        Args:
            heads: how many, K.
            strength: α.
            queries: at which positions; the last of every call, as published, so that every new token is steered. None for all.
        """
        edits = []
        chosen: dict[int, list[int]] = {}
        for site, head, _ in self.top(heads):
            chosen.setdefault(site, []).append(head)
        for site, own in sorted(chosen.items()):
            shift = torch.zeros_like(self.directions[site])
            shift[own] = strength * self.spread[site, own, None].to(shift) * self.directions[site][own]
            edits.append(Edit("z", add(shift[:, None]), select(sites=self.sites[site].name, heads=own, queries=queries)))
        return Plan(edits)

    def to_dict(self) -> dict[str, object]:
        return {
            "sites": [site.name for site in self.sites],
            "accuracy": self.accuracy.tolist(),
            "spread": self.spread.tolist(),
            "directions": [own.tolist() for own in self.directions],
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line a head; needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        rows = [
            {"site": site.name, "layer": site.layer, "head": head, "accuracy": float(self.accuracy[place, head]),
             "spread": float(self.spread[place, head])}
            for place, site in enumerate(self.sites)
            for head in range(site.query_heads)
        ]  # fmt: skip
        return pandas.DataFrame(rows)

    def plot(self) -> Figure:
        """A heat map of the probes' accuracy; needs plotly."""
        try:
            from plotly.graph_objects import Figure
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]'") from error
        labels = [site.name if site.layer is None else str(site.layer) for site in self.sites]
        figure = Figure()
        figure.add_heatmap(z=self.accuracy.tolist(), y=labels, zmin=0, zmax=1, colorscale="RdBu_r")
        figure.update_xaxes(title_text="head")
        figure.update_yaxes(title_text="layer", type="category")
        return figure


def fit_truth_heads(
    model: nn.Module,
    prompts: Prompts,
    labels: Sequence[int],
    *,
    direction: str = "mass-mean",
    folds: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TruthHeads:
    """Fit a probe on every head.

    Args:
        model: in eval mode.
        prompts: keyword inputs, or a list of them; the samples of a batch are prompts of their own.
        labels: 1 (true) or 0 (false), one for each sample.
        direction: `mass-mean`, the difference of the classes' means, or `probe`, the weights of a logistic regression.
        folds: of the cross-validation that gives the accuracies.
        seed: of the folds.
        progress: told (steps done, steps in all): prompts, then heads.

    Raises:
        InputError: labels that do not fit, or too few of one kind; an unknown direction.
        HeadscopeError: scikit-learn is not installed.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"direction={direction!r}: choose {' or '.join(DIRECTIONS)}")
    samples = samples_of(prompts)
    truth = _labels(labels, len(samples), folds)
    sites = sites_of(checked_model(model), samples[0])
    heads = heads_of(sites)
    names = [site.name for site in sites]
    total = len(samples) + len(heads)
    z = read_tokens(model, samples, "z", names, (-1,), None if progress is None else lambda done, _: progress(done, total))
    accuracy, spread, directions = [], [], []
    for site in sites:
        own = z[site.name][:, 0]  # [N, H, D]
        theta = own[truth == 1].mean(0) - own[truth == 0].mean(0)  # [H, D]
        for head in range(site.query_heads):
            right, weights = _probe(own[:, head], truth, folds, seed)
            accuracy.append(right)
            if direction == "probe":
                theta[head] = weights
            if progress is not None:
                progress(len(samples) + len(accuracy), total)
        theta = theta / theta.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        spread.append(torch.einsum("nhd,hd->nh", own, theta).std(0))
        directions.append(theta.float())
    return TruthHeads(
        torch.tensor(accuracy, dtype=torch.float64).reshape(len(sites), -1), tuple(directions), torch.stack(spread), sites,
        {"direction": direction, "folds": folds, "seed": seed, "prompts": len(samples)},
    )  # fmt: skip


def _labels(labels: Sequence[int], samples: int, folds: int) -> Tensor:
    truth = torch.as_tensor(labels)
    if truth.shape != (samples,) or not bool(((truth == 0) | (truth == 1)).all()):
        raise InputError(f"labels of shape {list(truth.shape)} for {samples} prompts: give 0 or 1 for each")
    least = min(int((truth == value).sum()) for value in (0, 1))
    if folds < 2 or least < folds:
        raise InputError(f"{least} prompts of the rarer label for {folds} folds: give at least as many, and 2 folds or more")
    return truth.long()


def _probe(z: Tensor, truth: Tensor, folds: int, seed: int) -> tuple[float, Tensor]:
    """Cross-validated accuracy, and the weights [D] of a fit on all, in the units of z."""
    linear, selection, pipeline, scaling = (
        needs(f"sklearn.{name}", "fit_truth_heads") for name in ("linear_model", "model_selection", "pipeline", "preprocessing")
    )
    x, y = z.numpy(), truth.numpy()
    model = pipeline.make_pipeline(scaling.StandardScaler(), linear.LogisticRegression(max_iter=1000))
    splits = selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    right = float(selection.cross_val_score(model, x, y, cv=splits).mean())
    model.fit(x, y)
    weights = torch.from_numpy(model[-1].coef_[0] / model[0].scale_)
    return right, weights
