"""The study of bent maps runs, goes on where it was cut off, and its README says what its results say."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

STUDY = Path(__file__).parents[1] / "case_studies" / "attention_bender"
FIGURES = ("digits.svg", "digits-maps.svg", "videos.svg", "videos-maps.svg")


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"attention_bender_{name}", STUDY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look themselves up
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run in a folder where an earlier one was cut off while it wrote its second cell."""
    out = tmp_path_factory.mktemp("attention_bender")
    marker = {"cell": "digits: deleted, 10", "seconds": 1.0, "found": {}}
    results = json.loads((STUDY / "results.json").read_text(encoding="utf-8"))
    marker["found"] = results["digits"]["deleted"]
    (out / "cells.jsonl").write_text(json.dumps(marker) + '\n{"cell": "digits: unedi', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, STUDY / "run.py", "--quick", "--out", out], capture_output=True, text=True, timeout=110
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STUDY / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_a_quick_run_writes_everything_and_keeps_finished_cells(quick: Path, results: dict[str, Any]) -> None:
    found = json.loads((quick / "results.json").read_text(encoding="utf-8"))
    assert found["digits"]["deleted"] == results["digits"]["deleted"]
    assert {"made", "digits", "videos"} == set(found)
    assert "nan" not in (quick / "results.md").read_text(encoding="utf-8").lower()
    for name in FIGURES:
        assert ElementTree.parse(quick / name).getroot().tag.endswith("svg")
    assert not (quick / "cells.jsonl").exists()


@pytest.mark.slow
def test_a_quick_run_does_not_replace_the_results() -> None:
    done = subprocess.run([sys.executable, STUDY / "run.py", "--quick"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 2
    assert "--quick would replace the study's results" in done.stderr


def test_the_readme_holds_the_tables_of_the_results(results: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(STUDY / "README.md", tmp_path)
    module("tables").write_tables(results, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (STUDY / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == (STUDY / "results.md").read_text(encoding="utf-8")
    assert not re.search(r"<!-- (\S+) -->\n<!-- /\1 -->", (STUDY / "README.md").read_text(encoding="utf-8"))


def test_a_moved_picture_is_moved_as_the_map_and_its_ink_with_it() -> None:
    conditions = module("conditions")
    picture = torch.full((1, 1, 8, 8), -1.0)
    picture[0, 0, 2:4, 1:3] = 1.0
    moved = conditions.moved(picture, "translate-x", 0.25)
    assert torch.equal(moved[0, 0, 2:4, 3:5], torch.ones(2, 2))
    torch.testing.assert_close(conditions.centroids(moved) - conditions.centroids(picture), torch.tensor([[0.0, 2.0]]))
    torch.testing.assert_close(conditions.moved(picture, "flip-h", None), picture.flip(3))
    assert conditions.correlation(picture, picture).item() == pytest.approx(1)
    assert conditions.correlation(picture, -picture).item() == pytest.approx(-1)


def test_every_video_that_can_be_asked_for_is_read_as_itself() -> None:
    video = module("video")
    judge = video.VideoJudge.listed()
    for shape in video.SHAPES:
        for motion in video.MOTIONS:
            for start in video.starts(motion):
                clean = video.clean_video(shape, motion, *start)
                assert float((clean + 1).sum()) == 2 * video.FRAMES * sum(map(sum, video.SHAPES[shape]))  # none of it left the picture
                assert judge.read(clean[None, None]) == [(shape, motion)]


def edited(results: dict[str, Any], model: str, **conditions: Any) -> list[dict[str, Any]]:
    return [row for row in results[model]["edits"] if all(row[name] == value for name, value in conditions.items())]


def mean(row: dict[str, Any], what: str) -> float:
    return float(row[what]["mean"])


def test_digits_do_not_move_with_their_maps(results: dict[str, Any]) -> None:
    rows = edited(results, "digits", word="subject", part="everywhere", spatial=True)
    assert len(rows) == 18
    assert max(abs(mean(row, axis)) for row in rows for axis in ("right", "down")) < 0.15
    quarter = next(row for row in rows if (row["motion"], row["amount"], row["renormalise"]) == ("translate-x", 0.25, False))
    assert quarter["wanted right"] > 1.8
    for part in ("digits", "videos"):
        everywhere = edited(results, part, part="everywhere", spatial=True)
        assert all(mean(row, "like before") > mean(row, "like moved") for row in everywhere)


def test_shapes_go_against_a_map_that_is_shifted_by_a_quarter(results: dict[str, Any]) -> None:
    for row in edited(results, "videos", word="shape", part="everywhere", amount=0.25):
        axis = "right" if row["motion"] == "translate-x" else "down"
        assert row[f"wanted {axis}"] > 1.5
        assert row[axis]["high"] < 0
    maps = results["videos"]["maps"]["shape"]
    assert maps["with ink"]["low"] > 0.5 > 0.2 > maps["with the ink of another"]["high"]


def test_the_subjects_map_carries_the_class_and_the_modifiers_does_not(results: dict[str, Any]) -> None:
    spatial = edited(results, "digits", word="subject", part="everywhere", renormalise=False, spatial=True)
    hard = [mean(row, "kept") for row in spatial if (row["motion"], row["amount"]) != ("scale", 2.0)]
    assert (min(hard), max(hard)) == pytest.approx((0.21, 0.58))
    assert min(mean(row, "kept") for row in edited(results, "digits", word="modifier")) >= 0.99
    assert results["digits"]["unedited"]["kept"]["digit"]["mean"] == 1.0


def test_some_content_of_digits_follows_their_maps(results: dict[str, Any]) -> None:
    deleted = results["digits"]["deleted"]
    for motion, amount in (("translate-y", 0.25), ("translate-x", 0.25), ("flip-v", None)):
        for row in edited(results, "digits", word="subject", part="everywhere", motion=motion, amount=amount):
            without = deleted[f"{motion} {amount} {row['renormalise']}"]
            assert row["like moved"]["low"] > max(without["high"], row["moved like before"]["high"])


def test_the_first_steps_and_the_single_blocks_matter_little(results: dict[str, Any]) -> None:
    def least(model: str, part: str) -> float:
        rows = edited(results, model, part=part)
        return min(mean(row, "kept") for row in rows)

    assert least("digits", "steps 0–2") == 1.0
    assert least("digits", "single blocks") >= 0.95 > 0.6 > least("digits", "double blocks")
    assert least("videos", "steps 0–2") > 0.75 > 0.5 > least("videos", "steps 10–19")
