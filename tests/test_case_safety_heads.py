"""The study of safety heads runs, and its README says what its results say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

STUDY = Path(__file__).parents[1] / "case_studies" / "safety_heads"


def run(*arguments: object) -> None:
    done = subprocess.run([sys.executable, STUDY / "run.py", *map(str, arguments)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_quick_run_finds_the_planted_head(tmp_path: Path) -> None:
    run("--quick", "--out", tmp_path)
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    (cell,) = found["planted"]
    assert cell["ranks"]["ships, query"]["triggered"]["rank"] == 1
    assert cell["removed"]["first by Ships"]["after"] < cell["removed"]["another of the layer"]["after"]
    assert ElementTree.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")


def test_the_planted_head_ranks_first_and_its_removal_is_seen() -> None:
    found = json.loads((STUDY / "results.json").read_text())
    assert not found["made"]["quick"]
    assert len(found["planted"]) == 3
    for cell in found["planted"]:
        assert cell["refusals"]["held out"]["triggered"] >= 0.9
        for way in ("ships, query", "ships, value", "sahara, directions"):
            assert cell["ranks"][way]["triggered"]["rank"] == 1, way
        assert cell["removed"]["first by Ships"]["before"] >= 0.8
        assert cell["removed"]["first by Ships"]["after"] == 0


def test_readme_and_figure_say_what_the_results_say(tmp_path: Path) -> None:
    for name in ("README.md", "results.json"):
        shutil.copy(STUDY / name, tmp_path / name)
    run("--write", "--out", tmp_path)
    for name in ("README.md", "figure.svg"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (STUDY / name).read_text(encoding="utf-8"), f"{name} is not of results.json"
