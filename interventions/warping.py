"""Edits of the pattern as a picture: what one key (a word) receives from the tokens of an image or video, moved, turned, blurred.

Letters: B batch, N selected heads, Q queries on a grid of F frames × Y rows × X columns, K keys.

The operations are those of AttentionBender (arXiv 2604.20936): each frame's map of each selected key is changed by a 2-D operation, after
the softmax. Without `renorm()` after it, rows no longer sum to 1, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from headscope.interventions.ops import Op, _number
from headscope.kernels.errors import EditError, ShapeError
from headscope.probe.call import AttentionCall

MOTIONS = ("scale", "rotate", "translate-x", "translate-y", "flip-h", "flip-v", "blur", "sharpen", "amplify")
PADS = ("zeros", "border", "reflection")
PLAIN = {"scale": 1.0, "rotate": 0.0, "translate-x": 0.0, "translate-y": 0.0, "blur": 0.0, "sharpen": 0.0, "amplify": 1.0}


@dataclass(frozen=True, eq=False)
class Warp(Op):
    """strength · g(map) + (1 - strength) · map, for every frame's map of every selected key.

    Attributes:
        motion: one of `MOTIONS`.
        amount: a factor for scale and amplify, degrees for rotate, a share of the picture for translate, cells for blur, a weight for
            sharpen; nothing for flips.
        grid: (rows, columns) or (frames, rows, columns).
        offset: queries that stand before the grid.
        strength: how much of the changed map.
        pad: what comes in from outside: `zeros`, `border` or `reflection`.
    """

    motion: str
    amount: float
    grid: tuple[int, ...]
    offset: int = 0
    strength: float = 1.0
    pad: str = "zeros"
    name: ClassVar[str] = "warp"
    stages: ClassVar[frozenset[str]] = frozenset({"pattern"})

    @property
    def identity(self) -> bool:
        return self.strength == 0.0 or (self.motion in PLAIN and self.amount == PLAIN[self.motion])

    def apply(self, value: Tensor, call: AttentionCall, stage: str) -> Tensor:
        size = math.prod(self.grid)
        if self.offset + size > value.shape[2]:
            raise ShapeError(
                f"{self} at {call.site.name}: a grid of {'×'.join(map(str, self.grid))} = {size} tokens after {self.offset}, "
                f"and the call has {value.shape[2]} queries"
            )
        batch, heads, _, keys = value.shape
        rows, columns = self.grid[-2:]
        inside = value[:, :, self.offset : self.offset + size]
        maps = inside.mT.reshape(-1, 1, rows, columns)  # [B·N·K·F, 1, Y, X]
        moved = self.strength * self._moved(maps.float()) + (1 - self.strength) * maps
        back = moved.reshape(batch, heads, keys, size).mT.to(value.dtype)
        return torch.cat([value[:, :, : self.offset], back, value[:, :, self.offset + size :]], dim=2)

    def _moved(self, maps: Tensor) -> Tensor:
        if self.motion == "amplify":
            return maps * self.amount
        if self.motion in ("flip-h", "flip-v"):
            return maps.flip(3 if self.motion == "flip-h" else 2)
        if self.motion in ("blur", "sharpen"):
            soft = _blurred(maps, self.amount if self.motion == "blur" else 1.0)
            return soft if self.motion == "blur" else (maps + self.amount * (maps - soft)).clamp_min(0.0)
        return self._resampled(maps)

    def _resampled(self, maps: Tensor) -> Tensor:
        """Bilinear, around the middle of the picture, in cells that are square."""
        rows, columns = maps.shape[-2:]
        angle = math.radians(self.amount) if self.motion == "rotate" else 0.0
        zoom = 1 / self.amount if self.motion == "scale" else 1.0
        ratio = rows / columns
        right = -2 * self.amount if self.motion == "translate-x" else 0.0  # where the picture is looked up moves the other way
        down = -2 * self.amount if self.motion == "translate-y" else 0.0
        matrix = maps.new_tensor(
            [
                [zoom * math.cos(angle), zoom * math.sin(angle) * ratio, right],
                [-zoom * math.sin(angle) / ratio, zoom * math.cos(angle), down],
            ]
        )
        places = functional.affine_grid(matrix.expand(len(maps), 2, 3), list(maps.shape), align_corners=False)
        return functional.grid_sample(maps, places, mode="bilinear", padding_mode=self.pad, align_corners=False)


def warp(
    motion: str, amount: float | None = None, *, grid: Sequence[int], offset: int = 0, strength: float = 1.0, pad: str = "zeros"
) -> Warp:
    """Change the map that each selected key receives from the tokens of a picture; see `Warp`.

    Raises:
        EditError: an unknown motion or padding, an amount that it cannot take, a grid that is none.
    """
    if motion not in MOTIONS:
        raise EditError(f"warp({motion!r}): the motions are {', '.join(MOTIONS)}")
    if pad not in PADS:
        raise EditError(f"warp(pad={pad!r}): the ways to pad are {', '.join(PADS)}")
    if (amount is None) == (motion in PLAIN):
        raise EditError(f"warp({motion!r}, {amount!r}): " + ("give an amount" if motion in PLAIN else "a flip takes no amount"))
    number = 0.0 if amount is None else _number("warp", "amount", amount)
    if (motion == "scale" and number <= 0) or (motion in ("blur", "sharpen", "amplify") and number < 0):
        raise EditError(
            f"warp({motion!r}, {amount!r}): give {'a positive number' if motion == 'scale' else 'a number that is not negative'}"
        )
    shape = tuple(grid)
    if len(shape) not in (2, 3) or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in shape):
        raise EditError(f"warp(grid={grid!r}): give (rows, columns) or (frames, rows, columns), each at least 1")
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise EditError(f"warp(offset={offset!r}): give how many tokens stand before the grid, 0 or more")
    return Warp(motion, number, shape, offset, _number("warp", "strength", strength), pad)


def _blurred(maps: Tensor, spread: float) -> Tensor:
    """A Gaussian of that standard deviation, in cells; the edge is continued."""
    if spread == 0:
        return maps
    for axis in (2, 3):
        reach = max(1, min(math.ceil(3 * spread), maps.shape[axis] - 1)) if maps.shape[axis] > 1 else 0
        if not reach:
            continue
        places = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
        weights = torch.exp(-places.square() / (2 * spread * spread))
        weights = weights / weights.sum()
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        maps = functional.conv2d(functional.pad(maps, padding, mode="replicate"), weights.reshape(shape))
    return maps
