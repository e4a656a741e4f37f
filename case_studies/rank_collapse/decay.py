"""Part a: how fast the tokens of an untrained network become one, by what the network is made of.

Letters: N tokens, E width, L layers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mpmath
import torch
from network import Design, Network
from rank import centred, residual, residual_composite

from headscope.kernels.sinkhorn import sinkhorn

TOKENS, WIDTH, HEADS = 32, 64, 4
FLOOR = 1e-14  # of a relative residual in float64, below which only rounding is left
EPSILONS = (0.1, 0.03, 0.01, 0.003)
DIGITS = 2400  # of the high-precision run: its smallest residuals have a thousand zeros


def variants(depth: int) -> dict[str, Design]:
    """The networks that are compared, by name; each is measured without a mask and causal."""
    alone = Design(depth, WIDTH, HEADS, skip=None, mlp_skip=None)
    block = replace(alone, skip=1.0, mlp=True, mlp_skip=1.0)
    return {
        "attention alone": alone,
        "with LayerNorm": replace(alone, norm="after"),
        "with MLPs": replace(alone, mlp=True),
        "with skips": replace(alone, skip=1.0),
        "with skips, branch / √L": replace(alone, skip=depth**-0.5),
        "post-LN block": replace(block, norm="after"),
        "pre-LN block": replace(block, norm="before"),
        "pre-LN, no attention skip": replace(block, norm="before", skip=None),
    }


@torch.no_grad()
def measure_decay(design: Design, seed: int) -> dict[str, list[float | None]]:
    """log10 of the relative residual of the states 0 to L of one random network on random tokens, in float64; None at the floor.

    "composite" is the measure of Dong et al. 2021, "frobenius" the usual one.
    """
    torch.manual_seed(seed)
    network = Network(design).double()
    states, _ = network.walk(torch.randn(1, TOKENS, WIDTH, dtype=torch.float64))
    found: dict[str, list[float | None]] = {}
    for name, measure in (("composite", residual_composite), ("frobenius", residual)):
        values = [float(measure(state)) for state in states]
        found[name] = [math.log10(value) if value > FLOOR else None for value in values]
    return found


def measure_cubic(layers: int, seed: int, *, tokens: int = 5, width: int = 4) -> dict[str, Any]:
    """log10 of the composite norm of the residual, layer by layer, in arithmetic of 2400 digits: one head without a mask.

    Where R' is cubic in R, each logarithm is about three times the one before.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Any:
        return mpmath.matrix(torch.randn(rows, width, generator=generator, dtype=torch.float64).tolist())

    with mpmath.workdps(DIGITS):
        x, found = draw(tokens), []
        for layer in range(layers + 1):
            means = [mpmath.fsum(x[i, j] for i in range(tokens)) / tokens for j in range(width)]
            rest = mpmath.matrix(tokens, width)
            for i in range(tokens):
                for j in range(width):
                    rest[i, j] = x[i, j] - means[j]
            columns = max(mpmath.fsum(abs(rest[i, j]) for i in range(tokens)) for j in range(width))
            rows = max(mpmath.fsum(abs(rest[i, j]) for j in range(width)) for i in range(tokens))
            found.append(float(mpmath.log10(mpmath.sqrt(columns * rows))))
            if layer == layers:
                break
            q, k, v = (x * draw(width) / mpmath.sqrt(width) for _ in range(3))
            scores = q * k.T / mpmath.sqrt(width)
            for i in range(tokens):
                weights = [mpmath.exp(scores[i, j]) for j in range(tokens)]
                total = mpmath.fsum(weights)
                for j in range(tokens):
                    scores[i, j] = weights[j] / total
            x = scores * v
    ratios = [after / before if before < 0 else None for before, after in zip(found[:-1], found[1:], strict=True)]
    return {"log_residual": found, "ratios": ratios}


def measure_leading_term(seed: int) -> dict[str, list[float]]:
    """How far one layer's residual is from R W_QK Rᵀ R W_V / (N √d), X = 1xᵀ + εR: ‖difference‖ / ‖term‖ for each ε."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width = 16, 8
    rest = centred(torch.randn(tokens, width, generator=generator, dtype=torch.float64))
    shared = torch.randn(1, width, generator=generator, dtype=torch.float64)
    match, value = (torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5 for _ in range(2))
    found: dict[str, list[float]] = {"softmax": [], "sinkhorn": []}
    for epsilon in EPSILONS:
        small = epsilon * rest
        x = shared + small
        term = small @ match @ small.T @ small @ value / (tokens * width**0.5)
        scores = x @ match @ x.T / width**0.5
        for name, half_steps in (("softmax", 1), ("sinkhorn", 101)):
            # The shared part of v adds one row to all tokens; left out, as it only adds rounding.
            after = centred(sinkhorn(scores, half_steps=half_steps) @ small @ value)
            found[name].append(float((after - term).norm() / term.norm()))
    return found


def measure_uniform_causal(layers: int) -> list[float]:
    """Frobenius residual of C^l x over that of C^(l-1) x, l = 1 to `layers`, for the uniform causal pattern C; tends to 1/2."""
    pattern = torch.ones(TOKENS, TOKENS, dtype=torch.float64).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    x = torch.randn(TOKENS, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for _ in range(layers):
        x = x - x[0]  # the first token stays as it is; without this the residual drowns in its rounding
        before, x = centred(x).norm(), pattern @ x
        found.append(float(centred(x).norm() / before))
    return found
