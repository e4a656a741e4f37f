"""How far the patterns of one site differ between two runs, row by row.

Letters: B batch, H query heads, Q queries, K keys, R rows of one panel.

KL and Jensen-Shannon are of rows renormalised over the real keys; the cosine is of what the model multiplies values by.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.kernels.errors import ShapeError
from headscope.probe.call import AttentionSite
from headscope.probe.health.comparison import HEAD_NUMBERS, HeadDifference
from headscope.probe.health.rows import panels_of, rows_of
from headscope.probe.record import Record


@dataclass(eq=False)
class HeadSums:
    """The differences of one site's heads, added up over its calls.

    Attributes:
        site: where the heads are.
        calls: how many calls were added.
        rows: rows compared; of the head that has most.
        broken: why nothing can be said of this site.
    """

    site: AttentionSite
    calls: int = 0
    rows: int = 0
    broken: str | None = None
    _total: Tensor = field(init=False)  # [4, H], in the order of HEAD_NUMBERS, times their rows
    _count: Tensor = field(init=False)  # [H], rows

    def __post_init__(self) -> None:
        self._total = torch.zeros(len(HEAD_NUMBERS), self.site.query_heads, dtype=torch.float64)
        self._count = torch.zeros(self.site.query_heads, dtype=torch.float64)

    def add(self, a: Record, b: Record, counted: Tensor | None) -> None:
        """One more call of each.

        Args:
            counted: [B, Q], bool, the rows that count; None for all.

        Raises:
            ShapeError: their patterns differ in shape.
        """
        rows_a, rows_b = rows_of(a), rows_of(b)
        if rows_a.shape != rows_b.shape:
            raise ShapeError(
                f"the patterns of {self.site.name} are {list(rows_a.shape)} and {list(rows_b.shape)}, [batch, head, query, key]: only "
                "models with the same heads, on the same tokens, can be compared"
            )
        batch, heads, _, _ = rows_a.shape
        sums = torch.zeros(3, heads, dtype=torch.float64)
        squares = torch.zeros(3, batch, heads, dtype=torch.float64)  # <A, B>, <A, A>, <B, B>
        counts = torch.zeros(batch, heads, dtype=torch.float64)
        for start, stop in panels_of(rows_a.shape):
            panel_a, panel_b = rows_a.read(start, stop), rows_b.read(start, stop)
            chosen = panel_a.alive & panel_b.alive.to(panel_a.alive.device)  # [B, H, R]
            if counted is not None:
                chosen = chosen & counted[:, None, start:stop].to(chosen.device)
            log_a, log_b = panel_a.log, panel_b.log.to(panel_a.log.device)
            p_a, p_b = log_a.exp(), log_b.exp()  # [B, H, R, K]
            mixed = torch.special.entr((p_a + p_b) / 2).sum(-1) - (torch.special.entr(p_a) + torch.special.entr(p_b)).sum(-1) / 2
            for place, value in enumerate((_divergence(p_a, log_a, log_b), _divergence(p_b, log_b, log_a), mixed)):
                sums[place] += value.clamp_min(0.0).masked_fill(~chosen, 0.0).sum((0, 2)).cpu()
            left = (p_a * panel_a.share[..., None]).masked_fill(~chosen[..., None], 0.0)
            right = (p_b * panel_b.share.to(p_b.device)[..., None]).masked_fill(~chosen[..., None], 0.0)
            squares += torch.stack([(left * right).sum((2, 3)), left.square().sum((2, 3)), right.square().sum((2, 3))]).cpu()
            counts += chosen.sum(-1).cpu()
        cosine = squares[0] / (squares[1] * squares[2]).sqrt()  # [B, H]
        weighted = (cosine * counts).masked_fill(counts == 0, 0.0).sum(0)
        self._total += torch.cat([sums, weighted[None]])
        self._count += counts.sum(0)
        self.calls += 1
        self.rows += int(counts.sum(0).max()) if heads else 0

    def result(self) -> HeadDifference:
        """The means over the rows."""
        heads = self.site.query_heads
        if self.broken is not None or not self.calls:
            nothing = torch.full((len(HEAD_NUMBERS), heads), torch.nan, dtype=torch.float64)
            reason = self.broken or "no call was compared"
            return self._difference(nothing, dict.fromkeys(HEAD_NUMBERS, reason))
        means = self._total / self._count
        undefined: dict[str, str] = {}
        for name, value in zip(HEAD_NUMBERS, means, strict=True):
            if bool((self._count == 0).any()):
                undefined[name] = "no row sees a key in both and is counted"
            elif bool(value.isnan().any()):
                undefined[name] = "a probability is negative"
            elif bool(value.isinf().any()):
                undefined[name] = "infinite: one gives something to a key that the other hides"
        return self._difference(means, undefined)

    def _difference(self, numbers: Tensor, undefined: dict[str, str]) -> HeadDifference:
        divergence, reverse, jensen_shannon, cosine = numbers
        return HeadDifference(self.site, self.calls, self.rows, divergence, reverse, jensen_shannon, cosine, undefined)


def _divergence(p: Tensor, log: Tensor, other: Tensor) -> Tensor:
    """[B, H, R], KL of the rows; inf where the other hides a key."""
    return torch.where(p == 0, 0.0, p * (log - other)).sum(-1)
