"""Text from outside is shown verbatim and does nothing."""

from __future__ import annotations

import html
import json

import pytest

from headscope.app import pages
from headscope.app.engine import Engine
from headscope.app.escape import markup, visible
from headscope.app.outcome import Choice, Comparison, Token, token_of
from tests.app.tiny import HOSTILE

PLAIN = ["<script>alert(1)</script>", "</s>", "<b>", "<br>", "javascript:alert(1)", '<i style="background:url(x)">', "é", "日本", "👍"]


@pytest.mark.parametrize("text", PLAIN)
def test_what_can_be_seen_is_left_as_it_is(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n", "⏎"),
        ("a\n\nb", "a⏎⏎b"),
        ("\t", "⇥"),
        (" ", "␣"),
        ("   ", "␣␣␣"),
        (" a", " a"),
        ("\r", "\\u000d"),
        ("\x00", "\\u0000"),
        ("\x1b[31m", "\\u001b[31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2066x\u2069", "\\u2066x\\u2069"),
        ("\u200b", "\\u200b"),
        ("\ufeff", "\\ufeff"),
        ("\u00a0", "\\u00a0"),
        ("\u2028", "\\u2028"),
        ("\ue000", "\\ue000"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("\u0301", "\u25cc\u0301"),
        ("", ""),
    ],
)
def test_what_cannot_be_seen_is_spelt_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_round_trips_and_opens_no_tag(text: str) -> None:
    assert "<" not in markup(text)
    assert html.unescape(markup(text)) == visible(text)


def test_markup_leaves_quotes_alone() -> None:
    assert markup('it\'s "so"') == 'it\'s "so"'


@pytest.mark.parametrize("place", range(len(HOSTILE)))
def test_hostile_tokens_of_a_tokenizer_get_visible_labels(engine: Engine, place: int) -> None:
    ids = engine.tokenizer(HOSTILE[place])["input_ids"]
    assert len(ids) == 1
    assert token_of(engine.tokenizer, ids[0]).label == visible(HOSTILE[place])


def test_bytes_that_are_no_character_are_shown_as_bytes(engine: Engine) -> None:
    ids = engine.tokenizer("é")["input_ids"]
    assert [token_of(engine.tokenizer, id).label for id in ids] == ["\\xc3", "\\xa9"]


@pytest.mark.parametrize("text", HOSTILE)
def test_tokens_reach_the_page_as_text_of_a_component_never_as_markup(engine: Engine, text: str) -> None:
    label = visible(text)
    [button] = pages.strip([Token(7, label)])
    assert button.children == label
    table = pages.outcome(Comparison((Choice(Token(7, label), 0.5, 0.4),), 0.1), engine.find(engine.first))
    found = json.dumps(table, default=lambda component: component.to_plotly_json())
    assert json.dumps(label) in found
    for banned in ("dangerously_allow_html", "srcDoc", "Markdown", "DataTable"):
        assert banned not in found
    assert pages.problem(text).children == label
