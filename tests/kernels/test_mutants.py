"""The mutants still fit the kernels, and the script that tries them tells a caught one from one that survives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels import mutants
from tests.kernels.mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_names_tests_that_are_there(mutant: Mutant) -> None:
    assert mutant.misfit(ROOT / "kernels") is None
    assert (ROOT / mutant.tests[0]).is_file()


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(("file", "detail"), [("errors.py", "0 times in kernels/errors.py"), ("gone.py", "there is no kernels/gone.py")])
def test_a_mutant_whose_text_is_not_there_is_not_applied(file: str, detail: str) -> None:
    verdict = mutants.try_mutant(Mutant("gone", file, "text that is not there", "", "", ()))
    assert verdict.state == "not applied"
    assert detail in verdict.detail


@pytest.mark.slow
def test_a_mutant_is_caught_and_a_change_of_nothing_survives() -> None:
    tests = ("tests/kernels/test_agreement.py", "-k", "alike and reference")
    right = Mutant("comment", "reference.py", "# over the real keys", "# over real keys", "it is not wrong", tests)
    wrong = Mutant("argmax", "reference.py", "seen.argmax(dim=-1).masked_fill(dead | broken, -1)", "seen.argmin(dim=-1)", "", tests)
    assert mutants.try_mutant(right).state == "survived"
    assert mutants.try_mutant(wrong).state == "caught"
