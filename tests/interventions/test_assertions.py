"""Assertions are read from text, mean what they say, and fail where a number is missing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.interventions.evaluation.assertions import MOMENTS, RELATIONS, Assertion, parse_assertion
from headscope.interventions.evaluation.changes import Result, change_of
from headscope.interventions.evaluation.evaluation import Evaluation
from headscope.kernels.errors import InputError

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,12}", fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(st.builds(Assertion, NAMES, st.sampled_from(sorted(RELATIONS)), NUMBERS, st.sampled_from(MOMENTS), st.booleans()))
def test_an_assertion_is_read_back_from_its_text(claim: Assertion) -> None:
    assert parse_assertion(str(claim)) == claim
    assert parse_assertion(f"  {claim.name}.{claim.moment} {claim.relation}  {claim.number!r} ") == claim


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab.<>=!-+019e% \n"), max_size=16) | st.text(max_size=20))
def test_any_other_text_is_refused_with_a_word_of_help(text: str) -> None:
    try:
        found = parse_assertion(text)
    except InputError as error:
        said = str(error)
    else:
        said = "write METRIC>=NUMBER" if math.isfinite(found.number) and found.relation in text and found.metric in text else ""
    assert "write METRIC>=NUMBER" in said


@pytest.mark.parametrize(
    "text", ["", "accuracy", "accuracy>", ">=1", "accuracy=1", "accuracy>=nan", "a>=1e999", "a b>1", "a.low>1", "a>=1 2", "1<a"]
)
def test_malformed_assertions_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="write METRIC>=NUMBER"):
        parse_assertion(text)


@settings(max_examples=100, deadline=None)
@given(NUMBERS.map(lambda x: round(x % 7, 2)), st.sampled_from(sorted(RELATIONS)), NUMBERS.map(lambda x: round(x % 7, 2)))
def test_a_verdict_is_the_comparison_it_states(value: float, relation: str, number: float) -> None:
    results = (Result("a", False, {"m": 0.0}, {"m": value}, ()),)
    found = Evaluation((change_of("m", results, 0),), (), 0, results, (), ())
    verdict = Assertion("m", relation, number).check(found)
    expected = {">=": value >= number, "<=": value <= number, "==": value == number, ">": value > number, "<": value < number}
    assert verdict.passed == expected[relation]
    assert str(verdict).startswith("PASS" if verdict.passed else "FAIL")
    assert verdict.value == value
