"""What one attribution costs: AttnLRP next to the gradients of the same model, LXT, and Captum's integrated gradients.

CPU time of one thread, all ways in turns within each round; a ratio is one way's time over that of one forward and one backward to the
inputs in the same round, and the median over the rounds counts. That is the strictest thing to be compared with: a backward to the
inputs alone computes no gradient of a weight, and neither does an attribution. Peak memory is the growth of the resident set during one
attribution in a fresh process.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.interception import RELEASING, RETAINING, Progress, Target, Timing, over
from bench.machine import Machine, resident_peak, this_machine
from bench.ways import (
    LXT,
    PATCHED,
    STEPS,
    WAYS,
    Case,
    Peer,
    Way,
    lxt_revision,
    make_subject,
    patched,
    peer_environment,
    serve,
    shorter,
    timed,
)

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("headscope", "torch", "transformers", "captum")
BASE = "gradients"
SHORT = 32  # tokens of the warm-up before memory is measured
LIMIT, GROWTH = 1.5, 2.2  # times the base; times the memory for twice the tokens
MODELS = {
    "lm": "`embedded:lm`, a Llama of 6 layers × 8 heads × 32",
    "gpt2": "GPT-2 small with 6 of its layers, 12 heads × 64",
    "vit": "ViT-S/16, 12 layers × 6 heads × 64, one image of 224 × 224",
}
IMAGE = 197  # tokens of that
START = 6.0  # seconds of the first runs of a case, for the progress alone


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        rounds: for each case, how many rounds.
        repeats: runs within one timing, by number of tokens; 1 where none is given.
        memory: numbers of tokens at which peak memory is measured, each twice the one before.
        measured: (way, attention) whose memory is measured.
    """

    rounds: dict[Case, int] = field(
        default_factory=lambda: {
            **{
                Case("lm", attention, tokens): rounds
                for tokens, rounds in ((128, 7), (512, 5), (1024, 3))
                for attention in ("sdpa", "eager")
            },
            Case("gpt2", "sdpa", 256): 3,
            **{Case("vit", attention, IMAGE): 3 for attention in ("sdpa", "eager")},
        }
    )
    repeats: dict[int, int] = field(default_factory=lambda: {128: 5, 512: 2})
    memory: tuple[int, ...] = (1024, 2048)
    measured: tuple[tuple[str, str], ...] = (
        (BASE, "sdpa"), ("attnlrp", "sdpa"), ("attnlrp-inputs", "sdpa"), ("lxt", "sdpa"), ("attnlrp", "eager"),
    )  # fmt: skip


FULL = Settings()
QUICK = Settings(
    rounds={Case("lm", "sdpa", 128): 5, Case("lm", "eager", 128): 3, Case("vit", "sdpa", IMAGE): 1}, repeats={}, memory=(512, 1024)
)
SQUARE = 2048  # eager attention holds a square of more tokens than these for every head: not measured


@dataclass(frozen=True)
class Report:
    """Everything that one run measured.

    Attributes:
        times: case -> way -> timing.
        absent: case -> way -> why it was not run.
        agreement: case -> the largest difference between our relevance of a token and LXT's, over the largest relevance.
        memory: (way, attention) -> tokens -> bytes.
        revision: LXT's commit.
    """

    machine: Machine
    times: dict[Case, dict[str, Timing]]
    absent: dict[Case, dict[str, str]]
    agreement: dict[Case, float]
    memory: dict[tuple[str, str], dict[int, int]]
    revision: str | None

    def targets(self) -> list[Target]:
        """The promises of this benchmark, one for each place where they can be checked."""
        found = [Target(f"`attnlrp` over `{BASE}`", str(case), row["attnlrp"].middle, LIMIT) for case, row in self.times.items()]
        for case, row in self.times.items():
            if case.model in PATCHED:
                found.append(Target("`attnlrp-inputs` over `lxt`", str(case), over(row["attnlrp-inputs"], row.get("lxt")), 1.0))
        for (way, attention), sizes in self.memory.items():
            if way == "attnlrp" and attention == "sdpa":
                lengths = list(sizes)
                for less, more in zip(lengths, lengths[1:], strict=False):
                    found.append(
                        Target("peak memory of `attnlrp`, twice the tokens", f"{less} → {more}, sdpa", sizes[more] / sizes[less], GROWTH)
                    )
        return found

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "machine": self.machine.to_dict(),
            "models": MODELS,
            "lxt": self.revision,
            "allocator": {name: os.environ.get(name) for name in RETAINING},
            "times": [
                {**asdict(case), "ways": {name: t.to_dict() for name, t in row.items()}, "absent": self.absent.get(case, {}),
                 "agreement_with_lxt": self.agreement.get(case)}
                for case, row in self.times.items()
            ],
            "memory": [
                {"way": way, "attention": kind, "bytes": {str(n): b for n, b in row.items()}} for (way, kind), row in self.memory.items()
            ],
            "targets": [{**asdict(t), "verdict": t.verdict} for t in self.targets()],
        }  # fmt: skip

    def to_markdown(self) -> str:
        """The ways, their times, their memory, the promises."""
        lxt = f"at commit {self.revision}" if self.revision else f"from the folder that {LXT} names"
        lines = [
            "# Cost of an attribution",
            "",
            "One logit, of a class or of the next token, float32, one input, CPU. Times are CPU time of one thread over that of "
            f"`{BASE}` in the same round: median (lowest–highest). The promise is about `{BASE}`, forward and backward to the inputs "
            f"alone; `training` shows what a backward to all weights costs. `captum` is one timing of {STEPS} steps. "
            f"LXT, {lxt}, ran in a process of its own.",
            "",
            *(f"- {name}: {MODELS[name]}" for name in dict.fromkeys(case.model for case in self.times) if name in MODELS),
            "",
            str(self.machine),
            "",
            "| name | tool | what is done |",
            "|---|---|---|",
            *(f"| `{way.name}` | {way.tool} | {way.label} |" for way in WAYS),
            "",
            f"| model | tokens | attention | `{BASE}`, ms | "
            + " | ".join(f"`{way.name}`" for way in WAYS[1:])
            + " | difference to `lxt` |",
            "|" + "---|" * (4 + len(WAYS)),
        ]
        for case, row in self.times.items():
            cells = [case.model, str(case.tokens), case.attention, f"{1000 * median(row[BASE].seconds):.0f}"]
            for way in WAYS[1:]:
                cells.append(_shown(row[way.name]) if way.name in row else self.absent.get(case, {}).get(way.name, "–"))
            cells.append(f"{self.agreement[case]:.0e}" if case in self.agreement else "–")
            lines.append("| " + " | ".join(cells) + " |")
        if self.memory:
            lengths = sorted({length for row in self.memory.values() for length in row})
            lines += [
                "",
                "Peak memory on `embedded:lm`, MiB:",
                "",
                "| name | attention | " + " | ".join(f"{n} tokens" for n in lengths) + " |",
            ]
            lines.append("|" + "---|" * (2 + len(lengths)))
            for (name, attention), sizes in self.memory.items():
                found = " | ".join(f"{sizes[n] / 2**20:.0f}" if n in sizes else "–" for n in lengths)
                lines.append(f"| `{name}` | {attention} | {found} |")
        lines += ["", "| promise | where | measured | limit | |", "|---|---|---|---|---|"]
        for t in self.targets():
            measured = "–" if t.measured is None else f"{t.measured:.3f}"
            lines.append(f"| {t.promise} | {t.where} | {measured} | ≤ {t.limit:.2f} | {t.verdict} |")
        return "\n".join(lines) + "\n"


def measure(
    case: Case, ways: Sequence[Way], rounds: int, repeats: int, progress: Progress | None = None
) -> tuple[dict[str, Timing], dict[str, str], float | None]:
    """Time ways in turns on one case.

    Args:
        ways: the first is the one that the others are compared with.
        rounds: in each, every way is timed once, beginning with another one every time.
        repeats: runs within one timing.

    Returns:
        timings by way; the ways that cannot run here, with the reason; how far our relevance is from LXT's, see `Report.agreement`.
    """
    subject = make_subject(case)
    absent = {way.name: reason for way in ways if (reason := way.why_not(case)) is not None}
    clocks: dict[str, Callable[[int], float]] = {}  # way -> CPU seconds of one run, from the number of runs
    found: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {}
    peer: Peer | None = None
    try:
        for way in ways:
            if way.name in absent:
                continue
            if way.run is None:
                try:
                    peer = Peer(case)
                except ImportError as error:
                    absent[way.name] = str(error)
                    continue
                clocks[way.name] = peer.seconds
            else:
                clocks[way.name] = partial(timed, way.run, subject)
                if not way.once:
                    found[way.name] = way.run(subject)  # first runs compile and allocate
        _tell(progress, START, f"{case}: warmed up")
        present = [way for way in ways if way.name in clocks]
        for number in range(rounds):
            turn = number % len(present)
            for way in (*present[turn:], *present[:turn]):
                if not (way.once and number):
                    seconds.setdefault(way.name, []).append(clocks[way.name](1 if way.once else repeats))
            _tell(progress, _round_cost(case, ways, repeats, number), f"{case}: round {number + 1}/{rounds}")
    finally:
        if peer is not None:
            peer.close()
    agreement = None
    if peer is not None and "attnlrp-inputs" in found:
        ours = found["attnlrp-inputs"].double()
        agreement = float((ours - peer.relevance).abs().max() / ours.abs().max())
    base = seconds[ways[0].name]
    timings = {
        way.name: Timing(tuple(seconds[way.name]), tuple(a / b for a, b in zip(seconds[way.name], base, strict=False)))
        for way in ways
        if way.name in seconds
    }
    return timings, absent, agreement


def measure_memory(name: str, case: Case) -> int:
    """Run one way in a fresh process; see `report_memory`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.attribution", "memory", name, case.model, case.attention, str(case.tokens)],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
        env={key: value for key, value in peer_environment().items() if key not in RETAINING} | RELEASING,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the memory run of {name} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def report_memory(name: str, case: Case) -> int:
    """How far one run of a way raises this process's peak, after a short one to load what it needs."""
    way = next(way for way in WAYS if way.name == name)
    run, make = (way.run, make_subject) if way.run is not None else (WAYS[0].run, patched)
    assert run is not None
    run(make(shorter(case, SHORT)))
    subject = make_subject(case)
    gc.collect()
    before = resident_peak(restart=True)
    run(subject)
    return resident_peak() - before


def run(settings: Settings = FULL) -> Report:
    """The whole benchmark."""
    torch.set_num_threads(1)
    _quiet()
    machine = this_machine(DISTRIBUTIONS)
    total = sum(
        START + sum(_round_cost(case, WAYS, settings.repeats.get(case.tokens, 1), number) for number in range(rounds))
        for case, rounds in settings.rounds.items()
    )
    wanted = [
        (name, Case("lm", attention, tokens))
        for name, attention in settings.measured
        for tokens in settings.memory
        if attention == "sdpa" or tokens <= SQUARE
    ]
    progress = Progress(total + sum(_process_cost(case) for _, case in wanted))
    times: dict[Case, dict[str, Timing]] = {}
    absent: dict[Case, dict[str, str]] = {}
    agreement: dict[Case, float] = {}
    for case, rounds in settings.rounds.items():
        times[case], absent[case], close = measure(case, WAYS, rounds, settings.repeats.get(case.tokens, 1), progress)
        if close is not None:
            agreement[case] = close
    memory: dict[tuple[str, str], dict[int, int]] = {}
    here = {way.name for way in WAYS if any(way.name in row for row in times.values())}
    for name, case in wanted:
        if name in here:
            memory.setdefault((name, case.attention), {})[case.tokens] = measure_memory(name, case)
        progress.step(_process_cost(case), f"memory of {name}: {case}")
    return Report(machine, times, absent, agreement, memory, lxt_revision())


def _shown(timing: Timing) -> str:
    return str(timing) if len(timing.ratios) > 1 else f"{timing.middle:.2f}"


def _round_cost(case: Case, ways: Sequence[Way], repeats: int, number: int) -> float:
    """Rough seconds of one round, for the progress alone."""
    once = STEPS if number == 0 and case.attention == "sdpa" else 0
    return _cost(case) * sum(once if way.once else 1.2 * repeats for way in ways)


def _cost(case: Case) -> float:
    """Rough seconds of a forward and a backward, for the progress alone."""
    weight = {"lm": 1.0, "gpt2": 8.0, "vit": 4.0}.get(case.model, 0.1)
    return weight * case.tokens / 3000 * (1 + case.tokens / 3000)


def _process_cost(case: Case) -> float:
    return 5 + 2 * _cost(case)


def _tell(progress: Progress | None, cost: float, what: str) -> None:
    if progress is not None:
        progress.step(cost, what)


def _quiet() -> None:
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _quiet()
    *words, model, attention, tokens = sys.argv[1:]
    chosen = Case(model, attention, int(tokens))
    if words == ["lxt"]:
        serve(chosen)
    else:
        print(report_memory(words[1], chosen))
