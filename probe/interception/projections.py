"""Queries and keys before their rotary embedding: the stages `q.pre` and `k.pre`.

What enters the rotation is the output of the query (key) projection, or of its norm where there is one. These are modules of
their own in most models; a forward hook on them changes what is rotated and what a KV cache stores. Where one projection
makes q, k and v together there is no such place, and the edit is refused by name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from headscope.kernels.errors import ShapeError
from headscope.probe.call import AttentionCall, AttentionSite, Handler
from headscope.probe.interception.candidate import head_count, layer_of
from headscope.probe.interception.place import recomputing
from headscope.probe.interception.session import Session

# In order of preference: a norm stands after its projection. The second name of a pair belongs to the text stream of joint blocks.
QUERY = (
    ("q_norm", "norm_q", "query_norm", "q_layernorm", "q_ln", "query_layernorm"),
    ("q_proj", "to_q", "query", "wq", "q_lin", "query_proj", "q", "linear_q", "W_q"),
)
KEY = (
    ("k_norm", "norm_k", "key_norm", "k_layernorm", "k_ln", "key_layernorm"),
    ("k_proj", "to_k", "key", "wk", "k_lin", "key_proj", "k", "linear_k", "W_k"),
)
ADDED = {"q.pre": ("norm_added_q", "add_q_proj"), "k.pre": ("norm_added_k", "add_k_proj")}
TAPPED = frozenset(name for group in (*QUERY, *KEY, *ADDED.values()) for name in group)
KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "num_key_value_groups_heads")


def taps(module: nn.Module, stage: str) -> list[nn.Module]:
    """The modules whose outputs are q (or k) before rotation; empty where there is none of its own."""
    names = QUERY if stage == "q.pre" else KEY
    found = next((child for group in names for name in group if _usable(child := getattr(module, name, None))), None)
    added = next((child for name in ADDED[stage] if _usable(child := getattr(module, name, None))), None)
    return [m for m in (found, added) if m is not None]


def _usable(child: object) -> bool:
    return isinstance(child, nn.Module) and not isinstance(child, nn.Identity)


def provisional_site(session: Session, path: str, module: nn.Module) -> AttentionSite:
    """A site as far as it can be described before it was ever called."""
    heads = head_count(module) or _heads_by_width(module)
    config = getattr(module, "config", None)
    groups = next((n for holder in (module, config) for name in KV_COUNTS if isinstance(n := getattr(holder, name, None), int)), heads)
    name = f"{path}#0"
    return session.sites.get(name) or AttentionSite(name, path, 0, layer_of(session, path), "self", heads, groups, 0, 0, "module")


def _heads_by_width(module: nn.Module) -> int:
    """Heads of a module that does not count them: the width of its query projection over that of one head."""
    width = getattr(module, "head_dim", None) or getattr(getattr(module, "config", None), "head_dim", None)
    projection = next((p for name in QUERY[1] if (p := getattr(module, name, None)) is not None), None)
    total = getattr(projection, "out_features", 0)
    return total // width if isinstance(width, int) and width and total else 1


def install(session: Session, handler: Handler, undo: list[Callable[[], None]]) -> None:
    """Hook the taps of every module at which the handler changes `q.pre` or `k.pre`; `undo` gets what removes the hooks."""
    for path, module in session.modules.items():
        if TAPPED.isdisjoint(module._modules):  # asking a module for what it lacks raises each time, and there are many modules
            continue
        available = {stage: taps(module, stage) for stage in ("q.pre", "k.pre")}
        if not all(available.values()):
            continue
        site = provisional_site(session, path, module)
        stages = handler.stages(site)
        for stage, places in available.items():
            if stage in stages:
                session.tapped.add((path, stage))
                parts = ("main", "added") if len(places) > 1 else ("",)
                hooks = [_hook(session, handler, site, stage, part) for part in parts]
                undo.extend(place.register_forward_hook(hook).remove for place, hook in zip(places, hooks, strict=True))


def _hook(session: Session, handler: Handler, site: AttentionSite, stage: str, part: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
    heads_last: list[bool] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        if threading.get_ident() != session.thread and not recomputing():
            return None
        known = session.sites.get(site.name, site)
        count = known.query_heads if stage == "q.pre" else known.kv_heads
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            raise ShapeError(
                f"{stage} of {known.name}: expected [batch, token, width] or [batch, token, head, width], got {type(output).__name__}"
            )
        if output.ndim == 4:
            if (output.shape[2] == count) != (output.shape[1] == count):
                heads_last[:] = [output.shape[2] == count]
            elif not heads_last:
                heads_last[:] = [output.stride(1) >= output.stride(2)]
            value = output.transpose(1, 2) if heads_last[0] else output
        else:
            if output.shape[-1] % count:
                raise ShapeError(f"{stage} of {known.name}: width {output.shape[-1]} is not a multiple of its {count} heads")
            batched = output if output.ndim == 3 else output[None]
            value = batched.view(*batched.shape[:2], count, -1).transpose(1, 2)  # [B, H, S, D]
        entry = next(e for e in session.entries if e.handler is handler)
        again = recomputing()  # the site was counted in the first forward
        step = session.steps[known.name] - entry.base[known.name] - again
        call = AttentionCall(known, step, value, value, None, timestep=session.timestep, part=part, recomputed=again)
        with session.watch.aside():
            changed = handler.change(call, stage, value)
        if changed is value:
            return None
        if changed.shape != value.shape:
            raise ShapeError(f"an edit at stage {stage!r} of {known.name} returned shape {tuple(changed.shape)} for {tuple(value.shape)}")
        if output.ndim == 4:
            return changed.transpose(1, 2) if heads_last[0] else changed
        return changed.transpose(1, 2).reshape(output.shape)

    return hook
