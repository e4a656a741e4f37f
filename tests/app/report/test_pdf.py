"""Printing: what goes wrong is said in words, and no half of a file is left."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from headscope.app.report import pdf
from headscope.kernels.errors import InputError


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pdf.shutil, "which", lambda name: f"bin/{name}")
    path = tmp_path / "r.html"
    path.write_text("x")
    return path


def answering(code: int, error: str, content: bytes | None) -> Any:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        target = next(word.partition("=")[2] for word in command if word.startswith("--print-to-pdf="))
        if content is not None:
            Path(target).write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", error)

    return run


@pytest.mark.parametrize(("code", "content"), [(1, b"%PDF-"), (0, None)])
def test_a_browser_that_fails_is_quoted(page: Path, monkeypatch: pytest.MonkeyPatch, code: int, content: bytes | None) -> None:
    monkeypatch.setattr(pdf.subprocess, "run", answering(code, "first\nno display\n", content))
    with pytest.raises(InputError, match="bin/chromium could not print .*: no display"):
        pdf.print_pdf(page, page.with_suffix(".pdf"))
    assert list(page.parent.iterdir()) == [page]


def test_a_browser_that_hangs_is_stopped(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, pdf.SECONDS)

    monkeypatch.setattr(pdf.subprocess, "run", hang)
    with pytest.raises(InputError, match="timed out after 120 seconds"):
        pdf.print_pdf(page, page.with_suffix(".pdf"))


def test_a_file_that_cannot_be_written_leaves_nothing(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf.subprocess, "run", answering(0, "", b"%PDF-"))
    with pytest.raises(InputError, match="cannot be written"):
        pdf.print_pdf(page, page.parent / "no" / "r.pdf")
    assert list(page.parent.iterdir()) == [page]


def test_places_that_take_no_pdf_are_named_before_the_work(page: Path) -> None:
    with pytest.raises(InputError, match="it is a folder"):
        pdf.check_pdf(page.parent)
    with pytest.raises(InputError, match="there is no folder"):
        pdf.check_pdf(page.parent / "no" / "r.pdf")
