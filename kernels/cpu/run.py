"""Attention and its statistics on a CPU: BLAS products, and compiled sweeps over each panel of scores while it lies in the cache.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, F features.

`attention.c` works off panels of queries of one key/value head; this file prepares what it reads, deals the key/value heads to
threads and gives it small enough pieces that a long call can be interrupted. Each head is worked off in the same order by one thread,
and BLAS is held to one thread inside, so the results do not depend on the number of threads. Memory beside inputs and outputs: one
panel of scores per thread and, where inputs are half precision or not dense along their last axis, float32 copies of one key/value
head per thread and of the output.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from torch import Tensor

from headscope.kernels.cpu import build
from headscope.kernels.errors import InputError
from headscope.kernels.problem import Problem, Wanted
from headscope.kernels.statistics import ROW_NAMES, Statistics

_DTYPES = {torch.float32: 1, torch.float64: 2, torch.float16: 3, torch.bfloat16: 4}  # as in attention.c
_ROWS = 128  # of a panel, over all heads that share a key head: fewer make BLAS slow, more waste the causal triangle
_LEAST_ROWS = 32  # however many keys there are
_SCORES = 1 << 20  # of a panel: what longer rows cost in cache, taller panels still win back in BLAS
_PIECE = 1 << 33  # multiplications between two looks at whether the call was interrupted: some tenths of a second


class Call(ctypes.Structure):
    """`Call` of attention.c, field by field."""

    _fields_ = [
        ("gemm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "shared", "queries", "keys", "width", "value_width", "features_width")),
        *((name, ctypes.c_int64) for name in ("panel", "tile", "batch", "group")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "features")),
        *((name, ctypes.c_int64) for name in ("q_head", "q_row", "q_column", "k_row", "v_row", "features_head")),
        *((name, ctypes.c_void_p) for name in ("head_scale", "gate", "sink", "first", "stop")),
        ("softcap", ctypes.c_double),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bias_dtype", "bias_head", "bias_row", "bias_key")),
        ("mask", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mask_head", "mask_row", "mask_key")),
        ("key_bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("key_bias_head", "key_bias_key")),
        *((name, ctypes.c_void_p) for name in ("output", "lse", "entropy", "p_max", "max_score", "sum_squares", "argmax")),
        *((name, ctypes.c_void_p) for name in ("received", "pooled", "moments", "place")),
        ("rows_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "scratch")),
    ]


def why_not(problem: Problem, wanted: Wanted) -> str | None:
    """Why this path cannot do what is asked; None where it can."""
    if problem.q.device.type != "cpu":
        return f"the tensors are on {problem.q.device}, not on the CPU"
    if problem.q.dtype == torch.float64:
        return "it computes in float32, and q is float64"
    if problem.needs_gradient:
        return "it gives no gradients, and an input requires one"
    if wanted.top:
        return "it does not find the top keys"
    usable, reason = build.state()
    return None if usable else f"there is no compiled kernel: {reason}"


def run(problem: Problem, wanted: Wanted) -> tuple[Tensor | None, Statistics]:
    """Output and statistics of a whole attention.

    Args:
        problem: what is computed on.
        wanted: what is computed.

    Returns:
        The output [B, H, Q, V] in the dtype of q, and the statistics in float32.

    Raises:
        InputError: what `why_not` says.
    """
    reason = why_not(problem, wanted)
    library = build.load()
    if reason is not None or library is None:
        raise InputError(f"implementation 'cpu' cannot do this: {reason}; choose another or leave the choice open")
    with torch.no_grad():
        results = _make_results(problem, wanted)
        _fill(library, problem, wanted, results)
        output = results.pop("output", None)
        if wanted.rows is not None:
            distinct = _distinct(wanted.rows)
            if wanted.rows != distinct:
                results["rows"] = results["rows"][:, :, [distinct.index(row) for row in wanted.rows]]
    return None if output is None else output.to(problem.q.dtype), Statistics(**results)


def _make_results(problem: Problem, wanted: Wanted) -> dict[str, Tensor]:
    """Room for what is wanted; what is summed up over panels holds 0."""
    batch, heads, queries, keys = problem.shape
    real = problem.q.new_empty(0, dtype=torch.float32)  # torch's own defaults may be another dtype and device
    made = {name: real.new_empty(batch, heads, queries) for name in ROW_NAMES if name in wanted.names}
    if "argmax" in made:
        made["argmax"] = real.new_empty(batch, heads, queries, dtype=torch.int64)
    if "received" in wanted.names:
        made["received"] = real.new_zeros(batch, heads, keys)
    if wanted.tile is not None:
        made["pooled"] = real.new_zeros(batch, heads, -(-queries // wanted.tile), -(-keys // wanted.tile))
    if wanted.rows is not None:
        made["rows"] = real.new_empty(batch, heads, len(_distinct(wanted.rows)), keys)
    if problem.features is not None:
        made["moments"] = real.new_empty(batch, heads, queries, problem.features.shape[3])
    if problem.v is not None:
        made["output"] = real.new_empty(batch, heads, queries, problem.v.shape[3])
    return made


def _distinct(rows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(rows)))


def _fill(library: build.Library, problem: Problem, wanted: Wanted, results: dict[str, Tensor]) -> None:
    batch, heads, queries, keys = problem.shape
    groups = problem.k.shape[1]
    if not batch * heads * queries:
        return
    width = int((problem.stop - problem.first).max())
    rows = min(_ROWS, max(_LEAST_ROWS, _SCORES // max(1, width)))
    panel = max(1, min(queries, rows // problem.shared))
    parts = -(-queries // panel)
    common, kept = _describe(library, problem, wanted, results, panel)
    per_score = common.width + common.value_width + common.features_width + 1
    step = max(1, _PIECE // (problem.shared * panel * max(1, width) * per_score))

    def work(pairs: Iterator[tuple[int, int]], stopped: threading.Event) -> None:
        call = Call.from_buffer_copy(common)
        scratch = torch.empty(library.scratch(ctypes.addressof(call)), dtype=torch.float32, device="cpu")
        call.scratch = scratch.data_ptr()
        with library.one_blas_thread():
            for b, g in pairs:
                own = _point(call, problem, b, g, kept)  # alive until the next one
                for begin in range(0, parts, step):
                    if stopped.is_set():
                        return
                    library.attend(ctypes.addressof(call), begin, min(begin + step, parts))
                del own

    pairs = product(range(batch), range(groups))
    threads = min(torch.get_num_threads(), batch * groups)
    if threads == 1:
        work(pairs, threading.Event())
    else:
        _deal(work, _Shared(pairs), threads)


class _Shared(Iterator[tuple[int, int]]):
    """An iterator that several threads may draw from."""

    def __init__(self, source: Iterator[tuple[int, int]]) -> None:
        self._source = source
        self._lock = threading.Lock()

    def __next__(self) -> tuple[int, int]:
        with self._lock:
            return next(self._source)


def _deal(work: Callable[[Iterator[tuple[int, int]], threading.Event], None], pairs: Iterator[tuple[int, int]], threads: int) -> None:
    """Let threads work until no pair is left; where one fails, or the caller is interrupted, the others stop at their next piece."""
    stopped = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="headscope") as pool:
        try:
            for done in [pool.submit(work, pairs, stopped) for _ in range(threads)]:
                done.result()
        finally:
            stopped.set()


def _describe(
    library: build.Library, problem: Problem, wanted: Wanted, results: dict[str, Tensor], panel: int
) -> tuple[Call, dict[str, Tensor]]:
    """What all key/value heads have in common, and the tensors that it points into beside the problem's own."""
    _, heads, queries, keys = problem.shape
    call = Call(gemm=library.gemm, heads=heads, shared=problem.shared, queries=queries, keys=keys, width=problem.q.shape[3])
    call.panel, call.tile, call.softcap = panel, wanted.tile or 1, problem.softcap or 0.0
    kept = {"head_scale": problem.head_scales(torch.float64).float(), "first": problem.first, "stop": problem.stop}
    for name, tensor in (("gate", problem.gate), ("sink", problem.sink)):
        if tensor is not None:
            kept[name] = tensor
    if wanted.rows is not None:
        chosen = _distinct(wanted.rows)
        call.rows_count = len(chosen)
        kept["place"] = torch.full((queries,), -1, dtype=torch.int32, device="cpu")
        kept["place"][list(chosen)] = torch.arange(len(chosen), dtype=torch.int32, device="cpu")
    for name, tensor in kept.items():
        kept[name] = tensor.contiguous() if tensor.dtype == torch.int32 else tensor.detach().float().contiguous()
    for name, tensor in (kept | results).items():
        setattr(call, name, tensor.data_ptr())
    if problem.v is not None:
        call.value_width = problem.v.shape[3]
    if problem.features is not None:
        call.features_width = problem.features.shape[3]
        kept["features"] = problem.features.detach().float().contiguous()
        call.features_head = _steps(kept["features"])[1]
    if problem.key_bias is not None:
        kept["key_bias"] = problem.key_bias.detach().float()
        _, call.key_bias_head, call.key_bias_key = _steps(kept["key_bias"])
    if problem.bias is not None:
        call.bias_dtype = _DTYPES[problem.bias.dtype]
        _, call.bias_head, call.bias_row, call.bias_key = _steps(problem.bias)
    if problem.mask is not None:
        _, call.mask_head, call.mask_row, call.mask_key = _steps(problem.mask)
    return call, kept


def _steps(tensor: Tensor) -> tuple[int, ...]:
    """Strides in elements, 0 along an axis of size 1, which is broadcast."""
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _point(call: Call, problem: Problem, b: int, g: int, kept: dict[str, Tensor]) -> list[Tensor]:
    """Let a call point at one key/value head. Returns the copies that it points into."""
    own = []
    heads = slice(g * problem.shared, (g + 1) * problem.shared)
    call.batch, call.group = b, g
    q = problem.q[b, heads].detach().float()  # [H / G, Q, D]; no copy in float32
    own.append(q)
    call.q, (call.q_head, call.q_row, call.q_column) = q.data_ptr(), q.stride()
    for name, tensor in (("k", problem.k), ("v", problem.v)):
        if tensor is not None:
            part = _dense_rows(tensor[b, g].detach().float())
            own.append(part)
            setattr(call, name, part.data_ptr())
            setattr(call, f"{name}_row", part.stride(0))
    for name, tensor in (("bias", problem.bias), ("mask", problem.mask), ("key_bias", kept.get("key_bias"))):
        if tensor is not None:  # heads are counted from the first
            setattr(call, name, tensor[b if tensor.shape[0] > 1 else 0].data_ptr())
    if "features" in kept:
        features = kept["features"]
        call.features = features[b if features.shape[0] > 1 else 0, heads.start if features.shape[1] > 1 else 0].data_ptr()
    return own


def _dense_rows(rows: Tensor) -> Tensor:
    """[K, D] as BLAS can read it: dense along D, rows one after another."""
    width = rows.shape[1]
    if (width > 1 and rows.stride(1) != 1) or rows.stride(0) < max(1, width):
        return rows.contiguous()
    return rows
