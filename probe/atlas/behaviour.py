"""What heads do: scores of their patterns on random tokens and on real inputs, each beside what uniform attention would score.

    behaviour = measure_behaviour(model, tokenizer)
    behaviour.scores["induction"][5, 2], behaviour.uniform["induction"][5, 2]        # 0.91, 0.01

Patterns are looked at some rows at a time, from the captured queries and keys. Letters: B samples, S tokens, H query heads, R query
rows at a time, L sites in execution order, N samples of random tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, NotIntercepted, SelectionError, ShapeError
from headscope.probe.atlas import tally
from headscope.probe.atlas.rows import AttentionRows, stream_rows
from headscope.probe.atlas.stimuli import Stimulus
from headscope.probe.atlas.tally import Detector, Tally
from headscope.probe.call import AttentionSite
from headscope.probe.keep import Keep
from headscope.probe.probe import Probe
from headscope.probe.record import Record

STRIPES = ("previous", "duplicate", "induction")
REAL = ("first", "sink", "distance", "local", "confidence", "entropy", "spread")
FLAT = 1e-6  # of the squared norm of uniform attention: a map that departs less from it says nothing


@dataclass(frozen=True, eq=False)
class Behaviour:
    """Scores of all heads.

    Attributes:
        sites: the L sites.
        scores: by name, [L, H] in float64; NaN where undefined. H is that of the widest site.
        uniform: by name, [L, H], what attention spread evenly over the visible keys scores.
        sink_key: [L, H], int64, where the sink is; -1 where undefined.
        on: by name, what it was measured on, in words.
        undefined: by name, why a score is NaN throughout.
        causal: no query saw a key behind it.
    """

    sites: tuple[AttentionSite, ...]
    scores: Mapping[str, Tensor]
    uniform: Mapping[str, Tensor]
    sink_key: Tensor
    on: Mapping[str, str]
    undefined: Mapping[str, str] = field(default_factory=dict)
    causal: bool = False


@dataclass(frozen=True, eq=False)
class RandomTokens:
    """Random tokens that heads are looked at on.

    Attributes:
        repeated: blocks of `length` random tokens, each twice.
        fresh: as many random tokens, none repeated.
        length: of a block.
        start: where the first block begins.
    """

    repeated: Stimulus
    fresh: Stimulus
    length: int
    start: int


def measure_behaviour(
    model: nn.Module,
    contents: Sequence[Stimulus],
    random: RandomTokens | None = None,
    *,
    detectors: Mapping[str, Detector] | None = None,
    told: str = "inputs",
    progress: Callable[[], None] | None = None,
) -> Behaviour:
    """Run the model and score every head.

    - on random tokens: `previous`, `duplicate`, `induction` (stripes), `current`, `positional`; the same stripes without the first
      token (`…_off_first`) and as TransformerLens' detector measures them (`…_mul`, see `match_heads`).
    - on the contents: `first`, `sink`, `distance`, `local` (how much nearer than uniform), `confidence`, `entropy` (nats),
      `spread` (share of uniform's), and the detectors.
      Without random tokens also `previous`, `current` and `positional`.

    Args:
        model: in eval mode.
        contents: real inputs.
        random: random tokens; None where the model reads none.
        detectors: by name, a number per row of a panel; see `AttentionRows`.
        told: what the contents are, in words.
        progress: called after every run of the model.

    Raises:
        SelectionError: a detector with the name of a score.
        ShapeError: a detector that returns another shape.
        NotIntercepted: no attention was caught.
    """
    own = dict(detectors or {})
    if taken := set(own) & {*STRIPES, *REAL, "current", "positional", *(f"{s}_{k}" for s in STRIPES for k in ("off_first", "mul"))}:
        raise SelectionError(f"a detector cannot be named {min(taken)!r}: that is a score of the atlas; choose another name")
    work = _Work(model, progress)
    on: dict[str, str] = {}
    if random is not None:
        words = f"{random.repeated.counted.shape[0]} blocks of {random.length} random tokens, repeated"  # type: ignore[union-attr]
        work.stripes(random)
        on |= dict.fromkeys(("current", *STRIPES, *(f"{s}_{k}" for s in STRIPES for k in ("off_first", "mul"))), words)
        work.positional([random.fresh])
        on["positional"] = f"random tokens, {random.fresh.tokens.shape[0]} samples"  # type: ignore[union-attr]
    scores: dict[str, Detector] = {
        "first": tally.first, "distance": tally.distance, "confidence": tally.confidence, "entropy": tally.entropy, "spread": tally.spread,
    }  # fmt: skip
    if random is None:
        scores |= {"previous": tally.offset(1), "current": tally.offset(0)}
        work.positional(contents)
        on["positional"] = told
    work.run(contents, {**scores, **own})
    on |= dict.fromkeys([*scores, *own, "sink", "local"], told)
    return work.behaviour(on, {"duplicate", "induction"} if random is None else set())


def pairs(*examples: Sequence[tuple[int, int]]) -> Detector:
    """A detector of the user's own relation: the mean probability that a query gives to its partners.

    Such as verb → subject from a parse: one list of (query, key) positions for each sample, in the order of the inputs, counted in the
    model's tokens from 0. A query with several partners counts once, with their mean; a sample without pairs counts nothing.

        chart_heads(model, tokenizer, texts=["The dog barked.", …], detectors={"subject": pairs([(3, 2)], …)})
    """

    def detect(rows: AttentionRows) -> Tensor:
        sums = torch.zeros(rows.pattern.shape[:-1], device=rows.pattern.device, dtype=torch.float64)
        counts = torch.zeros_like(sums)
        heights = {int(row): place for place, row in enumerate(rows.queries.tolist())}
        for sample in range(rows.pattern.shape[0]):
            number = rows.example + sample
            for query, key in examples[number] if number < len(examples) else ():
                if query < 0 or not 0 <= key < rows.pattern.shape[-1]:
                    raise SelectionError(f"pair ({query}, {key}) of sample {number}: it has {rows.pattern.shape[-1]} tokens, from 0")
                if query in heights:
                    sums[sample, :, heights[query]] += rows.pattern[sample, :, heights[query], key]
                    counts[sample, :, heights[query]] += 1
        return torch.where(counts > 0, sums / counts.clamp_min(1), torch.nan)

    return detect


def match_heads(
    model: nn.Module,
    inputs: Stimulus,
    detection: str | Tensor,
    *,
    exclude_first: bool = False,
    exclude_current: bool = False,
) -> Tensor:
    """[L, H], Σ(P ∘ D) / ΣP over all rows of all samples: what `error_measure="mul"` is in TransformerLens' head detector.

    A perfect induction head that rests on the first token in the first half scores a half; that is why stripes are the atlas's own.

    Args:
        detection: D, `previous`, `duplicate` or `induction` of the tokens, or [S, S] of your own.
        exclude_first, exclude_current: leave the first key, or each row's own, out of both sums.

    Raises:
        SelectionError: no such detection.
        InputError: no tokens to find repeats among.
        NotIntercepted: no attention was caught.
    """
    if isinstance(detection, str) and detection not in STRIPES:
        raise SelectionError(f"no detection {detection!r}: there are {', '.join(STRIPES)}, or give [S, S]")
    if isinstance(detection, str) and inputs.tokens is None:
        raise InputError(f"{detection} heads are found by the tokens, and these inputs have none: give token ids")
    work = _Work(model, None)
    for _, record in work.records(inputs):
        for rows in stream_rows(record, None, inputs.tokens):
            work.tally.add("mul", rows, *_mul(rows, detection, exclude_first, exclude_current), keys=1)
    return work.table("mul")


class _Work:
    """The runs of a model and what they add up to."""

    def __init__(self, model: nn.Module, progress: Callable[[], None] | None) -> None:
        self.model, self.progress = model, progress
        self.sites: dict[str, AttentionSite] = {}
        self.tally, self.even = Tally(), Tally()
        self.cosines: dict[str, list[Tensor]] = {}
        self.forward = False  # a key behind its query was seen

    def records(self, stimulus: Stimulus) -> Iterator[tuple[int, Record]]:
        """Each call of a run, with its step.

        Raises:
            NotIntercepted: there was none.
        """
        with torch.no_grad(), Probe(self.model).capture(Keep()) as seen:
            self.model(**stimulus.inputs)
        if not seen.records:
            raise NotIntercepted("no attention was caught in this model, so there are no heads to chart")
        for (name, step), record in seen.records.items():
            self.sites.setdefault(name, record.site)
            yield step, record
        if self.progress is not None:
            self.progress()

    def stripes(self, random: RandomTokens) -> None:
        """Repeated random tokens."""
        length, start = random.length, random.start
        detectors = {
            "current": tally.offset(0, start),
            "previous": tally.offset(1, start + 1),
            "duplicate": tally.offset(length, start + length),
            "induction": tally.offset(length - 1, start + length),
        }
        for _, record in self.records(random.repeated):
            for rows in stream_rows(record, random.repeated.counted, random.repeated.tokens):
                even = rows.uniform()
                for name, detect in detectors.items():
                    self._both(name, rows, even, detect)
                every = torch.ones_like(rows.counted)
                for name in STRIPES if rows.square else ():
                    for table, seen in ((self.tally, rows), (self.even, even)):
                        value = detectors[name](seen)
                        table.add(f"{name}_off_first", seen, value, 1 - seen.pattern[..., 0])
                        if seen.tokens is not None:
                            table.add(f"{name}_mul", replace(seen, counted=every), *_mul(seen, name, False, False), keys=1)

    def positional(self, stimuli: Sequence[Stimulus]) -> None:
        """Samples of different content, of which equal positions are compared."""
        for group in merged(stimuli):
            first = 1 if group.counted is None else max(1, int(group.counted.int().argmax(-1).amax()))
            for _, record in self.records(group):
                gram: Tensor | None = None
                even = 0.0
                for rows in stream_rows(record, group.counted, group.tokens):
                    if not rows.square or rows.pattern.shape[0] < 2 or rows.site.fold > 1:
                        break
                    uniform = rows.uniform().pattern
                    apart = ((rows.pattern - uniform) * rows.alive()[..., None])[..., first:].transpose(0, 1).flatten(2).double()
                    gram = apart @ apart.mT + (0.0 if gram is None else gram)  # [H, B, B]
                    even += float(uniform[0, 0].double().square().sum())
                if gram is not None:
                    self.cosines.setdefault(record.site.name, []).append(_cosine(gram, FLAT * even).cpu())

    def run(self, contents: Sequence[Stimulus], detectors: Mapping[str, Detector]) -> None:
        """Real inputs."""
        number = 0
        for stimulus in contents:
            batch = 1
            for step, record in self.records(stimulus):
                for rows in stream_rows(record, stimulus.counted, stimulus.tokens, example=number, image=stimulus.image):
                    even = rows.uniform()
                    self.tally.receive(rows, step)
                    self.even.receive(even, step)
                    for name, detect in detectors.items():
                        self._both(name, rows, even, detect)
                    places = torch.arange(rows.pattern.shape[-1], device=rows.pattern.device)
                    self.forward |= rows.square and bool((rows.visible & (places > rows.queries[:, None])).any())
                    batch = max(batch, rows.pattern.shape[0] // max(1, rows.site.fold))
            number += batch

    def _both(self, name: str, rows: AttentionRows, even: AttentionRows, detect: Detector) -> None:
        for table, seen in ((self.tally, rows), (self.even, even)):
            value = detect(seen)
            if not isinstance(value, Tensor):
                raise ShapeError(f"the detector {name!r} returned {type(value).__name__}: give a tensor [B, H, R], a number per row")
            table.add(name, seen, value)

    def table(self, name: str, source: Tally | None = None) -> Tensor:
        """[L, H], NaN where undefined."""
        source = self.tally if source is None else source
        return self._stack([source.mean(name, site) for site in self.sites])

    def _stack(self, rows: Sequence[Tensor | None]) -> Tensor:
        wide = max(site.query_heads for site in self.sites.values())
        found = torch.full((len(rows), wide), torch.nan, dtype=torch.float64)
        for place, (row, site) in enumerate(zip(rows, self.sites.values(), strict=True)):
            if row is not None:
                found[place, : site.query_heads] = row.double().expand(site.query_heads)
        return found

    def behaviour(self, on: Mapping[str, str], absent: set[str]) -> Behaviour:
        scores = {name: self.table(name) for name in on if name not in ("sink", "positional", "local")}
        uniform = {name: self.table(name, self.even) for name in scores}
        sinks = [(self.tally.sinks(site), self.even.sinks(site)) for site in self.sites]
        scores["sink"] = self._stack([None if own is None else own[0] for own, _ in sinks])
        uniform["sink"] = self._stack([None if even is None else even[0] for _, even in sinks])
        scores["local"] = 1 - scores["distance"] / uniform["distance"].masked_fill(uniform["distance"] == 0, torch.nan)
        keys = self._stack([None if own is None else own[1] for own, _ in sinks]).nan_to_num(nan=-1).long()
        cosines = (self.cosines.get(site) for site in self.sites)
        scores["positional"] = self._stack([None if not found else torch.stack(found).nanmean(0) for found in cosines])
        undefined = dict.fromkeys(absent, "the model reads no tokens that could be repeated")
        reasons = {"positional": "it takes at least two samples of one shape that attend to themselves as a whole"}
        for name, table in scores.items():
            if bool(table.isnan().all()):
                undefined[name] = reasons.get(name, "no row of these inputs can tell: too short, or no attention among the same positions")
        for name in absent:
            scores[name] = self._stack([None] * len(self.sites))
        return Behaviour(tuple(self.sites.values()), scores, uniform, keys, dict(on), undefined, not self.forward)


def merged(stimuli: Sequence[Stimulus]) -> list[Stimulus]:
    """Stimuli of the same shapes as one batch; what cannot be joined stays as it is."""
    groups: dict[object, list[Stimulus]] = {}
    for one in stimuli:
        plain = all(isinstance(value, Tensor) and value.dim() for value in one.inputs.values())
        shapes = tuple((name, tuple(value.shape[1:]), value.dtype) for name, value in one.inputs.items()) if plain else id(one)
        groups.setdefault((shapes, one.counted is None), []).append(one)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups.values()]


def _joined(group: Sequence[Stimulus]) -> Stimulus:
    inputs: dict[str, Any] = {name: torch.cat([one.inputs[name] for one in group]) for name in group[0].inputs}
    counted = None if group[0].counted is None else torch.cat([one.counted for one in group if one.counted is not None])
    tokens = None if group[0].tokens is None else torch.cat([one.tokens for one in group if one.tokens is not None])
    return Stimulus(inputs, counted, tokens, group[0].image)


def _cosine(gram: Tensor, least: float) -> Tensor:
    """[H], the mean cosine between samples, from their products [H, B, B]; NaN where a map hardly departs from uniform."""
    norms = gram.diagonal(dim1=-2, dim2=-1)  # [H, B]
    cosine = gram / (norms[:, :, None] * norms[:, None]).sqrt().clamp_min(1e-300)
    batch = gram.shape[-1]
    mean = (cosine.sum((-2, -1)) - batch) / (batch * (batch - 1))
    return mean.masked_fill((norms <= least).any(-1), torch.nan)


def _mul(rows: AttentionRows, detection: str | Tensor, exclude_first: bool, exclude_current: bool) -> tuple[Tensor, Tensor]:
    """[B, H, R] each: Σ_j P∘D and Σ_j P of each row."""
    places = torch.arange(rows.pattern.shape[-1], device=rows.pattern.device)
    if isinstance(detection, Tensor):
        wanted = detection.to(rows.pattern)[rows.queries][None]
    elif detection == "previous":
        wanted = (places == rows.queries[:, None] - 1)[None].to(rows.pattern)
    else:
        if rows.tokens is None:
            raise InputError(f"{detection} heads are found by the tokens, and {rows.site.name} does not attend to them one by one")
        same = rows.tokens[:, rows.queries, None] == rows.tokens[:, None]  # [B, R, K]
        if detection == "induction":
            same = torch.nn.functional.pad(same & (places != rows.queries[:, None]), (1, 0))[..., :-1] & (places <= rows.queries[:, None])
        else:
            same = same & (places < rows.queries[:, None])
        wanted = same.to(rows.pattern)
    pattern = rows.pattern
    if exclude_first:
        pattern = pattern.masked_fill(places == 0, 0.0)
    if exclude_current:
        pattern = pattern.masked_fill(places == rows.queries[:, None], 0.0)
    return (pattern * wanted[:, None]).sum(-1), pattern.sum(-1)
