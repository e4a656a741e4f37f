"""`headscope sites`, `capture` and `edit`: what takes a model and an input."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from headscope.app.cli import KEEPS
from headscope.app.escape import visible
from headscope.app.outcome import Token, answer, compare, token_of
from headscope.interventions import Edit, Plan, scale, select
from headscope.kernels.errors import InputError, RecipeError, SelectionError
from headscope.probe import AttentionSite, Capture, Keep, Probe, load
from headscope.probe.models import embedded_folder, model_fingerprint, tokenize

SAMPLE = "The quick brown fox jumps over the lazy dog."
WIDEST = 16  # a pattern up to this many keys is printed whole


@dataclass(frozen=True)
class Case:
    """A model and what it is run on."""

    name: str
    model: nn.Module
    processor: Any
    inputs: dict[str, Tensor]

    @property
    def reads_text(self) -> bool:
        return "input_ids" in self.inputs

    def token(self, id: int) -> Token:
        """What to call an entry of the model's answer: a token, or a class."""
        if self.reads_text:
            return token_of(self.processor, id)
        names = getattr(getattr(self.model, "config", None), "id2label", None) or {}
        return Token(id, visible(str(names.get(id, id))))


def run_sites(arguments: argparse.Namespace) -> int:
    """List the sites of a model."""
    case = _case(arguments)
    sites = Probe(case.model, case.processor).sites(**case.inputs)
    if arguments.json:
        _print_json("headscope.sites/v1", case, {"sites": [site.to_dict() for site in sites]})
        return 0
    columns: tuple[tuple[str, Callable[[AttentionSite], object]], ...] = (
        ("layer", lambda site: "–" if site.layer is None else site.layer),
        ("name", lambda site: visible(site.name)),
        ("kind", lambda site: site.kind),
        ("heads", lambda site: site.query_heads),
        ("kv heads", lambda site: site.kv_heads),
        ("dims", lambda site: site.key_dim if site.key_dim == site.value_dim else f"{site.key_dim}/{site.value_dim}"),
        ("caught by", lambda site: site.mechanism),
        ("notes", lambda site: _notes(site) or "–"),
    )
    _table([title for title, _ in columns], [[str(read(site)) for _, read in columns] for site in sites])
    print(f"\n{len(sites)} sites, {sum(site.query_heads for site in sites)} heads in {visible(case.name)}")
    return 0


def run_capture(arguments: argparse.Namespace) -> int:
    """Keep attention in a folder, or read a head back."""
    if (arguments.show is None) == (arguments.out is None):
        raise InputError("give --out DIR to capture into a folder, or --show DIR to read one")
    if arguments.show is not None:
        return _show(arguments)
    wanted = _keeps(arguments.keep)
    folder = Path(arguments.out)
    if folder.exists() and not arguments.overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{arguments.out!r} exists already: give another folder, or --overwrite")
    layers = None if arguments.layers is None else _numbers(arguments.layers, "--layers")
    heads = None if arguments.heads is None else _numbers(arguments.heads, "--heads")
    case = _case(arguments)
    with torch.no_grad(), Probe(case.model, case.processor).capture(wanted, sites=arguments.sites, layers=layers, heads=heads) as seen:
        case.model(**case.inputs)
    seen.save(folder, overwrite=arguments.overwrite)
    kept = sorted({name for record in seen.records.values() for name in record.names()})
    if arguments.json:
        facts = {"folder": str(folder), "kept": kept, "bytes": seen.nbytes, "sites": [site.to_dict() for site in seen.sites]}
        _print_json("headscope.capture/v1", case, facts)
    else:
        heads_kept = sum(len(record.heads) if record.heads is not None else record.site.query_heads for record in seen.records.values())
        print(f"{len(seen.sites)} sites, {heads_kept} heads kept in {visible(str(folder))}: {', '.join(kept)} ({seen.nbytes:,} bytes)")
        first = seen.sites[0]
        where = f"--layer {first.layer}" if first.layer is not None else f"--site '{first.name}'"
        print(f"read one back: headscope capture --show {visible(str(folder))} {where} --head {heads[0] if heads else 0}")
    return 0


def run_edit(arguments: argparse.Namespace) -> int:
    """Show what the model predicts before and after edits."""
    if arguments.top < 1:
        raise InputError(f"--top {arguments.top}: give a number of rows from 1 up")
    edits = [_scale_edit(text) for text in arguments.scale]
    if not edits and arguments.recipe is None:
        raise InputError("no edits: give --scale LAYER.HEAD=X, or --recipe FILE")
    case = _case(arguments)
    if arguments.recipe is not None:
        if not Path(arguments.recipe).is_file():
            raise RecipeError(f"there is no recipe {arguments.recipe!r}: give a YAML file that `headscope edit --save` wrote")
        edits = [*Plan.load(arguments.recipe, model=case.model, force=arguments.force).edits, *edits]
    plan = Plan(edits)
    answers = []
    text = {"tokenizer": case.processor, "input_ids": case.inputs["input_ids"]} if case.reads_text else {}
    for context in (nullcontext(), plan.on(case.model, **text)):
        with torch.no_grad(), context:
            answers.append(answer(case.model(**case.inputs)))
    found = compare(answers[0], answers[1], case.token, arguments.top)
    if arguments.save is not None:
        plan.save(arguments.save, model=case.model)
        print(f"recipe written to {visible(arguments.save)}", file=sys.stderr)
    what = "token" if case.reads_text else "class"
    if arguments.json:
        rows = [{"id": row.token.id, what: row.token.label, "before": row.before, "after": row.after} for row in found.rows]
        facts = {"edits": _edits(plan), "predicts": what, "kl_nats": found.divergence, "rows": rows}
        _print_json("headscope.edit/v1", case, facts)
        return 0
    table = []
    for row in found.rows:
        points = 100 * (row.after - row.before)
        table.append([row.token.label, f"{100 * row.before:.2f} %", f"{100 * row.after:.2f} %", _change(points)])
    _table([f"next {what}" if case.reads_text else what, "before", "after", "Δ points"], table, right=(1, 2, 3))
    print(f"\nKL(before ‖ after) = {found.divergence:.6g} nats")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    if arguments.head is None or (arguments.layer is None and arguments.site is None):
        raise InputError("say which head to read: --layer N --head N, or --site NAME --head N")
    folder = Path(arguments.show)
    if not folder.is_dir():
        raise InputError(f"there is no capture {arguments.show!r}: make one with --out")
    seen = Capture.open(folder)
    where = {"layer": arguments.layer, "site": arguments.site, "step": arguments.step, "heads": [arguments.head]}
    pattern = seen.pattern(**where)[0, 0].float()  # [Q, K]
    queries = list(range(pattern.shape[0])) if arguments.rows is None else _numbers(arguments.rows, "--rows")
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
        _table(["query \\ key", *map(str, range(pattern.shape[1]))], rows, right=range(pattern.shape[1] + 1))
    else:
        rows = []
        for query, row in zip(queries, chosen, strict=True):
            best = row.topk(min(4, row.shape[0]))
            entropy = float(-torch.xlogy(row, row).sum())
            pairs = [f"{key} ({value:.3f})" for value, key in zip(best.values.tolist(), best.indices.tolist(), strict=True) if value]
            rows.append([str(query), f"{entropy:.3f}", "  ".join(pairs)])
        _table(["query", "entropy (nats)", "most attended keys"], rows, right=(0, 1))
    return 0


def _write_png(file: Path, pattern: Tensor) -> None:
    try:
        from headscope.app import pictures
    except ImportError as error:
        raise InputError("--png needs pillow: pip install 'headscope[app]'") from error
    cells = pattern.masked_fill(pattern == 0, float("nan")).numpy()
    try:
        file.write_bytes(pictures.encode(pictures.indices(cells, "sqrt")))
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from error
    print(f"picture written to {visible(str(file))}: one pixel a cell, √ scale, no weight is transparent", file=sys.stderr)


def _case(arguments: argparse.Namespace) -> Case:
    text = _text(arguments)
    print(f"loading {visible(arguments.model)} …", file=sys.stderr, flush=True)
    name = str(arguments.model)
    options = {option: getattr(arguments, option) for option in ("device", "dtype", "task", "revision")}
    model, processor = load(name, **options)
    if name == "embedded:vit":
        if text is not None:
            raise InputError("embedded:vit reads images: give --image N instead of text")
        inputs = _as_inputs(model, processor(_digit(0 if arguments.image is None else arguments.image)))
    elif arguments.image is not None:
        raise InputError(f"--image is for embedded:vit, not for {name}")
    elif not callable(getattr(processor, "decode", None)):
        raise InputError(f"{name} has no tokenizer, so the command line cannot feed it: use headscope.probe.Probe from Python")
    else:
        if text is None and arguments.command != "sites":
            raise InputError("nothing to read: give --text, --text-file, or --text - for standard input")
        inputs = tokenize(processor, SAMPLE if text is None else text, model)
    return Case(name, model, processor, inputs)


def _text(arguments: argparse.Namespace) -> str | None:
    if arguments.text == "-":
        text: str = sys.stdin.read()
        return text
    if arguments.text_file is not None:
        try:
            return Path(arguments.text_file).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{arguments.text_file!r} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{arguments.text_file!r} is not UTF-8 text (byte {error.start})") from error
    return None if arguments.text is None else str(arguments.text)


def _digit(number: int) -> Any:
    with safe_open(embedded_folder("vit") / "held_out.safetensors", "pt") as file:
        images = file.get_tensor("images")
    if not 0 <= number < len(images):
        raise InputError(f"no image {number}: there are {len(images)} held-out digits, 0 to {len(images) - 1}")
    return images[number].numpy()


def _as_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight = next(model.parameters())
    return {name: value.to(weight.device, weight.dtype) for name, value in inputs.items()}


def _keeps(given: Sequence[str] | None) -> Keep:
    names = [name for part in given or ["qk"] for name in part.split(",")]
    for name in names:
        if name not in KEEPS:
            raise InputError(f"--keep {name!r}: there are {', '.join(KEEPS)}")
    return Keep(**dict.fromkeys(names, True))  # type: ignore[arg-type]


def _numbers(text: str, option: str) -> list[int]:
    """`0,2-4` as [0, 2, 3, 4]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})(?:\s*-\s*(\d{1,7}))?\s*", part)
        if match is None:
            raise InputError(f"{option} {text!r}: give numbers such as 0,2-4")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"{option} {text!r}: {last} is less than {first}")
        found.extend(range(first, last + 1))
    return found


def _scale_edit(text: str) -> Edit:
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)", text.strip())
    if match is None:
        raise InputError(f"--scale {text!r}: write LAYER.HEAD=X, such as 3.5=0 for layer 3, head 5, times 0")
    return Edit("z", scale(float(match[3])), select(layer=int(match[1]), head=int(match[2])))


def _notes(site: AttentionSite) -> str:
    marks = [
        "causal" if site.causal else "",
        "" if site.normaliser == "softmax" else site.normaliser,
        "" if site.softcap is None else f"softcap {site.softcap:g}",
        "sinks" if site.sinks else "",
        "bias" if site.bias else "",
        "" if site.fold == 1 else f"{site.fold} windows",
    ]
    return ", ".join(mark for mark in marks if mark)


def _edits(plan: Plan) -> object:
    """The edits as a recipe has them; in words where they hold tensors, which JSON cannot."""
    try:
        return plan.to_dict()["edits"]
    except RecipeError:
        return [str(edit) for edit in plan]


def _change(points: float) -> str:
    return f"{'▲' if points > 0.005 else '▼' if points < -0.005 else '·'} {points:+.2f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    widths = [max(len(line[column]) for line in [titles, *rows]) for column in range(len(titles))]
    for line in [titles, ["─" * width for width in widths], *rows]:
        sides = ["rjust" if column in right else "ljust" for column in range(len(line))]
        print("  ".join(getattr(cell, side)(width) for cell, side, width in zip(line, sides, widths, strict=True)).rstrip())


def _print_json(schema: str, case: Case, facts: Mapping[str, object]) -> None:
    head = {"schema": schema, "model": case.name, "fingerprint": model_fingerprint(case.model)}
    print(json.dumps({**head, **facts}, ensure_ascii=True, allow_nan=False))
