"""What becomes of a picture when the map of a word is bent? Writes results.json, results.md, figures and the tables of README.md.

python case_studies/attention_bender/run.py [--part digits,videos] [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

from conditions import MOTIONS, SPATIAL, Condition, conditions, correlation, interval, measure, moved
from figures import Row, write_figure
from log import Log
from subjects import Digits, Subject, Videos, settle
from tables import write_tables

HERE = Path(__file__).parent
SUBJECTS: dict[str, tuple[Callable[[int], Subject], int]] = {"digits": (Digits, 10), "videos": (Videos, 3)}  # and prompts of each kind
SHOWN = {
    ("translate-x", 0.25), ("translate-x", 0.5), ("rotate", 90.0), ("rotate", 180.0), ("flip-h", None), ("scale", 0.5), ("scale", 2.0),
    ("amplify", 0.0), ("amplify", 2.0), ("amplify", 5.0),
}  # fmt: skip
PICTURES = {"digits": 10, "videos": 4}


def run_part(part: str, log: Log, quick: bool) -> dict[str, Any]:
    """All conditions of one model."""
    make, each = SUBJECTS[part]
    subject = make(1 if quick else each)
    subject.steps = 4 if quick else subject.steps
    before = subject.draw()
    some = range(PICTURES[part])
    found: dict[str, Any] = {"prompts": len(subject.prompts), "shown": [subject.prompts[place] for place in some]}

    def unedited() -> dict[str, Any]:
        another = subject.draw(seed=1)
        return {
            "kept": {name: interval([float(one) for one in values]) for name, values in subject.kept(before).items()},
            "another noise": interval(correlation(before, another).tolist()),
            "pictures": rounded(before[: len(some)]),
        }

    def looked() -> dict[str, Any]:
        maps = subject.maps()
        ink = before.clamp(-1, 1)
        rows = {}
        for place, name in enumerate(maps.names):
            each_map = maps.maps[:, place].reshape(ink.shape)
            rows[name] = {
                "share": interval(maps.share[:, place].tolist()),
                "with ink": interval(correlated(each_map, ink)),
                "with the ink of another": interval(correlated(each_map, ink.roll(1, 0))),
                "maps": rounded(each_map[: len(some)], 5),
            }
        return rows

    def deleted() -> dict[str, Any]:
        """How like the moved pictures those are that lost the word: what a moved map does beyond that, it does by moving."""
        rows = {}
        for renormalise in (False, True):
            bare = subject.draw(subject.plan(Condition("amplify", 0.0, next(iter(subject.words)), renormalise=renormalise)))
            for motion, amount in MOTIONS:
                if motion in SPATIAL:
                    likeness = correlation(bare, moved(before, motion, amount))
                    rows[f"{motion} {amount} {renormalise}"] = interval(likeness.tolist())
        return rows

    found["unedited"] = log.cell(f"{part}: unedited, {len(before)}", unedited)
    found["maps"] = log.cell(f"{part}: maps, {len(before)}", looked)
    found["deleted"] = log.cell(f"{part}: deleted, {len(before)}", deleted)
    found["edits"] = []
    for condition in conditions(list(subject.words), list(subject.parts), quick):

        def bent(condition: Condition = condition) -> dict[str, Any]:
            after = subject.draw(subject.plan(condition))
            kept = subject.kept(after)
            row: dict[str, Any] = measure(before, after, next(iter(kept.values())), condition)
            row |= {f"{name} kept": interval([float(one) for one in values]) for name, values in list(kept.items())[1:]}
            whole = condition.part == "everywhere" and condition.word == next(iter(subject.words))
            if whole and (condition.motion, condition.amount) in SHOWN:
                row["pictures"] = rounded(after[: len(some)])
            return row

        row = log.cell(f"{part}: {condition.name}, {len(before)}", bent)
        found["edits"].append({**vars(condition), "spatial": condition.motion in SPATIAL, **row})
    return found


def correlated(maps: torch.Tensor, ink: torch.Tensor) -> list[float]:
    """Pearson's r of each map with a picture, over pixels and frames."""
    a, b = maps.flatten(1).double(), ink.flatten(1).double()
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    found: list[float] = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)).tolist()
    return found


def rounded(pictures: torch.Tensor, digits: int = 2) -> list[Any]:
    return [[[[round(float(x), digits) for x in row] for row in frame] for frame in one] for one in pictures]


def draw_figures(report: dict[str, Any], out: Path) -> None:
    """Pictures before and after, and maps beside them."""
    for part, found in report.items():
        if part == "made":
            continue
        frames = len(found["unedited"]["pictures"][0])
        rows = [Row("unedited", flat(found["unedited"]["pictures"]))]
        for row in found["edits"]:
            if "pictures" in row:
                amount = "" if row["amount"] is None else f" {row['amount']:g}"
                rows.append(Row(f"{row['motion']}{amount}{', renormalised' * row['renormalise']}", flat(row["pictures"])))
        heads = [prompt.split()[0] for prompt in found["shown"]]
        if frames > 1:
            heads = [" ".join(prompt.split()[:2]) if frame == 0 else "" for prompt in found["shown"] for frame in range(frames)]
        group = frames if frames > 1 else 0
        write_figure(out / f"{part}.svg", rows, heads, group)
        maps = [Row(f"map of {name}", flat(row["maps"]), map=True) for name, row in found["maps"].items()]
        write_figure(out / f"{part}-maps.svg", [rows[0], *maps], heads, group)


def flat(pictures: list[Any]) -> list[Any]:
    return [frame for picture in pictures for frame in picture]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(SUBJECTS), help="digits, videos or both")
    parser.add_argument("--quick", action="store_true", help="few prompts and edits, only to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    parts = arguments.part.split(",")
    unknown = [part for part in parts if part not in SUBJECTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: choose {', '.join(SUBJECTS)}")
    if arguments.quick and arguments.out == HERE:
        parser.error("--quick would replace the study's results: give another folder with --out")
    settle()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    report: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {"made": {}}
    log = Log(arguments.out / "cells.jsonl")
    for part in parts:
        report[part] = run_part(part, log, arguments.quick)
        report["made"][part] = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "seconds": round(log.seconds(part)),
            "seed": 0,
        }
    results.write_text(json.dumps(report, allow_nan=False) + "\n", encoding="utf-8")
    draw_figures(report, arguments.out)
    write_tables(report, arguments.out)
    log.path.unlink()
    sys.stderr.write(f"wrote {results}\n")


if __name__ == "__main__":
    main()
