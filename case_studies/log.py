"""Finished cells of a study, one JSON line each, so that a run that was cut off goes on where it stood."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Log:
    """A file of lines {"cell": name, "seconds": ..., "found": ...}; a last line that was cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the run ended while it wrote this line; the cell is measured again
            self.rows[row["cell"]] = row
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()), encoding="utf-8")

    def cell(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was found for a cell; measured now if it has not been. The name says everything that the result depends on."""
        if name not in self.rows:
            sys.stderr.write(f"{name} … ")
            sys.stderr.flush()
            began = time.monotonic()
            found = measure()
            line = json.dumps({"cell": name, "seconds": round(time.monotonic() - began, 2), "found": found})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self.rows[name] = json.loads(line)  # as a second run would read it
            sys.stderr.write(f"{self.rows[name]['seconds']:.1f} s\n")
        return self.rows[name]["found"]

    def seconds(self, part: str | None = None) -> float:
        """What the cells of a part took, those whose name begins with it and a colon, or all; this time and before it was cut off."""
        return sum(row["seconds"] for name, row in self.rows.items() if part is None or name.startswith(f"{part}:"))
