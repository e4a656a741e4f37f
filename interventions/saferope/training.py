"""Learning the rotation: what the model says to unsafe prompts is to change much, what it says to safe ones little.

Letters: N selected heads, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions.plan import Plan
from headscope.interventions.roles import Roles
from headscope.interventions.saferope.examples import Prompted
from headscope.kernels.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class Schedule:
    """How the rotation is learned.

    Attributes:
        steps: of Adam.
        rate: its learning rate.
        safety: weight of the change on safe prompts, against a change of 1 on unsafe ones.
        alternate: so many steps on safe prompts, then as many on unsafe ones (as published, 10); 0 takes both into every step.
        start: standard deviation of the matrices at the start; at 0 there is no direction to go.
        seed: of the start and of the order of examples.
    """

    steps: int = 250
    rate: float = 2e-2
    safety: float = 10.0
    alternate: int = 0
    start: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 0), ("rate", 0.0), ("safety", 0.0), ("alternate", 0), ("start", 0.0)):
            if not getattr(self, name) >= low:
                raise InputError(f"{name}={getattr(self, name)!r}: give {low} or more")


def learn(
    model: nn.Module,
    generators: Sequence[Tensor],
    plan: Callable[[Sequence[Tensor]], Plan],
    unsafe: Sequence[Prompted],
    safe: Sequence[Prompted],
    schedule: Schedule,
    *,
    read: Callable[[Any], Tensor],
    roles: Roles | None = None,
    vary: Callable[[Mapping[str, Any], torch.Generator], Mapping[str, Any]] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Skew-symmetric matrices, and the loss at every step.

    The loss is -tanh(d of unsafe) + safety · (d of safe), d the mean squared change of the output over its mean square. Matrices are S - Sᵀ
    of what is learned, so that every rotation on the way is orthogonal. No parameter of the model gets a gradient.

    Args:
        model: in eval mode.
        generators: S at the start, [N, R, R] for each side of each site.
        plan: the plan with such skew matrices.
        unsafe, safe: what is drawn from.
        schedule: see there.
        read: the tensor of the model's output that counts.
        roles: as `Plan.on` takes them.
        vary: other inputs from an example's, such as fresh noise and another timestep; called at every use.
        progress: told (step, steps, the losses in words).

    Raises:
        NonFiniteError: the loss is not finite; the matrices of the step before are lost.
    """
    order = torch.Generator().manual_seed(schedule.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    history: list[dict[str, float]] = []
    with torch.inference_mode(False), torch.enable_grad():
        learned = [matrix.clone().requires_grad_() for matrix in generators]
        optimiser = torch.optim.Adam(learned, lr=schedule.rate)
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            for step in range(schedule.steps):
                losses: dict[str, Tensor] = {}
                for name in _sides(schedule, step):
                    examples = unsafe if name == "unsafe" else safe
                    example = examples[int(torch.randint(len(examples), (), generator=order))]
                    inputs = example.inputs if vary is None else vary(example.inputs, order)
                    losses[name] = _change(model, plan([matrix - matrix.mT for matrix in learned]), inputs, read, roles)
                total = sum((-torch.tanh(d) if name == "unsafe" else schedule.safety * d for name, d in losses.items()), torch.zeros(()))
                if not bool(torch.isfinite(total)):
                    raise NonFiniteError(f"step {step}: the loss is not finite; lower the learning rate, or use float32")
                optimiser.zero_grad()
                total.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                history.append({"step": float(step), **{name: float(d.detach()) for name, d in losses.items()}})
                if progress is not None:
                    progress(step + 1, schedule.steps, ", ".join(f"{name} {float(d.detach()):.3g}" for name, d in losses.items()))
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        return [(matrix - matrix.mT).detach() for matrix in learned], history


def _sides(schedule: Schedule, step: int) -> tuple[str, ...]:
    if schedule.alternate == 0:
        return ("unsafe", "safe")
    return ("safe",) if (step // schedule.alternate) % 2 == 0 else ("unsafe",)


def _change(
    model: nn.Module, plan: Plan, inputs: Mapping[str, Any], read: Callable[[Any], Tensor], roles: Roles | None
) -> Tensor:  # fmt: skip
    """Mean squared change of the output by the plan, relative to its mean square."""
    with torch.no_grad():
        before = read(model(**inputs)).float()
    with plan.on(model, roles=roles, strict=False):
        after = read(model(**inputs)).float()
    return (after - before).square().mean() / before.square().mean().clamp_min(1e-12)


def output_of(output: Any) -> Tensor:
    """The tensor of a model's output that counts by default: its logits, its sample, or the first tensor there is.

    Raises:
        InputError: there is none.
    """
    for name in ("logits", "sample"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    parts = [output] if isinstance(output, Tensor) else list(output.values()) if isinstance(output, dict) else list(output)
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise InputError(f"no tensor in the model's output ({type(output).__name__}): give read=, a function that takes it out")
