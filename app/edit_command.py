"""`headscope edit` and what stands under it: what changes when heads are changed, measured, explained and compared."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headscope.app.case import Case, case_of, held_out_digit
from headscope.app.edit_files import check_folder
from headscope.app.edit_printing import print_evaluation, print_plan, print_verdicts
from headscope.app.escape import visible
from headscope.app.outcome import answer, compare
from headscope.app.printing import print_json, print_table
from headscope.interventions import Edit, Plan, scale, select
from headscope.interventions.evaluation.assertions import Assertion, parse_assertion
from headscope.interventions.evaluation.evaluate import evaluate
from headscope.interventions.evaluation.examples import Example, read_examples, with_inputs
from headscope.interventions.evaluation.metrics import NAMED, REFUSALS, Metric, as_metrics, refusal_rate
from headscope.kernels.errors import InputError, RecipeError, SelectionError
from headscope.probe import load
from headscope.probe.models import digits_processor


def run_edit(arguments: argparse.Namespace) -> int:
    """Show what the model predicts before and after edits."""
    if arguments.top < 1:
        raise InputError(f"--top {arguments.top}: give a number of rows from 1 up")
    edits = [_scale_edit(text) for text in arguments.scale]
    if not edits and arguments.recipe is None:
        raise InputError("no edits: give --scale LAYER.HEAD=X, or --recipe FILE")
    case = case_of(arguments)
    if arguments.recipe is not None:
        edits = [*_recipe(arguments.recipe, case.model, arguments.force).edits, *edits]
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


def run_edit_run(arguments: argparse.Namespace) -> int:
    """Measure a recipe on examples; 1 where an assertion fails."""
    _alone(arguments, "run")
    if arguments.repeats < 0 or (arguments.examples is not None and arguments.examples < 1):
        raise InputError("--repeats is 0 or more, --examples 1 or more")
    for option, file in (("--save", arguments.save), ("--log", arguments.log)):
        check_folder(option, file)
    claims = _claims(arguments)
    metrics = _metrics(arguments, claims)
    data, benign = (None if path is None else read_examples(path) for path in (arguments.data, arguments.benign))
    _check_claims(claims, [*(data or []), *(benign or [])], benign is not None)
    alone = _recipe(arguments.recipe)  # what is wrong with it alone is said before a model is loaded
    _check_roles(alone, [*(data or []), *(benign or [])])
    named = _load(arguments)
    plan = _recipe(arguments.recipe, named.model, arguments.force)
    examples = [None if rows is None else [_with_digit(row, named) for row in rows] for rows in (data, benign)]
    found = evaluate(
        named.model, plan, examples[0] or [], metrics=metrics, benign=examples[1], tokenizer=named.processor, examples=arguments.examples,
        repeats=arguments.repeats, seed=arguments.seed, log=arguments.log, progress=_progress, info={"name": named.name},
    )  # fmt: skip
    verdicts = [claim.check(found) for claim in claims]
    if arguments.save is not None:
        found.save(arguments.save)
        print(f"result written to {visible(arguments.save)}", file=sys.stderr)
    passed = all(verdict.passed for verdict in verdicts)
    if arguments.json:
        facts = {"passed": passed, "assertions": [verdict.to_dict() for verdict in verdicts], "evaluation": found.to_dict()}
        print_json("headscope.edit-run/v1", Case(named.name, named.model, named.processor, {}), facts)
    else:
        print_evaluation(found)
        print_verdicts(verdicts)
    return 0 if passed else 1


def run_edit_show(arguments: argparse.Namespace) -> int:
    """Say what a recipe does, and with a model what it costs."""
    _alone(arguments, "show", "text", "text_file", "image")
    if arguments.repeats < 1:
        raise InputError(f"--repeats {arguments.repeats}: time at least 1 forward")
    alone = _recipe(arguments.recipe)
    if arguments.model is not None and (roles := _roles(alone)):
        raise InputError(
            f"the recipe edits tokens by role ({', '.join(roles)}), which the command line cannot find in a text: "
            "leave --model out to see the edits, or use plan.cost(model, roles=...) from Python"
        )
    if arguments.model is None:
        if given := [name for name in ("text", "text_file", "image") if getattr(arguments, name) is not None]:
            raise InputError(f"--{given[0].replace('_', '-')} is what a model reads: give --model too")
        plan, cost, case = alone, None, None
    else:
        case = case_of(argparse.Namespace(**{**vars(arguments), "command": "edit show"}))
        plan = _recipe(arguments.recipe, case.model, arguments.force)
        try:
            options: dict[str, Any] = {"tokenizer": case.processor if case.reads_text else None, **case.inputs}
            cost = plan.cost(case.model, repeats=arguments.repeats, **options)
        except SelectionError as error:
            hint = "" if arguments.text or arguments.text_file else "; with --text the cost is measured on a text of yours"
            raise SelectionError(f"{error}{hint}") from error
    try:
        python: str | None = plan.to_python()
        why = ""
    except RecipeError as error:
        python, why = None, str(error)
    facts: dict[str, Any] = {"edits": [str(edit) for edit in plan], "python": python, "cost": None if cost is None else cost.to_dict()}
    if arguments.json:
        print_json("headscope.edit-show/v1", case, facts)
    else:
        print_plan(plan, python, why, cost)
    return 0


def run_edit_diff(arguments: argparse.Namespace) -> int:
    """Compare two recipes; 1 where they differ."""
    _alone(arguments, "diff")
    first, second = (_recipe(path) for path in (arguments.first, arguments.second))
    found = first.diff(second)
    if arguments.json:
        print_json("headscope.edit-diff/v1", None, {"same": found.same, **found.to_dict()})
    else:
        print("\n".join(visible(line) for line in str(found).splitlines()))
    return 0 if found.same else 1


@dataclass(frozen=True)
class _Named:
    """A model and what it is called."""

    name: str
    model: nn.Module
    processor: Any


def _load(arguments: argparse.Namespace) -> _Named:
    print(f"loading {visible(arguments.model)} …", file=sys.stderr, flush=True)
    options = {option: getattr(arguments, option) for option in ("device", "dtype", "task", "revision")}
    model, processor = load(arguments.model, **options)
    if processor is not digits_processor and not callable(getattr(processor, "decode", None)):
        raise InputError(
            f"{arguments.model} has no tokenizer, so the command line cannot feed it: use headscope.interventions.evaluate from Python"
        )
    return _Named(str(arguments.model), model, processor)


def _with_digit(example: Example, named: _Named) -> Example:
    """An example of embedded:vit, with its image for the number of it."""
    reads_digits = named.processor is digits_processor
    if example.image is None:
        if reads_digits:
            raise InputError(f'{example.name}: {named.name} reads images: give the number of one, such as {{"image": 3}}')
        return example
    if not reads_digits:
        raise InputError(f"{example.name}: an image is for embedded:vit, not for {named.name}")
    weight = next(named.model.parameters())
    try:
        inputs = digits_processor(held_out_digit(example.image))
    except InputError as error:
        raise InputError(f"{example.name}: {error}") from error
    return with_inputs(example, {name: value.to(weight.device, weight.dtype) for name, value in inputs.items()})


def _check_claims(claims: Sequence[Assertion], examples: Sequence[Example], apart: bool) -> None:
    """Raise for a claim about benign examples where there are none that it could be about."""
    beside = [one for one in examples if one.benign or apart]
    for claim in claims:
        if claim.benign and claim.metric not in ("kl", "perplexity") and not beside:
            raise InputError(f'assertion {str(claim)!r}: there are no benign examples: give --benign, or mark lines with "benign": true')
        needs = NAMED[claim.metric]().needs
        if claim.benign and any(all(getattr(one, need) is None for one in beside) for need in needs):
            raise InputError(f"assertion {str(claim)!r}: no benign example has {' and '.join(needs)}, which {claim.metric} needs")


def _roles(plan: Plan) -> list[str]:
    return sorted({role.name for edit in plan for role in edit.selector.roles()})


def _check_roles(plan: Plan, examples: Sequence[Example]) -> None:
    """Raise for an example that does not say which of its tokens have a role that the plan names."""
    for example in examples:
        for name in _roles(plan):
            if name not in (example.roles or {}):
                raise InputError(
                    f"{example.name} does not say which tokens have the role {name!r}, which the recipe edits: "
                    f'add positions, such as "roles": {{"{name}": [3, 4]}}'
                )


def _recipe(path: str, model: nn.Module | None = None, force: bool = False) -> Plan:
    if not Path(path).is_file():
        raise RecipeError(f"there is no recipe {path!r}: give a YAML file, such as `headscope edit --save` writes")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            plan = Plan.load(path, model=model, force=force)
        except RecipeError as error:
            raise RecipeError(str(error).replace("use force=True", "use --force")) from error
    for warning in caught:
        print(f"warning: {visible(str(warning.message))}", file=sys.stderr)
    return plan


def _claims(arguments: argparse.Namespace) -> list[Assertion]:
    claims = [parse_assertion(text) for text in arguments.assertions]
    if arguments.max_kl is not None:
        if not 0 <= arguments.max_kl < float("inf"):
            raise InputError(f"--max-kl {arguments.max_kl}: give a number of nats, 0 or more")
        claims.append(Assertion("kl", "<=", arguments.max_kl, benign=True))
    return claims


def _metrics(arguments: argparse.Namespace, claims: Sequence[Assertion]) -> tuple[Metric, ...]:
    """Those that are named, and those that assertions are about."""
    names = [name.strip() for given in arguments.metric for name in given.split(",")]
    names = list(dict.fromkeys([*names, *(claim.metric for claim in claims if not claim.benign)]))
    for claim in claims:
        if claim.metric not in NAMED:
            raise InputError(f"assertion {str(claim)!r}: no metric {claim.metric!r}: there are {', '.join(NAMED)}")
        if claim.benign and claim.metric not in ("kl", "perplexity", "accuracy") and claim.metric not in names:
            names.append(claim.metric)
    if not names and not claims:
        raise InputError(f"nothing to measure: give --metric, one or several of {', '.join(NAMED)}")
    if not names:
        names = ["kl"]
    own = refusal_rate(arguments.phrase or REFUSALS, arguments.generate) if "refusal-rate" in names else None
    if own is None and arguments.phrase:
        raise InputError("--phrase is for --metric refusal-rate")
    return as_metrics([own if name == "refusal-rate" and own is not None else name for name in names])


def _progress(done: int, total: int) -> None:
    if done == total or done % max(1, total // 20) == 0:
        print(f"{done} of {total} examples", file=sys.stderr, flush=True)


def _alone(arguments: argparse.Namespace, name: str, *allowed: str) -> None:
    """Raise for an option of plain `edit`, in front of the command's name, that the command would not look at."""
    for option in ("scale", "text", "text_file", "image"):
        if option not in allowed and getattr(arguments, option, None) not in (None, []):
            raise InputError(f"--{option.replace('_', '-')} belongs to plain `headscope edit`, not to `headscope edit {name}`")


def _scale_edit(text: str) -> Edit:
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)", text.strip())
    if match is None:
        raise InputError(f"--scale {text!r}: write LAYER.HEAD=X, such as 3.5=0 for layer 3, head 5, times 0")
    return Edit("z", scale(float(match[3])), select(layer=int(match[1]), head=int(match[2])))


def _edits(plan: Plan) -> object:
    """The edits as a recipe has them; in words where they hold tensors, which JSON cannot."""
    try:
        return plan.to_dict()["edits"]
    except RecipeError:
        return [str(edit) for edit in plan]


def _change(points: float) -> str:
    return f"{'▲' if points > 0.005 else '▼' if points < -0.005 else '·'} {points:+.2f}"
