"""Edits outside the door: what leaves a block (`resid`), and what leaves any module that is named (`out`).

Forward hooks, set when a handler enters and taken away when it leaves. Which modules are blocks is known from the sites that ran
inside them: the block of a site is the module up to the last number of its path. A block that returns several streams of one width
(text and image of a joint block) is edited as one sequence, in the order in which it returns them.

Letters: B batch, S tokens, E width.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import ShapeError
from headscope.probe.call import AttentionCall, AttentionSite, Handler
from headscope.probe.interception.candidate import layer_of
from headscope.probe.interception.place import recomputing
from headscope.probe.interception.session import Session


def install(session: Session, handler: Handler, undo: list[Callable[[], None]]) -> None:
    """Hook every module at whose output the handler may change something; `undo` gets what removes the hooks."""
    wanted: frozenset[str] = getattr(handler, "outside", frozenset())
    if not wanted:
        return
    steps: Counter[str] = Counter()
    for path, module in session.modules.items():
        if "resid" in wanted and path.rpartition(".")[2].isdigit():
            undo.append(module.register_forward_hook(_hook(session, handler, path, "resid", steps)).remove)
        if "out" in wanted and path and "out" in handler.stages(_place(path, layer_of(session, path))):
            undo.append(module.register_forward_hook(_hook(session, handler, path, "out", steps)).remove)


def block_of(path: str) -> str | None:
    """The block that a module stands in: its path up to the last number before its own name; None where there is none."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else None


def _place(path: str, layer: int | None) -> AttentionSite:
    """A block or module under the nouns of a site, so that selectors find it."""
    return AttentionSite(path, path, 0, layer, "module", 1, 1, 0, 0, "module")


def _hook(session: Session, handler: Handler, path: str, stage: str, steps: Counter[str]) -> Callable[[nn.Module, Any, Any], object]:
    known: list[AttentionSite] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> object:
        if threading.get_ident() != session.thread and not recomputing():
            return None
        if not known:
            layer = layer_of(session, path)
            if stage == "resid":
                inside = [site for site in session.sites.values() if block_of(site.module) == path]
                if not inside:  # no attention ran in it
                    return None
                layer = inside[0].layer
            known.append(_place(path, layer))
        site = known[0]
        if stage not in handler.stages(site):
            return None
        again = recomputing()  # the module was counted in the first forward
        steps[f"{stage} {path}"] += not again
        streams = _streams(output, path, stage)
        joined = streams[0] if len(streams) == 1 else torch.cat(streams, dim=-2)
        value = joined[(None,) * (3 - joined.ndim)][:, None]  # [B, 1, S, E]
        call = AttentionCall(site, steps[f"{stage} {path}"] - 1, value, value, None, timestep=session.timestep, recomputed=again)
        with session.watch.aside():
            changed = handler.change(call, stage, value)
        if changed is value:
            return None
        if changed.shape != value.shape:
            raise ShapeError(f"an edit at stage {stage!r} of {path} returned shape {tuple(changed.shape)} for {tuple(value.shape)}")
        whole = changed.to(joined.dtype).reshape(joined.shape)
        return _replaced(output, torch.split(whole, [stream.shape[-2] for stream in streams], dim=-2))

    return hook


def _streams(output: object, path: str, stage: str) -> list[Tensor]:
    """The token streams among what a module returned: [B, S, E] or [S, E], of one width and batch."""
    found = [x for x in (output if isinstance(output, (tuple, list)) else (output,)) if _is_stream(x)]
    alike = [x for x in found if x.ndim == found[0].ndim and x.shape[-1] == found[0].shape[-1] and x.shape[:-2] == found[0].shape[:-2]]
    if not alike:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ShapeError(f"{stage} of {path}: expected [batch, token, width], or a tuple that begins with it, got {shape}")
    return alike


def _is_stream(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim in (2, 3) and value.is_floating_point()


def _replaced(output: object, streams: tuple[Tensor, ...]) -> object:
    """What the module returned, with its streams changed."""
    if isinstance(output, Tensor):
        return streams[0]
    assert isinstance(output, (tuple, list))
    left = list(streams)
    first = streams[0]
    parts = [
        left.pop(0)
        if left and _is_stream(x) and x.ndim == first.ndim and x.shape[-1] == first.shape[-1] and x.shape[:-2] == first.shape[:-2]
        else x
        for x in output
    ]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
