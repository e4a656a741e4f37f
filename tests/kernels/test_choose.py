"""Which implementation runs, and what is said where the forced one cannot."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from headscope.kernels import blockwise, choose, reference
from headscope.kernels.choose import NAMES, Implementation
from headscope.kernels.cpu import run as cpu
from headscope.kernels.errors import InputError, SelectionError
from headscope.kernels.problem import Problem, Wanted, make_problem


def problem(dtype: torch.dtype = torch.float32, device: str = "cpu", gradient: bool = False) -> Problem:
    q = torch.zeros(1, 1, 2, 4, dtype=dtype, device=device, requires_grad=gradient)
    return make_problem(q, q, q) if device == "cpu" else Problem(q, q, q, 1.0, torch.zeros(2), torch.ones(2), True)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the compiled kernel were there, wherever the tests run."""
    monkeypatch.setattr("headscope.kernels.cpu.build.state", lambda: (True, "compiled"))


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headscope.kernels.cpu.build.state", lambda: (False, "no C compiler was found"))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("given", "wanted", "chosen"),
    [
        ({}, Wanted(), cpu.run),
        ({"dtype": torch.float16}, Wanted(frozenset({"lse"}), 4, (0,)), cpu.run),
        ({"dtype": torch.bfloat16}, Wanted(), cpu.run),
        ({"dtype": torch.float64}, Wanted(), blockwise.run),
        ({"gradient": True}, Wanted(), blockwise.run),
        ({}, Wanted(top=1), blockwise.run),
        ({"device": "meta"}, Wanted(), blockwise.run),
    ],
)
def test_the_compiled_kernel_is_taken_where_it_can_do_the_work_and_blockwise_where_not(
    given: dict[str, Any], wanted: Wanted, chosen: Implementation
) -> None:
    assert choose.choose(problem(**given), wanted) is chosen


@pytest.mark.usefixtures("compiled")
def test_an_input_that_requires_a_gradient_is_no_obstacle_where_none_is_recorded() -> None:
    with torch.no_grad():
        assert choose.choose(problem(gradient=True), Wanted()) is cpu.run


@pytest.mark.usefixtures("not_compiled")
def test_without_a_compiler_blockwise_runs_and_a_forced_compiled_kernel_says_why_it_cannot() -> None:
    assert choose.choose(problem(), Wanted()) is blockwise.run
    with pytest.raises(InputError, match="implementation 'cpu' cannot do this: .*no C compiler was found.*; choose another, or None"):
        choose.choose(problem(), Wanted(), "cpu")


def test_a_forced_implementation_is_the_one_that_runs() -> None:
    assert choose.choose(problem(), Wanted(), "blockwise") is blockwise.run
    assert choose.choose(problem(), Wanted(), "reference") is reference.run


@pytest.mark.parametrize(("given", "wanted"), [({"dtype": torch.float64}, Wanted()), ({"gradient": True}, Wanted()), ({}, Wanted(top=2))])
def test_a_forced_compiled_kernel_is_never_replaced_by_another(given: dict[str, Any], wanted: Wanted) -> None:
    with pytest.raises(InputError, match="implementation 'cpu' cannot do this"):
        choose.choose(problem(**given), wanted, "cpu")


def test_triton_forced_where_it_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"implementation 'triton' cannot do this: triton is not installed \(pip install headscope\[gpu\]\)"
    ):
        choose.choose(problem(), Wanted(), "triton")


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(SelectionError, match="no implementation 'flash': there are triton, cpu, blockwise, reference"):
        choose.choose(problem(), Wanted(), "flash")
    assert set(NAMES) == {"triton", "cpu", "blockwise", "reference"}


def test_attention_on_a_cpu_never_imports_triton() -> None:
    code = (
        "import sys, torch\n"
        "from headscope.kernels.attention import attention\n"
        "q = torch.zeros(1, 1, 2, 4)\n"
        "attention(q, q, q, implementation='blockwise')\n"
        "assert 'triton' not in sys.modules, 'triton'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
