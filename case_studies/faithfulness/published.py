"""The order of methods in the faithfulness table of the AttnLRP paper (Achtibat et al. 2024, table 1), beside ours.

The numbers are written down from memory and were not compared with the paper: check them there before quoting one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch

from headscope.probe.attribution.correlation import rank_correlation
from headscope.probe.attribution.measured import Faithfulness

# Area between the curves: ViT-B-16 on ImageNet, LLaMA 2-7b on IMDB and on Wikipedia. AttnLRP on the ViT is with the γ rule.
RECALLED = {
    "gradient-x-input": (0.90, 0.12, 0.18),
    "integrated-gradients": (1.54, 1.23, 4.05),
    "rollout": (1.31, -0.64, -3.49),
    "chefer": (2.60, 1.61, 9.79),
    "cp-lrp": (2.53, 1.72, 7.85),
    "attnlrp": (6.19, 2.50, 10.93),
}
COLUMN = {"embedded:vit": 0, "film reviews": 1, "embedded:lm": 2}


def compare(name: str, found: Faithfulness) -> dict[str, Any]:
    """How far our order of methods is theirs.

    Args:
        name: of our model, one of `COLUMN`.
        found: what we measured; its first removal counts.

    Returns:
        `spearman` of the two columns; `pairs` of methods, how many are in the same order (`same`), how many differ by more than
        chance here (`resolved`: the interval of the paired difference leaves 0 out), and how many of those in the same order.
    """
    ours: Mapping[str, float] = {
        method: interval.mean for method in RECALLED if (interval := found.interval("delta_area", method)) is not None
    }
    theirs = {method: RECALLED[method][COLUMN[name]] for method in ours}
    same = resolved = both = 0
    pairs = list(combinations(ours, 2))
    for a, b in pairs:
        alike = (ours[a] - ours[b]) * (theirs[a] - theirs[b]) > 0
        difference = found.difference("delta_area", a, b)
        clear = (
            difference is not None and difference.low is not None and difference.high is not None and difference.low * difference.high > 0
        )
        same, resolved, both = same + alike, resolved + clear, both + (alike and clear)
    return {
        "ours": dict(ours), "recalled": theirs,
        "spearman": rank_correlation(torch.tensor(list(ours.values())), torch.tensor(list(theirs.values()))),
        "pairs": len(pairs), "same": same, "resolved": resolved, "resolved_same": both,
    }  # fmt: skip
