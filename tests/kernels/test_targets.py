"""Every kernel compiles for every kind of GPU, keeps its numbers in registers on sm_90, and has loops as long as recorded.

Compiling takes a process of its own: in this one the kernels may be interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

from headscope.kernels.triton import targets
from headscope.kernels.triton.targets import Compiled, find_faults, find_loops, find_spills, to_table

RECORD = {"triton": "3.7.1", "loops": {"forward D=128": [400, 500]}}
GOOD = Compiled("forward D=128", "sm_90", registers=200, shared=1000, loops=(400, 500))


def instructions(count: int, last: str = "") -> list[str]:
    """Lines as nvdisasm writes them."""
    lines = [f"        /*{16 * n:04x}*/                   FADD R1, R2, R3 ;" for n in range(count)]
    return [*lines, f"        /*{16 * count:04x}*/              {last} ;"] if last else lines


def disassembled(*parts: list[str] | str) -> str:
    return "\n".join(line for part in parts for line in ([part] if isinstance(part, str) else part))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton, which exists for Linux alone, is not installed: nothing was compiled")
@pytest.mark.slow  # `make gate` runs the same, and is part of `make test`
@pytest.mark.timeout(600)
def test_every_kernel_compiles_everywhere_without_spills_and_with_the_recorded_loops() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "headscope.kernels.triton.targets"], capture_output=True, text=True, env=environment, timeout=590
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {name.partition(" D=")[0] for name in json.loads(targets.RECORD.read_text(encoding="utf-8"))["loops"]}
    assert {
        "forward-base",
        "forward-everything",
        "columns",
        "rows",
        "top",
        "backward-delta",
        "backward-keys",
        "backward-queries",
    } <= kernels
    lines = [line.split() for line in done.stdout.splitlines()]
    for kernel in kernels:
        compiled = {(line[1], line[2]) for line in lines if line[:1] == [kernel]}
        assert compiled == {("D=128", target) for target in targets.SHARED} | {("D=64", "sm_90")}


def test_interpreted_kernels_are_not_taken_for_compiled_ones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        targets.main([])
    assert stopped.value.code == 2
    assert "unset it to compile" in capsys.readouterr().err


def test_without_triton_nothing_is_compiled_and_that_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    assert targets.main([]) == 0
    assert capsys.readouterr().out == "triton is not installed, so no kernel was compiled\n"


def test_a_loop_is_counted_from_its_label_to_the_jump_back() -> None:
    sass = disassembled(instructions(7), ".L_x_1:", instructions(29, "@!P0 BRA `(.L_x_1)"), instructions(5))
    assert find_loops(sass) == (30,)


def test_of_nested_loops_the_inner_one_counts_and_of_neighbours_both() -> None:
    inner = [".L_x_2:", *instructions(39, "@P1 BRA `(.L_x_2)")]
    nested = [".L_x_1:", *instructions(20), *inner, *instructions(20, "@P0 BRA `(.L_x_1)")]
    assert find_loops(disassembled(nested)) == (40,)
    assert find_loops(disassembled(nested, ".L_x_3:", instructions(49, "BRA.U UP0, `(.L_x_3)"))) == (40, 50)


def test_neither_a_jump_ahead_nor_a_wait_is_a_loop() -> None:
    assert find_loops(disassembled("", instructions(30, "@P0 BRA `(.L_x_9)"), ".L_x_9:", instructions(30))) == ()
    assert find_loops(disassembled(".L_x_1:", instructions(3, "@!P0 BRA `(.L_x_1)"), ".L_x_2:", "  /*0050*/  BRA `(.L_x_2);")) == ()


@pytest.mark.parametrize(
    ("usage", "sass", "spilled"),
    [
        ("REG:198 STACK:0 SHARED:1024 LOCAL:0", "", 0),
        ("REG:255 STACK:176 SHARED:0 LOCAL:0", "", 176),
        ("REG:255 STACK:0 SHARED:0 LOCAL:24", "", 24),
        ("REG:255 STACK:0 SHARED:0 LOCAL:0", "/*0000*/ STL [R1], R2 ;\n/*0010*/ LDL.64 R4, [R1] ;", 8),
    ],
)
def test_spills_are_seen_in_the_usage_and_in_the_code(usage: str, sass: str, spilled: int) -> None:
    assert find_spills(sass, f"Function x:\n  {usage} CONSTANT[0]:432") == (int(usage[4:7]), spilled)


def test_what_equals_the_record_has_no_fault() -> None:
    assert find_faults([GOOD, replace(GOOD, loops=(410, 480))], RECORD, "3.7.1") == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (replace(GOOD, error="CompilationError: no"), "forward D=128 on sm_90 does not compile: CompilationError: no"),
        (replace(GOOD, spills=8), "forward D=128 on sm_90 spills 8 bytes"),
        (replace(GOOD, shared=232449), "asks for 232449 bytes of shared memory; there are 232448"),
        (replace(GOOD, target="gfx942", shared=65537), "on gfx942 asks for 65537 bytes"),
        (replace(GOOD, loops=(421, 500)), "has loops of 421, 500 instructions, recorded are 400, 500"),
        (replace(GOOD, loops=(379, 500)), "has loops of 379, 500 instructions"),
        (replace(GOOD, loops=(400,)), "has loops of 400 instructions"),
        (replace(GOOD, loops=()), "has loops of none instructions"),
        (replace(GOOD, kernel="rows D=128"), "rows D=128 on sm_90 has loops of 400, 500 instructions, recorded are none"),
    ],
)
def test_each_fault_is_named(changed: Compiled, fault: str) -> None:
    found = find_faults([GOOD, changed], RECORD, "3.7.1")
    assert len(found) == 1
    assert fault in found[0]


def test_loops_are_not_held_against_another_version_nor_another_target() -> None:
    assert find_faults([replace(GOOD, loops=(900,))], RECORD, "3.6.0") == []
    assert find_faults([replace(GOOD, target="sm_80", loops=(900,), spills=4)], RECORD, "3.7.1") == []


def test_the_table_has_a_line_for_each_and_the_recorded_loops_beside_the_measured_ones() -> None:
    failed = replace(GOOD, target="gfx942", error="CompilationError: no")
    lines = to_table([replace(GOOD, loops=(401, 500)), failed], RECORD).splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("401, 500 (400, 500)")
    assert lines[2].endswith("CompilationError: no")
