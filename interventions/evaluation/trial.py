"""One example, run without a plan and with it. Letters: S tokens, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from headscope.interventions.activation import Activation
from headscope.interventions.cost import measure_cost
from headscope.interventions.evaluation.changes import Price, Result
from headscope.interventions.evaluation.examples import Case, Example
from headscope.interventions.evaluation.metrics import Metric, Outcome, accuracy, kl, perplexity
from headscope.interventions.plan import Plan, switched_on
from headscope.interventions.roles import Roles
from headscope.interventions.spans import locate
from headscope.kernels.errors import HeadscopeError, InputError, SelectionError
from headscope.probe.call import OUTSIDE
from headscope.probe.footprint import measure
from headscope.probe.models import context_window

ALWAYS = (kl(), perplexity(), accuracy())  # what is asked of benign examples, where it can be


@dataclass(eq=False)
class Trial:
    """A model, a plan, and how an example is run with both."""

    model: nn.Module
    plan: Plan
    tokenizer: Any
    roles: Roles | Callable[[Example], Roles] | None
    run: Callable[[Example], Any] | None
    seed: int
    last: dict[int, str] = field(default_factory=dict)  # edit -> why it changed nothing in the example before
    sure: bool = False  # every edit has found a site

    def measure(self, case: Case, wanted: Sequence[Metric], benign: bool, *, alone: bool) -> Result:
        """Both runs of one example, and the metrics read off them.

        Raises:
            HeadscopeError: what the model or a metric could not do; the message names the example.
        """
        try:
            asked = [one for one in wanted if not benign or all(getattr(case, need) is not None for need in one.needs)]
            length = tuple(sorted({one.tokens for one in asked if one.tokens}))
            fitting = self._fitting(case)
            forward = benign or alone or any(not one.tokens for one in asked)
            hits = [False] * len(self.plan)
            with torch.no_grad():
                before = Outcome(case, self._forward(case) if forward else None, self._write(case, length))
                output, texts = None, {}
                if forward:
                    with self._on(case, fitting, hits):
                        output = self._forward(case)
                if length:
                    with self._on(case, fitting, hits):
                        texts = self._write(case, length)
            after = Outcome(case, output, texts, before)
            if benign or alone:
                asked = [*asked, *(one for one in self._always(before, benign) if one.name not in {other.name for other in asked})]
            return Result(
                case.example.id, benign, {one.name: _finite(one.measure(before, case)) for one in asked},
                {one.name: _finite(one.measure(after, case)) for one in asked}, tuple(hits),
            )  # fmt: skip
        except HeadscopeError as error:
            raise type(error)(f"{case.example.name}: {error}") from error

    def time(self, case: Case, repeats: int) -> Price:
        """What the plan costs on one example."""
        fitting = self._fitting(case)

        def forward() -> Any:
            return self._forward(case)

        cost = measure_cost(fitting[0].edits, lambda: self._switch(case, fitting[0]), self.model, (), {}, repeats, forward)
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        with torch.no_grad():
            _, without = measure(forward, device)
            with self._switch(case, fitting[0]):
                _, on = measure(forward, device)
        return Price(case.example.id, cost, without.peak_bytes, on.peak_bytes)

    def fits(self, case: Case) -> int:
        """How many edits an example has the text for."""
        return len(self._fitting(case)[1])

    def nothing(self, index: int, examples: int) -> str:
        """That an edit changed nothing, and why."""
        edit = self.plan.edits[index]
        spans = [span.text for span in edit.selector.spans()]
        why = self.last.get(index) or (f"its text {spans[0]!r} occurs in none of them" if spans else "none of them has what it selects")
        return f"edit {index} ({edit}) changed nothing in any of {examples} examples: {why}"

    def _fitting(self, case: Case) -> tuple[Plan, tuple[int, ...]]:
        """The plan less the edits at a text that this example does not hold, and the places of those that stay."""
        kept = tuple(index for index, edit in enumerate(self.plan) if self._holds(case, index))
        return (self.plan if len(kept) == len(self.plan) else Plan([self.plan.edits[index] for index in kept])), kept

    def _holds(self, case: Case, index: int) -> bool:
        spans = self.plan.edits[index].selector.spans()
        if not spans:
            return True
        if self.tokenizer is None or case.input_ids is None:
            locate(spans, self.tokenizer, case.input_ids)  # says what is missing
        try:
            locate(spans, self.tokenizer, case.input_ids)
        except SelectionError:
            return False
        return True

    @contextmanager
    def _on(self, case: Case, fitting: tuple[Plan, tuple[int, ...]], hits: list[bool]) -> Iterator[None]:
        """The plan, switched on for an example; afterwards it is noted which edits changed something."""
        plan, places = fitting
        if not places:
            yield
            return
        with self._switch(case, plan) as activation:
            yield
        for index, place in enumerate(places):
            if activation.hits[index]:
                hits[place] = True
            elif activation.sites:
                self.last[place] = activation.why(index)
        self._check_sites(activation)

    def _check_sites(self, activation: Activation) -> None:
        """Fail at the first example where an edit names a site that does not exist: no other example will have it.

        Raises:
            SelectionError: there is such an edit.
        """
        if self.sure:
            return
        if not activation.sites:
            raise SelectionError("no attention was called while the plan was on, so there is nothing that it could change")
        for index, edit in enumerate(activation.edits):
            if edit.stage not in OUTSIDE and not activation.hits[index] and not activation.matching(edit):
                raise SelectionError(f"edit {index} ({edit}) changes nothing: {activation.why(index)}")
        self.sure = len(activation.edits) == len(self.plan)

    def _switch(self, case: Case, plan: Plan) -> AbstractContextManager[Activation]:
        given: Roles | None = case.example.roles
        if given is None:
            given = self.roles(case.example) if callable(self.roles) else self.roles
        return switched_on(plan, self.model, tokenizer=self.tokenizer, input_ids=case.input_ids, roles=given)

    def _forward(self, case: Case) -> Any:
        with self._seeded():
            return self.model(**case.inputs) if self.run is None else self.run(case.example)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Torch draws the same numbers in every run, and goes on afterwards as if there had been none."""
        devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda" and p.device.index is not None})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            yield

    def _write(self, case: Case, lengths: tuple[int, ...]) -> dict[int, str | None]:
        """What the model writes, always the likeliest token; for each length the text of so many."""
        if not lengths:
            return {}
        model: Any = self.model
        ids = case.input_ids
        if not callable(getattr(model, "generate", None)) or not callable(getattr(self.tokenizer, "decode", None)) or ids is None:
            raise InputError("a metric of generated text needs a model that has generate(), its tokenizer, and a text")
        seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        limit = context_window(model)
        if limit is not None and not seq2seq and ids.shape[-1] + lengths[-1] > limit:
            raise InputError(
                f"{ids.shape[-1]} tokens and {lengths[-1]} generated ones are more than the context window of {limit}: generate fewer"
            )
        inputs = {"attention_mask": torch.ones_like(ids)}  # else transformers hides what looks like padding
        inputs |= {name: value for name, value in case.inputs.items() if name != "decoder_input_ids"}
        with self._seeded():
            found = model.generate(
                **inputs, max_new_tokens=lengths[-1], do_sample=False, num_beams=1, pad_token_id=self._padding,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        written = found.sequences[0, 1 if seq2seq else ids.shape[-1] :].tolist()
        whole = [not bool(step.isnan().any()) for step in found.logits]
        return {n: self.tokenizer.decode(written[:n], skip_special_tokens=True) if all(whole[:n]) else None for n in lengths}

    @cached_property
    def _padding(self) -> int:
        """The token behind the end of what is written: never read, but transformers asks for one."""
        config = getattr(self.model, "generation_config", None)
        for id in (getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)):
            if isinstance(id, int):
                return id
            if isinstance(id, list) and id:
                return int(id[0])
        return 0

    def _always(self, before: Outcome, benign: bool) -> list[Metric]:
        """Those of `ALWAYS` that can be read off this model and example."""
        try:
            before.logits  # noqa: B018
        except InputError:  # a model that makes something else
            return []
        reads = before.ids is not None and len(before.ids) > 1 and "MaskedLM" not in type(self.model).__name__
        possible = {"kl": True, "perplexity": reads, "accuracy": benign and before.case.target is not None}
        return [one for one in ALWAYS if possible[one.name]]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
