"""What was kept of the attention calls of a run: patterns, statistics and tensors, by layer or site, and by step.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headscope.kernels import reference
from headscope.kernels import statistics as kernels
from headscope.kernels.errors import BudgetError, ClosedError, NonFiniteError, NotIntercepted, SelectionError, StoreError
from headscope.kernels.statistics import Statistics
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.keep import Keep, free_memory, readable
from headscope.probe.store import Store, write

if TYPE_CHECKING:
    import xarray

STATISTIC = "statistics."


@dataclass(eq=False)
class Record:
    """What was kept of one call. Tensors may be on disk still: `get` fetches them."""

    site: AttentionSite
    step: int
    heads: tuple[int, ...] | None  # the query heads kept; None for all
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    scale: float = 1.0
    is_causal: bool = False
    softcap: float | None = None
    tile: int | None = None
    replay: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, repr=False)
    store: Store | None = field(default=None, repr=False)
    shard: str = ""
    aliases: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    def has(self, name: str) -> bool:
        return name in self.tensors or (self.store is not None and (name in self.aliases or name in self.store.shards.get(self.shard, ())))

    def get(self, name: str, heads: Sequence[int] | None = None) -> Tensor:
        """A kept tensor; of the given entries along its head axis only, where those are asked for."""
        if name in self.tensors:
            tensor = self.tensors[name]
            return tensor if heads is None or tensor.shape[1] == 1 else tensor[:, list(heads)]
        assert self.store is not None
        shard, key = self.aliases.get(name, (self.shard, name))
        if heads is None or self.store.shape(shard, key)[1] == 1:
            return self.store.read(shard, key)
        return torch.cat([self.store.read_slice(shard, key, (slice(None), slice(h, h + 1))) for h in heads], dim=1)

    def names(self) -> list[str]:
        stored = () if self.store is None else self.store.shards.get(self.shard, ())
        return sorted({*self.tensors, *stored, *self.aliases})

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def places(self, heads: Sequence[int] | int | None) -> list[int] | None:
        """Positions of the asked heads among those kept."""
        kept = self.heads or tuple(range(self.site.query_heads))
        if heads is None:
            return None
        asked = [heads] if isinstance(heads, int) else list(heads)
        for head in asked:
            if not 0 <= head < self.site.query_heads:
                raise SelectionError(
                    f"no head {head}: {self.site.name} has {self.site.query_heads} heads, 0 to {self.site.query_heads - 1}"
                )
            if head not in kept:
                raise SelectionError(f"head {head} of {self.site.name} was not kept; kept are {list(kept)}")
        return [kept.index(h) for h in asked]


class Capture:
    """The kept calls of a run; made by `Probe.capture` or `Capture.open`."""

    def __init__(
        self, keep: Keep, *, sites: str | Sequence[str] | None = None, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None,
        steps: Sequence[int] | None = None, fingerprint: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        self.keep = keep
        self.records: dict[tuple[str, int], Record] = {}
        self._sites: dict[str, AttentionSite] = {}
        self._globs = [sites] if isinstance(sites, str) else None if sites is None else list(sites)
        self._layers = None if layers is None else [layers] if isinstance(layers, int) else list(layers)
        self._heads = None if heads is None else tuple([heads] if isinstance(heads, int) else heads)
        self._steps = None if steps is None else {steps} if isinstance(steps, int) else set(steps)
        self._seen: dict[str, AttentionSite] = {}
        self._counts: Counter[str] = Counter()
        self._spent = 0
        self._budget = keep.budget
        self._fingerprint = fingerprint
        self._closed = False
        self._store: Store | None = None
        self.changes = False

    # -- as a handler ----------------------------------------------------------------------------------------------

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        return value

    def reads(self, site: AttentionSite) -> frozenset[str]:
        if not self._wants(site):
            return frozenset()
        return frozenset(("pattern",) * self.keep.needs_pattern + ("scores",) * self.keep.scores)

    def see(self, call: AttentionCall) -> None:
        self._seen.setdefault(call.site.name, call.site)
        if call.recomputed or not self._wants(call.site):
            return
        self._sites[call.site.name] = call.site
        if self._steps is not None and call.step not in self._steps:
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(call.q):
            raise NotIntercepted("tensors inside vmap or jacrev cannot be kept beyond it: capture a plain call, or loop over the samples")
        with torch.set_grad_enabled(self.keep.gradient and torch.is_grad_enabled()):  # looking must save nothing for a backward
            self.records[call.site.name, call.step] = self._record(call)

    def _wants(self, site: AttentionSite) -> bool:
        if self._layers is not None and site.layer not in self._layers:
            return False
        return self._globs is None or any(matches(site, glob) for glob in self._globs)

    def _record(self, call: AttentionCall) -> Record:
        keep, site = self.keep, call.site
        heads = self._heads
        if heads is not None:
            wrong = [h for h in heads if not 0 <= h < site.query_heads]
            if wrong:
                raise SelectionError(f"no head {wrong[0]}: {site.name} has {site.query_heads} heads, 0 to {site.query_heads - 1}")
        record = Record(
            site, call.step, heads, scale=call.scale, is_causal=call.is_causal, softcap=call.softcap, tile=keep.pooled, replay=call.replay
        )
        self._check_budget(call, len(heads) if heads is not None else site.query_heads)
        if keep.queries_and_keys or keep.needs_pattern or keep.v or keep.z:
            self._check_finite(call)
        chosen = None if heads is None else list(heads)
        grouped = None if heads is None or call.k.shape[1] == 1 else [h // call.groups for h in heads]

        def put(name: str, tensor: Tensor, picked: list[int] | None) -> None:
            kept = tensor if picked is None or tensor.shape[1] == 1 else tensor[:, picked]
            if keep.device is not None or (keep.dtype is not None and kept.is_floating_point()):
                kept = kept.to(device=keep.device, dtype=keep.dtype if kept.is_floating_point() else None)
            if not keep.gradient:
                kept = kept.detach()
            if kept.untyped_storage().nbytes() > kept.numel() * kept.element_size():
                kept = kept.clone()  # a view would keep all of a cache or a fused projection alive, and change with it
            record.tensors[name] = kept
            self._spent += kept.numel() * kept.element_size()

        told = keep.queries_and_keys and not call.rewritten
        if keep.queries_and_keys and call.rewritten and call.materialised is not None and not keep.pattern:
            put("pattern", call.materialised, chosen)  # an edit made it what it is: q and k cannot tell it any more
        if told:
            whole = call.replay is not None  # the tape runs on all heads at once
            put("q", call.q, None if whole else chosen)
            put("k", call.k, None if whole else grouped)
            for name in ("mask", "bias"):
                extra = getattr(call, name)
                if extra is not None:
                    record.tensors[name] = extra.detach() if extra.shape[1] == 1 or chosen is None else extra.detach()[:, chosen]
            if call.sink is not None:
                record.tensors["sink"] = call.sink.detach() if chosen is None else call.sink.detach()[chosen]
        if keep.v and call.v is not None:
            put("v", call.v, grouped)
        if keep.z and call.z is not None:
            put("z", call.z, chosen)
        if keep.scores:
            scores = call.materialised_scores if call.materialised_scores is not None else self._scores(call)
            put("scores", scores, chosen)
        if keep.needs_pattern:
            self._keep_pattern(call, record, put, chosen)
        if not (keep.queries_and_keys and call.replay is not None):
            record.replay = None
        return record

    def _scores(self, call: AttentionCall) -> Tensor:
        if call.replay is not None:
            return call.replay(call.q, call.k)
        return reference.scores(
            call.q, call.k, scale=call.scale, bias=call.bias, mask=call.mask, is_causal=call.is_causal, softcap=call.softcap
        )

    def _keep_pattern(
        self, call: AttentionCall, record: Record, put: Callable[[str, Tensor, list[int] | None], None], chosen: list[int] | None
    ) -> None:
        keep = self.keep
        pattern = call.materialised
        if pattern is None and call.replay is not None:
            pattern = reference.pattern(call.replay(call.q, call.k), sink=call.sink)
        facts = _facts(call, chosen)
        if pattern is None and keep.pattern:
            pattern = reference.pattern(reference.scores(**facts["scores"]), sink=facts["sink"])
            put("pattern", pattern, None)
            if chosen is not None:
                pattern = None
        elif pattern is not None and keep.pattern:
            put("pattern", pattern, chosen)
        if keep.rows is not None:
            rows = _positions(keep.rows, call.queries)
            if pattern is not None:
                put("rows", pattern[:, :, rows], chosen)
            else:
                put("rows", kernels.rows(facts["scores"]["q"], facts["scores"]["k"], rows, **facts["options"]), None)
            record.rows = tuple(rows)
        if keep.wanted_statistics or keep.pooled:
            if pattern is not None:
                picked = pattern if chosen is None else pattern[:, chosen]
                scores = call.materialised_scores
                found = kernels.statistics_of_pattern(picked, want=keep.wanted_statistics, pooled=keep.pooled,
                                                      scores=None if scores is None else scores if chosen is None else scores[:, chosen])  # fmt: skip
            else:
                found = kernels.statistics(
                    facts["scores"]["q"], facts["scores"]["k"], want=keep.wanted_statistics, pooled=keep.pooled, **facts["options"]
                )
            for name, tensor in found.tensors().items():
                put(STATISTIC + name, tensor, None)

    @torch.no_grad()
    def _check_finite(self, call: AttentionCall) -> None:
        for name, tensor in (("q", call.q), ("k", call.k)):
            if not bool(torch.isfinite(tensor).all()):
                b, h, position, _ = (int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])
                raise NonFiniteError(
                    f"{name} of {call.site.name} is not finite, first at sample {b}, head {h}, position {position} (step {call.step}): "
                    "the model, its input or an edit produced NaN or infinity before this layer"
                )

    def _check_budget(self, call: AttentionCall, heads: int) -> None:
        keep = self.keep
        if self._budget is None:
            self._budget = free_memory(torch.device(keep.device) if keep.device is not None else call.q.device) // 2
        batch, size = call.q.shape[0], (torch.empty((), dtype=keep.dtype).element_size() if keep.dtype else call.q.element_size())
        cells = batch * heads * call.queries * call.keys
        need = {
            "pattern": cells * size * keep.pattern, "scores": cells * size * keep.scores,
            "rows": batch * heads * (len(keep.rows) if keep.rows is not None else 0) * call.keys * size,
            "q and k": (call.q.numel() + call.k.numel()) * size * keep.queries_and_keys,
            "z": call.q.numel() * size * keep.z, "v": call.k.numel() * size * keep.v,
        }  # fmt: skip
        total = self._spent + sum(need.values())
        if total > self._budget:
            largest = max(need, key=lambda n: need[n])
            raise BudgetError(
                f"keeping {largest} of {call.site.name} ({readable(need[largest])}) would bring this capture to {readable(total)}, over its budget of "
                f"{readable(self._budget)}: keep statistics=True, rows=[…] or pooled=64 instead, choose layers= and heads=, or pass budget="
            )

    def finish(self) -> None:
        """Called when the scope ends without an error: a selection that hit nothing is said, not ignored."""
        if not self._seen:
            return
        if self.keep == Keep(qk=False):
            return
        if not self._sites:
            raise SelectionError(f"the capture's selection hit no site: {self._selection()}; the model showed {_list(list(self._seen))}")
        if not self.records:
            raise SelectionError(f"the capture's steps={sorted(self._steps or ())} were never reached; sites ran fewer steps")

    def _selection(self) -> str:
        return ", ".join(f"{n}={v!r}" for n, v in (("sites", self._globs), ("layers", self._layers)) if v is not None) or "everything"

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[AttentionSite]:
        """The sites of which something was kept, in execution order."""
        self._open()
        return list(self._sites.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all kept tensors in memory."""
        return sum(record.nbytes() for record in self.records.values())

    def steps(self, site: str | None = None, layer: int | None = None) -> list[int]:
        """The steps kept of a site."""
        name = self._find(layer, site).name
        return sorted(step for found, step in self.records if found == name)

    def pattern(
        self, layer: int | None = None, *, site: str | None = None, step: int | None = None, heads: int | Sequence[int] | None = None,
        rows: Sequence[int] | int | None = None,
    ) -> Tensor:  # fmt: skip
        """Softmax probabilities, [batch, head, query, key], whatever the model's own layout.

        Args:
            layer, site, step: which call; a step may be left out where there is only one.
            heads: some heads only, [batch, len(heads), query, key].
            rows: some query positions only, in the order given.

        Raises:
            SelectionError: no such call, head or row, or not kept.
        """
        record = self._one(layer, site, step)
        places = record.places(heads)
        wanted = None if rows is None else [rows] if isinstance(rows, int) else list(rows)
        if record.has("pattern"):
            pattern = record.get("pattern", places)
            return pattern if wanted is None else pattern[:, :, _positions(wanted, pattern.shape[2])]
        if record.rows is not None and wanted is not None and not record.has("q"):
            missing = [r for r in wanted if r not in record.rows and r not in (self.keep.rows or ())]
            if missing:
                raise SelectionError(f"row {missing[0]} of {record.site.name} was not kept; kept are {list(record.rows)}")
            order = [record.rows.index(r) if r in record.rows else list(self.keep.rows or ()).index(r) for r in wanted]
            return record.get("rows", places)[:, :, order]
        if record.rows is not None and not record.has("q"):
            return record.get("rows", places)
        if not record.has("q"):
            raise SelectionError(
                f"of {record.site.name} only {_list(record.names())} was kept: capture with Keep() or Keep(pattern=True) to read patterns"
            )
        if record.replay is not None:
            pattern = self._normalise(record, record.replay(record.get("q"), record.get("k")))
            pattern = pattern if places is None else pattern[:, list(record.heads[p] for p in places) if record.heads else places]
            return pattern if wanted is None else pattern[:, :, _positions(wanted, pattern.shape[2])]
        facts = self._facts(record, places)
        if wanted is not None:
            return kernels.rows(facts["scores"]["q"], facts["scores"]["k"], wanted, **facts["options"])
        return reference.pattern(reference.scores(**facts["scores"]), sink=facts["sink"])

    def statistics(
        self, layer: int | None = None, *, site: str | None = None, step: int | None = None, heads: int | Sequence[int] | None = None,
        pooled: int | None = None,
    ) -> Statistics:  # fmt: skip
        """Row, column and tile statistics of one call; computed from q and k on demand where they were not kept themselves.

        Raises:
            SelectionError: no such call or head, or nothing was kept to compute them from.
        """
        record = self._one(layer, site, step)
        places = record.places(heads)
        kept = [name for name in record.names() if name.startswith(STATISTIC)]
        if kept and (pooled is None or pooled == record.tile):
            return Statistics(**{name.removeprefix(STATISTIC): record.get(name, places) for name in kept})
        if record.has("pattern"):
            return kernels.statistics_of_pattern(record.get("pattern", places), pooled=pooled)
        if not record.has("q"):
            raise SelectionError(
                f"of {record.site.name} only {_list(record.names())} was kept: capture with Keep() or Keep(statistics=True)"
            )
        if record.replay is not None:
            scores = record.replay(record.get("q"), record.get("k"))
            scores = scores if places is None else scores[:, places]
            return kernels.statistics_of_pattern(self._normalise(record, scores), pooled=pooled, scores=scores)
        facts = self._facts(record, places)
        return kernels.statistics(facts["scores"]["q"], facts["scores"]["k"], pooled=pooled, **facts["options"])

    def pooled(self, layer: int | None = None, *, site: str | None = None, step: int | None = None, heads: int | Sequence[int] | None = None,
               tile: int = 64) -> Tensor:  # fmt: skip
        """Mass of the pattern per tile × tile square, [batch, head, ⌈query/tile⌉, ⌈key/tile⌉]."""
        record = self._one(layer, site, step)
        found = self.statistics(layer, site=site, step=step, heads=heads, pooled=record.tile or tile).pooled
        assert found is not None
        return found

    def q(self, layer: int | None = None, **which: Any) -> Tensor:
        """Queries, [batch, head, query, width]."""
        return self._tensor("q", layer, **which)

    def k(self, layer: int | None = None, **which: Any) -> Tensor:
        """Keys, [batch, kv head, key, width]."""
        return self._tensor("k", layer, **which)

    def v(self, layer: int | None = None, **which: Any) -> Tensor:
        """Values, [batch, kv head, key, width]."""
        return self._tensor("v", layer, **which)

    def z(self, layer: int | None = None, **which: Any) -> Tensor:
        """Per-head outputs before the output projection, [batch, head, query, width]."""
        return self._tensor("z", layer, **which)

    def scores(self, layer: int | None = None, **which: Any) -> Tensor:
        """Scores before the normaliser, [batch, head, query, key]."""
        return self._tensor("scores", layer, **which)

    def _tensor(
        self, name: str, layer: int | None, *, site: str | None = None, step: int | None = None, heads: int | Sequence[int] | None = None
    ) -> Tensor:
        record = self._one(layer, site, step)
        if not record.has(name):
            raise SelectionError(
                f"{name} of {record.site.name} was not kept; kept are {_list(record.names())}: capture with Keep({'qk' if name in 'qk' else name}=True)"
            )
        return record.get(name, record.places(heads))

    # -- finding ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._closed:
            raise ClosedError("this capture was closed; open it again or keep it open while reading")

    def close(self) -> None:
        """Let go of everything kept."""
        self._closed = True
        self.records.clear()

    def _find(self, layer: int | None, site: str | None) -> AttentionSite:
        self._open()
        if not self._sites:
            raise SelectionError("nothing was captured: run the model inside the `with probe.capture(…)` block first")
        found = [s for s in self._sites.values() if (site is None or matches(s, site)) and (layer is None or s.layer == layer)]
        exact = [s for s in found if site is not None and site in (s.name, s.module)]
        found = exact if len(exact) == 1 else found
        if not found:
            layers = sorted({s.layer for s in self._sites.values() if s.layer is not None})
            choice = f"captured layers are {layers}" if site is None else f"captured sites are {_list(list(self._sites))}"
            raise SelectionError(f"no captured site matches {'layer=' + str(layer) if site is None else 'site=' + repr(site)}: {choice}")
        if len(found) > 1:
            raise SelectionError(f"{len(found)} sites match: {_list([s.name for s in found])}; say which with site=")
        return found[0]

    def _one(self, layer: int | None, site: str | None, step: int | None) -> Record:
        found = self._find(layer, site)
        steps = sorted(s for name, s in self.records if name == found.name)
        if step is None and len(steps) > 1:
            raise SelectionError(f"{found.name} was called {len(steps)} times: say step={steps[0]} … step={steps[-1]}")
        wanted = steps[0] if step is None and steps else step
        if wanted is not None and wanted < 0 and steps:
            wanted = steps[wanted] if -wanted <= len(steps) else wanted
        if wanted not in steps:
            raise SelectionError(f"no step {wanted} of {found.name}; kept are {steps}")
        assert wanted is not None
        return self.records[found.name, wanted]

    def _facts(self, record: Record, places: list[int] | None) -> dict[str, Any]:
        if places is None:
            call = AttentionCall(record.site, record.step, record.get("q"), record.get("k"), None, record.scale,
                                 *(record.get(n) if record.has(n) else None for n in ("mask", "bias")), record.is_causal, record.softcap,
                                 record.get("sink") if record.has("sink") else None)  # fmt: skip
            return _facts(call, None)
        count = len(record.heads) if record.heads is not None else record.site.query_heads
        groups = count // record.site.kv_heads if record.heads is None else 1
        one_key = record.site.kv_heads == 1
        call = AttentionCall(record.site, record.step, record.get("q", places), record.get("k", None if one_key else [p // groups for p in places]), None, record.scale,
                             *(record.get(n, places) if record.has(n) else None for n in ("mask", "bias")), record.is_causal, record.softcap,
                             record.get("sink")[places] if record.has("sink") else None)  # fmt: skip
        return _facts(call, None)

    def _normalise(self, record: Record, scores: Tensor) -> Tensor:
        if record.site.normaliser == "sigmoid":
            return torch.sigmoid(scores)
        if record.site.normaliser == "relu":
            return torch.relu(scores)
        if record.site.sinks:
            raise SelectionError(f"{record.site.name} normalises over sinks as well: capture with Keep(pattern=True) or Keep(rows=…)")
        return reference.pattern(scores)

    # -- on disk ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write everything kept to a folder that is whole or absent; see `headscope.probe.store`.

        Raises:
            StoreError: the folder exists (pass overwrite=True), or cannot be written.
        """
        self._open()
        if not self.records:
            raise StoreError("nothing was captured, so there is nothing to save")
        shards: dict[str, dict[str, Tensor]] = {"shared": {}}
        shared: dict[tuple[Any, ...], str] = {}
        calls = []
        for i, record in enumerate(self.records.values()):
            shard = f"{i:05d}"
            tensors, aliases = {}, {}
            for name in record.names():
                tensor = record.get(name)
                if name in ("mask", "bias", "sink"):  # often one tensor for every layer
                    tensor = tensor.contiguous() if 0 not in tensor.stride() else _compact(tensor)
                    key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
                    spot = shared.setdefault(key, f"{name}.{len(shared)}")
                    shards["shared"][spot] = tensor
                    aliases[name] = spot
                else:
                    tensors[name] = tensor
            if record.replay is not None and "pattern" not in tensors:
                tensors["pattern"] = self.pattern(site=record.site.name, step=record.step)
                if record.heads is not None:
                    tensors.pop("q"), tensors.pop("k")
            shards[shard] = {n: t.detach() for n, t in tensors.items()}
            calls.append({
                "site": record.site.to_dict(), "step": record.step, "heads": None if record.heads is None else list(record.heads),
                "rows": None if record.rows is None else list(record.rows), "scale": record.scale, "is_causal": record.is_causal,
                "softcap": record.softcap, "tile": record.tile, "shard": shard, "shared": aliases,
            })  # fmt: skip
        if not shards["shared"]:
            del shards["shared"]
        manifest: dict[str, object] = {
            "keep": self.keep.to_dict(), "calls": calls, "versions": {name: version(name) for name in ("headscope", "torch")},
            "model": None if self._fingerprint is None else self._fingerprint(),
        }  # fmt: skip
        write(Path(folder), shards, manifest, overwrite=overwrite)

    @classmethod
    def open(cls, folder: str | Path) -> Capture:
        """Open a saved capture; tensors are read when asked for, single heads without the rest.

        Raises:
            StoreError: no capture there, or a damaged one.
        """
        store = Store.open(Path(folder))
        try:
            kept: dict[str, Any] = dict(store.manifest["keep"])  # type: ignore[call-overload]
            dtype = kept.pop("dtype")
            keep = Keep(
                **{**kept, "dtype": None if dtype is None else getattr(torch, dtype), "statistics": tuple(kept["statistics"]) or False}
            )
            capture = cls(keep)
            for entry in store.manifest["calls"]:  # type: ignore[attr-defined]
                site = AttentionSite(**entry["site"])
                heads = None if entry["heads"] is None else tuple(entry["heads"])
                record = Record(site, entry["step"], heads, rows=None if entry["rows"] is None else tuple(entry["rows"]), scale=entry["scale"],
                                is_causal=entry["is_causal"], softcap=entry["softcap"], tile=entry["tile"], store=store, shard=entry["shard"],
                                aliases={n: ("shared", spot) for n, spot in entry["shared"].items()})  # fmt: skip
                capture.records[site.name, record.step] = record
                capture._sites[site.name] = capture._seen[site.name] = site
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{folder} is a capture, but its manifest is not one of this version ({error!r}): capture again") from error
        capture._store = store
        return capture

    def verify(self) -> None:
        """Check every file of an opened capture against its checksum."""
        if self._store is None:
            raise StoreError("this capture is in memory: save it, open it, then verify")
        self._store.verify()

    # -- views -----------------------------------------------------------------------------------------------------

    def to_xarray(self, what: str = "pattern") -> xarray.Dataset:
        """Named axes: one variable per call, over sample, head, query and key; `what` may also name a statistic.

        Raises:
            SelectionError: xarray is missing, or `what` was not kept.
        """
        try:
            import xarray
        except ImportError as error:
            raise SelectionError("to_xarray() needs xarray: pip install xarray") from error
        variables = {}
        for (name, step), record in self.records.items():
            if what == "pattern":
                value = self.pattern(site=name, step=step)
            else:
                found = getattr(self.statistics(site=name, step=step), what, None)
                if found is None:
                    raise SelectionError(f"no statistic {what!r}: choose pattern or one of {', '.join(kernels.NAMES)}")
                value = found
            axes = ["sample", "head", "query", "key"] if value.ndim == 4 else ["sample", "head", "key" if what == "received" else "query"]
            dims = [a if a in ("sample", "head") else f"{a}:{n}" for a, n in zip(axes, value.shape, strict=True)]
            kept = list(record.heads) if record.heads is not None else list(range(record.site.query_heads))
            variables[f"{name}@{step}"] = xarray.DataArray(value.detach().float().cpu().numpy(), dims=[*dims[:1], f"head:{len(kept)}", *dims[2:]],
                                                           coords={f"head:{len(kept)}": kept}, attrs={"site": name, "step": step, "layer": record.site.layer})  # fmt: skip
        return xarray.Dataset(variables)

    def __repr__(self) -> str:
        return f"Capture({len(self._sites)} sites, {len(self.records)} calls, {readable(self.nbytes)})"

    def _repr_html_(self) -> str:
        lines = "".join(
            f"<tr><td>{html.escape(r.site.name)}</td><td>{r.step}</td><td>{r.site.query_heads}</td><td>{html.escape(', '.join(r.names()))}</td><td>{readable(r.nbytes())}</td></tr>"
            for r in list(self.records.values())[:200]
        )
        return f"<table><tr><th>site</th><th>step</th><th>heads</th><th>kept</th><th>size</th></tr>{lines}</table>"


def matches(site: AttentionSite, glob: str) -> bool:
    """Whether a glob names a site: its full name, its name without `#0`, or its module path."""
    return any(fnmatchcase(name, glob) for name in (site.name, site.name.removesuffix("#0"), site.module))


def _facts(call: AttentionCall, heads: list[int] | None) -> dict[str, Any]:
    """A call as arguments of the kernels, for some heads only where asked."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or heads is None or tensor.ndim < 4 or tensor.shape[1] == 1 else tensor[:, heads]

    q, k = call.q, call.k
    if heads is not None:
        q = q[:, heads]
        k = k if k.shape[1] == 1 else k[:, [h // call.groups for h in heads]]
    sink = call.sink if call.sink is None or heads is None else call.sink[heads]
    options = {"scale": call.scale, "bias": cut(call.bias), "mask": cut(call.mask), "is_causal": call.is_causal, "softcap": call.softcap}
    return {"scores": {"q": q, "k": k, **options}, "options": {**options, "sink": sink}, "sink": sink}


def _positions(rows: Sequence[int], count: int) -> list[int]:
    for row in rows:
        if not -count <= row < count:
            raise SelectionError(f"no query position {row}: this call has {count}, 0 to {count - 1}")
    return [int(row) % count for row in rows]


def _compact(tensor: Tensor) -> Tensor:
    """Drop what an expanded tensor repeats: its stride-0 dimensions become size 1 again."""
    index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    return tensor[index].contiguous()


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
