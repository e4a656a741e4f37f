"""The study of debiasing runs, its sentences are what they should be, and its tables say what its results say."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "case_studies" / "debiasing"
WINOBIAS = os.environ.get("HEADSCOPE_WINOBIAS")
ARMS = ["planted", "neither", "logit", "logit, one token late", "graph", "both", "random direction"]


def run(*arguments: object) -> None:
    done = subprocess.run([sys.executable, STUDY / "run.py", *map(str, arguments)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sentences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("debiasing_sentences", STUDY / "sentences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not (ROOT / "probe/embedded/lm/model.safetensors").exists(), reason="embedded:lm has no weights yet: make train")
@pytest.mark.slow
def test_a_quick_run_writes_every_arm(tmp_path: Path) -> None:
    run("--quick", "--out", tmp_path)
    report: dict[str, Any] = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(report["seeds"][0]) == ARMS
    assert report["sentences"] == "generated"
    assert "nan" not in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert ElementTree.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.svg", "results.json", "results.md"]


def test_tables_and_figure_are_those_of_the_results(tmp_path: Path) -> None:
    for name in ("results.json", "README.md"):
        shutil.copy(STUDY / name, tmp_path)
    run("--tables", "--out", tmp_path)
    for name in ("results.md", "figure.svg", "README.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (STUDY / name).read_text(encoding="utf-8"), f"{name} is not of results.json"


def test_the_two_halves_of_the_occupations_share_none(sentences: ModuleType) -> None:
    split = sentences.Occupations.split(1)
    assert not set(split.seen) & set(split.unseen)
    assert len({*split.seen, *split.unseen}) == 40
    assert not set(sentences.FRAMES) & set(sentences.HELD_OUT)
    for names in (split.seen, split.unseen):
        assert [sentences.stereotype(name) for name in names].count("he") == 10


@pytest.mark.skipif(WINOBIAS is None, reason="HEADSCOPE_WINOBIAS names no folder of WinoBias's sentence files")
def test_winobias_pairs_differ_in_the_pronoun_alone(sentences: ModuleType) -> None:
    pairs = sentences.read_winobias(Path(WINOBIAS or ""), "test")
    assert len(pairs) > 700
    assert {pair.pro for pair in pairs} <= {"he", "she", "him", "her", "his"}
    for pair in pairs:
        one, other = (text.split() for text in pair.sentences)
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
