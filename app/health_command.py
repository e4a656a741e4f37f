"""`headscope health`: how healthy a model's attention is, why, and what may be tried.

Letters: B batch, N tokens, L layers, H heads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from headscope.app.case import Case, case_of
from headscope.app.escape import visible
from headscope.app.health_printing import print_comparison, print_names, print_report, print_sweep
from headscope.app.printing import listed, print_json, print_table
from headscope.app.report.prompts import inputs_of, read_prompts
from headscope.interventions import Plan
from headscope.kernels.errors import InputError
from headscope.probe import load
from headscope.probe.atlas.chart import chart_heads
from headscope.probe.atlas.stimuli import TEXTS
from headscope.probe.health.compare import compare_health
from headscope.probe.health.comparison import HealthComparison
from headscope.probe.health.dilution import LengthSweep, sweep_lengths
from headscope.probe.health.findings import SEVERITIES, Finding, severity_named
from headscope.probe.health.measure import measure_health
from headscope.probe.health.report import HealthReport
from headscope.probe.health.thresholds import Thresholds, thresholds_of
from headscope.probe.models import context_window

NAMED = (("previous", "previous-token"), ("induction", "induction"), ("duplicate", "duplicate-token"))
SURE = 0.5  # of a stripe's mass, from which a head is named after it
BLOCK, SAMPLES = 64, 4  # of the random tokens that heads are named on


@dataclass(frozen=True)
class Seen:
    """What the command was run on.

    Attributes:
        case: the model and its first input.
        batches: all inputs.
        special: [B, N] of each, bool; None where nothing is known of special tokens.
        source: where the inputs are from, in words.
    """

    case: Case
    batches: list[dict[str, Tensor]]
    special: list[Tensor] | None
    source: str


def run_health(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 1 where `--fail-on` says that what was found is too bad."""
    thresholds = thresholds_of(_thresholds(arguments.threshold))
    if arguments.list_thresholds:
        return _list_thresholds(arguments, thresholds)
    _check(arguments)
    lengths = _lengths(arguments.lengths)
    seen = _seen(arguments)
    if lengths:
        _check_lengths(seen, lengths)
    plan = None if arguments.recipe is None else Plan.load(arguments.recipe, model=seen.case.model)
    report = _measure(arguments, seen, thresholds)
    names = _names(arguments, seen.case)
    sweep = _sweep(seen, lengths) if lengths else None
    if sweep is not None:
        report = replace(report, findings=_sorted(report, sweep.findings(thresholds)))
    compared = _compare(arguments, seen, plan)
    _write_files(arguments, report)
    if arguments.json:
        facts: dict[str, object] = {"worst": report.worst, "report": report.to_dict(), "names": names}
        facts |= {} if sweep is None else {"sweep": sweep.to_dict()}
        facts |= {} if compared is None else {"comparison": compared.to_dict()}
        print_json("headscope.health-command/v1", seen.case, facts)
    else:
        print_report(report, heads=arguments.heads, layers=arguments.layers)
        print_names(names)
        if sweep is not None:
            print_sweep(sweep)
        if compared is not None:
            print_comparison(compared)
    return 1 if arguments.fail_on is not None and report.at_least(arguments.fail_on) else 0


# -- what is asked -------------------------------------------------------------------------------------------------------


def _thresholds(given: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        name, sign, value = text.partition("=")
        try:
            number = float(value)
        except ValueError as error:
            raise InputError(f"--threshold {text!r}: write NAME=NUMBER, such as sink=0.5 (see --list-thresholds)") from error
        if not sign or not name.strip():
            raise InputError(f"--threshold {text!r}: write NAME=NUMBER, such as sink=0.5 (see --list-thresholds)")
        found[name.strip()] = number
    return found


def _list_thresholds(arguments: argparse.Namespace, thresholds: Thresholds) -> int:
    if arguments.json:
        print(json.dumps({"schema": "headscope.thresholds/v1", "thresholds": thresholds.rows()}))
        return 0
    rows = [
        [str(row["name"]), f"{row['value']:g}{' *' if row['changed'] else ''}", str(row["unit"]), f"{row['kind']}: {row['source']}"]
        for row in thresholds.rows()
    ]
    print_table(["threshold", "value", "unit", "where it comes from"], rows, right=(1,))
    print("\nwhat each is for")
    for row in thresholds.rows():
        print(f"  {row['name']}: {row['meaning']}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Everything that can be refused before a model is loaded is refused here."""
    if arguments.fail_on is not None:
        severity_named(arguments.fail_on)
    if arguments.spectrum < 0:
        raise InputError(f"--spectrum {arguments.spectrum}: give a number of steps from 0 up")
    if arguments.data is not None and arguments.tokens is not None:
        raise InputError("--tokens repeats or cuts one text: leave it out with --data")
    if arguments.recipe is not None and arguments.against_model is not None:
        raise InputError("--recipe and --against-model both name what is compared with: give one of them")
    if arguments.png is not None:
        _pictures()
    for name in ("html", "save", "png"):
        file = getattr(arguments, name)
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise InputError(f"--{name} {file!r}: there is no such folder")


def _lengths(text: str | None) -> list[int]:
    found = [] if text is None else listed(text, "--lengths")
    if found and (len(found) < 2 or found[0] < 2 or any(a >= b for a, b in zip(found, found[1:], strict=False))):
        raise InputError(f"--lengths {text!r}: give two or more numbers of tokens from 2 up, in ascending order, such as 64,256,1024")
    return found


def _check_lengths(seen: Seen, lengths: Sequence[int]) -> None:
    if not seen.case.reads_text:
        raise InputError(f"--lengths is for text, and {seen.case.name} reads images")
    limit = context_window(seen.case.model)
    if limit is not None and lengths[-1] > limit:
        raise InputError(f"--lengths up to {lengths[-1]}: the context window of this model is {limit} tokens")


# -- what is measured ----------------------------------------------------------------------------------------------------


def _seen(arguments: argparse.Namespace) -> Seen:
    nothing = arguments.text is None and arguments.text_file is None and arguments.image is None
    reads = str(arguments.model) != "embedded:vit"
    source = "the command line"
    if nothing and reads and arguments.data is None:
        arguments = argparse.Namespace(**vars(arguments) | {"text": "\n".join(TEXTS)})
        source = "a text that comes with the library"
    case = case_of(arguments)
    batches = [case.inputs]
    if arguments.data is not None:
        prompts = read_prompts(Path(arguments.data))
        batches = [inputs_of(prompt, case.model, case.processor) for prompt in prompts.rows]
        source = prompts.source
    return Seen(case, batches, _special(case, batches), source)


def _special(case: Case, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor] | None:
    ids = getattr(case.processor, "all_special_ids", None)
    if not ids or not all("input_ids" in batch for batch in batches):
        return None
    return [torch.isin(batch["input_ids"], batch["input_ids"].new_tensor(list(ids))) for batch in batches]


def _measure(arguments: argparse.Namespace, seen: Seen, thresholds: Thresholds) -> HealthReport:
    print("measuring …", file=sys.stderr, flush=True)
    one = len(seen.batches) == 1
    special = None if seen.special is None else seen.special[0] if one else seen.special
    report = measure_health(
        seen.case.model, seen.batches[0] if one else seen.batches, special=special, ignore_special=arguments.ignore_special,
        sites=arguments.sites, spectrum=arguments.spectrum, baselines=not arguments.no_baselines, thresholds=thresholds,
        seed=arguments.seed,
    )  # fmt: skip
    return replace(report, info={"name": seen.case.name, **report.info, "inputs": seen.source})


def _names(arguments: argparse.Namespace, case: Case) -> dict[str, list[dict[str, float]]]:
    """The heads that random tokens, each twice, show to be of a kind: by kind, each with its score."""
    window = context_window(case.model)
    length = BLOCK if window is None else min(BLOCK, (window - 2) // 2)
    if arguments.no_names or not case.reads_text or length < 8 or getattr(getattr(case.model, "config", None), "is_encoder_decoder", False):
        return {}
    print("naming heads …", file=sys.stderr, flush=True)
    atlas = chart_heads(
        case.model, case.processor, length=length, samples=SAMPLES, seed=arguments.seed, weights=False, redundancy=False, importance=False
    )
    found: dict[str, list[dict[str, float]]] = {}
    for score, kind in NAMED:
        top = [row for row in atlas.top(score, 1000) if math.isfinite(row[2]) and row[2] >= SURE]
        if top:
            found[kind] = [{"layer": layer, "head": head, "score": value} for layer, head, value in top]
    return found


def _sweep(seen: Seen, lengths: Sequence[int]) -> LengthSweep:
    ids = seen.case.inputs["input_ids"]
    repeated = ids[:, torch.arange(lengths[-1], device=ids.device) % ids.shape[1]]  # [1, N]
    if ids.shape[1] < lengths[-1]:
        print(f"the text has {ids.shape[1]} tokens and is repeated up to {lengths[-1]}", file=sys.stderr, flush=True)

    def told(done: int, total: int) -> None:
        print(f"length {done} of {total}", file=sys.stderr, flush=True)

    return sweep_lengths(seen.case.model, lambda length: {"input_ids": repeated[:, :length]}, lengths, progress=told)


def _sorted(report: HealthReport, more: Sequence[Finding]) -> tuple[Finding, ...]:
    every = [*report.findings, *more]
    return tuple(sorted(every, key=lambda one: -SEVERITIES.index(one.severity)))


def _compare(arguments: argparse.Namespace, seen: Seen, plan: Plan | None) -> HealthComparison | None:
    if plan is None and arguments.against_model is None:
        return None
    print("comparing …", file=sys.stderr, flush=True)
    if plan is not None:

        def within() -> AbstractContextManager[object]:
            return nullcontext() if plan is None else plan.on(seen.case.model)

        return compare_health(seen.case.model, None, seen.batches, within=within, names=("before", Path(arguments.recipe).name))
    other, _ = load(arguments.against_model, device=arguments.device, dtype=arguments.dtype, task=arguments.task)
    names = (seen.case.name, str(arguments.against_model))
    if names[0] == names[1]:
        names = (f"{names[0]} (first)", f"{names[1]} (second)")
    return compare_health(seen.case.model, other, seen.batches, names=names)


# -- files ---------------------------------------------------------------------------------------------------------------


def _write_files(arguments: argparse.Namespace, report: HealthReport) -> None:
    if arguments.html is not None:
        report.save_html(arguments.html)
        print(f"page written to {visible(arguments.html)}", file=sys.stderr)
    if arguments.save is not None:
        report.save(arguments.save)
        print(f"result written to {visible(arguments.save)}", file=sys.stderr)
    if arguments.png is not None:
        content: bytes = _pictures().budget(report)
        try:
            Path(arguments.png).write_bytes(content)
        except OSError as error:
            raise InputError(f"{arguments.png} cannot be written: {error.strerror}") from error
        print(f"picture written to {visible(arguments.png)}", file=sys.stderr)


def _pictures() -> ModuleType:
    try:
        from headscope.app import health_picture
    except ImportError as error:
        raise InputError("--png needs pillow: pip install 'headscope[app]'") from error
    return health_picture
