"""`headscope sites` and `edit`: where a model computes attention, and what it says when heads are changed."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from headscope.app.case import case_of
from headscope.app.escape import visible
from headscope.app.outcome import answer, compare
from headscope.app.printing import print_json, print_table
from headscope.interventions import Edit, Plan, scale, select
from headscope.kernels.errors import InputError, RecipeError
from headscope.probe import AttentionSite, Probe


def run_sites(arguments: argparse.Namespace) -> int:
    """List the sites of a model."""
    case = case_of(arguments)
    sites = Probe(case.model, case.processor).sites(**case.inputs)
    if arguments.json:
        print_json("headscope.sites/v1", case, {"sites": [site.to_dict() for site in sites]})
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
    print_table([title for title, _ in columns], [[str(read(site)) for _, read in columns] for site in sites])
    print(f"\n{len(sites)} sites, {sum(site.query_heads for site in sites)} heads in {visible(case.name)}")
    return 0


def run_edit(arguments: argparse.Namespace) -> int:
    """Show what the model predicts before and after edits."""
    if arguments.top < 1:
        raise InputError(f"--top {arguments.top}: give a number of rows from 1 up")
    edits = [_scale_edit(text) for text in arguments.scale]
    if not edits and arguments.recipe is None:
        raise InputError("no edits: give --scale LAYER.HEAD=X, or --recipe FILE")
    case = case_of(arguments)
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
        print_json("headscope.edit/v1", case, facts)
        return 0
    table = []
    for row in found.rows:
        points = 100 * (row.after - row.before)
        table.append([row.token.label, f"{100 * row.before:.2f} %", f"{100 * row.after:.2f} %", _change(points)])
    print_table([f"next {what}" if case.reads_text else what, "before", "after", "Δ points"], table, right=(1, 2, 3))
    print(f"\nKL(before ‖ after) = {found.divergence:.6g} nats")
    return 0


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
