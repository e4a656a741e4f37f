"""`headscope health`: what it prints is what Python measures; its exit code is for machines; bad input is one line."""

from __future__ import annotations

import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from headscope.app.cli import main
from headscope.interventions import Edit, Plan, scale, select
from headscope.kernels.errors import HeadscopeError
from headscope.probe import load
from headscope.probe.health.measure import measure_health
from headscope.probe.health.report import HealthReport
from headscope.probe.health.thresholds import TABLE
from headscope.probe.models import embedded_folder, tokenize

Shell = pytest.CaptureFixture[str]
TEXT = "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in liberty."


@pytest.fixture(autouse=True)
def _trained() -> None:
    for name in ("lm", "vit"):
        try:
            embedded_folder(name)
        except HeadscopeError as error:
            pytest.skip(str(error))


def said(capsys: Shell, *arguments: object, code: int = 0) -> str:
    ended = main(["health", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert ended == code, captured.err
    return captured.out


def refused(capsys: Shell, *arguments: object) -> str:
    ended = main(["health", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert (ended, captured.out, len(lines)) == (2, "", 1), captured
    return lines[0]


def measured(**options: Any) -> HealthReport:
    model, tokenizer = load("embedded:lm")
    return measure_health(model, tokenize(tokenizer, TEXT, model), **options)


def test_the_report_names_the_previous_token_and_induction_heads_and_raises_no_alarm(capsys: Shell) -> None:
    printed = said(capsys, "--model", "embedded:lm", "--text", TEXT, "--fail-on", "warn")
    assert "WARNING" not in printed
    assert "ALARM" not in printed
    assert printed.splitlines()[0] == "info: 1 observation; 48 heads in 6 layers"
    named = {line.split(":")[0].strip(): line for line in printed.splitlines() if line.startswith("    ")}
    for head in ("3.6", "2.4", "3.7"):
        assert f"{head} (1.00)" in named["previous-token"]
    for head in ("5.2", "5.3", "5.6"):
        assert f"{head} (0." in named["induction"]


def test_the_table_has_the_numbers_of_python(capsys: Shell) -> None:
    lines = said(capsys, "--text", TEXT, "--no-names", "--no-baselines", "--heads", "--layers").splitlines()
    report = measured(baselines=False)
    for row in report.layers():
        cells = next(line for line in lines if line.split()[:1] == [str(row["place"])]).split()
        assert cells[1:4] == [f"{row[name]:.2f}" for name in ("entropy_share", "diffuse", "routing")]
        assert cells[8] == f"{row['state_residual']:.2f}"
    heads = [
        line for line in lines if line[:3] in {f"{layer}.{head}" for layer in range(6) for head in range(8)} and len(line.split()) == 13
    ]
    assert len(heads) == 48
    assert heads[0].split()[1] == f"{float(report.heads[0].entropy_share[0]):.2f}"
    assert sum(line.startswith(("before model.layers.0", "model.layers.")) for line in lines) == 7


def test_json_is_the_report_and_follows_its_schema(capsys: Shell) -> None:
    told = json.loads(said(capsys, "--text", TEXT, "--json", "--no-names", "--threshold", "sink=0.9"))
    assert told["schema"] == "headscope.health-command/v1"
    assert told["fingerprint"].startswith("sha256:")
    schema = json.loads(files("headscope.probe.health").joinpath("health.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(told["report"], schema)
    expected = measured(thresholds={"sink": 0.9})
    assert told["worst"] == expected.worst
    assert told["report"]["findings"] == json.loads(expected.to_json())["findings"]
    assert next(row for row in told["report"]["thresholds"] if row["name"] == "sink")["value"] == 0.9


def test_exit_code_one_where_something_that_bad_was_found(capsys: Shell) -> None:
    quick = ("--text", TEXT, "--no-names", "--no-baselines")
    said(capsys, *quick, "--fail-on", "warn", code=0)
    said(capsys, *quick, "--fail-on", "info", code=1)
    printed = said(capsys, *quick, "--fail-on", "warn", "--threshold", "logit-warn=20", code=1)
    assert "WARNING  logit-growth" in printed
    assert "what may help: QK-norm" in printed


def test_files_are_written_and_can_be_read(capsys: Shell, tmp_path: Path) -> None:
    page, saved, picture = (tmp_path / name for name in ("health.html", "health.json", "health.png"))
    said(capsys, "--model", "embedded:vit", "--image", 3, "--html", page, "--save", saved, "--png", picture)
    report = HealthReport.load(saved)
    assert [one.heads for one in report.heads] == [4, 4, 4, 4]
    assert report.info["name"] == "embedded:vit"
    assert "<script" not in page.read_text(encoding="utf-8")
    with Image.open(io.BytesIO(picture.read_bytes())) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20) or []}
    assert {(185, 191, 200), (0, 114, 178), (224, 138, 0)} <= colours


def test_lines_of_a_file_are_averaged(capsys: Shell, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    texts = [TEXT, "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer."]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    told = json.loads(said(capsys, "--data", data, "--json", "--no-names", "--no-baselines"))
    model, tokenizer = load("embedded:lm")
    expected = measure_health(model, [tokenize(tokenizer, text, model) for text in texts], baselines=False)
    assert told["report"]["heads"][0]["queries"] == expected.heads[0].queries
    assert told["report"]["heads"][3]["routing"] == pytest.approx(expected.heads[3].routing.tolist(), abs=1e-6)
    assert told["report"]["info"]["inputs"] == "data.jsonl"


def test_one_layer_alone_can_be_measured(capsys: Shell) -> None:
    told = json.loads(said(capsys, "--text", TEXT, "--json", "--no-names", "--no-baselines", "--sites", "*layers.3*"))
    assert [one["site"]["layer"] for one in told["report"]["heads"]] == [3]


def test_a_sweep_over_lengths_and_a_comparison_with_an_edit(capsys: Shell, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    Plan([Edit("z", scale(0.0), select(layer=2, head=4))]).save(recipe)
    printed = said(capsys, "--text", TEXT, "--no-names", "--no-baselines", "--lengths", "16,32", "--recipe", recipe)
    assert "16 tokens" in printed
    assert "slope" in printed
    assert "Jensen-Shannon" in printed
    assert "before and recipe.yaml" in printed
    told = json.loads(
        said(capsys, "--text", TEXT, "--no-names", "--no-baselines", "--lengths", "16,32", "--json", "--against-model", "embedded:lm")
    )
    assert told["sweep"]["lengths"] == [16, 32]
    assert told["comparison"]["info"]["same_model"] is False
    assert told["comparison"]["heads"][0]["jensen_shannon"] == [0.0] * 8


def test_the_thresholds_are_listed_with_their_source(capsys: Shell) -> None:
    printed = said(capsys, "--list-thresholds", "--threshold", "sink=0.5")
    for row in TABLE:
        assert f"{row.name}: {row.meaning}" in printed
        assert row.source in printed
    assert "0.5 *" in printed
    rows = json.loads(said(capsys, "--list-thresholds", "--json"))["thresholds"]
    assert [row["name"] for row in rows] == [row.name for row in TABLE]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--fail-on", "ok"], "no severity 'ok'"),
        (["--threshold", "sink"], "write NAME=NUMBER"),
        (["--threshold", "sink=much"], "write NAME=NUMBER"),
        (["--threshold", "snik=0.5"], "did you mean 'sink'"),
        (["--threshold", "sink=-1"], "finite number from 0 up"),
        (["--lengths", "64"], "two or more numbers of tokens"),
        (["--lengths", "64,32"], "ascending order"),
        (["--lengths", "x"], "give numbers such as"),
        (["--spectrum", "-1"], "from 0 up"),
        (["--tokens", "9", "--data", "x.jsonl"], "leave it out with --data"),
        (["--recipe", "a", "--against-model", "b"], "give one of them"),
        (["--html", "nowhere/x.html"], "no such folder"),
        (["--text", "a", "--text-file", "b"], "not allowed with"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(arguments: list[str], reason: str, capsys: Shell) -> None:
    assert reason in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--data", "nowhere.jsonl"], "cannot be read"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["--lengths", "64,5000"], "context window"),
        (["--model", "embedded:vit", "--lengths", "4,8"], "is for text"),
        (["--text", ""], "empty"),
        (["--sites", "*layers.9*"], "layers.9"),
    ],
)
def test_what_the_model_cannot_do_is_named(arguments: list[str], reason: str, capsys: Shell) -> None:
    assert reason in refused(capsys, *arguments)
