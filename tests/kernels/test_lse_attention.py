"""Kernels that return lse keep their promises, and one that does not is found."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from headscope.kernels import lse_attention
from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.kernels.lse_attention import LseAttention, call, flex, ours, stock, verify

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def plain(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    scores = scale * (q.double() @ k.double().mT)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [stock, ours, lambda: ours("reference"), lambda: plain])
def test_what_we_ship_keeps_its_promises(make: Callable[[], LseAttention], dtype: torch.dtype) -> None:
    verify(make(), dtype=dtype)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_flex_that_is_not_compiled_runs_on_a_cpu() -> None:
    verify(flex(flex_attention))
    with pytest.raises(InputError, match="compiled for a CPU returns no lse"):
        verify(flex())


def broken(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> LseAttention:
    def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        return change(*plain(q, k, v, scale=scale, causal=causal))

    return attend


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (broken(lambda output, lse: (output, lse / math.log(2))), "logarithms to base 2"),
        (broken(lambda output, lse: (output, lse + 0.01)), "its scores are not scale · q·k"),
        (broken(lambda output, lse: (output * 0.9, lse)), "output is off by up to .* turn dropout off"),
        (lambda q, k, v, *, scale, causal: plain(q, k, v, scale=0.5, causal=causal), r"lse is off .*scale=0.4, causal=False"),
        (lambda q, k, v, *, scale, causal: plain(q, k, v, scale=scale, causal=False), r"lse is off .*causal=True"),
    ],
)
def test_a_kernel_that_breaks_a_promise_is_told_which(kernel: LseAttention, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        verify(kernel)


@pytest.mark.parametrize(
    "kernel",
    [
        broken(lambda output, lse: (output, lse[..., None])),
        broken(lambda output, lse: (output[..., :-1], lse)),
        broken(lambda output, lse: (output, lse.bfloat16())),
    ],
)
def test_what_a_kernel_returns_has_the_right_shape(kernel: LseAttention) -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ShapeError, match=r"give \[1, 2, 3, 4\] and \[1, 2, 3\], the lse in float32 or float64"):
        call(kernel, q, q, q, scale=1.0, causal=False)


def test_verifying_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    verify(plain)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stock_reads_tensors_of_any_stride(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 8, 9, dtype=dtype).mT for _ in range(3))
    output, lse = stock()(q, k, v[..., :5], scale=0.3, causal=True)
    right, log = plain(q, k, v[..., :5], scale=0.3, causal=True)
    torch.testing.assert_close(lse.double(), log, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.double(), right, atol=2e-2, rtol=0)


def test_autocast_does_not_reach_a_kernel() -> None:
    q = torch.randn(1, 1, 20, 8, generator=torch.Generator().manual_seed(0)) * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, lse = call(lambda q, k, v, *, scale, causal: (v, (scale * q @ k.mT).logsumexp(-1)), q, q, q, scale=0.3, causal=False)
    torch.testing.assert_close(lse.double(), plain(q, q, q, scale=0.3, causal=False)[1], atol=1e-5, rtol=0)


def test_a_torch_without_the_operator_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops, "aten", object())
    lse_attention._find.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="headscope.kernels"):
            verify(stock())
    finally:
        lse_attention._find.cache_clear()
    assert len(caplog.messages) == 1
    assert "has no aten._scaled_dot_product_flash_attention_for_cpu; headscope's own attention" in caplog.messages[0]


@pytest.mark.parametrize(
    ("dtype", "width", "values"), [(torch.float16, 19, 5), (torch.bfloat16, 64, 64), (torch.float16, 300, 3), (torch.float32, 19, 40)]
)
def test_the_cuda_operators_take_what_stock_gives_them(dtype: torch.dtype, width: int, values: int) -> None:
    operator = lse_attention._operator(torch.device("cuda:0"), dtype, max(width, values))
    assert operator is not None
    q, k, v = (torch.empty(2, 3, n, d, dtype=dtype, device="meta") for n, d in ((9, width), (11, width), (11, values)))
    output, lse = lse_attention._fused(operator, q, k, v, 0.3, False)  # shapes and arguments alone: it needs no GPU
    assert output.shape == (2, 3, 9, values)
    assert lse.shape == (2, 3, 9)
    assert lse.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cuda_operators_keep_their_promises(dtype: torch.dtype) -> None:
    verify(stock(), device="cuda", dtype=dtype)


def test_what_no_operator_does_is_refused() -> None:
    with pytest.raises(InputError, match="no fused attention for torch.float64 on cuda:0"):
        lse_attention._operator(torch.device("cuda:0"), torch.float64, 4)
    with pytest.raises(InputError, match="no fused attention for torch.float32 on meta"):
        stock()(*torch.empty(3, 1, 1, 2, 4, device="meta"), scale=1.0, causal=False)
    with pytest.raises(SelectionError, match="no implementation 'fast'"):
        verify(ours("fast"))
