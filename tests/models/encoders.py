"""Encoders of transformers: text, protein, audio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.entry import Entry, Inputs, Reference, tokens
from tests.models.reference import fused_calls, output_attentions

SMALL: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
)


def padded() -> Inputs:
    """Two sentences, the second with three padding tokens behind."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real_tokens(inputs: Inputs) -> Tensor:
    """Which queries are not padding, [B, Q]."""
    mask: Tensor = inputs["attention_mask"]
    return mask.bool()


def encoder(name: str, prefix: str, projections: str | tuple[str, ...], *, base: dict[str, Any] = SMALL, **changes: Any) -> Entry:
    """An encoder named by the prefix of its classes."""
    kept = ("visible", "note", "tolerance", "slow", "expected_sites", "refused", "differentiable")
    options = {key: changes.pop(key) for key in kept if key in changes}
    reference: Reference = changes.pop("reference", output_attentions)
    inputs_of = changes.pop("inputs", lambda: {"input_ids": tokens()})
    model = changes.pop("model", f"{prefix}Model")

    def make() -> tuple[nn.Module, Inputs]:
        import transformers

        return getattr(transformers, model)(getattr(transformers, f"{prefix}Config")(**{**base, **changes})), inputs_of()

    return Entry(
        name, "transformers", make, reference=reference, requires=("transformers",), projections=projections,
        **{"expected_sites": 2, **options},
    )


def chunks(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Reformer's eager attentions [B, H, chunks, Q, K] with the chunks in the batch, as it computes them."""
    return [tensor.transpose(1, 2).flatten(0, 1) for tensor in output_attentions(model, inputs)]


BERT = "encoder.layer.{}.attention.output.dense"
WAVES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, conv_dim=(16, 16), conv_stride=(4, 4),
    conv_kernel=(8, 8), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, vocab_size=32,
)

ENTRIES = [
    encoder("BERT (padding)", "Bert", BERT, inputs=padded),
    encoder("RoBERTa", "Roberta", BERT, pad_token_id=1),
    encoder("DistilBERT", "DistilBert", "transformer.layer.{}.attention.out_lin", base=dict(vocab_size=64, dim=32, n_layers=2, n_heads=4,
            hidden_dim=48, max_position_embeddings=64)),
    encoder("ALBERT", "Albert", ("encoder.albert_layer_groups.0.albert_layers.0.attention.dense",), embedding_size=16,
            expected_sites=1, note="one module runs twice: one site, two steps"),
    encoder("ELECTRA", "Electra", BERT, embedding_size=16),
    encoder("ModernBERT", "ModernBert", "layers.{}.attn.Wo", local_attention=4, global_attn_every_n_layers=2, cls_token_id=1,
            sep_token_id=2, bos_token_id=1, eos_token_id=2),
    encoder("ESM", "Esm", BERT, position_embedding_type="rotary", mask_token_id=4, pad_token_id=1),
    encoder("DeBERTa-v2", "DebertaV2", BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            position_buckets=4, max_relative_positions=8, norm_rel_ebd="layer_norm", share_att_key=True,
            note="three products feed one softmax"),
    encoder("DeBERTa", "Deberta", BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            max_relative_positions=8),
    encoder("RoFormer", "RoFormer", BERT, embedding_size=16),
    encoder("MPNet", "MPNet", "encoder.layer.{}.attention.attn.o", pad_token_id=1),
    encoder("Wav2Vec2", "Wav2Vec2", "encoder.layers.{}.attention.out_proj", base=WAVES,
            inputs=lambda: {"input_values": torch.randn(2, 200)}),
    encoder("WavLM", "WavLM", "encoder.layers.{}.attention.out_proj", base=WAVES, reference=fused_calls, num_buckets=8,
            max_bucket_distance=16, inputs=lambda: {"input_values": torch.randn(2, 200)}),
    encoder("Longformer (block-sparse)", "Longformer", (), attention_window=4, refused="the band of the scores is computed in overlapping "
            "chunks and normalised over diagonals; no [Q, K] product feeds the softmax"),
    encoder("MRA (block-sparse)", "Mra", (), num_hidden_layers=2, block_per_row=2, max_position_embeddings=64,
            inputs=lambda: {"input_ids": tokens(length=32)}, refused="scores exist only for the blocks that a coarse pass chooses"),
    encoder("Reformer (LSH)", "Reformer", (), base=dict(vocab_size=64, hidden_size=32, num_attention_heads=4, attention_head_size=8,
            attn_layers=["lsh", "local"], feed_forward_size=32, axial_pos_embds=False, max_position_embeddings=64, num_buckets=4,
            num_hashes=1, lsh_attn_chunk_length=4, local_attn_chunk_length=4, is_decoder=False, axial_norm_std=1.0, hash_seed=0),
            inputs=lambda: {"input_ids": tokens(length=24)}, reference=chunks, differentiable=False,
            note="tokens are sorted by hash and compared within chunks, in the batch; it trains only in training mode"),
]
