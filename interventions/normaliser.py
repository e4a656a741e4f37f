"""Another normaliser in place of softmax. Letters: B batch, H query heads, Q queries, K keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from headscope.interventions.ops import Op
from headscope.kernels.errors import EditError
from headscope.kernels.sinkhorn import sinkhorn as balanced
from headscope.probe.call import AttentionCall


@dataclass(frozen=True, eq=False)
class Sinkhorn(Op):
    """The pattern brought towards rows and columns of equal sums; see `headscope.kernels.sinkhorn`.

    Softmax is the first half-step, and the limit forgets what was multiplied to rows, so the pattern stands for the scores.
    """

    half_steps: int = 3
    name: ClassVar[str] = "sinkhorn"
    stages: ClassVar[frozenset[str]] = frozenset({"pattern"})

    @property
    def identity(self) -> bool:
        return self.half_steps == 1

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        return balanced(value.log(), self.half_steps).to(value.dtype)  # log 0 = -inf hides a pair


def sinkhorn(half_steps: int = 3) -> Sinkhorn:
    """Sinkhorn attention in place of softmax, at stage `pattern`; 1 half-step is softmax. A causal pattern is refused when it comes by.

    Raises:
        EditError: not a positive number of half-steps.
    """
    if isinstance(half_steps, bool) or not isinstance(half_steps, int) or half_steps < 1:
        raise EditError(f"sinkhorn({half_steps!r}): give a number of half-steps, 1 or more; odd numbers end with rows that sum to 1")
    return Sinkhorn(half_steps)
