"""Small models with random weights for tests of the methods, in float64, and runs of them with torch's own hooks alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, GROUPS, WIDTH = 3, 4, 2, 8
EMBED = HEADS * WIDTH


def llama(seed: int = 0, groups: int = GROUPS) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=EMBED, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=groups,
        vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    return _louder(LlamaForCausalLM(config))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return _louder(GPT2LMHeadModel(GPT2Config(n_embd=EMBED, n_layer=LAYERS, n_head=HEADS, vocab_size=50, n_positions=32)))


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=EMBED, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=40, vocab_size=50, num_labels=3
    )
    return _louder(BertForSequenceClassification(config))


def _louder(model: Any) -> Any:
    """Weights so large that attention is far from uniform."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "wte" not in name and "embed" not in name:
            parameter.data *= 5
    return model.eval().double()


def prompts(*lengths: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 50, (1, length), generator=generator)} for length in lengths]


def last(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[V] or [C], after the last token."""
    with torch.no_grad():
        found = model(**inputs).logits
    return found[0, -1] if found.ndim == 3 else found[0]


def kl(before: Tensor, after: Tensor) -> float:
    """Σ p log(p / p'), one entry after the other."""
    p, q = before.exp() / before.exp().sum(), after.exp() / after.exp().sum()
    return sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))


def changed(model: nn.Module, change: Callable[[Any], None]) -> Any:
    """A copy of the model with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


def hooked(model: nn.Module, paths: list[str], change: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The logits with another output of some modules, by hooks of torch."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    handles = [model.get_submodule(path).register_forward_hook(hook) for path in paths]
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


def rows(head: int, width: int = WIDTH) -> slice:
    """The rows of a projection that belong to a head."""
    return slice(head * width, (head + 1) * width)
