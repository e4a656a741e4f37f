"""The study of steering runs, goes on where it was cut off, and its README says what its results say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("sklearn")

STUDY = Path(__file__).parents[1] / "case_studies" / "steering"
INTERVAL = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}


def run(*arguments: object) -> None:
    done = subprocess.run([sys.executable, STUDY / "run.py", *map(str, arguments)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_quick_run_measures_all_and_keeps_what_was_finished_before(tmp_path: Path) -> None:
    cell = {
        "layer": 0,
        "strength": 1.0,
        "effect": INTERVAL,
        "kept": dict.fromkeys(("pattern", "values", "both"), INTERVAL),
        "separation": 1.0,
    }
    (tmp_path / "cells.jsonl").write_text(json.dumps({"cell": "layer 0, 4 prompts", "seconds": 1.0, "found": cell}) + '\n{"cell": "lay')
    run("--quick", "--out", tmp_path)
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert found["layers"][0] == cell
    assert found["layers"][1]["effect"]["mean"] > 0
    assert [row["entries"] for row in found["sparsity"]] == [256, 128, 64, 26, 13, 5, 3]
    assert found["sparsity"][0]["kept"]["mean"] == pytest.approx(1)
    assert ElementTree.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")
    assert not (tmp_path / "cells.jsonl").exists()


def test_readme_and_figure_say_what_the_results_say(tmp_path: Path) -> None:
    for name in ("README.md", "results.json"):
        shutil.copy(STUDY / name, tmp_path / name)
    run("--write", "--out", tmp_path)
    for name in ("README.md", "figure.svg"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (STUDY / name).read_text(encoding="utf-8"), f"{name} is not of results.json"
    marks = re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", (STUDY / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(marks) == 4
    assert all(text.strip() for _, text in marks), "a place in the README that the script did not fill"


def test_the_sentences_of_the_readme_hold_in_the_results() -> None:
    found = json.loads((STUDY / "results.json").read_text())
    assert not found["made"]["quick"]
    assert all(0.96 <= cell["kept"]["pattern"]["mean"] < 1 for cell in found["layers"])
    assert found["layers"][0]["kept"]["values"]["mean"] < 0.3
    assert all(cell["kept"]["both"]["mean"] > 0.7 for cell in found["layers"][2:])
    lost = [1 - cell["frozen"]["mean"] / cell["steered"]["mean"] for cell in found["moved"]]
    assert 0.11 < min(lost) < max(lost) < 0.18
    tenth = next(row for row in found["sparsity"] if row["share"] == 0.1)
    assert 0.4 < tenth["kept"]["mean"] < 0.6
    assert tenth["kept"]["mean"] == pytest.approx(tenth["energy"], abs=0.1)
