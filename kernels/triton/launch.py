"""Attention and its statistics by the Triton kernels: what to allocate, which kernels run, and with what.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, F features,
R rows asked for, t side of a tile or number of top keys.

The forward kernel gives the output, the row statistics, and a frame: for each row the two numbers from which later passes compute the
pattern. Received attention, the pooled map, rows and top keys each take such a pass. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from headscope.kernels.backward import GRADIENT
from headscope.kernels.problem import Problem, Wanted
from headscope.kernels.statistics import Statistics
from headscope.kernels.triton import configurations
from headscope.kernels.triton.backward import WIDEST as BACKWARD_WIDEST
from headscope.kernels.triton.backward import backward
from headscope.kernels.triton.columns import columns_kernel, tiles_kernel
from headscope.kernels.triton.common import is_interpreted, quiet
from headscope.kernels.triton.configurations import WIDEST, Configuration
from headscope.kernels.triton.forward import forward_kernel
from headscope.kernels.triton.rows import rows_kernel
from headscope.kernels.triton.top import top_kernel

MOST_TOP = 128
_LOG2E = 1.4426950408889634
_ROW_NAMES = ("lse", "entropy", "p_max", "argmax", "max_score", "sum_squares")
_SPAN = 8  # blocks of keys that one program of the rows kernel writes
_REACH = 1 << 20  # a stride up to this keeps offsets within a tile in 32 bits
INTERPRETED = is_interpreted(forward_kernel)


@dataclass(frozen=True, eq=False)
class Frame:
    """What later passes need to know of each row: the pattern is 2^(score in base 2 - highest) · weight.

    Attributes:
        highest: [B, H, R], float32; +inf in a dead row.
        weight: [B, H, R], float32; 0 in a dead row, NaN in a row with NaN.
    """

    highest: Tensor
    weight: Tensor


def why_not(problem: Problem, wanted: Wanted) -> str | None:
    """Why these kernels cannot do it, or None where they can."""
    if problem.q.device.type != "cuda" and not INTERPRETED:
        return f"triton needs a GPU, and q is on {problem.q.device}; TRITON_INTERPRET=1 runs its kernels on a CPU, slowly"
    if problem.q.dtype == torch.float64:
        return "triton sums in float32, and q is torch.float64"
    widest = max(problem.q.shape[3], 0 if problem.v is None else problem.v.shape[3])
    if widest > WIDEST:
        return f"triton holds heads up to {WIDEST} wide, and these are {widest} wide"
    if wanted.top > MOST_TOP:
        return f"triton finds up to {MOST_TOP} top keys, and {wanted.top} are asked for"
    if problem.needs_gradient:
        if problem.v is None:
            return "triton gives no gradients of statistics, and without v there is nothing else"
        if widest > BACKWARD_WIDEST:
            return f"triton gives gradients of heads up to {BACKWARD_WIDEST} wide, and these are {widest} wide"
        for name in ("bias", "key_bias", "temperature", "sink", "features"):
            tensor = getattr(problem, name)
            if tensor is not None and tensor.requires_grad:
                return f"triton gives gradients of q, k, v and gate alone, and {name} requires one"
    return None


def run(problem: Problem, wanted: Wanted) -> tuple[Tensor | None, Statistics]:
    """Output and statistics of an attention for which `why_not` has nothing to say.

    Args:
        problem: what is computed on.
        wanted: what is computed.

    Returns:
        The output [B, H, Q, V] in the dtype of q, and the statistics in float32. The output is differentiable with respect to q, k, v
        and gate; the statistics are not.
    """
    gate = problem.gate
    ungated = replace(problem, gate=None)
    if problem.v is not None and problem.needs_gradient:
        found: list[Statistics] = []
        output: Tensor | None = _Differentiable.apply(problem.q, problem.k, problem.v, ungated, wanted, found)
        statistics = found[0]
    else:
        with torch.no_grad():
            output, statistics = compute(ungated, wanted)
    if output is not None and gate is not None:
        output = (output * gate[:, None, None]).to(output.dtype)
    return output, statistics


class _Differentiable(torch.autograd.Function):
    """The output, with its gradient by q, k and v; the pattern is computed anew on the way back."""

    @staticmethod
    def forward(
        context: Any, q: Tensor, k: Tensor, v: Tensor, problem: Problem, wanted: Wanted, found: list[Statistics]
    ) -> Tensor:  # fmt: skip
        problem = replace(problem, q=q, k=k, v=v)
        output, statistics = compute(problem, replace(wanted, names=wanted.names | {"lse"}))
        assert output is not None
        assert statistics.lse is not None
        context.save_for_backward(q, k, v, output, statistics.lse)
        context.problem = replace(problem, q=q.detach(), k=k.detach(), v=v.detach())
        found.append(statistics if "lse" in wanted.names else replace(statistics, lse=None))
        return output

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, output, lse = context.saved_tensors
        with quiet():
            back = backward(replace(context.problem, q=q, k=k, v=v), output, lse, grad, GRADIENT)
        return back.q, back.k, back.v, None, None, None


def compute(problem: Problem, wanted: Wanted) -> tuple[Tensor | None, Statistics]:
    """The same without gradients and gate: the forward kernel, and those passes that are needed."""
    with quiet():
        by_column = "received" in wanted.names or wanted.tile is not None
        every_row = problem.v is not None or by_column or bool(wanted.top) or not wanted.names.isdisjoint(_ROW_NAMES)
        every_row = every_row or problem.features is not None
        found: dict[str, Tensor] = {}
        output = frame = None
        if every_row:
            output, found, frame = forward(problem, wanted, by_column or bool(wanted.top) or wanted.rows is not None)
        if by_column and frame is not None:
            found |= columns(problem, wanted, frame)
        if wanted.rows is not None:
            found["rows"] = rows(problem, wanted.rows, frame)
        if wanted.top and frame is not None:
            found |= top(problem, wanted.top, frame)
    return output, Statistics(**found)


def forward(
    problem: Problem, wanted: Wanted, with_frame: bool, positions: Tensor | None = None
) -> tuple[Tensor | None, dict[str, Tensor], Frame | None]:  # fmt: skip
    """Output, row statistics and moments, and the frame if it is asked for.

    Args:
        positions: [R], int32, the queries that are worked on; None for all.
    """
    batch, heads, queries, keys = problem.shape
    n_rows = queries if positions is None else len(positions)
    q, v = problem.q, problem.v
    blank = {"lse": float("-inf"), "max_score": float("-inf"), "argmax": -1}
    shape = (batch, heads, n_rows)
    found: dict[str, Tensor] = {}
    for name in _ROW_NAMES:
        if name in wanted.names:
            found[name] = q.new_full(shape, blank.get(name, 0), dtype=torch.int64 if name == "argmax" else torch.float32)
    output = None if v is None else q.new_zeros(*shape, v.shape[3])
    frame = None
    if with_frame:
        frame = Frame(q.new_full(shape, float("inf"), dtype=torch.float32), q.new_zeros(shape, dtype=torch.float32))
    packed = averages = None
    if problem.features is not None:
        packed = _pack(problem.features, q.dtype)
        averages = q.new_zeros(*shape, packed.shape[3], dtype=torch.float32)
    if n_rows and batch and keys:
        value_width = 0 if v is None else v.shape[3]
        config = _configuration("forward" if problem.bias is None and problem.mask is None else "forward-biased", problem)
        given = _Arguments(problem)
        f_b, f_h = (0, 0) if packed is None else given.head_strides(packed)
        forward_kernel[(batch * heads * triton.cdiv(n_rows, config.rows),)](
            q, problem.k, v, packed, problem.first, problem.stop, positions, given.scales, *given.extras, given.sink,
            output, *(found.get(name) for name in _ROW_NAMES), averages, None if frame is None else frame.highest,
            None if frame is None else frame.weight,
            *q.stride(), *problem.k.stride(), *((0, 0, 0, 0) if v is None else v.stride()), f_b, f_h, *given.strides,
            heads, problem.shared, n_rows, queries, keys, q.shape[3], value_width, problem.softcap,
            D=given.width, V=_padded(value_width), F=16 if packed is None else packed.shape[3], ROWS=config.rows, KEYS=config.keys,
            EVEN_D=given.width == q.shape[3], EVEN_V=_padded(value_width) == value_width,
            WIDE=given.wide or positions is not None, INTERPRETED=INTERPRETED,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if averages is not None and problem.features is not None:
        found["moments"] = _unpack(averages, problem.features.shape[3], q.dtype)
    return output, found, frame


def columns(problem: Problem, wanted: Wanted, frame: Frame) -> dict[str, Tensor]:
    """Received attention [B, H, K] and the pooled map, those of them that are wanted."""
    batch, heads, queries, keys = problem.shape
    q, tile = problem.q, wanted.tile
    config = _configuration("columns", problem)
    fits = tile is not None and tile >= 16 and tile & (tile - 1) == 0  # else the map takes a pass of its own
    found: dict[str, Tensor] = {}
    received = pooled = None
    if "received" in wanted.names:
        received = found["received"] = q.new_zeros(batch, heads, keys, dtype=torch.float32)
    cell = tile_rows = tile_columns = 0
    if fits and tile is not None:
        cell = min(tile, config.keys)
        tile_rows, tile_columns = -(-queries // tile), -(-keys // tile) * (tile // cell)
        pooled = q.new_zeros(batch, heads, tile_rows, tile_columns, dtype=torch.float32)
    if batch and queries and keys and (received is not None or pooled is not None):
        first_query, stop_query = problem.visible_queries()
        given = _Arguments(problem)
        columns_kernel[(batch * heads * triton.cdiv(keys, config.keys),)](
            q, problem.k, problem.first, problem.stop, first_query, stop_query, given.scales, *given.extras, frame.highest,
            frame.weight, received, pooled, *q.stride(), *problem.k.stride(), *given.strides,
            heads, problem.shared, queries, keys, q.shape[3], tile_rows, tile_columns, problem.softcap,
            D=given.width, ROWS=config.rows, KEYS=config.keys, TILE=tile if fits else 0, EVEN_D=given.width == q.shape[3],
            WIDE=given.wide, INTERPRETED=INTERPRETED, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if tile is not None:
        if pooled is None:
            found["pooled"] = _tiles(problem, tile, frame)
        else:  # a tile wider than a block of keys was written in parts
            parts = tile // cell
            found["pooled"] = pooled if parts == 1 else pooled.unflatten(3, (-1, parts)).sum(-1)
    return found


def _tiles(problem: Problem, tile: int, frame: Frame) -> Tensor:
    """The pooled map for tiles of any side, [B, H, ceil(Q/t), ceil(K/t)]."""
    batch, heads, queries, keys = problem.shape
    q = problem.q
    tile_rows, tile_columns = -(-queries // tile), -(-keys // tile)
    pooled = q.new_zeros(batch, heads, tile_rows, tile_columns, dtype=torch.float32)
    if pooled.numel():
        config = _configuration("tiles", problem)
        given = _Arguments(problem)
        together = max(1, config.rows // tile)
        squares = triton.cdiv(tile_rows, together) * triton.cdiv(tile_columns, together)
        tiles_kernel[(batch * heads * squares,)](
            q, problem.k, problem.first, problem.stop, given.scales, *given.extras, frame.highest, frame.weight, pooled,
            *q.stride(), *problem.k.stride(), *given.strides,
            heads, problem.shared, queries, keys, q.shape[3], tile, tile_rows, tile_columns, problem.softcap,
            D=given.width, SIDE=config.rows, EVEN_D=given.width == q.shape[3], WIDE=given.wide, INTERPRETED=INTERPRETED,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return pooled


def rows(problem: Problem, wanted: tuple[int, ...] | Tensor, frame: Frame | None = None) -> Tensor:
    """Exact rows of the pattern, [B, H, R, K]; the map of one head is all rows of a problem of one head.

    Args:
        wanted: query positions; as a tensor, int32 on the device of q, they need not be copied there.
        frame: of all queries; None where there is none yet, then that of the wanted ones alone is computed.
    """
    batch, heads, queries, keys = problem.shape
    q = problem.q
    positions = wanted if isinstance(wanted, Tensor) else torch.tensor(wanted, dtype=torch.int32, device=q.device)
    if frame is None:
        bare = replace(problem, v=None, features=None)
        _, _, frame = forward(bare, Wanted(), True, positions)
        assert frame is not None
    else:
        frame = Frame(frame.highest[:, :, positions], frame.weight[:, :, positions])
    count = len(positions)
    output = q.new_empty(batch, heads, count, keys, dtype=torch.float32)
    if output.numel():
        config = _configuration("rows", problem)
        given = _Arguments(problem)
        pieces = triton.cdiv(triton.cdiv(keys, config.keys), _SPAN)
        rows_kernel[(batch * heads * triton.cdiv(count, config.rows) * pieces,)](
            q, problem.k, problem.first, problem.stop, positions, given.scales, *given.extras, frame.highest, frame.weight, output,
            *q.stride(), *problem.k.stride(), *given.strides,
            heads, problem.shared, count, queries, keys, q.shape[3], _SPAN, problem.softcap,
            D=given.width, ROWS=config.rows, KEYS=config.keys, EVEN_D=given.width == q.shape[3], WIDE=given.wide, INTERPRETED=INTERPRETED,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return output


def top(problem: Problem, count: int, frame: Frame) -> dict[str, Tensor]:
    """top_keys and top_weights, [B, H, Q, t]."""
    batch, heads, queries, keys = problem.shape
    q = problem.q
    top_keys = q.new_full((batch, heads, queries, count), -1, dtype=torch.int64)
    top_weights = q.new_zeros(batch, heads, queries, count, dtype=torch.float32)
    if batch and queries and keys:
        config = _configuration("top", problem)
        given = _Arguments(problem)
        top_kernel[(batch * heads * triton.cdiv(queries, config.rows),)](
            q, problem.k, problem.first, problem.stop, given.scales, *given.extras, frame.highest, frame.weight, top_keys, top_weights,
            *q.stride(), *problem.k.stride(), *given.strides, heads, problem.shared, queries, keys, q.shape[3], count, problem.softcap,
            D=given.width, T=triton.next_power_of_2(count), ROWS=config.rows, KEYS=config.keys, EVEN_D=given.width == q.shape[3],
            WIDE=given.wide, INTERPRETED=INTERPRETED, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return {"top_keys": top_keys, "top_weights": top_weights}


class _Arguments:
    """What every kernel is given.

    Attributes:
        width: D padded to a power of two.
        scales: [2, H], float32, the factor and the unit of each head, see `headscope.kernels.triton.common`.
        extras: bias, mask (as bytes) and key bias, None where there is none.
        strides: theirs, by batch, head, query and key; 0 along axes that are repeated.
        sink: [H] or None.
        wide: whether a stride is so large that offsets within a tile need 64 bits.
    """

    def __init__(self, problem: Problem) -> None:
        scales = problem.head_scales(torch.float64)
        softcap = problem.softcap
        if softcap is not None:
            scales = torch.stack([scales * (2 * _LOG2E / softcap), torch.full_like(scales, _LOG2E)])
        elif problem.bias is not None or problem.key_bias is not None:
            scales = torch.stack([scales, torch.full_like(scales, _LOG2E)])
        else:
            size = scales.abs() * _LOG2E
            scales = torch.stack([scales.sign(), torch.where(size == 0, 1.0, size)])
        self.scales = scales.float()
        self.width = _padded(problem.q.shape[3])
        mask = None if problem.mask is None else problem.mask.view(torch.uint8)
        self.extras = (problem.bias, mask, problem.key_bias)
        self.strides = (*self._strides(problem.bias, 4), *self._strides(mask, 4), *self._strides(problem.key_bias, 3))
        self.sink = problem.sink
        tensors = (problem.q, problem.k, problem.v, *self.extras)
        self.wide = any(stride > _REACH for tensor in tensors if tensor is not None for stride in tensor.stride()[2:]) or (
            problem.shape[3] > _REACH
        )

    def head_strides(self, tensor: Tensor) -> tuple[int, int]:
        return self._strides(tensor, 4)[0], self._strides(tensor, 4)[1]

    @staticmethod
    def _strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
        if tensor is None:
            return (0,) * axes
        return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _pack(features: Tensor, dtype: torch.dtype) -> Tensor:
    """[B or 1, H or 1, K, F] -> [.., 1 + F or 1 + 2F, padded]: ones, the features, and in half precision what rounding took from them."""
    kind = torch.float32 if dtype == torch.float32 else torch.bfloat16  # float16 would overflow
    full = features.float()
    parts = [torch.ones_like(full[..., :1]), full]
    if kind == torch.bfloat16:
        parts.append(full - full.to(kind).float())
    packed = torch.cat(parts, dim=-1)
    return torch.nn.functional.pad(packed, (0, _padded(packed.shape[3]) - packed.shape[3])).to(kind)


def _unpack(averages: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    found = averages[..., 1 : 1 + count]
    return found.contiguous() if dtype == torch.float32 else found + averages[..., 1 + count : 1 + 2 * count]


def _padded(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def _configuration(kernel: str, problem: Problem) -> Configuration:
    target = "interpreter" if INTERPRETED else "amd" if torch.version.hip else "nvidia"
    width = max(problem.q.shape[3], 0 if problem.v is None else problem.v.shape[3])
    return configurations.find(kernel, width, target, problem.q.dtype)
