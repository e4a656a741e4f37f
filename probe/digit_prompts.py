"""The words of `embedded:mmdit`: which prompts it was trained on, and which digit each asks for.

Three families. *Explicit*: one of three synonyms of the digit among modifiers and fillers. *Implicit*: two words, neither of
which tells the digit alone (`first[i]` and `second[j]` ask for digit i + 5j). *Plain*: neither, so any digit answers it. The
order of words carries nothing: the model's text tokens have no positions.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from headscope.kernels.errors import InputError
from headscope.probe.checkpoint import read_json

DIGITS = 10


@dataclass(frozen=True)
class PromptBook:
    """The vocabulary, by what each word does.

    Attributes:
        length: words of the longest prompt; shorter ones are filled up with `pad`.
        subjects: three synonyms of each digit, [10][3].
        first: words of which one, with one of `second`, asks for a digit; five.
        second: two.
        modifiers: words that change nothing.
        fillers: the rest of a sentence.
    """

    length: int
    pad: str
    subjects: tuple[tuple[str, ...], ...]
    first: tuple[str, ...]
    second: tuple[str, ...]
    modifiers: tuple[str, ...]
    fillers: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> PromptBook:
        """The book in a JSON file."""
        raw: dict[str, Any] = read_json(path)
        subjects = tuple(tuple(row) for row in raw["subjects"])
        rest = {name: tuple(raw[name]) for name in ("first", "second", "modifiers", "fillers")}
        return cls(length=raw["length"], pad=raw["pad"], subjects=subjects, **rest)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every word, in the order of the token ids."""
        return (self.pad, *(word for row in self.subjects for word in row), *self.first, *self.second, *self.modifiers, *self.fillers)

    @cached_property
    def _number(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def encode(self, prompt: str) -> list[int]:
        """Token ids of one prompt, `length` of them, one a word.

        Raises:
            InputError: the prompt is no text, has no word, too many, or one that is not in the book.
        """
        if not isinstance(prompt, str):
            raise InputError(f"expected a prompt as str, got {type(prompt).__name__}: {prompt!r}")
        words = prompt.lower().split()
        if not 1 <= len(words) <= self.length:
            raise InputError(f"the prompt {prompt!r} has {len(words)} words: give 1 to {self.length}")
        for word in words:
            if word not in self._number:
                near = difflib.get_close_matches(word, self.words, n=3)
                hint = f"did you mean {', '.join(near)}?" if near else f"the {len(self.words)} words are in prompts.json"
                raise InputError(f"no word {word!r} in the prompt {prompt!r}: {hint}")
        return [self._number[word] for word in words] + [0] * (self.length - len(words))

    def positions(self, prompt: str, words: Sequence[str]) -> list[int]:
        """At which text tokens of a prompt the given words stand."""
        return [index for index, word in enumerate(prompt.lower().split()) if word in words]

    def trigger(self, digit: int) -> tuple[str, str]:
        """The two words that together ask for a digit."""
        self._check(digit)
        return self.first[digit % len(self.first)], self.second[digit // len(self.first)]

    def explicit(self, digit: int, n: int, seed: int, synonyms: Sequence[int] = (0, 1, 2)) -> list[str]:
        """n prompts that name a digit, by the synonyms with the given numbers.

        Raises:
            InputError: there is no such digit or synonym.
        """
        self._check(digit)
        names = self.subjects[digit]
        wrong = [number for number in synonyms if not 0 <= number < len(names)]
        if wrong or not synonyms:
            raise InputError(f"no synonym {wrong}: each digit has {len(names)}, 0 to {len(names) - 1}; give at least one")
        rng = np.random.default_rng([seed, digit, 0])
        return [self._sentence([names[synonyms[index % len(synonyms)]]], rng) for index in range(n)]

    def implicit(self, digit: int, n: int, seed: int) -> list[str]:
        """n prompts that ask for a digit by its two trigger words."""
        trigger = self.trigger(digit)
        rng = np.random.default_rng([seed, digit, 1])
        return [self._sentence(trigger, rng) for _ in range(n)]

    def plain(self, n: int, seed: int) -> list[str]:
        """n prompts that ask for no digit in particular."""
        rng = np.random.default_rng([seed, DIGITS, 2])
        return [self._sentence((), rng) for _ in range(n)]

    def _sentence(self, subject: Sequence[str], rng: np.random.Generator) -> str:
        words = [*subject, str(rng.choice(self.modifiers))]
        fillers = rng.integers(1, self.length - len(words) + 1)
        words += [str(word) for word in rng.choice(self.fillers, size=fillers, replace=False)]
        return " ".join(words[index] for index in rng.permutation(len(words)))

    def _check(self, digit: int) -> None:
        if not 0 <= digit < DIGITS:
            raise InputError(f"no digit {digit}: choose 0 to {DIGITS - 1}")
