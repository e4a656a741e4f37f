"""What the workbench page is made of. Text from outside reaches it through `escape.visible` and Dash components alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html
from dash.development.base_component import Component

from headscope.app import pictures
from headscope.app.engine import Run
from headscope.app.escape import visible
from headscope.app.outcome import Comparison, Token
from headscope.app.session import STRONGEST, Recipe

INDEX = """<!DOCTYPE html>
<html lang="en">
  <head>
    {%metas%}
    <title>{%title%}</title>
    {%favicon%}
    {%css%}
  </head>
  <body>
    {%app_entry%}
    <footer>{%config%}{%scripts%}{%renderer%}</footer>
  </body>
</html>"""

THEME = {
    "primaryColor": "indigo",
    "fontFamily": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', 'DejaVu Sans', sans-serif",
    "fontFamilyMonospace": "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace",
    "defaultRadius": "md",
    "colors": {  # Mantine's dark greys, a little bluer, to go with the rest of the page
        "dark": ["#d5d9e2", "#a3acbb", "#8d96a7", "#6b7485", "#444c5a", "#343a46", "#262b34", "#1d2027", "#17191f", "#111318"],
    },
}

SHORTCUTS = (
    ("← →", "previous or next head"),
    ("↑ ↓", "previous or next layer"),
    ("j k", "next or previous query token"),
    ("0", "ablate the chosen head"),
    ("[ ]", "scale it down or up by 0.1"),
    ("1", "reset it"),
    ("u r", "undo, redo"),
    ("d", "pattern before or after the edits"),
    ("?", "this list"),
)


def shell(content: Component, name: str, facts: str) -> Component:
    """What surrounds every page: the bar at the top and the list of keys."""
    bar = html.Header(
        [
            html.Div([html.Span(className="mark", **attributes(aria_hidden="true")), html.H1("Headscope")], className="brand"),
            html.Div([html.Span(visible(name), className="model"), html.Span(visible(facts), className="facts")], className="about"),
            html.Div(
                [
                    dmc.Button("Keys", id="help", variant="subtle", size="compact-sm", color="gray", **attributes(data_action="help")),
                    dmc.ColorSchemeToggle(
                        lightIcon=html.Span("☀", **attributes(aria_hidden="true")),
                        darkIcon=html.Span("☾", **attributes(aria_hidden="true")),
                        color="gray",
                        variant="subtle",
                        size="md",
                        **attributes(aria_label="Switch between light and dark"),
                    ),
                ],
                className="tools",
            ),
        ],
        className="bar",
    )
    keys = html.Dialog(
        [
            html.H2("Keys", id="keys-title"),
            html.Dl([part for key, meaning in SHORTCUTS for part in (html.Dt(html.Kbd(key)), html.Dd(meaning))]),
            dmc.Button("Close", variant="default", size="xs", **attributes(data_action="close-help")),
        ],
        id="keys",
        **attributes(aria_labelledby="keys-title"),
    )
    page: Component = dmc.MantineProvider([bar, html.Main(content), keys], theme=THEME, defaultColorScheme="auto")
    return page


def workbench(
    page: str, text: str, state: dict[str, object], run: Run, recipe: Recipe, comparison: Comparison, labels: list[str]
) -> Component:
    """The page `/heads`, already filled.

    Args:
        page: the session's id; the browser holds this and the run's key, nothing else.
        text: what the model was run on.
        state: what the page's script needs to know of the run, see `server.state`.
        run: the run shown.
        recipe: its edits.
        comparison: the next token before and after them.
        labels: what to call each site.
    """
    return html.Div(
        [
            dcc.Store(id="page", data=page),
            dcc.Store(id="command"),
            dcc.Store(id="run", data=state),
            dcc.Store(id="shown"),
            _input(text, run.tokens),
            html.Div(id="problem", role="alert"),
            html.Div(id="connection", role="alert", hidden=True),
            html.Div([_heads(), _pattern(), _panel(recipe, comparison, run, labels)], className="columns"),
            html.Div([html.Div(className="sweep"), html.Span(id="progress")], id="working", role="status"),
        ],
        id="workbench",
    )


def strip(tokens: Sequence[Token]) -> list[Component]:
    """One button for each token; the page's script keeps exactly one of them in the tab order."""
    return [
        html.Button(
            token.label,
            className="token",
            type="button",
            tabIndex=0 if place == len(tokens) - 1 else -1,
            **attributes(data_token=str(place), aria_label=f"token {place}: {token.label}"),
        )
        for place, token in enumerate(tokens)
    ]


def edit_list(recipe: Recipe, labels: Sequence[str]) -> Component:
    """The recipe, each edit with a way to take it back."""
    if not recipe:
        return html.P("No edits yet. Choose a head and move the slider, or press 0 to ablate it.", className="quiet")
    return html.Ol(
        [
            html.Li(
                [
                    html.Button(
                        f"{labels[edit.row]} H{edit.head}",
                        className="goto",
                        type="button",
                        title="show this head",
                        **attributes(data_action="goto", data_row=str(edit.row), data_head=str(edit.head)),
                    ),
                    html.Span("ablated" if edit.value == 0 else f"z × {edit.value:g}", className="what"),
                    html.Button(
                        "×",
                        className="remove",
                        type="button",
                        title="remove this edit",
                        **attributes(
                            data_action="remove",
                            data_row=str(edit.row),
                            data_head=str(edit.head),
                            aria_label=f"remove the edit of {labels[edit.row]} head {edit.head}",
                        ),
                    ),
                ]
            )
            for edit in recipe
        ],
        className="edits",
    )


def outcome(comparison: Comparison, run: Run) -> list[Component]:
    """The next-token table before and after, with the divergence under it."""
    largest = max((max(row.before, row.after) for row in comparison.rows), default=1.0) or 1.0
    rows = []
    for row in comparison.rows:
        points = 100 * (row.after - row.before)
        sign, tone = ("▲", "up") if points > 0.005 else ("▼", "down") if points < -0.005 else ("·", "same")
        rows.append(
            html.Tr(
                [
                    html.Th(html.Span(row.token.label, className="chip"), scope="row"),
                    html.Td(_bar(row.before, largest, "before")),
                    html.Td(_bar(row.after, largest, "after")),
                    html.Td([html.Span(sign, className=tone), f" {points:+.2f}" if tone != "same" else " 0.00"], className="number"),
                ],
                **attributes(data_token_id=str(row.token.id), data_before=repr(row.before), data_after=repr(row.after)),
            )
        )
    head = html.Thead(html.Tr([html.Th(text, scope="col") for text in ("token", "before", "after", "Δ points")]))
    facts = f"{1000 * run.seconds:.0f} ms · run {run.key[:12]}"
    return [
        html.Table([head, html.Tbody(rows)], className="next"),
        html.P(
            [
                html.Span(["KL(before ‖ after) = ", html.Strong(f"{comparison.divergence:.4g} nats")], id="divergence"),
                html.Span(facts, className="quiet"),
            ],
            className="divergence",
            **attributes(data_divergence=repr(comparison.divergence)),
        ),
    ]


def problem(message: str) -> Component:
    """An error, shown where the work is; everything else stays as it was."""
    alert: Component = dmc.Alert(visible(message), title="That did not work", color="red", variant="light", className="alert")
    return alert


def attributes(**named: str) -> Any:  # Any: Dash's own types know nothing of data-* and aria-*
    """Attributes whose names have hyphens: `data_token="3"` as `data-token`."""
    return {name.replace("_", "-"): value for name, value in named.items()}


def _bar(probability: float, largest: float, kind: str) -> Component:
    return html.Div(
        [
            html.Span(className=f"bar-fill {kind}", style={"width": f"{52 * probability / largest:.2f}%"}),
            html.Span(f"{100 * probability:.2f} %", className="number"),
        ],
        className="bar-cell",
    )


def _input(text: str, tokens: Sequence[Token]) -> Component:
    return html.Section(
        [
            html.Div(
                [
                    dmc.Textarea(
                        id="text",
                        value=text,
                        autosize=True,
                        minRows=1,
                        maxRows=5,
                        placeholder="Text for the model",
                        className="text",
                        spellCheck=False,
                        **attributes(aria_label="Text for the model"),
                    ),
                    dmc.Button("Run", id="go", **attributes(data_action="text")),
                ],
                className="entry",
            ),
            html.Div(strip(tokens), id="strip", role="toolbar", **attributes(aria_label="Tokens; the chosen one is the query")),
            html.P(id="query-line", className="quiet", **attributes(aria_live="polite")),
        ],
        className="card input",
        **attributes(aria_label="Text and tokens"),
    )


def _heads() -> Component:
    return html.Section(
        [
            html.Div([html.H2("Heads"), html.Span("layer ↓  head →", className="quiet")], className="title"),
            html.Div(
                [
                    html.Div(id="head-numbers", className="axis", **attributes(aria_hidden="true")),
                    html.Div(id="layer-numbers", className="axis", **attributes(aria_hidden="true")),
                    html.Div(
                        [html.Img(id="grid-image", alt=""), html.Div(id="grid-marks", **attributes(aria_hidden="true"))],
                        id="grid",
                        role="application",
                        tabIndex=0,
                        **attributes(aria_roledescription="grid of attention heads", aria_label="Grid of heads; arrow keys choose one"),
                    ),
                ],
                className="sheet",
            ),
            html.P(
                [
                    html.Span(id="chosen", **attributes(aria_live="polite")),
                    html.Span(
                        "Each square is one head's pattern, √ scale; blocks of cells show their largest value.",
                        className="quiet",
                    ),
                ],
                className="note",
            ),
            html.H2(["Head ", html.Span(id="summary-name"), html.Span(", averages over queries", className="quiet")]),
            html.Dl(id="summary"),
        ],
        className="card heads",
        **attributes(aria_label="Heads"),
    )


def _pattern() -> Component:
    gradient = ", ".join(f"#{stop}" for stop in pictures.STOPS[::3])
    return html.Section(
        [
            html.Div(
                [
                    html.H2(["Pattern ", html.Span(id="pattern-name")]),
                    html.Div(
                        [
                            dmc.SegmentedControl(
                                id="which",
                                value="after",
                                size="xs",
                                data=[{"value": "before", "label": "before"}, {"value": "after", "label": "after edits"}],
                                **attributes(aria_label="Run shown"),
                            ),
                            dmc.SegmentedControl(
                                id="colour-scale",
                                value="sqrt",
                                size="xs",
                                data=[{"value": name, "label": "√" if name == "sqrt" else name} for name in pictures.SCALES],
                                **attributes(aria_label="Colour scale"),
                            ),
                        ],
                        className="switches",
                    ),
                ],
                className="title",
            ),
            html.Div(
                [
                    html.Canvas(id="pattern", role="img", **attributes(aria_label="Attention pattern")),
                    html.Canvas(id="pattern-over", **attributes(aria_hidden="true")),
                ],
                id="pattern-box",
            ),
            html.P("Point at a cell to read its exact value.", id="readout", className="readout"),
            html.Div(
                [
                    html.Div(
                        [html.Div(className="ramp", style={"background": f"linear-gradient(90deg, {gradient})"}), html.Div(id="ticks")],
                        className="ramp-box",
                    ),
                    html.Span([html.Span(className="hatch"), "masked"], className="legend"),
                ],
                className="colour-bar",
                role="img",
                **attributes(aria_label="Colour bar: attention probability from 0 to 1; hatched cells are masked"),
            ),
        ],
        className="card pattern",
        **attributes(aria_label="Pattern of the chosen head"),
    )


def _panel(recipe: Recipe, comparison: Comparison, run: Run, labels: Sequence[str]) -> Component:
    return html.Section(
        [
            html.Div([html.H2(["Scale ", html.Span(id="edited-name")]), html.Div(id="group", className="quiet")], className="title"),
            html.Div(
                [
                    dmc.Slider(
                        id="scale-slider",
                        value=1,
                        min=0,
                        max=STRONGEST,
                        step=0.05,
                        precision=2,
                        updatemode="drag",
                        thumbLabel="Scale of the chosen head",
                        marks=[{"value": value, "label": f"{value:g}"} for value in (0, 0.5, 1, 1.5, STRONGEST)],
                        className="slider",
                    ),
                    dmc.NumberInput(
                        id="scale-number",
                        value=1,
                        min=0,
                        max=STRONGEST,
                        step=0.1,
                        decimalScale=4,
                        clampBehavior="strict",
                        size="sm",
                        w=92,
                        prefix="× ",
                        **attributes(aria_label="Scale of the chosen head, as a number"),
                    ),
                ],
                className="scale",
            ),
            html.Div(
                [
                    dmc.Button("Ablate ×0", color="orange.8", size="xs", **attributes(data_action="ablate")),
                    dmc.Button("Reset ×1", variant="default", size="xs", **attributes(data_action="reset")),
                ],
                className="buttons",
            ),
            html.Div(
                [
                    html.H2("Edits"),
                    html.Span(className="spring"),
                    dmc.Button("Undo", id="undo", variant="default", size="compact-xs", disabled=True, **attributes(data_action="undo")),
                    dmc.Button("Redo", id="redo", variant="default", size="compact-xs", disabled=True, **attributes(data_action="redo")),
                    dmc.Button("Clear", id="clear", variant="default", size="compact-xs", disabled=True, **attributes(data_action="clear")),
                ],
                className="title edits-title",
            ),
            html.Div(edit_list(recipe, labels), id="edits"),
            html.H2("Next token, before → after"),
            html.Div(outcome(comparison, run), id="outcome"),
        ],
        className="card panel",
        **attributes(aria_label="Edits and their effect"),
    )
