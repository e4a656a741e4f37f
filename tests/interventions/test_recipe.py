"""Recipes: what is saved is what is loaded, and nothing that is not understood gets in."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headscope.interventions import Edit, Plan, add, assign, bias, call, freeze, mask, patch, renorm, scale, select, span
from headscope.interventions.source import StoredRun
from headscope.kernels.errors import EditError, RecipeError
from headscope.probe.models import model_fingerprint
from tests.interventions.test_select import selectors

SCHEMA = json.loads(files("headscope.interventions").joinpath("recipe.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
tensors = st.builds(lambda shape, dtype, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
                    st.lists(st.integers(1, 3), max_size=4), dtypes, st.integers(0, 99))  # fmt: skip
ops = st.one_of(
    numbers.map(scale),
    (numbers | tensors).map(add),
    (numbers | tensors | st.sampled_from(["zero", "mean"])).map(assign),
    (numbers | tensors).map(bias),
    st.builds(mask),
    tensors.map(patch),
    tensors.map(freeze),
    st.builds(renorm),
)
STAGES = ["q.pre", "k.pre", "q", "k", "v", "bias", "scores", "pattern", "z", "o"]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    edits = []
    for _ in range(draw(st.integers(0, 4))):
        try:
            edits.append(Edit(draw(st.sampled_from(STAGES)), draw(ops), draw(selectors()), draw(st.just(1.0) | numbers)))
        except EditError:
            continue
    try:
        return Plan(edits)
    except EditError:
        return Plan(edits[:1])


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Plan.load(write(folder, text))
    return str(caught.value)


@settings(max_examples=60, deadline=None)
@given(plan=plans())
def test_a_plan_comes_back_from_yaml_and_fits_the_schema(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = plan.save(tmp_path_factory.mktemp("recipe") / "recipe.yaml")
    assert Plan.load(path) == plan
    VALIDATOR.validate(yaml.safe_load(path.read_text()))
    assert not list(path.parent.glob("*.tmp"))


@settings(max_examples=60, deadline=None)
@given(plan=plans())
def test_a_plan_comes_back_from_python(plan: Plan) -> None:
    names: dict[str, object] = {}
    exec(plan.to_python(), names)
    assert names["plan"] == plan


@given(plan=plans())
@settings(max_examples=30, deadline=None)
def test_a_plan_without_tensors_comes_back_from_json(plan: Plan) -> None:
    if "tensor" in str(plan):
        with pytest.raises(RecipeError, match="use plan.save"):
            plan.to_dict()
        return
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_schema_is_itself_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_a_recipe_reads_as_one_would_write_it(tmp_path: Path) -> None:
    plan = Plan(
        [Edit("z", scale(0.0), select(layer=3, head=5)), Edit("scores", bias(-2.0), select(layers=range(4, 8), keys=span("password")))]
    )
    assert Plan.load(plan.save(tmp_path / "r.yaml")) == plan
    assert Plan.load(write(tmp_path, """
        schema: headscope-recipe/1
        edits:
        - {stage: z, op: scale, value: 0, layers: 3, heads: [5]}
        - {stage: scores, op: bias, value: -2e0, layers: {start: 4, stop: 8}, keys: {span: password}}
        """)) == plan  # fmt: skip
    assert plan.to_python() == (
        "from headscope.interventions import Edit, Plan, bias, scale, select, span\n\n"
        "plan = Plan([\n"
        "    Edit('z', scale(0.0), select(layer=3, head=5)),\n"
        "    Edit('scores', bias(-2.0), select(layers=range(4, 8), keys=span('password'))),\n"
        "])\n"
    )


HEAD = "schema: headscope-recipe/1\n"
BAD = {
    "an unknown key": (HEAD + "edits: []\nnotes: x", "unknown key 'notes': the keys are schema, model, tensors, edits"),
    "an unknown edit key": (
        HEAD + "edits: [{stage: z, op: scale, value: 0, layer: 3}]",
        "edits[0]: unknown key 'layer': the keys are stage, op, value",
    ),
    "no schema": ("edits: []", "schema is missing: the recipe begins with the line schema: headscope-recipe/1"),
    "another schema": ("schema: recipe/v9\nedits: []", "schema is 'recipe/v9'"),
    "no edits": (HEAD, "edits is missing: it is a list"),
    "edits that are no list": (HEAD + "edits: {}", "edits is a dict: it is a list"),
    "an edit that is no mapping": (HEAD + "edits: [3]", "edits[0]: an edit is a mapping"),
    "no stage": (HEAD + "edits: [{op: scale, value: 1}]", "edits[0]: stage is missing"),
    "an unknown stage": (HEAD + "edits: [{stage: y, op: scale, value: 1}]", "edits[0]: no stage 'y'"),
    "an unknown op": (
        HEAD + "edits: [{stage: z, op: zero}]",
        "unknown op 'zero': the ops are scale, add, set, bias, mask, patch, freeze, renorm",
    ),
    "the name it has in Python": (HEAD + "edits: [{stage: z, op: assign, value: 0}]", "unknown op 'assign': assign is written set"),
    "code": (HEAD + "edits: [{stage: z, op: call, value: os.system}]", "unknown op 'call'"),
    "no value": (HEAD + "edits: [{stage: z, op: scale}]", "scale needs a value"),
    "a value too many": (HEAD + "edits: [{stage: scores, op: mask, value: 1}]", "mask takes no value"),
    "text for a number": (HEAD + "edits: [{stage: z, op: scale, value: half}]", "value is 'half': it is a number"),
    "a truth value for a number": (HEAD + "edits: [{stage: z, op: scale, value: true}]", "value is True: it is a number"),
    "infinity": (HEAD + "edits: [{stage: z, op: scale, value: .inf}]", "the factor is a finite number"),
    "an unknown word": (HEAD + "edits: [{stage: z, op: set, value: median}]", '"zero" and "mean"'),
    "a bad head": (HEAD + "edits: [{stage: z, op: scale, value: 0, heads: [five]}]", "heads=['five']: give an int"),
    "a null": (HEAD + "edits: [{stage: z, op: scale, value: 0, heads: null}]", "heads: null: leave the key out"),
    "a bad range": (HEAD + "edits: [{stage: z, op: scale, value: 0, heads: {from: 1}}]", "a mapping here is {start: 4, stop: 8}"),
    "a huge range": (HEAD + "edits: [{stage: z, op: scale, value: 0, heads: {start: 0, stop: 99999999999}}]", "the most is 1,000,000"),
    "an impossible edit": (HEAD + "edits: [{stage: z, op: bias, value: 0}]", "edits[0]: bias(0.0) cannot be done at z"),
    "a contradiction": (
        HEAD + "edits: [{stage: z, op: set, value: 0}, {stage: z, op: set, value: 1}]",
        "the recipe contradicts itself: two edits overwrite",
    ),
    "a tensor that is not there": (HEAD + "edits: [{stage: z, op: add, value: {tensor: edit0}}]", "the tensor file holds no 'edit0'"),
    "a run that is not there": (HEAD + "edits: [{stage: z, op: patch, value: {run: edit0}}]", "the tensor file holds no run 'edit0'"),
    "a patch of a number": (
        HEAD + "edits: [{stage: z, op: patch, value: 3}]",
        "patch takes {tensor: name} or {run: name} as its value, not 3",
    ),
    "a tensor file elsewhere": (
        HEAD + "tensors: {file: ../x.safetensors, sha256: ab}\nedits: []",
        "it is the plain name of a .safetensors file beside the recipe",
    ),
    "a tensor file without a checksum": (HEAD + "tensors: {file: x.safetensors}\nedits: []", "tensors.sha256 is None"),
    "a tensor file that is missing": (
        HEAD + f"tensors: {{file: x.safetensors, sha256: '{'0' * 64}'}}\nedits: []",
        "cannot be read: No such file",
    ),
    "a bad fingerprint": (HEAD + "model: {fingerprint: gpt2}\nedits: []", "model.fingerprint is 'gpt2'"),
    "an unknown model key": (HEAD + "model: {id: gpt2}\nedits: []", "unknown model key 'id'"),
    "a list": ("- 1", "a recipe is a mapping with the keys schema, model, tensors, edits; this is a list"),
    "nothing": ("", "the recipe is empty: it is a mapping with the keys schema, model, tensors, edits"),
    "an alias": (HEAD + "edits: &a [1]\nmodel: *a", "aliases are not allowed in a recipe"),
    "a repeated key": (HEAD + "edits: []\nedits: []", "key 'edits' is given twice"),
    "a python tag": ("!!python/object/apply:os.system ['true']", "not a YAML recipe"),
    "no YAML": ("{", "not a YAML recipe"),
    "a key that is no text": (HEAD + "edits: []\n1: 2", "key 1 is not text"),
    "deep nesting": ("[" * 30_000, "not a YAML recipe"),
    "a long number": (HEAD + f"edits: [{{stage: z, op: scale, value: {'9' * 5000}}}]", "recipe"),
    "a large number": (HEAD + f"edits: [{{stage: z, op: scale, value: {'9' * 400}}}]", "too large"),
    "too many edits": (HEAD + "edits: [" + "{stage: z, op: scale, value: 0}, " * 513 + "]", "513 edits: a recipe has at most 512"),
    "too many bytes": ("#" * 70_000, "a recipe has at most that"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_recipe_with_a_fault_is_refused_by_name(what: str, tmp_path: Path) -> None:
    text, message = BAD[what]
    found = refusal(tmp_path, text)
    assert found.startswith(("recipe.yaml: ", "the recipe contradicts"))
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize(
    "what",
    [
        what
        for what in BAD
        if what.startswith(("an unknown", "no s", "no v", "no e", "a value", "text", "a truth", "a bad", "a null", "too many e", "an edit"))
    ],
)
def test_the_schema_refuses_what_load_refuses(what: str) -> None:
    document = yaml.safe_load(BAD[what][0])
    assert not VALIDATOR.is_valid(document)


@pytest.mark.parametrize(
    "text",
    [
        "12e4",
        "12e4a",
        "1e-4",
        "null",
        "true",
        "0x1F",
        "2020-01-01",
        "1:30",
        "~",
        "!a",
        "*a",
        "&a",
        "é€\U0001f600",
        "a\n b",
        "\x85",
        "a\x85b\u2028\u2029",
        "\x00",
        "\ud800",
    ],
)
def test_text_that_looks_like_something_else_stays_text(text: str, tmp_path: Path) -> None:
    plan = Plan([Edit("k", scale(0.0), select(f"*{text}", keys=span(text)))])
    assert Plan.load(plan.save(tmp_path / "r.yaml")) == plan


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="none.yaml: no recipe can be read there"):
        Plan.load(tmp_path / "none.yaml")


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="gone/r.yaml cannot be written: No such file"):
        Plan([Edit("z", scale(0.0))]).save(tmp_path / "gone" / "r.yaml")


def test_a_function_cannot_be_saved(tmp_path: Path) -> None:
    plan = Plan([Edit("z", call(lambda value, _: value))])
    for write_down in (lambda: plan.save(tmp_path / "r.yaml"), plan.to_dict, plan.to_python):
        with pytest.raises(RecipeError, match=r"edit 0 .* cannot be (saved: a recipe holds no code|written as text)"):
            write_down()
    assert not list(tmp_path.iterdir())


def test_a_run_is_saved_with_its_places_and_refused_as_text(tmp_path: Path) -> None:
    run = StoredRun("pattern", {("model.layers.0.attn#0", 0): torch.rand(1, 2, 3, 3), ("a/b#1", 12): torch.rand(1, 2, 1, 4)})
    plan = Plan([Edit("pattern", freeze(run))])
    assert Plan.load(plan.save(tmp_path / "r.yaml")) == plan
    with pytest.raises(RecipeError, match=r"use plan.save\(path\)"):
        plan.to_python()


def test_large_tensors_are_not_written_as_text() -> None:
    with pytest.raises(RecipeError, match="the plan's tensors hold 5000 numbers, a script at most 4096"):
        Plan([Edit("z", add(torch.zeros(5000)))]).to_python()


def test_a_changed_tensor_file_is_refused(tmp_path: Path) -> None:
    path = Plan([Edit("z", add(torch.arange(5.0)))]).save(tmp_path / "r.yaml")
    (sidecar,) = tmp_path.glob("*.safetensors")
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RecipeError, match="its sha256 differs"):
        Plan.load(path)
    sidecar.unlink()
    (tmp_path / "other").write_bytes(content)
    for link in (os.symlink, os.link):
        link(tmp_path / "other", sidecar)
        with pytest.raises(RecipeError, match="is not a plain file, or a link|cannot be read"):
            Plan.load(path)
        sidecar.unlink()


def test_a_recipe_that_is_replaced_never_loses_its_tensors(tmp_path: Path) -> None:
    first = Plan([Edit("z", add(torch.arange(5.0)))])
    path = first.save(tmp_path / "r.yaml")
    before = path.read_bytes()
    Plan([Edit("z", add(torch.arange(6.0)))]).save(path)
    path.write_bytes(before)  # as if the second writing had stopped before the recipe itself
    assert Plan.load(path) == first


def test_too_large_a_plan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a recipe has at most 65536; split the plan"):
        Plan([Edit("scores", bias(1.0), select(keys=range(0, 40_000, 2)))]).save(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="513 edits"):
        Plan([Edit("z", add(1.0))] * 513).save(tmp_path / "r.yaml")
    assert not list(tmp_path.iterdir())


def test_a_recipe_for_another_model_is_refused_unless_forced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    plan = Plan([Edit("z", scale(0.0))])
    path = plan.save(tmp_path / "r.yaml", model=one)
    VALIDATOR.validate(yaml.safe_load(path.read_text()))
    assert Plan.load(path) == Plan.load(path, model=one) == plan
    with pytest.raises(RecipeError, match=f"made for another model: it names {model_fingerprint(one)[:19]}"):
        Plan.load(path, model=other)
    with pytest.warns(UserWarning, match="made for another model"):
        assert Plan.load(path, model=other, force=True) == plan
