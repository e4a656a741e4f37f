"""The sidecar: one way to write it, digests that notice everything, files that appear whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from headscope.app.report import sidecar
from headscope.app.report.build import Report
from headscope.kernels.errors import InputError, NonFiniteError, StoreError

PAGE = f'<p><code id="sidecar">{sidecar.ZEROS}</code>'.encode()


def test_the_canonical_form_is_sorted_ascii_without_spaces_and_survives_a_round_trip() -> None:
    found = {"b": [1, 0.1, None, True], "a": "ü\u202e<"}
    content = sidecar.canonical(found)
    assert content == b'{"a":"\\u00fc\\u202e<","b":[1,0.1,null,true]}\n'
    assert sidecar.canonical(sidecar.parse(content, "x")) == content


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        sidecar.canonical({"a": number})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a":NaN}', '{"a":"ü"}'.encode(), b"[" * 100_000])
def test_what_is_no_document_is_refused(content: bytes) -> None:
    with pytest.raises(StoreError):
        sidecar.parse(content, "report.json")


def test_the_digest_of_a_page_does_not_depend_on_which_sidecar_it_names() -> None:
    other = sidecar.stamped({"p": PAGE}, b"sidecar")["p"]
    assert other != PAGE
    assert sidecar.page_digest(other) == sidecar.page_digest(PAGE) == sidecar.digest(PAGE)
    assert sidecar.mention(other) == sidecar.digest(b"sidecar")


@pytest.mark.parametrize("page", [b"", PAGE + PAGE, PAGE.replace(b"0", b"g")])
def test_a_page_that_names_no_single_sidecar_is_refused(page: bytes) -> None:
    with pytest.raises(StoreError, match="instead of one"):
        sidecar.mention(page)


def test_files_appear_together_and_leave_nothing_else_behind(tmp_path: Path) -> None:
    sidecar.write({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"2"}


def test_when_one_file_cannot_be_written_none_is_and_old_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        sidecar.write({tmp_path / "a": b"new", tmp_path / "file" / "b": b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old", "file": b""}


@pytest.mark.parametrize(
    ("name", "reason"), [("r.txt", "ends in .html"), ("no/r.html", "there is no folder"), ("folder.html", "it is a folder")]
)
def test_places_that_take_no_report_are_named_before_the_work(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match=reason):
        sidecar.check_writable(tmp_path / name)


def test_a_folder_without_permission_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "touch", refuse)  # root may write anywhere
    with pytest.raises(InputError, match="r.html cannot be written: Permission denied"):
        sidecar.check_writable(tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_saving_writes_the_page_and_its_sidecar_and_nothing_else(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "r.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["schema"] == sidecar.SCHEMA
    assert sidecar.mention((tmp_path / "r.html").read_bytes()) == sidecar.digest((tmp_path / "r.json").read_bytes())
