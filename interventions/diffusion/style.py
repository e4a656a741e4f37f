"""Style mixing between parallel runs (HAM, arXiv 2603.24043): the structure of one run, the statistics and the words of another.

Letters: B samples, G heads, S tokens, D width.

    self-attention     q, k, v ← α · AdaIN(content's, style's) + (1 - α) · own
    cross-attention    k, v ← τ · style's + (1 - τ) · own          q ← β · content's + (1 - β) · own

AdaIN brings each channel of the content's tokens to the mean and standard deviation that the style's have. α = β = τ = 0 changes nothing to
the bit. The paper has τ = 1; its start from noised structure (SINI) is no edit of attention and not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.interventions.edit import Edit
from headscope.interventions.mixing import mix
from headscope.interventions.plan import Plan
from headscope.interventions.select import select
from headscope.interventions.source import Kept
from headscope.kernels.errors import EditError, ShapeError
from headscope.probe.call import AttentionSite

PRECISION = 1e-5  # what a channel's variance is raised by, so that a constant channel stays finite


@dataclass(frozen=True, eq=False)
class Restyled:
    """A run whose q, k, v are the content's with the style's statistics over tokens, made when they are read.

    Attributes:
        content, style: captures that kept q, k and v.
        tokens: over which of the tokens; None: all.
    """

    content: Kept
    style: Kept
    tokens: tuple[int, ...] | None = None

    @property
    def sites(self) -> Iterable[AttentionSite]:
        return self.content.sites

    def steps(self, site: str) -> Iterable[int]:
        return self.content.steps(site)

    def q(self, *, site: str, step: int) -> Tensor:
        return self._mixed(self.content.q(site=site, step=step), self.style.q(site=site, step=step), site)

    def k(self, *, site: str, step: int) -> Tensor:
        return self._mixed(self.content.k(site=site, step=step), self.style.k(site=site, step=step), site)

    def v(self, *, site: str, step: int) -> Tensor:
        return self._mixed(self.content.v(site=site, step=step), self.style.v(site=site, step=step), site)

    def z(self, *, site: str, step: int) -> Tensor:
        raise EditError("a restyled run has q, k and v alone")

    def scores(self, *, site: str, step: int) -> Tensor:
        raise EditError("a restyled run has q, k and v alone")

    def pattern(self, *, site: str, step: int) -> Tensor:
        raise EditError("a restyled run has q, k and v alone")

    def _mixed(self, content: Tensor, style: Tensor, site: str) -> Tensor:
        if content.shape[1] != style.shape[1] or content.shape[3] != style.shape[3] or style.shape[0] not in (1, content.shape[0]):
            raise ShapeError(f"{site}: content {list(content.shape)} and style {list(style.shape)} differ in more than their tokens")
        if self.tokens is None:
            return adain(content, style)
        places = list(self.tokens)
        return content.index_copy(2, torch.tensor(places, device=content.device), adain(content[:, :, places], style[:, :, places]))


def adain(content: Tensor, style: Tensor) -> Tensor:
    """The content with the style's mean and standard deviation over tokens, channel by channel (Huang and Belongie 2017).

    Args:
        content: [B, G, S, D].
        style: [B or 1, G, S', D].
    """
    own, other = content.float() if content.element_size() < 4 else content, style.float() if style.element_size() < 4 else style
    spread, mean = torch.var_mean(own, dim=2, keepdim=True, correction=0)
    wanted, middle = torch.var_mean(other, dim=2, keepdim=True, correction=0)
    normal = (own - mean) / (spread + PRECISION).sqrt()
    return (normal * (wanted + PRECISION).sqrt() + middle).to(content.dtype)


def mix_style(
    content: Kept, style: Kept, *, alpha: float, beta: float, words: float = 1.0, image: Sequence[int] | None = None, **where: Any
) -> Plan:
    """The plan for a third run, from captures of a content run and a style run that kept q, k and v: `Keep(qk=True, v=True)`.

    The runs need the same steps and pictures of one size. Sites without both kinds of attention are served by the half that they have.

    Args:
        content, style: the captures; the style's batch may be 1.
        alpha: α, how much of the restyled content in self-attention.
        beta: β, how much of the content's queries in cross-attention.
        words: τ, how much of the style's keys and values in cross-attention.
        image: in joint attention, positions of the image tokens, which are mixed as self-attention is; its text is left alone. None: joint
            attention is left alone.
        where: further conditions of `select`, such as `layers=…`, `steps=…`.

    Raises:
        EditError: captures of no self-, cross- or (with image) joint attention, a weight that is no number, or a `kind` given.
    """
    if "kind" in where or "queries" in where or "keys" in where:
        raise EditError("mix_style() chooses kinds and positions itself: narrow it with sites=, layers=, heads=, steps=")
    kinds = {site.kind for site in content.sites}
    restyled = Restyled(content, style)
    edits = []
    if "self" in kinds and image is None:
        edits += [Edit(stage, mix(restyled, alpha), select(kind="self", **where)) for stage in "qkv"]
    if "cross" in kinds:
        edits.append(Edit("q", mix(content, beta), select(kind="cross", **where)))
        edits += [Edit(stage, mix(style, words), select(kind="cross", **where)) for stage in "kv"]
    if image is not None:
        places = tuple(int(place) for place in image)
        joint = Restyled(content, style, places)
        for kind in sorted(kinds & {"joint", "self"}):  # a block that joined its streams before shows as self-attention
            edits.append(Edit("q", mix(joint, alpha), select(kind=kind, queries=places, **where)))
            edits += [Edit(stage, mix(joint, alpha), select(kind=kind, keys=places, **where)) for stage in "kv"]
    if not edits:
        raise EditError(
            f"the content run kept {', '.join(sorted(kinds)) or 'no'} attention: give self- or cross-attention, or image= for joint"
        )
    return Plan(edits)
