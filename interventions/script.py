"""A plan as Python text that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from headscope.interventions.edit import EVERYTHING, Edit
from headscope.interventions.ops import Assign, Call, Op, Patch
from headscope.interventions.select import Selector, Span, Stretch
from headscope.kernels.errors import RecipeError

MOST_NUMBERS = 4096  # in tensors, per script
SINGULAR = {"layers": "layer", "heads": "head", "kv_groups": "kv_group"}


def write_script(edits: Sequence[Edit]) -> str:
    """A script whose `plan` equals the plan of these edits.

    Raises:
        RecipeError: a function, a captured run, or more tensor entries than one would read; `Plan.save` keeps the latter two.
    """
    numbers = sum(value.numel() for edit in edits for value in _values(edit.op) if isinstance(value, Tensor))
    if numbers > MOST_NUMBERS:
        raise RecipeError(
            f"the plan's tensors hold {numbers} numbers, a script at most {MOST_NUMBERS}: use plan.save(path) and Plan.load(path)"
        )
    lines = [f"    {_edit(index, edit)}," for index, edit in enumerate(edits)]
    body = "plan = Plan([" + ("\n" + "\n".join(lines) + "\n" if lines else "") + "])\n"
    words = {"Edit", "Plan", *(_function(edit.op) for edit in edits)} if edits else {"Plan"}
    words |= {"select"} if any(edit.selector != EVERYTHING for edit in edits) else set()
    words |= {"span"} if any(edit.selector.spans() for edit in edits) else set()
    head = "import torch\n\n" if numbers else ""
    return f"{head}from headscope.interventions import {', '.join(sorted(words))}\n\n{body}"


def _edit(index: int, edit: Edit) -> str:
    if isinstance(edit.op, Call) or (isinstance(edit.op, Patch) and not isinstance(edit.op.source, Tensor)):
        advice = (
            "write it into your own script"
            if isinstance(edit.op, Call)
            else "use plan.save(path), which keeps its tensors, and Plan.load(path)"
        )
        raise RecipeError(f"edit {index} ({edit}) cannot be written as text: {advice}")
    parts = [repr(edit.stage), f"{_function(edit.op)}({', '.join(map(_literal, _values(edit.op)))})"]
    if edit.selector != EVERYTHING:
        parts.append(_selector(edit.selector))
    if edit.gate != 1.0:
        parts.append(f"gate={edit.gate!r}")
    return f"Edit({', '.join(parts)})"


def _values(op: Op) -> list[object]:
    return [getattr(op, field.name) for field in fields(op)]


def _function(op: Op) -> str:
    return "assign" if isinstance(op, Assign) else op.name


def _selector(selector: Selector) -> str:
    said = []
    for field in fields(selector):
        value = getattr(selector, field.name)
        if value is None:
            continue
        if isinstance(value, tuple) and len(value) == 1:
            said.append(f"{SINGULAR.get(field.name, field.name)}={value[0]!r}")
        else:
            said.append(f"{field.name}={_literal(value)}")
    return f"select({', '.join(said)})"


def _literal(value: object) -> str:
    if isinstance(value, Tensor):
        return f"torch.tensor({value.detach().cpu().to(_exact(value)).tolist()!r}, dtype={value.dtype})"
    if isinstance(value, Span):
        return f"span({value.text!r})"
    if isinstance(value, Stretch):
        return f"slice({value.start}, {value.stop}, {value.step})"
    if isinstance(value, tuple):
        if isinstance(value[0], int) and len(value) >= 3 and value[-1] - value[0] == len(value) - 1:
            return f"range({value[0]}, {value[-1] + 1})"
        return repr(list(value))
    return repr(value)


def _exact(value: Tensor) -> torch.dtype:
    """A dtype whose Python numbers give every entry back."""
    return torch.float64 if value.is_floating_point() else torch.int64
