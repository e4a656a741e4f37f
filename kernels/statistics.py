"""Numbers about a pattern that need no N×N map: per row, per column, per tile.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, P queries of one panel, W keys a panel can see, T tiles.

Rows are worked off in panels, so memory grows with panel × K, not with Q × K. Half-precision inputs are accumulated in
float32; float64 stays float64. Entropies and lse are in nats.

Where a head has a sink (an extra column that takes a share and carries no value):
    p_max, received, pooled and `rows` count it in the denominator, so they are what the model multiplies values by;
    lse, entropy and sum_squares look at the real keys only, renormalised to 1. The sink's own share of a row is
    sigmoid(sink - lse).

A row that sees no key is dead: lse -inf, argmax -1, everything else 0. NaN in a row shows as NaN in its numbers, argmax -1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope.kernels.errors import HeadscopeError, InputError, SelectionError

if TYPE_CHECKING:
    from pandas import DataFrame


ROW_NAMES = ("lse", "entropy", "p_max", "argmax", "max_score", "sum_squares")
NAMES = (*ROW_NAMES, "received")


def check_names(names: str | Sequence[str], tile: int | None) -> frozenset[str]:
    """The statistics asked for, as a set.

    Raises:
        SelectionError: a statistic that does not exist.
        InputError: a tile that is not positive.
    """
    asked = (names,) if isinstance(names, str) else tuple(names)
    for name in asked:
        if name not in NAMES:
            hint = "; for the pooled map give its tile, pooled=16" if name == "pooled" else ""
            raise SelectionError(f"no statistic {name!r}: there are {', '.join(NAMES)}{hint}")
    if tile is not None and tile < 1:
        raise InputError(f"tiles of side {tile}: give pooled=1 or more, or None for no pooled map")
    return frozenset(asked)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one attention; a field that was not asked for is None.

    Attributes:
        lse: [B, H, Q], log of the sum of exp(scores) over the visible keys, nats.
        entropy: [B, H, Q], nats; of the row renormalised over the real keys.
        p_max: [B, H, Q], the largest probability.
        argmax: [B, H, Q], int64, the key that has it; the lowest on a tie, -1 in a dead row.
        max_score: [B, H, Q], the largest score, nats; -inf in a dead row.
        sum_squares: [B, H, Q], sum of squared probabilities, renormalised over the real keys; 1 / it is how many keys count.
        received: [B, H, K], probability each key receives, summed over the queries.
        pooled: [B, H, ceil(Q/t), ceil(K/t)], the mass (sum, not mean) of the pattern in each t × t tile.
        moments: [B, H, Q, F], the features averaged by the pattern (a sink's share carries none).
        rows: [B, H, R, K], exact rows of the pattern.
        top_keys: [B, H, Q, t], int64, the keys of the t largest probabilities, largest first, the lowest key on a tie; -1 where
            a query sees fewer.
        top_weights: [B, H, Q, t], those probabilities; 0 where a query sees fewer.
    """

    lse: Tensor | None = None
    entropy: Tensor | None = None
    p_max: Tensor | None = None
    argmax: Tensor | None = None
    max_score: Tensor | None = None
    sum_squares: Tensor | None = None
    received: Tensor | None = None
    pooled: Tensor | None = None
    moments: Tensor | None = None
    rows: Tensor | None = None
    top_keys: Tensor | None = None
    top_weights: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if value is not None}

    def select(self, heads: int | Sequence[int]) -> Statistics:
        """The statistics of some heads, in the order given; negative heads count from the end.

        Raises:
            SelectionError: a head that is not there.
        """
        wanted = [heads] if isinstance(heads, int) else list(heads)
        chosen: dict[str, Tensor] = {}
        for name, value in self.tensors().items():
            count = value.shape[1]
            for head in wanted:
                if not -count <= head < count:
                    raise SelectionError(f"no head {head}: there are {count} heads, 0 to {count - 1}")
            chosen[name] = value[:, torch.tensor(wanted, dtype=torch.long, device=value.device)]
        return Statistics(**chosen)

    def to_dict(self) -> dict[str, object]:
        """The fields that are there as nested lists, ready for JSON; a number that is not finite becomes None."""
        return {name: _plain(value.detach().cpu().tolist()) for name, value in self.tensors().items()}

    def to_frame(self) -> DataFrame:
        """One line per batch entry, head and position; needs pandas.

        A position counts queries for the row statistics and keys for `received`; where there are more of one than of
        the other the missing cells are NA. What has other axes (pooled, moments, rows, top_keys, top_weights) is left out.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        axes = ["batch", "head", "position"]
        frame = pandas.DataFrame({axis: pandas.Series(dtype="int64") for axis in axes})
        for name, value in self.tensors().items():
            if name not in NAMES:
                continue
            index = pandas.MultiIndex.from_product([range(size) for size in value.shape], names=axes)
            flat = value.detach().cpu().flatten().numpy()
            column = pandas.Series(flat, index=index, name=name, dtype="Int64" if name == "argmax" else None)
            frame = frame.merge(column.reset_index(), on=axes, how="outer")
        return frame.sort_values(axes, ignore_index=True)


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
