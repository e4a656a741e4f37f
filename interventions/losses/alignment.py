"""Differentiable agreement of attention with maps that people made, and a hinge that ranks one group of keys above another.

Letters: B batch, H query heads, Q queries, K keys, P patches.

The measures are those of saliency benchmarks (Bylinskii et al. 2019): divergence and correlation with a fixation density, normalised
scanpath saliency at fixations. A loss is the divergence itself, 1 − correlation, or −NSS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from headscope.interventions.losses.loss_terms import wide
from headscope.kernels.errors import InputError, ShapeError

Where = slice | Sequence[int] | Tensor


def token_map(pattern: Tensor, query: int, keys: Where, heads: Sequence[int] | None = None) -> Tensor:
    """[B, P]: where one query looks among some keys, mean over heads, each sample summing to 1.

    Args:
        pattern: [B, H, Q, K].
        query: its position, such as 0 for a class token.
        keys: positions of the patches, such as slice(1, None).
        heads: some heads only.
    """
    rows = wide(pattern[:, list(heads)] if heads is not None else pattern)[:, :, query]
    found = rows[:, :, keys].mean(1)
    return found / found.sum(-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


def patch_map(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, P]: a density over pixels [B, height, width] as one over patches, each sample summing to 1; fixation counts add up."""
    if image.ndim != 3:
        raise ShapeError(f"a map of shape {list(image.shape)}: expected [B, height, width]")
    if bool((image < 0).any()) or bool((image.sum((1, 2)) <= 0).any()):
        raise InputError("a map with a negative number, or with nothing in it: give densities or counts of fixations")
    found = adaptive_avg_pool2d(wide(image)[:, None], grid).flatten(1)
    return found / found.sum(-1, keepdim=True)


def saliency_divergence(found: Tensor, human: Tensor, floor: float = 1e-7) -> Tensor:
    """KL(human ‖ found) in nats, mean over samples; both [B, P] that sum to 1, probabilities below `floor` taken as it."""
    _check(found, human)
    p, q = wide(found).clamp(min=floor), wide(human).detach().clamp(min=floor)
    return (q * (q.log() - p.log())).sum(-1).mean()


def map_correlation(found: Tensor, human: Tensor) -> Tensor:
    """Pearson's correlation over patches, mean over samples; a constant map has 0."""
    _check(found, human)
    return (_standard(found) * _standard(human.detach())).mean(-1).mean()


def scanpath_saliency(found: Tensor, fixations: Tensor) -> Tensor:
    """NSS: the map in standard deviations above its mean, at the fixations [B, P] (counts), mean over fixations, then samples."""
    _check(found, fixations)
    weights = wide(fixations).detach()
    if bool((weights.sum(-1) <= 0).any()):
        raise InputError("a sample without fixations: leave it out")
    return ((_standard(found) * weights).sum(-1) / weights.sum(-1)).mean()


def ranking_hinge(
    pattern: Tensor, preferred: Where, others: Where, *, margin: float = 0.1, gate: Tensor | None = None, queries: Where = slice(None)
) -> Tensor:
    """Mean of gate · max(0, margin − (mass on preferred keys − mass on the others)).

    For a group of keys that has to win where the gate says so, such as tactile tokens under contact (after VT-WAM, arXiv 2607.02503).

    Args:
        pattern: [B, H, Q, K].
        preferred, others: key positions.
        margin: by how much the mass has to be larger, at most 1.
        gate: [B] or [B, chosen queries] from 0 to 1; None: 1. A closed gate gives exactly 0 and no gradient.
        queries: some query positions only.
    """
    if not -1 <= margin <= 1:
        raise InputError(f"margin={margin}: masses lie between 0 and 1, so give a margin from -1 to 1")
    rows = wide(pattern)[:, :, queries]  # [B, H, chosen, K]
    lead = rows[..., preferred].sum(-1) - rows[..., others].sum(-1)  # [B, H, chosen]
    short = (margin - lead).clamp(min=0).mean(1)
    if gate is None:
        return short.mean()
    if gate.shape not in (short.shape[:1], short.shape):
        raise ShapeError(f"gate {list(gate.shape)}: expected [B] = {list(short.shape[:1])} or [B, queries] = {list(short.shape)}")
    return (short * gate.to(short).reshape(len(short), -1)).mean()


def _standard(values: Tensor) -> Tensor:
    """Mean 0 and variance 1 over patches; 0 where all are equal, with a finite gradient."""
    centred = wide(values) - wide(values).mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    flat = variance == 0
    return centred / torch.where(flat, 1.0, variance).sqrt()


def _check(found: Tensor, human: Tensor) -> None:
    if found.ndim != 2 or found.shape != human.shape:
        raise ShapeError(f"maps {list(found.shape)} and {list(human.shape)}: give two of [B, P], such as from token_map and patch_map")
