"""`headscope report` in the shell: one command makes a page, another checks it, bad input is one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from headscope.app.cli import main
from headscope.app.report import command, measures, pdf
from headscope.app.report.measures import Settings
from headscope.interventions import Edit, Plan, scale, select
from tests.app.report.conftest import Small
from tests.app.test_cli import Shell, needs, read, refused, said


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer random orders than the command would draw."""
    usual = measures.Settings

    def fewer(**given: Any) -> Settings:
        return usual(**{"draws": 3, "resamples": 100, "close": 1, **given})

    monkeypatch.setattr(command, "Settings", fewer)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_command_writes_page_and_sidecar_and_verify_passes(small: Small, tmp_path: Path, capsys: Shell) -> None:
    page = tmp_path / "r.html"
    text = said(capsys, "report", "--model", small.folder, "--text", "a <script> cat\n", "--out", page)
    assert "conservation" in text
    assert "with r.json beside it" in text
    assert names(tmp_path) == ["r.html", "r.json"]
    found = read(capsys, "report", "verify", page, "--recompute", 1)
    assert (found["schema"], found["passed"]) == ("headscope.report-verification/v1", True)
    assert found["findings"][-1] == {**found["findings"][-1], "name": "example 1", "passed": True}


def test_verify_fails_with_exit_code_1_after_one_flipped_byte_in_either_file(small: Small, tmp_path: Path, capsys: Shell) -> None:
    page = tmp_path / "r.html"
    said(capsys, "report", "--model", small.folder, "--text", "a cat", "--out", page)
    for path in (page, tmp_path / "r.json"):
        content = path.read_bytes()
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert "NOT AS IT WAS MADE" in said(capsys, "report", "verify", page, code=1)
        path.write_bytes(content)
    assert "nothing was changed" in said(capsys, "report", "verify", page)


def test_the_command_in_the_report_makes_the_same_numbers_again(small: Small, tmp_path: Path, capsys: Shell) -> None:
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"text": "a cat", "target": "b"}\n{"text": "a dog\\u202e"}\n{"text": "rest"}\n')
    page = tmp_path / "r.html"
    options = ["--examples", "2", "--show", "1", "--order", "worst", "--heads", "2", "--seed", "5", "--compare", "gradient-x-input"]
    found = read(capsys, "report", "--model", small.folder, "--data", lines, "--out", page, *options)
    assert (found["schema"], len(found["checks"])) == ("headscope.report/v1", 7)
    first = json.loads((tmp_path / "r.json").read_text())
    words = shlex.split(first["command"])
    assert words[:2] == ["headscope", "report"]
    said(capsys, *words[1:])
    second = json.loads((tmp_path / "r.json").read_text())
    for key in ("checks", "heads", "settings", "shown", "data", "counter"):
        assert first[key] == second[key]


def test_a_recipe_is_in_place_and_is_shown(small: Small, tmp_path: Path, capsys: Shell) -> None:
    recipe = Plan([Edit("z", scale(0.5), select(layer=0, head=1))]).save(tmp_path / "e.yaml", model=small.model)
    page = tmp_path / "r.html"
    said(capsys, "report", "--model", small.folder, "--text", "a cat", "--recipe", recipe, "--out", page)
    assert "value: 0.5" in page.read_text()
    assert read(capsys, "report", "verify", page, "--recompute", 1)["passed"] is True


def test_an_image_of_the_embedded_vit(tmp_path: Path, capsys: Shell) -> None:
    needs("vit")
    page = tmp_path / "r.html"
    said(capsys, "report", "--model", "embedded:vit", "--image", 3, "--compare", "", "--out", page)
    assert read(capsys, "report", "verify", page, "--recompute", 1)["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--text", "a"], "say where the report goes: --out"),
        (["--out", "{}/r.html"], "nothing to report on: give --text"),
        (["--text", "a", "--out", "{}/r.txt"], "ends in .html"),
        (["--text", "a", "--out", "{}/no/r.html"], "there is no folder"),
        (["--text", "", "--out", "{}/r.html"], "the text is empty"),
        (["--text", "a", "--data", "x", "--out", "{}/r.html"], "not allowed with argument"),
        (["--data", "{}/none.jsonl", "--out", "{}/r.html"], "cannot be read"),
        (["--data", "{}/bad.jsonl", "--out", "{}/r.html"], "bad.jsonl line 2 is no JSON"),
        (["--data", "{}/bad.jsonl", "--target", "b", "--out", "{}/r.html"], "each line names its own"),
        (["--text", "a", "--method", "magic", "--out", "{}/r.html"], "no method 'magic'"),
        (["--text", "a", "--image", "3", "--out", "{}/r.html"], "not allowed with argument"),
        (["--image", "3", "--out", "{}/r.html"], "example '1'"),
        (["--text", "a", "--target", "no such token", "--out", "{}/r.html"], "tokens"),
        (["--text", "a", "--target", "300", "--out", "{}/r.html"], "no class or token 300"),
        (["--text", "a", "--recipe", "{}/none.yaml", "--out", "{}/r.html"], "there is no recipe"),
        (["--text", "a", "--removal", "magic", "--out", "{}/r.html"], "no removal 'magic'"),
        (["--text", "a", "--heads", "-1", "--out", "{}/r.html"], "heads -1: give 0 or more"),
        (["verify", "{}/none.html"], "cannot be read"),
        (["verify"], "required: FILE"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(small: Small, tmp_path: Path, capsys: Shell, arguments: list[str], reason: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    model = [] if arguments[0] == "verify" else ["--model", str(small.folder)]
    assert reason in refused(capsys, "report", *model, *(argument.format(tmp_path) for argument in arguments))
    assert names(tmp_path) == ["bad.jsonl"]


def test_pdf_without_a_browser_is_refused_before_the_work(
    small: Small, tmp_path: Path, capsys: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf.shutil, "which", lambda name: None)
    line = refused(capsys, "report", "--model", small.folder, "--text", "a", "--out", tmp_path / "r.html", "--pdf", tmp_path / "r.pdf")
    assert "--pdf prints with Chromium, and none of chromium, " in line
    assert names(tmp_path) == []


def test_interactive_without_plotly_is_refused_before_the_work(
    small: Small, tmp_path: Path, capsys: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headscope.app.report.interactive.find_spec", lambda name: None)
    line = refused(capsys, "report", "--model", small.folder, "--text", "a", "--out", tmp_path / "r.html", "--interactive")
    assert "pip install 'headscope[app]'" in line
    assert names(tmp_path) == []


def test_help_of_verify_has_an_example(capsys: Shell) -> None:
    assert main(["report", "verify", "--help"]) == 0
    assert "example: headscope report verify" in capsys.readouterr().out
