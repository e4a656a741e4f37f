"""Files that are whole or absent, whenever the writing stops."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from headscope.kernels.errors import StoreError


def write_whole(path: Path, content: bytes) -> Path:
    """Replace a file whole: its content is on disk before it gets its name, and what was begun is taken away again.

    Raises:
        StoreError: the folder takes no file; what stood there before still does.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # so that the name is on disk too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path
