"""What was kept of one attention call, and what can be computed from it.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.kernels import blockwise, reference
from headscope.kernels.attention import attention
from headscope.kernels.errors import SelectionError
from headscope.kernels.panels import OF_SCORES, statistics_of_pattern
from headscope.kernels.statistics import NAMES, Statistics
from headscope.probe.call import AttentionCall, AttentionSite, Replay
from headscope.probe.store import Store

STATISTIC = "statistics."  # prefix of a kept statistic's name


@dataclass(frozen=True, eq=False)
class Terms:
    """Everything that a softmax attention's pattern follows from, for all heads of a call or some."""

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None
    mask: Tensor | None
    is_causal: bool
    softcap: float | None
    sink: Tensor | None

    @classmethod
    def of(cls, call: AttentionCall, heads: Sequence[int] | None = None) -> Terms:
        """The terms of a call; with `heads`, of these query heads only, keys repeated as they need them."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            once = compact(tensor)  # a mask expanded over heads or queries would be written out by the choice of heads
            return once if heads is None or once.shape[1] == 1 else once[:, list(heads)]

        q, k, sink = call.q, call.k, call.sink
        if heads is not None:
            q = q[:, list(heads)]
            k = k if k.shape[1] == 1 else k[:, [h // call.groups for h in heads]]
            sink = None if sink is None else sink[list(heads)]
        return cls(q, k, call.scale, cut(call.bias), cut(call.mask), call.is_causal, call.softcap, sink)

    def scores(self) -> Tensor:
        """[B, H, Q, K], -inf where a key may not be seen."""
        return reference.scores(
            self.q, self.k, scale=self.scale, bias=self.bias, mask=self.mask, is_causal=self.is_causal, softcap=self.softcap
        )

    def pattern(self) -> Tensor:
        """[B, H, Q, K]; with its graph where gradients are on and wanted, else by panels."""
        if torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad):
            return reference.pattern(self.scores(), sink=self.sink)
        return blockwise.pattern(
            self.q, self.k, scale=self.scale, bias=self.bias, mask=self.mask, is_causal=self.is_causal, softcap=self.softcap, sink=self.sink
        )

    def rows(self, queries: Sequence[int]) -> Tensor:
        """[B, H, len(queries), K], without the rest of the map."""
        rows = self._attend((), rows=queries).rows
        assert rows is not None
        return rows

    def statistics(self, want: Sequence[str], pooled: int | None) -> Statistics:
        """Without the map."""
        return self._attend(want, pooled=pooled)

    def _attend(self, keep: Sequence[str], *, rows: Sequence[int] | None = None, pooled: int | None = None) -> Statistics:
        found: Statistics
        _, found = attention(
            self.q, self.k, None, keep=keep, scale=self.scale, causal=self.is_causal, offset=0, softcap=self.softcap, bias=self.bias,
            mask=self.mask, sink=self.sink, rows=rows, pooled=pooled,
        )  # fmt: skip
        return found


@dataclass(eq=False)
class Record:
    """What was kept of one call. Tensors may be on disk still: `get` fetches them.

    Attributes:
        heads: the query heads kept; None for all.
        rows: the query positions whose pattern rows were kept.
        tile: side of the tiles of a kept pooled map.
        told: scores and pattern follow from the q and k kept, with mask, bias and sink or by the replay; else they were kept or are lost.
        gradient: what is computed from what was kept belongs to the autograd graph.
        replay: scores and pattern from (q, k) as the model's own code makes them, where mask and bias do not tell.
    """

    site: AttentionSite
    step: int
    heads: tuple[int, ...] | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    scale: float = 1.0
    is_causal: bool = False
    softcap: float | None = None
    tile: int | None = None
    told: bool = True
    gradient: bool = False
    replay: Replay | None = field(default=None, repr=False)
    store: Store | None = field(default=None, repr=False)
    shard: str = ""
    aliases: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    def names(self) -> list[str]:
        """Names of everything kept."""
        stored = () if self.store is None else self.store.shards.get(self.shard, ())
        return sorted({*self.tensors, *stored, *self.aliases})

    def has(self, name: str) -> bool:
        return name in self.names()

    def get(self, name: str, places: Sequence[int] | None = None) -> Tensor:
        """A kept tensor; with `places`, only these entries of its head axis (read alone where the record is on disk)."""
        if name in self.tensors:
            tensor = self.tensors[name]
            return tensor if places is None or tensor.shape[1] == 1 else tensor[:, list(places)]
        assert self.store is not None
        shard, key = self.aliases.get(name, (self.shard, name))
        if places is None or self.store.shape(shard, key)[1] == 1:
            return self.store.read(shard, key)
        return torch.cat([self.store.read_slice(shard, key, (slice(None), slice(p, p + 1))) for p in places], dim=1)

    def operand(self, name: str, places: Sequence[int] | None = None) -> Tensor:
        """A kept tensor of some kept heads. A replay runs on all heads at once, so q and k were kept whole for it."""
        if name not in ("q", "k") or self.replay is None or self.heads is None:
            return self.get(name, places)
        whole = self.tensors[name]
        group = self.site.query_heads // whole.shape[1]
        chosen = self.heads if places is None else [self.heads[p] for p in places]
        return whole if whole.shape[1] == 1 < self.site.query_heads else whole[:, [head // group for head in chosen]]

    def nbytes(self) -> int:
        return sum(stored_bytes(tensor) for tensor in self.tensors.values())

    def places(self, heads: Sequence[int] | int | None) -> list[int] | None:
        """Positions of the asked query heads among those kept.

        Raises:
            SelectionError: a head that the site has not, or that was not kept.
        """
        if heads is None:
            return None
        kept = self.heads or tuple(range(self.site.query_heads))
        asked = [heads] if isinstance(heads, int) else list(heads)
        if not asked:
            raise SelectionError("heads=[] chooses no head: name some, or leave heads out for all")
        for head in asked:
            check_head(self.site, head)
            if head not in kept:
                raise SelectionError(f"head {head} of {self.site.name} was not kept; kept are {list(kept)}")
        return [kept.index(h) for h in asked]

    def pattern(self, places: list[int] | None, rows: list[int] | None) -> Tensor:
        """Pattern of some kept heads and query positions, from whatever was kept of it."""
        if self.has("pattern"):
            pattern = self.get("pattern", places)
            return pattern if rows is None else pattern[:, :, positions(rows, pattern.shape[2])]
        if not self.has("q"):
            return self._kept_rows(places, rows)
        if self.replay is not None:
            pattern = self._replayed(self.replay.pattern, places)
            return pattern if rows is None else pattern[:, :, positions(rows, pattern.shape[2])]
        terms = self._terms(places)
        return terms.pattern() if rows is None else terms.rows(positions(rows, terms.q.shape[2]))

    def statistics(self, places: list[int] | None, pooled: int | None) -> Statistics:
        """Statistics of some kept heads, as kept or computed now."""
        names = [name for name in self.names() if name.startswith(STATISTIC)]
        kept = {name.removeprefix(STATISTIC): self.get(name, places) for name in names}
        if pooled is not None and pooled != self.tile:
            kept.pop("pooled", None)
        missing = [name for name in NAMES if name not in kept]
        tile = None if "pooled" in kept else pooled
        if not (self.has("pattern") or self.has("q")):
            if not kept or tile is not None:
                advice = "Keep() or Keep(statistics=True)" if tile is None else f"Keep() or Keep(pooled={tile})"
                raise SelectionError(f"of {self.site.name} only {spoken(self.names()) or 'nothing'} was kept: capture with {advice}")
            return Statistics(**kept)
        if not missing and tile is None:
            return Statistics(**kept)
        return Statistics(**(self.computed(places, missing, tile).tensors() | kept))

    def computed(self, places: list[int] | None, want: Sequence[str], tile: int | None) -> Statistics:
        """Statistics computed now, from the pattern or from q and k."""
        if self.has("pattern"):
            scores = self.get("scores", places) if self.has("scores") else None
            return statistics_of_pattern(self.get("pattern", places), want, tile, scores)
        if self.replay is not None:
            scores = None if OF_SCORES.isdisjoint(want) else self._replayed(self.replay.scores, places)
            return statistics_of_pattern(self._replayed(self.replay.pattern, places), want, tile, scores)
        return self._terms(places).statistics(want, tile)

    def scores(self, places: list[int] | None) -> Tensor:
        """Scores before the normaliser, as kept or computed now."""
        if self.has("scores"):
            return self.get("scores", places)
        if not self.has("q"):
            raise SelectionError(f"of {self.site.name} only {spoken(self.names())} was kept: capture with Keep() or Keep(scores=True)")
        if self.replay is not None:
            return self._replayed(self.replay.scores, places)
        if not self.told:
            raise SelectionError(
                f"the scores of {self.site.name} do not follow from q and k alone (an edit or the model's own code made them): "
                "capture with Keep(scores=True)"
            )
        return self._terms(places).scores()

    def _kept_rows(self, places: list[int] | None, rows: list[int] | None) -> Tensor:
        if self.rows is None:
            raise SelectionError(
                f"of {self.site.name} only {spoken(self.names()) or 'nothing'} was kept: capture with Keep() or Keep(pattern=True) to read "
                "patterns"
            )
        kept = self.get("rows", places)
        if rows is None:
            return kept
        count = int(self.get("queries").item()) if self.has("queries") else max(self.rows) + 1
        wanted = positions(rows, count)
        for row in wanted:
            if row not in self.rows:
                raise SelectionError(f"row {row} of {self.site.name} was not kept; kept are {list(self.rows)}")
        return kept[:, :, [self.rows.index(row) for row in wanted]]

    def _terms(self, places: list[int] | None) -> Terms:
        groups = 1 if self.heads is not None else self.site.query_heads // self.site.kv_heads
        shared = places is None or self.site.kv_heads == 1
        q, k = self.get("q", places), self.get("k", None if shared else [p // groups for p in places or ()])
        mask, bias = (self.get(n, places) if self.has(n) else None for n in ("mask", "bias"))
        sink = self.get("sink") if self.has("sink") else None
        return Terms(q, k, self.scale, bias, mask, self.is_causal, self.softcap, sink if sink is None or places is None else sink[places])

    def _replayed(self, replay: Callable[[Tensor, Tensor], Tensor], places: list[int] | None) -> Tensor:
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):  # the model's own bias may require gradients
            found = replay(self.get("q"), self.get("k"))
        chosen = list(self.heads) if self.heads is not None else None
        if places is not None:
            chosen = places if chosen is None else [chosen[p] for p in places]
        return found if chosen is None else found[:, chosen]


def check_head(site: AttentionSite, head: int) -> None:
    """Raises SelectionError for a head that the site has not."""
    if not 0 <= head < site.query_heads:
        raise SelectionError(f"no head {head}: {site.name} has {site.query_heads} heads, 0 to {site.query_heads - 1}")


def positions(rows: Sequence[int], count: int) -> list[int]:
    """Query positions counted from the front.

    Raises:
        SelectionError: a position that this call has not.
    """
    for row in rows:
        if not -count <= row < count:
            raise SelectionError(f"no query position {row}: this call has {count}, 0 to {count - 1}")
    return [int(row) % count for row in rows]


def compact(tensor: Tensor) -> Tensor:
    """What an expanded tensor repeats, once: its dimensions of stride 0 become size 1 again."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def stored_bytes(tensor: Tensor) -> int:
    """Bytes a tensor takes; what an expanded one repeats is there only once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def spoken(names: Sequence[str]) -> str:
    """A list of names for a message, shortened."""
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
