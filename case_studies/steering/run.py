"""Does steering act through where heads look, or through what they carry? Writes results.json, the tables of README.md and figure.svg.

python case_studies/steering/run.py [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what studies share

from chart import Line, Panel, draw
from log import Log
from steered import Judge, grouped, write_all
from styles import articles, divided, neutral, plays

from headscope.interventions import Edit, Plan, freeze
from headscope.interventions.language.directions import Direction, find_directions
from headscope.interventions.language.freezing import split_effect
from headscope.interventions.language.prompts import divergence, last_logits
from headscope.probe import Keep, Probe, load
from headscope.probe.attribution.interval import bootstrap

HERE = Path(__file__).parent
MARKS = 20  # tokens on either side of the logit difference
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
MIDDLE, STRENGTH = 2, 1.0  # the block for texts and sparsity; the direction in the length that it was found with
IN_TEXTS = (0.5, 1.0)  # the strengths while text is written


class Study:
    """The model, directions after every block, and what the metrics need."""

    def __init__(self, prompts: int, tokens: int) -> None:
        self.model, self.tokenizer = load("embedded:lm")
        self.tokens = tokens
        self.found, self.held = zip(*(divided(texts) for texts in (plays(), articles())), strict=True)
        positive, negative = ([self.inputs(text) for text in texts] for texts in self.found)
        self.directions = find_directions(self.model, positive, negative)
        said = [torch.stack([self.answer(self.inputs(text)) for text in texts]).log_softmax(-1).mean(0) for texts in self.held]
        order = (said[0] - said[1]).argsort(descending=True)
        self.marks = order[:MARKS], order[-MARKS:]
        self.texts = neutral()[:: max(1, len(neutral()) // prompts)][:prompts]
        self.prompts = [self.inputs(text) for text in self.texts]

    def inputs(self, text: str) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer(text, return_tensors="pt")["input_ids"]}

    def answer(self, inputs: dict[str, Tensor], *plans: Plan) -> Tensor:
        """[V], logits after the last token."""
        with torch.no_grad(), ExitStack() as stack:
            for plan in plans:
                stack.enter_context(plan.on(self.model))
            return last_logits(self.model(**inputs), inputs)[0]

    def style(self, output: Any) -> Tensor:
        """Mean logit of the tokens that plays favour, minus that of those that articles favour."""
        logits = output.logits[0, -1]
        value: Tensor = logits[self.marks[0]].mean() - logits[self.marks[1]].mean()
        return value


def by_layer(study: Study, layer: int, strength: float) -> dict[str, Any]:
    """The effect on the style logit of a direction added after one block, whole and with attention held."""
    split = split_effect(study.model, study.directions.at(layer).add(strength), study.prompts, study.style)
    return {
        "layer": layer, "strength": strength, "effect": split.effect.to_dict(),
        "kept": {case: split.kept(case).to_dict() for case in split.frozen},
        "separation": float(study.directions.separation[layer, 0]),
    }  # fmt: skip


def moved(study: Study, layer: int, strength: float, *, drawn: bool) -> dict[str, Any]:
    """KL from the unsteered answer, steered and steered with patterns frozen; by the direction or by a random one of its length."""
    direction = study.directions.at(layer)
    if drawn:
        other = torch.randn(direction.vector.shape, generator=torch.Generator().manual_seed(layer))
        direction = Direction(other / other.norm() * direction.vector.norm(), direction.block, layer)
    plan = direction.add(strength)
    whole, held, apart = [], [], []
    for inputs in study.prompts:
        with torch.no_grad(), Probe(study.model).capture(Keep(pattern=True)) as seen:
            plain = last_logits(study.model(**inputs), inputs)[0]
        free, frozen = study.answer(inputs, plan), study.answer(inputs, plan, Plan([Edit("pattern", freeze(seen))]))
        whole.append(float(divergence(plain, free)))
        held.append(float(divergence(plain, frozen)))
        apart.append(float(divergence(free, frozen)))
    return {
        "layer": layer, "steered": bootstrap(whole).to_dict(), "frozen": bootstrap(held).to_dict(), "apart": bootstrap(apart).to_dict(),
    }  # fmt: skip


def sparsity(study: Study, layer: int, strength: float) -> list[dict[str, Any]]:
    """What is left of the effect when only the largest entries of the vector are added."""
    direction = study.directions.at(layer)
    with torch.no_grad():
        before = [float(study.style(study.model(**inputs))) for inputs in study.prompts]

    def effect(plan: Plan) -> list[float]:
        with torch.no_grad(), plan.on(study.model):
            return [float(study.style(study.model(**inputs))) - b for inputs, b in zip(study.prompts, before, strict=True)]

    whole = effect(direction.add(strength))
    mean = sum(whole) / len(whole)
    found = []
    for share in SHARES:
        own = direction.sparse(share)
        found.append({
            "share": share, "entries": int((own.vector != 0).sum()), "energy": float((own.vector.norm() / direction.vector.norm()) ** 2),
            "kept": bootstrap([value / mean for value in effect(own.add(strength))]).to_dict(),
        })  # fmt: skip
    return found


def written(study: Study, layer: int) -> dict[str, Any]:
    """The share of texts that a judge, which knows tokens alone, takes for plays; and an example of each way."""
    trained, tested = (
        [write_all(study.model, grouped(study.tokenizer, texts), study.tokens) for texts in own] for own in (study.found, study.held)
    )
    judge = Judge(study.model.config.vocab_size, *trained)
    prompts = grouped(study.tokenizer, study.texts)
    rows = []
    for strength, frozen in ((0.0, False), *((strength, frozen) for strength in IN_TEXTS for frozen in (False, True))):
        plan = study.directions.at(layer).add(strength) if strength else None
        texts = write_all(study.model, prompts, study.tokens, plan, frozen=frozen)
        verdicts = judge.plays(texts)
        example = study.tokenizer.decode(torch.cat([prompts[-1][0], texts[-len(prompts[-1])]]).tolist(), skip_special_tokens=True)
        rows.append({"strength": strength, "frozen": frozen, "plays": verdicts, "share": bootstrap(verdicts).to_dict(), "example": example})
    lost = {}
    for strength in IN_TEXTS:
        free, held = (next(r["plays"] for r in rows if (r["strength"], r["frozen"]) == (strength, case)) for case in (False, True))
        lost[str(strength)] = bootstrap([a - b for a, b in zip(free, held, strict=True)]).to_dict()
    return {"accuracy": judge.accuracy(*tested), "layer": layer, "rows": rows, "lost": lost}


def spoken(value: dict[str, Any], digits: int = 2, percent: bool = False) -> str:
    mean, low, high = (value[key] for key in ("mean", "low", "high"))
    if percent:
        return f"{100 * mean:.1f} %" if low is None else f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{mean:.{digits}f}" if low is None else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def tables(report: dict[str, Any]) -> dict[str, str]:
    """By the mark in README.md."""
    rows = ["| added after block | effect on the style logit | patterns frozen | values frozen | both frozen |", "|---|---|---|---|---|"]
    for cell in report["layers"]:
        kept = [spoken(cell["kept"][case], percent=True) for case in ("pattern", "values", "both")]
        rows.append(f"| {cell['layer']} | {spoken(cell['effect'])} | {' | '.join(kept)} |")
    divergences = [
        "| added after block | KL steered, nats | KL steered, patterns frozen | KL between the two | the same, random direction |"
    ]
    divergences.append("|---|---|---|---|---|")
    for own, other in zip(report["moved"], report["random"], strict=True):
        cells = [spoken(own["steered"]), spoken(own["frozen"]), spoken(own["apart"], 3)]
        divergences.append(f"| {own['layer']} | {' | '.join(cells)} | {spoken(other['steered'])}; {spoken(other['apart'], 3)} |")
    sparse = ["| entries of 256 | share of the squared length | effect kept |", "|---|---|---|"]
    sparse += [f"| {row['entries']} | {100 * row['energy']:.0f} % | {spoken(row['kept'], percent=True)} |" for row in report["sparsity"]]
    facts = report["written"]
    texts = ["| strength | patterns | taken for plays | an example |", "|---|---|---|---|"]
    for row in facts["rows"]:
        example = repr(row["example"]).replace("|", "\\|")
        texts.append(
            f"| {row['strength']:g} | {'frozen' if row['frozen'] else 'free'} | {spoken(row['share'], percent=True)} | `{example}` |"
        )
    losses = "; ".join(f"at strength {name}: {spoken(value, percent=True)}" for name, value in facts["lost"].items())
    texts += [
        "", f"The judge is right on {100 * facts['accuracy']:.0f} % of texts that follow held-out prompts of either style. Freezing "
        f"takes away, of all texts, {losses} (paired).",
    ]  # fmt: skip
    return {"layers": "\n".join(rows), "divergences": "\n".join(divergences), "sparsity": "\n".join(sparse), "texts": "\n".join(texts)}


def figure(report: dict[str, Any]) -> str:
    layers = [cell["layer"] for cell in report["layers"]]
    lines = []
    for case, name in (("pattern", "patterns frozen"), ("values", "values frozen"), ("both", "both frozen")):
        own = [cell["kept"][case] for cell in report["layers"]]
        lines.append(Line(name, layers, *([100 * value[key] for value in own] for key in ("mean", "low", "high"))))
    lowest = min(0.0, *(min(line.lows) for line in lines))  # type: ignore[type-var]
    highest = max(110.0, *(max(line.highs) for line in lines))  # type: ignore[type-var]
    left = Panel(
        "Effect of steering that is kept", "added after block", "% of the effect", lines, lowest, highest, decades=False, ticks=layers
    )
    rows = report["sparsity"]
    xs = list(range(len(rows)))
    one = Line("kept", xs, *([100 * row["kept"][key] for row in rows] for key in ("mean", "low", "high")))
    two = Line("squared length", xs, [100 * row["energy"] for row in rows])
    title = f"Sparse vectors: {', '.join(str(row['entries']) for row in rows)} entries"
    right = Panel(title, "step to the right: fewer entries", "%", [one, two], 0.0, max(110.0, max(one.highs)), decades=False)  # type: ignore[type-var]
    return draw([left, right])


def main() -> None:
    parser = argparse.ArgumentParser(description="Does steering act through QK or OV?")
    parser.add_argument("--quick", action="store_true", help="a few prompts and tokens, to see that it runs")
    parser.add_argument("--write", action="store_true", help="only write tables and figure anew from results.json")
    parser.add_argument("--out", type=Path, default=HERE, help="where results, tables and figure go (default: beside this file)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.write:
        prompts, tokens = (4, 2) if arguments.quick else (40, 16)
        log, study = Log(out / "cells.jsonl"), Study(prompts, tokens)
        size = f"{prompts} prompts"
        layers = range(2) if arguments.quick else range(len(study.directions.blocks) - 1)
        report = {
            "layers": [log.cell(f"layer {layer}, {size}", partial(by_layer, study, layer, STRENGTH)) for layer in layers],
            "moved": [log.cell(f"moved {layer}, {size}", partial(moved, study, layer, STRENGTH, drawn=False)) for layer in layers],
            "random": [log.cell(f"random {layer}, {size}", partial(moved, study, layer, STRENGTH, drawn=True)) for layer in layers],
            "sparsity": log.cell(f"sparsity, {size}", partial(sparsity, study, MIDDLE, STRENGTH)),
            "written": log.cell(f"written, {size}, {tokens} tokens", partial(written, study, MIDDLE)),
            "marks": [[study.tokenizer.decode([int(i)]) for i in own] for own in study.marks],
            "made": {"quick": arguments.quick, "torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()},
        }
        (out / "results.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (out / "cells.jsonl").unlink()
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (out / "figure.svg").write_text(figure(report), encoding="utf-8")
    found = tables(report)
    readme = out / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        for mark, table in found.items():
            text = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m, own=table: f"{m[1]}{own}\n{m[2]}", text, flags=re.S)
        readme.write_text(text, encoding="utf-8")
    print("\n\n".join(found.values()))


if __name__ == "__main__":
    main()
