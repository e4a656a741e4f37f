"""Differentiable terms on patterns, hidden states and logits, each one number; see docs/math/losses.md.

Letters: B batch, H query heads, S tokens, Q queries, K keys, V vocabulary, E width of the residual stream.

`tokens` [B, S], bool, says which tokens count, so that padding on either side changes nothing; None: all. Half precision is taken to
single. A reference gets no gradient. Two equal arguments give exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headscope.kernels.errors import InputError, NonFiniteError, ShapeError

Ids = int | Sequence[int]


def laplacian_spectrum(pattern: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The eigenvalues of the graph Laplacian of causal attention: λ_i = Σ_{j>i} A_ji / n_i − A_ii, n_i = S − i counted from 0.

    The Laplacian D − A of a lower triangular A is lower triangular, so they are its diagonal: exact, and without a decomposition.
    n_i counts the queries that see key i, itself included.

    Args:
        pattern: A, [B, H, S, S], causal.
        tokens: [B, S].

    Returns:
        [B, H, S]; 0 at tokens that do not count.

    Raises:
        ShapeError: a pattern that is not square, or tokens that do not fit.
        InputError: a query sees a later key: then the eigenvalues are not the diagonal.
    """
    a, counted = wide(pattern), _counted(pattern, tokens)
    if a.shape[2] != a.shape[3]:
        raise ShapeError(f"pattern {list(a.shape)}: a spectrum needs as many queries as keys; a cache or cross attention has none")
    rows = counted[:, None, :, None]
    if bool((a.detach().triu(1) * rows).any()):
        raise InputError("a query attends to a later key: the Laplacian's eigenvalues lie on its diagonal only in causal attention")
    diagonal = a.diagonal(dim1=-2, dim2=-1)  # [B, H, S]
    received = (a * rows).sum(-2) - diagonal
    seen_by = counted.flip(-1).cumsum(-1).flip(-1).clamp(min=1)[:, None]  # [B, 1, S]
    return (received / seen_by - diagonal) * counted[:, None]


def shared_attention(first: Tensor, second: Tensor, tokens: Tensor | None = None) -> Tensor:
    """UGID's weights of the keys, [B, H, K]: mean of both patterns' rows of the last counted token, the first one's key left out.

    They carry no gradient.
    """
    counted = _counted(first, tokens)
    if first.shape != second.shape or first.shape[2] != first.shape[3]:
        raise ShapeError(f"patterns {list(first.shape)} and {list(second.shape)}: give two square ones of the same shape")
    places = torch.arange(counted.shape[1], device=counted.device)
    last = torch.where(counted > 0, places, -1).amax(-1).clamp(min=0)  # [B]
    begin = torch.where(counted > 0, places, counted.shape[1]).amin(-1)
    sample = torch.arange(len(last), device=last.device)
    rows = (0.5 * (wide(first) + wide(second))).detach()[sample, :, last]  # [B, H, K]
    return rows * (places[None] != begin[:, None])[:, None]


def spectrum_distance(first: Tensor, second: Tensor, weights: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
    """Σ_i w_i (λ_i − λ'_i)², mean over samples and heads (UGID).

    Args:
        first, second: causal patterns [B, H, S, S] of two runs, such as a sentence and its counterfactual, token beside token.
        weights: [B, H, S], such as `shared_attention`; None: 1 over the number of counted tokens.
        tokens: [B, S].
    """
    _same(first, second, "patterns")
    counted = _counted(first, tokens)
    share = counted[:, None] / counted.sum(-1)[:, None, None].clamp(min=1) if weights is None else weights * counted[:, None]
    gap = laplacian_spectrum(first, tokens) - laplacian_spectrum(second, tokens)
    return (share * gap.square()).sum(-1).mean()


def hidden_distance(first: Tensor, second: Tensor, weights: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
    """Σ_i w_i ‖h_i − h'_i‖², mean over samples; states [B, S, E], weights [B, S] or None for the mean over counted tokens."""
    _same(first, second, "hidden states")
    a, b = wide(first), wide(second)
    counted = _counted(a[:, None], tokens)
    share = counted / counted.sum(-1, keepdim=True).clamp(min=1) if weights is None else weights * counted
    return (share * (a - b).square().sum(-1)).sum(-1).mean()


def edge_distance(pattern: Tensor, reference: Tensor, top: int = 10, tokens: Tensor | None = None) -> Tensor:
    """Mean |A − R| over the `top` keys that each row of the reference R weighs most, over counted rows and heads.

    Where a row has fewer than `top` keys, all are taken; those that it does not see count as equal.
    """
    _same(pattern, reference, "patterns")
    if top < 1:
        raise InputError(f"top={top}: give the number of keys of each row that are compared, at least 1")
    counted = _counted(pattern, tokens)
    values, keys = wide(reference).detach().topk(min(top, pattern.shape[-1]), dim=-1)
    gaps = (wide(pattern).gather(-1, keys) - values).abs().mean((1, -1))  # [B, Q]
    return (gaps * counted).sum() / counted.sum().clamp(min=1)


def entropies(pattern: Tensor) -> Tensor:
    """[B, H, Q] in nats; a probability of 0 adds nothing and passes no gradient."""
    p = wide(pattern)
    present = p > 0
    return -torch.where(present, p * torch.where(present, p, 1.0).log(), 0.0).sum(-1)


def entropy_distance(first: Tensor, second: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean squared difference of the row entropies of two runs, over counted rows and heads, nats²."""
    _same(first, second, "patterns")
    return _mean_rows((entropies(first) - entropies(second)).square(), _counted(first, tokens))


def entropy_band(pattern: Tensor, low: float = 0.0, high: float = 1.0, tokens: Tensor | None = None) -> Tensor:
    """How far entropies lie outside a band, squared: each as a share of log(number of keys seen), over rows that see at least two.

    Args:
        pattern: [B, H, Q, K].
        low, high: the ends of the band, 0 ≤ low ≤ high ≤ 1.
        tokens: [B, Q].
    """
    if not 0 <= low <= high <= 1:
        raise InputError(f"a band of entropies from {low} to {high}: give shares with 0 <= low <= high <= 1")
    visible = (pattern.detach() > 0).sum(-1)  # [B, H, Q]
    found = entropies(pattern)
    share = found / visible.clamp(min=2).to(found.dtype).log()
    outside = (low - share).clamp(min=0) + (share - high).clamp(min=0)
    rows = (visible > 1) * _counted(pattern, tokens)[:, None]
    return (outside.square() * rows).sum() / rows.sum().clamp(min=1)


def masked_divergence(logits: Tensor, reference: Tensor, tokens: Tensor | None = None) -> Tensor:
    """KL(reference ‖ model) in nats, mean over the counted positions.

    With the positions around the words in question left out of `tokens` it is UGID's masked KL; with all of them, on sentences that
    are to stay as they are, its anchor.

    Args:
        logits, reference: [B, S, V], or [B, C] of a classifier.
        tokens: [B, S]; of a classifier [B].
    """
    _same(logits, reference, "logits")
    before, after = wide(reference).detach().log_softmax(-1), wide(logits).log_softmax(-1)
    each = (before.exp() * torch.where(before.isneginf(), 0.0, before - after)).sum(-1)
    if tokens is None:
        return each.mean()
    if tokens.shape != each.shape:
        raise ShapeError(f"tokens {list(tokens.shape)} for logits {list(logits.shape)}: expected {list(each.shape)}")
    counted = tokens.bool()
    return torch.where(counted, each, 0.0).sum() / counted.sum().clamp(min=1)


def log_odds(logits: Tensor, first: Ids, second: Ids, at: int | Tensor = -1) -> Tensor:
    """[B]: log p(first) − log p(second) of the next token after position `at`; of several ids the probabilities are summed.

    Args:
        logits: [B, S, V], or [B, C] of a classifier.
        first, second: token ids, such as those of " he" and " she".
        at: the position whose prediction counts, one for all samples or [B].
    """
    rows = wide(logits)
    if rows.ndim == 3:
        places = torch.as_tensor(at, device=rows.device).expand(len(rows))
        if bool(((places < -rows.shape[1]) | (places >= rows.shape[1])).any()):
            raise InputError(f"at={at}: the logits have {rows.shape[1]} positions")
        rows = rows[torch.arange(len(rows), device=rows.device), places]
    if rows.ndim != 2:
        raise ShapeError(f"logits {list(logits.shape)}: expected [B, S, V] or [B, C]")
    one, other = ([ids] if isinstance(ids, int) else list(ids) for ids in (first, second))
    if not one or not other or max(*one, *other) >= rows.shape[1] or min(*one, *other) < 0:
        raise InputError(f"ids {one} against {other}: give at least one each, of 0 to {rows.shape[1] - 1}")
    return rows[:, one].logsumexp(-1) - rows[:, other].logsumexp(-1)  # the normaliser cancels


def log_odds_penalty(logits: Tensor, first: Ids, second: Ids, at: int | Tensor = -1) -> Tensor:
    """(log p(first) − log p(second))², mean over samples (UGID)."""
    return log_odds(logits, first, second, at).square().mean()


def check_finite(terms: dict[str, Tensor]) -> None:
    """Raises NonFiniteError that names the first term which is NaN or infinite."""
    for name, value in terms.items():
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(
                f"the term {name!r} is {float(value.detach())}: the model overflows, or its input or weights are not finite"
            )


def wide(tensor: Tensor) -> Tensor:
    """The tensor, half precision taken to single."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _counted(pattern: Tensor, tokens: Tensor | None) -> Tensor:
    """[B, Q], 0 or 1 in the pattern's precision."""
    if pattern.ndim != 4:
        raise ShapeError(f"a pattern of shape {list(pattern.shape)}: expected [B, H, Q, K]")
    shape = (pattern.shape[0], pattern.shape[2])
    if tokens is None:
        return torch.ones(shape, device=pattern.device, dtype=wide(pattern[:0]).dtype)
    if tuple(tokens.shape) != shape:
        raise ShapeError(f"tokens {list(tokens.shape)} for {list(pattern.shape)}: expected [B, Q] = {list(shape)}")
    return tokens.to(pattern.device).bool().to(wide(pattern[:0]).dtype)


def _mean_rows(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of [B, H, Q] over heads and counted rows."""
    return (values.mean(1) * counted).sum() / counted.sum().clamp(min=1)


def _same(first: Tensor, second: Tensor, what: str) -> None:
    if first.shape != second.shape:
        raise ShapeError(f"{what} {list(first.shape)} and {list(second.shape)}: two runs are compared token by token, so they must agree")
