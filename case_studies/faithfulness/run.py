"""How faithful are attributions on three small trained models? Writes results.json, results.md and figure.svg.

python case_studies/faithfulness/run.py [--data FOLDER] [--quick] [--out FOLDER] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from agreement import agree
from figure import draw
from published import RECALLED, compare
from subjects import Subject, digits, film_reviews, folder_for_work, language

from headscope.probe.attribution.faithfulness import measure_faithfulness
from headscope.probe.attribution.interval import bootstrap
from headscope.probe.attribution.measured import POSITION, RANDOM, Faithfulness
from headscope.probe.attribution.sanity import randomise_layers
from headscope.probe.attribution.value import Value

HEAD_METHODS = ("attnlrp", "cp-lrp", "gim", "gradient-x-input")
CHECKED = ("attnlrp", "cp-lrp", "gim", "gradient-x-input", "integrated-gradients", "shapley-sampling", "rollout", "chefer", "attention")
SEED = 0


def told(what: str) -> Callable[[int, int], None]:
    """Progress on standard error."""

    def tell(done: int, total: int) -> None:
        if done == total or done % 20 == 0:
            sys.stderr.write(f"\r{what}: {done} of {total}{chr(10) if done == total else ''}")
            sys.stderr.flush()

    return tell


def measure(subject: Subject, work: Path) -> Faithfulness:
    return measure_faithfulness(
        subject.model, subject.samples, subject.methods, tokenizer=subject.tokenizer, removal=subject.removals, units=subject.units,
        steps=subject.steps, subsets=0, draws=3, seed=SEED, path=work / f"{subject.name.replace(':', '-')}.jsonl",
        progress=told(subject.name),
    )  # fmt: skip


def measure_heads(subject: Subject, work: Path) -> Faithfulness:
    return measure_faithfulness(
        subject.model, subject.samples, {name: name for name in HEAD_METHODS}, removal="heads", steps=subject.steps, subsets=0, draws=3,
        seed=SEED, path=work / f"{subject.name.replace(':', '-')}-heads.jsonl", progress=told(f"{subject.name}, heads"),
    )  # fmt: skip


def measure_agreement(subject: Subject) -> dict[str, Any] | None:
    """Per method, with the words that people marked, over the reviews whose label the model gets right; None where it gets none."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in [*subject.methods, POSITION]}
    shares, tell = [], told(f"{subject.name}, marked words")
    for place, (sample, review) in enumerate(zip(subject.samples, subject.reviews, strict=True)):
        value = Value(subject.model, sample, tokenizer=subject.tokenizer)
        words = sample["input_ids"].shape[1] - 2
        marked = torch.tensor([word in review.marked for word in range(words)])
        tell(place + 1, len(subject.samples))
        if value.target.ids != (review.label,) or not marked.any():
            continue
        shares.append(float(marked.double().mean()))
        for name in rows:
            if name == POSITION:
                relevance = torch.arange(words).double()
            else:
                whole = subject.methods[name](subject.model, sample, value.target).inputs["input_ids"]
                relevance = whole[0, 1:-1].double()
            found = agree(relevance, marked, subject.marked_share, SEED + place)
            rows[name].append((found.average_precision, found.f1))
    if not shares:
        return None
    table = {
        name: {"average_precision": bootstrap([a for a, _ in row]).to_dict(), "f1": bootstrap([b for _, b in row]).to_dict()}
        for name, row in rows.items()
    }
    return {"reviews": len(shares), "marked": sum(shares) / len(shares), "share": subject.marked_share, "methods": table}


def check_randomised(subject: Subject, count: int) -> dict[str, Any]:
    """Mean rank correlation with the trained model's relevance: with a new output layer, and with all weights drawn anew."""
    found, tell = {}, told(f"{subject.name}, weights drawn anew")
    for place, name in enumerate(CHECKED):
        runs = [randomise_layers(subject.model, sample, None, subject.methods[name], seed=SEED).steps for sample in subject.samples[:count]]
        first = [steps[0].spearman for steps in runs if steps[0].spearman is not None]
        last = [steps[-1].spearman for steps in runs if steps[-1].spearman is not None]
        found[name] = {"output": sum(first) / len(first) if first else None, "all": sum(last) / len(last) if last else None}
        tell(place + 1, len(CHECKED))
    return {"samples": count, "methods": found}


def spoken(interval: dict[str, Any] | None, digits: int = 2) -> str:
    if interval is None:
        return "–"
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    return f"{mean:.{digits}f}" if low is None else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table_of(found: Faithfulness, removal: str) -> list[str]:
    """A markdown table, the largest area first."""
    rows = sorted((row for row in found.summary() if row["removal"] == removal), key=lambda row: -row["delta_area"]["mean"])
    lines = ["| method | ΔA | minus AttnLRP's | comprehensiveness | sufficiency | ms |", "|---|---|---|---|---|---|"]
    for row in rows:
        name = row["method"]
        difference = None if name == "attnlrp" else found.difference("delta_area", name, "attnlrp", removal)
        cells = [
            name, spoken(row["delta_area"]), "–" if difference is None else spoken(difference.to_dict()),
            spoken(row["comprehensiveness"], 3),
            spoken(row["sufficiency"], 3), "–" if row["seconds"] is None else f"{1000 * row['seconds']:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sections(report: dict[str, Any], measured: dict[str, Faithfulness], heads: dict[str, Faithfulness]) -> list[str]:
    lines = []
    for name, found in measured.items():
        lines += [f"## {name}", "", report["subjects"][name]["what"] + ".", ""]
        for removal in found.removals:
            band = found.band("delta_area", removal)
            lines += [
                f"Removal: {removal}. Three random orders: ΔA {band[0]:.2f} to {band[1]:.2f}." if band else f"Removal: {removal}.",
                "",
            ]
            lines += [*table_of(found, removal), ""]
        lines += ["Heads set to zero in the order of their relevance:", "", *table_of(heads[name], "heads"), ""]
    if (agreement := report.get("agreement")) is not None:
        lines += [
            "## Words that people marked", "",
            f"{agreement['reviews']} reviews whose label the model gets right; {agreement['marked']:.1%} of their words are marked, which "
            f"is about what a random order scores on average precision. F1 is of the {agreement['share']:.1%} most relevant words, the "
            "share that is marked in the reviews that were not drawn.",
            "", "| method | average precision | F1 |", "|---|---|---|",
        ]  # fmt: skip
        order = sorted(agreement["methods"].items(), key=lambda row: -row[1]["average_precision"]["mean"])
        lines += [f"| {name} | {spoken(row['average_precision'], 3)} | {spoken(row['f1'], 3)} |" for name, row in order] + [""]
    checked = report["randomised"]
    lines += [
        "## Weights drawn anew", "",
        f"Mean rank correlation with the relevance of the trained `embedded:vit`, over {checked['samples']} digits and all pixels.", "",
        "| method | output layer anew | all weights anew |", "|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {name} | {_number(row['output'])} | {_number(row['all'])} |" for name, row in checked["methods"].items()] + [""]
    lines += [
        "## The published order", "",
        "ΔA by the AttnLRP paper's table 1 (recalled, not compared with the paper) and here; the models differ, so only the order can be "
        "compared.", "", "| method | " + " | ".join(f"{name}: paper, here" for name in report["published"]) + " |",
        "|---|" + "---|" * len(report["published"]),
    ]  # fmt: skip
    for method in RECALLED:
        cells = [f"{row['recalled'][method]:.2f}, {row['ours'][method]:.2f}" for row in report["published"].values()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines.append("")
    for name, row in report["published"].items():
        lines.append(
            f"- {name}: rank correlation {row['spearman']:.2f}; {row['same']} of {row['pairs']} pairs in the same order, and "
            f"{row['resolved_same']} of the {row['resolved']} pairs that differ here by more than chance."
        )
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the faithfulness of attributions on three small trained models")
    parser.add_argument("--data", type=Path, help="folder that holds wikitext-2-test.txt and movies/ (ERASER), at any depth")
    parser.add_argument("--quick", action="store_true", help="a few samples only, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of the trained classifier and finished entries, from which a second run goes on")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick and args.out == Path(__file__).parent:
        parser.error("--quick gives no result worth keeping: give --out another folder")
    torch.set_num_threads(args.threads)
    began, work = time.monotonic(), folder_for_work(args.work)
    wanted = [digits(args.quick), language(args.data, args.quick, SEED), film_reviews(args.data, work, args.quick, SEED)]
    subjects = [subject for subject in wanted if subject is not None]
    measured = {subject.name: measure(subject, work) for subject in subjects}
    heads = {subject.name: measure_heads(subject, work) for subject in subjects}
    report: dict[str, Any] = {
        "made": {"torch": torch.__version__, "python": platform.python_version(), "threads": args.threads, "cores": os.cpu_count(),
                 "seed": SEED},
        "subjects": {
            subject.name: {
                "what": subject.what, "settings": dict(measured[subject.name].settings),
                "inputs": measured[subject.name].to_dict()["summary"],
                "random_band": {removal: measured[subject.name].band("delta_area", removal) for removal in subject.removals},
                "heads": heads[subject.name].to_dict()["summary"],
            }
            for subject in subjects
        },
        "published": {name: compare(name, found) for name, found in measured.items()},
        "randomised": check_randomised(subjects[0], 2 if args.quick else 10),
    }  # fmt: skip
    if subjects[-1].reviews:
        report["classifier"] = json.loads((work / "reviews" / "training.json").read_text(encoding="utf-8"))
        report["agreement"] = measure_agreement(subjects[-1])
    report["made"]["seconds"] = round(time.monotonic() - began, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = [
        "# Results",
        "",
        "Written by `run.py`; means with 95 % bootstrap intervals over samples.",
        "",
        *sections(report, measured, heads),
    ]
    (args.out / "results.md").write_text("\n".join(text), encoding="utf-8")
    panels = []
    for name, found in measured.items():
        summary = [row for row in found.summary() if row["removal"] == found.removals[0] and row["method"] != RANDOM]
        rows = [(row["method"], *(row["delta_area"][end] for end in ("mean", "low", "high"))) for row in summary]
        panels.append((f"{name}: ΔA, removal {found.removals[0]}; grey: random orders", rows, found.band("delta_area") or (0.0, 0.0)))
    (args.out / "figure.svg").write_text(draw(panels), encoding="utf-8")
    print(f"wrote results.json, results.md and figure.svg to {args.out}")


if __name__ == "__main__":
    main()
