"""How text from outside is shown: every character of it can be seen, and none does anything.

Tokens, model names and error messages may hold markup, terminal escapes, invisible or direction-changing characters.
"""

from __future__ import annotations

import html
import unicodedata

SIGNS = {"\n": "⏎", "\t": "⇥"}
# Control, format (bidi, zero width), surrogate, private, unassigned, line and paragraph separators.
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
DOTTED_CIRCLE = "\u25cc"  # carries a combining mark that has no letter of its own to sit on


def visible(text: str) -> str:
    """The text with every character that would be invisible, or would act on its surroundings, spelt out.

    A newline becomes ⏎, a tab ⇥; other control, format and separator characters become `\\u202e`-like escapes, as do
    spaces other than the plain one; nothing but spaces becomes as many ␣. A combining mark at the start gets a dotted
    circle to sit on.
    """
    if text and not text.strip(" "):
        return "␣" * len(text)  # nothing but spaces would look like nothing at all
    shown = "".join(_show(character) for character in text)
    return DOTTED_CIRCLE + shown if text and unicodedata.combining(text[0]) else shown


def markup(text: str) -> str:
    """`visible` text, disarmed for places that read markup (HTML text, Plotly labels); not for attribute values."""
    return html.escape(visible(text), quote=False)


def _show(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    category = unicodedata.category(character)
    if category in INVISIBLE or (category == "Zs" and character != " "):
        code = ord(character)
        return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
    return character
