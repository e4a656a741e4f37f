"""The compiled part of the CPU path: built at first use with the system's C compiler, kept in the user's cache, loaded by ctypes.

The cache is the folder `headscope` in $XDG_CACHE_HOME or ~/.cache, for this user alone. A file there is named after what it was built
from (source, compiler, flags, processor) and after its own content, so a file that is damaged, or was built for another machine
sharing the home directory, is never loaded. Where the cache cannot be used, a private temporary folder serves for one process.

    $CC                    the compiler; else the first of cc, gcc and clang that is there
    HEADSCOPE_CPU_KERNEL   0 switches the path off
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("attention.c")
LOG = logging.getLogger("headscope.kernels")

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_SECONDS = 30  # a compiler that takes longer is given up; this source takes about one
_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features", "isa")


class _Unusable(Exception):
    """Why there is no compiled part."""


@dataclass(frozen=True, eq=False)
class Library:
    """The compiled part, ready to be called.

    Attributes:
        attend: `headscope_attend(call, begin, end)` of attention.c; it lets other Python threads run.
        scratch: `headscope_scratch(call)`, in floats.
        gemm: address of a BLAS `sgemm`.
        set_threads: sets how many threads BLAS uses when called from this thread, and returns the number before.
        detail: compiler, flags, SIMD level, BLAS and where the file lies.
        kept: what must live as long as the addresses above are used.
    """

    attend: Callable[[object, int, int], None]
    scratch: Callable[[object], int]
    gemm: int
    set_threads: Callable[[int], int]
    detail: str
    kept: tuple[object, ...]

    @contextmanager
    def one_blas_thread(self) -> Iterator[None]:
        """BLAS called from this thread uses no other."""
        before = self.set_threads(1)
        try:
            yield
        finally:
            self.set_threads(before)


def load() -> Library | None:
    """The compiled part, built if need be; None where there is none. The reason is logged once per process."""
    return None if _switched_off() else _attempt()[0]


def state() -> tuple[bool, str]:
    """Whether the compiled part is usable, and how it was built or why it was not."""
    if _switched_off():
        return False, "switched off by HEADSCOPE_CPU_KERNEL=0"
    library, reason = _attempt()
    return (False, reason) if library is None else (True, library.detail)


def forget() -> None:
    """Let the next `load` look for compiler and cache again."""
    _attempt.cache_clear()


def _switched_off() -> bool:
    return os.environ.get("HEADSCOPE_CPU_KERNEL") == "0"


@functools.cache
def _attempt() -> tuple[Library | None, str]:
    try:
        return _load(), ""
    except _Unusable as reason:
        LOG.warning("attention on the CPU runs blockwise, a few times slower than compiled: %s", reason)
        return None, str(reason)


def _load() -> Library:
    if os.name != "posix":
        raise _Unusable(f"it is not built on {platform.system()}")
    compiler, version = _find_compiler()
    native = _NATIVE.get(platform.machine())
    flags = (*_FLAGS, native) if native else _FLAGS
    try:
        source = SOURCE.read_bytes()
    except OSError as error:
        raise _Unusable(f"its source cannot be read: {error}") from error
    made_from = "\0".join((source.decode(), version, *compiler, *flags, _processor()))
    key = hashlib.sha256(made_from.encode()).hexdigest()[:24]
    folder = _cache_folder()
    if folder is not None:
        found = _find(folder, key) or _build(compiler, flags, folder, key)
        if found is not None:
            return _open(found, f"{version}, {' '.join(flags)}", str(found).replace(str(Path.home()), "~", 1))
    with tempfile.TemporaryDirectory(prefix="headscope-") as private:  # mode 0700; an open library outlives its file
        found = _build(compiler, flags, Path(private), key)
        if found is None:
            raise _Unusable(f"neither the cache nor {private} can be written")
        return _open(found, f"{version}, {' '.join(flags)}", "not kept, because the cache cannot be used")


def _find_compiler() -> tuple[tuple[str, ...], str]:
    """The command, and the first line of what it says about itself."""
    named = shlex.split(os.environ.get("CC", ""))
    if not named:
        here = [path for path in map(shutil.which, _COMPILERS) if path]
        if not here:
            raise _Unusable(f"there is no C compiler: none of {', '.join(_COMPILERS)} is on the PATH, and CC is not set")
        named = here[:1]
    said = _call([*named, "--version"])
    first = said.strip().splitlines()
    if not first:
        raise _Unusable(f"{shlex.join(named)} --version says nothing, so it is not a C compiler")
    return tuple(named), first[0]


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise _Unusable(f"{command[0]} was given up after {_SECONDS} s") from error
    except OSError as error:
        raise _Unusable(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise _Unusable(f"{command[0]} failed with status {done.returncode}: {next((line for line in said if 'error' in line), said[0])}")
    return done.stdout


def _processor() -> str:
    """What this processor can do, as far as the system tells: a build for it may not run on another."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        found = [line for line in first.splitlines() if line.split(":")[0].strip() in _PROCESSOR]
        if found:
            return "\n".join(found)
    return f"{platform.machine()} {platform.processor()}"


def _cache_folder() -> Path | None:
    """The cache, made if need be; None where it cannot be made or others could write to it."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "headscope"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_private(folder.stat()) else None
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return None


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _find(folder: Path, key: str) -> Path | None:
    """A build of this key that is ours, that only we can write, and whose content is what its name says."""
    for path in sorted(folder.glob(f"attention-{key}-*.so")):
        with suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and _is_private(status) and path.name == _name(key, path.read_bytes()):
                return path
    return None


def _name(key: str, content: bytes) -> str:
    return f"attention-{key}-{hashlib.sha256(content).hexdigest()[:24]}.so"


def _build(compiler: tuple[str, ...], flags: tuple[str, ...], folder: Path, key: str) -> Path | None:
    """Compile into the folder; None where it cannot be written. Others may do the same at the same time: each renames a whole file."""
    try:
        handle, made = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=folder)
        os.close(handle)
    except OSError:
        return None
    try:
        _call([*compiler, *flags, str(SOURCE), "-o", made, "-lm"])
        os.chmod(made, 0o700)
        path = folder / _name(key, Path(made).read_bytes())
        os.replace(made, path)
    except OSError:
        return None
    finally:
        Path(made).unlink(missing_ok=True)
    return path


def _open(path: Path, built: str, place: str) -> Library:
    try:
        library = ctypes.CDLL(str(path))
        attend, scratch, check, simd = (getattr(library, f"headscope_{name}") for name in ("attend", "scratch", "check", "simd"))
    except (OSError, AttributeError) as error:
        path.unlink(missing_ok=True)
        raise _Unusable(f"what was built cannot be loaded: {error}") from error
    attend.restype, attend.argtypes = None, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    scratch.restype, scratch.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    check.restype, check.argtypes = ctypes.c_int, [ctypes.c_void_p]
    simd.restype = ctypes.c_char_p
    torch_library = ctypes.CDLL(torch._C.__file__)  # looks a name up in all that torch was linked with
    blas, said = _symbol(torch_library, "sgemm_"), "BLAS of torch"
    if blas is None or not check(_address(blas)):
        blas, said = _SGEMM(_torch_sgemm), "torch.mm"
        if not check(_address(blas)):
            raise _Unusable("no matrix product of torch can be called from C")
    detail = f"{built}, {simd().decode()}, {said}, {place}"
    return Library(attend, scratch, _address(blas), _thread_setter(torch_library), detail, (library, torch_library, blas))


def _symbol(library: ctypes.CDLL, name: str) -> Callable[..., int] | None:
    found: Callable[..., int] | None = getattr(library, name, None)
    return found


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def _thread_setter(library: ctypes.CDLL) -> Callable[[int], int]:
    """Both numbers belong to the calling thread: MKL's own, and that of OpenMP, which every other BLAS of torch follows."""
    mkl = _symbol(library, "MKL_Set_Num_Threads_Local")
    if mkl is not None:
        return mkl
    get, put = _symbol(library, "omp_get_max_threads"), _symbol(library, "omp_set_num_threads")
    if get is None or put is None:
        return lambda count: count

    def set_threads(count: int) -> int:
        before = get()
        put(count)
        return before

    return set_threads


_SGEMM = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_char_p, *[ctypes.POINTER(ctypes.c_int64)] * 3, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_float), ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_int64),
)  # fmt: skip


def _torch_sgemm(
    order_a: bytes, order_b: bytes, m: object, n: object, k: object, alpha: object, a: int, lda: object, b: int, ldb: object,
    beta: object, c: int, ldc: object,
) -> None:  # fmt: skip
    """c = b a for column-major matrices as attention.c gives them, where torch's BLAS shows no `sgemm_`."""
    rows, columns, inner, step_a, step_b, step_c = (int(size[0]) for size in (m, n, k, lda, ldb, ldc))  # type: ignore[index]
    left = _view(b, columns, inner, step_b)
    right = _view(a, rows, inner, step_a).T if order_a == b"T" else _view(a, inner, rows, step_a)
    torch.mm(left, right, out=_view(c, columns, rows, step_c))


def _view(address: int, rows: int, columns: int, step: int) -> torch.Tensor:
    """[rows, columns] of the memory at an address, whose rows lie `step` floats apart."""
    if not rows or not columns:
        return torch.empty(rows, columns)
    flat = torch.frombuffer((ctypes.c_float * ((rows - 1) * step + columns)).from_address(address), dtype=torch.float32)
    return flat.as_strided((rows, columns), (step, 1))
