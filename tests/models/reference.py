"""Patterns from somewhere else: what Headscope captures is compared with these, and none of them uses Headscope.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.entry import Inputs, Reference

__all__ = ["dense", "eager", "fused_calls", "output_attentions", "slow_path", "softmaxes"]


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """The model under transformers' own eager attention; its former implementation afterwards."""
    found = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "_attn_implementation")]
    configs = {id(config): (config, config._attn_implementation) for config in found}
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for config, value in configs.values():
            config._attn_implementation = value


def flatten(attentions: Any) -> list[Tensor]:
    """The tensors in a (nested) tuple of attentions, in order, without the gaps."""
    if attentions is None:
        return []
    if isinstance(attentions, Tensor):
        return [attentions]
    return [tensor for part in attentions for tensor in flatten(part)]


@torch.no_grad()
def output_attentions(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """transformers' eager `output_attentions`, in execution order: encoder, then per decoder layer self, cross."""
    with eager(model):
        output = model(**inputs, output_attentions=True)
    if output.get("decoder_attentions") is None:
        return flatten(output.get("encoder_attentions")) + flatten(output.get("attentions"))
    own, cross = flatten(output["decoder_attentions"]), flatten(output.get("cross_attentions"))
    decoder = [tensor for pair in zip(own, cross, strict=True) for tensor in pair] if cross else own
    return flatten(output.get("encoder_attentions")) + decoder


@contextmanager
def recorded_softmaxes(wanted: Callable[[Tensor], bool]) -> Iterator[list[Tensor]]:
    """The outputs of every softmax over the last axis that runs in the block."""
    seen: list[Tensor] = []
    depth = 0  # F.softmax calls Tensor.softmax: only the outer one counts

    def recording(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def softmax(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal depth
            depth += 1
            try:
                result = original(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0 and wanted(result):
                seen.append(result.detach().clone())
            return result

        return softmax

    with (
        mock.patch.object(F, "softmax", recording(F.softmax)),
        mock.patch.object(torch, "softmax", recording(torch.softmax)),
        mock.patch.object(Tensor, "softmax", recording(Tensor.softmax)),
    ):
        yield seen


def softmaxes(*, heads: int | None = None, wanted: Callable[[Tensor], bool] | None = None, set_eager: bool = True) -> Reference:
    """Every softmax of the model's own eager code over a [B, H, Q, K] tensor, or over [B·H, Q, K] where `heads` is given."""

    def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
        dimensions = 4 if heads is None else 3
        choose = wanted or (lambda tensor: tensor.ndim == dimensions)
        with torch.no_grad(), recorded_softmaxes(choose) as seen:
            if set_eager:
                with eager(model):
                    model(**inputs)
            else:
                model(**inputs)
        return seen if heads is None else [tensor.reshape(-1, heads, *tensor.shape[1:]) for tensor in seen]

    return run


def dense(q: Tensor, k: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """softmax(q·kᵀ·scale + mask) in float64, [B, H, Q, K]; q [B, H, Q, D], k [B, G, K, D]."""
    q, k = q.double(), k.double()
    if k.ndim == 4 and k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("...qd,...kd->...qk", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~ones.tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


@torch.no_grad()
def fused_calls(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The pattern of each `F.scaled_dot_product_attention`, densely from its arguments, and of each `F.multi_head_attention_forward`,
    from a second call that asks for the weights per head."""
    seen: list[Tensor] = []
    fused, composite = F.scaled_dot_product_attention, F.multi_head_attention_forward
    inside = False

    def recording_fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not inside:
            seen.append(dense(query, key, attn_mask, is_causal, scale).float())
        return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def recording_composite(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        nonlocal inside
        inside = True
        try:
            asked = inspect.signature(composite).bind(*args, **kwargs)
            asked.arguments.update(need_weights=True, average_attn_weights=False, is_causal=False)
            weights = composite(*asked.args, **asked.kwargs)[1]
            if weights is not None:
                seen.append(weights if weights.ndim == 4 else weights.unsqueeze(0))
            return composite(*args, **kwargs)
        finally:
            inside = False

    with (
        mock.patch.object(F, "scaled_dot_product_attention", recording_fused),
        mock.patch.object(F, "multi_head_attention_forward", recording_composite),
        slow_path(),
    ):
        model(**inputs)
    return seen


@contextmanager
def slow_path() -> Iterator[None]:
    """`nn.TransformerEncoder` and `nn.MultiheadAttention` without their opaque fused kernel."""
    former = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(former)
