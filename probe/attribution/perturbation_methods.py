"""Attribution by taking units of the input away and asking the model again, by Captum's methods.

Letters: U units, n sets of units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from headscope.kernels.errors import InputError
from headscope.probe.attribution.question import Answer, Question, at_least, needs
from headscope.probe.attribution.units import Units, patch_units, units_of
from headscope.probe.attribution.value import Value

Progress = Callable[[int, int], None]


def shapley_sampling(
    question: Question, *, samples: int = 25, seed: int = 0, removal: str | None = None, units: Units | None = None,
    replacement: int | None = None, batch: int = 32, progress: Progress | None = None,
) -> Answer:  # fmt: skip
    """Shapley values of the units, over random orders in which they come in (Štrumbelj & Kononenko 2010).

    Args:
        question: what is asked.
        samples: orders.
        seed: of the orders.
        removal, units, replacement, batch: as in `Value`.
        progress: told (sets run, sets in all), for each sample of the batch anew.
    """
    at_least(1, samples=samples, batch=batch)
    captum = needs("captum.attr", "shapley-sampling")

    def explain(value: Value, counted: _Counted) -> Tensor:
        whole = _all(value)
        counted.total = samples * len(value.units) + 1
        found: Tensor = captum.ShapleyValueSampling(counted).attribute(whole, n_samples=samples, perturbations_per_eval=batch)
        return found

    return _perturbed(question, explain, seed, removal, units, replacement, batch, progress, {"samples": samples})


def kernel_shap(
    question: Question, *, samples: int = 200, seed: int = 0, removal: str | None = None, units: Units | None = None,
    replacement: int | None = None, batch: int = 32, progress: Progress | None = None,
) -> Answer:  # fmt: skip
    """Shapley values by a weighted linear regression on random sets of units (Lundberg & Lee 2017).

    Args:
        question, seed, removal, units, replacement, batch, progress: as in `shapley_sampling`.
        samples: sets.
    """
    at_least(3, samples=samples)
    at_least(1, batch=batch)
    captum = needs("captum.attr", "kernel-shap")
    needs("sklearn.linear_model", "kernel-shap")

    def explain(value: Value, counted: _Counted) -> Tensor:
        _several(value, "kernel-shap")
        counted.total = samples
        whole = _all(value)
        found: Tensor = captum.KernelShap(counted).attribute(whole, n_samples=samples, perturbations_per_eval=batch)
        return found

    return _perturbed(question, explain, seed, removal, units, replacement, batch, progress, {"samples": samples})


def lime(
    question: Question, *, samples: int = 200, alpha: float = 0.01, seed: int = 0, removal: str | None = None, units: Units | None = None,
    replacement: int | None = None, batch: int = 32, progress: Progress | None = None,
) -> Answer:  # fmt: skip
    """Weights of a sparse linear model fitted on random sets of units near the whole (Ribeiro et al. 2016).

    Args:
        question, seed, removal, units, replacement, batch, progress: as in `shapley_sampling`.
        samples: sets.
        alpha: the lasso's penalty on the weights, in units of the target.
    """
    at_least(3, samples=samples)
    at_least(1, batch=batch)
    at_least(0, alpha=alpha)
    captum = needs("captum.attr", "lime")
    needs("sklearn.linear_model", "lime")
    lasso = needs("captum._utils.models.linear_model", "lime").SkLearnLasso

    def explain(value: Value, counted: _Counted) -> Tensor:
        _several(value, "lime")
        counted.total = samples
        method = captum.Lime(counted, interpretable_model=lasso(alpha=alpha))
        found: Tensor = method.attribute(_all(value), n_samples=samples, perturbations_per_eval=batch)
        return found

    settings: dict[str, object] = {"samples": samples, "alpha": alpha}
    return _perturbed(question, explain, seed, removal, units, replacement, batch, progress, settings)


def feature_ablation(
    question: Question, *, removal: str | None = None, units: Units | None = None, replacement: int | None = None, batch: int = 32,
    progress: Progress | None = None,
) -> Answer:  # fmt: skip
    """What the target loses when one unit is taken away.

    Args:
        question, removal, units, replacement, batch, progress: as in `shapley_sampling`.
    """
    at_least(1, batch=batch)
    captum = needs("captum.attr", "feature-ablation")

    def explain(value: Value, counted: _Counted) -> Tensor:
        counted.total = len(value.units) + 1
        found: Tensor = captum.FeatureAblation(counted).attribute(_all(value), perturbations_per_eval=batch)
        return found

    return _perturbed(question, explain, None, removal, units, replacement, batch, progress, {})


def occlusion(
    question: Question, *, window: int | None = None, stride: int | None = None, removal: str | None = None,
    replacement: int | None = None, batch: int = 32, progress: Progress | None = None,
) -> Answer:  # fmt: skip
    """What the target loses when a window slides over the input, averaged over the windows that cover a place (Zeiler & Fergus 2014).

    Args:
        question, removal, replacement, batch, progress: as in `shapley_sampling`.
        window: its side: in tokens (3), or in pixels (a quarter of the image's height).
        stride: by which it moves: 1 token, or half a window.
    """
    at_least(1, window=window or 1, stride=stride or 1, batch=batch)
    captum = needs("captum.attr", "occlusion")
    image = question.inputs.get("pixel_values")
    units: Units | None = None
    if isinstance(image, Tensor) and "input_ids" not in question.inputs:
        if image.dim() != 4:
            raise InputError(f"pixel_values is {list(image.shape)}: give images [B, C, height, width]")
        window = window or max(1, image.shape[-2] // 4)
        stride = stride or max(1, window // 2)
        side = math.gcd(window, stride)  # the coarsest grid on which windows and steps are whole
        units = patch_units({"pixel_values": image[:1]}, side)
        shape = tuple(-(-size // side) for size in image.shape[-2:])
        windows, strides = [window // side] * 2, [stride // side] * 2
    else:
        window, stride = window or 3, stride or 1
        shape, windows, strides = (), [window], [stride]

    def explain(value: Value, counted: _Counted) -> Tensor:
        grid = shape or (len(value.units),)
        own = tuple(min(w, size) for w, size in zip(windows, grid, strict=True))
        counted.total = 1 + math.prod(-(-(size - w) // s) + 1 for size, w, s in zip(grid, own, strides, strict=True))
        found: Tensor = captum.Occlusion(counted).attribute(
            torch.ones(1, *grid, dtype=torch.float64), sliding_window_shapes=own, strides=tuple(strides), perturbations_per_eval=batch
        )
        return found

    settings: dict[str, object] = {"window": window, "stride": stride}
    return _perturbed(question, explain, None, removal, units, replacement, batch, progress, settings)


# -- what they share --------------------------------------------------------------------------------------------------


class _Counted:
    """A value function as Captum calls it: float masks [n, …] in, values [n] out, each set counted."""

    def __init__(self, value: Value, progress: Progress | None) -> None:
        self.value, self.progress = value, progress
        self.done, self.total = 0, 0

    def __call__(self, keep: Tensor) -> Tensor:
        found = self.value(keep.reshape(len(keep), -1) > 0.5)
        self.done += len(keep)
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)
        return found


def _perturbed(
    question: Question, explain: Callable[[Value, _Counted], Tensor], seed: int | None, removal: str | None, units: Units | None,
    replacement: int | None, batch: int, progress: Progress | None, settings: dict[str, object],
) -> Answer:  # fmt: skip
    """One explanation for each sample, its units' relevance spread evenly over their places."""
    rows, chosen, forwards, name = [], "", 0, ""
    for place, sample in enumerate(question.samples()):
        value = Value(
            sample.model, sample.inputs, sample.scalar, removal=removal, units=units or units_of(sample.inputs, sample.tokenizer),
            tokenizer=sample.tokenizer, replacement=replacement, batch=batch,
        )  # fmt: skip
        with nullcontext() if seed is None else _seeded(seed + place):
            relevance = explain(value, _Counted(value, progress)).detach().reshape(-1).double()
        rows.append(_spread(relevance, value.units, sample.inputs[value.units.input]))
        chosen, forwards, name = value.removal, forwards + value.forwards, value.units.input
    drawn = {} if seed is None else {"seed": seed}
    return Answer({name: torch.cat(rows)}, {**settings, **drawn, "removal": chosen, "forwards": forwards})


def _spread(relevance: Tensor, units: Units, given: Tensor) -> Tensor:
    """[U] to the input's own shape [1, …], so that the sum over a unit's places, and channels, is its relevance."""
    flat = torch.zeros(math.prod(units.shape), dtype=torch.float64)
    for amount, places in zip(relevance, units.places, strict=True):
        flat[list(places)] = amount / len(places)
    shaped = flat.reshape(1, *units.shape)
    return shaped if given.dim() == shaped.dim() else (shaped[:, None] / given.shape[1]).expand(given.shape).clone()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Captum draws from torch's own generator on the CPU: seed it, and put it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _all(value: Value) -> Tensor:
    """[1, U], every unit kept, as Captum's methods take their input."""
    return torch.ones(1, len(value.units), dtype=torch.float64)


def _several(value: Value, method: str) -> None:
    if len(value.units) < 2:
        raise InputError(f"{method} fits a model on sets of units and there is {len(value.units)}: choose feature-ablation")
