"""Finished examples of an evaluation on disk, a JSON line each, so that long work can stop and go on.

The first line names the work: model, plan, data, metrics and settings. Every line carries its own digest; a last line that was cut
short, as by a power failure, is dropped and its example measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from headscope.kernels.errors import InputError, StoreError

SCHEMA = "headscope.evaluation-log/v1"


class EvaluationLog:
    """The records so far, by their key.

    Args:
        path: of the file; None keeps them in memory only.
        work: what is being done; a log of other work is refused.

    Raises:
        InputError: the file belongs to other work.
        StoreError: it cannot be read or written, or is damaged elsewhere than at its end.
    """

    def __init__(self, path: Path | None, work: Mapping[str, object]) -> None:
        self.path, self.work = path, dict(work)
        self.records: dict[str, Any] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> EvaluationLog:
        if self.path is None:
            return self
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = self._take(content)
            file = self._file = self.path.open("r+b" if self.path.exists() else "xb")
            file.truncate(whole)
            file.seek(whole)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{self.path} cannot be kept as a log: {error.strerror}") from error
        if not whole:
            self._write(self._head)
        return self

    @property
    def _head(self) -> bytes:
        return _line({"schema": SCHEMA, "work": self.work})

    def add(self, key: str, record: Mapping[str, object]) -> None:
        """Keep a finished record."""
        self.records[key] = record
        self._write(_line({"key": key, "record": dict(record)}))

    def _take(self, content: bytes) -> int:
        """Read what is there; returns how many bytes of it are whole lines."""
        whole = 0
        lines = content.split(b"\n")
        for number, line in enumerate(lines[:-1]):
            found = _opened(line)
            if found is None:
                if number == len(lines) - 2:  # the end was being written
                    break
                raise StoreError(f"{self.path} line {number + 1} is damaged, or this is no log of an evaluation: choose another name")
            if number == 0:
                self._compare(found)
            else:
                self.records[str(found["key"])] = found["record"]
            whole += len(line) + 1
        if not whole and not self._head.startswith(content):
            raise StoreError(f"{self.path} is no log of an evaluation: choose another name")
        return whole

    def _compare(self, head: Mapping[str, Any]) -> None:
        if head.get("schema") != SCHEMA or not isinstance(head.get("work"), dict):
            raise StoreError(f"{self.path} is no log of an evaluation: choose another name")
        theirs = head["work"]
        other = [name for name in self.work if theirs.get(name) != json.loads(json.dumps(self.work[name]))]
        if other:
            raise InputError(f"{self.path} was begun with another {', '.join(other)}: delete it, or choose another name")

    def _write(self, line: bytes) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def _line(said: Mapping[str, object]) -> bytes:
    body = json.dumps(said, allow_nan=False)
    return f"{hashlib.sha256(body.encode()).hexdigest()[:16]} {body}\n".encode("ascii")


def _opened(line: bytes) -> dict[str, Any] | None:
    """What a whole line says."""
    digest, _, body = line.partition(b" ")
    if hashlib.sha256(body).hexdigest()[:16].encode() != digest:
        return None
    found = json.loads(body)
    return found if isinstance(found, dict) else None
