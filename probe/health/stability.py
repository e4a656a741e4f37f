"""Does it show early which tokens matter? What a scheme that drops tokens after some layer would assume, measured.

Letters: L sites in execution order, N tokens, E width of the residual stream.

Such schemes (DASH, arXiv 2604.18103) take the norm Δ_t = ‖U_t‖₂ of the attention output U before the residual, at one layer, and keep the
tokens with the largest for all layers after it. That is sound where Δ names tokens that later layers attend to, and about the same ones at
every layer. Both are measured here; nothing is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import HeadscopeError, InputError, NotIntercepted
from headscope.probe.attribution.as_html import table
from headscope.probe.attribution.correlation import rank_correlation
from headscope.probe.call import AttentionSite
from headscope.probe.health.inputs import Batch, Inputs, batches_of, refuse_training
from headscope.probe.health.kept import Kept
from headscope.probe.health.measures import Plain, plain
from headscope.probe.health.rows import panels_of, rows_of
from headscope.probe.interception import intercept
from headscope.probe.probe import Probe
from headscope.probe.record import Record
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

LEAST = 4  # tokens of a sample; fewer have no ranks worth comparing
VECTORS = ("norm", "variation", "stays", "foresight", "kept_mass")


@dataclass(frozen=True, eq=False)
class TokenStability:
    """How well the norm of a layer's attention output tells which tokens later layers need. Means over the samples.

    Attributes:
        sites: the L self-attention sites, in execution order.
        share: of the tokens that is kept.
        tokens: tokens counted, over all samples.
        norm: [L], mean of Δ.
        variation: [L], standard deviation of Δ over its mean: near 0, all tokens look alike and a choice among them is noise.
        overlap: [L, L], share of the kept tokens that two layers have in common; `share` is chance.
        stays: [L], mean overlap with all later layers; NaN at the last.
        agreement: [L, L], Spearman correlation of Δ at a layer (row) with the attention that tokens receive at a later one (column), per
            query that can see them; NaN where the column is not later.
        foresight: [L], the same with the mean of all later layers.
        kept_mass: [L], share of the attention of all later layers that goes to the kept tokens; `share` is chance.
        skipped: site -> why it is not among them.
    """

    sites: tuple[AttentionSite, ...]
    share: float
    tokens: int
    norm: Tensor
    variation: Tensor
    overlap: Tensor
    stays: Tensor
    agreement: Tensor
    foresight: Tensor
    kept_mass: Tensor
    skipped: Mapping[str, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Plain]]:
        """One line for each site."""
        lists = {name: getattr(self, name).tolist() for name in VECTORS}
        return [
            {"site": site.name, "layer": site.layer, **{name: plain(values[place]) for name, values in lists.items()}}
            for place, site in enumerate(self.sites)
        ]

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values, ready for JSON; None where undefined."""
        tables = {name: [[plain(value) for value in row] for row in getattr(self, name).tolist()] for name in ("overlap", "agreement")}
        vectors = {name: [plain(value) for value in getattr(self, name).tolist()] for name in VECTORS}
        return {
            "schema": "headscope.stability/v1", "sites": [site.to_dict() for site in self.sites], "share": self.share,
            "tokens": self.tokens, **vectors, **tables, "skipped": dict(self.skipped),
        }  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """The lines of `rows` as a data frame; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        return pandas.DataFrame(self.rows())

    def plot(self) -> Figure:
        """The overlap between layers and the agreement with later attention, side by side, as a Plotly figure.

        Raises:
            HeadscopeError: plotly is not installed.
        """
        try:
            from plotly.graph_objects import Heatmap
            from plotly.subplots import make_subplots
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]', or use to_dict()") from error
        titles = (f"kept tokens in common (chance {self.share:.2f})", "Spearman: Δ with attention received later")
        found = make_subplots(rows=1, cols=2, subplot_titles=titles)
        names = [str(site.layer) if site.layer is not None else markup(site.name) for site in self.sites]
        for column, (values, low) in enumerate(((self.overlap, 0.0), (self.agreement, -1.0)), 1):
            cells = [[plain(value) for value in row] for row in values.tolist()]
            text = [["" if value is None else f"{value:.2f}" for value in row] for row in cells]
            scale = "Oranges" if low == 0 else "RdBu"
            drawn = Heatmap(
                z=cells, x=names, y=names, text=text, texttemplate="%{text}" if len(names) <= 16 else None, colorscale=scale, zmin=low,
                zmax=1.0, showscale=False,
            )  # fmt: skip
            found.add_trace(drawn, row=1, col=column)
            found.update_yaxes(autorange="reversed", row=1, col=column, title_text="layer of the choice")
            found.update_xaxes(row=1, col=column, title_text="other layer" if column == 1 else "later layer")
        found.update_layout(template="plotly_white", height=460, title=markup(str(self)))
        return found

    def _repr_html_(self) -> str:
        head = ("site", "Δ varies by", "kept tokens that stay", "foresight", "later attention on kept tokens")
        cells = [
            (site.name, *(f"{float(getattr(self, name)[place]):.2f}" for name in ("variation", "stays", "foresight", "kept_mass")))
            for place, site in enumerate(self.sites)
        ]
        style = "font-family:system-ui,sans-serif;font-size:14px;line-height:1.5;color:#111;background:#fff;padding:.5em"
        note = f"<p>By chance {self.share:.2f} stay, foresight is 0, and {self.share:.2f} of the attention goes to the kept tokens.</p>"
        return f'<div style="{style}"><p><b>{markup(str(self))}</b></p>{note}{table(head, cells)}</div>'

    def __str__(self) -> str:
        known = self.foresight[self.foresight.isfinite()]
        mean = f"{float(known.mean()):+.2f}" if len(known) else "undefined"
        return f"TokenStability({len(self.sites)} sites, {self.tokens} tokens, {self.share:.0%} kept, mean foresight {mean})"


def measure_stability(
    model: nn.Module, inputs: Inputs, *, share: float = 1 / 3, tokens: Tensor | Sequence[Tensor] | None = None
) -> TokenStability:
    """Whether the tokens that a layer's attention changes most are the ones that later layers attend to.

    Args:
        model: in evaluation mode; nothing of it is changed. Each batch runs once, the first twice.
        inputs: as `measure_health` takes them.
        share: of the tokens that would be kept, between 0 and 1.
        tokens: bool [B, N], True = counts; for several batches a list with one for each. By default the inputs' `attention_mask`.

    Raises:
        InputError: a share that is none; a model in training mode; no sample with enough tokens.
        NotIntercepted: no attention was caught, or none whose tokens and output can be told.

    Source: DASH, arXiv 2604.18103.
    """
    if not 0 < share < 1:
        raise InputError(f"share={share}: give the share of the tokens that would be kept, between 0 and 1")
    batches = batches_of(model, inputs, tokens=tokens)
    refuse_training(model, "stability is")
    sites = Probe(model).sites(*batches[0].args, **batches[0].kwargs)
    samples: list[_Sample] = []
    skipped: dict[str, str] = {}
    with torch.no_grad():
        for batch in batches:
            samples += _samples(model, batch, sites, skipped)
    kept = [site for site in sites if site.name not in skipped]
    if not kept:
        raise NotIntercepted(f"no self-attention whose tokens and output can be told: {'; '.join(f'{n}: {r}' for n, r in skipped.items())}")
    usable = [sample for sample in samples if len(sample.numbers[kept[0].name].norms) >= LEAST]
    if not usable:
        raise InputError(f"no sample has {LEAST} tokens that count: give longer inputs")
    return _averaged(kept, usable, share, skipped)


@dataclass(frozen=True, eq=False)
class _Numbers:
    """One site and sample: Δ [n] and the attention that its tokens receive, [n] per query that sees them and [n] in all."""

    norms: Tensor
    received: Tensor
    mass: Tensor


@dataclass(frozen=True, eq=False)
class _Sample:
    numbers: Mapping[str, _Numbers]


def _samples(model: nn.Module, batch: Batch, sites: Sequence[AttentionSite], skipped: dict[str, str]) -> Iterator[_Sample]:
    kept = Kept(batch.tokens)
    with intercept(model, kept), _outputs(model, sites) as outputs:
        batch.run(model)
    by_site: dict[str, list[_Numbers]] = {}
    for site in sites:
        steps = sorted(step for name, step in kept.records if name == site.name)
        reason = kept.broken.get(site.name) or (None if len(steps) == 1 else f"called {len(steps)} times in one forward")
        record = kept.records.get((site.name, steps[0])) if steps and reason is None else None
        found = None if record is None else _numbers(record, kept.rows[site.name, record.step], outputs.get(site.name, []))
        if isinstance(found, list):
            by_site[site.name] = found
        else:
            skipped.setdefault(site.name, reason or found or "not run")
    counts = {len(numbers) for numbers in by_site.values()}
    for place in range(max(counts, default=0)):
        yield _Sample({name: numbers[place] for name, numbers in by_site.items() if place < len(numbers)})


@contextmanager
def _outputs(model: nn.Module, sites: Sequence[AttentionSite]) -> Iterator[dict[str, list[Tensor]]]:
    """By site: what its output projection, or else the module it stands in, gives out while the block runs."""
    modules = dict(model.named_modules())
    found: dict[str, list[Tensor]] = {}

    def catch(name: str, first: bool) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            state = output if isinstance(output, Tensor) else next((one for one in output if isinstance(one, Tensor)), None)
            if state is not None and state.dim() == 3:
                found.setdefault(name, []).insert(0 if first else len(found.get(name, [])), state.detach())

        return hook

    with ExitStack() as stack:
        for site in sites:
            for path, first in ((site.output_projection, True), (site.module, False)):
                if path is not None and path in modules:
                    stack.callback(modules[path].register_forward_hook(catch(site.name, first)).remove)
        yield found


def _numbers(record: Record, counted: Tensor | None, outputs: Sequence[Tensor]) -> list[_Numbers] | str:
    """One for each sample, or why there are none."""
    rows = rows_of(record)
    batch, heads, queries, keys = rows.shape
    if record.site.kind == "cross" or queries != keys or record.site.fold != 1:
        return "its queries and keys are not the tokens of the text"
    state = next((one for one in outputs if one.shape[:2] == (batch, queries)), None)
    if state is None:  # some models put the batch second
        state = next((one.transpose(0, 1) for one in outputs if one.shape[:2] == (queries, batch)), None)
    if state is None:
        return "no output of it over the tokens was seen"
    received = torch.zeros(batch, keys, dtype=torch.float64)
    seen_by = torch.zeros(batch, keys, dtype=torch.float64)
    for start, stop in panels_of(rows.shape):
        panel = rows.read(start, stop)
        alive = panel.alive if counted is None else panel.alive & counted[:, None, start:stop].to(panel.alive.device)
        p = (panel.log.exp() * panel.share[..., None]).masked_fill(~alive[..., None], 0.0)
        received += p.sum((1, 2)).cpu() / heads
        seen_by += (~torch.isneginf(panel.log) & alive[..., None]).sum((1, 2)).cpu() / heads
    norms = state.double().norm(dim=-1).cpu()  # [B, N]
    found = []
    for sample in range(batch):
        mine = torch.ones(keys, dtype=torch.bool) if counted is None else counted[sample].cpu()
        found.append(_Numbers(norms[sample][mine], (received[sample] / seen_by[sample])[mine], received[sample][mine]))
    return found


def _averaged(sites: Sequence[AttentionSite], samples: Sequence[_Sample], share: float, skipped: Mapping[str, str]) -> TokenStability:
    names = [site.name for site in sites]
    count = len(names)
    vectors: dict[str, list[Tensor]] = {name: [] for name in ("norm", "variation", "foresight", "kept_mass")}
    overlaps, agreements = [], []
    for sample in samples:
        each = [sample.numbers[name] for name in names]
        kept = [_top(one.norms, share) for one in each]
        overlaps.append(torch.stack([torch.stack([(a & b).sum() / a.sum() for b in kept]) for a in kept]).double())
        agreement = torch.full((count, count), torch.nan, dtype=torch.float64)
        later, mass = torch.full((count,), torch.nan, dtype=torch.float64), torch.full((count,), torch.nan, dtype=torch.float64)
        for place, one in enumerate(each[:-1]):
            after = each[place + 1 :]
            for other, late in enumerate(after, place + 1):
                agreement[place, other] = _spearman(one.norms, late.received)
            later[place] = _spearman(one.norms, torch.stack([late.received for late in after]).mean(0))
            total = torch.stack([late.mass for late in after]).sum(0)
            mass[place] = total[kept[place]].sum() / total.sum()
        agreements.append(agreement)
        vectors["norm"].append(torch.stack([one.norms.mean() for one in each]))
        vectors["variation"].append(torch.stack([one.norms.std(correction=0) / one.norms.mean() for one in each]))
        vectors["foresight"].append(later)
        vectors["kept_mass"].append(mass)
    overlap, agreement = torch.stack(overlaps).mean(0), torch.stack(agreements).nanmean(0)
    stays = torch.stack([overlap[place, place + 1 :].mean() for place in range(count)])
    means = {name: torch.stack(values).nanmean(0) for name, values in vectors.items()}
    tokens = sum(len(sample.numbers[names[0]].norms) for sample in samples)
    return TokenStability(tuple(sites), share, tokens, overlap=overlap, agreement=agreement, stays=stays, skipped=dict(skipped), **means)


def _top(norms: Tensor, share: float) -> Tensor:
    """[n] bool, the tokens with the largest norms; the earlier ones on a tie."""
    chosen = torch.zeros(len(norms), dtype=torch.bool)
    chosen[norms.argsort(descending=True, stable=True)[: math.ceil(share * len(norms))]] = True
    return chosen


def _spearman(a: Tensor, b: Tensor) -> float:
    if not bool(a.isfinite().all() and b.isfinite().all()):
        return math.nan
    found = rank_correlation(a, b)
    return math.nan if found is None else found
