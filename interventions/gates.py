"""How much of an edit each token and head gets: a number read off the token itself.

Letters: B batch, N heads (of the stage, or those that are selected), S tokens, D width, R rank of a subspace.

A gate reads the value at its own stage before the edit, of the selected heads and tokens alone. Its tensors are for all heads, or
count those that the edit selects: [D, R] or [N, D, R], [D] or [N, D].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interventions.source import same_tensor
from headscope.kernels.errors import EditError, NonFiniteError, ShapeError
from headscope.probe.call import AttentionCall

ORTHONORMAL = 1e-3  # how far UᵀU of a basis may be from the identity


@dataclass(frozen=True, eq=False)
class Gate(ABC):
    """One gate with its numbers. Two are equal if they are of one kind and their numbers and tensors are."""

    name: ClassVar[str]  # in recipes

    @abstractmethod
    def strength(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        """[B, N, S, 1], 0 for none of the edit, 1 for all; in float32 or the value's wider dtype."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return all(same_tensor(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs)

    def __hash__(self) -> int:
        return hash((self.name, *(value for field in fields(self) if isinstance(value := getattr(self, field.name), (float, str)))))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(_spoken(getattr(self, field.name)) for field in fields(self))})"


@dataclass(frozen=True, eq=False)
class Risk(Gate):
    """The latent risk score ‖Uᵀx‖² / ‖x‖² of a token, the share of it that lies in a subspace (SafeRoPE, arXiv 2604.01826).

    Attributes:
        basis: U, [D, R] or [N, D, R], orthonormal columns.
        threshold: a number, or [N], below which the gate closes.
        sharpness: None closes it at once; a number or [N] makes the step a sigmoid, sharpness · (score - threshold).
        weighted: the open gate is the score itself; else 1.
    """

    basis: Tensor
    threshold: float | Tensor = 0.0
    sharpness: float | Tensor | None = None
    weighted: bool = True
    name: ClassVar[str] = "risk"

    def strength(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        score = risk_score(value, self.basis)
        opened = _opened(score, self.threshold, self.sharpness)
        return opened * score if self.weighted else opened


@dataclass(frozen=True, eq=False)
class Cosine(Gate):
    """The cosine between a token and an anchor, through a threshold.

    Attributes:
        anchor: [D] or [N, D].
        threshold, sharpness: as in `Risk`.
    """

    anchor: Tensor
    threshold: float | Tensor = 0.0
    sharpness: float | Tensor | None = None
    name: ClassVar[str] = "cosine"

    def strength(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        x = _wide(value)
        anchor = _vector("anchor", self.anchor, x)
        size = x.norm(dim=-1, keepdim=True) * anchor.norm(dim=-1, keepdim=True)
        cosine = (x * anchor).sum(-1, keepdim=True) / size.masked_fill(size == 0, 1.0)
        return _opened(cosine, self.threshold, self.sharpness)


@dataclass(frozen=True, eq=False)
class Linear(Gate):
    """A linear probe: sigmoid(w·x + b).

    Attributes:
        weight: [D] or [N, D].
        offset: b, a number or [N].
        hard: 1 where the probability is above a half, else 0.
    """

    weight: Tensor
    offset: float | Tensor = 0.0
    hard: bool = False
    name: ClassVar[str] = "linear"

    def strength(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        x = _wide(value)
        logit = (x * _vector("weight", self.weight, x)).sum(-1, keepdim=True) + _per_head("offset", self.offset, x)
        return (logit > 0).to(x.dtype) if self.hard else torch.sigmoid(logit)


@dataclass(frozen=True, eq=False)
class Function(Gate):
    """Anything: function(value, call) -> [B, N, S, 1]. It cannot be saved in a recipe."""

    function: Callable[[Tensor, AttentionCall], Tensor]
    name: ClassVar[str] = "function"

    def strength(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        found = self.function(value, call)
        if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[-1] != 1:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(f"the gate {self} returned {what}: return [batch, head, token, 1], or 1 where it is the same for all")
        return found.to(value.device)


def risk(basis: Tensor, threshold: float | Tensor = 0.0, *, sharpness: float | Tensor | None = None, weighted: bool = True) -> Risk:
    """A gate that opens for tokens that lie in a subspace; see `Risk`.

    Raises:
        EditError: a basis that is not orthonormal, or with more columns than it has rows.
    """
    return Risk(orthonormal(basis), _threshold(threshold), None if sharpness is None else _threshold(sharpness), bool(weighted))


def cosine(anchor: Tensor, threshold: float | Tensor = 0.0, *, sharpness: float | Tensor | None = None) -> Cosine:
    """A gate that opens for tokens that point where an anchor does."""
    return Cosine(finite("anchor", anchor), _threshold(threshold), None if sharpness is None else _threshold(sharpness))


def linear(weight: Tensor, offset: float | Tensor = 0.0, *, hard: bool = False) -> Linear:
    """A gate that a linear probe opens."""
    return Linear(finite("weight", weight), _threshold(offset), bool(hard))


def function(function: Callable[[Tensor, AttentionCall], Tensor]) -> Function:
    """A gate of one's own, function(value, call) -> [B, N, S, 1]."""
    if not callable(function):
        raise EditError(f"function({function!r}): give a function(value, call) that returns a tensor")
    return Function(function)


GATES = {kind.name: kind for kind in (Risk, Cosine, Linear)}
MAKERS: dict[str, Callable[..., Gate]] = {"risk": risk, "cosine": cosine, "linear": linear}


def risk_score(value: Tensor, basis: Tensor) -> Tensor:
    """[B, N, S, 1], ‖Uᵀx‖² / ‖x‖² of each token, 0 to 1; 0 where x is 0.

    Args:
        value: [B, N, S, D].
        basis: [D, R] or [N, D, R].
    """
    x = _wide(value)
    inside = (x @ fitted(basis, x)).square().sum(-1, keepdim=True)
    total: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()  # without squares of every entry as a tensor of their own
    return (inside / total.masked_fill(total == 0, 1.0)).clamp(0.0, 1.0)


def fitted(basis: Tensor, value: Tensor) -> Tensor:
    """A basis [D, R] or [N, D, R] in the dtype and on the device of a value [B, N, S, D].

    Raises:
        ShapeError: it is for another width or number of heads.
    """
    if basis.shape[-2] != value.shape[-1] or (basis.ndim == 3 and basis.shape[0] not in (1, value.shape[1])):
        raise ShapeError(
            f"a basis of {list(basis.shape)} for {value.shape[1]} selected heads of width {value.shape[-1]}: "
            f"give [{value.shape[-1]}, R], or one for each head, [{value.shape[1]}, {value.shape[-1]}, R]"
        )
    return basis.to(value)


def orthonormal(basis: Tensor) -> Tensor:
    """The basis, if its columns are orthonormal.

    Raises:
        EditError: they are not, or there are more of them than the width allows.
    """
    finite("basis", basis)
    if basis.ndim not in (2, 3):
        raise ShapeError(f"a basis of {list(basis.shape)}: give [width, rank], or [heads, width, rank]")
    width, rank = basis.shape[-2:]
    if not 1 <= rank <= width:
        raise EditError(f"a basis of rank {rank} in heads of width {width}: give 1 to {width} columns")
    gram = basis.double().mT @ basis.double()
    if float((gram - torch.eye(rank, dtype=torch.float64, device=basis.device)).abs().max()) > ORTHONORMAL:
        raise EditError("the columns of the basis are not orthonormal: orthonormalise it with torch.linalg.qr(basis).Q")
    return basis


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it holds finite real numbers.

    Raises:
        EditError, NonFiniteError: it does not.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise EditError(f"{name}={type(tensor).__name__}: give a tensor of floating-point numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{name} {list(tensor.shape)} holds NaN or infinity")
    return tensor


def _threshold(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        return finite("threshold", value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise EditError(f"threshold={value!r}: give a finite number, or a tensor with one for each head")
    return float(value)


def _opened(score: Tensor, threshold: float | Tensor, sharpness: float | Tensor | None) -> Tensor:
    over = score - _per_head("threshold", threshold, score)
    return (over > 0).to(score.dtype) if sharpness is None else torch.sigmoid(_per_head("sharpness", sharpness, score) * over)


def _per_head(name: str, number: float | Tensor, value: Tensor) -> float | Tensor:
    if not isinstance(number, Tensor):
        return number
    if number.ndim > 1 or number.numel() not in (1, value.shape[1]):
        raise ShapeError(f"{name} {list(number.shape)} for {value.shape[1]} selected heads: give one number, or one for each of them")
    return number.to(value).reshape(1, -1, 1, 1)


def _vector(name: str, vector: Tensor, value: Tensor) -> Tensor:
    """[1, N or 1, 1, D]."""
    if (
        vector.ndim not in (1, 2)
        or vector.shape[-1] != value.shape[-1]
        or (vector.ndim == 2 and vector.shape[0] not in (1, value.shape[1]))
    ):
        raise ShapeError(
            f"{name} {list(vector.shape)} for {value.shape[1]} selected heads of width {value.shape[-1]}: give [{value.shape[-1]}], "
            f"or [{value.shape[1]}, {value.shape[-1]}]"
        )
    return vector.to(value).reshape(1, -1, 1, vector.shape[-1])


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _spoken(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    return getattr(value, "__name__", repr(value))
