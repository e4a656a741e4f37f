"""Catching attention: one mechanism for every model; see `intercept`, `session` and `tracker`."""

from headscope.probe.interception.intercept import check_model, intercept
from headscope.probe.interception.session import Session

__all__ = ["Session", "check_model", "intercept"]
