"""Edits that mix a value with something else: another run, its own statistics, noise. Letters: B batch, N heads, S tokens, D width."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interventions.ops import LINEAR_STAGES, Op, Patch, _number, _source
from headscope.interventions.source import Source
from headscope.kernels.errors import EditError
from headscope.probe.call import AttentionCall

STYLES = ("plain", "adain")


@dataclass(frozen=True, eq=False)
class Mix(Op):
    """own · value + other · what another run had there; with style "adain" the value takes on that run's mean and spread over tokens first.

    Attributes:
        source: the other run: a capture that kept this stage, or a tensor.
        other: its weight.
        own: the value's weight.
        style: `plain`: the other run's value itself. `adain`: the value, each channel brought to the mean and standard deviation that the
            other run has there (Huang & Belongie 2017; for attention, HAM, arXiv 2603.24043).
    """

    source: Source
    other: float
    own: float
    style: str = "plain"
    name: ClassVar[str] = "mix"
    stages: ClassVar[frozenset[str]] = LINEAR_STAGES | {"pattern"}

    @property
    def identity(self) -> bool:
        return self.other == 0.0 and self.own == 1.0

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        theirs = Patch(self.source).apply(value, call, stage)
        if self.style == "adain":
            theirs = _restyled(value, theirs)
        return self.own * value + self.other * theirs


@dataclass(frozen=True, eq=False)
class Noise(Op):
    """value + scale · standard deviation of the value · a standard normal, the same for the same seed, site and step.

    Attributes:
        scale: 1 adds as much noise as there is signal.
        keep: weight of the value itself; 0 with scale 1 replaces it by noise of its own size.
        seed: of the noise.
    """

    scale: float
    keep: float = 1.0
    seed: int = 0
    name: ClassVar[str] = "noise"
    stages: ClassVar[frozenset[str]] = LINEAR_STAGES

    @property
    def identity(self) -> bool:
        return self.scale == 0.0 and self.keep == 1.0

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        place = zlib.crc32(f"{self.seed} {call.site.name} {call.step} {stage}".encode())  # a generator looks at 32 bits
        generator = torch.Generator().manual_seed(place)
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
        spread = value.detach().float().std(dim=(2, 3), keepdim=True, correction=0).to(value.dtype)  # [B, N, 1, 1]
        return self.keep * value + self.scale * spread * drawn


def mix(source: Source, other: float, own: float | None = None, *, style: str = "plain") -> Mix:
    """Mix a stage with that of another run: own · value + other · theirs; `own` is 1 - other if left out.

    Raises:
        EditError: a weight that is no number, or an unknown style.
    """
    if style not in STYLES:
        raise EditError(f"mix(style={style!r}): the styles are {', '.join(STYLES)}")
    weight = _number("mix", "weight", other)
    return Mix(_source("mix", source), weight, 1.0 - weight if own is None else _number("mix", "weight", own), style)


def noise(scale: float, *, keep: float = 1.0, seed: int = 0) -> Noise:
    """Add normal noise, in units of the head's own standard deviation.

    Raises:
        EditError: a scale or weight that is no number, a seed that is no int.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 31:
        raise EditError(f"noise(seed={seed!r}): the seed is an int from 0 to {(1 << 31) - 1}")
    return Noise(_number("noise", "scale", scale), _number("noise", "weight of the value", keep), seed)


def _restyled(value: Tensor, style: Tensor) -> Tensor:
    """The value with the mean and spread over tokens of another, channel by channel."""
    wide, other = value.float(), style.float()
    spread = wide.std(dim=2, keepdim=True, correction=0)
    normal = (wide - wide.mean(dim=2, keepdim=True)) / spread.masked_fill(spread == 0, 1.0)
    return (normal * other.std(dim=2, keepdim=True, correction=0) + other.mean(dim=2, keepdim=True)).to(value.dtype)
