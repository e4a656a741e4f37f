"""How strongly a later head reads what an earlier one writes, by its queries, keys or values (Elhage et al. 2021).

Letters: L sites in execution order, H query heads, D width of a head, E width of the stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.atlas.spectra import factors, triangle
from headscope.probe.atlas.weights import HeadWeights
from headscope.probe.call import AttentionSite

KINDS = ("q", "k", "v")


@dataclass(frozen=True)
class Composed:
    """One pair of heads.

    Attributes:
        kind: `q`, `k` or `v`: the later head's input that the earlier one writes for.
        source, source_head: the earlier head.
        target, target_head: the later one.
        score: ‖AB‖ / (‖A‖ ‖B‖).
        excess: how far that is above unrelated heads, score - 1/√E.
    """

    kind: str
    source: str
    source_head: int
    target: str
    target_head: int
    score: float
    excess: float


@dataclass(frozen=True, eq=False)
class CompositionScores:
    """‖AB‖_F / (‖A‖_F ‖B‖_F) of all pairs of an earlier and a later head; NaN for all others and where weights are missing.

    A is what the earlier head moves, W_V W_O; B is W_Q W_Kᵀ of the later head for `q`, its transpose for `k`, and W_V W_O for `v`.

    Attributes:
        sites: L names.
        q, k, v: [L, H, L, H], first the earlier head.
        baseline: 1/√E, the root mean square of the score when B is turned at random against A, whatever their spectra.
        reasons: by site, why it has no scores.
    """

    sites: tuple[str, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    baseline: float
    reasons: Mapping[str, str]

    def of(self, kind: str) -> Tensor:
        """[L, H, L, H].

        Raises:
            SelectionError: a kind other than `q`, `k` and `v`.
        """
        if kind not in KINDS:
            raise SelectionError(f"no composition {kind!r}: there are {', '.join(KINDS)}")
        found: Tensor = getattr(self, kind)
        return found

    def strongest(self, kind: str | None = None, count: int = 10) -> tuple[Composed, ...]:
        """The pairs with the highest scores, of one kind or of all.

        Raises:
            SelectionError: a kind other than `q`, `k` and `v`.
        """
        kinds = KINDS if kind is None else (kind,)
        scores = torch.stack([self.of(name) for name in kinds])  # [kinds, L, H, L, H]
        known = int((~scores.isnan()).sum())
        flat = scores.nan_to_num(nan=-math.inf).flatten()
        best = flat.topk(min(count, known))
        found = []
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            name, source, head, target, other = (int(i) for i in torch.unravel_index(torch.tensor(place), scores.shape))
            pair = Composed(kinds[name], self.sites[source], head, self.sites[target], other, value, value - self.baseline)
            found.append(pair)
        return tuple(found)


def compose_heads(weights: Mapping[str, HeadWeights], *, fold: bool = True) -> CompositionScores:
    """Composition between all heads of a stack of sites that read and write one stream.

    Args:
        weights: of `head_weights`, in execution order; a site counts as later than another where its layer is, or where it comes later in
            a model without layer numbers. Cross attentions are left out.
        fold: take the scale of the norm in front of the later head into what it reads.

    Raises:
        InputError: no site has weights for it, or the sites differ in their number of heads or in the width of their stream.
    """
    usable: dict[str, tuple[HeadWeights, dict[str, tuple[Tensor, Tensor]]]] = {}
    reasons: dict[str, str] = {}
    for name, one in weights.items():
        sides = _sides(one.folded() if fold else one, one)
        if isinstance(sides, str):
            reasons[name] = sides
        else:
            usable[name] = one, sides
    if not usable:
        raise InputError(f"no site has the weights that composition needs: {'; '.join(f'{n}: {r}' for n, r in reasons.items()) or 'none'}")
    widths = {side.shape[-1] for _, both in usable.values() for pair in both.values() for side in pair}
    heads = {one.site.query_heads for one, _ in usable.values()}
    if len(widths) > 1 or len(heads) > 1:
        raise InputError(f"the sites have streams {sorted(widths)} wide and {sorted(heads)} heads: give those of one stack alone")
    count, width = heads.pop(), widths.pop()
    names = tuple(weights)
    scores = {kind: torch.full((len(names), count, len(names), count), math.nan, dtype=torch.float64) for kind in KINDS}
    for early, source in enumerate(names):
        if source not in usable:
            continue
        read, written = usable[source][1]["v"]
        moved = triangle(read) @ written  # [H, D, E], of the norm of W_V W_O and of its products
        for late, target in enumerate(names):
            if target not in usable or not _before(usable[source][0].site, usable[target][0].site, early, late):
                continue
            for kind in KINDS:
                entry, rest = usable[target][1][kind]
                reader = triangle(rest) @ entry  # [H, D, E]
                scores[kind][early, :, late] = _norms(moved, reader).cpu()
    return CompositionScores(names, scores["q"], scores["k"], scores["v"], 1 / math.sqrt(width), reasons)


def _sides(weights: HeadWeights, plain: HeadWeights) -> dict[str, tuple[Tensor, Tensor]] | str:
    """For each way in, the factor [H, D, E] that meets the stream and the factor behind it; or why there are none."""
    (q, k, why), (v, o, missing) = factors(weights, "qk"), factors(weights, "ov")
    other = [f"{stage} reads the {source}" for stage, source in plain.reads.items() if source != "residual"]
    if q is None or k is None or v is None or o is None:
        return "; ".join(reason for reason in (why, missing) if reason)
    return "; ".join(other) if other else {"q": (q, k), "k": (k, q), "v": (v, o)}


def _before(source: AttentionSite, target: AttentionSite, early: int, late: int) -> bool:
    return early < late if source.layer is None or target.layer is None else source.layer < target.layer


def _norms(moved: Tensor, reader: Tensor) -> Tensor:
    """[H, H'] of ‖AB‖ / (‖A‖ ‖B‖), where moved [H, D, E] and readerᵀ [H', E, D'] have the norms and products of A and B."""
    products = torch.einsum("hde,gce->hgdc", moved, reader).flatten(2).norm(dim=-1)
    sizes = moved.flatten(1).norm(dim=-1)[:, None] * reader.flatten(1).norm(dim=-1)
    return torch.where(sizes > 0, products / sizes, torch.nan)
