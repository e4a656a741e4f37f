"""The function mode under which a model's forward pass records the relevance rules, whatever code makes the calls.

It changes no number of the forward pass, no class and no weight: weights enter as constants, so that a tensor belongs to the autograd
graph exactly if it depends on the input; embedding lookups become the leaves; functions that are not linear in their data get the
backward pass of their rule. The model's own attention kernels stay in use. What no mode can see, autograd functions of somebody's own and
scripted modules, is recognised by what it leaves behind, and reported as unruled.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

from headscope.probe.attribution import constant_rules, functions, nonlinear_rules, product_rules, rules, written
from headscope.probe.attribution.booking import Booking, Rule, checkpointed
from headscope.probe.attribution.calls import BARE, bare, base, in_place, tensors_in, widened
from headscope.probe.attribution.ledger import Books
from headscope.probe.attribution.rules import RuleSet
from headscope.probe.interception.session import Session
from headscope.probe.interception.tape import base_name

WIDE = (torch.float64, torch.complex128)
_kinds: dict[Any, tuple[str, str, bool]] = {}  # torch function -> what it is to the rules, its name, whether it writes into its input


@dataclass(frozen=True, eq=False)
class Leaf:
    """A lookup or a table at which relevance ends.

    Attributes:
        name: of the input whose values were looked up, else the path of the module that did.
        constant: the lookup does not depend on the values of an input (positions, token types that were not given).
        tensor: what was looked up, a leaf of the graph.
    """

    name: str
    constant: bool
    tensor: Tensor


class RuleMode(Booking):
    """See the module docstring.

    Args:
        rules: the rule set.
        books: what absorbs relevance is booked here; None for rules that do not conserve.
        session: of the interception, to name modules.
        indices: integer inputs by name; a lookup by one of them is that input's leaf.
        exact: stay in float64 where the model's code rounds on its way: for float64 models, whose books then close to 1e-10.
        audit: book every operation, not only those that may absorb: several times slower, for tests.
    """

    def __init__(
        self, rules: RuleSet, books: Books | None, session: Session, indices: dict[str, Tensor], exact: bool = False, audit: bool = False
    ) -> None:
        super().__init__(rules, books, session, audit)
        self.indices, self.exact = indices, exact
        self.leaves: list[Leaf] = []
        self._foreign: set[Any] = set()
        self._steps: set[type] = set()  # kinds of steps of the graph that torch made
        if books is not None:
            for path, module in session.modules.items():
                if isinstance(module, torch.jit.ScriptModule):
                    books.unruled["torch.jit.script", path] = 1

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        known = _kinds.get(func)
        if known is None:
            known = _kinds[func] = (*classify(func), in_place(base_name(func)))
        kind, name, writes = known
        if kind == "pass":
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if args and (writes or kwargs.get("inplace") or (kind == "identity" or kind == "linear") and args[-1] is True):
            self.before_writing(args[0])
        if not torch.is_grad_enabled():
            return self._without_data(func, name, args, kwargs)
        if kind == "lookup":
            found = self._lookup(func, name, args, kwargs)
            if found is not None:
                return found
        for a in args:
            if type(a) not in BARE:
                args = tuple([bare(a) for a in args])
                break
        for value in kwargs.values():
            if type(value) not in BARE:
                kwargs = {key: bare(value) for key, value in kwargs.items()}
                break
        if kind == "composite" and func is not self._inside:
            return self.reenter(func, args, kwargs)
        if not self._depends(args, kwargs):
            return self._without_data(func, name, args, kwargs)
        if self.exact and any(isinstance(a, Tensor) and a.dtype in WIDE and a.requires_grad for a in (*args, *kwargs.values())):
            if name in NARROWING:
                return args[0]
            args, kwargs = widened(name, kind, args, kwargs)
        if kind == "linear" or kind == "lookup":
            return self.linear(func, name, args, kwargs) if self.audit else func(*args, **kwargs)
        return RULES[kind](self, func, name, args, kwargs)

    def _depends(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether any tensor among the arguments depends on the input; one that a foreign function made is reported."""
        found = False
        for value in (*args, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind is not Tensor and kind in BARE:
                continue
            if kind is Tensor or isinstance(value, Tensor):
                if value.requires_grad:
                    found = True
                    made = value.grad_fn
                    if made is not None and type(made) not in self._steps:
                        self._meet(made)
            elif isinstance(value, list | tuple) and self._depends(value, {}):
                found = True
        return found

    def _meet(self, made: Any) -> None:
        """A kind of step of the graph that was not seen before."""
        if isinstance(made, BackwardCFunction) or "CppNode" in made.name():
            self._note_foreign(made)
        elif type(made).__name__ == made.name():  # torch's own have a class each
            self._steps.add(type(made))

    def _note_foreign(self, made: Any) -> None:
        """A step of the graph by a function of somebody's own: no torch call showed what it does, and the residual will."""
        own = getattr(type(made), "_forward_cls", None)
        if own is CheckpointFunction:
            raise checkpointed(self.path())
        if getattr(own, "__module__", "") in OWN:
            self._steps.add(type(made))
            return
        if self.books is None or made in self._foreign:
            return
        self._foreign.add(made)
        key = (made.name().removesuffix("Backward"), self.path())
        self.books.unruled[key] = self.books.unruled.get(key, 0) + 1
        for before, _ in made.next_functions:
            if isinstance(before, BackwardCFunction):
                self._note_foreign(before)

    def _lookup(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Rows of a weight picked by integers: a leaf of the graph. None where this is something else."""
        if name == "embedding":
            index, weight = (*args, *(kwargs[key] for key in ("input", "weight") if key in kwargs))[:2]
        elif len(args) > 1 and type(args[0]) is not Tensor and isinstance(args[0], nn.Parameter):
            weight, index = args[0], args[-1]
        else:
            return None
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool or bare(weight).requires_grad:
            return None
        given = next((key for key, value in self.indices.items() if same_values(index, value)), None)
        if name != "embedding" and given is None:
            return None
        with torch.no_grad():
            found: Tensor = func(*(bare(a) for a in args), **{key: bare(value) for key, value in kwargs.items()})
        leaf = found.detach().requires_grad_()
        path = self.path()
        self.leaves.append(Leaf(given or path, given is None, leaf))
        return leaf.clone()  # the model may write into it

    def _without_data(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on constants. Where positions count, tables of cosines and sines and what is made of them are remembered."""
        result = func(*args, **kwargs)
        if self.rules.positions and (
            name in ("cos", "sin", "polar")
            or (self.angles and any(self.angles.get(tensor) for tensor in tensors_in((*args, *kwargs.values()))))
        ):
            for tensor in tensors_in((result,)):
                self.angles.put(tensor, True)
        return result


def discrete(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Its result carries no gradient."""
    return func(*args, **kwargs)


NARROWING = frozenset({"float", "half", "bfloat16"})
OWN = (functions.__name__, "headscope.probe.interception.guard")  # where our own autograd functions stand
RULES: dict[str, Rule] = {
    **product_rules.RULES, **constant_rules.RULES, **nonlinear_rules.RULES, "discrete": discrete, "composite": nonlinear_rules.unruled,
}  # fmt: skip
KINDS = (
    ("pass", rules.PASS), ("discrete", rules.DISCRETE), ("linear", rules.LINEAR), ("mostly", rules.MOSTLY), ("add", rules.ADD),
    ("product", rules.PRODUCT), ("affine", rules.AFFINE), ("divide", rules.DIVIDE), ("constant", rules.CONSTANT),
    ("softmax", rules.SOFTMAX), ("norm", rules.NORM), ("join", rules.JOIN), ("clamp", rules.CLAMP), ("fill", rules.FILL),
    ("lookup", {"embedding", "index_select"}), ("power", {"pow", "__pow__", "pow_", "__ipow__"}),
    ("attention", {"scaled_dot_product_attention"}), ("factors", {"prod"}),
)  # fmt: skip
KINDS_BY_BASE = (
    ("identity", rules.IDENTITY), ("fused_product", rules.FUSED_PRODUCT), ("written", written.FUNCTIONS), ("gate", rules.GATE),
)  # fmt: skip


def classify(func: Any) -> tuple[str, str]:
    """What a torch function is to the rules, and the name that the books give it."""
    name = base_name(func)
    namespace = str(getattr(func, "_qualified_op_name", None) or getattr(getattr(func, "_schema", None), "name", "")).partition("::")[0]
    if namespace not in ("", "aten"):
        name = f"{namespace}::{name}"  # somebody's own operator: that it is called `mul` says nothing
    if name == "__getitem__":
        return "lookup", name
    for kind, names in KINDS:
        if name in names:
            return kind, name
    for kind, ruled in KINDS_BY_BASE:
        if name in ruled or base(name) in ruled:
            return kind, name
    return "composite" if isinstance(func, types.FunctionType) else "unruled", name


def same_values(index: Tensor, given: Tensor) -> bool:
    """Whether a lookup is by an input: its values, whatever its shape and the order of its axes."""
    if index is given:
        return True
    if index.numel() != given.numel() or index.is_floating_point():
        return False
    flat = index.reshape(-1)
    return any(bool((flat == order.reshape(-1)).all()) for order in ((given, given.mT) if given.dim() == 2 else (given,)))
