"""Whether the commands under `headscope edit` can write where they are told to, asked before hours of work."""

from __future__ import annotations

from pathlib import Path

from headscope.kernels.errors import InputError


def check_folder(option: str, file: str | None) -> None:
    """Raise InputError for a file whose folder does not exist; None is no file."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise InputError(f"{option} {file!r}: there is no such folder, so make it first")
