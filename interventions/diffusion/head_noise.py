"""Noise in place of what heads write, at image tokens that point where an anchor does (UVR, arXiv 2606.06875).

    z ← κ z + ν σ ε        where cos(z, anchor) is above a threshold

Letters: H heads, V width of z. σ is the head's own standard deviation, ε standard normal. The paper looks at one layer for its mask
and adds noise of size 1 in all; here every layer has anchors and a mask of its own, so that no layer waits for another,
and noise is as large as the signal, whatever the model's scale. As released, the paper's code does nothing: its anchors are None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from headscope.interventions.edit import Edit
from headscope.interventions.gates import cosine
from headscope.interventions.mixing import noise
from headscope.interventions.plan import Plan
from headscope.interventions.positions import Role
from headscope.interventions.select import IndicesLike, select
from headscope.interventions.source import Kept
from headscope.kernels.errors import EditError, ShapeError


def find_anchors(unsafe: Kept, safe: Kept | None = None, *, queries: Iterable[int] | None = None) -> dict[str, Tensor]:
    """For each site the mean direction of z, [H, V], over samples, tokens and steps; less that of a safe run where one is given.

    Args:
        unsafe, safe: captures that kept z.
        queries: positions of the image tokens; all if left out.
    """
    places = None if queries is None else list(queries)

    def mean(run: Kept, site: str) -> Tensor:
        steps = [run.z(site=site, step=step) for step in run.steps(site)]
        chosen = [z if places is None else z[:, :, places] for z in steps]
        return torch.stack([torch.nn.functional.normalize(z.float(), dim=-1).mean((0, 2)) for z in chosen]).mean(0)

    found = {}
    for site in unsafe.sites:
        anchor = mean(unsafe, site.name)
        found[site.name] = anchor if safe is None else anchor - mean(safe, site.name)
    return found


def noise_heads(
    anchors: Mapping[str, Tensor], *, threshold: float = 0.6, amount: float = 0.999, keep: float = 0.001, seed: int = 0,
    queries: IndicesLike | Role | None = None, **where: Any,
) -> Plan:  # fmt: skip
    """One edit a site: noise where z points as the anchor does.

    Args:
        anchors: by site name, [V], or one a head [H, V].
        threshold: of the cosine.
        amount, keep: ν and κ; the paper's .999 and .001.
        seed: of the noise.
        queries: the image tokens: positions or `role("image")`.
        where: further conditions of `select`, such as `steps=…`, `timesteps=(850, 1000)`.

    Raises:
        EditError: no anchors.
        ShapeError: an anchor of another form.
    """
    if not anchors:
        raise EditError("anchors is empty: give a direction for each site, such as find_anchors(capture) finds")
    for site, anchor in anchors.items():
        if anchor.ndim not in (1, 2):
            raise ShapeError(f"the anchor of {site} is {list(anchor.shape)}: give [width], or one a head, [heads, width]")
    return Plan(
        Edit("z", noise(amount, keep=keep, seed=seed), select(sites=site, queries=queries, **where), cosine(anchor, threshold))
        for site, anchor in anchors.items()
    )
