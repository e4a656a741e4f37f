"""AttentionBender (arXiv 2604.20936): what a word receives from the tokens of a picture or video, moved, turned, mirrored or amplified.

The paper changes the pattern after the softmax and, by default, does not renormalise: rows then sum to more or less than 1, and
each z grows or shrinks with them. With `renormalise` rows sum to 1 again; amplifying is then a bias of the scores, log(amount), as
far as every query is amplified alike. The paper shows pictures and calls what it sees "highly entangled": it measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from headscope.interventions.edit import Edit
from headscope.interventions.ops import renorm
from headscope.interventions.plan import Plan
from headscope.interventions.positions import Role, Span
from headscope.interventions.select import IndicesLike, select
from headscope.interventions.warping import warp


def bend(
    motion: str, amount: float | None = None, *, grid: Sequence[int], tokens: IndicesLike | Span | Role | None = None, offset: int = 0,
    region: Sequence[int] | None = None, strength: float = 1.0, pad: str = "zeros", renormalise: bool = False,
    sites: str | Sequence[str] | None = None, kind: str | None = None, layers: IndicesLike | None = None,
    heads: IndicesLike | None = None, steps: IndicesLike | None = None, timesteps: tuple[float, float] | None = None,
    branch: str | None = None,
) -> Plan:  # fmt: skip
    """A plan that bends the maps of words; `Plan([*bend(...), *bend(...)])` bends them twice.

    An amount that changes nothing (a turn by 0, a scale of 1) leaves the model to the bit, renormalised or not.

    Args:
        motion, amount, strength, pad: as in `warp`: `scale`, `rotate`, `translate-x`, `translate-y`, `flip-h`, `flip-v`, `blur`, `sharpen`,
            `amplify`.
        grid: (rows, columns) or (frames, rows, columns) of image tokens; frames are changed one by one.
        tokens: keys of the words: positions, `role("text")` or a span. All keys if left out, which in joint attention includes the image's.
        offset: queries that stand before the image, such as the text of Flux.
        region: image queries whose rows alone take on the new map, as `grid(shape, rows=…, columns=…)` of the vocabulary counts them, with
            the same offset. The map is moved as a whole, then cut.
        renormalise: divide each row by its sum afterwards. The paper's default does not.
        sites, kind, layers, heads, steps, timesteps, branch: where, as in `select`.

    Raises:
        EditError: an unknown motion, an amount that it cannot take, a grid that is none.
        SelectionError: a malformed selection.
    """
    op = warp(motion, amount, grid=grid, offset=offset, strength=strength, pad=pad)
    places = {"kind": kind, "layers": layers, "heads": heads, "steps": steps, "timesteps": timesteps, "branch": branch}
    edits = [Edit("pattern", op, select(sites, queries=region, keys=tokens, **places))]  # type: ignore[arg-type]
    if renormalise and not op.identity:
        rows = range(offset, offset + math.prod(op.grid)) if region is None else region
        edits.append(Edit("pattern", renorm(), select(sites, queries=rows, **places)))  # type: ignore[arg-type]
    return Plan(edits)
