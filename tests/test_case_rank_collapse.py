"""The study of rank collapse runs, goes on where it was cut off, and its README says what its results say."""

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

STUDY = Path(__file__).parents[1] / "case_studies" / "rank_collapse"
FIGURES = ("decay.svg", "gradients.svg", "normalisers.svg", "surgery.svg")
KEPT = [0.125] * 60


def run(*arguments: object) -> None:
    done = subprocess.run([sys.executable, STUDY / "run.py", *map(str, arguments)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run of all parts, in a folder where an earlier one was cut off while it wrote its second cell."""
    out = tmp_path_factory.mktemp("rank_collapse")
    cell = {"cell": "a: uniform causal attention, 60 layers", "seconds": 1.0, "found": KEPT}
    (out / "cells.jsonl").write_text(json.dumps(cell) + '\n{"cell": "a: cubic', encoding="utf-8")
    run("--quick", "--out", out)
    return out


@pytest.fixture(scope="module")
def results(quick: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((quick / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_all_parts_tables_and_figures_are_written(quick: Path, results: dict[str, Any]) -> None:
    assert {"a", "b", "c", "d", "made"} == set(results)
    assert "nan" not in (quick / "results.md").read_text(encoding="utf-8").lower()
    for name in FIGURES:
        assert ElementTree.parse(quick / name).getroot().tag.endswith("svg")


@pytest.mark.slow
def test_a_run_that_was_cut_off_keeps_its_finished_cells(quick: Path, results: dict[str, Any]) -> None:
    assert results["a"]["uniform_causal"] == KEPT
    assert len(results["a"]["cubic"]) == 2
    assert not (quick / "cells.jsonl").exists()


@pytest.mark.slow
def test_attention_alone_loses_more_than_attention_with_skips(results: dict[str, Any]) -> None:
    last = {name: [seed["frobenius"][3] for seed in seeds] for name, seeds in results["a"]["decay"]["bidirectional"].items()}
    assert max(last["attention alone"]) < -4 < -0.5 < min(last["with skips"])


@pytest.mark.slow
def test_the_health_report_names_the_collapse_of_a_model_without_skips_and_none_in_the_intact_one(results: dict[str, Any]) -> None:
    cuts = results["d"]["embedded:vit"]
    named = {cut: {row["layer"] for row in cuts[cut]["report"]["findings"] if row["rule"] == "token-collapse"} for cut in cuts}
    assert named["intact"] == set()
    assert named["without attention skips"] == {2, 3}


@pytest.mark.slow
def test_the_report_measures_the_residual_that_the_study_measures(results: dict[str, Any]) -> None:
    for cuts in results["d"].values():
        for row in cuts.values():
            for own, reported in zip(row["residual"][1:], row["report"]["residual"], strict=True):
                assert reported == pytest.approx(own, rel=1e-6, abs=1e-14)


@pytest.mark.slow
def test_the_models_are_whole_again_after_the_surgery(results: dict[str, Any]) -> None:
    cuts = results["d"]["embedded:vit"]
    assert cuts["intact"]["accuracy"] == 1.0
    assert cuts["without attention skips"]["residual"][0] == cuts["intact"]["residual"][0]


def test_readme_and_tables_say_what_the_results_say(tmp_path: Path) -> None:
    for name in ("README.md", "results.json"):
        shutil.copy(STUDY / name, tmp_path / name)
    run("--part", "", "--out", tmp_path)
    for name in ("README.md", "results.md", *FIGURES):
        assert (tmp_path / name).read_text(encoding="utf-8") == (STUDY / name).read_text(encoding="utf-8"), f"{name} is not of results.json"
    marks = re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", (STUDY / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(marks) >= 8
    assert all(text.strip() for _, text in marks), "a place in the README that the script did not fill"
