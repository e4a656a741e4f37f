"""`headscope edit` and what stands under it: numbers are those of Python, exit codes are for machines, bad input is one line."""

from __future__ import annotations

import io
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from headscope.app.cli import main
from headscope.interventions import Edit, Plan, bias, role, scale, select, span
from headscope.interventions.evaluation.evaluate import evaluate
from headscope.interventions.evaluation.evaluation import Evaluation
from headscope.interventions.evaluation.metrics import NAMED
from headscope.kernels.errors import HeadscopeError
from headscope.probe import load
from headscope.probe.models import embedded_folder, tokenize

Shell = pytest.CaptureFixture[str]
SCHEMA = json.loads((files("headscope.interventions.evaluation") / "evaluation.schema.json").read_text())
ROWS = [
    {"id": "a", "text": "hello", "target": "a", "against": "b"},
    {"id": "b", "text": "password", "target": 100},
    {"id": "c", "text": "good day", "target": "!", "benign": True},
]


def said(capsys: Shell, *arguments: object, code: int = 0) -> str:
    """What `edit` prints on stdout; it must end with `code`."""
    ended = main(["edit", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert ended == code, captured.err
    return captured.out


def read(capsys: Shell, *arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(capsys, *arguments, "--json", code=code))
    return found


def refused(capsys: Shell, *arguments: object) -> str:
    """The one line that bad input gets."""
    ended = main(["edit", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert (ended, captured.out, len(lines)) == (2, "", 1), captured
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    return Plan([Edit("z", scale(-3.0), select(layer=3)), Edit("pattern", scale(0.5), select(layer=1, keys=span("ss")))]).save(
        tmp_path / "recipe.yaml", model=load(tiny)[0]
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path / "data.jsonl", ROWS)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


# -- plain edit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no edits"),
        (["--scale", "3-5"], "write LAYER.HEAD=X"),
        (["--scale", "3.5=nan"], "write LAYER.HEAD=X"),
        (["--scale", "3.5=0", "--top", "0"], "--top 0"),
    ],
)
def test_bad_arguments_get_one_line_and_exit_code_two(arguments: list[str], reason: str, capsys: Shell) -> None:
    assert reason in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--text", "hello", "--scale", "6.0=0"], "layer"),
        (["--text", "hello", "--scale", "3.8=0"], "no head 8"),
        (["--text", "", "--scale", "3.5=0"], "empty"),
        (["--scale", "3.5=0"], "nothing to read"),
        (["--text", "x" * 300, "--scale", "3.5=0"], "300 tokens"),
        (["--text", "x", "--recipe", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
        (["--text-file", "nowhere.txt", "--scale", "3.5=0"], "cannot be read"),
        (["--image", "3", "--scale", "3.5=0"], "--image is for embedded:vit"),
    ],
)
def test_what_the_model_does_not_have_is_named(arguments: list[str], reason: str, tiny: Path, capsys: Shell) -> None:
    assert reason in refused(capsys, *arguments, "--model", tiny)


def test_an_edit_gives_the_numbers_of_the_python_interface(tiny: Path, capsys: Shell) -> None:
    found = read(capsys, "--model", tiny, "--text", "hello", "--scale", "3.5=0", "--scale", "1.2=1.5", "--top", 5)
    model, tokenizer = load(tiny)
    inputs = tokenize(tokenizer, "hello", model)
    plan = Plan([Edit("z", scale(0.0), select(layer=3, head=5)), Edit("z", scale(1.5), select(layer=1, head=2))])
    with torch.no_grad():
        before = model(**inputs).logits[0, -1].double().softmax(-1)
        with plan.on(model):
            after = model(**inputs).logits[0, -1].double().softmax(-1)
    assert len(found["rows"]) == 5
    assert [(edit["layers"], edit["heads"], edit["value"]) for edit in found["edits"]] == [([3], [5], 0.0), ([1], [2], 1.5)]
    for row in found["rows"]:
        assert row["before"] == pytest.approx(float(before[row["id"]]), abs=1e-12)
        assert row["after"] == pytest.approx(float(after[row["id"]]), abs=1e-12)
    assert found["kl_nats"] == pytest.approx(float((before * (before / after).log()).sum()), rel=1e-6)


def test_an_edit_of_one_changes_nothing(tiny: Path, capsys: Shell) -> None:
    found = read(capsys, "--model", tiny, "--text", "hello", "--scale", "3.5=1")
    assert found["kl_nats"] == 0
    assert all(row["before"] == row["after"] for row in found["rows"])


def test_a_saved_recipe_gives_the_same_result(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    recipe = tmp_path / "recipe.yaml"
    first = read(capsys, "--model", tiny, "--text", "hello", "--scale", "3.5=0.25", "--save", recipe)
    second = read(capsys, "--model", tiny, "--text", "hello", "--recipe", recipe)
    assert second["rows"] == first["rows"]
    table = said(capsys, "--model", tiny, "--text", "hello", "--recipe", recipe)
    assert "KL(before ‖ after) = " in table


def test_a_recipe_for_another_model_is_refused(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    from tests.app.tiny import save_tiny

    recipe, other = tmp_path / "recipe.yaml", save_tiny(tmp_path / "other", seed=1)
    read(capsys, "--model", other, "--text", "hello", "--scale", "3.5=0", "--save", recipe)
    assert "made for another model" in refused(capsys, "--model", tiny, "--text", "hello", "--recipe", recipe)
    assert main(["edit", "--model", str(tiny), "--text", "hello", "--recipe", str(recipe), "--force"]) == 0
    assert "warning: the recipe was made for another model" in capsys.readouterr().err


def test_text_comes_from_standard_input_or_a_file(tiny: Path, tmp_path: Path, capsys: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = read(capsys, "--model", tiny, "--text", "hello", "--scale", "3.5=0")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert read(capsys, "--model", tiny, "--text", "-", "--scale", "3.5=0") == direct
    file = tmp_path / "text.txt"
    file.write_text("hello", encoding="utf-8")
    assert read(capsys, "--model", tiny, "--text-file", file, "--scale", "3.5=0") == direct
    file.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(capsys, "--model", tiny, "--text-file", file, "--scale", "3.5=0")


# -- edit run ------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_measured_as_python_measures_it(tiny: Path, recipe: Path, data: Path, tmp_path: Path, capsys: Shell) -> None:
    common = ["run", recipe, "--data", data, "--model", tiny, "--repeats", 0]
    metrics = ["--metric", "target-probability,entropy", "--metric", "accuracy"]
    found = read(capsys, *common, *metrics, "--save", tmp_path / "result.json")
    model, tokenizer = load(tiny)
    expected = evaluate(
        model, Plan.load(recipe), data, metrics=["target-probability", "entropy", "accuracy"], tokenizer=tokenizer, repeats=0,
        info={"name": str(tiny)},
    )  # fmt: skip
    assert (found["schema"], found["model"], found["passed"]) == ("headscope.edit-run/v1", str(tiny), True)
    assert found["evaluation"] == expected.to_dict()
    jsonschema.validate(found["evaluation"], SCHEMA)
    assert Evaluation.load(tmp_path / "result.json").to_dict() == found["evaluation"]
    table = said(capsys, *common, *metrics, "--repeats", 1)
    assert "effect on 2 examples:" in table
    assert "side effects on 1 benign example:" in table
    assert "edit 1: pattern scale(0.5) on layers 1, keys 'ss': changed something in 1 of 3 examples" in table
    assert "of 2 changed sites, 1 leaves fused attention\n  model.layers.1.self_attn#0\n" in table


def test_assertions_decide_the_exit_code_and_say_their_numbers(tiny: Path, recipe: Path, data: Path, capsys: Shell) -> None:
    common = ["run", recipe, "--data", data, "--model", tiny, "--repeats", 0]
    entropy = read(capsys, *common, "--metric", "entropy")["evaluation"]["effect"][0]["after"]["mean"]
    good, bad = f"entropy>={entropy - 0.01}", f"entropy>={entropy + 0.01}"
    assert f"PASS {good}: it is {entropy:.6g}" in said(capsys, *common, "--assert", good)
    text = said(capsys, *common, "--assert", good, "--assert", bad, "--max-kl", 0, code=1)
    assert f"FAIL {bad}: it is {entropy:.6g}" in text
    assert "FAIL benign.kl<=0.0: it is " in text
    found = read(capsys, *common, "--assert", bad, "--max-kl", 50, code=1)
    assert not found["passed"]
    assert [one["passed"] for one in found["assertions"]] == [False, True]
    assert found["assertions"][0]["value"] == entropy
    alone = read(capsys, *common, "--max-kl", 50)
    assert [row["metric"] for row in alone["evaluation"]["effect"]] == ["kl"]


def test_a_model_that_an_edit_breaks_fails_and_is_reported(tiny: Path, data: Path, tmp_path: Path, capsys: Shell) -> None:
    path = Plan([Edit("z", scale(3e38), select(layer=2))]).save(tmp_path / "r.yaml")
    text = said(capsys, "run", path, "--data", data, "--model", tiny, "--repeats", 0, "--assert", "entropy>=0", "--max-kl", 9, code=1)
    assert "BROKEN: entropy is NaN or infinite in 2 examples after the edits (first: 'a')" in text
    assert "FAIL entropy>=0.0: entropy is NaN or infinite in 2 examples after" in text
    assert "FAIL benign.kl<=9.0: kl is NaN" in text
    assert read(capsys, "run", path, "--data", data, "--model", tiny, "--repeats", 0, "--metric", "entropy")["passed"]


def test_an_interrupted_run_goes_on_from_its_log(
    tiny: Path, recipe: Path, data: Path, tmp_path: Path, capsys: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headscope.app import edit_command

    log = tmp_path / "log.jsonl"
    common = ["run", recipe, "--data", data, "--model", tiny, "--metric", "accuracy,entropy", "--repeats", 0]
    whole = read(capsys, *common)

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(edit_command, "_progress", interrupt)
        assert said(capsys, *common, "--log", log, code=130) == ""
    assert len(log.read_text().splitlines()) == 3
    assert read(capsys, *common, "--log", log) == whole
    assert "was begun with another metrics" in refused(capsys, *common, "--log", log, "--metric", "kl")


def test_the_benign_examples_may_have_their_own_file(tiny: Path, recipe: Path, data: Path, tmp_path: Path, capsys: Shell) -> None:
    beside = written(tmp_path / "benign.jsonl", [{"text": "good night", "target": "!"}, {"text": "ok"}])
    found = read(capsys, "run", recipe, "--data", data, "--benign", beside, "--model", tiny, "--metric", "accuracy", "--repeats", 0)
    assert [(one["id"], one["benign"]) for one in found["evaluation"]["results"]] == [
        ("a", False), ("b", False), ("c", True), ("1", True), ("2", True),
    ]  # fmt: skip
    first = read(capsys, "run", recipe, "--data", data, "--model", tiny, "--assert", "accuracy>=0", "--examples", 2, "--repeats", 0)
    assert [one["id"] for one in first["evaluation"]["results"]] == ["a", "b", "c"]


def test_refusals_are_generated_and_told_by_ones_own_phrases(tiny: Path, recipe: Path, data: Path, capsys: Shell) -> None:
    common = ["run", recipe, "--data", data, "--model", tiny, "--metric", "refusal-rate", "--repeats", 0, "--generate", 4]
    model, tokenizer = load(tiny)
    ids = tokenize(tokenizer, "hello", model)
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[0, 5:], skip_special_tokens=True)
    rows = read(capsys, *common, "--phrase", text)["evaluation"]["results"]
    assert rows[0]["before"]["refusal-rate"] == 1
    assert {one["before"]["refusal-rate"] for one in read(capsys, *common)["evaluation"]["results"]} == {0}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to measure: give --metric, one or several of target-probability"),
        (["--metric", "precision"], "no metric 'precision': there are"),
        (["--metric", "accuracy", "--assert", "accuracy"], "assertion 'accuracy': write METRIC>=NUMBER"),
        (["--assert", "precision>0"], "no metric 'precision'"),
        (["--assert", "benign.logit-difference>0"], "no benign example has target and against, which logit-difference needs"),
        (["--metric", "accuracy", "--max-kl", "-1"], "--max-kl -1.0: give a number of nats"),
        (["--metric", "accuracy", "--max-kl", "x"], "invalid float value"),
        (["--metric", "accuracy", "--phrase", "no"], "--phrase is for --metric refusal-rate"),
        (["--metric", "refusal-rate", "--generate", "0"], "0 generated tokens"),
        (["--metric", "accuracy", "--examples", "0"], "--examples 1 or more"),
        (["--metric", "accuracy", "--repeats", "-1"], "--repeats is 0 or more"),
        (["--metric", "logit-difference"], "data.jsonl line 2 (example 'b') has no against, which logit-difference needs"),
        (["--metric", "accuracy", "--benign", "nowhere.jsonl"], "'nowhere.jsonl' cannot be read"),
        (["--metric", "accuracy", "--save", "nowhere/x.json"], "no such folder"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments: list[str], reason: str, tiny: Path, recipe: Path, data: Path, capsys: Shell) -> None:
    common = [] if "--repeats" in arguments else ["--repeats", 0]
    assert reason in refused(capsys, "run", recipe, "--data", data, "--model", tiny, *common, *arguments)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x" * 300, "target": 1}, "line 1 (example '1'): the text has 300 tokens, the context window of this model 256"),
        ({"text": "a", "target": "ab"}, "line 1 (example '1'): 'ab' is 2 tokens here"),
        ({"image": 3, "target": 1}, "line 1 (example '1'): an image is for embedded:vit"),
        ({"text": "a", "goal": 1}, "line 1 has 'goal': an example may have id, text"),
    ],
)
def test_a_bad_line_is_named(row: dict[str, Any], reason: str, tiny: Path, recipe: Path, tmp_path: Path, capsys: Shell) -> None:
    path = written(tmp_path / "d.jsonl", [row])
    assert f"d.jsonl {reason}" in refused(capsys, "run", recipe, "--data", path, "--model", tiny, "--metric", "accuracy", "--repeats", 0)


def test_a_claim_about_benign_examples_needs_some(tiny: Path, recipe: Path, tmp_path: Path, capsys: Shell) -> None:
    path = written(tmp_path / "d.jsonl", ROWS[:2])
    common = ["run", recipe, "--data", path, "--model", tiny, "--repeats", 0]
    assert "there are no benign examples: give --benign" in refused(capsys, *common, "--assert", "benign.accuracy>0")
    assert "side effects (no benign examples)" in said(capsys, *common, "--max-kl", 90)


def test_a_recipe_for_another_model_is_refused_by_every_command(
    tiny: Path, recipe: Path, data: Path, tmp_path: Path, capsys: Shell
) -> None:
    from tests.app.tiny import save_tiny

    other = save_tiny(tmp_path / "other", seed=1)
    run = ["run", recipe, "--data", data, "--model", other, "--metric", "entropy", "--repeats", 0]
    show = ["show", recipe, "--model", other, "--text", "lasso grass ss", "--repeats", 1]
    for command in (run, show):
        line = refused(capsys, *command)
        assert "made for another model" in line
        assert "use --force" in line
        assert main(["edit", *map(str, command), "--force"]) == 0
        assert "warning: the recipe was made for another model" in capsys.readouterr().err


def test_options_before_the_command_hold_or_are_refused(tiny: Path, recipe: Path, data: Path, capsys: Shell) -> None:
    run = ["run", recipe, "--data", data, "--metric", "entropy", "--repeats", 0]
    assert json.loads(said(capsys, "--json", "--model", tiny, *run))["model"] == str(tiny)
    assert "--scale belongs to plain `headscope edit`" in refused(capsys, "--scale", "1.1=0", "--model", tiny, *run)
    assert "--text belongs to plain `headscope edit`" in refused(capsys, "--text", "x", "diff", recipe, recipe)


def test_progress_goes_to_stderr(tiny: Path, recipe: Path, data: Path, capsys: Shell) -> None:
    assert (
        main(["edit", "run", str(recipe), "--data", str(data), "--model", str(tiny), "--metric", "entropy", "--repeats", "0", "--json"])
        == 0
    )
    captured = capsys.readouterr()
    assert "loading" in captured.err
    assert "3 of 3 examples" in captured.err
    assert len(captured.out.splitlines()) == 1


def test_the_metrics_are_listed(capsys: Shell) -> None:
    text = said(capsys, "run", "--list-metrics")
    assert [line.split()[0] for line in text.splitlines()] == list(NAMED)
    assert all(len(line.split()) > 2 for line in text.splitlines())


def test_digits_are_measured_by_their_class(tmp_path: Path, capsys: Shell) -> None:
    try:
        embedded_folder("vit")
    except HeadscopeError as error:
        pytest.skip(str(error))
    path = Plan([Edit("z", scale(0.0))]).save(tmp_path / "r.yaml")
    rows = written(tmp_path / "d.jsonl", [{"image": 0, "label": "2"}, {"image": 1, "label": 2}, {"image": 2, "label": 2, "benign": True}])
    common = ["--model", "embedded:vit", "--repeats", 0, "--metric", "accuracy"]
    found = read(capsys, "run", path, "--data", rows, *common)
    assert {row["metric"] for row in found["evaluation"]["side_effects"]} == {"accuracy", "kl"}
    text = written(tmp_path / "t.jsonl", [{"text": "two", "target": 2}])
    assert "embedded:vit reads images: give the number of one" in refused(capsys, "run", path, "--data", text, *common)
    many = written(tmp_path / "m.jsonl", [{"image": 99999, "target": 2}])
    assert "m.jsonl line 1 (example '1'): no image 99999" in refused(capsys, "run", path, "--data", many, *common)


# -- edit show, edit diff ------------------------------------------------------------------------------------------------


def test_a_recipe_is_shown_in_words_as_python_and_with_its_cost(tiny: Path, recipe: Path, capsys: Shell) -> None:
    text = said(capsys, "show", recipe)
    assert "2 edits\n  0: z scale(-3.0) on layers 3\n" in text
    names: dict[str, Any] = {}
    exec(text.partition("\n\n")[2], names)
    assert names["plan"] == Plan.load(recipe)
    assert "forward" not in text
    priced = said(capsys, "show", recipe, "--model", tiny, "--text", "ssss", "--repeats", 1)
    assert "edit 1 is carried out at pattern, in 1 call\n" in priced
    assert "x the forward without the plan" in priced
    found = read(capsys, "show", recipe, "--model", tiny, "--text", "ssss", "--repeats", 1)
    assert (found["schema"], found["cost"]["repeats"], len(found["cost"]["sites"])) == ("headscope.edit-show/v1", 1, 2)
    assert read(capsys, "show", recipe)["cost"] is None
    assert "with --text the cost is measured on a text of yours" in refused(capsys, "show", recipe, "--model", tiny)
    assert "--text is what a model reads: give --model too" in refused(capsys, "show", recipe, "--text", "x")
    assert "--repeats 0" in refused(capsys, "show", recipe, "--model", tiny, "--repeats", 0)


def test_a_recipe_too_large_for_a_script_says_so(tmp_path: Path, capsys: Shell) -> None:
    from headscope.interventions import add

    path = Plan([Edit("z", add(torch.ones(5000)), select(layer=0))]).save(tmp_path / "big.yaml")
    assert "as Python: the plan's tensors hold 5000 numbers" in said(capsys, "show", path)
    assert read(capsys, "show", path)["python"] is None


def test_two_recipes_are_compared_edit_by_edit(recipe: Path, tmp_path: Path, capsys: Shell) -> None:
    other = Plan([Edit("z", scale(-3.0), select(layer=3)), Edit("z", scale(0.0), select(layer=1))]).save(tmp_path / "other.yaml")
    assert said(capsys, "diff", recipe, recipe) == "  2 edits in common\n"
    assert said(capsys, "diff", recipe, other, code=1).splitlines() == [
        "- 1: pattern scale(0.5) on layers 1, keys 'ss'", "+ 1: z scale(0.0) on layers 1", "  1 edits in common",
    ]  # fmt: skip
    found = read(capsys, "diff", recipe, other, code=1)
    assert (found["schema"], found["same"], found["kept"]) == ("headscope.edit-diff/v1", False, 1)
    assert read(capsys, "diff", recipe, recipe)["same"]
    assert "there is no recipe 'nowhere.yaml'" in refused(capsys, "diff", recipe, "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("edits: [")
    assert "bad.yaml: not a YAML recipe" in refused(capsys, "diff", recipe, tmp_path / "bad.yaml")


@pytest.mark.parametrize("command", ["run", "show", "diff", "heads", "direction", "saferope"])
def test_every_command_has_help_with_an_example_and_json(command: str, capsys: Shell) -> None:
    text = said(capsys, command, "--help")
    assert f"example: headscope edit {command}" in text
    assert "--json" in text


def test_a_recipe_about_roles_needs_examples_that_say_them(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    named = Plan([Edit("scores", bias(-1.0), select(keys=role("subject")))]).save(tmp_path / "roles.yaml")
    data = tmp_path / "roles.jsonl"
    data.write_text('{"text": "hello", "roles": {"subject": [1, 2]}}\n')
    assert "changed something in 1 of 1 examples" in said(
        capsys, "run", named, "--data", data, "--model", tiny, "--metric", "kl", "--repeats", 0
    )
    data.write_text('{"text": "hello"}\n')
    line = refused(capsys, "run", named, "--data", data, "--model", tiny, "--metric", "kl")
    assert "roles.jsonl line 1" in line
    assert 'add positions, such as "roles": {"subject": [3, 4]}' in line
    assert "keys role subject" in said(capsys, "show", named)
    assert "by role (subject), which the command line cannot find" in refused(capsys, "show", named, "--model", tiny)
