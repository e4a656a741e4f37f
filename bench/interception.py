"""What it costs to look at attention, or to change it: Headscope next to other tools, as ratios to the untouched model.

CPU time of one thread, all variants in turns within each round, so that a busy machine slows all of them alike. A ratio is one
variant's time over that of the untouched model in the same round; the median over the rounds is what counts. Freed memory stays with
the process (`RETAINING`): otherwise whoever runs after a release pays for page faults that another caused. Peak memory is the growth
of the resident set during one forward in a fresh process, where freed memory goes back at once (`RELEASING`).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.machine import Machine, resident_peak, this_machine
from bench.variants import DECODE, FORWARD, NEW_TOKENS, Models, Shape, Variant

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("headscope", "torch", "transformers", "transformer-lens", "nnsight")
PROMPT = 128  # tokens before decoding
SHORT = 32  # tokens of the warm-up before memory is measured
BASE = "plain"
# Settings of glibc's allocator, read when a process starts; other systems ignore them.
RETAINING = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26), "MALLOC_MMAP_MAX_": "0"}
RELEASING = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
PEERS = ("eager-patterns", "transformer-lens", "nnsight")


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        rounds: for each number of tokens, how many rounds.
        decode_rounds: the same for decoding.
        memory: numbers of tokens at which peak memory is measured.
        repeats: runs of a variant within one timing, by number of tokens; 1 where none is given.
    """

    rounds: dict[int, int] = field(default_factory=lambda: {256: 9, 1024: 5, 2048: 3})
    decode_rounds: int = 5
    memory: tuple[int, ...] = (1024, 2048)
    repeats: dict[int, int] = field(default_factory=lambda: {256: 3})


FULL = Settings()
QUICK = Settings(rounds={256: 3, 1024: 2}, decode_rounds=1, memory=(1024,), repeats={})


@dataclass(frozen=True)
class Timing:
    """CPU seconds of one variant in each round, and their ratios to the untouched model's."""

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def middle(self) -> float:
        return median(self.ratios)

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({min(self.ratios):.2f}–{max(self.ratios):.2f})"

    def to_dict(self) -> dict[str, object]:
        return {
            "median_ratio": self.middle, "lowest_ratio": min(self.ratios), "highest_ratio": max(self.ratios),
            "median_seconds": median(self.seconds), "ratios": list(self.ratios), "seconds": list(self.seconds),
        }  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes: growth of the peak resident set during one forward, and how much attention was kept at its end."""

    rise: int
    kept: int


@dataclass(frozen=True)
class Target:
    """One promise: what was measured, and the most it may be. `measured` is None where a peer is missing."""

    promise: str
    where: str
    measured: float | None
    limit: float

    @property
    def verdict(self) -> str:
        return "not measured" if self.measured is None else "pass" if self.measured <= self.limit else "miss"


@dataclass(frozen=True)
class Report:
    """Everything that one run measured.

    Attributes:
        forward: tokens -> variant -> timing; decode: variant -> timing; memory: tokens -> variant -> bytes.
        absent: variants that could not be run, and why.
    """

    machine: Machine
    shape: Shape
    forward: dict[int, dict[str, Timing]]
    decode: dict[str, Timing]
    memory: dict[int, dict[str, Memory]]
    absent: dict[str, str]

    def targets(self) -> list[Target]:
        """The promises of this benchmark, one for each place where they can be checked."""
        found = []
        for length, row in self.forward.items():
            where = f"{length} tokens"
            found.append(Target("`nothing` kept over untouched", where, row["nothing"].middle, 1.05))
            for peer in PEERS:
                found.append(Target(f"`patterns` over `{peer}`", where, over(row["patterns"], row.get(peer)), 1.0))
            found += [
                Target(f"`{name}` edit over untouched", where, row[name].middle, 1.10) for name in ("identity-call", "identity-scale")
            ]
        for length, sizes in self.memory.items():
            ours, base = sizes["patterns"], sizes[BASE]
            found.append(Target("peak of `patterns` over untouched + kept", f"{length} tokens", ours.rise / (base.rise + ours.kept), 1.05))
        return found

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "machine": self.machine.to_dict(),
            "model": asdict(self.shape),
            "allocator": {name: os.environ.get(name) for name in RETAINING},
            "forward": {str(n): {name: t.to_dict() for name, t in row.items()} for n, row in self.forward.items()},
            "decode": {name: t.to_dict() for name, t in self.decode.items()},
            "memory": {str(n): {name: asdict(m) for name, m in row.items()} for n, row in self.memory.items()},
            "absent": self.absent,
            "targets": [{**asdict(t), "verdict": t.verdict} for t in self.targets()],
        }

    def to_markdown(self) -> str:
        """One table with all tools, then the promises."""
        shape, lengths, sizes = self.shape, list(self.forward), list(self.memory)
        head = ["name", "tool", "what is done", *(f"{n} tokens" for n in lengths), *(["decode"] if self.decode else [])]
        head += [f"peak MiB, {n}" for n in sizes] + [f"kept MiB, {n}" for n in sizes] + ["target"]
        lines = [
            "# Cost of looking and changing",
            "",
            f"Llama-shaped model, {shape.layers} layers × {shape.heads} heads × {shape.head_width}, random weights, float32, one prompt, "
            "CPU. Times are CPU time of one thread over that of the untouched model in the same round: median (lowest–highest). "
            + " ".join(f"Untouched, {n} tokens: {1000 * median(row[BASE].seconds):.0f} ms." for n, row in self.forward.items())
            + f" Decode: {PROMPT} tokens of prompt, then {NEW_TOKENS} by `generate`. Peak: growth of the resident set during one forward "
            "in a fresh process; kept: bytes of attention held at its end. `make bench` measures again.",
            "",
            str(self.machine),
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
        ]
        verdicts = self._verdicts()
        for variant in FORWARD:
            cells = [f"`{variant.name}`", variant.tool, variant.label]
            reason = self.absent.get(variant.name)
            cells += [str(row[variant.name]) if variant.name in row else reason or "–" for row in self.forward.values()]
            if self.decode:
                cells.append(str(self.decode[variant.name]) if variant.name in self.decode else "–")
            for part in ("rise", "kept"):
                cells += [f"{getattr(row[variant.name], part) / 2**20:.0f}" if variant.name in row else "–" for row in self.memory.values()]
            lines.append("| " + " | ".join([*cells, verdicts.get(variant.name, "")]) + " |")
        lines += ["", "| promise | where | measured | limit | |", "|---|---|---|---|---|"]
        for t in self.targets():
            measured = "–" if t.measured is None else f"{t.measured:.3f}"
            lines.append(f"| {t.promise} | {t.where} | {measured} | ≤ {t.limit:.2f} | {t.verdict} |")
        return "\n".join(lines) + "\n"

    def _verdicts(self) -> dict[str, str]:
        """For each of our variants with a promise, whether all, or how many, of its promises are kept."""
        found: dict[str, list[str]] = {}
        for target in self.targets():
            name = next(v.name for v in FORWARD if target.promise.partition(" over ")[0].find(f"`{v.name}`") >= 0)
            found.setdefault(name, []).append(target.verdict)
        return {name: ", ".join(f"{rows.count(word)} {word}" for word in dict.fromkeys(rows)) for name, rows in found.items()}


def over(ours: Timing, theirs: Timing | None) -> float | None:
    """Median over the rounds of one variant's time over another's in the same round."""
    if theirs is None:
        return None
    return median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True))


class Progress:
    """Says on stderr how far we are and how long it will still take."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self.start = total, 0.0, time.perf_counter()

    def step(self, cost: float, what: str) -> None:
        self.done += cost
        spent = time.perf_counter() - self.start
        left = spent * (self.total - self.done) / self.done
        print(f"{100 * self.done / self.total:3.0f} % {what}; {spent:.0f} s so far, about {max(left, 0):.0f} s left", file=sys.stderr)


def measure(
    models: Models, variants: Sequence[Variant], length: int, rounds: int, repeats: int, progress: Progress | None = None, what: str = ""
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time variants in turns on one prompt.

    Args:
        models: what they run.
        variants: the first is the one that the others are compared with.
        length: tokens of the prompt.
        rounds: in each, every variant is timed once, beginning with another one every time.
        repeats: runs within one timing.
        progress, what: told after each round; `what` is the word for it.

    Returns:
        timings by variant, and the variants that cannot run here with the reason.
    """
    ids = models.prompt(length)
    seconds: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    with torch.no_grad():
        for variant in variants:
            if not variant.installed:
                absent[variant.name] = "not installed"
                continue
            try:
                variant.run(models, ids)  # first runs build models, compile and allocate
            except ImportError as error:
                absent[variant.name] = f"cannot be imported ({error})"
                continue
            seconds[variant.name] = []
        present = [v for v in variants if v.name in seconds]
        _tell(progress, length, len(variants), f"{what} warmed up")
        for number in range(rounds):
            turn = number % len(present)
            for variant in (*present[turn:], *present[:turn]):
                seconds[variant.name].append(_time(variant, models, ids, repeats))
            _tell(progress, length, len(variants) * repeats, f"{what} round {number + 1}/{rounds}")
    base = seconds[variants[0].name]
    timings = {name: Timing(tuple(found), tuple(a / b for a, b in zip(found, base, strict=True))) for name, found in seconds.items()}
    return timings, absent


def measure_memory(variant: Variant, length: int) -> Memory:
    """Run one variant in a fresh process; see `report_memory`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.interception", variant.name, str(length)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={name: value for name, value in os.environ.items() if name not in RETAINING} | RELEASING,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the memory run of {variant.name} failed:\n{done.stderr[-2000:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def report_memory(variant: Variant, length: int, models: Models) -> Memory:
    """How far one forward of a variant raises this process's peak, after a short one to load what it needs."""
    with torch.no_grad():
        variant.run(models, models.prompt(SHORT))
        ids = models.prompt(length)
        gc.collect()
        before = resident_peak(restart=True)
        kept = variant.run(models, ids)
        return Memory(resident_peak() - before, kept)


def run(settings: Settings = FULL, shape: Shape | None = None) -> Report:
    """The whole benchmark."""
    torch.set_num_threads(1)
    _quiet()
    models = Models(shape)
    machine = this_machine(DISTRIBUTIONS)
    measured = [v for v in FORWARD if v.name != "plain-again"]
    total = sum(_cost(n, len(FORWARD) * (1 + rounds * settings.repeats.get(n, 1))) for n, rounds in settings.rounds.items())
    total += _cost(PROMPT, len(DECODE) * (1 + settings.decode_rounds)) + sum(_process_cost(n) * len(measured) for n in settings.memory)
    progress = Progress(total)
    forward: dict[int, dict[str, Timing]] = {}
    absent: dict[str, str] = {}
    for length, rounds in settings.rounds.items():
        forward[length], missing = measure(models, FORWARD, length, rounds, settings.repeats.get(length, 1), progress, f"{length} tokens:")
        absent |= missing
    decode, _ = measure(models, DECODE, PROMPT, settings.decode_rounds, 1, progress, "decoding:")
    memory: dict[int, dict[str, Memory]] = {}
    for length in settings.memory:
        memory[length] = {}
        for variant in measured:
            if variant.name not in absent:
                memory[length][variant.name] = measure_memory(variant, length)
            progress.step(_process_cost(length), f"memory at {length} tokens: {variant.name}")
    return Report(machine, models.shape, forward, decode, memory, absent)


def _time(variant: Variant, models: Models, ids: Tensor, repeats: int) -> float:
    gc.collect()  # nobody pays for another's garbage
    start = time.process_time()
    for _ in range(repeats):
        variant.run(models, ids)
    return (time.process_time() - start) / repeats


def _cost(length: int, runs: int) -> float:
    """Rough seconds, for the progress alone."""
    return runs * (0.2 if length == PROMPT else length / 3000 + (length / 1600) ** 2)


def _process_cost(length: int) -> float:
    return 8 + _cost(length, 1)


def _tell(progress: Progress | None, length: int, runs: int, what: str) -> None:
    if progress is not None:
        progress.step(_cost(length, runs), what)


def _quiet() -> None:
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _quiet()
    chosen = next(v for v in FORWARD if v.name == sys.argv[1])
    print(json.dumps(asdict(report_memory(chosen, int(sys.argv[2]), Models()))))
