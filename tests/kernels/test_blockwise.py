"""Attention and patterns by panels: equal to the dense ones, with gradients, in memory that grows with the length alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.kernels import blockwise, panels, reference
from headscope.kernels.attention import attention
from headscope.kernels.errors import ShapeError
from headscope.kernels.statistics import Statistics
from headscope.probe import Keep, Probe


@given(
    seed=st.integers(0, 2**16),
    groups=st.integers(1, 2),
    share=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    causal=st.booleans(),
    extra=st.sampled_from(["none", "bias", "mask", "softcap", "sink"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=120, deadline=None)
def test_the_panelled_pattern_equals_the_dense_one(
    seed: int, groups: int, share: int, queries: int, keys: int, causal: bool, extra: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = groups * share
    q = torch.randn(2, heads, queries, 4, generator=generator, dtype=dtype)
    k = torch.randn(2, groups, keys, 4, generator=generator, dtype=dtype)
    bias = torch.randn(1, heads, queries, keys, generator=generator, dtype=dtype) if extra == "bias" else None
    mask = torch.rand(2, 1, queries, keys, generator=generator) > 0.6 if extra == "mask" else None
    sink = torch.randn(heads, generator=generator, dtype=dtype) if extra == "sink" else None
    softcap = 1.5 if extra == "softcap" else None
    dense = reference.pattern(reference.scores(q, k, scale=0.5, bias=bias, mask=mask, is_causal=causal, softcap=softcap), sink=sink)
    found = blockwise.pattern(q, k, scale=0.5, bias=bias, mask=mask, is_causal=causal, softcap=softcap, sink=sink)
    torch.testing.assert_close(found, dense, atol=1e-6 if dtype == torch.float32 else 1e-13, rtol=0)


def test_panels_meet_without_a_seam_where_there_are_many() -> None:
    q, k = torch.randn(1, 2, 700, 8), torch.randn(1, 1, 700, 8)
    found = blockwise.pattern(q, k, scale=0.3, is_causal=True)
    torch.testing.assert_close(found, reference.pattern(reference.scores(q, k, scale=0.3, is_causal=True)), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2, 700))


def test_an_empty_batch_gives_an_empty_pattern_and_a_misfit_an_error() -> None:
    assert blockwise.pattern(torch.randn(0, 2, 3, 4), torch.randn(0, 1, 5, 4), scale=1.0).shape == (0, 2, 3, 5)
    with pytest.raises(ShapeError):
        blockwise.pattern(torch.randn(1, 3, 3, 4), torch.randn(1, 2, 5, 4), scale=1.0)


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries of one head at a time, so that a handful of queries is many panels."""
    monkeypatch.setattr(panels, "_CPU_CELLS", 1)
    monkeypatch.setattr(panels, "_CPU_ROWS", 2)


def textbook(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_bias: Tensor, temperature: Tensor, gate: Tensor, sink: Tensor, features: Tensor
) -> dict[str, Tensor]:
    """softmax with a column for the sink, and what is said of it, all held; query i sees keys 0 to i."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[3] ** 0.5 / temperature[:, None, None]
    scores = 2.0 * torch.tanh(scores / 2.0) + bias + key_bias
    scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    with_sink = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    p, alone = with_sink.softmax(-1)[..., :-1], scores.softmax(-1)
    best = p.topk(2).values
    return {
        "output": p @ v * gate[:, None, None],
        "lse": scores.logsumexp(-1),
        "entropy": -torch.special.xlogy(alone, alone.clamp_min(1e-300)).sum(-1),
        "p_max": p.amax(-1),
        "max_score": scores.amax(-1),
        "sum_squares": alone.square().sum(-1),
        "received": p.sum(-2),
        "pooled": p.unflatten(-1, (-1, 3)).sum(-1).unflatten(-2, (-1, 3)).sum(-2),
        "moments": p @ features,
        "rows": p[:, :, [4, 1, 1]],
        "top_weights": torch.where(torch.arange(6)[:, None] + 1 > torch.arange(2), best, 0.0),
    }


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 6, 2), (1, 2, 6, 2), (1, 2, 6, 3), (1, 4, 6, 6), (6,), (4,), (4,), (4,), (6, 2)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made[5] = made[5].abs() + 0.5  # temperature
    return [tensor.requires_grad_() for tensor in made]


def by_panels(*parts: Tensor) -> dict[str, Tensor]:
    q, k, v, bias, key_bias, temperature, gate, sink, features = parts
    output, found = attention(
        q, k, v, causal=True, softcap=2.0, bias=bias, key_bias=key_bias, temperature=temperature, gate=gate, sink=sink, features=features,
        rows=[4, 1, 1], top=2, pooled=3, implementation="blockwise",
    )  # fmt: skip
    return {"output": output} | {name: value for name, value in found.tensors().items() if value.is_floating_point()}


def weighed(found: dict[str, Tensor]) -> Tensor:
    """One number in which every entry counts differently."""
    return sum(((value * torch.arange(value.numel()).view_as(value).sin()).sum() for value in found.values()), torch.zeros(()))


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("name", list(textbook(*inputs())))
def test_every_result_has_the_value_and_gradients_of_the_textbook(name: str) -> None:
    given, twins = inputs(), inputs()
    found, want = by_panels(*given)[name], textbook(*twins)[name]
    torch.testing.assert_close(found, want)
    weighed({name: found}).backward()
    weighed({name: want}).backward()
    for tensor, twin in zip(given, twins, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, torch.zeros_like(twin) if twin.grad is None else twin.grad
        )


@pytest.mark.usefixtures("small_panels")
def test_second_derivatives_are_those_of_the_textbook() -> None:
    results = []
    for function in (by_panels, textbook):
        parts = inputs()
        first = torch.autograd.grad(weighed(function(*parts)), parts, create_graph=True)
        results.append(torch.autograd.grad(weighed({str(i): slope.square() for i, slope in enumerate(first)}), parts))
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.usefixtures("small_panels")
def test_gradients_stay_finite_beside_dead_rows_hidden_keys_and_a_softcap() -> None:
    q, k, v = (torch.randn(1, 2, 6, 2, requires_grad=True) for _ in range(3))
    bias = torch.zeros(6, 6).masked_fill(torch.rand(6, 6) > 0.5, -torch.inf)
    bias[2] = -torch.inf
    bias.requires_grad_()
    output, found = attention(q, k, v, bias=bias, softcap=1.0, causal=True, offset=-2, top=3, pooled=4, implementation="blockwise")
    numbers = [output, *(value for value in found.tensors().values() if value.is_floating_point())]
    sum(value.masked_fill(value.isinf(), 0.0).sum() for value in numbers).backward()  # type: ignore[union-attr]
    for tensor in (q, k, v, bias):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_forward_and_backward_make_no_tensor_of_queries_times_keys_and_keep_no_panel() -> None:
    queries, kept = 2048, 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    q, k, v = (torch.randn(1, 2, queries, 4, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output, found = attention(q, k, v, implementation="blockwise")
        assert found.entropy is not None
        assert found.received is not None
        (output.sum() + found.entropy.sum() + found.received.square().sum()).backward()
    assert largest.numbers <= 2 * 128 * queries  # the panels of both heads; the maps are 2 * 2048 * 2048
    assert kept <= q.numel()
    assert q.grad is not None


def test_a_window_looks_only_at_the_keys_near_a_panel() -> None:
    q = torch.randn(1, 1, 4096, 2)
    with Largest() as largest:
        attention(q, q, q, window=50, causal=True, implementation="blockwise")
    assert largest.numbers <= 2 * 128 * (128 + 50)


def test_packed_sequences_are_the_same_as_each_alone() -> None:
    lengths, key_lengths = [3, 0, 130, 5], [4, 7, 131, 0]
    q, k, v = torch.randn(1, 2, 138, 4), torch.randn(1, 1, 142, 4), torch.randn(1, 1, 142, 3)
    output, found = attention(q, k, v, causal=True, lengths=lengths, key_lengths=key_lengths, implementation="blockwise")
    for i in range(4):
        queries, keys = (slice(sum(each[:i]), sum(each[: i + 1])) for each in (lengths, key_lengths))
        alone, one = attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], causal=True, implementation="blockwise")
        torch.testing.assert_close(output[:, :, queries], alone)
        for name in ("lse", "entropy", "p_max"):
            torch.testing.assert_close(getattr(found, name)[:, :, queries], getattr(one, name))
        torch.testing.assert_close(found.received[:, :, keys], one.received)


def test_of_equal_scores_the_lowest_keys_are_the_top() -> None:
    k = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 3.0, 2.0]).repeat(40).view(1, 1, 280, 1)
    found = attention(torch.ones(1, 1, 1, 1), k, None, keep="argmax", top=125, implementation="blockwise")[1]
    assert found.top_keys is not None
    assert found.argmax is not None
    largest = [7 * i + j for i in range(40) for j in (1, 3, 5)]
    assert found.top_keys.flatten().tolist() == [*largest, 2, 4, 6, 9, 11]
    assert found.argmax.item() == 1


class Little(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.project(x).chunk(3, dim=-1))
        z: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return z


@pytest.mark.usefixtures("small_panels")
def test_gradients_are_the_same_inside_a_capture_scope_and_do_not_count_as_attention_of_the_model() -> None:
    def slopes(found: Statistics, q: Tensor) -> Tensor:
        assert found.entropy is not None
        return torch.autograd.grad(found.entropy.sum(), q)[0]

    q, model = torch.randn(1, 2, 7, 4, requires_grad=True), Little()
    want = slopes(attention(q, q, None, causal=True, implementation="blockwise")[1], q)
    with Probe(model).capture(Keep(statistics=True)) as capture:
        model(torch.randn(1, 7, 8))
        found = slopes(attention(q, q, None, causal=True, implementation="blockwise")[1], q)
    torch.testing.assert_close(found, want)
    assert len(capture.sites) == 1
