"""The numbers of every head of one attention call, of all samples and of several calls.

Letters: S samples, H query heads, n rows that count, m keys.

`readings` and `panel_readings` say what each row and each key has to tell; this file averages it. What every number means stands in
`headscope.probe.health.measures.HeadMeasures`, the formulas in `docs/math/health.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.kernels.identities import budget
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.capture import matches
from headscope.probe.health.bounds import entropy_floor
from headscope.probe.health.inputs import Tokens
from headscope.probe.health.measures import HEAD_FIELDS, HeadMeasures
from headscope.probe.health.panel_readings import read_source, source_of
from headscope.probe.health.readings import Readings, read_view
from headscope.probe.health.visibility import Views

NO_ROWS = "no row counts: every query is padding, special or sees no key"
ONE_KEY = "one visible key"
ONE_ROW = "one row"
NOT_FINITE = "NaN or infinity in the queries or keys"
NOT_SAME = "queries and keys are not the same tokens"
NO_SCORES = "the scores are not known: the model's code or an edit made the pattern in another way"


@dataclass(frozen=True, eq=False)
class Summary:
    """What some samples of one call have to say.

    Attributes:
        numbers: [S, H] by field, NaN where undefined.
        weight: [S, H], rows counted.
        keys: [S, H], mean visible keys.
        broken: [S, H], not finite.
        why: field -> reason, for the fields that are NaN somewhere.
        causal, square: as in `HeadMeasures`.
    """

    numbers: dict[str, Tensor]
    weight: Tensor
    keys: Tensor
    broken: Tensor
    why: dict[str, str]
    causal: bool
    square: bool


@torch.no_grad()
def measure_call(
    call: AttentionCall, tokens: Tokens | None = None, *, steps: int = 0, seed: int = 0, views: Views | None = None
) -> HeadMeasures:
    """Every head of one finished call.

    Args:
        call: as an interception handler sees it.
        tokens: which tokens count; None counts all.
        steps: of the bounds on singular values, as in `headscope.kernels.spectrum`; 0 for those that cost nothing.
        seed: of the random part of where those start.
        views: what is known of the masks of earlier calls, to be handed from one call to the next.
    """
    return average(call.site, summaries(call, tokens or Tokens(), steps=steps, seed=seed, views=views or Views()), 1)


def summaries(call: AttentionCall, tokens: Tokens, *, steps: int, seed: int, views: Views) -> list[Summary]:
    """What the samples of a call have to say, by groups that count the same rows."""
    counted, special = tokens.rows(call), tokens.special_keys(call)
    found: list[Readings] = []
    terms = views.terms(call)
    seen = views.of(call, counted) if call.told and call.replay is None and call.materialised is None else None
    if seen is not None:
        found = [read_view(call, view, terms, steps, seed) for view in seen if len(view.rows) and len(view.keys)]
    else:
        for sample in range(call.q.shape[0]):
            rows = torch.arange(call.queries, device=call.q.device)
            rows = rows if counted is None else rows[counted[sample].to(rows.device)]
            if len(rows) and call.keys:
                found.append(read_source(call, sample, source_of(call, sample, rows, terms), steps, seed))
    return [summarise(one, None if special is None else special[list(one.samples)][:, one.keys]) for one in found]


def summarise(readings: Readings, special: Tensor | None) -> Summary:
    """Averages over the rows of each sample.

    Args:
        special: [S, m], bool; None where nobody said which keys are special.
    """
    r = readings
    shape = r.entropy.shape  # [S, H, n]
    alive, visible = r.alive.expand(shape), r.visible.expand(shape)
    many = alive & (visible > 1)
    count = alive.sum(dim=-1).double()  # [S, H]
    mean = _Mean(alive, shape)
    choosing = _Mean(many, shape)
    seen_by = r.seen_by.expand_as(r.received)
    keys = (seen_by > 0).sum(dim=-1)
    squares = r.squares.masked_fill(~alive, 0.0).sum(dim=-1)
    parts = budget(r.entropy, r.received, lse=torch.zeros_like(r.entropy).masked_fill(~alive, -torch.inf), keys=seen_by > 0)
    shares = parts.shares().clamp_min(0.0)
    shares = shares / shares.sum(dim=-1, keepdim=True)  # NaN where there is but one key
    often = 4 * seen_by >= seen_by.amax(dim=-1, keepdim=True)  # of a key that few rows see, the mean says little
    share = (r.received / seen_by.clamp_min(1)).masked_fill(~often | (seen_by == 0), -1.0)
    sink, sink_place = share.max(dim=-1)
    first = (seen_by > 0).long().argmax(dim=-1, keepdim=True)
    own = r.own.masked_fill(~alive, torch.nan)
    n = r.visible.expand(shape).double()
    numbers = {
        "entropy": mean(r.entropy),
        "entropy_share": choosing(r.entropy / n.clamp_min(2.0).log()),
        "diffuse": shares[..., 0],
        "routing": shares[..., 1],
        "hub": shares[..., 2],
        "p_max": mean(r.p_max),
        "effective_keys": mean(1 / r.squares.masked_fill(~alive, 1.0)),
        "effective_share": choosing(1 / (r.squares.masked_fill(~alive, 1.0) * n.clamp_min(1.0))),
        "sum_squares": mean(r.squares),
        "sink": _where(count > 1, sink),
        "sink_key": r.keys[sink_place].double(),
        "special_mass": _special(r, special, mean, count),
        "first_mass": r.received.gather(-1, first)[..., 0] / count,
        "distance": r.distance,
        "own": _Mean(~own.isnan() | r.entropy.isnan(), shape)(own),
        "previous": _Mean(alive & ~r.previous.isnan(), shape)(r.previous),
        "row_residual": _where(count > 1, (1 - r.received.square().sum(dim=-1) / (count * squares)).clamp_min(0.0)),
        "row_cosine": _where(count > 1, (r.directions.square().sum(dim=-1) - count) / (count * (count - 1)).clamp_min(1.0)),
        "sigma_low": _where(count > 1, r.spectrum.sigma_low),
        "sigma_high": _where(count > 1, r.spectrum.sigma_high),
        "contrast_low": _where(count > 1, r.spectrum.contrast_low),
        "contrast_high": _where(count > 1, r.spectrum.contrast_high),
        "column_deviation": _columns(r, seen_by, count, keys),
        "contraction": torch.full_like(count, torch.nan),
        "max_score": r.max_score.masked_fill(~alive, -torch.inf).amax(dim=-1),
        "score_variance": choosing(r.variance),
        "entropy_floor": choosing(entropy_floor((r.variance.clamp_min(0.0) * n).sqrt(), n.clamp_min(1.0))),
    }
    if r.causal:
        chosen = many & ~own.isnan()
        numbers["contraction"] = _where(chosen.any(dim=-1), own.masked_fill(~chosen, -1.0).amax(dim=-1))
    broken = (count > 0) & ~torch.isfinite(numbers["entropy"] + squares + r.received.sum(dim=-1))
    for name in ("sink", "diffuse", "routing", "hub"):  # of one key nothing can be said
        numbers[name] = _where(keys > 1, numbers[name])
    dead = broken | (count == 0)
    numbers = {name: value.masked_fill(dead, torch.nan) for name, value in numbers.items()}
    return Summary(numbers, count, mean(n), broken, _reasons(r, numbers, special), r.causal, r.square)


@dataclass(frozen=True, eq=False)
class _Mean:
    """The mean over some of the rows, NaN where there is none."""

    which: Tensor  # [S, H, n]
    shape: Sequence[int]

    def __call__(self, x: Tensor) -> Tensor:
        total = x.expand(self.shape).masked_fill(~self.which, 0.0).sum(dim=-1)
        return total / self.which.sum(dim=-1)  # 0 / 0 is NaN


def _where(condition: Tensor, x: Tensor) -> Tensor:
    return torch.where(condition, x, torch.nan)


def _special(r: Readings, special: Tensor | None, mean: Callable[[Tensor], Tensor], count: Tensor) -> Tensor:
    """[S, H], mass on special tokens; where nobody named any, on columns that are no keys."""
    if special is not None:
        return r.received.masked_fill(~special[:, None].to(r.received.device), 0.0).sum(dim=-1) / count
    return torch.full_like(count, torch.nan) if r.beyond is None else mean(r.beyond)


def _columns(r: Readings, seen_by: Tensor, count: Tensor, keys: Tensor) -> Tensor:
    """[S, H], mean |c_j - 1|, where rows and keys are the same tokens."""
    apart = (r.received - 1).abs().masked_fill(seen_by == 0, 0.0).sum(dim=-1) / keys.clamp_min(1)
    return _where((keys == count) & (count > 1), apart) if r.square else torch.full_like(count, torch.nan)


def _reasons(r: Readings, numbers: dict[str, Tensor], special: Tensor | None) -> dict[str, str]:
    """Why a field is NaN, whatever else might be."""
    ordered = not bool(r.distance.isnan().all())
    if r.square:
        columns = ONE_ROW if len(r.rows) == 1 else "some tokens do not count as queries, so a column sum of 1 means nothing"
    else:
        columns = NOT_SAME
    said = dict.fromkeys(("entropy_share", "diffuse", "routing", "hub", "effective_share", "sink"), ONE_KEY)
    said |= dict.fromkeys(("row_residual", "row_cosine", "sigma_low", "sigma_high", "contrast_low", "contrast_high"), ONE_ROW)
    said |= dict.fromkeys(("score_variance", "entropy_floor"), NO_SCORES if bool(r.variance.isnan().all()) else ONE_KEY)
    said |= {
        "special_mass": "nobody said which tokens are special",
        "distance": NOT_SAME,
        "own": NOT_SAME if not ordered else "no row sees its own key",
        "previous": NOT_SAME if not ordered else "no row sees a key before its own",
        "column_deviation": columns,
        "contraction": "the attention is not causal" if not r.causal else ONE_KEY,
        "max_score": NO_SCORES,
    }
    if len(r.rows) == 1:
        said["sink"] = ONE_ROW
    return {name: said.get(name, NOT_FINITE) for name, value in numbers.items() if bool(value.isnan().any())}


def average(site: AttentionSite, found: Sequence[Summary], calls: int) -> HeadMeasures:
    """One measure of a site: the samples of all calls, weighted by the rows they count."""
    heads = site.query_heads
    if not found:
        nothing = torch.full((heads,), torch.nan, dtype=torch.float64)
        fields = dict.fromkeys(HEAD_FIELDS, nothing) | {"sink_key": torch.full((heads,), -1)}
        none = dict.fromkeys((name for name in HEAD_FIELDS), NO_ROWS)
        return HeadMeasures(site=site, calls=calls, queries=0, keys=0.0, causal=False, square=False, undefined=none, **fields)
    weight = torch.cat([one.weight for one in found]).cpu()  # [samples, H]
    broken = torch.cat([one.broken for one in found]).cpu().any(dim=0)  # [H]
    numbers: dict[str, Tensor] = {}
    for name in HEAD_FIELDS:
        each = torch.cat([one.numbers[name] for one in found]).cpu()
        if name == "sink_key":
            numbers[name] = each[0].masked_fill(broken | each[0].isnan(), -1.0).long()
            continue
        if name == "max_score":
            total = each.masked_fill(each.isnan(), -torch.inf).amax(dim=0)
            total = total.masked_fill(torch.isneginf(total), torch.nan)
        else:
            there = weight * ~each.isnan()
            total = (each.nan_to_num() * there).sum(dim=0) / there.sum(dim=0)  # 0 / 0 is NaN
        numbers[name] = total.masked_fill(broken, torch.nan)
    numbers["sink_key"] = numbers["sink_key"].masked_fill(numbers["sink"].isnan(), -1)
    why: dict[str, str] = {}
    for name, value in numbers.items():
        if name != "sink_key" and bool(value.isnan().any()):
            said = next((one.why[name] for one in found if name in one.why), NO_ROWS)
            finite = bool((value.isnan() & ~broken).any())
            why[name] = said if finite else NOT_FINITE
    alive = weight.sum(dim=0)
    keys = torch.cat([one.keys for one in found]).cpu().nan_to_num()
    seen = float((keys * weight).sum() / weight.sum()) if bool(weight.any()) else 0.0
    several = [one for one in found if one.weight.max() > 1] or list(found)  # of a single row, all that it sees comes before it
    return HeadMeasures(
        site=site,
        calls=calls,
        queries=int(alive.max()),
        keys=seen,
        causal=all(one.causal for one in several),
        square=all(one.square for one in found),
        undefined=why,
        **numbers,
    )


@dataclass(eq=False)
class HeadMeter:
    """An interception handler that measures every head of every call; it changes nothing.

    Attributes:
        sites: names or globs of the sites to measure; None for all.
        layers: likewise.
        steps, seed: as in `measure_call`.
        tokens: of the batch that runs.
    """

    sites: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    steps: int = 0
    seed: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    changes: bool = False
    seen: dict[str, AttentionSite] = field(default_factory=dict)  # all sites that came by
    _found: dict[str, list[Summary]] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)
    _views: Views = field(default_factory=Views)

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"scores", "pattern"}) if self.wants(site) else frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        return value

    def see(self, call: AttentionCall) -> None:
        self.seen.setdefault(call.site.name, call.site)
        if call.recomputed or not self.wants(call.site):
            return
        with torch.no_grad():
            found = summaries(call, self.tokens, steps=self.steps, seed=self.seed, views=self._views)
        self._found.setdefault(call.site.name, []).extend(found)
        self._calls[call.site.name] = self._calls.get(call.site.name, 0) + 1

    def wants(self, site: AttentionSite) -> bool:
        """Whether this site was chosen."""
        if self.layers is not None and site.layer not in self.layers:
            return False
        return self.sites is None or any(matches(site, glob) for glob in self.sites)

    def measures(self, sites: dict[str, AttentionSite] | None = None) -> tuple[HeadMeasures, ...]:
        """One for each site, in the order in which they first ran; `sites` as the session knows them at the end."""
        known = sites or {}
        return tuple(average(known.get(name, self.seen[name]), found, self._calls[name]) for name, found in self._found.items())
