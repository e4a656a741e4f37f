"""A health monitor as a callback of transformers' Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from headscope.probe.health.monitor import HealthMonitor


class MonitorCallback(TrainerCallback):
    """Measures before the first step and after the steps at which it is due; may end the training.

    Attributes:
        monitor: what it asks.
    """

    def __init__(self, monitor: HealthMonitor) -> None:
        self.monitor = monitor

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return self._asked(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return self._asked(state, control)

    def _asked(self, state: TrainerState, control: TrainerControl) -> TrainerControl:
        self.monitor.step(state.global_step)
        if self.monitor.stopping:
            control.should_training_stop = True
        return control


def make_callback(monitor: HealthMonitor) -> TrainerCallback:
    """The callback."""
    return MonitorCallback(monitor)
