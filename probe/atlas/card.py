"""What to call a head, and why: a table of rules, and a line of plain words from its numbers.

Letters: L sites, H query heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from headscope.kernels.errors import InputError, SelectionError

UNDEFINED = "undefined"  # nothing is known of the head
PLAIN = "unnamed"  # something is known, and no rule applies


@dataclass(frozen=True)
class Rule:
    """When a head gets a label.

    Attributes:
        label: its name.
        score: which score is looked at.
        at_least: how much it must be above what uniform attention scores, as a share of what is possible:
            (score - uniform) / (1 - uniform). For scores without a uniform baseline: how large
            the score must be. A negative number: the score must be that or lower.
        text: the evidence in words; {score}, {uniform} and {percent} are filled in.
        unless: (score, limit) each: no label where this score is above the limit.
        source: where the rule is from; "heuristic" where it is ours.
    """

    label: str
    score: str
    at_least: float
    text: str
    unless: tuple[tuple[str, float], ...] = ()
    source: str = "heuristic"


RULES: Mapping[str, Rule] = MappingProxyType({
    rule.label: rule
    for rule in (
        Rule("induction", "induction", 0.3, "{score} of its attention follows a repeat (uniform {uniform})",
             source="Olsson et al. 2022; threshold heuristic"),
        Rule("previous-token", "previous", 0.35, "{score} of its attention goes to the token before (uniform {uniform})",
             source="Elhage et al. 2021; threshold heuristic"),
        Rule("duplicate-token", "duplicate", 0.3, "{score} of its attention goes to the same token one block before (uniform {uniform})",
             source="Wang et al. 2023; threshold heuristic"),
        Rule("current-token", "current", 0.5, "{score} of its attention stays on its own token (uniform {uniform})"),
        Rule("first-token", "first", 0.5, "rests on the first token with {score} of its attention (uniform {uniform})",
             source="Xiao et al. 2024; threshold heuristic"),
        Rule("sink", "sink", 0.3, "one key gets {score} of all attention (uniform {uniform})", unless=(("first", 0.25),),
             source="Gu et al. 2025, threshold 0.3"),
        Rule("positional", "positional", 0.8, "its pattern is nearly the same for other contents (similarity {score})",
             unless=(("first", 0.5),)),
        Rule("local", "local", 0.75, "stays near: its mean distance is {percent} less than uniform attention's",
             unless=(("previous", 0.35), ("current", 0.5))),
        Rule("broad", "spread", 0.7, "spreads its attention widely ({score} of the entropy of uniform attention)"),
        Rule("copying", "copying", 0.5, "copies what it attends to (OV score {score})", source="Elhage et al. 2021; threshold heuristic"),
        Rule("anti-copying", "copying", -0.5, "writes against what it attends to (OV score {score})",
             source="McDougall et al. 2023; threshold heuristic"),
    )
})  # fmt: skip
WITHOUT_BASELINE = ("positional", "spread", "copying", "confidence", "local")  # scores that are not shares of attention
STRIPES = ("induction", "previous", "duplicate", "current", "first")


@dataclass(frozen=True)
class Card:
    """One head in one line.

    Attributes:
        site: name of the site.
        layer: index of its block, or its place among the sites.
        head: which head.
        labels: all that apply, the strongest first; `("unnamed",)` where none does, `("undefined",)` where nothing is known.
        text: the line.
        evidence: (score, value, uniform or None) for each label, in the same order.
    """

    site: str
    layer: int
    head: int
    labels: tuple[str, ...]
    text: str
    evidence: tuple[tuple[str, float, float | None], ...] = ()

    @property
    def name(self) -> str:
        """`5.2`."""
        return f"{self.layer}.{self.head}"

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, object]:
        return {
            "site": self.site, "layer": self.layer, "head": self.head, "labels": list(self.labels), "text": self.text,
            "evidence": [list(row) for row in self.evidence],
        }  # fmt: skip


def rules_of(thresholds: Mapping[str, float] | None) -> tuple[Rule, ...]:
    """The rules with thresholds of the user's, by label.

    Raises:
        SelectionError: no rule of that label.
        InputError: a threshold that is not finite.
    """
    given = dict(thresholds or {})
    for label, limit in given.items():
        if label not in RULES:
            raise SelectionError(f"no label {label!r}: there are {', '.join(RULES)}")
        if not math.isfinite(limit):
            raise InputError(f"the threshold of {label} is {limit}: give a finite number")
    return tuple(replace(rule, at_least=float(given.get(rule.label, rule.at_least))) for rule in RULES.values())


def strength(rule: Rule, score: float, uniform: float | None) -> float:
    """How far a head meets a rule, as the rule counts it: 1 is all there could be."""
    if rule.at_least < 0:
        return -score
    if uniform is None or math.isnan(uniform) or rule.score in WITHOUT_BASELINE:
        return score
    return (score - uniform) / (1 - uniform) if uniform < 1 else 0.0


def labels_of(rules: Sequence[Rule], scores: Mapping[str, float], uniform: Mapping[str, float]) -> list[tuple[Rule, float]]:
    """The rules that a head meets, the strongest first, with their strength. NaN meets none."""
    found = []
    for rule in rules:
        score = scores.get(rule.score, math.nan)
        if math.isnan(score):
            continue
        if any(scores.get(name, math.nan) > limit for name, limit in rule.unless):
            continue
        size = strength(rule, score, uniform.get(rule.score))
        if size >= abs(rule.at_least):
            found.append((rule, size))
    order = {label: place for place, label in enumerate(RULES)}
    pattern = [row for row in found if row[0].score in STRIPES]
    rest = [row for row in found if row[0].score not in STRIPES]
    return sorted(pattern, key=lambda row: (-row[1], order[row[0].label])) + rest


def write_card(
    site: str,
    layer: int,
    head: int,
    rules: Sequence[Rule],
    scores: Mapping[str, float],
    uniform: Mapping[str, float],
    extra: Sequence[str] = (),
) -> Card:
    """The line about one head.

    Args:
        scores, uniform: of this head, by name; NaN where undefined.
        extra: more to say, such as its rank of importance.
    """  # fmt: skip
    found = labels_of(rules, scores, uniform)
    known = [name for name, value in scores.items() if not math.isnan(value) and not name.startswith("importance")]
    if not known:
        return Card(site, layer, head, (UNDEFINED,), f"{layer}.{head} {UNDEFINED}: nothing could be measured of this head")
    evidence = tuple((rule.score, scores[rule.score], _number(uniform.get(rule.score))) for rule, _ in found)
    if found:
        labels = tuple(rule.label for rule, _ in found)
        told = [_filled(rule.text, scores[rule.score], uniform.get(rule.score)) for rule, _ in found]
    else:
        labels, told = (PLAIN,), [_nothing(scores, uniform)]
        evidence = ()
    return Card(site, layer, head, labels, f"{layer}.{head} {', '.join(labels)}: {'; '.join([*told, *extra])}", evidence)


def _nothing(scores: Mapping[str, float], uniform: Mapping[str, float]) -> str:
    """What an unnamed head comes nearest to."""
    words = {rule.score: rule.text for rule in RULES.values() if rule.score in STRIPES}
    near = [(scores[name] - (uniform.get(name) or 0.0), name) for name in words if not math.isnan(scores.get(name, math.nan))]
    if not near:
        return "no pattern that has a name"
    _, name = max(near)
    return f"no pattern that has a name; at most {_filled(words[name], scores[name], uniform.get(name))}"


def _filled(text: str, score: float, uniform: float | None) -> str:
    base = uniform if uniform is not None and not math.isnan(uniform) else None
    signed = f"{score:+.2f}" if "OV" in text else f"{score:.2f}"
    return text.format(score=signed, uniform="unknown" if base is None else f"{base:.2f}", percent=f"{score:.0%}")


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
