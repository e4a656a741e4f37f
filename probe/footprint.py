"""What a run took: its time, and how far it raised the memory in use."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Footprint:
    """What one run took.

    Attributes:
        seconds: from its start to its end.
        peak_bytes: the most that was in use during the run, less what was in use before: the resident set of the process, or
            what torch had allocated on a GPU. None where the system does not tell. Only Linux forgets earlier peaks when asked; on
            others a higher one, such as of loading the model, hides this one, which then is too small.
    """

    seconds: float
    peak_bytes: int | None


def measure(run: Callable[[], Result], device: torch.device) -> tuple[Result, Footprint]:
    """Do something once, and tell what it took beside what it returned."""
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        before = _resident_peak(restart=True)
    started = time.perf_counter()
    result = run()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    after = torch.cuda.max_memory_allocated(device) if on_gpu else _resident_peak()
    return result, Footprint(seconds, None if before is None or after is None else max(0, after - before))


def _resident_peak(*, restart: bool = False) -> int | None:
    """The most bytes of RAM that this process has held, on Linux since it was last asked to restart."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if status.exists():
        try:
            if restart:
                _return_freed_memory()
                reset.write_text("5")
            return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):  # a sandbox with half a /proc
            pass
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _return_freed_memory() -> None:
    """What the allocator holds in reserve would be used first, and the run would seem to need less."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
