"""Where a monitor writes what it measures: a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from headscope.kernels.errors import HeadscopeError, StoreError
from headscope.probe.health.measures import plain
from headscope.probe.health.report import HealthReport

PREFIX = "health/"


class Outlet(Protocol):
    """Takes every measurement."""

    def write(self, step: int, numbers: Mapping[str, float], report: HealthReport) -> None:
        """One measurement: its curves, and all of it."""
        ...


class JsonLines:
    """A file with one JSON document a line: everything about every head. Lines are added, so a run that goes on goes on in its file."""

    def __init__(self, path: str | Path) -> None:
        """Raises StoreError where no file can be written."""
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written ({error.strerror}): give another file for the log") from error

    def write(self, step: int, numbers: Mapping[str, float], report: HealthReport) -> None:
        document = {
            "schema": "headscope.monitor/v1", "step": step, "worst": report.worst,
            "numbers": {name: plain(value) for name, value in numbers.items()},
            "heads": {
                one.site.name: {name: [plain(value) for value in values.tolist()] for name, values in one.numbers().items()}
                for one in report.heads
            },
            "streams": [one.row() for one in report.streams],
            "findings": [one.to_dict() for one in report.findings],
        }  # fmt: skip
        line = json.dumps(document, allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)


class TensorBoard:
    """Scalars under `health/`."""

    def __init__(self, writer: Any) -> None:
        """
        Args:
            writer: a SummaryWriter, or the folder for one.

        Raises:
            HeadscopeError: TensorBoard is not installed.
        """
        if isinstance(writer, str | Path):
            try:
                module = importlib.import_module("torch.utils.tensorboard")
            except ImportError as error:
                raise HeadscopeError("tensorboard= needs TensorBoard, which is not installed: pip install tensorboard") from error
            writer = module.SummaryWriter(str(writer))
        self.writer = writer

    def write(self, step: int, numbers: Mapping[str, float], report: HealthReport) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(PREFIX + name, value, global_step=step)
        for one in report.findings:
            if one.severity in ("warn", "alarm"):
                self.writer.add_text(PREFIX + "findings", f"{one.severity}: {one.rule} at {one.place}: {one.why}", global_step=step)
        self.writer.flush()


class WeightsAndBiases:
    """Scalars under `health/`, over a step of their own, `health/step`, so that nobody else's counting is disturbed.

    Args:
        run: a run; None for the one that is active when something is to be written, if there is one.
    """

    def __init__(self, run: Any = None) -> None:
        self.run = run
        self._told: set[int] = set()

    def write(self, step: int, numbers: Mapping[str, float], report: HealthReport) -> None:
        run = self.run if self.run is not None else getattr(sys.modules.get("wandb"), "run", None)
        if run is None:
            return
        if id(run) not in self._told:
            self._told.add(id(run))
            run.define_metric(PREFIX + "step")
            run.define_metric(PREFIX + "*", step_metric=PREFIX + "step")
        run.log({PREFIX + "step": step, **{PREFIX + name: value for name, value in numbers.items()}})


def weights_and_biases(asked: Any) -> WeightsAndBiases | None:
    """The outlet for what a user said.

    Args:
        asked: a run; True for the active one, which must be there; None for the active one, if any; False for none.

    Raises:
        HeadscopeError: True, and Weights & Biases is not installed or has no run.
    """
    if asked is False:
        return None
    if asked is True:
        try:
            active = importlib.import_module("wandb").run
        except ImportError as error:
            raise HeadscopeError("wandb=True needs Weights & Biases, which is not installed: pip install wandb") from error
        if active is None:
            raise HeadscopeError("wandb=True, but no run is active: call wandb.init() first, or give the run")
        return WeightsAndBiases(active)
    return WeightsAndBiases(asked)
