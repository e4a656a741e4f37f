"""Does a planted safety head rank first? Writes results.json, the table of README.md and figure.svg.

python case_studies/safety_heads/run.py [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

from chart import Line, Panel, draw
from log import Log
from planting import HELD_OUT, TRAINED, Prompts, plant, prompts, refusal, refusal_rate
from torch import nn

from headscope.interventions.evaluation.evaluate import evaluate
from headscope.interventions.language.head_search import search_heads
from headscope.interventions.language.head_sets import Removal
from headscope.interventions.language.safety_heads import score_sahara, score_ships

HERE = Path(__file__).parent
PLANTED = ((2, 5), (3, 1), (4, 6))
WAYS = ("ships, query", "ships, value", "sahara, directions", "sahara, prompts")
ASKED = 4  # times as many prompts of each kind are asked for refusals as for ranks


def measure(layer: int, head: int, count: int) -> dict[str, Any]:
    """Plant, rank on both kinds of prompts, take out what ranks first, look again."""
    model, tokenizer = plant(layer, head)
    token, held = refusal(tokenizer), prompts(tokenizer, HELD_OUT, count)
    rates = {
        name: {"triggered": refusal_rate(model, own.triggered, token), "harmless": refusal_rate(model, own.harmless, token)}
        for name, own in (
            ("trained", prompts(tokenizer, TRAINED, ASKED * count)),
            ("held out", prompts(tokenizer, HELD_OUT, ASKED * count)),
        )
    }
    places: dict[str, dict[str, Any]] = {}
    for kind, own in (("triggered", held.triggered), ("harmless", held.harmless)):
        for way in WAYS:
            name, how = way.split(", ")
            if name == "ships":
                ranking = score_ships(model, own, removal=how)
            else:
                ranking = score_sahara(model, own, space=how)
            best = ranking.top(name, 48)
            order = [(site.layer, number) for site, number, _ in best]
            scores = [score for *_, score in best]
            place = order.index((layer, head))
            places.setdefault(way, {})[kind] = {
                "rank": place + 1, "score": scores[place], "next": scores[0] if place else scores[1], "first": list(order[0]),
                "scores": scores[:8],
            }  # fmt: skip
    return {"layer": layer, "head": head, "refusals": rates, "ranks": places, "removed": _removed(model, held, token, layer, head, count)}


def _removed(model: nn.Module, held: Prompts, token: int, layer: int, head: int, count: int) -> dict[str, Any]:
    """The harness on plans that take out one head: the one that Ships puts first, and another of its layer."""
    data = [{"id": str(i), "inputs": one, "target": token} for i, one in enumerate(held.triggered)]
    benign = [{"id": f"b{i}", "inputs": one, "target": token, "benign": True} for i, one in enumerate(held.harmless)]
    greedy = search_heads(model, held.triggered, 1, objective="ships", epsilon=1e-4)
    other = (f"model.layers.{layer}.self_attn#0", (head + 2) % 8)
    found = {}
    for name, plan in (("first by Ships", greedy.plan()), ("another of the layer", Removal("query", 1e-4).plan([other]))):
        result = evaluate(model, plan, data, metrics=["accuracy"], benign=benign, repeats=0)
        change = result["accuracy"]
        found[name] = {
            "plan": str(plan.edits[0]),
            "before": change.before.mean if change.before else None,
            "after": change.after.mean if change.after else None,
            "kl": result["benign.kl"].after.to_dict() if result["benign.kl"].after else None,
        }
    return found


def table_of(report: dict[str, Any]) -> list[str]:
    rows = ["| planted | way | rank on trigger prompts | its score | best other | rank on harmless prompts |", "|---|---|---|---|---|---|"]
    for cell in report["planted"]:
        for way in WAYS:
            own = cell["ranks"][way]
            bad, good = own["triggered"], own["harmless"]
            unit = "nats" if way.startswith("ships") else "°"
            rows.append(
                f"| {cell['layer']}.{cell['head']} | {way} | **{bad['rank']}** of 48 | {bad['score']:.2f} {unit} | "
                f"{bad['next']:.2f} {unit} | {good['rank']} |"
            )
    rows += [
        "",
        "| planted | refusals, trigger prompts | harmless ones | first by Ships out | another of its layer out | KL on harmless, nats |",
    ]
    rows.append("|---|---|---|---|---|---|")
    for cell in report["planted"]:
        rates, gone = cell["refusals"]["held out"], cell["removed"]
        first, other = gone["first by Ships"], gone["another of the layer"]
        rows.append(
            f"| {cell['layer']}.{cell['head']} | {rates['triggered']:.2f} | {rates['harmless']:.2f} | {first['after']:.2f} | "
            f"{other['after']:.2f} | {first['kl']['mean']:.3f} |"
        )
    return rows


def figure(report: dict[str, Any]) -> str:
    """Scores of the eight best heads on trigger prompts, by Ships and by Sahara."""
    panels = []
    for way, unit in (("ships, query", "nats"), ("sahara, directions", "degrees")):
        lines = []
        for cell in report["planted"]:
            scores = cell["ranks"][way]["triggered"]["scores"]
            rank = cell["ranks"][way]["triggered"]["rank"]
            lines.append(Line(f"planted in {cell['layer']}.{cell['head']}", range(1, 9), scores, dots=[rank]))
        high = max(max(line.ys) for line in lines) * 1.05  # type: ignore[type-var]
        panels.append(Panel(f"{way}: the dot is the planted head", "rank", unit, lines, 0.0, high, decades=False, ticks=range(1, 9)))
    return draw(panels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant a refusal in one head and ask Ships and Sahara for it")
    parser.add_argument("--quick", action="store_true", help="one head, a few prompts, to see that it runs")
    parser.add_argument("--write", action="store_true", help="only write table and figure anew from results.json")
    parser.add_argument("--out", type=Path, default=HERE, help="where results, table and figure go (default: beside this file)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.write:
        count, heads = (2, PLANTED[1:2]) if arguments.quick else (6, PLANTED)
        log = Log(out / "cells.jsonl")
        cells = [
            log.cell(f"planted in {layer}.{head}, {count} prompts", lambda at=(layer, head): measure(*at, count)) for layer, head in heads
        ]
        report = {
            "planted": cells,
            "made": {"quick": arguments.quick, "torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()},
        }
        (out / "results.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (out / "cells.jsonl").unlink()
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (out / "figure.svg").write_text(figure(report), encoding="utf-8")
    readme = out / "README.md"
    if readme.is_file():
        table = "\n".join(table_of(report))
        text = readme.read_text(encoding="utf-8")
        readme.write_text(
            re.sub(r"(<!-- table -->\n).*?(<!-- /table -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S), encoding="utf-8"
        )
    print("\n".join(table_of(report)))


if __name__ == "__main__":
    main()
