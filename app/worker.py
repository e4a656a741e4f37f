"""One thread that owns the model; everything that touches model or captures runs there, one job at a time.

Jobs in the same lane supersede each other: of those that wait only the newest survives, and the one that runs is told to
stop at the next layer. Urgent jobs (pictures of runs that are already there) go before forward passes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

Result = TypeVar("Result")


class Superseded(Exception):
    """A newer job of the same lane took this one's place."""


@dataclass(eq=False)
class Ticket:
    """What a running job sees of the outside: whether to go on, and where to say how far it is."""

    lane: str | None = None
    progress: str = "waiting for the model"
    cancelled: threading.Event = field(default_factory=threading.Event)

    def report(self, progress: str) -> None:
        """Say how far the job is; raises `Superseded` when nobody waits for it any more."""
        if self.cancelled.is_set():
            raise Superseded
        self.progress = progress


@dataclass(eq=False)
class _Job:
    work: Callable[[Ticket], Any]
    ticket: Ticket
    future: Future[Any]


class Worker:
    """The thread. `start` runs in it first, before any job."""

    def __init__(self, start: Callable[[], None] | None = None) -> None:
        self._condition = threading.Condition()
        self._urgent: deque[_Job] = deque()
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._loop, args=(start,), name="headscope-model", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Ticket], Result], *, lane: str | None = None) -> tuple[Future[Result], Ticket]:
        """Queue a job. Without a lane it is urgent and nothing supersedes it."""
        job = _Job(work, Ticket(lane), Future())
        with self._condition:
            if self._closed:
                raise RuntimeError("the worker is closed")
            if lane is None:
                self._urgent.append(job)
            else:
                for old in [old for old in self._waiting if old.ticket.lane == lane]:
                    self._waiting.remove(old)
                    _drop(old)
                if self._running is not None and self._running.ticket.lane == lane:
                    self._running.ticket.cancelled.set()
                self._waiting.append(job)
            self._condition.notify()
        return job.future, job.ticket

    def close(self) -> None:
        """Finish the running job, drop the rest, end the thread."""
        with self._condition:
            self._closed = True
            for job in (*self._urgent, *self._waiting):
                _drop(job)
            self._urgent.clear()
            self._waiting.clear()
            if self._running is not None:
                self._running.ticket.cancelled.set()
            self._condition.notify()
        self._thread.join(timeout=10)

    def _loop(self, start: Callable[[], None] | None) -> None:
        if start is not None:
            start()
        while True:
            with self._condition:
                while not (self._urgent or self._waiting or self._closed):
                    self._condition.wait()
                if self._closed:
                    return
                job = (self._urgent or self._waiting).popleft()
                self._running = job
            if not job.future.set_running_or_notify_cancel():  # whoever asked has gone
                continue
            try:
                result = job.work(job.ticket)
            except BaseException as error:  # handed to whoever waits; the thread must outlive any job
                job.future.set_exception(error)
            else:
                job.future.set_result(result)
            with self._condition:
                self._running = None


def _drop(job: _Job) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(Superseded())
