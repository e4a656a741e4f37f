"""Plans tried on examples: numbers are those of the plain loop over the model, work that stops goes on, what is broken is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.interventions import Edit, Plan, add, bias, call, role, scale, select, span
from headscope.interventions.evaluation.assertions import parse_assertion
from headscope.interventions.evaluation.changes import Result, change_of
from headscope.interventions.evaluation.evaluate import evaluate
from headscope.interventions.evaluation.evaluation import Evaluation
from headscope.interventions.evaluation.examples import Example
from headscope.interventions.evaluation.metrics import generated, refusal_rate
from headscope.kernels.errors import HeadscopeError, InputError, SelectionError, StoreError
from headscope.probe import load

ABLATE = Plan([Edit("z", scale(0.0), select(layer=1, head=2))])
SCHEMA = json.loads((files("headscope.interventions.evaluation") / "evaluation.schema.json").read_text())


class Letters:
    """A tokenizer of one token a letter, ids 0 to 25."""

    def __call__(self, text: str, **_: object) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) - 97 for letter in text]])}

    def encode(self, text: str, **_: object) -> list[int]:
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(97 + int(id)) for id in ids)


TOKENIZER = Letters()
ROWS: list[dict[str, object]] = [
    {"id": "one", "text": "abcab", "target": "c", "against": "d"},
    {"id": "two", "text": "bbca", "target": "a", "against": 5},
    {"id": "three", "text": "hello", "target": 7, "against": "x"},
    {"id": "four", "text": "zyx", "target": "z", "against": "a"},
    {"id": "kind", "text": "kind", "target": "d", "benign": True},
    {"id": "nice", "text": "nicer", "benign": True},
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=26,
        max_position_embeddings=16, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if "proj" in name:
            parameter.data *= 8
    return made


def logits(model: nn.Module, text: str, plan: Plan | None = None) -> Tensor:
    inputs = TOKENIZER(text)
    with torch.no_grad():
        if plan is None:
            return model(**inputs).logits[0].double()
        with plan.on(model, tokenizer=TOKENIZER, input_ids=inputs["input_ids"]):
            return model(**inputs).logits[0].double()


def run(model: nn.Module, plan: Plan = ABLATE, data: Any = ROWS, **options: Any) -> Evaluation:
    return evaluate(model, plan, data, **{"metrics": ["accuracy"], "tokenizer": TOKENIZER, "repeats": 0, **options})


def test_effect_and_side_effects_are_those_of_the_plain_loop(model: LlamaForCausalLM) -> None:
    found = run(model, metrics=["target-probability", "logit-difference"])
    differences = []
    for row in ROWS[:4]:
        target, against = (one if isinstance(one, int) else ord(str(one)) - 97 for one in (row["target"], row["against"]))
        before, after = (logits(model, str(row["text"]), plan)[-1] for plan in (None, ABLATE))
        differences.append(float(after.softmax(-1)[target] - before.softmax(-1)[target]))
        result = next(one for one in found.results if one.id == row["id"])
        assert result.before["target-probability"] == pytest.approx(float(before.softmax(-1)[target]), rel=1e-12)
        assert result.after["logit-difference"] == pytest.approx(float(after[target] - after[against]), rel=1e-12)
    change = found["target-probability"]
    assert change.difference is not None
    assert change.difference.mean == pytest.approx(np.mean(differences), rel=1e-12)
    divergences = []
    for row in ROWS[4:]:
        before, after = (logits(model, str(row["text"]), plan).log_softmax(-1) for plan in (None, ABLATE))
        divergences.append(float((before.exp() * (before - after)).sum(-1).mean()))
    side = found["benign.kl"]
    assert side.after is not None
    assert side.after.mean == pytest.approx(np.mean(divergences), rel=1e-9)
    assert {row.metric for row in found.side_effects} == {"target-probability", "accuracy", "kl", "perplexity"}
    accuracy = found["benign.accuracy"].before
    assert accuracy is not None
    assert accuracy.n == 1  # only `kind` has a target
    assert (found.benign, found.hits) == (2, (6,))


def test_the_interval_of_the_difference_resamples_pairs() -> None:
    generator = np.random.default_rng(3)
    before = generator.normal(size=40) * 10
    after = before + 1 + generator.normal(size=40) * 0.01
    results = [Result(str(place), False, {"m": a}, {"m": b}, ()) for place, (a, b) in enumerate(zip(before, after, strict=True))]
    found = change_of("m", results, seed=5)
    drawn = np.random.default_rng(5).integers(0, 40, size=(2000, 40))
    means = (after - before)[drawn].mean(1)
    assert found.difference is not None
    assert found.before is not None
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-12)
    assert found.difference.low is not None
    assert found.before.low is not None
    assert found.before.high is not None
    assert found.difference.low > 0.9  # though the two means overlap widely
    assert found.before.high - found.before.low > 4


def test_an_edit_at_a_text_acts_on_the_examples_that_hold_it(model: LlamaForCausalLM) -> None:
    plan = Plan([Edit("scores", bias(-3.0), select(keys=span("b"))), Edit("z", scale(0.5), select(layer=0, queries=4))])
    found = run(model, plan)
    assert found.hits == (2, 3)  # b in two texts, a fifth token in three
    hit = {one.id: one.hits for one in found.results}
    assert hit == {
        "one": (True, True), "two": (True, False), "three": (False, True), "four": (False, False), "kind": (False, False),
        "nice": (False, True),
    }  # fmt: skip
    four = next(one for one in found.results if one.id == "four")
    assert four.before == four.after


def test_an_edit_that_changes_nothing_anywhere_is_named(model: LlamaForCausalLM) -> None:
    with pytest.raises(SelectionError, match=r"edit 0 .* of 6 examples: its text 'qq' occurs in none of them"):
        run(model, Plan([Edit("scores", bias(-3.0), select(keys=span("qq")))]))
    with pytest.raises(SelectionError, match="edit 0 .* changed nothing in any of 6 examples: 2 sites match, but none of their steps"):
        run(model, Plan([Edit("z", scale(0.0), select(queries=12))]))
    with pytest.raises(SelectionError, match=r"example 'one'\): edit 0 .* no site matches") as raised:
        run(model, Plan([Edit("z", scale(0.0), select(layer=9))]))
    assert "Sites seen: model.layers.0.self_attn" in str(raised.value)
    ids = [{"inputs": TOKENIZER("abcb"), "target": 1}]
    with pytest.raises(SelectionError, match="needs the tokens it stands in"):
        run(model, Plan([Edit("scores", bias(-3.0), select(keys=span("b")))]), ids, tokenizer=None)


def test_roles_may_differ_from_example_to_example(model: LlamaForCausalLM) -> None:
    plan = Plan([Edit("scores", bias(-4.0), select(keys=role("subject")))])
    rows = [{"id": "a", "text": "abcde", "roles": {"subject": [1, 2]}}, {"id": "b", "text": "fghij"}]
    found = run(model, plan, rows, metrics="entropy", roles=lambda example: {"subject": [3]})
    for result, places in zip(found.results, ([1, 2], [3]), strict=True):
        text = next(str(row["text"]) for row in rows if row["id"] == result.id)
        after = logits(model, text, Plan([Edit("scores", bias(-4.0), select(keys=places))]))[-1].log_softmax(-1)
        assert result.after["entropy"] == pytest.approx(float(-(after.exp() * after).sum()), rel=1e-6)
    with pytest.raises(SelectionError, match=r"example 'b'\): role\('subject'\): none were given"):
        run(model, plan, rows, metrics="entropy")


def test_generated_text_is_written_with_the_plan_on(model: LlamaForCausalLM) -> None:
    def written(plan: Plan | None, text: str, count: int) -> str:
        ids = TOKENIZER(text)["input_ids"]
        for _ in range(count):
            with torch.no_grad():
                if plan is None:
                    row = model(input_ids=ids).logits[0, -1]
                else:
                    with plan.on(model):
                        row = model(input_ids=ids).logits[0, -1]
            ids = torch.cat([ids, row.argmax()[None, None]], -1)
        return TOKENIZER.decode(ids[0, len(text) :].tolist())

    texts: list[tuple[str, str]] = []

    def note(text: str, example: Example) -> float:
        texts.append((example.id, text))
        return float(len(text))

    plan = Plan([Edit("z", scale(-2.0), select(layer=0, head=1))])
    rows = ROWS[:2]
    long = [written(plan, str(row["text"]), 6) for row in rows]
    found = run(model, plan, rows, metrics=[generated("long", note, 6), generated("short", note, 3), refusal_rate([long[0][2:5]], 6)])
    expected = [
        (str(row["id"]), written(now, str(row["text"]), count)) for row in rows for count in (6, 3) for now in (None, plan)
    ]  # fmt: skip
    assert sorted(texts) == sorted(expected)
    assert [one.after["long"] for one in found.results] == [6, 6]
    assert found.results[0].after["refusal-rate"] == 1
    with pytest.raises(InputError, match="5 tokens and 32 generated ones are more than the context window of 16"):
        run(model, plan, rows, metrics="refusal-rate")


def test_a_later_step_is_reached_by_generation_alone(model: LlamaForCausalLM) -> None:
    plan = Plan([Edit("z", scale(0.0), select(layer=0, phase="decode"))])
    metric = generated("a", lambda text, example: float(text.count("a")), 4)
    assert run(model, plan, ROWS[:2], metrics=metric).hits == (2,)
    with pytest.raises(SelectionError, match="changed nothing in any of 2 examples"):
        run(model, plan, ROWS[:2])


def test_an_edit_that_breaks_the_model_is_reported_and_not_averaged(model: LlamaForCausalLM) -> None:
    def explode(value: Tensor, made: object) -> Tensor:
        return value * (math.nan if value.shape[2] == 4 else 1.0)  # texts of four letters

    found = run(model, Plan([Edit("z", call(explode), select(layer=0))]), metrics=["accuracy", "entropy"])
    change = found["entropy"]
    assert (change.undefined_before, change.undefined_after, change.first_undefined) == (0, 1, "two")
    assert change.after is not None
    assert change.after.n == 3
    assert math.isfinite(change.after.mean)
    assert found.troubles[0] == "accuracy is NaN or infinite in 1 example after the edits (first: 'two')"
    assert any(trouble.startswith("benign: kl is NaN") for trouble in found.troubles)
    verdict = parse_assertion("accuracy>=0").check(found)
    assert (verdict.passed, verdict.trouble) == (False, found.troubles[0])
    rows = [row for row in ROWS if row["id"] == "two"]
    alone = run(model, Plan([Edit("z", call(explode), select(layer=0))]), rows, metrics=[generated("g", lambda *_: 1.0, 3), "entropy"])
    assert alone["g"].after is None  # nothing is said of text that was made of NaN
    assert alone["entropy"].difference is None
    assert not parse_assertion("g<1").check(alone).passed
    assert "undefined" in str(alone)


def test_any_module_and_any_function_can_be_measured(model: LlamaForCausalLM) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(picture=self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(1)
    net = Net().eval()

    def mean(outputs: Any, example: Example) -> Tensor:
        return outputs.picture.mean() * example.facts.get("weight", 1)

    batch = torch.randn(3, 5, 8)
    found = evaluate(net, Plan([Edit("z", scale(0.0))]), [{"x": batch}], metrics=mean, repeats=0)
    assert [one.id for one in found.results] == ["1.1", "1.2", "1.3"]
    bare = float(net.attention.out_proj.bias.detach().mean())
    assert [one.after["mean"] for one in found.results] == pytest.approx([bare] * 3, abs=1e-7)
    assert found.side_effects == ()
    rows = [{"inputs": {"x": batch[:1]}, "facts": {"weight": 2}}]
    assert evaluate(net, Plan([Edit("z", scale(0.0))]), rows, metrics=mean, repeats=0)["mean"].after.mean == pytest.approx(2 * bare)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"example '1'.*SimpleNamespace, which has no logits: measure it by a function"):
        evaluate(net, Plan([Edit("z", scale(0.0))]), [{"x": batch[:1]}], metrics="entropy", repeats=0)


def test_a_run_of_ones_own_draws_alike_with_and_without_the_plan(model: LlamaForCausalLM) -> None:
    drawn: list[float] = []

    def draw(example: Example) -> Tensor:
        drawn.append(float(torch.rand(())))
        return model(input_ids=TOKENIZER("ab")["input_ids"]).logits.sum() * 0 + drawn[-1]

    def number(outputs: Tensor, example: Example) -> Tensor:
        return outputs

    torch.manual_seed(11)
    expected = torch.rand(())
    torch.manual_seed(11)
    found = evaluate(model, ABLATE, [{"text": "draw"}] * 1, metrics=number, run=draw, repeats=0, seed=4)
    assert torch.rand(()) == expected  # torch's own generator goes on as if nothing had been
    assert drawn[0] == drawn[1]
    assert found["number"].difference.mean == 0  # type: ignore[union-attr]


def test_a_plan_that_is_on_belongs_to_the_model_as_it_is(model: LlamaForCausalLM) -> None:
    other = Plan([Edit("z", scale(0.0), select(layer=0, head=0))])
    with other.on(model):
        found = run(model, metrics="target-logit", data=ROWS[:1])
    both = Plan([*other, *ABLATE])
    assert found.results[0].before["target-logit"] == pytest.approx(float(logits(model, "abcab", other)[-1, 2]), rel=1e-6)
    assert found.results[0].after["target-logit"] == pytest.approx(float(logits(model, "abcab", both)[-1, 2]), rel=1e-6)


def test_the_model_is_left_as_it_was_also_after_a_metric_fails(model: LlamaForCausalLM) -> None:
    def fails(outputs: object, example: Example) -> float:
        raise ZeroDivisionError("mine")

    before = logits(model, "abc")
    with pytest.raises(ZeroDivisionError, match="mine"):
        run(model, metrics=fails)
    assert torch.equal(logits(model, "abc"), before)


def test_the_price_is_measured_where_most_edits_apply(model: LlamaForCausalLM) -> None:
    plan = Plan([Edit("pattern", scale(0.5), select(layer=1, keys=span("b"))), *ABLATE])
    found = run(model, plan, repeats=2)
    assert found.price is not None
    assert found.price.example == "one"  # the longest text with a b
    assert [(site.site, site.leaves_fused) for site in found.price.cost.sites] == [("model.layers.1.self_attn#0", True)]
    assert found.price.cost.repeats == 2
    assert found.price.cost.overhead > 0
    assert run(model).price is None


class Stop(Exception):
    pass


@pytest.mark.parametrize("cut", [0, 30])
def test_work_that_was_killed_goes_on_and_ends_with_the_same_bits(model: LlamaForCausalLM, tmp_path: Path, cut: int) -> None:
    wanted = ["accuracy", "entropy", generated("length", lambda text, example: float(len(set(text))), 4)]
    whole = run(model, metrics=wanted, repeats=1, log=tmp_path / "whole.jsonl")
    log, seen = tmp_path / "log.jsonl", []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        run(model, metrics=wanted, repeats=1, log=log, progress=stop)
    if cut:  # the power went while a line was being written
        log.write_bytes(log.read_bytes()[:-cut])
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        resumed = run(model, metrics=wanted, repeats=1, log=log)
        worked = len(calls)
        again = run(model, metrics=wanted, repeats=1, log=log)
    finally:
        handle.remove()
    assert seen == [1, 2, 3]
    assert worked > 0
    assert len(calls) == worked  # the third time nothing is run at all
    assert again.to_json() == resumed.to_json()
    assert replace(resumed, price=None).to_json() == replace(whole, price=None).to_json()
    assert resumed.price is not None  # measured before the interruption


def test_a_log_of_other_work_is_refused_and_a_damaged_one_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    run(model, log=log)
    for reason, options in {
        "another metrics": {"metrics": "entropy"},
        "another seed": {"seed": 1},
        "another plan": {"plan": Plan([Edit("z", scale(0.5), select(layer=1, head=2))])},
        "another data": {"data": [*ROWS[:1], *ROWS[4:]]},
        "another benign": {"data": ROWS[:4]},
    }.items():
        with pytest.raises(InputError, match=f"was begun with {reason}.*: delete it"):
            run(model, log=log, **options)
    content = log.read_bytes().split(b"\n")
    content[2] = content[2].replace(b"0", b"1")
    log.write_bytes(b"\n".join(content))
    with pytest.raises(StoreError, match="line 3 is damaged"):
        run(model, log=log)
    for other in (b"my notes", b"my notes\n", b"a\nb\n"):
        log.write_bytes(other)
        with pytest.raises(StoreError, match="is no log of an evaluation|is damaged"):
            run(model, log=log)
        assert log.read_bytes() == other
    with pytest.raises(StoreError, match="cannot be kept as a log"):
        run(model, log=tmp_path / "nowhere" / "log.jsonl")


def test_plans_that_hold_tensors_or_code_can_be_logged(model: LlamaForCausalLM, tmp_path: Path) -> None:
    first, second = (Plan([Edit("z", add(torch.full((8,), number)), select(layer=0))]) for number in (1.0, 2.0))
    log = tmp_path / "log.jsonl"
    run(model, first, log=log)
    with pytest.raises(InputError, match="another plan"):
        run(model, second, log=log)
    code = Plan([Edit("z", call(_same))])
    assert run(model, code, log=tmp_path / "code.jsonl").results == run(model, code, log=tmp_path / "code.jsonl").results


def _same(value: Tensor, made: object) -> Tensor:
    return value


def test_what_is_saved_is_loaded_and_valid(model: LlamaForCausalLM, tmp_path: Path) -> None:
    found = run(model, metrics=["accuracy", "entropy"], repeats=1, info={"name": "tiny"})
    broken = replace(found, results=(Result("x", False, {"a": math.nan}, {"a": 1.0}, (True,)),))
    for one in (found, broken, run(model, data=ROWS[:1])):
        jsonschema.validate(one.to_dict(), SCHEMA)
        loaded = Evaluation.load(one.save(tmp_path / "found.json"))
        assert loaded.to_json() == one.to_json()
        assert (loaded.effect, loaded.price, loaded.hits) == (one.effect, one.price, one.hits)
    assert math.isnan(Evaluation.load(broken.save(tmp_path / "b.json")).results[0].before["a"])
    assert found.info["name"] == "tiny"
    assert found.info["fingerprint"].startswith("sha256:")  # type: ignore[attr-defined]
    document = found.to_dict()
    for change, reason in (
        ({"schema": "headscope.evaluation/v9"}, "this version reads"),
        ({"extra": 1}, "'extra' is missing or unknown"),
        ({"results": [{}]}, "damaged"),
        ({"effect": 3}, "damaged"),
    ):
        path = tmp_path / "bad.json"
        path.write_text(json.dumps({**document, **change}))
        with pytest.raises(StoreError, match=reason):
            Evaluation.load(path)
    (tmp_path / "bad.json").write_text('{"schema": NaN}')
    with pytest.raises(StoreError, match="NaN, which is not a number of JSON"):
        Evaluation.load(tmp_path / "bad.json")
    with pytest.raises(StoreError, match="cannot be read"):
        Evaluation.load(tmp_path / "nowhere.json")


def test_a_result_is_a_table_a_picture_and_markup(model: LlamaForCausalLM) -> None:
    found = run(model, repeats=1)
    frame = found.to_frame()
    assert list(frame.columns) == ["id", "benign", "metric", "before", "after"]
    assert len(frame) == 4 + 3 + 2  # `kind`: accuracy, kl, perplexity; `nice` has no target
    panels = found.plot()
    assert len(panels.data) == len(found.effect) + len(found.side_effects)
    row = found["benign.kl"].after
    assert row is not None
    assert row.high is not None
    drawn = next(trace for trace, title in zip(panels.data, panels.layout.annotations, strict=True) if title.text == "benign: kl")
    assert drawn.y[1] + drawn.error_y.array[1] == pytest.approx(row.high)
    hostile = replace(found, effect=(replace(found.effect[0], metric="<b>", undefined_after=1, first_undefined="<script>"),))
    page = hostile._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    with pytest.raises(SelectionError, match="'recall' was not measured: there are accuracy, benign.accuracy"):
        found["recall"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"metrics": "logit-difference", "data": [{"text": "abc", "target": 1}]},
            "has no against, which logit-difference needs",
        ),
        ({"data": ["abc"]}, "example '1' has no target, which accuracy needs"),
        ({"data": [{"text": "abc" * 9, "target": 1}]}, "example '1'.*27 tokens, the context window of this model 16"),
        ({"data": [{"text": "abc", "target": "xy"}]}, "'xy' is 2 tokens here"),
        ({"data": [{"text": "abc", "target": 26}]}, "no token or class 26: there are 26, 0 to 25"),
        ({"data": [{"text": "", "target": 2}]}, "example '1'"),
        ({"data": [{"text": "abc", "target": 1}], "tokenizer": None}, "a text needs a tokenizer"),
        ({"data": ROWS[4:]}, "every example is benign"),
        ({"data": ROWS, "benign": ROWS[4:5]}, "two benign examples have the same id"),
        ({"data": ROWS, "benign": []}, "benign is empty"),
        ({"examples": 0}, "examples=0: give how many"),
        ({"repeats": -1}, "repeats=-1"),
        ({"data": [{"image": 3, "target": 1}]}, "only the command line reads"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is_run(model: LlamaForCausalLM, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        run(model, **options)


def test_a_model_in_training_is_refused(model: LlamaForCausalLM) -> None:
    model.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            run(model)
    finally:
        model.eval()


def test_the_first_examples_of_both_sets_are_taken(model: LlamaForCausalLM) -> None:
    assert [one.id for one in run(model, examples=1).results] == ["one", "kind"]
    assert [one.id for one in run(model, data=ROWS[:4], benign=ROWS[4:], examples=2).results] == ["one", "two", "kind", "nice"]


def test_pictures_are_judged_by_a_function_after_a_whole_diffusion_run() -> None:
    pytest.importorskip("diffusers")
    try:
        transformer, flow = load("embedded:mmdit")
    except HeadscopeError as error:
        pytest.skip(str(error))

    def ink(pictures: Tensor, example: Example) -> Tensor:
        return pictures.mean()

    plan = Plan([Edit("z", scale(0.0), select(timesteps=(0.0, 0.6)))])
    rows = [{"id": "7", "text": "a plain eight"}, {"id": "9", "text": "a plain three", "benign": True}]
    found = evaluate(
        transformer, plan, rows, metrics=ink, repeats=1, run=lambda example: flow.sample(str(example.text), seed=int(example.id), steps=2)
    )
    with plan.on(transformer):
        expected = float(flow.sample("a plain eight", seed=7, steps=2).mean())
    assert found.results[0].after["ink"] == expected
    assert found.results[0].before["ink"] == float(flow.sample("a plain eight", seed=7, steps=2).mean()) != expected
    assert [row.metric for row in found.side_effects] == ["ink"]
    assert found.price is not None
