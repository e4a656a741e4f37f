"""Methods to compare rules with: every one by name, its options, and the simplest of them.

Letters: B batch, S tokens, E width of the embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.attribution import attention_methods, gradient_methods, perturbation_methods
from headscope.probe.attribution.question import Answer, Question

CONTROL = "this is a control: it knows nothing of what the model does"
TOWARDS = ("start", "centre", "end")


def random(question: Question, *, seed: int = 0) -> Answer:
    """Normal noise.

    Args:
        question: what is asked.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(like.shape, generator=generator, dtype=torch.float64) for name, like in _shapes(question).items()}
    return Answer(found, {"seed": seed}, (CONTROL,))


def position(question: Question, *, towards: str | None = None) -> Answer:
    """Relevance by position alone, from 0 to 1.

    Args:
        question: what is asked.
        towards: where it is largest: `start`, `centre` or `end`; by default the end of a text and the centre of an image.
    """
    if towards is not None and towards not in TOWARDS:
        raise SelectionError(f"no position towards {towards!r}: there are {', '.join(TOWARDS)}")
    found, used = {}, {}
    for name, like in _shapes(question).items():
        used[name] = towards or ("centre" if like.dim() == 4 else "end")
        axes = [_ramp(size, used[name]) for size in (like.shape[-2:] if like.dim() == 4 else (*like.shape, 1, 1)[1:2])]
        relevance = axes[0] if len(axes) == 1 else (axes[0][:, None] + axes[1]) / 2
        if len(axes) == 1:
            relevance = relevance.reshape(-1, *[1] * max(0, like.dim() - 2))
        found[name] = relevance.expand(like.shape).clone()
    return Answer(found, {"towards": used}, (CONTROL,))


def _ramp(size: int, towards: str) -> Tensor:
    """[size] in float64, rising to 1 at one end or in the middle."""
    places = torch.arange(1, size + 1, dtype=torch.float64)
    if towards == "centre":
        places = torch.minimum(places, places.flip(0))
    return (places if towards != "start" else places.flip(0)) / places.max()


def _shapes(question: Question) -> dict[str, Tensor]:
    """A tensor of each attributed input's shape: [B, S] for token ids."""
    return {name: value[..., 0] if name in question.indices else value for name, value in question.entrances().items()}


METHODS: dict[str, Callable[..., Answer]] = {
    "integrated-gradients": gradient_methods.integrated_gradients,
    "layer-integrated-gradients": gradient_methods.layer_integrated_gradients,
    "layer-gradient-x-activation": gradient_methods.layer_gradient_x_activation,
    "shapley-sampling": perturbation_methods.shapley_sampling,
    "kernel-shap": perturbation_methods.kernel_shap,
    "lime": perturbation_methods.lime,
    "feature-ablation": perturbation_methods.feature_ablation,
    "occlusion": perturbation_methods.occlusion,
    "attention": attention_methods.attention,
    "rollout": attention_methods.rollout,
    "flow": attention_methods.flow,
    "chefer": attention_methods.chefer,
    "value-zeroing": attention_methods.value_zeroing,
    "gradient-norm": gradient_methods.gradient_norm,
    "random": random,
    "position": position,
}


def options_of(method: str) -> dict[str, bool]:
    """The options of a method, and whether each must be given."""
    parameters = inspect.signature(METHODS[method]).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


def answer(method: str, question: Question, options: Mapping[str, Any]) -> Answer:
    """What a method says.

    Raises:
        InputError: an option that this method has not, or one missing that it needs.
    """
    check_options(method, options, options_of(method))
    return METHODS[method](question, **options)


def check_options(method: str, given: Mapping[str, Any], allowed: Mapping[str, bool]) -> None:
    """Raises InputError for an option that is not allowed, or not given but needed."""
    for name in given:
        if name not in allowed:
            choice = f"it has {', '.join(allowed)}" if allowed else "it has none"
            raise InputError(f"{method} has no option {name!r}: {choice}")
    for name, needed in allowed.items():
        if needed and name not in given:
            raise InputError(f"{method} needs {name}=")
