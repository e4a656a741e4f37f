"""Find torchvision where it is kept aside, and make it importable beside a CPU build of torch.

torchvision's ordinary wheel is built for CUDA. Beside a CPU build of torch its C++ operators do not load, and the import stops at
`operator torchvision::nms does not exist`; were it on the path, `import transformers` would stop there too. So it lives in a folder of
its own (`.zoo/` in the repository, or $HEADSCOPE_ZOO), is put on the path by whoever needs it, and the
two operators that its Python code insists on are declared, without a kernel. Its models need neither.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

_NEEDED = ("nms", "qnms")
_libraries: list[torch.library.Library] = []


def zoo_folder() -> Path:
    """Where packages that only the zoo needs are kept: $HEADSCOPE_ZOO, or `.zoo` in the repository."""
    return Path(os.environ.get("HEADSCOPE_ZOO") or Path(__file__).resolve().parents[2] / ".zoo")


@cache
def torchvision_missing() -> str | None:
    """Make torchvision importable; None when it is, else what is missing and what to do.

    Where transformers is imported later it finds torchvision and offers what needs it, timm backbones too; where it was there
    already it goes on without.
    """
    if importlib.util.find_spec("torchvision") is None:
        folder = zoo_folder()
        if not (folder / "torchvision").is_dir():
            return f"torchvision is neither installed nor in {folder.name}/ (run `make zoo`, or set HEADSCOPE_ZOO to its folder)"
        sys.path.append(str(folder))
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        _libraries.append(library)  # a library that is collected takes its declarations with it
        for operator in _NEEDED:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        try:
            importlib.import_module("torchvision")
        except (RuntimeError, ImportError) as error:
            return f"torchvision does not import beside torch {torch.__version__}: {error}"
    return None
