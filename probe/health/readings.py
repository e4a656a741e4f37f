"""What is read off a call before anything is averaged: numbers of rows and of keys.

Letters: S samples, H query heads, G key/value heads, n rows that count, m keys, P rows of one panel, D width of a query or key.

P is the pattern over the real keys: its rows sum to 1 also where a sink or another normaliser takes a share of them. Two ways lead to the
same numbers. Where the real tokens see one another in a simple way (`headscope.probe.health.visibility.View`), everything comes from a few
calls of an attention that keeps statistics, in O(n + m) memory: this file. Else `headscope.probe.health.panel_readings` works off the
rows in panels, as scores made again from queries and keys, or as the pattern that the model's own code has formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from headscope.kernels import identities, reference
from headscope.kernels.attention import attention
from headscope.kernels.lse_attention import ours
from headscope.kernels.problem import make_problem
from headscope.kernels.spectrum import Spectrum, bracket
from headscope.probe.call import AttentionCall
from headscope.probe.health.visibility import Terms, View, same_tokens

_CHUNK = 64  # rows of which the causal variance looks at one another directly


@dataclass(frozen=True, eq=False)
class Readings:
    """Of some samples of one call that count the same rows; float64 but for counts.

    Attributes:
        samples: which.
        rows: [n], positions of the rows that count.
        keys: [m], positions of the keys below.
        alive: [S or 1, H or 1, n], the row sees a key.
        visible: [S or 1, H or 1, n], how many.
        entropy, p_max, squares, max_score, variance: [S, H, n]; the last two are NaN where scores are not known.
        own, previous: [S, H, n], P_ii and P_i,i-1; NaN where there is no such key, or it may not be seen.
        distance: [S, H], mean Σ_j P_ij |i - j|; NaN where positions mean nothing.
        received: [S, H, m], c_j = Σ_i P_ij.
        seen_by: [S or 1, H or 1, m], by how many rows.
        directions: [S, H, m], Σ_i P_ij / ‖P_i‖.
        beyond: [S, H, n], what of a row went to columns that are no keys; None where there are none.
        causal: no row sees a key after its own position.
        square: rows and keys are the same tokens.
        spectrum: bounds of singular values.
    """

    samples: tuple[int, ...]
    rows: Tensor
    keys: Tensor
    alive: Tensor
    visible: Tensor
    entropy: Tensor
    p_max: Tensor
    squares: Tensor
    max_score: Tensor
    variance: Tensor
    own: Tensor
    previous: Tensor
    distance: Tensor
    received: Tensor
    seen_by: Tensor
    directions: Tensor
    beyond: Tensor | None
    causal: bool
    square: bool
    spectrum: Spectrum


def read_view(call: AttentionCall, view: View, terms: Terms, steps: int, seed: int) -> Readings:
    """The readings of samples whose visibility is simple, streamed."""
    keys, rows = view.keys, view.rows
    asked = keys if view.causal else rows  # causal calls are square: rows that do not count are hidden in them
    samples = torch.tensor(view.samples, device=call.q.device)
    q, k = _taken(call.q, samples, asked), _taken(call.k, samples, keys)  # [S, H, ., D], [S, G, m, D]
    bias = _key_bias(terms, view, call.keys)
    place = torch.searchsorted(asked, rows)  # of the rows in q
    hidden = None
    if len(asked) > len(rows):
        hidden = torch.zeros(1, 1, len(asked), 1, dtype=torch.bool, device=q.device)
        hidden[0, 0, place] = True
    names = ("lse", "entropy", "p_max", "max_score", "sum_squares", "received")
    _, found = attention(q, k, None, keep=names, scale=call.scale, causal=view.causal, mask=hidden, key_bias=bias)
    problem = make_problem(q, k, None, scale=call.scale, causal=view.causal, mask=hidden, key_bias=bias)
    lse, squares, received = _there(found.lse), _there(found.sum_squares), _there(found.received)
    kernel = ours()

    def back(u: Tensor) -> Tensor:
        return identities.apply_transposed(kernel, problem, _spread(u, place, len(asked)), lse=lse)

    def forth(x: Tensor) -> Tensor:
        return identities.apply(kernel, problem, x)[:, :, place]

    lse_of_rows, squares = lse[:, :, place].double(), squares[:, :, place].double()
    position, stand = _positions(call, view), None
    if position is not None:
        stand = _Stripes(q[:, :, place], k, call.scale, bias, lse_of_rows, position, keys)
    alone = torch.ones(1, 1, len(rows), dtype=torch.bool, device=q.device)
    visible = torch.searchsorted(keys, rows, right=True) if view.causal else torch.full_like(rows, len(keys))
    seen_by = len(rows) - torch.searchsorted(rows, keys) if view.causal else torch.full_like(keys, len(rows))
    causal = view.causal or (position is not None and len(rows) == 1 and bool(keys[-1] <= position[0]))
    return Readings(
        samples=view.samples,
        rows=rows,
        keys=keys,
        alive=alone,
        visible=visible[None, None],
        entropy=_there(found.entropy)[:, :, place].double(),
        p_max=_there(found.p_max)[:, :, place].double(),
        squares=squares,
        max_score=_there(found.max_score)[:, :, place].double(),
        variance=_variance(q, k, call.scale, bias, view.causal)[:, :, place],
        own=undefined_like(lse_of_rows) if stand is None else stand.at(0, causal),
        previous=undefined_like(lse_of_rows) if stand is None else stand.at(1, causal),
        distance=_distance(q, k, call.scale, bias, place, lse_of_rows, received, position, keys, causal),
        received=received.double(),
        seen_by=seen_by[None, None],
        directions=back(squares.rsqrt()[..., None])[..., 0].double(),
        beyond=None if call.sink is None else torch.sigmoid(call.sink.double()[:, None] - lse_of_rows),
        causal=causal,
        square=same_tokens(call),
        spectrum=bracket(forth, back, received, squares.sum(dim=-1), len(rows), steps, seed=seed),
    )


def _taken(x: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """x [B, H, N, D] of some samples and positions, without gradients; x itself where that is all of it."""
    x = x.detach()
    x = x if len(samples) == x.shape[0] else x[samples]
    return x if len(positions) == x.shape[2] else x[:, :, positions]


def _key_bias(terms: Terms, view: View, count: int) -> Tensor | None:
    """[S or 1, H or 1, m]."""
    if terms.key_bias is None:
        return None
    bias = terms.key_bias.detach().expand(*terms.key_bias.shape[:2], count)[..., view.keys]
    return bias if bias.shape[0] == 1 else bias[list(view.samples)]


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def undefined_like(like: Tensor) -> Tensor:
    """NaN of the same shape, float64."""
    return torch.full_like(like, torch.nan, dtype=torch.float64)


def _spread(u: Tensor, place: Tensor, count: int) -> Tensor:
    """u [S, H, n, F] of the rows that count, among all [S, H, count, F]; 0 elsewhere."""
    if u.shape[2] == count:
        return u
    full = u.new_zeros(*u.shape[:2], count, u.shape[3])
    full[:, :, place] = u
    return full


def _positions(call: AttentionCall, view: View) -> Tensor | None:
    """[n], at which key each row stands; None where queries and keys are not the same tokens."""
    if same_tokens(call) or (call.is_causal and call.site.kind != "cross"):
        return view.rows
    if call.queries == 1 and call.site.kind != "cross" and len(view.rows) == 1 and len(view.keys):
        return view.keys[-1:]  # one step of decoding behind a cache
    return None


@dataclass(frozen=True, eq=False)
class _Stripes:
    """Probabilities at a fixed distance: exp(s_ij - lse_i), with nothing else computed."""

    q: Tensor  # [S, H, n, D]
    k: Tensor  # [S, G, m, D]
    scale: float
    bias: Tensor | None
    lse: Tensor  # [S, H, n]
    position: Tensor  # [n]
    keys: Tensor  # [m]

    def at(self, back: int, causal: bool) -> Tensor:
        """[S, H, n], the probability of the key so far before; NaN where it is not there, or, for the row before, where it comes first."""
        wanted = self.position - back
        place = torch.searchsorted(self.keys, wanted).clamp_max(len(self.keys) - 1)
        there = self.keys[place] == wanted
        k = reference.repeat_heads(self.k[:, :, place], self.q.shape[1])  # [S, H, n, D]
        scores = (self.q.double() * k.double()).sum(dim=-1) * self.scale
        if self.bias is not None:
            scores = scores + self.bias[..., place].double()
        return (scores - self.lse).exp().masked_fill(~there, torch.nan)


def _distance(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None, place: Tensor, lse: Tensor, received: Tensor, position: Tensor | None,
    keys: Tensor, causal: bool,
) -> Tensor:  # fmt: skip
    """[S, H], mean_i Σ_j P_ij |i - j|.

    Σ_j P_ij (i - j) needs only the received probability. Where keys lie on both sides, |i - j| = 2 (i - j)⁺ - (i - j), and the first term
    comes from the causal half of the same scores: P_ij = exp(lse' - lse) P'_ij for j <= i.
    """
    if position is None:
        return lse.new_full(lse.shape[:2], torch.nan)
    middle = float(keys.double().mean())
    at, there = position.double() - middle, keys.double() - middle  # [n], [m]
    signed = at.mean() - (received.double() * there).sum(dim=-1) / len(position)
    if causal:
        return signed
    whole = q
    if q.shape[2] != len(keys):  # rows are some of the keys: the half needs a square
        whole = _spread(q, torch.searchsorted(keys, position), len(keys))
    features = there.to(torch.float64 if q.dtype == torch.float64 else torch.float32)[None, None, :, None]
    _, half = attention(whole, k, None, keep=("lse",), scale=scale, causal=True, key_bias=bias, features=features)
    rows = torch.searchsorted(keys, position)
    share = (_there(half.lse)[:, :, rows].double() - lse).exp()
    return (2 * share * (at - _there(half.moments)[:, :, rows, 0].double())).mean(dim=-1) - signed


def _variance(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, causal: bool) -> Tensor:
    """[S, H, n], the variance of each row's visible scores.

    A score is linear in its key, so the mean of a row's scores and of their squares follow from the mean key and from Σ k kᵀ over the
    keys it sees: sums over the chunks before, and within a chunk the scores themselves. With chunks of about D rows, memory is O(n D).
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(exact) * scale, reference.repeat_heads(k, q.shape[1]).to(exact)
    if bias is not None:
        q = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1)
        k = torch.cat([k, bias.to(exact)[..., None].expand(*k.shape[:3], 1)], dim=-1)
    k = k - k.mean(dim=2, keepdim=True)  # a common offset of a row's scores changes no variance, but costs digits
    if not causal:
        return ((q @ (k.mT @ k)) * q).sum(dim=-1).double().clamp_min(0.0) / k.shape[2]
    rows, more = k.shape[2], -k.shape[2] % _CHUNK
    own, seen = (pad(x, (0, 0, 0, more)).reshape(*x.shape[:2], -1, _CHUNK, x.shape[3]) for x in (q, k))  # [S, H, n / C, C, D]
    inside = (own @ seen.mT).tril()
    total = _before(seen.sum(dim=3, keepdim=True))  # [S, H, n / C, 1, D], of all chunks before
    outer = _before(seen.mT @ seen)
    sums = (own @ total.mT)[..., 0] + inside.sum(dim=-1)
    squares = ((own @ outer) * own).sum(dim=-1) + inside.square_().sum(dim=-1)
    count = torch.arange(1, rows + 1, device=q.device)
    mean, square = (x.flatten(2)[..., :rows].double() / count for x in (sums, squares))
    variance: Tensor = (square - mean.square()).clamp_min(0.0)
    return variance


def _before(x: Tensor) -> Tensor:
    """Sums over the chunks before each one, the third axis."""
    return pad(x.cumsum(dim=2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
