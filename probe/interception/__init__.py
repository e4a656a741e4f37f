"""Catching attention: one mechanism for every model; see `session`, `mode` and `tracker`."""

from headscope.probe.interception.session import Session, check_model, intercept

__all__ = ["Session", "check_model", "intercept"]
