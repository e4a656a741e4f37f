"""`headscope edit saferope` from two files of prompts to a saved rotation, and what it says of files that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headscope.app.cli import main
from headscope.app.saferope_command import read_lines
from headscope.interventions import Plan, SafeRoPE
from headscope.kernels.errors import InputError
from headscope.probe import load

TEXTS = ("They sold {} now.", "He has {} at home.", "The {} are old.", "Some {} here.")


def lines(path: Path, *words: str) -> Path:
    rows = [{"text": text.format(word), "subject": word} for text in TEXTS for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    unsafe, safe = lines(tmp_path / "unsafe.jsonl", "guns", "bombs"), lines(tmp_path / "safe.jsonl", "apples")
    return ["--unsafe", str(unsafe), "--safe", str(safe)]


def test_what_is_learned_is_printed_and_saved(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, recipe = tmp_path / "guns.safetensors", tmp_path / "guns.yaml"
    assert main(["edit", "saferope", *files, "--steps", "2", "--save", str(saved), "--recipe", str(recipe)]) == 0
    out = capsys.readouterr()
    model, _ = load("embedded:lm")
    found = SafeRoPE.load(saved, model)
    assert Plan.load(recipe, model=model) == found.plan()
    assert str(found) in out.out
    assert out.out.count("self_attn") == len(found.parts)
    assert "unsafe prompts: output changed by" in out.out
    assert "learning" in out.err


def test_json_holds_the_heads_and_the_effect(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", "saferope", *files, "--kind", "project", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "headscope.edit-saferope/v1"
    assert found["kind"] == "project"
    assert found["saferope"]["info"]["heads"] == sum(len(part["heads"]) for part in found["saferope"]["parts"])
    assert {name: set(effect) for name, effect in found["effect"].items()} == dict.fromkeys(("unsafe", "safe"), {"change", "divergence"})
    assert found["effect"]["unsafe"]["change"] > 0 < found["effect"]["unsafe"]["divergence"]


def test_a_drawing_model_is_fed_prompts_of_its_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    _, flow = load("embedded:mmdit")
    files = []
    for option, digit in (("--unsafe", 8), ("--safe", 1)):
        name = flow.book.subjects[digit][0]
        prompts = flow.book.explicit(digit, 8, seed=1, synonyms=(0,))
        path = tmp_path / f"{digit}.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt, "subject": name}) + "\n" for prompt in prompts), encoding="utf-8")
        files += [option, str(path)]
    assert main(["edit", "saferope", "--model", "embedded:mmdit", *files, "--steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["saferope"]["role"] == "text"
    assert found["effect"]["unsafe"]["divergence"] is None


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2 is not JSON"),
        ('{"text": "no subject"}', r'line 2: give {"text": "…", "subject": "…"}'),
        ('{"text": "", "subject": "x"}', "line 2: give"),
        ("[1]", "line 2: give"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, row: str, says: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "a b", "subject": "b"}\n' + row, encoding="utf-8")
    with pytest.raises(InputError, match=f"some.jsonl, {says}"):
        read_lines(path, "--unsafe")


def test_what_cannot_be_asked_is_refused_in_one_line(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, strange = tmp_path / "empty.jsonl", tmp_path / "strange.jsonl"
    empty.write_text("\n", encoding="utf-8")
    strange.write_text('{"text": "a b", "subject": "c"}\n', encoding="utf-8")
    refused = {
        "--steps 0: give 1 or more": [*files, "--steps", "0"],
        "holds no prompt": [*files[:2], "--safe", str(empty)],
        "absent.jsonl' cannot be read": [*files[:2], "--safe", "absent.jsonl"],
        "strange.jsonl, line 1: there is no 'c' in the text": [*files[:2], "--safe", str(strange)],
        "--role text: embedded:lm reads one sequence": [*files, "--role", "text"],
        "absent/found.safetensors': there is no such folder": [*files, "--save", str(tmp_path / "absent" / "found.safetensors")],
        "absent/recipe.yaml': there is no such folder": [*files, "--recipe", str(tmp_path / "absent" / "recipe.yaml")],
        "are the same prompt: the two sets must not overlap": [*files[:2], "--safe", files[1]],
    }
    for says, arguments in refused.items():
        assert main(["edit", "saferope", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert says in error
