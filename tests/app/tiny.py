"""A random little Llama with a tokenizer that has hostile tokens, saved as an ordinary folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HOSTILE = (
    "<script>document.body.dataset.hacked='yes'</script>",
    "</s>",
    "<b>",
    "<br>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=\"document.body.dataset.hacked='yes'\">",
    '<span style="background:url(http://192.0.2.1/x)">',
    "javascript:alert(1)",
    "&lt;b&gt;",
    "{{7*7}}",
    "\u202egnp.exe",
    "\u200b",
    "\n\n",
    "\t",
    "\x1b[31m",
    "\u0301",
    "=1+1",
    "![x](http://192.0.2.1/y)",
)


def save_tiny(folder: Path, *, layers: int = 6, heads: int = 8, groups: int = 4, seed: int = 0, window: int = 256) -> Path:
    """A Llama of 6 layers × 8 heads (4 kv heads) over 300 tokens: 256 bytes, the hostile ones, padding to 300."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in HOSTILE])
    tokenizer.add_tokens([AddedToken(f"<unused{place}>", normalized=False) for place in range(300 - tokenizer.get_vocab_size())])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16 * heads,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=window,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder
