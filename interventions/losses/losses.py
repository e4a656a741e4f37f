"""A loss on attention for those who fine-tune: weighted terms over one or two runs and a reference.

    loss = AttentionLoss(spectrum=20, hidden=1, edges=5, divergence=1, log_odds=1, words=(he, she))
    with keep_run(model, layers=(2, 3)) as run:
        model(**sentences)
    with keep_run(model, layers=(2, 3)) as other:
        model(**counterfactuals)
    with torch.no_grad(), keep_run(base, layers=(2, 3)) as reference:
        base(**sentences)
    loss(run, other, reference).total.backward()

It holds no state and no optimiser. The terms: `headscope.interventions.losses.loss_terms`; those with maps that people made:
`headscope.interventions.losses.alignment`. Source of the combination: UGID, arXiv 2603.19144.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.interventions.losses.alignment import (
    map_correlation,
    patch_map,
    ranking_hinge,
    saliency_divergence,
    scanpath_saliency,
    token_map,
)
from headscope.interventions.losses.kept_run import Place, Run, keep_run
from headscope.interventions.losses.loss_terms import (
    Ids,
    check_finite,
    edge_distance,
    entropies,
    entropy_band,
    entropy_distance,
    hidden_distance,
    laplacian_spectrum,
    log_odds,
    log_odds_penalty,
    masked_divergence,
    shared_attention,
    spectrum_distance,
)
from headscope.kernels.errors import InputError, NonFiniteError, SelectionError
from headscope.probe.interception.outside import block_of

__all__ = [
    "AttentionLoss",
    "LossValue",
    "Run",
    "edge_distance",
    "entropies",
    "entropy_band",
    "entropy_distance",
    "hidden_distance",
    "keep_run",
    "laplacian_spectrum",
    "log_odds",
    "log_odds_penalty",
    "map_correlation",
    "masked_divergence",
    "patch_map",
    "ranking_hinge",
    "saliency_divergence",
    "scanpath_saliency",
    "shared_attention",
    "spectrum_distance",
    "token_map",
]

PAIRED = ("spectrum", "hidden", "entropy")
REFERRED = ("edges", "divergence")


@dataclass(frozen=True)
class LossValue:
    """What a loss came to.

    Attributes:
        total: the weighted sum, on the graph.
        terms: each term before its weight, on the graph.
    """

    total: Tensor
    terms: dict[str, Tensor]

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for a log."""
        return {"total": float(self.total.detach()), **{name: float(value.detach()) for name, value in self.terms.items()}}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.to_dict().items())


@dataclass(frozen=True)
class AttentionLoss:
    """Weights of the terms; 0 leaves a term out, and then it is not computed. Terms over layers are means over all calls kept.

    Attributes:
        spectrum: squared distance of the Laplacian spectra of two runs.
        hidden: squared distance of their hidden states.
        entropy: squared distance of their row entropies.
        edges: L1 distance from a reference pattern over its `top` keys of each row.
        divergence: KL from the reference's predictions, at the positions `counted`.
        log_odds: squared log-odds of two words.
        anchor: KL from the reference on sentences that are to stay as they are.
        words: ids of these two words, each one or several.
        top: keys of each row that `edges` compares.
        weighted: weigh tokens in spectrum and hidden by how much the last token attends to them, as UGID does; else all alike.

    Raises:
        InputError: no weight, a negative one, or log_odds without words.
        NonFiniteError: a weight that is NaN or infinite.
    """

    spectrum: float = 0.0
    hidden: float = 0.0
    entropy: float = 0.0
    edges: float = 0.0
    divergence: float = 0.0
    log_odds: float = 0.0
    anchor: float = 0.0
    words: tuple[Ids, Ids] | None = None
    top: int = 10
    weighted: bool = True

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise NonFiniteError(f"{name}={weight}: a weight is a finite number")
            if weight < 0:
                raise InputError(f"{name}={weight}: a negative weight would reward the distance; give 0 or more")
        if not any(self.weights.values()):
            raise InputError("all weights are 0: give at least one, such as AttentionLoss(spectrum=20)")
        if self.log_odds and self.words is None:
            raise InputError("log_odds without words: give the ids of two words, such as words=(id_of_he, id_of_she)")

    @property
    def weights(self) -> dict[str, float]:
        """Of every term."""
        names = (*PAIRED, *REFERRED, "log_odds", "anchor")
        return {name: float(getattr(self, name)) for name in names}

    def __call__(
        self, run: Run, other: Run | None = None, reference: Run | None = None, *, at: int | Tensor | Sequence[int] = -1,
        counted: Tensor | None = None, anchors: tuple[Run, Run] | None = None,
    ) -> LossValue:  # fmt: skip
        """The loss of a run.

        Args:
            run: of the model that is trained.
            other: its run on the counterfactuals, token beside token; for spectrum, hidden and entropy.
            reference: the base model's run on the same input, best under no_grad; for edges and divergence.
            at: position of each sample, [B] or one for all, after which the two words are compared.
            counted: [B, S], positions that `divergence` compares; None: all tokens.
            anchors: runs of the model and of the base model on the anchor sentences.

        Raises:
            InputError: a run that a term needs is missing.
            SelectionError: two runs kept different calls.
            ShapeError: they differ in shape.
            NonFiniteError: a term is NaN or infinite.
        """
        terms: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            if not weight:
                continue
            if name in PAIRED:
                terms[name] = self._paired(name, run, _given(other, name, "other"))
            elif name == "edges":
                base = _given(reference, name, "reference")
                pairs = _pairs(run.patterns, base.patterns)
                terms[name] = _mean(edge_distance(a, b, self.top, run.tokens) for a, b in pairs.values())
            elif name == "divergence":
                base = _given(reference, name, "reference")
                terms[name] = masked_divergence(run.logits, base.logits, run.tokens if counted is None else counted)
            elif name == "anchor":
                if anchors is None:
                    raise InputError("anchor needs anchors=(run of the model, run of the base model) on the anchor sentences")
                terms[name] = masked_divergence(anchors[0].logits, anchors[1].logits, anchors[0].tokens)
            else:
                assert self.words is not None
                places = at if isinstance(at, int) else torch.as_tensor(at)
                terms[name] = log_odds_penalty(run.logits, *self.words, places)
        check_finite(terms)
        total = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        return LossValue(total, terms)

    def _paired(self, name: str, run: Run, other: Run) -> Tensor:
        """Spectrum, hidden or entropy of two runs; a token counts where it does in both."""
        tokens = run.tokens if other.tokens is None or run.tokens is None else run.tokens & other.tokens
        if name == "entropy":
            return _mean(entropy_distance(a, b, tokens) for a, b in _pairs(run.patterns, other.patterns).values())
        weights: dict[Place, Tensor] = {}
        if self.weighted:
            weights = {place: shared_attention(a, b, tokens) for place, (a, b) in _pairs(run.patterns, other.patterns).items()}
        if name == "spectrum":
            pairs = _pairs(run.patterns, other.patterns)
            return _mean(spectrum_distance(a, b, weights.get(place), tokens) for place, (a, b) in pairs.items())
        by_block = {(block_of(site.partition("#")[0]), step): value.mean(1) for (site, step), value in weights.items()}
        if not run.hidden:
            raise SelectionError(
                "no hidden states were kept: keep_run(hidden=False), or the chosen sites stand in no numbered block (layers.3.attention)"
            )
        states = _pairs(run.hidden, other.hidden)
        return _mean(hidden_distance(a, b, by_block.get(place), tokens) for place, (a, b) in states.items())


def _given(run: Run | None, term: str, argument: str) -> Run:
    if run is None:
        raise InputError(f"the term {term!r} compares two runs: pass {argument}=, a run kept with keep_run")
    return run


def _pairs(first: dict[Place, Tensor], second: dict[Place, Tensor]) -> dict[Place, tuple[Tensor, Tensor]]:
    if first.keys() != second.keys() or not first:
        apart = sorted(first.keys() ^ second.keys())
        raise SelectionError(
            f"the two runs kept different calls, or none: {apart[:3] or 'nothing kept'}; give keep_run the same layers and model"
        )
    return {place: (value, second[place]) for place, value in first.items()}


def _mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
