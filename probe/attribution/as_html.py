"""An attribution as a static piece of HTML: no script, no link, every token literal.

Relevance is told by colour (orange for, blue against), by the sign and by a digit, so that it can be read without colours. Letters:
B batch, S tokens, L layers, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope.kernels.errors import SelectionError
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from headscope.probe.attribution.attribution import Attribution

FOR, AGAINST = (217, 95, 2), (33, 102, 172)  # orange and blue, told apart with every common colour blindness
MOST_TOKENS = 2000  # of one text that are shown
MOST_SAMPLES = 8
MOST_CELLS = 16  # of an image, a side
TOP_HEADS = 5
HALF = re.compile("[\udc80-\udcff]")  # a byte that is no whole character, in a piece


def page_of(attribution: Attribution) -> str:
    """The whole result: what was asked, the inputs, the strongest heads, the books, the warnings."""
    parts = [f"<p><b>{markup(attribution.method)}</b>: {markup(attribution.target)} = {attribution.value:.6g}</p>"]
    parts += [f"<p><b>Warning:</b> {markup(text)}</p>" for text in attribution.warnings]
    for name, value in attribution.inputs.items():
        count = value.shape[0] if value.dim() else 0
        for sample in range(min(count, MOST_SAMPLES)):
            title = f"{name}, sample {sample}" if count > 1 else name
            parts.append(f"<p><b>{markup(title)}</b>, sum {float(value[sample].double().sum()):+.6g}</p>")
            parts.append(_input(attribution, value[sample], sample))
        if count > MOST_SAMPLES:
            parts.append(f"<p>{MOST_SAMPLES} of {count} samples are shown.</p>")
    parts += [_heads(attribution), _ledger(attribution)]
    style = "font-family:system-ui,sans-serif;font-size:14px;line-height:1.5;color:#111;background:#fff;padding:.5em"
    return f'<div style="{style}">{"".join(parts)}</div>'


def tokens_html(tokens: Sequence[str], relevance: Sequence[float], special: Sequence[bool] | None = None) -> str:
    """Tokens as coloured boxes with sign and digit: 9 is the largest magnitude among them, 0 less than an eighteenth of it.

    Args:
        tokens: their texts; any characters.
        relevance: of each.
        special: tokens that are no part of the text get a dashed frame.
    """
    largest = max((abs(number) for number in relevance), default=0.0)
    boxes = []
    for place, (token, number) in enumerate(zip(tokens[:MOST_TOKENS], relevance, strict=False)):
        frame = "1px dashed #555" if special is not None and special[place] else "1px solid #ddd"
        style = (
            f"display:inline-block;margin:1px;padding:0 3px;white-space:pre;unicode-bidi:isolate;border:{frame};{colour(number, largest)}"
        )
        boxes.append(f'<span style="{style}">{markup(token)}<sub>{digit(number, largest)}</sub></span>')
        if "\n" in token:
            boxes.append("<br>")
    if len(relevance) > MOST_TOKENS:
        boxes.append(f"<p>{MOST_TOKENS} of {len(relevance)} tokens are shown.</p>")
    return f'<div style="line-height:2">{"".join(boxes)}</div>'


def digit(number: float, largest: float) -> str:
    """Sign and size in one digit: +9 for the largest magnitude, 0 for next to nothing."""
    size = round(9 * abs(number) / largest) if largest else 0
    return f"{'+' if number > 0 else '−'}{size}" if size else "0"


def colour(number: float, largest: float) -> str:
    """CSS of a box's background; pale enough at its strongest for black text."""
    share = 0.6 * abs(number) / largest if largest else 0.0
    mixed = (round(255 + share * (channel - 255)) for channel in (FOR if number > 0 else AGAINST))
    return "background:rgb({},{},{})".format(*mixed)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are escaped; every column but the first is right-aligned."""
    cell = "padding:1px 8px;border-bottom:1px solid #ddd;text-align:"
    sides = ["left", *["right"] * (len(titles) - 1)]
    head = "".join(f'<th style="{cell}{side}">{markup(title)}</th>' for title, side in zip(titles, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td style="{cell}{side}">{markup(text)}</td>' for text, side in zip(row, sides, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<table style="border-collapse:collapse"><tr>{head}</tr>{body}</table>'


def one_sample(attribution: Attribution, sample: int | None) -> int:
    """Which sample is meant.

    Raises:
        SelectionError: there are several to choose from, or no such sample.
    """
    count = max((value.shape[0] for value in attribution.inputs.values() if value.dim()), default=1)
    if sample is None and count == 1:
        return 0
    if sample is None or not 0 <= sample < count:
        raise SelectionError(f"{'which sample?' if sample is None else f'no sample {sample}:'} there are {count}: give sample=")
    return sample


def names_of(attribution: Attribution, sample: int, count: int) -> list[str]:
    """The tokens of a sample, bytes that are no character as `\\xe2`; their positions where the texts are not known."""
    texts = attribution.pieces or attribution.tokens
    if texts is not None and sample < len(texts) and len(texts[sample]) == count:
        return [HALF.sub(lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text) for text in texts[sample]]
    return [str(place) for place in range(count)]


def special_of(attribution: Attribution, sample: int, count: int) -> list[bool] | None:
    """Which tokens of a sample are special; None where that is not known of this input."""
    known = attribution.special
    fits = known is not None and sample < known.shape[0] and known.shape[1] == count
    return [bool(apart) for apart in known[sample].tolist()] if known is not None and fits else None


def image_of(relevance: Tensor) -> Tensor | None:
    """[height, width], relevance [C, height, width] of an image summed over its channels; None where it is no image."""
    return relevance.detach().double().cpu().sum(0) if relevance.dim() == 3 else None


def _input(attribution: Attribution, relevance: Tensor, sample: int) -> str:
    if relevance.dim() == 1:
        count = len(relevance)
        numbers = relevance.detach().double().tolist()
        return tokens_html(names_of(attribution, sample, count), numbers, special_of(attribution, sample, count))
    image = image_of(relevance)
    if image is None:
        return f"<p>{markup(str(list(relevance.shape)))}, from {float(relevance.min()):+.3g} to {float(relevance.max()):+.3g}</p>"
    sums = _pooled(image)
    largest = float(sums.abs().max())
    rows = "".join(
        "<tr>" + "".join(f'<td style="width:2em;text-align:center;{colour(n, largest)}">{digit(n, largest)}</td>' for n in row) + "</tr>"
        for row in sums.tolist()
    )
    return f'<table style="border-collapse:collapse">{rows}</table>'


def _pooled(image: Tensor) -> Tensor:
    """Sums over tiles, so that at most `MOST_CELLS` cells stand side by side."""
    tile = -(-max(image.shape) // MOST_CELLS)
    high, wide = (-(-size // tile) * tile for size in image.shape)
    padded = torch.nn.functional.pad(image, (0, wide - image.shape[1], 0, high - image.shape[0]))
    return padded.reshape(high // tile, tile, wide // tile, tile).sum((1, 3))


def strongest_heads(attribution: Attribution, count: int) -> list[tuple[str, int, float]]:
    """(site, head, relevance over batch and positions) of the heads with the largest magnitudes."""
    every = [
        (name, head, number)
        for name, value in attribution.heads.items()
        for head, number in enumerate(value.detach().double().sum((0, 2)).tolist())
    ]
    return sorted(every, key=lambda row: -abs(row[2]))[:count]


def _heads(attribution: Attribution) -> str:
    found = strongest_heads(attribution, TOP_HEADS)
    if not found:
        return ""
    total = sum(value.shape[1] for value in attribution.heads.values())
    rows = [(name, str(head), f"{number:+.4g}") for name, head, number in found]
    return f"<p><b>Strongest heads</b>, {len(rows)} of {total}</p>" + table(("site", "head", "relevance"), rows)


def _ledger(attribution: Attribution) -> str:
    ledger = attribution.ledger
    if ledger is None:
        return "<p><b>Books:</b> this method keeps none.</p>"
    state = "PASS" if ledger.closes else "FAIL"
    limit = ledger.tolerance * ledger.scale
    return f"<p><b>Books: {state}</b>, residual {ledger.residual:.3g}, allowed {limit:.3g}</p>" + table(
        ("where relevance is", "amount", "of the target"), ledger_rows(attribution)
    )


def ledger_rows(attribution: Attribution) -> list[tuple[str, str, str]]:
    """The books in a few lines: what, amount, share of the target; no lines without books."""
    ledger = attribution.ledger
    if ledger is None:
        return []
    amounts = [("target", ledger.target), ("inputs", ledger.inputs)]
    if ledger.constants:
        amounts.append(("constants (positions, token types)", sum(ledger.constants.values())))
    amounts += [(f"absorbed: {kind}", amount) for kind, amount in ledger.by_kind().items()]
    amounts.append(("residual", ledger.residual))
    share = ledger.target
    return [(name, f"{amount:+.6g}", f"{100 * amount / share:.1f} %" if share else "–") for name, amount in amounts]
