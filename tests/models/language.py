"""Decoder-only language models of transformers, two layers of four heads each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.entry import Entry, Inputs, tokens
from tests.models.reference import fused_calls, output_attentions

SMALL: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED: dict[str, Any] = dict(SMALL, num_key_value_heads=2)
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=16)


def causal(
    name: str,
    prefix: str,
    projections: str | tuple[str, ...],
    *,
    base: dict[str, Any] = SMALL,
    model: str | None = None,
    **changes: Any,
) -> Entry:
    """A causal language model named by the prefix of its classes."""
    options = {key: changes.pop(key) for key in ("visible", "note", "tolerance", "slow", "generate", "reference") if key in changes}
    sites = changes.pop("expected_sites", 2)
    inputs_of = changes.pop("inputs", lambda: {"input_ids": tokens()})
    implementation = changes.pop("attn_implementation", None)

    def make() -> tuple[nn.Module, Inputs]:
        import transformers

        config = getattr(transformers, f"{prefix}Config")(**{**base, **changes})
        if implementation is not None:
            config._attn_implementation = implementation
        return getattr(transformers, model or f"{prefix}ForCausalLM")(config), inputs_of()

    return Entry(
        name, "transformers", make, sites, requires=("transformers",), projections=projections,
        **{"generate": True, "reference": output_attentions, **options},
    )


def padded_left() -> Inputs:
    """Two prompts, the first with three padding tokens in front."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real_tokens(inputs: Inputs) -> Tensor:
    """Which queries are not padding, [B, Q]."""
    mask: Tensor = inputs["attention_mask"]
    return mask.bool()


LLAMA = "model.layers.{}.self_attn.o_proj"

ENTRIES = [
    causal("Llama (GQA)", "Llama", LLAMA, base=GROUPED),
    causal("Llama (eager)", "Llama", LLAMA, base=GROUPED, attn_implementation="eager"),
    causal("Llama (left padding)", "Llama", LLAMA, base=GROUPED, inputs=padded_left, visible=real_tokens),
    causal("Qwen2", "Qwen2", LLAMA, base=GROUPED),
    causal("Qwen3", "Qwen3", LLAMA, base=GROUPED, head_dim=16),
    causal("Mistral (SWA)", "Mistral", LLAMA, base=GROUPED, sliding_window=4),
    causal("Mixtral", "Mixtral", LLAMA, base=GROUPED, num_local_experts=4, num_experts_per_tok=2),
    causal("Gemma2 (softcap)", "Gemma2", LLAMA, base=GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0),
    causal("Gemma3 (SWA)", "Gemma3Text", LLAMA, base=GROUPED, model="Gemma3ForCausalLM", head_dim=8, sliding_window=4,
           layer_types=["sliding_attention", "full_attention"]),
    causal("GPT-OSS (sinks)", "GptOss", LLAMA, base=GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
           note="rows sum to less than 1: the sink takes the rest"),
    causal("GPT-2", "GPT2", "transformer.h.{}.attn.c_proj", model="GPT2LMHeadModel"),
    causal("GPT-NeoX", "GPTNeoX", "gpt_neox.layers.{}.attention.dense"),
    causal("GPT-J", "GPTJ", "transformer.h.{}.attn.out_proj", base=dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64,
           rotary_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    causal("Falcon (MQA)", "Falcon", "transformer.h.{}.self_attention.dense", reference=fused_calls),
    causal("Bloom (ALiBi)", "Bloom", "transformer.h.{}.self_attention.dense", base=dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4,
           pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    causal("MPT (ALiBi)", "Mpt", "transformer.blocks.{}.attn.out_proj", base=dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4,
           max_seq_len=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    causal("OPT", "OPT", "model.decoder.layers.{}.self_attn.out_proj", ffn_dim=48, word_embed_proj_dim=32),
    causal("Phi", "Phi", "model.layers.{}.self_attn.dense"),
    causal("Phi-3", "Phi3", LLAMA, base=GROUPED),
    causal("DeepSeek-V3 (MLA)", "DeepseekV3", LLAMA, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1,
           n_shared_experts=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
           num_key_value_heads=4, note="24 wide keys, 12 wide values"),
    causal("Cohere", "Cohere", LLAMA, base=GROUPED),
    causal("OLMo-2", "Olmo2", LLAMA, base=GROUPED),
    causal("StarCoder2", "Starcoder2", LLAMA, base=GROUPED),
    causal("GPT-BigCode (MQA)", "GPTBigCode", "transformer.h.{}.attn.c_proj"),
    causal("Qwen3-Next (hybrid)", "Qwen3Next", ("model.layers.1.self_attn.o_proj"), base=GROUPED, **EXPERTS, expected_sites=1, head_dim=8,
           num_experts=4, shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
           linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], note="the linear-attention layer is no site"),
    causal("GPT-Neo (local)", "GPTNeo", "transformer.h.{}.attn.attention.out_proj", base=dict(vocab_size=64, hidden_size=32, num_layers=2,
           num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=64, pad_token_id=0,
           bos_token_id=1, eos_token_id=2)),
    causal("CodeGen", "CodeGen", "transformer.h.{}.attn.out_proj", base=dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64,
           rotary_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    causal("XLNet", "XLNet", (), base=dict(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48), model="XLNetLMHeadModel",
           generate=False, note="the output map is an einsum with a [E, H, D] parameter"),
]
