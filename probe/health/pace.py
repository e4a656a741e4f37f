"""How often a training run can be measured so that measuring takes no more than a share of its time."""

from __future__ import annotations

from headscope.kernels.errors import InputError

DIGITS = (1, 2, 5)


class Pace:
    """Says at which steps to measure, and what it has cost so far.

    With `every`, at its multiples. Without, at the first step, and then at multiples of 1, 2, 5, 10, 20, 50, … steps, the smallest
    interval at which a measurement as long as the last one takes at most `share` of the time of training; and never before all
    measurements together take at most that. So the promise holds from 1 / share times the first measurement on, whatever the model, the
    probe batch and the machine, and the steps are still round ones. A fixed interval could promise nothing.

    Attributes:
        every: steps between measurements; None: found out.
        share: of the time of training that measuring may take.
        spent: seconds that measuring took.
        last: seconds of the last measurement.
    """

    def __init__(self, every: int | None, share: float) -> None:
        """Raises InputError for an interval below 1, or a share that is none."""
        if every is not None and every < 1:
            raise InputError(f"every={every}: give the number of steps between measurements, 1 or more, or None to find one")
        if not 0 < share <= 1:
            raise InputError(f"share={share}: give the share of the training time that measuring may take, such as 0.02")
        self.every, self.share = every, share
        self.spent = self.last = 0.0
        self._began: float | None = None
        self._now = 0.0
        self._first = 0
        self._step = 0
        self._measured: int | None = None

    def due(self, step: int, now: float) -> bool:
        """Whether to measure at this step; asked once a step.

        Args:
            now: seconds, of a clock that only goes forward.
        """
        if self._began is None:
            self._began, self._first = now, step
        self._now, self._step = now, step
        if step == self._measured:
            return False
        if self.every is not None:
            return step % self.every == 0
        if self._measured is None:
            return True
        return step % self.interval == 0 and self.spent + self.last <= self.share * self.trained

    def paid(self, step: int, seconds: float) -> None:
        """A measurement at this step took so long."""
        self._measured, self.last = step, seconds
        self.spent += seconds
        self._now += seconds

    @property
    def trained(self) -> float:
        """Seconds since the first step that were not spent measuring, up to the last step."""
        return 0.0 if self._began is None else max(0.0, self._now - self._began - self.spent)

    @property
    def overhead(self) -> float:
        """Seconds measuring over seconds training; inf while nothing but measuring was done, 0 while nothing was."""
        return self.spent / self.trained if self.trained else float("inf") if self.spent else 0.0

    @property
    def interval(self) -> int:
        """Steps between measurements as things stand."""
        if self.every is not None:
            return self.every
        steps = self._step - self._first
        if steps < 1 or not self.trained:
            return 1
        return round_above(self.last / (self.share * self.trained / steps))


def round_above(number: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that is not below a number."""
    scale = 1
    while True:
        for digit in DIGITS:
            if digit * scale >= number:
                return digit * scale
        scale *= 10
