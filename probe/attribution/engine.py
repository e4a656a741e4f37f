"""The function mode under which a model's forward pass records the relevance rules, whatever code makes the calls.

It changes no number of the forward pass, no class and no weight: weights enter as constants, so that a tensor belongs to the autograd
graph exactly if it depends on the input; embedding lookups become the leaves; functions that are not linear in their data get the
backward pass of their rule. The model's own attention kernels stay in use. What no mode can see, autograd functions of somebody's own and
scripted modules, is recognised by what it leaves behind, and reported as unruled.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from headscope.kernels.errors import AttributionError
from headscope.probe.attribution import functions, rules, written
from headscope.probe.attribution.ledger import Books, inner, on_gradient
from headscope.probe.attribution.rules import RuleSet
from headscope.probe.interception.place import locate
from headscope.probe.interception.session import Session
from headscope.probe.interception.tape import base_name
from headscope.probe.interception.tracker import ByIdentity, never

WIDE = (torch.float64, torch.complex128)


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


@dataclass(eq=False)
class Held:
    """What a number was when it was booked; the model may write over it afterwards, and then it is a copy."""

    value: Tensor


class RuleMode(TorchFunctionMode):
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
        super().__init__()
        self.rules, self.books, self.session, self.indices, self.exact, self.audit = rules, books, session, indices, exact, audit
        self.leaves: list[Leaf] = []
        self.angles: ByIdentity[bool] = ByIdentity()
        self.positions: Tensor | None = None  # [B, S], relevance of rotary positions, where the rules give them any
        self._kinds: dict[Any, tuple[str, str, bool]] = {}
        self._held: dict[int, list[Held]] = {}  # by the address of their memory
        self._foreign: set[Any] = set()
        self._steps: set[type] = set()  # kinds of steps of the graph that torch made
        self._inside: Any = None  # the composite that runs: it hands itself here again if its own check could not be switched off
        if books is not None:
            for path, module in session.modules.items():
                if isinstance(module, torch.jit.ScriptModule):
                    books.unruled["torch.jit.script", path] = 1

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        known = self._kinds.get(func)
        if known is None:
            known = self._kinds[func] = (*classify(func), in_place(base_name(func)))
        kind, name, writes = known
        if kind == "pass":
            return func(*args, **kwargs)
        if args and (writes or "inplace" in kwargs or (kind == "identity" or kind == "linear") and args[-1] is True):
            self._before_writing(args[0])
        if not torch.is_grad_enabled():
            return self._without_data(func, name, args, kwargs)
        if kind == "lookup":
            found = self._lookup(func, name, args, kwargs)
            if found is not None:
                return found
        args = tuple([bare(a) for a in args])
        if kwargs:
            kwargs = {key: bare(value) for key, value in kwargs.items()}
        if kind == "composite" and func is not self._inside:
            return self._reenter(func, args, kwargs)
        if not self._depends(args, kwargs):
            return self._without_data(func, name, args, kwargs)
        if self.exact and any(isinstance(a, Tensor) and a.dtype in WIDE and a.requires_grad for a in (*args, *kwargs.values())):
            if name in NARROWING:
                return args[0]
            args, kwargs = widened(name, kind, args, kwargs)
        if kind == "linear" or kind == "lookup":
            return self._linear(func, name, args, kwargs)
        rule: Callable[..., Any] = getattr(self, f"_{kind}" if kind != "composite" else "_unruled")
        return rule(func, name, args, kwargs)

    def _depends(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether any tensor among the arguments depends on the input; one that a foreign function made is reported."""
        found = False
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                if value.requires_grad:
                    found = True
                    made = value.grad_fn
                    if made is not None and type(made) not in self._steps:
                        self._meet(made)
            elif isinstance(value, list | tuple) and self._depends(tuple(value), {}):
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
            raise checkpointed(self._path())
        if getattr(own, "__module__", "") in OWN:
            self._steps.add(type(made))
            return
        if self.books is None or made in self._foreign:
            return
        self._foreign.add(made)
        key = (made.name().removesuffix("Backward"), self._path())
        self.books.unruled[key] = self.books.unruled.get(key, 0) + 1
        for before, _ in made.next_functions:
            if isinstance(before, BackwardCFunction):
                self._note_foreign(before)

    # -- leaves ----------------------------------------------------------------------------------------------------

    def _lookup(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Rows of a weight picked by integers: a leaf of the graph. None where this is something else."""
        if name == "embedding":
            index, weight = (*args, *(kwargs[key] for key in ("input", "weight") if key in kwargs))[:2]
        elif len(args) > 1 and isinstance(args[0], nn.Parameter):
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
        path = self._path()
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

    def _book_position(self, name: str, result: Tensor, table: Tensor, part: float) -> None:
        """The share of a rotary table in its product with data, by position where its axes tell."""
        if self.books is None:
            return
        books, path, held = self.books, self._path(), self._hold(result)
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

    # -- rules -----------------------------------------------------------------------------------------------------

    def _linear(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its own gradient; an audit books it all the same, and must find nothing."""
        if not self.audit or in_place(name) or name in UNTAPPED:
            return func(*args, **kwargs)
        return self._tapped("linear", func, name, args, kwargs)

    def _discrete(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its result carries no gradient."""
        return func(*args, **kwargs)

    def _attention(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """softmax(q kᵀ) v in the model's own kernel: its gradient, times the shares of q, k and v in the two products."""
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        q, k, v = given["query"], given["key"], given["value"]
        mask = given.get("attn_mask")
        scored = q.requires_grad or k.requires_grad or (isinstance(mask, Tensor) and mask.requires_grad)
        if self.rules.softmax == "tempered":
            followed = self._reenter(written.attention, (), given)
            with torch.no_grad():
                shown = func(**given)
            return functions.Replaced.apply(followed, shown)  # type: ignore[no-untyped-call]
        if self.rules.softmax == "stop":
            q, k, scored = q.detach(), k.detach(), False
        weight = 0.5 if self.rules.split and scored and v.requires_grad else 1.0
        both = 0.5 if self.rules.split and q.requires_grad and k.requires_grad else 1.0
        operands = [("query", q, weight * both), ("key", k, weight * both), ("value", v, weight)]
        if isinstance(mask, Tensor) and mask.requires_grad:  # a bias that was looked up: a summand, with what reaches the scores
            operands.append(("attn_mask", mask.detach() if self.rules.softmax == "stop" else mask, weight))
        ins = [share(tensor, part) for _, tensor, part in operands]
        given |= {name: tensor for (name, _, _), tensor in zip(operands, ins, strict=True)}
        shares = [part for _, _, part in operands]
        result: Tensor = func(**given)
        self._book("softmax", name, ins, result, shares)
        return result

    def _softmax(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.rules.softmax == "stop":
            with torch.no_grad():
                return func(*args, **kwargs)
        if self.rules.softmax == "tempered":
            (x, *rest), kwargs = leading(args, kwargs, "input")
            dim = kwargs.get("dim", rest[0] if rest else -1)
            source = share(x, 1.0)
            result = functions.Tempered.apply(source, lambda t: func(t, *rest, **kwargs), dim, self.rules.temperature)  # type: ignore[no-untyped-call]
            self._book("softmax", name, [source], result, (1.0,))
            return result
        return self._tapped("softmax", func, name, args, kwargs)

    def _identity(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An element-wise function through the origin."""
        if not self.rules.identity:
            return self._tapped("gate", func, name, args, kwargs)
        plain = base(name)
        (x, *rest), kwargs = leading(args, kwargs, "input")
        options = {key: value for key, value in kwargs.items() if key != "inplace"}
        if plain in ("elu", "selu", "celu", "silu", "mish", "hardswish") and rest and rest[-1] is True:
            rest = rest[:-1]  # the flag `inplace`
            options["inplace"] = kwargs["inplace"] = True
        inplace = in_place(name) or bool(kwargs.get("inplace"))
        options.pop("inplace", None)
        run = (getattr(torch, plain, None) or getattr(nn.functional, plain)) if inplace else func
        result: Tensor = functions.Identity.apply(  # type: ignore[no-untyped-call]
            x.clone() if inplace else x, lambda t: run(t, *rest, **options), rules.IDENTITY[plain]
        )
        return x.copy_(result) if inplace else result

    def _power(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """xⁿ: the identity rule for n > 0; a negative power is a normaliser's and a constant, a power of two data a gate."""
        x = args[0] if args else kwargs.get("input")
        exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
        if isinstance(exponent, Tensor) and exponent.numel() == 1 and not exponent.requires_grad:
            exponent = float(exponent)
        if not isinstance(exponent, int | float) or not isinstance(x, Tensor) or not x.requires_grad or in_place(name):
            return self._tapped("gate", func, name, args, kwargs)
        if exponent < 0:
            return self._constant(func, name, args, kwargs)
        if exponent == 0 or not self.rules.identity:
            return self._tapped("gate", func, name, args, kwargs)
        return functions.Identity.apply(x, lambda t: func(t, exponent), 1.0 if exponent == 1 else 0.0)  # type: ignore[no-untyped-call]

    def _constant(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of a normaliser: no relevance passes."""
        if not self.rules.frozen:
            return func(*args, **kwargs)
        with torch.no_grad():
            result = func(*args, **kwargs)
        return result.detach()

    def _divide(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The denominator is a constant: it normalises."""
        if kwargs.get("rounding_mode") is not None:
            return self._tapped("gate", func, name, args, kwargs)
        if self.rules.frozen:
            args = (args[0], *(a.detach() if isinstance(a, Tensor) else a for a in args[1:]))
            kwargs = {key: value.detach() if key == "other" and isinstance(value, Tensor) else value for key, value in kwargs.items()}
        return self._linear(func, name, args, kwargs)

    def _product(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product of n data-dependent factors gives each 1/n of its relevance."""
        tensors = list(tensors_in((*args, *kwargs.values())))
        count = sum(tensor.requires_grad for tensor in tensors)
        table = next((t for t in tensors if self.angles.get(t)), None) if count == 1 and self.angles else None
        if table is not None and not in_place(name):
            result = func(*(share(a, 0.5) for a in args), **{key: share(value, 0.5) for key, value in kwargs.items()})
            self._book_position(name, result, table, 0.5)
            return result
        if count < 2 or not self.rules.split:
            return self._linear(func, name, args, kwargs)
        if in_place(name):
            result = func(*args, **kwargs)
            on_gradient(result, lambda g: g / count)
            return result
        shared = tuple(share(a, 1 / count) for a in args)
        return func(*shared, **{key: share(value, 1 / count) for key, value in kwargs.items()})

    def _factors(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`prod`: each of the n numbers that are multiplied is a factor."""
        (x, *rest), kwargs = leading(args, kwargs, "input")
        dim = kwargs.get("dim", rest[0] if rest and isinstance(rest[0], int) else None)
        count = x.numel() if dim is None else x.shape[dim]
        return func(share(x, 1 / count) if self.rules.split and count else x, *rest, **kwargs)

    def _fused_product(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """summand + factor · factor in one call."""
        order = rules.FUSED_PRODUCT[base(name)]
        args, kwargs = (*args, *(kwargs[key] for key in order[len(args) :])), {key: v for key, v in kwargs.items() if key not in order}
        summand, factors = args[0], args[1:3]
        count = sum(isinstance(f, Tensor) and f.requires_grad for f in factors)
        beta = kwargs.get("beta", 1)
        fixed = not summand.requires_grad and beta != 0
        value = summand.clone() if fixed and in_place(name) else summand
        if count > 1 and self.rules.split:
            args = (summand, *(share(f, 1 / count) for f in factors), *args[3:])
        result: Tensor = func(*args, **kwargs)
        if fixed:
            self._book_constant("bias", name, result, value, beta)
        return result

    def _affine(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """x W + b: linear in x, b absorbs ⟨b, g⟩; a weight that depends on the data is a factor."""
        names = ("input1", "input2", "weight") if name == "bilinear" else ("input", "weight")
        args, kwargs = leading(args, kwargs, *names)
        rest = args[len(names) :]
        bias = rest[0] if rest else kwargs.get("bias")
        count = sum(factor.requires_grad for factor in args[: len(names)])
        if count > 1 and self.rules.split:
            args = (*(share(factor, 1 / count) for factor in args[: len(names)]), *rest)
        result: Tensor = func(*args, **kwargs)
        x, weight = args[:2]
        if self.rules.gamma and x.requires_grad and count == 1 and name != "bilinear":
            return self._gamma(func, x, weight, bias, rest[1:], kwargs, result)
        if isinstance(bias, Tensor) and not bias.requires_grad:
            shape = (-1, *([1] * (weight.dim() - 2))) if name.startswith("conv") else (-1,)
            self._book_constant("bias", name, result, bias.reshape(shape), 1)
        return result

    def _gamma(
        self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        """The γ rule: positive contributions to a positive output weigh 1 + γ, and so do negative ones to a negative output.

        Forward is y to the bit; backward is that of y_γ · (y / y_γ) with the quotient held fixed.
        """
        gamma = self.rules.gamma
        options = {key: value for key, value in kwargs.items() if key != "bias"}
        source = share(x, 1.0)
        positive, negative = source.clamp(min=0), source.clamp(max=0)
        up, down = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
        raised, lowered = (None, None) if bias is None else (bias + gamma * bias.clamp(min=0), bias + gamma * bias.clamp(max=0))
        above = func(positive, up, raised, *rest, **options) + func(negative, down, None, *rest, **options)
        below = func(positive, down, lowered, *rest, **options) + func(negative, up, None, *rest, **options)
        changed = torch.where(y > 0, above, below)
        floor = torch.finfo(y.dtype).eps
        safe = torch.where(changed.abs() < floor, torch.where(changed < 0, -floor, floor), changed).detach()
        result: Tensor = functions.Replaced.apply(changed * (y.detach() / safe), y)  # type: ignore[no-untyped-call]
        self._book("bias", base_name(func), [source], result, (1.0,))
        return result

    def _add(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Summands pass relevance on as they contribute; a constant one absorbs its part."""
        first = args[0] if args else kwargs.get("input")
        second = args[1] if len(args) > 1 else kwargs.get("other")
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        fixed = not (isinstance(first, Tensor) and first.requires_grad)
        value = first.clone() if fixed and isinstance(first, Tensor) and in_place(name) else first  # afterwards it is the sum
        result: Tensor = func(*args, **kwargs)
        minus = -1 if "sub" in name else 1
        own, other = (1, minus * alpha) if name not in ("rsub", "__rsub__") else (-alpha, 1)
        if fixed:
            self._book_constant("constant", name, result, value, own)
        elif not (isinstance(second, Tensor) and second.requires_grad):
            self._book_constant("constant", name, result, second, other)
        return result

    def _fill(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where a mask puts a number, that number's part is absorbed; -inf has none."""
        names = ("condition", "input", "other") if name == "where" else ("input", "mask", "value")
        (one, two, three), kwargs = leading(args, kwargs, *names)
        if name == "where" and isinstance(two, Tensor) and not isinstance(one, Tensor | bool):
            one, two = two, one
        parts = ((one, two), (~one, three)) if name == "where" else ((~two, one), (two, three))
        if name == "where" and not (isinstance(one, Tensor) and one.dtype == torch.bool):
            return self._tapped("constant", func, name, args, kwargs)
        fixed = [(mask, v.clone() if in_place(name) and v is one else v) for mask, v in parts if not depends((v,), {})]
        result: Tensor = func(one, two, three, **kwargs)
        for mask, value in fixed:
            self._book_constant("constant", name, result, value, mask)
        return result

    def _join(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Constants that are laid beside data, or written into it, absorb what reaches them."""
        books = self.books
        if books is None:
            return func(*args, **kwargs)
        if "prod" in (*args, kwargs.get("reduce")):
            return self._tapped("unruled", func, name, args, kwargs)
        path = self._path()
        anchor = next(tensor for tensor in tensors_in((*args, *kwargs.values())) if tensor.requires_grad)

        def tap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return type(value)(tap(item) for item in value) if type(value) in (list, tuple) else value
            if value.requires_grad or not (value.is_floating_point() or value.is_complex()):
                return value
            held = self._hold(value)
            return functions.Noted.apply(value, anchor, lambda g: books.add("constant", name, path, inner(held.value, g)))  # type: ignore[no-untyped-call]

        first, rest = args[:1], args[1:]
        if not in_place(name):
            first = tuple(tap(a) for a in first)
        elif name != "copy_" and not first[0].requires_grad and bool((first[0] != 0).any()):
            kept = first[0].clone()
            noted = functions.Noted.apply(kept, anchor, lambda g: books.add("constant", name, path, inner(kept, g)))  # type: ignore[no-untyped-call]
            first[0].copy_(noted)  # what was there before is a constant, and stays one where nothing is written
        return func(*first, *(tap(a) for a in rest), **{key: tap(value) for key, value in kwargs.items()})

    def _mostly(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Functions that are linear, unless an argument makes them something else."""
        second = args[1] if len(args) > 1 else kwargs.get("other")
        if name in ("max", "min") and isinstance(second, Tensor):
            return self._tapped("clamp", func, name, args, kwargs)
        if name.startswith("grid_sampler") and isinstance(second, Tensor) and second.requires_grad:
            return self._tapped("gate", func, name, args, kwargs)
        if name in ("max", "min") or name.startswith("grid_sampler") or not any(args[1:]) and not kwargs:
            return self._linear(func, name, args, kwargs)
        value = kwargs.get("value", args[-1] if len(args) > 2 else None)
        if "pad" in name and not (isinstance(value, int | float) and value):
            return self._linear(func, name, args, kwargs)
        return self._tapped("constant", func, name, args, kwargs)

    def _norm(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A normalisation: its mean is subtracted, its scale held fixed, its shift absorbs."""
        if not self.rules.frozen:
            return func(*args, **kwargs)
        names = {
            "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
            "rms_norm": ("input", "normalized_shape", "weight", "eps"),
            "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
            "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        }  # fmt: skip
        given = dict(zip(names.get(name, ()), args, strict=False)) | kwargs
        if name not in names or (name == "instance_norm" and not given.get("use_input_stats", True)):
            return self._tapped("norm shift" if name in ("batch_norm", "instance_norm") else "unruled", func, name, args, kwargs)
        x, weight, bias = given["input"], given.get("weight"), given.get("bias")
        if depends((weight, bias), {}):
            return self._tapped("unruled", func, name, args, kwargs)
        if name == "rms_norm":
            dims, eps = tuple(range(-len(given["normalized_shape"]), 0)), given.get("eps")
            eps = torch.finfo(x.dtype).eps if eps is None else eps
            options = {key: value for key, value in given.items() if key != "input"}
            return functions.RootMeanSquare.apply(x, lambda t: func(t, **options), dims, weight, eps)  # type: ignore[no-untyped-call]
        eps = given.get("eps", 1e-5)
        if name == "layer_norm":
            result = functions.LayerNorm.apply(x, tuple(given["normalized_shape"]), weight, bias, eps)  # type: ignore[no-untyped-call]
        else:
            options = {key: value for key, value in given.items() if key != "input"}
            groups = given.get("num_groups", x.shape[1])
            result = functions.GroupNorm.apply(x, lambda t: func(t, **options), groups, weight, eps)  # type: ignore[no-untyped-call]
            bias = None if bias is None else bias.reshape(-1, *([1] * (x.dim() - 2)))
        if bias is not None:
            self._book_constant("norm shift", name, result, bias, 1)
        return result

    def _written(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A fused function run as the plain operations that it stands for."""
        followed = self._reenter(written.FUNCTIONS[base(name)], args, kwargs)
        with torch.no_grad():
            shown = func(args[0].clone(), *args[1:], **kwargs) if in_place(name) else func(*args, **kwargs)
        result = functions.Replaced.apply(followed, shown)  # type: ignore[no-untyped-call]
        return args[0].copy_(result) if in_place(name) else result

    def _clamp(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._tapped("clamp", func, name, args, kwargs)

    def _gate(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._tapped("gate", func, name, args, kwargs)

    def _unruled(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._tapped("unruled", func, name, args, kwargs)

    # -- books -----------------------------------------------------------------------------------------------------

    def _tapped(self, kind: str, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
            self._book(kind, name, ins, result, (1.0,) * len(ins))
            return target.copy_(result)
        result = func(*(tap(a) for a in args), **{key: tap(value) for key, value in kwargs.items()})
        outputs = [t for t in (result if isinstance(result, list | tuple) else (result,)) if isinstance(t, Tensor) and t.requires_grad]
        for place, output in enumerate(outputs):
            self._book(kind, name, ins if place == 0 else [], output, (1.0,) * len(ins))
        return result

    def _book(self, kind: str, name: str, ins: Sequence[Tensor], result: Tensor, shares: Sequence[float]) -> None:
        """Have the backward pass write down ⟨out, g⟩ - Σ share · ⟨in, g⟩, where each `in` is the own alias of this call."""
        path = self._path()
        if self.books is None or not result.requires_grad:
            return
        books, output = self.books, self._hold(result)

        def out(g: Tensor) -> None:
            books.add(kind, name, path, inner(output.value, g))
            if kind == "unruled":
                books.unruled[name, path] = books.unruled.get((name, path), 0) + 1

        on_gradient(result, out)
        for tensor, part in zip(ins, shares, strict=False):
            if tensor.requires_grad:
                held = self._hold(tensor)
                on_gradient(tensor, lambda g, held=held, part=part: books.add(kind, name, path, -part * inner(held.value, g)))  # type: ignore[misc]

    def _book_constant(self, kind: str, name: str, result: Tensor, constant: Any, factor: Any) -> None:
        """A summand that no input reaches absorbs ⟨constant, g⟩; `factor` is its number or mask."""
        if self.books is None or not result.requires_grad or (isinstance(constant, int | float) and constant == 0):
            return
        books, path = self.books, self._path()
        if isinstance(constant, int | float) and not math.isfinite(constant):
            return
        held = self._hold(constant) if isinstance(constant, Tensor) else constant

        def absorb(g: Tensor) -> None:
            part = g * factor
            if isinstance(held, Held):
                value = held.value
                part = part.sum_to_size(value.shape) if value.dim() and value.shape != part.shape else part
                part = part.sum() if not value.dim() else part
                books.add(kind, name, path, inner(value.to(part.device), part))
            else:
                books.add(kind, name, path, held * part.sum(dtype=torch.float64))

        on_gradient(result, absorb)

    def _hold(self, tensor: Tensor) -> Held:
        held = Held(tensor.detach())
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # under vmap there is no memory to speak of
            self._held.setdefault(tensor.untyped_storage().data_ptr(), []).append(held)
        return held

    def _before_writing(self, target: Any) -> None:
        """The model is about to write into a tensor: what the books hold of its memory is copied first."""
        if isinstance(target, Tensor) and self._held and not torch._C._functorch.is_functorch_wrapped_tensor(target):
            for held in self._held.pop(target.untyped_storage().data_ptr(), ()):
                held.value = held.value.clone()

    def _path(self) -> str:
        """The module whose code made this call.

        Raises:
            AttributionError: it runs inside a gradient checkpoint.
        """
        place = locate([self.session])
        if place is not None and (place.checkpointed or place.reentrant):
            raise checkpointed(place.path)
        return "" if place is None else place.path

    # -- the rest --------------------------------------------------------------------------------------------------

    def _reenter(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


NARROWING = frozenset({"float", "half", "bfloat16"})
UNTAPPED = frozenset({"copy_", "__setitem__", "detach", "to", "contiguous"})
OWN = (functions.__name__, "headscope.probe.interception.guard")  # where our own autograd functions stand
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


def checkpointed(path: str) -> AttributionError:
    """Rules do not survive a second forward."""
    return AttributionError(
        f"{path or 'the model'} runs under gradient checkpointing, whose second forward would not follow the rules: switch it off for the "
        "attribution (for transformers: model.gradient_checkpointing_disable())"
    )


def base(name: str) -> str:
    """`add` for `add_`."""
    return name if name.endswith("__") else name.removesuffix("_")


def bare(value: Any) -> Any:
    """A weight as a constant; everything else as it is."""
    kind = type(value)
    if kind is Tensor or kind is int or kind is float:
        return value
    if isinstance(value, nn.Parameter):
        return value.detach()
    if kind in (list, tuple) and any(isinstance(item, nn.Parameter) for item in value):
        return kind(bare(item) for item in value)
    return value


def leading(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with its first arguments, of these names, by position."""
    if len(args) >= len(names):
        return args, kwargs
    missing = names[len(args) :]
    return (*args, *(kwargs[key] for key in missing)), {key: value for key, value in kwargs.items() if key not in missing}


def widened(name: str, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with every narrower dtype widened: a float64 model that rounds on its way could not close its books to 1e-10."""
    args = tuple(torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a for a in args)
    kwargs = {key: torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v for key, v in kwargs.items()}
    if name in ("to", "type_as") and len(args) > 1 and isinstance(args[1], Tensor) and args[1].is_floating_point():
        args = (args[0], torch.empty(0, dtype=torch.float64, device=args[1].device), *args[2:])
    elif kind in ("affine", "norm", "product", "fused_product", "join", "attention") and not in_place(name):
        args = tuple(wide(a) for a in args)
        kwargs = {key: wide(value) for key, value in kwargs.items()}
    return args, kwargs


def wide(value: Any) -> Any:
    """A tensor, or each in a list, in float64 where it is real and narrower."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(wide(item) for item in value) if type(value) in (list, tuple) else value


def share(value: Any, part: float) -> Any:
    """A factor whose gradient is multiplied by its part."""
    if isinstance(value, Tensor) and value.requires_grad:
        return functions.Scaled.apply(value, part)  # type: ignore[no-untyped-call]
    return type(value)(share(item, part) for item in value) if type(value) in (list, tuple) else value


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some arguments and in the lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def depends(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether any tensor among the arguments depends on the input."""
    return any(tensor.requires_grad for tensor in tensors_in((*args, *kwargs.values())))


def in_place(name: str) -> bool:
    """`add_`, `__iadd__`, `__setitem__`; not `__add__`."""
    if not name.endswith("__"):
        return name.endswith("_")
    return name == "__setitem__" or (name.startswith("__i") and name not in ("__init__", "__index__", "__int__", "__invert__"))


def same_values(index: Tensor, given: Tensor) -> bool:
    """Whether a lookup is by an input: its values, whatever its shape and the order of its axes."""
    if index is given:
        return True
    if index.numel() != given.numel() or index.is_floating_point():
        return False
    flat = index.reshape(-1)
    return any(bool((flat == order.reshape(-1)).all()) for order in ((given, given.mT) if given.dim() == 2 else (given,)))
