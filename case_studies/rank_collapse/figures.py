"""The study's figures, drawn from results.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chart import Line, Panel, draw
from digits import DEPTHS, DESIGN
from over_seeds import over_seeds


def draw_figures(report: dict[str, Any], out: Path) -> None:
    """One SVG for each part that was measured."""
    for part, panels in (("a", decay), ("b", normalisers), ("c", gradients), ("d", surgery)):
        if part in report:
            (out / f"{panels.__name__}.svg").write_text(draw(panels(report[part])), encoding="utf-8")


def decay(found: dict[str, Any]) -> list[Panel]:
    panels = []
    for mask, title in (("bidirectional", "No mask"), ("causal", "Causal mask")):
        lines = []
        for name, seeds in found["decay"][mask].items():
            rows = [row["composite"] for row in seeds]
            lines.append(line_of(name, range(len(rows[0])), list(zip(*rows, strict=True))))
        panels.append(Panel(f"{title}: how much the tokens still differ", "layer", "relative residual", lines, -8, 0.3))
    return panels


def normalisers(found: dict[str, Any]) -> list[Panel]:
    panels = []
    for when, title in (("init", "Products of patterns, before training"), ("trained", "Products of patterns, after training")):
        lines = [
            line_of(spelled(half_steps), DEPTHS, list(zip(*(run[when]["path"]["log_residual"] for run in runs), strict=True)))
            for half_steps, runs in found["skip"].items()
        ]
        panels.append(Panel(title, "layers multiplied", "relative residual", lines, -14, 0.3, ticks=DEPTHS))
    lines = [
        line_of(
            spelled(half_steps), range(DESIGN.depth + 1), list(zip(*(run["trained"]["hidden"]["residual"] for run in runs), strict=True))
        )
        for half_steps, runs in found["skip"].items()
    ]
    panels.append(Panel("Hidden states, after training", "layer", "relative residual", lines, 0, 1, decades=False))
    lines = [
        Line(
            f"{spelled(half_steps)}: accuracy {run['trained']['accuracy']:.2f}", DEPTHS, run["trained"]["path"]["log_residual"], style=place
        )
        for place, (half_steps, runs) in enumerate(found["no_skip"].items())
        for run in runs
    ]
    panels.append(
        Panel("Trained without attention skips, each seed", "layers multiplied", "relative residual", lines, -14, 0.3, ticks=DEPTHS)
    )
    return panels


def gradients(found: dict[str, Any]) -> list[Panel]:
    lines = []
    for name, seeds in found.items():
        rows = [[math.log10(max(value, 1e-300)) for value in row["ratio"]] for row in seeds]
        lines.append(line_of(name, range(1, len(rows[0]) + 1), list(zip(*rows, strict=True))))
    return [Panel("Gradient of queries and keys over that of values", "layer", "ratio", lines, -16, 0.3)]


def surgery(found: dict[str, Any]) -> list[Panel]:
    panels: list[tuple[int, Panel]] = []
    for model, cuts in found.items():
        mask = "causal" if next(iter(cuts.values()))["causal"] else "no mask"
        for layers in {len(row["residual"]) - 1 for row in cuts.values()}:
            lines = [
                cut_line(name.replace(f", {layers} layers", ""), row, place)
                for place, (name, row) in enumerate(cuts.items())
                if len(row["residual"]) - 1 == layers
            ]
            panels.append((layers, Panel(f"{model} ({mask}), {layers} layers", "blocks passed", "relative residual", lines, -5, 0.3)))
    return [panel for _, panel in sorted(panels, key=lambda row: row[0])]


def cut_line(name: str, row: dict[str, Any], place: int) -> Line:
    """One model's residual, with rings where the report names token-collapse and dots where it names rank-collapse."""
    values = [math.log10(value) if value > 0 else None for value in row["residual"]]
    rings, dots = (
        [finding["layer"] + 1 for finding in row["report"]["findings"] if finding["rule"] == rule]
        for rule in ("token-collapse", "rank-collapse")
    )
    return Line(name, range(len(values)), values, rings=rings, dots=dots, style=place)


def line_of(name: str, xs: Sequence[int], values: Sequence[Sequence[float | None]]) -> Line:
    """The mean over seeds at each place, with its interval; nothing where a seed has reached the floor."""
    found = [None if any(value is None for value in row) else over_seeds([value for value in row if value is not None]) for row in values]
    ys, lows, highs = ([None if row is None else getattr(row, end) for row in found] for end in ("mean", "low", "high"))
    return Line(name, xs, ys, lows, highs)


def spelled(half_steps: str) -> str:
    return "softmax" if half_steps == "1" else f"Sinkhorn {half_steps}"
