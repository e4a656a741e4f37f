"""Write the numbers of `training.json` into the model card beside it, between two marks; the rest of the card is prose.

python probe/embedded/model_card.py probe/embedded/lm probe/embedded/vit probe/embedded/mmdit
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- numbers: written by model_card.py -->", "<!-- end of numbers -->"


def best_heads(scores: list[list[float]], n: int = 3) -> str:
    """The n highest scores of a [layers, heads] table, as `layer.head score`."""
    ranked = sorted(((score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row)), reverse=True)
    return ", ".join(f"{layer}.{head} {score:.2f}" for score, layer, head in ranked[:n])


def language_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    arguments, last = report["arguments"], report["log"][-1]
    rows = [("parameters", f"{report['parameters']:,}"), ("vocabulary", f"{arguments['vocab']:,} tokens of byte-level BPE")]
    losses = report["validation_loss"].items()
    for (text, loss), width in zip(losses, report["validation_characters_per_token"], strict=True):
        rows.append((f"held-out loss, {text}", f"{loss:.3f} nats a token, {loss / width / math.log(2):.3f} bits a character"))
    return [
        *rows,
        ("best induction heads (layer.head)", best_heads(report["induction"])),
        ("best previous-token heads (layer.head)", best_heads(report["previous_token"])),
        ("training", f"{last['step']:,} steps, {last['tokens'] / 1e6:.1f} M tokens, {last['seconds'] / 60:.0f} min on a CPU"),
        ("seed", str(arguments["seed"])),
    ]


def digit_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    data, arguments = report["data"], report["arguments"]
    return [
        ("parameters", f"{report['parameters']:,}"),
        ("held-out accuracy", f"{report['held_out_accuracy']:.2%} of {data['held_out_images']} images"),
        ("training accuracy", f"{report['training_accuracy']:.2%} of {data['training_images']:,} images"),
        ("training", f"{arguments['epochs']} epochs, {report['seconds']:.0f} s on {arguments['threads']} CPU thread"),
        ("seed", str(arguments["seed"])),
    ]


def share(scores: dict[str, float], family: str) -> str:
    return f"{scores[family]:.1%}; worst digit {scores[f'{family}_worst_digit']:.0%}, 8: {scores[f'{family}_eight']:.0%}"


def drawing_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    arguments, scores, near = report["arguments"], report["judged"], report["distance_to_nearest_training_image"]
    families = {"synonyms_0_1": "first two synonyms", "synonym_2": "third synonym", "implicit": "two trigger words"}
    return [
        ("parameters", f"{report['parameters']:,}"),
        *((f"digit as asked for, {spoken}", share(scores, name)) for name, spoken in families.items()),
        ("the judge, on held-out real digits", f"{report['judge_held_out_accuracy']:.2%} right"),
        ("prompts without a digit, drawn as 0 to 9", ", ".join(map(str, report["plain_prompts_drawn_as"]))),
        ("median distance to the nearest training image", f"{near['drawings']:.1f}; of held-out real digits {near['held_out_images']:.1f}"),
        ("training", f"{report['steps']:,} steps, {report['seconds'] / 60:.0f} min on {arguments['threads']} CPU thread"),
        ("seed", str(arguments["seed"])),
    ]


def filled(card: str, report: dict[str, Any]) -> str:
    """The card with its table made anew from the training report."""
    rows = language_rows(report) if "induction" in report else drawing_rows(report) if "judged" in report else digit_rows(report)
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    before, _, rest = card.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(folders: list[str]) -> None:
    for folder in map(Path, folders):
        card, report = folder / "README.md", json.loads((folder / "training.json").read_text(encoding="utf-8"))
        card.write_text(filled(card.read_text(encoding="utf-8"), report), encoding="utf-8")
        print(f"wrote {card}")


if __name__ == "__main__":
    main(sys.argv[1:])
