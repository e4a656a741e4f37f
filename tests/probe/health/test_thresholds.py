"""Thresholds: one table, every line with its source; changed by name, and never by accident."""

from __future__ import annotations

import pytest

from headscope.kernels.errors import InputError
from headscope.probe.health.thresholds import TABLE, Thresholds, thresholds_of


def test_every_threshold_says_where_it_comes_from_and_what_it_is_for() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert row.kind in ("literature", "heuristic")
        assert row.source
        assert row.unit
        assert row.meaning.endswith(".")
        assert row.kind == "heuristic" or any(character.isdigit() for character in row.source), f"{row.name} names no year"


def test_what_is_not_changed_stays_as_in_the_table() -> None:
    found = thresholds_of({"sink": 0.5})
    assert found["sink"] == 0.5
    assert all(found[row.name] == row.value for row in TABLE if row.name != "sink")
    assert [row["name"] for row in found.rows() if row["changed"]] == ["sink"]
    assert found.to_dict() == {row.name: (0.5 if row.name == "sink" else row.value) for row in TABLE}


def test_giving_the_value_of_the_table_changes_nothing() -> None:
    assert thresholds_of({"sink": 0.3}) == thresholds_of(None) == Thresholds()
    assert thresholds_of(thresholds_of({"sink": 0.5})) == thresholds_of({"sink": 0.5}) != Thresholds()


def test_it_reads_like_a_mapping() -> None:
    found = Thresholds()
    assert "sink" in found
    assert "snk" not in found
    assert list(found) == [row.name for row in TABLE]
    assert len(found) == len(TABLE)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    for ask in (lambda: thresholds_of({"snik": 0.5}), lambda: Thresholds()["snik"]):
        with pytest.raises(InputError, match="no threshold 'snik': did you mean 'sink'"):
            ask()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, True, "0.5", None])
def test_a_value_that_is_no_finite_number_from_zero_up_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="threshold sink = .* give a finite number from 0 up, in probability"):
        thresholds_of({"sink": value})  # type: ignore[dict-item]


def test_a_warning_that_comes_after_its_alarm_is_refused() -> None:
    with pytest.raises(InputError, match="residual-alarm = 0.2 is above residual-warn = 0.1: give both"):
        thresholds_of({"residual-alarm": 0.2})
    assert thresholds_of({"residual-alarm": 0.2, "residual-warn": 0.4})["residual-warn"] == 0.4


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(InputError, match="thresholds are list: give a mapping"):
        thresholds_of([0.3])  # type: ignore[arg-type]
