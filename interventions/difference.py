"""What two plans have in common and what only one of them does."""

from __future__ import annotations

import difflib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass

from headscope.interventions.edit import Edit


@dataclass(frozen=True)
class PlanDifference:
    """Edits of two plans, compared in order; equal ones are those with equal stage, op, tensors, selector and gate.

    Attributes:
        removed: in the first plan alone, with their place in it.
        added: in the second plan alone, with their place in it.
        kept: how many both have, in the same order.
    """

    removed: tuple[tuple[int, Edit], ...]
    added: tuple[tuple[int, Edit], ...]
    kept: int

    @property
    def same(self) -> bool:
        """Whether the plans are equal."""
        return not self.removed and not self.added

    def to_dict(self) -> dict[str, object]:
        """Plain values; edits in words."""
        sides = {"removed": self.removed, "added": self.added}
        return {name: [{"index": index, "edit": str(edit)} for index, edit in side] for name, side in sides.items()} | {"kept": self.kept}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [f"- {index}: {edit}" for index, edit in self.removed] + [f"+ {index}: {edit}" for index, edit in self.added]
        return "\n".join([*lines, f"  {self.kept} edits in common"])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def difference(first: Sequence[Edit], second: Sequence[Edit]) -> PlanDifference:
    """The shortest change from one list of edits to another, in order."""
    matcher = difflib.SequenceMatcher(None, list(first), list(second), autojunk=False)
    removed: list[tuple[int, Edit]] = []
    added: list[tuple[int, Edit]] = []
    kept = 0
    for tag, start, stop, begin, end in matcher.get_opcodes():
        if tag == "equal":
            kept += stop - start
            continue
        removed += [(index, first[index]) for index in range(start, stop)]
        added += [(index, second[index]) for index in range(begin, end)]
    return PlanDifference(tuple(removed), tuple(added), kept)
