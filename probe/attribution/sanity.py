"""Does an attribution depend on what the model learned? Weights are drawn anew from the output down (Adebayo et al. 2018).

An attribution that stays much the same shows the input rather than the model. Letters: U places of an input.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, NonFiniteError, SelectionError, ShapeError
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.correlation import rank_correlation
from headscope.probe.attribution.faithfulness import Ranker
from headscope.probe.attribution.target import Scalar, Target, as_target

WINDOW = 7  # pixels a side, of the windows in which two maps are compared (Wang et al. 2004)


@dataclass(frozen=True)
class Step:
    """One step down.

    Attributes:
        module: path of what was drawn anew in this step, beside all that came before.
        spearman: rank correlation of the relevance with that of the trained model; None where one of them is constant.
        absolute: the same of their absolute values, which a mere change of sign does not lower.
        ssim: structural similarity of the two maps, each scaled to 0 to 1; None where the input is no image.
    """

    module: str
    spearman: float | None
    absolute: float | None
    ssim: float | None


@dataclass(frozen=True)
class Randomisation:
    """How the relevance of one input moved away from that of the trained model.

    Attributes:
        input: name of the input.
        steps: from the output down; the last has no trained weight left.
    """

    input: str
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            f"{step.module}: " + ", ".join(f"{name} {value:.3f}" for name, value in asdict(step).items() if isinstance(value, float))
            for step in self.steps
        ]
        return "\n".join(["rank correlation with the trained model's relevance, drawn anew down to", *rows])


def randomise_layers(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: int | Target | Scalar | None = None,
    method: str | Ranker = "attnlrp",
    *,
    name: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Randomisation:
    """Attribute one target again and again while a copy of the model loses what it learned, from the output down to the input.

    Every weight of a layer is drawn from a normal distribution with that tensor's own mean and spread, so that the layer keeps its scale
    and nothing else. A weight that several layers share goes with the first of them. Buffers stay.

    Args:
        model: in eval mode; the copy is changed, never the model itself.
        inputs: keyword inputs of one sample.
        target: as in `attribute`; the largest logit is that of the trained model, throughout.
        method: of `attribute`, or a function of (model, inputs, target) that returns an attribution or its tensor.
        name: of the input whose relevance is compared; may be left out where there is one.
        seed: of the new weights.
        progress: called with (attributions done, attributions in all).

    Raises:
        InputError: no weights to draw, or a model that cannot be copied.
        SelectionError: no such input or method.
        NonFiniteError: a relevance is NaN or infinite.
    """
    scalar = as_target(target)
    if isinstance(scalar, Target):
        with torch.no_grad():
            scalar = scalar.resolved(model(**inputs))
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{type(model).__name__} cannot be copied ({error}): load it a second time and randomise that") from error
    groups = layers_down(twin, inputs)
    if not groups:
        raise InputError(f"{type(model).__name__} has no weights that could be drawn anew")
    name, trained = _relevance(model, inputs, scalar, method, name)
    generator, drawn, steps = torch.Generator().manual_seed(seed), set[int](), []
    for place, (path, weights) in enumerate(groups.items(), 1):
        draw_anew(weights, generator, drawn)
        relevance = _relevance(twin, inputs, scalar, method, name)[1]
        image = relevance.dim() == 4 and min(relevance.shape[-2:]) > 1
        steps.append(
            Step(
                path,
                rank_correlation(trained.flatten(), relevance.flatten()),
                rank_correlation(trained.abs().flatten(), relevance.abs().flatten()),
                similarity(trained.sum((0, 1)), relevance.sum((0, 1))) if image else None,
            )
        )
        if progress is not None:
            progress(place, len(groups))
    return Randomisation(name, tuple(steps))


def layers_down(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, list[nn.Parameter]]:
    """What is drawn anew in one step, by path, from the output to the input: blocks whole, and weights that stand in none.

    The order is that in which modules finish in a forward pass, reversed; what does not run comes last.
    """
    blocks: list[str] = []
    found: dict[str, list[nn.Parameter]] = {}
    finished: list[str] = []
    with ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():
            if any(path.startswith(f"{block}.") for block in blocks):
                continue
            block = re.search(r"(^|\.)\d+$", path) is not None
            weights = list(module.parameters(recurse=block))
            if block:
                blocks.append(path)
            if weights:
                found[path] = weights
                stack.callback(module.register_forward_hook(_noting(finished, path)).remove)
        model(**inputs)
    ran = list(dict.fromkeys(reversed(finished)))
    return {path: found[path] for path in [*ran, *(path for path in found if path not in ran)]}


def _noting(finished: list[str], path: str) -> Callable[..., None]:
    return lambda *_: finished.append(path)


def draw_anew(weights: Sequence[nn.Parameter], generator: torch.Generator, drawn: set[int]) -> None:
    """Every floating-point weight that is not among `drawn` from a normal with its own mean and spread; adds them there."""
    with torch.no_grad():
        for weight in weights:
            if id(weight) in drawn or not weight.is_floating_point():
                continue
            drawn.add(id(weight))
            own = weight.double()
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
            weight.copy_(own.mean() + noise * own.std(correction=0))


def similarity(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two maps [height, width], each scaled to 0 to 1 (Wang et al. 2004); means over square windows.

    Raises:
        ShapeError: they differ in shape, or are no maps.
    """
    if a.dim() != 2 or a.shape != b.shape:
        raise ShapeError(f"maps {list(a.shape)} and {list(b.shape)}: give two of one shape, [height, width]")
    side = min(WINDOW, *a.shape)
    a, b = (nn.functional.unfold(_scaled(x)[None, None], side)[0] for x in (a, b))  # [side², windows]
    mean_a, mean_b = a.mean(0), b.mean(0)
    variance_a, variance_b = a.var(0, correction=1), b.var(0, correction=1)
    covariance = ((a - mean_a) * (b - mean_b)).sum(0) / (len(a) - 1)
    light, spread = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + light) * (2 * covariance + spread)
    return float((top / ((mean_a**2 + mean_b**2 + light) * (variance_a + variance_b + spread))).mean())


def _scaled(x: Tensor) -> Tensor:
    x = x.detach().double().cpu()
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


def _relevance(
    model: nn.Module, inputs: Mapping[str, Any], target: Target | Scalar, method: str | Ranker, name: str | None
) -> tuple[str, Tensor]:
    found = (
        attribute(model, inputs, target, method, heads=False, layers=False) if isinstance(method, str) else method(model, inputs, target)
    )
    if isinstance(found, Attribution):
        name = next(iter(found.inputs)) if name is None and len(found.inputs) == 1 else name
        if name is None or name not in found.inputs:
            raise SelectionError(f"which input? there are {', '.join(found.inputs)}: give name=")
        found = found.inputs[name]
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError("a relevance is NaN or infinite, which has no rank: attribute in float32")
    return name or "", found.detach().double().cpu()
