"""`headscope edit heads` and `edit direction`: from files of prompts to a recipe that runs, and one line for what cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headscope.app.cli import main
from headscope.interventions import Plan
from headscope.probe import load

Shell = pytest.CaptureFixture[str]


def prompts(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def sad(tmp_path: Path) -> str:
    return prompts(tmp_path / "sad.jsonl", "The king is dead", "The queen is gone")


@pytest.fixture
def glad(tmp_path: Path) -> str:
    return prompts(tmp_path / "glad.jsonl", "A cat sat down", "The sun is hot")


def refused(capsys: Shell, *arguments: str) -> str:
    assert main(["edit", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_the_best_head_comes_with_a_recipe_that_runs(sad: str, tmp_path: Path, capsys: Shell) -> None:
    recipe = tmp_path / "heads.yaml"
    assert main(["edit", "heads", "--data", sad, "--top", "2", "--count", "1", "--save", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == "ships"
    model, tokenizer = load("embedded:lm")
    with Plan.load(recipe, model=model).on(model) as on:
        model(**tokenizer("The king is dead", return_tensors="pt"))
    assert set(on.hits.values()) == {1}


def test_the_direction_comes_with_a_recipe_that_runs(sad: str, glad: str, tmp_path: Path, capsys: Shell) -> None:
    recipe = tmp_path / "direction.yaml"
    assert main(["edit", "direction", "--positive", sad, "--negative", glad, "--also", "*.mlp", "--save", str(recipe)]) == 0
    assert "taken: direction of length" in capsys.readouterr().out
    model, tokenizer = load("embedded:lm")
    plan = Plan.load(recipe, model=model)
    with plan.on(model) as on:
        model(**tokenizer("The king is dead", return_tensors="pt"))
    assert [edit.stage for edit in plan] == ["resid", "attn_out", "out"]
    assert set(on.hits.values()) == {model.config.num_hidden_layers}


def test_what_cannot_be_asked_is_one_line(sad: str, glad: str, tmp_path: Path, capsys: Shell) -> None:
    both = ["direction", "--positive", sad, "--negative", glad]
    away = str(tmp_path / "absent" / "recipe.yaml")
    assert "there is no such folder, so make it first" in refused(capsys, "heads", "--data", sad, "--save", away)
    assert "there is no such folder, so make it first" in refused(capsys, *both, "--save", away)
    assert "--add nan: give a finite number" in refused(capsys, *both, "--add", "nan")
    assert "--also '*nothing': embedded:lm has no such module" in refused(capsys, *both, "--also", "*nothing")
    same = refused(capsys, "direction", "--positive", sad, "--negative", sad)
    assert "the two sets of prompts have the same mean there" in same
