"""What is compared: the rotation that was learned, parts of it, simpler edits, and what knows the word.

Letters: N selected heads, D width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from headscope.interventions import Edit, Plan, assign, mask, role, select
from headscope.interventions.roles import Roles
from headscope.interventions.saferope.saferope import SafeRoPE

NONE, LEARNED = "none", "learned rotation"
BLOCKED, SILENCED = "word's key masked", "word's value zeroed"
HALF = 16  # heads


def edits() -> dict[str, Callable[[SafeRoPE, int], Plan]]:
    """Each plan of a fitted SafeRoPE and a seed, by its name in the tables."""
    return {
        LEARNED: lambda fitted, seed: fitted.plan(),
        "learned, q only": lambda fitted, seed: fitted.plan(sides=("q",)),
        "learned, k only": lambda fitted, seed: fitted.plan(sides=("k",)),
        "learned, not gated": lambda fitted, seed: fitted.plan(gated=False),
        "learned, best 16 heads": lambda fitted, seed: best_heads(fitted, HALF).plan(),
        "learned, random 16 heads": lambda fitted, seed: some_heads(fitted, HALF, seed).plan(),
        "random subspaces, not gated": lambda fitted, seed: random_subspaces(fitted, seed).plan(gated=False),
        "projection": lambda fitted, seed: fitted.plan("project"),
        "projection, not gated": lambda fitted, seed: fitted.plan("project", gated=False),
        "half-turn": lambda fitted, seed: fitted.plan("half-turn"),
    }


def oracle(way: str, roles: Roles) -> tuple[Plan, Roles]:
    """The plan that hides the first text token from all heads, or what it has to say, and where that token is."""
    text = roles["text"]
    assert not isinstance(text, (range, slice, list, tuple))
    first = {place: found[:1] for place, found in text.items() if place.endswith("/k") and "@" not in place}  # type: ignore[union-attr]
    edit = Edit("scores", mask(), select(keys=role("word"))) if way == BLOCKED else Edit("v", assign("zero"), select(keys=role("word")))
    return Plan([edit]), {"word": first}


def best_heads(fitted: SafeRoPE, count: int) -> SafeRoPE:
    """The rotations of those heads alone that tell unsafe from safe best."""
    order = sorted(_all(fitted), key=lambda place: -float(fitted.parts[place[0]].gap[place[1]]))
    return only(fitted, order[:count])


def some_heads(fitted: SafeRoPE, count: int, seed: int) -> SafeRoPE:
    """The rotations of as many heads drawn by chance."""
    places = _all(fitted)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    return only(fitted, [places[index] for index in order[:count]])


def only(fitted: SafeRoPE, places: list[tuple[int, int]]) -> SafeRoPE:
    """The same without the heads that are not named, each as (part, place in it)."""
    parts = []
    for number, part in enumerate(fitted.parts):
        kept = sorted(place for owner, place in places if owner == number)
        if kept:
            heads = tuple(part.heads[place] for place in kept)
            cut = {name: getattr(part, name)[kept] for name in ("basis", "threshold", "gap", "skew")}
            parts.append(replace(part, heads=heads, **cut))
    return replace(fitted, parts=tuple(parts))


def random_subspaces(fitted: SafeRoPE, seed: int) -> SafeRoPE:
    """The learned angles in subspaces drawn by chance."""
    random = torch.Generator().manual_seed(seed)
    parts = [replace(part, basis=torch.linalg.qr(torch.randn(part.basis.shape, generator=random)).Q) for part in fitted.parts]
    return replace(fitted, parts=tuple(parts))


def _all(fitted: SafeRoPE) -> list[tuple[int, int]]:
    return [(number, place) for number, part in enumerate(fitted.parts) for place in range(len(part.heads))]
