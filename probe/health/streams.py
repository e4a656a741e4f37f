"""Hidden states: how different the tokens still are at the input and the output of every block.

Letters: B batch, N tokens, d width of a hidden state, n tokens of one sample that count.

    with watched_states(model) as states:
        model(**inputs)
    states["model.layers.3", "output", 3, 0]  # [B, N, d]

A block is the module in whose list the layers stand: `model.layers.3`. Only blocks in which attention was seen are watched. Maps of an
image or a grid, [B, H, W, d] and [B, d, H, W], are tokens in reading order.

All numbers are computed in float64 from the states in their own precision. Singular values come from the smaller Gram matrix, so those
below about 1e-8 of the largest are rounding; the states' own rounding is larger. Where the tokens differ by less than 10 eps of the
dtype, what is left is rounding too: the residual is given as that floor and no rank is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import ShapeError
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.health.measures import STREAM_FIELDS, StreamMeasures
from headscope.probe.interception.intercept import check_model, intercept
from headscope.probe.interception.place import clean_path

Key = tuple[str, str, int, int]  # path of the block, place, layer, stream

ONE_TOKEN = "fewer than two tokens"
ALL_ZERO = "the hidden states are all 0"
NOT_FINITE = "NaN or infinity in the hidden states"
FLOOR = "the tokens differ by less than the dtype resolves"

_NUMBERED = re.compile(r"(?:.*_)?(\d+)")  # layers.3, but also encoder_layer_3
_CENTRED = ("cosine_centred", "effective_rank_centred", "stable_rank_centred", "participation_centred")
_RANKS = ("effective_rank", "stable_rank", "participation")


@dataclass(frozen=True, eq=False)
class State:
    """The hidden state at one place, as it was when it came by: detached, and a copy.

    Attributes:
        name: path of the block.
        place: `input` or `output`.
        layer: number of the block.
        stream: which of several.
        states: [B, N, d].
        before: [B, N, d], the state before this block; None where none of this shape was seen.
        update: [B, N, d], what attention gave; likewise.
    """

    name: str
    place: str
    layer: int
    stream: int
    states: Tensor
    before: Tensor | None = None
    update: Tensor | None = None

    @property
    def key(self) -> Key:
        return self.name, self.place, self.layer, self.stream


@torch.no_grad()
def measure_stream(
    states: Tensor,
    tokens: Tensor | None = None,
    *,
    name: str = "",
    place: str = "output",
    layer: int = 0,
    stream: int = 0,
    before: Tensor | None = None,
    update: Tensor | None = None,
) -> StreamMeasures:
    """The numbers of hidden states at one place, means over the samples, weighted by their tokens.

    Args:
        states: [B, N, d].
        tokens: [B, N], bool, the tokens that count; None for all.
        name, place, layer, stream: where it is.
        before: [B, N, d], the state one block before.
        update: [B, N, d], what attention gave to it.

    Raises:
        ShapeError: tensors that do not fit together.
    """
    if states.dim() != 3 or not states.is_floating_point():
        raise ShapeError(f"the hidden states are {list(states.shape)} of {states.dtype}; give floating-point [B, N, d]")
    for what, other in (("before", before), ("update", update)):
        if other is not None and other.shape != states.shape:
            raise ShapeError(f"{what} is {list(other.shape)} beside hidden states {list(states.shape)}; they must be equal")
    if tokens is not None and tokens.shape != states.shape[:2]:
        raise ShapeError(f"tokens are {list(tokens.shape)} beside hidden states {list(states.shape)}; give bool [B, N]")
    samples: list[StreamMeasures] = []
    for sample, x in enumerate(states):
        chosen = torch.ones(len(x), dtype=torch.bool, device=x.device) if tokens is None else tokens[sample].to(x.device)
        numbers, why, floored = _sample(x[chosen])
        one, reasons = _beside(x[chosen], *(None if other is None else other[sample][chosen] for other in (before, update)))
        numbers |= one
        samples.append(
            StreamMeasures(
                name,
                place,
                layer,
                stream,
                int(chosen.sum()),
                states.shape[2],
                str(states.dtype).removeprefix("torch."),
                floored=floored,
                undefined=why | reasons,
                **numbers,
            )  # fmt: skip
        )
    return average_streams(samples)


def average_streams(found: Sequence[StreamMeasures]) -> StreamMeasures:
    """One measure of a place from those of several samples or calls, weighted by their tokens."""
    first = found[0]
    numbers: dict[str, float] = {}
    why: dict[str, str] = {}
    for name in STREAM_FIELDS:
        there = [(getattr(one, name), one.tokens) for one in found if not math.isnan(getattr(one, name))]
        broken = any(one.undefined.get(name) == NOT_FINITE for one in found)
        if there and not broken:
            numbers[name] = sum(value * weight for value, weight in there) / sum(weight for _, weight in there)
        else:
            numbers[name] = math.nan
            why[name] = NOT_FINITE if broken else next((one.undefined[name] for one in found if name in one.undefined), ONE_TOKEN)
    return StreamMeasures(
        first.name, first.place, first.layer, first.stream, sum(one.tokens for one in found), first.width, first.dtype,
        floored=any(one.floored for one in found), undefined=why, **numbers,
    )  # fmt: skip


def _sample(x: Tensor) -> tuple[dict[str, float], dict[str, str], bool]:
    """The numbers of one sample [n, d] alone, why some are not there, and whether the residual is at the floor."""
    names = [name for name in STREAM_FIELDS if name not in ("update", "step_cosine", "rank_limit")]
    limit = {"rank_limit": float(min(len(x) - 1, x.shape[1]))}
    if len(x) < 2:
        return {}, dict.fromkeys((*names, "rank_limit"), ONE_TOKEN), False
    floor = 10 * torch.finfo(x.dtype).eps
    x = x.double()
    if not bool(torch.isfinite(x).all()):
        return limit, dict.fromkeys(names, NOT_FINITE), False
    largest = float(x.abs().max())
    if largest == 0:
        return limit, dict.fromkeys(names, ALL_ZERO), False
    x = x / largest  # every number is one of the shape alone; the squares of bfloat16 may overflow
    mean = x.mean(dim=0)
    apart = x - mean
    squares, rest = float(x.square().sum()), float(apart.square().sum())
    found = limit | {"residual": math.sqrt(rest / squares), "residual_composite": _composite(apart) / _composite(x)}
    why: dict[str, str] = {}
    found["cosine"] = _cosine(x)
    if math.isnan(found["cosine"]):
        why["cosine"] = "fewer than two tokens with a hidden state that is not 0"
    if found["residual"] < floor:
        found["residual"], found["residual_composite"] = floor, max(floor, found["residual_composite"])
        return found, why | dict.fromkeys((*_CENTRED, *_RANKS), FLOOR), True
    found["cosine_centred"] = _cosine(apart)
    if math.isnan(found["cosine_centred"]):
        why["cosine_centred"] = "fewer than two tokens away from the mean one"
    wide = x.shape[1] >= x.shape[0]
    gram = apart @ apart.mT if wide else apart.mT @ apart
    whole = x @ x.mT if wide else gram + len(x) * torch.outer(mean, mean)
    for suffix, matrix in (("_centred", gram), ("", whole)):
        spread = torch.linalg.eigvalsh(matrix)
        spread = spread.masked_fill(spread < spread[-1] * len(matrix) * torch.finfo(torch.float64).eps, 0.0)
        total = spread.sum()
        share = spread.sqrt() / spread.sqrt().sum()
        found["effective_rank" + suffix] = float(torch.special.entr(share).sum().exp())
        found["stable_rank" + suffix] = float(total / spread[-1])
        found["participation" + suffix] = float(total.square() / spread.square().sum())
    return found, why, False


def _composite(x: Tensor) -> float:
    """√(‖X‖₁ ‖X‖_∞), the largest column sum and the largest row sum of |x|."""
    size = x.abs()
    return math.sqrt(float(size.sum(dim=0).max()) * float(size.sum(dim=1).max()))


def _cosine(x: Tensor) -> float:
    """Mean cosine of two different rows: (‖Σ x̂‖² - n) / (n (n - 1)); rows of 0 have none."""
    length = x.norm(dim=1, keepdim=True)
    there = length[:, 0] > 1e-14 * length.max()
    count = int(there.sum())
    if count < 2:
        return math.nan
    return float(((x[there] / length[there]).sum(dim=0).square().sum() - count) / (count * (count - 1)))


def _beside(x: Tensor, before: Tensor | None, update: Tensor | None) -> tuple[dict[str, float], dict[str, str]]:
    """What relates the states of one sample to those before the block and to what attention gave."""
    found: dict[str, float] = {}
    why: dict[str, str] = {}
    old = None if before is None else before.double()
    if old is None:
        why["step_cosine"] = why["update"] = "the hidden state before the block was not seen"
        return found, why
    given = None if update is None else update.double()
    size = old.norm(dim=1)
    both = size * x.double().norm(dim=1)
    product = (x.double() * old).sum(dim=1)
    _mean_of("step_cosine", product, both, found, why)
    if given is None:
        why["update"] = "the attention's output was not seen, or has another shape"
    else:
        _mean_of("update", given.norm(dim=1), size, found, why)
    return found, why


def _mean_of(name: str, above: Tensor, below: Tensor, found: dict[str, float], why: dict[str, str]) -> None:
    """The mean of a quotient over the tokens where it is one."""
    if not bool(torch.isfinite(above).all() & torch.isfinite(below).all()):
        why[name] = NOT_FINITE
    elif not bool((below > 0).any()):
        why[name] = ALL_ZERO if len(below) else "no token counts"
    else:
        found[name] = float((above / below)[below > 0].mean())


# -- catching them -----------------------------------------------------------------------------------------------------


@contextmanager
def watched_states(model: nn.Module) -> Iterator[dict[Key, Tensor]]:
    """The hidden states of one forward, [B, N, d] by place, as they come; of several forwards the last."""
    states: dict[Key, Tensor] = {}

    def keep(state: State) -> None:
        states[state.key] = state.states

    with watch_states(model, keep):
        yield states


@contextmanager
def watch_states(model: nn.Module, consume: Callable[[State], None]) -> Iterator[None]:
    """Hand every hidden state before the first block of a list, and after each block, to `consume`, as it comes.

    The model is as it was afterwards, also after an exception.

    Raises:
        NotIntercepted: `model` is not a torch module.
    """
    watch = _Watch(check_model(model), consume)
    with ExitStack() as stack:
        stack.callback(watch.forget)
        for path, module in watch.modules.items():
            inside = any(path.startswith(f"{block}.") for block in watch.numbered)
            if path in watch.numbered:
                stack.callback(module.register_forward_pre_hook(watch.begin(path), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(watch.end(path)).remove)
            if inside or path in watch.numbered:
                stack.callback(module.register_forward_hook(watch.inside(path)).remove)
        stack.enter_context(intercept(model, watch, strict=False))
        yield


@dataclass(eq=False)
class _Watch:
    """An interception handler that learns which blocks attend, and the hooks that see what goes into them and comes out."""

    model: nn.Module
    consume: Callable[[State], None]
    changes: bool = False
    modules: dict[str, nn.Module] = field(default_factory=dict)
    numbered: set[str] = field(default_factory=set)
    _inputs: dict[str, list[Tensor]] = field(default_factory=dict)  # of the blocks that are running
    _blocks: dict[str, AttentionSite] = field(default_factory=dict)  # blocks that have attended in this run, with their first site
    _axes: dict[str, tuple[int, int]] = field(default_factory=dict)  # B and Q of that
    _updates: dict[str, Tensor] = field(default_factory=dict)
    _last: dict[str, str] = field(default_factory=dict)  # a list of blocks -> the block that ran last

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            self.modules.setdefault(clean_path(name), module)
        for path, module in self.modules.items():
            if _NUMBERED.fullmatch(path.rpartition(".")[2]) and next(module.children(), None) is not None:
                self.numbered.add(path)

    def forget(self) -> None:
        """Let go of what belongs to a run."""
        for kept in (self._inputs, self._blocks, self._axes, self._updates, self._last):
            kept.clear()

    # as a handler

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        return value

    def see(self, call: AttentionCall) -> None:
        block = None if call.recomputed else self.block_of(call.site.module)
        if block is not None and block not in self._blocks:
            self._blocks[block] = call.site
            self._axes[block] = (call.q.shape[0], call.queries)

    def block_of(self, module: str) -> str | None:
        """The module of the layer a path stands in: up to its last number, but where a list holds parts of different kinds, as of a
        layer of an encoder-decoder model, up to the number before."""
        parts = module.split(".")
        ends = [i for i, part in enumerate(parts) if _NUMBERED.fullmatch(part) and ".".join(parts[: i + 1]) in self.numbered]
        for end in reversed(ends):
            siblings = self.modules[".".join(parts[:end])].children()
            if len({type(one) for one in siblings}) == 1:
                return ".".join(parts[: end + 1])
        return ".".join(parts[: ends[-1] + 1]) if ends else None

    # as hooks

    def begin(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = [kwargs[name] for name in ("hidden_states", "x", "src", "tgt") if name in kwargs]
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._inputs[path] = [one.detach().clone() for one in (*named, *args, *kwargs.values()) if _is_state(one)]
            self._blocks.pop(path, None)
            self._updates.pop(path, None)

        return hook

    def inside(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for block, site in self._blocks.items():
                if site.module == path != block and block not in self._updates:
                    found = _tensors(output)
                    if found:
                        with torch.no_grad(), torch._C.DisableTorchFunction():
                            self._updates[block] = found[0].detach().clone()

        return hook

    def end(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inputs, update, site = self._inputs.pop(path, []), self._updates.pop(path, None), self._blocks.pop(path, None)
            if site is None:
                return
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._report(path, site, [one.detach().clone() for one in _tensors(output)], inputs, update)

        return hook

    def _report(self, path: str, site: AttentionSite, outputs: list[Tensor], inputs: list[Tensor], update: Tensor | None) -> None:
        layer = site.layer
        number = _NUMBERED.fullmatch(path.rpartition(".")[2])
        if layer is None:
            layer = int(number[1]) if number else 0
        stack = path.rpartition(".")[0]
        first = self._last.get(stack) is None or self._last[stack] == path
        self._last.setdefault(stack, path)
        attended = None if update is None else self._tokens(update, path, site)
        for stream, output in enumerate(outputs):
            states = self._tokens(output, path, site)
            if states is None:
                continue
            place = next((i for i, one in enumerate(inputs) if one.shape == output.shape), None)
            before = None if place is None else self._tokens(inputs.pop(place), path, site)
            given = attended if attended is not None and attended.shape == states.shape and stream == 0 else None
            if first and before is not None:
                self.consume(State(path, "input", layer, stream, before))
            self.consume(State(path, "output", layer, stream, states, before, given))

    def _tokens(self, x: Tensor, path: str, site: AttentionSite) -> Tensor | None:
        """A hidden state as [B, N, d]; None where it is not clear how it is one."""
        batch, queries = self._axes.get(path, (0, 0))
        width = site.query_heads * site.value_dim
        if x.dim() == 2:
            return x[None]
        if x.dim() == 3:
            module = self.modules[path]
            attention = getattr(module, "self_attn", None)
            by_time = isinstance(attention, nn.MultiheadAttention) and not attention.batch_first
            return x.transpose(0, 1) if by_time or (x.shape[:2] == (queries, batch) and batch != queries) else x
        if x.dim() == 4 and (x.shape[3] == width) != (x.shape[1] == width):
            return x.flatten(1, 2) if x.shape[3] == width else x.flatten(2).transpose(1, 2)
        if x.dim() == 4 and (x.shape[1] == x.shape[2]) != (x.shape[2] == x.shape[3]):  # a square map
            return x.flatten(1, 2) if x.shape[1] == x.shape[2] else x.flatten(2).transpose(1, 2)
        return None


def _is_state(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (2, 3, 4) and value.numel() > 0


def _tensors(output: Any) -> list[Tensor]:
    """The hidden states in what a block returned: the first tensor, and further ones [B, ., d] of its batch and width."""
    values = list(output.values()) if isinstance(output, Mapping) else list(output) if isinstance(output, (tuple, list)) else [output]
    found = [one for one in values if _is_state(one)]
    if not found:
        return []
    first = found[0]
    alike = [one for one in found[1:] if one.dim() == first.dim() == 3 and (one.shape[0], one.shape[2]) == (first.shape[0], first.shape[2])]
    return [first, *alike]
