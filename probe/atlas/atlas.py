"""The head atlas: what each head of a model is.

    atlas = chart_heads(model, tokenizer)
    print(atlas)                      # the labelled heads, a line each
    atlas.scores["induction"]         # [L, H]
    atlas.card(5, 2)                  # 5.2 induction: 0.91 of its attention follows a repeat …

Letters: L sites in execution order, H query heads (of the widest site).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.atlas import atlas_file
from headscope.probe.atlas.atlas_figure import figure
from headscope.probe.atlas.atlas_html import page_of
from headscope.probe.atlas.card import PLAIN, RULES, UNDEFINED, Card, rules_of, write_card
from headscope.probe.atlas.circuits import Circuits
from headscope.probe.atlas.redundancy import Redundancy
from headscope.probe.call import AttentionSite
from headscope.probe.visible import markup, visible
from headscope.probe.whole_file import write_whole

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class HeadAtlas:
    """Scores of all heads, and what follows from them.

    Heads are named `layer.head`, where the layer is that of the site's block; if two sites share a block, or one has none, it is the
    site's place in execution order.

    Attributes:
        sites: the L sites.
        scores: by name, [L, H] in float64; NaN where undefined. `docs/guides/atlas.md` lists the names.
        uniform: by name, [L, H], what attention spread evenly over the visible keys scores.
        sink_key: [L, H], int64, the key that gets most of all attention; -1 where undefined.
        on: by name, what a score was measured on, in words.
        undefined: by name, why a score is NaN throughout.
        redundancy: how alike the patterns are, and clusters; None where that was not asked for.
        circuits: compositions and directions; None likewise.
        thresholds: of labels, where they are not the default.
        warnings: what a reader should know, in words.
        info: how it was made: model, fingerprint, versions, seed; ready for JSON.
    """

    sites: tuple[AttentionSite, ...]
    scores: Mapping[str, Tensor]
    uniform: Mapping[str, Tensor]
    sink_key: Tensor
    on: Mapping[str, str] = field(default_factory=dict)
    undefined: Mapping[str, str] = field(default_factory=dict)
    redundancy: Redundancy | None = None
    circuits: Circuits | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    info: Mapping[str, object] = field(default_factory=dict)

    # -- heads -----------------------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """What each site is called by: its layer, or its place."""
        numbers = [site.layer for site in self.sites]
        return tuple(n for n in numbers if n is not None) if None not in numbers and len(set(numbers)) == len(numbers) else tuple(
            range(len(numbers))
        )  # fmt: skip

    def lift(self, score: str) -> Tensor:
        """[L, H], a score minus what uniform attention gets.

        Raises:
            SelectionError: no such score, or one without a baseline.
        """
        self._of(score)
        if score not in self.uniform:
            raise SelectionError(f"{score} has no uniform baseline: those with one are {', '.join(self.uniform)}")
        return self.scores[score] - self.uniform[score]

    def top(self, score: str, count: int = 10) -> list[tuple[int, int, float]]:
        """(layer, head, score) of the heads that have most of it; undefined ones are left out.

        Raises:
            SelectionError: no such score.
        """
        table = self._of(score)
        rows = [(float(table[place, head]), place, head) for place, head in self._places() if not math.isnan(float(table[place, head]))]
        return [(self.layers[place], head, value) for value, place, head in sorted(rows, key=lambda row: (-row[0], *row[1:]))[:count]]

    @cached_property
    def _cards(self) -> tuple[Card, ...]:
        rules = rules_of(self.thresholds)
        ranks = self._ranks()
        found = []
        for place, head in self._places():
            own, even = ({name: float(table[place, head]) for name, table in tables.items()} for tables in (self.scores, self.uniform))
            extra = [f"importance rank {ranks[place, head]} of {len(ranks)}"] if (place, head) in ranks else []
            if self.redundancy is not None and (alike := self.redundancy.cluster_of(self.sites[place].name, head)):
                extra.append(f"alike: {', '.join(self.name(*other) for other in alike[:3])}{' …' if len(alike) > 3 else ''}")
            found.append(write_card(self.sites[place].name, self.layers[place], head, rules, own, even, extra))
        return tuple(found)

    def cards(self) -> tuple[Card, ...]:
        """One card a head, in order of layers."""
        return self._cards

    def card(self, layer: int, head: int) -> Card:
        """The card of one head.

        Raises:
            SelectionError: no such head.
        """
        self._place(layer, head)
        return next(card for card in self._cards if (card.layer, card.head) == (layer, head))

    def labels(self) -> dict[str, list[Card]]:
        """The cards of the heads with each label, those that have most of it first; labels that no head has are left out."""
        found: dict[str, list[Card]] = {}
        for label in (*RULES, PLAIN, UNDEFINED):
            own = [card for card in self._cards if label in card.labels]
            if label in RULES:
                sign = -1 if RULES[label].at_least >= 0 else 1
                own.sort(key=lambda card, label=label: sign * card.evidence[card.labels.index(label)][1])  # type: ignore[misc]
            if own:
                found[label] = own
        return found

    def name(self, site: str, head: int) -> str:
        """`5.2` for head 2 of the site of layer 5."""
        return f"{self.layers[self._index(site)]}.{head}"

    def describe(self, layer: int, head: int) -> str:
        """Everything known about one head, in lines of text.

        Raises:
            SelectionError: no such head.
        """
        place = self._place(layer, head)
        site = self.sites[place].name
        lines = [self.card(layer, head).text, "", f"site     {site}"]
        if self.redundancy is not None:
            alike = self.redundancy.cluster_of(site, head)
            lines.append(f"alike    {', '.join(self.name(*other) for other in alike) or 'no other head'}")
        lines += ["", "score                   value  uniform  measured on"]
        for name, table in self.scores.items():
            value = float(table[place, head])
            even = float(self.uniform[name][place, head]) if name in self.uniform else math.nan
            told = [f"{number:8.3f}" if not math.isnan(number) else "       –" for number in (value, even)]
            lines.append(f"{name:20s} {told[0]} {told[1]}  {self.on.get(name, '') if not math.isnan(value) else self.reason(name)}")
        if self.circuits is not None:
            lines += self._wiring(site, head)
        return "\n".join(lines)

    def reason(self, score: str) -> str:
        """Why a score is undefined."""
        return f"undefined: {self.undefined.get(score, 'not for this head')}"

    def _wiring(self, site: str, head: int) -> list[str]:
        """Directions and compositions of a head, in lines."""
        assert self.circuits is not None
        lines = []
        for direction in self.circuits.directions.get((site, head), ()):
            between = "looks for" if direction.circuit == "qk" else "writes"
            lines.append(f"  {direction.circuit.upper()} σ {direction.value:.3g} ({direction.share:.0%} of the whole)")
            for pole in direction.poles:
                reads, writes = (" ".join(f"‹{visible(text)}›" for text, _ in side) for side in (pole.reads, pole.writes))
                lines.append(f"    {reads}  {between}  {writes}")
        lines = ["", "strongest directions, in tokens", *lines] if lines else []
        told = [
            f"  {pair.kind.upper()}: {self.name(pair.source, pair.source_head)} → {self.name(pair.target, pair.target_head)}"
            f"  {pair.score:.3f}, {pair.excess:+.3f} from unrelated heads"
            for pair in self.circuits.of(site, head)
        ]
        return [*lines, "", "composition (Q, K, V: what of the later head it feeds)", *told] if told else lines

    # -- rules -----------------------------------------------------------------------------------------------------

    def relabel(self, thresholds: Mapping[str, float]) -> HeadAtlas:
        """The same atlas with other thresholds of labels, by label.

        Raises:
            SelectionError: no such label.
            InputError: a threshold that is not finite.
        """
        rules_of(thresholds)
        return replace(self, thresholds=dict(thresholds))

    # -- out -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values: the document that `save` writes. NaN is None."""
        return atlas_file.encode(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write the atlas as a JSON file, schema `headscope.atlas/v1`; it is whole or absent.

        Raises:
            StoreError: the folder takes no file.
        """
        return atlas_file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> HeadAtlas:
        """What `save` wrote.

        Raises:
            StoreError: there is no such file, or it is damaged or of another version.
        """
        return cls(**atlas_file.load(Path(path)))

    def save_html(self, path: str | Path) -> Path:
        """Write the atlas as a page that needs no network and runs no script.

        Raises:
            StoreError: the folder takes no file.
        """
        title = f"Head atlas: {self.info.get('model', 'model')}"
        head = (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
            "<style>body{color-scheme:light dark;background:light-dark(#fff,#15171b)}</style>"
            f"<title>{markup(title)}</title></head><body style='margin:0 auto;max-width:72rem;padding:1rem'>"
        )
        return write_whole(Path(path), f"{head}{page_of(self)}</body></html>\n".encode())

    def to_frame(self) -> DataFrame:
        """One line a head: site, layer, head, labels, card, every score and its uniform baseline; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        rows: list[dict[str, object]] = []
        for card, (place, head) in zip(self._cards, self._places(), strict=True):
            row: dict[str, object] = {
                "site": card.site, "layer": card.layer, "head": head, "labels": ", ".join(card.labels), "card": card.text,
            }  # fmt: skip
            row |= {name: float(table[place, head]) for name, table in self.scores.items()}
            row |= {f"{name} uniform": float(table[place, head]) for name, table in self.uniform.items()}
            rows.append(row)
        return pandas.DataFrame(rows)

    def plot(self, score: str | None = None) -> Figure:
        """A heat map of layers and heads as a Plotly figure; needs plotly.

        Args:
            score: which; None draws the most telling ones side by side.

        Raises:
            HeadscopeError: plotly is not installed.
            SelectionError: no such score.
        """
        if score is not None:
            self._of(score)
        return figure(self, score)

    def _repr_html_(self) -> str:
        return page_of(self)

    def __str__(self) -> str:
        lines = [f"HeadAtlas({self.info.get('model', 'model')}, {len(self.sites)} sites, {len(self._places())} heads)"]
        for label, cards in self.labels().items():
            lines.append(f"  {label}: {' '.join(card.name for card in cards[:12])}{' …' if len(cards) > 12 else ''}")
        return "\n".join(lines)

    # -- finding ---------------------------------------------------------------------------------------------------

    def _of(self, score: str) -> Tensor:
        if score not in self.scores:
            raise SelectionError(f"no score {score!r}: there are {', '.join(self.scores)}")
        return self.scores[score]

    def _places(self) -> list[tuple[int, int]]:
        return [(place, head) for place, site in enumerate(self.sites) for head in range(site.query_heads)]

    def _index(self, site: str) -> int:
        names = [own.name for own in self.sites]
        if site not in names:
            raise SelectionError(f"no site {site!r}: there are {', '.join(names)}")
        return names.index(site)

    def _place(self, layer: int, head: int) -> int:
        if layer not in self.layers:
            raise SelectionError(f"no layer {layer}: there are {', '.join(map(str, self.layers))}")
        place = self.layers.index(layer)
        if not 0 <= head < self.sites[place].query_heads:
            raise SelectionError(f"no head {head}: layer {layer} has {self.sites[place].query_heads} heads, from 0")
        return place

    def _ranks(self) -> dict[tuple[int, int], int]:
        """Rank of importance of each head, from 1; none where that is unknown."""
        table = self.scores.get("importance")
        known = [] if table is None else [(place, head) for place, head in self._places() if not bool(torch.isnan(table[place, head]))]
        order = sorted(known, key=lambda at: -float(table[at])) if table is not None else []
        return {at: number for number, at in enumerate(order, 1)}
