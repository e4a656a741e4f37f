"""A head atlas as a static piece of HTML: no script, no link, every text literal. Letters: L sites, H query heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headscope.probe.atlas.atlas_figure import SHARES, SIGNED, TELLING
from headscope.probe.atlas.card import PLAIN, RULES, UNDEFINED, WITHOUT_BASELINE, Card
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from headscope.probe.atlas.atlas import HeadAtlas

# Backgrounds on which black text is read easily; the label stands in the cell too, so colour is never needed.
COLOURS = {
    "induction": "#f6c48a", "previous-token": "#a9d3ef", "duplicate-token": "#f3b6cf", "current-token": "#b9e3c6", "first-token": "#d9d9d9",
    "sink": "#d9d9d9", "positional": "#d8ccf0", "broad": "#f4ecb0", "local": "#d5e6b0", "copying": "#c5e8e4", "anti-copying": "#f2bdb5",
}  # fmt: skip
SHORT = {
    "induction": "induction", "previous-token": "previous", "duplicate-token": "duplicate", "current-token": "current",
    "first-token": "first", "sink": "sink", "positional": "positional", "broad": "broad", "local": "local",
    "copying": "copying", "anti-copying": "anti-copy",
}  # fmt: skip
MOST_HEADS = 64  # of a layer that are drawn
MOST_CARDS = 24  # of a label that are told
MOST_PAIRS = 12
MOST_TOKENS = 5
BLUE, RED = (33, 113, 181), (203, 24, 29)

MEANING = {
    "previous": "attention to the token before",
    "duplicate": "second copy: attention to the same token in the first",
    "induction": "second copy: attention to what followed the same token in the first",
    "current": "attention to the token itself",
    "first": "attention to the first token",
    "sink": "largest share of all attention that one key gets",
    "distance": "mean distance between query and key",
    "local": "how much shorter that distance is than uniform attention's, as a share",
    "confidence": "mean of the largest probability",
    "entropy": "mean entropy of a row, nats",
    "spread": "entropy as a share of uniform attention's",
    "positional": "likeness of the patterns of different contents, uniform attention taken off",
    "importance": "size of the effect of a gate on the head, to first order (Michel et al. 2019)",
    "copying": "OV copying score, −1 to 1",
}


def page_of(atlas: HeadAtlas) -> str:
    """The whole atlas: the map, the cards by label, scores, clusters, circuits, how it was made."""
    heads = sum(site.query_heads for site in atlas.sites)
    parts = [
        f"<h1 style='font-size:1.5em;margin:.2em 0'>Head atlas of {markup(str(atlas.info.get('model', 'the model')))}</h1>",
        f"<p style='opacity:.75;margin:.2em 0 1em'>{len(atlas.sites)} attention sites, {heads} heads. "
        "A head is named layer.head. Every label follows from a number by a rule; the number stands beside it.</p>",
        *(f"<p><b>Note:</b> {markup(text)}</p>" for text in atlas.warnings),
        _map(atlas), _cards(atlas), _scores(atlas), _clusters(atlas), _circuits(atlas), _made(atlas),
    ]  # fmt: skip
    colours = "color-scheme:light dark;color:light-dark(#111,#eceef1);background:light-dark(#fff,#15171b)"
    style = f"font-family:system-ui,sans-serif;font-size:14px;line-height:1.5;{colours};padding:.5em"
    return f'<div style="{style}">{"".join(part for part in parts if part)}</div>'


def _map(atlas: HeadAtlas) -> str:
    wide = min(MOST_HEADS, max((site.query_heads for site in atlas.sites), default=0))
    cards = {(card.layer, card.head): card for card in atlas.cards()}
    cell = "border:1px solid transparent;padding:3px 4px;text-align:center;font-size:12px;"
    top = "".join(f"<th style='{cell}opacity:.7;font-weight:normal'>{head}</th>" for head in range(wide))
    rows = []
    for layer, site in zip(atlas.layers, atlas.sites, strict=True):
        row = [f"<th style='{cell}text-align:right;opacity:.7;font-weight:normal;white-space:nowrap'>layer {layer}</th>"]
        for head in range(min(wide, site.query_heads)):
            card = cards[layer, head]
            label = card.labels[0]
            fill = COLOURS.get(label, "#f5f5f5")
            more = "+" if len(card.labels) > 1 else ""
            text = SHORT.get(label, "·" if label == PLAIN else "?")
            row.append(f"<td style='{cell}background:{fill};color:#111;min-width:4.6em' title='{_attribute(card.text)}'>{text}{more}</td>")
        rows.append(f"<tr>{''.join(row)}</tr>")
    notes = "+ has further labels; · no pattern that has a name; ? undefined"
    cut = "" if wide == max((site.query_heads for site in atlas.sites), default=0) else f" The first {wide} heads of each layer are drawn."
    return (
        "<div style='overflow-x:auto'><table style='border-collapse:collapse'><tr><th></th>"
        f"{top}</tr>{''.join(rows)}</table></div>"
        f"<p style='opacity:.7;font-size:12px;margin:.3em 0 1em'>Columns are heads. {notes}.{cut}</p>"
    )


def _cards(atlas: HeadAtlas) -> str:
    parts = [_title("What the heads do")]
    for label, cards in atlas.labels().items():
        if label in (PLAIN, UNDEFINED):
            parts.append(f"<p style='margin:.6em 0'>{_chip(label)} {_names(cards)}</p>")
            continue
        rule = RULES[label]
        first = [card for card in cards if card.labels[0] == label]
        also = [card for card in cards if card.labels[0] != label]
        shown = "".join(f"<li style='margin:.1em 0'>{_line(card)}</li>" for card in first[:MOST_CARDS])
        rest = f"<li>and {len(first) - MOST_CARDS} more: {_names(first[MOST_CARDS:])}</li>" if len(first) > MOST_CARDS else ""
        rest += f"<li style='opacity:.75'>{'also' if first else 'only beside other labels:'} {_names(also)}</li>" if also else ""
        told = _rule(rule.score, atlas.thresholds.get(label, rule.at_least))
        number = f"{len(cards)} head{'s' if len(cards) > 1 else ''}"
        source = f"<span style='opacity:.7;font-size:12px'>{number}; rule: {markup(told)} ({markup(rule.source)})</span>"
        parts.append(
            f"<div style='margin:.8em 0'>{_chip(label)} {source}<ul style='margin:.2em 0;padding-left:1.4em;list-style:none'>"
            f"{shown}{rest}</ul></div>"
        )
    return "".join(parts)


def _rule(score: str, limit: float) -> str:
    if limit < 0 or score in WITHOUT_BASELINE:
        return f"{score} at {'most' if limit < 0 else 'least'} {limit:g}"
    return f"{score} at least {limit:g} of the way from uniform attention's to all"


def _line(card: Card) -> str:
    name, _, rest = card.text.partition(": ")
    return f"<b>{markup(card.name)}</b> {markup(rest)}" if name else markup(card.text)


def _names(cards: Sequence[Card]) -> str:
    return " ".join(markup(card.name) for card in cards)


def _chip(label: str) -> str:
    return f"<b style='background:{COLOURS.get(label, '#eee')};color:#111;padding:1px 8px;border-radius:3px'>{markup(label)}</b>"


def _scores(atlas: HeadAtlas) -> str:
    names = [name for name in (*TELLING, *_own(atlas)) if name in atlas.scores and not bool(atlas.scores[name].isnan().all())]
    if not names:
        return ""
    tables = "".join(_table(atlas, name) for name in names)
    return f"{_title('Scores')}<div style='display:flex;flex-wrap:wrap;gap:1.2em'>{tables}</div>"


def _own(atlas: HeadAtlas) -> list[str]:
    """The user's detectors: scores whose meaning is not known here."""
    return [str(name) for name in detectors] if isinstance(detectors := atlas.info.get("detectors"), list) else []


def _table(atlas: HeadAtlas, name: str) -> str:
    table = atlas.scores[name].tolist()
    known = [cell for row in table for cell in row if not math.isnan(cell)]
    largest = 1.0 if name in SHARES else max(map(abs, known), default=1.0) or 1.0
    wide = min(MOST_HEADS, max((site.query_heads for site in atlas.sites), default=0))
    style = "padding:1px 3px;text-align:center;font-size:11px;min-width:2.4em;"
    rows = []
    for layer, row in zip(atlas.layers, table, strict=True):
        cells = "".join(f"<td style='{style}{_shade(cell, largest)}'>{_told(cell, name)}</td>" for cell in row[:wide])
        rows.append(f"<tr><th style='{style}opacity:.7;font-weight:normal'>{layer}</th>{cells}</tr>")
    even = atlas.uniform.get(name)
    base = [cell for row in (even.tolist() if even is not None else []) for cell in row if not math.isnan(cell)]
    between = f"; uniform attention {min(base):.2f}" + (f" to {max(base):.2f}" if max(base) - min(base) > 0.005 else "") if base else ""
    measured = f"; on {markup(atlas.on[name])}" if name in atlas.on else ""
    told = f"{markup(MEANING.get(name, 'a detector of the user'))}{measured}{between}"
    return (
        f"<div style='max-width:26em'><b>{markup(name)}</b><br><span style='opacity:.7;font-size:12px'>{told}</span>"
        f"<div style='overflow-x:auto'><table style='border-collapse:collapse;margin-top:.2em'>{''.join(rows)}</table></div></div>"
    )


def _shade(cell: float, largest: float) -> str:
    if math.isnan(cell):
        return "color:#777"
    share = 0.65 * min(1.0, abs(cell) / largest)
    red, green, blue = (round(255 + share * (channel - 255)) for channel in (BLUE if cell >= 0 else RED))
    return f"background:rgb({red},{green},{blue});color:#111"


def _told(cell: float, name: str) -> str:
    if math.isnan(cell):
        return "–"
    return f"{cell:+.2f}" if name in SIGNED else f"{cell:.2f}" if abs(cell) < 10 else f"{cell:.0f}"


def _clusters(atlas: HeadAtlas) -> str:
    found = atlas.redundancy
    if found is None:
        return ""
    told = "; ".join(found.notes)
    lines = "".join(f"<li>{' '.join(markup(atlas.name(*found.heads[place])) for place in group)}</li>" for group in found.clusters)
    scale = "root of the Jensen-Shannon divergence as a share of the largest" if found.distance == "jensen-shannon" else "1 − cosine"
    return (
        f"{_title('Heads that look alike')}<p style='margin:.2em 0'>Patterns on the same {found.queries} rows; mean distance within a "
        f"group below {found.threshold:g} ({scale}). {markup(told)}</p>"
        + (f"<ul style='margin:.2em 0'>{lines}</ul>" if lines else "<p>No two heads are that near.</p>")
    )


def _circuits(atlas: HeadAtlas) -> str:
    found = atlas.circuits
    if found is None:
        return ""
    parts = [_title("Circuits in the weights")]
    if found.compositions:
        rows = "".join(
            f"<tr><td style='padding:1px 10px'>{pair.kind.upper()}</td><td>{_headed(atlas, pair.source, pair.source_head)} → "
            f"{_headed(atlas, pair.target, pair.target_head)}</td><td style='padding:1px 10px;text-align:right'>{pair.score:.3f}</td>"
            f"<td style='text-align:right'>{pair.excess:+.3f}</td></tr>"
            for pair in found.compositions[:MOST_PAIRS]
        )
        parts.append(
            "<p style='margin:.2em 0'>Composition: how much of what an earlier head writes a later one reads into its queries (Q), keys "
            "(K) or values (V), and how far that is above unrelated heads.</p>"
            f"<table style='border-collapse:collapse'>{rows}</table>"
        )
    named = {card.name: card for label, cards in atlas.labels().items() if label in RULES for card in cards}
    labelled = [card for card in named.values() if (card.site, card.head) in found.directions][:MOST_CARDS]
    if labelled:
        parts.append("<p style='margin:1em 0 .2em'>The strongest singular directions of a head's QK and OV maps, read in tokens:</p>")
    for card in labelled:
        lines = "".join(
            f"<tr style='vertical-align:top'><td style='padding:1px 10px'>{one.circuit.upper()}</td>"
            f"<td style='padding:1px 10px;text-align:right'>{one.value:.3g}</td>"
            f"<td>{_tokens([text for text, _ in pole.reads])} {'looks for' if one.circuit == 'qk' else 'writes'} "
            f"{_tokens([text for text, _ in pole.writes])}</td></tr>"
            for one in found.directions[card.site, card.head]
            for pole in one.poles
        )
        parts.append(
            f"<details style='margin:.2em 0'><summary>{markup(card.name)} {markup(', '.join(card.labels))}</summary>"
            f"<table style='border-collapse:collapse'>{lines}</table></details>"
        )
    parts += [f"<p style='opacity:.7;font-size:12px'>{markup(site)}: {markup(reason)}</p>" for site, reason in found.reasons.items()]
    return "".join(parts) if len(parts) > 1 else ""


def _headed(atlas: HeadAtlas, site: str, head: int) -> str:
    """A head's name in the colour of its label."""
    label = atlas.card(atlas.layers[[own.name for own in atlas.sites].index(site)], head).labels[0]
    return f"<span style='background:{COLOURS.get(label, '#fff')};color:#111;padding:0 4px'>{markup(atlas.name(site, head))}</span>"


def _tokens(tokens: Sequence[str]) -> str:
    box = "border:1px solid #8886;padding:0 3px;margin:1px;white-space:pre;unicode-bidi:isolate;display:inline-block"
    return "".join(f'<span style="{box}">{markup(token)}</span>' for token in tokens[:MOST_TOKENS])


def _made(atlas: HeadAtlas) -> str:
    lines = [f"{markup(name)}: {markup(str(value))}" for name, value in atlas.info.items()]
    missing = [f"{markup(name)} is undefined: {markup(reason)}" for name, reason in atlas.undefined.items()]
    told = "".join(f"<li>{line}</li>" for line in [*missing, *lines])
    return f"{_title('How this was made')}<ul style='margin:.2em 0;opacity:.75;font-size:12px;overflow-wrap:anywhere'>{told}</ul>"


def _title(text: str) -> str:
    return f"<h2 style='font-size:1.15em;margin:1.4em 0 .4em'>{markup(text)}</h2>"


def _attribute(text: str) -> str:
    return markup(text).replace("'", "&#39;").replace('"', "&quot;")
