"""Samples before and after, from the same noise, each with what the judge reads under it."""

from __future__ import annotations

from pathlib import Path

import torch
from judge import Judge
from PIL import Image, ImageDraw, ImageFont
from prompts import HELD_OUT, SEEN, first_word
from torch import Tensor
from ways import BLOCKED, LEARNED, NONE, edits, oracle

from headscope.interventions.roles import Roles
from headscope.interventions.saferope.saferope import SafeRoPE
from headscope.probe.digit_flow import DigitFlow

SHOWN = (NONE, BLOCKED, LEARNED, "learned, not gated", "projection", "half-turn")
EACH = 6  # pictures of a family
PIXEL, GAP, MARGIN, LETTERS = 5, 6, 14, 13
INK, SOFT, BAD = (17, 17, 17), (90, 96, 105), (179, 38, 30)


def draw_samples(flow: DigitFlow, judge: Judge, fitted: SafeRoPE, roles: Roles, unsafe: int, out: Path) -> Path:
    """samples.png: a row for each edit, a column for each prompt; red where the judge reads the unsafe digit."""
    book = flow.book
    safe = [digit for digit in range(10) if digit != unsafe][:: 9 // EACH + 1]
    families = {
        f"asks for {unsafe}, seen name": book.explicit(unsafe, EACH, seed=70_000, synonyms=SEEN),
        "held-out name": book.explicit(unsafe, EACH, seed=70_001, synonyms=HELD_OUT),
        "by two words": book.implicit(unsafe, EACH, seed=70_002),
        f"asks for {', '.join(map(str, safe))}": [book.explicit(digit, 1, seed=70_003)[0] for digit in safe],
    }
    prompts = [prompt for family in families.values() for prompt in family]
    rows = {way: drawn(flow, fitted, roles, way, prompts, book.subjects[unsafe]) for way in SHOWN}
    font = ImageFont.load_default(LETTERS)
    size = 8 * PIXEL
    left = int(max(font.getlength(way) for way in SHOWN)) + 2 * MARGIN
    top, step = MARGIN + 2 * LETTERS, size + LETTERS + 10
    starts, x = [], left
    for family in families.values():
        starts.append([x + place * (size + GAP) for place in range(len(family))])
        x += len(family) * (size + GAP) + 2 * MARGIN
    image = Image.new("RGB", (x, top + step * len(SHOWN) + MARGIN), "white")
    pen = ImageDraw.Draw(image)
    for name, places in zip(families, starts, strict=True):
        pen.text((places[0], MARGIN), name, fill=INK, font=font)
    columns = [place for places in starts for place in places]
    for line, (way, pictures) in enumerate(rows.items()):
        y = top + step * line
        pen.text((MARGIN, y + size / 2), way, fill=INK, font=font, anchor="lm")
        for at, picture, read in zip(columns, pictures, judge.read(pictures), strict=True):
            grey = ((1 - picture[0].clamp(-1, 1)) * 127.5).to(torch.uint8).numpy()
            image.paste(Image.fromarray(grey).resize((size, size), Image.Resampling.NEAREST), (at, y))
            pen.rectangle((at - 1, y - 1, at + size, y + size), outline=BAD if read == unsafe else (200, 204, 210))
            pen.text((at + size / 2, y + size + 8), str(read), fill=BAD if read == unsafe else SOFT, font=font, anchor="mm")
    path = out / "samples.png"
    image.save(path, format="PNG", optimize=True)
    return path


def drawn(flow: DigitFlow, fitted: SafeRoPE, roles: Roles, way: str, prompts: list[str], words: tuple[str, ...]) -> Tensor:
    """One picture a prompt."""
    base = flow.sample(prompts, seed=7)
    if way == NONE:
        return base
    if way != BLOCKED:
        with edits()[way](fitted, 0).on(flow.model, roles=fitted.roles):
            return flow.sample(prompts, seed=7)
    found = [first_word(prompt, words) for prompt in prompts]
    plan, place = oracle(way, roles)
    with plan.on(flow.model, roles=place):
        hidden = flow.sample([new or old for new, old in zip(found, prompts, strict=True)], seed=7)
    chosen = [index for index, prompt in enumerate(found) if prompt is not None]
    base[chosen] = hidden[chosen]
    return base
