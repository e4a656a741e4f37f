if __name__ != "headscope.probe":
    raise ImportError("import headscope.probe, not probe: the folder is mapped to that name by the installed package")

from headscope.kernels.errors import (
    AttributionError,
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
from headscope.probe.atlas.atlas import HeadAtlas
from headscope.probe.atlas.chart import chart_heads
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.faithfulness import measure_faithfulness
from headscope.probe.attribution.heads import rank_heads
from headscope.probe.attribution.target import Target, contrast, generated
from headscope.probe.call import AttentionCall, AttentionSite, Handler
from headscope.probe.capture import Capture
from headscope.probe.health.compare import compare_health
from headscope.probe.health.measure import measure_health
from headscope.probe.health.monitor import HealthMonitor
from headscope.probe.health.report import HealthReport
from headscope.probe.keep import Keep
from headscope.probe.models import load
from headscope.probe.probe import Probe

__all__ = [
    "AttentionCall",
    "AttentionSite",
    "Attribution",
    "AttributionError",
    "BudgetError",
    "Capture",
    "ClosedError",
    "EditError",
    "Handler",
    "HeadAtlas",
    "HeadscopeError",
    "HealthMonitor",
    "HealthReport",
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
    "Target",
    "attribute",
    "chart_heads",
    "compare_health",
    "contrast",
    "generated",
    "load",
    "measure_faithfulness",
    "measure_health",
    "rank_heads",
]
