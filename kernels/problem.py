"""One attention in the form that every implementation reads: checked, with all its structure as an interval of keys per query.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, F features.

Causality, a sliding window and packed sequences each let a query see one run of neighbouring keys, so together they do too:
query i sees the keys first[i] <= j < stop[i]. Both ends never fall from one query to the next. What is irregular (a mask, biases)
comes on top. The score of query i and key j is

    softcap( scale / temperature · q_i·k_j ) + bias_ij + key_bias_j,   and -inf where the key may not be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from headscope.kernels.checks import check_call, full_rank, shown
from headscope.kernels.errors import InputError, ShapeError


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be computed on.

    Attributes:
        q: [B, H, Q, D].
        k: [B, G, K, D]; query head h uses key head h // (H / G).
        v: [B, G, K, V]; None where only statistics are wanted.
        scale: factor on q·k.
        first, stop: [Q], int32; the keys that each query sees; a dead query has first = stop.
        whole: every query sees all keys, as far as first and stop are concerned.
        softcap: c of c·tanh(s / c).
        bias: [B or 1, H or 1, Q or 1, K or 1], added to the scores.
        mask: bool, of the same shape, True = may be seen.
        key_bias: [B or 1, H or 1, K], added to the scores of a key.
        temperature: [H], divides q·k.
        gate: [H], multiplies the output.
        sink: [H], the score of one more column that takes a share and carries no value.
        features: [B or 1, H or 1, K, F], averaged by the pattern beside the values.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    scale: float
    first: Tensor
    stop: Tensor
    whole: bool
    softcap: float | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    key_bias: Tensor | None = None
    temperature: Tensor | None = None
    gate: Tensor | None = None
    sink: Tensor | None = None
    features: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, Q, K."""
        batch, heads, queries, _ = self.q.shape
        return batch, heads, queries, self.k.shape[2]

    @property
    def shared(self) -> int:
        """How many query heads use one key/value head, H / G."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def precision(self) -> torch.dtype:
        """In which statistics are given and sums are kept: float64 for float64, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def needs_gradient(self) -> bool:
        """Whether a result would belong to an autograd graph."""
        given = (self.q, self.k, self.v, self.bias, self.key_bias, self.temperature, self.gate, self.sink, self.features)
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)

    def head_scales(self, dtype: torch.dtype) -> Tensor:
        """[H], the factor on q·k of each head, scale / temperature."""
        if self.temperature is None:
            return torch.full((self.q.shape[1],), self.scale, dtype=dtype, device=self.q.device)
        return self.scale / self.temperature.to(dtype)

    def visible_queries(self) -> tuple[Tensor, Tensor]:
        """[K] and [K], int32: the queries first <= i < stop outside of which none sees the key (a dead one inside sees none either)."""
        keys = torch.arange(self.k.shape[2], dtype=torch.int32, device=self.q.device)
        return (
            torch.searchsorted(self.stop, keys, right=True, out_int32=True),
            torch.searchsorted(self.first, keys, right=True, out_int32=True),
        )


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    offset: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    temperature: Tensor | None = None,
    gate: Tensor | None = None,
    sink: Tensor | None = None,
    features: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
) -> Problem:
    """Check the parts of an attention against one another and bring them to one form.

    Args: as `headscope.kernels.attention.attention`.

    Raises:
        ShapeError: tensors whose shapes, dtypes or devices do not fit together.
        InputError: a scale, softcap, window or length that makes no sense.
    """
    check_call(q, k, v=v, bias=bias, mask=mask, sink=sink, softcap=softcap, window=window)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    if scale is None:
        scale = width**-0.5 if width else 1.0
    if not abs(scale) < float("inf"):
        raise InputError(f"scale {scale}: give a finite number, or None for 1 / sqrt(D)")
    for name, tensor in (("temperature", temperature), ("gate", gate)):
        if tensor is not None and (tensor.shape != (heads,) or not tensor.is_floating_point() or tensor.device != q.device):
            raise ShapeError(
                f"{name} is {shown(tensor)} of {tensor.dtype} on {tensor.device}; give one floating-point number per query head, "
                f"[{heads}], on {q.device}"
            )
    if temperature is not None and not bool((temperature.detach() > 0).all()):
        raise InputError("temperature: every head needs a positive one; 1 leaves a head as it is")
    key_bias = _over_keys("key_bias", key_bias, 0, (batch, heads, keys), q.device)
    features = _over_keys("features", features, 1, (batch, heads, keys), q.device)
    if key_lengths is not None and lengths is None:
        raise InputError("key_lengths without lengths: give the number of queries of each packed sequence too")
    each, each_keys = [queries], [keys]
    if lengths is not None:
        each = _packed("lengths", lengths, queries, batch)
        each_keys = _packed(
            "lengths" if key_lengths is None else "key_lengths", lengths if key_lengths is None else key_lengths, keys, batch
        )
    if len(each) != len(each_keys):
        raise InputError(f"{len(each)} sequences in lengths and {len(each_keys)} in key_lengths: give as many of one as of the other")
    first, stop = _visible_keys(each, each_keys, causal, offset, window)
    whole = not causal and window is None and lengths is None
    return Problem(
        q, k, v, scale, first.to(q.device), stop.to(q.device), whole, softcap, full_rank(bias), full_rank(mask), key_bias, temperature,
        gate, sink, features,
    )  # fmt: skip


def _visible_keys(
    lengths: Sequence[int], key_lengths: Sequence[int], causal: bool, offset: int | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """[Q] and [Q], int32. Each sequence has its own diagonal: its query i stands at its key i + offset, by default at the end."""
    starts, stops = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    before = accumulate(key_lengths, initial=0)
    for own_queries, own_keys, key_start in zip(lengths, key_lengths, before, strict=False):
        place = torch.arange(own_queries) + (own_keys - own_queries if offset is None else offset)
        begin = (torch.zeros_like(place) if window is None else place - window + 1).clamp(0, own_keys)
        last = torch.full_like(place, own_keys)
        if causal or window is not None:
            last = (place + (1 if causal or window is None else window)).clamp(0, own_keys)
        starts.append(key_start + begin)
        stops.append(key_start + torch.maximum(last, begin))
    return torch.cat(starts).to(torch.int32), torch.cat(stops).to(torch.int32)


def _packed(name: str, lengths: Sequence[int], total: int, batch: int) -> list[int]:
    found = [int(length) for length in lengths]
    if batch != 1:
        raise InputError(f"{name} with a batch of {batch}: packed sequences lie one after another in a batch of 1")
    if any(length < 0 for length in found) or sum(found) != total:
        raise InputError(f"{name} {found[:8]} add up to {sum(found)}; they must be 0 or more and add up to {total}")
    return found


def _over_keys(name: str, tensor: Tensor | None, after: int, shape: tuple[int, int, int], device: torch.device) -> Tensor | None:
    """A tensor [.., K] (after = 0) or [.., K, F] (after = 1) with axes of 1 in front up to batch and head."""
    if tensor is None:
        return None
    batch, heads, keys = shape
    axes = "[B, H, K]" if after == 0 else "[B, H, K, F]"
    full = tensor[(None,) * (3 + after - tensor.dim())] if tensor.dim() < 3 + after else tensor
    fits = full.dim() == 3 + after and full.shape[0] in (1, batch) and full.shape[1] in (1, heads) and full.shape[2] == keys
    if tensor.dim() < 1 + after or not fits or not tensor.is_floating_point() or tensor.device != device:
        raise ShapeError(
            f"{name} is {shown(tensor)} of {tensor.dtype} on {tensor.device}; give floating-point numbers {axes} with B {batch} or 1, "
            f"H {heads} or 1 and K {keys}, on {device}; leading axes may be left out"
        )
    return full


@dataclass(frozen=True)
class Wanted:
    """What is to be computed.

    Attributes:
        names: out of `headscope.kernels.statistics.NAMES`.
        tile: side of the tiles of the pooled map; None for no map.
        rows: query positions whose pattern rows are wanted, each from 0 to Q - 1; None for none.
        top: how many of the largest probabilities of each row are wanted, with their keys.
    """

    names: frozenset[str] = frozenset()
    tile: int | None = None
    rows: tuple[int, ...] | None = None
    top: int = 0
