"""Part c: once the tokens are alike, queries and keys get no gradient, values do (Noci et al. 2022).

Letters: B samples, N tokens, E width, L layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from decay import HEADS, TOKENS, WIDTH
from network import Design, Network

DEPTH = 6


def variants(depth: int = DEPTH) -> dict[str, Design]:
    """The networks that are compared, by name."""
    alone = Design(depth, WIDTH, HEADS, skip=None)
    skips = replace(alone, skip=1.0)
    return {
        "no skip": alone,
        "no skip, causal": replace(alone, causal=True),
        "no skip, Sinkhorn 21": replace(alone, half_steps=21),
        "skip": skips,
        "skip, branch / √L": replace(skips, skip=depth**-0.5),
        "post-LN block": replace(skips, norm="after", mlp=True),
        "pre-LN block": replace(skips, norm="before", mlp=True),
    }


def measure_gradients(design: Design, seed: int) -> dict[str, list[float]]:
    """Gradient norms at W_Q, W_K and W_V of each layer, and the ratio (‖g_Q‖ + ‖g_K‖) / (2 ‖g_V‖), in float64.

    The loss is the inner product of the last states with a random direction for each token.
    """
    torch.manual_seed(seed)
    network = Network(design).double()
    x, direction = torch.randn(2, 4, TOKENS, WIDTH, dtype=torch.float64)
    (network(x) * direction).mean().backward()
    found: dict[str, list[float]] = {"query": [], "key": [], "value": [], "ratio": []}
    for block in network.blocks:
        attention = block.attention
        query, key, value = (float(linear.weight.grad.norm()) for linear in (attention.q, attention.k, attention.v))
        for name, number in (("query", query), ("key", key), ("value", value), ("ratio", (query + key) / (2 * value))):
            found[name].append(number)
    return found
