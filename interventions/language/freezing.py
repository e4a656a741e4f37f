"""Does an edit act through QK or through OV? Its effect again, with who looks where held as it was, and with the values held.

Letters: B samples of a batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions.edit import Edit
from headscope.interventions.language.prompts import Prompts, samples_of, sites_of
from headscope.interventions.ops import freeze, patch
from headscope.interventions.plan import Plan
from headscope.interventions.select import select
from headscope.kernels.errors import InputError
from headscope.probe.attribution.interval import Interval, bootstrap
from headscope.probe.capture import Capture
from headscope.probe.interception import intercept
from headscope.probe.keep import Keep

Metric = Callable[[Any], Tensor]
CASES = ("pattern", "values", "both")


@dataclass(frozen=True, eq=False)
class EffectSplit:
    """An edit's effect on a metric, whole and with parts of attention held at the unedited run.

    Attributes:
        before, after: the metric without and with the edit, one for each prompt.
        frozen: with the edit while `pattern`, `values` or `both` are held.
        sites: where they are held.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    frozen: dict[str, tuple[float, ...]]
    sites: tuple[str, ...]

    @property
    def effect(self) -> Interval:
        """Mean of after - before, with its interval over prompts."""
        return bootstrap([b - a for a, b in zip(self.before, self.after, strict=True)])

    def kept(self, case: str) -> Interval:
        """The share of the mean effect that is left while something is held; 1 is all. The interval resamples prompts.

        Raises:
            InputError: no such case, or an effect of zero, which has no shares.
        """
        if case not in self.frozen:
            raise InputError(f"no case {case!r}: there are {', '.join(self.frozen)}")
        whole = torch.tensor(self.after, dtype=torch.float64) - torch.tensor(self.before, dtype=torch.float64)
        held = torch.tensor(self.frozen[case], dtype=torch.float64) - torch.tensor(self.before, dtype=torch.float64)
        if float(whole.mean()) == 0:
            raise InputError("the edit moves the metric by 0 on average, so nothing of it can be shared out: use another metric or edit")
        n = len(whole)
        share = float(held.mean() / whole.mean())
        if n == 1:
            return Interval(share, None, None, 1)
        drawn = torch.randint(0, n, (2000, n), generator=torch.Generator().manual_seed(0))
        ratios = held[drawn].mean(1) / whole[drawn].mean(1)
        low, high = (float(x) for x in torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)))
        return Interval(share, low, high, n)

    def to_dict(self) -> dict[str, object]:
        return {
            "before": list(self.before),
            "after": list(self.after),
            "frozen": {case: list(values) for case, values in self.frozen.items()},
            "effect": self.effect.to_dict(),
            "kept": {case: self.kept(case).to_dict() for case in self.frozen},
            "sites": list(self.sites),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def __str__(self) -> str:
        lines = [f"effect {self.effect}"]
        lines += [f"kept with {case} held: {self.kept(case)}" for case in self.frozen]
        return "\n".join(lines)


def split_effect(
    model: nn.Module,
    plan: Plan,
    prompts: Prompts,
    metric: Metric,
    *,
    sites: str | Sequence[str] | None = None,
    cases: Sequence[str] = CASES,
    progress: Callable[[int, int], None] | None = None,
) -> EffectSplit:
    """Measure an edit's effect whole, and with patterns or values held at what they are without it (arXiv 2604.08524).

    What is kept with the pattern held acts through what heads carry (OV) or past attention; what is kept with the values held acts
    through where heads look (QK) or past attention; with both held, past attention alone.

    Args:
        model: in eval mode; nothing of it is changed.
        plan: the edit.
        prompts: keyword inputs, or a list of them; the samples of a batch are prompts of their own.
        metric: the model's output -> one number.
        sites: where they are held; everywhere if left out.
        cases: of `pattern`, `values`, `both`.
        progress: told (prompts done, prompts in all).

    Raises:
        InputError: no prompts, no such case, or a metric that gives more than one number.
    """
    if not cases or any(case not in CASES for case in cases):
        raise InputError(f"cases={list(cases)!r}: choose among {', '.join(CASES)}")
    samples = samples_of(prompts)
    found: dict[str, list[float]] = {name: [] for name in ("before", "after", *cases)}
    names: tuple[str, ...] = ()
    for number, inputs in enumerate(samples):
        names = names or _chosen(model, inputs, sites)
        seen = Capture(Keep(pattern=True, v=True), sites=list(names))
        with torch.no_grad():
            with intercept(model, seen):
                found["before"].append(_one(metric(model(**inputs))))
            for case in ("after", *cases):
                held = [Edit("pattern", freeze(seen), select(sites=names))] if case in ("pattern", "both") else []
                held += [Edit("v", patch(seen), select(sites=names))] if case in ("values", "both") else []
                with ExitStack() as stack:
                    stack.enter_context(plan.on(model))
                    if held:
                        stack.enter_context(Plan(held).on(model))
                    found[case].append(_one(metric(model(**inputs))))
        if progress is not None:
            progress(number + 1, len(samples))
    return EffectSplit(
        tuple(found["before"]), tuple(found["after"]), {case: tuple(found[case]) for case in cases}, names
    )  # fmt: skip


def _chosen(model: nn.Module, inputs: dict[str, Any], sites: str | Sequence[str] | None) -> tuple[str, ...]:
    everywhere = sites_of(model, inputs)
    if sites is None:
        return tuple(site.name for site in everywhere)
    chosen = select(sites=sites)
    found = tuple(site.name for site in everywhere if chosen.matches(site))
    if not found:
        raise InputError(f"sites={sites!r}: there is no such site; there are {', '.join(site.name for site in everywhere[:8])}")
    return found


def _one(value: Tensor) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the metric gave {came}: it must give one number for the output of one prompt")
    return float(value)
