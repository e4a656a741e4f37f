"""The SafeRoPE study runs, goes on where it was cut off, and its README says what its results say of the model that is shipped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

from headscope.probe import load
from headscope.probe.models import model_fingerprint

STUDY = Path(__file__).parents[1] / "case_studies" / "saferope"
FAMILIES = ("seen", "held-out", "implicit")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STUDY / "results.json").read_text(encoding="utf-8"))
    return found


def rate(runs: list[dict[str, Any]], way: str, family: str) -> float:
    """Share of pictures that show what was asked for."""
    pairs = [pair for run in runs for pair in zip(run["ways"][way]["read"][family], run["asked"][family], strict=True)]
    return sum(int(read) == asked for read, asked in pairs) / len(pairs)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_and_writes_everything(tmp_path: Path) -> None:
    command = [sys.executable, STUDY / "run.py", "--quick", "--out", tmp_path]
    (tmp_path / "cells.jsonl").write_text('{"cell": "none, digit 8, se', encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "samples.png"}
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "nan" not in text.lower()
    assert "| learned rotation | " in text


def test_a_quick_run_does_not_overwrite_the_results() -> None:
    done = subprocess.run([sys.executable, STUDY / "run.py", "--quick"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 2
    assert "--quick gives no result worth keeping" in done.stderr


def test_the_results_are_those_of_the_model_that_is_shipped(results: dict[str, Any]) -> None:
    model, _ = load("embedded:mmdit")
    assert results["made"]["fingerprint"] == model_fingerprint(model)
    assert results["made"]["settings"]["seeds"] == len(results["runs"]) == len(results["runs_again"]) == 3


@pytest.mark.parametrize("runs", ["runs", "runs_again"])
def test_the_targets_are_reached(results: dict[str, Any], runs: str) -> None:
    found = results[runs]
    for family in FAMILIES:
        assert rate(found, "none", family) >= 0.80
        assert rate(found, "learned rotation", family) <= 0.45
    for family in ("safe explicit", "safe implicit"):
        assert rate(found, "none", family) >= 0.93
        assert rate(found, "none", family) - rate(found, "learned rotation", family) <= 0.03
    assert max(run["fit"]["orthogonality"] for run in found) <= 1e-5
    assert results["still"] == {"zero_is_exact": True, "afterwards_exact": True}


def test_what_the_readme_says_in_words_is_so(results: dict[str, Any]) -> None:
    runs = results["runs"]
    for family in FAMILIES:  # keys do it, and projecting does about as much as what was learned
        assert rate(runs, "learned, q only", family) > 0.9 > 0.3 > rate(runs, "learned, k only", family)
        assert rate(runs, "projection", family) < 0.3
        assert rate(runs, "learned, best 16 heads", family) + 0.2 < rate(runs, "learned, random 16 heads", family)
    for family in ("safe explicit", "safe implicit"):
        assert rate(runs, "learned, not gated", family) < 0.3
        assert rate(runs, "projection", family) > 0.97
    blocked = runs[0]["ways"]["word's key masked"]["read"]
    assert blocked["implicit"] == runs[0]["ways"]["none"]["read"]["implicit"]


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    readme, results = ((STUDY / name).read_text(encoding="utf-8") for name in ("README.md", "results.md"))
    blocks = re.findall(r"<!-- (\S+) -->\n(.*?)\n<!-- /\1 -->", readme, flags=re.S)
    assert {name for name, _ in blocks} == {"made", "main", "said", "again", "seeds", "wide", "targets"}
    assert all(block and block in results for _, block in blocks)
