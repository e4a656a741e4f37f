"""Looking at a model in the middle of its training without leaving a trace.

What a measurement could change, and what is put back: the mode of every submodule, gradients, buffers, and the random states of torch (CPU,
CUDA, MPS), NumPy and Python. Weights are only read. Counters that a model keeps in plain Python are out of reach.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError

WRAPPERS = ("DistributedDataParallel", "DataParallel", "OptimizedModule", "DeepSpeedEngine")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the block runs; afterwards everything is as it was, to the bit, also after an exception."""
    with ExitStack() as stack:
        stack.callback(_restore_random, _random_states())
        stack.enter_context(_same_buffers(model))
        modes = [(module, module.training) for module in model.modules()]
        gradients = [(weight, weight.grad) for weight in model.parameters()]
        stack.callback(_restore_modes, modes)
        stack.callback(_restore_gradients, gradients)
        for module, _ in modes:
            module.training = False  # not eval(): some models do more than that in it
        for weight, _ in gradients:
            weight.grad = None  # nothing can be added to a gradient that is put away
        yield


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, DataParallel, torch.compile or DeepSpeed, which alone can run in one process only.

    Raises:
        InputError: its weights are spread over processes, so that no process can run it alone.
    """
    while type(model).__name__ in WRAPPERS:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    for module in model.modules():
        if any(kind.__name__ in ("FullyShardedDataParallel", "FSDPModule") for kind in type(module).__mro__):
            raise InputError(_spread(f"{type(model).__name__} is sharded by FSDP"))
    for name, weight in model.named_parameters():
        if any(kind.__name__ == "DTensor" for kind in type(weight).__mro__):
            raise InputError(_spread(f"the weight {name} is a DTensor"))
        if hasattr(weight, "ds_id"):
            raise InputError(_spread(f"the weight {name} is partitioned by DeepSpeed ZeRO-3"))
    return model


def process_rank() -> int:
    """The rank of this process among those that train together; 0 where there is one."""
    together: Any = torch.distributed  # torch has no types for it
    if together.is_available() and together.is_initialized():
        return int(together.get_rank())
    rank = os.environ.get("RANK", "0")
    if not rank.isdigit():
        raise InputError(f"the environment variable RANK is {rank!r}: it must be the number of this process, from 0")
    return int(rank)


def _spread(what: str) -> str:
    return (
        f"{what}: its weights are spread over processes, and the monitor runs in one of them alone. Gather a full copy and measure that "
        "with measure_health, for instance at every checkpoint"
    )


def _random_states() -> dict[str, Any]:
    found: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    cuda: Any = torch.cuda  # torch has no types for it
    if cuda.is_available() and cuda.is_initialized():
        found["cuda"] = cuda.get_rng_state_all()
    if torch.backends.mps.is_available() and "torch.mps" in sys.modules:
        found["mps"] = torch.mps.get_rng_state()
    return found


def _restore_random(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _restore_gradients(gradients: list[tuple[nn.Parameter, Tensor | None]]) -> None:
    for weight, gradient in gradients:
        weight.grad = gradient


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers that the block replaces or writes into come back; some models keep lengths, caches or running means in them."""
    kept = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    names = [(module, set(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, before in names:
            for name in set(module._buffers) - before:
                del module._buffers[name]
        for module, name, buffer, version, copy in kept:
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(copy)
