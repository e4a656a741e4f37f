"""What a head or a layer is compared with: attention that looks at everything alike, and the same network before it was trained.

Letters: N tokens, H heads. Uniform attention needs no forward pass: its numbers follow from N and from whether the future is masked.
The untrained network is a copy; neither the model nor the random state is touched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from headscope.kernels.errors import HeadscopeError, InputError
from headscope.probe.call import AttentionSite
from headscope.probe.health.measures import HeadMeasures, StreamMeasures, plain
from headscope.probe.health.undisturbed import bare_model

KINDS = ("uniform", "fresh")
Measure = Callable[[nn.Module], tuple[tuple[HeadMeasures, ...], tuple[StreamMeasures, ...]]]


@dataclass(frozen=True, eq=False)
class Baselines:
    """What the numbers are compared with.

    Attributes:
        uniform: by site name: the numbers of uniform attention over as many tokens, causal where the site is.
        heads, streams: of the freshly initialised network on the same inputs; empty where there is none.
        absent: `uniform` or `fresh`, or the name of a site -> why it is not there.
        seed: of the fresh weights.
    """

    uniform: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    heads: tuple[HeadMeasures, ...] = ()
    streams: tuple[StreamMeasures, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def fresh_head(self, site: AttentionSite) -> HeadMeasures | None:
        """The same site in the freshly initialised network."""
        return next((one for one in self.heads if one.site.name == site.name), None)

    def fresh_stream(self, stream: StreamMeasures) -> StreamMeasures | None:
        """The same place in the freshly initialised network."""
        key = (stream.name, stream.place, stream.stream)
        return next((one for one in self.streams if (one.name, one.place, one.stream) == key), None)

    def to_dict(self) -> dict[str, object]:
        return {
            "uniform": {site: {name: plain(value) for name, value in row.items()} for site, row in self.uniform.items()},
            "fresh": {"heads": [one.to_dict() for one in self.heads], "streams": [one.to_dict() for one in self.streams]},
            "absent": dict(self.absent),
            "seed": self.seed,
        }


def uniform_attention(tokens: int, causal: bool) -> dict[str, float]:
    """The numbers of attention that gives every visible key the same probability, by the names of `HeadMeasures`.

    Args:
        tokens: N, both queries and keys.
        causal: key j is visible to query i only for j <= i: P_ij = 1 / (i + 1), so c_j = h_N - h_j with h the harmonic numbers.

    Raises:
        InputError: fewer than 2 tokens, where everything is uniform.
    """
    if tokens < 2:
        raise InputError(f"uniform attention over {tokens} tokens: give 2 or more")
    total = math.log(tokens)
    if not causal:
        return {
            "entropy": total, "entropy_share": 1.0, "diffuse": 1.0, "routing": 0.0, "hub": 0.0, "p_max": 1 / tokens,
            "effective_keys": float(tokens), "effective_share": 1.0, "sum_squares": 1 / tokens, "sink": 1 / tokens,
            "first_mass": 1 / tokens,
            "distance": (tokens**2 - 1) / (3 * tokens), "own": 1 / tokens, "previous": 1 / tokens, "row_residual": 0.0, "row_cosine": 1.0,
            "sigma_low": 1.0, "sigma_high": 1.0, "contrast_low": 0.0, "contrast_high": 0.0, "column_deviation": 0.0,
            "max_score": 0.0, "score_variance": 0.0,
        }  # fmt: skip
    place = torch.arange(1, tokens + 1, dtype=torch.float64)  # visible keys of each row
    inverse = 1 / place
    harmonic = inverse.cumsum(0)
    last = float(harmonic[-1])
    received = last - harmonic + inverse  # [N], c_j
    mean = received / tokens
    entropy = float(place.log().mean())
    spread = float(torch.special.entr(mean).sum())
    roots = place.sqrt()
    pairs = float(((roots.cumsum(0) - roots) / roots).sum())  # Σ over i < j of √(n_i / n_j), the cosine of two rows
    return {
        "entropy": entropy, "entropy_share": 1.0, "diffuse": entropy / total, "routing": (spread - entropy) / total,
        "hub": (total - spread) / total, "p_max": last / tokens, "effective_keys": (tokens + 1) / 2, "effective_share": 1.0,
        "sum_squares": last / tokens, "sink": last / tokens, "first_mass": last / tokens, "distance": (tokens - 1) / 4,
        "own": last / tokens, "previous": (last - 1) / (tokens - 1), "row_residual": 1 - float(received.square().sum()) / (tokens * last),
        "row_cosine": 2 * pairs / (tokens * (tokens - 1)), "column_deviation": float((received - 1).abs().mean()), "contraction": 0.5,
        "max_score": 0.0, "score_variance": 0.0,
    }  # fmt: skip


def uniform_baseline(measured: HeadMeasures) -> dict[str, float]:
    """Uniform attention over as many keys as the rows of this site see on average.

    Samples of several lengths are taken as one of their mean; of a site whose queries are not its keys only what needs no position.

    Raises:
        InputError: the rows see fewer than 2 keys.
    """
    if not math.isfinite(measured.keys):
        raise InputError("no row of this site was counted")
    tokens = round(2 * measured.keys - 1) if measured.causal else round(measured.keys)
    found = uniform_attention(tokens, measured.causal)
    if not measured.square:
        for name in ("distance", "own", "previous", "column_deviation", "contraction"):
            found.pop(name, None)
    return found


def measure_baselines(
    model: nn.Module,
    heads: Sequence[HeadMeasures],
    measure: Measure,
    wanted: bool | Sequence[str] = True,
    seed: int = 0,
) -> Baselines:
    """Both baselines, or those that are wanted; what cannot be made is absent with the reason.

    Args:
        model: stays as it is.
        heads: what was measured of it.
        measure: measures heads and streams of another model on the same inputs.
        wanted: True for all, False for none, or some of `KINDS`.
        seed: of the fresh weights.

    Raises:
        InputError: no such baseline.
    """
    if isinstance(wanted, str):
        wanted = (wanted,)
    kinds = (KINDS if wanted else ()) if isinstance(wanted, bool) else tuple(wanted)
    if unknown := [name for name in kinds if name not in KINDS]:
        raise InputError(f"no baseline {unknown[0]!r}: there are {', '.join(KINDS)}")
    absent = {name: "not asked for" for name in KINDS if name not in kinds}
    uniform: dict[str, dict[str, float]] = {}
    for one in heads if "uniform" in kinds else ():
        try:
            uniform[one.site.name] = uniform_baseline(one)
        except InputError as error:
            absent[one.site.name] = str(error)
    fresh: tuple[tuple[HeadMeasures, ...], tuple[StreamMeasures, ...]] = ((), ())
    if "fresh" in kinds:
        try:
            fresh = measure(fresh_copy(model, seed))
        except HeadscopeError as error:
            absent["fresh"] = str(error)
    return Baselines(uniform, *fresh, absent, seed)


def fresh_copy(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same architecture with the weights it would have before training, in the mode, type and place of the model.

    A transformers model is made anew from a copy of its config. Any other is copied, and every module initialises its own parameters again.

    Args:
        model: stays as it is.
        seed: of the weights; the random state outside is left alone.

    Raises:
        InputError: a parameter belongs to a module that does not say how it begins, the model cannot be copied, or its weights are
            spread over processes.
    """
    model = bare_model(model)
    weight = next(model.parameters(), None)
    if weight is None:
        raise InputError("the model has no parameters, so there is nothing to initialise")
    devices = sorted({one.device.index or 0 for one in model.parameters() if one.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        found = _from_config(model)
        if found is None:
            found = _initialised_again(model)
    return found.to(device=weight.device, dtype=weight.dtype).train(model.training)


def _from_config(model: nn.Module) -> nn.Module | None:
    """Made from its config; None where it is no such model."""
    config = getattr(model, "config", None)
    if not hasattr(model, "_init_weights") or not hasattr(config, "to_dict"):
        return None
    try:
        found: nn.Module = type(model)(copy.deepcopy(config))
    except Exception as error:  # the model's own code may raise anything
        raise InputError(f"{type(model).__name__} cannot be made from its config ({type(error).__name__}: {_first_line(error)})") from error
    shapes = {name: value.shape for name, value in model.named_parameters()}
    if shapes != {name: value.shape for name, value in found.named_parameters()}:
        raise InputError(f"{type(model).__name__} was changed since it was made: its config makes other parameters than it has")
    return found


def _initialised_again(model: nn.Module) -> nn.Module:
    """A deep copy in which every module that has parameters of its own has drawn them again."""
    silent = [
        (name, module)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None and _initialiser(module) is None
    ]
    if silent:
        name, module = silent[0]
        raise InputError(
            f"{name or 'the model'} ({type(module).__name__}) has parameters and no reset_parameters() that would draw them again"
        )
    try:
        found = copy.deepcopy(model)
        for module in found.modules():
            reset = _initialiser(module)
            if reset is not None:
                reset()
    except Exception as error:  # the model's own code may raise anything
        raise InputError(
            f"{type(model).__name__} cannot be copied and initialised ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return found


def _initialiser(module: nn.Module) -> Callable[[], None] | None:
    for name in ("reset_parameters", "_reset_parameters"):
        found = getattr(module, name, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0][:200]
