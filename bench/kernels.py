"""What statistics of an attention cost: every implementation next to torch's fused attention, as ratios in the same round.

On a CPU: one thread, CPU time, all variants in turns within each round; a ratio is one variant's time over that of the fused
attention in the same round, and the median over the rounds counts. The full case is equal work: everybody computes N² scores. A causal
fused attention also computes scores that nobody sees, the more the shorter the sequence, so the causal times are given per visible
pair of query and key too, next to those of the full case. Peak memory is the growth of the resident set during one call in a fresh
process, less the tensors that came out. The GPU's part is `bench.gpu`.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import gpu
from bench.attentions import BACKWARD, FORWARD, HEADS, WIDTH, Inputs, Variant, make_inputs
from bench.interception import RELEASING, RETAINING, Memory, Progress, Target, Timing
from bench.machine import Machine, resident_peak, this_machine
from headscope.kernels.statistics import Statistics

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("headscope", "torch", "triton", "numpy")
MEASURED = ("sdpa", "cpu", "cpu-all", "blockwise")  # whose memory is measured
SHORT = 256  # tokens of the warm-up before memory is measured
KINDS = {True: "causal", False: "full"}


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        rounds: for each sequence length N, how many rounds.
        repeats: calls within one timing, by N; 1 where none is given.
        backward: for each N, how many rounds of the backward passes.
        memory: the N at which memory is measured.
        left_out: variants that are not run.
        gpu: how much is measured on a GPU, where there is one.
    """

    rounds: dict[int, int] = field(default_factory=lambda: {512: 15, 1024: 11, 2048: 9, 4096: 5, 8192: 3})
    repeats: dict[int, int] = field(default_factory=lambda: {512: 5, 1024: 2})
    backward: dict[int, int] = field(default_factory=lambda: {1024: 7, 4096: 3})
    memory: int = 8192
    left_out: tuple[str, ...] = ()
    gpu: gpu.Settings = field(default_factory=gpu.Settings)


FULL = Settings()
QUICK = Settings({512: 3, 1024: 2}, {}, {512: 2}, 2048, ("flex", "flex-lse"), gpu.QUICK)


@dataclass(frozen=True)
class Row:
    """Everything that was timed on inputs of one length, causal or full.

    Attributes:
        length: N.
        causal: whether a query sees only the keys up to its own.
        visible: scores that the softmax sees, over all heads.
        timings: by variant; the first one is what the others are compared with.
    """

    length: int
    causal: bool
    visible: int
    timings: dict[str, Timing]

    @property
    def where(self) -> str:
        return f"{self.length}, {KINDS[self.causal]}"

    def per_pair(self, name: str) -> float | None:
        """Picoseconds per visible pair of query and key."""
        return 1e12 * median(self.timings[name].seconds) / self.visible if name in self.timings else None

    def to_dict(self) -> dict[str, object]:
        timings = {name: timing.to_dict() for name, timing in self.timings.items()}
        return {"length": self.length, "causal": self.causal, "visible": self.visible, "timings": timings}


@dataclass(frozen=True)
class Report:
    """Everything that one run measured.

    Attributes:
        forward, backward: one row for each length, causal and full.
        memory: variant -> bytes, of a causal attention over `length_of_memory` keys.
        absent: variants that could not be run, and why.
        gpu: None where there is no GPU.
    """

    machine: Machine
    forward: list[Row]
    backward: list[Row]
    memory: dict[str, Memory]
    length_of_memory: int
    absent: dict[str, str]
    gpu: gpu.Report | None

    def targets(self) -> list[Target]:
        """The promises of this benchmark, one for each place where they can be checked."""
        found = []
        for name, limit in (("cpu", 1.30), ("blockwise", 4.0)):
            for row in self.forward:
                timing = row.timings.get(name)
                found.append(Target(f"`{name}`, all row statistics, over `sdpa`", row.where, timing and timing.middle, limit))
        for name in MEASURED[1:]:
            size = self.memory.get(name)
            beyond = None if size is None else (size.rise - size.kept) / 2**20
            found.append(Target(f"peak MiB of `{name}` beyond inputs and outputs", f"{self.length_of_memory}, causal", beyond, 64))
        return found + gpu.targets(self.gpu)

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "machine": self.machine.to_dict(),
            "shape": {"batch": 1, "heads": HEADS, "head_width": WIDTH, "dtype": "float32"},
            "allocator": {name: os.environ.get(name) for name in RETAINING},
            "forward": [row.to_dict() for row in self.forward],
            "backward": [row.to_dict() for row in self.backward],
            "memory": {name: asdict(size) for name, size in self.memory.items()},
            "length_of_memory": self.length_of_memory,
            "absent": self.absent,
            "gpu": None if self.gpu is None else self.gpu.to_dict(),
            "targets": [{**asdict(target), "verdict": target.verdict} for target in self.targets()],
        }

    def to_markdown(self) -> str:
        """The tables of the CPU, that of the GPU, then the promises."""
        lines = [
            "# Cost of statistics",
            "",
            f"One attention, {HEADS} heads × {WIDTH}, random numbers, float32, one thread of a CPU. Times are CPU time over that of "
            "torch's fused attention in the same round: median (lowest–highest). The full case is equal work. `make bench-kernels` "
            "measures again.",
            "",
            str(self.machine),
            "",
            *_table(self.forward, FORWARD, self.absent),
            "",
            "Milliseconds of `sdpa`: " + self._milliseconds(self.forward, "sdpa") + ".",
            "",
            "## Equal work",
            "",
            "Picoseconds per visible pair of query and key: median time over exactly N² pairs per head (full) or N (N + 1) / 2 (causal). "
            "What a causal pair costs more than a full one is work on pairs that nobody sees, and overhead. The last columns set the "
            "causal statistics against a fused attention without that waste: one pair at the price of its full case.",
            "",
            *self._equal_work(),
            "",
            "## Backward",
            "",
            "Relevance by AttnLRP through the softmax and both products, next to the gradient by torch's fused backward.",
            "",
            *_table(self.backward, BACKWARD, self.absent),
            "",
            "## Memory",
            "",
            f"Growth of the resident set during one causal call over {self.length_of_memory} keys in a fresh process, MiB.",
            "",
            "| name | peak | of which outputs | beyond |",
            "|---|---|---|---|",
            *(
                f"| `{name}` | {size.rise / 2**20:.1f} | {size.kept / 2**20:.1f} | {(size.rise - size.kept) / 2**20:.1f} |"
                for name, size in self.memory.items()
            ),
            "",
            *gpu.to_markdown(self.gpu),
            "",
            "## Promises",
            "",
            "| promise | where | measured | limit | |",
            "|---|---|---|---|---|",
        ]
        for target in self.targets():
            measured = "–" if target.measured is None else f"{target.measured:.3f}"
            lines.append(f"| {target.promise} | {target.where} | {measured} | ≤ {target.limit:.2f} | {target.verdict} |")
        return "\n".join(lines) + "\n"

    def _milliseconds(self, rows: Sequence[Row], name: str) -> str:
        return ", ".join(f"{1000 * median(row.timings[name].seconds):.1f} ({row.where})" for row in rows)

    def _equal_work(self) -> list[str]:
        names = ["sdpa", *(name for name in ("cpu", "blockwise") if name not in self.absent)]
        head = ["N", *(f"`{name}` {kind}" for name in names for kind in KINDS.values())]
        head += [f"`{name}` causal over `sdpa` full" for name in names[1:]]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for length in dict.fromkeys(row.length for row in self.forward):
            both = {row.causal: row for row in self.forward if row.length == length}
            each = {(name, causal): both[causal].per_pair(name) or 0.0 for name in names for causal in KINDS}
            cells = [str(length), *(f"{each[name, causal]:.0f}" for name in names for causal in KINDS)]
            cells += [f"{each[name, True] / each['sdpa', False]:.2f}" for name in names[1:]]
            lines.append("| " + " | ".join(cells) + " |")
        return lines


def measure(variants: Sequence[Variant], inputs: Inputs, rounds: int, repeats: int = 1) -> tuple[Row, dict[str, str]]:
    """Time variants in turns on the same inputs.

    Args:
        variants: the first is the one that the others are compared with.
        inputs: what they compute on.
        rounds: in each, every variant is timed once, beginning with another one every time.
        repeats: calls within one timing.

    Returns:
        the timings, and the variants that cannot run here with the reason.
    """
    seconds: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    with torch.no_grad():
        for variant in variants:
            if inputs.length > variant.most:
                continue
            try:
                variant.run(inputs)  # first runs compile and allocate
            except (ImportError, RuntimeError, ValueError) as error:
                absent[variant.name] = f"cannot run: {_reason(error)}"
                continue
            seconds[variant.name] = []
        present = [variant for variant in variants if variant.name in seconds]
        with _no_garbage_collection():
            for number in range(rounds):
                turn = number % len(present)
                for variant in (*present[turn:], *present[:turn]):
                    seconds[variant.name].append(_time(variant, inputs, repeats))
    base = seconds[variants[0].name]
    timings = {name: Timing(tuple(found), tuple(a / b for a, b in zip(found, base, strict=True))) for name, found in seconds.items()}
    return Row(inputs.length, inputs.causal, inputs.visible, timings), absent


def measure_memory(variant: Variant, length: int) -> Memory:
    """Run one variant in a fresh process; see `report_memory`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.kernels", variant.name, str(length)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={name: value for name, value in os.environ.items() if name not in RETAINING} | RELEASING,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the memory run of {variant.name} failed:\n{done.stderr[-2000:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def report_memory(variant: Variant, length: int) -> Memory:
    """How far one causal call raises this process's peak, after a short one to load what it needs, and the bytes that came out."""
    with torch.no_grad():
        variant.run(make_inputs(SHORT, True))
        inputs = make_inputs(length, True)
        gc.collect()
        before = resident_peak(restart=True)
        kept = nbytes(variant.run(inputs))
        return Memory(resident_peak() - before, kept)


def nbytes(result: Any) -> int:
    """Bytes of all tensors in what a variant returned."""
    if isinstance(result, Tensor):
        return result.nbytes
    if isinstance(result, Statistics):
        return nbytes(tuple(result.tensors().values()))
    return sum(map(nbytes, result)) if isinstance(result, (tuple, list)) else 0


def run(settings: Settings = FULL) -> Report:
    """The whole benchmark."""
    torch.set_num_threads(1)
    machine = this_machine(DISTRIBUTIONS)
    plan = [
        (variants, length, rounds, settings.repeats.get(length, 1) if variants is FORWARD else 1, causal)
        for variants, lengths in ((FORWARD, settings.rounds), (BACKWARD, settings.backward))
        for (length, rounds), causal in product(lengths.items(), KINDS)
    ]
    progress = Progress(sum(_cost(*part[1:]) for part in plan) + 5 * len(MEASURED))
    rows: dict[bool, list[Row]] = {True: [], False: []}
    absent = dict.fromkeys(settings.left_out, "was left out")
    for variants, length, rounds, repeats, causal in plan:
        chosen = [variant for variant in variants if variant.name not in absent]
        row, missing = measure(chosen, make_inputs(length, causal), rounds, repeats)
        rows[variants is FORWARD].append(row)
        absent |= missing
        progress.step(_cost(length, rounds, repeats, causal), ("forward " if variants is FORWARD else "backward ") + row.where)
    memory = {}
    for variant in FORWARD:
        if variant.name in MEASURED and variant.name not in absent:
            memory[variant.name] = measure_memory(variant, settings.memory)
            progress.step(5, f"memory of {variant.name}")
    on_gpu = gpu.run(settings.gpu) if torch.cuda.is_available() else None
    return Report(machine, rows[True], rows[False], memory, settings.memory, absent, on_gpu)


def _table(rows: Sequence[Row], variants: Sequence[Variant], absent: dict[str, str]) -> list[str]:
    head = ["name", "what is computed", *(row.where for row in rows)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for variant in variants:
        cells = [str(row.timings[variant.name]) if variant.name in row.timings else "–" for row in rows]
        lines.append("| " + " | ".join([f"`{variant.name}`", variant.label, *cells]) + " |")
    reasons = [f"`{variant.name}` {absent[variant.name]}." for variant in variants if variant.name in absent]
    return [*lines, "", "Missing: " + " ".join(reasons)] if reasons else lines


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nobody pays for another's garbage."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _time(variant: Variant, inputs: Inputs, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        variant.run(inputs)
    return (time.process_time() - start) / repeats


def _cost(length: int, rounds: int, repeats: int, causal: bool) -> float:
    """Rough seconds, for the progress alone."""
    return (1 + rounds * repeats) * (length / 1024) ** 2 * (0.5 if causal else 1.0)


def _reason(error: Exception) -> str:
    """The first line of an error that says something, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).replace("|", "/")[:160]


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = next(variant for variant in FORWARD if variant.name == sys.argv[1])
    print(json.dumps(asdict(report_memory(chosen, int(sys.argv[2])))))
