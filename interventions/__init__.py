"""CHANGE: the vocabulary of edits to attention, and plans made of them.

plan = Plan([Edit("z", scale(0.0), select(layer=3, head=5))])
with plan.on(model):
    model(**inputs)
"""

if __name__ != "headscope.interventions":
    raise ImportError("import headscope.interventions, not interventions: the folder is mapped to that name by the installed package")

from headscope.interventions.edit import Edit
from headscope.interventions.ops import add, assign, bias, call, freeze, mask, patch, renorm, scale
from headscope.interventions.plan import Plan
from headscope.interventions.select import Selector, Span, select, span

__all__ = [
    "Edit",
    "Plan",
    "Selector",
    "Span",
    "add",
    "assign",
    "bias",
    "call",
    "freeze",
    "mask",
    "patch",
    "renorm",
    "scale",
    "select",
    "span",
]
