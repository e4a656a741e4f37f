"""Models as TransformerLens 4 wraps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.entry import Entry, Inputs, tokens


def native() -> tuple[nn.Module, Inputs]:
    """TransformerLens' own small transformer."""
    from transformer_lens.model_bridge.sources.native import boot

    config: dict[str, Any] = dict(
        d_model=32, d_head=8, n_heads=4, n_layers=2, n_ctx=32, d_vocab=64, d_mlp=48, act_fn="gelu", seed=0, initializer_range=0.02
    )
    return boot(config), {"input": tokens()}


def bridged(prefix: str, **config: Any) -> tuple[nn.Module, Inputs]:
    """A transformers model inside a TransformerBridge."""
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    settings = getattr(transformers, f"{prefix}Config")(**config, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    name = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    settings._attn_implementation = "eager"  # as its own `boot_transformers` does
    model = getattr(transformers, name)(settings)
    return build_bridge_from_module(model, name, hf_config=settings), {"input": tokens()}


def cached_patterns(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """`hook_pattern` of every block, from TransformerLens' own cache."""
    with torch.no_grad():
        lens: Any = model
        _, cache = lens.run_with_cache(inputs["input"])
    return [cache[f"blocks.{i}.attn.hook_pattern"] for i in range(2)]


LLAMA: dict[str, Any] = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
GPT2: dict[str, Any] = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
REQUIRES = ("transformer_lens",)

ENTRIES = [
    Entry("TransformerLens native", "TransformerLens", native, 2, cached_patterns, REQUIRES),
    Entry("TransformerBridge of Llama (GQA)", "TransformerLens", lambda: bridged("Llama", **LLAMA), 2, cached_patterns, REQUIRES),
    Entry("TransformerBridge of GPT-2", "TransformerLens", lambda: bridged("GPT2", **GPT2), 2, cached_patterns, REQUIRES),
]
