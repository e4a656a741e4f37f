"""What the study found, in tables made from results.json alone: results.md, and the marked places of README.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_tables(report: dict[str, Any], out: Path) -> None:
    """Write results.md, and put the same blocks between `<!-- name -->` and `<!-- /name -->` of a README.md in the folder."""
    blocks: dict[str, str] = {}
    text = ["# Results", "", "Written by `run.py`. Brackets: 95 % bootstrap intervals over pictures."]
    for part, found in report.items():
        if part == "made":
            continue
        made = report["made"][part]
        first = next(iter(found["maps"]))
        whole = [row for row in found["edits"] if row["part"] == "everywhere" and row["word"] == first]
        rest = [row for row in found["edits"] if row not in whole]
        blocks |= {f"{part}-unedited": unedited(found), f"{part}-edits": edits(whole, found), f"{part}-parts": parts(rest)}
        text += ["", f"## {part}", "", f"{found['prompts']} prompts; torch {made['torch']}, {made['machine']}, {made['seconds']} seconds."]
        text += [f"\n{blocks[f'{part}-{name}']}" for name in ("unedited", "edits", "parts")]
    (out / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    readme = out / "README.md"
    if readme.is_file():
        whole_text = readme.read_text(encoding="utf-8")
        for name, block in blocks.items():
            whole_text = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, block=block: f"{m[1]}{block}\n{m[2]}", whole_text, flags=re.S
            )
        readme.write_text(whole_text, encoding="utf-8")


def unedited(found: dict[str, Any]) -> str:
    """Maps of the words, under a line on the pictures themselves."""
    kept = "; ".join(f"{name} as asked {spoken(value)}" for name, value in found["unedited"]["kept"].items())
    head = f"Unedited: {kept}. r with a picture of the same prompt and other noise: {spoken(found['unedited']['another noise'])}.\n\n"
    return head + table(
        ["word", "share of attention", "r of its map with the ink", "with the ink of another prompt's picture"],
        [
            [name, spoken(row["share"], 3), spoken(row["with ink"]), spoken(row["with the ink of another"])]
            for name, row in found["maps"].items()
        ],
    )


def edits(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> str:
    """A line for each edit of the first word everywhere, without and with renormalising side by side."""
    lines = []
    for row in rows:
        if row["renormalise"]:
            continue
        twin = next(
            other for other in rows if other["renormalise"] and (other["motion"], other["amount"]) == (row["motion"], row["amount"])
        )
        lines.append([titled(row), *(cell for each in (row, twin) for cell in cells(each, found["deleted"]))])
    head = ["kept", "right, down (wanted)", "r before", "r moved (before it, word deleted)"]
    return table(["edit", *head, *(f"{name}, renorm." for name in head)], lines)


def parts(rows: Sequence[dict[str, Any]]) -> str:
    """Other words, and parts of the model and of the walk."""
    lines = [
        [titled(row), row["word"], row["part"], "yes" if row["renormalise"] else "no", *cells(row)]
        for row in sorted(rows, key=lambda row: (row["word"], row["part"]))
    ]
    return table(["edit", "word", "where", "renorm.", "kept", "right, down (wanted)", "r before", "r moved (before it)"], lines)


def titled(row: dict[str, Any]) -> str:
    return row["motion"] if row["amount"] is None else f"{row['motion']} {row['amount']:g}"


def cells(row: dict[str, Any], deleted: dict[str, Any] | None = None) -> list[str]:
    wanted = f" ({number(row['wanted right'])}, {number(row['wanted down'])})" if row["spatial"] else ""
    shift = f"{number(row['right']['mean'])}, {number(row['down']['mean'])}{wanted}"
    follows = "–"
    if row["spatial"]:
        without = "" if deleted is None else f", {number(deleted[key(row)]['mean'])}"
        follows = f"{number(row['like moved']['mean'])} ({number(row['moved like before']['mean'])}{without})"
    return [spoken(row["kept"]), shift, number(row["like before"]["mean"]), follows]


def key(row: dict[str, Any]) -> str:
    """Under which name the study keeps how like a moved picture one without the word is."""
    return f"{row['motion']} {row['amount']} {row['renormalise']}"


def spoken(found: dict[str, Any], digits: int = 2) -> str:
    if found["low"] is None:
        return number(found["mean"], digits)
    return f"{number(found['mean'], digits)} [{number(found['low'], digits)}, {number(found['high'], digits)}]"


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−") if abs(value) >= 0.5 * 10**-digits else f"{0:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
