"""What a sample is cut into: the units that are removed, kept, ranked and named.

Letters: B batch, S tokens, U units, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.kernels.errors import InputError, ShapeError
from headscope.probe.attribution.words import joined, pieces_of, word_starts


@dataclass(frozen=True, eq=False)
class Units:
    """Disjoint groups of the places of one input.

    Attributes:
        input: name of the input, of one sample.
        places: which places belong to each unit: positions of tokens, or flat indices row · width + column of pixels.
        names: what to call each unit.
        shape: of the places: (S,) for tokens, (height, width) for an image.
    """

    input: str
    places: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __post_init__(self) -> None:
        """Raises InputError for units that overlap, are empty, have no name each, or lie outside the input."""
        places = [place for unit in self.places for place in unit]
        if not self.places or not all(self.places):
            raise InputError(f"{len(self.places)} units of {self.input}, some without a place: give at least one unit, and a place to each")
        if len(self.names) != len(self.places):
            raise InputError(f"{len(self.names)} names for {len(self.places)} units: give one name a unit")
        if len(set(places)) != len(places) or min(places) < 0 or max(places) >= math.prod(self.shape):
            raise InputError(f"the units of {self.input} overlap, or lie outside its {math.prod(self.shape)} places, 0 to one less")

    def cover(self, keep: Tensor) -> Tensor:
        """[n, U] bool -> [n, *shape] bool: which places stay. Places of no unit always do.

        Raises:
            ShapeError: another number of units.
        """
        if keep.dim() != 2 or keep.shape[1] != len(self) or keep.dtype != torch.bool:
            raise ShapeError(f"keep is {list(keep.shape)} of {keep.dtype}; give bool [n, {len(self)}], one column a unit")
        stay = torch.ones(len(keep), math.prod(self.shape), dtype=torch.bool)
        stay[:, [place for places in self.places for place in places]] = keep.cpu()[:, self._owners]
        return stay.reshape(len(keep), *self.shape)

    def sums(self, relevance: Tensor) -> Tensor:
        """[U] in float64, relevance summed over each unit; of a tensor whose trailing axes are `shape` (after summing those before).

        Raises:
            ShapeError: it has other axes.
        """
        if tuple(relevance.shape[-len(self.shape) :]) != self.shape:
            raise ShapeError(f"relevance is {list(relevance.shape)}; its last axes must be {list(self.shape)}")
        flat = relevance.detach().reshape(-1, math.prod(self.shape)).sum(0).double().cpu()
        chosen = flat[[place for places in self.places for place in places]]
        return torch.zeros(len(self), dtype=torch.float64).index_add_(0, torch.tensor(self._owners), chosen)

    @property
    def _owners(self) -> list[int]:
        """The unit of every place, in the order of `places`."""
        return [unit for unit, places in enumerate(self.places) for _ in places]


def token_units(inputs: Mapping[str, Any], tokenizer: Any = None, name: str = "input_ids", apart: Collection[int] = ()) -> Units:
    """Every visible token that is not special, by itself.

    Args:
        inputs: keyword inputs of one sample.
        tokenizer: knows which tokens are special, and names the others.
        name: of the input.
        apart: ids that are no units either, such as the places that a model fills with an image.

    Raises:
        InputError: more than one sample, or nothing that could be removed.
    """
    ids = _one(inputs, name, 2)
    mask = inputs.get("attention_mask")
    visible = torch.ones_like(ids, dtype=torch.bool) if not isinstance(mask, Tensor) or mask.shape != ids.shape else mask.bool()
    special = {*(getattr(tokenizer, "all_special_ids", ()) or ()), *apart}
    places = [place for place, id in enumerate(ids[0].tolist()) if bool(visible[0, place]) and id not in special]
    if not places:
        raise InputError(f"{name} holds no token that could be removed: the text is empty, or special tokens only")
    names = [str(int(ids[0, place])) if tokenizer is None else tokenizer.decode([int(ids[0, place])]) for place in places]
    return Units(name, tuple((place,) for place in places), tuple(names), (ids.shape[1],))


def word_units(inputs: Mapping[str, Any], tokenizer: Any, name: str = "input_ids") -> Units:
    """Tokens joined to words.

    Raises:
        InputError: as `token_units`.
    """
    tokens = token_units(inputs, tokenizer, name)
    ids = inputs[name][0].tolist()
    places = [place for (place,) in tokens.places]
    pieces = pieces_of(tokenizer, ids)
    starts = word_starts(pieces, [place not in set(places) for place in range(len(ids))])
    grouped, words = group_words(tokens.places, [pieces[place] for place in places], [starts[place] for place in places])
    return Units(name, grouped, tuple(joined([word]) for word in words), tokens.shape)


def group_words(
    places: Sequence[tuple[int, ...]], names: Sequence[str], begins: Sequence[bool]
) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """Neighbouring units joined where one does not begin a word."""
    groups: list[tuple[int, ...]] = []
    words: list[str] = []
    for own, name, begin in zip(places, names, begins, strict=True):
        if begin or not groups or groups[-1][-1] + 1 != own[0]:
            groups.append(own)
            words.append(name)
        else:
            groups[-1] += own
            words[-1] += name.removeprefix("##")
    return tuple(groups), tuple(word.strip() or word for word in words)


def patch_units(inputs: Mapping[str, Any], side: int, name: str = "pixel_values") -> Units:
    """Square patches of an image [1, C, height, width]; those at the right and lower edge may be smaller.

    Raises:
        InputError: no image of one sample, or a side that is not positive.
    """
    image = _one(inputs, name, 4)
    if side < 1:
        raise InputError(f"patches of side {side}: give 1 or more pixels")
    height, width = image.shape[-2:]
    places, names = [], []
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows, columns = range(top, min(top + side, height)), range(left, min(left + side, width))
            places.append(tuple(row * width + column for row in rows for column in columns))
            names.append(f"row {top // side}, column {left // side}")
    return Units(name, tuple(places), tuple(names), (height, width))


def units_of(inputs: Mapping[str, Any], tokenizer: Any = None, side: int | None = None, apart: Collection[int] = ()) -> Units:
    """The usual units: tokens of a text; patches of an image, by default an eighth of its height a side.

    Raises:
        InputError: neither text nor image.
    """
    if isinstance(inputs.get("input_ids"), Tensor):
        return token_units(inputs, tokenizer, apart=apart)
    image = inputs.get("pixel_values")
    if isinstance(image, Tensor) and image.dim() == 4:
        return patch_units(inputs, side or max(1, image.shape[-2] // 8))
    raise InputError(f"neither input_ids nor pixel_values among {', '.join(inputs)}: give units=")


def _one(inputs: Mapping[str, Any], name: str, axes: int) -> Tensor:
    given = inputs.get(name)
    if not isinstance(given, Tensor) or given.dim() != axes or given.shape[0] != 1:
        came = list(given.shape) if isinstance(given, Tensor) else "missing"
        raise InputError(f"{name} is {came}: units are cut in one sample with {axes} axes, [1, …]")
    return given
