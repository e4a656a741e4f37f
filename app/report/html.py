"""The pages of a report: a function of its sidecar and nothing else, so that the same sidecar gives the same bytes.

Static, self-contained, without script: one style sheet inside, no address of anything outside, and a policy that forbids both.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files
from urllib.parse import quote

from headscope.app.escape import markup
from headscope.app.report import sections
from headscope.app.report.interactive import chart_scripts
from headscope.app.report.parts import View
from headscope.app.report.schema import Json
from headscope.kernels.errors import InputError

WARN_BYTES, MOST_BYTES = 5 * 2**20, 10 * 2**20
SECTIONS: tuple[tuple[str, str, Callable[[View], str]], ...] = (
    ("verdict", "Verdict", sections.verdict),
    ("identity", "What was measured", sections.identity),
    ("settings", "Settings", sections.settings),
    ("conservation", "Conservation: where the relevance went", sections.conservation),
    ("faithfulness", "Faithfulness: does removing what matters change the answer?", sections.faithfulness),
    ("sanity", "Sanity checks", sections.sanity),
    ("heads", "Heads", sections.heads),
    ("tokens", "Tokens", sections.tokens),
    ("evidence", "Evidence", sections.evidence),
    ("counter", "Counter-evidence", sections.counter),
    ("caveats", "Caveats and sign-off", sections.caveats),
)


def pages(document: Json, name: str, *, most: int = MOST_BYTES) -> dict[str, bytes]:
    """The pages by file name, each with zeros for the digest of the sidecar.

    Args:
        document: the sidecar.
        name: of the page, such as `report.html`; its sidecar's differs in the ending.
        most: bytes above which the examples move to pages of their own, in a folder beside the page.

    Raises:
        InputError: the page is too large even without the examples.
    """
    stem = name.rpartition(".")[0]
    whole = _page(View(document, stem, False)).encode()
    if len(whole) <= most:
        return {name: whole}
    view = View(document, stem, True)
    found = {name: _page(view).encode()}
    for record in view.shown:
        found[view.file(record["id"])] = _example_page(view, record, name).encode()
    largest = max(found, key=lambda page: len(found[page]))
    if len(found[largest]) > most:
        raise InputError(f"{largest} would have {len(found[largest])} bytes, more than {most}: show fewer examples, or cut long texts")
    return found


def head(title: str, scripts: Sequence[str] = ()) -> str:
    """Everything before the body; the policy allows this style sheet, these scripts, and nothing else."""
    style = files("headscope.app.report").joinpath("assets/report.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src '{_source(style)}'; base-uri 'none'; form-action 'none'"
    if scripts:
        allowed = " ".join(f"'{_source(script)}'" for script in scripts)
        policy = (  # the chart library writes styles of its own, and draws pictures of itself
            f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
        )
    return (
        f'<!DOCTYPE html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n<meta http-equiv=Content-Security-Policy content="{policy}">\n'
        f'<meta name=viewport content="width=device-width,initial-scale=1">\n<meta name=referrer content=no-referrer>\n'
        f"<title>{markup(title)}</title>\n<style>{style}</style>\n</head>\n"
    )


def _source(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _page(view: View) -> str:
    document, title = view.document, view.document["title"]
    links = "".join(f"<li><a href=#{key}>{place} {name.partition(':')[0]}</a>" for place, (key, name, _) in enumerate(SECTIONS))
    body = "".join(  # the verdict's heading says what it is
        f"<section id={key}>\n{'' if key == 'verdict' else f'<h2>{place} {name}</h2>'}\n{written(view)}</section>\n"
        for place, (key, name, written) in enumerate(SECTIONS)
    )
    scripts = [] if document["interactive"] is None else chart_scripts(document)
    about = f"{markup(document['method']['name'])} on {markup(document['model']['id'])}, made {markup(document['created'])}"
    return (
        f"{head(title, scripts)}<body>\n<header><h1>{markup(title)}</h1><p class=soft>{about}</p></header>\n"
        f'<nav aria-label="Sections"><ol>{links}</ol></nav>\n<main>\n{body}</main>\n'
        f"{''.join(f'<script>{script}</script>' for script in scripts)}</body>\n</html>\n"
    )


def _example_page(view: View, record: Json, name: str) -> str:
    title = f"Example {record['id']}"
    return (
        f'{head(title)}<body>\n<header><h1>{markup(title)}</h1><p><a href="../{quote(name)}#tokens">back to the report</a></p></header>\n'
        f"<main>\n{sections.example(record, view.places[record['id']], 'h2')}{sections.sidecar_line(view.stem)}</main>\n</body>\n</html>\n"
    )
