"""Losses on attention for those who fine-tune."""

from headscope.interventions.losses.kept_run import Run, keep_run
from headscope.interventions.losses.losses import AttentionLoss, LossValue

__all__ = [
    "AttentionLoss",
    "LossValue",
    "Run",
    "keep_run",
]
