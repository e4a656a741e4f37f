"""How commands print: tables for people, JSON for programs, lists of numbers as people write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from headscope.app.case import Case
from headscope.kernels.errors import InputError
from headscope.probe.models import model_fingerprint


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as their widest cell; those named in `right` stand right-aligned."""
    widths = [max(len(line[column]) for line in [titles, *rows]) for column in range(len(titles))]
    for line in [titles, ["─" * width for width in widths], *rows]:
        sides = ["rjust" if column in right else "ljust" for column in range(len(line))]
        print("  ".join(getattr(cell, side)(width) for cell, side, width in zip(line, sides, widths, strict=True)).rstrip())


def print_json(schema: str, case: Case | None, facts: Mapping[str, object]) -> None:
    """One line: the schema's name, the model and its fingerprint where there is one, then the facts."""
    head = {"schema": schema} | ({} if case is None else {"model": case.name, "fingerprint": model_fingerprint(case.model)})
    print(json.dumps({**head, **facts}, ensure_ascii=True, allow_nan=False))


def listed(text: str, option: str) -> list[int]:
    """`0,2-4` as [0, 2, 3, 4].

    Raises:
        InputError: anything else.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})(?:\s*-\s*(\d{1,7}))?\s*", part)
        if match is None:
            raise InputError(f"{option} {text!r}: give numbers such as 0,2-4")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"{option} {text!r}: {last} is less than {first}")
        found.extend(range(first, last + 1))
    return found
