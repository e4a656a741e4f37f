"""`headscope edit saferope`: find a concept in the heads of a model, learn to turn it away, and say what that changes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headscope.app.case import Case
from headscope.app.edit_files import check_folder
from headscope.app.escape import visible
from headscope.app.printing import print_json, print_table
from headscope.interventions import Plan, Prompted, SafeRoPE, span
from headscope.interventions.language.prompts import divergence, last_logits, samples_of
from headscope.interventions.saferope.saferope import angles
from headscope.interventions.saferope.training import Schedule, output_of
from headscope.interventions.spans import locate
from headscope.kernels.errors import InputError
from headscope.probe import load
from headscope.probe.digit_flow import SIDE, DigitFlow
from headscope.probe.models import tokenize

MADE_FROM = {"text": "encoder_hidden_states", "image": "hidden_states"}
BATCH = 12  # prompts of embedded:mmdit that are run together


@dataclass(frozen=True)
class Line:
    """One prompt of a file and the words in it that name the subject."""

    place: str
    text: str
    subject: str


@dataclass(frozen=True)
class Effect:
    """What a plan does to a set of prompts.

    Attributes:
        change: mean squared change of the model's output over its mean square, averaged over the examples.
        divergence: KL(before ‖ after) of the next token in nats, averaged over prompts; None where no token is predicted.
    """

    change: float
    divergence: float | None


def run_edit_saferope(arguments: argparse.Namespace) -> int:
    """Fit, print, write."""
    if arguments.steps < 1:
        raise InputError(f"--steps {arguments.steps}: give 1 or more; without learning there are --kind half-turn and --kind project")
    for option, file in (("--save", arguments.save), ("--recipe", arguments.recipe)):
        check_folder(option, file)
    files = [read_lines(Path(path), option) for path, option in ((arguments.unsafe, "--unsafe"), (arguments.safe, "--safe"))]
    print(f"loading {visible(arguments.model)} …", file=sys.stderr, flush=True)
    options = {option: getattr(arguments, option) for option in ("device", "dtype", "task", "revision")}
    model, processor = load(arguments.model, **options)
    if isinstance(processor, DigitFlow):
        unsafe, safe = (drawn(processor, lines, 2 * arguments.seed + place) for place, lines in enumerate(files))
        roles: dict[str, Any] = {"role": arguments.role or "text", "made_from": MADE_FROM}
    else:
        if arguments.role is not None:
            raise InputError(
                f"--role {arguments.role}: {arguments.model} reads one sequence; roles are for models that join text and image"
            )
        if not callable(getattr(processor, "decode", None)):
            raise InputError(f"{arguments.model} has no tokenizer, so the command line cannot feed it: use SafeRoPE.fit from Python")
        unsafe, safe = ([read(model, processor, line) for line in lines] for lines in files)
        roles = {}
    learned = arguments.kind == "rotate"
    found = SafeRoPE.fit(
        model, unsafe, safe, rank=arguments.rank, least_gap=arguments.least_gap, most_heads=arguments.most_heads, progress=told,
        schedule=Schedule(steps=arguments.steps, alternate=arguments.alternate, seed=arguments.seed) if learned else None, **roles,
    )  # fmt: skip
    plan = found.plan(arguments.kind)
    effects = {name: measure(model, found, plan, examples) for name, examples in (("unsafe", unsafe), ("safe", safe))}
    if arguments.save is not None:
        found.save(arguments.save)
        print(f"SafeRoPE written to {visible(arguments.save)}", file=sys.stderr)
    if arguments.recipe is not None:
        plan.save(arguments.recipe, model=model)
        print(f"recipe written to {visible(arguments.recipe)}", file=sys.stderr)
    if arguments.json:
        facts = {"saferope": found.to_dict(), "kind": arguments.kind, "effect": {name: vars(effect) for name, effect in effects.items()}}
        print_json("headscope.edit-saferope/v1", Case(str(arguments.model), model, processor, {}), facts)
        return 0
    _print(found, effects)
    return 0


def read_lines(path: Path, option: str) -> list[Line]:
    """The prompts of a JSON-lines file; empty lines are passed over.

    Raises:
        InputError: it cannot be read; a line that is not {"text": …, "subject": …}, named by its number.
    """
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {str(path)!r} cannot be read: {error}") from error
    found = []
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            entry = json.loads(row)
        except json.JSONDecodeError as error:
            raise InputError(f"{place} is not JSON: {error}") from error
        text = entry.get("text", entry.get("prompt")) if isinstance(entry, dict) else None
        subject = entry.get("subject") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text or not isinstance(subject, str) or not subject.strip():
            raise InputError(f'{place}: give {{"text": "…", "subject": "…"}}, the subject as words of the text')
        found.append(Line(place, text, subject))
    if not found:
        raise InputError(f"{option} {str(path)!r} holds no prompt")
    return found


def read(model: nn.Module, tokenizer: Any, line: Line) -> Prompted:
    """A text as inputs of a model, and the tokens that its subject overlaps."""
    inputs = tokenize(tokenizer, line.text, model)
    if line.subject not in line.text:
        raise InputError(f"{line.place}: there is no {line.subject!r} in the text")
    ((positions,),) = locate([span(line.subject)], tokenizer, inputs["input_ids"]).values()
    return Prompted(inputs, [list(positions)])


def drawn(flow: DigitFlow, lines: Sequence[Line], seed: int) -> list[Prompted]:
    """Prompts of `embedded:mmdit` in batches, with fresh noise at random times."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, len(lines), BATCH):
        part = lines[start : start + BATCH]
        subjects = [flow.book.positions(line.text, line.subject.lower().split()) for line in part]
        for line, places in zip(part, subjects, strict=True):
            if not places:
                raise InputError(f"{line.place}: there is no {line.subject!r} in the prompt")
        noise = torch.randn(len(part), 1, SIDE, SIDE, generator=random)
        inputs = flow.inputs(noise, torch.rand(len(part), generator=random), [line.text for line in part])
        found.append(Prompted(inputs, subjects))
    return found


@torch.no_grad()
def measure(model: nn.Module, found: SafeRoPE, plan: Plan, examples: Sequence[Prompted]) -> Effect:
    """What the plan does to the examples."""
    changes, nats = [], []
    for example in examples:
        outputs = []
        for context in (nullcontext(), plan.on(model, roles=found.roles, strict=False)):
            with context:
                outputs.append(model(**example.inputs))
        before, after = (output_of(output).float() for output in outputs)
        changes.append(float((after - before).square().mean() / before.square().mean().clamp_min(1e-12)))
        if hasattr(outputs[0], "logits"):
            logits = [last_logits(output, samples_of(example.inputs)[0]) for output in outputs]
            nats.append(float(divergence(*logits).mean()))
    return Effect(sum(changes) / len(changes), sum(nats) / len(nats) if nats else None)


def told(what: str, done: int, total: int) -> None:
    """Progress on stderr."""
    if done == total or done % 10 == 0:
        sys.stderr.write(f"\r\033[K{what}: {done} of {total}{chr(10) if done == total else ''}")
        sys.stderr.flush()


def _print(found: SafeRoPE, effects: dict[str, Effect]) -> None:
    rows = []
    for part in found.parts:
        counted = found.info["counts"][f"{part.side.site} {part.side.stage}"]
        rows.append([
            visible(part.side.site), part.side.stage, f"{len(part.heads)} of {counted}", _between(part.gap.tolist()),
            _between(part.threshold.tolist()), _between(angles(part.skew).tolist()),
        ])  # fmt: skip
    print_table(["site", "stage", "heads", "separation", "threshold", "angle"], rows, right=(3, 4, 5))
    print(f"\n{found}")
    for name, effect in effects.items():
        nats = "" if effect.divergence is None else f", KL(before ‖ after) of the next token {effect.divergence:.4g} nats"
        print(f"{name} prompts: output changed by {100 * effect.change:.3g} % of its mean square{nats}")


def _between(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
