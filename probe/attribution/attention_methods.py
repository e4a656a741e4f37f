"""Attribution methods that read attention: raw weights, rollout, flow, weights times gradients, value-zeroing.

They follow one stream of positions through self-attention, and tell how much of each first position reaches the positions that the
target reads. Their scale is that of attention, not of the target.

Letters: B batch, H query heads, N positions, Q queries, K keys, V width of a value, E width of the stream, L layers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import AttributionError, NotIntercepted, SelectionError
from headscope.probe.attribution.question import Answer, Question, at_least, copied, needs
from headscope.probe.attribution.target import one_number
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception.intercept import intercept

OVER = ("last", "mean")
CELLS = 10**9  # the whole of a flow, in the whole numbers that its solver counts in
SCALE = "attention tells where heads look, not what the output was made of: its numbers are not in the unit of the target"


def attention(question: Question, *, over: str = "last") -> Answer:
    """Attention that the positions read by the target pay to each position, mean over heads.

    Args:
        question: what is asked.
        over: the `last` layer, or the `mean` of all.
    """
    if over not in OVER:
        raise SelectionError(f"no attention over {over!r}: there are {', '.join(OVER)}")
    stream = SingleStream.of(question)
    layers = stream.means()
    return _answer(question, stream, stream.read(layers[-1] if over == "last" else torch.stack(layers).mean(0)), {"over": over})


def rollout(question: Question) -> Answer:
    """Products of attention and the residual stream over all layers (Abnar & Zuidema 2020, section 3)."""
    stream = SingleStream.of(question)
    return _answer(question, stream, stream.read(rolled([with_residual(layer) for layer in stream.means()])), {})


def flow(question: Question) -> Answer:
    """The largest flow from the positions that the target reads to each first position, layers as pipes (Abnar & Zuidema 2020, section 3).

    One maximum flow a position: slow beyond some hundred positions. Several positions that are read are one source together.
    """
    stream = SingleStream.of(question)
    layers = [with_residual(layer) for layer in stream.means()]
    found = torch.stack([
        torch.tensor(_flows([layer[b].cpu() for layer in layers], row.nonzero().flatten().tolist()), dtype=torch.float64)
        for b, row in enumerate(stream.rows.cpu())
    ])  # fmt: skip
    return _answer(question, stream, found, {})


def chefer(question: Question) -> Answer:
    """Attention times its gradient, positive part, mean over heads, rolled out over layers (Chefer et al. 2021, equations 5 and 6).

    The identity with which the product begins is taken off again, so that a position which is read has no relevance for that alone.
    """
    stream = SingleStream.of(question)
    gradients = torch.autograd.grad(stream.value, stream.patterns, allow_unused=True)
    one = torch.eye(stream.positions, dtype=stream.patterns[0].dtype, device=stream.patterns[0].device)
    relevance = one.expand(question.batch, -1, -1)
    for pattern, gradient in zip(stream.patterns, gradients, strict=True):
        if gradient is not None:
            relevance = relevance + (pattern.detach() * gradient).clamp(min=0).mean(1) @ relevance
    return _answer(question, stream, stream.read(relevance - one), {})


def value_zeroing(question: Question, *, batch: int = 32) -> Answer:
    """How far each position's output of a block turns when one position's values are zero, rolled out (Mohebbi et al. 2023, section 3).

    The distance is 1 - cosine, each row normalised to 1. One forward for each block and position.

    Args:
        question: what is asked.
        batch: positions run together.
    """
    at_least(1, batch=batch)
    stream = SingleStream.of(question)
    rows = []
    for place, sample in enumerate(question.samples()):
        layers = [_turned(sample, site, stream.positions, batch) for site in stream.sites]
        rows.append(
            torch.einsum(
                "q,qk->k", stream.weights[place].cpu(), rolled([layer / layer.sum(-1, keepdim=True).clamp(min=1e-300) for layer in layers])
            )
        )
    return _answer(question, stream, torch.stack(rows), {"forwards": len(stream.sites) * stream.positions * question.batch})


# -- the stream --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Patterns:
    """An interception handler that keeps every pattern and the last z, attached to the graph."""

    calls: list[tuple[AttentionSite, Tensor]] = field(default_factory=list)
    z: Tensor | None = None
    changes: bool = False

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"pattern", "z"})

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        if call.recomputed:
            return value
        alias = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        if stage == "pattern":
            self.calls.append((call.site, alias))
        else:
            self.z = alias
        return alias

    def see(self, call: AttentionCall) -> None:
        pass


@dataclass(frozen=True, eq=False)
class SingleStream:
    """One stream of positions: its patterns [B, H, N, N] in execution order, the target's value, and which positions the target reads.

    Attributes:
        rows: [B, N] bool, the positions whose output of the last attention has a gradient from the target.
    """

    sites: tuple[AttentionSite, ...]
    patterns: tuple[Tensor, ...]
    value: Tensor
    rows: Tensor

    @classmethod
    def of(cls, question: Question) -> SingleStream:
        """Run the model once and read the stream off its attention.

        Raises:
            AttributionError: attention between two streams, in windows, or over sequences of changing length.
            NotIntercepted: no attention was caught.
        """
        handler = Patterns()
        with intercept(question.model, handler):
            value = one_number(question.read(question.model(**question.inputs)).sum())
        if not handler.calls or handler.z is None:
            raise NotIntercepted("no attention with a pattern was caught in this model")
        sizes = {pattern.shape[-2:] for _, pattern in handler.calls}
        other = next((site for site, _ in handler.calls if site.kind != "self"), None)
        if other is not None or len(sizes) > 1 or len({*next(iter(sizes))}) > 1 or handler.calls[0][1].shape[0] != question.batch:
            what = f"{other.name} is {other.kind} attention" if other else f"patterns are {', '.join(str(list(s)) for s in sizes)}"
            raise AttributionError(
                f"attention methods follow one stream of positions through self-attention; here {what}: choose another method"
            )
        (gradient,) = torch.autograd.grad(value, [handler.z], retain_graph=True, allow_unused=True)
        if gradient is None or not bool((gradient != 0).any()):
            raise AttributionError("the target reads no position of the last attention: its gradient there is zero")
        rows = (gradient != 0).any(-1).any(1)  # [B, Q]
        return cls(tuple(site for site, _ in handler.calls), tuple(pattern for _, pattern in handler.calls), value, rows)

    @property
    def positions(self) -> int:
        """N."""
        return int(self.patterns[0].shape[-1])

    @property
    def weights(self) -> Tensor:
        """[B, N] in float64, equal among the positions that are read, summing to 1."""
        return self.rows.double() / self.rows.double().sum(-1, keepdim=True)

    def means(self) -> list[Tensor]:
        """[B, N, N] in float64 for every layer, mean over heads."""
        return [pattern.detach().double().mean(1) for pattern in self.patterns]

    def read(self, relevance: Tensor) -> Tensor:
        """[B, N]: of [B, N, N], the mean of the rows that the target reads."""
        return torch.einsum("bq,bqk->bk", self.weights, relevance.double())


def with_residual(layer: Tensor) -> Tensor:
    """Half attention, half identity: what a block passes on, rows summing to 1."""
    mixed = 0.5 * layer + 0.5 * torch.eye(layer.shape[-1], dtype=layer.dtype, device=layer.device)
    return mixed / mixed.sum(-1, keepdim=True)


def rolled(layers: list[Tensor]) -> Tensor:
    """The product of [..., N, N], the last layer leftmost."""
    product = layers[0]
    for layer in layers[1:]:
        product = layer @ product
    return product


def _flows(layers: list[Tensor], rows: list[int]) -> list[float]:
    """Maximum flow from `rows` above to each position below, through [N, N] capacities; 1 is what leaves one row."""
    sparse, graph = needs("scipy.sparse", "flow"), needs("scipy.sparse.csgraph", "flow")
    n, whole = layers[0].shape[-1], CELLS // len(rows)
    source = n * (len(layers) + 1)
    starts, ends, sizes = [source] * len(rows), [n * len(layers) + row for row in rows], [whole] * len(rows)
    for depth, layer in enumerate(layers):
        capacity = (layer * whole).round().long()
        upper, lower = capacity.nonzero(as_tuple=True)
        starts += (upper + n * (depth + 1)).tolist()
        ends += (lower + n * depth).tolist()
        sizes += capacity[upper, lower].tolist()
    network = sparse.csr_matrix((sizes, (starts, ends)), shape=(source + 1, source + 1), dtype="int32")
    return [graph.maximum_flow(network, source, place).flow_value / whole / len(rows) for place in range(n)]


# -- value-zeroing -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Zeroing:
    """An interception handler: sample b of the batch loses the value of position `places[b]` at one site."""

    name: str
    places: list[int]
    changes: bool = True

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"v"}) if site.name == self.name else frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        changed = value.clone()
        changed[torch.arange(len(self.places)), :, self.places] = 0
        return changed

    def see(self, call: AttentionCall) -> None:
        pass


def _turned(question: Question, site: AttentionSite, positions: int, batch: int) -> Tensor:
    """[N, N] in float64: 1 - cosine between a position's output of the block (row), and that without a position's value (column)."""
    match = re.match(r"(.*?(?:^|\.)\d+)(?=\.|$)", site.module)
    block = question.model.get_submodule(match[1] if match else site.module)
    whole = _output(question, block, 1)[0]
    found = torch.empty(positions, positions, dtype=torch.float64)
    for start in range(0, positions, batch):
        places = list(range(start, min(start + batch, positions)))
        with intercept(question.model, _Zeroing(site.name, places)):
            without = _output(question, block, len(places))  # [n, N, E]
        found[:, places] = 1 - nn.functional.cosine_similarity(without, whole, dim=-1).T.cpu()
    return found.clamp(min=0)


def _output(question: Question, block: nn.Module, count: int) -> Tensor:
    """[count, N, E] in float64, what a block gives out for copies of one sample."""
    kept: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        kept.append((result[0] if isinstance(result, tuple | list) else result).detach().double())

    handle = block.register_forward_hook(note)
    try:
        with torch.no_grad():
            question.model(**{name: copied(value, count, 1) for name, value in question.inputs.items()})
    finally:
        handle.remove()
    return kept[-1]


# -- from positions to inputs ------------------------------------------------------------------------------------------


def _answer(question: Question, stream: SingleStream, relevance: Tensor, settings: dict[str, object]) -> Answer:
    read = [row.nonzero().flatten().tolist() for row in stream.rows]
    return Answer(at_inputs(question, relevance), {**settings, "positions_read": read}, (SCALE,))


def at_inputs(question: Question, relevance: Tensor) -> dict[str, Tensor]:
    """[B, N] to the input that the positions are of: tokens themselves; an image's patches, each spread evenly over its pixels.

    Positions before the patches (class tokens, registers) are left out.

    Raises:
        AttributionError: the positions are those of no input.
    """
    n = relevance.shape[-1]
    for name, ids in question.indices.items():
        if ids.dim() == 2 and ids.shape[1] == n:
            return {name: relevance}
    images = [name for name, value in question.floats.items() if value.dim() == 4]
    if len(images) == 1 and not any(name.endswith("input_ids") for name in question.indices):
        image = question.floats[images[0]]
        rows, columns = _grid(question.model, image, n)
        patches = relevance[:, n - rows * columns :].reshape(-1, 1, rows, columns)
        high, wide = image.shape[-2] // rows, image.shape[-1] // columns
        spread = patches.repeat_interleave(high, -2).repeat_interleave(wide, -1) / (high * wide * image.shape[1])
        spread = nn.functional.pad(spread, (0, image.shape[-1] - spread.shape[-1], 0, image.shape[-2] - spread.shape[-2]))
        return {images[0]: spread.expand(image.shape).clone()}
    for name, value in question.floats.items():
        if value.dim() == 3 and value.shape[1] == n:
            return {name: relevance[..., None].expand(value.shape) / value.shape[-1]}
    raise AttributionError(
        f"attention runs over {n} positions, which are those of none of the inputs {', '.join(question.inputs)}: choose another method"
    )


def _grid(model: nn.Module, image: Tensor, positions: int) -> tuple[int, int]:
    """Rows and columns of patches: by the convolution that cuts them, else a square with a few positions before it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size and module.in_channels == image.shape[1]:
            rows, columns = image.shape[-2] // module.stride[0], image.shape[-1] // module.stride[1]
            if 0 < rows * columns <= positions:
                return rows, columns
    for before in range(min(9, positions)):
        side = math.isqrt(positions - before)
        if side * side == positions - before and image.shape[-2] % side == 0 and image.shape[-1] % side == 0:
            return side, side
    raise AttributionError(f"{positions} positions of an image of {list(image.shape[-2:])} pixels: how patches lie in it cannot be told")
