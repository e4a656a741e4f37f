"""Keys and values that no token of the input made, put in front of those of a call: a prefix, a fact, somebody else's cache.

Letters: B batch, G key/value heads, M injected tokens, D width of a key, V width of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interventions.gates import finite
from headscope.interventions.ops import Op
from headscope.interventions.select import Selector
from headscope.kernels.errors import EditError, ShapeError
from headscope.probe.call import AttentionCall, Extension


@dataclass(frozen=True, eq=False)
class Inject(Op):
    """Keys k and values v before the call's own. What is not there, in a row shorter than the longest, is hidden: never a key of zeros,
    whose score of 0 would take a share.

    Attributes:
        k: [B or 1, G, M, D], as after rotation: with the positions that they are to have.
        v: [B or 1, G, M, V].
        lengths: [B or 1], how many of a row's M are there, counted from the front; None for all.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor | None = None
    name: ClassVar[str] = "inject"
    stages: ClassVar[frozenset[str]] = frozenset({"kv"})

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        raise EditError("inject() adds tokens, so it works at stage kv of fused attention alone")

    def extension(self, call: AttentionCall, selector: Selector) -> Extension:
        """What goes in front of this call.

        Raises:
            ShapeError: keys or values that do not fit the site.
            EditError: a selection that injected tokens cannot have.
        """
        assert call.v is not None
        batch, groups = call.k.shape[:2]
        wanted = ((batch, groups, self.k.shape[2], call.k.shape[3]), (batch, groups, self.k.shape[2], call.v.shape[3]))
        for name, tensor, shape in zip("kv", (self.k, self.v), wanted, strict=True):
            if tensor.shape[0] not in (1, batch) or tuple(tensor.shape[1:]) != shape[1:]:
                raise ShapeError(
                    f"inject() at {call.site.name}: {name} is {list(tensor.shape)}, this call needs {list(shape)} (or batch 1)"
                )
        if selector.heads is not None or selector.kv_groups is not None or selector.samples is not None or selector.branch is not None:
            raise EditError("inject() with heads=, samples= or branch=: it adds keys for all; hide them from others with mask() at scores")
        places = torch.arange(self.k.shape[2])
        visible = None if self.lengths is None else (places < self.lengths[:, None]).to(call.k.device)
        return Extension(self.k.to(call.k).expand(*wanted[0]), self.v.to(call.v).expand(*wanted[1]), visible)


def inject(k: Tensor, v: Tensor, *, lengths: Sequence[int] | Tensor | None = None, strength: float = 1.0) -> Inject:
    """Put keys and values in front of those of a call; queries, masks and biases go on to mean the tokens that they meant.

    Where the model rotates its keys, these have to be rotated already, for the positions that they are to stand at, and the text has to
    stand behind them: a real prefix's cache with position_ids that go on after it equals the prefix put before the text.

    Args:
        k: [G, M, D] or [B, G, M, D].
        v: [G, M, V] or [B, G, M, V].
        lengths: how many of the M a sample has, for prefixes of different length; what is behind is hidden.
        strength: multiplies v: 1 for all of it.

    Raises:
        ShapeError: k and v that do not belong together.
        EditError: lengths beyond M.
    """
    finite("k", k)
    finite("v", v)
    k, v = (x[None] if x.ndim == 3 else x for x in (k, v))
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"inject(): k is {list(k.shape)} and v is {list(v.shape)}; give [B, G, M, D] and [B, G, M, V]")
    counts = None if lengths is None else torch.as_tensor(lengths, dtype=torch.int64).reshape(-1)
    if counts is not None and (not len(counts) or int(counts.min()) < 0 or int(counts.max()) > k.shape[2]):
        raise EditError(f"inject(lengths={counts.tolist()}): each is from 0 to the {k.shape[2]} tokens that are injected")
    return Inject(k, v if strength == 1.0 else v * float(strength), counts)
