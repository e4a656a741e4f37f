"""Small pieces of a page: numbers, tables, links, and the signs of colour-blind safe heat maps. Where text becomes markup.

Every number goes through `number` or `count`, which put it inside <i>; every text from outside through `markup` or `quoted`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote

from headscope.app.escape import markup, visible
from headscope.app.report import figures
from headscope.app.report.schema import Json


@dataclass(frozen=True)
class View:
    """A sidecar, and where its examples stand.

    Attributes:
        document: the sidecar.
        stem: of the page's name.
        apart: each example has a page of its own.
    """

    document: Json
    stem: str
    apart: bool

    @cached_property
    def shown(self) -> list[Json]:
        """The records that are shown, in order."""
        by_id = {record["id"]: record for record in self.document["examples"]}
        return [by_id[id] for id in self.document["shown"]["examples"]]

    @cached_property
    def places(self) -> dict[str, int]:
        """The number of every example that is shown, from 1."""
        return {record["id"]: place for place, record in enumerate(self.shown, 1)}

    def file(self, id: str) -> str:
        """The file of an example's own page."""
        return f"{self.stem}-examples/{self.places[id]:04d}.html"

    def address(self, id: str) -> str:
        """Where an example begins, for the double quotes of a link."""
        return f"{quote(self.file(id)) if self.apart else ''}#e{self.places[id]}"

    def link(self, id: str) -> str:
        """An example's name, leading to it where it is shown."""
        return f'<a href="{self.address(id)}">{markup(id)}</a>' if id in self.places else markup(id)


def number(value: float | int | None) -> str:
    """A number of the sidecar, in four digits; where there is none, a dash."""
    return "–" if value is None else f"<i>{figures.shown(value)}</i>"


def count(value: int) -> str:
    """A whole number of the sidecar, all of its digits."""
    return f"<i>{value}</i>"


def quoted(text: str) -> str:
    """Text from outside, inside the double quotes of an attribute."""
    return html.escape(visible(text), quote=True)


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    aside = set(right)
    top = "".join(f"<th scope=col{' class=r' if place in aside else ''}>{name}" for place, name in enumerate(columns))
    body = []
    for row in rows:
        first = f"<tr><th scope=row{' class=r' if 0 in aside else ''}>{row[0]}"
        body.append(first + "".join(f"<td{' class=r' if place in aside else ''}>{cell}" for place, cell in enumerate(row[1:], 1)))
    name = quoted(html.unescape(_plain(caption)))
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{name}"><table><caption>{caption}</caption>'
        f"<thead><tr>{top}<tbody>{''.join(body)}</table></div>\n"
    )


def _plain(markup_text: str) -> str:
    return "".join(part.rpartition(">")[2] for part in markup_text.split("<"))


def interval(found: Json) -> str:
    if found["low"] is None:
        return number(found["mean"])
    return f"{number(found['mean'])} [{number(found['low'])}, {number(found['high'])}]"


def badge(passed: bool | None) -> str:
    if passed is None:
        return "– not done"
    return "<span class=good>✓ PASS</span>" if passed else "<strong class=bad>✗ FAIL</strong>"


def some_of(caption: str, shown: Sequence[Json], document: Json) -> str:
    return f"{caption}, showing {count(len(shown))} of {count(document['shown']['of'])}"


def head_name(layer: int | None, site: str, head: int) -> str:
    return f"{markup(site) if layer is None else f'L{count(layer)}'} head {count(head)}"


def signed(level: int) -> str:
    return f"<sub>{'+' if level > 0 else '−' if level < 0 else ''}{abs(level)}</sub>"


def shade(level: int, special: bool = False) -> str:
    names = [*(["s"] if special else []), *([f"{'p' if level > 0 else 'n'}{abs(level)}"] if level else [])]
    return "" if not names else f" class={names[0]}" if len(names) == 1 else f' class="{" ".join(names)}"'
