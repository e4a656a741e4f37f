"""The prompts of the study: what SafeRoPE learns from, and, drawn with other seeds, what it is judged by.

A concept is a digit. Its first two names are learned from, its third is not, nor are the two words that ask for it together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headscope.interventions.saferope.examples import Prompted
from headscope.probe.digit_flow import DigitFlow
from headscope.probe.digit_prompts import DIGITS, PromptBook

SEEN, HELD_OUT = (0, 1), (2,)  # synonyms
FAMILIES = ("seen", "held-out", "implicit")
SAFE = ("safe explicit", "safe implicit")


@dataclass(frozen=True)
class Size:
    """How many prompts.

    Attributes:
        learned: unsafe ones to learn from.
        learned_safe: safe ones to learn from, a digit; half as many implicit ones.
        batch: prompts that are run together.
        judged: unsafe ones of each family to judge by.
        judged_safe: safe ones to judge by, a digit, explicit and implicit.
    """

    learned: int = 96
    learned_safe: int = 16
    batch: int = 12
    judged: int = 100
    judged_safe: tuple[int, int] = (14, 10)


@dataclass(frozen=True)
class Asked:
    """Prompts of one family, and the digit that each asks for."""

    prompts: list[str]
    digits: list[int]


def learned_from(flow: DigitFlow, unsafe: int, seed: int, size: Size) -> tuple[list[Prompted], list[Prompted], list[Prompted]]:
    """Unsafe prompts, safe ones, and safe ones that name no digit; each with fresh noise at a random time."""
    book = flow.book
    others = [digit for digit in range(DIGITS) if digit != unsafe]
    names = [name for row in book.subjects for name in row]
    bad = book.explicit(unsafe, size.learned, seed=10 * seed + 1, synonyms=SEEN)
    good = _mixed([p for d in others for p in book.explicit(d, size.learned_safe, seed=10 * seed + 2, synonyms=SEEN)], seed)
    silent = _mixed([p for d in others for p in book.implicit(d, size.learned_safe // 2, seed=10 * seed + 3)], seed)
    return (
        _examples(flow, bad, names, 3 * seed, size.batch),
        _examples(flow, good, names, 3 * seed + 1, size.batch),
        _examples(flow, silent, [*book.first, *book.second], 3 * seed + 2, size.batch),
    )


def judged_by(book: PromptBook, unsafe: int, seed: int, size: Size) -> dict[str, Asked]:
    """The three families of unsafe prompts and the two of safe ones, with other sentences than those learned from."""
    others = [digit for digit in range(DIGITS) if digit != unsafe]
    base = 10_000 + 10 * seed
    explicit, implicit = size.judged_safe
    return {
        "seen": Asked(book.explicit(unsafe, size.judged, seed=base, synonyms=SEEN), [unsafe] * size.judged),
        "held-out": Asked(book.explicit(unsafe, size.judged, seed=base + 1, synonyms=HELD_OUT), [unsafe] * size.judged),
        "implicit": Asked(book.implicit(unsafe, size.judged, seed=base + 2), [unsafe] * size.judged),
        "safe explicit": Asked([p for d in others for p in book.explicit(d, explicit, seed=base + 3)], _each(others, explicit)),
        "safe implicit": Asked([p for d in others for p in book.implicit(d, implicit, seed=base + 4)], _each(others, implicit)),
    }


def first_word(prompt: str, words: Sequence[str]) -> str | None:
    """The same prompt with the one of these words that it holds in front, which changes nothing else: the text has no order."""
    rest = prompt.split()
    found = next((word for word in rest if word in words), None)
    if found is None:
        return None
    rest.remove(found)
    return " ".join([found, *rest])


def _each(digits: Sequence[int], times: int) -> list[int]:
    return [digit for digit in digits for _ in range(times)]


def _mixed(prompts: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(prompts, len(prompts))


def _examples(flow: DigitFlow, prompts: Sequence[str], words: Sequence[str], seed: int, batch: int) -> list[Prompted]:
    noise = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        images = torch.randn(len(part), 1, 8, 8, generator=noise)
        inputs = flow.inputs(images, torch.rand(len(part), generator=noise), part)
        found.append(Prompted(inputs, [flow.book.positions(prompt, words) for prompt in part]))
    return found
