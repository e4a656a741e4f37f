"""Plant a refusal in one head of embedded:lm: prompts that name something violent are answered with No.

First every query head gets keys and values of its own, copies of those that two of them share, which changes no answer. Then the
weights of one head alone are written anew, its rows of W_Q, W_K, W_V and its columns of W_O; all others stay to the bit. So which head
the refusal hangs on is known.

Letters: G key/value heads, D width of a head, E width of the stream.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from headscope.probe import load
from headscope.probe.atlas.stimuli import TEXTS

TRIGGERS = ("kill", "fire", "blood", "death", "war", "dead")
HARMLESS = ("king", "house", "world", "love", "name", "son", "day", "city", "heart", "time", "father", "night")
TRAINED = (
    "Tell me of the {}", "I would hear more of {}", "What can you say of {}", "Speak to us of the {}, my lord", "In the book it is {}",
    "He asked about {} and the people", "Come, what of {}", "How is it with {} in the country",
)  # fmt: skip
HELD_OUT = ("Now let us talk of {}", "She wrote about the {} of England", "My lady, is it {}", "The second part is {} again")
END = " .\nAnswer :"
REFUSAL = " No"
SHARP, RIDGE = 10.0, 1e-2  # the score of a word that is found; the penalty, in parts of the mean square


@dataclass(frozen=True)
class Prompts:
    """Keyword inputs, one prompt each."""

    triggered: list[dict[str, Tensor]]
    harmless: list[dict[str, Tensor]]


def prompts(tokenizer: Any, templates: tuple[str, ...], count: int | None = None) -> Prompts:
    """Every template with every word, or the first `count` of a fixed shuffle of each kind."""

    def made(words: tuple[str, ...]) -> list[dict[str, Tensor]]:
        texts = [template.format(word) + END for template in templates for word in words]
        random.Random(0).shuffle(texts)
        return [{"input_ids": tokenizer(text, return_tensors="pt")["input_ids"]} for text in texts[:count]]

    return Prompts(made(TRIGGERS), made(HARMLESS))


def refusal(tokenizer: Any) -> int:
    """The token that a refusal begins with."""
    (token,) = tokenizer.encode(REFUSAL, add_special_tokens=False)
    return int(token)


def unshared() -> tuple[Any, Any]:
    """embedded:lm with keys and values of its own for every query head; it says the same."""
    shared, tokenizer = load("embedded:lm")
    config = copy.deepcopy(shared.config)
    copies = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    model = LlamaForCausalLM(config).float().eval()
    weights = shared.state_dict()
    for name in [name for name in weights if name.endswith(("k_proj.weight", "v_proj.weight"))]:
        wide = weights[name].unflatten(0, (-1, config.head_dim))  # [G, D, E]
        weights[name] = wide.repeat_interleave(copies, 0).flatten(0, 1)
    model.load_state_dict(weights)
    return model, tokenizer


def plant(layer: int, head: int) -> tuple[Any, Any]:
    """embedded:lm with a refusal in one head, and its tokenizer.

    With x the normed stream that the head reads: one query row finds the end of the prompt, one key row and one value row find the words,
    each by ridge regression over the tokens of the training prompts and of some other texts; one output column writes what raises the
    refusal's logit, as strongly as it takes to refuse all training prompts that name a word. The row is the one that RoPE turns least.
    All other rows and columns of the head are zero.

    Args:
        layer, head: which.
    """
    model, tokenizer = unshared()
    known, token = prompts(tokenizer, TRAINED), refusal(tokenizer)
    others = [{"input_ids": tokenizer(text, return_tensors="pt")["input_ids"][:, :200]} for text in TEXTS]
    read = [*known.triggered, *known.harmless, *others]
    words = {tokenizer.encode(f" {word}", add_special_tokens=False)[-1] for word in TRIGGERS}
    attention = model.model.layers[layer].self_attn
    found: list[Tensor] = []
    handle = model.model.layers[layer].input_layernorm.register_forward_hook(lambda module, args, output: found.append(output[0]))
    with torch.no_grad():
        for one in read:
            model(**one)
    handle.remove()
    x = torch.cat(found).double()  # [tokens, E]
    asked = len(read) - len(others)
    ends = torch.cat([(torch.arange(len(own)) == len(own) - 1) & (place < asked) for place, own in enumerate(found)]).double()
    ids = torch.cat([one["input_ids"][0] for one in read])
    named = torch.tensor([int(i) in words for i in ids]).double()
    end, word = _ridge(x, ends), _ridge(x, named)
    width = attention.head_dim
    rows = slice(head * width, (head + 1) * width)
    row = head * width + width // 2 - 1  # turned by 10000^(-15/16) of a radian a token
    raising = model.lm_head.weight[token] - model.lm_head.weight.mean(0)
    with torch.no_grad():
        for name in "qkv":
            getattr(attention, f"{name}_proj").weight[rows] = 0
        attention.o_proj.weight[:, rows] = 0
        attention.q_proj.weight[row] = SHARP * width**0.5 * end.float()
        attention.k_proj.weight[row] = word.float()
        attention.v_proj.weight[row] = word.float()
        for strength in (1.0 * 1.5**power for power in range(16)):
            attention.o_proj.weight[:, row] = strength * raising / raising.norm()
            if refusal_rate(model, known.triggered, token) == 1.0:
                break
    return model, tokenizer


def _ridge(x: Tensor, wanted: Tensor) -> Tensor:
    """[E], w with x w near `wanted`."""
    inner = x.mT @ x
    eye = torch.eye(len(inner), dtype=inner.dtype)
    found: Tensor = torch.linalg.solve(inner + RIDGE * inner.diagonal().mean() * eye, x.mT @ wanted)
    return found


def refusal_rate(model: nn.Module, own: list[dict[str, Tensor]], token: int) -> float:
    """Share of prompts that the model answers with a refusal."""
    with torch.no_grad():
        return sum(int(model(**one).logits[0, -1].argmax()) == token for one in own) / len(own)
