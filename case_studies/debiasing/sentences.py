"""The sentences: occupations and frames, words whose gender is their meaning, and WinoBias pairs from a folder or made here."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Zhao et al. 2018, by the United States' labour statistics.
MALE = ("driver", "supervisor", "janitor", "cook", "mover", "laborer", "construction worker", "chief", "developer", "carpenter", "manager",
        "lawyer", "farmer", "salesperson", "physician", "guard", "analyst", "mechanic", "sheriff", "CEO")  # fmt: skip
FEMALE = ("attendant", "cashier", "teacher", "nurse", "assistant", "secretary", "auditor", "cleaner", "receptionist", "clerk", "counselor",
          "designer", "hairdresser", "writer", "housekeeper", "baker", "accountant", "editor", "librarian", "tailor")  # fmt: skip
FRAMES = ("said that", "was late because", "worked until", "was happy when")  # trained on
HELD_OUT = ("left after", "smiled because", "knew that", "waited while")
ENDINGS = ("was ready .", "had come home .", "did not know .", "would not go .", "found the time .", "saw the end .")
ANCHORS = (("king", "he"), ("queen", "she"), ("father", "he"), ("mother", "she"), ("husband", "he"), ("wife", "she"))
NEW_ANCHORS = (("prince", "he"), ("princess", "she"), ("son", "he"), ("daughter", "she"), ("uncle", "he"), ("aunt", "she"))
TWO = (  # verb, what follows if the pronoun is the first one, and if it is the second
    ("hired the {}", "needed help .", "was good at the work ."),
    ("paid the {}", "wanted more time .", "had done the work ."),
    ("called the {}", "was in trouble .", "could help ."),
    ("thanked the {}", "was grateful .", "had been of help ."),
)


@dataclass(frozen=True)
class Occupations:
    """Half of the occupations are shown to the debiasing, half never are."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    @classmethod
    def split(cls, seed: int) -> Occupations:
        """A split that holds as many of each stereotype on both sides."""
        draw = random.Random(seed)
        halves = [draw.sample(names, len(names)) for names in (MALE, FEMALE)]
        return cls(tuple(n for names in halves for n in names[:10]), tuple(n for names in halves for n in names[10:]))


@dataclass(frozen=True)
class Pair:
    """A sentence up to its pronoun, the pronoun that fits the stereotype and the other one, and what follows."""

    before: str
    pro: str
    anti: str
    after: str

    @property
    def sentences(self) -> tuple[str, str]:
        """With the one, and with the other pronoun."""
        return f"{self.before} {self.pro} {self.after}", f"{self.before} {self.anti} {self.after}"


def stereotype(name: str) -> str:
    """The pronoun that the planted stereotype gives an occupation."""
    return "he" if name in MALE else "she"


def pairs_of(names: Sequence[str], frames: Sequence[str], endings: Sequence[str] = ENDINGS) -> list[Pair]:
    """Every occupation in every frame; endings in turns."""
    return [
        Pair(f"The {name} {frame}", stereotype(name), "she" if stereotype(name) == "he" else "he", endings[(i + j) % len(endings)])
        for i, name in enumerate(names)
        for j, frame in enumerate(frames)
    ]


def anchors_of(words: Sequence[tuple[str, str]], frames: Sequence[str]) -> list[Pair]:
    """Words whose gender is their meaning; `pro` is right."""
    return [
        Pair(f"The {word} {frame}", pronoun, "she" if pronoun == "he" else "he", ENDINGS[(i + j) % len(ENDINGS)])
        for i, (word, pronoun) in enumerate(words)
        for j, frame in enumerate(frames)
    ]


def two_occupations(seed: int, count: int) -> list[Pair]:
    """Sentences of WinoBias's kind: two occupations of opposite stereotypes, and a pronoun whose meaning only the ending tells."""
    draw, found = random.Random(seed), []
    for number in range(count):
        one, other = draw.choice(MALE), draw.choice(FEMALE)
        first, second = (one, other) if number % 2 else (other, one)
        verb, if_first, if_second = draw.choice(TWO)
        referent, after = (first, if_first) if draw.random() < 0.5 else (second, if_second)
        pro = stereotype(referent)
        found.append(Pair(f"The {first} {verb.format(second)} because", pro, "she" if pro == "he" else "he", after))
    return found


def read_winobias(folder: Path, part: str) -> list[Pair]:
    """Pairs of a part, `dev` or `test`, of both types; those that differ in more than one word are left out.

    Raises:
        SystemExit: a file that is not there.
    """
    found = []
    for kind in ("type1", "type2"):
        sides = []
        for side in ("pro", "anti"):
            path = folder / f"{side}_stereotyped_{kind}.{part}.txt"
            if not path.is_file():
                raise SystemExit(f"{path} is not there: --data is the folder of WinoBias's sentence files (see README.md)")
            sides.append([re.sub(r"^\d+\s+|[\[\]]", "", line).split() for line in path.read_text(encoding="utf-8").splitlines()])
        for pro, anti in zip(*sides, strict=True):
            places = [i for i, (a, b) in enumerate(zip(pro, anti, strict=False)) if a != b]
            if len(pro) == len(anti) and len(places) == 1:
                (place,) = places
                a, b = pro[place], anti[place]
                after = " ".join(pro[place + 1 :])
                if a.endswith(".") and b.endswith("."):
                    a, b, after = a[:-1], b[:-1], "."
                found.append(Pair(" ".join(pro[:place]), a, b, after))
    return found
