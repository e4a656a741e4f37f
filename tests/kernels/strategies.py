"""Random attentions for Hypothesis: any shape, dtype, structure and memory layout that a call may come with.

Hypothesis draws what shapes a call; the numbers come from a seed it draws, so that a failure shrinks to few features, not to few digits.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADS = ((1, 1), (2, 2), (2, 1), (3, 1), (4, 2), (6, 2), (6, 3))
EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70)  # where blocks of the kernels begin and end
WIDTHS = (1, 3, 5, 8, 16, 20, 33, 64)


@dataclass(frozen=True)
class Limits:
    """What an implementation can do, and how large a call may be.

    Attributes:
        dtypes: of q, k and v.
        size: most queries and keys.
        top: whether it finds top keys.
    """

    dtypes: tuple[torch.dtype, ...] = DTYPES
    size: int = 70
    top: bool = True


@dataclass
class Call:
    """One call of `attention`.

    Attributes:
        q, k, v: [B, H, Q, D], [B, G, K, D], [B, G, K, V].
        structure: what the twin and the kernels both take: scale, causal, bias, …
        rows, top, pooled: what is asked for.
        exact: every score is a small multiple of a power of two, so that ties are ties in any arithmetic.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    structure: dict[str, Any] = field(default_factory=dict)
    rows: list[int] | None = None
    top: int = 0
    pooled: int | None = None
    exact: bool = False

    @property
    def wanted(self) -> dict[str, Any]:
        return {"rows": self.rows, "top": self.top, "pooled": self.pooled}

    def __repr__(self) -> str:
        def shown(value: object) -> object:
            return f"{list(value.shape)} of {value.dtype}, strides {value.stride()}" if isinstance(value, Tensor) else value

        parts = {"q": self.q, "k": self.k, "v": self.v, **self.structure, **self.wanted, "exact": self.exact}
        return "Call(" + ", ".join(f"{name}={shown(value)}" for name, value in parts.items()) + ")"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis would write out every number


@st.composite
def calls(draw: st.DrawFn, limits: Limits) -> Call:
    """Any call within the limits, with any mixture of features."""
    dtype = draw(st.sampled_from(limits.dtypes))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    exact = draw(st.booleans())
    size = st.sampled_from([*range(limits.size, 2, -3), *(edge for edge in EDGES if edge <= limits.size)])
    heads, groups = draw(st.sampled_from(HEADS))
    queries, keys = draw(size), draw(size)
    width, value_width = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
    structure = draw(structures(queries, keys))
    batch = 1 if "lengths" in structure else draw(st.sampled_from((1, 2, 1, 2, 1, 2, 0)))
    amplitude = draw(st.sampled_from((1, 8, 60)))

    def numbers(*shape: int) -> Tensor:
        if exact:
            return torch.randint(-2, 3, shape, generator=random).double()
        return torch.randn(shape, generator=random, dtype=torch.float64)

    q = numbers(batch, heads, queries, width) * (1 if exact else amplitude)
    k = numbers(batch, groups, keys, width)
    if draw(st.booleans()) and keys:
        k = k[:, :, torch.arange(keys) % draw(st.integers(1, keys))]  # repeated keys: ties
    v = torch.randn(batch, groups, keys, value_width, generator=random, dtype=torch.float64)
    q, k, v = (draw(layouts())(tensor.to(dtype)) for tensor in (q, k, v))

    def maybe(name: str, make: Callable[[], Any]) -> None:
        if draw(st.booleans()):
            structure[name] = make()

    def broadcast(*shape: int) -> list[int]:
        return [size if draw(st.booleans()) else 1 for size in shape]

    def additive(*shape: int) -> Tensor:
        """A bias in some dtype and layout, some of it -inf; only 0 and -inf where ties must stay ties."""
        values = torch.zeros(shape, dtype=torch.float64) if exact else torch.randn(shape, generator=random, dtype=torch.float64) * 3
        values[torch.rand(shape, generator=random) < draw(st.sampled_from((0.0, 0.1, 0.5, 0.3, 0.0, 1.0)))] = -torch.inf
        return draw(strides())(values.to(draw(st.sampled_from((dtype, torch.float32)))))

    def mask() -> Tensor:
        shape = broadcast(batch, heads, queries, keys)
        allowed = torch.rand(shape, generator=random) >= draw(st.sampled_from((0.1, 0.5, 0.9)))
        if draw(st.booleans()):
            allowed[:, :, ::3] = False  # whole rows
        allowed = allowed[(0,) * draw(st.integers(0, 2))] if batch and allowed.shape[:2] == (1, 1) else allowed
        return draw(strides())(allowed)

    maybe("scale", lambda: draw(st.sampled_from((0.25, 0.5, 1.0) if exact else (0.0, 0.07, -0.5))))
    if exact and "scale" not in structure:
        structure["scale"] = 0.125
    maybe("bias", lambda: additive(*broadcast(batch, heads, queries, keys)))
    maybe("mask", mask)
    maybe("key_bias", lambda: additive(*([batch, heads, keys] if draw(st.booleans()) else [keys])))
    maybe("temperature", lambda: torch.tensor([0.5, 1.0, 2.0] * 2)[:heads] if exact else torch.rand(heads, generator=random) + 0.5)
    maybe("gate", lambda: torch.randn(heads, generator=random))
    maybe("sink", lambda: torch.randn(heads, generator=random) * draw(st.sampled_from((1, 20))))
    maybe("features", lambda: features(draw, batch, heads, keys, random))
    if not exact:
        maybe("softcap", lambda: draw(st.sampled_from((2.0, 30.0))))
    rows = None
    if draw(st.booleans()):
        rows = draw(st.lists(st.integers(0, queries - 1), max_size=3)) if queries else []
    return Call(
        q,
        k,
        None if draw(st.integers(0, 5)) == 5 else v,
        structure,
        rows=rows,
        top=draw(st.sampled_from((0, 1, 3, 8))) if limits.top else 0,
        pooled=draw(st.sampled_from((None, 1, 7, 16, 64))),
        exact=exact,
    )


def features(draw: st.DrawFn, batch: int, heads: int, keys: int, random: torch.Generator) -> Tensor:
    count = draw(st.sampled_from((1, 3, 16, 17)))
    shape = draw(st.sampled_from(((batch, heads, keys, count), (1, heads, keys, count), (heads, keys, count), (keys, count))))
    return draw(strides())(torch.randn(shape, generator=random))


@st.composite
def structures(draw: st.DrawFn, queries: int, keys: int) -> dict[str, Any]:
    """Causality, offset, window and packing, in any mixture."""
    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found["causal"] = True
    if draw(st.integers(0, 3)) == 0:
        found["window"] = draw(st.integers(1, max(1, keys) + 2))
    if draw(st.integers(0, 3)) == 0:
        found["offset"] = draw(st.integers(-queries - 1, keys + 1))
    if draw(st.integers(0, 3)) == 0:
        count = draw(st.integers(1, 4))
        found["lengths"] = draw(pieces(queries, count))
        if queries != keys or draw(st.booleans()):
            found["key_lengths"] = draw(pieces(keys, count))
    return found


@st.composite
def pieces(draw: st.DrawFn, total: int, count: int) -> list[int]:
    """Lengths of `count` pieces that add up to `total`; some may be 0."""
    ends = sorted(draw(st.lists(st.integers(0, total), min_size=count - 1, max_size=count - 1)))
    return [stop - start for start, stop in zip([0, *ends], [*ends, total], strict=True)]


def layouts() -> st.SearchStrategy[Callable[[Tensor], Tensor]]:
    """Ways in which [B, H, N, D] may lie in memory, with the same numbers: as a projection leaves it, sliced, back to front, expanded."""
    return st.sampled_from((Tensor.contiguous, tokens_first, every_second, width_first, shared_batch))


def strides() -> st.SearchStrategy[Callable[[Tensor], Tensor]]:
    """Ways in which a mask or bias may lie in memory, with the same numbers."""
    return st.sampled_from((Tensor.contiguous, every_second, last_axis_slowest))


def tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def width_first(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def every_second(x: Tensor) -> Tensor:
    wide = (
        torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        if x.is_floating_point()
        else torch.ones(*x.shape[:-1], 2 * x.shape[-1] + 1)
    )
    wide = wide.to(x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def last_axis_slowest(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def shared_batch(x: Tensor) -> Tensor:
    """All batch entries are the first one, and lie in one place."""
    return x[:1].expand(x.shape) if x.shape[0] else x
