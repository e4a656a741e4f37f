"""The two models that are bent, behind one face: prompts, words, drawing, and who judges what was drawn.

Shapes: N pictures or videos of F frames, 8 × 8 pixels.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from conditions import Condition
from torch import Tensor, nn
from video import GRID as VIDEO_GRID
from video import MOTIONS, SHAPES, VideoJudge, load_flow

from headscope.interventions import Plan, select
from headscope.interventions.diffusion.bender import bend
from headscope.interventions.diffusion.maps import TokenMaps, watch_maps
from headscope.probe import load

sys.path.append(str(Path(__file__).parents[1] / "saferope"))
from judge import Judge


class Subject(ABC):
    """A model with N prompts.

    Attributes:
        words: keys of each word of every prompt; the first is the one that is bent most.
        parts: parts of the model or of the walk, as conditions of `select`.
        everywhere: all sites that words are seen at.
        steps: of the walk.
    """

    name: str
    model: nn.Module
    words: Mapping[str, Sequence[int]]
    parts: Mapping[str, dict[str, Any]]
    everywhere: dict[str, Any]
    grid: tuple[int, ...]
    offset: int
    prompts: list[str]
    steps: int = 20

    def plan(self, condition: Condition) -> Plan:
        where = self.parts[condition.part] if condition.part != "everywhere" else {}
        return bend(
            condition.motion, condition.amount, grid=self.grid, tokens=self.words[condition.word], offset=self.offset,
            renormalise=condition.renormalise, **{**self.everywhere, **where},
        )  # fmt: skip

    def draw(self, plan: Plan | None = None, seed: int = 0) -> Tensor:
        """[N, F, 8, 8], the same noise for the same seed."""
        with nullcontext() if plan is None else plan.on(self.model):
            return self.sample(seed)

    def maps(self, seed: int = 0) -> TokenMaps:
        """Of the words while the prompts are drawn unedited, enlarged to the picture."""
        where = select(**self.everywhere)
        with watch_maps(self.model, self.words, grid=self.grid, offset=self.offset, where=where) as watched:
            self.sample(seed)
        return watched.maps(size=(8, 8))

    @abstractmethod
    def sample(self, seed: int) -> Tensor: ...

    @abstractmethod
    def kept(self, pictures: Tensor) -> dict[str, list[bool]]:
        """For each thing that was asked for, whether each picture shows it; the first is what the first word asks for."""


class Digits(Subject):
    """`embedded:mmdit`: joint attention of 16 image tokens and 8 text tokens."""

    name = "digits"
    words: Mapping[str, Sequence[int]] = {"subject": [0], "modifier": [1], "all words": range(4)}
    parts: Mapping[str, dict[str, Any]] = {
        "steps 0–2": {"steps": range(3)}, "steps 10–19": {"steps": range(10, 20)}, "double blocks": {"sites": "transformer_blocks.*"},
        "single blocks": {"sites": "single_transformer_blocks.*"},
    }  # fmt: skip
    everywhere: dict[str, Any] = {"sites": "*"}
    grid, offset = (4, 4), 8

    def __init__(self, each: int) -> None:
        self.model, self.flow = load("embedded:mmdit")
        book = self.flow.book
        self.prompts = [
            f"{book.subjects[digit][turn % 3]} {book.modifiers[turn % 8]} a digit" for turn in range(each) for digit in range(10)
        ]  # fmt: skip
        self.asked = [digit for _ in range(each) for digit in range(10)]
        self.judge = Judge.fit()

    def sample(self, seed: int) -> Tensor:
        found: Tensor = self.flow.sample(self.prompts, seed=seed, steps=self.steps)
        return found

    def kept(self, pictures: Tensor) -> dict[str, list[bool]]:
        return {"digit": [bool(one) for one in self.judge.read(pictures) == self.asked]}


class Videos(Subject):
    """The tiny video model: cross-attention of 4 × 4 × 4 tokens of a video to 4 words."""

    name = "videos"
    words: Mapping[str, Sequence[int]] = {"shape": [0], "motion": [1], "all words": range(4)}
    parts: Mapping[str, dict[str, Any]] = {
        "steps 0–2": {"steps": range(3)}, "steps 10–19": {"steps": range(10, 20)}, "first layer": {"layers": [0]},
        "last layer": {"layers": [2]},
    }  # fmt: skip
    everywhere: dict[str, Any] = {"sites": "*attn2*"}
    grid, offset = VIDEO_GRID, 0

    def __init__(self, each: int) -> None:
        self.flow = load_flow()
        self.model = self.flow.model
        self.asked = [(shape, motion) for _ in range(each) for motion in MOTIONS for shape in SHAPES]
        self.prompts = [f"{shape} {motion} a film" for shape, motion in self.asked]
        self.judge = VideoJudge.listed()

    def sample(self, seed: int) -> Tensor:
        return self.flow.sample(self.prompts, seed=seed, steps=self.steps)[:, 0]

    def kept(self, pictures: Tensor) -> dict[str, list[bool]]:
        read = self.judge.read(pictures[:, None])
        return {
            "shape": [one[0] == other[0] for one, other in zip(read, self.asked, strict=True)],
            "motion": [one[1] == other[1] for one, other in zip(read, self.asked, strict=True)],
        }


def settle() -> None:
    """One thread, so that times and roundings are the same everywhere."""
    torch.set_num_threads(1)
