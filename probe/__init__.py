if __name__ != "headscope.probe":
    raise ImportError("import headscope.probe, not probe: the folder is mapped to that name by the installed package")

from headscope.kernels.errors import (
    BudgetError,
    ClosedError,
    EditError,
    HeadscopeError,
    InputError,
    ModelError,
    NonFiniteError,
    NotIntercepted,
    RecipeError,
    SelectionError,
    ShapeError,
    StoreError,
)
from headscope.probe.call import AttentionCall, AttentionSite, Handler
from headscope.probe.capture import Capture
from headscope.probe.keep import Keep
from headscope.probe.models import load
from headscope.probe.probe import Probe

__all__ = [
    "AttentionCall",
    "AttentionSite",
    "BudgetError",
    "Capture",
    "ClosedError",
    "EditError",
    "Handler",
    "HeadscopeError",
    "InputError",
    "Keep",
    "ModelError",
    "NonFiniteError",
    "NotIntercepted",
    "Probe",
    "RecipeError",
    "SelectionError",
    "ShapeError",
    "StoreError",
    "load",
]
