"""How a function mode writes down what the operations that it sees absorb.

The rules (`product_rules`, `constant_rules`, `nonlinear_rules`) are functions of a torch call that run it and book it here; the amounts are
known when the backward pass comes by (`ledger`).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headscope.kernels.errors import AttributionError
from headscope.probe.attribution import functions
from headscope.probe.attribution.calls import in_place
from headscope.probe.attribution.ledger import Books, inner, on_gradient
from headscope.probe.attribution.rules import RuleSet
from headscope.probe.interception.place import locate
from headscope.probe.interception.session import Session
from headscope.probe.interception.tracker import ByIdentity, never

UNTAPPED = frozenset({"copy_", "__setitem__", "detach", "to", "contiguous"})


@dataclass(eq=False)
class Held:
    """What a number was when it was booked; the model may write over it afterwards, and then it is a copy."""

    value: Tensor


class Booking(TorchFunctionMode):
    """What a rule works with: the rule set, the books, where in the model the call stands.

    Attributes:
        angles: tables of cosines and sines of positions, and what was made of them, where positions count.
        positions: [B, S], relevance of rotary positions, where the rules give them any.
    """

    def __init__(self, rules: RuleSet, books: Books | None, session: Session, audit: bool = False) -> None:
        super().__init__()
        self.rules, self.books, self.session, self.audit = rules, books, session, audit
        self.angles: ByIdentity[bool] = ByIdentity()
        self.positions: Tensor | None = None
        self._held: dict[int, list[Held]] = {}  # by the address of their memory
        self._inside: Any = None  # the composite that runs: it hands itself here again if its own check could not be switched off

    def linear(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its own gradient; an audit books it all the same, and must find nothing."""
        if not self.audit or in_place(name) or name in UNTAPPED:
            return func(*args, **kwargs)
        return self.tapped("linear", func, name, args, kwargs)

    def tapped(self, kind: str, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run with the function's own gradient, and book what it absorbs: ⟨out, g⟩ - Σ ⟨in, g⟩."""
        if self.books is None:
            return func(*args, **kwargs)
        ins: list[Tensor] = []

        def tap(value: Any) -> Any:
            if isinstance(value, Tensor) and value.requires_grad:
                ins.append(functions.Scaled.apply(value, 1.0))  # type: ignore[no-untyped-call]
                return ins[-1]
            return type(value)(tap(item) for item in value) if type(value) in (list, tuple) else value

        if in_place(name):
            # The input before and the output after are two tensors to the books: a copy is written into and copied back.
            target = args[0]
            result = func(tap(target).clone(), *(tap(a) for a in args[1:]), **kwargs)
            self.book(kind, name, ins, result, (1.0,) * len(ins))
            return target.copy_(result)
        result = func(*(tap(a) for a in args), **{key: tap(value) for key, value in kwargs.items()})
        outputs = [t for t in (result if isinstance(result, list | tuple) else (result,)) if isinstance(t, Tensor) and t.requires_grad]
        for place, output in enumerate(outputs):
            self.book(kind, name, ins if place == 0 else [], output, (1.0,) * len(ins))
        return result

    def book(self, kind: str, name: str, ins: Sequence[Tensor], result: Tensor, shares: Sequence[float]) -> None:
        """Have the backward pass write down ⟨out, g⟩ - Σ share · ⟨in, g⟩, where each `in` is the own alias of this call."""
        path = self.path()  # without books too: it refuses checkpoints
        if self.books is None or not result.requires_grad:
            return
        books, output = self.books, self.hold(result)

        def out(g: Tensor) -> None:
            books.add(kind, name, path, inner(output.value, g))
            if kind == "unruled":
                books.unruled[name, path] = books.unruled.get((name, path), 0) + 1

        on_gradient(result, out)
        for tensor, part in zip(ins, shares, strict=False):
            if tensor.requires_grad:
                held = self.hold(tensor)
                on_gradient(tensor, lambda g, held=held, part=part: books.add(kind, name, path, -part * inner(held.value, g)))  # type: ignore[misc]

    def book_constant(self, kind: str, name: str, result: Tensor, constant: Any, factor: Any) -> None:
        """A summand that no input reaches absorbs ⟨constant, g⟩; `factor` is its number or mask."""
        if self.books is None or not result.requires_grad or (isinstance(constant, int | float) and constant == 0):
            return
        books, path = self.books, self.path()
        if isinstance(constant, int | float) and not math.isfinite(constant):
            return
        held = self.hold(constant) if isinstance(constant, Tensor) else constant
        number = factor if isinstance(factor, int | float) else None

        def absorb(g: Tensor) -> None:
            part = g if number is not None else g * factor
            if isinstance(held, Held):
                value = held.value
                part = part.sum_to_size(value.shape) if value.dim() and value.shape != part.shape else part
                part = part.sum() if not value.dim() else part
                amount = inner(value.to(part.device), part)
            else:
                amount = held * part.sum(dtype=torch.float64)
            books.add(kind, name, path, amount if number is None else amount * number)

        on_gradient(result, absorb)

    def book_position(self, name: str, result: Tensor, table: Tensor, part: float) -> None:
        """The share of a rotary table in its product with data, by position where its axes tell."""
        if self.books is None:
            return
        books, path, held = self.books, self.path(), self.hold(result)
        wide = [i - table.dim() for i in range(table.dim() - 1) if table.shape[i] > 1]
        axis = wide[-1] + result.dim() if wide else None

        def absorb(g: Tensor) -> None:
            value = held.value
            amount = part * (value * g if not value.is_complex() else value.real * g.real + value.imag * g.imag)
            books.add("position", name, path, amount.sum(dtype=torch.float64))
            if axis:
                kept = amount.sum(dim=[i for i in range(1, amount.dim()) if i != axis])  # [B, S]
                before = self.positions
                self.positions = kept if before is None or before.shape != kept.shape else before + kept

        on_gradient(result, absorb)

    def hold(self, tensor: Tensor) -> Held:
        held = Held(tensor.detach())
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # under vmap there is no memory to speak of
            self._held.setdefault(tensor.untyped_storage().data_ptr(), []).append(held)
        return held

    def before_writing(self, target: Any) -> None:
        """The model is about to write into a tensor: what the books hold of its memory is copied first."""
        if isinstance(target, Tensor) and self._held and not torch._C._functorch.is_functorch_wrapped_tensor(target):
            for held in self._held.pop(target.untyped_storage().data_ptr(), ()):
                held.value = held.value.clone()

    def path(self) -> str:
        """The module whose code made this call.

        Raises:
            AttributionError: it runs inside a gradient checkpoint.
        """
        place = locate([self.session])
        if place is not None and (place.checkpointed or place.reentrant):
            raise checkpointed(place.path)
        return "" if place is None else place.path

    def reenter(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a composite written in Python so that its inner calls are seen."""
        hidden = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        again = types.FunctionType(
            func.__code__, {**func.__globals__, **dict.fromkeys(hidden, never)}, func.__name__, func.__defaults__, func.__closure__
        )
        again.__kwdefaults__ = func.__kwdefaults__
        before, self._inside = self._inside, func
        try:
            with self:
                return again(*args, **kwargs)
        finally:
            self._inside = before


Rule = Callable[[Booking, Any, str, tuple[Any, ...], dict[str, Any]], Any]  # mode, torch function, its name, arguments


def checkpointed(path: str) -> AttributionError:
    """Rules do not survive a second forward."""
    return AttributionError(
        f"{path or 'the model'} runs under gradient checkpointing, whose second forward would not follow the rules: switch it off for the "
        "attribution (for transformers: model.gradient_checkpointing_disable())"
    )
