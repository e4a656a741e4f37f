"""Which terms of UGID's loss change what a model says, and which what happens inside? Writes results.json, results.md and figure.svg.

python case_studies/debiasing/run.py [--data FOLDER] [--seeds N] [--quick] [--tables] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

from arms import ARMS, LAYERS, RANDOM, debias, random_direction
from figure import draw
from log import Log
from measure import measure
from safetensors.torch import load_model, save_model
from sentences import Occupations, Pair, read_winobias, two_occupations
from subject import Subject, plant
from tables import write_tables
from torch import nn

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        seeds: of the split, the order of the training and the random direction; one model is planted for all.
        planting, debiasing: steps of Adam.
        texts, length: samples of the model's own text, half of them unread, and their tokens.
        pairs: sentences of WinoBias, or of its kind, that are measured.
        frames: of the held-out ones, in which every occupation is measured.
    """

    seeds: int = 3
    planting: int = 120
    debiasing: int = 50
    texts: int = 96
    length: int = 32
    pairs: int = 100
    frames: int = 4


QUICK = Settings(seeds=1, planting=2, debiasing=1, texts=4, length=8, pairs=2, frames=1)


def study(log: Log, settings: Settings, data: Path | None, out: Path) -> dict[str, Any]:
    """All arms of all seeds, or what the log has of them."""
    name = "WinoBias" if data else "generated"
    learnt = read_winobias(data, "dev") if data else two_occupations(1, 400)
    asked = read_winobias(data, "test") if data else two_occupations(2, settings.pairs)
    asked = random.Random(0).sample(asked, settings.pairs)
    planted: list[Subject] = []

    def subject() -> Subject:
        if not planted:
            planted.append(the_planted(settings, learnt, out / f"planted-{name}-{settings.planting}.safetensors"))
        return planted[0]

    found: dict[str, Any] = {"sentences": name, "seeds": []}
    for seed in range(settings.seeds):
        occupations = Occupations.split(seed)
        trained: dict[str, nn.Module] = {}

        def arm(name: str, seed: int = seed, seen: Occupations = occupations, trained: dict[str, nn.Module] = trained) -> dict[str, Any]:
            base = subject()
            if name == "planted":
                model: nn.Module = base.model
            elif name == RANDOM:
                both = trained.get("both") or debias(base, ARMS["both"], seen.seen, settings.debiasing, seed)
                model = random_direction(base.model, both, seed)
            else:
                model = trained[name] = debias(base, ARMS[name], seen.seen, settings.debiasing, seed)
            return measure(model, base, seen, asked, settings.frames)

        key = f"{name}, {settings}, seed {seed}"
        found["seeds"].append({one: log.cell(f"{one}: {key}", lambda one=one: arm(one)) for one in ("planted", *ARMS, RANDOM)})
    for path in out.glob("planted-*.safetensors"):
        path.unlink()
    return found


def the_planted(settings: Settings, pairs: list[Pair], path: Path) -> Subject:
    """The subject with the planted stereotype; kept in a file until the study is done, for a run that goes on."""
    subject = Subject(settings.texts, settings.length, 0)
    if path.is_file():
        load_model(subject.model, path)
    else:
        sys.stderr.write("planting the stereotype …\n")
        plant(subject, pairs, settings.planting, 0)
        save_model(subject.model, str(path))
    return subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of WinoBias's sentence files; without it sentences of its kind are made")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a run that shows only that it runs")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--tables", action="store_true", help="only write tables and figure again, from results.json")
    arguments = parser.parse_args()
    if arguments.tables:
        rewrite(arguments.out)
        return
    if arguments.seeds < 1:
        parser.error("--seeds: at least 1")
    if arguments.quick and arguments.out == HERE:
        parser.error("--quick measures nothing worth keeping: say --out FOLDER")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = QUICK if arguments.quick else Settings(seeds=arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = Log(arguments.out / "cells.jsonl")
    report = study(log, settings, arguments.data, arguments.out)
    report["made"] = {
        "settings": asdict(settings), "layers": list(LAYERS),
        "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    (arguments.out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rewrite(arguments.out)
    log.path.unlink()


def rewrite(out: Path) -> None:
    """Tables and figure again, from results.json as it is."""
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    write_tables(report, out)
    (out / "figure.svg").write_text(draw(report), encoding="utf-8")


if __name__ == "__main__":
    main()
