from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headscope.app.report.build import Report, build_report
from headscope.app.report.measures import Settings
from headscope.app.report.sidecar import run_digest
from headscope.app.report.summary import summarise
from headscope.probe import load
from tests.app.tiny import HOSTILE, save_tiny

QUICK = Settings(draws=4, resamples=100, close=1, heads=3, together=2)
TEXTS = ("a" + "b".join(HOSTILE), "the cat sat on the mat", "one two three four\x00five")


@dataclass(frozen=True)
class Small:
    """A random Llama of 2 layers × 2 heads, with its folder."""

    folder: Path
    model: Any
    tokenizer: Any


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = save_tiny(tmp_path_factory.mktemp("small"), layers=2, heads=2, groups=1)
    return Small(folder, *load(folder))


@pytest.fixture(scope="session")
def report(small: Small) -> Report:
    """Three hostile prompts on the small model."""
    command = "headscope report --text 'a\nb'"
    return build_report(small.model, small.tokenizer, TEXTS, settings=QUICK, name=str(small.folder), command=command)


@pytest.fixture
def grown(report: Report) -> Callable[[int, int], Report]:
    """A report of so many examples of so many tokens each, made of one that was measured."""

    def grow(examples: int, tokens: int) -> Report:
        document = copy.deepcopy(report.document)
        first = document["examples"][1]
        records = []
        for place in range(examples):
            record = copy.deepcopy(first)
            record["id"] = f"example {place}"
            record["tokens"] = [f" tok{spot % 10}e" for spot in range(tokens)]
            record["relevance"] = [round((-1) ** spot * (spot % 7 + place) / 7, 9) for spot in range(tokens)]
            record["levels"] = [spot % 19 - 9 for spot in range(tokens)]
            record["run_sha256"] = run_digest(record)
            records.append(record)
        names = [(site, layer, head) for site, layer, levels in document["heads"]["map"] for head in range(len(levels))]
        scope = document["verdict"]["scope"]
        document |= summarise(records, QUICK, names, [0.5] * examples)
        document["verdict"]["scope"] = scope
        document["examples"] = records
        document["data"] |= {"n": examples, "total": examples}
        document["shown"] |= {"examples": [record["id"] for record in records], "n": examples, "of": examples}
        return Report(document)

    return grow
