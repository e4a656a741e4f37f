"""What is wrong, why, and what may be tried: rules over what was measured, and the list of heads that are sharp and well.

Letters: H heads, N tokens, L layers. A number that is undefined makes no finding. A head that is sharp because it routes, as previous-token
and induction heads do, is named in the notes and never in a warning; a sink is an observation, not an illness.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from headscope.probe.health.baselines import Baselines
from headscope.probe.health.finding import SEVERITIES, Evidence, Finding, severity_named, worst
from headscope.probe.health.measures import GradientMeasures, HeadMeasures, StreamMeasures
from headscope.probe.health.rules import RULES
from headscope.probe.health.stream_findings import findings_of_streams
from headscope.probe.health.thresholds import Thresholds

__all__ = ["SEVERITIES", "Finding", "find", "notes_of", "severity_named", "worst"]


@dataclass
class _Hit:
    """A rule that fired for one head."""

    severity: str
    rule: str
    head: int
    evidence: tuple[Evidence, ...]
    words: dict[str, float] = field(default_factory=dict)


def find(
    heads: Sequence[HeadMeasures],
    streams: Sequence[StreamMeasures],
    gradients: Sequence[GradientMeasures],
    baselines: Baselines,
    thresholds: Thresholds,
) -> tuple[Finding, ...]:
    """Everything that the rules find, the worst first, then by layer.

    Args:
        heads, streams, gradients: what was measured; any of them may be empty.
        baselines: what it is compared with; without them fewer findings can be made.
        thresholds: where the rules fire.
    """
    untrained = _untrained(heads, baselines, thresholds)
    found = findings_of_streams(streams, baselines, thresholds) + ([] if untrained is None else [untrained])
    alike = any(one.rule in ("alike-inputs", "undefined-inputs") for one in found)
    for one in heads:
        mine = _of_site(one, baselines, thresholds, untrained is not None)
        if _entering(one, streams) < thresholds["residual-warn"]:
            mine = [_follows(hit) for hit in mine]
        found += [hit for hit in mine if not alike or hit.rule == "logit-growth"]
    for gradient in gradients:
        found += _grouped(
            gradient.site.layer, gradient.site.name, len(gradient.ratio), list(_of_gradients(gradient, thresholds)), thresholds
        )
    return tuple(sorted(found, key=_order))


def _entering(one: HeadMeasures, streams: Sequence[StreamMeasures]) -> float:
    """What tells the tokens apart that a site reads: the residual behind the block before it; NaN where that is not known."""
    before = [state for state in streams if one.site.layer is not None and state.place == "output" and state.layer == one.site.layer - 1]
    return before[-1].residual if before else math.nan


def _follows(hit: Finding) -> Finding:
    """Attention over tokens that are one vector cannot choose between them: then flat patterns are no cause but a consequence."""
    if hit.rule not in ("uniform-attention", "pattern-rank-collapse"):
        return hit
    why = f"{hit.why}; the tokens that enter this layer are alike already, so it cannot do otherwise"
    return replace(hit, why=why, remedies=("mend the token-collapse in the layers before it",))


def notes_of(heads: Sequence[HeadMeasures], findings: Sequence[Finding], thresholds: Thresholds) -> tuple[Finding, ...]:
    """What is well, or only worth knowing: heads that are sharp and healthy, and patterns of an uncommon kind.

    Args:
        heads: what was measured.
        findings: what was found in it; a head that is suspected there is not called healthy.
        thresholds: where the rules fire.
    """
    suspected = {
        (one.site, head)
        for one in findings
        if one.rule in ("logit-growth", "entropy-collapse")
        for head in (one.heads if one.head is None else (one.head,))
    }
    found: list[Finding] = []
    for one in heads:
        if one.queries < thresholds["tokens-least"] or not one.keys >= 2:
            continue
        found += _grouped(
            one.site.layer,
            one.site.name,
            one.heads,
            [hit for head in range(one.heads) for hit in _curious(one, head, thresholds)],
            thresholds,
        )
        for head in range(one.heads):
            kind = _healthy(one, head, thresholds)
            if kind is not None and (one.site.name, head) not in suspected:
                entropy, routing = _number(one.entropy_share, head), _number(one.routing, head)
                evidence: tuple[Evidence, ...] = (
                    ("routing", routing, thresholds["routing-sharp"]), ("entropy_share", entropy, None),
                    *((("previous", _number(one.previous, head), thresholds["offset-mass"]),) if kind == "previous-token" else ()),
                    *((("own", _number(one.own, head), thresholds["offset-mass"]),) if kind == "own-token" else ()),
                )  # fmt: skip
                why = f"{_KINDS[kind]}: sharp because it routes, not because it collapsed"
                found.append(Finding("ok", f"healthy-{kind}", one.site.layer, one.site.name, head, evidence, why))
    return tuple(found)


_KINDS = {
    "previous-token": "attends to the token before",
    "own-token": "attends to its own token",
    "sharp": "sends each query to keys of its own",
}


def _healthy(one: HeadMeasures, head: int, thresholds: Thresholds) -> str | None:
    """What kind of healthy sharp head this is; None where it is none, or where nothing is known."""
    routing = _number(one.routing, head)
    if not one.queries or not routing >= thresholds["routing-sharp"]:  # also NaN
        return None
    for kind, mass in (("previous-token", one.previous), ("own-token", one.own)):
        if _number(mass, head) >= thresholds["offset-mass"]:
            return kind
    return "sharp"


def _of_site(one: HeadMeasures, baselines: Baselines, thresholds: Thresholds, untrained: bool) -> list[Finding]:
    if one.queries < thresholds["tokens-least"] or not one.keys >= 2:
        return []
    uniform = baselines.uniform.get(one.site.name, {})
    hits = [hit for head in range(one.heads) for hit in _of_head(one, head, uniform, thresholds, untrained)]
    found = _layer_rules(one, uniform, thresholds, untrained, hits)
    said = {finding.rule for finding in found}
    covered = {"pattern-rank-collapse": {"uniform-attention", "sink"}, "sink-dominated": {"sink"}}
    silenced = set().union(*(covered.get(rule, set()) for rule in said))
    return found + _grouped(one.site.layer, one.site.name, one.heads, [h for h in hits if h.rule not in silenced], thresholds)


def _of_head(one: HeadMeasures, head: int, uniform: Mapping[str, float], thresholds: Thresholds, untrained: bool) -> Iterable[_Hit]:
    score = _number(one.max_score, head)
    if score > thresholds["logit-warn"]:
        severity = "alarm" if score > thresholds["logit-alarm"] else "warn"
        yield _Hit(severity, "logit-growth", head, (("max_score", score, thresholds[f"logit-{severity}"]),), {"score": score})
    if _uniform(one, head, uniform, thresholds):
        evidence: tuple[Evidence, ...] = (
            ("entropy_share", _number(one.entropy_share, head), thresholds["uniform-entropy"]),
            ("routing", _number(one.routing, head), uniform.get("routing", 0.0) + thresholds["routing-low"]),
        )  # fmt: skip
        yield _Hit("info" if untrained else "warn", "uniform-attention", head, evidence)
    sink = _number(one.sink, head)
    if (
        sink >= thresholds["sink"]
        and _number(one.hub, head) >= thresholds["sink-hub"]
        and sink - uniform.get("sink", 0.0) >= thresholds["sink-excess"]
        and _healthy(one, head, thresholds) is None
    ):
        words = {"sink": sink, "key": float(one.sink_key[head])}
        yield _Hit("info", "sink", head, (("sink", sink, thresholds["sink"]), ("hub", _number(one.hub, head), None)), words)


def _curious(one: HeadMeasures, head: int, thresholds: Thresholds) -> Iterable[_Hit]:
    if one.causal:
        return  # even uniform attention exceeds 1 there, and only the identity is doubly stochastic
    low = _number(one.contrast_low, head)
    if low > thresholds["contrast"]:
        yield _Hit("ok", "amplifying", head, (("contrast_low", low, thresholds["contrast"]),), {"low": low})
    deviation = _number(one.column_deviation, head)
    flat = _number(one.entropy_share, head) >= thresholds["uniform-entropy"]
    if one.square and not flat and deviation < thresholds["doubly-stochastic"]:
        yield _Hit("ok", "doubly-stochastic", head, (("column_deviation", deviation, thresholds["doubly-stochastic"]),))


def _uniform(one: HeadMeasures, head: int, uniform: Mapping[str, float], thresholds: Thresholds) -> bool:
    excess = _number(one.routing, head) - uniform.get("routing", 0.0)
    return _number(one.entropy_share, head) >= thresholds["uniform-entropy"] and excess < thresholds["routing-low"]


def _layer_rules(
    one: HeadMeasures, uniform: Mapping[str, float], thresholds: Thresholds, untrained: bool, hits: Sequence[_Hit]
) -> list[Finding]:
    """What can only be said of all heads of a site together."""
    found: list[Finding] = []
    routing, entropy = one.routing.tolist(), one.entropy_share.tolist()
    if not all(math.isfinite(value) for value in routing + entropy):
        return found
    flat = [hit.head for hit in hits if hit.rule == "uniform-attention"]
    sinks = [
        head
        for head in range(one.heads)
        if _number(one.sink, head) >= thresholds["sink-layer"] and _number(one.hub, head) >= thresholds["sink-hub"]
    ]
    limit = uniform.get("routing", 0.0) + thresholds["routing-low"]
    if len(sinks) == one.heads:
        least = min(_number(one.sink, head) for head in sinks)
        found.append(_layer(one, "warn", "sink-dominated", (("least sink", least, thresholds["sink-layer"]),), sinks, {"sink": least}))
    elif max(routing) < limit and len(flat) < one.heads * thresholds["layer-share"]:
        evidence: tuple[Evidence, ...] = (("largest routing", max(routing), limit), ("mean hub", sum(one.hub.tolist()) / one.heads, None))
        found.append(_layer(one, "info" if untrained else "warn", "pattern-rank-collapse", evidence, range(one.heads), {}))
    sharp = [
        head for head in range(one.heads)
        if entropy[head] < thresholds["entropy-low"]
        and (not _explained(one, head, thresholds) or _number(one.max_score, head) > thresholds["logit-warn"])
    ]  # fmt: skip
    if one.heads > 1 and len(sharp) >= one.heads * thresholds["layer-share"]:
        mean = sum(entropy[head] for head in sharp) / len(sharp)
        score = max(_number(one.max_score, head) for head in sharp)
        evidence = (("mean entropy_share", mean, thresholds["entropy-low"]), ("max_score", score, None))
        found.append(_layer(one, "warn", "entropy-collapse", evidence, sharp, {}))
    return found


def _explained(one: HeadMeasures, head: int, thresholds: Thresholds) -> bool:
    """A sharp head whose pattern tells why it is sharp: a neighbour, itself, or a sink. Scores that are too large need no such reason."""
    positional = max(_or_zero(one.previous, head), _or_zero(one.own, head)) >= thresholds["offset-mass"]
    return positional or _or_zero(one.hub, head) >= thresholds["routing-sharp"]


def _untrained(heads: Sequence[HeadMeasures], baselines: Baselines, thresholds: Thresholds) -> Finding | None:
    """Said once, where every head has the entropy and the routing of a freshly initialised network, and these are not exactly uniform."""
    gaps = []
    for one in heads:
        fresh = baselines.fresh_head(one.site)
        if fresh is None or fresh.heads != one.heads:
            return None
        if float(one.score_variance.nan_to_num().amax()) < 0.01 * float(fresh.score_variance.nan_to_num().mean()):
            return None  # flat scores are not those of fresh weights
        for name in ("entropy_share", "routing"):
            gaps.append(float((getattr(one, name).mean() - getattr(fresh, name).mean()).abs()))
    if not gaps or not max(gaps) < thresholds["untrained"]:  # also NaN
        return None
    words = {"gap": max(gaps)}
    why = RULES["untrained"].layer.format(**words)
    evidence: tuple[Evidence, ...] = (("largest gap of a layer's mean to fresh weights", max(gaps), thresholds["untrained"]),)
    return Finding("info", "untrained", None, "whole model", None, evidence, why, RULES["untrained"].remedies)


def _of_gradients(one: GradientMeasures, thresholds: Thresholds) -> Iterable[_Hit]:
    for head, ratio in enumerate(one.ratio.tolist()):
        if ratio < thresholds["gradient-warn"]:
            severity = "alarm" if ratio < thresholds["gradient-alarm"] else "warn"
            yield _Hit(
                severity, "gradient-vanishing", head, (("gradient ratio", ratio, thresholds[f"gradient-{severity}"]),), {"ratio": ratio}
            )


def _grouped(layer: int | None, site: str, total: int, hits: Sequence[_Hit], thresholds: Thresholds) -> list[Finding]:
    """Findings of single heads; of the layer where most of its heads have the same."""
    by_rule: dict[str, list[_Hit]] = defaultdict(list)
    for hit in hits:
        by_rule[hit.rule].append(hit)
    found = []
    for name, same in by_rule.items():
        rule = RULES[name]
        if len(same) < 2 or len(same) < total * thresholds["layer-share"]:
            for hit in same:
                why = rule.head.format(**hit.words)
                found.append(Finding(hit.severity, name, layer, site, hit.head, hit.evidence, why, rule.remedies, rule.source))
            continue
        worst = max(same, key=lambda hit: (SEVERITIES.index(hit.severity), _extreme(name, hit)))
        heads = tuple(hit.head for hit in same)
        # the mildest of the group for rules that say "and more", the worst for those that say "up to"
        told = min(same, key=lambda hit: hit.words["sink"]) if name == "sink" else worst
        why = rule.layer.format(count=len(same), total=total, **told.words)
        found.append(Finding(worst.severity, name, layer, site, None, told.evidence, why, rule.remedies, rule.source, heads))
    return found


def _extreme(rule: str, hit: _Hit) -> float:
    value = hit.evidence[0][1]
    return -value if rule in ("gradient-vanishing", "doubly-stochastic") else value


def _layer(
    one: HeadMeasures, severity: str, name: str, evidence: tuple[Evidence, ...], heads: Iterable[int], words: Mapping[str, float]
) -> Finding:
    members, rule = tuple(heads), RULES[name]
    why = rule.layer.format(count=len(members), total=one.heads, **words)
    return Finding(severity, name, one.site.layer, one.site.name, None, evidence, why, rule.remedies, rule.source, members)


def _number(values: Tensor, head: int) -> float:
    return float(values[head])


def _or_zero(values: Tensor, head: int) -> float:
    value = float(values[head])
    return value if math.isfinite(value) else 0.0


def _order(one: Finding) -> tuple[int, int, str, str, int]:
    layer = -1 if one.layer is None else one.layer
    return (-SEVERITIES.index(one.severity), layer, one.rule, one.site, -1 if one.head is None else one.head)
