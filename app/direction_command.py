"""`headscope edit direction`: the direction that tells two sets of prompts apart, and a recipe that takes it away or adds it."""

from __future__ import annotations

import argparse
import math
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from headscope.app.case import Case
from headscope.app.edit_files import check_folder
from headscope.app.escape import visible
from headscope.app.heads_command import told
from headscope.app.printing import listed, print_json, print_table
from headscope.app.report.prompts import inputs_of, read_prompts
from headscope.interventions.language.directions import Choice, Direction, Directions, choose_direction, find_directions
from headscope.kernels.errors import InputError
from headscope.probe import load
from headscope.probe.attribution.target import id_named

Rows = list[dict[str, Tensor]]


def run_edit_direction(arguments: argparse.Namespace) -> int:
    """Find, choose, print, write."""
    positions = [-place for place in listed(arguments.positions, "--positions")]
    if 0 in positions:
        raise InputError(f"--positions {arguments.positions!r}: the last token is 1")
    if arguments.add is not None and not math.isfinite(arguments.add):
        raise InputError(f"--add {arguments.add}: give a finite number")
    check_folder("--save", arguments.save)
    if not 0 < arguments.held_out < 1:
        raise InputError(f"--held-out {arguments.held_out}: give a share between 0 and 1")
    files = [read_prompts(Path(path)) for path in (arguments.positive, arguments.negative)]
    print(f"loading {visible(arguments.model)} …", file=sys.stderr, flush=True)
    options = {option: getattr(arguments, option) for option in ("device", "dtype", "task", "revision")}
    model, processor = load(arguments.model, **options)
    for glob in arguments.also:
        if not any(fnmatchcase(name, glob) for name, _ in model.named_modules()):
            raise InputError(f"--also {glob!r}: {arguments.model} has no such module; '*.mlp' names all that end so")
    found, held = [], []
    for file in files:
        rows = [inputs_of(prompt, model, processor) for prompt in file.rows]
        first, rest = split(rows, arguments.held_out if arguments.behaviour else 0.0)
        found.append(first)
        held.append(rest)
    directions = find_directions(model, found[0], found[1], positions=positions, progress=told)
    choice: Choice | None = None
    if arguments.behaviour:
        labels = getattr(getattr(model, "config", None), "id2label", None)
        tokens = [id_named(text, processor, labels) for text in arguments.behaviour]
        choice = choose_direction(
            model, directions, held[0], held[1], tokens, most_divergence=arguments.max_kl, least_induced=arguments.min_induced,
            also=arguments.also, progress=told,
        )  # fmt: skip
    direction = _taken(arguments, directions, choice)
    if not direction.vector.any():
        raise InputError("the two sets of prompts have the same mean there, so there is no direction between them: give other prompts")
    plan = direction.ablate(arguments.also) if arguments.add is None else direction.add(arguments.add)
    if arguments.save is not None:
        plan.save(arguments.save, model=model)
        print(f"recipe written to {visible(arguments.save)}", file=sys.stderr)
    if arguments.json:
        facts: dict[str, Any] = {"direction": direction.to_dict(), "separation": directions.separation.tolist()}
        facts |= {} if choice is None else {"choice": choice.to_dict()}
        print_json("headscope.edit-direction/v1", Case(str(arguments.model), model, processor, {}), facts)
        return 0
    _print(directions, choice)
    print(f"\ntaken: {visible(str(direction))}")
    return 0


def split(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """The first prompts, to find with, and the last `share` of them, to choose by.

    Raises:
        InputError: too few for both.
    """
    held = round(share * len(rows))
    if share and not 1 <= held < len(rows):
        raise InputError(
            f"{len(rows)} prompts, of which a share of {share:g} is held out: give at least one to find with and one to choose by"
        )
    return rows[: len(rows) - held], rows[len(rows) - held :]


def _taken(arguments: argparse.Namespace, directions: Directions, choice: Choice | None) -> Direction:
    """The block that was named, else the one that was chosen, else the one that separates best."""
    if arguments.layer is not None:
        return directions.at(arguments.layer, directions.positions[-1])
    if choice is not None:
        return choice.direction
    best = int(directions.separation.argmax())
    wide = len(directions.positions)
    return directions.at(best // wide, directions.positions[best % wide])


def _print(directions: Directions, choice: Choice | None) -> None:
    if choice is None:
        rows = [
            [str(layer), str(position), f"{float(directions.vectors[layer, place].norm()):.3g}",
             f"{float(directions.separation[layer, place]):.3g}"]
            for layer in range(len(directions.blocks))
            for place, position in enumerate(directions.positions)
        ]  # fmt: skip
        print_table(["block", "token", "length", "separation"], rows, right=(0, 1, 2, 3))
        return
    rows = [
        [str(c.layer), str(c.position), f"{c.ablated:.3f}", f"{c.induced:.3f}", f"{c.divergence:.4f}", c.dropped or "–"]
        for c in choice.candidates
    ]
    print_table(["block", "token", "without it", "with it added", "KL, nats", "dropped"], rows, right=(0, 1, 2, 3, 4))
    print(f"\nlog-odds of the behaviour as it is: {choice.positive:.3f} on positive prompts, {choice.negative:.3f} on negative ones")
