"""Who was measured: model, tokenizer and environment, named so that somebody else can tell whether theirs are the same."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from headscope.app.report.schema import Json
from headscope.probe.call import AttentionSite
from headscope.probe.models import model_fingerprint

PACKAGES = ("headscope", "torch", "transformers", "tokenizers", "numpy", "safetensors", "captum")


def describe_model(model: nn.Module, processor: Any, sites: tuple[AttentionSite, ...], name: str | None, revision: str | None) -> Json:
    """The `model` of a sidecar."""
    config = getattr(model, "config", None)
    weight = next(model.parameters(), None)
    return {
        "id": name or type(model).__name__,
        "revision": revision or getattr(config, "_commit_hash", None),
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sites": len(sites),
        "heads": sum(site.query_heads for site in sites),
        "weights_sha256": model_fingerprint(model).removeprefix("sha256:"),
        "tokenizer_sha256": tokenizer_digest(processor),
        "dtype": "none" if weight is None else str(weight.dtype).removeprefix("torch."),
        "device": "none" if weight is None else weight.device.type,
        "attention": str(getattr(config, "_attn_implementation", None) or "its own code"),
        "caught_by": sorted({site.mechanism for site in sites}),
    }


def tokenizer_digest(processor: Any) -> str | None:
    """SHA-256 of what decides how a text is cut: the whole of a fast tokenizer, else vocabulary and special tokens; None without one."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    elif callable(getattr(processor, "get_vocab", None)):
        content = {"vocabulary": processor.get_vocab(), "special": {key: str(value) for key, value in processor.special_tokens_map.items()}}
    else:
        return None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_environment(device: torch.device) -> Json:
    """The `environment` of a sidecar."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
