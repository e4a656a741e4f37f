"""How a health report is printed: the verdict, a line for each layer, what was found and why, and which sharp heads are well.

Letters: L layers, H heads.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from headscope.app.escape import visible
from headscope.app.printing import print_table
from headscope.probe.health.comparison import HealthComparison
from headscope.probe.health.dilution import LengthSweep
from headscope.probe.health.report import HealthReport
from headscope.probe.health.report_file import places
from headscope.probe.health.report_words import NAMED, Told, number, share, told, verdict

WIDE = 110  # letters of a line of prose
MOST = 8  # numbers of a finding, heads of a comparison
LAYERS = (
    ("entropy", "entropy_share"), ("diffuse", "diffuse"), ("routing", "routing"), ("hub", "hub"), ("sink", "sink"),
    ("previous", "previous"), ("row residual", "row_residual"),
    ("│ stream residual", "state_residual"), ("cosine", "state_cosine"), ("rank", "state_effective_rank_centred"),
)  # fmt: skip
HEADS = (
    "entropy_share",
    "diffuse",
    "routing",
    "hub",
    "p_max",
    "sink",
    "first_mass",
    "previous",
    "own",
    "distance",
    "row_residual",
    "max_score",
)
STATES = (
    "residual", "residual_composite", "cosine", "cosine_centred", "effective_rank_centred", "stable_rank", "participation_centred",
    "update", "step_cosine",
)  # fmt: skip
PLAIN = ("state_effective_rank_centred", "effective_rank_centred", "stable_rank", "participation_centred", "distance", "max_score")


def print_report(report: HealthReport, *, heads: bool, layers: bool) -> None:
    """Everything that a person reads first."""
    print(f"{verdict(report)}\n")
    rows = [[visible(str(row["place"])), *(_cell(field, row[field]) for _, field in LAYERS)] for row in report.layers()]
    if rows:
        print_table(["layer", *(title for title, _ in LAYERS)], rows, right=range(1, len(LAYERS) + 1))
    if heads:
        _print_heads(report)
    if layers:
        _print_states(report)
    print()
    for one in told(report.findings):
        _print_finding(one)
    if not report.findings:
        print("no findings")
    _print_notes(report)
    for name, reason in report.baselines.absent.items():
        if reason != "not asked for":
            print(f"no baseline {visible(name)}: {visible(reason)}")
    for text in _texts(report.info.get("warnings")):
        print(f"warning: {visible(text)}")


def _texts(given: object) -> list[str]:
    return [str(text) for text in given] if isinstance(given, list | tuple) else []


def _cell(field: str, value: object) -> str:
    numeric = value if isinstance(value, int | float) else None
    if field in PLAIN:
        return number(None if numeric is None else round(numeric, 1))
    return share(numeric) if numeric is None or "residual" in field else f"{numeric:.2f}"


def _print_finding(one: Told) -> None:
    print(f"{NAMED[one.severity][0].upper()}  {one.rule}  {visible(one.places)}")
    _prose(visible(one.why) + ".")
    measured = "; ".join(f"{place} {number(value)}" for place, _, value, _ in one.evidence[:MOST])
    if one.evidence:
        _, name, _, limit = one.evidence[0]
        more = f" and {len(one.evidence) - MOST} more" if len(one.evidence) > MOST else ""
        _prose(f"{name}: {visible(measured)}{more}{'' if limit is None else f' (threshold {number(limit)})'}")
    if one.remedies:
        _prose(f"what may help: {'; '.join(one.remedies)}")
    print()


def _prose(text: str) -> None:
    print(textwrap.fill(text, WIDE, initial_indent="    ", subsequent_indent="    "))


def _print_notes(report: HealthReport) -> None:
    groups = told(report.notes)
    healthy = [one for one in groups if one.rule.startswith("healthy-")]
    if healthy:
        print("healthy sharp heads: their entropy is low because they route, which is no collapse")
        for one in healthy:
            print(f"    {one.rule.removeprefix('healthy-')}: {visible(one.places)}")
    for one in groups:
        if one not in healthy:
            print(f"note: {one.rule}: {visible(one.places)}")


def print_names(names: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Heads by what they do on random tokens, each twice."""
    if names:
        print("on random tokens, read twice:")
    for kind, rows in names.items():
        most = ", ".join(f"{row['layer']}.{row['head']} ({row['score']:.2f})" for row in rows[:MOST])
        print(f"    {kind}: {most}{f' and {len(rows) - MOST} more' if len(rows) > MOST else ''}")


def _print_heads(report: HealthReport) -> None:
    print("\nevery head")
    rows = []
    for place, one in zip(places(report.heads), report.heads, strict=True):
        for row in one.rows():
            rows.append([f"{visible(place)}.{row['head']}", *(_cell(field, row[field]) for field in HEADS)])
    print_table(["head", *(field.replace("_", " ") for field in HEADS)], rows, right=range(1, len(HEADS) + 1))


def _print_states(report: HealthReport) -> None:
    print("\nhidden states")
    rows = []
    for one in report.streams:
        before = "before " if one.place == "input" else ""
        row = one.row()
        rows.append(
            [f"{before}{visible(one.name)}{f' ({one.stream})' if one.stream else ''}", *(_cell(field, row[field]) for field in STATES)]
        )
    print_table(["where", *(field.replace("_", " ") for field in STATES)], rows, right=range(1, len(STATES) + 1))


def print_sweep(sweep: LengthSweep) -> None:
    """How many keys a query uses, on average over the heads of a layer, as the text grows."""
    print("\neffective keys of a query as the text grows, mean over the heads of a layer")
    rows = []
    for place, one in enumerate(sweep.heads):
        name = str(place if one.site.layer is None else one.site.layer)
        rows.append([name, *(number(round(float(row.nanmean()), 1)) for row in one.effective_keys), share(float(one.slope.nanmean()))])
    print_table(["layer", *(f"{length} tokens" for length in sweep.lengths), "slope"], rows, right=range(1, len(sweep.lengths) + 2))
    print("slope: 1 spreads over all keys there are, 0 keeps to as many as on a short text")


def print_comparison(compared: HealthComparison) -> None:
    """The heads that differ most, and the hidden states."""
    print(f"\n{visible(str(compared))}")
    layers = {one.site.name: one.site.layer for one in compared.heads}
    rows = [
        [visible(site) if layers[site] is None else f"{layers[site]}.{head}", number(value)]
        for site, head, value in compared.changed_most(MOST)
    ]
    print_table(["head", "Jensen-Shannon, nats"], rows, right=(1,))
    if compared.streams:
        print()
        states = [
            [f"{'before ' if one.place == 'input' else ''}{visible(one.name)}", share(one.cka), share(one.change)]
            for one in compared.streams
        ]
        print_table(["hidden states", "CKA", "relative change"], states, right=(1, 2))
    for text in compared.warnings:
        print(f"warning: {visible(text)}")
