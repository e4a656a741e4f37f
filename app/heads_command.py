"""`headscope edit heads`: which heads some prompts hang on (Ships, Sahara), and a recipe that takes them out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from headscope.app.case import Case
from headscope.app.edit_files import check_folder
from headscope.app.escape import visible
from headscope.app.printing import print_json, print_table
from headscope.app.report.prompts import inputs_of, read_prompts
from headscope.interventions.language.head_search import OBJECTIVES, HeadSet, search_heads
from headscope.interventions.language.head_sets import removal_of
from headscope.interventions.language.safety_heads import score_sahara, score_ships
from headscope.kernels.errors import InputError
from headscope.probe import load

EPSILON = {"ships": 1e-4, "sahara": 1e-5}


def run_edit_heads(arguments: argparse.Namespace) -> int:
    """Score every head, or search for a set; print; write a recipe."""
    for name in ("count", "top", "batch"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: give 1 or more")
    check_folder("--save", arguments.save)
    prompts = read_prompts(Path(arguments.data)).first(arguments.examples)
    print(f"loading {visible(arguments.model)} …", file=sys.stderr, flush=True)
    options = {option: getattr(arguments, option) for option in ("device", "dtype", "task", "revision")}
    model, processor = load(arguments.model, **options)
    samples = [inputs_of(prompt, model, processor) for prompt in prompts.rows]
    case = Case(str(arguments.model), model, processor, {})
    how = {"removal": arguments.removal, "epsilon": EPSILON[arguments.score], "batch": arguments.batch}
    unit = OBJECTIVES[arguments.score]
    if arguments.search is not None:
        found = search_heads(
            model, samples, arguments.count, objective=arguments.score, strategy=arguments.search, progress=told, **how
        )  # fmt: skip
        chosen, rows = found.plan(), _set_rows(found)
        facts: dict[str, object] = {"search": found.to_dict()}
        titles = ["heads out", "site", "head", unit]
    else:
        score = score_ships if arguments.score == "ships" else score_sahara
        ranking = score(model, samples, progress=told, **how)
        best = ranking.top(arguments.score, max(arguments.top, arguments.count))
        removal = removal_of(arguments.removal, how["epsilon"], model, samples)
        chosen = removal.plan([(site.name, head) for site, head, _ in best[: arguments.count]])
        rows = [
            [str(place), visible(site.name), str(head), f"{value:.4g}"]
            for place, (site, head, value) in enumerate(best[: arguments.top], 1)
        ]
        facts, titles = {"ranking": ranking.to_dict()}, ["rank", "site", "head", unit]
    if arguments.save is not None:
        chosen.save(arguments.save, model=model)
        print(f"recipe written to {visible(arguments.save)}", file=sys.stderr)
    if arguments.json:
        print_json("headscope.edit-heads/v1", case, {"score": arguments.score, "prompts": len(samples), **facts})
        return 0
    print_table(titles, rows, right=(0, 2, 3))
    print(f"\n{arguments.score} in {unit}, {len(samples)} prompts, removal by {arguments.removal}")
    return 0


def told(done: int, total: int) -> None:
    """Progress on standard error."""
    if done == total or done % 10 == 0:
        print(f"\r{done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _set_rows(found: HeadSet) -> list[list[str]]:
    return [
        [str(place), visible(name), str(head), f"{value:.4g}"]
        for place, ((name, head), value) in enumerate(zip(found.heads, found.values, strict=True), 1)
    ]
