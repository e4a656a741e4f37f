"""Rules over hidden states: what becomes of the tokens on their way through the blocks.

Letters: N tokens. A number that is undefined makes no finding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from headscope.probe.health.baselines import Baselines
from headscope.probe.health.finding import Evidence, Finding
from headscope.probe.health.measures import StreamMeasures
from headscope.probe.health.rules import RULES
from headscope.probe.health.thresholds import Thresholds


def findings_of_streams(streams: Sequence[StreamMeasures], baselines: Baselines, thresholds: Thresholds) -> list[Finding]:
    """What is found in hidden states: tokens that become one vector, that point one way, or that lose rank."""
    inputs = [one for one in streams if one.place == "input"]
    blind = next((one for one in inputs if math.isnan(one.residual)), None)
    if blind is not None:
        return _blind(blind, thresholds)
    before = max((one.residual for one in inputs), default=math.nan)
    found = []
    if before < thresholds["residual-warn"]:
        first = inputs[0]
        evidence: tuple[Evidence, ...] = (("residual", before, thresholds["residual-warn"]),)
        return [_said(first.layer, first.name, "info", "alike-inputs", evidence, {"residual": before})]
    for one in streams:
        if one.place != "output" or one.tokens < thresholds["tokens-least"] or not math.isfinite(one.residual):
            continue
        fresh = baselines.fresh_stream(one)
        reference: tuple[Evidence, ...] = () if fresh is None else (("residual of fresh weights", fresh.residual, None),)
        if one.floored or one.residual < thresholds["residual-warn"]:
            severity = "alarm" if one.floored or one.residual < thresholds["residual-alarm"] else "warn"
            evidence = (("residual", one.residual, thresholds[f"residual-{severity}"]), ("cosine", one.cosine, None), *reference)
            entry = before if math.isfinite(before) else 1.0
            found.append(_said(one.layer, one.name, severity, "token-collapse", evidence, {"residual": one.residual, "before": entry}))
            continue
        low_rank = _low_rank(one, fresh, thresholds)
        if low_rank is not None:
            found.append(low_rank)
        if one.cosine > thresholds["cosine"]:
            evidence = (("cosine", one.cosine, thresholds["cosine"]), ("cosine_centred", one.cosine_centred, None), *reference)
            centred = (
                "they also lie in few directions"
                if low_rank is not None
                else f"what is left of them has {one.effective_rank_centred:.0f} directions"
            )
            why = RULES["alike-tokens"].layer.format(cosine=one.cosine, centred=centred)
            rule = RULES["alike-tokens"]
            found.append(Finding("info", "alike-tokens", one.layer, one.name, None, evidence, why, rule.remedies, rule.source))
    return found


def _blind(first: StreamMeasures, thresholds: Thresholds) -> list[Finding]:
    """Said in place of everything else where what goes into the model has no residual: zeros, or what is not finite."""
    if first.tokens < thresholds["tokens-least"]:
        return []
    why = RULES["undefined-inputs"].layer.format(reason=first.undefined.get("residual", "not measured"))
    evidence: tuple[Evidence, ...] = (("residual", math.nan, None),)
    return [Finding("info", "undefined-inputs", first.layer, first.name, None, evidence, why, RULES["undefined-inputs"].remedies)]


def _low_rank(one: StreamMeasures, fresh: StreamMeasures | None, thresholds: Thresholds) -> Finding | None:
    """Few directions, by themselves or beside the freshly initialised network."""
    share = _ratio(one.effective_rank_centred, one.rank_limit)
    first = math.nan if fresh is None else _ratio(fresh.effective_rank_centred, fresh.rank_limit)
    limit = max(thresholds["effective-rank"], (first if math.isfinite(first) else 0.0) * thresholds["effective-rank-fresh"])
    if not share < limit:  # also NaN
        return None
    evidence: tuple[Evidence, ...] = (
        ("effective_rank_centred / rank_limit", share, limit), ("residual", one.residual, None), ("that of fresh weights", first, None)
    )  # fmt: skip
    words = {"rank": one.effective_rank_centred, "limit": one.rank_limit}
    return _said(one.layer, one.name, "warn", "rank-collapse", evidence, words)


def _said(layer: int | None, site: str, severity: str, name: str, evidence: tuple[Evidence, ...], words: Mapping[str, float]) -> Finding:
    rule = RULES[name]
    return Finding(severity, name, layer, site, None, evidence, rule.layer.format(**words), rule.remedies, rule.source)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
