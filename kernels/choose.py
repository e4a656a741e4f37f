"""Which implementation computes an attention: one function, by device, dtype and what is asked.

| name | where | what it cannot do |
|---|---|---|
| triton | CUDA, ROCm; anywhere under TRITON_INTERPRET=1 | float64; gradients of statistics, biases, features, sink or temperature |
| cpu | CPU, with a C compiler | float64, gradients, top keys |
| blockwise | any device | nothing |
| reference | any device | nothing; holds the whole pattern, in float64 |

The choice: triton on a GPU, cpu on a CPU, and blockwise where that one cannot do what is asked; the reference only where it is forced.
Every implementation is a function of a `Problem` and what is `Wanted` of it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeAlias

from torch import Tensor

from headscope.kernels import blockwise, reference
from headscope.kernels.cpu import run as cpu
from headscope.kernels.errors import InputError, SelectionError
from headscope.kernels.problem import Problem, Wanted
from headscope.kernels.statistics import Statistics

Implementation: TypeAlias = Callable[[Problem, Wanted], tuple[Tensor | None, Statistics]]

NAMES = ("triton", "cpu", "blockwise", "reference")


def choose(problem: Problem, wanted: Wanted, forced: str | None = None) -> Implementation:
    """The fastest implementation that can do what is asked, or the one that is forced.

    Raises:
        SelectionError: there is no implementation of that name.
        InputError: the one that is forced cannot do this; the message says why.
    """
    if forced is not None and forced not in NAMES:
        raise SelectionError(f"no implementation {forced!r}: there are {', '.join(NAMES)}")
    name = forced or ("triton" if problem.q.device.type == "cuda" else "cpu")
    if name == "reference":
        return reference.run
    if name == "blockwise":
        return blockwise.run
    obstacle, implementation = _triton(problem, wanted) if name == "triton" else (cpu.why_not(problem, wanted), cpu.run)
    if obstacle is None:
        return implementation
    if forced is not None:
        raise InputError(f"implementation {forced!r} cannot do this: {obstacle}; choose another, or None for one that can")
    return blockwise.run


def _triton(problem: Problem, wanted: Wanted) -> tuple[str | None, Implementation]:
    """Why triton cannot do this, and what runs where it can. Only here is triton imported: it need not be installed."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install headscope[gpu])", blockwise.run
    from headscope.kernels.triton import launch

    return launch.why_not(problem, wanted), launch.run
