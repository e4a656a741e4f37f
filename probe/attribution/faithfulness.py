"""`measure_faithfulness`: whether what an attribution calls relevant is what the model's answer hangs on; over one sample or many.

Letters: U units, P points of a curve, H heads of all sites.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, NonFiniteError, SelectionError, ShapeError
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.curves import SHARES, Subsets, check_relevance, draw_subsets, measure_curves
from headscope.probe.attribution.entries import Entries, digest_of
from headscope.probe.attribution.measured import POSITION, RANDOM, Faithfulness, Measured
from headscope.probe.attribution.target import Scalar, Target
from headscope.probe.attribution.units import Units
from headscope.probe.attribution.value import Value
from headscope.probe.models import model_fingerprint

Goal = int | Target | Scalar | None
Ranker = Callable[[nn.Module, Mapping[str, Any], Target | Scalar], Attribution | Tensor]
Ranking = str | Attribution | Tensor | Ranker


def measure_faithfulness(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    attribution: Ranking | Sequence[Ranking] | Mapping[str, Ranking | Sequence[Ranking]],
    target: Goal | Sequence[Goal] = None,
    *,
    tokenizer: Any = None,
    removal: str | Sequence[str | None] | None = None,
    units: Units | Callable[[Mapping[str, Any]], Units] | None = None,
    replacement: int | None = None,
    steps: int = 20,
    shares: Sequence[float] = SHARES,
    subsets: int = 20,
    draws: int = 5,
    batch: int = 32,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    path: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Faithfulness:
    """Remove what an attribution calls relevant, and see what becomes of the target; beside it random orders and the order of position.

    Args:
        model: in eval mode; nothing of it is changed.
        inputs: keyword inputs of one sample, or a sequence of those.
        attribution: what ranks the units: the name of a method of `attribute`; an `Attribution`; a tensor, one number a unit or of the
            input's shape; or a function of (model, inputs, target) that returns one of these two. For several samples, a sequence
            of them, or a name or function for all. A mapping from names measures several on the same removals.
        target: as in `attribute`; a sequence gives each sample its own. Probabilities are read beside it, see `Curves`.
        tokenizer, units, replacement, batch: as in `Value`; units may be a function of a sample.
        removal: one or several of `Value`'s; `heads` ranks heads by their relevance instead of the input.
        steps, shares: as in `measure_curves`.
        subsets: random sets of each size for sensitivity-n; 0 leaves it out.
        draws: random orders to compare with; 0 leaves them out.
        level, resamples: of the bootstrap over samples.
        seed: of everything random; the same call gives the same numbers.
        path: a JSON-lines file that takes every finished entry, and from which a repeated call goes on. An entry counts only under the
            same model, sample, target and settings; a function counts by its name.
        progress: called with (entries done, entries in all).

    Raises:
        InputError: no samples, several samples in one batch, a removal that an input cannot have, as many rankings as samples missing.
        NonFiniteError: a relevance or a value is NaN or infinite.
        SelectionError: no such method or removal, or an attribution that has no relevance of what is removed.
        ShapeError: a relevance of another shape.
        StoreError: `path` holds something else.
    """
    samples = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    removals = (removal,) if removal is None or isinstance(removal, str) else tuple(removal)
    if not samples or not removals or draws < 0 or subsets < 0:
        raise InputError(
            f"{len(samples)} samples, {len(removals)} removals, draws={draws}, subsets={subsets}: give at least one sample and removal, "
            "and no negative number"
        )
    targets: list[Goal] = [*target] if isinstance(target, Sequence) else [target] * len(samples)
    if len(targets) != len(samples):
        raise InputError(f"{len(targets)} targets for {len(samples)} samples: give one for all, or one for each")
    rankings = _rankings(attribution, len(samples), not isinstance(inputs, Mapping))
    settings = {
        "steps": steps, "shares": list(shares), "subsets": subsets, "draws": draws, "level": level, "resamples": resamples, "seed": seed,
        "replacement": replacement, "model": None if path is None else model_fingerprint(model), "torch": torch.__version__,
    }  # fmt: skip
    fixed = {name: value for name, value in settings.items() if name not in ("draws", "level", "resamples")} | {"batch": batch}
    names = [(name, 0) for name in rankings] + [(RANDOM, draw) for draw in range(draws)] + [(POSITION, 0)]
    total, found = len(samples) * len(removals) * len(names), []
    with Entries(path) as entries:
        for place, (sample, goal) in enumerate(zip(samples, targets, strict=True)):
            made: dict[str, tuple[Attribution | Tensor, float | None]] = {}
            for manner in removals:
                context = Context(model, sample, goal, tokenizer, manner, units, replacement, batch, subsets, _mixed(seed, place))
                asked = (fixed, manner, place, sample, _named(goal), context.units)
                for name, draw in names:
                    ranking = rankings[name][place] if name in rankings else None
                    key = digest_of(asked, name, draw, _named(ranking))
                    entry = entries.get(key)
                    if entry is None:
                        order = _mixed(seed, place, draw)
                        relevance, seconds = context.relevance(name, ranking, made, order, "heads" in removals)
                        curves = measure_curves(
                            context.value.read, relevance, steps=steps, shares=shares, subsets=context.drawn(), seed=order
                        )
                        ends = curves.most_first[0], curves.most_first[-1]
                        entry = Measured(place, context.value.removal, name, draw, len(relevance), *ends, seconds, curves)
                        entries.put(key, entry)
                    found.append(entry)
                    if progress is not None:
                        progress(len(found), total)
    return Faithfulness(tuple(found), settings)


class Context:
    """One sample under one removal: what its rankings share, made when first asked for."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        goal: Goal,
        tokenizer: Any,
        removal: str | None,
        units: Units | Callable[[Mapping[str, Any]], Units] | None,
        replacement: int | None,
        batch: int,
        subsets: int,
        seed: int,
    ) -> None:
        self.model, self.inputs, self.goal, self.tokenizer, self.removal = model, inputs, goal, tokenizer, removal
        self.given, self.replacement, self.batch, self.subsets, self.seed = units, replacement, batch, subsets, seed
        self._value: Value | None = None
        self._drawn: Subsets | None = None

    @property
    def units(self) -> Units | None:
        """Those given for this sample; None for the usual ones."""
        if self.given is None or self.removal == "heads":
            return None
        return self.given if isinstance(self.given, Units) else self.given(self.inputs)

    @property
    def value(self) -> Value:
        if self._value is None:
            self._value = Value(
                self.model, self.inputs, self.goal, removal=self.removal, units=self.units, tokenizer=self.tokenizer,
                replacement=self.replacement, batch=self.batch,
            )  # fmt: skip
        return self._value

    def drawn(self) -> Subsets | None:
        """The random sets of sensitivity-n."""
        if self.subsets and self._drawn is None:
            self._drawn = draw_subsets(self.value.read, len(self.value.units), self.subsets, seed=self.seed)
        return self._drawn

    def relevance(
        self, name: str, ranking: Ranking | None, made: dict[str, tuple[Attribution | Tensor, float | None]], seed: int, heads: bool
    ) -> tuple[Tensor, float | None]:
        """[U], of a ranking or, where it is None, of the control of that name; and the seconds that it took."""
        units = self.value.units
        if ranking is None:
            return (_random(len(units), seed) if name == RANDOM else _position(units)), None
        if name not in made:
            made[name] = self._made(ranking, heads)
        attribution, seconds = made[name]
        return relevance_of(attribution, units), seconds

    def _made(self, ranking: Ranking, heads: bool) -> tuple[Attribution | Tensor, float | None]:
        if isinstance(ranking, Attribution | Tensor):
            return ranking, None
        started = time.perf_counter()
        if isinstance(ranking, str):
            found: Attribution | Tensor = attribute(
                self.model, self.inputs, self.value.target, ranking, tokenizer=self.tokenizer, heads=heads, layers=False
            )
        else:
            found = ranking(self.model, self.inputs, self.value.target)
        return found, time.perf_counter() - started


def relevance_of(attribution: Attribution | Tensor, units: Units) -> Tensor:
    """[U] in float64: what an attribution says of each unit.

    Args:
        attribution: of one sample; or a tensor, one number a unit or with the axes of the input. For heads: [layers, H] or flat.
        units: of the input, or of heads.

    Raises:
        SelectionError: the attribution has no relevance of that input, or of heads.
        ShapeError: it has other axes, or is of several samples.
        NonFiniteError: it is NaN or infinite.
    """
    if isinstance(attribution, Attribution):
        attribution = _found(attribution, units)
    tensor = attribution.detach().double().cpu()
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(f"{bad} of {tensor.numel()} relevances are NaN or infinite, which have no rank: attribute again in float32")
    if tensor.shape == (len(units),):
        relevance = tensor
    elif units.input == "heads" and tensor.numel() == len(units):
        relevance = tensor.flatten()
    else:
        if tensor.dim() > len(units.shape) and tensor.shape[0] != 1:
            raise ShapeError(
                f"relevance is {list(tensor.shape)}: give that of one sample, [1, …], or one number for each of {len(units)} units"
            )
        relevance = units.sums(tensor)
    check_relevance(relevance)
    return relevance


def _found(attribution: Attribution, units: Units) -> Tensor:
    if units.input == "heads":
        rows = [value.sum(-1) for value in attribution.heads.values()]  # [B, H] a site
        if not rows:
            raise SelectionError(f"{attribution.method} kept no relevance of heads: attribute(…, heads=True), or another method")
        if len(rows[0]) != 1:
            raise ShapeError(f"the relevance of heads is of {len(rows[0])} samples: attribute one sample at a time")
        return torch.cat(rows, dim=-1)[0]
    if units.input not in attribution.inputs:
        raise SelectionError(f"{attribution.method} has no relevance of {units.input}: there are {', '.join(attribution.inputs)}")
    return attribution.inputs[units.input]


def _rankings(attribution: Any, samples: int, several: bool) -> dict[str, list[Ranking]]:
    """By name, one ranking a sample."""
    given = attribution if isinstance(attribution, Mapping) else {_usual_name(attribution): attribution}
    found: dict[str, list[Ranking]] = {}
    for name, ranking in given.items():
        if name in (RANDOM, POSITION):
            raise InputError(f"{name!r} is the name of a control: give the ranking another")
        one_each = isinstance(ranking, list | tuple)
        if not one_each and several and samples > 1 and isinstance(ranking, Attribution | Tensor):
            raise InputError(f"{name}: one attribution for {samples} samples: give a sequence, one for each, or the name of a method")
        rows = list(ranking) if one_each else [ranking] * samples
        if len(rows) != samples:
            raise InputError(f"{name}: {len(rows)} attributions for {samples} samples: give one for each")
        for row in rows:
            if not (isinstance(row, str | Attribution | Tensor) or callable(row)):
                raise InputError(
                    f"{name}: {type(row).__name__} ranks nothing: give a method's name, an Attribution, a tensor or a function"
                )
        found[name] = rows
    if not found:
        raise InputError("nothing to measure: give at least one attribution")
    return found


def _usual_name(attribution: Any) -> str:
    first = attribution[0] if isinstance(attribution, list | tuple) and attribution else attribution
    if isinstance(first, str):
        return first
    return first.method if isinstance(first, Attribution) else getattr(first, "__name__", "given")


def _random(units: int, seed: int) -> Tensor:
    return torch.rand(units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _position(units: Units) -> Tensor:
    """[U]: later is more relevant; in an image, nearer to its centre. The opposite order has the opposite area between its curves."""
    if len(units.shape) == 1:
        return torch.arange(len(units), dtype=torch.float64)
    height, width = units.shape[-2:]
    grid = torch.stack(torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")).reshape(2, -1)
    middle = torch.tensor([(height - 1) / 2, (width - 1) / 2], dtype=torch.float64)
    return torch.stack([-torch.dist(grid[:, list(places)].mean(1), middle) for places in units.places])


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1)[0])


def _named(given: object) -> object:
    """What stands for a target or ranking in a digest: its content, or a function's name."""
    if isinstance(given, Target):
        return given.to_dict()
    if isinstance(given, Attribution):
        return [given.method, dict(given.inputs), dict(given.heads)]
    if given is None or isinstance(given, str | int | Tensor):
        return given
    return f"{getattr(given, '__module__', '')}.{getattr(given, '__qualname__', type(given).__qualname__)}"
