"""From a piece of text to the tokens that carry it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from headscope.interventions.positions import Span
from headscope.kernels.errors import SelectionError

UNFINISHED = "\ufffd"  # what decoding gives for a character whose bytes are not all there yet


class Tokenizer(Protocol):
    """What a span needs of a tokenizer; those of transformers have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of the tokens."""
        ...


def locate(
    spans: Iterable[Span], tokenizer: Tokenizer | None, input_ids: Tensor | Sequence[int] | None
) -> dict[Span, list[tuple[int, ...]]]:
    """For each span, the positions of the tokens that overlap it, one tuple for each row of the ids.

    Raises:
        SelectionError: nothing to look in, or a text that occurs in none of the rows.
    """
    wanted = sorted(set(spans), key=lambda span: span.text)
    if not wanted:
        return {}
    if tokenizer is None or input_ids is None:
        raise SelectionError(f"span({wanted[0].text!r}) needs the tokens it stands in: give plan.on(model, tokenizer=..., input_ids=...)")
    ids = torch.as_tensor(input_ids)
    if ids.ndim not in (1, 2) or not ids.numel() or ids.is_floating_point():
        raise SelectionError(f"input_ids of shape {list(ids.shape)} and {ids.dtype}: give token ids [tokens] or [samples, tokens]")
    rows = [_bounds(tokenizer, row) for row in (ids if ids.ndim == 2 else ids[None]).tolist()]
    found = {span: [_overlapping(span.text, text, bounds) for text, bounds in rows] for span in wanted}
    for span, positions in found.items():
        if not any(positions):
            text = rows[0][0]
            raise SelectionError(f"span({span.text!r}) does not occur in the text given: {text[:80]!r}{'…' if len(text) > 80 else ''}")
    return found


def _bounds(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of the ids and each token's [start, end) in it, in characters.

    Read off how the decoded text grows with each token, seen from a token before it, which holds for every tokenizer (word
    pieces, spaces that belong to the next token, bytes). Tokens that share one character all cover it.
    """

    def decode(first: int, stop: int) -> str:
        return tokenizer.decode(ids[first:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text, bounds = "", []
    anchor = read = 0  # the tokens before `read` are in the text; decoding starts at `anchor`
    for count in range(1, len(ids) + 1):
        known, grown = decode(anchor, read) if read > anchor else "", decode(anchor, count)
        if grown.endswith(UNFINISHED) and count < len(ids):
            continue
        piece = grown[len(known) :]
        bounds += [(len(text), len(text) + len(piece))] * (count - read)
        text += piece
        anchor, read = (read if piece else anchor), count
    return text, bounds


def _overlapping(wanted: str, text: str, bounds: list[tuple[int, int]]) -> tuple[int, ...]:
    places, at = [], text.find(wanted)
    while at >= 0:
        places.append((at, at + len(wanted)))
        at = text.find(wanted, at + 1)
    return tuple(i for i, (start, end) in enumerate(bounds) if any(start < right and end > left for left, right in places))
