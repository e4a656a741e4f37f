"""What a capture keeps, and what that costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from headscope.kernels.errors import InputError
from headscope.kernels.statistics import NAMES


@dataclass(frozen=True)
class Keep:
    """What to keep of every attention call. `Keep()` keeps q and k, from which patterns and statistics are computed on demand.

    Attributes:
        qk: queries and keys; None means: yes, unless something else was named. `Keep(qk=False)` alone keeps nothing.
        pattern: the full map, [B, H, Q, K]: O(N²) bytes per head.
        rows: query positions whose exact pattern rows are kept; negative positions count from the end.
        pooled: side t of the tiles of a pooled map, [B, H, ⌈Q/t⌉, ⌈K/t⌉] (mass per tile).
        statistics: True for all, or names out of lse, entropy, p_max, argmax, max_score, sum_squares, received.
        v, scores, z: values; scores before the normaliser (O(N²)); per-head output before the output projection.
        device: where kept tensors go, for example "cpu"; None leaves them where they are.
        dtype: to which kept floating-point tensors are converted; None keeps the model's.
        budget: bytes that may be kept; None allows half of the memory that is free at the start.
        gradient: keep tensors attached to the autograd graph.
    """

    qk: bool | None = None
    pattern: bool = False
    rows: Sequence[int] | None = None
    pooled: int | None = None
    statistics: bool | Sequence[str] = False
    v: bool = False
    scores: bool = False
    z: bool = False
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    budget: int | None = None
    gradient: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.statistics, str):
            raise InputError(f"statistics={self.statistics!r}: give a tuple of names, such as ({self.statistics!r},), or True for all")
        if isinstance(self.rows, int):
            raise InputError(f"rows={self.rows}: give a list of query positions, such as [{self.rows}]")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise InputError(f"dtype={self.dtype}: kept tensors are numbers with a fraction; give a floating-point dtype, or None")
        unknown = [n for n in self.statistics if n not in NAMES] if not isinstance(self.statistics, bool) else []
        if unknown:
            raise InputError(f"no statistic {unknown[0]!r}: choose from {', '.join(NAMES)}, or say statistics=True for all")
        if self.pooled is not None and self.pooled < 1:
            raise InputError(f"pooled={self.pooled}: the side of a tile must be a positive number of tokens")
        if self.budget is not None and self.budget <= 0:
            raise InputError(f"budget={self.budget}: give a positive number of bytes, or None")

    @property
    def queries_and_keys(self) -> bool:
        if self.qk is not None:
            return self.qk
        return not (self.pattern or self.rows or self.pooled or self.statistics or self.v or self.scores or self.z)

    @property
    def wanted_statistics(self) -> tuple[str, ...]:
        if isinstance(self.statistics, bool):
            return NAMES if self.statistics else ()
        return tuple(self.statistics)

    @property
    def needs_pattern(self) -> bool:
        return bool(self.pattern or self.rows or self.pooled or self.statistics)

    def to_dict(self) -> dict[str, object]:
        """The settings as plain values."""
        found = asdict(self)
        found["device"] = None if self.device is None else str(self.device)
        found["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        found["rows"] = None if self.rows is None else [int(r) for r in self.rows]
        found["statistics"] = list(self.wanted_statistics)
        return found


def free_memory(device: torch.device) -> int:
    """Bytes free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def readable(n: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return ""
