"""Entering the watch over a model: the one way in for captures, plans and attribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from headscope.kernels.errors import NotIntercepted
from headscope.probe.call import Handler
from headscope.probe.interception import flex, graph, outside, projections
from headscope.probe.interception.mode import watch
from headscope.probe.interception.session import Session, session_of


def check_model(model: object) -> nn.Module:
    """The module itself, if it can be watched at all."""
    if not isinstance(model, nn.Module):
        inner = [name for name, value in vars(model).items() if isinstance(value, nn.Module)] if hasattr(model, "__dict__") else []
        hint = f": pass one of its modules ({', '.join(inner[:6])})" if inner else ""
        raise NotIntercepted(f"expected a torch.nn.Module, got {type(model).__name__}{hint}")
    return model


@contextmanager
def intercept(model: nn.Module, handler: Handler, strict: bool = True) -> Iterator[Session]:
    """Show every attention call of `model` in this thread to `handler` while the block runs.

    Scopes on one model nest and may be left in any order. On leaving, also by an exception, the model is as it was.

    Args:
        model: any nn.Module.
        handler: see `headscope.probe.call.Handler`.
        strict: raise when attention-like operations were seen but not caught, or when nothing was caught at all.

    Raises:
        NotIntercepted: see `strict`; also for a call from a thread that did not enter.
    """
    check_model(model)
    session = session_of(model)
    if session is None:
        session = Session(model)
        session.open(flex.patched(), graph.watched(session), watch(session))
    entry = session.add(handler, strict)
    try:
        if handler.changes:
            projections.install(session, handler, entry.undo)
            outside.install(session, handler, entry.undo)
        yield session
        if session.depth == 0:
            session.settle()
        session.check_ran(entry)
    finally:
        session.drop(entry)
