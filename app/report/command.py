"""`headscope report` and `headscope report verify`: make a report, and check one."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from headscope.app.case import given_text
from headscope.app.escape import visible
from headscope.app.printing import print_table
from headscope.app.report.build import build_report
from headscope.app.report.html import WARN_BYTES
from headscope.app.report.interactive import chart_library
from headscope.app.report.measures import Settings
from headscope.app.report.pdf import check_pdf, print_pdf
from headscope.app.report.prompts import Prompt, Prompts, read_prompts
from headscope.app.report.schema import Json
from headscope.app.report.sidecar import check_writable, sidecar_of
from headscope.app.report.verify import recompute, verify
from headscope.interventions import Plan
from headscope.kernels.errors import InputError, RecipeError
from headscope.probe import load

MARKS = {True: "PASS", False: "FAIL", None: "not done"}


def run_report(arguments: argparse.Namespace) -> int:
    """Make a report."""
    if arguments.out is None:
        raise InputError("say where the report goes: --out report.html")
    page = Path(arguments.out)
    check_writable(page)
    if arguments.pdf is not None:
        check_pdf(Path(arguments.pdf))
    if arguments.interactive:
        chart_library()
    settings = _settings(arguments)
    prompts = _prompts(arguments)
    print(f"loading {visible(arguments.model)} …", file=sys.stderr, flush=True)
    model, processor = load(
        arguments.model, device=arguments.device, dtype=arguments.dtype, task=arguments.task, revision=arguments.revision
    )
    if arguments.recipe is not None and not Path(arguments.recipe).is_file():
        raise RecipeError(f"there is no recipe {arguments.recipe!r}: give a YAML file that `headscope edit --save` wrote")
    report = build_report(
        model, processor, prompts, settings=settings, name=arguments.model, revision=arguments.revision,
        plan=None if arguments.recipe is None else Plan.load(arguments.recipe, model=model), examples=arguments.examples,
        shown=arguments.show, order=arguments.order, command=_command(arguments), resume=page.with_suffix(".progress.jsonl"),
        progress=_told,
    )  # fmt: skip
    report.save(page, interactive=arguments.interactive)
    size = page.stat().st_size
    if size > WARN_BYTES and not arguments.interactive:
        print(f"the page has {size / 2**20:.1f} MB; --show fewer examples makes it smaller", file=sys.stderr)
    if arguments.interactive:
        print(f"the page holds plotly.js, {chart_library()['bytes'] / 2**20:.1f} MB of its {size / 2**20:.1f} MB", file=sys.stderr)
    if arguments.pdf is not None:
        print_pdf(page, Path(arguments.pdf))
    _print(report.document, page, arguments.json)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Check a report; 1 if anything is wrong with it."""
    page = Path(arguments.report)
    document, findings = verify(page)
    if arguments.recompute is not None and document is not None and all(finding.passed is not False for finding in findings):
        name = arguments.model or document["model"]["id"]
        print(f"loading {visible(name)} …", file=sys.stderr, flush=True)
        dtype = document["model"]["dtype"]
        model, processor = load(name, device=arguments.device, dtype=dtype, revision=document["model"]["revision"] if "/" in name else None)
        findings += recompute(document, model, processor, arguments.recompute, arguments.seed)
    passed = all(finding.passed is not False for finding in findings)
    if arguments.json:
        facts = {"schema": "headscope.report-verification/v1", "report": str(page), "passed": passed}
        print(json.dumps({**facts, "findings": [finding.to_dict() for finding in findings]}))
    else:
        print_table(["", "what", "found"], [[MARKS[row.passed], visible(row.name), visible(row.detail)] for row in findings])
        print(f"\n{'nothing was changed' if passed else 'NOT AS IT WAS MADE'}: {visible(str(page))}")
    return 0 if passed else 1


def _settings(arguments: argparse.Namespace) -> Settings:
    compared = None if arguments.compare is None else tuple(name for name in arguments.compare.split(",") if name)
    return Settings(method=arguments.method, compared=compared, removal=arguments.removal, heads=arguments.heads, seed=arguments.seed)


def _prompts(arguments: argparse.Namespace) -> Prompts:
    """The examples that the command line names."""
    target, against = _choice(arguments.target), _choice(arguments.against)
    if arguments.data is not None:
        if target is not None or against is not None:
            raise InputError("--target and --against are for one --text or --image; with --data each line names its own")
        return read_prompts(Path(arguments.data))
    text = given_text(arguments)
    if text is None and arguments.image is None:
        raise InputError("nothing to report on: give --text, --text-file, --image or --data")
    prompt = Prompt("1", text, arguments.image, None, target, against)
    content = json.dumps([text, arguments.image, target, against]).encode()
    return Prompts((prompt,), "the command line", hashlib.sha256(content).hexdigest(), 1)


def _choice(given: str | None) -> int | str | None:
    """A token or class: by number, else by name."""
    return int(given) if given is not None and given.isascii() and given.isdigit() else given


def _command(arguments: argparse.Namespace) -> str:
    """The line that makes this report again: every option that was given."""
    words = ["headscope", "report"]
    for name, usual in DEFAULTS.items():
        value = getattr(arguments, name)
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value not in (usual, None, False):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


DEFAULTS: dict[str, Any] = {
    "model": None, "revision": None, "task": None, "device": "cpu", "dtype": None, "text": None, "text_file": None, "image": None,
    "data": None, "out": None, "method": "attnlrp", "compare": None, "target": None, "against": None, "removal": None, "recipe": None,
    "examples": None, "show": 50, "order": "first", "heads": 20, "seed": 0, "interactive": False,
}  # fmt: skip


def _told(done: int, total: int) -> None:
    if total > 1:
        print(f"example {done} of {total}", file=sys.stderr, flush=True)


def _print(document: Json, page: Path, as_json: bool) -> None:
    verdict = document["verdict"]
    if as_json:
        facts = {"report": str(page), "sidecar": str(sidecar_of(page)), "passed": verdict["passed"], "checks": document["checks"]}
        print(json.dumps({"schema": "headscope.report/v1", **facts}))
        return
    rows = []
    for check in document["checks"]:
        number = "–" if check["value"] is None else f"{check['value']:.4g}"
        rows.append(
            [
                MARKS[check["passed"]],
                check["name"],
                number,
                f"{check['relation']} {check['tolerance']:g}" if check["tolerance"] is not None else "–",
            ]
        )
    print_table(["", "check", "number", "allowed"], rows, right=(2, 3))
    print(f"\n{'PASS' if verdict['passed'] else 'FAIL'}: {visible(str(page))}, with {visible(sidecar_of(page).name)} beside it")
