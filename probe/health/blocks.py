"""Catching hidden states: what goes into the first block of a model and what comes out of every one.

Letters: B batch, N tokens, d width of a hidden state.

    with watched_states(model) as states:
        model(**inputs)
    states["model.layers.3", "output", 3, 0]  # [B, N, d]

A block is the module in whose list the layers stand: `model.layers.3`. Only blocks in which attention was seen are watched. Maps of an
image or a grid, [B, H, W, d] and [B, d, H, W], are tokens in reading order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception.intercept import check_model, intercept
from headscope.probe.interception.place import clean_path

Key = tuple[str, str, int, int]  # path of the block, place, layer, stream

_NUMBERED = re.compile(r"(?:.*_)?(\d+)")  # layers.3, but also encoder_layer_3


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
