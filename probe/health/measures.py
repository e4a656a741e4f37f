"""What is measured of a model's health: numbers of heads, of hidden states and of gradients.

Letters: B batch, H query heads, Q queries, K keys, N tokens, d width of a hidden state. Entropies in nats, distances in positions.

A number that has no meaning for what was measured is NaN, and `undefined` says why; it says nothing about health. A value of one head
may be NaN (its rows were dead, or not finite) while the others are numbers: then `undefined` says why under the same name.
Numbers of several samples are means over the samples, weighted by the rows each of them counts (heads) or by its tokens (hidden states).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from headscope.kernels.errors import InputError
from headscope.probe.call import AttentionSite

Plain = str | int | float | None  # what a row of a table holds

# Of HeadMeasures, in the order of its fields.
HEAD_FIELDS = (
    "entropy", "entropy_share", "diffuse", "routing", "hub", "p_max", "effective_keys", "effective_share", "sum_squares",
    "sink", "sink_key", "special_mass", "first_mass", "distance", "own", "previous", "row_residual", "row_cosine",
    "sigma_low", "sigma_high", "contrast_low", "contrast_high", "column_deviation", "contraction",
    "max_score", "score_variance", "entropy_floor",
)  # fmt: skip
# Of StreamMeasures.
STREAM_FIELDS = (
    "residual", "residual_composite", "cosine", "cosine_centred", "effective_rank", "effective_rank_centred", "stable_rank",
    "stable_rank_centred", "participation", "participation_centred", "update", "step_cosine", "rank_limit",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class HeadMeasures:
    """Every head of one site, over one call or several; all numbers [H], float64 on the CPU, NaN where undefined.

    Attributes:
        site: where the heads are.
        calls: how many calls were averaged.
        queries: rows counted: living, not padding, and not special where special tokens are left out.
        keys: visible keys of a counted row, their mean.
        causal: no counted row sees a key after its own position, by the call's flag or by its mask.
        square: queries and keys are the same tokens, so that a column sum is to be compared with 1.
        entropy: mean over rows of H_i, nats.
        entropy_share: mean of H_i / log n_i over the rows that see n_i > 1 keys, 0 to 1.
        diffuse, routing, hub: shares of the budget log K = diffuse + routing + hub; they sum to 1.
        p_max: mean of the largest probability of a row.
        effective_keys: mean of 1 / Σ_j P_ij².
        effective_share: mean of that over n_i.
        sum_squares: mean of Σ_j P_ij².
        sink: the largest α_j = (probability key j receives) / (rows that can see it).
        sink_key: that key's position in the first sample of the first call, int64; -1 where undefined.
        special_mass: mean mass a row puts on special tokens.
        first_mass: mean mass a row puts on the first real token.
        distance: mean of Σ_j P_ij |i - j|.
        own, previous: mean of P_ii, and of P_i,i-1 over the rows that can see a key before them.
        row_residual: ρ = 1 - ‖c‖² / (N ‖P‖_F²), 0 where all rows are equal.
        row_cosine: mean over i ≠ j of cos(P_i, P_j).
        sigma_low, sigma_high: the largest singular value of P lies between them.
        contrast_low, contrast_high: the largest singular value of ΠP, Π = I - 11ᵀ/N, lies between them.
        column_deviation: mean of |c_j - 1| (square only).
        contraction: the largest P_ii but for the first row (causal only).
        max_score: the largest visible score of all counted rows, nats.
        score_variance: mean over rows of the variance of the visible scores.
        entropy_floor: mean over rows of the least entropy that scores of this variance can have (Zhai et al. 2023), nats.
        undefined: field -> why it, or some heads of it, is NaN.
    """

    site: AttentionSite
    calls: int
    queries: int
    keys: float
    causal: bool
    square: bool
    entropy: Tensor
    entropy_share: Tensor
    diffuse: Tensor
    routing: Tensor
    hub: Tensor
    p_max: Tensor
    effective_keys: Tensor
    effective_share: Tensor
    sum_squares: Tensor
    sink: Tensor
    sink_key: Tensor
    special_mass: Tensor
    first_mass: Tensor
    distance: Tensor
    own: Tensor
    previous: Tensor
    row_residual: Tensor
    row_cosine: Tensor
    sigma_low: Tensor
    sigma_high: Tensor
    contrast_low: Tensor
    contrast_high: Tensor
    column_deviation: Tensor
    contraction: Tensor
    max_score: Tensor
    score_variance: Tensor
    entropy_floor: Tensor
    undefined: dict[str, str] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """H."""
        return self.site.query_heads

    def numbers(self) -> dict[str, Tensor]:
        """The fields [H] by name, in their order."""
        return {name: getattr(self, name) for name in HEAD_FIELDS}

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON: lists of H numbers, None where undefined."""
        return {
            "site": self.site.to_dict(), "calls": self.calls, "queries": self.queries, "keys": plain(self.keys),
            "causal": self.causal, "square": self.square,
            **{name: [plain(one) for one in value.tolist()] for name, value in self.numbers().items()},
            "undefined": dict(self.undefined),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> HeadMeasures:
        """What `to_dict` wrote.

        Raises:
            InputError: a field is missing, or has not H numbers.
        """
        _complete("HeadMeasures", given, ("site", "calls", "queries", "keys", "causal", "square", *HEAD_FIELDS, "undefined"))
        site = AttentionSite(**given["site"])
        found = {name: _numbers(name, given[name], site.query_heads) for name in HEAD_FIELDS}
        keys = math.nan if given["keys"] is None else float(given["keys"])
        return cls(
            site=site, calls=int(given["calls"]), queries=int(given["queries"]), keys=keys, causal=bool(given["causal"]),
            square=bool(given["square"]), undefined=dict(given["undefined"]), **found,
        )  # fmt: skip

    def rows(self) -> list[dict[str, Plain]]:
        """One line of a table for each head."""
        lists = {name: value.tolist() for name, value in self.numbers().items()}
        same: dict[str, Plain] = {"site": self.site.name, "layer": self.site.layer}
        tail: dict[str, Plain] = {"queries": self.queries, "keys": plain(self.keys)}
        return [{**same, "head": head, **{name: plain(value[head]) for name, value in lists.items()}, **tail} for head in range(self.heads)]


@dataclass(frozen=True)
class StreamMeasures:
    """Hidden states [B, N, d] at one place; every number a mean over the samples, NaN where undefined.

    Attributes:
        name: path of the block's module.
        place: `input` (before the first block) or `output` of that block.
        layer: the block's number.
        stream: which of several hidden states, where a block has several; else 0.
        tokens: tokens counted, over all samples.
        width: d.
        dtype: of the states, `float32`; the floor of what their numbers can resolve is 10 eps of it.
        residual: ‖ΠX‖_F / ‖X‖_F, 0 to 1.
        residual_composite: √(‖R‖₁ ‖R‖_∞) over the same of X, R = X - 1 · (mean row); below 2, and not always below 1.
        cosine, cosine_centred: mean cos(x_i, x_j) over i ≠ j; centred: of x_i minus the mean token.
        effective_rank, effective_rank_centred: exp of the entropy of σ / Σσ.
        stable_rank, stable_rank_centred: Σσ² / σ₁².
        participation, participation_centred: (Σσ²)² / Σσ⁴.
        update: mean over tokens of ‖attention's output‖ / ‖hidden state before the block‖, where both were seen.
        step_cosine: mean over tokens of the cosine to the state one block before.
        rank_limit: min(tokens - 1, d), the largest centred rank; a mean over the samples.
        floored: the residual is below 10 eps of the dtype: it is given as that floor, and the centred numbers are undefined.
        undefined: field -> why it is NaN.
    """

    name: str
    place: str
    layer: int
    stream: int
    tokens: int
    width: int
    dtype: str = "float32"
    residual: float = math.nan
    residual_composite: float = math.nan
    cosine: float = math.nan
    cosine_centred: float = math.nan
    effective_rank: float = math.nan
    effective_rank_centred: float = math.nan
    stable_rank: float = math.nan
    stable_rank_centred: float = math.nan
    participation: float = math.nan
    participation_centred: float = math.nan
    update: float = math.nan
    step_cosine: float = math.nan
    rank_limit: float = math.nan
    floored: bool = False
    undefined: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON; None where undefined."""
        found: dict[str, object] = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**found, **{name: plain(getattr(self, name)) for name in STREAM_FIELDS}, "undefined": dict(self.undefined)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> StreamMeasures:
        """What `to_dict` wrote.

        Raises:
            InputError: a field is missing.
        """
        names = tuple(one.name for one in fields(cls))
        _complete("StreamMeasures", given, names)
        found = {name: given[name] for name in names}
        found |= {name: math.nan if given[name] is None else float(given[name]) for name in STREAM_FIELDS}
        return cls(**found)

    def row(self) -> dict[str, Plain]:
        """One line of a table."""
        found = self.to_dict()
        del found["undefined"]
        return found  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class GradientMeasures:
    """How much of a loss's gradient reaches the queries, keys and values of one site.

    Attributes:
        site: where the heads are.
        query, key, value: [H], float64, norms of the gradient at q, k and v; with shared keys and values, their group's norm.
        ratio: [H], (query + key) / (2 value); NaN where the gradient at v is 0.
        undefined: field -> why it is NaN.
    """

    site: AttentionSite
    query: Tensor
    key: Tensor
    value: Tensor
    ratio: Tensor
    undefined: dict[str, str] = field(default_factory=dict)

    def numbers(self) -> dict[str, Tensor]:
        """The fields [H] by name, in their order."""
        return {"query": self.query, "key": self.key, "value": self.value, "ratio": self.ratio}

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON: lists of H numbers, None where undefined."""
        lists = {name: [plain(one) for one in value.tolist()] for name, value in self.numbers().items()}
        return {"site": self.site.to_dict(), **lists, "undefined": dict(self.undefined)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> GradientMeasures:
        """What `to_dict` wrote.

        Raises:
            InputError: a field is missing, or has not H numbers.
        """
        names = ("query", "key", "value", "ratio")
        _complete("GradientMeasures", given, ("site", *names, "undefined"))
        site = AttentionSite(**given["site"])
        return cls(site=site, undefined=dict(given["undefined"]), **{name: _numbers(name, given[name], site.query_heads) for name in names})

    def rows(self) -> list[dict[str, Plain]]:
        """One line of a table for each head."""
        lists = {name: value.tolist() for name, value in self.numbers().items()}
        same: dict[str, Plain] = {"site": self.site.name, "layer": self.site.layer}
        count = self.site.query_heads
        return [{**same, "head": head, **{name: plain(value[head]) for name, value in lists.items()}} for head in range(count)]


def plain(value: float | int) -> float | int | None:
    """A number that JSON can hold: None for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(name: str, given: Any, heads: int) -> Tensor:
    if not isinstance(given, (list, tuple)) or len(given) != heads:
        raise InputError(f"{name} is not a list of {heads} numbers, one for each head")
    if name == "sink_key":
        return torch.tensor([int(value) for value in given], dtype=torch.int64)
    return torch.tensor([math.nan if value is None else float(value) for value in given], dtype=torch.float64)


def _complete(kind: str, given: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(f"no {', '.join(missing)} in what should be {kind}: it was written by another version, or is damaged")
