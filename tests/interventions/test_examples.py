"""Examples are read as they are written, and what is malformed is named with its line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headscope.interventions.evaluation.examples import Example, as_examples, case_of, read_examples
from headscope.kernels.errors import InputError


def lines(rows: Iterable[object], path: Path) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_lines_are_read_as_written(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "target": 3}, {"prompt": "b", "label": "x", "against": "y", "benign": True}, {"image": 4, "label": 7},
        {"id": 9, "text": "c", "roles": {"subject": [0, 2]}, "facts": {"k": [1]}},
    ]  # fmt: skip
    path = lines(rows, tmp_path / "d.jsonl")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    found = read_examples(path)
    assert [(one.id, one.text, one.image, one.target, one.against, one.benign) for one in found] == [
        ("1", "a", None, 3, None, False), ("3", "b", None, "x", "y", True), ("5", None, 4, 7, None, False),
        ("9", "c", None, None, None, False),
    ]  # fmt: skip
    assert (found[3].roles, found[3].facts) == ({"subject": [0, 2]}, {"k": [1]})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "d.jsonl has no example: give one JSON object a line"),
        (b"\n \n", "d.jsonl has no example"),
        (b'{"text": "a"}\n{"text": ', "d.jsonl line 2 is no JSON"),
        (b'{"text": "a"}\n\xff', "d.jsonl line 2 is not UTF-8"),
        (b'["a"]', "d.jsonl line 1 is list: give an object"),
        (b'{"txt": "a"}', "d.jsonl line 1 has 'txt': an example may have id, text"),
        (b'{"text": 3}', "line 1: text is 3; it must be str"),
        (b'{"text": "a", "target": true}', "target is True; it must be int or str"),
        (b'{"text": "a", "benign": 1}', "benign is 1; it must be bool"),
        (b'{"text": "a", "prompt": "b"}', "both text and prompt, which mean the same"),
        (b'{"text": "a", "image": 2}', "needs a text .* and only one of them"),
        (b'{"id": "a"}', "needs a text"),
        (b'{"text": "a", "id": 1}\n{"text": "b", "id": "1"}', "two examples with the id '1'"),
        (b'{"text": "a", "roles": {"s": []}}', "give positions for each role"),
        (b'{"text": "a", "roles": {"s": "12"}}', "give positions for each role"),
        (b'{"text": "a", "inputs": {}}', "has 'inputs'"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_examples(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "data is empty"),
        ({"text": "a"}, "data is dict: give a path"),
        (3, "data is int: give a path"),
        ([3], "data, entry 1, is int"),
        ([{"text": "a", "extra": 1}], "data, entry 1 has 'extra'.*under facts"),
        ([{"x": 1.0}], "data, entry 1, is empty"),
        (["a", Example("1", "b")], "two examples with the id '1'"),
    ],
)
def test_data_from_python_that_cannot_be_used_is_refused(data: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        as_examples(data)


def test_a_word_that_is_a_token_only_with_its_space_is_hinted_at() -> None:
    class Words:
        def encode(self, text: str, **_: object) -> list[int]:
            return [5] if text.startswith(" ") else [1] * len(text)

        def decode(self, ids: list[int], **_: object) -> str:
            return "x"

    inputs = {"x": torch.zeros(1, 2)}
    assert case_of(Example("a", inputs=inputs, target=" be"), nn.Identity(), Words()).target == 5
    with pytest.raises(InputError, match="'be' is 2 tokens here.*; ' be', with the space that stands before a word, is one"):
        case_of(Example("a", inputs=inputs, target="be"), nn.Identity(), Words())
