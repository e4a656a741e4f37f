"""Attribution over the zoo: do the books close, on which model, and who absorbs what?

`python -m tests.attribution_coverage` rewrites the section "Attribution" of docs/coverage.md.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.attribution import Attribution
from tests.coverage import TABLE, difference, keep_attribution, number, quiet
from tests.models import ENTRIES, FAMILIES, Entry
from tests.models.entry import Inputs

EXACT_LIMIT = 1e-10  # of the largest number in the books
FLOAT_LIMIT = 1e-4
FORWARD_LIMIT = 1e-6  # of the largest output: autograd may choose another kernel than a pass without gradients does
FUSED_LIMIT = 1e-6  # of the largest relevance
TITLE = "## Attribution"


@dataclass
class BookRow:
    """What was measured on one model.

    Attributes:
        entry: the model.
        exact: |residual| over the largest number in the books, in float64.
        single: the same in float32.
        forward: how far the float32 output moves under attribution, over its largest value.
        fused: relevance with fused attention against eager, in float64, over the largest; None where there is no choice.
        shares: of the relevance, by where it ended: `inputs`, `constants`, and the kinds of absorbers; absolute values, sum 1.
        unruled: operations without a rule.
        problems: what breaks a promise, in words.
    """

    entry: Entry
    exact: float | None = None
    single: float | None = None
    forward: float | None = None
    fused: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    unruled: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """The books close in both precisions, and nothing else is wrong."""
        return not self.problems and self.exact is not None


def unfit(entry: Entry) -> str | None:
    """Why relevance cannot be asked of an entry at all."""
    if entry.refused is not None:
        return f"refused: {entry.refused}"
    return None if entry.differentiable else "no gradient can be taken through it here"


def build(entry: Entry, dtype: torch.dtype, implementation: str | None = None) -> tuple[nn.Module, Inputs]:
    """The model and its inputs in some precision."""
    model, inputs = entry.build()
    config: Any = getattr(model, "config", None)
    if dtype == torch.float64 and config is not None:
        for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
            part._experts_implementation = "eager"  # grouped products have no float64
    if implementation is not None:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    model = model.to(dtype)
    return model, {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def explain(entry: Entry, model: nn.Module, inputs: Inputs) -> tuple[Attribution, float]:
    """AttnLRP of a fixed random functional of the output, and how far the output moved, relative to its largest value."""
    torch.manual_seed(0)
    plain = entry.output(model(**inputs)).detach().clone()
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3)).to(plain.dtype)
    visible = entry.visible(inputs) if entry.visible is not None else None
    if (
        visible is not None and visible.shape == plain.shape[: visible.dim()]
    ):  # what padding sees is nothing, and no two kernels agree on it
        weights = weights * visible.reshape(*visible.shape, *([1] * (plain.dim() - visible.dim())))
    seen: list[Tensor] = []

    def target(output: Any) -> Tensor:
        seen.append(entry.output(output).detach().clone())
        return (entry.output(output) * weights).sum()

    torch.manual_seed(0)
    result = attribute(model, inputs, target)
    return result, difference(seen[0], plain) / max(1.0, float(plain.abs().max()))


def check(entry: Entry) -> BookRow:
    """Measure one model that is not `unfit`."""
    row = BookRow(entry)
    for measure in (check_exact, check_single, check_fused):
        try:
            measure(row)
        except Exception as error:  # a row that breaks must not hide the others: the table says so, the tests fail on it
            row.problems.append(f"{measure.__name__.removeprefix('check_')}: {type(error).__name__}: {str(error)[:200]}")
    return row


def closing(row: BookRow, result: Attribution, limit: float, precision: str) -> float:
    """|residual| over the scale of the books."""
    ledger = result.ledger
    assert ledger is not None
    found = abs(ledger.residual) / ledger.scale
    if not found <= limit:
        row.problems.append(f"the books do not close in {precision}: {found:.1e} of their largest number is missing")
    return found


def check_exact(row: BookRow) -> None:
    """The books in float64, and what stands in them."""
    result, _ = explain(row.entry, *build(row.entry, torch.float64))
    row.exact = closing(row, result, EXACT_LIMIT, "float64")
    row.unruled = tuple(sorted({f"{name} in {module}" for name, module, _ in result.unruled}))
    assert result.ledger is not None
    parts = {"inputs": result.ledger.inputs, "constants": sum(result.ledger.constants.values()), **result.ledger.by_kind()}
    whole = sum(abs(amount) for amount in parts.values())
    row.shares = {name: abs(amount) / whole for name, amount in parts.items() if amount}


def check_single(row: BookRow) -> None:
    """The books in float32, and the forward pass."""
    result, row.forward = explain(row.entry, *build(row.entry, torch.float32))
    row.single = closing(row, result, FLOAT_LIMIT, "float32")
    if not row.forward <= FORWARD_LIMIT:
        row.problems.append(f"the output moves by {row.forward:.1e} under attribution")


def check_fused(row: BookRow) -> None:
    """Relevance with the model's eager attention against its fused one, where transformers lets one choose."""
    if row.entry.family != "transformers":
        return
    found = []
    for implementation in ("eager", "sdpa"):
        try:
            model, inputs = build(row.entry, torch.float64, implementation)
        except (ValueError, AttributeError, RuntimeError):
            return  # it has only one
        config: Any = model.config
        if config._attn_implementation != implementation:
            return
        found.append(explain(row.entry, model, inputs)[0].inputs)
    largest = max(float(value.abs().max()) for value in found[0].values())
    row.fused = max(difference(found[0][name], found[1][name]) for name in found[0]) / largest
    if not row.fused <= FUSED_LIMIT:
        row.problems.append(f"eager and fused attention differ by {row.fused:.1e} of the largest relevance")


def line(row: BookRow) -> str:
    """One line of the table."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(row.shares.items(), key=lambda item: -item[1]) if share >= 0.005)
    remarks = [*(f"no rule for {name}" for name in row.unruled), *(f"**{problem}**" for problem in row.problems)]
    cells = (row.entry.name, number(row.exact), number(row.single), number(row.forward), number(row.fused), shares, "; ".join(remarks))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def section(rows: list[BookRow], unasked: dict[str, str]) -> str:
    """The section of docs/coverage.md."""
    works, ruled = sum(row.works for row in rows), sum(row.works and not row.unruled for row in rows)
    lines = [
        TITLE,
        "",
        f"AttnLRP on {len(rows)} models: the books of {works} close, {ruled} of them without an operation that has no rule; "
        f"{len(rows) - works} have a problem. Written by `python -m tests.attribution_coverage`. The target is a fixed random functional "
        "of the output.",
        "",
        "- **float64 / float32**: |residual| of the books over the largest number in them; they close up to 1e-10 / 1e-4.",
        "- **output**: how far the float32 output moves under attribution, over its largest value. 0 is the same to the bit.",
        "- **eager = fused**: relevance of the inputs with transformers' eager attention against `sdpa`, float64, over the largest.",
        "- **where relevance ends**: shares of the absolute amounts. Constants are lookups that no input decides, and constant summands.",
        "- Operations without a rule passed relevance by their plain gradient; what they kept is booked, so the books close all the same.",
        "",
        "| architecture | float64 | float32 | output | eager = fused | where relevance ends | remark |",
        "|---|---|---|---|---|---|---|",
        *(line(row) for family in FAMILIES for row in rows if row.entry.family == family),
    ]
    if unasked:
        lines += ["", "Not asked:", "", *(f"- {name}: {reason}" for name, reason in unasked.items())]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure every entry, rewrite the section, and say what is wrong; 1 when something is."""
    parser = argparse.ArgumentParser(description="Attribute every model of the zoo and rewrite the section in docs/coverage.md.")
    parser.add_argument("--only", help="measure entries whose name contains this text, and write nothing")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet()
    rows: list[BookRow] = []
    unasked: dict[str, str] = {}
    chosen = [entry for entry in ENTRIES if options.only is None or options.only.lower() in entry.name.lower()]
    for count, entry in enumerate(chosen, 1):
        reason = unfit(entry) or entry.missing()
        if reason is not None:
            unasked[entry.name] = reason
            continue
        start = time.perf_counter()
        row = check(entry)
        rows.append(row)
        print(
            f"{count}/{len(chosen)} {'ok' if row.works else 'PROBLEM'} {entry.name} ({time.perf_counter() - start:.1f} s)", file=sys.stderr
        )
        for problem in row.problems:
            print(f"    {problem}", file=sys.stderr)
    if options.only is None:
        TABLE.write_text(keep_attribution(TABLE.read_text(encoding="utf-8"), section(rows, unasked)), encoding="utf-8")
    else:
        print("\n".join(line(row) for row in rows))
    bad = [row.entry.name for row in rows if not row.works]
    print(f"{len(rows) - len(bad)} close, {len(bad)} have a problem, {len(unasked)} not asked")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
