"""Which heads matter for a target: relevance, gradients, ablation and patching beside each other, and how far they agree.

Letters: N examples, B batch, L sites in execution order, H query heads of a site, Q queries, V width of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import AttributionError, InputError, NonFiniteError, NotIntercepted, SelectionError
from headscope.probe.attribution.attribute import ruled
from headscope.probe.attribution.head_ranking import HeadRanking
from headscope.probe.attribution.question import Question, at_least, copied
from headscope.probe.attribution.rules import RULE_SETS, rule_set
from headscope.probe.attribution.target import Scalar, Target, one_number
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception.intercept import intercept

Ask = int | Target | Scalar | None
Place = tuple[str, int]  # a site, and which of its calls in one forward
PLAIN = "gradient-x-input"
BY_RULES = tuple(name for name in RULE_SETS if name not in ("relp", PLAIN))
ABLATIONS = ("zero-ablation", "mean-ablation")
PAIRED = ("activation-patching", "attribution-patching", "relp")  # they compare with a corrupted input
METHODS = (*BY_RULES, "michel", *ABLATIONS, *PAIRED)


def rank_heads(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    target: Ask | Sequence[Ask] = None,
    method: str | Sequence[str] = "attnlrp",
    *,
    corrupted: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
    remember: MutableMapping[tuple[str, int], Tensor] | None = None,
) -> HeadRanking:
    """Score every head for a target, by one method or several.

    - `attnlrp`, `cp-lrp`, `gim`, …: relevance at the head's output z, Σ z·g under the rules.
    - `michel`: |Σ z·∂y/∂z|, the size of the effect of a gate on the head, to first order (Michel et al. 2019, section 4.1).
    - `zero-ablation`, `mean-ablation`: what the target loses with z zero, or its mean over all examples and positions.
    - `activation-patching`: what it loses with z of the corrupted input (Vig et al. 2020).
    - `attribution-patching`: the same to first order, Σ (z - z')·∂y/∂z (Nanda 2023; Syed et al. 2023).
    - `relp`: with the coefficients of relevance propagation in place of the gradient (Jafari et al. 2025).

    Args:
        model: in eval mode; nothing of it is changed.
        inputs: keyword inputs, or a list of them; the samples of a batch are examples of their own.
        target: as in `attribute`, one for all inputs or a list with one for each. The largest logit is that of the intact input.
        method: a name or several.
        corrupted: for patching: for each input one of the same shape, in which what matters is changed.
        batch: heads that ablation and patching change together, each in a copy of the example.
        progress: told (steps done, steps in all).
        remember: scores [L, H] by (method, number of the example) as they are made, NaN for heads still to come; what stands there is
            not computed again. Give one that outlives the process to go on after a stop.

    Raises:
        SelectionError: no such method; sites that differ in their number of heads.
        InputError: inputs that are no keyword inputs, nothing to compare with, lists of different length.
        AttributionError: a target that is no single number, or does not depend on the inputs.
        NonFiniteError: a score is NaN or infinite.
        NotIntercepted: no attention was caught.
    """
    methods = [method] if isinstance(method, str) else list(method)
    for name in methods:
        if name not in METHODS:
            raise SelectionError(f"no method {name!r} to rank heads: there are {', '.join(METHODS)}")
    if not methods:
        raise SelectionError(f"no method to rank heads: choose among {', '.join(METHODS)}")
    at_least(1, batch=batch)
    questions = _questions(model, inputs, target)
    others = None if corrupted is None else _questions(model, corrupted, target)
    if others is None and set(methods) & set(PAIRED):
        raise InputError(f"{next(m for m in methods if m in PAIRED)} compares with another input: give corrupted=")
    if others is not None:
        _check_pairs(questions, others)
    work = _Work(questions, others, batch, progress, {} if remember is None else remember)
    examples = {name: torch.stack(list(work.scores(name, methods))) for name in methods}
    for name, scores in examples.items():
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError(f"a score by {name} is not finite: the model overflows; use float32 instead of half precision")
    return HeadRanking(
        {name: scores.mean(0) for name, scores in examples.items()},
        examples,
        work.sites,
        {
            "methods": methods,
            "examples": len(questions),
            "targets": [q.scalar.to_dict() if isinstance(q.scalar, Target) else q.describe() for q in questions],
        },
    )


# -- the work ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Heads:
    """An interception handler that keeps every z, attached to the graph if there is one."""

    z: dict[Place, Tensor] = field(default_factory=dict)
    sites: dict[str, AttentionSite] = field(default_factory=dict)
    changes: bool = False

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"z"})

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        if call.recomputed:
            return value
        self.sites[call.site.name] = call.site
        self.z[call.site.name, call.step] = alias = value.view_as(value)
        return alias

    def see(self, call: AttentionCall) -> None:
        pass


@dataclass(eq=False)
class _Replaced:
    """An interception handler: copy b of the batch has another z at one head, `chosen[b]`.

    `instead` gives it for all heads of a call, broadcastable to [B of one copy, H, Q, V]; 0 where it gives None.
    """

    chosen: Sequence[tuple[str, int]]
    instead: Callable[[AttentionCall], Tensor | None]
    changes: bool = True

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"z"}) if any(name == site.name for name, _ in self.chosen) else frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        copies = len(self.chosen)
        if value.shape[0] % copies:
            raise AttributionError(f"{call.site.name} has {value.shape[0]} rows for {copies} samples: give batch=1")
        changed, other = value.clone(memory_format=torch.contiguous_format), self.instead(call)
        parts = changed.view(copies, -1, *value.shape[1:])  # [n, B, H, Q, V]
        for copy, (name, head) in enumerate(self.chosen):
            if name == call.site.name:
                parts[copy, :, head] = 0 if other is None else other[:, head].to(value.dtype)
        return changed

    def see(self, call: AttentionCall) -> None:
        pass


class _Work:
    """The examples, what all methods share of them, and the count of steps done."""

    def __init__(
        self, questions: Sequence[Question], others: Sequence[Question] | None, batch: int,
        progress: Callable[[int, int], None] | None, remember: MutableMapping[tuple[str, int], Tensor],
    ) -> None:  # fmt: skip
        self.questions, self.others, self.batch = questions, others, batch
        self.progress, self.remember = progress, remember
        self.done = 0
        found, _ = outputs_of_heads(questions[0])
        self.sites = tuple(found.sites.values())
        if not self.sites:
            raise NotIntercepted("no attention was caught in this model, so there are no heads to rank")
        sizes = {site.query_heads for site in self.sites}
        if len(sizes) > 1:
            raise SelectionError(f"the sites have {', '.join(map(str, sorted(sizes)))} heads: their scores make no table [L, H]")
        self.heads = [(site.name, head) for site in self.sites for head in range(site.query_heads)]
        self.means: dict[str, Tensor] | None = None

    def scores(self, method: str, methods: Sequence[str]) -> Iterator[Tensor]:
        """[L, H] in float64 for each example."""
        total = len(self.questions) * sum(self._steps(name, len(self.heads)) for name in methods)
        for number, question in enumerate(self.questions):
            known = self.remember.get((method, number))
            flat = torch.full((len(self.heads),), float("nan"), dtype=torch.float64) if known is None else known.flatten().clone()
            left = int(flat.isnan().sum())
            self._tell(self._steps(method, len(self.heads)) - self._steps(method, left), total)
            for partial in () if not left else self._scored(method, number, question, flat):
                flat = partial
                self.remember[method, number] = flat.reshape(len(self.sites), -1).clone()
                self._tell(1, total)
            yield flat.reshape(len(self.sites), -1)

    def _steps(self, method: str, heads: int) -> int:
        """How many steps it takes to score so many heads in one example."""
        return -(-heads // self.batch) if self._perturbs(method) else min(heads, 1)

    def _scored(self, method: str, number: int, question: Question, scores: Tensor) -> Iterator[Tensor]:
        return self._perturbed(method, number, question, scores) if self._perturbs(method) else self._linear(method, number)

    def _perturbs(self, method: str) -> bool:
        return method in ABLATIONS or method == "activation-patching"

    def _tell(self, steps: int, total: int) -> None:
        self.done += steps
        if self.progress is not None and steps:
            self.progress(self.done, total)

    def _linear(self, method: str, number: int) -> Iterator[Tensor]:
        """Σ z·g, or Σ (z - z')·g, by one forward and one backward."""
        rules = rule_set(PLAIN if method in ("michel", "attribution-patching") else method)
        question = self.questions[number]
        z, g = coefficients(question, rules.name)
        other = outputs_of_heads(self.others[number])[0].z if self.others is not None and method in PAIRED else {}
        sums = {site.name: torch.zeros(site.query_heads, dtype=torch.float64) for site in self.sites}
        for place, gradient in g.items():
            if place in other and other[place].shape != z[place].shape:
                raise InputError(
                    f"{place[0]} gives {list(z[place].shape)} for an input and {list(other[place].shape)} for its corrupted twin: "
                    "they must have the same shape"
                )
            inside = z[place] - other[place] if place in other else z[place]
            sums[place[0]] += (inside.double() * gradient.double()).sum((0, 2, 3)).cpu()
        found = torch.cat([sums[site.name] for site in self.sites])
        yield found.abs() if method == "michel" else found

    def _perturbed(self, method: str, number: int, question: Question, scores: Tensor) -> Iterator[Tensor]:
        """The scores [L·H] after each batch of heads, every head changed in a copy of its own."""
        heads, whole = outputs_of_heads(question)
        if method == "mean-ablation":
            self.means = self.means or self._mean()
            means = self.means
            instead: Callable[[AttentionCall], Tensor | None] = lambda call: means[call.site.name][None, :, None]  # noqa: E731
        elif method == "activation-patching":
            assert self.others is not None
            other = outputs_of_heads(self.others[number])[0].z
            instead = lambda call: other[call.site.name, call.step]  # noqa: E731
        else:
            instead = lambda call: None  # noqa: E731
        together = self.batch if isinstance(question.scalar, Target) else 1
        left = [place for place in range(len(self.heads)) if bool(scores[place].isnan())]
        for start in range(0, len(left), self.batch):
            for first in range(start, min(start + self.batch, len(left)), together):
                places = left[first : min(first + together, start + self.batch)]
                inputs = {name: copied(value, len(places), 1) for name, value in question.inputs.items()}
                with torch.no_grad(), intercept(question.model, _Replaced([self.heads[place] for place in places], instead)):
                    scores[places] = whole - question.read(question.model(**inputs)).double().cpu()
            yield scores

    def _mean(self) -> dict[str, Tensor]:
        """[H, V] for every site, over all examples, calls and positions."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for question in self.questions:
            for (name, _), z in outputs_of_heads(question)[0].z.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=z.device)) + z.double().sum((0, 2))
                counts[name] = counts.get(name, 0) + z.shape[0] * z.shape[2]
        return {name: total / counts[name] for name, total in sums.items()}


def outputs_of_heads(question: Question) -> tuple[_Heads, float]:
    """z of every site and call, and the target's value; no gradients."""
    heads = _Heads()
    with torch.no_grad(), intercept(question.model, heads, strict=False):
        value = question.read(question.model(**question.inputs)).sum(dtype=torch.float64)
    return heads, float(value)


def coefficients(question: Question, rules: str) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
    """z [B, H, Q, V] of every site and call, and what the rules let through to it, ∂y/∂z for the plain gradient.

    Raises:
        AttributionError: the target does not depend on the inputs.
    """
    handler = _Heads()
    with ruled(question, handler, rule_set(rules)) as (_, floats):
        value = one_number(question.read(question.model(**{**question.inputs, **floats})).sum())
    places = [place for place, z in handler.z.items() if z.requires_grad]
    gradients = torch.autograd.grad(value, [handler.z[place] for place in places], allow_unused=True)
    z = {place: handler.z[place].detach() for place in places}
    return z, {
        place: torch.zeros_like(z[place]) if gradient is None else gradient for place, gradient in zip(places, gradients, strict=True)
    }


def _questions(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], target: Ask | Sequence[Ask]) -> list[Question]:
    """One question for each sample, its largest logit named."""
    given = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not given:
        raise InputError("no inputs: give at least one example")
    targets: list[Ask] = list(target) if isinstance(target, Sequence) else [target] * len(given)
    if len(targets) != len(given):
        raise InputError(f"{len(targets)} targets for {len(given)} inputs: give one for each, or one for all")
    return [sample.resolved() for one, own in zip(given, targets, strict=True) for sample in Question.of(model, one, own).samples()]


def _check_pairs(questions: Sequence[Question], others: Sequence[Question]) -> None:
    if len(questions) != len(others):
        raise InputError(f"{len(questions)} inputs and {len(others)} corrupted ones: give one for each")
    for number, (question, other) in enumerate(zip(questions, others, strict=True)):
        for name, value in question.inputs.items():
            twin = other.inputs.get(name)
            if isinstance(value, Tensor) and (not isinstance(twin, Tensor) or twin.shape != value.shape):
                came = list(twin.shape) if isinstance(twin, Tensor) else "missing"
                raise InputError(f"{name} of input {number} is {list(value.shape)}, of its corrupted twin {came}: give the same shape")
