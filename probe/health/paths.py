"""What is left of the differences between tokens after several layers of attention alone: products of patterns along paths of heads.

Letters: B samples, H query heads, N tokens, L sites one after another, R paths, W columns of a block.

    with probe.capture(Keep()) as seen:
        model(**inputs)
    measure_paths(seen).residual  # [R, L]

Without skips and MLPs a stack of attention is a sum over paths, one head h_l of each layer, of M = P_{h_l} … P_{h_1}, up to what values
do to features. How fast ΠM, Π = I - 11ᵀ/N, falls beside M is how fast a path makes all tokens alike. Source: Dong et al. 2021, section 2.

Up to some number of tokens M itself is formed. Beyond it, patterns are read three times by panels of rows, forwards on a random block,
backwards on its span and forwards again (Halko et al. 2011, algorithm 4.4), so that nothing of size N × N is held; numbers then come from
the W largest singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.probe.call import AttentionSite
from headscope.probe.capture import Capture, matches
from headscope.probe.health.measures import Plain, plain
from headscope.probe.health.rows import Rows, panels_of, rows_of
from headscope.probe.record import Record

Path = tuple[int | None, ...]  # a head of each site; None for the mean of its heads
_FIELDS = ("residual", "contrast", "effective_rank", "rank", "contraction")
_TAIL = 0.01  # of the sum of singular values that may be missing where an effective rank is given


@dataclass(frozen=True, eq=False)
class PathMeasures:
    """Products of patterns; every number [R, L] in float64, after 1 to L sites, a mean over samples, NaN where undefined.

    Attributes:
        sites: those of the path, in execution order.
        paths: a head of each site; None for the mean of its heads.
        samples, tokens: how many, and how many tokens they count in all.
        threshold: of `rank`.
        exact: the products were formed. Else `residual` is good to some percent, `contrast` and the ranks come from a block and are close
            lower bounds, and ranks that the block does not hold are undefined.
        residual: ‖ΠM‖_F / ‖M‖_F, 0 where all rows are equal. Below 1e-15 it is rounding.
        contrast: ‖ΠM‖₂, above 1 where a difference of tokens grows.
        effective_rank: exp of the entropy of σ / Σσ of M.
        rank: how many σ are larger than `threshold` σ₁.
        contraction: largest diagonal entry of M but for the first token: its second largest eigenvalue (causal only).
        undefined: field -> why it is NaN.
    """

    sites: tuple[AttentionSite, ...]
    paths: tuple[Path, ...]
    samples: int
    tokens: int
    threshold: float
    exact: bool
    residual: Tensor
    contrast: Tensor
    effective_rank: Tensor
    rank: Tensor
    contraction: Tensor
    undefined: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON; None where undefined."""
        found: dict[str, object] = {
            "sites": [site.name for site in self.sites], "paths": [list(path) for path in self.paths], "samples": self.samples,
            "tokens": self.tokens, "threshold": self.threshold, "exact": self.exact,
        }  # fmt: skip
        found |= {name: [[plain(one) for one in row] for row in getattr(self, name).tolist()] for name in _FIELDS}
        return found | {"undefined": dict(self.undefined)}

    def rows(self) -> list[dict[str, Plain]]:
        """One line of a table for each path and depth."""
        values = {name: getattr(self, name).tolist() for name in _FIELDS}
        found: list[dict[str, Plain]] = []
        for number, path in enumerate(self.paths):
            for depth in range(len(self.sites)):
                place: dict[str, Plain] = {"path": number, "heads": spoken(path[: depth + 1]), "depth": depth + 1}
                found.append(place | {name: plain(value[number][depth]) for name, value in values.items()})
        return found


def spoken(path: Path) -> str:
    """`3.0.mean`: the head of each site."""
    return ".".join("mean" if head is None else str(head) for head in path)


@torch.no_grad()
def measure_paths(
    capture: Capture,
    *,
    heads: Sequence[Sequence[int]] = (),
    random: int = 8,
    sites: Sequence[str] | None = None,
    step: int | None = None,
    tokens: Tensor | None = None,
    threshold: float = 1e-2,
    dense_up_to: int = 512,
    block: int = 64,
    seed: int = 0,
) -> PathMeasures:
    """Follow the mean of all heads, some paths and some random ones through the captured sites.

    Args:
        capture: with `Keep()` or the patterns of every site.
        heads: paths to follow: a head of each site.
        random: how many further paths with a random head at each site.
        sites: names or globs of the sites to pass, by default all that were captured; in execution order either way.
        step: which call of the sites, where they were called several times.
        tokens: bool [B, N], True = counts; the others are left out as queries and as keys.
        threshold: what share of σ₁ a singular value needs to count towards `rank`.
        dense_up_to: the most tokens for which products are formed, in B · R · N² numbers of memory.
        block: W, columns of the block beyond that.
        seed: of the random paths and the block.

    Returns:
        The mean of heads is the first path, then `heads`, then the random ones.

    Raises:
        InputError: a site whose queries and keys are not the same tokens; paths, counts or a threshold that make no sense.
        SelectionError: a site, call or head that was not captured.
        ShapeError: tokens that do not fit.
    """
    if not 0 < threshold < 1 or random < 0 or block < 2:
        raise InputError(f"threshold={threshold}, random={random}, block={block}: give a share between 0 and 1, 0 or more, 2 or more")
    passed, rows = _passed(capture, sites, step)
    batch, _, count, _ = rows[0].shape
    device = rows[0].device
    living = torch.ones(batch, count, dtype=torch.bool) if tokens is None else tokens
    if living.shape != (batch, count) or living.dtype != torch.bool:
        raise ShapeError(f"tokens is {list(living.shape)} of {living.dtype}; give bool [{batch}, {count}], True where a token counts")
    living = living.to(device)
    made = torch.Generator().manual_seed(seed)
    paths = _paths([each.shape[1] for each in rows], heads, random, made)
    work = _Work(rows, paths, living)
    exact = count <= dense_up_to
    raw = work.formed(threshold) if exact else work.sketched(threshold, block, made)
    return _result(raw, work, passed, paths, threshold, exact)


def _passed(capture: Capture, names: Sequence[str] | None, step: int | None) -> tuple[tuple[AttentionSite, ...], list[Rows]]:
    """The sites of the path and their patterns, all over the same tokens."""
    found = tuple(site for site in capture.sites if names is None or any(matches(site, name) for name in names))
    if not found:
        raise SelectionError(f"no captured site matches sites={names}; captured are {', '.join(site.name for site in capture.sites)}")
    rows: list[Rows] = []
    for site in found:
        each = rows_of(_record(capture, site, step))
        batch, heads, queries, keys = each.shape
        if queries != keys or site.kind not in ("self", "joint"):
            raise InputError(
                f"{site.name} ({site.kind}) has {queries} queries and {keys} keys: path products need queries and keys that are the same "
                "tokens at every site; name the self-attention sites with sites="
            )
        if rows and (batch, queries) != (rows[0].shape[0], rows[0].shape[2]):
            raise InputError(
                f"{site.name} has {batch} samples of {queries} tokens and {found[0].name} has {rows[0].shape[0]} of {rows[0].shape[2]}: "
                "a path passes the same tokens everywhere; name the sites that share them with sites="
            )
        if heads != site.query_heads:
            raise SelectionError(f"only {heads} of the {site.query_heads} heads of {site.name} were kept: capture all heads")
        rows.append(each)
    return found, rows


def _record(capture: Capture, site: AttentionSite, step: int | None) -> Record:
    steps = capture.steps(site.name)
    if step is None and len(steps) > 1:
        raise SelectionError(f"{site.name} was called {len(steps)} times: say step={steps[0]} … step={steps[-1]}")
    if step is not None and step not in steps:
        raise SelectionError(f"no step {step} of {site.name}; kept are {steps}")
    record = capture.records[site.name, steps[0] if step is None else step]
    if not (record.has("q") or record.has("pattern")):
        raise SelectionError(f"of {site.name} only {', '.join(record.names())} was kept: capture with Keep() to follow paths")
    return record


def _paths(counts: Sequence[int], chosen: Sequence[Sequence[int]], random: int, made: torch.Generator) -> tuple[Path, ...]:
    paths: list[Path] = [(None,) * len(counts)]
    for path in chosen:
        if len(path) != len(counts):
            raise InputError(f"heads={list(path)}: a path has one head for each of the {len(counts)} sites")
        for head, count in zip(path, counts, strict=True):
            if not 0 <= head < count:
                raise SelectionError(f"no head {head}: this site has {count} heads, 0 to {count - 1}")
        paths.append(tuple(path))
    paths.extend(tuple(int(torch.randint(count, (), generator=made)) for count in counts) for _ in range(random))
    return tuple(paths)


class _Work:
    """The patterns of the sites, and what all paths do to a block of columns."""

    def __init__(self, rows: Sequence[Rows], paths: Sequence[Path], living: Tensor) -> None:
        self.rows, self.paths, self.living = rows, paths, living
        self.causal = True
        self.shape = (len(rows), len(paths), living.shape[0])  # L, R, B

    def applied(self, depth: int, x: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """P x (or Pᵀ x) at every path, x [B, R, N, W], and the diagonal of P, [B, R, N]."""
        rows = self.rows[depth]
        chosen = [path[depth] for path in self.paths]
        result, diagonal = torch.zeros_like(x), x.new_zeros(x.shape[:3])
        for start, stop in panels_of(rows.shape):
            panel = rows.read(start, stop)
            p = (panel.log.exp() * panel.share[..., None]).masked_fill(~panel.alive[..., None], 0.0)  # [B, H, r, N]
            p = torch.where(self.living[:, None, start:stop, None] & self.living[:, None, None], p, 0.0)  # 0 * NaN is NaN
            if self.causal and bool(p.triu(start + 1).any()):
                self.causal = False
            mean = p.mean(1)
            for number, head in enumerate(chosen):
                own = mean if head is None else p[:, head]  # [B, r, N]
                diagonal[:, number, start:stop] = own.diagonal(start, -2, -1)
                if transposed:
                    result[:, number] += own.mT @ x[:, number, start:stop]
                else:
                    result[:, number, start:stop] = own @ x[:, number]
        return result, diagonal

    def formed(self, threshold: float) -> dict[str, Tensor]:
        """Every number, [L, B, R], from the products themselves."""
        _, paths, batch = self.shape
        count = self.living.shape[1]
        product = torch.eye(count, dtype=torch.float64, device=self.living.device).expand(batch, paths, count, count)
        found = []
        diagonals = torch.ones(batch, paths, count, dtype=torch.float64, device=product.device)
        for depth in range(len(self.rows)):
            product, diagonal = self.applied(depth, product)
            diagonals = diagonals * diagonal
            numbers = _ranks(_singular(product), threshold)
            off = self.centred(product)
            numbers |= {"residual": _norm(off) / _norm(product), "contrast": _largest(off), "contraction": self.second(diagonals)}
            found.append(numbers)
        return {name: torch.stack([numbers[name] for numbers in found]) for name in _FIELDS}

    def sketched(self, threshold: float, block: int, made: torch.Generator) -> dict[str, Tensor]:
        """The same from the span of what the products make of a random block."""
        _, paths, batch = self.shape
        count = self.living.shape[1]
        drawn = torch.randn(batch, paths, count, 2 * block, generator=made, dtype=torch.float64).to(self.living.device)
        x, rest = drawn, drawn[..., block:]  # the first half finds the span, the second probes what it leaves out
        spans, probes, found = [], [], []
        diagonals = torch.ones(x.shape[:3], dtype=torch.float64, device=x.device)
        for depth in range(len(self.rows)):
            x, diagonal = self.applied(depth, x)
            diagonals = diagonals * diagonal
            spans.append(torch.linalg.qr(x[..., :block].nan_to_num()).Q)
            probes.append(x[..., block:])
            found.append({"contraction": self.second(diagonals)})
        blocks = x[..., :0]
        for depth in reversed(range(len(self.rows))):  # P_1ᵀ … P_lᵀ Q_l of all depths l at once
            blocks, _ = self.applied(depth, torch.cat([spans[depth], blocks], dim=-1), transposed=True)
        spans = [torch.linalg.qr(part.nan_to_num()).Q for part in blocks.tensor_split(len(spans), dim=-1)]  # V
        blocks = torch.cat(spans, dim=-1)
        for depth, numbers in enumerate(found):  # and forwards again: M ≈ (M V) Vᵀ
            blocks, _ = self.applied(depth, blocks)
            product, blocks = blocks.tensor_split([spans[depth].shape[-1]], dim=-1)
            left = probes[depth] - product @ (spans[depth].mT @ rest)  # (M - M V Vᵀ) G, whose squares are W times those without G
            sigma, off = _singular(product), self.centred(product)
            numbers |= _ranks(sigma, threshold) | {"contrast": _largest(off)}
            squares = [_norm(big).square() + _norm(small).square() / block for big, small in ((off, self.centred(left)), (product, left))]
            numbers["residual"] = (squares[0] / squares[1]).sqrt()
            last, missing = sigma[..., -1], self.living.sum(1)[:, None] - sigma.shape[-1]
            numbers["rank"][(last > threshold / 2 * sigma[..., 0]) & (missing > 0)] = torch.nan
            numbers["effective_rank"][last * missing > _TAIL * sigma.sum(-1)] = torch.nan
        return {name: torch.stack([numbers[name] for numbers in found]) for name in _FIELDS}

    def centred(self, x: Tensor) -> Tensor:
        """Π x over the tokens that count, x [B, R, N, W]; 0 at the others."""
        counted = self.living[:, None, :, None]
        mean = x.masked_fill(~counted, 0.0).sum(2, keepdim=True) / counted.sum(2, keepdim=True)
        return (x - mean).masked_fill(~counted, 0.0)

    def second(self, diagonals: Tensor) -> Tensor:
        """[B, R], the largest but for that of the first token."""
        first = (self.living.cumsum(1) == 1) & self.living
        return diagonals.masked_fill((first | ~self.living)[:, None], -torch.inf).amax(-1)


def _singular(x: Tensor) -> Tensor:
    """[B, R, min(N, W)], largest first; NaN where x [B, R, N, W] is not finite."""
    bad = ~x.isfinite().all(dim=-1).all(dim=-1)
    found: Tensor = torch.linalg.svdvals(x.masked_fill(bad[..., None, None], 0.0))
    return found.masked_fill(bad[..., None], torch.nan)


def _ranks(sigma: Tensor, threshold: float) -> dict[str, Tensor]:
    """Both ranks, [B, R]; NaN where nothing is left of M."""
    first = sigma[..., :1]
    share = sigma / sigma.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    rank = (sigma > threshold * first).sum(-1).double().masked_fill(~(first[..., 0] > 0), torch.nan)
    return {"effective_rank": entropy.exp(), "rank": rank}


def _norm(x: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return found


def _largest(x: Tensor) -> Tensor:
    """[B, R], the largest singular value; by the Gram matrix, which costs the small ones their digits but not this one."""
    gram = x.mT @ x
    bad = ~gram.isfinite().all(dim=-1).all(dim=-1)
    values: Tensor = torch.linalg.eigvalsh(gram.masked_fill(bad[..., None, None], 0.0))
    return values[..., -1].clamp_min(0.0).sqrt().masked_fill(bad, torch.nan)


def _result(
    raw: dict[str, Tensor], work: _Work, sites: tuple[AttentionSite, ...], paths: tuple[Path, ...], threshold: float, exact: bool
) -> PathMeasures:
    """Means over the samples that have two tokens and more, and why what is NaN is so."""
    sizes = work.living.sum(1)
    usable = (sizes > 1).nonzero()[:, 0]
    undefined: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    for name in _FIELDS:
        values = raw[name][:, usable]  # [L, B, R]
        found[name] = values.mean(1).T.cpu() if len(usable) else torch.full((len(paths), len(sites)), torch.nan, dtype=torch.float64)
        if name == "contraction" and not work.causal:
            found[name] = torch.full_like(found[name], torch.nan)
            undefined[name] = "the patterns are not causal"
        elif not len(usable):
            undefined[name] = "one token: there is nothing to compare"
        elif bool(found[name].isnan().any()):
            held = exact or name not in ("rank", "effective_rank") or bool(found["residual"].isnan().any())
            undefined[name] = "a pattern holds NaN or nothing but zeros" if held else "more singular values matter than the block holds"
    return PathMeasures(sites, paths, len(usable), int(sizes[usable].sum()), threshold, exact, undefined=undefined, **found)
