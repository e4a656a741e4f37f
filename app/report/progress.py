"""Finished examples on disk, one JSON line each, so that long work can stop and go on."""

from __future__ import annotations

import os
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

from headscope.app.report import sidecar
from headscope.app.report.schema import Json
from headscope.kernels.errors import InputError, StoreError

SCHEMA = "headscope.report-progress/v1"


class Progress:
    """The records so far, by example.

    Args:
        path: of the file; None keeps them in memory only. A line that was cut short by a crash is dropped.
        key: names model, data and settings; a file made with others is refused.

    Raises:
        InputError: the file belongs to other work, or cannot be written.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.records: dict[str, Json] = {}
        self._file: BufferedWriter | None = None

    def __enter__(self) -> Progress:
        if self.path is None or not self.path.exists():
            return self
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}") from error
        if lines and lines[0] + b"\n" != self._head:
            raise InputError(f"{self.path} was begun with another model, other data or other settings: delete it, or choose another name")
        whole = [line for line in lines[1:] if self._take(line)]
        self._open(b"".join(line + b"\n" for line in whole))
        return self

    @property
    def _head(self) -> bytes:
        return sidecar.canonical({"schema": SCHEMA, "key": self.key})

    def _open(self, lines: bytes) -> None:
        assert self.path is not None
        sidecar.write({self.path: self._head + lines})
        self._file = self.path.open("ab")

    def _take(self, line: bytes) -> bool:
        """Whether a line holds a whole record, which then counts as done."""
        try:
            record = sidecar.parse(line, str(self.path))
        except StoreError:
            return False
        if record.get("run_sha256") != sidecar.run_digest(record):
            return False
        self.records[record["id"]] = record
        return True

    def add(self, record: Json) -> None:
        """Keep a finished example."""
        self.records[record["id"]] = record
        if self.path is not None and self._file is None:
            self._open(b"")
        if self._file is not None:
            self._file.write(sidecar.canonical(record))
            self._file.flush()
            os.fsync(self._file.fileno())

    def discard(self) -> None:
        """The work is done: the file goes."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
