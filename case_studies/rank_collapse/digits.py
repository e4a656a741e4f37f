"""Part b: small vision transformers on scikit-learn's digits, with softmax and with Sinkhorn attention, before and after training.

Letters: B images, N tokens (patches of 2 × 2 pixels), F pixels of a patch, H heads, L layers, R paths.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from network import Classifier, Design
from rank import centred, column_deviation, effective_rank, numerical_rank, residual
from sklearn.datasets import load_digits
from torch import Tensor

from headscope.kernels.sinkhorn import sinkhorn

HELD_OUT = 360
DESIGN = Design(depth=8, width=48, heads=4, norm="before", mlp=True, xavier=False)
DEPTHS = (1, 2, 4, 8)
FLOOR = 1e-15  # of a residual in float64: below is rounding


@dataclass(frozen=True)
class Training:
    """One network to train: its attention, and the budget that all share."""

    half_steps: int
    skip: bool
    seed: int
    epochs: int = 20
    rate: float = 3e-3
    batch: int = 64
    trained_on: int = 1437  # images
    images: int = 64  # held-out images that the patterns are measured on
    paths: int = 16  # random head paths an image

    def design(self) -> Design:
        return replace(DESIGN, half_steps=self.half_steps, skip=1.0 if self.skip else None)


def read_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches [n, 16, 4] in [-1, 1] and labels [n]: of 1437 images to train on, and of the 360 held out; the same for every seed."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.from_numpy(data.images[order] / 8 - 1).float()
    patches = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)  # rows, columns, then the pixels
    labels = torch.from_numpy(data.target[order])
    return patches[HELD_OUT:], labels[HELD_OUT:], patches[:HELD_OUT], labels[:HELD_OUT]


@torch.no_grad()
def accuracy(model: Classifier, patches: Tensor, labels: Tensor) -> float:
    return float((model(patches).argmax(-1) == labels).double().mean())


def train(task: Training) -> dict[str, Any]:
    """Measure a network, train it, measure it again."""
    began = time.monotonic()
    patches, labels, held, answers = read_digits()
    patches, labels = patches[: task.trained_on], labels[: task.trained_on]
    torch.manual_seed(task.seed)
    model = Classifier(task.design(), tokens=16, inputs=4, classes=10)
    found: dict[str, Any] = {"init": {"accuracy": accuracy(model, held, answers), **measure(model, held, task)}, "accuracies": []}
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.01)
    steps = task.epochs * math.ceil(len(patches) / task.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(task.seed)
    for _ in range(task.epochs):
        for chosen in torch.randperm(len(patches), generator=generator).split(task.batch):
            optimizer.zero_grad()
            model.loss(patches[chosen], labels[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        found["accuracies"].append(accuracy(model, held, answers))
    found["trained"] = {"accuracy": found["accuracies"][-1], **measure(model, held, task)}
    found["seconds"] = round(time.monotonic() - began, 1)
    return found


@torch.no_grad()
def measure(model: Classifier, held: Tensor, task: Training) -> dict[str, Any]:
    """Patterns and states on held-out images, in float64."""
    precise = Classifier(task.design(), tokens=16, inputs=4, classes=10).double()
    precise.load_state_dict(model.state_dict())
    states, scores = precise.network.walk(precise.tokens(held[: task.images].double()))
    own = [sinkhorn(layer, half_steps=task.half_steps) for layer in scores]
    generator = torch.Generator().manual_seed(task.seed)
    orders = [torch.randperm(len(own[0]), generator=generator) for _ in own]
    mixed = [layer[order] for layer, order in zip(own, orders, strict=True)]
    other = 1 if task.half_steps > 1 else 21
    swapped = [sinkhorn(layer, half_steps=other) for layer in scores]
    heads = torch.randint(own[0].shape[1], (task.paths, len(own)), generator=generator)  # [R, L]
    return {
        "path": measure_paths(own, heads),
        "shuffled": measure_paths(mixed, heads),
        "swapped": {"half_steps": other, **measure_paths(swapped, heads)},
        "hidden": {
            "residual": [float(residual(state).mean()) for state in states],
            "effective_rank_centred": [float(effective_rank(centred(state)).mean()) for state in states],
        },
        "column_deviation": [float(column_deviation(layer).mean()) for layer in own],
        "entropy_share": [float(torch.special.entr(layer).sum(-1).mean() / math.log(layer.shape[-1])) for layer in own],
        "budget": [split_budget(layer) for layer in own],
    }


def split_budget(pattern: Tensor) -> list[float]:
    """Diffuse, routing and hub shares of log N, mean over images and heads, of patterns [B, H, N, N]."""
    total = math.log(pattern.shape[-1])
    diffuse = torch.special.entr(pattern).sum(-1).mean(-1)
    spread = torch.special.entr(pattern.mean(-2)).sum(-1)
    return [float(part.mean() / total) for part in (diffuse, spread - diffuse, total - spread)]


def measure_paths(patterns: Sequence[Tensor], heads: Tensor) -> dict[str, list[float]]:
    """Rank of the products of patterns along paths of heads, after some of the layers; means over images and paths.

    Args:
        patterns: [B, H, N, N] for each layer.
        heads: [R, L], which head a path takes in each layer.
    """
    product: Tensor | None = None
    found: dict[str, list[float]] = {"rank": [], "effective_rank": [], "log_residual": []}
    for layer, pattern in enumerate(patterns):
        chosen = pattern[:, heads[:, layer]]  # [B, R, N, N]
        product = chosen if product is None else chosen @ product
        if layer + 1 in DEPTHS:
            found["rank"].append(float(numerical_rank(product).mean()))
            found["effective_rank"].append(float(effective_rank(product).mean()))
            found["log_residual"].append(float(residual(product).clamp_min(FLOOR).log10().mean()))
    return found


def name_of(task: Training) -> str:
    """The cell of the log."""
    skip = "skip" if task.skip else "no skip"
    trained = f"epochs {task.epochs} of {task.trained_on}"
    return f"b: half-steps {task.half_steps}, {skip}, seed {task.seed}, {trained}, {task.images} images, {task.paths} paths"
