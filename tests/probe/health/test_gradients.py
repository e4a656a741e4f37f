"""The gradients that reach queries, keys and values are those of the same attention written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from headscope.kernels.errors import InputError, NonFiniteError, NotIntercepted
from headscope.probe.health.gradients import measure_gradients

torch.set_num_threads(1)
WIDTH, HEADS, EACH = 8, 4, 2


class Layer(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * EACH, bias=False) for n in (HEADS, groups, groups))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def split(self, x: Tensor) -> list[Tensor]:
        """q [B, H, N, D], k and v [B, G, N, D]."""
        return [p(x).unflatten(-1, (-1, EACH)).transpose(1, 2) for p in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.o(scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Pure attention, or with skips."""

    def __init__(self, layers: int = 3, groups: int = HEADS, skip: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.skip = nn.ModuleList(Layer(groups) for _ in range(layers)), skip
        self.drop = nn.Dropout(0.1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.drop(layer(x)) + (x if self.skip else 0.0)
        return x


def loss(output: Tensor) -> Tensor:
    return (output * torch.arange(output.numel(), dtype=torch.float64).cos().view(output.shape)).sum()


def by_hand(net: Net, x: Tensor, tokens: Tensor | None = None) -> list[list[Tensor]]:
    """[layers][q, k, v], norms [H or G], from attention written out."""
    kept = []
    for layer in net.layers:
        assert isinstance(layer, Layer)
        parts = [part.requires_grad_() if part.is_leaf else part for part in layer.split(x)]
        for part in parts:
            part.retain_grad()
        q, k, v = parts
        k, v = (part.repeat_interleave(HEADS // part.shape[1], 1) for part in (k, v))
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k).div(EACH**0.5).exp()
        z = torch.einsum("bhqk,bhkd->bqhd", weights / weights.sum(-1, keepdim=True), v)
        x = layer.o(z.flatten(2)) + (x if net.skip else 0.0)
        kept.append(parts)
    loss(x).backward()  # type: ignore[no-untyped-call]
    living = torch.ones(x.shape[:2]) if tokens is None else tokens
    found = []
    for parts in kept:
        norms = [(part.grad * living[:, None, :, None]).square().sum((0, 2, 3)).sqrt() for part in parts if part.grad is not None]
        found.append([norm.detach() for norm in norms])
    return found


def draw(batch: int = 2, tokens: int = 7, seed: int = 1, size: float = 1.0) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_norms_and_ratio_are_those_of_attention_written_out(groups: int, skip: bool) -> None:
    net = Net(groups=groups, skip=skip)
    found = measure_gradients(net, draw(), loss)
    expected = by_hand(Net(groups=groups, skip=skip), draw())
    assert [one.site.layer for one in found] == [0, 1, 2]
    for one, (query, key, value) in zip(found, expected, strict=True):
        key, value = (x.repeat_interleave(HEADS // groups) for x in (key, value))
        torch.testing.assert_close(one.query, query, rtol=1e-9, atol=1e-18)
        torch.testing.assert_close(one.key, key, rtol=1e-9, atol=1e-18)
        torch.testing.assert_close(one.value, value, rtol=1e-9, atol=1e-18)
        torch.testing.assert_close(one.ratio, (query + key) / (2 * value), rtol=1e-8, atol=0)
        assert one.undefined == {}


def test_frozen_parameters_give_the_same_numbers() -> None:
    net, frozen = Net(), Net().requires_grad_(False)
    for one, other in zip(measure_gradients(net, draw(), loss), measure_gradients(frozen, draw(), loss), strict=True):
        torch.testing.assert_close(one.ratio, other.ratio, rtol=1e-12, atol=0)
        torch.testing.assert_close(one.key, other.key, rtol=1e-12, atol=0)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_without_skips_the_gradient_at_queries_and_keys_vanishes_with_depth_and_with_skips_not() -> None:
    def mean(skip: bool) -> list[float]:
        return [float(one.ratio.mean()) for one in measure_gradients(Net(6, skip=skip), draw(tokens=16), loss)]

    pure, skipped = mean(False), mean(True)
    assert pure[5] < 1e-6 < 1e-3 < pure[0]
    assert min(skipped) > 1e-2


def test_several_batches_count_as_one_whose_loss_is_their_sum() -> None:
    net, batches = Net(), [draw(1, 7, seed) for seed in (1, 2, 3)]
    together = measure_gradients(net, torch.cat(batches), lambda output: sum((loss(one[None]) for one in output), torch.zeros(())))
    for one, other in zip(measure_gradients(net, [{"x": batch} for batch in batches], loss), together, strict=True):
        torch.testing.assert_close(one.query, other.query, rtol=1e-12, atol=0)
        torch.testing.assert_close(one.ratio, other.ratio, rtol=1e-12, atol=0)


def test_only_the_tokens_that_count_are_looked_at() -> None:
    tokens = torch.ones(2, 7, dtype=torch.bool)
    tokens[0, 5:], tokens[1, :2] = False, False
    expected = by_hand(Net(), draw(), tokens)
    for one, (query, key, value) in zip(measure_gradients(Net(), draw(), loss, tokens), expected, strict=True):
        for measured, right in ((one.query, query), (one.key, key), (one.value, value)):
            torch.testing.assert_close(measured, right, rtol=1e-9, atol=0)


def test_two_calls_of_a_site_add_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(1)
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.net(x), self.net(x)])

    single = measure_gradients(Net(1), draw(), loss)[0]
    (double,) = measure_gradients(Twice(), draw(), lambda output: loss(output[0]) + loss(output[1]))
    torch.testing.assert_close(double.value, single.value * 2**0.5, rtol=1e-12, atol=0)
    torch.testing.assert_close(double.ratio, single.ratio, rtol=1e-12, atol=0)


def test_nothing_is_left_on_the_model() -> None:
    net = Net()
    net.layers[1].requires_grad_(False)
    net.layers[0].q.weight.grad = torch.full_like(net.layers[0].q.weight, 3.0)  # type: ignore[union-attr, arg-type]
    before = [(p.clone(), None if p.grad is None else p.grad.clone(), p.requires_grad) for p in net.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        measure_gradients(net, draw(), lambda output: loss(output) + torch.randn(()))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    for p, (value, gradient, wanted) in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.requires_grad == wanted
        assert (p.grad is None) == (gradient is None)
        assert p.grad is None or torch.equal(p.grad, gradient)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not any(module.training for module in net.modules())


def test_a_second_measurement_gives_the_same_numbers_to_the_bit() -> None:
    net = Net()
    for one, other in zip(measure_gradients(net, draw(), loss), measure_gradients(net, draw(), loss), strict=True):
        assert torch.equal(one.ratio, other.ratio)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_numbers_or_says_why_not(reentrant: bool) -> None:
    class Checked(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=reentrant)
            return x

    found = measure_gradients(Checked(), draw().requires_grad_(), loss)
    if reentrant:
        assert all("without gradients" in one.undefined["ratio"] and bool(one.ratio.isnan().all()) for one in found)
    else:
        for one, right in zip(found, measure_gradients(Net(), draw(), loss), strict=True):
            torch.testing.assert_close(one.ratio, right.ratio, rtol=1e-12, atol=0)


def test_a_site_that_ran_partly_without_gradients_says_so() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(1)
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                first = self.net(x)
            return self.net(x) + first

    (one,) = measure_gradients(Half(), draw(), loss)
    assert bool(one.value.isnan().all())
    assert one.undefined["value"] == "the model ran some calls of this site without gradients"


def test_a_head_whose_values_get_no_gradient_has_no_ratio() -> None:
    net = Net(1)
    net.layers[0].o.weight.data[:, :EACH] = 0.0  # type: ignore[union-attr, index]
    (one,) = measure_gradients(net, draw(), loss)
    assert bool(one.ratio[0].isnan())
    assert bool(one.ratio[1:].isfinite().all())
    assert one.undefined == {"ratio": "no gradient at the values of a head"}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda output: output, InputError, r"the loss gave a tensor \[2, 7, 8\] of torch.float64: return one number"),
        (lambda output: 3.0, InputError, "the loss gave float"),
        (lambda output: output.detach().sum(), InputError, "the loss depends on no attention"),
        (lambda output: output.sum() * torch.nan, NonFiniteError, "the loss is nan"),
    ],
)
def test_a_loss_that_tells_nothing_is_refused(wrong: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure_gradients(Net(), draw(), wrong)


def test_training_mode_and_models_without_attention_are_refused() -> None:
    with pytest.raises(InputError, match="gradients are measured in eval mode: call model.eval"):
        measure_gradients(Net().train(), draw(), loss)
    with pytest.raises(NotIntercepted):
        measure_gradients(nn.Linear(WIDTH, WIDTH).double().eval(), draw(), loss)
