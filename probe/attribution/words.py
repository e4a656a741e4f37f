"""From the pieces of a vocabulary to words and sentences of the text.

Every tokenizer writes spaces and bytes in its own way (Ġ, ▁, ##, </w>, <0xE2>). A piece here is the token as it stands in the running
text: the space before a word belongs to it, and bytes that are no whole character are lone surrogates, as Python's `surrogateescape` has
them, so that joined pieces are the text again. Letters: S tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Words are what white space separates; ideographs and hiragana are written without, and count one by one.
ALONE = "\u3041-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{ALONE}]|[^\\s{ALONE}]+")
END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[」』）]*|\n[^\S\n]*\n")
NO_END = re.compile(r"(?:^|[\s(\"'])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|cf|Fig|No|[Ee]\.g|[Ii]\.e)\s?\.$")


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The piece of each token, see the module docstring; special and added tokens stand for themselves.

    Args:
        tokenizer: any tokenizer of transformers, or anything with `decode`.
        ids: token numbers of one text.
    """
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return [str(tokenizer.decode([id])) for id in ids]
    raw = [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
    verbatim = {*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", ())}
    kind = _kind(tokenizer)
    found = []
    for place, (id, token) in enumerate(zip(ids, raw, strict=True)):
        if id in verbatim:
            found.append(token)
        elif kind in ("pieces", "words"):
            goes_on = kind == "pieces" and token.startswith("##")
            first = place == 0 or ids[place - 1] in verbatim
            found.append(token[2:] if goes_on else token if first else f" {token}")
        elif kind == "spaces":
            match = BYTE.fullmatch(token)
            found.append(_text(bytes([int(match[1], 16)])) if match else token.replace("▁", " "))
        elif kind == "bytes" and all(character in BYTES for character in token):
            found.append(_text(bytes(BYTES[character] for character in token)))
        elif kind == "ends":
            found.append(token.removesuffix("</w>") + " " if token.endswith("</w>") else token)
        else:
            found.append(_decoded(tokenizer, id, token))
    return found


def joined(pieces: Sequence[str]) -> str:
    """The text of neighbouring pieces; what is no whole character even then becomes U+FFFD."""
    return b"".join(map(_bytes, pieces)).decode("utf-8", "replace")


def word_starts(pieces: Sequence[str], special: Sequence[bool]) -> list[bool]:
    """[S], whether a token begins a word. White space by itself, such as a line break, and special tokens stand alone.

    A token is never divided: it belongs to the word in which it begins, and what continues its last word joins it.

    Args:
        pieces: of one text.
        special: tokens that are no part of the text.
    """
    starts = [True] * len(pieces)
    for run in _runs(special):
        text, offsets = _laid_out(pieces[run.start : run.stop])
        begins = {match.start() for match in WORD.finditer(text)}
        for place, (start, stop, whole) in zip(run, offsets, strict=True):
            first = _first_letter(text, start, stop)
            starts[place] = place == run.start or (whole and (first is None or first in begins))
    return starts


def sentence_starts(pieces: Sequence[str], special: Sequence[bool]) -> list[bool]:
    """[S], whether a token begins a sentence; it belongs to the one in which its first letter lies, white space to the one before.

    A sentence ends at . ! ? … before white space, at 。！？, or at an empty line; not after an initial or a usual English abbreviation, nor
    before a small letter (unless the text has no capitals at all).

    Args:
        pieces: of one text.
        special: tokens that are no part of the text; the text before and after one is not the same sentence.
    """
    starts = [True] * len(pieces)
    for run in _runs(special):
        text, offsets = _laid_out(pieces[run.start : run.stop])
        ends = [match.end() for match in END.finditer(text) if _ends_here(text, match.end())]
        before = 0
        for place, (start, stop, whole) in zip(run, offsets, strict=True):
            first = _first_letter(text, start, stop)
            within = before if first is None or not whole else bisect_right(ends, first)
            starts[place] = place == run.start or within > before
            before = within
    return starts


def _ends_here(text: str, end: int) -> bool:
    rest = text[end:].lstrip()
    cased = text != text.lower()
    return not (NO_END.search(text[max(0, end - 12) : end]) or (cased and rest[:1].islower() and "\n" not in text[end - 1 : end]))


def _runs(special: Sequence[bool]) -> list[range]:
    """The runs of neighbouring tokens between special ones."""
    found: list[range] = []
    for place, apart in enumerate(special):
        if apart:
            continue
        if found and found[-1].stop == place:
            found[-1] = range(found[-1].start, place + 1)
        else:
            found.append(range(place, place + 1))
    return found


def _laid_out(pieces: Sequence[str]) -> tuple[str, list[tuple[int, int, bool]]]:
    """The text of pieces; of each, from which to which character it reaches, and whether it begins with a whole one."""
    raw = [_bytes(piece) for piece in pieces]
    text = _text(b"".join(raw))
    character_of = [number for number, character in enumerate(text) for _ in _bytes(character)]  # by byte
    found, at = [], 0
    for own in raw:
        if own:
            whole = at == 0 or character_of[at] != character_of[at - 1]
            found.append((character_of[at], character_of[at + len(own) - 1] + 1, whole))
        else:
            found.append((0, 0, False))
        at += len(own)
    return text, found


def _first_letter(text: str, start: int, stop: int) -> int | None:
    return next((at for at in range(start, stop) if not text[at].isspace()), None)


def _kind(tokenizer: Any) -> str:
    """How this vocabulary writes spaces."""

    def has(piece: str) -> bool:
        id = tokenizer.convert_tokens_to_ids(piece)
        return isinstance(id, int) and 0 <= id < len(tokenizer) and tokenizer.convert_ids_to_tokens(id) == piece

    backend = getattr(tokenizer, "backend_tokenizer", None)
    model, decoder = (type(getattr(backend, part, None)).__name__ for part in ("model", "decoder"))
    if model == "WordPiece" or all(has(piece) for piece in ("##s", "##e", "##a")):
        return "pieces"
    if model == "WordLevel":
        return "words"
    if decoder == "ByteLevel":
        return "bytes"
    if model == "Unigram" or decoder == "Metaspace" or has("▁"):
        return "spaces"
    if has("Ġ"):
        return "bytes"
    return "ends" if decoder == "BPEDecoder" or has("e</w>") else "decoded"


def _decoded(tokenizer: Any, id: int, token: str) -> str:
    text = str(tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if (not text or "\ufffd" in text) and len(token) == 1 and ord(token) < 256:
        return _text(bytes([ord(token)]))  # a vocabulary of bytes
    return text or token


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _bytes_by_character() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _bytes_by_character()  # the byte each character stands for in a byte-level vocabulary (GPT-2's table)
