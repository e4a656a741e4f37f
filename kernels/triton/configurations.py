"""How large the blocks of each kernel are, and how many warps and stages it gets: a recorded table, not a search at run time.

`configurations.json` holds, by target, kernel and dtype, for each head width [rows, keys, warps, stages]; `source` says where the numbers
are from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("configurations.json")
WIDEST = 1024


@dataclass(frozen=True)
class Configuration:
    """One way to run a kernel.

    Attributes:
        rows, keys: queries and keys of one block, powers of two from 16.
        warps, stages: of one program; stages are how many blocks are in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def find(kernel: str, width: int, target: str, dtype: torch.dtype) -> Configuration:
    """The recorded configuration for heads of at least this width.

    Args:
        kernel: forward, forward-biased (where a bias or mask takes room too), columns, rows, top or tiles.
        width: the larger of D and V, at most `WIDEST`.
        target: nvidia, amd or interpreter.
        dtype: of q.
    """
    by_width = _table()[target][kernel]["single" if dtype == torch.float32 else "half"]
    recorded = min(int(number) for number in by_width if int(number) >= width)
    return Configuration(*by_width[str(recorded)])


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return table
