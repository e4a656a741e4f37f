"""torch's own attention modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.entry import Entry, Inputs
from tests.models.reference import fused_calls

WIDTH, HEADS = 32, 4


def attention(needs_weights: bool) -> tuple[nn.Module, Inputs]:
    """One nn.MultiheadAttention, asked for its weights or not."""
    x, y = torch.randn(2, 6, WIDTH), torch.randn(2, 9, WIDTH)
    inputs = {"query": x, "key": y, "value": y, "need_weights": needs_weights, "average_attn_weights": False}
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), inputs


def own_weights(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What the module returns as its weights, per head."""
    with torch.no_grad():
        return [model(**{**inputs, "need_weights": True})[1]]


def encoder(padded: bool) -> tuple[nn.Module, Inputs]:
    """nn.TransformerEncoder, which takes its opaque fast path without a gradient."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True)
    inputs: Inputs = {"src": torch.randn(2, 6, WIDTH)}
    if padded:
        inputs["src_key_padding_mask"] = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), inputs


def decoder() -> tuple[nn.Module, Inputs]:
    """nn.TransformerDecoder, causal, sequence first."""
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    return nn.TransformerDecoder(layer, 2), {"tgt": torch.randn(5, 2, WIDTH), "memory": torch.randn(7, 2, WIDTH), "tgt_mask": mask}


ENTRIES = [
    Entry("nn.MultiheadAttention", "torch.nn", lambda: attention(False), 1, own_weights, projections="out_proj"),
    Entry("nn.MultiheadAttention (need_weights)", "torch.nn", lambda: attention(True), 1, own_weights, projections="out_proj"),
    Entry("nn.TransformerEncoder (fast path)", "torch.nn", lambda: encoder(False), 2, fused_calls,
          projections="layers.{}.self_attn.out_proj", note="torch switches its fast path off while it is watched"),
    Entry("nn.TransformerEncoder (padding)", "torch.nn", lambda: encoder(True), 2, fused_calls, projections="layers.{}.self_attn.out_proj"),
    Entry("nn.TransformerDecoder (cross)", "torch.nn", decoder, 4, fused_calls,
          projections=tuple(f"layers.{i}.{part}.out_proj" for i in range(2) for part in ("self_attn", "multihead_attn"))),
]  # fmt: skip
