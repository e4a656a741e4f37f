"""A health monitor as a callback of Lightning's Trainer, whichever of its two names is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headscope.kernels.errors import HeadscopeError
from headscope.probe.health.outlets import PREFIX, WeightsAndBiases
from headscope.probe.health.report import HealthReport

if TYPE_CHECKING:
    from headscope.probe.health.monitor import HealthMonitor

NAMES = ("lightning.pytorch", "pytorch_lightning")


class Loggers:
    """The loggers of a Lightning trainer as an outlet of a monitor."""

    def __init__(self, loggers: list[Any]) -> None:
        self.loggers = loggers

    def write(self, step: int, numbers: Mapping[str, float], report: HealthReport) -> None:
        for logger in self.loggers:
            logger.log_metrics({PREFIX + name: value for name, value in numbers.items()}, step=step)


def make_callback(monitor: HealthMonitor) -> Any:
    """A callback of the library that is loaded already, else of the first that is installed.

    The class is made here because its base is not known before.

    Raises:
        HeadscopeError: neither is installed.
    """
    base: Any = _library().Callback

    class MonitorCallback(base):  # type: ignore[misc]
        """Measures before the first step and after the steps at which it is due; may end the training."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            loggers = list(trainer.loggers)
            if any(type(logger).__name__ == "WandbLogger" for logger in loggers):  # it writes into the active run itself
                monitor.outlets = [one for one in monitor.outlets if not (isinstance(one, WeightsAndBiases) and one.run is None)]
            monitor.outlets = [one for one in monitor.outlets if not isinstance(one, Loggers)]
            if loggers:
                monitor.outlets.append(Loggers(loggers))
            self._last = -1
            self._asked(trainer)

        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            self._asked(trainer)

        def _asked(self, trainer: Any) -> None:
            if trainer.global_step == self._last:  # gradients are being accumulated
                return
            self._last = trainer.global_step
            monitor.step(trainer.global_step)
            if monitor.stopping:
                trainer.should_stop = True

    return MonitorCallback()


def _library() -> Any:
    for name in (*(one for one in NAMES if one in sys.modules), *NAMES):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise HeadscopeError("for_lightning() needs Lightning, which is not installed: pip install lightning")
