"""Which heads look alike: cosine and Jensen-Shannon divergence between the patterns of all heads, and clusters of them.

Letters: N heads of all sites, Q queries, K keys, R query rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import HeadscopeError, InputError, NotIntercepted, SelectionError
from headscope.probe.atlas.rows import AttentionRows, stream_rows
from headscope.probe.atlas.stimuli import Stimulus
from headscope.probe.keep import Keep
from headscope.probe.probe import Probe
from headscope.probe.record import Record

Head = tuple[str, int]  # site and head
WORK = 2_000_000_000  # cells of pairs of patterns that are compared; beyond it every so-many-th query is taken
CELLS = 1 << 22  # numbers of all patterns that are held at once
THRESHOLD = 0.5  # heads of one cluster are on average nearer than this
DISTANCES = ("jensen-shannon", "cosine")


@dataclass(frozen=True, eq=False)
class Redundancy:
    """How alike the heads' patterns are.

    Attributes:
        heads: the N heads, (site, head).
        cosine: [N, N], of the patterns as flat vectors, 0 to 1; NaN for heads whose patterns have different shapes.
        divergence: [N, N], Jensen-Shannon, nats, mean over queries; 0 to log 2, NaN likewise.
        clusters: groups of at least two places in `heads`, the largest first.
        distance: what the clusters were made with, `jensen-shannon` (its root, as a share of the largest) or `cosine` (1 - cosine).
        threshold: below which mean distance heads were joined.
        queries: how many query rows were compared.
        notes: what was left out, in words.
    """

    heads: tuple[Head, ...]
    cosine: Tensor
    divergence: Tensor
    clusters: tuple[tuple[int, ...], ...]
    distance: str = DISTANCES[0]
    threshold: float = THRESHOLD
    queries: int = 0
    notes: tuple[str, ...] = field(default=())

    def cluster_of(self, site: str, head: int) -> tuple[Head, ...]:
        """The other heads of its cluster, nearest first; () where it stands alone.

        Raises:
            SelectionError: no such head.
        """
        if (site, head) not in self.heads:
            raise SelectionError(f"no head {head} of {site} was compared")
        own = self.heads.index((site, head))
        cluster = next((group for group in self.clusters if own in group), ())
        return tuple(self.heads[place] for place in sorted(cluster, key=lambda place: -float(self.cosine[own, place])) if place != own)

    def clustered(self, threshold: float = THRESHOLD, distance: str = DISTANCES[0]) -> Redundancy:
        """The same with other clusters; needs scikit-learn.

        Raises:
            HeadscopeError: scikit-learn is not installed.
            InputError: a threshold that is not positive.
            SelectionError: no such distance.
        """
        groups = _clusters(distances(self.cosine, self.divergence, distance), threshold)
        return Redundancy(self.heads, self.cosine, self.divergence, groups, distance, threshold, self.queries, self.notes)


def measure_redundancy(
    model: nn.Module,
    contents: Sequence[Stimulus],
    *,
    exclude_first: bool = False,
    threshold: float = THRESHOLD,
    distance: str = DISTANCES[0],
    work: int = WORK,
    progress: Callable[[], None] | None = None,
) -> Redundancy:
    """Compare the patterns of all heads with each other, across layers too.

    All heads are compared on the same query rows, some at a time. Where the pairs of all rows are more work than `work`, every so-many-th
    row is taken; `notes` says so. Rows of padding and special tokens, and rows with one key, do not count.

    Args:
        exclude_first: leave the first key out and renormalise, so that heads that rest on it do not look alike for that alone.
        threshold, distance: of the clusters.
        work: cells of pairs that may be compared.
        progress: called after every run of the model.

    Raises:
        HeadscopeError: scikit-learn is not installed.
        InputError: a threshold that is not positive.
        SelectionError: no such distance.
        NotIntercepted: no attention was caught.

    Source: Clark et al. 2019, section 6, for the divergence.
    """
    _scikit_learn()
    if distance not in DISTANCES:
        raise SelectionError(f"no distance {distance!r}: there are {', '.join(DISTANCES)}")
    total = _Total()
    taken, whole = 0, 0
    for stimulus in contents:
        with torch.no_grad(), Probe(model).capture(Keep()) as seen:
            model(**stimulus.inputs)
        if not seen.records:
            raise NotIntercepted("no attention was caught in this model, so there are no heads to compare")
        groups: dict[tuple[int, int, int, int], list[Record]] = {}
        for record in seen.records.values():
            groups.setdefault((record.step, *_shape(record)), []).append(record)
        share = work // max(1, len(contents) * len(groups))
        for (_, batch, queries, keys), records in groups.items():
            count = sum(record.site.query_heads for record in records)
            step = max(1, -(-(count * count * batch * queries * keys) // max(1, 2 * share)))
            taken, whole = taken + -(-queries // step) * batch, whole + queries * batch
            _compare(records, stimulus, total, step, count, exclude_first)
        if progress is not None:
            progress()
    cosine, divergence = total.tables()
    notes = () if taken == whole else (f"{taken} of {whole} query rows were compared, evenly spaced: all of them would be too much work",)
    clusters = _clusters(distances(cosine, divergence, distance), threshold)
    return Redundancy(tuple(total.heads), cosine, divergence, clusters, distance, threshold, taken, notes)


def distances(cosine: Tensor, divergence: Tensor, distance: str) -> Tensor:
    """[N, N], 0 alike to 1; 1 where two heads could not be compared.

    Raises:
        SelectionError: no such distance.
    """
    if distance not in DISTANCES:
        raise SelectionError(f"no distance {distance!r}: there are {', '.join(DISTANCES)}")
    found = (divergence / log(2)).clamp(0, 1).sqrt() if distance == "jensen-shannon" else (1 - cosine).clamp(0, 1)
    return found.nan_to_num(nan=1.0).fill_diagonal_(0.0)


class _Total:
    """Sums over rows of everything that two heads are compared by."""

    def __init__(self) -> None:
        self.heads: dict[Head, int] = {}
        self.blocks: list[tuple[Tensor, Tensor, Tensor, int]] = []  # places [n], products [n, n], divergences [n, n], rows

    def places(self, records: Sequence[Record]) -> Tensor:
        """[n], the numbers of the heads of these records."""
        names = [(record.site.name, head) for record in records for head in range(record.site.query_heads)]
        return torch.tensor([self.heads.setdefault(name, len(self.heads)) for name in names])

    def tables(self) -> tuple[Tensor, Tensor]:
        """[N, N] each, the cosine and the divergence."""
        count = len(self.heads)
        products, divergence, rows = (torch.zeros(count, count, dtype=torch.float64) for _ in range(3))
        own = torch.zeros(count, count, dtype=torch.float64)
        for places, product, apart, number in self.blocks:
            cells = (places[:, None], places[None])
            products.index_put_(cells, product, accumulate=True)
            divergence.index_put_(cells, apart, accumulate=True)
            own.index_put_(cells, product.diagonal()[:, None].expand_as(product), accumulate=True)  # where the two were compared
            rows.index_put_(cells, torch.full_like(product, number), accumulate=True)
        unknown = rows == 0
        cosine = products / (own * own.mT).sqrt().clamp_min(1e-300)
        return cosine.masked_fill(unknown, torch.nan), (divergence / rows.clamp_min(1)).masked_fill(unknown, torch.nan)


def _shape(record: Record) -> tuple[int, int, int]:
    if record.has("q"):
        q, k = record.get("q"), record.get("k")
        return q.shape[0], q.shape[2], k.shape[2]
    pattern = record.pattern(None, None)
    return pattern.shape[0], pattern.shape[2], pattern.shape[3]


def _compare(records: Sequence[Record], stimulus: Stimulus, total: _Total, step: int, count: int, exclude_first: bool) -> None:
    """Add the comparison of all heads of records whose patterns have one shape."""
    places = total.places(records)
    products, divergence = (torch.zeros(len(places), len(places), dtype=torch.float64) for _ in range(2))
    batch, queries, keys = _shape(records[0])
    height = max(1, min(queries, CELLS // max(1, batch * count * keys)))
    heads_cells = [height * batch * record.site.query_heads * keys for record in records]
    streams = [
        stream_rows(record, stimulus.counted, stimulus.tokens, cells=cells) for record, cells in zip(records, heads_cells, strict=True)
    ]
    number = 0
    for panels in zip(*streams, strict=True):
        live = _live(panels, step)
        if not bool(live.any()):
            continue
        rows = torch.cat([panel.pattern.transpose(0, 1)[:, live].double() for panel in panels])  # [n, rows, K]
        if exclude_first and keys > 1:
            rows = rows[..., 1:]
        rows = rows / rows.sum(-1, keepdim=True).clamp_min(1e-30)
        number += rows.shape[1]
        flat = rows.flatten(1)
        products += (flat @ flat.mT).cpu()
        divergence += _jensen_shannon(rows).cpu()
    if number:
        total.blocks.append((places, products, divergence, number))


def _live(panels: Sequence[AttentionRows], step: int) -> Tensor:
    """[B, R], bool: rows that count, see two keys or more in every head, and whose turn it is."""
    found = (panels[0].queries % step == 0)[None].expand(panels[0].pattern.shape[0], -1)
    for panel in panels:
        found = found & panel.counted & (panel.visible.sum(-1) > 1).all(1)
    return found


def _jensen_shannon(rows: Tensor) -> Tensor:
    """[n, n], the divergence of all pairs, [n, rows, K] each, summed over rows: H of the mean of two rows minus the mean of their H."""
    entropy = torch.special.entr(rows).sum((1, 2))  # [n]
    found = torch.zeros(len(rows), len(rows), dtype=rows.dtype, device=rows.device)
    for place in range(1, len(rows)):
        mixed = torch.special.entr((rows[place] + rows[:place]) / 2).sum((1, 2))
        found[place, :place] = (mixed - (entropy[place] + entropy[:place]) / 2).clamp_min(0.0)
    return found + found.mT


def _clusters(apart: Tensor, threshold: float) -> tuple[tuple[int, ...], ...]:
    if not threshold > 0:
        raise InputError(f"threshold={threshold}: give a positive distance, below 1")
    clustering = _scikit_learn()
    if len(apart) < 2:
        return ()
    model = clustering(n_clusters=None, metric="precomputed", linkage="average", distance_threshold=threshold)
    labels = model.fit_predict(apart.numpy())
    groups: dict[int, list[int]] = {}
    for place, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(place)
    found = [tuple(group) for group in groups.values() if len(group) > 1]
    return tuple(sorted(found, key=lambda group: (-len(group), group)))


def _scikit_learn() -> Any:  # scikit-learn has no types
    try:
        from sklearn.cluster import AgglomerativeClustering
    except ImportError as error:
        raise HeadscopeError(
            "clusters of heads need scikit-learn, which is not installed: pip install 'headscope[attribution]', or chart without redundancy"
        ) from error
    return AgglomerativeClustering
