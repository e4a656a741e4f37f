"""What a look at the health of a model costs: all statistics of all heads, next to the plain forward and to scripts over dense maps.

CPU time of one thread, all ways in turns within each round; a ratio is one way's time over that of the plain forward in the same round,
and the median over the rounds counts. It includes the forward that every way runs. Ways that take minutes are timed once. Peak memory is
the growth of the resident set during one run in a fresh process. The monitor is what a training run of a small model pays for it, on the
wall clock.
"""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bench.interception import RELEASING, RETAINING, Progress, Target, Timing
from bench.machine import Machine, resident_peak, this_machine
from headscope.probe.health.heads import HeadMeter
from headscope.probe.health.inputs import batches_of, undisturbed
from headscope.probe.health.measure import measure_health
from headscope.probe.health.monitor import HealthMonitor
from headscope.probe.interception import intercept

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("headscope", "torch", "transformers", "attnspectra")
BASE = "plain"
SHORT = 32  # tokens of the warm-up before memory is measured
LIMIT = 1.5  # times the plain forward
STEPS = 8  # of the bounds on singular values
SHARE = 0.02


@dataclass(frozen=True)
class Shape:
    """Of the model: a GPT-2, by default of the size of GPT-2 small, without its output layer."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    positions: int = 2048


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        shape: of the model.
        rounds: for each number of tokens, how many rounds.
        spectra: layers that attnspectra is given, by number of tokens; its time is scaled up to all of them.
        memory: numbers of tokens at which peak memory is measured.
        training: wall-clock seconds of the small training loop.
    """

    shape: Shape
    rounds: dict[int, int]
    spectra: dict[int, int]
    memory: tuple[int, ...]
    training: float


FULL = Settings(Shape(), {512: 7, 2048: 3}, {512: 12, 2048: 1}, (512, 2048), 120.0)
QUICK = Settings(Shape(layers=3, positions=512), {128: 3, 512: 1}, {128: 3, 512: 1}, (512,), 30.0)


@cache
def built(shape: Shape, attention: str) -> nn.Module:
    """The model in evaluation mode, with random weights from one seed that make patterns far from uniform."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width, n_positions=shape.positions, initializer_range=0.1)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = GPT2Model(config)
    return model.eval()


def ids_of(tokens: int) -> Tensor:
    """[1, S], random."""
    return torch.randint(0, 50257, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def plain(shape: Shape, ids: Tensor) -> None:
    """The forward alone."""
    with torch.no_grad():
        built(shape, "sdpa")(input_ids=ids, use_cache=False)


def heads(shape: Shape, ids: Tensor) -> None:
    """All numbers of all heads, and nothing of the hidden states."""
    model = built(shape, "sdpa")
    (batch,) = batches_of(model, {"input_ids": ids, "use_cache": False})
    meter = HeadMeter(None, None, 0, 0)
    meter.tokens = batch.tokens
    with undisturbed(model), intercept(model, meter) as session:
        batch.run(model)
    meter.measures(session.sites)


def health(shape: Shape, ids: Tensor) -> None:
    """Everything that `measure_health` says of heads and hidden states, without the fresh copy."""
    _measured(shape, ids, 0)


def health_bounds(shape: Shape, ids: Tensor) -> None:
    """The same with bounds on singular values by Lanczos steps."""
    _measured(shape, ids, STEPS)


def eager_dense(shape: Shape, ids: Tensor) -> list[dict[str, Tensor]]:
    """The same numbers of heads, but for singular values, from the maps that eager attention returns: what one writes in an afternoon."""
    with torch.no_grad():
        maps = built(shape, "eager")(input_ids=ids, use_cache=False, output_attentions=True).attentions
        return [dense_numbers(pattern) for pattern in maps]


def attnspectra(shape: Shape, ids: Tensor, layers: int | None = None) -> float:
    """What the package computes, from the same maps; of some layers only where `layers` says so.

    Returns:
        CPU seconds of the part that grows with the number of layers it is given.
    """
    kinds = importlib.import_module("attnspectra")
    with torch.no_grad():
        maps = built(shape, "eager")(input_ids=ids, use_cache=False, output_attentions=True).attentions[:layers]
        about = kinds.ModelInfo("gpt2", "gpt2", len(maps), shape.heads, shape.width)
        start = time.process_time()
        kinds.compute_head_metrics(kinds.CapturedRun(ids, list(maps), None, [""] * ids.shape[1], about))
        return time.process_time() - start


def dense_numbers(p: Tensor) -> dict[str, Tensor]:
    """[H] each, from one layer's causal maps [1, H, N, N]."""
    pattern = p[0]
    heads, n, _ = pattern.shape
    seen = torch.arange(1, n + 1, dtype=pattern.dtype)
    place = torch.arange(n, dtype=pattern.dtype)
    entropy = torch.special.entr(pattern).sum(-1)  # [H, N]
    squares, received = pattern.square().sum(-1), pattern.sum(-2)
    mean = received / n
    spread = torch.special.entr(mean).sum(-1)
    total = float(seen[-1].log())
    scores = pattern.clamp_min(1e-30).log()
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    centre = scores.masked_fill(~visible, 0.0).sum(-1) / seen
    variance = (scores - centre[..., None]).masked_fill(~visible, 0.0).square().sum(-1) / seen
    unit = pattern / squares.sqrt()[..., None]
    received_norm = received.square().sum(-1)
    return {
        "entropy": entropy.mean(-1), "entropy_share": (entropy[:, 1:] / seen[1:].log()).mean(-1),
        "diffuse": entropy.mean(-1) / total, "routing": (spread - entropy.mean(-1)) / total, "hub": (total - spread) / total,
        "p_max": pattern.amax(-1).mean(-1), "effective_keys": (1 / squares).mean(-1),
        "effective_share": (1 / squares / seen)[:, 1:].mean(-1),
        "sum_squares": squares.mean(-1), "sink": (received / seen.flip(0))[:, : n // 2 + 1].amax(-1),
        "first_mass": pattern[:, :, 0].mean(-1), "distance": (pattern * (place[:, None] - place).abs()).sum(-1).mean(-1),
        "own": pattern.diagonal(dim1=-2, dim2=-1).mean(-1), "previous": pattern.diagonal(-1, -2, -1).mean(-1),
        "row_residual": 1 - received_norm / (n * squares.sum(-1)), "row_cosine": (unit.sum(-2).square().sum(-1) - n) / (n * (n - 1)),
        "column_deviation": (received - 1).abs().mean(-1), "contraction": pattern.diagonal(dim1=-2, dim2=-1)[:, 1:].amax(-1),
        "score_variance": variance[:, 1:].mean(-1),
    }  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One column of the table.

    Attributes:
        name: key in the results and on the command line.
        tool: whose way it is.
        label: what is done.
        run: does it once.
        requires: a module that must be importable.
        once: too slow to repeat: timed in the first round alone.
    """

    name: str
    tool: str
    label: str
    run: Callable[[Shape, Tensor], object]
    requires: str | None = None
    once: bool = False

    def why_not(self) -> str | None:
        """Why this cannot be done here; None where it can."""
        if self.requires is not None:
            try:
                importlib.import_module(self.requires)
            except ImportError as error:
                return f"cannot be imported ({error})"
        return None


WAYS = (
    Way(BASE, "transformers", "fused attention, nothing looked at", plain),
    Way("again", "transformers", "the same once more: the noise of this table", plain),
    Way("heads", "Headscope", "all numbers of all heads", heads),
    Way("health", "Headscope", "`measure_health(…, baselines=False)`: heads, hidden states, findings, fingerprint", health),
    Way("health-bounds", "Headscope", f"the same with `spectrum={STEPS}`", health_bounds),
    Way("eager-dense", "a script", "the numbers of heads, without singular values, from `output_attentions=True`", eager_dense),
    Way(
        "attnspectra", "attnspectra", "`compute_head_metrics`: 9 numbers of heads by dense singular values", attnspectra, "attnspectra",
        once=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Overhead:
    """What a monitor cost a training run.

    Attributes:
        seconds: of the run, measurements included.
        steps: of the optimizer.
        measured: steps that were measured.
        share: seconds measuring over seconds training, as the monitor reports it.
        each: median seconds of one measurement.
        step: mean seconds of a step without measuring.
    """

    seconds: float
    steps: int
    measured: list[int]
    share: float
    each: float
    step: float


@dataclass(frozen=True)
class Report:
    """Everything that one run measured.

    Attributes:
        times: tokens -> way -> timing.
        scaled: tokens -> how many layers attnspectra was given.
        absent: way -> why it was not run.
        memory: tokens -> way -> bytes.
    """

    machine: Machine
    shape: Shape
    times: dict[int, dict[str, Timing]]
    scaled: dict[int, int]
    absent: dict[str, str]
    memory: dict[int, dict[str, int]]
    overhead: Overhead

    def targets(self) -> list[Target]:
        """The promises of this benchmark, one for each place where they can be checked."""
        found = [Target("`heads` over the plain forward", f"{n} tokens", row["heads"].middle, LIMIT) for n, row in self.times.items()]
        for tokens, row in self.memory.items():
            square = 4 * self.shape.heads * tokens**2
            grown = row["heads"] - row[BASE]
            found.append(Target("memory of `heads` beyond plain, over one layer's maps", f"{tokens} tokens", grown / square, 1.0))
        found.append(Target("monitor: time measuring over time training", "small GPT-2", self.overhead.share, SHARE))
        return found

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "machine": self.machine.to_dict(), "model": asdict(self.shape),
            "allocator": {name: os.environ.get(name) for name in RETAINING},
            "times": {str(n): {name: timing.to_dict() for name, timing in row.items()} for n, row in self.times.items()},
            "attnspectra_layers": {str(n): layers for n, layers in self.scaled.items()}, "absent": self.absent,
            "memory": {str(n): row for n, row in self.memory.items()}, "monitor": asdict(self.overhead),
            "targets": [{**asdict(t), "verdict": t.verdict} for t in self.targets()],
        }  # fmt: skip

    def to_markdown(self) -> str:
        """The ways, their times, their memory, the monitor, the promises."""
        shape = self.shape
        columns = [*(f"{n} tokens" for n in self.times), *(f"peak at {n}, MiB" for n in self.memory)]
        lines = [
            "# Cost of a look at health",
            "",
            f"A GPT-2 of {shape.layers} layers × {shape.heads} heads × {shape.width // shape.heads}, random weights, without its output "
            f"layer, float32, one text. Times are CPU time of one thread over that of `{BASE}` in the same round, forward included: median "
            "(lowest–highest). `attnspectra` is one timing; where it was given some of the layers its time is scaled up to all.",
            "",
            str(self.machine),
            "",
            "| " + " | ".join(["name", "tool", "what is done", *columns]) + " |",
            "|" + "---|" * (3 + len(columns)),
        ]
        for way in WAYS:
            cells = [f"`{way.name}`", way.tool, way.label]
            for tokens, row in self.times.items():
                cells.append(self._shown(way, tokens, row.get(way.name)))
            cells += [f"{row[way.name] / 2**20:.0f}" if way.name in row else "–" for row in self.memory.values()]
            lines.append("| " + " | ".join(cells) + " |")
        base = ", ".join(f"{1000 * median(row[BASE].seconds):.0f} ({n} tokens)" for n, row in self.times.items())
        spent = self.overhead
        lines += [
            "",
            f"Milliseconds of `{BASE}`: {base}.",
            "",
            f"The monitor at its default interval: {spent.steps} steps of a small GPT-2 in {spent.seconds:.0f} s of wall clock, "
            f"{1000 * spent.step:.1f} ms each; measured at {len(spent.measured)} steps ({', '.join(map(str, spent.measured[:8]))}"
            f"{', …' if len(spent.measured) > 8 else ''}), {1000 * spent.each:.0f} ms each: {100 * spent.share:.2f} % of the training.",
            "",
            "| promise | where | measured | limit | |",
            "|---|---|---|---|---|",
        ]
        for t in self.targets():
            measured = "–" if t.measured is None else f"{t.measured:.3f}"
            lines.append(f"| {t.promise} | {t.where} | {measured} | ≤ {t.limit:.2f} | {t.verdict} |")
        return "\n".join(lines) + "\n"

    def _shown(self, way: Way, tokens: int, timing: Timing | None) -> str:
        if timing is None:
            return self.absent.get(way.name, "–")
        if not way.once:
            return str(timing)
        layers = self.scaled.get(tokens, self.shape.layers)
        return f"{timing.middle:.0f}" + (f" (from {layers} of {self.shape.layers} layers)" if layers < self.shape.layers else "")


def measure(
    shape: Shape, tokens: int, rounds: int, spectra: int, progress: Progress | None = None
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time all ways in turns at one number of tokens.

    Args:
        rounds: in each, every way is timed once, beginning with another one every time.
        spectra: layers that attnspectra is given.

    Returns:
        timings by way; the ways that cannot run here, with the reason.
    """
    ids = ids_of(tokens)
    absent = {way.name: reason for way in WAYS if (reason := way.why_not()) is not None}
    present = [way for way in WAYS if way.name not in absent]
    for way in present:
        if not way.once:
            way.run(shape, ids)  # first runs build models, compile and allocate
    _tell(progress, 6 * _cost(shape, tokens), f"{tokens} tokens: warmed up")
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        turn = number % len(present)
        for way in (*present[turn:], *present[:turn]):
            if not (way.once and number):
                seconds.setdefault(way.name, []).append(_timed(way, shape, ids, spectra))
        _tell(progress, 6 * _cost(shape, tokens), f"{tokens} tokens: round {number + 1}/{rounds}")
    base = seconds[BASE]
    return {name: Timing(tuple(found), tuple(a / b for a, b in zip(found, base, strict=False))) for name, found in seconds.items()}, absent


def measure_memory(way: Way, shape: Shape, tokens: int) -> int:
    """Run one way in a fresh process; see `report_memory`."""
    numbers = [str(number) for number in (*asdict(shape).values(), tokens)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.health", way.name, *numbers], cwd=ROOT, capture_output=True, text=True, timeout=1800,
        env={name: value for name, value in os.environ.items() if name not in RETAINING} | RELEASING,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the memory run of {way.name} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def report_memory(way: Way, shape: Shape, tokens: int) -> int:
    """How far one run of a way raises this process's peak, after a short one to load what it needs."""
    way.run(shape, ids_of(SHORT))
    ids = ids_of(tokens)
    gc.collect()
    before = resident_peak(restart=True)
    way.run(shape, ids)
    return max(0, resident_peak() - before)  # below zero is the noise of the pages that are given back


def train(seconds: float) -> Overhead:
    """A small GPT-2 learns random tokens for some time, watched by a monitor at its default interval."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=128, n_positions=256, vocab_size=2048))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitor = HealthMonitor(model, {"input_ids": torch.randint(0, 2048, (2, 128))}, share=SHARE, wandb=False)
        model.train()
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            ids = torch.randint(0, 2048, (8, 128))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(steps)
            steps += 1
        whole = time.perf_counter() - start
    moments = monitor.history.moments
    spent = sum(moment.seconds for moment in moments)
    each = median(moment.seconds for moment in moments)
    return Overhead(whole, steps, monitor.history.steps(), monitor.overhead, each, (whole - spent) / steps)


def run(settings: Settings = FULL) -> Report:
    """The whole benchmark."""
    torch.set_num_threads(1)
    _quiet()
    machine = this_machine(DISTRIBUTIONS)
    shape = settings.shape
    measured = [way for way in WAYS if way.name not in ("again", "attnspectra")]
    total = sum(6 * _cost(shape, n) * (1 + rounds) for n, rounds in settings.rounds.items()) + settings.training
    progress = Progress(total + sum(_process_cost(shape, n) * len(measured) for n in settings.memory))
    times: dict[int, dict[str, Timing]] = {}
    absent: dict[str, str] = {}
    for tokens, rounds in settings.rounds.items():
        times[tokens], missing = measure(shape, tokens, rounds, settings.spectra.get(tokens, shape.layers), progress)
        absent |= missing
    overhead = train(settings.training)
    progress.step(settings.training, "training with a monitor")
    memory: dict[int, dict[str, int]] = {}
    for tokens in settings.memory:
        for way in measured:
            memory.setdefault(tokens, {})[way.name] = measure_memory(way, shape, tokens)
            progress.step(_process_cost(shape, tokens), f"memory at {tokens} tokens: {way.name}")
    return Report(machine, shape, times, settings.spectra, absent, memory, overhead)


def _measured(shape: Shape, ids: Tensor, spectrum: int) -> None:
    measure_health(built(shape, "sdpa"), {"input_ids": ids, "use_cache": False}, baselines=False, spectrum=spectrum)


def _timed(way: Way, shape: Shape, ids: Tensor, spectra: int) -> float:
    """CPU seconds of one run; of attnspectra scaled up to all layers."""
    gc.collect()  # nobody pays for another's garbage
    start = time.process_time()
    if way.name == "attnspectra" and spectra < shape.layers:
        part = attnspectra(shape, ids, spectra)
        return time.process_time() - start + part * (shape.layers / spectra - 1)
    way.run(shape, ids)
    return time.process_time() - start


def _cost(shape: Shape, tokens: int) -> float:
    """Rough seconds of a forward, for the progress alone."""
    return shape.layers * tokens / 5000 * (1 + tokens / 4000)


def _process_cost(shape: Shape, tokens: int) -> float:
    return 8 + 2 * _cost(shape, tokens)


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
    chosen = next(way for way in WAYS if way.name == sys.argv[1])
    *sides, tokens_asked = (int(word) for word in sys.argv[2:])
    print(report_memory(chosen, Shape(*sides), tokens_asked))
