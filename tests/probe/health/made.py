"""Measures made up for tests of what is said about them."""

from __future__ import annotations

import math
from typing import Any

import torch

from headscope.probe.call import AttentionSite
from headscope.probe.health.measures import HEAD_FIELDS, HeadMeasures, StreamMeasures

TOKENS = 64
# Of a head that is neither sharp nor flat.
USUAL = {
    "entropy": 2.5, "entropy_share": 0.6, "diffuse": 0.6, "routing": 0.3, "hub": 0.1, "p_max": 0.3, "effective_keys": 9.0,
    "effective_share": 0.15, "sum_squares": 0.1, "sink": 0.1, "sink_key": 0.0, "special_mass": math.nan, "first_mass": 0.05,
    "distance": 9.0, "own": 0.05, "previous": 0.05, "row_residual": 0.6, "row_cosine": 0.4, "sigma_low": 1.1, "sigma_high": 1.3,
    "contrast_low": 0.8, "contrast_high": 1.2, "column_deviation": 0.5, "contraction": math.nan, "max_score": 8.0,
    "score_variance": 2.0, "entropy_floor": 0.1,
}  # fmt: skip


def site(layer: int = 0, heads: int = 4) -> AttentionSite:
    name = f"model.layers.{layer}.self_attn"
    return AttentionSite(f"{name}#0", name, 0, layer, "self", heads, heads, 8, 8, "sdpa")


def head_measures(
    layer: int = 0,
    heads: int = 4,
    *,
    causal: bool = False,
    square: bool = True,
    keys: float = float(TOKENS),
    queries: int = TOKENS,
    **fields: Any,
) -> HeadMeasures:
    """A site of usual heads, some numbers of which are given: one for all heads, or a list."""
    values = {name: fields.get(name, USUAL[name]) for name in HEAD_FIELDS}
    tensors = {
        name: torch.as_tensor(
            value if isinstance(value, list) else [value] * heads, dtype=torch.int64 if name == "sink_key" else torch.float64
        )
        for name, value in values.items()
    }
    undefined = {name: "made up" for name, value in tensors.items() if value.isnan().any()}
    return HeadMeasures(
        site=site(layer, heads), calls=1, queries=queries, keys=keys, causal=causal, square=square, undefined=undefined, **tensors
    )


def stream_measures(layer: int = 0, place: str = "output", **fields: Any) -> StreamMeasures:
    """Usual hidden states behind a block, some numbers of which are given."""
    usual = {
        "residual": 0.9, "residual_composite": 0.9, "cosine": 0.2, "cosine_centred": 0.0, "effective_rank": 30.0,
        "effective_rank_centred": 29.0, "stable_rank": 5.0, "stable_rank_centred": 4.0, "participation": 9.0,
        "participation_centred": 8.0, "update": 0.5, "step_cosine": 0.9, "rank_limit": 63.0,
    }  # fmt: skip
    given: dict[str, Any] = {"tokens": TOKENS, "width": 128, **usual, **fields}
    return StreamMeasures(f"model.layers.{layer}", place, layer, 0, **given)
