"""What was kept of the attention calls of a run: patterns, statistics and tensors, by layer or site, and by step.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headscope.kernels.errors import ClosedError, SelectionError, StoreError
from headscope.kernels.panels import OF_SCORES
from headscope.kernels.statistics import NAMES, Statistics
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.keep import Keep, readable
from headscope.probe.record import STATISTIC, Record, compact, spoken, stored_bytes
from headscope.probe.recorder import Recorder
from headscope.probe.store import Store, write

if TYPE_CHECKING:
    import xarray

Heads = int | Sequence[int] | None


class Capture:
    """The kept calls of a run; made by `Probe.capture` or `Capture.open`."""

    changes = False  # as a handler it only looks

    def __init__(
        self,
        keep: Keep,
        *,
        sites: str | Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
        fingerprint: Callable[[], str] | None = None,
    ) -> None:
        self.keep = keep
        self.records: dict[tuple[str, int], Record] = {}
        self._sites: dict[str, AttentionSite] = {}
        self._seen: dict[str, AttentionSite] = {}
        self._globs = [sites] if isinstance(sites, str) else None if sites is None else list(sites)
        self._layers = None if layers is None else list(layers)
        self._steps = None if steps is None else set(steps)
        self._recorder = Recorder(keep, None if heads is None else tuple(heads))
        self._fingerprint = fingerprint
        self._store: Store | None = None
        self._closed = False

    # -- as a handler ----------------------------------------------------------------------------------------------

    def stages(self, site: AttentionSite) -> frozenset[str]:
        """None: a capture changes nothing."""
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def reads(self, site: AttentionSite) -> frozenset[str]:
        """Scores and pattern, where they are to be kept and the model's code forms them anyway."""
        if not self._wants(site):
            return frozenset()
        keep = self.keep
        lost = keep.queries_and_keys and site.normaliser != "softmax"  # q and k do not tell its pattern
        return frozenset(("pattern",) * (keep.needs_pattern or lost) + ("scores",) * (keep.scores or bool(keep.statistics)))

    def see(self, call: AttentionCall) -> None:
        """Keep what was asked of a finished call."""
        self._seen.setdefault(call.site.name, call.site)
        if call.recomputed or not self._wants(call.site):
            return
        self._sites[call.site.name] = call.site
        if self._steps is None or call.step in self._steps:
            self.records[call.site.name, call.step] = self._recorder.record(call)

    def _wants(self, site: AttentionSite) -> bool:
        if self._layers is not None and site.layer not in self._layers:
            return False
        return self._globs is None or any(matches(site, glob) for glob in self._globs)

    def finish(self, sites: dict[str, AttentionSite]) -> None:
        """The scope ended without an error: take what the run learned of its sites, and say it if the selection hit nothing.

        Raises:
            SelectionError: no site, or no step, was hit.
        """
        for name in self._sites:
            self._sites[name] = sites.get(name, self._sites[name])
        for record in self.records.values():
            record.site = self._sites[record.site.name]
        if self._seen and not self._sites:
            chosen = ", ".join(f"{n}={v!r}" for n, v in (("sites", self._globs), ("layers", self._layers)) if v is not None)
            raise SelectionError(f"the capture's selection hit no site: {chosen}; the model showed {spoken(list(self._seen))}")
        if self._seen and not self.records:
            raise SelectionError(f"the capture's steps={sorted(self._steps or ())} were never reached: the sites ran fewer steps")

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[AttentionSite]:
        """The sites of which something was kept, in execution order."""
        self._open()
        return list(self._sites.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all kept tensors in memory."""
        tensors = {id(t): t for record in self.records.values() for t in record.tensors.values()}  # a mask may be every layer's
        return sum(stored_bytes(t) for t in tensors.values())

    def steps(self, site: str | None = None, layer: int | None = None) -> list[int]:
        """The steps kept of a site."""
        name = self._find(layer, site).name
        return sorted(step for found, step in self.records if found == name)

    def pattern(
        self,
        layer: int | None = None,
        *,
        site: str | None = None,
        step: int | None = None,
        heads: Heads = None,
        rows: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Softmax probabilities, [batch, head, query, key], whatever the model's own layout.

        Args:
            layer: which layer, where it has one site.
            site: or which site, by name, module path or glob.
            step: which call of it; may be left out where there is only one, and counts from the end where negative.
            heads: some heads only, [batch, len(heads), query, key].
            rows: some query positions only, in the order given.

        Raises:
            SelectionError: no such call, head or row, or not kept.
        """
        record = self._one(layer, site, step)
        return record.pattern(record.places(heads), None if rows is None else [rows] if isinstance(rows, int) else list(rows))

    def statistics(
        self, layer: int | None = None, *, site: str | None = None, step: int | None = None, heads: Heads = None, pooled: int | None = None
    ) -> Statistics:
        """Row, column and tile statistics of one call; computed now from what was kept, where they were not kept themselves.

        Args:
            layer, site, step, heads: as in `pattern`.
            pooled: side of the tiles of the pooled map, if one is wanted.

        Raises:
            SelectionError: no such call or head, or nothing was kept to compute them from.
        """
        record = self._one(layer, site, step)
        return record.statistics(record.places(heads), pooled)

    def pooled(
        self, layer: int | None = None, *, site: str | None = None, step: int | None = None, heads: Heads = None, tile: int | None = None
    ) -> Tensor:
        """Mass of the pattern per tile × tile square, [batch, head, ⌈query/tile⌉, ⌈key/tile⌉]; by default the kept tile, else 64."""
        record = self._one(layer, site, step)
        found = record.statistics(record.places(heads), tile or record.tile or 64).pooled
        assert found is not None
        return found

    def q(self, layer: int | None = None, *, site: str | None = None, step: int | None = None, heads: Heads = None) -> Tensor:
        """Queries, [batch, head, query, width]."""
        return self._tensor("q", layer, site, step, heads)

    def k(self, layer: int | None = None, *, site: str | None = None, step: int | None = None) -> Tensor:
        """Keys, [batch, kv head, key, width]."""
        return self._tensor("k", layer, site, step, None)

    def v(self, layer: int | None = None, *, site: str | None = None, step: int | None = None) -> Tensor:
        """Values, [batch, kv head, key, width]."""
        return self._tensor("v", layer, site, step, None)

    def z(self, layer: int | None = None, *, site: str | None = None, step: int | None = None, heads: Heads = None) -> Tensor:
        """Per-head outputs before the output projection, [batch, head, query, width]."""
        return self._tensor("z", layer, site, step, heads)

    def scores(self, layer: int | None = None, *, site: str | None = None, step: int | None = None, heads: Heads = None) -> Tensor:
        """Scores before the normaliser, [batch, head, query, key]; -inf where a key may not be seen."""
        record = self._one(layer, site, step)
        return record.scores(record.places(heads))

    def _tensor(self, name: str, layer: int | None, site: str | None, step: int | None, heads: Heads) -> Tensor:
        record = self._one(layer, site, step)
        if not record.has(name):
            asked = "qk" if name in ("q", "k") else name
            raise SelectionError(
                f"{name} of {record.site.name} was not kept; kept are {spoken(record.names())}: capture with Keep({asked}=True)"
            )
        return record.operand(name, record.places(heads))

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
            choice = f"captured layers are {layers}" if site is None else f"captured sites are {spoken(list(self._sites))}"
            raise SelectionError(f"no captured site matches {'layer=' + str(layer) if site is None else 'site=' + repr(site)}: {choice}")
        if len(found) > 1:
            raise SelectionError(f"{len(found)} sites match: {spoken([s.name for s in found])}; say which with site=")
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
        shared: dict[object, str] = {}
        calls = []
        for i, record in enumerate(self.records.values()):
            shard = f"{i:05d}"
            tensors, aliases = {}, {}
            for name in record.names():
                if name in ("mask", "bias", "sink"):  # often one tensor for every layer
                    key: object = record.aliases[name] if name in record.aliases else _memory(record.tensors[name])
                    if key not in shared:
                        shared[key] = f"{name}.{len(shared)}"
                        shards["shared"][shared[key]] = compact(record.get(name)).contiguous()
                    aliases[name] = shared[key]
                else:
                    tensors[name] = record.operand(name)
            if record.replay is not None:  # the model's own code is not saved, so what it made is
                tensors.setdefault("pattern", record.pattern(None, None))
                for name, tensor in record.computed(None, sorted(OF_SCORES), None).tensors().items():
                    tensors.setdefault(STATISTIC + name, tensor)
            shards[shard] = {n: t.detach() for n, t in tensors.items()}
            calls.append({
                "site": record.site.to_dict(), "step": record.step, "heads": None if record.heads is None else list(record.heads),
                "rows": None if record.rows is None else list(record.rows), "scale": record.scale, "is_causal": record.is_causal,
                "softcap": record.softcap, "tile": record.tile, "told": record.told and record.replay is None,
                "shard": shard, "shared": aliases,
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
                record = Record(
                    site,
                    entry["step"],
                    heads,
                    rows=None if entry["rows"] is None else tuple(entry["rows"]),
                    scale=entry["scale"],
                    is_causal=entry["is_causal"],
                    softcap=entry["softcap"],
                    tile=entry["tile"],
                    told=entry["told"],
                    store=store,
                    shard=entry["shard"],
                    aliases={n: ("shared", spot) for n, spot in entry["shared"].items()},
                )
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
        """Named axes: one variable per call, over sample, head, query and key; `what` may also name a statistic, or `pooled`.

        An axis carries its length in its name, `query:128`, since calls differ; `sample` does so where the batch differs too.

        Raises:
            SelectionError: xarray is missing, or `what` was not kept.
        """
        try:
            import xarray
        except ImportError as error:
            raise SelectionError("to_xarray() needs xarray: pip install xarray") from error
        self._open()
        values: dict[tuple[str, int], Tensor] = {}
        for (name, step), record in self.records.items():
            value = record.pattern(None, None) if what == "pattern" else getattr(record.statistics(None, None), what, None)
            if value is None:
                raise SelectionError(f"no {what!r} of {name}: choose pattern or one of {', '.join((*NAMES, 'pooled'))}, and keep it")
            values[name, step] = value
        last = {"pattern": ["query", "key"], "pooled": ["query tile", "key tile"], "received": ["key"]}.get(what, ["query"])
        batches = {value.shape[0] for value in values.values()}
        variables = {}
        for (name, step), value in values.items():
            record = self.records[name, step]
            dims = [f"{axis}:{n}" for axis, n in zip(["sample", "head", *last], value.shape, strict=True)]
            if len(batches) == 1:  # windows folded into the batch make it another size at some sites
                dims[0] = "sample"
            heads = list(record.heads) if record.heads is not None else list(range(record.site.query_heads))
            plain = value.detach().cpu()
            variables[f"{name}@{step}"] = xarray.DataArray(
                (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy(),  # numpy has no bfloat16
                dims=dims,
                coords={dims[1]: heads},
                attrs={"site": name, "step": step, "layer": record.site.layer} | ({"rows": list(record.rows)} if record.rows else {}),
            )
        return xarray.Dataset(variables)

    def __repr__(self) -> str:
        return f"Capture({len(self._sites)} sites, {len(self.records)} calls, {readable(self.nbytes)})"

    def _repr_html_(self) -> str:
        shown = list(self.records.values())[:200]
        rows = [(r.site.name, r.step, r.site.query_heads, ", ".join(r.names()), readable(r.nbytes())) for r in shown]
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        rest = f"<p>… and {len(self.records) - len(shown)} more calls</p>" if len(self.records) > len(shown) else ""
        return f"<table><tr><th>site</th><th>step</th><th>heads</th><th>kept</th><th>size</th></tr>{lines}</table>{rest}"


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that are the same numbers in memory."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def matches(site: AttentionSite, glob: str) -> bool:
    """Whether a glob names a site: its full name, its name without `#0`, or its module path."""
    return any(name == glob or fnmatchcase(name, glob) for name in (site.name, site.name.removesuffix("#0"), site.module))
