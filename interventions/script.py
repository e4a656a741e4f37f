"""A plan as Python text that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields

import torch
from torch import Tensor

from headscope.interventions.edit import EVERYTHING, Edit
from headscope.interventions.gates import Function, Gate
from headscope.interventions.mixing import Mix
from headscope.interventions.ops import Call, Op, Patch
from headscope.interventions.positions import Role, Span, Stretch
from headscope.interventions.rotary import Reposition
from headscope.interventions.select import Selector
from headscope.interventions.separation import Separate
from headscope.interventions.warping import PLAIN, Warp
from headscope.kernels.errors import RecipeError

MOST_NUMBERS = 4096  # in tensors, per script
SINGULAR = {"layers": "layer", "heads": "head", "kv_groups": "kv_group"}


def write_script(edits: Sequence[Edit]) -> str:
    """A script whose `plan` equals the plan of these edits.

    Raises:
        RecipeError: a function, a captured run, or more tensor entries than one would read; `Plan.save` keeps the latter two.
    """
    holders = [holder for edit in edits for holder in (edit.op, edit.gate) if isinstance(holder, (Op, Gate))]
    numbers = sum(value.numel() for holder in holders for value in _values(holder) if isinstance(value, Tensor))
    if numbers > MOST_NUMBERS:
        raise RecipeError(
            f"the plan's tensors hold {numbers} numbers, a script at most {MOST_NUMBERS}: use plan.save(path) and Plan.load(path)"
        )
    lines = [f"    {_edit(index, edit)}," for index, edit in enumerate(edits)]
    body = "plan = Plan([" + ("\n" + "\n".join(lines) + "\n" if lines else "") + "])\n"
    words = {"Edit", "Plan", *(_function(edit.op) for edit in edits)} if edits else {"Plan"}
    words |= {"select"} if any(edit.selector != EVERYTHING for edit in edits) else set()
    words |= {"span"} if any(edit.selector.spans() for edit in edits) else set()
    words |= {"role"} if any(edit.selector.roles() for edit in edits) else set()
    words |= {"gates"} if any(isinstance(edit.gate, Gate) for edit in edits) else set()
    words -= {"Reposition", "separate"}
    head = "import torch\n\n" if numbers else ""
    moved = any(isinstance(edit.op, Reposition) for edit in edits)
    more = "from headscope.interventions.rotary import Reposition\n" if moved else ""
    more += "from headscope.interventions.separation import separate\n" if any(isinstance(edit.op, Separate) for edit in edits) else ""
    return f"{head}from headscope.interventions import {', '.join(sorted(words))}\n{more}\n{body}"


def _edit(index: int, edit: Edit) -> str:
    code = isinstance(edit.op, Call) or isinstance(edit.gate, Function)
    if code or (isinstance(edit.op, (Patch, Mix)) and not isinstance(edit.op.source, Tensor)):
        advice = "write it into your own script" if code else "use plan.save(path), which keeps its tensors, and Plan.load(path)"
        raise RecipeError(f"edit {index} ({edit}) cannot be written as text: {advice}")
    parts = [repr(edit.stage), f"{_function(edit.op)}({_arguments(edit.op)})"]
    if edit.selector != EVERYTHING:
        parts.append(_selector(edit.selector))
    if isinstance(edit.gate, Gate):
        parts.append(f"gate=gates.{edit.gate.name}({_arguments(edit.gate)})")
    elif edit.gate != 1.0:
        parts.append(f"gate={edit.gate!r}")
    return f"Edit({', '.join(parts)})"


def _arguments(holder: Op | Gate) -> str:
    """A single one by place, several by name; those at their default are left out."""
    several = len(fields(holder)) > 1
    said = []
    for field in fields(holder):
        value = getattr(holder, field.name)
        plain = not isinstance(value, Tensor) and field.default is not MISSING and value == field.default
        if not plain and not (isinstance(holder, Warp) and field.name == "amount" and holder.motion not in PLAIN):
            said.append(f"{field.name}={_literal(value)}" if several else _literal(value))
    return ", ".join(said)


def _values(holder: Op | Gate) -> list[object]:
    return [getattr(holder, field.name) for field in fields(holder)]


def _function(op: Op) -> str:
    return {"set": "assign", "reposition": "Reposition"}.get(op.name, op.name)


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
    if isinstance(value, Role):
        return f"role({value.name!r})"
    if isinstance(value, Span):
        return f"span({value.text!r})"
    if isinstance(value, Stretch):
        return f"slice({value.start}, {value.stop}, {value.step})"
    if isinstance(value, tuple):
        if isinstance(value[0], int) and len(value) >= 3 and value == tuple(range(value[0], value[-1] + 1)):  # a grid need not rise
            return f"range({value[0]}, {value[-1] + 1})"
        return repr(list(value))
    return repr(value)


def _exact(value: Tensor) -> torch.dtype:
    """A dtype whose Python numbers give every entry back."""
    return torch.float64 if value.is_floating_point() else torch.int64
