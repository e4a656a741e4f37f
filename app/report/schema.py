"""Check plain values against the shipped JSON Schema, with the words of JSON Schema that it uses and no package.

Whoever has `jsonschema` gets the same answer from `report.schema.json`; whoever only has headscope gets it from here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from headscope.kernels.errors import InputError

Json = dict[str, Any]

TYPES: Mapping[str, Callable[[object], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer()),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
WORDS = {
    "$schema", "$id", "$defs", "$ref", "title", "description", "type", "const", "enum", "pattern", "required", "properties",
    "additionalProperties", "items", "minItems", "maxItems", "minimum", "maximum", "anyOf",
}  # fmt: skip


def report_schema() -> Json:
    """The schema of a report's sidecar."""
    found: Json = json.loads(files("headscope.app.report").joinpath("report.schema.json").read_text(encoding="utf-8"))
    return found


def check(document: object, schema: Json | None = None) -> None:
    """Nothing, where the document is what the schema says.

    Raises:
        InputError: the first place where it is not, and what is allowed there.
    """
    whole = report_schema() if schema is None else schema
    problem = _problem(document, whole, whole, "the report")
    if problem is not None:
        raise InputError(problem)


def _problem(value: Any, schema: Json, whole: Json, where: str) -> str | None:
    if "$ref" in schema:
        return _problem(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole, where)
    if "anyOf" in schema:
        found = [_problem(value, choice, whole, where) for choice in schema["anyOf"]]
        return None if None in found else found[0]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(TYPES[kind](value) for kind in kinds):
        return f"{where} is {_short(value)}; it must be {' or '.join(kinds)}"
    if "const" in schema and value != schema["const"]:
        return f"{where} is {_short(value)}; it must be {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {_short(value)}; it must be one of {', '.join(map(repr, schema['enum']))}"
    if isinstance(value, str) and "pattern" in schema and re.search(schema["pattern"], value) is None:
        return f"{where} is {_short(value)}; it must match {schema['pattern']}"
    if TYPES["number"](value):
        low, high = schema.get("minimum"), schema.get("maximum")
        if (low is not None and value < low) or (high is not None and value > high):
            return f"{where} is {value}; it must lie between {low} and {high}"
    if isinstance(value, list):
        return _problem_of_list(value, schema, whole, where)
    if isinstance(value, dict):
        return _problem_of_object(value, schema, whole, where)
    return None


def _problem_of_list(value: list[Any], schema: Json, whole: Json, where: str) -> str | None:
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    if len(value) < low or (high is not None and len(value) > high):
        return f"{where} has {len(value)} entries; it must have {low} to {'any number' if high is None else high}"
    for place, entry in enumerate(value if "items" in schema else []):
        problem = _problem(entry, schema["items"], whole, f"{where}[{place}]")
        if problem is not None:
            return problem
    return None


def _problem_of_object(value: dict[str, Any], schema: Json, whole: Json, where: str) -> str | None:
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        return f"{where} lacks {missing[0]!r}"
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, entry in value.items():
        rule = known.get(name, rest)
        if rule is False:
            return f"{where} has an unknown entry {name!r}; there are {', '.join(known)}"
        problem = _problem(entry, rule, whole, f"{where}.{name}") if isinstance(rule, dict) else None
        if problem is not None:
            return problem
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
