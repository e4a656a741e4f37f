"""What SafeRoPE costs at inference: its rotation next to one layer's attention and to a matrix exponential for each token; and what
plans of bias, scale and rotation cost a whole model, whose attention stays fused.

CPU time of one thread, all ways in turns within each round; a ratio is one way's time over that of the untouched layer or model in the same
round, and the median over the rounds counts. The layer's attention is the fused call alone, without projections, so a ratio is the largest
that a model could show.

Letters: H heads, S tokens, D width, R rank.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bench.health import Shape as ModelShape
from bench.health import built, ids_of
from bench.interception import Progress, Target, Timing, over
from bench.machine import Machine, this_machine
from headscope.interventions import Edit, Plan, bias, gates, rotate, scale, select

BASE = "plain"
LAYER_LIMIT, MODEL_LIMIT = 1.05, 1.15
MODEL_RANK = 4
Ways: TypeAlias = "dict[str, Callable[[], object]]"
DISTRIBUTIONS = ("headscope", "torch", "transformers")


@dataclass(frozen=True)
class Shape:
    """Of the layer, by default that of FLUX.1 at 1024 × 1024 pixels."""

    heads: int = 24
    tokens: int = 4608
    text: int = 512
    width: int = 128
    rank: int = 5


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        layer: of the first table.
        model: of the second.
        tokens: that the model reads.
        rounds: of the first table and of the second.
    """

    layer: Shape
    model: ModelShape
    tokens: int
    rounds: tuple[int, int]


FULL = Settings(Shape(), ModelShape(positions=1024), 1024, (5, 7))
QUICK = Settings(Shape(heads=4, tokens=1024, text=128), ModelShape(layers=2, heads=4, width=128, positions=128), 128, (3, 3))


class Attention(nn.Module):
    """One layer's attention on queries, keys and values that are there already."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        size = (1, shape.heads, shape.tokens, shape.width)
        self.q, self.k, self.v = (torch.randn(size, generator=random) for _ in range(3))

    def forward(self, q: Tensor | None = None, k: Tensor | None = None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q if q is None else q, self.k if k is None else k, self.v)


@dataclass(frozen=True, eq=False)
class Turned:
    """Subspaces U [H, D, R], rotations A [H, R, R] and thresholds [H]: about half of the tokens of white noise are above theirs."""

    basis: Tensor
    skew: Tensor
    threshold: Tensor

    @classmethod
    def drawn(cls, shape: Shape) -> Turned:
        random = torch.Generator().manual_seed(1)
        basis = torch.linalg.qr(torch.randn(shape.heads, shape.width, shape.rank, generator=random)).Q
        matrix = torch.randn(shape.heads, shape.rank, shape.rank, generator=random)
        return cls(basis, matrix - matrix.mT, torch.full((shape.heads,), shape.rank / shape.width))

    def plan(self, text: int | None = None) -> Plan:
        """The rotation of queries and keys, of all tokens or of the first ones."""
        rows = None if text is None else slice(text)
        op, gate = rotate(self.basis, self.skew), gates.risk(self.basis, self.threshold)
        return Plan([Edit("q", op, select(queries=rows), gate), Edit("k", op, select(keys=rows), gate)])

    def by_exponentials(self, x: Tensor) -> Tensor:
        """The same with a matrix exponential for each token and head, as the released code does it."""
        c = x @ self.basis  # [B, H, S, R]
        risk = c.square().sum(-1) / x.square().sum(-1)
        gate = risk * (risk > self.threshold[:, None])
        turns = torch.linalg.matrix_exp(gate[..., None, None] * self.skew[:, None])  # [B, H, S, R, R]
        return x + ((turns @ c[..., None])[..., 0] - c) @ self.basis.mT


def layer_labels(shape: Shape) -> dict[str, str]:
    """What is done to a layer, by the name of the way."""
    return {
        BASE: "fused attention of one layer",
        "again": "the same once more: the noise of this table",
        "all tokens": "gated rotation of queries and keys of all tokens",
        "text tokens": f"of the {shape.text} text tokens alone",
        "matrix-exp": "all tokens, a matrix exponential for each token and head",
    }


def layer_ways(shape: Shape) -> Ways:
    """How it is done."""
    layer, turned = Attention(shape), Turned.drawn(shape)

    def planned(plan: Plan) -> None:
        with plan.on(layer):
            layer()

    return {
        BASE: layer,
        "again": layer,
        "all tokens": partial(planned, turned.plan()),
        "text tokens": partial(planned, turned.plan(shape.text)),
        "matrix-exp": lambda: layer(turned.by_exponentials(layer.q), turned.by_exponentials(layer.k)),
    }


MODEL_LABELS = {
    BASE: "the model untouched",
    "again": "the same once more: the noise of this table",
    "bias": "`bias(-2.0)` on two keys, all layers and heads",
    "scale": "`scale(0.5)` on `z` of two heads of every layer",
    "rotate": f"gated rotation of rank {MODEL_RANK} of `q` and `k`, all layers, heads and tokens",
    "all three": "together",
}


def model_ways(shape: ModelShape, tokens: int) -> Ways:
    """What is done to a whole model, by the names above."""
    model: Any = built(shape, "sdpa")
    ids = ids_of(tokens)
    random = torch.Generator().manual_seed(1)
    width, rank = shape.width // shape.heads, MODEL_RANK
    basis = torch.linalg.qr(torch.randn(shape.heads, width, rank, generator=random)).Q
    matrix = torch.randn(shape.heads, rank, rank, generator=random)
    op, gate = rotate(basis, matrix - matrix.mT), gates.risk(basis, rank / width)
    edits = {
        "bias": [Edit("scores", bias(-2.0), select(keys=[1, 2]))],
        "scale": [Edit("z", scale(0.5), select(heads=[0, 1]))],
        "rotate": [Edit("q", op, select(), gate), Edit("k", op, select(), gate)],
    }

    def run() -> None:
        model(input_ids=ids, use_cache=False)

    def planned(plan: Plan) -> None:
        with plan.on(model):
            run()

    plans = {**{name: Plan(some) for name, some in edits.items()}, "all three": Plan([edit for some in edits.values() for edit in some])}
    return {BASE: run, "again": run, **{name: partial(planned, plan) for name, plan in plans.items()}}


def measure(ways: Ways, rounds: int, progress: Progress | None = None) -> dict[str, Timing]:
    """Time all ways in turns; in each round another one comes first."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for run in ways.values():
            run()  # first runs allocate
        for number in range(rounds):
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                gc.collect()
                start = time.process_time()
                ways[name]()
                seconds[name].append(time.process_time() - start)
            if progress is not None:
                progress.step(1, f"round {number + 1}/{rounds}")
    base = seconds[BASE]
    return {name: Timing(tuple(found), tuple(a / b for a, b in zip(found, base, strict=True))) for name, found in seconds.items()}


@dataclass(frozen=True)
class Report:
    """Everything that one run measured: timings by way, of the layer and of the model."""

    machine: Machine
    settings: Settings
    layer: dict[str, Timing]
    model: dict[str, Timing]

    def targets(self) -> list[Target]:
        """The promises."""
        shape = self.settings.layer
        where = f"{shape.heads} heads × {shape.tokens} tokens × {shape.width}, rank {shape.rank}"
        found = [
            Target(f"SafeRoPE on {name} over the layer's attention", where, self.layer[name].middle, LAYER_LIMIT)
            for name in ("all tokens", "text tokens")
        ]
        exponentials = over(self.layer["all tokens"], self.layer["matrix-exp"])
        found.append(Target("SafeRoPE over a matrix exponential for each token", where, exponentials, 1.0))
        found += [
            Target(f"`{name}` plan over untouched", f"{self.settings.tokens} tokens", timing.middle, MODEL_LIMIT)
            for name, timing in self.model.items()
            if name not in (BASE, "again")
        ]
        return found

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "machine": self.machine.to_dict(), "settings": asdict(self.settings),
            "layer": {name: timing.to_dict() for name, timing in self.layer.items()},
            "model": {name: timing.to_dict() for name, timing in self.model.items()},
            "targets": [{**asdict(target), "verdict": target.verdict} for target in self.targets()],
        }  # fmt: skip

    def to_markdown(self) -> str:
        """Two tables, then the promises."""
        layer, model = self.settings.layer, self.settings.model
        lines = [
            "# Cost of SafeRoPE, and of plans that keep fused attention", "",
            f"The layer: {layer.heads} heads × {layer.tokens} tokens × {layer.width}, rank {layer.rank}, every head edited, float32, CPU. "
            "Times are CPU time of one thread over that of the fused attention alone in the same round: median (lowest–highest). "
            "`python -m bench saferope` measures again.", "",
            str(self.machine), "",
            *_table(layer_labels(layer), self.layer), "",
            f"The model: a GPT-2 of {model.layers} layers × {model.heads} heads, width {model.width}, random weights, "
            f"{self.settings.tokens} tokens, no cache.", "",
            *_table(MODEL_LABELS, self.model), "",
            "| promise | where | measured | limit | |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for t in self.targets():
            measured = "–" if t.measured is None else f"{t.measured:.3f}"
            lines.append(f"| {t.promise} | {t.where} | {measured} | ≤ {t.limit:.2f} | {t.verdict} |")
        return "\n".join(lines) + "\n"


def _table(labels: dict[str, str], timings: dict[str, Timing]) -> list[str]:
    lines = ["| name | what is done | ms | ratio |", "|---|---|---|---|"]
    for name, timing in timings.items():
        ratio = f"{timing.middle:.3f} ({min(timing.ratios):.3f}–{max(timing.ratios):.3f})"
        lines.append(f"| {name} | {labels[name]} | {1000 * median(timing.seconds):.0f} | {ratio} |")
    return lines


def run(settings: Settings = FULL) -> Report:
    """The whole benchmark."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine = this_machine(DISTRIBUTIONS)
        progress = Progress(sum(settings.rounds))
        layer = measure(layer_ways(settings.layer), settings.rounds[0], progress)
        return Report(machine, settings, layer, measure(model_ways(settings.model, settings.tokens), settings.rounds[1], progress))
    finally:
        torch.set_num_threads(threads)
