"""`headscope report verify`: do the files belong together, do the numbers add up, and do they come out again?

Without a model: every digest, the schema, the sums that the report claims, everything that follows from the records of the examples,
and the page itself, which is a function of the sidecar. With a model: a sample of the examples is measured again.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from headscope.app.report import html, sidecar
from headscope.app.report.identity import tokenizer_digest
from headscope.app.report.interactive import chart_library
from headscope.app.report.measures import Settings, Subject, examine, levels_of
from headscope.app.report.prompts import Prompt, inputs_of
from headscope.app.report.schema import Json, check
from headscope.app.report.summary import summarise
from headscope.interventions import Plan
from headscope.kernels.errors import HeadscopeError, InputError, StoreError
from headscope.probe import Probe
from headscope.probe.attribution.target import Target
from headscope.probe.models import model_fingerprint

ADDS_UP = 1e-6  # of the numbers added: relevance is written in nine digits
AGAIN = 1e-3  # of the largest number compared: another machine adds in another order
AGAIN_AREA = 1e-2  # of areas: where two units are nearly equal, it may remove the other one first
APART = re.compile(r"[^/\\\0]+-examples/\d{4,9}\.html")


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; `passed` is None where it could not be."""

    name: str
    passed: bool | None
    detail: str

    def to_dict(self) -> Json:
        return {"name": self.name, "passed": self.passed, "detail": self.detail}


def verify(page: Path) -> tuple[Json | None, list[Finding]]:
    """Check a report by itself.

    Args:
        page: the HTML file; its sidecar lies beside it.

    Returns:
        The sidecar, or None where it cannot be trusted to be one, and what was checked.

    Raises:
        StoreError: a file is missing or cannot be read.
    """
    content, found = sidecar.read(page), sidecar.read(sidecar.sidecar_of(page))
    name = sidecar.sidecar_of(page).name
    findings: list[Finding] = []
    try:
        named = sidecar.mention(content)
    except StoreError as error:
        return None, [Finding("sidecar", False, str(error))]
    own = sidecar.digest(found)
    findings.append(Finding("sidecar", own == named, f"{name} has SHA-256 {own[:16]}…, {page.name} names {named[:16]}…"))
    try:
        document = sidecar.parse(found, name)
        check(document)
        canonical = sidecar.canonical(document) == found
    except HeadscopeError as error:
        return None, [*findings, Finding("schema", False, str(error))]
    findings.append(Finding("schema", canonical, sidecar.SCHEMA if canonical else f"{name} is not written in the canonical way"))
    findings += _pages(page, document)
    if all(finding.passed is not False for finding in findings):
        for name, judge in (("examples", _runs), ("sums", _sums), ("figures", _follows), ("page", partial(_rendered, page))):
            findings.append(_judged(name, judge, document))
    return document, findings


def recompute(document: Json, model: nn.Module, processor: Any, count: int, seed: int = 0) -> list[Finding]:
    """Measure some examples again.

    Args:
        document: a sidecar.
        model, processor: as the report names them.
        count: how many examples, drawn at random.
        seed: of the drawing.

    Raises:
        InputError: a count below 1.
    """
    if count < 1:
        raise InputError(f"--recompute {count}: give 1 or more")
    weights = model_fingerprint(model).removeprefix("sha256:")
    findings = [_same("weights", weights, document["model"]["weights_sha256"])]
    if document["model"]["tokenizer_sha256"] is not None:
        findings.append(_same("tokenizer", tokenizer_digest(processor) or "none", document["model"]["tokenizer_sha256"]))
    if not all(finding.passed for finding in findings):
        return findings
    plan = None if document["recipe"] is None else Plan.from_dict(document["recipe"])
    records, settings = document["examples"], _settings(document)
    drawn = [records[place] for place in sorted(random.Random(seed).sample(range(len(records)), min(count, len(records))))]
    for record in drawn:
        inputs = inputs_of(Prompt(record["id"], record["text"], record["image"]), model, processor) if _has_inputs(record) else {}
        sites = tuple(Probe(model).sites(**inputs)) if inputs else ()
        findings.append(_again(record, Subject(model, processor, sites, plan), settings))
    return findings


def _judged(name: str, judge: Callable[[Json], Finding], document: Json) -> Finding:
    """What a judge finds; a document so twisted that it cannot be judged has failed."""
    try:
        return judge(document)
    except (HeadscopeError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return Finding(name, False, f"the numbers make no report: {type(error).__name__} {error}")


def _pages(page: Path, document: Json) -> list[Finding]:
    """Every page against the digest that the sidecar has of it."""
    findings = []
    whole = [name for name in document["pages"] if "/" not in name]
    if len(whole) != 1:
        return [Finding("pages", False, f"the sidecar names {len(whole)} pages instead of one")]
    for name, expected in document["pages"].items():
        if "/" in name and APART.fullmatch(name) is None:
            findings.append(Finding(name, False, "a page stands in the folder of examples, and nowhere else"))
            continue
        try:
            content = sidecar.read(page if name == whole[0] else page.parent / name)
            named = sidecar.mention(content)
        except StoreError as error:
            findings.append(Finding(name, False, str(error)))
            continue
        own = sidecar.page_digest(content)
        right = own == expected and named == sidecar.digest(sidecar.canonical(document))
        findings.append(Finding(name, right, f"SHA-256 {own[:16]}…, the sidecar has {expected[:16]}…"))
    return findings


def _runs(document: Json) -> Finding:
    wrong = [record["id"] for record in document["examples"] if record["run_sha256"] != sidecar.run_digest(record)]
    return Finding("examples", not wrong, f"{len(document['examples'])} records, changed: {', '.join(wrong) or 'none'}")


def _sums(document: Json) -> Finding:
    """Whether the relevances of every example add up to what is said, and its books to what they say."""
    wrong = []
    for record in document["examples"]:
        size = max([abs(record["value"]), *map(abs, record["relevance"])])
        right = _near(sum(record["relevance"]), record["sum"], size) and record["levels"] == levels_of(record["relevance"])
        right &= _near(record["value"] - record["sum"], record["open"], size)
        ledger = record["ledger"]
        if ledger is not None:
            rest = ledger["target"] - ledger["inputs"] - ledger["constants"] - ledger["absorbed"]
            right &= _near(rest, ledger["residual"], ledger["scale"]) and _near(
                sum(ledger["by_kind"].values()), ledger["absorbed"], ledger["scale"]
            )
            right &= ledger["closes"] == (abs(ledger["residual"]) <= ledger["allowed"])
        if not right:
            wrong.append(record["id"])
    return Finding("sums", not wrong, f"relevances and books add up on all examples but: {', '.join(wrong) or 'none'}")


def _follows(document: Json) -> Finding:
    """Whether tables, intervals and checks are what the records of the examples give."""
    settings = _settings(document)
    heads = document["heads"]
    names = [(site, layer, head) for site, layer, levels in heads["map"] for head in range(len(levels))]
    again = summarise(document["examples"], settings, names, heads["together"]["by_example"])
    again["verdict"]["scope"] = document["verdict"]["scope"]
    wrong = [name for name, value in again.items() if not _alike(value, document[name])]
    return Finding("figures", not wrong, f"what follows from the examples, computed again; different: {', '.join(wrong) or 'none'}")


def _rendered(page: Path, document: Json) -> Finding:
    """Whether the page is what the sidecar makes."""
    if document["tool"]["version"] != version("headscope"):
        return Finding("page", None, f"made by headscope {document['tool']['version']}; this is {version('headscope')}, whose pages differ")
    if document["interactive"] is not None and document["interactive"] != chart_library():
        return Finding("page", None, "made with another plotly, whose pages differ")
    name = next(name for name in document["pages"] if "/" not in name)
    made = sidecar.stamped(html.pages(document | {"pages": {}}, name), sidecar.canonical(document))[name]
    return Finding("page", made == sidecar.read(page), "the page is what this sidecar makes")


def _again(record: Json, subject: Subject, settings: Settings) -> Finding:
    name = f"example {record['id']}"
    if not _has_inputs(record) or "ids" not in record["target"]:
        return Finding(name, None, "its inputs or its target came from Python and are not in the sidecar")
    target = record["target"]
    goal = Target(tuple(target["ids"]), tuple(target["against"]), tuple(target["positions"]), target["log_probability"])
    try:
        found = examine(subject, Prompt(record["id"], record["text"], record["image"], None, goal), settings, False)
    except HeadscopeError as error:
        return Finding(name, False, str(error))
    if found["inputs_sha256"] != record["inputs_sha256"]:
        return Finding(name, False, "the tokenizer cuts its text in another way")
    apart = {what: _apart(found[what], record[what]) for what in ("relevance", "head_effects")}
    apart["value"] = _apart([found["value"]], [record["value"]])
    areas = [[one["curves"][method]["delta_area"] for method in record["curves"]] for one in (found, record)]
    worst = max(apart.values())
    detail = f"largest difference {worst:.2g} of the largest number, ΔA {_apart(*areas):.2g}; allowed {AGAIN:g} and {AGAIN_AREA:g}"
    return Finding(name, worst <= AGAIN and _apart(*areas) <= AGAIN_AREA, detail)


def _has_inputs(record: Json) -> bool:
    return record["text"] is not None or record["image"] is not None


def _settings(document: Json) -> Settings:
    given = document["settings"]
    return Settings(**{**given, "compared": tuple(given["compared"])})


def _same(name: str, found: str, expected: str) -> Finding:
    if found == expected:
        return Finding(name, True, f"SHA-256 {found[:16]}…")
    return Finding(name, False, f"SHA-256 {found[:16]}…, the report was made with {expected[:16]}…")


def _apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference, of the largest number."""
    if len(found) != len(expected):
        return math.inf
    largest = max(map(abs, expected), default=0.0) or 1.0
    return max((abs(a - b) for a, b in zip(found, expected, strict=True)), default=0.0) / largest


def _near(a: float, b: float, size: float) -> bool:
    return abs(a - b) <= ADDS_UP * max(size, 1e-12)


def _alike(a: object, b: object) -> bool:
    """Equal, but for the last digits of numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-12)
    return a == b
