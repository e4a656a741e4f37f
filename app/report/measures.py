"""What is measured on one example: its attribution with the books, the checks on it, its curves, and the effect of every head.

Each measure turns what `headscope.probe` returns into plain values for the sidecar; nothing is averaged over examples here.

Letters: S tokens (or patches), P points of a curve, H heads of all sites in execution order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headscope.app.report.prompts import Prompt, inputs_of, target_of, tensor_bytes
from headscope.app.report.schema import Json
from headscope.app.report.sidecar import run_digest
from headscope.interventions import Plan
from headscope.kernels.errors import HeadscopeError, InputError
from headscope.probe import AttentionSite
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.curves import Curves
from headscope.probe.attribution.faithfulness import measure_faithfulness
from headscope.probe.attribution.measured import RANDOM, Measured
from headscope.probe.attribution.sanity import randomise_layers
from headscope.probe.attribution.target import Scalar, Target, as_target, value_of
from headscope.probe.attribution.units import Units, units_of
from headscope.probe.attribution.value import Value, neutral_token

ORDERS, FEWEST = 20, 8  # random orders: with 20, a method better than all of them has a chance below 0.05
LEVELS = 9  # a token's relevance is also shown as a digit, 0 to 9 of the example's largest
TOP = 5  # tokens of an example whose relevance is written out
STEPS = 10  # of a curve; those of texts of different lengths are averaged at these shares removed
SHARES_REMOVED = [step / STEPS for step in range(STEPS + 1)]
OTHER_REMOVAL = {
    "token": "zero-embedding",
    "zero-embedding": "mean-embedding",
    "zero": "mean",
}  # a second way to take units away, which a result must survive


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a report.

    Attributes:
        method: the one that the report is about.
        compared: other methods, for their curves only; None takes gradient-x-input, and rollout where all attention is self-attention.
        removal: how units are taken away for curves; None takes `zero` for images, and for text `token`, or `zero-embedding` where
            neither tokenizer nor model has a token that says nothing.
        draws: random orders to compare with, an example; None takes `ORDERS` over all examples, and at least `FEWEST` for each.
        resamples: of the bootstrap.
        close: examples, the first ones, that also get the costly checks: repetition, random weights, another removal.
        heads: how many heads are listed.
        together: how many of them are ablated together.
        seed: of everything random.
    """

    method: str = "attnlrp"
    compared: tuple[str, ...] | None = None
    removal: str | None = None
    draws: int | None = None
    resamples: int = 2000
    close: int = 3
    heads: int = 20
    together: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("resamples", 100), ("close", 0), ("heads", 0), ("together", 1), ("seed", 0)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise InputError(f"{name} {given}: give {least} or more")
        if self.method in self.others or len(set(self.others)) < len(self.others):
            raise InputError(f"compared with {', '.join(self.others)}: name methods once, and {self.method} not among them")

    @property
    def others(self) -> tuple[str, ...]:
        """The methods to compare with, as far as they are known."""
        return self.compared or ()

    def settled(self, sites: Sequence[AttentionSite], examples: int) -> Settings:
        """The same with nothing left open, for a model's sites and a number of examples."""
        usual = ("gradient-x-input", "rollout") if all(site.kind == "self" for site in sites) else ("gradient-x-input",)
        compared = tuple(name for name in usual if name != self.method) if self.compared is None else self.compared
        draws = max(FEWEST, -(-ORDERS // examples)) if self.draws is None else self.draws
        return replace(self, compared=compared, draws=draws)

    def to_dict(self) -> Json:
        return {**asdict(self), "compared": list(self.others)}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, what reads for it, its sites, and edits that are in place all the time."""

    model: nn.Module
    processor: Any
    sites: tuple[AttentionSite, ...]
    plan: Plan | None = None

    def edited(self, inputs: Mapping[str, Tensor]) -> AbstractContextManager[object]:
        if self.plan is None:
            return nullcontext()
        ids = inputs.get("input_ids")
        return self.plan.on(self.model, **({} if ids is None else {"tokenizer": self.processor, "input_ids": ids}))


def examine(subject: Subject, prompt: Prompt, settings: Settings, close: bool) -> Json:
    """Everything about one example.

    Args:
        subject: the model.
        prompt: the example.
        settings: what to measure.
        close: also run the costly checks.

    Raises:
        HeadscopeError: what could not be measured; the message names the example.
    """
    started = time.perf_counter()
    try:
        inputs = inputs_of(prompt, subject.model, subject.processor)
        with subject.edited(inputs):
            record = _examined(subject, prompt, inputs, settings, close)
    except HeadscopeError as error:
        where = f"example {prompt.id!r}: "
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}{error}") from error
    record["seconds"] = round(time.perf_counter() - started, 3)
    record["run_sha256"] = run_digest(record)
    return record


def _examined(subject: Subject, prompt: Prompt, inputs: dict[str, Tensor], settings: Settings, close: bool) -> Json:
    target = resolved(subject.model, inputs, target_of(prompt, subject.model, subject.processor))
    attribution = attributed(subject, inputs, target, settings.method)
    shown = shown_units(inputs)
    relevance = relevance_of(attribution, shown)
    special = [] if attribution.special is None else attribution.special[0].nonzero().flatten().tolist()
    tokens = _names(attribution, shown)
    record: Json = {
        "id": prompt.id,
        "text": prompt.text,
        "image": prompt.image,
        "target": {"words": attribution.target, **(target.to_dict() if isinstance(target, Target) else {})},
        "value": attribution.value,
        "inputs_sha256": inputs_digest(inputs),
        "tokens": tokens,
        "grid": _grid(shown),
        "relevance": relevance,
        "levels": levels_of(relevance),
        "sum": sum(relevance),
        "open": attribution.value - sum(relevance),
        "special": special,
        "top": _top(tokens, relevance, special),
        "ledger": _ledger(attribution),
        "unruled": [list(row) for row in attribution.unruled],
        "warnings": list(attribution.warnings),
        "forward_difference": _forward_difference(subject.model, inputs, target, attribution.value),
        "heads": head_relevance(subject, attribution),
        "head_effects": head_effects(subject, inputs, target),
    }
    record |= _removals(subject, inputs, target, settings, attribution)
    record["close_look"] = _close_look(subject, inputs, target, settings, attribution, record["removal"]) if close else None
    return record


def attributed(subject: Subject, inputs: Mapping[str, Tensor], target: Target | Scalar, method: str) -> Attribution:
    """One attribution; a tokenizer names tokens only where there are any."""
    return attribute(subject.model, inputs, target, method, tokenizer=_tokenizer(subject, inputs), layers=False)


def _tokenizer(subject: Subject, inputs: Mapping[str, Tensor]) -> Any:
    return subject.processor if "input_ids" in inputs else None


def resolved(model: nn.Module, inputs: Mapping[str, Tensor], given: int | Target | Scalar | None) -> Target | Scalar:
    """The target with the largest logit named, so that every method is asked about the same one."""
    target = as_target(given)
    if not isinstance(target, Target):
        return target
    with torch.no_grad():
        return target.resolved(model(**inputs))


def shown_units(inputs: Mapping[str, Tensor]) -> Units:
    """What relevance is shown by: every token of a text, special ones too, so that sums hold; patches of an image."""
    ids = inputs.get("input_ids")
    if ids is None:
        return units_of(inputs)
    return Units("input_ids", tuple((place,) for place in range(ids.shape[1])), tuple(map(str, ids[0].tolist())), (ids.shape[1],))


def relevance_of(attribution: Attribution, shown: Units) -> list[float]:
    """[S], relevance of every unit shown, in nine digits."""
    return [short(value) for value in shown.sums(attribution.inputs[shown.input].double()).tolist()]


def levels_of(relevance: Sequence[float]) -> list[int]:
    """From -9 to 9: numbers in ninths of the largest."""
    most = max(map(abs, relevance), default=0.0)
    return [round(LEVELS * value / most) if most else 0 for value in relevance]


def head_relevance(subject: Subject, attribution: Attribution) -> list[float] | None:
    """[H], relevance of every head, summed over positions; None where the method gives heads none."""
    if any(site.name not in attribution.heads for site in subject.sites):
        return None
    return [short(float(value)) for site in subject.sites for value in attribution.heads[site.name].double().sum(dim=(0, 2))]


def head_effects(subject: Subject, inputs: dict[str, Tensor], target: Target | Scalar) -> list[float]:
    """[H], how far the value falls when one head is ablated.

    Raises:
        InputError: this example runs other heads than the first one did.
    """
    value = Value(subject.model, inputs, target, removal="heads")
    count = len(value.units)
    if value.units.names != tuple(f"{site.name} head {head}" for site in subject.sites for head in range(site.query_heads)):
        raise InputError(f"this example runs {count} heads, not those that the first example ran: report on them apart")
    found = value(torch.cat([torch.ones(1, count, dtype=torch.bool), ~torch.eye(count, dtype=torch.bool)]))
    return [short(drop) for drop in (found[0] - found[1:]).tolist()]


def joint_effect(subject: Subject, prompt: Prompt, heads: Sequence[int]) -> float:
    """How far the value falls when several heads, counted as in `head_effects`, are ablated at once."""
    inputs = inputs_of(prompt, subject.model, subject.processor)
    with subject.edited(inputs):
        value = Value(subject.model, inputs, target_of(prompt, subject.model, subject.processor), removal="heads")
        keep = torch.ones(2, len(value.units), dtype=torch.bool)
        keep[1, list(heads)] = False
        intact, without = value(keep).tolist()
    return float(intact - without)


def short(value: float, digits: int = 9) -> float:
    """Nine digits hold any float32 exactly."""
    return float(f"{value:.{digits}g}")


def inputs_digest(inputs: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything the model is given."""
    return hashlib.sha256(b"".join(f"|{name}|".encode() + tensor_bytes(value) for name, value in sorted(inputs.items()))).hexdigest()


def _top(tokens: Sequence[str], relevance: Sequence[float], special: Sequence[int]) -> list[Json]:
    """The units with the largest relevance by size, special ones left out."""
    ordinary = [place for place in range(len(tokens)) if place not in set(special)]
    order = sorted(ordinary, key=lambda place: -abs(relevance[place]))[:TOP]
    return [{"place": place, "token": tokens[place], "relevance": relevance[place]} for place in order]


def _names(attribution: Attribution, shown: Units) -> list[str]:
    if attribution.tokens is None or len(shown.shape) > 1:
        return list(shown.names)
    return list(attribution.tokens[0])


def _grid(shown: Units) -> list[int] | None:
    """Rows and columns of patches."""
    if len(shown.shape) == 1:
        return None
    columns = len({name.rpartition(" ")[2] for name in shown.names})
    return [len(shown) // columns, columns]


def _ledger(attribution: Attribution) -> Json | None:
    ledger = attribution.ledger
    if ledger is None:
        return None
    return {
        "target": ledger.target, "inputs": ledger.inputs, "constants": sum(ledger.constants.values()), "by_kind": ledger.by_kind(),
        "absorbed": ledger.absorbed, "residual": ledger.residual, "scale": ledger.scale, "tolerance": ledger.tolerance,
        "allowed": ledger.tolerance * ledger.scale, "closes": ledger.closes,
    }  # fmt: skip


def _forward_difference(model: nn.Module, inputs: Mapping[str, Tensor], target: Target | Scalar, value: float) -> float:
    """How far the value under the rules is from the model's own, relative to it where it is above one."""
    with torch.no_grad():
        own = value_of(target(model(**inputs)))
    return abs(value - own) / max(1.0, abs(own))


def _removals(subject: Subject, inputs: dict[str, Tensor], target: Target | Scalar, settings: Settings, attribution: Attribution) -> Json:
    """Curves of every method and of the controls."""
    found = measure_faithfulness(
        subject.model, inputs, {settings.method: attribution, **{name: name for name in settings.others}}, target,
        tokenizer=_tokenizer(subject, inputs), removal=_removal(subject, inputs, settings), steps=STEPS, subsets=0,
        draws=settings.draws or 0, seed=settings.seed,
    )  # fmt: skip
    ranked = {entry.method: entry for entry in found.samples if entry.method != RANDOM}
    first = ranked[settings.method]
    taken = {name: entry.seconds for name, entry in ranked.items()} | {settings.method: float(str(attribution.settings["seconds"]))}
    return {
        "removal": first.removal,
        "units": first.units,
        "bare": first.empty,
        "fall": first.intact - first.empty,
        "curves": {name: _curve(entry.curves) for name, entry in ranked.items()},
        "random": _random(found.samples),
        "method_seconds": {name: round(seconds, 4) for name, seconds in taken.items() if seconds is not None},
    }


def _removal(subject: Subject, inputs: Mapping[str, Tensor], settings: Settings) -> str | None:
    if settings.removal is not None or "input_ids" not in inputs:
        return settings.removal
    try:
        neutral_token(subject.processor, subject.model)
    except InputError:
        return "zero-embedding"
    return "token"


def _curve(curves: Curves) -> Json:
    return {
        "most_first": on_shares(curves.removed, curves.most_first),
        "least_first": on_shares(curves.removed, curves.least_first),
        "delta_area": curves.delta_area,
        "comprehensiveness": curves.comprehensiveness,
        "sufficiency": curves.sufficiency,
    }


def _random(samples: Sequence[Measured]) -> Json:
    """Curves of random orders; removing from one end of them is as good as from the other, so one curve a draw will do."""
    drawn = [entry.curves for entry in samples if entry.method == RANDOM]
    return {
        "most_first": [on_shares(curves.removed, curves.most_first) for curves in drawn],
        "delta_area": [short(curves.delta_area) for curves in drawn],
    }


def on_shares(removed: Sequence[int], heights: Sequence[float]) -> list[float]:
    """A curve read at the same shares for every length, between points on a straight line; in seven digits."""
    shares = [count / removed[-1] for count in removed]
    return [short(float(height), 7) for height in np.interp(SHARES_REMOVED, shares, heights)]


def _close_look(
    subject: Subject, inputs: dict[str, Tensor], target: Target | Scalar, settings: Settings, attribution: Attribution, removal: str
) -> Json:
    """Does it come out the same again; does it depend on the weights; does it hold with another removal?"""
    again = attributed(subject, inputs, target, settings.method)
    largest = max([float(value.abs().max()) for value in attribution.inputs.values()], default=0.0)
    apart = max([float((again.inputs[name] - value).abs().max()) for name, value in attribution.inputs.items()], default=0.0)
    found: Json = {"repeat_difference": apart / largest if largest else 0.0, "random_weights": None, "other_removal": None}
    if subject.plan is None:  # edits belong to the model, a copy with other weights goes without them
        steps = randomise_layers(subject.model, inputs, target, settings.method, name=shown_units(inputs).input, seed=settings.seed).steps
        found["random_weights"] = [[step.module, step.spearman] for step in steps]
    other = OTHER_REMOVAL.get(removal)
    if other is not None and (not other.endswith("-embedding") or hasattr(subject.model, "get_input_embeddings")):
        samples = measure_faithfulness(
            subject.model, inputs, {settings.method: attribution}, target, tokenizer=_tokenizer(subject, inputs), removal=other,
            steps=STEPS, subsets=0, draws=settings.draws or 0, seed=settings.seed,
        ).samples  # fmt: skip
        own = next(entry for entry in samples if entry.method == settings.method)
        drawn = [short(entry.curves.delta_area) for entry in samples if entry.method == RANDOM]
        found["other_removal"] = {"removal": other, "delta_area": own.curves.delta_area, "random_delta_area": drawn}
    return found
