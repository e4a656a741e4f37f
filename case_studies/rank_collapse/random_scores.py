"""Part b, without a network: softmax and Sinkhorn on random scores, and products of such patterns.

Letters: N tokens.
"""

from __future__ import annotations

import torch
from rank import centred, effective_rank

from headscope.kernels.sinkhorn import sinkhorn

TOKENS, DEPTH = 64, 12
SPREADS = (1.0, 4.0)  # standard deviations of the scores
HALF_STEPS = 101


def measure_random_scores(spread: float, seed: int, draws: int = 6) -> dict[str, dict[str, float]]:
    """Means over some draws, for softmax and Sinkhorn on the same scores, in float64.

    Of one pattern P: its largest singular value, ‖Π P‖₂ and effective rank. Of the product of 12: log10 ‖Π ∏P‖₂ and effective rank.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(draws, DEPTH, TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    found = {}
    for name, half_steps in (("softmax", 1), ("sinkhorn", HALF_STEPS)):
        patterns = sinkhorn(scores, half_steps=half_steps)
        one, product = patterns[:, 0], patterns[:, 0]
        for layer in range(1, DEPTH):
            product = patterns[:, layer] @ product
        found[name] = {
            "sigma": float(torch.linalg.matrix_norm(one, 2).mean()),
            "contrast": float(torch.linalg.matrix_norm(centred(one), 2).mean()),
            "effective_rank": float(effective_rank(one).mean()),
            "product_log_contrast": float(torch.linalg.matrix_norm(centred(product), 2).log10().mean()),
            "product_effective_rank": float(effective_rank(product).mean()),
        }
    return found
