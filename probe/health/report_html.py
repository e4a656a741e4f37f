"""A health report as a page, and as a piece of one for notebooks: no script, nothing from outside, every name literal.

Curves and bars are SVG that stands in the page; colours are told apart with every common colour blindness, and every cell has its number.
Letters: L layers, H heads.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from torch import Tensor

from headscope.probe.health import report_svg
from headscope.probe.health.report_file import layer_rows, places
from headscope.probe.health.report_words import number, share, told, verdict
from headscope.probe.health.rules import RULES
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from headscope.probe.health.report import HealthReport

SIGNS = {"ok": "✓ ", "info": "", "warn": "! ", "alarm": "✗ "}
WORDS = {"ok": "healthy", "info": "observation", "warn": "warning", "alarm": "alarm"}
MAPS = (
    ("entropy_share", "Entropy, as a share of log n", "1: the query sees everything alike; 0: one key takes all"),
    ("routing", "Routing: what depends on the query", "share of the budget; high in sharp heads that are healthy"),
    ("sink", "Sink: what the favourite key gets", "mean over the queries that see it"),
    ("previous", "Mass on the previous token", ""),
    ("row_residual", "Row residual: how much the rows differ", "0: every query looks at the same keys"),
    ("max_score", "Largest score", ""),
)
MOST_HEADS = 64  # cells of a row


def page(report: HealthReport) -> str:
    """The whole document. Its policy allows this style sheet and nothing else."""
    style = _style("health.css") + _style("page.css")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    title = f"Attention health of {_model(report)}"
    return (
        f'<!DOCTYPE html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n<meta http-equiv=Content-Security-Policy content="{policy}">\n'
        '<meta name=viewport content="width=device-width,initial-scale=1">\n<meta name=referrer content=no-referrer>\n'
        f"<title>{markup(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<main class=hs>\n{_body(report)}</main>\n</body>\n</html>\n"
    )


def fragment(report: HealthReport) -> str:
    """The same for a notebook."""
    return f"<style>{_style('health.css')}</style><div class=hs>{_body(report)}</div>"


def _style(name: str) -> str:
    return files("headscope.probe.health").joinpath(f"assets/{name}").read_text(encoding="utf-8")


def _body(report: HealthReport) -> str:
    parts = [
        f"<h1>Attention health of {markup(_model(report))}</h1>\n<p class=soft>{_about(report)}</p>\n",
        f'<div class="verdict {report.worst}">{SIGNS[report.worst]}{markup(verdict(report))}</div>\n',
        _findings(report), _notes(report), _budget(report), _curves(report), _maps(report), _layers(report), _small_print(report),
    ]  # fmt: skip
    return "".join(parts)


def _model(report: HealthReport) -> str:
    return str(report.info.get("name") or report.info.get("model") or "a model")


def _about(report: HealthReport) -> str:
    known = [("model", "class"), ("samples", "samples"), ("tokens", "tokens"), ("seed", "seed"), ("fingerprint", "weights")]
    parts = [f"{word} {markup(str(report.info[key])[:19])}" for key, word in known if report.info.get(key) not in (None, "")]
    return " · ".join(parts)


def _findings(report: HealthReport) -> str:
    groups = told(report.findings)
    if not groups:
        return "<h2>Findings</h2>\n<p>None: no rule fired. What could not be measured is listed at the end, and says nothing.</p>\n"
    cards = []
    for one in groups:
        rows = "; ".join(
            f"{markup(place)}: {markup(name.replace('_', ' '))} {number(value)}{'' if limit is None else f' (threshold {number(limit)})'}"
            for place, name, value, limit in one.evidence[:6]
        )
        more = f"; and {len(one.evidence) - 6} more" if len(one.evidence) > 6 else ""
        tries = f"<p>What may help:</p><ul>{''.join(f'<li>{markup(text)}</li>' for text in one.remedies)}</ul>" if one.remedies else ""
        source = f"<small>Source: {markup(one.source)}</small>" if one.source else ""
        cards.append(
            f"<section class='finding {one.severity}'><h3>"
            f"<span class='tag {one.severity}'>{SIGNS[one.severity]}{WORDS[one.severity]}</span>"
            f"{markup(one.rule)}<span class=where>{markup(one.places)}</span></h3><p>{markup(_sentence(one.why))}</p>"
            f"<p class=soft>Measured: {rows}{more}</p>{tries}{source}</section>\n"
        )
    return f"<h2>Findings</h2>\n{''.join(cards)}"


def _notes(report: HealthReport) -> str:
    groups = told(report.notes)
    healthy = "".join(
        f"<li><b>{markup(one.rule.removeprefix('healthy-'))}</b>: {markup(one.places)}</li>"
        for one in groups
        if one.rule.startswith("healthy-")
    )
    others = "".join(
        f"<p><b>{markup(one.rule)}</b> <span class=soft>{markup(one.places)}</span>: {markup(one.why)}.</p>"
        for one in groups
        if not one.rule.startswith("healthy-")
    )
    card = (
        "<section class='finding ok'><h3><span class='tag ok'>✓ healthy</span>sharp heads that route</h3><p>Their entropy is low because "
        f"they know where to look; a report on entropy alone would call them collapsed.</p><ul>{healthy}</ul></section>\n"
    )
    return (card if healthy else "") + (f"<section class='finding ok'>{others}</section>\n" if others else "")


def _budget(report: HealthReport) -> str:
    names, rows = places(report.heads), [(one.diffuse, one.routing, one.hub) for one in report.heads]
    if not any(bool(part.isfinite().any()) for row in rows for part in row):
        return ""
    keys = "".join(
        f"<li>{report_svg.swatch(kind)}{words}</li>"
        for kind, words in (
            ("diffuse", "diffuse: what a query does not decide"),
            ("routing", "routing: what depends on the query"),
            ("hub", "hub: what all queries share, such as a sink"),
        )
    )
    picture = report_svg.budget_bars([_name(name) for name in names], rows)
    return (
        "<h2>The attention budget of every head</h2>\n<p>The log of the number of keys is the sum of three parts. Uniform attention is all "
        f"diffuse, a sink all hub, a head that sends every query somewhere else all routing.</p>\n<ul class=key>{keys}</ul>\n"
        f"<div class=scroll>{picture}</div>\n"
    )


def _name(place: str) -> str:
    return f"layer {place}" if place.isdigit() else place


def _curves(report: HealthReport) -> str:
    panels = report_svg.panels(report)
    if not panels:
        return ""
    keys = (
        f"<li>{report_svg.line('own')}this model (dots: its heads)</li><li>{report_svg.line('base')}the same network freshly initialised, "
        f"or uniform attention</li><li>{report_svg.line('limit')}threshold</li>"
    )
    return f"<h2>Layer by layer</h2>\n<ul class=key>{keys}</ul>\n<div class=row>{''.join(panels)}</div>\n"


def _maps(report: HealthReport) -> str:
    tables = [_map(report, field, title, about) for field, title, about in MAPS]
    found = "".join(table for table in tables if table)
    return f"<h2>Head by head</h2>\n<div class=row>{found}</div>\n" if found else ""


def _map(report: HealthReport, field: str, title: str, about: str) -> str:
    values: list[Tensor] = [getattr(one, field) for one in report.heads]
    finite = [float(value) for row in values for value in row.tolist() if math.isfinite(value)]
    if not finite:
        return ""
    top = 1.0 if field != "max_score" else max(max(finite), 1e-12)
    widest = min(MOST_HEADS, max(len(row) for row in values))
    head = "".join(f"<th scope=col>{place}" for place in range(widest))
    body = []
    for name, row in zip(places(report.heads), values, strict=True):
        cells = "".join(_cell(value, top, field) for value in row.tolist()[:widest])
        body.append(f"<tr><th scope=row>{markup(name)}{cells}")
    more = f", the first {widest} heads" if widest < max(len(row) for row in values) else ""
    caption = f"<caption><b>{markup(title)}</b>{markup(about + more) if about or more else '&nbsp;'}</caption>"
    return f"<div class=scroll><table class=map>{caption}<thead><tr><th>{head}<tbody>{''.join(body)}</table></div>"


def _cell(value: float, top: float, field: str) -> str:
    if not math.isfinite(value):
        return "<td>–"
    level = round(10 * max(0.0, min(1.0, value / top)))
    return f"<td{f' class=h{level}' if level else ''}>{f'{value:.2f}' if field != 'max_score' else number(value)}"


COLUMNS = (
("entropy_share", "entropy share"), ("diffuse", "diffuse"), ("routing", "routing"), ("hub", "hub"), ("sink", "sink"),
    ("previous", "previous"), ("row_residual", "row residual"), ("max_score", "largest score"), ("state_residual", "token residual"),
    ("state_cosine", "token cosine"), ("state_effective_rank_centred", "centred rank"), ("state_update", "update"),
)  # fmt: skip


def _layers(report: HealthReport) -> str:
    rows = layer_rows(report)
    if not rows:
        return ""
    titles = "".join(f"<th scope=col class=r>{title}" for _, title in COLUMNS)
    body = []
    for row in rows:
        cells = "".join(f"<td class=r>{_figure(key, row[key])}" for key, _ in COLUMNS)  # type: ignore[arg-type]
        body.append(f"<tr><th scope=row>{markup(str(row['place']))}{cells}")
    caption = "<caption>Means over the heads of a layer; token columns are the hidden states behind its block.</caption>"
    return (
        f"<h2>Numbers</h2>\n<div class=scroll><table>{caption}<thead><tr><th scope=col>layer{titles}<tbody>{''.join(body)}</table></div>\n"
    )


def _figure(key: str, value: float | None) -> str:
    if key in ("max_score", "state_effective_rank_centred"):
        return number(value)
    return share(value) if key == "state_residual" or value is None else f"{value:.2f}"


def _small_print(report: HealthReport) -> str:
    return _thresholds(report) + _undefined(report) + _settings(report)


def _thresholds(report: HealthReport) -> str:
    body = "".join(
        f"<tr><th scope=row>{markup(str(row['name']))}<td class=r>{number(float(row['value']))}{' *' if row['changed'] else ''}"
        f"<td>{markup(str(row['unit']))}<td>{markup(str(row['meaning']))}<td>{markup(str(row['kind']))}: {markup(str(row['source']))}"
        for row in report.thresholds.rows()
    )
    head = "".join(f"<th scope=col>{title}" for title in ("threshold", "value", "unit", "meaning", "where it comes from"))
    changed = "<p class=soft>* changed for this report</p>" if report.thresholds.changed else ""
    return (
        f"<h2>Small print</h2>\n<details><summary>Thresholds and where they come from</summary><div class=scroll><table><thead><tr>{head}"
        f"<tbody>{body}</table></div>{changed}</details>\n"
    )


def _undefined(report: HealthReport) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    named: list[tuple[str, dict[str, str]]] = [(one.site.name, one.undefined) for one in report.heads]
    named += [(f"{one.name} ({one.place})", one.undefined) for one in report.streams]
    named += [(one.site.name, one.undefined) for one in report.gradients]
    for place, undefined in named:
        for field, reason in undefined.items():
            reasons.setdefault((field, reason), []).append(place)
    rows = [f"<li><b>{markup(f)}</b>: {markup(r)} <small>({_some(names)})</small></li>" for (f, r), names in reasons.items()]
    rows += [f"<li><b>baseline {markup(name)}</b>: {markup(reason)}</li>" for name, reason in report.baselines.absent.items()]
    if not rows:
        return ""
    return f"<details><summary>What is undefined, and why</summary><ul>{''.join(rows)}</ul></details>\n"


def _some(names: Sequence[str]) -> str:
    return markup(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _settings(report: HealthReport) -> str:
    rows = "".join(f"<tr><th scope=row>{markup(str(key))}<td>{markup(str(value))}" for key, value in report.info.items())
    known = ", ".join(sorted({one.rule for one in report.findings} & RULES.keys())) or "none"
    return (
        f"<details><summary>What was measured</summary><table><tbody>{rows}</table><p class=soft>rules that fired: {known}</p></details>\n"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
