"""Whole networks: relevance carried back layer by layer in its own terms, and AttnLRP as its authors' efficient rules have it.

No code is shared with the package. Letters: B batch, S tokens, E width, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope.probe.attribution.attribute import attribute


def redraw(model: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + (parameter if parameter.dim() < 2 else 0))
    return model.eval().to(dtype)


# -- a block of attention and MLP ------------------------------------------------------------------------------------


class Block(nn.Module):
    """Embedding, pre-norm attention, gated MLP with biases, head; written plainly."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.embed = nn.Embedding(11, 6)
        self.norm1, self.norm2 = nn.RMSNorm(6, eps=1e-6), nn.LayerNorm(6)
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (2, 3)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.fused:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            z = (q @ k.mT / math.sqrt(3)).masked_fill(hidden, float("-inf")).softmax(-1) @ v
        x = x + self.o(z.transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        out: Tensor = self.head(x)
        return out


def back_linear(x: Tensor, m: nn.Linear, r: Tensor) -> tuple[Tensor, Tensor]:
    """R of the rows of x, and what the bias kept."""
    y = x @ m.weight.T + m.bias
    return torch.einsum("si,ji,sj->si", x, m.weight, r / y), (m.bias / y * r).sum()


def back_block(model: Block, ids: Tensor, position: int, token: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """R of each token's embedding [S, E], of each head's z [H, S, D], and what was absorbed, by kind."""
    with torch.no_grad():
        kept: dict[str, Tensor] = dict.fromkeys(("bias", "softmax", "norm shift"), torch.zeros((), dtype=torch.float64))
        x0 = model.embed.weight[ids]  # [S, E]
        h1 = x0 / (x0.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm1.weight
        q, k, v = (h1 @ m.weight.T + m.bias for m in (model.q, model.k, model.v))
        length = len(ids)
        visible = torch.ones(length, length).tril().bool()
        z = torch.zeros_like(q)
        for h in range(2):
            c = slice(3 * h, 3 * h + 3)
            z[:, c] = (q[:, c] @ k[:, c].T / math.sqrt(3)).masked_fill(~visible, float("-inf")).softmax(-1) @ v[:, c]
        attended = z @ model.o.weight.T + model.o.bias
        x1 = x0 + attended
        mean, sigma = x1.mean(-1, keepdim=True), (x1.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h2 = (x1 - mean) / sigma * model.norm2.weight + model.norm2.bias
        gate, up = h2 @ model.gate.weight.T + model.gate.bias, h2 @ model.up.weight.T + model.up.bias
        hidden = gate * torch.sigmoid(gate) * up
        added = hidden @ model.down.weight.T + model.down.bias
        x2 = x1 + added
        logits = x2 @ model.head.weight.T + model.head.bias

        r = torch.zeros_like(logits)
        r[position, token] = logits[position, token]

        def book(kind: str, amount: Tensor) -> None:
            kept[kind] = kept[kind] + amount

        r2, lost = back_linear(x2, model.head, r)
        book("bias", lost)
        rm = added / x2 * r2
        r1 = x1 / x2 * r2
        rh, lost = back_linear(hidden, model.down, rm)
        book("bias", lost)
        rg, lost = back_linear(h2, model.gate, rh / 2)
        book("bias", lost)
        ru, lost = back_linear(h2, model.up, rh / 2)
        book("bias", lost)
        rn = rg + ru
        matrix = (torch.eye(6, dtype=torch.float64) - 1 / 6)[None] * model.norm2.weight[None, :, None] / sigma[:, :, None]  # [S, out, in]
        r1 = r1 + torch.einsum("si,sji,sj->si", x1, matrix, rn / h2)
        book("norm shift", (model.norm2.bias / h2 * rn).sum())
        ra, r0 = attended / x1 * r1, x0 / x1 * r1
        rz, lost = back_linear(z, model.o, ra)
        book("bias", lost)
        rq, rk, rv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for h in range(2):
            c = slice(3 * h, 3 * h + 3)
            s = q[:, c] @ k[:, c].T / math.sqrt(3)
            p = s.masked_fill(~visible, float("-inf")).softmax(-1)
            unit = rz[:, c] / z[:, c]
            rv[:, c] = v[:, c] * (p.T @ unit) / 2
            rp = p * (unit @ v[:, c].T) / 2
            rs = torch.where(visible, s * (rp - p * rp.sum(-1, keepdim=True)), 0.0)
            book("softmax", rp.sum() - rs.sum())
            parts = torch.where(visible[:, :, None], q[:, None, c] * k[None, :, c] / math.sqrt(3) / s[:, :, None] * rs[:, :, None] / 2, 0.0)
            rq[:, c], rk[:, c] = parts.sum(1), parts.sum(0)
        for part, m in ((rq, model.q), (rk, model.k), (rv, model.v)):
            back, lost = back_linear(h1, m, part)
            book("bias", lost)
            r0 = r0 + back  # the RMS norm hands relevance through
    return r0, rz.unflatten(-1, (2, 3)).transpose(0, 1), kept


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_block_agrees_with_relevance_carried_back_layer_by_layer(fused: bool, seed: int) -> None:
    model = redraw(Block(fused), seed=seed)
    ids = torch.randint(0, 11, (5,), generator=torch.Generator().manual_seed(seed))
    result = attribute(model, {"input_ids": ids[None]}, 4)
    tokens, z, kept = back_block(model, ids, -1, 4)
    scale = float(tokens.abs().max())
    assert (result.inputs["input_ids"][0] - tokens.sum(-1)).abs().max() < 1e-9 * max(1.0, scale)
    (heads,) = result.heads.values()
    assert (heads[0] - z.sum(-1)).abs().max() < 1e-9 * max(1.0, scale)
    assert result.ledger is not None
    found = result.ledger.by_kind()
    assert set(found) == set(kept)
    for kind, amount in kept.items():
        assert abs(found[kind] - float(amount)) < 1e-9 * max(1.0, scale), kind
    assert result.ledger.closes


# -- AttnLRP as plain gradients --------------------------------------------------------------------------------------


def halved(x: Tensor, by: float) -> Tensor:
    """x, with its gradient divided."""
    return x / by + (x - x / by).detach()


def settled(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), with the gradient f(x) / x."""
    y = f(x).detach()
    return x * (y / x.detach())


def twin_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    """Plain attention whose operands' gradients are divided by 4, 4 and 2: half for each of the two products that they go through."""
    q, k, v = halved(query, 4), halved(key, 4), halved(value, 2)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scaling = options.get("scaling")
    scores = q @ k.mT * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if options.get("sliding_window") is not None:
        visible &= ~torch.ones_like(visible).tril(-options["sliding_window"])
    pattern = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (pattern @ v).transpose(1, 2).contiguous(), pattern


def rms(self: Any, x: Tensor) -> Tensor:
    eps = getattr(self, "variance_epsilon", None) or self.eps
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps).detach()
    gain = 1 + self.weight if "Gemma" in type(self).__name__ else self.weight
    return x * inverse * gain


def layer_norm(self: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().detach() * self.weight + self.bias


def gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(halved(settled(self.act_fn, self.gate_proj(x)) * self.up_proj(x), 2))  # type: ignore[no-any-return]


@contextmanager
def efficient_rules(model: Any) -> Iterator[None]:
    """The rules on this one model's modules."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    changed = []
    for module in model.modules():
        name = type(module).__name__
        rule: Any = rms if "RMSNorm" in name else layer_norm if name == "LayerNorm" else None
        if hasattr(module, "gate_proj"):
            rule = gated
        if rule is None and "GELU" in name:
            plain = module.forward
            rule = lambda self, x, plain=plain: settled(plain, x)  # noqa: E731
        if rule is not None:
            module.forward = MethodType(rule, module)
            changed.append(module)
    ALL_ATTENTION_FUNCTIONS["twin"] = twin_attention
    before = model.config._attn_implementation
    model.config._attn_implementation = "twin"
    try:
        yield
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS["twin"]
        for module in changed:
            del module.forward


def tiny(name: str) -> Any:
    import transformers as t

    common = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    configurations = {
        "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**common)),
        "Qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**common)),
        "Qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**common, head_dim=4)),
        "Gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**common, head_dim=4, sliding_window=4)),
        "GPT-2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
        ),
    }
    return redraw(configurations[name]())


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Gemma3", "GPT-2"])
def test_attnlrp_agrees_with_its_authors_efficient_rules(name: str) -> None:
    model = tiny(name)
    ids = torch.randint(0, 40, (1, 7), generator=torch.Generator().manual_seed(3))
    target = int(model(input_ids=ids).logits[0, -1].argmax())
    ours = attribute(model, {"input_ids": ids}, target)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with efficient_rules(model):
        # Gemma3 scales inside its embedding module, whose output is the leaf on both sides.
        value = model(inputs_embeds=embedded).logits[0, -1, target]
        (g,) = torch.autograd.grad(value, embedded)
    theirs = (embedded * g).sum(-1).detach()
    assert abs(float(value.detach()) - ours.value) < 1e-5 * max(1.0, abs(ours.value))
    assert float((ours.inputs["input_ids"] - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())
    assert ours.ledger is not None
    assert ours.ledger.closes
