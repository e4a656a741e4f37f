"""What a plan costs a model, predicted from its stages and measured."""

from __future__ import annotations

import html
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from torch import nn

from headscope.interventions.activation import Activation
from headscope.interventions.edit import Edit, lower
from headscope.kernels.errors import InputError

MATERIALISED = frozenset({"scores", "pattern"})
FLEX_MATERIALISED = MATERIALISED | {"bias"}  # flex_attention takes no mask tensor that a bias could join


@dataclass(frozen=True)
class EditCost:
    """One edit: the stage it was asked for, the cheapest stage that expresses it, and the calls of one forward that it changes."""

    edit: str
    stage: str
    lowered: str
    calls: int


@dataclass(frozen=True)
class SiteCost:
    """One site that the plan changes: at which stages, and whether it leaves the fused attention it would otherwise use."""

    site: str
    mechanism: str
    stages: tuple[str, ...]
    leaves_fused: bool


@dataclass(frozen=True)
class PlanCost:
    """What a plan costs.

    Attributes:
        edits, sites: where the plan is carried out.
        seconds_without, seconds_with: median of the forwards.
        overhead: seconds_with / seconds_without.
        repeats: timed forwards each, taken in turns.
    """

    edits: tuple[EditCost, ...]
    sites: tuple[SiteCost, ...]
    seconds_without: float
    seconds_with: float
    overhead: float
    repeats: int

    def to_dict(self) -> dict[str, object]:
        """The fields as plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """The fields as JSON."""
        return json.dumps(self.to_dict())

    @property
    def overhead_in_words(self) -> str:
        """The measured times."""
        return (
            f"{self.overhead:.2f}x the forward without the plan ({self.seconds_without:.4f} s -> {self.seconds_with:.4f} s, "
            f"median of {self.repeats})"
        )

    def __str__(self) -> str:
        lines = [self.overhead_in_words]
        lines += [
            f"  edit {index}: {edit.edit}: carried out at {edit.lowered} in {edit.calls} calls" for index, edit in enumerate(self.edits)
        ]
        lines += [
            f"  {site.site}: {', '.join(site.stages)}{' (leaves fused attention)' if site.leaves_fused else ''}" for site in self.sites
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def measure_cost(
    edits: Sequence[Edit],
    switched_on: Callable[[], AbstractContextManager[Activation]],
    model: nn.Module,
    args: Sequence[object],
    inputs: Mapping[str, object],
    repeats: int,
    run: Callable[[], object] | None = None,
) -> PlanCost:
    """Run the model with and without a plan, in turns, after one run each that does not count. `run` stands for model(*args, **inputs).

    Raises:
        InputError: fewer than one repeat.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise InputError(f"repeats={repeats!r}: time at least 1 forward")
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}

    def forward() -> float:
        started = time.perf_counter()
        model(*args, **inputs) if run is None else run()
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds: dict[bool, list[float]] = {False: [], True: []}
    with torch.no_grad():
        forward()
        with switched_on() as activation:
            forward()
            stages = {site: activation.stages(site) for site in activation.sites.values()}
            hits = dict(activation.hits)
        for _ in range(repeats):
            seconds[False].append(forward())
            with switched_on():
                seconds[True].append(forward())
    without, with_plan = (statistics.median(seconds[on]) for on in (False, True))
    return PlanCost(
        edits=tuple(EditCost(str(edit), edit.stage, lower(edit), hits.get(index, 0)) for index, edit in enumerate(edits)),
        sites=tuple(
            SiteCost(
                site.name,
                site.mechanism,
                tuple(sorted(found)),
                site.mechanism != "dataflow" and bool(found & (FLEX_MATERIALISED if site.mechanism == "flex" else MATERIALISED)),
            )
            for site, found in stages.items()
            if found
        ),
        seconds_without=without,
        seconds_with=with_plan,
        overhead=with_plan / without,
        repeats=repeats,
    )
