"""The nouns everything speaks: a place where attention is computed, and one execution of it.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.
Canonical layouts, whatever the model's own: q [B, H, Q, D], k [B, G, K, D], v [B, G, K, V],
scores and pattern [B, H, Q, K], z [B, H, Q, V] (per head, before the output projection),
o [B, H, Q, E] (per head, after it; E is the width of the residual stream).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from torch import Tensor

# `pos` is carried out at q and k. The last three lie outside the door: what attention writes, what leaves its block, or any module.
STAGES = ("pos", "q.pre", "k.pre", "q", "k", "v", "kv", "bias", "scores", "pattern", "z", "o", "attn_out", "resid", "out")
OUTSIDE = ("attn_out", "resid", "out")


@dataclass(frozen=True)
class AttentionSite:
    """One place in a model where attention is computed.

    Attributes:
        name: module path, `#`, ordinal: `model.layers.3.self_attn#0`.
        module: the path alone.
        ordinal: n-th attention within one call of that module.
        layer: index of the block the site stands in; None where the path carries no number.
        kind: `self`, `cross`, `joint` (two streams in one attention) or `window` (windows or frames folded into the batch).
        query_heads: H.
        kv_heads: G; H is a multiple of it.
        key_dim: D.
        value_dim: V.
        mechanism: how it was caught: `sdpa`, `flex`, `dataflow`, or the name of a library adapter.
        normaliser: `softmax`, `sigmoid`, `exp-sum`, `relu`.
        causal: the call masked the future by a flag (a mask tensor that does so is not looked into).
        softcap: the cap c of c·tanh(s/c), where there is one.
        sinks: the normaliser ran over extra columns that carry no value.
        bias: something was added to the scores, or masked out.
        fold: how many windows, rows or frames the model folded into the batch.
        output_projection: path of the linear map W_O that z goes into, where one was seen.
    """

    name: str
    module: str
    ordinal: int
    layer: int | None
    kind: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    mechanism: str
    normaliser: str = "softmax"
    causal: bool = False
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    fold: int = 1
    output_projection: str | None = None

    def to_dict(self) -> dict[str, str | int | float | bool | None]:
        """A plain dict of the fields, ready for JSON."""
        return asdict(self)

    def named(self, **changes: str | int | float | bool | None) -> AttentionSite:
        """The same site with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(eq=False)
class AttentionCall:
    """One execution of a site. Tensors are canonical views of the model's own; see the module docstring.

    `mask` (True = may be seen) and `bias` broadcast to [B, H, Q, K]. A site caught by dataflow carries no mask or bias
    of its own: what its code did between q·kᵀ and the normaliser is kept as a replay.
    """

    site: AttentionSite
    step: int
    q: Tensor
    k: Tensor
    v: Tensor | None
    scale: float = 1.0
    mask: Tensor | None = None
    bias: Tensor | None = None
    is_causal: bool = False
    softcap: float | None = None
    sink: Tensor | None = None
    # An edit changed scores or pattern, or the model's code makes them in a way that cannot be run again: they are materialised.
    rewritten: bool = False
    recomputed: bool = False  # a checkpoint's second forward: edits apply, captures do not count it
    timestep: Tensor | float | None = None  # of a diffusion model, as its forward was given it
    injected: int = 0  # keys in front that an edit put there
    part: str = ""  # before rotation, `main` or `added` where a joint attention projects its two streams one by one
    z: Tensor | None = None
    replay: Replay | None = field(default=None, repr=False)  # None where scale, mask and bias say it all
    # The normalised pattern where it was materialised anyway (by the model's code or for an edit).
    materialised: Tensor | None = field(default=None, repr=False)
    materialised_scores: Tensor | None = field(default=None, repr=False)

    @property
    def queries(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    @property
    def cached(self) -> int:
        """Keys of a self-attention before the first query: what a cache holds."""
        return max(self.keys - self.injected - self.queries, 0) if self.site.kind == "self" else 0

    @property
    def groups(self) -> int:
        """How many query heads share one key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    def spent(self) -> AttentionCall:
        """The finished call without its output and maps, to be held for as long as tensors that descend from it live."""
        return replace(self, z=None, materialised=None, materialised_scores=None, replay=None)

    @property
    def told(self) -> bool:
        """Whether the pattern follows from q and k, with the call's other terms or by its replay; else it is materialised."""
        return not self.rewritten and (self.site.mechanism == "sdpa" if self.replay is None else self.replay.tells_pattern)


class Replay(Protocol):
    """The model's own way from queries and keys to scores and pattern, canonical ones, to be run again at any time."""

    @property
    def tells_pattern(self) -> bool:
        """Whether the pattern follows from the scores by a softmax, so that `pattern` may be asked."""
        ...

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, Q, K], from q [B, H, Q, D] and k [B, G, K, D]."""
        ...

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, Q, K]."""
        ...

    def detached(self) -> Replay:
        """The same, holding on to no autograd graph."""
        ...


@dataclass(frozen=True, eq=False)
class Extension:
    """Keys and values that an edit puts in front of those of a call.

    Attributes:
        k: [B, G, M, D], rotated as keys of the cache are.
        v: [B, G, M, V].
        visible: [B or 1, M], bool, False where a row has fewer than M; None for all.
    """

    k: Tensor
    v: Tensor
    visible: Tensor | None = None


class Handler(Protocol):
    """What an interception calls at every attention call: captures, plans, attribution rules.

    Handlers run in the order they were entered; all changes at a stage come before anything is computed from it.
    """

    changes: bool  # True for handlers that change the model (plans), False for those that only look

    def stages(self, site: AttentionSite) -> frozenset[str]:
        """The stages this handler changes at this site. Asked at every call; cheap."""
        ...

    def reads(self, site: AttentionSite) -> frozenset[str]:
        """Of `scores` and `pattern`, those that `see` wants to find materialised if the model's code forms them anyway."""
        ...

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        """The value the model is to go on with at this stage (return `value` itself to leave it alone).

        For `bias` the value is what is to be added to the scores so far, broadcastable to [B, H, Q, K] (a scalar zero
        when nothing was added before).
        """
        ...

    def see(self, call: AttentionCall) -> None:
        """The finished call, with `z` set. It is let go of afterwards: keep the tensors you want, not the call."""
        ...
