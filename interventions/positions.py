"""Ways to name positions: a slice, a text, a role, a box of a grid."""

from __future__ import annotations

from dataclasses import dataclass

from headscope.kernels.errors import SelectionError


@dataclass(frozen=True)
class Stretch:
    """A slice of positions or steps: either end open, clipped to what is there, as Python slices are."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None

    def indices(self, length: int) -> range:
        """The indices below `length` that the slice names."""
        return range(*slice(self.start, self.stop, self.step).indices(length))


@dataclass(frozen=True)
class Span:
    """Every token that a text overlaps, at each of its occurrences; found when the plan is switched on."""

    text: str


@dataclass(frozen=True)
class Role:
    """Every token of a role, such as text, image or register; `plan.on(model, roles=...)` says which those are."""

    name: str


Positions = tuple[int, ...] | Stretch | Span | Role


def span(text: str) -> Span:
    """The tokens of a text, for `queries=` or `keys=`; `plan.on(model, tokenizer=..., input_ids=...)` says where they are.

    Raises:
        SelectionError: the text is empty.
    """
    if not isinstance(text, str) or not text:
        raise SelectionError(f"span({text!r}): a span needs the text to look for, at least one character")
    return Span(text)


def role(name: str) -> Role:
    """The tokens of a role, for `queries=` or `keys=`; `plan.on(model, roles={"text": range(8)})` says which those are.

    `find_roles` reads off a model which tokens come from which of its inputs.

    Raises:
        SelectionError: the name is empty.
    """
    if not isinstance(name, str) or not name:
        raise SelectionError(f"role({name!r}): give the name of a role, such as 'text' or 'image'")
    return Role(name)


def grid(
    shape: tuple[int, ...], *, rows: slice | int | None = None, columns: slice | int | None = None, frames: slice | int | None = None,
    offset: int = 0,
) -> tuple[int, ...]:  # fmt: skip
    """Positions of a box among tokens that stand row by row (and frame by frame), for `queries=` or `keys=`.

    Args:
        shape: (rows, columns) of an image, or (frames, rows, columns) of a video, in tokens.
        rows, columns, frames: which of them: an int or a slice; all if left out.
        offset: tokens that stand before the grid, such as a class token or a text.

    Raises:
        SelectionError: a shape that is no grid, or a box with nothing in it.
    """
    if len(shape) not in (2, 3) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise SelectionError(f"grid({shape!r}): give (rows, columns) or (frames, rows, columns), each at least 1")
    if frames is not None and len(shape) == 2:
        raise SelectionError(f"grid({shape!r}, frames={frames!r}): an image has no frames; give (frames, rows, columns)")
    chosen = (rows, columns) if len(shape) == 2 else (frames, rows, columns)
    axes = [
        range(size)[part] if isinstance(part, slice) else range(size) if part is None else _one(part, size, shape)
        for part, size in zip(chosen, shape, strict=True)
    ]
    found = [0]
    for axis, size in zip(axes, shape, strict=True):
        found = [place * size + index for place in found for index in axis]
    if not found:
        raise SelectionError(f"grid({shape!r}): the box holds no token")
    return tuple(place + offset for place in found)


def _one(index: int, size: int, shape: tuple[int, ...]) -> range:
    if isinstance(index, bool) or not isinstance(index, int) or not -size <= index < size:
        raise SelectionError(f"grid({shape!r}): no {index!r} among {size}; give an int from 0 to {size - 1}, or a slice")
    return range(index % size, index % size + 1)
