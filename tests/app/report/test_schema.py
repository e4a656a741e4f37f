"""Our reader of JSON Schema says what jsonschema says, about reports and about damaged ones."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from headscope.app.report.build import Report
from headscope.app.report.schema import WORDS, check, report_schema
from headscope.kernels.errors import InputError


def places(found: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key or index in it."""
    for key in list(found) if isinstance(found, dict) else range(len(found)):
        yield found, key
        if isinstance(found[key], dict | list):
            yield from places(found[key])


def words(found: Any, names: bool = True) -> Iterator[str]:
    """The words of JSON Schema that a schema uses."""
    for key, value in found.items():
        if names:
            yield key
        if isinstance(value, dict):
            yield from words(value, not (names and key in ("properties", "$defs")))
        for row in value if isinstance(value, list) else []:
            yield from words(row) if isinstance(row, dict) else ()


def test_the_schema_is_one_and_uses_only_words_that_are_checked() -> None:
    jsonschema.Draft202012Validator.check_schema(report_schema())
    assert set(words(report_schema())) <= WORDS


def test_a_report_is_what_its_schema_says(report: Report) -> None:
    check(report.document)
    jsonschema.validate(report.document, report_schema())


def test_damaged_reports_are_judged_as_jsonschema_judges_them(report: Report) -> None:
    judge, schema, draw = jsonschema.Draft202012Validator(report_schema()), report_schema(), random.Random(0)
    spots = len(list(places(report.document)))
    refused = 0
    for _ in range(150):
        document = copy.deepcopy(report.document)
        holder, key = list(places(document))[draw.randrange(spots)]
        action = draw.randrange(4)
        if action == 0:
            del holder[key]
        elif action == 1:
            holder[key] = draw.choice([None, True, -1, 0.5, "x", [], {}, [1, "a"], {"mean": 1}])
        elif action == 2 and isinstance(holder, dict):
            holder["unknown"] = 1
        else:
            holder[key] = [holder[key]]
        valid = judge.is_valid(document)
        refused += not valid
        if valid:
            check(document, schema)
        else:
            with pytest.raises(InputError):
                check(document, schema)
    assert refused > 50


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("verdict", "passed"), "yes", "the report.verdict.passed is 'yes'; it must be boolean"),
        (("schema",), "v2", "it must be 'headscope.attribution-report/v1'"),
        (("model", "weights_sha256"), "abc", "it must match"),
        (("examples",), [], "has 0 entries; it must have 1 to any number"),
        (("shown", "order"), "best", "it must be one of 'first', 'random', 'worst'"),
        (("data", "n"), -1, "must lie between 0 and None"),
        (("tool", "extra"), 1, "has an unknown entry 'extra'; there are name, version"),
    ],
)
def test_the_message_names_the_place_and_what_is_allowed(report: Report, path: tuple[str, ...], value: Any, message: str) -> None:
    document = copy.deepcopy(report.document)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(InputError) as raised:
        check(document)
    assert message in str(raised.value)


def test_a_missing_entry_is_named(report: Report) -> None:
    document = copy.deepcopy(report.document)
    del document["checks"]
    with pytest.raises(InputError, match="the report lacks 'checks'"):
        check(document)
