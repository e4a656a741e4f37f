"""What a plan does, what it does beside that, and what it costs: measured on examples."""

from headscope.interventions.evaluation.evaluate import evaluate
from headscope.interventions.evaluation.evaluation import Evaluation

__all__ = [
    "Evaluation",
    "evaluate",
]
