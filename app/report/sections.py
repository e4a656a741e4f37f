"""The sections of a report, each a function of the sidecar.

Letters: P points of a curve.
"""

from __future__ import annotations

import yaml

from headscope.app.escape import markup
from headscope.app.report import figures
from headscope.app.report.parts import View, badge, count, head_name, interval, number, shade, signed, some_of, table
from headscope.app.report.schema import Json
from headscope.app.report.sidecar import ZEROS

KINDS = {
    "softmax": "softmax, which is not linear in the scores",
    "bias": "biases of linear maps",
    "norm shift": "shifts of normalisations",
    "constant": "constants added to data",
    "gate": "gates that are not zero at zero",
    "clamp": "clamps",
    "position": "functions of position",
    "unruled": "operations without a rule",
}


def verdict(view: View) -> str:
    """Section 0: PASS or FAIL of every check, with its number and tolerance."""
    document = view.document
    found, rows = document["verdict"], []
    for check in document["checks"]:
        low, high = check["low"], check["high"]
        within = "" if low is None else f" [{number(low)}, {number(high)}]"
        note = "" if check["note"] is None else f" <small>{markup(check['note'])}</small>"
        rows.append(
            [
                badge(check["passed"]), f"<a href=#{check['section']}>{markup(check['label'])}</a>{note}", number(check["value"]) + within,
                "–" if check["tolerance"] is None else f"{check['relation']} {number(check['tolerance'])}", count(check["n"]),
            ]
        )  # fmt: skip
    title, kind = ("✓ 0 Verdict: PASS", "card") if found["passed"] else ("✗ 0 Verdict: FAIL", "card bad")
    rest = f", {count(found['not_done'])} not done" if found["not_done"] else ""
    tally = f"{count(found['failed'])} of {count(found['of'])} checks failed{rest}."
    columns = ["result", "check", "number", "allowed", "examples"]
    checks = table("Every check, with its number and what it may be", columns, rows, right=(2, 3, 4))
    return f'<div class="{kind}"><h2>{title}</h2><p>{tally} {markup(found["scope"])}</p>{checks}</div>\n'


def identity(view: View) -> str:
    """Section 1: model, data and environment, by digest."""
    document = view.document
    model, data, environment = document["model"], document["data"], document["environment"]
    size = f"{count(model['parameters'])} parameters, {count(model['heads'])} heads at {count(model['sites'])} sites"
    where = f"{markup(model['device'])} ({markup(environment['device_name'])}), {count(environment['threads'])} threads"
    rows = [
        ("model", markup(model["id"])),
        ("revision", "–" if model["revision"] is None else markup(model["revision"])),
        ("class", f"{markup(model['class'])}, {size}"),
        ("weights SHA-256", f"<code>{model['weights_sha256']}</code>"),
        ("tokenizer SHA-256", "–" if model["tokenizer_sha256"] is None else f"<code>{model['tokenizer_sha256']}</code>"),
        ("data", f"{markup(data['source'])}: {count(data['n'])} of {count(data['total'])} examples ({markup(data['selection'])})"),
        ("data SHA-256", f"<code>{data['sha256']}</code>"),
        ("attention", f"{markup(model['attention'])}, caught by {markup(', '.join(model['caught_by']))}"),
        ("numbers", f"{markup(model['dtype'])} on {where}"),
        ("software", markup(", ".join(f"{name} {version}" for name, version in environment["packages"].items()))),
        ("system", markup(f"Python {environment['python']}, {environment['platform']}")),
    ]  # fmt: skip
    return f"<dl>{''.join(f'<dt>{name}<dd>{value}' for name, value in rows)}</dl>\n{sidecar_line(view.stem)}"


def sidecar_line(stem: str) -> str:
    file = f"{stem}.json"
    return (
        f"<dl><dt>sidecar<dd>{markup(file)}: every number on this page, exact, with those that are not shown"
        f'<dt>its SHA-256<dd><code id="sidecar">{ZEROS}</code></dl>\n'
        f"<p class=soft>Check both with <code>headscope report verify {markup(stem)}.html</code>. "
        "A digest shows that something changed, not who made it.</p>\n"
    )


def settings(view: View) -> str:
    """Section 2: how it was made, and the command that makes it again."""
    document = view.document
    method, chosen = document["method"], document["settings"]
    rows = [
        ("method", f"{markup(method['name'])} ({markup(method['source'])})"),
        ("compared with", markup(", ".join(chosen["compared"])) or "–"),
        ("target", markup(method["target"])),
        ("removed by", f"{markup(document['faithfulness']['removal'])}: what stands in for a unit that is taken away"),
        ("random orders", f"{count(chosen['draws'])} an example"),
        ("intervals", f"{number(document['faithfulness']['level'])} of {count(chosen['resamples'])} bootstrap resamples of the examples"),
        ("seed", count(chosen["seed"])),
        ("took", f"{number(document['runtime']['seconds'])} s"),
    ]
    command = "made from Python: there is no command" if document["command"] is None else document["command"]
    recipe = ""
    if document["recipe"] is not None:
        recipe = f"<h3>Edits that were in place</h3><pre>{_lines_of(yaml.safe_dump(document['recipe'], width=120))}</pre>\n"
    table = "".join(f"<dt>{name}<dd>{value}" for name, value in rows)
    return f"<dl>{table}</dl>\n<h3>To make it again</h3><pre>{markup(command)}</pre>\n{recipe}"


def _lines_of(text: str) -> str:
    """Text of several lines, which stay lines."""
    return "\n".join(markup(line) for line in text.splitlines())


def conservation(view: View) -> str:
    """Section 3: the books of every example, and by kind."""
    document, shown = view.document, view.shown
    found = document["conservation"]
    if not found["keeps_books"]:
        text = (
            "<p>This method keeps no books: its relevances need not sum to the target's value, and the difference says nothing about where "
            "the rest went.</p>\n"
        )
        columns = ["example", "value", "all removed", "Σ shown", "value − Σ"]
        rows = [
            [view.link(record["id"]), number(record["value"]), number(record["bare"]), number(record["sum"]), number(record["open"])]
            for record in shown
        ]
        return text + table(some_of("Sums by example", shown, document), columns, rows, right=range(1, 5))
    state = (
        "The books close on every example."
        if not found["open"]
        else "<strong class=bad>The books do not close</strong> on these examples: "
    )
    state += ", ".join(markup(id) for id in found["open"])
    text = (
        f"<p>{state} What entered at the target either reached the inputs or was kept on the way; the largest residual is "
        f"{number(found['worst'])} of its ledger's largest entry, {number(found['tolerance'])} is allowed. "
        "What a softmax or a bias kept is not explained by any token.</p>\n"
    )
    largest = max(map(abs, found["by_kind"].values()), default=0.0)
    kinds = [[markup(KINDS.get(kind, kind)), number(value), figures.bar(value, largest)] for kind, value in found["by_kind"].items()]
    by_kind = table(
        "Kept on the way, by kind: mean over the examples, in the unit of the target", ["kind", "relevance", "size"], kinds, right=(1,)
    )
    columns = ["example", "value", "all removed", "at inputs", "at constants", "kept", "residual", "allowed", "closes"]
    rows = []
    for record in shown:
        ledger = record["ledger"]
        rows.append(
            [
                view.link(record["id"]), number(record["value"]), number(record["bare"]), number(ledger["inputs"]),
                number(ledger["constants"]), number(ledger["absorbed"]), number(ledger["residual"]), number(ledger["allowed"]),
                badge(ledger["closes"]),
            ]
        )  # fmt: skip
    unruled = ""
    if found["unruled"]:
        lines = [[markup(operation), markup(module) or "–", count(calls)] for operation, module, calls in found["unruled"]]
        unruled = table(
            "Operations without a rule: relevance passed them by their own gradient", ["operation", "module", "calls"], lines, right=(2,)
        )
    return text + by_kind + table(some_of("The books of every example", shown, document), columns, rows, right=range(1, 8)) + unruled


def faithfulness(view: View) -> str:
    """Section 4: curves of removal against random orders, and the areas between them."""
    document = view.document
    found = document["faithfulness"]
    band = (found["random"]["low"], found["random"]["mean"], found["random"]["high"])
    both = [_lines(found, name) for name in ("most_first", "least_first")]
    limits = figures.ends([line for lines in both for line in lines], band)
    pictures = "".join(
        f"<figure><figcaption>{title}</figcaption>"
        f"{figures.curves(f'{title}: the target against the share of the units removed', found['shares'], lines, band, limits)}</figure>"
        for lines, title in zip(both, ("most relevant removed first", "least relevant removed first"), strict=True)
    )
    keys = "".join(f"<li>{figures.key(place)}{markup(method['name'])}" for place, method in enumerate(found["methods"]))
    keys += f"<li>{figures.key(None)}{count(found['random']['draws'])} random orders, mean and {number(found['level'])} band"
    rows = [
        [
            markup(method["name"]), interval(method["delta_area"]), interval(method["comprehensiveness"]),
            interval(method["sufficiency"]), number(method["seconds"]),
        ]
        for method in found["methods"]
    ]  # fmt: skip
    rows.append(["random orders", interval(found["random"]["delta_area"]), "–", "–", "–"])
    text = (
        "<p>Units are removed in the order of their relevance. A good order makes the target fall fast when the most relevant go first, "
        "and keeps it up when the least relevant do. ΔA is the area between the two curves. Texts with units removed are texts that the "
        "model may never have seen.</p>\n"
    )
    columns = ["method", "ΔA", "comprehensiveness", "sufficiency", "seconds"]
    caption = "Means over the examples, with bootstrap intervals where there are several examples"
    pictures += "" if document["interactive"] is None else "<div id=curves></div>"
    return f"{text}{pictures}<ul class=key>{keys}</ul>\n{table(caption, columns, rows, right=range(1, 5))}"


def _lines(found: Json, name: str) -> list[figures.Line]:
    return [figures.Line(method["name"], method[name]) for method in found["methods"]]


def sanity(view: View) -> str:
    """Section 5: does it come out again, and does it depend on what it should depend on?"""
    document = view.document
    found = document["sanity"]
    parts = [
        f"<p>Measured on {count(found['examples'])} of {count(document['data']['n'])} examples, the first ones. A second run differed by "
        f"at most {number(found['repeat_difference'])} of the largest relevance.</p>\n"
    ]
    weights = found["random_weights"]
    if weights is None:
        parts.append("<p>The test with random weights was not done.</p>\n")
    else:
        rows = [[markup(module), number(correlation)] for module, correlation in weights["steps"]]
        caption = (
            "Weights made random from the output down, one module after another: rank correlation with the relevance of the model itself"
        )
        parts.append(table(caption, ["random from here up", "correlation"], rows, right=(1,)))
    other = found["other_removal"]
    if other is None:
        parts.append("<p>There is no other way to remove units from this input, so nothing is said about another baseline.</p>\n")
    else:
        parts.append(
            f"<p>With units removed by {markup(other['removal'])} instead, ΔA exceeds that of random orders by "
            f"{interval(other['margin'])}.</p>\n"
        )
    return "".join(parts)


def heads(view: View) -> str:
    """Section 6: heads by the effect of their ablation."""
    document = view.document
    found = document["heads"]
    columns = ["layer", "head", "effect of ablation", "relevance", "p", "p (Holm)"]
    rows = [
        [
            f"<span id=h{place}>{'–' if row['layer'] is None else count(row['layer'])}</span>", count(row["head"]), interval(row["effect"]),
            "–" if row["relevance"] is None else interval(row["relevance"]), number(row["p"]), number(row["p_adjusted"]),
        ]
        for place, row in enumerate(found["rows"])
    ]  # fmt: skip
    caption = f"Showing {count(found['shown'])} of {count(found['tested'])} heads, those with the largest effect by size"
    together, several = found["together"], document["data"]["n"] > 1
    names = ", ".join(head_name(layer, site, head) for site, layer, head in together["heads"])
    tested = "p is that of a sign-flip test over examples; Holm's correction counts all heads that were ablated." if several else (
        "With one example there are no intervals and no p-values: these are numbers about this one text."
    )  # fmt: skip
    return (
        "<p>Effect: how far the target falls when the head's output is set to zero. Relevance: what the method gave the head. "
        f"{tested} Over all heads the two rank alike with a correlation of {number(found['agreement'])}.</p>\n"
        f"{_map(found)}{'' if document['interactive'] is None else '<div id=grid></div>'}{table(caption, columns, rows, right=range(6))}"
        f"<p>Ablated together, {names} change the target by {interval(together['effect'])}; their single effects sum to "
        f"{number(together['sum_of_single'])}. Where the two differ, heads stand in for one another or work together.</p>\n"
    )


def _map(found: Json) -> str:
    rows = []
    for name, layer, levels in found["map"]:
        title = markup(name) if layer is None else f"layer {count(layer)}"
        rows.append(f"<tr><th scope=row>{title}{''.join(f'<td{shade(level)}>{signed(level)}' for level in levels)}")
    wide = max(len(levels) for _, _, levels in found["map"])
    top = "".join(f"<th scope=col>{count(head)}" for head in range(wide))
    caption = "<caption>Effect of every head, in ninths of the largest; + where the target falls without the head</caption>"
    body = f"<table class=map>{caption}<thead><tr><th scope=col>head{top}<tbody>{''.join(rows)}</table>"
    return f'<div class=scroll tabindex=0 role=region aria-label="Map of heads">{body}</div>\n'


def tokens(view: View) -> str:
    """Section 7: what every token got, as colour, sign and digit."""
    document, shown = view.document, view.shown
    text = (
        f"<p>Showing {count(len(shown))} of {count(document['shown']['of'])} examples: {markup(document['shown']['rule'])}. "
        "The digit is the relevance in ninths of the example's largest; + speaks for the target, − against it. "
        "Special tokens are outlined.</p>\n"
    )
    if view.apart:
        rows = [[view.link(record["id"]), count(len(record["tokens"]))] for record in shown]
        return text + table(
            "Each example has a page of its own, for together they would be too large", ["example", "tokens"], rows, right=(1,)
        )
    return text + "".join(example(record, place) for place, record in enumerate(shown, 1))


def example(record: Json, place: int, level: str = "h3") -> str:
    """One example's tokens."""
    wide = None if record["grid"] is None else record["grid"][1]
    kind = "tokens" if wide is None else '"tokens grid"'
    special, named = set(record["special"]), {row["place"] for row in record["top"]}
    spans = []
    for position, (token, digit) in enumerate(zip(record["tokens"], record["levels"], strict=True)):
        name = f" id=e{place}t{position}" if position in named else ""
        spans.append(f"<span{name}{shade(digit, position in special)}>{markup(token) if wide is None else ''}{signed(digit)}</span>")
        if wide is not None and position % wide == wide - 1:
            spans.append("<br>")
    top = "; ".join(f"{markup(row['token'])} at {count(row['place'])}: {number(row['relevance'])}" for row in record["top"])
    return (
        f"<{level} id=e{place}>{markup(record['id'])}</{level}>\n"
        f"<p class=soft>{markup(record['target']['words'])} = {number(record['value'])}; what is shown sums to {number(record['sum'])}; "
        f"run <code>{record['run_sha256'][:16]}</code></p>\n<p class={kind}>{''.join(spans)}</p>\n"
        f"<p class=soft>Largest by size, {count(len(record['top']))} of {count(len(record['tokens']))}: {top}</p>\n"
    )


def evidence(view: View) -> str:
    """Section 8: from a claim to the example, its tokens, its heads and its run."""
    document = view.document
    ranked = {(row["site"], row["head"]): place for place, row in enumerate(document["heads"]["rows"])}
    rows = []
    for claim in document["claims"]:
        if claim["example"] not in view.places:
            continue
        address = view.address(claim["example"])
        words = "; ".join(
            f'<a href="{address}t{row["place"]}">{markup(row["token"])}</a> {number(row["relevance"])}' for row in claim["tokens"]
        )
        found = []
        for row in claim["heads"]:
            rank, name = ranked.get((row["site"], row["head"])), head_name(row["layer"], row["site"], row["head"])
            found.append(f"{name if rank is None else f'<a href=#h{rank}>{name}</a>'} {number(row['effect'])}")
        rows.append(
            [
                f"{markup(claim['target'])} = {number(claim['value'])} rests on these tokens and heads", view.link(claim["example"]),
                words or "–", "; ".join(found), f"<code>{claim['run_sha256'][:16]}</code>",
            ]
        )  # fmt: skip
    some = f"Showing {count(len(rows))} of {count(len(document['claims']))} claims"
    caption = f"{some}: for every example shown, its most relevant tokens and its heads with the largest effect"
    return table(caption, ["claim", "example", "tokens and their relevance", "heads and their effect", "run"], rows)


def counter(view: View) -> str:
    """Section 9: where the method did worst."""
    found = view.document["counter"]
    rows = [
        [
            view.link(row["example"]), number(row["delta_area"]),
            number(row["random_delta_area"]), number(row["margin"]), markup(", ".join(row["better"])) or "none",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    tally = f"{count(found['not_above_random'])} of {count(found['of'])} examples are not above random orders"
    text = f"<p>{tally}. Shown are {markup(found['rule'])}.</p>\n"
    return text + table(
        "Where the method did worst", ["example", "ΔA", "ΔA of random orders", "difference", "did better"], rows, right=(1, 2, 3)
    )


def caveats(view: View) -> str:
    """Section 10: what to keep in mind, what nobody tested, and who stands for it."""
    document = view.document
    lists = "".join(
        f"<h3>{title}</h3><ul>{''.join(f'<li>{markup(line)}' for line in document[name])}</ul>\n"
        for name, title in (("caveats", "Keep in mind"), ("not_tested", "Not tested"))
    )
    lines = "".join(f"<li>{name}" for name in ("Reviewed by", "Role", "Date", "Signature"))
    return f"{lists}<h3>Sign-off</h3><ul class=sign>{lines}</ul>\n"
