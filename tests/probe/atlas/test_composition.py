"""Composition between heads, against dense matrices, TransformerLens and a planted induction circuit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, SelectionError
from headscope.probe import Keep, Probe
from headscope.probe.atlas.composition import compose_heads
from headscope.probe.atlas.weights import HeadWeights, head_weights
from headscope.probe.call import AttentionSite
from tests.models import ENTRIES

H, WIDTH, STREAM = 3, 4, 12
READS = {"q": "residual", "k": "residual", "v": "residual"}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site(layer: int | None, number: int, **changes: object) -> AttentionSite:
    found = AttentionSite(f"layers.{number}#0", f"layers.{number}", 0, layer, "self", H, 1, WIDTH, WIDTH, "sdpa")
    return found.named(**changes)  # type: ignore[arg-type]


def weights(number: int, *, layer: int | None = -1, **changes: object) -> HeadWeights:
    """Three query heads on one key and value head."""
    given: dict[str, object] = {
        "q": random(H, WIDTH, STREAM, seed=number), "k": random(1, WIDTH, STREAM, seed=number + 10),
        "v": random(1, WIDTH, STREAM, seed=number + 20), "o": random(H, WIDTH, STREAM, seed=number + 30), "reads": READS,
    }  # fmt: skip
    return HeadWeights(site(number if layer == -1 else layer, number), **{**given, **changes})  # type: ignore[arg-type]


def stack(*sites: HeadWeights) -> dict[str, HeadWeights]:
    return {one.site.name: one for one in sites}


def test_scores_are_those_of_the_dense_matrices_and_only_of_earlier_to_later_heads() -> None:
    given = [weights(number) for number in range(3)]
    found = compose_heads(stack(*given))
    for early in range(3):
        for late in range(3):
            for head in range(H):
                for other in range(H):
                    place = (early, head, late, other)
                    if early >= late:
                        assert all(math.isnan(float(found.of(kind)[place])) for kind in "qkv")
                        continue
                    first, second = given[early], given[late]
                    assert first.v is not None
                    assert first.o is not None
                    assert second.q is not None
                    assert second.k is not None
                    assert second.v is not None
                    assert second.o is not None
                    a = first.v[0].T @ first.o[head]
                    qk = second.q[other].T @ second.k[0]
                    for kind, b in (("q", qk), ("k", qk.T), ("v", second.v[0].T @ second.o[other])):
                        expected = float((a @ b).norm() / a.norm() / b.norm())
                        assert float(found.of(kind)[place]) == pytest.approx(expected, rel=1e-9)


def test_the_baseline_is_what_matrices_turned_at_random_against_each_other_have() -> None:
    stream = 40
    a, b = random(stream, 3, seed=0) @ random(3, stream, seed=1), random(stream, 2, seed=2) @ random(2, stream, seed=3)
    squares = []
    for seed in range(400):
        turn = torch.linalg.qr(random(stream, stream, seed=100 + seed)).Q
        squares.append(float((a @ turn @ b).norm() / a.norm() / b.norm()) ** 2)
    mean = sum(squares) / len(squares)
    spread = (sum((s - mean) ** 2 for s in squares) / len(squares) / len(squares)) ** 0.5
    assert abs(mean - 1 / stream) < 4 * spread
    assert compose_heads(stack(weights(0), weights(1))).baseline == pytest.approx(1 / STREAM**0.5)


def test_the_scale_of_the_norm_in_front_of_the_later_head_is_folded_unless_asked_not_to() -> None:
    gain = random(STREAM, seed=50)
    late = weights(1)
    assert late.q is not None
    scaled = compose_heads(stack(weights(0), weights(1, q_gain=gain)))
    assert torch.allclose(scaled.q, compose_heads(stack(weights(0), weights(1, q=late.q * gain))).q, equal_nan=True)
    plain = compose_heads(stack(weights(0), late))
    assert torch.equal(compose_heads(stack(weights(0), weights(1, q_gain=gain)), fold=False).q.nan_to_num(), plain.q.nan_to_num())
    assert not torch.allclose(scaled.q, plain.q, equal_nan=True)


def test_sites_without_weights_are_left_out_with_a_reason_and_layers_decide_what_is_earlier() -> None:
    broken = weights(1, o=None, reasons={"o": "it is gated"})
    latent = weights(2, reads={**READS, "k": "latent"})
    found = compose_heads(stack(weights(0), broken, latent, weights(3)))
    assert dict(found.reasons) == {"layers.1#0": "o: it is gated", "layers.2#0": "k reads the latent"}
    assert bool(found.k[:, :, 1:3].isnan().all())
    assert not bool(found.k[0, :, 3].isnan().any())
    same = compose_heads(stack(weights(0, layer=0), weights(1, layer=0)))
    assert bool(same.q.isnan().all())
    assert same.strongest() == ()
    unnumbered = compose_heads(stack(weights(0, layer=None), weights(1, layer=None)))
    assert not bool(unnumbered.q[0, :, 1].isnan().any())
    with pytest.raises(InputError, match="layers.1#0: o: it is gated"):
        compose_heads(stack(broken))
    narrow = weights(1, **{name: random(h, WIDTH, 6, seed=1) for name, h in (("q", H), ("k", 1), ("v", 1), ("o", H))})
    with pytest.raises(InputError, match=r"streams \[6, 12\] wide"):
        compose_heads(stack(weights(0), narrow))
    with pytest.raises(SelectionError, match="no composition 'x': there are q, k, v"):
        found.strongest("x")


class Layer(nn.Module):
    """Attention of H heads on a stream, without a norm."""

    def __init__(self, heads: int, width: int, stream: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(stream, heads * width, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * width, stream, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        out: Tensor = x + self.o(z.transpose(1, 2).flatten(-2))
        return out


def test_a_planted_induction_circuit_has_the_strongest_composition_by_keys() -> None:
    words, length, heads = 8, 14, 4  # the stream: the word, the position, and room for the word before
    width, stream = length, 2 * words + length
    torch.manual_seed(0)
    model = nn.Sequential(Layer(heads, width, stream), Layer(heads, width, stream)).eval()
    word, position, before = slice(0, words), slice(words, words + length), slice(words + length, stream)
    with torch.no_grad():
        first, second = model
        one, two = slice(width, 2 * width), slice(2 * width, 3 * width)  # head 0.1 looks back, head 1.2 is the induction head
        for layer, own in ((first, one), (second, two)):
            for part in (layer.q, layer.k, layer.v):
                part.weight.mul_(0.2)
                part.weight[own] = 0
            layer.o.weight.mul_(0.2)
            layer.o.weight[:, own] = 0
        first.q.weight[one, position] = 30 * torch.eye(length).roll(1, 1)  # a query at i is the key of i - 1
        first.k.weight[one, position] = torch.eye(length)
        first.v.weight[one, word][:words] = torch.eye(words)
        first.o.weight[before, one][:, :words] = torch.eye(words)
        second.q.weight[two, word][:words] = 30 * torch.eye(words)
        second.k.weight[two, before][:words] = torch.eye(words)
        second.v.weight[two, word][:words] = torch.eye(words)
        second.o.weight[word, two][:, :words] = torch.eye(words)
    text = torch.tensor([3, 1, 4, 0, 5, 2, 6, 3, 1, 4, 0, 5, 2, 6])
    x = torch.zeros(1, length, stream)
    x[0, range(length), text] = 1
    x[0, :, position] = torch.eye(length)
    with Probe(model).capture(Keep(pattern=True)) as seen, torch.no_grad():
        model(x)
    looked = torch.arange(1, length)
    assert bool((seen.pattern(site="0#0")[0, 1].argmax(-1)[1:] == looked - 1).all())
    assert bool((seen.pattern(site="1#0")[0, 2].argmax(-1)[8:] == looked[7:] - 6).all())  # the key after the same word, a period before
    found = compose_heads(head_weights(model, x))
    best, *others = found.strongest("k")
    assert (best.source, best.source_head, best.target, best.target_head) == ("0#0", 1, "1#0", 2)
    assert best.score == pytest.approx(words**-0.5, rel=1e-4)  # ‖I‖ / ‖I‖² on 8 words
    assert best.excess == pytest.approx(best.score - found.baseline)
    assert all(other.score < 0.8 * best.score for other in others)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", ["TransformerLens native", "TransformerBridge of GPT-2", "TransformerBridge of Llama (GQA)"])
def test_scores_agree_with_transformer_lens(name: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    reason = entry.missing()
    if reason is not None:
        pytest.skip(reason)
    model, inputs = entry.build()
    lens: Any = model
    ours = compose_heads(head_weights(model, inputs), fold=False)
    for kind in "qkv":
        theirs = lens.all_composition_scores(kind.upper()).scores.detach().double()
        mine = ours.of(kind)
        assert mine.shape == theirs.shape
        known = ~mine.isnan()
        assert int(known.sum()) == 16  # two layers of four heads
        torch.testing.assert_close(mine[known], theirs[known], rtol=1e-4, atol=1e-5)
        assert not theirs[~known].any()
