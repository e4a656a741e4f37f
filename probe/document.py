"""Results as JSON documents: ASCII, whole or absent, no key twice, no number that JSON has not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from headscope.kernels.errors import StoreError
from headscope.probe.whole_file import write_whole

Result = TypeVar("Result")


def write_document(path: Path, document: object) -> Path:
    """Write plain values; the file is whole or absent.

    Raises:
        StoreError: the folder takes no file.
    """
    return write_whole(path, (json.dumps(document, allow_nan=False) + "\n").encode("ascii"))


def read_document(path: Path, what: str, decode: Callable[[Any], Result]) -> Result:
    """What `decode` makes of the values in a file.

    Args:
        path: the file.
        what: what it should be, for messages: `attribution`, `health report`.
        decode: raises StoreError for values that are none.

    Raises:
        StoreError: there is no file, or it is none of these.
    """
    try:
        text = path.read_bytes().decode("ascii")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is no {what}: byte {error.start} is not ASCII") from error
    try:
        return decode(json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number))
    except StoreError as error:
        raise StoreError(f"{path.name}: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise StoreError(f"{path.name} is no JSON: {error}") from error


def _unique(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise StoreError(f"{key!r} stands there twice")
        found[key] = value
    return found


def _no_number(text: str) -> object:
    raise StoreError(f"it holds {text}, which is not a number of JSON")
