"""`headscope attribute`: what it prints is what Python computes; bad input is one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headscope.app import attribute_command, relevance_picture
from headscope.app.cli import main
from headscope.kernels.errors import HeadscopeError
from headscope.probe import load
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.rules import RULE_SETS
from headscope.probe.attribution.target import Target, contrast, generated
from headscope.probe.models import embedded_folder, tokenize

Shell = pytest.CaptureFixture[str]
TEXT = "To be, or not to"


@pytest.fixture(autouse=True)
def _trained() -> None:
    for name in ("lm", "vit"):
        try:
            embedded_folder(name)
        except HeadscopeError as error:
            pytest.skip(str(error))


def said(capsys: Shell, *arguments: object, code: int = 0) -> str:
    ended = main(["attribute", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert ended == code, captured.err
    return captured.out


def read(capsys: Shell, *arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(capsys, *arguments, "--json", code=code))
    return found


def refused(capsys: Shell, *arguments: object) -> str:
    ended = main(["attribute", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert (ended, captured.out, len(lines)) == (2, "", 1), captured
    return lines[0]


def asked(target: Target | None = None, method: str = "attnlrp", text: str = TEXT) -> Attribution:
    model, tokenizer = load("embedded:lm")
    return attribute(model, tokenize(tokenizer, text, model), target, method, tokenizer=tokenizer)


def token(text: str) -> int:
    (id,) = load("embedded:lm")[1].encode(text, add_special_tokens=False)
    return int(id)


def test_the_table_has_every_token_with_sign_and_bar(capsys: Shell) -> None:
    found = asked()
    lines = said(capsys, "--text", TEXT).splitlines()
    assert lines[0] == f"attnlrp: logit of ' be' = {found.value:.6g}"
    numbers = found.of_tokens()[0].tolist()
    rows = [line for line in lines if re.match(r"\s+\d  .*│", line)]
    assert [float(re.search(r"[+-]\d+\.\d{4}", row)[0]) for row in rows] == [round(n, 4) for n in numbers]  # type: ignore[index]
    for row, number in zip(rows, numbers, strict=True):
        before, after = row.split("│")
        assert not ("█" in before and "█" in after)
        assert after.count("█") + before.count("█") == round(14 * abs(number) / max(map(abs, numbers)))
        assert ("█" in before) <= (number < 0)
    assert "(special)" in rows[0]


def test_the_books_are_printed_with_their_verdict(capsys: Shell) -> None:
    printed = said(capsys, "--text", TEXT)
    assert "books: PASS" in printed
    assert "absorbed: softmax" in printed
    assert "the 5 strongest of 48 heads" in printed


def test_json_is_the_attribution(capsys: Shell) -> None:
    told = read(capsys, "--text", TEXT, "--words")
    assert told["schema"] == "headscope.attribute/v1"
    assert told["fingerprint"].startswith("sha256:")
    expected = asked().to_dict()
    assert told["attribution"].keys() == expected.keys()
    assert np.allclose(told["attribution"]["inputs"]["input_ids"], expected["inputs"]["input_ids"], atol=1e-6)  # type: ignore[index]
    assert [row["text"] for row in told["groups"]["rows"]] == ["<s>", "To", "be,", "or", "not", "to"]


def test_targets_are_named_by_text_or_number(capsys: Shell) -> None:
    be, the = token(" be"), token(" the")
    for target in (" be", be):
        told = read(capsys, "--text", TEXT, "--target", target, "--against", " the", "--position", -2)
        expected = asked(contrast(be, the, -2))
        assert told["attribution"]["value"] == pytest.approx(expected.value, abs=1e-5)
        assert np.allclose(told["attribution"]["inputs"]["input_ids"], expected.of_tokens().tolist(), atol=1e-5)
    alone = read(capsys, "--text", TEXT, "--against", " the")  # against, of the largest
    assert alone["attribution"]["target"] == "logit of ' be' minus ' the'"


def test_words_and_sentences_keep_the_sum(capsys: Shell) -> None:
    text = "To be, or not to be. That is the question."
    total = None
    for option, count in (("--words", 11), ("--sentences", 3)):
        groups = read(capsys, "--text", text, option)["groups"]
        assert len(groups["rows"]) == count
        assert sum(row["relevance"] for row in groups["rows"]) == groups["total"]
        assert total in (None, groups["total"])
        total = groups["total"]
    assert "That is the question." in said(capsys, "--text", text, "--sentences")


def test_heads_and_layers_are_listed_when_asked(capsys: Shell) -> None:
    printed = said(capsys, "--text", TEXT, "--heads", "--layers")
    found = asked()
    table = printed.split("relevance of every head\n")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[float(cell) for cell in line.split()[1:]] for line in table]
    assert np.allclose(cells, found.of_heads().tolist(), atol=6e-4)
    assert re.search(r"model\.layers\.0 +block +[+-]\d", printed)
    assert printed.index("model.layers.2 ") < printed.index("model.layers.5 ")


def test_a_map_adds_up_to_its_head(capsys: Shell, tmp_path: Path) -> None:
    told = read(capsys, "--text", TEXT, "--map", "3.5", "--png", tmp_path / "m.png")
    assert np.allclose(np.sum(told["map"]["relevance"], axis=1), asked().heads["model.layers.3.self_attn#0"][0, 5].tolist(), atol=1e-5)
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.size[0] == picture.size[1] >= 700
    assert "head 3.5: relevance of each query" in said(capsys, "--text", TEXT, "--map", "3.5")
    long = said(capsys, "--text", TEXT * 20, "--map", "3.5")
    assert "from keys" in long
    assert re.search(r"the 64 of \d+ queries with the largest magnitudes", long)
    assert re.search(r"the 64 of \d+ tokens with the largest magnitudes", long)


def test_generated_tokens_are_explained_each_and_summed(capsys: Shell) -> None:
    told = read(capsys, "--text", TEXT, "--generate", 3)
    model, tokenizer = load("embedded:lm")
    inputs = tokenize(tokenizer, TEXT, model)
    written = model.generate(**inputs, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert told["prompt"] == 7
    assert told["places"] == [7, 8, 9]
    whole = attribute(model, {"input_ids": written}, generated(written[0, 7:].tolist(), 7))
    assert told["whole"]["value"] == pytest.approx(whole.value, abs=1e-4)
    assert np.allclose(np.sum(told["relevance"], axis=0), whole.of_tokens()[0].tolist(), atol=1e-4)
    part = read(capsys, "--text", TEXT, "--generate", 3, "--span", "1:")
    assert part["places"] == [8, 9]
    assert np.allclose(np.array(part["relevance"]), np.array(told["relevance"])[1:], atol=1e-4)
    printed = said(capsys, "--text", TEXT, "--generate", 3, "--words")
    assert "tokens 7:10, each by its logit where it was predicted" in printed
    assert "summed: logit of" in printed


def test_tokens_of_the_text_itself_are_explained(capsys: Shell) -> None:
    told = read(capsys, "--text", TEXT, "--span", "4:6", "--sentences")
    assert told["prompt"] is None
    assert told["places"] == [4, 5]
    assert told["groups"]["total"] == pytest.approx(np.sum(told["relevance"]), abs=1e-4)


def test_methods_are_compared_side_by_side(capsys: Shell) -> None:
    told = read(capsys, "--text", TEXT, "--compare", "attnlrp,cp-lrp,random")
    assert [one["method"] for one in told["attributions"]] == ["attnlrp", "cp-lrp", "random"]
    agree = np.array(told["rank_correlation"])
    assert np.allclose(np.diag(agree), 1)
    assert np.allclose(agree, agree.T)
    printed = said(capsys, "--text", TEXT, "--compare", "attnlrp,random", "--words")
    assert "agreement: rank correlation" in printed
    assert "books of attnlrp: PASS" in printed
    assert "books of random: none kept" in printed
    assert "warning: random: " in printed
    assert "row 3, column 3" in said(capsys, "--model", "embedded:vit", "--compare", "attnlrp,cp-lrp")


def test_an_image_is_told_and_drawn_by_patches(capsys: Shell, tmp_path: Path) -> None:
    file = tmp_path / "digit.png"
    printed = said(capsys, "--model", "embedded:vit", "--image", 3, "--png", file)
    told = read(capsys, "--model", "embedded:vit", "--image", 3)
    pixels = np.array(told["attribution"]["inputs"]["pixel_values"])[0, 0]
    assert "logit of class 2 = " in printed
    rows = [[float(cell) for cell in line.split()[1:]] for line in printed.splitlines()[5:9]]
    assert np.allclose(rows, pixels.reshape(4, 2, 4, 2).sum((1, 3)), atol=6e-4)
    with Image.open(file) as picture:
        assert picture.size[0] > 2 * picture.size[1] > 400
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    assert (colours[:, 0] > colours[:, 2] + 60).any()  # orange
    assert (colours[:, 2] > colours[:, 0] + 60).any()  # blue


def test_a_page_has_no_script_and_hostile_text_is_literal(capsys: Shell, tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    hostile = "<script>alert(1)</script>\u202eevil\n&lt;"
    said(capsys, "--text", hostile, "--html", file)
    page = file.read_text(encoding="utf-8")
    tags: set[str] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.add(tag)

    Reader().feed(page)
    assert "script" not in tags
    assert "\u202e" not in page
    assert "⏎" in page
    printed = said(capsys, "--text", hostile, "--words")
    assert "\u202e" not in printed
    assert "\\u202eevil" in printed


def test_a_saved_result_is_read_back(capsys: Shell, tmp_path: Path) -> None:
    said(capsys, "--text", TEXT, "--save", tmp_path / "a.json")
    assert torch.allclose(Attribution.load(tmp_path / "a.json").of_tokens(), asked().of_tokens(), atol=1e-5)


def test_heads_are_drawn(capsys: Shell, tmp_path: Path) -> None:
    said(capsys, "--text", TEXT, "--png", tmp_path / "h.png")
    with Image.open(tmp_path / "h.png") as picture:
        assert picture.size[0] > 8 * 64


def test_books_that_do_not_close_are_printed_as_fail_and_strict_ends_with_1(capsys: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Attribution:
        found = attribute(*arguments, **options)
        assert found.ledger is not None
        return replace(found, ledger=replace(found.ledger, inputs=found.ledger.inputs - 1))

    monkeypatch.setattr(attribute_command, "attribute", wrong)
    assert "books: FAIL" in said(capsys, "--text", TEXT)
    assert "books: FAIL" in said(capsys, "--text", TEXT, "--strict", code=1)
    assert "books of gim: FAIL" in said(capsys, "--text", TEXT, "--compare", "attnlrp,gim", "--strict", code=1)
    monkeypatch.undo()
    said(capsys, "--text", TEXT, "--strict")


def test_methods_are_listed(capsys: Shell) -> None:
    printed = said(capsys, "--list-methods")
    listed = {row["name"]: row for row in read(capsys, "--list-methods")["methods"]}
    assert set(RULE_SETS) < set(listed)
    assert {"integrated-gradients", "rollout", "random"} < set(listed)
    assert all(name in printed and row["about"] for name, row in listed.items())
    assert listed["attnlrp"]["books"] == "yes"


REFUSED: list[tuple[list[object], str]] = [
    (["--method", "attnlpr"], "no method 'attnlpr': there are attnlrp, cp-lrp"),
    (["--compare", "attnlrp,attnlrp"], "names a method twice"),
    (["--compare", "attnlrp", "--method", "gim"], "leave --method out"),
    (["--compare", "attnlrp,gim", "--png", "x.png"], "leave out --png, or name one --method"),
    (["--generate", "2", "--target", " be"], "--generate and --span say what is explained: leave out --target"),
    (["--span", "1:2", "--map", "0.0"], "leave out --map"),
    (["--generate", "0"], "--generate 0: give a number of tokens from 1 up"),
    (["--method", "occlusion", "--generate", "2"], "--generate, --span and --map are for attnlrp"),
    (["--method", "rollout", "--map", "0.0"], "are for attnlrp"),
    (["--method", "gradient-x-input", "--strict"], "--strict asks for books"),
    (["--map", "35"], "--map '35': write LAYER.HEAD, such as 3.5"),
    (["--words", "--sentences"], "not allowed with argument"),
    (["--model", "embedded:vit", "--words"], "--words is for text, and embedded:vit reads images"),
    (["--model", "embedded:vit", "--generate", "3"], "--generate is for text"),
    (["--model", "embedded:vit", "--target", "cow"], "no class 'cow': give a number, or one of"),
    (["--text", TEXT, "--target", "xyzzy"], "'xyzzy' is 5 tokens here"),
    (["--text", TEXT, "--target", "99999"], "no class or token 99999: there are 2048, 0 to 2047"),
    (["--text", TEXT, "--position", "20"], "no prediction at position 20: there are 7, -7 to 6"),
    (["--text", TEXT, "--map", "9.0"], "no layer 9: there are 0, 1, 2, 3, 4, 5"),
    (["--text", TEXT, "--map", "0.9"], "no head 9: layer 0 has 8, 0 to 7"),
    (["--text", TEXT, "--span", "0:2"], "the text has 7 tokens, of which 1 to 7 can be named"),
    (["--text", TEXT, "--span", "2"], "--span '2': write START:STOP, such as 0:3"),
    (["--text", TEXT, "--generate", "2", "--span", "1:4"], "2 tokens were generated, 0 to 2 can be named"),
    (["--text", TEXT, "--generate", "9999"], "the context window of this model is 4096"),
    (["--text", TEXT, "--method", "random", "--png", "x.png"], "random has no heads to draw"),
    (["--text", TEXT, "--html", "none/x.html"], "cannot be written: No such file"),
    (["--text", TEXT, "--save", "none/x.json"], "cannot be written: No such file"),
    (["--text", ""], "the text is empty"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[" ".join(map(str, row[0]))[:40] for row in REFUSED])
def test_bad_input_is_one_line(arguments: list[object], says: str, capsys: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


# -- pictures ------------------------------------------------------------------------------------------------------------


def test_colours_are_white_at_nothing_and_differ_by_sign() -> None:
    found = relevance_picture.colours(np.array([0.0, 1.0, -1.0, 0.5]), 1.0).astype(int)
    assert found[0].tolist() == [255, 255, 255]
    assert found[1][0] > found[1][2] + 100
    assert found[2][2] > found[2][0] + 100
    assert (found[3] >= found[1]).all()
    assert relevance_picture.colours(np.zeros(2), 0.0).tolist() == [[255] * 3] * 2


@pytest.mark.parametrize(("number", "text"), [(0.5, "+0.50"), (-1.234, "-1.23"), (0.0, "+0.00"), (0.001, "+1e-03")])
def test_numbers_in_cells_have_a_sign(number: float, text: str) -> None:
    assert relevance_picture.written(number) == text


@pytest.mark.parametrize(
    "draw",
    [
        lambda: relevance_picture.matrix(np.zeros((3, 2000))),
        lambda: relevance_picture.table([[1.0], [1.0, -2.0]], ["a", "b"], ["head 0", "head 1"]),
        lambda: relevance_picture.over_image(np.ones((5, 7)), np.zeros((3, 4))),  # patches that do not fill the last row and column
    ],
)
def test_pictures_of_odd_shapes_are_pictures(draw: Callable[[], bytes]) -> None:
    assert draw().startswith(b"\x89PNG")
