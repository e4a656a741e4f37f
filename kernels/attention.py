"""Attention with its statistics: one signature, whatever computes it.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, F features,
R rows asked for, t side of a tile or number of top keys.

    output, statistics = attention(q, k, v, causal=True)

`headscope.kernels.choose` says which implementation runs; all agree with `headscope.kernels.reference` to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from headscope.kernels.choose import choose
from headscope.kernels.errors import InputError, SelectionError
from headscope.kernels.problem import Problem, Wanted, make_problem
from headscope.kernels.statistics import NAMES, Statistics, check_names

TILE = 64  # of the pooled map that keep="all" includes


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, keep: str | Sequence[str] = ..., scale: float | None = ..., causal: bool = ...,
    offset: int | None = ..., window: int | None = ..., softcap: float | None = ..., bias: Tensor | None = ..., mask: Tensor | None = ...,
    key_bias: Tensor | None = ..., temperature: Tensor | None = ..., gate: Tensor | None = ..., sink: Tensor | None = ...,
    features: Tensor | None = ..., lengths: Sequence[int] | None = ..., key_lengths: Sequence[int] | None = ...,
    rows: Sequence[int] | Tensor | None = ..., top: int = ..., pooled: int | None = ..., implementation: str | None = ...,
) -> tuple[Tensor, Statistics]: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: None, *, keep: str | Sequence[str] = ..., scale: float | None = ..., causal: bool = ...,
    offset: int | None = ..., window: int | None = ..., softcap: float | None = ..., bias: Tensor | None = ..., mask: Tensor | None = ...,
    key_bias: Tensor | None = ..., temperature: Tensor | None = ..., gate: Tensor | None = ..., sink: Tensor | None = ...,
    features: Tensor | None = ..., lengths: Sequence[int] | None = ..., key_lengths: Sequence[int] | None = ...,
    rows: Sequence[int] | Tensor | None = ..., top: int = ..., pooled: int | None = ..., implementation: str | None = ...,
) -> tuple[None, Statistics]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    keep: str | Sequence[str] = "all",
    scale: float | None = None,
    causal: bool = False,
    offset: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    temperature: Tensor | None = None,
    gate: Tensor | None = None,
    sink: Tensor | None = None,
    features: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    rows: Sequence[int] | Tensor | None = None,
    top: int = 0,
    pooled: int | None = None,
    implementation: str | None = None,
) -> tuple[Tensor | None, Statistics]:
    """softmax(q kᵀ) v, and what there is to know about its pattern without holding the pattern.

    The score of query i and key j is softcap(scale / temperature · q_i·k_j) + bias_ij + key_bias_j, and -inf where the key may not be
    seen. NaN in a row shows as NaN in its output and numbers, argmax -1; a row that sees no key is 0 throughout, lse -inf, argmax -1.

    Args:
        q: [B, H, Q, D], in float16, bfloat16, float32 or float64.
        k: [B, G, K, D]; query head h uses key/value head h // (H / G).
        v: [B, G, K, V]; None computes the statistics alone.
        keep: names out of `headscope.kernels.statistics.NAMES`; "all" for all of them and a pooled map; () for none.
        scale: factor on q·k; None means 1 / sqrt(D).
        causal: query i sees keys 0 to i + offset. Unlike torch's `is_causal`, the last query sees the last key, whatever Q and K.
        offset: at which key the first query stands; None means K - Q. With 0, causality is counted from the top left.
        window: query i sees the `window` keys up to its own, and as many on the other side where not causal.
        softcap: c of c·tanh(s / c).
        bias: added to the scores; broadcastable to [B, H, Q, K].
        mask: bool, True = may be seen; broadcastable to [B, H, Q, K].
        key_bias: added to all scores of a key, -inf hides it; [B, H, K], where B and H may be 1 or left out.
        temperature: [H], divides q·k; positive.
        gate: [H], multiplies the output of a head; statistics are those of the pattern and do not see it.
        sink: [H], the score of one more column per head that takes its share and carries no value; `headscope.kernels.statistics`
            says which numbers count it.
        features: [B, H, K, F], where B and H may be 1 or left out; their averages by the pattern come as `moments`.
        lengths: queries of each packed sequence; a sequence sees itself alone. Causality, offset and window count within it. B = 1.
        key_lengths: keys of each packed sequence, where they are not those of the queries.
        rows: query positions whose rows of the pattern come as `rows`; negative ones count from the end.
        top: how many of each row's largest probabilities come as `top_keys` and `top_weights`.
        pooled: side t of the tiles of the pooled map; None for no map unless keep is "all", then 64.
        implementation: one of `headscope.kernels.choose.NAMES`; None takes the fastest that can do it.

    Returns:
        The output [B, H, Q, V] in the dtype of q (None without v), and the statistics in float32, float64 for float64 inputs.

    Raises:
        ShapeError: tensors whose shapes, dtypes or devices do not fit together; the message gives both.
        InputError: a scale, softcap, window, length, tile or count that makes no sense; an implementation that cannot do this.
        SelectionError: a statistic, query position or implementation that does not exist.
    """
    problem = make_problem(
        q, k, v, scale=scale, causal=causal, offset=offset, window=window, softcap=softcap, bias=bias, mask=mask, key_bias=key_bias,
        temperature=temperature, gate=gate, sink=sink, features=features, lengths=lengths, key_lengths=key_lengths,
    )  # fmt: skip
    wanted = _wanted(problem, keep, pooled, rows, top)
    run = choose(problem, wanted, implementation)
    with torch.autocast(q.device.type, enabled=False):  # it would take float32 products back to half
        return run(problem, wanted)


def _wanted(problem: Problem, keep: str | Sequence[str], pooled: int | None, rows: Sequence[int] | Tensor | None, top: int) -> Wanted:
    if keep == "all":
        keep, pooled = NAMES, TILE if pooled is None else pooled
    names = check_names(keep, pooled)
    if top < 0:
        raise InputError(f"top {top}: give how many of the largest probabilities are wanted, or 0 for none")
    return Wanted(names, pooled, None if rows is None else _positions(rows, problem.shape[2]), top)


def _positions(rows: Sequence[int] | Tensor, count: int) -> tuple[int, ...]:
    wanted = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
    for row in wanted:
        if not -count <= row < count:
            allowed = f"{-count} to {count - 1}" if count else "none"
            raise SelectionError(f"no query at position {row}: there are {count} queries, positions {allowed}")
    return tuple(row % count for row in wanted)
