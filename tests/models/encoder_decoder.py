"""Encoder-decoders of transformers: self-attention twice and cross-attention once a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models.entry import Entry, Inputs, tokens
from tests.models.reference import output_attentions


def pair(name: str, prefix: str, projections: tuple[str, ...], config: dict[str, Any], **options: Any) -> Entry:
    """A sequence-to-sequence model named by the prefix of its classes."""
    inputs_of = options.pop("inputs", lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(length=5)})
    model = options.pop("model", f"{prefix}ForConditionalGeneration")

    def make() -> tuple[nn.Module, Inputs]:
        import transformers

        return getattr(transformers, model)(getattr(transformers, f"{prefix}Config")(**config)), inputs_of()

    return Entry(
        name, "transformers", make, reference=output_attentions, requires=("transformers",), projections=projections,
        **{"expected_sites": 6, "generate": True, **options}
    )  # fmt: skip


BART: dict[str, Any] = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    forced_eos_token_id=None,
)  # fmt: skip
T5: dict[str, Any] = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8, pad_token_id=0, eos_token_id=2,
    decoder_start_token_id=0,
)  # fmt: skip
WHISPER: dict[str, Any] = dict(
    BART, num_mel_bins=8, max_source_positions=16, max_target_positions=32, decoder_start_token_id=1, suppress_tokens=None,
    begin_suppress_tokens=None,
)  # fmt: skip
LED: dict[str, Any] = dict(BART, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4)
LED.pop("max_position_embeddings")


def bart(prefix: str) -> tuple[str, ...]:
    """Output projections of BART-like models, in execution order."""
    encoder = [f"{prefix}encoder.layers.{i}.self_attn.out_proj" for i in range(2)]
    return (*encoder, *(f"{prefix}decoder.layers.{i}.{part}.out_proj" for i in range(2) for part in ("self_attn", "encoder_attn")))


T5_PROJECTIONS = (
    *(f"encoder.block.{i}.layer.0.SelfAttention.o" for i in range(2)),
    *(f"decoder.block.{i}.layer.{part}.o" for i in range(2) for part in ("0.SelfAttention", "1.EncDecAttention")),
)

ENTRIES = [
    pair("T5 (relative bias)", "T5", T5_PROJECTIONS, T5, tolerance=5e-6, note="scores are not scaled"),
    pair("BART", "Bart", bart("model."), BART),
    pair("Marian", "Marian", bart("model."), BART, model="MarianMTModel"),
    pair("Pegasus", "Pegasus", bart("model."), BART),
    pair("Whisper", "Whisper", bart("model."), WHISPER,
         inputs=lambda: {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens(length=5)}),
    pair("LED (block-sparse encoder)", "LED", (), LED, generate=False,
         refused="the encoder's self-attention is Longformer's, in overlapping chunks; the decoder alone would be caught"),
]  # fmt: skip
