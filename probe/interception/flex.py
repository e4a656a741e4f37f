"""`flex_attention` as an attention call.

flex_attention is no overridable torch function: while a session is open, the names under which it is reached are
replaced by a wrapper that falls through in every other thread and for every other model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.attention.flex_attention
from torch import Tensor

from headscope.kernels import reference
from headscope.kernels.errors import NotIntercepted
from headscope.probe.call import AttentionCall
from headscope.probe.interception.axes import Atom
from headscope.probe.interception.candidate import Candidate, Grouping, describe
from headscope.probe.interception.guard import guarded, refuse_reentrant
from headscope.probe.interception.mode import current_tracker
from headscope.probe.interception.names import Replacement
from headscope.probe.interception.place import locate
from headscope.probe.interception.tape import Node

if TYPE_CHECKING:
    from headscope.probe.interception.tracker import Tracker

MODULE = "torch.nn.attention.flex_attention"
INTEGRATION = "transformers.integrations.flex_attention"


def _wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        tracker = current_tracker()
        return original(*args, **kwargs) if tracker is None else run(tracker, original, args, kwargs)

    flex_attention.__wrapped__ = original  # type: ignore[attr-defined]
    return flex_attention


def _wrap_compiled(friendly: Callable[..., Any]) -> Callable[..., Any]:
    def compile_friendly(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any) -> Any:
        wrapper = _wrapper(lambda *a, **k: friendly(*a, training=training, **k))
        return wrapper(query, key, value, **kwargs)

    return compile_friendly


FLEX = Replacement(lambda: (MODULE, "flex_attention"), _wrapper)
COMPILED = Replacement(
    lambda: (INTEGRATION, "compile_friendly_flex_attention") if INTEGRATION in sys.modules else None, _wrap_compiled, "transformers."
)


@contextmanager
def patched() -> Iterator[None]:
    """Route `flex_attention` through the watching thread's tracker while any session is open in the process."""
    with FLEX.installed(), COMPILED.installed():
        yield


def run(tracker: Tracker, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One flex_attention call, edited and shown like any other."""
    names = ("query", "key", "value", "score_mod", "block_mask", "scale", "enable_gqa", "return_lse", "kernel_options")
    bound = dict(zip(names, args, strict=False)) | kwargs

    def native(**changed: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return func(**{**bound, **changed})

    place = locate(tracker.mode.sessions)
    if place is None:
        return native()
    session = place.session
    q, k, v = bound["query"], bound["key"], bound["value"]
    scale = bound.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    ordinal = session.claim(place.path)
    name = session.site_name(place.path, ordinal)
    site = session.site(
        name,
        lambda: describe(session, place, place.path, ordinal, q, k, v.shape[-1], mechanism="flex", bias=bound.get("score_mod") is not None),
    )
    call = AttentionCall(site, session.next_step(name, place.recomputed), q, k, v, scale, recomputed=place.recomputed)
    score_mod, block_mask = bound.get("score_mod"), bound.get("block_mask")

    call.replay = replay = FlexReplay(scale, score_mod, block_mask)
    stages = session.stages(site)
    inner = stages & {"q", "k", "v", "bias", "scores", "pattern"}
    if not inner:
        result = native()
    else:
        refuse_reentrant(session, place)
        if bound.get("return_lse") or bound.get("return_aux") is not None:
            raise NotIntercepted(f"{name}: flex_attention was asked for its lse as well, which an edit would make untrue; edit z instead")
        call.q = session.change(call, "q", q) if "q" in stages else q
        call.k = session.change(call, "k", k) if "k" in stages else k
        call.v = session.change(call, "v", v) if "v" in stages else v
        if stages & {"bias", "scores", "pattern"}:
            scores = replay.scores(call.q, call.k)
            if "bias" in stages:
                scores = scores + session.change(call, "bias", torch.zeros((), dtype=scores.dtype, device=scores.device))
            if "scores" in stages:
                scores = session.change(call, "scores", scores)
            call.rewritten = True
            call.materialised_scores = scores
            pattern = reference.pattern(scores)
            if "pattern" in stages:
                pattern = session.change(call, "pattern", pattern)
            call.materialised = pattern
            assert call.v is not None
            result = (pattern @ reference.repeat_heads(call.v, q.shape[1])).to(q.dtype)
        else:
            result = native(query=call.q, key=call.k, value=call.v)
    output = result[0] if isinstance(result, tuple) else result
    z = output
    if "z" in stages:
        z = session.change(call, "z", output)
    call.z = z
    session.finish(call)
    z = guarded(z, session, place, name)
    atoms = tuple(Atom((c,), n) for c, n in zip("bhqv", z.shape, strict=True))
    candidate = Candidate(
        session,
        place,
        place.path,
        "softmax",
        Grouping((atoms[0],), (atoms[1],), (atoms[2],), (), True),
        None,
        call=call.spent(),
        confirmed=True,
        stages=stages,
    )
    tracker.track(z, Node("z", tuple((a,) for a in atoms), candidate=candidate))
    return (z, *result[1:]) if isinstance(result, tuple) else z


@dataclass(frozen=True, eq=False)
class FlexReplay:
    """Scores and pattern of a flex_attention call; see `headscope.probe.call.Replay`."""

    scale: float
    score_mod: Callable[..., Any] | None
    block_mask: Any
    tells_pattern = True

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, Q, K]."""
        with torch._C.DisableTorchFunction():
            return mod_scores(reference.scores(q, k, scale=self.scale), self.score_mod, self.block_mask)

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, Q, K]."""
        return reference.pattern(self.scores(q, k))

    def detached(self) -> FlexReplay:
        """Itself: what a score_mod closes over is its own."""
        return self


def mod_scores(scores: Tensor, score_mod: Callable[..., Any] | None, block_mask: Any) -> Tensor:
    """Apply flex_attention's score_mod and mask_mod to dense scores [B, H, Q, K]; -inf where masked."""
    b, h, q, k = (torch.arange(n, device=scores.device) for n in scores.shape)
    if score_mod is not None:
        over = _over_all(score_mod, with_score=True)
        scores = over(scores, b, h, q, k).to(scores.dtype)
    if block_mask is not None and getattr(block_mask, "mask_mod", None) is not None:
        visible = _over_all(block_mask.mask_mod, with_score=False)(b, h, q, k)
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def _over_all(mod: Callable[..., Any], with_score: bool) -> Callable[..., Any]:
    """A function of single indices as a function of whole axes, the key index innermost."""
    for axis in (3, 2, 1, 0):  # k, q, h, b
        index: tuple[int | None, ...] = tuple(0 if i == axis else None for i in range(4))
        mod = torch.vmap(mod, in_dims=((0, *index) if with_score else index))
    return mod
