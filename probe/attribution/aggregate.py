"""Relevance of words, sentences and other groups of tokens: signed sums that lose nothing.

Every relevance is first put on a common grid, a multiple of the power of two that is the last binary digit of the sum of all
magnitudes (which moves it by less than a float64 of that size can tell). Multiples of one step add up without rounding, so the sums over
tokens, words, sentences and the whole are the same number, in whichever order they are taken. Letters: B batch, S tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from headscope.kernels.errors import HeadscopeError, InputError, SelectionError
from headscope.probe.attribution.as_html import tokens_html
from headscope.probe.attribution.units import group_words
from headscope.probe.attribution.words import joined, sentence_starts, word_starts

if TYPE_CHECKING:
    from pandas import DataFrame

    from headscope.probe.attribution.attribution import Attribution

Span = tuple[int, int] | Sequence[int] | range


@dataclass(frozen=True)
class Group:
    """Some tokens of one text.

    Attributes:
        text: what they say, verbatim; the name that was given, for groups with names.
        places: their positions.
        relevance: the sum over them.
        kind: `text`, `special` (no part of the text), or `rest` (in none of the groups that were asked for).
    """

    text: str
    places: tuple[int, ...]
    relevance: float
    kind: str = "text"


@dataclass(frozen=True)
class Groups(Sequence[Group]):
    """A text cut into groups; every token is in one of them.

    Attributes:
        of: what they are: words, sentences, tokens, groups.
        rows: in the order of their first token, the rest last.
        total: the sum over all tokens, which is that over the groups.
    """

    of: str
    rows: tuple[Group, ...]
    total: float

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Group: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, place: int | slice) -> Group | tuple[Group, ...]:
        return self.rows[place]

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return {"of": self.of, "total": self.total, "rows": [{**asdict(row), "places": list(row.places)} for row in self.rows]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line a group; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=["text", "places", "relevance", "kind"])

    def _repr_html_(self) -> str:
        return tokens_html([row.text for row in self.rows], [row.relevance for row in self.rows], [row.kind != "text" for row in self.rows])

    def __str__(self) -> str:
        return f"Groups({len(self)} {self.of}, total {self.total:.6g})"


def words(attribution: Attribution, sample: int | None = None, name: str | None = None) -> Groups:
    """One row a word, by white space; special tokens and white space that is a token of its own are rows too.

    Args:
        attribution: of a text, with its tokens.
        sample: which of the batch; may be left out where there is one.
        name: of the input, as in `Attribution.of_tokens`.

    Raises:
        InputError: it is not known which tokens there are, or which of them are special.
        SelectionError: no such sample or input.
    """
    return _by_starts("words", attribution, sample, name)


def sentences(attribution: Attribution, sample: int | None = None, name: str | None = None) -> Groups:
    """One row a sentence, see `sentence_starts`; the same otherwise as `words`."""
    return _by_starts("sentences", attribution, sample, name)


def groups(
    attribution: Attribution, spans: Mapping[str, Span] | Sequence[Span], sample: int | None = None, name: str | None = None
) -> Groups:
    """One row for each span of tokens, such as the turns of a chat or the sources of a prompt; what is in none is one more row.

    Args:
        attribution: of a text; its tokens need not be known.
        spans: by name, or without names in a list. A pair (start, stop) leaves out stop, as a slice does; other numbers of positions, and
            ranges, are the positions themselves.
        sample, name: as in `words`.

    Raises:
        InputError: an empty span, one outside of the text, or two that overlap.
        SelectionError: no such sample or input.
    """
    relevance, sample = _relevance(attribution, sample, name)
    length = len(relevance)
    pieces = None if attribution.tokens is None else _pieces(attribution, sample, length)
    listed = list(spans.items()) if isinstance(spans, Mapping) else [(None, span) for span in spans]
    owner: dict[int, str] = {}
    found: list[Group] = []
    for number, (title, span) in enumerate(listed):
        places = _places(span, length)
        words = title if title is not None else f"{places[0]}:{places[-1] + 1}" if pieces is None else joined([pieces[p] for p in places])
        for place in places:
            if place in owner:
                raise InputError(f"token {place} is in two groups, {owner[place]!r} and {str(title or number)!r}: groups must not overlap")
            owner[place] = str(title or number)
        found.append(_group(words, places, relevance, "text"))
    rest = tuple(place for place in range(length) if place not in owner)
    if rest:
        found.append(_group("rest", rest, relevance, "rest"))
    return Groups("groups", tuple(found), float(relevance.sum()))


def on_grid(relevance: Tensor) -> Tensor:
    """Float64 multiples of one power of two, see the module docstring; of any shape.

    Raises:
        InputError: a relevance that is not finite.
    """
    wide = relevance.detach().to("cpu", torch.float64)
    size = float(wide.abs().sum())
    if not math.isfinite(size):
        raise InputError("a relevance is NaN or infinite, so it has no sum")
    step = math.ldexp(1.0, math.frexp(size)[1] - 52) if size else 0.0
    return torch.round(wide / step) * step if step else wide


def _by_starts(of: str, attribution: Attribution, sample: int | None, name: str | None) -> Groups:
    relevance, sample = _relevance(attribution, sample, name)
    length = len(relevance)
    if attribution.tokens is None:
        raise InputError(f"{of} need the text of the tokens, which this attribution has not: give attribute(…, tokenizer=…)")
    if attribution.special is None:
        raise InputError(f"{of} need to know which tokens are special, which this attribution does not: give attribute(…, tokenizer=…)")
    pieces = _pieces(attribution, sample, length)
    special = [bool(apart) for apart in attribution.special[sample].tolist()]
    starts = word_starts(pieces, special) if of == "words" else sentence_starts(pieces, special)
    # What follows a special token starts anew: `starts` says so.
    places, _ = group_words([(place,) for place in range(length)], pieces, starts)
    found = []
    for own in places:
        text = joined([pieces[place] for place in own])
        if of == "sentences" or text.strip():
            text = text.strip() or text
        found.append(_group(text, own, relevance, "special" if special[own[0]] else "text"))
    return Groups(of, tuple(found), float(relevance.sum()))


def _relevance(attribution: Attribution, sample: int | None, name: str | None) -> tuple[Tensor, int]:
    """[S] on its grid, of one sample, and which."""
    every = attribution.of_tokens(name)
    if sample is None:
        if len(every) != 1:
            raise SelectionError(f"which text? there are {len(every)}: give sample=")
        sample = 0
    if not 0 <= sample < len(every):
        raise SelectionError(f"no sample {sample}: there are {len(every)}, 0 to {len(every) - 1}")
    return on_grid(every[sample]), sample


def _pieces(attribution: Attribution, sample: int, length: int) -> Sequence[str]:
    found = attribution.pieces or attribution.tokens
    assert found is not None
    if len(found[sample]) != length:
        raise InputError(
            f"the input has {length} positions and {len(found[sample])} tokens of text: name= the input that the tokens are of"
        )
    return found[sample]


def _places(span: Span, length: int) -> tuple[int, ...]:
    pair = isinstance(span, tuple) and len(span) == 2
    places = tuple(range(span[0], span[1])) if pair else tuple(span)
    if not places:
        raise InputError(f"the group {span} is empty: a pair is (start, stop), with stop left out")
    for place in places:
        if not 0 <= place < length:
            raise InputError(f"the group {span} leaves the text: there are {length} tokens, 0 to {length - 1}")
    return places


def _group(text: str, places: tuple[int, ...], relevance: Tensor, kind: str) -> Group:
    return Group(text, places, float(relevance[list(places)].sum()), kind)
