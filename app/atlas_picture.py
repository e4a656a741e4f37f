"""A head atlas as PNG: every head a cell with its label and the number the label follows from.

Letters: L sites, H query heads.
"""

from __future__ import annotations

import io
import math

from PIL import Image, ImageColor, ImageDraw, ImageFont

from headscope.app.relevance_picture import INK, table
from headscope.probe.atlas.atlas import HeadAtlas
from headscope.probe.atlas.atlas_html import COLOURS, SHORT
from headscope.probe.atlas.card import PLAIN

WIDE, HIGH, LETTERS, SMALL, MARGIN = 92, 44, 14, 12, 14  # pixels
PALE, FAINT = "#f2f2f2", "#777777"


def label_map(atlas: HeadAtlas) -> bytes:
    """All heads, layers downward: the first label of each, and its score."""
    fonts = ImageFont.load_default(LETTERS), ImageFont.load_default(SMALL)
    names = [f"layer {layer}" for layer in atlas.layers]
    left = int(max(fonts[0].getlength(name) for name in names)) + 2 * MARGIN
    top = LETTERS + 2 * MARGIN
    columns = max(site.query_heads for site in atlas.sites)
    image = Image.new("RGB", (left + WIDE * columns + MARGIN, top + HIGH * len(names) + MARGIN), "white")
    pen = ImageDraw.Draw(image)
    for head in range(columns):
        pen.text((left + WIDE * (head + 0.5), top / 2), f"head {head}", fill=FAINT, font=fonts[0], anchor="mm")
    cards = {(card.layer, card.head): card for card in atlas.cards()}
    for place, (layer, site) in enumerate(zip(atlas.layers, atlas.sites, strict=True)):
        y = top + HIGH * place
        pen.text((MARGIN, y + HIGH / 2), names[place], fill=FAINT, font=fonts[0], anchor="lm")
        for head in range(site.query_heads):
            card, x = cards[layer, head], left + WIDE * head
            fill = COLOURS.get(card.labels[0], PALE)
            pen.rectangle((x, y, x + WIDE - 3, y + HIGH - 3), fill=ImageColor.getrgb(fill))
            if not card.evidence:
                mark = "·" if card.labels[0] == PLAIN else "?"
                pen.text((x + WIDE / 2, y + HIGH / 2), mark, fill=FAINT, font=fonts[0], anchor="mm")
                continue
            more = f" +{len(card.labels) - 1}" if len(card.labels) > 1 else ""
            pen.text((x + WIDE / 2, y + 14), SHORT[card.labels[0]] + more, fill=INK, font=fonts[1], anchor="mm")
            pen.text((x + WIDE / 2, y + 30), f"{card.evidence[0][1]:.2f}", fill=INK, font=fonts[0], anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def score_map(atlas: HeadAtlas, score: str) -> bytes:
    """All heads, layers downward, with one score each; what is undefined is left white and says 0."""
    rows = [
        [0.0 if math.isnan(cell) else cell for cell in row[: site.query_heads]]
        for row, site in zip(atlas.scores[score].tolist(), atlas.sites, strict=True)
    ]
    names = [f"layer {layer}" for layer in atlas.layers]
    return table(rows, names, [f"head {head}" for head in range(max(map(len, rows)))])
