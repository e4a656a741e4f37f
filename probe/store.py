"""Captures and results on disk: a folder that is whole or absent, and says so when it was damaged.

    folder/
        manifest.json             format, the caller's manifest, and per shard: file, size, sha256, tensors
        <32 hex>.safetensors      one per shard; named by a hash of the shard's name, never by text a user chose

A folder is written beside its target as `.headscope-<hex>.tmp`, flushed to the disk, and renamed. Its writer holds a lock on
`.headscope-<hex>.lock`, which the kernel drops when the writer dies; the next write in the same place removes what has no
holder (not on Windows, which has no such lock). Nothing here is pickled, and a shard counts only if it is a plain file with
one name, called what the shard's name hashes to.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headscope.kernels.errors import SelectionError, StoreError

if sys.platform != "win32":
    import fcntl


FORMAT = "headscope-capture/1"
MANIFEST = "manifest.json"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bfloat16, torch.float16, torch.float32, torch.float64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip

_SHARD_FILE = re.compile(r"[0-9a-f]{32}\.safetensors")
_LEFTOVER = re.compile(r"(\.headscope-[0-9a-f]{16})\.(?:tmp|lock)")
_MANIFEST_LIMIT = 64 << 20  # bytes; a manifest holds names and numbers, not data


def write(folder: Path, shards: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, object], *, overwrite: bool = False) -> None:
    """Write tensors and a manifest as one folder; until this returns, the folder is as it was before.

    With `overwrite`, the old and the new folder change places in one step where the system can (Linux). Elsewhere the target
    is absent for an instant, and a kill in that instant leaves the old capture beside it as `.headscope-<hex>-old.tmp`. Only a
    folder that holds nothing but a capture is ever replaced.

    Args:
        folder: the target; folders above it are made.
        shards: tensors by name, by shard; a shard is one file. Dtypes as in `DTYPES`, on any device.
        manifest: what JSON can hold: string keys, strings, finite numbers, booleans, None, lists. Tuples come back as lists.
        overwrite: replace a capture that is already there.

    Raises:
        StoreError: the target exists, a tensor or value cannot be stored, or the disk refused; nothing is left behind.
    """
    target = Path(os.path.abspath(folder))  # resolve() would follow a link at the target
    plain = _plain(manifest, "manifest")
    ready = {_text(shard): {_text(name): _storable(shard, name, x) for name, x in named.items()} for shard, named in shards.items()}
    need = sum(x.nbytes for named in ready.values() for x in named.values())
    _check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(target.parent)
        free = shutil.disk_usage(target.parent).free
        if need > free:
            raise StoreError(f"{target}: the capture needs {need:,} bytes and {free:,} are free; nothing was written")
        with _temporary_folder(target.parent) as temporary:
            entries = {shard: _write_shard(temporary, shard, tensors) for shard, tensors in ready.items()}
            with (temporary / MANIFEST).open("xb") as file:
                file.write(_seal(plain, entries))
            _flush(temporary / MANIFEST)
            _flush(temporary)
            _move(temporary, target, overwrite)
    except StoreError:
        raise
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{target}: the capture could not be written: {error}; nothing was kept of it") from error
    try:
        _flush(target.parent)
    except OSError as error:
        raise StoreError(f"{target}: written, but the disk did not confirm it: {error}; a power cut could undo it") from error


@dataclass(frozen=True)
class _Entry:
    """What the manifest says of one shard."""

    file: str
    size: int
    sha256: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name

    def to_dict(self) -> dict[str, object]:
        tensors = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in self.tensors.items()}
        return {"file": self.file, "size": self.size, "sha256": self.sha256, "tensors": tensors}


@dataclass(frozen=True, eq=False)
class Store:
    """An open capture. Nothing is read before it is asked for.

    Attributes:
        folder: where it lies.
        manifest: what was given to `write`.
    """

    folder: Path
    manifest: dict[str, object]
    _entries: dict[str, _Entry] = field(repr=False)
    _identity: tuple[int, int] = field(repr=False)  # of the folder, so that its replacement does not go unnoticed
    _verified: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)  # what a shard's file was when it was hashed

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Read and check the manifest, and that every shard is there at its full size.

        Raises:
            StoreError: no capture here, or one of another format, or damaged.
        """
        place = Path(folder)
        if not place.is_dir():
            raise StoreError(f"{place}: no such capture; give the folder that was written")
        identity = _identity(place)
        manifest, entries = _unseal(place / MANIFEST)
        store = cls(place, manifest, entries, identity)
        for shard in entries:
            store._file(shard)
        return store

    @property
    def shards(self) -> dict[str, tuple[str, ...]]:
        """Names of the tensors in each shard."""
        return {shard: tuple(entry.tensors) for shard, entry in self._entries.items()}

    def shape(self, shard: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the manifest."""
        return self._find(shard, name)[1]

    def dtype(self, shard: str, name: str) -> torch.dtype:
        """Dtype of a tensor, from the manifest."""
        return DTYPES[self._find(shard, name)[0]]

    def read(self, shard: str, name: str) -> Tensor:
        """One whole tensor. The first read of a shard compares the whole file with its sha256; later ones trust that,
        as long as size and time of the file stay the same.

        Raises:
            SelectionError: no such shard or tensor.
            StoreError: the file is missing or damaged.
        """
        self._find(shard, name)
        if self._verified.get(shard) != _stamp(self._file(shard)):
            self._verify_shard(shard)
        return self._load(shard, name, None)

    def read_slice(self, shard: str, name: str, index: tuple[int | slice, ...]) -> Tensor:
        """A part of a tensor, such as one head, reading no more of the file than that.

        The checksum is over the whole file, so here it is NOT compared: only the file's size, its header and the shape are.
        Call `verify()` first where the disk is not trusted.

        Args:
            index: an integer or a slice with a positive step per axis, from the first; axes left out are taken whole.

        Raises:
            SelectionError: no such shard or tensor, or an index outside it.
            StoreError: the file is missing, or its size or header is wrong.
        """
        ranges = _ranges(index, self._find(shard, name)[1], name)
        part = self._load(shard, name, tuple(slice(start, stop) for start, stop, _ in ranges))
        return part[tuple(0 if step is None else slice(None, None, step) for _, _, step in ranges)]

    def verify(self) -> None:
        """Compare every file with its sha256 and every header with the manifest, whatever was compared before.

        Raises:
            StoreError: the first damage found.
        """
        _unseal(self.folder / MANIFEST)
        for shard, entry in self._entries.items():
            self._verify_shard(shard)
            for name, (_, shape) in entry.tensors.items():
                self._load(shard, name, tuple(slice(0, 0) for _ in shape))

    def _find(self, shard: str, name: str) -> tuple[str, tuple[int, ...]]:
        if shard not in self._entries:
            raise SelectionError(f"no shard {shard!r} in {self.folder}: {_list(self._entries)}")
        tensors = self._entries[shard].tensors
        if name not in tensors:
            raise SelectionError(f"no tensor {name!r} in shard {shard!r}: {_list(tensors)}")
        return tensors[name]

    def _file(self, shard: str) -> Path:
        """The file of a shard, after a look at what lies under that name now."""
        entry = self._entries[shard]
        path = self.folder / entry.file
        size = _plain_file_size(path)
        if _identity(self.folder) != self._identity:
            raise StoreError(f"{self.folder}: replaced by another capture since it was opened; open it again")
        if size != entry.size:
            raise StoreError(f"{path}: {size:,} bytes where {entry.size:,} were written; the file is damaged, capture again")
        return path

    def _verify_shard(self, shard: str) -> None:
        path = self._file(shard)
        before = _stamp(path)
        if _sha256(path) != self._entries[shard].sha256:
            raise StoreError(f"{path}: the sha256 is not the one written; the file is damaged, capture again")
        self._verified[shard] = before

    def _load(self, shard: str, name: str, cut: tuple[slice, ...] | None) -> Tensor:
        path = self._file(shard)
        dtype, shape = self._entries[shard].tensors[name]
        try:
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(name)
                found = tuple(part.get_shape())
                value: Tensor = file.get_tensor(name) if not cut or found != shape else part[cut]
        except (SafetensorError, OSError, ValueError) as error:
            raise StoreError(f"{path}: {name!r} cannot be read: {error}; the file is damaged, capture again") from error
        if found != shape or value.dtype != DTYPES[dtype]:
            raise StoreError(
                f"{path}: {name!r} is {list(found)} of {value.dtype} where the manifest says {list(shape)} of {dtype}; the file is damaged"
            )
        return value


def _write_shard(folder: Path, shard: str, tensors: dict[str, Tensor]) -> _Entry:
    path = folder / _file_name(shard)
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, x in tensors.items():
        storage = x.untyped_storage().data_ptr()
        own[name] = x.clone() if storage in storages else x  # safetensors refuses tensors that share memory
        storages.add(storage)
    save_file(own, path)
    _flush(path)
    shapes = {name: (str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in tensors.items()}
    return _Entry(path.name, path.stat().st_size, _sha256(path), shapes)


def _seal(manifest: object, entries: Mapping[str, _Entry]) -> bytes:
    """The manifest as bytes that carry their own sha256, taken with that field empty."""
    return _dump({"format": FORMAT, "sha256": "", "manifest": manifest, "shards": {name: e.to_dict() for name, e in entries.items()}})


def _dump(document: dict[str, object]) -> bytes:
    def text(sha256: str) -> bytes:
        return (json.dumps({**document, "sha256": sha256}, indent=1, allow_nan=False) + "\n").encode("ascii")

    return text(hashlib.sha256(text("")).hexdigest())


def _unseal(path: Path) -> tuple[dict[str, object], dict[str, _Entry]]:
    """The caller's manifest and the shards, out of a file that is exactly what `_seal` writes."""
    if _plain_file_size(path) > _MANIFEST_LIMIT:
        raise StoreError(f"{path}: over {_MANIFEST_LIMIT:,} bytes; this is not a manifest of ours")
    try:
        content = _read(path)
        document = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not readable as JSON: {error}; the file is damaged, capture again") from error
    if not isinstance(document, dict) or "format" not in document:
        raise StoreError(f"{path}: not the manifest of a capture")
    if document["format"] != FORMAT:
        raise StoreError(f"{path}: the format is {document['format']!r} and this version reads {FORMAT!r}; capture again, or read it there")
    try:
        whole = _dump(document) == content
    except (ValueError, RecursionError):
        whole = False
    manifest, shards = document.get("manifest"), document.get("shards")
    if not whole or set(document) != {"format", "sha256", "manifest", "shards"}:
        raise StoreError(f"{path}: the sha256 is not the one written; the file is damaged or was edited, capture again")
    if not isinstance(manifest, dict) or not isinstance(shards, dict):
        raise StoreError(f"{path}: not the manifest of a capture")
    return manifest, {shard: _entry(path, shard, given) for shard, given in shards.items()}


def _entry(path: Path, shard: str, given: object) -> _Entry:
    """One shard's part of a manifest; a checksum that fits does not make it trusted, so every field is looked at."""
    wrong = StoreError(f"{path}: the entry of shard {shard!r} is malformed; this was not written by Headscope")
    if not isinstance(given, dict) or set(given) != {"file", "size", "sha256", "tensors"}:
        raise wrong
    file, size, sha256, tensors = given["file"], given["size"], given["sha256"], given["tensors"]
    if not _encodes(shard) or file != _file_name(shard):
        raise StoreError(f"{path}: shard {shard!r} points to {file!r}, which is not its name; this was not written by Headscope")
    if type(size) is not int or not isinstance(sha256, str) or not isinstance(tensors, dict):
        raise wrong
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape"} or not _encodes(name):
            raise wrong
        dtype, shape = tensor["dtype"], tensor["shape"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise wrong
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise wrong
        shapes[name] = (dtype, tuple(shape))
    return _Entry(file, size, sha256, shapes)


def _file_name(shard: str) -> str:
    return hashlib.sha256(shard.encode()).hexdigest()[:32] + ".safetensors"


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise StoreError(f"{target} exists; give another folder, or overwrite=True to replace the capture in it")
    ours = target.is_dir() and not target.is_symlink()
    ours = ours and all(name == MANIFEST or _SHARD_FILE.fullmatch(name) for name in os.listdir(target))
    if not ours:
        raise StoreError(f"{target} holds something else than a capture, so it is not replaced; give another folder")


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder that goes when the block ends, unless it was moved away; locked against `_remove_orphans` meanwhile."""
    while True:
        stem = f".headscope-{secrets.token_hex(8)}"
        lock, folder = parent / f"{stem}.lock", parent / f"{stem}.tmp"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Another write may have taken the file for an orphan before it was locked.
            held = _lock(descriptor) and os.path.samestat(os.fstat(descriptor), lock.stat())
        except FileNotFoundError:
            held = False
        if held:
            break
        os.close(descriptor)
    try:
        folder.mkdir()
        yield folder
    finally:
        # A failure to clean up must not hide the first error, nor make a finished capture look failed: the next write tries again.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
        lock.unlink(missing_ok=True)


def _remove_orphans(parent: Path) -> None:
    """Remove what writers that died have left in this folder."""
    if sys.platform == "win32":
        return
    stems = {found[1] for name in os.listdir(parent) if (found := _LEFTOVER.fullmatch(name))}
    for stem in stems:
        lock, folder = parent / f"{stem}.lock", parent / f"{stem}.tmp"
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            continue  # someone else's, or not ours to touch
        try:
            if _lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock on an open file; False where another process or descriptor holds it."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _move(temporary: Path, target: Path, overwrite: bool) -> None:
    """Put the finished folder in place; what was there before ends up under the temporary name."""
    if not overwrite or not target.exists():
        temporary.rename(target)  # fails where a folder with files in it has come up meanwhile
    elif not _exchange(temporary, target):
        aside = temporary.with_name(temporary.name.replace(".tmp", "-old.tmp"))
        target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            aside.rename(target)
            raise
        aside.rename(temporary)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change names in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):  # an old kernel, or a file system without it
        return False
    raise OSError(code, os.strerror(code), str(b))


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":
        return  # cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno != errno.EINVAL:  # some network file systems have no such call for folders
            raise
    finally:
        os.close(descriptor)


def _plain_file_size(path: Path) -> int:
    """Size of a file that is really in its folder: no link of either kind, no device, no folder."""
    try:
        found = path.lstat()
    except OSError as error:
        raise StoreError(f"{path}: missing ({error.strerror}); the capture is damaged, capture again") from error
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise StoreError(f"{path}: a link or not a plain file, so it is not read; copy the capture with its files")
    return found.st_size


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.lstat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _open_plain(path: Path) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))


def _read(path: Path) -> bytes:
    with os.fdopen(_open_plain(path), "rb") as file:
        return file.read(_MANIFEST_LIMIT + 1)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with os.fdopen(_open_plain(path), "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _storable(shard: str, name: str, x: Tensor) -> Tensor:
    """The tensor as plain bytes in memory: dense, contiguous, on the CPU."""
    where = f"tensor {name!r} of shard {shard!r}"
    if not isinstance(x, Tensor):
        raise StoreError(f"{where} is a {type(x).__name__}; give a tensor")
    if x.dtype not in DTYPES.values():
        raise StoreError(f"{where} is {x.dtype}; a store holds {', '.join(DTYPES)}")
    if x.layout != torch.strided or x.is_meta:
        raise StoreError(f"{where} is {'on the meta device' if x.is_meta else x.layout}, so it has no bytes to store; give a dense tensor")
    return x.detach().cpu().resolve_neg().contiguous()


def _text(name: str) -> str:
    if not isinstance(name, str) or not _encodes(name) or name == "__metadata__":
        raise StoreError(f"{name!r} cannot be a name; give a string that is valid Unicode and not '__metadata__'")
    return name


def _encodes(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _plain(value: object, where: str) -> object:
    """The value as JSON keeps it; what JSON would change or refuse raises."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise StoreError(f"{where} has the key {key!r}; JSON keeps only strings as keys: give {str(key)!r}")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise StoreError(f"{where} is {value!r}, which JSON cannot keep; give strings, finite numbers, booleans, None, lists or dicts of them")


def _ranges(index: tuple[int | slice, ...], shape: tuple[int, ...], name: str) -> list[tuple[int, int, int | None]]:
    """Start, stop and step per axis; the step is None where an integer takes the axis away."""
    if len(index) > len(shape):
        raise SelectionError(f"{len(index)} indices for {name!r}, which is {list(shape)}; give at most {len(shape)}")
    ranges: list[tuple[int, int, int | None]] = []
    for axis, size in enumerate(shape):
        part = index[axis] if axis < len(index) else slice(None)
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            if step < 1:
                raise SelectionError(f"a step of {step} on axis {axis} of {name!r}; give a positive one and flip the result")
            ranges.append((start, max(start, stop), step))
        elif not -size <= part < size:
            raise SelectionError(f"no index {part} on axis {axis} of {name!r}, which is {list(shape)}; give {-size} to {size - 1}")
        else:
            ranges.append((part % size, part % size + 1, None))
    return ranges


def _list(names: Mapping[str, object]) -> str:
    return f"there are {', '.join(map(repr, names))}" if names else "there are none"
