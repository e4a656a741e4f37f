"""Numbers of hidden states: how different the tokens still are at one place.

Letters: B batch, N tokens, d width of a hidden state, n tokens of one sample that count.

`headscope.probe.health.blocks` catches the states. All numbers are computed in float64 from the states in their own precision. Where the
tokens differ by less than 10 eps of the dtype, what is left is rounding: the residual is given as that floor and no rank is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headscope.kernels.errors import ShapeError
from headscope.probe.health.measures import STREAM_FIELDS, StreamMeasures
from headscope.probe.health.state_ranks import ranks_of

ONE_TOKEN = "fewer than two tokens"
ALL_ZERO = "the hidden states are all 0"
NOT_FINITE = "NaN or infinity in the hidden states"
FLOOR = "the tokens differ by less than the dtype resolves"

_CENTRED = ("cosine_centred", "effective_rank_centred", "stable_rank_centred", "participation_centred")
_RANKS = ("effective_rank", "stable_rank", "participation")


@torch.no_grad()
def measure_stream(
    states: Tensor,
    tokens: Tensor | None = None,
    *,
    name: str = "",
    place: str = "output",
    layer: int = 0,
    stream: int = 0,
    before: Tensor | None = None,
    update: Tensor | None = None,
) -> StreamMeasures:
    """The numbers of hidden states at one place, means over the samples, weighted by their tokens.

    Args:
        states: [B, N, d].
        tokens: [B, N], bool, the tokens that count; None for all.
        name, place, layer, stream: where it is.
        before: [B, N, d], the state one block before.
        update: [B, N, d], what attention gave to it.

    Raises:
        ShapeError: tensors that do not fit together.
    """
    if states.dim() != 3 or not states.is_floating_point():
        raise ShapeError(f"the hidden states are {list(states.shape)} of {states.dtype}; give floating-point [B, N, d]")
    for what, other in (("before", before), ("update", update)):
        if other is not None and other.shape != states.shape:
            raise ShapeError(f"{what} is {list(other.shape)} beside hidden states {list(states.shape)}; they must be equal")
    if tokens is not None and tokens.shape != states.shape[:2]:
        raise ShapeError(f"tokens are {list(tokens.shape)} beside hidden states {list(states.shape)}; give bool [B, N]")
    samples: list[StreamMeasures] = []
    for sample, x in enumerate(states):
        own = [None if other is None else other[sample] for other in (before, update)]
        if tokens is not None and not bool(tokens[sample].all()):
            chosen = tokens[sample].to(x.device)
            x, own = x[chosen], [None if other is None else other[chosen] for other in own]
        numbers, why, floored = _sample(x)
        one, reasons = _beside(x, *own)
        numbers |= one
        samples.append(
            StreamMeasures(
                name,
                place,
                layer,
                stream,
                len(x),
                states.shape[2],
                str(states.dtype).removeprefix("torch."),
                floored=floored,
                undefined=why | reasons,
                **numbers,
            )  # fmt: skip
        )
    return average_streams(samples)


def average_streams(found: Sequence[StreamMeasures]) -> StreamMeasures:
    """One measure of a place from those of several samples or calls, weighted by their tokens."""
    first = found[0]
    numbers: dict[str, float] = {}
    why: dict[str, str] = {}
    for name in STREAM_FIELDS:
        there = [(getattr(one, name), one.tokens) for one in found if not math.isnan(getattr(one, name))]
        broken = any(one.undefined.get(name) == NOT_FINITE for one in found)
        if there and not broken:
            numbers[name] = sum(value * weight for value, weight in there) / sum(weight for _, weight in there)
        else:
            numbers[name] = math.nan
            why[name] = NOT_FINITE if broken else next((one.undefined[name] for one in found if name in one.undefined), ONE_TOKEN)
    return StreamMeasures(
        first.name, first.place, first.layer, first.stream, sum(one.tokens for one in found), first.width, first.dtype,
        floored=any(one.floored for one in found), undefined=why, **numbers,
    )  # fmt: skip


def _sample(x: Tensor) -> tuple[dict[str, float], dict[str, str], bool]:
    """The numbers of one sample [n, d] alone, why some are not there, and whether the residual is at the floor."""
    names = [name for name in STREAM_FIELDS if name not in ("update", "step_cosine", "rank_limit")]
    limit = {"rank_limit": float(min(len(x) - 1, x.shape[1]))}
    if len(x) < 2:
        return {}, dict.fromkeys((*names, "rank_limit"), ONE_TOKEN), False
    floor = 10 * torch.finfo(x.dtype).eps
    lowest, highest = (float(one) for one in x.aminmax())  # NaN where there is one
    largest = max(-lowest, highest)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        return limit, dict.fromkeys(names, NOT_FINITE), False
    if largest == 0:
        return limit, dict.fromkeys(names, ALL_ZERO), False
    x = x.to(torch.float64, copy=True).div_(largest)  # every number is one of the shape alone; the squares of bfloat16 may overflow
    mean = x.mean(dim=0)
    apart = x - mean
    squares, rest = (float(torch.dot(one.flatten(), one.flatten())) for one in (x, apart))
    found = limit | {"residual": math.sqrt(rest / squares), "residual_composite": _composite(apart) / _composite(x)}
    why: dict[str, str] = {}
    found["cosine"] = _cosine(x)
    if math.isnan(found["cosine"]):
        why["cosine"] = "fewer than two tokens with a hidden state that is not 0"
    if found["residual"] < floor:
        found["residual"], found["residual_composite"] = floor, max(floor, found["residual_composite"])
        return found, why | dict.fromkeys((*_CENTRED, *_RANKS), FLOOR), True
    found["cosine_centred"] = _cosine(apart)
    if math.isnan(found["cosine_centred"]):
        why["cosine_centred"] = "fewer than two tokens away from the mean one"
    for suffix, ranks in zip(("_centred", ""), ranks_of(x, apart, mean), strict=True):
        found |= {name + suffix: value for name, value in zip(_RANKS, ranks, strict=True)}
    return found, why, False


def _composite(x: Tensor) -> float:
    """√(‖X‖₁ ‖X‖_∞), the largest column sum and the largest row sum of |x|."""
    size = x.abs()
    return math.sqrt(float(size.sum(dim=0).max()) * float(size.sum(dim=1).max()))


def _cosine(x: Tensor) -> float:
    """Mean cosine of two different rows: (‖Σ x̂_i‖² - n) / (n (n - 1)); rows of 0 have none."""
    length = torch.linalg.vector_norm(x, dim=1)
    there = length > 1e-14 * length.max()
    count = int(there.sum())
    if count < 2:
        return math.nan
    total = length.reciprocal().masked_fill(~there, 0.0) @ x
    return float((total.square().sum() - count) / (count * (count - 1)))


def _beside(x: Tensor, before: Tensor | None, update: Tensor | None) -> tuple[dict[str, float], dict[str, str]]:
    """What relates the states of one sample to those before the block and to what attention gave."""
    found: dict[str, float] = {}
    why: dict[str, str] = {}
    if before is None:
        why["step_cosine"] = why["update"] = "the hidden state before the block was not seen"
        return found, why
    x, before = x.double(), before.double()
    size, own = (torch.linalg.vector_norm(one, dim=1) for one in (before, x))
    _mean_of("step_cosine", (x * before).sum(dim=1), size * own, found, why)
    if update is None:
        why["update"] = "the attention's output was not seen, or has another shape"
    else:
        _mean_of("update", torch.linalg.vector_norm(update.double(), dim=1), size, found, why)
    return found, why


def _mean_of(name: str, above: Tensor, below: Tensor, found: dict[str, float], why: dict[str, str]) -> None:
    """The mean of a quotient over the tokens where it is one."""
    if not bool(torch.isfinite(above).all() & torch.isfinite(below).all()):
        why[name] = NOT_FINITE
    elif not bool((below > 0).any()):
        why[name] = ALL_ZERO if len(below) else "no token counts"
    else:
        found[name] = float((above / below)[below > 0].mean())
