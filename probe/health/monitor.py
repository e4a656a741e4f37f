"""Watching the health of a model's attention while it is trained.

    monitor = HealthMonitor(model, probe_batch, log="health.jsonl")
    for step, batch in enumerate(loader):
        ...                                       # forward, backward, optimizer
        monitor.step(step)

    Trainer(..., callbacks=[monitor.for_trainer()])             # transformers
    lightning.Trainer(..., callbacks=[monitor.for_lightning()])

Every so many steps the model runs once, in evaluation mode, on a fixed batch, and `measure_health` looks at it. The training does not
notice: modes, gradients, buffers and random states are put back, so a monitored run gives the same weights to the bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, NonFiniteError
from headscope.probe.health.baselines import measure_baselines
from headscope.probe.health.findings import Finding, find, worst
from headscope.probe.health.gradients import measure_gradients
from headscope.probe.health.history import Moment, MonitorHistory, numbers_of
from headscope.probe.health.inputs import Batch, Inputs, batches_of
from headscope.probe.health.measure import run_batches
from headscope.probe.health.measures import GradientMeasures
from headscope.probe.health.outlets import JsonLines, Outlet, TensorBoard, weights_and_biases
from headscope.probe.health.pace import Pace
from headscope.probe.health.report import HealthReport
from headscope.probe.health.thresholds import Thresholds, thresholds_of
from headscope.probe.health.trend import Trend
from headscope.probe.health.undisturbed import bare_model, process_rank, undisturbed
from headscope.probe.interception import check_model

if TYPE_CHECKING:
    from transformers import TrainerCallback

LOG = logging.getLogger("headscope.health")
LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "alarm": logging.ERROR}
BASELINES = ("uniform",)  # the fresh copy would take as long as the measurement, and says the same every time
Slopes = tuple[GradientMeasures, ...]
OnAlarm = str | Callable[[HealthReport], object] | None


class HealthMonitor:
    """Measures a model now and then during its training, on a fixed batch, in the process of rank 0.

    Attributes:
        history: what was measured so far.
        report: the last measurement in full; None before the first.
        overhead: time spent measuring over time spent training.
        stopping: an alarm came, and the training was to be stopped by one.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        every: int | None = None,
        share: float = 0.02,
        tokens: Tensor | Sequence[Tensor] | None = None,
        special: Tensor | Sequence[Tensor] | None = None,
        spectrum: int = 0,
        gradients: Callable[[Any], Tensor] | None = None,
        thresholds: Mapping[str, float] | Thresholds | None = None,
        log: str | Path | None = None,
        tensorboard: Any = None,
        wandb: Any = None,
        outlets: Sequence[Outlet] = (),
        on_alarm: OnAlarm = None,
    ) -> None:
        """
        Args:
            model: what is trained; DistributedDataParallel, torch.compile and the like around it are looked through.
            inputs: the probe batch, as `measure_health` takes it; moved to the model's device. A few hundred tokens are enough.
            every: steps between measurements. None: as often as `share` allows, see `headscope.probe.health.pace`.
            share: of the training's time that measuring may take, where `every` is None.
            tokens, special, spectrum, gradients, thresholds: as in `measure_health`.
            log: a file that gets one JSON line for each measurement.
            tensorboard: a SummaryWriter, or the folder for one.
            wandb: a run; True for the active one; None for the active one, if there is one; False for none.
            outlets: whatever else takes measurements, see `headscope.probe.health.outlets`.
            on_alarm: what to do at a finding of severity `alarm`: "stop" the training (a plain loop looks at `stopping`; of several
                processes all are told, by one broadcast a step), or a function of the report. It is logged anyway.

        Raises:
            InputError: an interval or share that makes no sense; another `on_alarm`; weights that are spread over processes.
            NotIntercepted: `model` is not a torch module.
            StoreError: the log cannot be written.
            HeadscopeError: an outlet whose library is not installed.
        """
        self.model = check_model(model)
        bare_model(model)
        if not (on_alarm is None or on_alarm == "stop" or callable(on_alarm)):
            raise InputError(f'on_alarm={on_alarm!r}: give "stop", a function of the report, or None')
        self._inputs, self._tokens, self._special = inputs, tokens, special
        self._spectrum, self._gradients = spectrum, gradients
        self._thresholds = thresholds_of(thresholds)
        self._on_alarm = on_alarm
        self._pace = Pace(every, share)
        self._trend = Trend()
        self._moments: list[Moment] = []
        self._standing: set[tuple[str, str, int | None]] = set()  # findings that have been told
        self._steps = 0
        self._told_overhead = False
        self.report: HealthReport | None = None
        self.stopping = False
        self.outlets: list[Outlet] = list(outlets)
        if process_rank() == 0:
            chosen = (
                JsonLines(log) if log is not None else None,
                TensorBoard(tensorboard) if tensorboard is not None else None,
                weights_and_biases(wandb),
            )
            self.outlets += [outlet for outlet in chosen if outlet is not None]

    def step(self, step: int | None = None) -> HealthReport | None:
        """Call it once for each step of the optimizer, anywhere in the loop: gradients that wait for the optimizer are left as they are.

        Args:
            step: its number; counted from 0 where left out.

        Returns:
            the measurement, where one was due; None else, and in every process but that of rank 0.

        Raises:
            NotIntercepted: the model shows no attention.
        """
        number = self._steps if step is None else step
        self._steps = number + 1
        due = process_rank() == 0 and self._pace.due(number, time.perf_counter())
        report = self.measure(number) if due else None
        if self._on_alarm == "stop":
            self.stopping = _agreed(self.stopping, self.model)
        return report

    def measure(self, step: int | None = None) -> HealthReport:
        """Measure now, whether it is due or not."""
        number = self._steps if step is None else step
        model = bare_model(self.model)
        device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
        _wait(device)
        start = time.perf_counter()
        with undisturbed(model):
            inputs, tokens, special = (_moved(given, device) for given in (self._inputs, self._tokens, self._special))
            batches = batches_of(model, inputs, tokens=tokens, special=special)
            report = self._measured(model, batches, number, self._slopes(model, inputs, tokens))
        _wait(device)
        findings = (*report.findings, *self._trend.add(report.heads))
        numbers = numbers_of(report)
        self._tell(findings, number)
        for outlet in self.outlets:
            outlet.write(number, numbers, report)
        seconds = time.perf_counter() - start
        self._pace.paid(number, seconds)
        self._moments.append(Moment(number, seconds, worst(findings), numbers, findings))
        self.report = report
        self._mind_overhead()
        if worst(findings) == "alarm" and self._on_alarm is not None:
            if callable(self._on_alarm):
                self._on_alarm(report)
            else:
                self.stopping = True
        return report

    @property
    def history(self) -> MonitorHistory:
        return MonitorHistory(tuple(self._moments))

    @property
    def overhead(self) -> float:
        return self._pace.overhead

    def for_trainer(self) -> TrainerCallback:
        """A callback for transformers' Trainer: it measures before the first step and then when it is due."""
        from headscope.probe.health.trainer_callback import make_callback  # transformers takes seconds to load

        return make_callback(self)

    def for_lightning(self) -> Any:
        """A callback for Lightning's Trainer, of `lightning` or `pytorch_lightning`; measurements go to the trainer's loggers too.

        Raises:
            HeadscopeError: neither is installed.
        """
        from headscope.probe.health.lightning_callback import make_callback  # the same

        return make_callback(self)

    def _measured(self, model: nn.Module, batches: Sequence[Batch], step: int, slopes: Slopes) -> HealthReport:
        """As `measure_health`, but for what costs more than it tells during a training: the fresh copy and the fingerprint."""
        heads, streams = run_batches(model, batches, steps=self._spectrum)
        baselines = measure_baselines(model, heads, lambda other: run_batches(other, batches), BASELINES)
        findings = find(heads, streams, slopes, baselines, self._thresholds)
        dtype = next((str(weight.dtype).removeprefix("torch.") for weight in model.parameters() if weight.is_floating_point()), "none")
        tokens = max((one.queries for one in heads), default=0)
        info = {"model": type(model).__name__, "step": step, "dtype": dtype, "batches": len(batches), "tokens": tokens, "seed": 0}
        return HealthReport(heads, streams, slopes, baselines, findings, self._thresholds, info)

    def _slopes(self, model: nn.Module, inputs: Inputs, tokens: Tensor | Sequence[Tensor] | None) -> Slopes:
        if self._gradients is None:
            return ()
        try:
            return measure_gradients(model, inputs, self._gradients, tokens)
        except NonFiniteError as error:  # the training decides what becomes of it, not who watches
            LOG.warning("no gradients were measured: %s", error)
            return ()

    def _tell(self, findings: Sequence[Finding], step: int) -> None:
        """Log what is new. What stands is not told again until it has gone and come back.

        Fresh weights attend uniformly and worse; so a warning about the first measurement is no more than a remark, and becomes a warning
        if it still stands at the second.
        """
        first = not self._moments
        standing = set()
        for one in findings:
            level = LEVELS.get(one.severity, logging.INFO)
            place = (one.rule, one.site, one.head)
            if first and level == logging.WARNING:
                level = logging.INFO
            else:
                standing.add(place)
            if place not in self._standing:
                remedy = f"; try: {one.remedies[0]}" if one.remedies else ""
                LOG.log(level, "step %d, %s at %s: %s%s", step, one.rule, one.place, one.why, remedy)
        self._standing = standing

    def _mind_overhead(self) -> None:
        pace = self._pace
        if pace.every is None or self._told_overhead or len(self._moments) < 3 or not pace.overhead > pace.share:
            return
        self._told_overhead = True
        LOG.warning(
            "measuring takes %.1f %% of the time of training, at every %d steps; every=None keeps it below %.0f %%",
            100 * pace.overhead, pace.every, 100 * pace.share,
        )  # fmt: skip

    def __repr__(self) -> str:
        how = f"every {self._pace.every} steps" if self._pace.every is not None else f"at most {100 * self._pace.share:g} % of the time"
        return f"HealthMonitor({type(self.model).__name__}, {how}, {len(self._moments)} measurements)"


def _moved(given: Any, device: torch.device) -> Any:
    """Tensors to a device, in mappings and lists too."""
    if isinstance(given, Tensor):
        return given.to(device)
    if isinstance(given, Mapping):
        return {name: _moved(value, device) for name, value in given.items()}
    return type(given)(_moved(value, device) for value in given) if type(given) in (list, tuple) else given


def _agreed(stopping: bool, model: nn.Module) -> bool:
    """What the process of rank 0 says, in all of them: one that stops alone would leave the others waiting for it."""
    together: Any = torch.distributed  # torch has no types for it
    if not (together.is_available() and together.is_initialized()) or together.get_world_size() == 1:
        return stopping
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    told = torch.tensor([float(stopping)], device=device)
    together.broadcast(told, src=0)
    return bool(told.item())


def _wait(device: torch.device) -> None:
    """Until the device has done its work, so that nobody's work is counted as another's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
