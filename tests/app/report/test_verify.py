"""`verify`: passes what was made, notices every byte that was changed, and numbers that do not follow although every digest is right."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headscope.app.report import html, sidecar
from headscope.app.report.build import Report, build_report
from headscope.app.report.prompts import Prompt
from headscope.app.report.schema import Json
from headscope.app.report.verify import Finding, recompute, verify
from headscope.interventions import Edit, Plan, scale, select
from headscope.kernels.errors import InputError, StoreError
from headscope.probe.models import tokenize
from tests.app.report.conftest import QUICK, Small
from tests.app.report.test_schema import places


@pytest.fixture(scope="module")
def saved(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.save(tmp_path_factory.mktemp("saved") / "report.html")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    for path in (saved, sidecar.sidecar_of(saved)):
        shutil.copy(path, tmp_path)
    return tmp_path / saved.name


def failed(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.passed is False]


def signed_anew(document: Json, page: Path) -> None:
    """Write a changed document with every digest redone, as a forger would."""
    for record in document["examples"]:
        record["run_sha256"] = sidecar.run_digest(record)
    for claim in document["claims"]:
        claim["run_sha256"] = next(r["run_sha256"] for r in document["examples"] if r["id"] == claim["example"])
    pages = html.pages(document | {"pages": {}}, page.name)
    document["pages"] = {name: sidecar.page_digest(content) for name, content in pages.items()}
    content = sidecar.canonical(document)
    page.write_bytes(sidecar.stamped(pages, content)[page.name])
    sidecar.sidecar_of(page).write_bytes(content)


def test_a_report_passes_as_it_was_made(saved: Path) -> None:
    document, findings = verify(saved)
    assert document is not None
    assert [finding.passed for finding in findings] == [True] * 7


@pytest.mark.parametrize("suffix", [".html", ".json"])
def test_one_flipped_bit_anywhere_in_either_file_is_noticed(copied: Path, suffix: str) -> None:
    victim, draw = copied.with_suffix(suffix), random.Random(1)
    content = victim.read_bytes()
    for _ in range(60):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        victim.write_bytes(bytes(changed))
        assert failed(verify(copied)[1])
    victim.write_bytes(content)
    assert not failed(verify(copied)[1])


@pytest.mark.parametrize("suffix", [".html", ".json"])
def test_a_file_that_is_cut_short_or_longer_is_noticed(copied: Path, suffix: str) -> None:
    victim = copied.with_suffix(suffix)
    content = victim.read_bytes()
    for changed in (content[:-1], content + b"\n", b"", content[: len(content) // 2]):
        victim.write_bytes(changed)
        assert failed(verify(copied)[1])


def test_a_missing_file_is_an_error_that_names_it(copied: Path) -> None:
    sidecar.sidecar_of(copied).unlink()
    with pytest.raises(StoreError, match="report.json cannot be read"):
        verify(copied)


def test_a_renamed_report_still_passes(copied: Path) -> None:
    copied.rename(copied.with_name("other.html"))
    copied.with_suffix(".json").rename(copied.with_name("other.json"))
    assert not failed(verify(copied.with_name("other.html"))[1])


def edit_check(document: Json) -> None:
    document["checks"][0]["passed"] = not document["checks"][0]["passed"]


def edit_verdict(document: Json) -> None:
    document["verdict"]["passed"] = not document["verdict"]["passed"]


def edit_relevance(document: Json) -> None:
    document["examples"][0]["relevance"][0] += 0.5


def edit_ledger(document: Json) -> None:
    document["examples"][0]["ledger"]["residual"] = 0.1


def edit_closes(document: Json) -> None:
    document["examples"][0]["ledger"]["closes"] = False


def edit_head(document: Json) -> None:
    document["heads"]["rows"][0]["effect"]["mean"] *= 1.01


def edit_counter(document: Json) -> None:
    document["counter"]["rows"].pop()


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (edit_check, "figures"), (edit_verdict, "figures"), (edit_relevance, "sums"), (edit_ledger, "sums"),
        (edit_closes, "sums"), (edit_head, "figures"),        (edit_counter, "figures"),
    ],
)  # fmt: skip
def test_a_changed_number_is_noticed_even_with_all_digests_redone(copied: Path, change: Callable[[Json], None], noticed: str) -> None:
    document = json.loads(sidecar.sidecar_of(copied).read_text())
    change(document)
    signed_anew(document, copied)
    assert noticed in failed(verify(copied)[1])


def test_a_page_that_says_something_else_than_its_sidecar_is_noticed_with_all_digests_redone(copied: Path) -> None:
    document = json.loads(sidecar.sidecar_of(copied).read_text())
    page = copied.read_bytes().replace(b"Keep in mind", b"Nothing here")
    document["pages"] = {copied.name: sidecar.page_digest(page)}
    content = sidecar.canonical(document)
    copied.write_bytes(sidecar.stamped({copied.name: page}, content)[copied.name])
    sidecar.sidecar_of(copied).write_bytes(content)
    assert failed(verify(copied)[1]) == ["page"]


def test_a_twisted_document_with_all_digests_redone_is_judged_and_not_a_crash(copied: Path) -> None:
    draw, page = random.Random(2), copied.read_bytes()
    original = sidecar.sidecar_of(copied).read_text()
    spots, judged = len(list(places(json.loads(original)))), 0
    for _ in range(60):
        document = json.loads(original)
        holder, key = list(places(document))[draw.randrange(spots)]
        holder[key] = draw.choice([None, -1, 1e300, "x", [], {}, [[1]], holder[key], [holder[key]] * 2])
        for record in document["examples"] if isinstance(document["examples"], list) else []:
            if isinstance(record, dict):
                record["run_sha256"] = sidecar.run_digest(record)
        content = sidecar.canonical(document)
        copied.write_bytes(sidecar.stamped({"p": page}, content)["p"])
        sidecar.sidecar_of(copied).write_bytes(content)
        found = verify(copied)[1]
        judged += found[-1].name == "page"
        assert found
    assert judged > 3


def test_a_page_in_another_folder_is_not_looked_at(copied: Path) -> None:
    document = json.loads(sidecar.sidecar_of(copied).read_text())
    document["pages"]["../../etc/x.html"] = "0" * 64
    sidecar.sidecar_of(copied).write_bytes(sidecar.canonical(document))
    assert "../../etc/x.html" in failed(verify(copied)[1])


def test_pages_of_examples_are_verified_too(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html.pages, "__kwdefaults__", {"most": 30_000})
    document = copy.deepcopy(report.document)
    document["examples"][0]["text"] = "x"
    document["title"] += "y" * 0
    big = Report(document)
    monkeypatch.setattr(html.pages, "__kwdefaults__", {"most": len(html.pages(document, "r.html")["r.html"]) - 1})
    page = big.save(tmp_path / "r.html")
    examples = sorted((tmp_path / "r-examples").iterdir())
    assert len(examples) == 3
    signed = {finding.name: finding.passed for finding in verify(page)[1]}
    assert all(signed[f"r-examples/{path.name}"] for path in examples)
    examples[1].write_bytes(examples[1].read_bytes().replace(b"the", b"teh", 1))
    assert "r-examples/0002.html" in failed(verify(page)[1])


def test_examples_come_out_again_on_the_same_model(report: Report, small: Small) -> None:
    findings = recompute(report.document, small.model, small.tokenizer, 5)
    assert [finding.name for finding in findings] == ["weights", "tokenizer", "example 1", "example 2", "example 3"]
    assert not failed(findings)


def test_relevance_that_the_model_does_not_give_is_noticed(report: Report, small: Small) -> None:
    document = copy.deepcopy(report.document)
    document["examples"][1]["relevance"][2] += 0.05 * max(map(abs, document["examples"][1]["relevance"]))
    assert failed(recompute(document, small.model, small.tokenizer, 3)) == ["example 2"]


def test_another_model_is_refused_before_anything_is_measured(report: Report, small: Small) -> None:
    other = copy.deepcopy(small.model)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    findings = recompute(report.document, other, small.tokenizer, 1)
    assert failed(findings) == ["weights"]
    assert len(findings) == 2


def test_a_count_below_one_is_refused(report: Report, small: Small) -> None:
    with pytest.raises(InputError, match="--recompute 0"):
        recompute(report.document, small.model, small.tokenizer, 0)


def test_inputs_from_python_cannot_be_recomputed_and_the_finding_says_so(small: Small) -> None:
    given = Prompt("own", inputs=tokenize(small.tokenizer, "a cat", small.model))
    report = build_report(small.model, small.tokenizer, [given], settings=QUICK)
    finding = recompute(report.document, small.model, small.tokenizer, 1)[-1]
    assert (finding.passed, finding.name) == (None, "example own")


def test_a_report_under_edits_says_so_and_comes_out_again(small: Small, tmp_path: Path) -> None:
    plan = Plan([Edit("z", scale(0.0), select(layer=1, head=0))])
    report = build_report(small.model, small.tokenizer, "the cat sat", settings=QUICK, plan=plan)
    assert report.document["recipe"]["edits"][0]["op"] == "scale"
    assert report.document["sanity"]["random_weights"] is None
    page = report.save(tmp_path / "r.html")
    assert not failed(verify(page)[1])
    assert not failed(recompute(report.document, small.model, small.tokenizer, 1))
    document = copy.deepcopy(report.document)
    document["recipe"] = None
    assert failed(recompute(document, small.model, small.tokenizer, 1)) == ["example 1"]
