"""Every metric equals its formula written out in float64 numpy, from the model's logits alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.interventions.evaluation.examples import Case, Example
from headscope.interventions.evaluation.metrics import NAMED, Metric, Outcome, as_metrics, generated, refusal_rate
from headscope.kernels.errors import InputError

TOKENS, WORDS = 5, 11
IDS = torch.tensor([[3, 1, 4, 1, 5]])
TARGET, AGAINST = 7, 2


def drawn(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case_of(**inputs: Tensor) -> Case:
    return Case(Example("a", "text"), inputs, TARGET, AGAINST)


def pair(before: Tensor, after: Tensor, **inputs: Tensor) -> tuple[Outcome, Outcome]:
    case = case_of(**(inputs or {"input_ids": IDS}))
    first = Outcome(case, before)
    return first, Outcome(case, after, reference=first)


def value(name: str, outcome: Outcome) -> float:
    return NAMED[name]().measure(outcome, outcome.case)


def probabilities(row: Tensor) -> np.ndarray:
    wide = row.numpy().astype(np.float64)
    weights = np.exp(wide - wide.max())
    found: np.ndarray = weights / weights.sum()
    return found


def surprise(logits: Tensor) -> float:
    terms = [-math.log(probabilities(logits[place])[int(IDS[0, place + 1])]) for place in range(TOKENS - 1)]
    return math.exp(sum(terms) / len(terms))


def divergence(before: Tensor, after: Tensor) -> float:
    total = 0.0
    for one, two in zip(before, after, strict=True):
        p, q = probabilities(one), probabilities(two)
        total += sum(p[word] * math.log(p[word] / q[word]) for word in range(WORDS))
    return total / len(before)


WRITTEN: dict[str, Callable[[Tensor, Tensor], float]] = {
    "target-probability": lambda before, after: float(probabilities(after[-1])[TARGET]),
    "target-logit": lambda before, after: float(after[-1, TARGET]),
    "logit-difference": lambda before, after: float(after[-1, TARGET].double() - after[-1, AGAINST].double()),
    "accuracy": lambda before, after: float(int(np.argmax(after[-1].numpy())) == TARGET),
    "perplexity": lambda before, after: surprise(after),
    "kl": divergence,
    "entropy": lambda before, after: -sum(p * math.log(p) for p in probabilities(after[-1])),
}


def test_every_named_metric_of_logits_has_a_twin_here() -> None:
    assert set(WRITTEN) | {"refusal-rate"} == set(NAMED)
    assert all(NAMED[name]().name == name for name in NAMED)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("seed", range(3))
def test_a_metric_of_a_text_is_its_formula(name: str, seed: int) -> None:
    before, after = drawn(seed, 1, TOKENS, WORDS), drawn(100 + seed, 1, TOKENS, WORDS)
    _, outcome = pair(before, after)
    assert value(name, outcome) == pytest.approx(WRITTEN[name](before[0], after[0]), rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"perplexity"}))
def test_a_metric_of_classes_reads_the_one_row(name: str) -> None:
    before, after = drawn(0, 1, WORDS), drawn(1, 1, WORDS)
    _, outcome = pair(before, after, pixel_values=torch.zeros(1, 3))
    assert value(name, outcome) == pytest.approx(WRITTEN[name](before, after), rel=1e-12)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_looked_at(name: str, side: str) -> None:
    before, after, noise = drawn(4, TOKENS, WORDS), drawn(5, TOKENS, WORDS), drawn(6, 2, WORDS)

    def padded(values: Tensor, filler: Tensor) -> Tensor:
        return torch.cat([filler, values] if side == "left" else [values, filler])[None]

    ids, mask = padded(IDS[0], torch.tensor([0, 0])), padded(torch.ones(TOKENS), torch.zeros(2))
    _, outcome = pair(padded(before, noise), padded(after, -noise), input_ids=ids, attention_mask=mask)
    assert value(name, outcome) == pytest.approx(WRITTEN[name](before, after), rel=1e-12)


def test_an_accuracy_of_one_needs_the_target_to_have_the_largest_logit() -> None:
    logits = torch.zeros(1, TOKENS, WORDS)
    logits[0, -1, TARGET] = 1
    assert value("accuracy", pair(logits, logits)[1]) == 1
    assert value("accuracy", pair(logits, -logits)[1]) == 0


def test_the_unedited_run_has_no_divergence_from_itself() -> None:
    before, after = pair(drawn(0, 1, TOKENS, WORDS), drawn(0, 1, TOKENS, WORDS))
    assert value("kl", before) == value("kl", after) == 0


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_broken_logit_gives_no_number(name: str, number: float) -> None:
    broken = drawn(0, 1, TOKENS, WORDS)
    broken[..., TARGET] = number
    assert not math.isfinite(value(name, pair(drawn(1, 1, TOKENS, WORDS), broken)[1]))


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"target-logit", "logit-difference"}))
def test_an_entry_that_the_model_rules_out_is_no_broken_one(name: str) -> None:
    before, after = drawn(0, 1, TOKENS, WORDS), drawn(1, 1, TOKENS, WORDS)
    before[..., 0] = after[..., 0] = -math.inf
    _, outcome = pair(before, after)
    kept = [logits[0, :, 1:] for logits in (before, after)]
    shifted = {name: WRITTEN[name] for name in ("entropy",)}
    assert math.isfinite(value(name, outcome))
    if name in shifted:
        assert value(name, outcome) == pytest.approx(-sum(p * math.log(p) for p in probabilities(kept[1][-1])), rel=1e-12)
    if name == "kl":
        total = sum((p * np.log(p / q)).sum() for p, q in ((probabilities(a), probabilities(b)) for a, b in zip(*kept, strict=True)))
        assert value(name, outcome) == pytest.approx(total / TOKENS, rel=1e-12)


def test_a_probability_that_an_edit_takes_to_zero_makes_the_divergence_infinite() -> None:
    after = drawn(1, 1, TOKENS, WORDS)
    after[..., 0] = -math.inf
    assert value("kl", pair(drawn(0, 1, TOKENS, WORDS), after)[1]) == math.inf


def test_an_output_without_logits_and_a_text_of_one_token_say_what_to_do() -> None:
    case = case_of(input_ids=IDS)
    with pytest.raises(InputError, match="dict, which has no logits: measure it by a function"):
        value("accuracy", Outcome(case, {"picture": 1}))
    with pytest.raises(InputError, match="at least 2 tokens"):
        value("perplexity", Outcome(case_of(input_ids=IDS[:, :1]), drawn(0, 1, 1, WORDS)))
    with pytest.raises(InputError, match="no token or class 7: there are 3, 0 to 2"):
        value("accuracy", Outcome(case, drawn(0, 1, TOKENS, 3)))
    with pytest.raises(InputError, match=r"logits of \[2, 5, 11\]"):
        value("accuracy", Outcome(case, drawn(0, 2, TOKENS, WORDS)))


def test_a_refusal_is_told_by_its_phrases_in_any_letters() -> None:
    case = case_of(input_ids=IDS)
    measure = refusal_rate(["I can't", "As an AI"], tokens=8).measure
    said = {"No. I CAN\u2019T do that.": 1.0, "as an ai model": 1.0, "Of course I can.": 0.0}
    assert {text: measure(Outcome(case, texts={8: text}), case) for text in said} == said
    assert math.isnan(measure(Outcome(case, texts={8: None}), case))
    for phrases in ([], [""], "sorry"):
        with pytest.raises(InputError, match="give a list of what a refusal may say"):
            refusal_rate(phrases)
    with pytest.raises(InputError, match="0 generated tokens"):
        generated("mine", lambda text, example: 0.0, 0)


def test_functions_become_metrics_of_the_output() -> None:
    def brightness(outputs: Tensor, example: Example) -> Tensor:
        return outputs.mean() if example.id == "a" else torch.tensor(9.0)

    (metric,) = as_metrics(brightness)
    case = case_of(input_ids=IDS)
    assert (metric.name, metric.measure(Outcome(case, torch.tensor([1.0, 2.0])), case)) == ("brightness", 1.5)
    assert [one.name for one in as_metrics(["accuracy", brightness, Metric("own", lambda outcome, case: 1.0)])] == [
        "accuracy", "brightness", "own",
    ]  # fmt: skip
    (wordy,) = as_metrics([Metric("a", lambda outcome, case: 0.0)])
    assert wordy.measure(Outcome(case), case) == 0
    with pytest.raises(InputError, match="returned str: return one number"):
        as_metrics(lambda_free)[0].measure(Outcome(case), case)


def lambda_free(outputs: object, example: Example) -> str:
    return "high"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "no metrics: give some of target-probability"),
        ("precision", "no metric 'precision': there are target-probability"),
        (["accuracy", "accuracy"], "'accuracy' is given twice"),
        ([3], "metric 3: give a name, or a function"),
        (lambda outputs, example: 0.0, "write a def instead of a lambda"),
    ],
)
def test_metrics_that_are_none_are_refused(given: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        as_metrics(given)  # type: ignore[arg-type]
