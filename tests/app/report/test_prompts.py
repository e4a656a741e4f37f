"""Prompts from a file: every line that is not understood is named by its number."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from headscope.app.report.prompts import Prompt, as_prompts, read_prompts
from headscope.kernels.errors import InputError


def written(folder: Path, content: bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    return path


def test_lines_become_prompts_and_empty_ones_are_passed_over(tmp_path: Path) -> None:
    content = b'{"text": "a", "target": " b", "against": 3}\n\n{"id": "second", "image": 4}\r\n{"id": 7, "text": "\\u2028"}'
    found = read_prompts(written(tmp_path, content))
    assert [(row.id, row.text, row.image, row.target, row.against) for row in found.rows] == [
        ("1", "a", None, " b", 3), ("second", None, 4, None, None), ("7", "\u2028", None, None, None),
    ]  # fmt: skip
    assert (found.total, found.source, found.sha256) == (3, "prompts.jsonl", hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "line 2 is no JSON"), (b'"text"', "line 2 is str: give an object"), (b'{"text": 3}', "line 2: text is 3; it must be str"),
        (b'{"text": "a", "image": 1}', "line 2 needs a text, or an image"), (b"{}", "line 2 needs a text"),
        (b'{"text": "a", "targt": 1}', "line 2 has 'targt': a line may have id, text, image, target, against"),
        (b'{"text": "a", "target": true}', "line 2: target is True; it must be int or str"), (b'{"text": "\xff"}', "line 2 is not UTF-8"),
        (b"[" * 100_000, "line 2 is no JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_prompts(written(tmp_path, b'{"text": "good"}\n' + line + b"\n"))


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_a_line_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="has no example"):
        read_prompts(written(tmp_path, content))


def test_two_lines_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two examples with the id 'a'"):
        read_prompts(written(tmp_path, b'{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}'))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.jsonl' cannot be read: No such file"):
        read_prompts(tmp_path / "nothing.jsonl")


def test_the_digest_changes_with_everything_that_is_asked() -> None:
    asked = [Prompt("1", "a"), Prompt("2", "a"), Prompt("1", "b"), Prompt("1", "a", target=3), Prompt("1", "a", target=3, against=4)]
    assert len({as_prompts([prompt]).sha256 for prompt in asked}) == len(asked)
    assert as_prompts("a").sha256 == as_prompts(["a"]).sha256
