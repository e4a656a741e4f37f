"""A report on disk: one canonical JSON document, the pages made of it, and the digests that tie them together.

The document names the SHA-256 of every page, taken with the page's own mention of the document set to zeros; every page names the
SHA-256 of the document. So neither can change alone. A digest shows that something changed, not who made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from headscope.app.report.schema import Json
from headscope.kernels.errors import InputError, NonFiniteError, StoreError

SCHEMA = "headscope.attribution-report/v1"
ZEROS = "0" * 64
MENTION = re.compile(rb'(<code id="sidecar">)([0-9a-f]{64})(</code>)')
MOST_BYTES = 2**30


def canonical(document: Mapping[str, object]) -> bytes:
    """The one way to write a document down: ASCII, keys sorted, no spaces, shortest numbers.

    Raises:
        NonFiniteError: a number is NaN or infinite.
    """
    try:
        text = json.dumps(document, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise NonFiniteError(f"a number in the report is NaN or infinite, which JSON cannot say: {error}") from error
    return f"{text}\n".encode("ascii")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def run_digest(record: Mapping[str, object]) -> str:
    """What names one example's numbers: the SHA-256 of its record without that name."""
    return digest(canonical({key: value for key, value in record.items() if key != "run_sha256"}))


def page_digest(page: bytes) -> str:
    """SHA-256 of a page with its mention of the sidecar set to zeros."""
    return digest(MENTION.sub(rb"\g<1>" + ZEROS.encode() + rb"\g<3>", page))


def mention(page: bytes) -> str:
    """The sidecar's digest as a page has it.

    Raises:
        StoreError: the page names none, or several.
    """
    found = MENTION.findall(page)
    if len(found) != 1:
        raise StoreError(f"the page names {len(found)} sidecar digests instead of one: it is no report, or was changed")
    return str(found[0][1].decode())


def stamped(pages: Mapping[str, bytes], sidecar: bytes) -> dict[str, bytes]:
    """The pages, with the digest of the finished sidecar in place of the zeros."""
    own = digest(sidecar).encode()
    return {name: MENTION.sub(rb"\g<1>" + own + rb"\g<3>", page) for name, page in pages.items()}


def parse(content: bytes, name: str) -> Json:
    """A document from its bytes; not yet checked against the schema.

    Raises:
        StoreError: no JSON, or not an object.
    """

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")

    try:
        found = json.loads(content.decode("ascii"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{name} is no JSON of a report ({error}): it was changed or cut short") from error
    if not isinstance(found, dict):
        raise StoreError(f"{name} holds {type(found).__name__} instead of a report")
    return found


def read(path: Path) -> bytes:
    """The bytes of a file of a report.

    Raises:
        StoreError: it is missing, too large or cannot be read.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise StoreError(f"{path} has {path.stat().st_size} bytes; a report's files have at most {MOST_BYTES}")
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def sidecar_of(page: Path) -> Path:
    """Where the JSON beside a page lies."""
    return page.with_suffix(".json")


def write(files: Mapping[Path, bytes]) -> None:
    """Put files in place; each appears whole, and none of them before all are written.

    Raises:
        InputError: a folder takes no file.
    """
    temporary = {path: path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp") for path in files}
    path = next(iter(files))
    try:
        for path, content in files.items():
            path.parent.mkdir(exist_ok=True)
            with temporary[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, written in temporary.items():
            written.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        for written in temporary.values():
            if written.exists():
                written.unlink()


def check_writable(path: Path) -> None:
    """Ask before the work whether the report can be written after it.

    Raises:
        InputError: its folder is missing or takes no file, or a folder has its name.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: a report is a page, so its name ends in .html")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder")
    probe = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
