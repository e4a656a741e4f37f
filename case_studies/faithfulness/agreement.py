"""How well relevance finds the words that a person marked as the reasons of a label.

Letters: S words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from headscope.probe.attribution.curves import ranking


@dataclass(frozen=True)
class Agreement:
    """For one review.

    Attributes:
        average_precision: area under the precision-recall curve: the mean, over marked words, of the share of marked words among those
            that are at least as relevant.
        f1: of the words above a fixed share of the most relevant with the marked ones.
        marked: share of the words that are marked; what both figures are compared with.
    """

    average_precision: float
    f1: float
    marked: float


def agree(relevance: Tensor, marked: Tensor, share: float, seed: int = 0) -> Agreement:
    """Compare relevance [S] with marks [S] bool; equal relevances rank in an order drawn by the seed.

    Args:
        relevance: of the words.
        marked: by a person, at least one.
        share: of the words that count as chosen, ⌈share · S⌉ of them.
        seed: of the order among equals.
    """
    hits = marked[ranking(relevance, seed)].tolist()
    found, precisions = 0, []
    for place, hit in enumerate(hits, 1):
        found += hit
        if hit:
            precisions.append(found / place)
    chosen = math.ceil(share * len(hits))
    both = sum(hits[:chosen])
    return Agreement(sum(precisions) / len(precisions), 2 * both / (chosen + found), found / len(hits))
