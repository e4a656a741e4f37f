"""Try a plan on examples: every one is run without it and with it, and each metric is read off both runs.

    found = evaluate(model, plan, "prompts.jsonl", metrics=["accuracy"], benign="benign.jsonl", tokenizer=tokenizer)
    print(found)

Letters: S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from headscope.interventions import recipe
from headscope.interventions.evaluation.changes import Price, Result, change_of
from headscope.interventions.evaluation.evaluation import Evaluation
from headscope.interventions.evaluation.evaluation_file import decode_price, decode_result, encode_price, encode_result
from headscope.interventions.evaluation.evaluation_log import EvaluationLog
from headscope.interventions.evaluation.examples import Case, Example, as_examples, case_of, digest
from headscope.interventions.evaluation.metrics import Given, Metric, as_metrics
from headscope.interventions.evaluation.trial import Trial
from headscope.interventions.plan import Plan
from headscope.interventions.roles import Roles
from headscope.kernels.errors import HeadscopeError, InputError, RecipeError, SelectionError
from headscope.probe.interception.intercept import check_model
from headscope.probe.models import model_fingerprint

Data: TypeAlias = "str | Path | Iterable[Example | str | Mapping[str, Any]]"


def evaluate(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    metrics: Given | Sequence[Given],
    benign: Data | None = None,
    tokenizer: Any = None,
    roles: Roles | Callable[[Example], Roles] | None = None,
    run: Callable[[Example], Any] | None = None,
    examples: int | None = None,
    repeats: int = 5,
    seed: int = 0,
    log: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    info: Mapping[str, object] | None = None,
) -> Evaluation:
    """Measure what a plan does to a model, what it does beside that, and what it costs.

    Args:
        model: in eval mode; as it is, with any plan that is already on. It is left as it was.
        plan: the edits.
        data: a path to JSON lines, or a list of examples, texts, mappings of their fields, or keyword inputs of the model.
        metrics: names, such as "accuracy" (see `metrics.NAMED`), and functions(outputs, example) -> float of what the model returned.
        benign: the same as `data`, of what should not change; examples of `data` may also say "benign": true.
        tokenizer: for texts, spans and generated text.
        roles: which positions `role("text")` stands for, or a function of the example that says so. An example's own come first.
        run: what to do with an example instead of model(**inputs), such as a whole diffusion run; its result goes to the metrics.
        examples: only the first so many of `data` and of `benign`.
        repeats: timed runs with and without the plan, in turns; 0 does not measure the price.
        seed: of the bootstrap, and of torch's generator at the start of every run, so that both runs draw alike.
        log: a file that takes every finished example, and from which a repeated call goes on; it ends with the same result.
        progress: called with how many examples are done, and of how many.
        info: more to keep with the result.

    Raises:
        InputError: data, metrics or a log that do not fit; the message names the example or line.
        SelectionError: an edit that changed nothing in any example.
    """
    check_model(model)
    if any(module.training for module in model.modules()):
        raise InputError("the model is in training mode, where dropout makes results random: call model.eval() first")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
        raise InputError(f"repeats={repeats!r}: give how often to time the model, 0 for not at all")
    wanted = as_metrics(metrics)
    effect, beside = _split(data, benign, examples)
    trial = Trial(model, plan, tokenizer, roles, run, seed)
    cases = [_checked(one, trial, wanted) for one in effect]
    others = [_checked(one, trial, ()) for one in beside]
    told = _told(model, plan, effect, beside, wanted, seed)
    results: list[Result] = []
    with EvaluationLog(None if log is None else Path(log), told) as kept:
        price = _price(trial, [*cases, *others], repeats, kept) if repeats else None
        for place, case in enumerate([*cases, *others]):
            key = f"{'benign' if place >= len(cases) else 'data'} {case.example.id}"
            if key not in kept.records:
                found = trial.measure(case, wanted, place >= len(cases), alone=not others)
                kept.add(key, encode_result(found))
            results.append(decode_result(kept.records[key]))
            if progress is not None:
                progress(place + 1, len(cases) + len(others))
    hits = tuple(sum(one.hits[index] for one in results) for index in range(len(plan)))
    for index, count in enumerate(hits):
        if not count:
            raise SelectionError(trial.nothing(index, len(results)))
    ours, theirs = results[: len(cases)], results[len(cases) :]
    names = dict.fromkeys(name for one in theirs or ours for name in one.before)
    side = [name for name in names if theirs or name in ("kl", "perplexity")]
    return Evaluation(
        effect=tuple(change_of(one.name, ours, seed) for one in wanted),
        side_effects=tuple(change_of(name, theirs or ours, seed) for name in side),
        benign=len(theirs),
        results=tuple(results),
        edits=tuple(map(str, plan)),
        hits=hits,
        price=price,
        info={**told, **(info or {})},
    )


def _split(data: Data, benign: Data | None, count: int | None) -> tuple[list[Example], list[Example]]:
    """What the effect and what the side effects are measured on."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise InputError(f"examples={count!r}: give how many, 1 or more")
    listed = as_examples(data)
    effect, beside = [one for one in listed if not one.benign], [one for one in listed if one.benign]
    if benign is not None:
        beside = [*beside, *as_examples(benign, "benign")]
        if len({one.id for one in beside}) < len(beside):
            raise InputError("two benign examples have the same id, one of data and one of benign: give each its own")
    if not effect:
        raise InputError("every example is benign: give some on which the plan should do something")
    return effect[:count], beside[:count]


def _checked(example: Example, trial: Trial, wanted: Sequence[Metric]) -> Case:
    """The example as the model takes it, with all that the metrics need."""
    if trial.run is not None and example.inputs is None and not callable(getattr(trial.tokenizer, "decode", None)):
        case = Case(example, {}, *(one if isinstance(one, int) else None for one in (example.target, example.against)))
    else:
        case = case_of(example, trial.model, trial.tokenizer)
    for metric in wanted:
        for need in metric.needs:
            if getattr(case, need) is None:
                raise InputError(f"{example.name} has no {need}, which {metric.name} needs")
    return case


def _price(trial: Trial, cases: Sequence[Case], repeats: int, kept: EvaluationLog) -> Price:
    """The price, from the log if it is there: times differ from run to run, and a resumed result should not."""
    if "price" not in kept.records:
        case = max(cases, key=lambda one: (trial.fits(one), one.tokens))
        try:
            kept.add("price", encode_price(trial.time(case, repeats)))
        except HeadscopeError as error:
            raise type(error)(f"{case.example.name}: {error}") from error
    return decode_price(kept.records["price"])


def _told(
    model: nn.Module, plan: Plan, effect: Sequence[Example], beside: Sequence[Example], wanted: Sequence[Metric], seed: int
) -> dict[str, object]:
    """What decides the result; a log of something else is not gone on with."""
    try:
        edits = recipe.digest(plan.edits)
    except RecipeError:  # code has no content that could be compared
        edits = "; ".join(map(str, plan))
    return {
        "model": type(model).__name__,
        "fingerprint": model_fingerprint(model),
        "plan": edits,
        "data": digest(effect),
        "benign": digest(beside) if beside else None,
        "metrics": [{"name": one.name, "tokens": one.tokens, "setting": one.setting} for one in wanted],
        "seed": seed,
        "versions": {name: version(name) for name in ("headscope", "torch")},
    }
