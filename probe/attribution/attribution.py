"""What an attribution found.

Letters: B batch, S tokens, H query heads, Q queries, K keys, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headscope.kernels.errors import HeadscopeError, SelectionError
from headscope.probe.attribution import aggregate, attribution_file
from headscope.probe.attribution.aggregate import Groups, Span
from headscope.probe.attribution.as_figure import figure
from headscope.probe.attribution.as_html import page_of
from headscope.probe.attribution.ledger import Ledger
from headscope.probe.call import AttentionSite

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class Attribution:
    """Relevance of everything that a target's value was made from.

    Relevances are in the unit of the target (logits, for a logit), signed, and additive: those of the parts of a thing sum to its own.

    Attributes:
        method: name of the method.
        target: what was attributed, in words.
        value: the target's value, summed over the batch.
        inputs: by name of the input: [B, S] for token ids (summed over the width of their embedding), else of the input's own shape.
        heads: by name of the site: [B, H, Q], at each head's output z before the output projection.
        blocks: by module path: [B, S], at the residual stream that leaves the block.
        parts: by module path: [B, S], at what a part of a block (attention, MLP) adds to the residual stream.
        sites: the sites of `heads`, in execution order.
        ledger: what was absorbed on the way, and whether the books close; None for methods that do not conserve.
        unruled: (operation, module, calls) without a rule; relevance passed them by their own gradient.
        warnings: what a reader should know, in words.
        tokens: [B][S], the text of each token, where a tokenizer was given.
        pieces: [B][S], each token as it stands in the text, by which words are found; see `words.py`.
        special: [B, S] bool, tokens that are no part of the text; None where that is not known.
        settings: how it was made, ready for JSON.
        maps: makes what `map` returns, where maps were kept; no part of a saved result.
    """

    method: str
    target: str
    value: float
    inputs: Mapping[str, Tensor]
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    blocks: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    sites: tuple[AttentionSite, ...] = ()
    ledger: Ledger | None = None
    unruled: tuple[tuple[str, str, int], ...] = ()
    warnings: tuple[str, ...] = ()
    tokens: Sequence[Sequence[str]] | None = None
    pieces: Sequence[Sequence[str]] | None = None
    special: Tensor | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    maps: Callable[[str, Sequence[int] | None], Tensor] | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool | None:
        """Whether the books close; None where the method keeps none."""
        return None if self.ledger is None else self.ledger.closes

    def of_tokens(self, name: str | None = None) -> Tensor:
        """[B, S], the relevance of each token of a text input.

        Args:
            name: of the input; may be left out where there is one.

        Raises:
            SelectionError: there is none of that name, or several to choose from.
        """
        found = {key: value for key, value in self.inputs.items() if value.dim() == 2}
        if name is None and len(found) == 1:
            return next(iter(found.values()))
        wanted = "input_ids" if name is None else name
        if wanted not in found:
            what = f"no input {name!r} is a text" if name is not None else "which text?" if found else "no input is a text"
            raise SelectionError(f"{what}: of tokens [B, S] there are {', '.join(found) or 'none; read .inputs'}")
        return found[wanted]

    def of_heads(self) -> Tensor:
        """[L, H], relevance of every head, summed over batch and positions; layers in execution order.

        Raises:
            SelectionError: no heads were kept, or sites differ in their number of heads.
        """
        rows = [value.sum(dim=(0, 2)) for value in self.heads.values()]
        if not rows:
            raise SelectionError("no relevance of heads was kept: attribute(…, heads=True)")
        if len({len(row) for row in rows}) > 1:
            raise SelectionError("the sites differ in their number of heads: read .heads by site")
        return torch.stack(rows)

    def map(self, site: str, rows: Sequence[int] | None = None) -> Tensor:
        """How each head's relevance at a query came from the keys: pattern times ⟨v, g⟩; its sum over the keys is `heads[site]`.

        Args:
            site: its name.
            rows: query positions; None for all, which is a tensor of Q × K cells a head.

        Returns:
            [B, H, len(rows), K].

        Raises:
            SelectionError: maps were not kept, or there is no such site.
        """
        if self.maps is None:
            raise SelectionError("the maps were not kept: attribute(…, maps=True); a saved result never holds them")
        if site not in self.heads:
            raise SelectionError(f"no site {site!r}: there are {', '.join(self.heads)}")
        return self.maps(site, rows)

    def words(self, sample: int | None = None, name: str | None = None) -> Groups:
        """Relevance of words, see `aggregate.words`."""
        return aggregate.words(self, sample, name)

    def sentences(self, sample: int | None = None, name: str | None = None) -> Groups:
        """Relevance of sentences, see `aggregate.sentences`."""
        return aggregate.sentences(self, sample, name)

    def groups(self, spans: Mapping[str, Span] | Sequence[Span], sample: int | None = None, name: str | None = None) -> Groups:
        """Relevance of spans of tokens, such as the turns of a chat or the sources of a prompt, see `aggregate.groups`."""
        return aggregate.groups(self, spans, sample, name)

    def save(self, path: str | Path) -> Path:
        """Write everything but maps as a JSON file, schema `headscope.attribution/v1`; it is whole or absent.

        Raises:
            StoreError: the folder takes no file.
            NonFiniteError: a number is NaN or infinite.
        """
        return attribution_file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """What `save` wrote, on the CPU.

        Raises:
            StoreError: there is no such file, or it is damaged, changed or of another version.
        """
        return cls(**attribution_file.load(Path(path)))

    def to_dict(self) -> dict[str, object]:
        """Everything but maps as plain values: the document that `save` writes."""
        return attribution_file.encode(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line per sample and token (or element) of every input; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        rows: list[dict[str, Any]] = []
        for name, value in self.inputs.items():
            flat = value.reshape(value.shape[0], -1).tolist() if value.dim() else [[float(value)]]
            for sample, numbers in enumerate(flat):
                for position, number in enumerate(numbers):
                    row = {"input": name, "sample": sample, "position": position, "relevance": number}
                    if self.tokens is not None and value.dim() == 2 and position < len(self.tokens[sample]):
                        row["token"] = self.tokens[sample][position]
                    rows.append(row)
        return pandas.DataFrame(rows)

    def plot(self, sample: int | None = None) -> Figure:
        """The tokens (or pixels) by their sign, a heat map of heads and the books, as a Plotly figure.

        Args:
            sample: which of the batch; may be left out where there is one.

        Raises:
            HeadscopeError: plotly is not installed.
            SelectionError: no such sample.
        """
        return figure(self, sample)

    def _repr_html_(self) -> str:
        return page_of(self)

    def __str__(self) -> str:
        state = {None: "no books", True: "books close", False: "BOOKS DO NOT CLOSE"}[self.passed]
        unruled = f", {len(self.unruled)} operations without a rule" if self.unruled else ""
        return f"Attribution({self.method}, {self.target} = {self.value:.6g}, {len(self.heads)} sites, {state}{unruled})"
