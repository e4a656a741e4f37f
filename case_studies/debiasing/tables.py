"""The study's numbers with their intervals, and the table of results.md, from results.json."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sentences import stereotype

from headscope.probe.attribution.interval import Interval, bootstrap

Cells = dict[str, Any]
INTERNALS = ("spectrum", "hidden", "spectrum elsewhere", "hidden elsewhere")


def by_word(seeds: Sequence[Cells], part: str) -> Interval:
    """|log p(he) − log p(she)|: mean over frames and seeds of each occupation, interval over occupations."""
    values: dict[str, list[float]] = {}
    for cell in seeds:
        for word, row in cell[part].items():
            values.setdefault(word, []).extend(map(abs, row))
    return bootstrap([statistics.fmean(row) for row in values.values()])


def gap(seeds: Sequence[Cells], part: str) -> Interval:
    """How much more "he" is favoured after men's occupations than after women's; interval over occupations, resampled on each side."""
    signed: dict[str, list[float]] = {}
    for cell in seeds:
        for word, row in cell[part].items():
            signed.setdefault(word, []).extend(row)
    means = {word: statistics.fmean(row) for word, row in signed.items()}
    sides = [[value for word, value in means.items() if stereotype(word) == pronoun] for pronoun in ("he", "she")]
    he, she = (bootstrap(values) for values in sides)
    mean = he.mean - she.mean
    if he.low is None or he.high is None or she.low is None or she.high is None:
        return Interval(mean, None, None, he.n + she.n)
    low = ((he.mean - he.low) ** 2 + (she.high - she.mean) ** 2) ** 0.5
    high = ((he.high - he.mean) ** 2 + (she.mean - she.low) ** 2) ** 0.5
    return Interval(mean, mean - low, mean + high, he.n + she.n)


def by_sentence(seeds: Sequence[Cells], part: str, value: Callable[[float], float] = float) -> Interval:
    """Mean over seeds of each sentence, interval over sentences."""
    return bootstrap([statistics.fmean(map(value, row)) for row in zip(*(cell[part] for cell in seeds), strict=True)])


def cost(seeds: Sequence[Cells], planted: Sequence[Cells]) -> Interval:
    """Nats a token more than the planted model on unread text, interval over texts."""
    more = [[a - b for a, b in zip(cell["text"], base["text"], strict=True)] for cell, base in zip(seeds, planted, strict=True)]
    return bootstrap([statistics.fmean(row) for row in zip(*more, strict=True)])


def summary(report: dict[str, Any]) -> dict[str, dict[str, Interval | list[float]]]:
    """For each arm its measures; internals as a share of the planted model's, one for each seed."""
    seeds = report["seeds"]
    planted = [cells["planted"] for cells in seeds]
    found: dict[str, dict[str, Interval | list[float]]] = {}
    for arm in seeds[0]:
        cells = [row[arm] for row in seeds]
        found[arm] = {
            "seen": by_word(cells, "seen"), "unseen": by_word(cells, "unseen"),
            "gap seen": gap(cells, "seen"), "gap unseen": gap(cells, "unseen"),
            "anchors": by_sentence(cells, "anchors"), "new anchors": by_sentence(cells, "new anchors"),
            "wino odds": by_sentence(cells, "wino odds", abs), "wino preference": by_sentence(cells, "wino preference"),
            "cost": cost(cells, planted),
            **{name: [a["internals"][name] / b["internals"][name] for a, b in zip(cells, planted, strict=True)] for name in INTERNALS},
        }  # fmt: skip
    return found


def spoken(value: Interval | list[float], digits: int = 2) -> str:
    if isinstance(value, list):
        return f"{statistics.fmean(value):.2g}" + (f" ({min(value):.2g} to {max(value):.2g})" if len(value) > 1 else "")
    ends = "" if value.low is None else f" [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return f"{value.mean:.{digits}f}{ends}".replace("-", "−")


TABLES = {
    "What the model says: \\|log p(he) − log p(she)\\|, nats": ("seen", "unseen", "wino odds"),
    "The stereotype alone, nats: how much more \"he\" is favoured after men's occupations": ("gap seen", "gap unseen", "wino preference"),
    "What happens inside: distance of counterfactuals, as a share of the planted model's (range over seeds)": INTERNALS,
    "What it costs: log-odds of the right pronoun after words of one gender (higher is better), nats a token on other text":
        ("anchors", "new anchors", "cost"),
}  # fmt: skip
HEADS = {
    "seen": "trained occupations", "unseen": "unseen occupations", "gap seen": "trained occupations", "gap unseen": "unseen occupations",
    "wino odds": "{}", "wino preference": "{}: sentence that fits, less the other", "spectrum": "spectrum, layers 2–4",
    "hidden": "hidden, layers 2–4", "spectrum elsewhere": "spectrum, other layers", "hidden elsewhere": "hidden, other layers",
    "anchors": "king, queen …", "new anchors": "prince, princess … (unseen)", "cost": "other text",
}  # fmt: skip


def write_tables(report: dict[str, Any], out: Path) -> None:
    """results.md, and the same tables between the marks of a README.md beside it."""
    found, lines = summary(report), []
    for title, names in TABLES.items():
        heads = [HEADS[name].format(report["sentences"]) for name in names]
        lines += [f"**{title}**", "", f"| arm | {' | '.join(heads)} |", "|---|" + "---|" * len(names)]
        for arm, row in found.items():
            lines.append(f"| {arm} | " + " | ".join(spoken(row[name], 3 if name == "cost" else 2) for name in names) + " |")
        lines.append("")
    settings = report["made"]["settings"]
    lines += [f"Seeds: {settings['seeds']}; steps: {settings['planting']} to plant, {settings['debiasing']} to debias; "
              f"measured on {settings['pairs']} pairs of sentences ({report['sentences']}).", ""]  # fmt: skip
    text = "\n".join(lines)
    (out / "results.md").write_text("# Results\n\n" + text, encoding="utf-8")
    readme = out / "README.md"
    if readme.is_file():
        written = readme.read_text(encoding="utf-8")
        filled = re.sub(r"(<!-- results -->\n).*?(<!-- /results -->)", lambda mark: mark[1] + text + mark[2], written, flags=re.DOTALL)
        readme.write_text(filled, encoding="utf-8")
