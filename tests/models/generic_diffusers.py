"""Tiny denoisers of diffusers: constructor arguments and shapes of inputs from `denoisers.json`.

The file holds, by class, the smallest settings with which the class is known to run; most come from diffusers' own tests
(Apache-2.0). Letters: B batch, C channels, T frames.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models.entry import Inputs
from tests.models.generic import LARGEST, TooLarge

SETTINGS = Path(__file__).with_name("denoisers.json")


def denoisers() -> list[str]:
    """Names of all denoisers in diffusers, transformers and UNets, known or not."""
    import diffusers.models.transformers
    import diffusers.models.unets
    from diffusers.models.modeling_utils import ModelMixin

    found: list[str] = []
    for package in (diffusers.models.transformers, diffusers.models.unets):
        for part in pkgutil.iter_modules(package.__path__):
            try:
                module = importlib.import_module(f"{package.__name__}.{part.name}")
            except ImportError:
                continue
            found += [
                name
                for name, value in vars(module).items()
                if isinstance(value, type) and issubclass(value, ModelMixin) and value.__module__ == module.__name__
            ]
    return sorted(set(found))


def denoiser_class(name: str) -> Any:
    """The class of that name, wherever in diffusers it is."""
    import diffusers

    if hasattr(diffusers, name):
        return getattr(diffusers, name)
    for package in ("diffusers.models.transformers", "diffusers.models.unets"):
        for part in pkgutil.iter_modules(importlib.import_module(package).__path__):
            module = importlib.import_module(f"{package}.{part.name}")
            if hasattr(module, name):
                return getattr(module, name)
    raise RuntimeError(f"build: diffusers has no class {name}")


def made(description: dict[str, Any]) -> Any:
    """One input from its description."""
    kind = description["t"]
    if kind == "value":
        return description["value"]
    if kind == "dict":
        return {int(name) if name.isdigit() else name: made(one) for name, one in description["items"].items()}  # JSON has no integer keys
    if kind in ("list", "tuple"):
        items = [made(one) for one in description["items"]]
        return items if kind == "list" else tuple(items)
    shape = description["shape"]
    if description.get("values") is not None:
        dtype = {"bool": torch.bool, "int": torch.long, "float": torch.float32}[kind]
        return torch.tensor(description["values"], dtype=dtype).reshape(shape)
    if kind == "float":
        return torch.randn(shape)
    if kind == "bool":
        return torch.ones(shape, dtype=torch.bool)
    return torch.randint(description["low"], description["high"] + 1, shape)


def tiny_denoiser(name: str) -> tuple[nn.Module, Inputs]:
    """A tiny denoiser in eval mode, and inputs.

    Raises:
        RuntimeError: nothing is known about how to build it; the message starts with `build`.
    """
    settings = json.loads(SETTINGS.read_text(encoding="utf-8")).get(name)
    if settings is None:
        raise RuntimeError("build: no tiny settings are known for this class")
    torch.manual_seed(0)
    model: nn.Module = denoiser_class(name)(**settings["config"]).eval()
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        raise TooLarge(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f}M parameters")
    return model, {key: made(one) for key, one in settings["inputs"].items()}
