"""Spectral editing of activations: keep what goes with good demonstrations, drop what goes with bad ones (Qiu et al. 2024,
arXiv 2405.09719).

With states x of neutral prompts and x± of positive and negative ones, row by row: Ω± = E[x x±ᵀ] = U± Σ± V±ᵀ. U₊ holds the leading left
singular vectors of Ω₊, Ū₋ all but the leading ones of Ω₋, each leading part explaining a share of Σ σ². Then

    x' = (U₊ U₊ᵀ + Ū₋ Ū₋ᵀ) x, rescaled to the length of x.

U₊U₊ᵀ + 1 - U₋U₋ᵀ is symmetric, so with the eigenvectors W and eigenvalues Λ of U₋U₋ᵀ - U₊U₊ᵀ it is x - W Λ Wᵀ x: one `project` with a
strength for each column. The published kernels for non-linear editing are not here.

Letters: N prompts, E width, R rank.
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
from headscope.interventions.language.prompts import Prompts, blocks_of, read_tokens, samples_of, sites_of
from headscope.interventions.plan import Plan
from headscope.interventions.select import select
from headscope.interventions.subspace import project
from headscope.kernels.errors import HeadscopeError, InputError, SelectionError

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

NOTHING = 1e-6  # an eigenvalue of the change below this changes nothing


@dataclass(frozen=True, eq=False)
class SpectralEdit:
    """The projections, one place after the other.

    Attributes:
        stage: `resid` or `out`.
        places: the paths of blocks or modules.
        bases: W, [E, R] for each place.
        strengths: Λ, [R] for each place.
        kept: how many directions explain the share of the positive covariance, for each place.
        dropped: likewise of the negative one, which are taken away.
        settings: how it was made, ready for JSON.
    """

    stage: str
    places: tuple[str, ...]
    bases: tuple[Tensor, ...]
    strengths: tuple[Tensor, ...]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    settings: Mapping[str, object] = field(default_factory=dict)

    def plan(self, last: int | None = None) -> Plan:
        """x' at the last `last` places, at all if left out; every token keeps its length.

        Raises:
            SelectionError: there is no place, or nothing to change at them.
        """
        if last is not None and not 1 <= last <= len(self.places):
            raise SelectionError(f"last={last}: there are {len(self.places)} places")
        chosen = range(len(self.places) if last is None else last)
        edits = []
        for back in reversed(chosen):
            place = len(self.places) - 1 - back
            if self.strengths[place].numel():
                op = project(self.bases[place].float(), self.strengths[place].float(), renormalise=True)
                edits.append(Edit(self.stage, op, select(sites=self.places[place])))
        if not edits:
            raise SelectionError("positive and negative prompts give the same projections at all these places: there is nothing to change")
        return Plan(edits)

    def to_dict(self) -> dict[str, object]:
        return {
            "stage": self.stage,
            "places": list(self.places),
            "kept": list(self.kept),
            "dropped": list(self.dropped),
            "strengths": [own.tolist() for own in self.strengths],
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line a place; needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        return pandas.DataFrame({"place": self.places, "kept": self.kept, "dropped": self.dropped})

    def plot(self) -> Figure:
        """How many directions are kept and dropped at each place; needs plotly."""
        try:
            from plotly.graph_objects import Figure
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]'") from error
        figure = Figure()
        for name, counts in (("kept", self.kept), ("dropped", self.dropped)):
            figure.add_bar(x=list(self.places), y=list(counts), name=name)
        figure.update_yaxes(title_text="directions")
        return figure

    def __str__(self) -> str:
        rows = [f"{place}: {k} kept, {d} dropped" for place, k, d in zip(self.places, self.kept, self.dropped, strict=True)]
        return f"spectral edit at {self.stage}\n" + "\n".join(rows)


def fit_spectral(
    model: nn.Module,
    neutral: Prompts,
    positive: Prompts,
    negative: Prompts,
    *,
    modules: Sequence[str] | None = None,
    explained: float = 0.99,
    progress: Callable[[int, int], None] | None = None,
) -> SpectralEdit:
    """Find the projections from three sets of prompts that belong together: neutral, positive and negative number i are of one question.

    Args:
        model: in eval mode.
        neutral, positive, negative: keyword inputs, or lists of them, as many samples each; states are those of the last token.
        modules: paths of the modules whose output is edited, such as the feed-forward layers, as published; the blocks if left out.
        explained: share of Σ σ² that the leading directions explain.
        progress: told (prompts done, prompts in all).

    Raises:
        InputError: empty sets or sets of different size, a share outside of 0 to 1.
        SelectionError: no such module.
    """
    if not 0 < explained <= 1:
        raise InputError(f"explained={explained}: give a share above 0, at most 1")
    sets = [samples_of(given, name) for given, name in ((neutral, "neutral"), (positive, "positive"), (negative, "negative"))]
    if len({len(samples) for samples in sets}) > 1:
        sizes = ", ".join(str(len(samples)) for samples in sets)
        raise InputError(f"{sizes} neutral, positive and negative prompts: they are taken three by three, so give as many of each")
    checked_model(model)
    stage = "resid" if modules is None else "out"
    places = blocks_of(sites_of(model, sets[0][0])) if modules is None else tuple(modules)
    states = []
    for number, samples in enumerate(sets):
        before = number * len(samples)

        def tell(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, 3 * len(sets[0]))

        found = read_tokens(model, samples, stage, places, (-1,), tell)
        states.append({place: own[:, 0, 0] for place, own in found.items()})  # [N, E]
    neutrals, positives, negatives = states
    parts = [spectral_parts(neutrals[place], positives[place], negatives[place], explained) for place in places]
    return SpectralEdit(
        stage, places, tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts), tuple(p[3] for p in parts),
        {"explained": explained, "prompts": len(sets[0])},
    )  # fmt: skip


def spectral_parts(neutral: Tensor, positive: Tensor, negative: Tensor, explained: float) -> tuple[Tensor, Tensor, int, int]:
    """W [E, R] and Λ [R] of x' = x - W Λ Wᵀ x before rescaling, and how many directions are kept and dropped.

    Args:
        neutral, positive, negative: states [N, E].
        explained: share of Σ σ².
    """
    leading = []
    for other in (positive, negative):
        left, sizes, _ = torch.linalg.svd(neutral.mT @ other / len(neutral))
        share = sizes.square().cumsum(0) / sizes.square().sum().clamp(min=1e-300)
        leading.append(left[:, : int((share < explained - 1e-12).sum()) + 1])
    plus, minus = leading
    values, vectors = torch.linalg.eigh(minus @ minus.mT - plus @ plus.mT)
    changing = values.abs() > NOTHING
    return vectors[:, changing], values[changing], plus.shape[1], minus.shape[1]
