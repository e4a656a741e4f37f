"""Where a concept lies in a head, how well that tells it from others, and which heads are worth an edit.

Letters: n, m tokens, H heads, D width, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels.errors import EditError, InputError


@dataclass(frozen=True, eq=False)
class Separation:
    """How far a score tells two sets apart, for each head.

    Attributes:
        threshold: [H], the score above which most of the first set lie and few of the second: the largest share of the first above it minus
            the share of the second (Youden 1950), in the middle of the gap.
        gap: [H], that difference of shares, -1 to 1.
    """

    threshold: Tensor
    gap: Tensor


def check_rank(rank: int, width: int) -> None:
    """Raise EditError unless heads of a width have subspaces of that rank."""
    if not isinstance(rank, int) or not 1 <= rank <= width:
        raise EditError(f"rank {rank}: the heads are {width} wide, so give 1 to {width}")


def basis_of(tokens: Tensor, rank: int) -> Tensor:
    """[H, D, R], the strongest directions of each head's tokens: left singular vectors of [D, n], not centred.

    Args:
        tokens: [n, H, D].
        rank: R.

    Raises:
        EditError: a rank above the width of a head, or above the number of tokens.
    """
    count, _, width = tokens.shape
    check_rank(rank, width)
    if rank > count:
        raise InputError(f"rank {rank} from {count} subject tokens: give at least as many tokens as directions")
    found: Tensor = torch.linalg.svd(tokens.double().transpose(0, 1), full_matrices=False).Vh  # [H, min(n, D), D]
    return found[:, :rank].mT.float().contiguous()


def scores_of(tokens: Tensor, basis: Tensor) -> Tensor:
    """[n, H], the latent risk score ‖Uᵀx‖² / ‖x‖² of each token in each head.

    Args:
        tokens: [n, H, D].
        basis: [H, D, R].
    """
    inside = torch.einsum("nhd,hdr->nhr", tokens.double(), basis.double()).square().sum(-1)
    total = tokens.double().square().sum(-1)
    return inside / total.masked_fill(total == 0, 1.0)


def separate(first: Tensor, second: Tensor) -> Separation:
    """The best threshold of each head between scores [n, H] of one set and [m, H] of another."""
    both = torch.cat([first, second]).sort(dim=0).values  # [n + m, H]
    middles = (both[1:] + both[:-1]) / 2
    candidates = torch.cat([both[:1] - 1e-6, middles, both[-1:] + 1e-6])  # [C, H]
    above = (first[:, None] > candidates).double().mean(0) - (second[:, None] > candidates).double().mean(0)  # [C, H]
    gap, place = above.max(dim=0)
    return Separation(candidates.gather(0, place[None])[0], gap)
