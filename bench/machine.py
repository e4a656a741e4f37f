"""The machine, the versions and the day a measurement belongs to."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Where and with what something was measured.

    Attributes:
        processor: its name as the system gives it.
        cores: logical cores that this process may use.
        memory: bytes of RAM.
        system: operating system and its release.
        python: version of the interpreter.
        threads: torch's threads within one operation.
        load: mean number of processes that wanted a core in the minute before the measurement.
        date: day and time in UTC, ISO 8601.
        versions: of the distributions asked for; None where one is not installed.
    """

    processor: str
    cores: int
    memory: int
    system: str
    python: str
    threads: int
    load: float
    date: str
    versions: dict[str, str | None]

    def to_dict(self) -> dict[str, object]:
        """The fields as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        found = ", ".join(f"{name} {number}" for name, number in self.versions.items() if number is not None)
        return (
            f"{self.date[:10]} · {self.processor}, {self.cores} cores of which {self.threads} computed, {self.memory / 2**30:.0f} GiB, "
            f"load {self.load:.1f} · {self.system} · Python {self.python}, {found}"
        )


def this_machine(distributions: Sequence[str]) -> Machine:
    """The machine as it is now, with the versions of these distributions."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={name: _version(name) for name in distributions},
    )


def resident_peak(*, restart: bool = False) -> int:
    """The most bytes of RAM this process has held, since its start or, on Linux, since it was last asked to restart.

    Without that reset an earlier peak (imports, building the model) would hide a later one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
