"""One row of the zoo: a tiny model with random weights, its inputs, and what is known about its attention beforehand.

Letters: B batch, H query heads, Q queries, K keys.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Reference = Callable[[nn.Module, Inputs], list[Tensor]]
FAMILIES = ("transformers", "diffusers", "timm", "torchvision", "torch.nn", "torch_geometric", "TransformerLens", "hand-written")


def main_output(output: Any) -> Tensor:
    """The first tensor of a model's output: the logits, the hidden states, the sample."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    for part in output:
        found = part if isinstance(part, Tensor) else main_output(part) if isinstance(part, (tuple, list, dict)) and len(part) else None
        if found is not None and found.is_floating_point():
            return found
    raise TypeError(f"no floating-point tensor in an output of type {type(output).__name__}")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: what the coverage table calls it.
        family: one of FAMILIES.
        make: builds the model and its keyword inputs; called under a fixed seed.
        expected_sites: how many places compute attention in one forward.
        reference: the patterns [B, H, Q, K] in execution order, made without Headscope; None where there is no second opinion.
        requires: modules that must be importable.
        projections: for each site, in execution order, the path of the linear map W_O that z goes into; a single string with
            `{}` is formatted with 0, 1, …; two paths are joined by `+` where z is cut between them; empty where z does not go into
            one map head by head.
        generate: the model has a `generate` method and its decoding is to be tested.
        output: picks the tensor to compare out of what the model returns.
        visible: queries to compare, [B, Q] or None for all; padded queries see nothing, and what then comes out is a matter of taste.
        tolerance: the largest difference between a captured pattern and its reference.
        refused: why the row is known not to work; it is expected to raise NotIntercepted.
        differentiable: gradients can be taken through the model.
        slow: left out of the quick tests.
        note: one remark for the table.
        weights: re-draws the parameters so that patterns are far from uniform; off for models whose own start is better.
    """

    name: str
    family: str
    make: Callable[[], tuple[nn.Module, Inputs]]
    expected_sites: int
    reference: Reference | None = None
    requires: tuple[str, ...] = ()
    projections: str | tuple[str, ...] = ()
    generate: bool = False
    output: Callable[[Any], Tensor] = main_output
    visible: Callable[[Inputs], Tensor] | None = None
    tolerance: float = 2e-6
    refused: str | None = None
    differentiable: bool = True
    slow: bool = False
    note: str = ""
    weights: bool = True
    generate_options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[nn.Module, Inputs]:
        """The model in eval mode with its keyword inputs; the same weights and inputs every time."""
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(0)
            model, inputs = self.make()
            model = model.eval()
            if self.weights:
                redraw(model)
        finally:
            torch.random.set_rng_state(state)
        return model, inputs

    def missing(self) -> str | None:
        """Why this entry cannot be built here; None when it can."""
        for name in self.requires:
            if name == "torchvision" or name == "timm":
                from tests.models.torchvision_path import torchvision_missing

                reason = torchvision_missing()
                if reason is not None:
                    return reason
            try:
                importlib.import_module(name)
            except ImportError as error:
                return f"{name} cannot be imported: {error}"
        return None

    def projection_paths(self) -> list[str]:
        """The paths of W_O, one a site; empty where the entry names none."""
        if isinstance(self.projections, str):
            return [self.projections.format(i) for i in range(self.expected_sites)]
        return list(self.projections)


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Replace the usual tiny initial weights by ones of unit gain: patterns become uneven, gates and zero layers open."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise)
        else:
            fan_in = parameter.shape[1] if parameter.ndim == 3 else parameter.numel() // parameter.shape[0]
            parameter.copy_(noise / fan_in**0.5)


def tokens(batch: int = 2, length: int = 8, vocabulary: int = 64) -> Tensor:
    """Token ids [B, S] between 5 and the vocabulary's end: below 5 live padding and other special tokens."""
    return torch.randint(5, vocabulary, (batch, length))


def image(batch: int = 2, size: int = 16, channels: int = 3) -> Tensor:
    """Pixels [B, C, size, size]."""
    return torch.randn(batch, channels, size, size)
