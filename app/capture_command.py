"""`headscope capture`: keep attention in a folder, sum it up head by head, draw it, or read a head back.

Letters: B batch, H query heads, Q queries, K keys, T tiles.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope.app.case import Case, case_of
from headscope.app.cli import KEEPS
from headscope.app.escape import visible
from headscope.app.printing import listed, print_json, print_table
from headscope.kernels.errors import InputError, SelectionError
from headscope.probe import Capture, Keep, Probe
from headscope.probe.footprint import Footprint, measure
from headscope.probe.keep import readable
from headscope.probe.record import Record

if TYPE_CHECKING:
    from headscope.app.pictures import Floats

WIDEST = 16  # a pattern up to this many keys is printed whole
TILES = 256  # a pooled map has at most so many tiles a side, unless --tile says otherwise


@dataclass(frozen=True)
class HeadSummary:
    """A head in one call, in a few numbers; queries that see no key are left out.

    Attributes:
        entropy: nats, mean over the queries.
        p_max: a query's largest probability, mean over the queries.
        key: the key that receives most; None where no query sees one.
        share: of the attention of all queries, what that key receives.
        max_score: the largest score before the softmax, nats; None where the model's code does not show its scores.
    """

    site: str
    layer: int | None
    step: int
    head: int
    entropy: float
    p_max: float
    key: int | None
    share: float
    max_score: float | None


def run_capture(arguments: argparse.Namespace) -> int:
    """Keep attention in a folder, sum it up, or read a head back."""
    if arguments.show is not None:
        if arguments.out is not None:
            raise InputError("--out DIR makes a capture and --show DIR reads one: give one of them")
        return _show(arguments)
    names = _names(arguments)
    layers = None if arguments.layers is None else listed(arguments.layers, "--layers")
    heads = None if arguments.heads is None else listed(arguments.heads, "--heads")
    case = case_of(arguments)
    tokens = case.inputs["input_ids"].shape[-1] if case.reads_text else 1
    keep = _keep(names, arguments.tile or -(-tokens // TILES))
    print(f"running {f'{tokens:,} tokens' if case.reads_text else 'one image'} …", file=sys.stderr, flush=True)

    def run() -> Capture:
        with torch.no_grad(), Probe(case.model, case.processor).capture(keep, sites=arguments.sites, layers=layers, heads=heads) as seen:
            case.model(**case.inputs)
        return seen

    seen, cost = measure(run, next(case.model.parameters()).device)
    if arguments.png is not None:
        _draw_heads(Path(arguments.png), seen)
    if arguments.out is None:
        _print_summary(case, seen, cost, as_json=arguments.json)
        return 0
    seen.save(arguments.out, overwrite=arguments.overwrite)
    kept = sorted({name for record in seen.records.values() for name in record.names()})
    if arguments.json:
        facts = {"folder": str(Path(arguments.out)), "kept": kept, "bytes": seen.nbytes, "sites": [site.to_dict() for site in seen.sites]}
        print_json("headscope.capture/v1", case, {**facts, **asdict(cost)})
        return 0
    folder = visible(str(Path(arguments.out)))
    heads_kept = sum(len(_heads(record)) for record in seen.records.values())
    print(f"{len(seen.sites)} sites, {heads_kept} heads kept in {folder}: {', '.join(kept)} ({seen.nbytes:,} bytes)")
    first = seen.sites[0]
    where = f"--layer {first.layer}" if first.layer is not None else f"--site '{first.name}'"
    print(f"read one back: headscope capture --show {folder} {where} --head {heads[0] if heads else 0}")
    print(_told(cost), file=sys.stderr)
    return 0


def _names(arguments: argparse.Namespace) -> list[str]:
    """What to keep; everything that can be refused before a model is loaded is refused here."""
    names = [name for part in arguments.keep or [] for name in part.split(",")]
    for name in names:
        if name not in KEEPS:
            raise InputError(f"--keep {name!r}: there are {', '.join(KEEPS)}")
    if arguments.tile is not None and arguments.tile < 1:
        raise InputError(f"--tile {arguments.tile}: the side of a tile is a number of tokens from 1 up")
    if arguments.tile is not None and arguments.png is None and "pooled" not in names:
        raise InputError("--tile is for maps that are drawn or kept: give --png FILE or --keep pooled too")
    if arguments.png is not None:
        _pictures()
    if arguments.tokens is not None and arguments.tokens < 1:
        raise InputError(f"--tokens {arguments.tokens}: give a number from 1 up")
    if arguments.out is not None:
        folder = Path(arguments.out)
        if folder.exists() and not arguments.overwrite and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{arguments.out!r} exists already: give another folder, or --overwrite")
        names = names or ["qk"]
    elif not names and arguments.png is None:
        raise InputError(
            "give --keep statistics to look at every head, --png FILE to draw them, --out DIR to capture into a folder, or --show DIR to "
            "read one"
        )
    else:
        for name in names:
            if name != "statistics" and not (name == "pooled" and arguments.png is not None):
                raise InputError(f"--keep {name} is kept in a folder: give --out DIR" + (", or --png FILE" if name == "pooled" else ""))
        names.append("statistics")
    return [*names, "statistics", "pooled"] if arguments.png is not None else names


def _keep(names: Sequence[str], tile: int) -> Keep:
    given: dict[str, bool | int] = dict.fromkeys(names, True)
    if "pooled" in given:
        given["pooled"] = tile
    return Keep(**given)  # type: ignore[arg-type]


def summarise(record: Record) -> list[HeadSummary]:
    """Each kept head of one call, from the statistics that were kept of it."""
    found = record.statistics(None, None)
    entropy, p_max, argmax, received = found.entropy, found.p_max, found.argmax, found.received
    assert entropy is not None
    assert p_max is not None
    assert argmax is not None
    assert received is not None
    heads = []
    for place, head in enumerate(_heads(record)):
        alive = argmax[:, place] >= 0  # [B, Q]
        count = int(alive.sum())
        mass = received[:, place].double().sum(dim=0)  # [K]
        highest = None if found.max_score is None or not count else float(found.max_score[:, place][alive].max())
        heads.append(
            HeadSummary(
                record.site.name,
                record.site.layer,
                record.step,
                head,
                entropy=float(entropy[:, place][alive].double().mean()) if count else 0.0,
                p_max=float(p_max[:, place][alive].double().mean()) if count else 0.0,
                key=int(mass.argmax()) if count else None,
                share=float(mass.max()) / count if count else 0.0,
                max_score=highest,
            )
        )
    return heads


def _print_summary(case: Case, seen: Capture, cost: Footprint, *, as_json: bool) -> None:
    records = list(seen.records.values())
    heads = [head for record in records for head in summarise(record)]
    tokens = case.inputs["input_ids"][0].tolist() if case.reads_text else []
    if as_json:
        facts = {"tokens": len(tokens) or None, **asdict(cost), "heads": [asdict(head) for head in heads]}
        print_json("headscope.heads/v1", case, facts)
        return
    layers = [record.site.layer for record in records]
    by_layer = None not in layers and len(set(layers)) == len(layers)
    rows = []
    for head in heads:
        place = str(head.layer) if by_layer else f"{visible(head.site)}@{head.step}"
        key = "–" if head.key is None else str(head.key)
        if head.key is not None and head.key < len(tokens):
            key += f" {case.token(tokens[head.key]).label!r}"
        score = "–" if head.max_score is None else f"{head.max_score:.2f}"
        rows.append([place, str(head.head), f"{head.entropy:.3f}", f"{head.p_max:.3f}", key, f"{100 * head.share:.1f} %", score])
    titles = ["layer" if by_layer else "site", "head", "entropy (nats)", "p_max", "most received key", "its share", "max score"]
    print_table(titles, rows, right=(1, 2, 3, 5, 6))
    cells = sum(_cells(record) for record in records)
    what = f"{len(tokens):,} tokens" if tokens else "one image"
    print(f"\n{len(heads)} heads, {what}: {_told(cost)}; their whole maps in float32 would be {readable(4 * cells)}")


def _cells(record: Record) -> int:
    """Cells of all kept maps of a call, were they whole: B · H · Q · K."""
    found = record.statistics(None, None)
    assert found.entropy is not None
    assert found.received is not None
    return int(found.entropy.numel() * found.received.shape[-1])


def _told(cost: Footprint) -> str:
    grown = "an unknown amount" if cost.peak_bytes is None else f"at most {readable(cost.peak_bytes)}"
    return f"{cost.seconds:.2f} s, memory in use grew by {grown}"


def _heads(record: Record) -> tuple[int, ...]:
    return record.heads or tuple(range(record.site.query_heads))


def _draw_heads(file: Path, seen: Capture) -> None:
    """The pooled maps of all heads in one picture: of each tile, its share of the attention of its queries."""
    maps, names = [], []
    for record in seen.records.values():
        maps.append([_shown(head) for head in _shares(record)])
        names.append(f"layer {record.site.layer}" if record.site.layer is not None else visible(record.site.name))
    pictures = _pictures()
    _write(file, pictures.atlas(maps, names, "log"))
    tile = max(record.tile or 1 for record in seen.records.values())
    print(
        f"picture written to {visible(str(file))}: a row for each of {len(maps)} sites, a column for each head; one cell is {tile} queries "
        f"(down) × {tile} keys (right), its colour the share of those queries' attention on a log scale, no weight is transparent",
        file=sys.stderr,
    )


def _show(arguments: argparse.Namespace) -> int:
    if arguments.head is None or (arguments.layer is None and arguments.site is None):
        raise InputError("say which head to read: --layer N --head N, or --site NAME --head N")
    folder = Path(arguments.show)
    if not folder.is_dir():
        raise InputError(f"there is no capture {arguments.show!r}: make one with --out")
    seen = Capture.open(folder)
    where = {"layer": arguments.layer, "site": arguments.site, "step": arguments.step, "heads": [arguments.head]}
    pattern = seen.pattern(**where)[0, 0].float()  # [Q, K]
    queries = list(range(pattern.shape[0])) if arguments.rows is None else listed(arguments.rows, "--rows")
    for query in queries:
        if query >= pattern.shape[0]:
            raise SelectionError(f"no query {query}: this head has {pattern.shape[0]}, 0 to {pattern.shape[0] - 1}")
    if arguments.png is not None:
        _write_png(Path(arguments.png), pattern)
    chosen = pattern[queries]
    if arguments.json:
        which = {"capture": str(folder), "layer": arguments.layer, "site": arguments.site, "head": arguments.head}
        numbers = {"shape": list(pattern.shape), "queries": queries, "pattern": chosen.tolist()}
        print(json.dumps({"schema": "headscope.head/v1", **which, **numbers}))
        return 0
    if pattern.shape[1] <= WIDEST:
        cells = [[f"{value:.3f}" if value else "·" for value in row] for row in chosen.tolist()]
        rows = [[str(query), *row] for query, row in zip(queries, cells, strict=True)]
        print_table(["query \\ key", *map(str, range(pattern.shape[1]))], rows, right=range(pattern.shape[1] + 1))
    else:
        rows = []
        for query, row in zip(queries, chosen, strict=True):
            best = row.topk(min(4, row.shape[0]))
            entropy = float(-torch.xlogy(row, row).sum())
            pairs = [f"{key} ({value:.3f})" for value, key in zip(best.values.tolist(), best.indices.tolist(), strict=True) if value]
            rows.append([str(query), f"{entropy:.3f}", "  ".join(pairs)])
        print_table(["query", "entropy (nats)", "most attended keys"], rows, right=(0, 1))
    return 0


def _write_png(file: Path, pattern: Tensor) -> None:
    pictures = _pictures()
    _write(file, pictures.encode(pictures.indices(_shown(pattern), "sqrt")))
    print(f"picture written to {visible(str(file))}: one pixel a cell, √ scale, no weight is transparent", file=sys.stderr)


def _shares(record: Record) -> Tensor:
    """[H, T, T], the mass of each tile over the number of its queries, those that see no key left out: rows add up to 1."""
    found = record.statistics(None, record.tile)
    assert found.pooled is not None
    assert found.argmax is not None
    assert record.tile is not None
    mass = found.pooled.sum(dim=0)  # [B, H, T, T] -> [H, T, T]
    alive = (found.argmax >= 0).sum(dim=0)  # [H, Q]
    short = mass.shape[1] * record.tile - alive.shape[1]
    queries = torch.nn.functional.pad(alive, (0, short)).reshape(*mass.shape[:2], record.tile).sum(dim=-1)  # [H, T]
    return mass / queries.clamp_min(1)[..., None]


def _shown(weights: Tensor) -> Floats:
    """Weights as a picture takes them: NaN, which is transparent, where there is none."""
    cells: Floats = weights.float().cpu().masked_fill(weights.cpu() == 0, float("nan")).numpy()
    return cells


def _pictures() -> ModuleType:
    try:
        from headscope.app import pictures
    except ImportError as error:
        raise InputError("--png needs pillow: pip install 'headscope[app]'") from error
    return pictures


def _write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from error
