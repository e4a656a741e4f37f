"""What the commands under `headscope edit` print for people."""

from __future__ import annotations

from collections.abc import Sequence

from headscope.app.escape import visible
from headscope.app.printing import print_table
from headscope.interventions import Plan
from headscope.interventions.cost import PlanCost
from headscope.interventions.evaluation.assertions import Verdict
from headscope.interventions.evaluation.changes import Change, cells
from headscope.interventions.evaluation.evaluation import Evaluation

MOST_SITES = 12


def print_evaluation(found: Evaluation) -> None:
    """Effect, side effects, where the edits acted, the price, and what has no number."""
    examples = len(found.results) - found.benign
    _print_changes(f"effect on {_counted(examples, 'example')}", found.effect)
    beside = f"side effects on {_counted(found.benign, 'benign example')}" if found.benign else "side effects (no benign examples)"
    told = set() if found.benign else {row.metric for row in found.effect}
    rows = [row for row in found.side_effects if row.metric not in told]
    if rows:
        print()
        _print_changes(beside, rows)
    print("\nmeans, with 95 % intervals of the mean over examples; the difference is paired")
    print()
    for index, (edit, count) in enumerate(zip(found.edits, found.hits, strict=True)):
        print(f"edit {index}: {visible(edit)}: changed something in {count} of {len(found.results)} examples")
    if found.price is not None:
        print()
        _print_cost(found.price.cost)
        if found.price.bytes_without is not None and found.price.bytes_with is not None:
            print(f"memory: {_mebibytes(found.price.bytes_without)} -> {_mebibytes(found.price.bytes_with)} beyond what was in use before")
    if found.troubles:
        print()
        for trouble in found.troubles:
            print(f"BROKEN: {visible(trouble)}")


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Each assertion, and whether it holds."""
    if verdicts:
        print()
    for verdict in verdicts:
        print(visible(str(verdict)))


def print_plan(plan: Plan, python: str | None, why: str, cost: PlanCost | None) -> None:
    """A plan in words, as a script, and what it costs."""
    print(_counted(len(plan), "edit"))
    for index, edit in enumerate(plan):
        print(f"  {index}: {visible(str(edit))}")
    print()
    print(f"as Python: {why}" if python is None else "\n".join(visible(line) for line in python.rstrip().splitlines()))
    if cost is not None:
        print()
        for index, edit_cost in enumerate(cost.edits):
            print(f"edit {index} is carried out at {edit_cost.lowered}, in {_counted(edit_cost.calls, 'call')}")
        _print_cost(cost)


def _print_changes(title: str, rows: Sequence[Change]) -> None:
    print(f"{title}:")
    print()
    print_table(["metric", "before", "after", "difference"], [[visible(row.metric), *cells(row)] for row in rows], right=(1, 2, 3))


def _print_cost(cost: PlanCost) -> None:
    print(cost.overhead_in_words)
    leaving = [site.site for site in cost.sites if site.leaves_fused]
    leave = "leaves" if len(leaving) == 1 else "leave"
    print(f"of {_counted(len(cost.sites), 'changed site')}, {len(leaving)} {leave} fused attention")
    for name in leaving[:MOST_SITES]:
        print(f"  {visible(name)}")
    if len(leaving) > MOST_SITES:
        print(f"  and {len(leaving) - MOST_SITES} more")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
