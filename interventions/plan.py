"""A list of edits that is switched on and off as one.

    plan = Plan([Edit("z", scale(0.0), select(layer=3, head=5))])
    with plan.on(model):
        model(**inputs)

What an edit means does not depend on where it is carried out, but a capture of the pattern shows it as it was materialised or
recomputed: a scale of whole pattern rows, which is carried out on z, does not show there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headscope.interventions import recipe
from headscope.interventions.activation import Activation, enter, leave, refuse_sure_conflicts
from headscope.interventions.cost import PlanCost, measure_cost
from headscope.interventions.difference import PlanDifference, difference
from headscope.interventions.edit import Edit
from headscope.interventions.positions import Role, Span
from headscope.interventions.roles import Roles, known_roles
from headscope.interventions.script import write_script
from headscope.interventions.spans import Tokenizer, locate
from headscope.kernels.errors import ClosedError, EditError, RecipeError
from headscope.probe.call import AttentionCall, AttentionSite, Extension
from headscope.probe.interception import intercept


class Plan:
    """Edits in order. Within a stage they act in this order; stages follow the order of a call.

    A plan never changes; what happens while it is on is kept elsewhere, so one plan may be on at several models and in
    several threads at a time, once each. It is itself a handler for `intercept`, which then counts no hits.
    """

    changes = True

    def __init__(self, edits: Iterable[Edit]) -> None:
        """Raises EditError if two of the edits certainly overwrite the same entries."""
        found = tuple(edits)
        for edit in found:
            if not isinstance(edit, Edit):
                raise EditError(f"Plan([... {edit!r} ...]): a plan is a list of Edit(stage, op, select(...))")
        refuse_sure_conflicts((), found, "in one plan")
        self.edits = found
        self._attached: list[tuple[nn.Module, ExitStack]] = []
        self._handler = Activation(self, found, {})

    @contextmanager
    def on(
        self,
        model: nn.Module,
        *,
        strict: bool = True,
        tokenizer: Tokenizer | None = None,
        input_ids: Tensor | Sequence[int] | None = None,
        roles: Roles | None = None,
    ) -> Iterator[Activation]:
        """Change the model while the block runs; afterwards it is as it was.

        Args:
            model: any module; its attention calls in this thread are changed.
            strict: raise if an edit changed nothing, or if attention was run that could not be caught.
            tokenizer, input_ids: where `span("text")` is looked up, [tokens] or [samples, tokens]; only spans need them.
            roles: which positions `role("text")` stands for: a range or list for each role, or what `find_roles` found.

        Yields:
            The activation: `.hits` counts the calls that each edit changed, `.sites` holds the sites that were run.

        Raises:
            SelectionError: a span that does not occur; a head that a selected site does not have; at the end, an edit that hit nothing.
            EditError: the plan is on already, or contradicts a plan that is.
        """
        with switched_on(self, model, strict=strict, tokenizer=tokenizer, input_ids=input_ids, roles=roles) as activation:
            yield activation
        if strict:  # not reached when an exception is on its way
            activation.check_hits()

    def attach(
        self,
        model: nn.Module,
        *,
        strict: bool = True,
        tokenizer: Tokenizer | None = None,
        input_ids: Tensor | Sequence[int] | None = None,
        roles: Roles | None = None,
    ) -> Plan:
        """Switch the plan on until `detach()`; the arguments and errors are those of `on()`."""
        stack = ExitStack()
        stack.enter_context(self.on(model, strict=strict, tokenizer=tokenizer, input_ids=input_ids, roles=roles))
        self._attached.append((model, stack))
        return self

    def detach(self, model: nn.Module | None = None) -> None:
        """Switch off what `attach()` switched on, at one model or at all.

        Raises:
            ClosedError: the plan is not attached there.
            SelectionError: an edit hit nothing; the model is restored nevertheless.
        """
        leaving = [entry for entry in self._attached if model is None or entry[0] is model]
        if not leaving:
            raise ClosedError(
                f"the plan is not attached to {'a model' if model is None else f'this {type(model).__name__}'}: "
                "attach(model) comes first, and detach() once"
            )
        self._attached = [entry for entry in self._attached if entry not in leaving]
        with ExitStack() as every:
            for _, stack in leaving:
                every.push(stack)

    def stages(self, site: AttentionSite) -> frozenset[str]:
        """The stages at which the plan changes something at a site."""
        return self._handler.stages(site)

    def reads(self, site: AttentionSite) -> frozenset[str]:
        """Nothing: a plan looks at no finished call."""
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        """The stage's value after the plan's edits there."""
        return self._handler.change(call, stage, value)

    def see(self, call: AttentionCall) -> None:
        """Nothing to do at a finished call."""

    @property
    def outside(self) -> frozenset[str]:
        """Those of the stages outside the door at which the plan changes something."""
        return self._handler.outside

    def extend(self, call: AttentionCall) -> list[Extension]:
        """The keys and values that the plan puts in front of those of a call."""
        return self._handler.extend(call)

    def diff(self, other: Plan) -> PlanDifference:
        """What another plan does that this one does not, and the other way round."""
        return difference(self.edits, other.edits)

    def cost(
        self, model: nn.Module, *args: object, repeats: int = 5, tokenizer: Tokenizer | None = None, roles: Roles | None = None,
        **inputs: object,
    ) -> PlanCost:  # fmt: skip
        """What the plan costs: where each edit is carried out, which sites leave the fused path, time with and without it.

        Args:
            model: the model to run.
            args, inputs: what to run it with.
            repeats: timed runs each, taken in turns.
            tokenizer: for spans, which are looked up in `inputs["input_ids"]`.
            roles: as in `on()`.
        """
        ids = inputs.get("input_ids")
        return measure_cost(
            self.edits,
            lambda: self.on(model, tokenizer=tokenizer, input_ids=ids if isinstance(ids, Tensor) else None, roles=roles),
            model,
            args,
            inputs,
            repeats,
        )

    def save(self, path: str | Path, model: nn.Module | None = None) -> Path:
        """Write the plan as a YAML recipe; tensors go to a safetensors file beside it.

        Args:
            path: the recipe, such as `recipe.yaml`; replaced whole if it exists.
            model: if given, its fingerprint is written, and `load(path, model=...)` refuses other models.

        Raises:
            RecipeError: an edit that cannot be written down (`call`), or more than a recipe may hold.
        """
        return recipe.save(self.edits, Path(path), model)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None, *, force: bool = False) -> Plan:
        """Read a recipe that `save` or a person wrote.

        Args:
            path: the YAML file.
            model: if given, and the recipe names a fingerprint, they have to agree.
            force: warn instead where they do not.

        Raises:
            RecipeError: anything in the file that is not understood, named; or another model.
        """
        return cls._checked(recipe.load(Path(path), model, force=force))

    def to_dict(self) -> dict[str, object]:
        """The recipe as plain values, for JSON; a plan that holds tensors has none and needs `save`."""
        return recipe.to_dict(self.edits)

    @classmethod
    def from_dict(cls, document: Mapping[str, object]) -> Plan:
        """The plan that `to_dict` wrote; RecipeError as with `load`."""
        return cls._checked(recipe.from_dict(document))

    @classmethod
    def _checked(cls, edits: Sequence[Edit]) -> Plan:
        try:
            return cls(edits)
        except EditError as error:
            raise RecipeError(f"the recipe contradicts itself: {error}") from error

    def to_python(self) -> str:
        """A script that makes this plan, as text."""
        return write_script(self.edits)

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __eq__(self, other: object) -> bool:
        return self.edits == other.edits if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.edits)

    def __repr__(self) -> str:
        return f"Plan({len(self.edits)} edits: {'; '.join(map(str, self.edits))})"


@contextmanager
def switched_on(
    plan: Plan,
    model: nn.Module,
    *,
    strict: bool = True,
    tokenizer: Tokenizer | None = None,
    input_ids: Tensor | Sequence[int] | None = None,
    roles: Roles | None = None,
) -> Iterator[Activation]:
    """`plan.on(...)`, for those who look at the hits themselves: an edit that changed nothing is no error here."""
    spans = locate((span for edit in plan.edits for span in edit.selector.spans()), tokenizer, input_ids)
    named = known_roles(roles, [role for edit in plan.edits for role in edit.selector.roles()])
    places: dict[Span | Role, Any] = {place: found for known in (spans.items(), named.items()) for place, found in known}
    with ExitStack() as stack:
        activation = enter(model, plan, plan.edits, places)
        stack.callback(leave, model, activation)
        stack.enter_context(intercept(model, activation, strict=strict))
        yield activation
