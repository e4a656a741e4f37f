"""Which edits are compared, and what is measured of the pictures that come of them.

A picture made with a moved map is compared with two: the unedited one of the same noise, and that one moved as the map was. Where it is
more like the second, it followed its map.

Shapes: N pictures or videos of F frames (a picture has one), 8 × 8 pixels, -1 paper and 1 ink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.interventions.warping import warp
from headscope.probe.attribution.interval import Interval, bootstrap
from headscope.probe.call import AttentionCall, AttentionSite

MOTIONS: tuple[tuple[str, float | None], ...] = (
    ("translate-x", 0.25), ("translate-x", 0.5), ("translate-y", 0.25), ("rotate", 90.0), ("rotate", 180.0), ("flip-h", None),
    ("flip-v", None), ("scale", 0.5), ("scale", 2.0), ("blur", 1.0), ("amplify", 0.0), ("amplify", 2.0), ("amplify", 5.0),
)  # fmt: skip
SPATIAL = ("translate-x", "translate-y", "rotate", "flip-h", "flip-v", "scale")
FOR_PARTS = (("translate-x", 0.5), ("flip-h", None), ("amplify", 0.0), ("amplify", 5.0))


@dataclass(frozen=True)
class Condition:
    """One edit: what, of which word, where, and whether rows are renormalised."""

    motion: str
    amount: float | None
    word: str = "subject"
    part: str = "everywhere"
    renormalise: bool = False

    @property
    def name(self) -> str:
        amount = "" if self.amount is None else f" {self.amount:g}"
        return f"{self.motion}{amount}, {self.word}, {self.part}{', renormalised' if self.renormalise else ''}"


def conditions(words: Sequence[str], parts: Sequence[str], quick: bool) -> list[Condition]:
    """All motions of the first word everywhere, with and without renormalising; some of the other words and of parts of the walk."""
    if quick:
        return [Condition(m, a, words[0], renormalise=r) for r in (False, True) for m, a in FOR_PARTS[::3]] + [
            Condition("flip-h", None, words[1], parts[0])
        ]
    some = FOR_PARTS
    found = [Condition(m, a, words[0], renormalise=r) for r in (False, True) for m, a in MOTIONS]
    found += [Condition(m, a, word, renormalise=r) for r in (False, True) for word in words[1:] for m, a in some]
    return found + [Condition(m, a, words[0], part, r) for r in (False, True) for part in parts for m, a in some]


def moved(pictures: Tensor, motion: str, amount: float | None) -> Tensor:
    """Pictures [N, F, 8, 8] moved as `warp` moves maps; paper comes in from outside."""
    site = AttentionSite("none", "none", 0, None, "cross", 1, 1, 1, 1, "sdpa")
    n, frames, side = pictures.shape[:3]
    ink = (pictures.clamp(-1, 1) + 1).reshape(n, 1, -1, 1)
    call = AttentionCall(site, 0, ink, ink, None)
    return warp(motion, amount, grid=(frames, side, side)).apply(ink, call, "pattern").reshape(pictures.shape) - 1


def centroids(pictures: Tensor) -> Tensor:
    """Row and column of the middle of the ink, pixels, mean over frames: [N, 2]."""
    ink = (pictures.clamp(-1, 1) + 1) / 2
    ink = ink * (ink > 0.25)  # what is left of noise on paper would pull everything to the middle
    places = torch.arange(pictures.shape[-1], dtype=ink.dtype)
    total = ink.sum((2, 3)).clamp_min(1e-6)
    both = [(ink.sum(3) * places).sum(2) / total, (ink.sum(2) * places).sum(2) / total]
    return torch.stack(both, -1).mean(1)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of the pixels of each picture with those of another, [N]."""
    a, b = (x.clamp(-1, 1).flatten(1).double() for x in (one, other))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)


def measure(before: Tensor, after: Tensor, kept: Sequence[bool], condition: Condition) -> dict[str, object]:
    """What an edit did, as plain values: intervals are bootstrapped over pictures.

    Args:
        before, after: [N, F, 8, 8], of the same noise.
        kept: whether each still shows what was asked for.
    """
    shift = centroids(after) - centroids(before)
    found: dict[str, object] = {
        "kept": interval([float(one) for one in kept]),
        "pixels": interval((after.clamp(-1, 1) - before.clamp(-1, 1)).abs().flatten(1).mean(1).tolist()),
        "down": interval(shift[:, 0].tolist()),
        "right": interval(shift[:, 1].tolist()),
        "like before": interval(correlation(after, before).tolist()),
        "ink": interval(((after.clamp(-1, 1) - before.clamp(-1, 1)) / 2).flatten(1).mean(1).tolist()),
    }
    if condition.motion in SPATIAL:
        target = moved(before, condition.motion, condition.amount)
        wanted = centroids(target) - centroids(before)
        found["like moved"] = interval(correlation(after, target).tolist())
        found["moved like before"] = interval(correlation(target, before).tolist())
        found["wanted down"], found["wanted right"] = float(wanted[:, 0].mean()), float(wanted[:, 1].mean())
    return found


def interval(values: Sequence[float]) -> dict[str, object]:
    found: Interval = bootstrap(list(values))
    return found.to_dict()
