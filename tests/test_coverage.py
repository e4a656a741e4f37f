"""Every model of the zoo keeps every promise of the coverage table."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import census
from tests.coverage import check, line, table
from tests.models import COUSINS, ENTRIES, FAMILIES, Entry

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def marked(entry: Entry) -> object:
    """A test parameter; slow entries are left to the slow tier."""
    return pytest.param(entry, id=entry.name, marks=[pytest.mark.slow] if entry.slow else [])


@pytest.mark.parametrize("entry", [marked(entry) for entry in ENTRIES if entry.refused is None])
def test_sites_patterns_edits_decoding_and_gradients_are_right(entry: Entry) -> None:
    reason = entry.missing()
    if reason is not None:
        pytest.skip(reason)
    row = check(entry)
    assert row.problems == []
    assert row.pattern is not None or entry.reference is None


@pytest.mark.parametrize("entry", [marked(entry) for entry in ENTRIES if entry.refused is not None])
def test_a_model_that_cannot_be_caught_is_refused_and_never_shows_nothing(entry: Entry) -> None:
    reason = entry.missing()
    if reason is not None:
        pytest.skip(reason)
    row = check(entry)
    assert row.problems == []
    assert row.refusal


def test_the_zoo_has_at_least_45_architectures_that_should_work_and_all_families() -> None:
    working = [entry for entry in ENTRIES if entry.refused is None]
    assert len(working) >= 45
    assert {entry.family for entry in working} == set(FAMILIES)


def test_names_in_the_zoo_are_unique_and_projections_match_the_sites() -> None:
    assert [name for name, count in Counter(entry.name for entry in ENTRIES).items() if count > 1] == []
    assert {entry.name for entry in ENTRIES} >= COUSINS
    for entry in ENTRIES:
        assert len(entry.projection_paths()) in (0, entry.expected_sites), entry.name


def test_two_builds_of_an_entry_have_the_same_weights() -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "matmul, softmax")
    (first, one), (second, two) = entry.build(), entry.build()
    assert all(bool((a == b).all()) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert bool((one["x"] == two["x"]).all())


def test_the_table_shows_a_broken_row_as_broken() -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "matmul, softmax")
    row = check(entry)
    row.problems.append("patterns differ from the reference by 3e-01, allowed 1e-06")
    assert "**patterns differ" in line(row)
    assert "1 have a problem" in table([row], {})


COUNTED = ["Llama (GQA)", "GPT-J", "nn.TransformerDecoder (cross)", "einsum with groups (GQA)", "bmm on [B·H, S, D]"]


@pytest.mark.parametrize("name", COUNTED)
def test_the_census_counts_attentions_without_the_interception(name: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    model, inputs = entry.build()
    assert census.count(model, inputs) == entry.expected_sites


def test_the_census_calls_it_a_silent_miss_when_fewer_calls_are_caught_than_counted() -> None:
    result = census.Result("llama", calls=1, seen=2, sites=1)
    census.judge(result, refusal=None)
    assert result.status == "silent-miss"
    census.judge(result, refusal="2 attention-like operation(s) were seen but not caught")
    assert result.status == "refused"
