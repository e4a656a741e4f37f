"""Do the tests notice a wrong formula? Each mutant of `mutant_list.py` is put into a copy of the kernels, and its tests must fail there.

    python -m tests.kernels.mutants [--only NAME] [--implementation blockwise]

The tests run against the copy unchanged first: a test that fails anyway catches nothing. Exit status 1 if a mutant survives, or its text
is not in the source exactly once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
SECONDS = 400  # of one run of tests; a mutant that hangs is caught
AT_ONCE = 2

# A pytest plugin. Without it a run might test the installed kernels, and Hypothesis would spend its time on the smallest failing call.
PLUGIN = """
import headscope.kernels.problem
import torch
from hypothesis import Phase, settings

assert headscope.kernels.problem.__file__.startswith({copy!r}), headscope.kernels.problem.__file__
torch.set_num_threads(1)
settings.register_profile("mutants", phases=(Phase.generate,), print_blob=False)
settings.load_profile("mutants")
"""


@dataclass(frozen=True)
class Verdict:
    """How the tests of one mutant, or of the unchanged kernels, ended.

    Attributes:
        state: "caught", "survived", or why there was no result.
        detail: the test that failed; the end of the output where there was no result.
        seconds: that the run took.
    """

    state: str
    detail: str
    seconds: float


def make_copy(folder: Path) -> Path:
    """A tree in which `headscope.kernels` is a copy and the other packages are links. Returns the copy of kernels/."""
    packages = folder / "headscope"
    packages.mkdir()
    for link in (ROOT / "typings" / "headscope").iterdir():
        if link.name != "kernels":
            (packages / link.name).symlink_to(link.resolve(), target_is_directory=True)
    kernels = packages / "kernels"
    shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "mutants_plugin.py").write_text(PLUGIN.format(copy=str(folder)), encoding="utf-8")
    return kernels


def run_tests(folder: Path, tests: Iterable[str]) -> Verdict:
    """Run tests on the copy in a folder until the first failure."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),  # compiled kernels of this copy
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-rfE",
        "--timeout=0",
        "-p",
        "no:cacheprovider",
        "-p",
        "mutants_plugin",
        *tests,
    ]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Verdict("caught", f"ran longer than {SECONDS} s", time.monotonic() - start)
    seconds = time.monotonic() - start
    lines = done.stdout.strip().splitlines()
    failed = [line.split(" - ")[0].split("::", 1)[-1] for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0:
        return Verdict("survived", lines[-1] if lines else "", seconds)
    if done.returncode == 1 and failed:
        return Verdict("caught", failed[0], seconds)
    return Verdict(f"pytest ended with {done.returncode}", " / ".join([*lines[-4:], done.stderr.strip()[-300:]]), seconds)


def try_mutant(mutant: Mutant) -> Verdict:
    """Run the tests of one mutant on a copy of its own."""
    with tempfile.TemporaryDirectory(prefix="headscope-mutant-") as name:
        kernels = make_copy(Path(name))
        reason = mutant.misfit(kernels)
        if reason is not None:
            return Verdict("not applied", reason, 0.0)
        mutant.apply(kernels)
        return run_tests(Path(name), mutant.tests)


def try_unchanged(tests: tuple[str, ...]) -> Verdict:
    """Run a choice of tests on an unchanged copy."""
    with tempfile.TemporaryDirectory(prefix="headscope-mutant-") as name:
        make_copy(Path(name))
        return run_tests(Path(name), tests)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants that the command line names, print a table. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.mutants", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", choices=[mutant.name for mutant in MUTANTS], metavar="NAME", help="one mutant; may be repeated"
    )
    parser.add_argument("--implementation", choices=sorted({mutant.implementation for mutant in MUTANTS}))
    given = parser.parse_args(arguments)
    chosen = [
        mutant
        for mutant in MUTANTS
        if given.only in (None, []) or mutant.name in given.only
        if given.implementation in (None, mutant.implementation)
    ]
    if not chosen:
        parser.error("no mutant is of that name and implementation")

    start = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        choices = list(dict.fromkeys(mutant.tests for mutant in chosen))
        for tests, verdict in zip(choices, pool.map(try_unchanged, choices), strict=True):
            print(f"unchanged kernels: {verdict.detail} ({verdict.seconds:.0f} s)   {' '.join(tests)}", flush=True)
            if verdict.state != "survived":
                print("these tests fail without any mutant; nothing can be said", flush=True)
                return 1
        width = max(len(mutant.name) for mutant in chosen)
        bad = 0
        for number, (mutant, verdict) in enumerate(zip(chosen, pool.map(try_mutant, chosen), strict=True), 1):
            bad += verdict.state != "caught"
            print(
                f"{number:3}/{len(chosen)}  {mutant.name:{width}}  {verdict.state:9} {verdict.seconds:4.0f} s  {verdict.detail}", flush=True
            )
            if verdict.state != "caught":
                print(f"         kernels/{mutant.file}: {mutant.why}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants caught, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
