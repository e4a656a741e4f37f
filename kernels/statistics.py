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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope.kernels.errors import HeadscopeError, InputError, SelectionError, ShapeError
from headscope.kernels.reference import check_call, finish_scores, full_rank, pattern

if TYPE_CHECKING:
    from pandas import DataFrame


ROW_NAMES = ("lse", "entropy", "p_max", "argmax", "sum_squares")
NAMES = (*ROW_NAMES, "received")

# Scores worked on at once, where panel and head allow. On a CPU larger blocks leave the cache; on a GPU smaller ones idle it.
_CPU_BLOCK, _CPU_PANEL = 1 << 18, 64
_BLOCK = 1 << 24
# exp() of it is 0 in float32 and float64; unlike -inf it can be multiplied by that 0.
_FLOOR = -1000.0


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one attention; a field that was not asked for is None.

    Attributes:
        lse: [B, H, Q], log of the sum of exp(scores) over the visible keys, nats.
        entropy: [B, H, Q], nats; of the row renormalised over the real keys.
        p_max: [B, H, Q], the largest probability.
        argmax: [B, H, Q], int64, the key that has it; the lowest on a tie, -1 in a dead row.
        sum_squares: [B, H, Q], sum of squared probabilities, renormalised over the real keys; 1 / it is how many keys count.
        received: [B, H, K], probability each key receives, summed over the queries.
        pooled: [B, H, ceil(Q/t), ceil(K/t)], the mass (sum, not mean) of the pattern in each t × t tile.
    """

    lse: Tensor | None = None
    entropy: Tensor | None = None
    p_max: Tensor | None = None
    argmax: Tensor | None = None
    sum_squares: Tensor | None = None
    received: Tensor | None = None
    pooled: Tensor | None = None

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
        the other the missing cells are NA. The pooled map has other axes and is left out.

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
            if name == "pooled":
                continue
            index = pandas.MultiIndex.from_product([range(size) for size in value.shape], names=axes)
            flat = value.detach().cpu().flatten().numpy()
            column = pandas.Series(flat, index=index, name=name, dtype="Int64" if name == "argmax" else None)
            frame = frame.merge(column.reset_index(), on=axes, how="outer")
        return frame.sort_values(axes, ignore_index=True)


def statistics(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    want: Sequence[str] = NAMES,
    pooled: int | None = None,
    panel: int = 256,
) -> Statistics:
    """Statistics of softmax(q kᵀ) that never hold the whole pattern.

    Args:
        q: [B, H, Q, D].
        k: [B, G, K, D].
        scale, bias, mask, is_causal, softcap: as in `headscope.kernels.reference.scores`.
        sink: [H]; the module docstring says which numbers count it.
        want: names out of `NAMES`; only what they need is computed.
        pooled: side t of the tiles of the pooled map; None for no map.
        panel: queries worked on at once, at most; a CPU takes fewer.

    Returns:
        Statistics in float32, or float64 for float64 inputs. Differentiable; then every panel is kept for the backward pass.

    Raises:
        ShapeError: tensors that do not fit together.
        InputError: a softcap, tile or panel that is not positive.
        SelectionError: a statistic that does not exist.
    """
    check_call(q, k, bias=bias, mask=mask, sink=sink, softcap=softcap)
    names = _check_names(want, pooled, panel)
    dtype = _precision(q)
    shape = (*q.shape[:3], k.shape[2])
    groups = q.shape[1] // k.shape[1]
    bias, mask = full_rank(bias), full_rank(mask)

    def measure(block: _Block) -> dict[str, Tensor]:
        panel_q = q[block.batch, block.heads, block.rows].to(dtype)
        kv_heads = slice(block.heads.start // groups, block.heads.stop // groups)
        panel_k = k[block.batch, kv_heads, : block.width].to(dtype)
        positions = torch.arange(block.rows.start, block.rows.stop, device=q.device)
        seen = finish_scores(
            _products(panel_q, panel_k, scale),
            positions,
            bias=block.cut(bias),
            mask=block.cut(mask),
            is_causal=is_causal,
            softcap=softcap,
        )
        head_sink = None if sink is None else sink[block.heads].to(dtype)
        return _measure_scores(seen, head_sink, names, pooled, positions)

    with torch.autocast(q.device.type, enabled=False):  # it would take the float32 products back to half
        return _collect(shape, groups, names, pooled, panel, is_causal, dtype, q.device, measure)


def statistics_of_pattern(
    pattern: Tensor, want: Sequence[str] = NAMES, pooled: int | None = None, scores: Tensor | None = None
) -> Statistics:
    """The same statistics from a pattern that is already there, whatever normaliser or edit made it.

    Rows need not sum to 1: entropy and sum_squares renormalise them. A row of zeros is dead. Entries below 0, which only an
    edit can make, have no entropy: NaN.

    Args:
        pattern: [B, H, Q, K].
        want: names out of `NAMES`. `lse` is given only with `scores`, else None: a pattern does not determine it.
        pooled: side t of the tiles of the pooled map; None for no map.
        scores: [B, H, Q, K], what the softmax saw.

    Raises:
        ShapeError: not four axes, or scores of another shape.
        InputError: a tile that is not positive.
        SelectionError: a statistic that does not exist.
    """
    if pattern.dim() != 4 or not pattern.is_floating_point():
        raise ShapeError(f"the pattern is {list(pattern.shape)} of {pattern.dtype}; give floating-point [B, H, Q, K]")
    if scores is not None and scores.shape != pattern.shape:
        raise ShapeError(f"the scores are {list(scores.shape)} and the pattern is {list(pattern.shape)}; they must be equal")
    names = _check_names(want, pooled, 1)
    if scores is None:
        names = names - {"lse"}
    dtype = _precision(pattern)
    batch, heads, queries, keys = pattern.shape

    def measure(block: _Block) -> dict[str, Tensor]:
        index = (block.batch, block.heads, block.rows)
        positions = torch.arange(block.rows.start, block.rows.stop, device=pattern.device)
        found = _measure_pattern(pattern[index].to(dtype), names, pooled, positions)
        if scores is not None and "lse" in names:
            found |= _measure_scores(scores[index].to(dtype), None, frozenset({"lse"}), None, positions)
        return found

    with torch.autocast(pattern.device.type, enabled=False):
        return _collect((batch, heads, queries, keys), 1, names, pooled, 256, False, dtype, pattern.device, measure)


def rows(
    q: Tensor,
    k: Tensor,
    queries: Sequence[int] | Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Exact rows of the pattern for chosen queries, without the others.

    Args:
        q: [B, H, Q, D].
        k: [B, G, K, D].
        queries: positions, in any order and as often as wanted; negative ones count from the end.
        scale, bias, mask, is_causal, softcap, sink: as in `statistics`.

    Returns:
        [B, H, len(queries), K], in float32, or float64 for float64 inputs.

    Raises:
        ShapeError, InputError: as `statistics`.
        SelectionError: a position that is not there.
    """
    check_call(q, k, bias=bias, mask=mask, sink=sink, softcap=softcap)
    count = q.shape[2]
    wanted = [int(query) for query in (queries.tolist() if isinstance(queries, Tensor) else queries)]
    for query in wanted:
        if not -count <= query < count:
            allowed = f"{-count} to {count - 1}" if count else "none"
            raise SelectionError(f"no query at position {query}: there are {count} queries, positions {allowed}")
    positions = torch.tensor([query % count for query in wanted], dtype=torch.long, device=q.device)
    dtype = _precision(q)
    with torch.autocast(q.device.type, enabled=False):
        seen = finish_scores(
            _products(q[:, :, positions].to(dtype), k.to(dtype), scale),
            positions,
            bias=_pick_rows(bias, positions),
            mask=_pick_rows(mask, positions),
            is_causal=is_causal,
            softcap=softcap,
        )
        return pattern(seen, sink=None if sink is None else sink.to(dtype))


@dataclass(frozen=True)
class _Block:
    """Some batch entries, heads and consecutive queries, and how many keys from the left they can see."""

    batch: slice
    heads: slice
    rows: slice
    width: int

    def cut(self, tensor: Tensor | None) -> Tensor | None:
        """The part of a mask or bias, [B or 1, H or 1, Q or 1, K or 1], that lies over this block."""
        if tensor is None:
            return None
        whole = slice(None)
        wanted = (self.batch, self.heads, self.rows, slice(self.width))
        return tensor[tuple(whole if size == 1 else part for size, part in zip(tensor.shape, wanted, strict=True))]


def _blocks(shape: tuple[int, int, int, int], groups: int, panel: int, is_causal: bool, device: torch.device) -> Iterator[_Block]:
    """The whole of [B, H, Q, K] in blocks of a good size; query heads that share a key head stay together."""
    batch, heads, queries, keys = shape
    block = _CPU_BLOCK if device.type == "cpu" else _BLOCK
    panel = max(1, min(panel, queries, _CPU_PANEL if device.type == "cpu" else panel))
    one_head = max(1, panel * keys)
    batch_step = max(1, block // max(1, heads * one_head))
    head_step = min(heads, max(1, block // (groups * one_head)) * groups) or 1
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            for start in range(0, queries, panel):
                stop = min(start + panel, queries)
                width = min(keys, stop) if is_causal else keys  # no query of the panel sees a key beyond its last
                if width:
                    yield _Block(slice(b, min(b + batch_step, batch)), slice(h, min(h + head_step, heads)), slice(start, stop), width)


def _collect(
    shape: tuple[int, int, int, int],
    groups: int,
    names: frozenset[str],
    tile: int | None,
    panel: int,
    is_causal: bool,
    dtype: torch.dtype,
    device: torch.device,
    measure: Callable[[_Block], dict[str, Tensor]],
) -> Statistics:
    """Measure block by block and put the pieces in place; what no block covers keeps the values of a dead row."""
    batch, heads, queries, keys = shape
    out: dict[str, Tensor] = {}
    for name in ROW_NAMES:
        if name in names:
            blank = {"lse": float("-inf"), "argmax": -1}.get(name, 0)
            out[name] = torch.full((batch, heads, queries), blank, dtype=torch.long if name == "argmax" else dtype, device=device)
    if "received" in names:
        out["received"] = torch.zeros(batch, heads, keys, dtype=dtype, device=device)
    if tile is not None:
        out["pooled"] = torch.zeros(batch, heads, -(-queries // tile), -(-keys // tile), dtype=dtype, device=device)
    for block in _blocks(shape, groups, panel, is_causal, device):
        for name, value in measure(block).items():
            if name == "received":
                out[name][block.batch, block.heads, : block.width] += value
            elif name == "pooled":
                first = block.rows.start // (tile or 1)
                out[name][block.batch, block.heads, first : first + value.shape[2], : value.shape[3]] += value
            else:
                out[name][block.batch, block.heads, block.rows] = value
    return Statistics(**out)


def _measure_scores(scores: Tensor, sink: Tensor | None, names: frozenset[str], tile: int | None, positions: Tensor) -> dict[str, Tensor]:
    """Statistics of one panel of scores [B, H, P, W], W > 0, at these query positions [P]."""
    found: dict[str, Tensor] = {}
    top = scores.amax(dim=-1)  # [B, H, P]
    dead = torch.isneginf(top)
    if "argmax" in names:
        found["argmax"] = scores.argmax(dim=-1).masked_fill(dead | top.isnan(), -1)
    if tile is None and names <= {"argmax"}:
        return found
    top = top.masked_fill(dead, 0.0)
    shifted = (scores - top[..., None]).clamp_min(_FLOOR)  # in this frame the sums below lose nothing to a common offset
    p = shifted.exp()  # [B, H, P, W], largest 1; 0 in dead rows
    total = p.sum(dim=-1).masked_fill(dead, 1.0)
    log_total = total.log()
    if "lse" in names:
        found["lse"] = (top + log_total).masked_fill(dead, float("-inf"))
    if "entropy" in names:
        found["entropy"] = log_total - (p * shifted).sum(dim=-1) / total
    if "sum_squares" in names:
        found["sum_squares"] = p.square().sum(dim=-1) / total.square()
    if tile is not None or not names.isdisjoint(("p_max", "received")):
        if sink is not None:
            log_total = torch.logaddexp(log_total, sink[:, None] - top)
        weight = (-log_total).exp().masked_fill(dead, 0.0)  # the pattern is weight * p
        if "p_max" in names:
            found["p_max"] = weight
        found |= _measure_columns(p, weight, names, tile, positions)
    return found


def _measure_pattern(p: Tensor, names: frozenset[str], tile: int | None, positions: Tensor) -> dict[str, Tensor]:
    """Statistics of one panel of a pattern [B, H, P, W], W > 0; all but lse."""
    found: dict[str, Tensor] = {}
    dead = (p == 0).all(dim=-1)  # [B, H, P]
    if "argmax" in names:
        found["argmax"] = p.argmax(dim=-1).masked_fill(dead | p.isnan().any(dim=-1), -1)
    if "p_max" in names:
        found["p_max"] = p.amax(dim=-1)
    if not names.isdisjoint(("entropy", "sum_squares")):
        share = p / p.sum(dim=-1, keepdim=True).masked_fill(dead[..., None], 1.0)
        if "entropy" in names:
            counted = share.masked_fill(share == 0, 1.0)  # 0 log 0 is 0, and so is its gradient
            found["entropy"] = -(counted * counted.log()).sum(dim=-1)
        if "sum_squares" in names:
            found["sum_squares"] = share.square().sum(dim=-1)
    weight = torch.ones((), dtype=p.dtype, device=p.device).expand(p.shape[:-1])
    return found | _measure_columns(p, weight, names, tile, positions)


def _measure_columns(p: Tensor, weight: Tensor, names: frozenset[str], tile: int | None, positions: Tensor) -> dict[str, Tensor]:
    """What a panel adds to received [B, H, W] and to the rows of tiles it touches; the pattern is weight [B, H, P] times p."""
    found: dict[str, Tensor] = {}
    if "received" in names:
        found["received"] = (weight[..., None, :] @ p).squeeze(-2)
    if tile is not None:
        tiles = -(-p.shape[-1] // tile)
        padded = torch.nn.functional.pad(p, (0, tiles * tile - p.shape[-1]))
        by_tile = padded.reshape(*p.shape[:-1], tiles, tile).sum(dim=-1)  # [B, H, P, W] -> [B, H, P, T]
        tile_row = positions // tile
        first, last = int(positions[0]) // tile, int(positions[-1]) // tile
        member = torch.arange(first, last + 1, device=p.device)[:, None] == tile_row  # [tile rows, P]
        # A product with 0s and 1s sums rows into tiles the same way on every device, whatever the panel.
        found["pooled"] = member.to(p.dtype) @ (by_tile * weight[..., None])
    return found


def _products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale · q kᵀ, [B, H, P, D] and [B, G, W, D] -> [B, H, P, W], without repeating k for the heads that share it."""
    batch, heads, queries, width = q.shape
    groups = k.shape[1]
    shared = (q * scale).reshape(batch, groups, heads // groups * queries, width)  # [B, G, H/G * P, D]
    return (shared @ k.transpose(-2, -1)).reshape(batch, heads, queries, k.shape[2])


def _pick_rows(tensor: Tensor | None, positions: Tensor) -> Tensor | None:
    """The rows of a mask or bias for these queries; itself where it is the same for all."""
    full = full_rank(tensor)
    return full if full is None or full.shape[2] == 1 else full[:, :, positions]


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_names(want: Sequence[str], pooled: int | None, panel: int) -> frozenset[str]:
    names = (want,) if isinstance(want, str) else tuple(want)
    for name in names:
        if name not in NAMES:
            hint = "; for the pooled map give its tile, pooled=16" if name == "pooled" else ""
            raise SelectionError(f"no statistic {name!r}: there are {', '.join(NAMES)}{hint}")
    if pooled is not None and pooled < 1:
        raise InputError(f"tiles of side {pooled}: give pooled=1 or more, or None for no pooled map")
    if panel < 1:
        raise InputError(f"a panel of {panel} queries: give 1 or more")
    return frozenset(names)


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
