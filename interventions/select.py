"""Where an edit applies: sites, layers, heads, positions, steps, samples.

A position is counted from the start of the sequence. With a KV cache a self-attention site receives fewer queries than keys;
its queries are then the last ones, so position p means the same token in prefill and in every decode step, and a position
that this call does not hold is simply not there. (A static cache holds keys for tokens that do not exist yet; there, query
positions cannot be told apart from the outside and only `keys=` and negative `queries=` are meaningful.) Negative positions
count from the end of the call: `queries=-1` is the last query of every call, the new token in a decode step.
"""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import SupportsIndex

import torch
from torch import Tensor

from headscope.interventions.positions import Positions, Role, Span, Stretch, role, span
from headscope.kernels.errors import RecipeError, SelectionError
from headscope.probe.call import AttentionSite

KINDS = ("self", "cross", "joint", "window")
BRANCHES = ("cond", "uncond")
PHASES = ("prefill", "decode")
STREAMS = ("encoder", "decoder")
MOST_INDICES = 1_000_000


Steps = tuple[int, ...] | Stretch
IndicesLike = int | slice | Iterable[SupportsIndex]


@dataclass(frozen=True)
class Selector:
    """A set of conditions that all have to hold; None leaves that one open. Made by `select()`.

    Attributes:
        sites: globs matched against a site's name, with and without `#ordinal`.
        layers, heads, kv_groups: indices from 0; `heads` are query heads.
        queries, keys: positions.
        steps: which call of a site: decode steps, denoising steps.
        samples: rows of the batch, before windows or frames were folded into it.
        kind: `self`, `cross`, `joint` or `window`.
        branch: `cond` or `uncond`, the halves of a batch doubled for classifier-free guidance (uncond first).
        timesteps: the lowest and highest diffusion timestep, both included, in the unit that the model is given.
        phase: `prefill` or `decode`: calls that begin a sequence, or that continue a cached one.
        stream: `encoder` or `decoder`: sites with that name in their path.
    """

    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    kv_groups: tuple[int, ...] | None = None
    queries: Positions | None = None
    keys: Positions | None = None
    steps: Steps | None = None
    samples: tuple[int, ...] | None = None
    kind: str | None = None
    branch: str | None = None
    timesteps: tuple[float, float] | None = None
    phase: str | None = None
    stream: str | None = None

    def matches(self, site: AttentionSite) -> bool:
        """Whether site, layer and kind are among those selected; heads and positions are not looked at."""
        if self.kind is not None and site.kind not in (self.kind, "module"):
            return False
        if self.stream is not None and self.stream not in site.module.split("."):
            return False
        if self.layers is not None and site.layer not in self.layers:
            return False
        if self.sites is None:
            return True
        names = (site.name, site.name.partition("#")[0], site.module)
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.sites for name in names)

    def takes_step(self, step: int) -> bool:
        """Whether the n-th call of a site is selected."""
        if self.steps is None:
            return True
        if isinstance(self.steps, Stretch):
            return step in self.steps.indices(step + 1)
        return step in self.steps

    def surely_meets(self, other: Selector) -> bool:
        """True where both certainly have an entry in common if each has any; False also where only a run can tell."""
        if (self.samples is not None and other.branch is not None) or (self.branch is not None and other.samples is not None):
            return False
        if (self.heads is not None and other.kv_groups is not None) or (self.kv_groups is not None and other.heads is not None):
            return False
        anywhere = any(one.sites is None and one.layers is None for one in (self, other))
        return (
            (anywhere or (self.sites == other.sites and _meet(self.layers, other.layers)))
            and (self.kind is None or other.kind is None or self.kind == other.kind)
            and all(_equal(getattr(self, name), getattr(other, name)) for name in ("branch", "timesteps", "phase", "stream"))
            and _meet(self.heads, other.heads)
            and _meet(self.kv_groups, other.kv_groups)
            and _meet(self.steps, other.steps)
            and _meet(self.samples, other.samples)
            and _meet(self.queries, other.queries)
            and _meet(self.keys, other.keys)
        )

    def counts_positions(self) -> bool:
        """Whether a query or key is named by its absolute position."""
        named = [positions for positions in (self.queries, self.keys) if positions is not None]
        return any(not isinstance(positions, tuple) or positions[-1] >= 0 for positions in named)

    def spans(self) -> tuple[Span, ...]:
        """The text spans that have to be found before the selector can be used."""
        return tuple(positions for positions in (self.queries, self.keys) if isinstance(positions, Span))

    def roles(self) -> tuple[Role, ...]:
        """The roles that have to be known before the selector can be used."""
        return tuple(positions for positions in (self.queries, self.keys) if isinstance(positions, Role))

    def takes_time(self, timestep: Tensor | float | None) -> bool:
        """Whether a call at this diffusion timestep is selected.

        Raises:
            SelectionError: timesteps are selected, but the model was given none, or the samples are at different ones.
        """
        if self.timesteps is None:
            return True
        if timestep is None:
            raise SelectionError("timesteps= selects by the model's input `timestep`, which this forward was not given: use steps=")
        values = torch.as_tensor(timestep).flatten()
        if not bool((values == values[0]).all()):
            raise SelectionError(
                f"timesteps= with samples at different timesteps ({values[:4].tolist()} …): give them the same, or use samples="
            )
        return self.timesteps[0] <= float(values[0]) <= self.timesteps[1]

    def to_dict(self) -> dict[str, object]:
        """The conditions that are set, as plain values: lists, `{start, stop}` for runs, `{slice: [...]}`, `{span: text}`."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _plain(value) for name, value in found.items() if value is not None}

    @classmethod
    def from_dict(cls, conditions: Mapping[str, object]) -> Selector:
        """The selector that `to_dict` wrote.

        Raises:
            RecipeError: an unknown condition, or a value that it cannot take.
        """
        allowed = [field.name for field in fields(cls)]
        for name in conditions:
            if name not in allowed:
                raise RecipeError(f"unknown selector key {name!r}: the keys are {', '.join(allowed)}")
        try:
            return select(**{name: _read(name, value) for name, value in conditions.items()})  # type: ignore[arg-type]
        except SelectionError as error:
            raise RecipeError(str(error)) from error

    def __str__(self) -> str:
        return ", ".join(f"{name} {_spoken(value)}" for name, value in self.to_dict().items()) or "everything"


def select(
    sites: str | Iterable[str] | None = None,
    *,
    layer: int | None = None,
    layers: IndicesLike | None = None,
    head: int | None = None,
    heads: IndicesLike | None = None,
    kv_group: int | None = None,
    kv_groups: IndicesLike | None = None,
    queries: IndicesLike | Span | Role | None = None,
    keys: IndicesLike | Span | Role | None = None,
    steps: IndicesLike | None = None,
    samples: IndicesLike | None = None,
    kind: str | None = None,
    branch: str | None = None,
    timesteps: tuple[float, float] | None = None,
    phase: str | None = None,
    stream: str | None = None,
) -> Selector:
    """The part of a model's attention that an edit or a capture concerns; `select()` is all of it.

    Args:
        sites: a glob or several, such as `"*cross*"` or `"model.layers.3.self_attn"`.
        layer, layers: one index, or a list or range; together with `sites` both must hold.
        head, heads: query heads. At the stages k and v they must cover whole key/value groups.
        kv_group, kv_groups: key/value heads; at q, scores, pattern, z and o all query heads that share them.
        queries, keys: an int, a list, a range, a slice, `span("text")`, `role("image")` or `grid(...)`; negative counts from the end of the
            call.
        steps: which calls of a site, from 0.
        samples: rows of the batch.
        kind: `self`, `cross`, `joint` or `window`.
        branch: `cond` or `uncond` half of a batch doubled for guidance.
        timesteps: (lowest, highest) diffusion timestep, both included, as the model is given it: 0 to 1000 in most, 0 to 1 in some.
        phase: `prefill` or `decode`.
        stream: `encoder` or `decoder` of a model that has both.

    Raises:
        SelectionError: an empty or malformed condition, or two that say the same thing.
    """
    for one, many, first, second in (
        ("layer", "layers", layer, layers),
        ("head", "heads", head, heads),
        ("kv_group", "kv_groups", kv_group, kv_groups),
    ):
        if first is not None and second is not None:
            raise SelectionError(f"{one}={first!r} and {many}={second!r} say the same thing: give one of them")
    if (head is not None or heads is not None) and (kv_group is not None or kv_groups is not None):
        raise SelectionError(
            "heads and kv_groups were both given: a kv group already stands for all query heads that share it, so give one of them"
        )
    if samples is not None and branch is not None:
        raise SelectionError("samples and branch were both given: a branch is a half of the samples, so give one of them")
    _one_of("kind", kind, KINDS)
    _one_of("branch", branch, BRANCHES)
    _one_of("phase", phase, PHASES)
    _one_of("stream", stream, STREAMS)
    return Selector(
        sites=_globs(sites),
        layers=_indices("layers", layer if layers is None else layers),
        heads=_indices("heads", head if heads is None else heads),
        kv_groups=_indices("kv_groups", kv_group if kv_groups is None else kv_groups),
        queries=_positions("queries", queries),
        keys=_positions("keys", keys),
        steps=_steps(steps),
        samples=_indices("samples", samples),
        kind=kind,
        branch=branch,
        timesteps=_range_of_times(timesteps),
        phase=phase,
        stream=stream,
    )


def _globs(sites: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if sites is None:
        return None
    found = (sites,) if isinstance(sites, str) else tuple(sites)
    if not found or not all(isinstance(glob, str) and glob for glob in found):
        raise SelectionError(f"sites={sites!r}: give a site name or glob such as '*cross*', or a list of them")
    return found


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise SelectionError(f"{name}={value!r}: {name} is one of {', '.join(allowed)}")


def _numbers(name: str, value: IndicesLike) -> tuple[int, ...]:
    """Sorted indices without repeats."""
    if isinstance(value, range) and len(value) > MOST_INDICES:
        raise SelectionError(f"{name}={value!r} has {len(value):,} entries: the most is {MOST_INDICES:,}")
    if isinstance(value, (bool, str, bytes, Mapping)):
        raise SelectionError(f"{name}={value!r}: give an int, a list of ints or a range")
    try:
        entries = list(value) if isinstance(value, Iterable) else [value]
        if any(isinstance(entry, bool) for entry in entries):
            raise TypeError
        found = tuple(sorted({operator.index(entry) for entry in entries}))  # type: ignore[arg-type]
    except TypeError:
        raise SelectionError(f"{name}={value!r}: give an int, a list of ints or a range") from None
    if not found:
        raise SelectionError(f"{name}={value!r} selects nothing: leave it out to select all")
    return found


def _indices(name: str, value: IndicesLike | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, slice):
        raise SelectionError(f"{name}={value!r}: slices are for queries, keys and steps; give an int, a list of ints or a range")
    found = _numbers(name, value)
    if found[0] < 0:
        raise SelectionError(f"{name} {found[0]}: {name} are counted from 0; negative numbers are for queries and keys")
    return found


def _range_of_times(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    numbers = [float(end) for end in pair if isinstance(end, (int, float)) and not isinstance(end, bool) and math.isfinite(end)]
    if len(pair) != 2 or len(numbers) != 2 or numbers[0] > numbers[1]:
        raise SelectionError(f"timesteps={value!r}: give the lowest and the highest, such as (500, 1000)")
    return numbers[0], numbers[1]


def _equal(one: object, other: object) -> bool:
    return one is None or other is None or one == other


def _positions(name: str, value: IndicesLike | Span | Role | None) -> Positions | None:
    if value is None or isinstance(value, (Span, Role)):
        return value
    if isinstance(value, slice):
        return _stretch(name, value)
    return _numbers(name, value)


def _steps(value: IndicesLike | None) -> Steps | None:
    if not isinstance(value, slice):
        return _indices("steps", value)
    if any(end is not None and end < 0 for end in (value.start, value.stop, value.step)):
        raise SelectionError(f"steps={value!r}: how many steps there will be is not known, so they are counted from 0")
    return _stretch("steps", value)


def _stretch(name: str, value: slice) -> Stretch:
    ends = (value.start, value.stop, value.step)
    if any(end is not None and (isinstance(end, bool) or not isinstance(end, int)) for end in ends) or value.step == 0:
        raise SelectionError(f"{name}={value!r}: the ends of a slice are ints or left out, and its step is not 0")
    return Stretch(*ends)


def _meet(one: Positions | None, other: Positions | None) -> bool:
    if one is None or other is None or one == other:
        return True
    return isinstance(one, tuple) and isinstance(other, tuple) and not set(one).isdisjoint(other)


def _plain(value: object) -> object:
    if isinstance(value, Span):
        return {"span": value.text}
    if isinstance(value, Role):
        return {"role": value.name}
    if isinstance(value, Stretch):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, tuple):
        if len(value) >= 3 and isinstance(value[0], int) and value[-1] - value[0] == len(value) - 1:
            return {"start": value[0], "stop": value[-1] + 1}
        return list(value)
    return value


def _read(name: str, value: object) -> object:
    """What `_plain` wrote; anything else goes on to `select()`, which says what is wrong with it."""
    if value is None:
        raise RecipeError(f"{name}: null: leave the key out to select all")
    if not isinstance(value, dict):
        return value
    if set(value) == {"span"}:
        return span(value["span"])
    if set(value) == {"role"}:
        return role(value["role"])
    if set(value) == {"slice"} and isinstance(value["slice"], list) and len(value["slice"]) == 3:
        return slice(*value["slice"])
    if set(value) == {"start", "stop"} and all(isinstance(end, int) and not isinstance(end, bool) for end in value.values()):
        return range(value["start"], value["stop"])
    raise RecipeError(
        f"{name}: {value!r}: a mapping here is {{start: 4, stop: 8}}, {{slice: [start, stop, step]}}, {{span: text}} or {{role: name}}"
    )


def _spoken(value: object) -> str:
    if isinstance(value, dict):
        if "span" in value:
            return repr(value["span"])
        if "role" in value:
            return f"role {value['role']}"
        if "slice" in value:
            return ":".join("" if end is None else str(end) for end in value["slice"])
        return f"{value['start']} to {value['stop'] - 1}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
