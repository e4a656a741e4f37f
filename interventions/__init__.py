"""CHANGE: the vocabulary of edits to attention, and plans made of them.

plan = Plan([Edit("z", scale(0.0), select(layer=3, head=5))])
with plan.on(model):
    model(**inputs)
"""

if __name__ != "headscope.interventions":
    raise ImportError("import headscope.interventions, not interventions: the folder is mapped to that name by the installed package")

from headscope.interventions import gates
from headscope.interventions.difference import PlanDifference
from headscope.interventions.edit import Edit
from headscope.interventions.evaluation import Evaluation, evaluate
from headscope.interventions.gates import Gate
from headscope.interventions.injection import inject
from headscope.interventions.mixing import mix, noise
from headscope.interventions.normaliser import sinkhorn
from headscope.interventions.ops import add, assign, bias, call, freeze, mask, patch, renorm, scale
from headscope.interventions.plan import Plan
from headscope.interventions.positions import Role, Span, grid, role, span
from headscope.interventions.roles import find_roles
from headscope.interventions.rotary import band, phase, reposition
from headscope.interventions.saferope.examples import Prompted
from headscope.interventions.saferope.saferope import SafeRoPE
from headscope.interventions.select import Selector, select
from headscope.interventions.separation import separate
from headscope.interventions.subspace import project, rotate
from headscope.interventions.warping import warp

__all__ = [
    "Edit",
    "Evaluation",
    "Gate",
    "Plan",
    "PlanDifference",
    "Prompted",
    "Role",
    "SafeRoPE",
    "Selector",
    "Span",
    "add",
    "assign",
    "band",
    "bias",
    "call",
    "evaluate",
    "find_roles",
    "freeze",
    "gates",
    "grid",
    "inject",
    "mask",
    "mix",
    "noise",
    "patch",
    "phase",
    "project",
    "renorm",
    "reposition",
    "role",
    "rotate",
    "scale",
    "select",
    "separate",
    "sinkhorn",
    "span",
    "warp",
]
