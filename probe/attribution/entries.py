"""Finished entries of a long measurement in a JSON-lines file, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from headscope.kernels.errors import StoreError
from headscope.probe.attribution.measured import Measured
from headscope.probe.attribution.units import Units


class Entries:
    """Finished entries in a JSON-lines file, each under the digest of what it was measured from; without a path, nothing is kept.

    Raises:
        StoreError: a line is none of ours. A last line that was cut off while it was written is dropped.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._entries: dict[str, Measured] = {}
        self._file: IO[str] | None = None
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._entries[row["key"]] = Measured.from_dict(row["measured"])
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{path}, line {number}, is no entry of a faithfulness measurement ({error}): give another path"
                ) from error
        if torn:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - len(torn))

    def __enter__(self) -> Entries:
        if self.path is not None:
            self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, key: str) -> Measured | None:
        return self._entries.get(key)

    def put(self, key: str, entry: Measured) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "measured": entry.to_dict()}, allow_nan=False) + "\n")
            self._file.flush()


def digest_of(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in _leaves(parts):
        digest.update(part)
    return digest.hexdigest()


def _leaves(part: object) -> Iterator[bytes]:
    """Content and structure of nested values, as bytes."""
    if isinstance(part, Tensor):
        dense = part.detach().contiguous().cpu()
        yield f"|tensor {dense.dtype} {tuple(dense.shape)}|".encode()
        yield dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(part, Mapping):
        for name, value in part.items():
            yield f"|{name}:".encode()
            yield from _leaves(value)
    elif isinstance(part, list | tuple):
        yield f"|{len(part)}[".encode()
        for value in part:
            yield from _leaves(value)
    elif isinstance(part, Units):
        yield from _leaves((part.input, part.places, part.shape))
    else:
        yield f"|{type(part).__name__} {part!r}|".encode()
