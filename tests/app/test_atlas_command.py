"""`headscope atlas`: the labelled heads first, the numbers of the Python interface, and files that can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from headscope.probe.atlas.atlas import HeadAtlas
from tests.app.test_cli import Shell, needs, read, refused, said

pytest.importorskip("sklearn")
FEW = ("--length", 8, "--samples", 2)
SHORT = (*FEW, "--text", "hello there")


def test_the_embedded_model_names_its_heads(capsys: Shell) -> None:
    needs("lm")
    text = said(capsys, "atlas", "--model", "embedded:lm", "--no-weights")
    induction = text.split("induction (")[1].split("previous-token (")[0]
    previous = text.split("previous-token (")[1].split("current-token (")[0]
    assert all(f"  {name} " in induction for name in ("5.2", "5.3", "5.6"))
    assert all(f"  {name} " in previous for name in ("3.6", "2.4", "3.7"))
    assert "look alike" in text
    table = text.split("─\n")[1].splitlines()
    assert table[0].split()[-1].startswith("induction")


def test_files_hold_what_is_printed(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    files = [tmp_path / name for name in ("atlas.json", "atlas.html", "atlas.png")]
    options = [text for name, path in zip(("--save", "--html", "--png"), files, strict=True) for text in (name, path)]
    found = read(capsys, "atlas", "--model", tiny, *SHORT, *options)
    loaded = HeadAtlas.load(files[0])
    assert loaded.to_dict() == found
    assert found["schema"] == "headscope.atlas/v1"
    assert found["info"]["name"] == str(tiny)
    assert len(found["cards"]) == 48
    assert "<script" not in files[1].read_text(encoding="utf-8")
    with Image.open(files[2]) as image:
        assert image.width > 8 * 60
        assert image.height > 6 * 30


def test_one_head_is_told_in_full_and_scores_are_ranked(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    told = said(capsys, "atlas", "--model", tiny, *SHORT, "--no-redundancy", "--head", "3.5")
    assert told.startswith("3.5 ")
    assert "site     model.layers.3.self_attn#0" in told
    assert "strongest directions" in told
    picture = tmp_path / "score.png"
    fast = ("--model", tiny, *SHORT, "--no-weights", "--no-redundancy")
    ranked = said(capsys, "atlas", *fast, "--score", "first", "--top", 3, "--png", picture)
    rows = ranked.split("─\n")[1].splitlines()
    numbers = [float(row.split()[1]) for row in rows]
    assert len(rows) == 3
    assert numbers == sorted(numbers, reverse=True)
    assert picture.exists()


def test_texts_come_from_the_shell_and_from_lines_of_json(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    lines = tmp_path / "texts.jsonl"
    lines.write_text(json.dumps({"text": "hello there"}) + "\n", encoding="utf-8")
    fast = (*FEW, "--no-weights", "--no-redundancy")
    one = read(capsys, "atlas", "--model", tiny, "--text", "hello there", *fast)
    many = read(capsys, "atlas", "--model", tiny, "--data", lines, *fast)
    assert one["scores"] == many["scores"]
    assert one["redundancy"] is None
    assert one["circuits"] is None
    other = read(capsys, "atlas", "--model", tiny, "--text", "hello there", *fast, "--seed", 1)
    assert other["scores"]["induction"] != one["scores"]["induction"]
    assert other["scores"]["first"] == one["scores"]["first"]


def test_digits_are_charted_too(capsys: Shell) -> None:
    needs("vit")
    found = read(capsys, "atlas", "--model", "embedded:vit", "--no-weights", "--no-redundancy")
    assert found["undefined"]["induction"] == "the model reads no tokens that could be repeated"
    assert len(found["cards"]) == 16
    one = read(capsys, "atlas", "--model", "embedded:vit", "--image", 3, "--no-weights", "--no-redundancy")
    assert "positional" in one["undefined"]
    assert "reads images" in refused(capsys, "atlas", "--model", "embedded:vit", "--text", "a")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--head", "5-2"], "--head '5-2': write LAYER.HEAD, such as 5.2"),
        (["--top", "0"], "--top 0: give a number of heads from 1 up"),
        (["--data", "none.jsonl"], "cannot be read"),
        (["--image", "1"], "--image is for embedded:vit"),
        (["--score", "shy", "--no-weights", *map(str, SHORT), "--no-redundancy"], "no score 'shy'"),
        (["--head", "9.0", "--no-weights", *map(str, SHORT), "--no-redundancy"], "no layer 9"),
        (["--length", "1000"], "the context window of this model is 256"),
    ],
)
def test_bad_wishes_are_one_line(arguments: list[str], reason: str, tiny: Path, capsys: Shell) -> None:
    assert reason in refused(capsys, "atlas", "--model", tiny, *arguments)
