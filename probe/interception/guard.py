"""Gradient checkpointing and edits: the second forward must be the edited one, or the backward must not pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headscope.kernels.errors import EditError, NotIntercepted
from headscope.probe.interception.place import Place
from headscope.probe.interception.session import Session


class RecomputeGuard(torch.autograd.Function):
    """Identity whose backward insists that a checkpointed region was run again under the same edits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, session: Session, site: str) -> Tensor:
        ctx.session, ctx.site = session, site
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.site not in ctx.session.recomputed:
            raise NotIntercepted(
                f"the backward of a checkpointed region recomputed {ctx.site} outside the plan that edited its forward: the gradient "
                "would be that of another model. Call backward() inside the same `with plan.on(model):` block"
            )
        return grad, None, None


def refuse_reentrant(session: Session, place: Place) -> None:
    """Reentrant checkpoints run their first forward without a graph, so no guard can be tied to it.

    Raises:
        EditError: an edit is active and the call stands in one.
    """
    if place.reentrant and session.changing():
        raise EditError(
            f"{place.path} runs inside a reentrant gradient checkpoint, whose second forward would lose the edit after the scope ends: "
            "use non-reentrant checkpointing (gradient_checkpointing_kwargs={'use_reentrant': False})"
        )


def guarded(result: Tensor, session: Session, place: Place, site: str) -> Tensor:
    """The output of an attention call, tied to its recomputation where an edit made it inside a checkpoint."""
    refuse_reentrant(session, place)
    if session.changing() and place.checkpointed and result.requires_grad:
        tied: Tensor = RecomputeGuard.apply(result, session, site)  # type: ignore[no-untyped-call]
        return tied
    return result
