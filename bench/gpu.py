"""What statistics of an attention cost on a GPU: our kernels next to torch's fused attention, all backends, and flex.

Before anything is timed, output and statistics are held against the float64 reference. Then all variants run in turns, each with the
L2 cache flushed before and timed by events; the median and the tenth and ninetieth percentile are reported. What a matrix product
and a copy reach at best is measured in the same run. The number of tokens is the same for every sequence length.

Letters: B batch, H query heads, G key/value heads, N queries and as many keys, D width of a head.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from statistics import quantiles
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.interception import Target
from headscope.kernels import reference
from headscope.kernels.backward import Relevance, Rule, stock
from headscope.kernels.problem import Problem, Wanted, make_problem
from headscope.kernels.statistics import NAMES, Statistics

ONE_PASS = frozenset({"lse", "entropy", "p_max", "sum_squares"})
TILE, FEATURES = 64, 16
_WAIT = 1 << 23  # cycles, about 5 ms
# The most that may lie between our numbers and the reference's, both from the same inputs; the output is rounded to its dtype.
TOLERANCES = {"output": 2e-2, "lse": 1e-3, "entropy": 1e-3, "p_max": 1e-3, "sum_squares": 1e-3, "max_score": 1e-3, "received": 1e-2}
BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LABELS = {
    "sdpa-flash": "torch, FLASH_ATTENTION",
    "sdpa-cudnn": "torch, CUDNN_ATTENTION",
    "sdpa-efficient": "torch, EFFICIENT_ATTENTION, keys and values repeated beforehand",
    "flex-lse": "`torch.compile(flex_attention)` with lse",
    "own": "Headscope, output only",
    "own-statistics": "lse, entropy, p_max and sum of squares",
    "own-everything": "all row statistics and 16 features",
    "columns": "received attention and pooled map, as a pass after the forward",
    "map": "whole pattern of one head in float32, as a pass after the forward",
    "backward": "torch's backward (FLASH_ATTENTION where it can)",
    "relevance-stock": "AttnLRP by torch's attention, repeated, and its backward",
    "relevance-fused": "AttnLRP by our kernels",
}


@dataclass(frozen=True)
class Settings:
    """How much is measured; every length has as many prompts as make up `tokens`."""

    widths: tuple[int, ...] = (64, 128)
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    heads: int = 32
    groups: int = 8
    tokens: int = 32768
    checked: int = 1024  # N of the comparison with the reference
    warm_ups: int = 20
    repeats: int = 50
    product: int = 8192  # side of the matrices whose product is timed
    copied: int = 2**30  # bytes
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


QUICK = Settings(lengths=(2048, 8192), warm_ups=5, repeats=10)


class Clock(Protocol):
    """What tells time and memory."""

    def milliseconds(self, run: Callable[[], object]) -> float: ...

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes of memory in use at most during the call, beyond those in use before."""
        ...


class EventClock:
    """CUDA events, the L2 cache flushed before each call, and the device kept waiting until the call has queued its work."""

    def __init__(self) -> None:
        self._flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def milliseconds(self, run: Callable[[], object]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda._sleep(_WAIT)  # without it, what the host does before the first kernel would be counted
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop))

    def peak(self, run: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class WallClock:
    """Time by the wall, no memory: enough to run everything here once without a GPU."""

    def milliseconds(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)

    def peak(self, run: Callable[[], object]) -> int:
        run()
        return 0


@dataclass(frozen=True)
class Spread:
    """Milliseconds of one variant: the median, and the tenth and ninetieth percentile."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f}–{self.high:.3f})"


@dataclass(frozen=True, eq=False)
class Inputs:
    """q [B, H, N, D], k and v [B, G, N, D], a gradient of the output, and features [1, 1, N, 16], from one seed."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor
    features: Tensor
    causal: bool

    @cached_property
    def repeated(self) -> tuple[Tensor, Tensor]:
        """k and v as [B, H, N, D], for a backend that knows no shared heads."""
        heads = self.q.shape[1]
        return reference.repeat_heads(self.k, heads), reference.repeat_heads(self.v, heads)

    @cached_property
    def problem(self) -> Problem:
        return make_problem(self.q, self.k, self.v, causal=self.causal)

    @cached_property
    def with_features(self) -> Problem:
        return make_problem(self.q, self.k, self.v, causal=self.causal, features=self.features)

    @cached_property
    def one_head(self) -> Problem:
        return make_problem(self.q[:1, :1], self.k[:1, :1], causal=self.causal)

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor]:
        """The output, and the lse that a backward pass of our own starts from."""
        from headscope.kernels.triton import launch

        output, found = launch.run(self.problem, Wanted(frozenset({"lse"})))
        assert output is not None
        assert found.lse is not None
        return output, found.lse

    @cached_property
    def graph(self) -> tuple[list[Tensor], Tensor]:
        """Leaves for q, k and v, and torch's fused attention of them, ready to be differentiated."""
        leaves = [tensor.clone().requires_grad_() for tensor in (self.q, self.k, self.v)]
        return leaves, scaled_dot_product_attention(*leaves, is_causal=self.causal, enable_gqa=True)


@dataclass(frozen=True)
class Row:
    """What was measured on one shape.

    Attributes:
        width, length, causal: D, N, and whether a query sees only the keys up to its own.
        batch: prompts.
        spreads: milliseconds by variant.
        beyond: bytes in use at most beyond inputs and outputs, by variant.
        absent: variants that could not be run, and why.
    """

    width: int
    length: int
    causal: bool
    batch: int
    spreads: dict[str, Spread]
    beyond: dict[str, int]
    absent: dict[str, str]

    @property
    def where(self) -> str:
        return f"D {self.width}, N {self.length}, {'causal' if self.causal else 'full'}"

    def over(self, ours: str, theirs: str) -> float | None:
        """The ratio of two medians, None where one is missing; the best backend of torch goes by the name of sdpa."""
        names = [name for name in (BACKENDS if theirs == "sdpa" else [theirs]) if name in self.spreads]
        if ours not in self.spreads or not names:
            return None
        return self.spreads[ours].middle / min(self.spreads[name].middle for name in names)


@dataclass(frozen=True)
class Report:
    """What one run measured on a GPU.

    Attributes:
        name: of the device.
        teraflops: of a product of two large matrices, in the dtype of the inputs.
        bytes_per_second: of a large copy, what is read and what is written counted.
        errors: largest differences from the reference, by name.
        rows: one for each shape.
    """

    name: str
    teraflops: float
    bytes_per_second: float
    errors: dict[str, float]
    rows: list[Row]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def targets(report: Report | None) -> list[Target]:
    """The promises of the GPU; where there is none they are not measured."""
    if report is None:
        places = ("D 128, N 8192, causal", "D 128, N 32768, causal")
        limits = {"one-pass statistics over the best `sdpa`": 1.05, "`columns` over `own`": 0.65, "AttnLRP over `backward`": 1.30}
        return [Target(f"GPU: {promise}", where, None, limit) for where in places for promise, limit in limits.items()] + [
            Target("GPU: copy rate over the rate of the map of one head", places[1], None, 1 / 0.85),
            Target("GPU: MiB of statistics beyond inputs and outputs", places[1], None, 100.0),
        ]
    found = []
    for row in report.rows:
        if row.width != 128 or row.length < 8192:
            continue
        relevance = [ratio for name in ("relevance-stock", "relevance-fused") if (ratio := row.over(name, "backward")) is not None]
        found += [
            Target("GPU: one-pass statistics over the best `sdpa`", row.where, row.over("own-statistics", "sdpa"), 1.05),
            Target("GPU: `columns` over `own`", row.where, row.over("columns", "own"), 0.65),
            Target("GPU: AttnLRP over `backward`", row.where, min(relevance, default=None), 1.30),
        ]
        if row.length == 32768:
            found += [
                Target("GPU: copy rate over the rate of the map of one head", row.where, _map_rate(report, row), 1 / 0.85),
                Target("GPU: MiB of statistics beyond inputs and outputs", row.where, _mebibytes(row, "own-statistics"), 100.0),
            ]
    return found


def to_markdown(report: Report | None) -> list[str]:
    """The section of the GPU, as lines."""
    if report is None:
        return ["## GPU", "", "Not measured: this machine has none that torch can use."]
    lines = [
        "## GPU",
        "",
        f"{report.name}. Milliseconds by events, L2 flushed, median (tenth–ninetieth percentile). In the same run a matrix product reached "
        f"{report.teraflops:.0f} TFLOP/s and a copy {report.bytes_per_second / 1e9:.0f} GB/s, reading and writing counted. Largest "
        "differences from the float64 reference: " + ", ".join(f"{name} {error:.1e}" for name, error in report.errors.items()) + ".",
        "",
    ]
    for row in report.rows:
        lines += [
            f"### {row.where}, {row.batch} prompts",
            "",
            "| name | what is computed | ms | over best `sdpa` | over `own` | MiB beyond |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for name, label in LABELS.items():
            if name not in row.spreads:
                lines.append(f"| `{name}` | {label} | {row.absent.get(name, '–')} | – | – | – |")
                continue
            ratios = [row.over(name, other) for other in ("sdpa", "own")]
            cells = ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            lines.append(f"| `{name}` | {label} | {row.spreads[name]} | {cells[0]} | {cells[1]} | {row.beyond[name] / 2**20:.1f} |")
        lines.append("")
    return lines[:-1]


def run(settings: Settings, clock: Clock | None = None) -> Report:
    """Check, then time everything.

    Raises:
        RuntimeError: our numbers differ from the reference's; nothing has been timed.
    """
    clock = EventClock() if clock is None else clock
    errors = check(settings)
    for name, error in errors.items():
        if not error <= TOLERANCES[name]:
            raise RuntimeError(f"{name} differs from the reference by {error:.1e}, more than {TOLERANCES[name]:.0e}: nothing was timed")
    name = torch.cuda.get_device_name() if settings.device == "cuda" else settings.device
    teraflops, rate = ceilings(settings, clock)
    rows = []
    for width, length, causal in product(settings.widths, settings.lengths, (True, False)):
        batch = max(1, settings.tokens // length)
        inputs = make_inputs(settings, batch, length, width, causal)
        spreads, beyond, absent = measure(variants(inputs), clock, settings.warm_ups, settings.repeats)
        rows.append(Row(width, length, causal, batch, spreads, beyond, absent))
    return Report(name, teraflops, rate, errors, rows)


def make_inputs(settings: Settings, batch: int, length: int, width: int, causal: bool) -> Inputs:
    draw = torch.Generator(settings.device).manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=settings.device).to(settings.dtype)

    q, gradient = (random(batch, settings.heads, length, width) for _ in range(2))
    k, v = (random(batch, settings.groups, length, width) for _ in range(2))
    return Inputs(q, k, v, gradient, random(1, 1, length, FEATURES), causal)


def check(settings: Settings) -> dict[str, float]:
    """Largest differences between our numbers and those of the float64 reference, over all widths."""
    from headscope.kernels.triton import launch

    errors = dict.fromkeys(TOLERANCES, 0.0)
    for width, causal in product(settings.widths, (True, False)):
        problem = make_inputs(settings, 1, settings.checked, width, causal).problem
        wanted = Wanted(frozenset(errors) - {"output"})
        output, ours = launch.run(problem, wanted)
        right, theirs = reference.run(problem, wanted)
        pairs = {"output": (output, right)} | {name: (getattr(ours, name), getattr(theirs, name)) for name in wanted.names}
        for name, (a, b) in pairs.items():
            errors[name] = max(errors[name], float((a.double() - b.double()).abs().max()))
    return errors


def ceilings(settings: Settings, clock: Clock) -> tuple[float, float]:
    """TFLOP/s of a matrix product and bytes per second of a copy, the best of some."""
    side = settings.product
    a = torch.randn(side, side, device=settings.device, dtype=settings.dtype)
    source = torch.empty(settings.copied, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    multiply = min(clock.milliseconds(lambda: a @ a) for _ in range(10))
    copy = min(clock.milliseconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * side**3 / multiply / 1e9, 2 * settings.copied / copy * 1e3


def variants(x: Inputs) -> dict[str, Callable[[], object]]:
    """Everything that is timed on one shape, by the names of `LABELS`."""
    from headscope.kernels.triton import backward, launch

    def fused(name: str) -> Callable[[], object]:
        k, v = x.repeated if name == "sdpa-efficient" else (x.k, x.v)

        def call() -> Tensor:
            with sdpa_kernel(BACKENDS[name]):
                return scaled_dot_product_attention(x.q, k, v, is_causal=x.causal, enable_gqa=k.shape[1] != x.q.shape[1])

        return call

    def ours(problem: Problem, wanted: Wanted) -> Callable[[], object]:
        return lambda: launch.run(problem, wanted)

    frame, frame_of_one = (launch.forward(problem, Wanted(), True)[2] for problem in (x.problem, x.one_head))
    every_row = torch.arange(x.q.shape[2], dtype=torch.int32, device=x.q.device)
    return {
        **{name: fused(name) for name in BACKENDS},
        "flex-lse": _flex(x),
        "own": ours(x.problem, Wanted()),
        "own-statistics": ours(x.problem, Wanted(ONE_PASS)),
        "own-everything": ours(x.with_features, Wanted(frozenset(NAMES) - {"received"})),
        "columns": lambda: launch.columns(x.problem, Wanted(frozenset({"received"}), TILE), frame),
        "map": lambda: launch.rows(x.one_head, every_row, frame_of_one),
        "backward": lambda: torch.autograd.grad(x.graph[1], x.graph[0], x.gradient, retain_graph=True),
        "relevance-stock": lambda: stock(x.problem, *x.forward, x.gradient, Rule(splits=True)),
        "relevance-fused": lambda: backward.backward(x.problem, *x.forward, x.gradient, Rule(splits=True)),
    }


def _flex(x: Inputs) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    length = x.q.shape[2]
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, x.q.device.type) if x.causal else None
    return lambda: compiled(x.q, x.k, x.v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))


def measure(
    runs: dict[str, Callable[[], object]], clock: Clock, warm_ups: int, repeats: int
) -> tuple[dict[str, Spread], dict[str, int], dict[str, str]]:
    """Time variants in turns.

    Returns:
        milliseconds and peak bytes beyond inputs and outputs by variant, and the variants that cannot run here with the reason.
    """
    beyond: dict[str, int] = {}
    absent: dict[str, str] = {}
    for name, call in runs.items():
        try:
            outputs = _nbytes(call())
            beyond[name] = clock.peak(call) - outputs
            for _ in range(warm_ups):
                call()
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            beyond.pop(name, None)
            absent[name] = "cannot run: " + (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")[:160]
    times: dict[str, list[float]] = {name: [] for name in beyond}
    present = list(times)
    for number in range(repeats):
        turn = number % len(present)
        for name in (*present[turn:], *present[:turn]):
            times[name].append(clock.milliseconds(runs[name]))
    spreads = {}
    for name, found in times.items():
        cuts = quantiles(found, n=10, method="inclusive")
        spreads[name] = Spread(cuts[4], cuts[0], cuts[8])
    return spreads, beyond, absent


def _nbytes(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.nbytes
    if isinstance(result, Statistics):
        return _nbytes(result.tensors())
    if isinstance(result, dict):
        return _nbytes(tuple(result.values()))
    if isinstance(result, Relevance):
        return _nbytes((result.q, result.k, result.v, result.rows, result.columns))
    return sum(map(_nbytes, result)) if isinstance(result, (tuple, list)) else 0


def _map_rate(report: Report, row: Row) -> float | None:
    """The copy's bytes per second over those that the map of one head is written with."""
    if "map" not in row.spreads:
        return None
    return report.bytes_per_second * row.spreads["map"].middle / 1e3 / (4 * row.length**2)


def _mebibytes(row: Row, name: str) -> float | None:
    return row.beyond[name] / 2**20 if name in row.beyond else None
