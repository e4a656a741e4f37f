"""What the weights of heads say: scores, with whom heads compose, and what their strongest directions read and write.

Letters: L sites, H query heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import HeadscopeError, InputError
from headscope.probe.atlas.composition import Composed, compose_heads
from headscope.probe.atlas.directions import Direction, Vocabulary, copying_scores, read_directions, vocabulary_of
from headscope.probe.atlas.spectra import effective_ranks, head_spectra
from headscope.probe.atlas.weights import HeadWeights, head_weights
from headscope.probe.call import AttentionSite

PAIRS = 60  # of a model that are kept, the strongest
READ = 64  # heads whose directions are read in tokens
DIRECTIONS, TOKENS = 2, 6  # of a circuit; at each end
NAMES = ("copying", "qk_sigma", "qk_rank", "ov_sigma", "ov_rank")


@dataclass(frozen=True)
class Circuits:
    """What was found in the weights beside scores.

    Attributes:
        compositions: the strongest pairs of heads, the strongest first.
        directions: by (site, head), singular directions of QK and OV read in tokens; of some heads only.
        reasons: by site, what could not be found and why.
    """

    compositions: tuple[Composed, ...] = ()
    directions: Mapping[tuple[str, int], tuple[Direction, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def of(self, site: str, head: int, count: int = 5) -> tuple[Composed, ...]:
        """The strongest compositions that a head takes part in."""
        own = (pair for pair in self.compositions if (site, head) in ((pair.source, pair.source_head), (pair.target, pair.target_head)))
        return tuple(own)[:count]


@dataclass(frozen=True, eq=False)
class WeightReading:
    """The weights of all heads, and the scores that follow from them.

    Attributes:
        weights: by site.
        vocabulary: embedding and unembedding; None where the model has none.
        scores: by name, [L, H]; NaN where undefined.
        on: by name, what a score is of, in words.
        undefined: by name, why it is NaN throughout.
    """

    weights: Mapping[str, HeadWeights]
    vocabulary: Vocabulary | None
    scores: Mapping[str, Tensor]
    on: Mapping[str, str]
    undefined: Mapping[str, str]

    def circuits(self, tokenizer: Any, heads: Sequence[tuple[str, int]]) -> Circuits:
        """Compositions of all heads, and directions of the first `READ` of those named."""
        reasons = {name: own.reason for name, own in self.weights.items() if own.reason is not None}
        try:
            found = compose_heads(self.weights)
        except InputError as error:
            pairs: tuple[Composed, ...] = ()
            reasons.setdefault("composition", str(error))
        else:
            pairs = found.strongest(None, PAIRS)
            reasons |= {name: reason for name, reason in found.reasons.items() if name not in reasons}
        directions: dict[tuple[str, int], tuple[Direction, ...]] = {}
        readable = tokenizer if callable(getattr(tokenizer, "decode", None)) else None
        for site, head in heads[:READ] if readable is not None else ():
            if self.vocabulary is None:
                break
            try:
                directions[site, head] = tuple(
                    one
                    for circuit in ("qk", "ov")
                    for one in read_directions(
                        self.weights[site], head, self.vocabulary, readable, circuit=circuit, count=DIRECTIONS, top=TOKENS
                    )
                )
            except InputError as error:
                reasons.setdefault(site, str(error))
        return Circuits(pairs, directions, reasons)


def read_weights(model: nn.Module, inputs: Mapping[str, Any], sites: Sequence[AttentionSite]) -> WeightReading:
    """Find the weights of all heads by one run, and score them: OV copying, largest singular values and effective ranks of QK and OV.

    Args:
        inputs: a few tokens are enough.
        sites: the L sites; those whose weights cannot be found are NaN.
    """
    try:
        weights = head_weights(model, inputs)
    except HeadscopeError as error:
        wide = max(site.query_heads for site in sites)
        empty = {name: torch.full((len(sites), wide), torch.nan, dtype=torch.float64) for name in NAMES}
        return WeightReading({}, None, empty, {}, dict.fromkeys(NAMES, str(error)))
    try:
        vocabulary: Vocabulary | None = vocabulary_of(model, inputs)
        reasons: dict[str, str] = {}
    except InputError as error:
        vocabulary, reasons = None, {"copying": str(error)}
    tables = {name: torch.full((len(sites), max(s.query_heads for s in sites)), torch.nan, dtype=torch.float64) for name in NAMES}
    kinds = set()
    for place, site in enumerate(sites):
        if site.name not in weights:
            continue
        own = weights[site.name]
        spectra, copied = head_spectra(own.folded()), copying_scores(own, vocabulary)
        for circuit, values in (("qk", spectra.qk), ("ov", spectra.ov)):
            if values is not None:
                tables[f"{circuit}_sigma"][place, : site.query_heads] = values.amax(-1).double().cpu()
                tables[f"{circuit}_rank"][place, : site.query_heads] = effective_ranks(values).double().cpu()
        tables["copying"][place, : site.query_heads] = copied.values.double().cpu()
        if bool(copied.values.isnan().all()):
            reasons.setdefault("copying", copied.reason or "its weights were not found")
        else:
            kinds.add(copied.kind)
    whole = "the weights: W_E W_V W_O W_U" if kinds == {"copying"} else "the weights: W_V W_O alone, for want of logits of tokens"
    on = {"copying": whole, **{name: f"the weights: {name[:2].upper()}" for name in NAMES[1:]}}
    missing = next((own.reason for own in weights.values() if own.reason is not None), "the weights were not found")
    undefined = {name: reasons.get(name, missing) for name, table in tables.items() if bool(table.isnan().all())}
    return WeightReading(weights, vocabulary, tables, on, undefined)
