"""One thread's watch over a model: who is listening, where in the model we are, which call this is.

A `Session` belongs to one model and one thread. Handlers (captures, plans, attribution rules) enter it; while any is
inside, a `TorchFunctionMode` sees every torch call of the thread (`mode`, `tracker`), recognises attention, and
asks the session which site and step it is. Nothing of the model is changed: a few forward hooks tell where a call
begins, and they go when the last handler leaves.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import EditError, NotIntercepted, ShapeError
from headscope.probe.call import AttentionCall, AttentionSite, Extension, Handler
from headscope.probe.interception.place import clean_path, recomputing

_sessions: dict[tuple[int, int], Session] = {}  # (id of the model, thread) -> its session


@dataclass(eq=False)
class Entry:
    """One handler inside a session."""

    handler: Handler
    strict: bool
    base: Counter[str]  # steps of each site when the handler entered: its own steps count from there
    calls: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)


class Session:
    """The watch of one thread over one model; see the module docstring."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.thread = threading.get_ident()
        self.paths: dict[int, str] = {}
        self.modules: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            path = clean_path(name)
            self.paths.setdefault(id(module), path)
            self.modules.setdefault(path, module)
        self.entries: list[Entry] = []
        self.sites: dict[str, AttentionSite] = {}
        self.steps: Counter[str] = Counter()
        self.ordinals: Counter[str] = Counter()
        self.unclaimed: list[str] = []  # normalisers over activation products that became no attention call
        self.forwards = 0
        self.batch: int | None = None
        self.timestep: Tensor | float | None = None
        self.depth = 0
        self.scripted = _scripted_attention(model, self.paths)
        self.tapped: set[tuple[str, str]] = set()  # (module, stage) hooked for edits before rotation
        self.hooked: set[str] = set()
        self.recomputed: set[str] = set()  # sites that a checkpoint has run again inside this session
        self.watch: Any = None  # the thread's function mode, set by `mode.watch`
        self.pending: list[Any] = []  # candidates of the running forward: normalised, not yet multiplied with a value
        self._stack = ExitStack()

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by identity; made when an output projection is first met."""
        return {id(p): clean_path(name) for name, p in self.model.named_parameters()}

    # -- entering and leaving --------------------------------------------------------------------------------------

    def open(self, *scopes: AbstractContextManager[None]) -> None:
        """Hook the model and enter what watches beside it; all of it is undone by `close`, and at once if something fails."""
        with ExitStack() as stack:
            stack.callback(_sessions.pop, (id(self.model), self.thread), None)
            before = self.model.register_forward_pre_hook(self._root_begins, with_kwargs=True, prepend=True)
            stack.callback(before.remove)
            after = self.model.register_forward_hook(self._root_ends, always_call=True)
            stack.callback(after.remove)
            for module in _outer_modules(self.model):
                stack.callback(module.register_forward_pre_hook(self._check_thread, prepend=True).remove)
            for scope in scopes:
                stack.enter_context(scope)
            if "torch._dynamo" in sys.modules:  # compiled code would run past the mode: run it eagerly meanwhile
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._stack = stack.pop_all()
            _sessions[id(self.model), self.thread] = self

    def close(self) -> None:
        self.pending.clear()
        self._stack.close()

    def add(self, handler: Handler, strict: bool) -> Entry:
        entry = Entry(handler, strict, Counter(self.steps))
        self.entries.append(entry)
        return entry

    def drop(self, entry: Entry) -> None:
        for undo in entry.undo:
            undo()
        self.entries.remove(entry)
        if not self.entries:
            self.close()

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _check_thread(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == self.thread or session_of(self.model) is not None or recomputing():
            return
        raise NotIntercepted(
            f"{type(module).__name__} was called from another thread while an edit or a capture is active in thread {self.thread}: "
            "that call would run without it. Enter the probe or plan inside the thread that calls the model "
            "(DataParallel replicas cannot be watched: use one device, or DistributedDataParallel)"
        )

    def _root_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_thread(module, args)
        if threading.get_ident() != self.thread:
            return
        if self.depth == 0:
            self.pending.clear()
            self.ordinals.clear()
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
            self.batch = tensors[0].shape[0] if tensors else None
            self.timestep = self._timestep(args, kwargs)
        self.depth += 1

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | float | None:
        """The diffusion timestep among the model's inputs, if it has one by that name."""
        place = self._timestep_place
        name, index = place if place is not None else ("", len(args))
        found = kwargs.get(name, args[index] if index < len(args) else None)
        return found if isinstance(found, (Tensor, int, float)) and not isinstance(found, bool) else None

    @cached_property
    def _timestep_place(self) -> tuple[str, int] | None:
        """Name and position of the parameter that takes the diffusion timestep."""
        try:
            names = list(inspect.signature(self.model.forward).parameters)
        except ValueError:  # TorchScript's has none
            return None
        return next(((name, names.index(name)) for name in ("timestep", "timesteps") if name in names), None)

    def _root_ends(self, module: nn.Module, args: tuple[Any, ...], result: object) -> None:
        if threading.get_ident() != self.thread:
            return
        self.depth = max(0, self.depth - 1)
        if self.depth == 0:
            self.forwards += 1
            if result is not None:
                self.settle()
            self.pending.clear()

    def watch_module(self, path: str) -> None:
        """Learn when this module is called, so that the ordinals of its attention calls start anew."""
        if path in self.hooked:
            return
        self.hooked.add(path)
        module = self.modules[path]
        borrowed: list[ExitStack] = []

        def begins(module: nn.Module, args: tuple[Any, ...]) -> None:
            if threading.get_ident() != self.thread:
                if recomputing():  # a checkpoint's second run in autograd's own thread: lend it the mode
                    stack = ExitStack()
                    stack.enter_context(self.watch.lent())
                    borrowed.append(stack)
                else:
                    self._check_thread(module, args)
                    return
            self.ordinals.pop(path, None)

        def ends(module: nn.Module, args: tuple[Any, ...], result: object) -> None:
            if borrowed and threading.get_ident() != self.thread:
                borrowed.pop().close()

        self._stack.callback(module.register_forward_pre_hook(begins, prepend=True).remove)
        self._stack.callback(module.register_forward_hook(ends, always_call=True).remove)

    # -- what an attention call asks -------------------------------------------------------------------------------

    def claim(self, path: str) -> int:
        """The ordinal of the next attention in this call of the module."""
        ordinal = self.ordinals[path]
        self.ordinals[path] += 1
        self.watch_module(path)
        return ordinal

    def site_name(self, path: str, ordinal: int) -> str:
        """Module path, `#`, ordinal; the class of the model stands for its own empty path."""
        return f"{path or type(self.model).__name__}#{ordinal}"

    def site(self, name: str, build: Any) -> AttentionSite:
        if name not in self.sites:
            self.sites[name] = build()
        return self.sites[name]

    def stages(self, site: AttentionSite) -> frozenset[str]:
        """All stages that some handler changes at this site."""
        found: frozenset[str] = frozenset()
        for entry in self.entries:
            found |= entry.handler.stages(site)
        for stage in sorted(found & {"q.pre", "k.pre"}):
            self._check_tap(site, stage)
        return found

    def _check_tap(self, site: AttentionSite, stage: str) -> None:
        """Refuse an edit before rotation at a site that has no place for it: one fused projection, or a name that is not known."""
        if (site.module, stage) in self.tapped:
            return
        children = [name for name, _ in self.modules[site.module].named_children()] if site.module in self.modules else []
        raise EditError(
            f"{site.name} has no {'query' if stage[0] == 'q' else 'key'} projection of its own (its modules: "
            f"{', '.join(children) or 'none'}): {stage} cannot be edited there; edit {stage[0]!r} (after rotation) instead"
        )

    def reads(self, site: AttentionSite) -> frozenset[str]:
        """Stages whose materialised value some handler wants to see when the call is finished."""
        found: frozenset[str] = frozenset()
        for entry in self.entries:
            found |= entry.handler.reads(site)
        return found

    def changing(self) -> bool:
        return any(entry.handler.changes for entry in self.entries)

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        """Let every handler change a value; the one given comes back itself when none does."""
        count = call.step
        call.timestep = self.timestep
        for entry in self.entries:
            if stage not in entry.handler.stages(call.site):
                continue
            call.step = count - entry.base[call.site.name]
            changed = entry.handler.change(call, stage, value)
            if changed is not value and stage != "bias" and changed.shape != value.shape:
                raise ShapeError(
                    f"an edit at stage {stage!r} of {call.site.name} returned shape {tuple(changed.shape)} for {tuple(value.shape)}: "
                    "an edit must keep the shape"
                )
            value = changed
        call.step = count
        return value

    def extend(self, call: AttentionCall) -> list[Extension]:
        """Keys and values that handlers put in front of those of a call, the first to be entered outermost."""
        count, found = call.step, []
        call.timestep = self.timestep
        for entry in self.entries:
            if "kv" in entry.handler.stages(call.site):
                call.step = count - entry.base[call.site.name]
                found += entry.handler.extend(call)  # type: ignore[attr-defined]
        call.step = count
        return found

    def finish(self, call: AttentionCall) -> None:
        count = call.step
        call.timestep = self.timestep
        for entry in self.entries:
            entry.calls += 1
            call.step = count - entry.base[call.site.name]
            entry.handler.see(call)
        call.step = count

    def next_step(self, site: str, recomputed: bool) -> int:
        """Number of this call of the site; a recomputed one carries the number of the call it repeats."""
        if recomputed:
            self.recomputed.add(site)
            return max(0, self.steps[site] - 1)
        self.steps[site] += 1
        return self.steps[site] - 1

    def release(self, candidate: Any) -> None:
        """Let go of what a completed call held: its map lives on only where a handler kept it."""
        self.pending.remove(candidate)
        call = candidate.call
        candidate.call = call.spent()
        call.materialised = call.materialised_scores = call.replay = None

    # -- never miss silently ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """At the end of a forward: every normalised product must have become an attention call."""
        lost = [p.complaint for p in self.pending if p.complaint is not None and not p.confirmed]
        lost.extend(self.scripted)
        self.scripted = []
        self.pending.clear()
        if not lost:
            return
        self.unclaimed.extend(lost)
        if any(entry.strict for entry in self.entries):
            raise NotIntercepted(
                f"{len(lost)} attention-like operation(s) were seen but not caught:\n  " + "\n  ".join(dict.fromkeys(lost)) + "\n"
                "What is caught elsewhere stays valid: pass strict=False to go on without these, and list them with probe.unclaimed"
            )

    def check_ran(self, entry: Entry) -> None:
        """A handler that leaves without having seen any attention call has been silently useless: say so."""
        if entry.calls or not entry.strict:
            return
        name = type(self.model).__name__
        if self.forwards == 0:
            raise NotIntercepted(
                f"the model ({name}) was not run inside the scope: call it, or its generate(), between entering and leaving"
            )
        advice = "it computes no attention that torch functions show"
        if any(isinstance(m, torch.jit.ScriptModule) for m in self.model.modules()):
            advice = "it holds TorchScript modules, whose inside runs past Python: load the original nn.Module instead"
        raise NotIntercepted(f"{self.forwards} forward(s) of {name} showed 0 attention sites: {advice}")


def _outer_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that a forward calls first: children, their children, and the blocks in their lists. A thread starts at one of these."""
    todo = [(child, 1) for child in model.children()]
    while todo:
        module, depth = todo.pop()
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            todo.extend((child, depth) for child in module.children())
            continue
        if isinstance(module, torch.jit.ScriptModule):
            continue
        yield module
        if depth < 2:
            todo.extend((child, depth + 1) for child in module.children())


def _scripted_attention(model: nn.Module, paths: dict[int, str]) -> list[str]:
    """A complaint for every TorchScript module inside the model that computes attention: it runs past Python."""
    found: list[str] = []
    for module in model.modules():
        if module is model or not isinstance(module, torch.jit.ScriptModule) or not hasattr(module, "inlined_graph"):
            continue
        path = paths.get(id(module), "")
        kinds = {node.kind() for node in module.inlined_graph.nodes()}
        inside = any(path.startswith(f"{line.partition(':')[0]}.") for line in found)
        if not inside and kinds & {"aten::softmax", "aten::scaled_dot_product_attention"}:
            found.append(
                f"{path}: a TorchScript module with a softmax or attention inside, which runs past Python: use the original nn.Module"
            )
    return found


def session_of(model: nn.Module) -> Session | None:
    """The session that this thread has open on a model."""
    return _sessions.get((id(model), threading.get_ident()))
