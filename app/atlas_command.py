"""`headscope atlas`: what each head of a model does, a line a head.

Letters: L sites, H query heads.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from headscope.app.case import given_text, held_out_digit
from headscope.app.escape import visible
from headscope.app.printing import print_table
from headscope.app.report.prompts import read_prompts
from headscope.kernels.errors import InputError
from headscope.probe import load
from headscope.probe.atlas.atlas import HeadAtlas
from headscope.probe.atlas.card import PLAIN, UNDEFINED, Card
from headscope.probe.atlas.chart import chart_heads

DIGITS = 32  # held-out digits that embedded:vit is charted on where none is named
COLUMNS = ("induction", "previous", "duplicate", "current", "first", "positional", "copying", "importance")


def run_atlas(arguments: argparse.Namespace) -> int:
    """Chart the heads, print the labelled ones first, and write the files that were asked for."""
    head = _check(arguments)
    texts = _texts(arguments)
    print(f"loading {visible(arguments.model)} …", file=sys.stderr, flush=True)
    options = {option: getattr(arguments, option) for option in ("device", "dtype", "task", "revision")}
    model, processor = load(str(arguments.model), **options)
    inputs = _images(arguments, model, processor, texts)
    if inputs is None and not callable(getattr(processor, "decode", None)):
        raise InputError(f"{arguments.model} has no tokenizer, so the command line cannot feed it: use chart_heads from Python")
    atlas = chart_heads(
        model, None if inputs is not None else processor, inputs=inputs, texts=texts, seed=arguments.seed, length=arguments.length,
        samples=arguments.samples, weights=not arguments.no_weights, redundancy=not arguments.no_redundancy, progress=_progress,
    )  # fmt: skip
    atlas = replace(atlas, info={"name": str(arguments.model), **atlas.info})
    if arguments.score is not None:
        atlas.top(arguments.score)  # refuses a score that there is not
    told = None if head is None else atlas.describe(*head)
    _write_files(arguments, atlas)
    if arguments.json:
        print(atlas.to_json())
    elif told is not None:
        print(told)
    elif arguments.score is not None:
        _print_score(atlas, arguments.score, arguments.top)
    else:
        _print(atlas, arguments.top)
    return 0


def _check(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """The head of --head; everything that can be refused before a model is loaded is refused here."""
    if arguments.top < 1:
        raise InputError(f"--top {arguments.top}: give a number of heads from 1 up")
    if arguments.png is not None:
        _pictures()
    if arguments.head is None:
        return None
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", arguments.head.strip())
    if match is None:
        raise InputError(f"--head {arguments.head!r}: write LAYER.HEAD, such as 5.2")
    return int(match[1]), int(match[2])


def _texts(arguments: argparse.Namespace) -> list[str] | None:
    if arguments.data is None:
        text = given_text(arguments)
        return None if text is None else [text]
    rows = read_prompts(Path(arguments.data)).rows
    if not all(row.text is not None for row in rows):
        raise InputError('--data of an atlas holds texts: give lines such as {"text": "…"}')
    return [row.text for row in rows if row.text is not None]


def _images(arguments: argparse.Namespace, model: Any, processor: Any, texts: Sequence[str] | None) -> Mapping[str, Tensor] | None:
    """The digits of embedded:vit; None for a model that reads text."""
    if arguments.model != "embedded:vit":
        if arguments.image is not None:
            raise InputError(f"--image is for embedded:vit, not for {arguments.model}")
        return None
    if texts is not None:
        raise InputError("embedded:vit reads images: give --image N instead of text")
    numbers = range(DIGITS) if arguments.image is None else [arguments.image]
    pixels: Mapping[str, Tensor] = processor(np.stack([held_out_digit(number) for number in numbers]))
    weight = next(model.parameters())
    return {name: value.to(weight.device, weight.dtype) for name, value in pixels.items()}


def _progress(done: int, total: int) -> None:
    print(f"\rstep {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


# -- printing ------------------------------------------------------------------------------------------------------------


def _print(atlas: HeadAtlas, most: int) -> None:
    """The labelled heads, then a table of scores."""
    print(f"{visible(str(atlas.info['name']))}: {len(atlas.sites)} sites, {len(atlas.cards())} heads\n")
    labels = atlas.labels()
    for label, cards in labels.items():
        if label in (PLAIN, UNDEFINED):
            continue
        first = [card for card in cards if card.labels[0] == label]
        print(f"{label} ({len(cards)})")
        for card in first[:most]:
            print(f"  {card.name:5s} {visible(card.text.partition(': ')[2])}")
        also = [card.name for card in [*first[most:], *(card for card in cards if card.labels[0] != label)]]
        if also:
            print(f"  {'also' if first else 'beside another label:'} {' '.join(also)}")
    for label in (PLAIN, UNDEFINED):
        if label in labels:
            print(f"{label} ({len(labels[label])})\n  {' '.join(card.name for card in labels[label])}")
    if atlas.redundancy is not None and atlas.redundancy.clusters:
        found = atlas.redundancy
        groups = ["[" + " ".join(atlas.name(*found.heads[place]) for place in group) + "]" for group in found.clusters]
        print(f"look alike\n  {' '.join(groups)}")
    names = [name for name in COLUMNS if name in atlas.scores and not bool(atlas.scores[name].isnan().all())]
    print()
    _table(atlas, _ordered(labels)[:most], names)
    for name, reason in atlas.undefined.items():
        print(f"{name}: undefined, {visible(reason)}")
    for text in atlas.warnings:
        print(f"note: {visible(text)}")


def _ordered(labels: Mapping[str, Sequence[Card]]) -> list[Card]:
    """Every head once: by label, those that have most of it first."""
    found: dict[str, Card] = {}
    for label, cards in labels.items():
        for card in cards:
            if card.labels[0] == label:
                found.setdefault(card.name, card)
    return list(found.values())


def _print_score(atlas: HeadAtlas, score: str, most: int) -> None:
    cards = {card.name: card for card in atlas.cards()}
    chosen = [cards[f"{layer}.{head}"] for layer, head, _ in atlas.top(score, most)]
    print(f"{score}, measured on {visible(atlas.on.get(score, 'the weights'))}\n")
    _table(atlas, chosen, [score, *(name for name in COLUMNS if name != score and name in atlas.scores)])
    if not chosen:
        print(atlas.reason(score))


def _table(atlas: HeadAtlas, cards: Sequence[Card], names: Sequence[str]) -> None:
    rows = []
    for card in cards:
        place = atlas.layers.index(card.layer)
        cells = [float(atlas.scores[name][place, card.head]) for name in names]
        rows.append([card.name, *map(_cell, names, cells), ", ".join(card.labels)])
    print_table(["head", *names, "labels"], rows, right=range(1, 1 + len(names)))


def _cell(name: str, number: float) -> str:
    return "–" if math.isnan(number) else f"{number:+.2f}" if name == "copying" else f"{number:.2f}"


# -- files ---------------------------------------------------------------------------------------------------------------


def _write_files(arguments: argparse.Namespace, atlas: HeadAtlas) -> None:
    if arguments.save is not None:
        atlas.save(arguments.save)
        print(f"atlas written to {visible(arguments.save)}", file=sys.stderr)
    if arguments.html is not None:
        atlas.save_html(arguments.html)
        print(f"page written to {visible(arguments.html)}", file=sys.stderr)
    if arguments.png is not None:
        pictures = _pictures()
        drawn: bytes = pictures.label_map(atlas) if arguments.score is None else pictures.score_map(atlas, arguments.score)
        try:
            Path(arguments.png).write_bytes(drawn)
        except OSError as error:
            raise InputError(f"{arguments.png} cannot be written: {error.strerror}") from error
        print(f"picture written to {visible(arguments.png)}", file=sys.stderr)


def _pictures() -> ModuleType:
    try:
        from headscope.app import atlas_picture
    except ImportError as error:
        raise InputError("--png needs pillow: pip install 'headscope[app]'") from error
    return atlas_picture
