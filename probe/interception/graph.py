"""Graph attention of torch_geometric: a softmax over the edges that enter a node.

The library normalises a list of edges with scatter operations, which no product of activations precedes, so this one call is
hooked by name. Its map is shown dense: queries are the target nodes, keys the source nodes, [1, head, node, node], zero where
no edge runs. There are no queries and keys to edit; scores, pattern and z (what each head gathers) can be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import EditError
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception.candidate import Candidate, layer_of
from headscope.probe.interception.mode import current_tracker
from headscope.probe.interception.names import Replacement
from headscope.probe.interception.place import locate
from headscope.probe.interception.session import Session

LIBRARY = "torch_geometric"


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def softmax(src: Tensor, index: Tensor | None = None, ptr: Tensor | None = None, num_nodes: int | None = None, dim: int = 0) -> Tensor:
        tracker = current_tracker()
        place = locate(tracker.mode.sessions) if tracker is not None else None
        edges = _edges() if place is not None else None
        if place is None or edges is None or index is None or dim != 0:
            result: Tensor = original(src, index, ptr, num_nodes, dim)
            return result
        return _normalise(original, place, src, index, ptr, num_nodes, edges)

    softmax.__wrapped__ = original  # type: ignore[attr-defined]
    return softmax


EDGE_SOFTMAX = Replacement(
    lambda: ("torch_geometric.utils._softmax", "softmax") if "torch_geometric.utils._softmax" in sys.modules else None,
    _wrap,
    prefix=LIBRARY,
)


def _edges() -> tuple[Tensor, tuple[int, int]] | None:
    """The edge list and the numbers of source and target nodes, from the propagate() or edge_updater() that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("propagate", "edge_updater"):
            edge_index = frame.f_locals.get("edge_index")
            if isinstance(edge_index, Tensor) and edge_index.layout == torch.strided and edge_index.ndim == 2:
                return edge_index, _nodes(frame.f_locals.get("size"), edge_index)
        frame = frame.f_back
    return None


def _nodes(size: Any, edge_index: Tensor) -> tuple[int, int]:
    counted = int(edge_index.max()) + 1 if edge_index.numel() else 0
    if isinstance(size, list | tuple) and len(size) == 2:
        known = [s for s in size if isinstance(s, int)]
        return (size[0] or (known[0] if known else counted), size[1] or (known[-1] if known else counted))
    return counted, counted


def _normalise(
    original: Callable[..., Any],
    place: Any,
    src: Tensor,
    index: Tensor,
    ptr: Tensor | None,
    num_nodes: int | None,
    edges: tuple[Tensor, tuple[int, int]],
) -> Tensor:
    session: Session = place.session
    edge_index, (sources, targets) = edges
    targets = max(targets, num_nodes or 0)
    flat = src.reshape(src.shape[0], -1)  # [edges, H]
    heads = flat.shape[1]
    from_node = edge_index[0] if torch.equal(edge_index[1], index) else edge_index[1]
    sources = max(sources, targets if sources == 0 else sources)
    ordinal = session.claim(place.path)
    name = session.site_name(place.path, ordinal)
    kind = "self" if sources == targets else "cross"
    site = session.site(
        name, lambda: AttentionSite(name, place.path, ordinal, layer_of(session, place.path), kind, heads, heads, 0, 0, "edge-softmax")
    )
    empty = src.new_zeros(1, heads, targets, 0), src.new_zeros(1, heads, sources, 0)
    call = AttentionCall(site, session.next_step(name, place.recomputed), *empty, None, recomputed=place.recomputed)
    stages = session.stages(site)
    refused = stages & {"q", "k", "v"}
    if refused:
        raise EditError(
            f"{name} is graph attention over a list of edges: it has no {', '.join(sorted(refused))} to edit; edit scores, pattern or z"
        )

    def densify(values: Tensor, fill: float) -> Tensor:  # [edges, H] -> [1, H, targets, sources]
        full = values.new_full((targets * sources, heads), fill)
        spot = index * sources + from_node
        full = full.index_add(0, spot, values) if fill == 0 else full.index_copy(0, spot, values)
        return full.reshape(targets, sources, heads).permute(2, 0, 1)[None]

    def pick(dense: Tensor) -> Tensor:
        return dense[0].permute(1, 2, 0)[index, from_node].reshape(src.shape)

    if stages & {"bias", "scores"}:
        scores = densify(flat, float("-inf"))
        changed = scores
        if "bias" in stages:
            changed = changed + session.change(call, "bias", torch.zeros((), dtype=scores.dtype, device=scores.device))
        if "scores" in stages:
            changed = session.change(call, "scores", changed)
        src = pick(changed)
    result: Tensor = original(src, index, ptr, num_nodes, 0)
    dense = densify(result.reshape(-1, heads), 0.0)
    if "pattern" in stages:
        changed = session.change(call, "pattern", dense)
        if changed is not dense:
            result, dense = pick(changed), changed
    call.materialised = dense
    candidate = Candidate(
        session,
        place,
        place.path,
        "softmax",
        None,
        f"{place.path}: an edge softmax whose messages were never gathered",
        call=call,
        stages=stages,
    )
    session.pending.append(candidate)
    return result


@contextmanager
def watched(session: Session) -> Iterator[None]:
    """See the graph attention of this session's model: its edge softmax, and what each node gathers per head."""
    if LIBRARY not in sys.modules:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(EDGE_SOFTMAX.installed())
        for module in session.model.modules():
            register = getattr(module, "register_propagate_forward_hook", None)
            if callable(register):
                stack.callback(register(_gathered(session)).remove)
        yield


def _gathered(session: Session) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        path = session.paths.get(id(module))
        open_calls = [
            c
            for c in session.pending
            if c.path == path and not c.confirmed and c.call is not None and c.call.site.mechanism == "edge-softmax"
        ]
        if not open_calls or not isinstance(output, Tensor):
            return None
        candidate = open_calls[-1]
        call: AttentionCall = candidate.call
        shaped = output if output.ndim == 3 else output[:, None] if output.ndim == 2 and call.site.query_heads == 1 else None
        candidate.confirmed = True
        if shaped is None:
            session.finish(call)
            session.release(candidate)
            return None
        z = shaped.transpose(0, 1)[None]  # [1, H, node, width]
        changed = session.change(call, "z", z) if "z" in candidate.stages else z
        call.z = changed
        if call.site.value_dim == 0:
            call.site = session.sites[call.site.name] = call.site.named(value_dim=z.shape[-1])
        session.finish(call)
        session.release(candidate)
        return None if changed is z else changed[0].transpose(0, 1).reshape(output.shape)

    return hook
