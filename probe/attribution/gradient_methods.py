"""Attribution by gradients: along a path from a baseline, at a layer, and their length. Paths and layers are Captum's.

Letters: B batch, S tokens, E width of the embedding.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.attribution.question import Answer, Question, at_least, needs
from headscope.probe.attribution.target import Target, one_number
from headscope.probe.attribution.value import neutral_token

Ways = dict[str, Tensor]  # into the model, or relevance there, by name
BASELINES = ("zero", "mean", "token")
LOOSE = 0.05  # of the difference that integrated gradients should add up to: beyond it, a warning


def integrated_gradients(
    question: Question, *, steps: int = 50, baseline: str | None = None, replacement: int | None = None, batch: int = 32
) -> Answer:
    """Gradients along the straight line from a baseline to the input, times their difference (Sundararajan et al. 2017).

    Text is attributed at its embeddings, images at their pixels; the sum is the target's value minus that at the baseline, up to an
    error that falls with the number of steps.

    Args:
        question: what is asked.
        steps: points on the line, by Gauss-Legendre quadrature.
        baseline: `token` (a neutral one at every position), by default for text; `zero`, by default for all else; `mean` (of the sample's
            tokens, or of the image's pixels by channel). Where a model divides by the root mean square of its embeddings, zero is a
            point of discontinuity, and the sum then misses the difference however many steps there are.
        replacement: id of that token; by default as in `Value`.
        batch: samples run together.
    """
    at_least(1, steps=steps, batch=batch)
    captum = needs("captum.attr", "integrated-gradients")

    def explain(sample: Question, whole: Ways, start: Ways) -> Ways:
        found = captum.IntegratedGradients(_forward(sample, whole)).attribute(
            tuple(whole.values()), baselines=tuple(start.values()), n_steps=steps, internal_batch_size=_together(sample, batch)
        )
        return {name: r.sum(-1).detach() if name in sample.indices else r.detach() for name, r in zip(whole, found, strict=True)}

    found, settings, warnings = _along_a_line(question, explain, baseline, replacement)
    return Answer(found, {"steps": steps, **settings}, warnings)


def layer_integrated_gradients(
    question: Question, *, layer: str, steps: int = 50, baseline: str | None = None, replacement: int | None = None, batch: int = 32
) -> Answer:
    """Integrated gradients at what a module gives out, between its output for the baseline and for the input.

    Args:
        question, steps, baseline, replacement, batch: as in `integrated_gradients`.
        layer: path of the module.
    """
    at_least(1, steps=steps, batch=batch)
    captum, module = needs("captum.attr", "layer-integrated-gradients"), _module(question, layer)

    def explain(sample: Question, whole: Ways, start: Ways) -> Ways:
        found = captum.LayerIntegratedGradients(_forward(sample, whole), module).attribute(
            tuple(whole.values()), baselines=tuple(start.values()), n_steps=steps, internal_batch_size=_together(sample, batch)
        )
        return {layer: _over_width(found)}

    found, settings, warnings = _along_a_line(question, explain, baseline, replacement)
    return _at_layer(layer, found, {"steps": steps, **settings}, warnings)


def layer_gradient_x_activation(question: Question, *, layer: str) -> Answer:
    """What a module gives out times its gradient.

    Args:
        question: what is asked.
        layer: path of the module.
    """
    captum = needs("captum.attr", "layer-gradient-x-activation")
    whole = {name: value.clone().requires_grad_() for name, value in question.entrances().items()}
    method = captum.LayerGradientXActivation(_forward(question, whole), _module(question, layer))
    return _at_layer(layer, {layer: _over_width(method.attribute(tuple(whole.values())))}, {}, ())


def gradient_norm(question: Question) -> Answer:
    """The length of the gradient: of each token's embedding, of each element of a floating-point input (Simonyan et al. 2014)."""
    whole = {name: value.clone().requires_grad_() for name, value in question.entrances().items()}
    gradients = torch.autograd.grad(one_number(question.values(whole).sum()), list(whole.values()), allow_unused=True)
    found = {}
    for (name, value), gradient in zip(whole.items(), gradients, strict=True):
        gradient = torch.zeros_like(value) if gradient is None else gradient
        found[name] = gradient.norm(dim=-1) if name in question.indices else gradient.abs()
    return Answer(found, {}, ("a length has no sign: this tells what matters, not in which direction",))


# -- what they share --------------------------------------------------------------------------------------------------


def _along_a_line(
    question: Question, explain: Callable[[Question, Ways, Ways], Ways], baseline: str | None, replacement: int | None
) -> tuple[Ways, dict[str, object], tuple[str, ...]]:
    """Each sample explained against its baseline, and how far the sums are from the difference they should be."""
    samples = [one.resolved() for one in question.samples()] if isinstance(question.scalar, Target) else [question]
    rows, expected, below, total = [], 0.0, 0.0, 0.0
    whole: Ways = {}
    for sample in samples:
        whole = sample.entrances()
        start = _start(sample, whole, baseline, replacement)
        rows.append(explain(sample, whole, start))
        with torch.no_grad():
            above, at_start = (float(sample.values(x).sum(dtype=torch.float64)) for x in (whole, start))
        below, expected = below + at_start, expected + above - at_start
        total += sum(float(r.sum(dtype=torch.float64)) for r in rows[-1].values())
    delta = total - expected
    used = baseline or ("token" if any(name in question.indices for name in whole) else "zero")
    settings: dict[str, object] = {"baseline": used, "value_at_baseline": below, "completeness_delta": delta}
    warnings: tuple[str, ...] = ()
    if abs(delta) > LOOSE * max(abs(expected), 1e-12):
        words = f"relevance sums to {total:.4g}, but the target is {expected:.4g} above the baseline: give more steps, or another baseline"
        warnings = (words,)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}, settings, warnings


def _forward(question: Question, ways: Ways) -> Callable[..., Tensor]:
    names = list(ways)

    def forward(*values: Tensor) -> Tensor:
        return question.values(dict(zip(names, values, strict=True)))

    return forward


def _together(question: Question, batch: int) -> int:
    """Points that Captum may run at once, in copies of the batch: one where the target is a function of the whole output."""
    return batch if isinstance(question.scalar, Target) else question.batch


def _start(question: Question, whole: Ways, baseline: str | None, replacement: int | None) -> Ways:
    """Where the line to the input begins."""
    if baseline is not None and baseline not in BASELINES:
        raise SelectionError(f"no baseline {baseline!r}: there are {', '.join(BASELINES)}")
    found = {}
    for name, value in whole.items():
        text = name in question.indices
        if baseline == "zero" or (baseline is None and not text):
            found[name] = torch.zeros_like(value)
        elif baseline == "mean":
            dims = list(range(2, value.dim())) if value.dim() > 3 else [1]  # of an image its pixels, of a sequence its positions
            found[name] = value.mean(dims, keepdim=True).expand_as(value).clone() if value.dim() > 1 else value
        elif text:
            id = neutral_token(question.tokenizer, question.model) if replacement is None else replacement
            found[name] = question.embedding(name, torch.full_like(question.inputs[name], id))
        else:
            raise InputError(f"{name} has no tokens: choose the baseline zero or mean")
    return found


def _module(question: Question, layer: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(question.model.named_modules())
    if layer not in modules or not layer:
        near = difflib.get_close_matches(layer, modules, 4, 0.3)
        raise SelectionError(f"no module {layer!r} in {type(question.model).__name__}{': near are ' + ', '.join(near) if near else ''}")
    if isinstance(modules[layer], nn.Embedding):
        raise SelectionError(f"{layer} is an embedding, where relevance is that of the input: choose integrated-gradients")
    return modules[layer]


def _over_width(found: Any) -> Tensor:
    """[B, S] of what Captum found at a module: the first of several outputs, summed over its width."""
    while isinstance(found, tuple | list):
        found = found[0]
    relevance: Tensor = found.detach()
    return relevance.sum(-1) if relevance.dim() > 2 else relevance


def _at_layer(layer: str, found: Ways, settings: dict[str, object], warnings: tuple[str, ...]) -> Answer:
    """Relevance at a module: among the blocks where its path ends in a number, else among their parts."""
    words = (f"relevance is at the output of {layer}, whose positions have seen others: it is not that of the input", *warnings)
    block = re.search(r"(^|\.)\d+$", layer) is not None
    return Answer({}, {"layer": layer, **settings}, words, blocks=found if block else {}, parts={} if block else found)
