"""Plans that take heads away: their output set to zero, to its mean, or to what it is on another input.

Letters: H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from headscope.interventions.edit import Edit
from headscope.interventions.language.head_sets import Removal, mean_outputs
from headscope.interventions.language.prompts import Prompts, samples_of, sites_of
from headscope.interventions.ops import patch
from headscope.interventions.plan import Plan
from headscope.interventions.select import select
from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.call import AttentionSite
from headscope.probe.capture import Capture
from headscope.probe.interception import intercept
from headscope.probe.keep import Keep

LayerHead = tuple[int, int]


def ablate_heads(
    model: nn.Module, heads: Sequence[LayerHead], inputs: Prompts, how: str = "zero", *, kind: str | None = None
) -> Plan:  # fmt: skip
    """A plan that takes heads away, to be switched on by `plan.on(model)`.

    Args:
        model: whose heads.
        heads: (layer, head).
        inputs: what the means are taken over, or whose output a head gets; for `zero` any input, to find the sites with.
        how: `zero`; `mean`, over all samples and positions of `inputs`; `resample`, the output on `inputs`, which must have the shape of
            what the plan is then used on.
        kind: `self` or `cross`, where a layer has both.

    Raises:
        InputError: an unknown way, or nothing to take means over.
        SelectionError: no such head, or several sites in its layer.
    """
    if how not in ("zero", "mean", "resample"):
        raise InputError(f"how={how!r}: choose zero, mean or resample")
    samples = samples_of(inputs, "inputs")
    sites = sites_of(model, samples[0])
    places = [(site_at(sites, layer, kind).name, head) for layer, head in heads]
    if how == "zero":
        return Removal("zero").plan(places)
    if how == "mean":
        return Removal("mean", means=mean_outputs(model, samples)).plan(places)
    whole: Any = inputs if not isinstance(inputs, Sequence) else inputs[0]
    if isinstance(inputs, Sequence) and len(inputs) != 1:
        raise InputError(f"{len(inputs)} batches to resample from: give the one that the plan is to take from")
    seen = Capture(Keep(z=True), sites=sorted({name for name, _ in places}))
    with torch.no_grad(), intercept(model, seen):
        model(**whole)
    return Plan([Edit("z", patch(seen), select(sites=name, head=head)) for name, head in places])


def site_at(sites: Sequence[AttentionSite], layer: int, kind: str | None = None) -> AttentionSite:
    """The site of a layer.

    Raises:
        SelectionError: there is none, or more than one.
    """
    found = [site for site in sites if site.layer == layer and kind in (None, site.kind)]
    if len(found) != 1:
        layers = sorted({site.layer for site in sites if site.layer is not None})
        what = f"no attention in layer {layer}; the layers are {layers}" if not found else f"several sites in layer {layer}"
        raise SelectionError(f"{what}{'' if not found else ': ' + ', '.join(site.name for site in found) + '; say which kind='}")
    return found[0]
