"""Does SafeRoPE erase a concept from `embedded:mmdit`, and what does it cost? Writes results.json, results.md and pictures.

python case_studies/saferope/run.py [--seeds 3] [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

from judge import Judge
from log import Log
from pictures import draw_samples
from prompts import FAMILIES, SAFE, Asked, Size, first_word, judged_by, learned_from
from tables import write_tables
from torch import Tensor
from ways import BLOCKED, LEARNED, NONE, SILENCED, edits, oracle

from headscope.interventions import Plan
from headscope.interventions.roles import Roles, find_roles
from headscope.interventions.saferope.saferope import SafeRoPE
from headscope.interventions.saferope.training import Schedule
from headscope.probe import load
from headscope.probe.digit_flow import DigitFlow
from headscope.probe.models import model_fingerprint

HERE = Path(__file__).parent
MODEL = "embedded:mmdit"
MADE_FROM = {"text": "encoder_hidden_states", "image": "hidden_states"}


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        seeds: of prompts, noise and learning.
        unsafe: the digit that is to go, with all comparisons.
        again: another, with the learned rotation alone.
        rank, wide_rank: of the subspaces; the second for the first seed alone.
        steps: of learning.
        size: how many prompts.
    """

    seeds: int = 3
    unsafe: int = 8
    again: int = 3
    rank: int = 2
    wide_rank: int = 5
    steps: int = 120
    size: Size = Size()


QUICK = Settings(seeds=1, steps=4, size=Size(learned=12, learned_safe=2, batch=6, judged=6, judged_safe=(2, 2)))


class Study:
    """The model, the judge and the cells measured so far."""

    def __init__(self, settings: Settings, log: Log, fits: Path) -> None:
        self.settings, self.log, self.fits = settings, log, fits
        model, flow = load(MODEL)
        assert isinstance(flow, DigitFlow)
        self.model, self.flow = model, flow
        self.fingerprint = model_fingerprint(model)
        self.judge = Judge.fit()
        self.roles: Roles = find_roles(model, flow.inputs(flow.noise(1, 0), 1.0, flow.book.plain(1, 0)), MADE_FROM)
        self.base: dict[tuple[int, int], dict[str, Tensor]] = {}

    def fit(self, unsafe: int, seed: int, rank: int) -> SafeRoPE:
        """Learned now, or read from the file of a run that was cut off."""
        path = self.fits / f"{self.fingerprint[-12:]}-{unsafe}-{seed}-{rank}-{self.settings.steps}.safetensors"
        if not path.is_file():
            bad, good, silent = learned_from(self.flow, unsafe, seed, self.settings.size)
            SafeRoPE.fit(
                self.model, bad, good, train_safe=[*good, *silent], rank=rank, role="text", made_from=MADE_FROM,
                schedule=Schedule(steps=self.settings.steps, seed=seed),
            ).save(path)  # fmt: skip
        return SafeRoPE.load(path, self.model)

    def cell(self, what: str, unsafe: int, seed: int, measure: Any) -> Any:
        size = ", ".join(f"{name} {value}" for name, value in asdict(self.settings.size).items())
        name = f"{what}, digit {unsafe}, seed {seed}, {self.settings.steps} steps, {size}, model {self.fingerprint[-12:]}"
        return self.log.cell(name, measure)

    def learned(self, unsafe: int, seed: int, rank: int) -> dict[str, Any]:
        """Facts of a fit."""
        began = time.monotonic()
        fitted = self.fit(unsafe, seed, rank)
        wide = [torch.linalg.matrix_exp(part.skew.double()) for part in fitted.parts]
        errors = [float((turn @ turn.mT - torch.eye(rank, dtype=torch.float64)).abs().max()) for turn in wide]
        single = [torch.linalg.matrix_exp(part.skew) for part in fitted.parts]
        errors32 = [float((turn @ turn.mT - torch.eye(rank)).abs().max()) for turn in single]
        skewness = max(float((part.skew + part.skew.mT).abs().max()) for part in fitted.parts)
        gaps = torch.cat([part.gap for part in fitted.parts])
        thresholds = torch.cat([part.threshold for part in fitted.parts])
        angles = [float(torch.linalg.eigvalsh(1j * matrix.double()).max()) for part in fitted.parts for matrix in part.skew]
        return {
            "seconds": time.monotonic() - began, "heads": fitted.info["heads"], "heads_in_all": fitted.info["heads_in_all"],
            "gap": [float(gaps.min()), float(gaps.max())], "threshold": [float(thresholds.min()), float(thresholds.max())],
            "largest_angle": max(angles), "skewness": skewness, "orthogonality": max(*errors, *errors32),
            **{name: fitted.info[name] for name in ("change_unsafe", "change_safe") if name in fitted.info},
        }  # fmt: skip

    def judged(self, unsafe: int, seed: int, plan: Plan | None, roles: Roles | None = None, words: Sequence[str] = ()) -> dict[str, Any]:
        """What the judge reads in each family, as a string of digits, and how safe pictures changed.

        Args:
            plan: on while the model draws; None for none.
            words: draw only what holds one of them, with that word in front; what is drawn without the plan stands for the rest.
        """
        asked = judged_by(self.flow.book, unsafe, seed, self.settings.size)
        if (unsafe, seed) not in self.base:
            self.base[unsafe, seed] = {name: self.draw(family, seed, place) for place, (name, family) in enumerate(asked.items())}
        base = self.base[unsafe, seed]
        drawn = base
        if plan is not None:
            drawn = {}
            with plan.on(self.model, roles=roles, strict=False):
                for place, (name, family) in enumerate(asked.items()):
                    if not words:
                        drawn[name] = self.draw(family, seed, place)
                        continue
                    found = [first_word(prompt, words) for prompt in family.prompts]
                    moved = [prompt or given for prompt, given in zip(found, family.prompts, strict=True)]
                    drawn[name] = base[name].clone()
                    chosen = [index for index, prompt in enumerate(found) if prompt is not None]
                    if chosen:
                        drawn[name][chosen] = self.draw(Asked(moved, family.digits), seed, place)[chosen]
        safe, safe_base = (torch.cat([pictures[name] for name in SAFE]) for pictures in (drawn, base))
        return {
            "read": {name: "".join(map(str, self.judge.read(pictures))) for name, pictures in drawn.items()},
            "frechet": self.judge.frechet(safe, [digit for digit in range(10) if digit != unsafe]),
            "moved": float((safe - safe_base).abs().mean()),
            "exact": all(torch.equal(drawn[name], base[name]) for name in drawn),
        }

    def draw(self, family: Asked, seed: int, place: int) -> Tensor:
        return self.flow.sample(family.prompts, seed=100 * seed + place)

    def compare(self, unsafe: int, seed: int, ways: Sequence[str]) -> dict[str, Any]:
        """Each way's readings, by its name."""
        rank, names = self.settings.rank, self.flow.book.subjects[unsafe]
        cell = partial(self.cell, unsafe=unsafe, seed=seed)
        learned = cell(f"fit of rank {rank}", measure=lambda: self.learned(unsafe, seed, rank))
        found = {NONE: cell(NONE, measure=lambda: self.judged(unsafe, seed, None))}
        for way in (BLOCKED, SILENCED):
            plan, place = oracle(way, self.roles)
            found[way] = cell(way, measure=partial(self.judged, unsafe, seed, plan, place, names))
        for way in ways:

            def measure(way: str = way) -> dict[str, Any]:
                fitted = self.fit(unsafe, seed, rank)
                return self.judged(unsafe, seed, edits()[way](fitted, seed), fitted.roles)

            found[way] = cell(way, measure=measure)
        return {"fit": learned, "asked": {n: a.digits for n, a in judged_by(self.flow.book, unsafe, seed, self.settings.size).items()},
                "ways": found}  # fmt: skip

    def still(self, unsafe: int, seed: int) -> dict[str, Any]:
        """Strength 0, and the plan after its block."""
        fitted = self.fit(unsafe, seed, self.settings.rank)
        zero = self.judged(unsafe, seed, fitted.plan(strength=0.0), fitted.roles)["exact"]
        with contextlib.suppress(KeyboardInterrupt), fitted.plan().on(self.model, roles=fitted.roles):
            raise KeyboardInterrupt
        asked = judged_by(self.flow.book, unsafe, seed, self.settings.size)
        again = {name: self.draw(family, seed, place) for place, (name, family) in enumerate(asked.items())}
        base = self.base[unsafe, seed]
        return {"zero_is_exact": zero, "afterwards_exact": all(torch.equal(again[name], base[name]) for name in base)}

    def wide(self, unsafe: int, seed: int) -> dict[str, Any]:
        rank = self.settings.wide_rank
        facts = self.cell(f"fit of rank {rank}", unsafe, seed, lambda: self.learned(unsafe, seed, rank))

        def measure() -> dict[str, Any]:
            fitted = self.fit(unsafe, seed, rank)
            return self.judged(unsafe, seed, fitted.plan(), fitted.roles)

        return {"fit": facts, "ways": {LEARNED: self.cell(f"learned rotation of rank {rank}", unsafe, seed, measure)}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Erase a digit from embedded:mmdit and let a classifier of real digits judge")
    parser.add_argument("--seeds", type=int, help="of prompts, noise and learning; by default 3")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results, and of cells.jsonl while it runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: give 1 or more")
    if args.quick and args.out == HERE:
        parser.error("--quick gives no result worth keeping: give --out another folder")
    torch.set_num_threads(args.threads)
    settings = QUICK if args.quick else Settings()
    if args.seeds is not None:
        settings = replace(settings, seeds=args.seeds)

    log = Log(args.out / "cells.jsonl")
    fits = args.out / "fits"
    fits.mkdir(exist_ok=True)
    study = Study(settings, log, fits)
    runs = [study.compare(settings.unsafe, seed, list(edits())) for seed in range(settings.seeds)]
    again = [study.compare(settings.again, seed, [LEARNED]) for seed in range(settings.seeds)]
    report: dict[str, Any] = {
        "unsafe": settings.unsafe, "again": settings.again, "families": [*FAMILIES, *SAFE], "runs": runs, "runs_again": again,
        "wide_rank": settings.wide_rank, "wide": study.wide(settings.unsafe, 0),
        "still": study.cell("strength 0", settings.unsafe, 0, lambda: study.still(settings.unsafe, 0)),
        "judge": study.judge.held_out_accuracy,
        "made": {
            "model": MODEL, "fingerprint": study.fingerprint, "settings": asdict(settings), "seconds": round(log.seconds(), 1),
            "torch": torch.__version__, "python": platform.python_version(), "threads": args.threads, "cores": os.cpu_count(),
        },
    }  # fmt: skip
    path = args.out / "results.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_tables(report, args.out)
    draw_samples(study.flow, study.judge, study.fit(settings.unsafe, 0, settings.rank), study.roles, settings.unsafe, args.out)
    log.path.unlink()  # everything is in results.json
    for file in fits.iterdir():
        file.unlink()
    fits.rmdir()
    sys.stderr.write(f"wrote the results to {args.out}\n")


if __name__ == "__main__":
    main()
