"""When do tokens become one? Writes results.json, results.md, figures and the tables of README.md.

python case_studies/rank_collapse/run.py [--part a,b,c,d] [--seeds N] [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

from decay import measure_cubic, measure_decay, measure_leading_term, measure_uniform_causal
from decay import variants as decay_variants
from digits import Training, name_of, train
from figures import draw_figures
from log import Log
from random_scores import SPREADS, measure_random_scores
from surgery import CUTS, Cut, Subject, broken, digits, language, measure_report, measure_states
from tables import write_tables
from vanishing import measure_gradients
from vanishing import variants as gradient_variants

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        seeds: of parts a and c, and of the random scores.
        trained_seeds: of part b.
        depth: layers of part a.
        cubic_layers: layers of the high-precision run.
        half_steps: of the attentions of part b.
        training: what the trainings of part b share.
        draws: of random scores, a seed.
        texts, tokens, images: samples of part d.
        cuts: what is done to its models.
    """

    seeds: int = 5
    trained_seeds: int = 3
    depth: int = 24
    cubic_layers: int = 7
    half_steps: tuple[int, ...] = (1, 3, 21)
    training: Training = Training(1, True, 0)
    draws: int = 6
    texts: int = 4
    tokens: int = 128
    images: int = 32
    cuts: tuple[str, ...] = tuple(CUTS)


QUICK = Settings(
    seeds=2, trained_seeds=2, depth=4, cubic_layers=3, half_steps=(1, 3),
    training=Training(1, True, 0, epochs=1, trained_on=64, images=4, paths=2), draws=1, texts=2, tokens=16, images=4,
    cuts=("intact", "without attention skips"),
)  # fmt: skip


def part_a(log: Log, settings: Settings) -> dict[str, Any]:
    """Decay by what a network is made of; the cubic law; causal attention."""
    seeds = range(settings.seeds)
    decay: dict[str, Any] = {}
    for mask, causal in (("bidirectional", False), ("causal", True)):
        decay[mask] = {
            name: [
                log.cell(f"a: {mask}, {name}, {settings.depth} layers, seed {seed}", partial(measure_decay, design, seed)) for seed in seeds
            ]
            for name, design in ((name, replace(design, causal=causal)) for name, design in decay_variants(settings.depth).items())
        }
    layers = settings.cubic_layers
    return {
        "decay": decay,
        "cubic": [log.cell(f"a: cubic law, {layers} layers, seed {seed}", partial(measure_cubic, layers, seed)) for seed in seeds],
        "leading_term": [log.cell(f"a: leading term, seed {seed}", partial(measure_leading_term, seed)) for seed in seeds],
        "uniform_causal": log.cell("a: uniform causal attention, 60 layers", partial(measure_uniform_causal, 60)),
    }


def part_b(log: Log, settings: Settings) -> dict[str, Any]:
    """Softmax against Sinkhorn: on random scores, and on digits before and after training."""
    found: dict[str, Any] = {
        "random_scores": {
            str(spread): [
                log.cell(f"b: random scores, spread {spread}, seed {seed}", partial(measure_random_scores, spread, seed, settings.draws))
                for seed in range(settings.seeds)
            ]
            for spread in SPREADS
        }
    }
    for name, skip in (("skip", True), ("no_skip", False)):
        found[name] = {str(half_steps): [] for half_steps in settings.half_steps}
        for seed in range(settings.trained_seeds):
            for half_steps in settings.half_steps:
                task = replace(settings.training, half_steps=half_steps, skip=skip, seed=seed)
                found[name][str(half_steps)].append(log.cell(name_of(task), partial(train, task)))
    return found


def part_c(log: Log, settings: Settings) -> dict[str, Any]:
    """Gradients of queries and keys against those of values."""
    return {
        name: [log.cell(f"c: {name}, seed {seed}", partial(measure_gradients, design, seed)) for seed in range(settings.seeds)]
        for name, design in gradient_variants().items()
    }


def part_d(log: Log, settings: Settings) -> dict[str, Any]:
    """Trained models whose skips are taken out, and what the health report says of them."""
    found: dict[str, Any] = {}
    for name, make in (
        ("embedded:lm", partial(language, settings.texts, settings.tokens)),
        ("embedded:vit", partial(digits, settings.images)),
    ):
        found[name] = {
            cut: log.cell(f"d: {name}, {cut}, {settings.texts} × {settings.tokens}, {settings.images}", partial(_examine, make, CUTS[cut]))
            for cut in settings.cuts
            if CUTS[cut].layers is None or name == "embedded:lm"
        }
    return found


def _examine(make: partial[Subject], cut: Cut) -> dict[str, Any]:
    subject = make(cut)
    with broken(subject.layers, cut):
        return {"what": subject.what, "causal": subject.causal, **measure_states(subject), "report": measure_report(subject)}


PARTS = {"a": part_a, "b": part_b, "c": part_c, "d": part_d}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure rank collapse in untrained, trained and broken attention networks")
    parser.add_argument(
        "--part",
        default="a,b,c,d",
        help="which parts to measure; the others stay as they are in results.json, and none only writes tables and figures anew",
    )
    parser.add_argument("--seeds", type=int, help="seeds of every part (by default 5, and 3 where networks are trained)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results, and of cells.jsonl while it runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    wanted = [part for part in args.part.split(",") if part]
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}: choose among {', '.join(PARTS)}")
    if args.seeds is not None and args.seeds < 2:
        parser.error(f"--seeds {args.seeds} gives no interval: give 2 or more")
    if args.quick and args.out == HERE:
        parser.error("--quick gives no result worth keeping: give --out another folder")
    torch.set_num_threads(args.threads)
    settings = QUICK if args.quick else Settings()
    if args.seeds is not None:
        settings = replace(settings, seeds=args.seeds, trained_seeds=args.seeds)

    log = Log(args.out / "cells.jsonl")
    path = args.out / "results.json"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"made": {}}
    for part in wanted:
        report[part] = PARTS[part](log, settings)
        report["made"][part] = {
            "torch": torch.__version__, "python": platform.python_version(), "threads": args.threads, "cores": os.cpu_count(),
            "seeds": {"b": settings.trained_seeds, "d": None}.get(part, settings.seeds), "seconds": round(log.seconds(part), 1),
        }  # fmt: skip
    lines = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", json.dumps(report, indent=1))
    path.write_text(lines + "\n", encoding="utf-8")  # a list of numbers on one line
    write_tables(report, args.out)
    draw_figures(report, args.out)
    log.path.unlink()  # everything is in results.json
    sys.stderr.write(f"wrote the results to {args.out}\n")


if __name__ == "__main__":
    main()
