"""Long work stops and goes on: the same report comes out, and nothing is measured twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headscope.app.report import build
from headscope.app.report.build import build_report
from headscope.app.report.measures import Settings
from headscope.app.report.progress import Progress
from headscope.app.report.sidecar import run_digest
from headscope.kernels.errors import InputError
from tests.app.report.conftest import QUICK, Small

TEXTS = ["a cat", "a dog", "two birds"]


def test_after_a_stop_only_the_rest_is_measured_and_the_file_goes_at_the_end(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, asked = tmp_path / "r.progress.jsonl", []
    examine = build.examine

    def watched(subject: Any, prompt: Any, settings: Settings, close: bool) -> Any:
        asked.append(prompt.id)
        if asked == ["1", "2", "3"]:
            raise KeyboardInterrupt
        return examine(subject, prompt, settings, close)

    monkeypatch.setattr(build, "examine", watched)
    with pytest.raises(KeyboardInterrupt):
        build_report(small.model, small.tokenizer, TEXTS, settings=QUICK, resume=file)
    assert len(file.read_text().splitlines()) == 3
    with file.open("ab") as opened:
        opened.write(b'{"cut": "sho')
    told: list[tuple[int, int]] = []
    report = build_report(small.model, small.tokenizer, TEXTS, settings=QUICK, resume=file, progress=lambda *done: told.append(done))
    assert asked == ["1", "2", "3", "3"]
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert not file.exists()
    whole = build_report(small.model, small.tokenizer, TEXTS, settings=QUICK)
    assert [r["relevance"] for r in report.document["examples"]] == [r["relevance"] for r in whole.document["examples"]]
    assert report.document["checks"] == whole.document["checks"]


def record(id: str) -> dict[str, Any]:
    found: dict[str, Any] = {"id": id, "value": 0.1}
    return {**found, "run_sha256": run_digest(found)}


def test_a_file_of_other_work_is_refused_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    with Progress(file, "one") as progress:
        progress.add(record("a"))
    content = file.read_bytes()
    with pytest.raises(InputError, match="begun with another model, other data or other settings"), Progress(file, "two"):
        pass
    file.write_bytes(b"my notes\n")
    with pytest.raises(InputError, match="delete it"), Progress(file, "one"):
        pass
    assert (content != b"", file.read_bytes()) == (True, b"my notes\n")


def test_a_record_that_was_changed_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    with Progress(file, "k") as progress:
        progress.add(record("a"))
        progress.add(record("b"))
    file.write_bytes(file.read_bytes().replace(b'"id":"b","run', b'"id":"c","run'))
    with Progress(file, "k") as progress:
        assert list(progress.records) == ["a"]
        progress.add(record("b"))
    with Progress(file, "k") as progress:
        assert list(progress.records) == ["a", "b"]


def test_work_that_fails_at_once_leaves_no_file(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise InputError("no")

    monkeypatch.setattr(build, "examine", fail)
    with pytest.raises(InputError):
        build_report(small.model, small.tokenizer, TEXTS, settings=QUICK, resume=tmp_path / "p.jsonl")
    assert list(tmp_path.iterdir()) == []
