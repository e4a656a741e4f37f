"""What an edit does to the entries it concerns. Each operation gives the new value for all entries; the edit takes the selected ones.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width.

Masked scores stay masked: an entry that is -inf (or the dtype's most negative number, which many models add instead) keeps its
value under every operation but patch, freeze and call, so scaling scores by 0 gives uniform attention over the visible keys,
never sight of the future.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headscope.interventions.region import SCORE_STAGES
from headscope.interventions.source import Source, StoredRun, read_source, same_tensor
from headscope.kernels.errors import EditError, NonFiniteError, ShapeError
from headscope.probe.call import STAGES, AttentionCall

ALL_STAGES = frozenset(STAGES) - {"pos", "kv"}  # those two take ops of their own
LINEAR_STAGES = ALL_STAGES - set(SCORE_STAGES)  # the stages whose last axis is a feature, not a key


@dataclass(frozen=True, eq=False)
class Op(ABC):
    """One operation with its numbers. Two are equal if they are of one kind and their numbers and tensors are."""

    name: ClassVar[str]  # in recipes
    stages: ClassVar[frozenset[str]] = ALL_STAGES
    overwrites: ClassVar[bool] = False  # what was there before is lost, so that two of them on one entry contradict each other
    keeps_masked: ClassVar[bool] = True
    per_head: ClassVar[bool] = False  # it is given the selected heads alone, and its tensors count them

    @property
    def identity(self) -> bool:
        """Whether it certainly changes nothing."""
        return False

    @abstractmethod
    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        """The new value of every entry; broadcasts to the shape of `value`, at `bias` to [B, H, Q, K]."""

    def gated(self, value: Tensor, gate: float | Tensor, call: AttentionCall, stage: str) -> Tensor:
        """The new value where the edit is made in part: value + gate · (edited - value), the gate a number or [B, N, rows, 1]."""
        new = self.apply(value, call, stage)
        if isinstance(gate, float) and gate == 1.0:
            return new
        kept = new == value  # where both are -inf the difference is NaN
        if isinstance(gate, Tensor):
            kept = kept | (gate == 0)
        return torch.where(kept, value, value + gate * (new - value)).to(value.dtype)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return all(
            same_tensor(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b for a, b in pairs
        )

    def __hash__(self) -> int:
        return hash((self.name, *(value for field in fields(self) if isinstance(value := getattr(self, field.name), (float, str)))))

    def __str__(self) -> str:
        inside = (getattr(self, field.name) for field in fields(self))
        return f"{self.name}({', '.join(_spoken(value) for value in inside)})"


@dataclass(frozen=True, eq=False)
class Scale(Op):
    """value · factor; a factor of 0 assigns zero, for 0 · NaN would be NaN."""

    factor: float
    name: ClassVar[str] = "scale"

    @property
    def identity(self) -> bool:
        return self.factor == 1.0

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        return torch.zeros_like(value) if self.factor == 0.0 else value * self.factor

    def gated(self, value: Tensor, gate: float | Tensor, call: AttentionCall, stage: str) -> Tensor:
        """1 + gate · (factor - 1), so that a gated scale is a scale to the bit."""
        if isinstance(gate, float):
            return Scale(1.0 + gate * (self.factor - 1.0)).apply(value, call, stage)
        return super().gated(value, gate, call, stage)


@dataclass(frozen=True, eq=False)
class Add(Op):
    """value + amount."""

    amount: float | Tensor
    name: ClassVar[str] = "add"

    @property
    def identity(self) -> bool:
        return isinstance(self.amount, float) and self.amount == 0.0

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        return value + _fitted(self.amount, value, call, stage, self)


@dataclass(frozen=True, eq=False)
class Assign(Op):
    """A constant, a tensor, or the head's mean over the batch and positions of this call."""

    value: float | Tensor | Literal["mean"]
    name: ClassVar[str] = "set"
    overwrites: ClassVar[bool] = True

    @property
    def zero(self) -> bool:
        """Whether it sets zero."""
        return isinstance(self.value, float) and self.value == 0.0

    @property
    def mean(self) -> bool:
        """Whether it sets the mean."""
        return isinstance(self.value, str)

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        if isinstance(self.value, str):
            return value.mean((0, 2), keepdim=True).expand_as(value)  # [1, N, 1, D]
        if isinstance(self.value, float):
            return torch.full_like(value, self.value)
        return _fitted_tensor(self.value, value, call, stage, self)


@dataclass(frozen=True, eq=False)
class Bias(Op):
    """scores + amount: the odds of each selected key are multiplied by exp(amount)."""

    amount: float | Tensor
    name: ClassVar[str] = "bias"
    stages: ClassVar[frozenset[str]] = frozenset({"bias", "scores"})

    @property
    def identity(self) -> bool:
        return isinstance(self.amount, float) and self.amount == 0.0

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        return value + _fitted(self.amount, value, call, stage, self)


@dataclass(frozen=True, eq=False)
class Mask(Op):
    """Scores of -inf: the key is not seen; a query with no key left gives zero."""

    name: ClassVar[str] = "mask"
    stages: ClassVar[frozenset[str]] = frozenset({"bias", "scores"})
    overwrites: ClassVar[bool] = True

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        return torch.full_like(value, -math.inf)


@dataclass(frozen=True, eq=False)
class Patch(Op):
    """What another run had at the same stage, site and step."""

    source: Source
    name: ClassVar[str] = "patch"
    overwrites: ClassVar[bool] = True
    keeps_masked: ClassVar[bool] = False

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        other = read_source(self.source, stage, call.site.name, call.step)
        expected = _whole(value, call, stage)
        if other.shape != expected:
            raise ShapeError(
                f"{self.name} at {stage} of {call.site.name}, step {call.step}: the other run has {list(other.shape)}, "
                f"this call {list(expected)}; both runs need the same batch and lengths"
            )
        return other.to(value)


@dataclass(frozen=True, eq=False)
class Freeze(Patch):
    """A patch of who looks where (the pattern, or scores, or q and k), while v flows: does an effect act through QK or OV?"""

    name: ClassVar[str] = "freeze"
    stages: ClassVar[frozenset[str]] = frozenset({"q", "k", "scores", "pattern"})


@dataclass(frozen=True, eq=False)
class Renorm(Op):
    """Pattern rows divided by their sum; a row of zeros stays so."""

    name: ClassVar[str] = "renorm"
    stages: ClassVar[frozenset[str]] = frozenset({"pattern"})

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        total = value.sum(-1, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32))  # [B, H, Q, 1]
        return (value / total.masked_fill(total == 0, 1)).to(value.dtype)


@dataclass(frozen=True, eq=False)
class Call(Op):
    """Anything: function(value, call) -> tensor of the same shape and dtype."""

    function: Callable[[Tensor, AttentionCall], Tensor]
    name: ClassVar[str] = "call"
    keeps_masked: ClassVar[bool] = False

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        result = self.function(value, call)
        if not isinstance(result, Tensor):
            raise EditError(
                f"{self} at {stage} of {call.site.name} returned {type(result).__name__}: return a tensor like the value it is given"
            )
        fits = result.shape == value.shape or (stage == "bias" and _broadcasts(result, value, call, stage))
        if not fits or result.dtype != value.dtype or result.device != value.device:
            raise ShapeError(
                f"{self} at {stage} of {call.site.name} returned {list(result.shape)} {result.dtype} on {result.device}, "
                f"it was given {list(value.shape)} {value.dtype} on {value.device}: return the same shape, dtype and device"
            )
        return result


def scale(factor: float) -> Scale:
    """Multiply by a factor; 0 assigns zero, 1 changes nothing to the bit. At q or k before the scores: a temperature."""
    return Scale(_number("scale", "factor", factor))


def add(amount: float | Tensor) -> Add:
    """Add a number, or a tensor that broadcasts to the stage, such as a steering vector [D] at z."""
    return Add(_number_or_tensor("add", amount))


def assign(value: float | Tensor | Literal["zero", "mean"]) -> Assign:
    """Set to "zero", a number, a tensor, or "mean": the head's mean over the batch and positions of the call (not at scores or pattern).

    In a cached decode step a call holds one position, so its mean is over the batch alone.
    """
    if isinstance(value, str):
        if value not in ("zero", "mean"):
            raise EditError(f'assign({value!r}): the words are "zero" and "mean"; else give a number or a tensor')
        return Assign(0.0 if value == "zero" else "mean")
    return Assign(_number_or_tensor("assign", value))


def bias(amount: float | Tensor) -> Bias:
    """Add to scores: keeps the model's own fused attention. Equal to multiplying the pattern by exp(amount) and renormalising."""
    return Bias(_number_or_tensor("bias", amount))


def mask() -> Mask:
    """Hide keys from queries: scores of -inf. Keeps the model's own fused attention."""
    return Mask()


def patch(source: Source) -> Patch:
    """Take the value from another run: a `Capture` that kept this stage, read at the same site and step, or a tensor."""
    return Patch(_source("patch", source))


def freeze(source: Source) -> Freeze:
    """Hold the pattern (or scores, q, k) at that of an earlier run, a `Capture` or a tensor, while v flows."""
    return Freeze(_source("freeze", source))


def renorm() -> Renorm:
    """Make the selected pattern rows sum to 1 again, after other edits. Where a model has sinks this takes their share too."""
    return Renorm()


def call(function: Callable[[Tensor, AttentionCall], Tensor]) -> Call:
    """Use any function(value, call) -> tensor. It sees the whole value and must not change it in place; it cannot be saved in a recipe."""
    if not callable(function):
        raise EditError(f"call({function!r}): give a function(value, call) that returns a tensor")
    return Call(function)


def hidden(scores: Tensor) -> Tensor:
    """True where a score means "masked": -inf, or so negative that a model can only have meant that."""
    return scores <= torch.finfo(scores.dtype).min / 2


def _number(op: str, what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EditError(f"{op}({value!r}): the {what} is a number")
    if not math.isfinite(value):
        raise NonFiniteError(f"{op}({value!r}): the {what} is a finite number; to hide keys use mask()")
    return float(value)


def _number_or_tensor(op: str, value: object) -> float | Tensor:
    if not isinstance(value, Tensor):
        return _number(op, "value", value)
    if value.is_complex() or value.dtype == torch.bool:
        raise EditError(f"{op}(tensor of {value.dtype}): give a tensor of real numbers")
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"{op}(tensor {list(value.shape)}): it holds NaN or infinity; to hide keys use mask()")
    return value


def _source(op: str, source: object) -> Source:
    if isinstance(source, (Tensor, StoredRun)) or all(hasattr(source, stage) for stage in ("pattern", "steps", "sites")):
        return source  # type: ignore[return-value]
    raise EditError(f"{op}({type(source).__name__}): give a Capture of another run, or a tensor")


def _fitted(amount: float | Tensor, value: Tensor, call: AttentionCall, stage: str, op: Op) -> float | Tensor:
    return amount if isinstance(amount, float) else _fitted_tensor(amount, value, call, stage, op)


def _fitted_tensor(amount: Tensor, value: Tensor, call: AttentionCall, stage: str, op: Op) -> Tensor:
    """The amount in the value's dtype and on its device, if it broadcasts into the value."""
    if not _broadcasts(amount, value, call, stage):
        raise ShapeError(
            f"{op} at {stage} of {call.site.name}: the tensor's shape {list(amount.shape)} "
            f"does not broadcast to {list(_whole(value, call, stage))}"
        )
    return amount.to(value)


def _whole(value: Tensor, call: AttentionCall, stage: str) -> torch.Size:
    """The shape of a stage; a bias may come smaller than what it is added to."""
    return torch.Size((call.q.shape[0], call.q.shape[1], call.queries, call.keys)) if stage == "bias" else value.shape


def _broadcasts(amount: Tensor, value: Tensor, call: AttentionCall, stage: str) -> bool:
    expected = _whole(value, call, stage)
    if amount.ndim > len(expected):
        return False
    return all(size in (1, whole) for size, whole in zip(amount.shape[::-1], expected[::-1], strict=False))


def _spoken(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, (bool, int, float, str)) or value is None:
        return repr(value)
    return getattr(value, "__name__", type(value).__name__)
