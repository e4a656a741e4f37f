"""What a model says, before and after edits: the likeliest next tokens (or classes) and how far apart the two answers are.

Letters: S tokens, V vocabulary (or classes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.app.escape import visible
from headscope.kernels.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class Token:
    """A token (or class) and a label that may be shown anywhere text is taken as text."""

    id: int
    label: str


@dataclass(frozen=True)
class Choice:
    """One row of the table; probabilities before and after the edits."""

    token: Token
    before: float
    after: float


@dataclass(frozen=True)
class Comparison:
    """The likeliest answers of either run, in the order of the first, and KL(before ‖ after) in nats."""

    rows: tuple[Choice, ...]
    divergence: float


def answer(output: object) -> Tensor:
    """Log-probabilities [V] in float64 of what comes next (logits [1, S, V]) or of the classes (logits [1, V]).

    Raises:
        InputError: the model gives no logits.
        NonFiniteError: they are not finite.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise InputError(f"the model returns {type(output).__name__} without logits, so there is no before and after to show")
    last = logits[0, -1] if logits.ndim == 3 else logits[0]
    if not bool(torch.isfinite(last).all()):
        raise NonFiniteError(f"{int((~torch.isfinite(last)).sum())} of {last.numel()} logits are not finite")
    return torch.log_softmax(last.detach().double(), dim=-1).cpu()


def compare(before: Tensor, after: Tensor, token: Callable[[int], Token], shown: int) -> Comparison:
    """Two answers [V] side by side.

    Args:
        before, after: log-probabilities.
        token: what to call an entry.
        shown: how many rows, at most.
    """
    likeliest = torch.maximum(before, after).topk(min(shown, before.shape[0])).indices.tolist()
    order = sorted(likeliest, key=lambda id: (-float(before[id]), id))
    rows = tuple(Choice(token(id), float(before[id].exp()), float(after[id].exp())) for id in order)
    divergence = float((before.exp() * (before - after)).sum())
    return Comparison(rows, max(0.0, divergence))


def token_of(tokenizer: Any, id: int) -> Token:
    """A token with its label; bytes that are no character of their own are written as `\\xe2`.

    Args:
        tokenizer: any tokenizer of transformers.
        id: the token's number.
    """
    text = str(tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    piece = str(tokenizer.convert_ids_to_tokens(id) or "")
    if "\ufffd" in text and piece and all(character in BYTES for character in piece):
        return Token(id, "".join(_byte(BYTES[character]) for character in piece))
    return Token(id, visible(text or piece))


def _byte(value: int) -> str:
    return visible(chr(value)) if value < 128 else f"\\x{value:02x}"


def _bytes_by_character() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _bytes_by_character()  # the byte each character stands for in a byte-level vocabulary (GPT-2's table)
