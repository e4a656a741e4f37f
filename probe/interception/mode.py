"""The function mode of a thread: it hands every torch call to the tracker while any session is open.

One mode serves all sessions of its thread. Sessions may be left in any order, so the mode is taken off the stack wherever it
stands, and whatever stands above it is put back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from headscope.probe.interception.session import Session
from headscope.probe.interception.tracker import Tracker

_local = threading.local()


class Watch(TorchFunctionMode):
    """See the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[Session] = []
        self.tracker = Tracker(self)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.tracker.dispatch(func, args, kwargs or {})

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Run another thread's torch calls under this mode, while the mode's own thread waits for it."""
        _push(self)
        try:
            yield
        finally:
            _remove(self)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let torch calls of this thread pass unseen: those of an edit in a hook are none of the model's."""
        modes = _unstacked()
        for mode in modes:
            if mode is not self:
                _push(mode)
        try:
            yield
        finally:
            _unstacked()
            for mode in modes:
                _push(mode)


def current_tracker() -> Tracker | None:
    """The tracker of this thread, while it watches anything."""
    found: Watch | None = getattr(_local, "watch", None)
    return None if found is None else found.tracker


@contextmanager
def watch(session: Session) -> Iterator[None]:
    """Let the thread's function mode work for a session."""
    current: Watch | None = getattr(_local, "watch", None)
    if current is None:
        current = _local.watch = Watch()
        _push(current)
    current.sessions.append(session)
    session.watch = current
    try:
        yield
    finally:
        current.sessions.remove(session)
        if not current.sessions:
            _remove(current)
            _local.watch = None


@contextmanager
def beneath(mode: TorchFunctionMode) -> Iterator[None]:
    """Let a mode see the torch calls of this thread after all others have: the watch and its edits come first."""
    for one in (mode, *_unstacked()):
        _push(one)
    try:
        yield
    finally:
        _remove(mode)


def _unstacked() -> list[TorchFunctionMode]:
    """All modes of the thread, the outermost first, taken off the stack."""
    held: list[TorchFunctionMode] = []
    while torch._C._len_torch_function_stack() > 0:
        held.append(torch.overrides._pop_mode())  # type: ignore[no-untyped-call]
    return held[::-1]


def _push(mode: TorchFunctionMode) -> None:
    torch.overrides._push_mode(mode)  # type: ignore[no-untyped-call]


def _remove(mode: TorchFunctionMode) -> None:
    held = []
    while torch._C._len_torch_function_stack() > 0:
        top = torch.overrides._pop_mode()  # type: ignore[no-untyped-call]
        if top is mode:
            break
        held.append(top)
    for other in reversed(held):
        _push(other)
