"""The books of an attribution: what came in at the target, what reached the inputs, and who kept the rest.

In the modified-gradient form of layer-wise relevance propagation the relevance of a tensor x is Σ x·g, where g is the gradient that the
rules let through. An operation y = f(x₁ … xₙ) absorbs ⟨y, g_y⟩ - Σ ⟨xᵢ, g_xᵢ⟩. For operations linear in their data that is zero; what is
not zero is booked here, by operation and module, so that

    target = Σ inputs + Σ constants + Σ absorbed + residual

with a residual of rounding errors only (Achtibat et al. 2024, section 3; Arras et al. 2025 for this form).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# What an operation may absorb by the definition of its rule; anything else is `unruled`.
DECLARED = ("softmax", "bias", "norm shift", "constant", "gate", "clamp", "position")
AT_ONCE = 2**16  # products that are added up in their own dtype; sums of so many in float64


@dataclass(frozen=True)
class Entry:
    """What one operation at one place absorbed.

    Attributes:
        kind: one of `DECLARED`, or `unruled`.
        operation: the torch function.
        module: path of the module whose code called it.
        amount: relevance, in units of the target.
    """

    kind: str
    operation: str
    module: str
    amount: float

    def to_dict(self) -> dict[str, str | float]:
        return {"kind": self.kind, "operation": self.operation, "module": self.module, "amount": self.amount}


@dataclass
class Books:
    """The ledger while a backward pass writes into it; amounts stay on their device until `close`."""

    _amounts: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    unruled: dict[tuple[str, str], int] = field(default_factory=dict)  # (operation, module) -> how often

    def add(self, kind: str, operation: str, module: str, amount: Tensor) -> None:
        key = (kind, operation, module)
        before = self._amounts.get(key)
        self._amounts[key] = amount if before is None else before + amount

    def entries(self) -> tuple[Entry, ...]:
        """One for each kind, operation and module, in the order in which the backward pass met them, reversed: inputs first."""
        found = (Entry(*key, amount=float(amount)) for key, amount in reversed(self._amounts.items()))
        return tuple(entry for entry in found if entry.amount)


def inner(x: Tensor, g: Tensor) -> Tensor:
    """⟨x, g⟩ in float64; where g is 0 a masked -inf counts nothing."""
    x = x.detach()
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and g.dtype == x.dtype and g.shape == x.shape:
        flat = zip(torch.split(x.reshape(-1), AT_ONCE), torch.split(g.reshape(-1), AT_ONCE), strict=True)
        total = torch.stack([torch.dot(a, b) for a, b in flat]).sum(dtype=torch.float64)
        if math.isfinite(total):  # on the CPU it costs nothing to ask
            return total
    if x.dtype in (torch.float16, torch.bfloat16):
        x, g = x.float(), g.float()
    product = x.real * g.real + x.imag * g.imag if x.is_complex() else x * g
    return torch.where(g == 0, torch.zeros((), dtype=product.dtype, device=g.device), product).sum(dtype=torch.float64)


def on_gradient(tensor: Tensor, act: Callable[[Tensor], Tensor | None]) -> None:
    """Call `act` with the gradient of a tensor when the backward pass has it; what it returns replaces the gradient."""
    tensor.register_hook(act)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Ledger:
    """The closed books.

    Attributes:
        target: relevance that was sent in: the target's value.
        inputs: relevance that reached the inputs.
        constants: relevance at lookups that do not depend on the input's values (positions, token types), by module.
        entries: what operations absorbed.
        tolerance: the largest |residual| that still counts as closed, relative to the larger of |target| and the largest entry.
    """

    target: float
    inputs: float
    constants: dict[str, float]
    entries: tuple[Entry, ...]
    tolerance: float

    @property
    def absorbed(self) -> float:
        return sum(entry.amount for entry in self.entries)

    @property
    def residual(self) -> float:
        """What the books cannot account for."""
        return self.target - self.inputs - sum(self.constants.values()) - self.absorbed

    @property
    def scale(self) -> float:
        """The size of the numbers in the books, to which rounding errors are relative."""
        return max([abs(self.target), abs(self.inputs), *(abs(entry.amount) for entry in self.entries)], default=0.0)

    @property
    def closes(self) -> bool:
        return abs(self.residual) <= self.tolerance * self.scale

    def by_kind(self) -> dict[str, float]:
        """What each kind absorbed, over all modules."""
        found: dict[str, float] = {}
        for entry in self.entries:
            found[entry.kind] = found.get(entry.kind, 0.0) + entry.amount
        return found

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return {
            "target": self.target,
            "inputs": self.inputs,
            "constants": dict(self.constants),
            "absorbed": self.absorbed,
            "by_kind": self.by_kind(),
            "residual": self.residual,
            "tolerance": self.tolerance,
            "closes": self.closes,
            "entries": [entry.to_dict() for entry in self.entries],
        }
