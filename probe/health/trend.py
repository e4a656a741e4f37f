"""Findings that only the course of a training run shows: entropy that falls, scores that grow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from headscope.probe.health.findings import Finding
from headscope.probe.health.measures import HeadMeasures

WINDOW = 10  # measurements that are looked back on
FALL = 0.3  # of its entropy that a head loses within the window
ROUTING_GAIN = 0.1  # share of the budget; a head that gains so much got better, not worse
SCORES, GROWTH = 30.0, 3.0  # nats from which growth by this factor is told
ENTROPY_REMEDIES = ("normalise queries and keys (QK-norm)", "σReparam", "a lower learning rate, or a longer warm-up")
SCORE_REMEDIES = ("normalise queries and keys (QK-norm)", "clip the scores or the weights behind them (QK-Clip, softcap)", "weight decay")


class Trend:
    """Remembers the last measurements of a run and compares the newest with them."""

    def __init__(self) -> None:
        self._past: dict[str, deque[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, heads: Sequence[HeadMeasures]) -> tuple[Finding, ...]:
        """One more measurement; what it shows next to the highest entropy and the lowest scores of the last ones.

        - `entropy-fall`: a head lost 30 % of its entropy and routes no better for it. Source: Zhai et al. 2023, whose curves do this
          before training diverges; the numbers are rules of thumb.
        - `score-growth`: its largest score grew threefold, to 30 nats and more.
        """
        found: list[Finding] = []
        for one in heads:
            past = self._past.setdefault(one.site.name, deque(maxlen=WINDOW))
            if past and past[0][0].shape == one.entropy.shape:
                for head in range(one.heads):
                    found += _fallen(one, head, past)
                    found += _grown(one, head, past)
            past.append((one.entropy.clone(), one.routing.clone(), one.max_score.clone()))
        return tuple(found)


def _fallen(one: HeadMeasures, head: int, past: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Finding]:
    now, routing = float(one.entropy[head]), float(one.routing[head])
    highest, then = max(((float(row[0][head]), float(row[1][head])) for row in past), key=lambda pair: _or_low(pair[0]))
    if not now < (1 - FALL) * highest or not routing < then + ROUTING_GAIN:  # also NaN
        return []
    evidence = (("entropy", now, (1 - FALL) * highest), ("entropy before", highest, None), ("routing", routing, then + ROUTING_GAIN))
    why = (
        f"its entropy fell from {highest:.2f} to {now:.2f} nats within {len(past)} measurements, and it does not route better for it: "
        "attention may be collapsing onto few keys"
    )
    source = "Zhai et al. 2023; rule of thumb"
    return [Finding("warn", "entropy-fall", one.site.layer, one.site.name, head, evidence, why, ENTROPY_REMEDIES, source)]


def _grown(one: HeadMeasures, head: int, past: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Finding]:
    now = float(one.max_score[head])
    lowest = min((float(row[2][head]) for row in past if math.isfinite(row[2][head])), default=math.nan)
    if not (now > SCORES and now > GROWTH * lowest):
        return []
    evidence = (("max_score", now, max(SCORES, GROWTH * lowest)), ("max_score before", lowest, None))
    why = f"its largest score grew from {lowest:.3g} to {now:.3g} within {len(past)} measurements: scores that run away end in divergence"
    source = "Wortsman et al. 2023; rule of thumb"
    return [Finding("warn", "score-growth", one.site.layer, one.site.name, head, evidence, why, SCORE_REMEDIES, source)]


def _or_low(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
