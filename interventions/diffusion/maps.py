"""Where in a picture or video a word is looked for: DAAM's read-out (arXiv 2210.04885), for cross and joint attention.

Letters: B samples, H heads, Q queries, K keys, W words, F frames, Y rows, X columns of image tokens.

    with watch_maps(model, {"ship": 3}, grid=(16, 16)) as watched:
        pipeline(...)
    watched.maps(size=(128, 128)).plot()

For each head the pattern from image queries to the word's keys is averaged over steps; each of these maps is enlarged (bicubic), cut off
at 0, and their mean over heads and sites is the word's map, as in DAAM but for a constant. What is kept while a model runs is
[B, H, W, F·Y·X] a site, however many steps there are. A map says where the word was looked at, not what came of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from headscope.interventions.positions import Span
from headscope.interventions.roles import Roles
from headscope.interventions.select import Selector, select
from headscope.kernels.errors import HeadscopeError, InputError, SelectionError, ShapeError
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.capture import Capture
from headscope.probe.interception import intercept
from headscope.probe.record import Terms

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

Words = Mapping[str, int | Sequence[int]] | Sequence[int]
MOST_CELLS = 1 << 26  # of a pattern made at once; a larger one is made head by head


@dataclass(frozen=True, eq=False)
class TokenMaps:
    """One map a word.

    Attributes:
        names: the W words.
        maps: [B, W, Y, X], or [B, W, F, Y, X] of a video.
        share: [B, W], the mean share of an image token's attention that the word gets, before enlarging.
        sites: where it was read.
        calls: how many calls were read.
    """

    names: tuple[str, ...]
    maps: Tensor
    share: Tensor
    sites: tuple[str, ...]
    calls: int

    def of(self, name: str) -> Tensor:
        """The map of one word, [B, Y, X] or [B, F, Y, X].

        Raises:
            SelectionError: it was not asked for.
        """
        if name not in self.names:
            raise SelectionError(f"no map of {name!r}: there are {', '.join(self.names)}")
        return self.maps[:, self.names.index(name)]

    def to_dict(self) -> dict[str, object]:
        return {
            "names": list(self.names),
            "maps": self.maps.tolist(),
            "share": self.share.tolist(),
            "sites": list(self.sites),
            "calls": self.calls,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line a cell: sample, word, frame, row, column, value; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        maps = self.maps if self.maps.ndim == 5 else self.maps[:, :, None]
        places = torch.cartesian_prod(*(torch.arange(side) for side in maps.shape)).tolist()
        rows = [
            {"sample": sample, "word": self.names[word], "frame": frame, "row": row, "column": column, "value": value}
            for (sample, word, frame, row, column), value in zip(places, maps.flatten().tolist(), strict=True)
        ]
        return pandas.DataFrame(rows)

    def plot(self, pictures: Tensor | None = None, sample: int = 0) -> Figure:
        """A heat map for each word (row) and frame (column), each with a scale of its own, over the picture if one is given. Needs plotly.

        Args:
            pictures: [B, Y', X'] or [B, F, Y', X'] in shades of grey, of any size.
            sample: which of B.

        Raises:
            HeadscopeError: plotly is not installed.
            ShapeError: pictures with another number of frames.
        """
        try:
            from plotly.subplots import make_subplots
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]'") from error
        maps = self.maps[sample] if self.maps.ndim == 5 else self.maps[sample][:, None]  # [W, F, Y, X]
        shown = None if pictures is None else pictures[sample] if pictures.ndim == 4 else pictures[sample][None]
        frames, rows, columns = maps.shape[1:]
        if shown is not None and shown.shape[0] != frames:
            raise ShapeError(f"the pictures have {shown.shape[0]} frames and the maps {frames}: give one each")
        titles = [name if frames == 1 else f"{name}, frame {frame}" for name in self.names for frame in range(frames)]
        figure: Figure = make_subplots(rows=len(self.names), cols=frames, subplot_titles=titles)
        for word in range(len(self.names)):
            for frame in range(frames):
                where = {"row": word + 1, "col": frame + 1}
                if shown is not None:
                    high, wide = shown.shape[1:]
                    figure.add_heatmap(
                        z=shown[frame].tolist(), x0=0.5 / wide, dx=1 / wide, y0=0.5 / high, dy=1 / high, colorscale="Greys",
                        showscale=False, hoverinfo="skip", **where,
                    )  # fmt: skip
                figure.add_heatmap(
                    z=maps[word, frame].tolist(), x0=0.5 / columns, dx=1 / columns, y0=0.5 / rows, dy=1 / rows, colorscale="Viridis",
                    opacity=1.0 if shown is None else 0.6, showscale=False, hovertemplate="%{z:.4g}<extra></extra>", **where,
                )  # fmt: skip
        figure.update_yaxes(range=[1, 0], showticklabels=False, constrain="domain")
        figure.update_xaxes(range=[0, 1], showticklabels=False, constrain="domain")
        return figure

    def __str__(self) -> str:
        size = "×".join(map(str, self.maps.shape[2:]))
        shares = ", ".join(f"{name} {float(value):.1%}" for name, value in zip(self.names, self.share.mean(0), strict=True))
        return f"maps of {size} from {self.calls} calls of {len(self.sites)} sites; share of attention: {shares}"


class MapReader:
    """A handler that adds up maps while a model runs; `maps()` says what it has so far."""

    changes = False

    def __init__(
        self, words: Words, *, grid: Sequence[int], offset: int = 0, where: Selector | None = None, roles: Roles | None = None
    ) -> None:
        """The arguments are those of `watch_maps`."""
        self.words = _listed(words)
        self.grid = tuple(grid)
        if len(self.grid) not in (2, 3) or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in self.grid):
            raise InputError(f"grid={grid!r}: give (rows, columns) or (frames, rows, columns) of image tokens, each at least 1")
        self.offset, self.where = offset, where if where is not None else select()
        if self.where.queries is not None or self.where.keys is not None:
            raise InputError("where= with queries or keys: the words are the keys, and the grid says which queries")
        if self.where.kv_groups is not None or self.where.phase is not None:
            raise InputError("where= with kv_groups or phase: choose maps by sites, layers, heads, steps, timesteps, samples, branch")
        self.roles = roles
        if roles is not None and not {"text", "image"} <= roles.keys():
            raise InputError(f"roles={sorted(roles)}: they must name text and image; find_roles(model, inputs, ...) finds both")
        self._any_kind = where is not None and (where.sites is not None or where.kind is not None)
        self._sums: dict[str, Tensor] = {}  # [B, H, W, cells]
        self._grids: dict[str, tuple[int, ...]] = {}
        self._calls: dict[str, int] = {}

    def stages(self, site: AttentionSite) -> frozenset[str]:
        """None: it changes nothing."""
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def reads(self, site: AttentionSite) -> frozenset[str]:
        """The pattern, where the model's code forms it anyway."""
        return frozenset({"pattern"}) if self._wants(site) else frozenset()

    def see(self, call: AttentionCall) -> None:
        """Add the maps of a finished call."""
        if call.recomputed or not self._wants(call.site):
            return
        if self.where.takes_step(call.step) and self.where.takes_time(call.timestep):
            with torch.no_grad():
                self._add_call(call)

    def add(self, site: AttentionSite, step: int, pattern: Tensor) -> None:
        """Add the maps of one call from its pattern, [B, H, Q, K].

        Raises:
            InputError: timesteps are selected, which a pattern does not tell.
        """
        if self.where.timesteps is not None:
            raise InputError("timesteps= of a capture: it does not keep them; select by steps=, or use watch_maps while the model runs")
        if self._wants(site) and self.where.takes_step(step):
            queries, grid, keys = self._places(site, pattern.shape[2], pattern.shape[3])
            self._put(site, grid, self._cut(pattern.detach(), queries, keys))

    def maps(self, size: Sequence[int] | None = None) -> TokenMaps:
        """The maps so far.

        Args:
            size: (rows, columns) to enlarge them to; the grid itself if left out.

        Raises:
            SelectionError: no call was read.
        """
        if not self._sums:
            raise SelectionError(
                "no attention from image to text was seen: run the model inside the block; in a model that joins both streams before "
                "attention give roles=find_roles(...), or name its sites with where=select(sites=...)"
            )
        target = (self.grid[-2], self.grid[-1]) if size is None else (int(size[0]), int(size[1]))
        total: Tensor | None = None
        share: Tensor | None = None
        heads = 0
        for name, sums in self._sums.items():
            mean = sums / self._calls[name]  # [B, H, W, cells]
            grid = self._grids[name]
            flat = mean.reshape(-1, 1, *grid[-2:])
            if tuple(grid[-2:]) != target:
                flat = functional.interpolate(flat, size=target, mode="bicubic", align_corners=False).clamp_min(0)
            large = flat.reshape(*mean.shape[:3], *grid[:-2], *target).sum(1)
            total = large if total is None else total + large
            share = mean.mean(-1).sum(1) if share is None else share + mean.mean(-1).sum(1)
            heads += mean.shape[1]
        assert total is not None
        assert share is not None
        return TokenMaps(tuple(self.words), total / heads, share / heads, tuple(self._sums), sum(self._calls.values()))

    def _wants(self, site: AttentionSite) -> bool:
        if not self.where.matches(site):
            return False
        if self.roles is not None:
            return self._known("text", site, "k") is not None and self._known("image", site, "q") is not None
        return self._any_kind or site.kind in ("cross", "joint")

    def _known(self, role: str, site: AttentionSite, side: str) -> tuple[int, ...] | None:
        """Where a role's tokens are among the queries or keys of a site; None where it has none."""
        assert self.roles is not None
        places = self.roles[role]
        if isinstance(places, Mapping):
            return places.get(f"{site.name}/{side}") or None
        if isinstance(places, slice):
            raise InputError(f"role {role!r} is a slice: give a range or list of positions")
        return tuple(places) or None

    def _places(self, site: AttentionSite, queries: int, keys: int) -> tuple[list[int], tuple[int, ...], list[list[int]]]:
        """The image queries of a call, the grid that they form, and the keys of each word."""
        if self.roles is not None:
            image, text = self._known("image", site, "q"), self._known("text", site, "k")
            assert image is not None
            assert text is not None
            grid = _coarser(self.grid, len(image), site)
            chosen = list(image)
        else:
            text = None
            whole = math.prod(self.grid)
            grid = self.grid if self.offset + whole <= queries else _coarser(self.grid, queries - self.offset, site)
            chosen = list(range(self.offset, self.offset + math.prod(grid)))
        count = keys if text is None else len(text)
        for name, places in self.words.items():
            if not all(-count <= place < count for place in places):
                raise SelectionError(f"word {name!r} at {places}: {site.name} has {count} text tokens, 0 to {count - 1}")
        found = [[(place % count if text is None else text[place]) for place in places] for places in self.words.values()]
        return chosen, grid, found

    def _cut(self, pattern: Tensor, queries: list[int], keys: list[list[int]]) -> Tensor:
        """[B, H, W, cells] of the selected samples and heads: what each word's keys receive together."""
        where = self.where
        if where.heads is not None:
            if where.heads[-1] >= pattern.shape[1]:
                raise SelectionError(f"no head {where.heads[-1]}: this site has {pattern.shape[1]} heads, 0 to {pattern.shape[1] - 1}")
            pattern = pattern[:, list(where.heads)]
        return self._rows(pattern, queries, keys)

    def _rows(self, pattern: Tensor, queries: list[int], keys: list[list[int]]) -> Tensor:
        where = self.where
        if where.branch is not None:
            if len(pattern) % 2:
                raise SelectionError(f"branch={where.branch!r}: a batch of {len(pattern)} has no two halves for guidance")
            half = len(pattern) // 2
            pattern = pattern[half:] if where.branch == "cond" else pattern[:half]
        if where.samples is not None:
            pattern = pattern[list(where.samples)]
        rows = pattern[:, :, queries]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return torch.stack([rows[..., places].sum(-1) for places in keys], dim=2)

    def _add_call(self, call: AttentionCall) -> None:
        if call.site.fold != 1:
            raise SelectionError(
                f"{call.site.name} folds windows or frames into its batch: its queries are no grid, so leave it out with where="
            )
        queries, grid, keys = self._places(call.site, call.queries, call.keys)
        pattern = call.materialised
        if pattern is None and call.replay is not None:
            pattern = call.replay.pattern(call.q, call.k)
        if pattern is not None or call.q.shape[0] * call.q.shape[1] * call.queries * call.keys <= MOST_CELLS:
            found = self._cut(Terms.of(call).pattern() if pattern is None else pattern, queries, keys)
        else:
            chosen = self.where.heads if self.where.heads is not None else range(call.q.shape[1])
            found = torch.cat([self._rows(Terms.of(call, [head]).pattern(), queries, keys) for head in chosen], dim=1)
        self._put(call.site, grid, found)

    def _put(self, site: AttentionSite, grid: tuple[int, ...], found: Tensor) -> None:
        known = self._sums.get(site.name)
        if known is not None and known.shape != found.shape:
            raise ShapeError(
                f"{site.name} gave maps of {list(known.shape)} and now {list(found.shape)}: read runs of one batch and size alone"
            )
        self._sums[site.name] = found if known is None else known + found
        self._grids[site.name] = grid
        self._calls[site.name] = self._calls.get(site.name, 0) + 1


@contextmanager
def watch_maps(
    model: nn.Module, words: Words, *, grid: Sequence[int], offset: int = 0, where: Selector | None = None, roles: Roles | None = None
) -> Iterator[MapReader]:
    """Read maps of words while the block runs; the model's outputs stay as they are.

    Args:
        model: any module.
        words: for each word the positions of its tokens, {"ship": [3, 4]}, or positions alone; counted among the keys, or among the text
            tokens where roles are given.
        grid: (rows, columns) or (frames, rows, columns) of image tokens at the finest site; a coarser one may have half as many a side.
        offset: queries that stand before the image, such as the text of Flux.
        where: which sites, layers, heads, steps, samples; `select(branch="cond")` where the batch is doubled for guidance. All cross and
            joint attention if left out.
        roles: what `find_roles` found for text and image: it says at every site which tokens are which, and offset is not looked at.

    Raises:
        InputError: a grid, words or selection that maps cannot have.
    """
    reader = MapReader(words, grid=grid, offset=offset, where=where, roles=roles)
    with intercept(model, reader):
        yield reader


def token_maps(
    seen: Capture | MapReader, words: Words | None = None, *, grid: Sequence[int] | None = None, size: Sequence[int] | None = None,
    offset: int = 0, where: Selector | None = None, roles: Roles | None = None,
) -> TokenMaps:  # fmt: skip
    """Maps from what was kept of a run, patterns or q and k, or from a reader.

    Args:
        seen: a capture, which needs words and grid too, or a reader, which knows them.
        size: (rows, columns) to enlarge the maps to.
        words, grid, offset, where, roles: as in `watch_maps`; heads are counted among those kept.

    Raises:
        InputError: words or grid are missing.
        SelectionError: nothing kept goes from image to text.
    """
    if isinstance(seen, MapReader):
        return seen.maps(size)
    if words is None or grid is None:
        raise InputError("token_maps(capture): say which words and which grid, such as token_maps(seen, {'ship': 3}, grid=(16, 16))")
    reader = MapReader(words, grid=grid, offset=offset, where=where, roles=roles)
    for (_, step), record in seen.records.items():
        reader.add(record.site, step, record.pattern(None, None))
    return reader.maps(size)


def _listed(words: Words) -> dict[str, tuple[int, ...]]:
    named: Mapping[Any, Any] = words if isinstance(words, Mapping) else {str(place): place for place in words}
    found: dict[str, tuple[int, ...]] = {}
    for name, places in named.items():
        if isinstance(places, (Span, str)):
            raise InputError(f"words[{name!r}]={places!r}: give the positions of its tokens, an int or a list")
        listed = (places,) if isinstance(places, int) else tuple(places)
        if not listed or not all(isinstance(place, int) and not isinstance(place, bool) for place in listed):
            raise InputError(f"words[{name!r}]={places!r}: give the positions of its tokens, an int or a list")
        found[str(name)] = listed
    if not found:
        raise InputError("no words: give their positions, such as {'ship': 3}")
    return found


def _coarser(grid: tuple[int, ...], count: int, site: AttentionSite) -> tuple[int, ...]:
    """The grid itself, or that with 2, 4, 8 … times fewer rows and columns, that holds so many tokens."""
    rows, columns = grid[-2:]
    factor = 1
    while True:
        found = (*grid[:-2], rows // factor, columns // factor)
        if math.prod(found) == count and not rows % factor and not columns % factor:
            return found
        factor *= 2
        if factor > min(rows, columns):
            raise ShapeError(
                f"{site.name} has {count} image queries: neither the grid {'×'.join(map(str, grid))} nor one with half, a quarter … the "
                "rows and columns holds as many; leave the site out with where=, or give offset= or roles="
            )
