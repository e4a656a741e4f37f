"""TS-Attn (arXiv 2604.19473): a plan that gives each event of a prompt the frames that it is to happen in; the formula is in `separation`.

With two events, "the horse gallops" and "then it rears", and 8 latent frames:

    separate_events([((2, 3), range(0, 4)), ((6, 7), range(4, 8))], grid=(8, 30, 52), steps=50, subject=[1], kind="cross")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headscope.interventions.edit import Edit
from headscope.interventions.plan import Plan
from headscope.interventions.select import select
from headscope.interventions.separation import separate
from headscope.kernels.errors import EditError


def separate_events(
    events: Sequence[tuple[Sequence[int], Sequence[int]]], *, grid: Sequence[int], steps: int, share: float = 0.2,
    subject: Sequence[int] | None = None, text: Sequence[int] | None = None, offset: int = 0, threshold: float | None = None,
    erosion: int = 3, strength: float = 1.0, **where: Any,
) -> Plan:  # fmt: skip
    """A plan that gives each event its frames, for the first steps of a sampling.

    Args:
        events: for each its keys (words) and its frames, such as [((3, 4), range(0, 4)), ((7, 8), range(4, 8))]. Frames may be of several
            events or of none; those of none are left alone.
        grid: (frames, rows, columns) of image tokens; frames are those of the latent video.
        steps: how many steps the sampling has.
        share: of them, the first ones that the plan acts in: the paper's 0.2 for text to video, 0.4 for image to video.
        subject, text, offset, threshold, erosion, strength: as in `Separate`; positions of keys. In joint attention `text` has to be given.
        where: further conditions of `select`, such as `kind="cross"`, `layers=…`, `branch="cond"`.

    Raises:
        EditError: no events, a frame that is not there, a key of two events, a share that is none.
    """
    if not events:
        raise EditError("events is empty: give for each event its keys and its frames")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1 or not 0 < share <= 1:
        raise EditError(f"steps={steps!r}, share={share!r}: give how many steps there are, and a share above 0 and up to 1")
    frames = tuple(grid)[0]
    keys = [int(key) for words, _ in events for key in words]
    signs = torch.zeros(frames, len(keys), dtype=torch.int64)
    column = 0
    busy = torch.zeros(frames, dtype=torch.bool)
    for words, when in events:
        chosen = [int(frame) for frame in when]
        if not words or not chosen or not all(0 <= frame < frames for frame in chosen):
            raise EditError(f"event {list(words)} in frames {chosen}: give keys, and frames from 0 to {frames - 1}")
        busy[chosen] = True
        signs[chosen, column : column + len(words)] = 1
        column += len(words)
    signs[(signs == 0) & busy[:, None]] = -1
    op = separate(
        torch.tensor(keys), signs, grid, None if subject is None else torch.tensor(list(subject)),
        None if text is None else torch.tensor(list(text)), offset, threshold, erosion, strength,
    )  # fmt: skip
    early = range(max(1, round(share * steps)))
    return Plan([Edit("scores", op, select(steps=early, **where))])
