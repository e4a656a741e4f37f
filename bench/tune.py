"""Choose the blocks, warps and stages of each kernel by the time they take on this GPU, and record them.

Every candidate is timed on causal heads of 4,096 queries and keys; the fastest one by its median is written to
`headscope.kernels.triton`'s `configurations.json`, for the widths that were tried. Nothing is tuned at run time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from bench import gpu

LENGTH = 4096
WANTED_TOP = 8
# Queries and keys of a block, warps, stages.
CANDIDATES = [
    (64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 8, 3), (128, 32, 4, 3), (128, 32, 4, 4), (128, 64, 4, 3),
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3),
]  # fmt: skip


def tune(settings: gpu.Settings, clock: gpu.Clock, candidates: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    """The recorded table of configurations with the fastest candidates in it; nothing is written."""
    from triton.runtime.errors import OutOfResources

    from headscope.kernels.triton import configurations, launch

    table: dict[str, Any] = json.loads(configurations.PATH.read_text(encoding="utf-8"))
    target = "interpreter" if launch.INTERPRETED else "amd" if torch.version.hip else "nvidia"
    kind = "single" if settings.dtype == torch.float32 else "half"
    for width in settings.widths:
        inputs = gpu.make_inputs(settings, max(1, settings.tokens // settings.lengths[0]), settings.lengths[0], width, True)
        for kernel, call in _calls(inputs).items():
            found = {}
            for candidate in candidates:
                chosen = configurations.Configuration(*candidate)
                with patch.object(configurations, "find", lambda *_, chosen=chosen: chosen):
                    try:
                        for _ in range(settings.warm_ups):
                            call()
                    except OutOfResources:  # too large for this GPU
                        continue
                    times = sorted(clock.milliseconds(call) for _ in range(settings.repeats))
                found[candidate] = times[len(times) // 2]
            table[target][kernel][kind][str(width)] = list(min(found, key=found.__getitem__))
    table["source"] = f"tuned on {torch.cuda.get_device_name()}" if settings.device == "cuda" else f"tuned on {settings.device}"
    return table


def record() -> str:
    """Tune on this GPU, write the table and say where it lies.

    Raises:
        RuntimeError: there is no GPU.
    """
    from headscope.kernels.triton import configurations

    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a GPU that torch can use, and there is none")
    table = tune(replace(gpu.Settings(), lengths=(LENGTH,)), gpu.EventClock(), CANDIDATES)
    configurations.PATH.write_text(written(table), encoding="utf-8")
    configurations._table.cache_clear()  # what is measured next runs with it
    return str(configurations.PATH)


def _calls(x: gpu.Inputs) -> dict[str, Callable[[], object]]:
    """One call of each kernel that is tuned, alone."""
    from headscope.kernels.triton import launch

    frame = launch.forward(x.problem, gpu.Wanted(), True)[2]
    assert frame is not None
    positions = torch.arange(x.q.shape[2], dtype=torch.int32, device=x.q.device)
    one = launch.forward(x.one_head, gpu.Wanted(), True)[2]
    return {
        "forward": lambda: launch.forward(x.problem, gpu.Wanted(gpu.ONE_PASS), False),
        "columns": lambda: launch.columns(x.problem, gpu.Wanted(frozenset({"received"}), gpu.TILE), frame),
        "rows": lambda: launch.rows(x.one_head, positions, one),
        "top": lambda: launch.top(x.problem, WANTED_TOP, frame),
    }


def written(table: dict[str, Any]) -> str:
    """As JSON, the configurations of one kernel and dtype on one line."""
    lines = [f' "source": {json.dumps(table["source"])}']
    for target in (name for name in table if name != "source"):
        kernels = []
        for kernel, kinds in table[target].items():
            inner = ",\n".join(f'   "{kind}": {json.dumps(widths)}' for kind, widths in kinds.items())
            kernels.append(f'  "{kernel}": {{\n{inner}\n  }}')
        lines.append(f' "{target}": {{\n' + ",\n".join(kernels) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"
