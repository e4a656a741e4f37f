"""Compile every kernel for every kind of GPU, on a machine that has none, and hold the result against what was recorded.

`python -m headscope.kernels.triton.targets` prints a table and fails where a kernel does not compile, asks for more shared memory
than there is, spills registers on sm_90, or has inner loops on sm_90 more than 5 % longer or shorter than recorded with the same
triton. `--record` writes those lengths anew. The compiled code is read with the disassembler that comes with triton.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("recorded.json")
STRICT = "sm_90"  # where spills and loop lengths are held against the record
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes of shared memory that one program may ask for
TOLERANCE = 0.05
WAIT = 16  # instructions; a shorter loop waits for a copy or a barrier, or ends the program
PLAN = [(128, tuple(SHARED)), (64, (STRICT,))]  # head widths, and what they are compiled for; all in bfloat16
PROCESSES = 2
_LABEL = re.compile(r"^(\.L_[\w.]+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_JUMP = re.compile(r"\b(?:BRA|JMP|CALL\S*)\b.*`\((\.L_[\w.]+)\)")


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel on one target.

    Attributes:
        kernel: its name, with the head width; target: sm_80, … or gfx942.
        registers: of one thread.
        spills: bytes (NVIDIA) or registers (AMD) of one thread that did not find room and went to memory.
        shared: bytes of shared memory of one program.
        loops: instructions of each innermost loop, in the order of the code; empty on AMD, where they are not counted.
        error: why it did not compile; None where it did.
    """

    kernel: str
    target: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    loops: tuple[int, ...] = ()
    error: str | None = None


def find_loops(sass: str) -> tuple[int, ...]:
    """Instructions of each innermost loop in disassembled NVIDIA code: what lies between a label and a later jump back to it."""
    place: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    count = 0
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            place[label[1]] = count
        elif instruction := _INSTRUCTION.match(line):
            count += 1
            jump = _JUMP.search(instruction[1])
            if jump and jump[1] in place and count - place[jump[1]] >= WAIT:
                found.append((place[jump[1]], count))
    inner = [(a, b) for a, b in found if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in found)]
    return tuple(stop - start for start, stop in sorted(set(inner)))


def find_spills(sass: str, usage: str) -> tuple[int, int]:
    """Registers, and bytes of local memory, of one thread: from `cuobjdump --dump-resource-usage`, or 4 for each local access if more."""
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    accesses = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return numbers["REG"], max(numbers["STACK"] + numbers["LOCAL"], 4 * accesses)


def find_faults(found: Sequence[Compiled], record: Mapping[str, Any], triton_version: str) -> list[str]:
    """What is wrong with what was compiled, one sentence for each fault; empty where nothing is.

    Args:
        found: everything that was compiled.
        record: what `--record` wrote.
        triton_version: with which it was compiled; loops are held only against a record of the same version.
    """
    faults = []
    for one in found:
        name = f"{one.kernel} on {one.target}"
        if one.error is not None:
            faults.append(f"{name} does not compile: {one.error}")
            continue
        if one.shared > SHARED[one.target]:
            faults.append(f"{name} asks for {one.shared} bytes of shared memory; there are {SHARED[one.target]}")
        if one.target != STRICT:
            continue
        if one.spills:
            faults.append(f"{name} spills {one.spills} bytes: use smaller tiles, more warps or fewer stages")
        if record["triton"] == triton_version:
            before = tuple(record["loops"].get(one.kernel, ()))
            same = len(before) == len(one.loops) and all(abs(n - b) <= TOLERANCE * b for n, b in zip(one.loops, before, strict=True))
            if not same:
                faults.append(f"{name} has loops of {_counts(one.loops)} instructions, recorded are {_counts(before)}; --record if meant")
    return faults


def to_table(found: Sequence[Compiled], record: Mapping[str, Any]) -> str:
    """One line for each kernel and target."""
    width = max(len(one.kernel) for one in found)
    lines = [f"{'kernel':{width}}  {'target':7} {'registers':>9} {'spills':>6} {'shared':>7}  loops (recorded)"]
    for one in found:
        before = record["loops"].get(one.kernel, ()) if one.target == STRICT else ()
        tail = one.error or _counts(one.loops) + (f" ({_counts(before)})" if before else "")
        lines.append(f"{one.kernel:{width}}  {one.target:7} {one.registers:9} {one.spills:6} {one.shared:7}  {tail}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the table and the faults; 0 where there are none, or where triton is not installed."""
    parser = argparse.ArgumentParser(prog="python -m headscope.kernels.triton.targets", description="Compile every kernel without a GPU.")
    parser.add_argument("--record", action="store_true", help=f"write the loop lengths of {STRICT} to {RECORD.name}")
    options = parser.parse_args(argv)
    if find_spec("triton") is None:
        print("triton is not installed, so no kernel was compiled")
        return 0
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, so kernels are interpreted: unset it to compile them")
    triton_version = version("triton")
    found = compile_all()
    if options.record:
        loops = {one.kernel: list(one.loops) for one in found if one.target == STRICT}
        RECORD.write_text(json.dumps({"triton": triton_version, "loops": loops}, indent=1) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    print(to_table(found, record))
    if record["triton"] != triton_version:
        print(f"loops were not compared: this is triton {triton_version}, recorded are those of {record['triton']}")
    faults = find_faults(found, record, triton_version)
    print("\n".join(faults) or "no faults")
    return 1 if faults else 0


def compile_all() -> list[Compiled]:
    """Compile the whole plan in fresh processes, with an empty cache of their own."""
    jobs = [(width, name, target) for width, targets in PLAN for name in _specimens(width) for target in targets]
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=_use_cache, initargs=(cache,)) as pool,
    ):
        return list(pool.map(_compile, jobs))


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def _specimens(width: int) -> dict[str, Any]:
    from headscope.kernels.triton import backward, specimens

    return {one.name: one for module in (specimens, backward) for one in module.specimens(width, "bf16")}


def _compile(job: tuple[int, str, str]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    width, name, target = job
    one = _specimens(width)[name]
    nvidia = target.startswith("sm_")
    order = list(one.signature)
    aligned = {(order.index(argument),): [["tt.divisibility", 16]] for argument in one.aligned}
    constants = one.constants if nvidia else one.constants | one.amd
    stages = one.num_stages if nvidia else min(one.num_stages, 2)
    options = {"num_warps": one.num_warps, "num_stages": stages, "enable_fp_fusion": True}
    chip = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    label = f"{name} D={width}"
    try:
        made: Any = triton.compile(ASTSource(one.kernel, one.signature, constants, aligned), target=chip, options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        return Compiled(label, target, error=f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}")
    if not nvidia:
        notes = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", made.asm["amdgcn"]))
        spills = int(notes["vgpr_spill_count"]) + int(notes["sgpr_spill_count"])
        return Compiled(label, target, int(notes["vgpr_count"]), spills, made.metadata.shared)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        sass = _disassemble("nvdisasm", "-c", str(binary))
        registers, spills = find_spills(sass, _disassemble("cuobjdump", "--dump-resource-usage", str(binary)))
    return Compiled(label, target, registers, spills, made.metadata.shared, find_loops(sass))


def _disassemble(tool: str, *arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True).stdout


def _counts(loops: Sequence[int]) -> str:
    return ", ".join(map(str, loops)) or "none"


if __name__ == "__main__":
    sys.exit(main())
