"""`measure_health`: every head and every block of a model on some inputs, against its baselines, with what is to be said of them.

Letters: B batch, N tokens, H query heads.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import HeadscopeError, InputError, SelectionError
from headscope.probe.health.baselines import measure_baselines
from headscope.probe.health.blocks import Key, State, watch_states
from headscope.probe.health.findings import find
from headscope.probe.health.gradients import measure_gradients
from headscope.probe.health.heads import HeadMeter
from headscope.probe.health.inputs import Batch, Inputs, batches_of, refuse_training, undisturbed
from headscope.probe.health.measures import GradientMeasures, HeadMeasures, StreamMeasures
from headscope.probe.health.report import HealthReport
from headscope.probe.health.streams import average_streams, measure_stream
from headscope.probe.health.thresholds import Thresholds, thresholds_of
from headscope.probe.interception.intercept import check_model, intercept
from headscope.probe.models import model_fingerprint
from headscope.probe.record import spoken

Progress = Callable[[int, int], None]


def measure_health(
    model: nn.Module,
    inputs: Inputs,
    *,
    tokens: Tensor | Sequence[Tensor] | None = None,
    special: Tensor | Sequence[Tensor] | None = None,
    ignore_special: bool = False,
    sites: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    spectrum: int = 0,
    gradients: Callable[[Any], Tensor] | None = None,
    baselines: bool | Sequence[str] = True,
    thresholds: Mapping[str, float] | Thresholds | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> HealthReport:
    """Measure how a model's attention does, and say what is wrong with it.

    One forward for each batch, and one more for the freshly initialised copy that it is compared with. Fused attention stays fused and no
    map is held; a model that forms its own maps is read from those. The model, its gradients and the random state stay as they are.

    Args:
        model: any nn.Module, in eval mode.
        inputs: keyword inputs, the first positional input as a tensor, or a list of either: several batches, averaged.
        tokens: bool [B, N], True = counts; for several batches a list. None takes the inputs' `attention_mask`.
        special: bool [B, N], True = a special token such as [CLS]; needed for `special_mass`.
        ignore_special: special tokens are not counted as queries.
        sites: names or globs of the attention sites to measure; None for all.
        layers: likewise.
        spectrum: steps of the bounds on singular values, two streamed attentions each; 0 for the bounds that cost nothing.
        gradients: a loss, function of the model's output: adds one backward, and the gradient that reaches queries, keys and values.
        baselines: True for all, False for none, or names out of `headscope.probe.health.baselines.KINDS`.
        thresholds: where the rules fire, instead of the defaults: some by name, or a `Thresholds`.
        progress: called with (forwards done, forwards in all).
        seed: of the fresh copy's weights and of the start of the bounds.

    Raises:
        InputError: training mode; inputs, masks, steps or baselines that make no sense.
        NotIntercepted: the model computes no attention, or some that was not caught.
        SelectionError: `sites` and `layers` choose nothing; no threshold of that name.
    """
    check_model(model)
    refuse_training(model)
    if spectrum < 0:
        raise InputError(f"spectrum={spectrum}: give 0 for the bounds that cost nothing, or a number of steps")
    limits = thresholds_of(thresholds)
    batches = batches_of(model, inputs, tokens=tokens, special=special, ignore_special=ignore_special)
    globs = [sites] if isinstance(sites, str) else None if sites is None else list(sites)
    numbers = [layers] if isinstance(layers, int) else None if layers is None else list(layers)
    fresh = baselines is True or (not isinstance(baselines, bool) and "fresh" in baselines)
    told = _Progress(progress, len(batches) * (1 + fresh + (gradients is not None)))

    def measure(other: nn.Module) -> tuple[tuple[HeadMeasures, ...], tuple[StreamMeasures, ...]]:
        return run_batches(other, batches, sites=globs, layers=numbers, steps=spectrum, seed=seed, step=told.step)

    heads, streams = measure(model)
    if tokens is not None and not any(batch.tokens.used for batch in batches):
        raise InputError(
            f"tokens is {[list(batch.tokens.counts.shape) for batch in batches if batch.tokens.counts is not None]}, and no attention has "
            "queries of that number: give bool [B, N], N as the model's attention counts its tokens"
        )
    found = measure_baselines(model, heads, measure, baselines, seed)
    slopes: tuple[GradientMeasures, ...] = ()
    if gradients is not None:
        slopes = measure_gradients(model, inputs, gradients, tokens)
        told.step(len(batches))
    info: dict[str, object] = {
        "model": type(model).__name__,
        "fingerprint": _fingerprint(model),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "headscope": _version()},
        "dtype": _dtype(model),
        "batches": len(batches),
        "tokens": max((one.queries for one in heads), default=0),
        "seed": seed,
        "spectrum": spectrum,
    }
    return HealthReport(
        heads=heads, streams=streams, gradients=slopes, baselines=found, findings=find(heads, streams, slopes, found, limits),
        thresholds=limits, info=info,
    )  # fmt: skip


def run_batches(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    steps: int = 0,
    seed: int = 0,
    step: Callable[[], None] | None = None,
) -> tuple[tuple[HeadMeasures, ...], tuple[StreamMeasures, ...]]:
    """The heads and hidden states of a model on some batches, without gradients and with the random state left as it was.

    Args:
        sites, layers: of the attention to measure; hidden states are those of the same layers.
        steps, seed: of the bounds on singular values.
        step: called after each forward.

    Raises:
        NotIntercepted: the model computes no attention, or some that was not caught.
        SelectionError: the choice hit no site.
    """
    meter = HeadMeter(sites, layers, steps, seed)
    found: dict[Key, list[StreamMeasures]] = {}

    def consume(state: State) -> None:
        if layers is not None and state.layer not in layers:
            return
        mask = meter.tokens.of_states(state.states.shape[0], state.states.shape[1], state.name)
        measured = measure_stream(
            state.states, mask, name=state.name, place=state.place, layer=state.layer, stream=state.stream, before=state.before,
            update=state.update,
        )  # fmt: skip
        found.setdefault(state.key, []).append(measured)

    with undisturbed(model), watch_states(model, consume), intercept(model, meter) as session:
        for batch in batches:
            meter.tokens = batch.tokens
            batch.run(model)
            if step is not None:
                step()
    heads = meter.measures(session.sites)
    if not heads:
        chosen = ", ".join(f"{name}={value!r}" for name, value in (("sites", sites), ("layers", layers)) if value is not None)
        raise SelectionError(f"{chosen} chooses no attention; the model showed {spoken(list(meter.seen))}")
    return heads, tuple(average_streams(each) for each in found.values())


class _Progress:
    """Counts forwards and says so."""

    def __init__(self, told: Progress | None, total: int) -> None:
        self.told, self.total, self.done = told, total, 0

    def step(self, count: int = 1) -> None:
        self.done = min(self.done + count, self.total)
        if self.told is not None:
            self.told(self.done, self.total)


def _fingerprint(model: nn.Module) -> str:
    try:
        return model_fingerprint(model)
    except HeadscopeError as error:  # weights on the meta device
        return f"unknown: {error}"


def _version() -> str:
    try:
        return metadata.version("headscope")
    except metadata.PackageNotFoundError:  # run from its folder, not installed
        return "unknown"


def _dtype(model: nn.Module) -> str:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return "none" if first is None else str(first.dtype).removeprefix("torch.")
