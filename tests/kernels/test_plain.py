"""A problem is brought to what a bare kernel knows, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.kernels import identities
from headscope.kernels.errors import InputError
from headscope.kernels.lse_attention import stock
from headscope.kernels.plain import make_plain
from headscope.kernels.problem import make_problem


def tensors(queries: int = 6, keys: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 2, queries, 4, generator=made, dtype=torch.float64).to(dtype),
        torch.randn(1, 2, keys, 4, generator=made, dtype=torch.float64).to(dtype),
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"softcap": 30.0}, "a softcap"),
        ({"sink": torch.zeros(2)}, "a sink"),
        ({"bias": torch.zeros(6, 6)}, "a bias over pairs"),
        ({"mask": torch.ones(6, 6, dtype=torch.bool)}, "a mask over pairs"),
        ({"window": 3, "causal": True}, "a window"),
        ({"lengths": [2, 4]}, "packed lengths"),
        ({"causal": True, "offset": 2}, "an offset"),
        ({"key_bias": torch.full((6,), torch.nan)}, "NaN or inf"),
        ({"key_bias": torch.full((6,), torch.inf)}, "NaN or inf"),
    ],
)
def test_what_an_identity_cannot_honour_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        identities.entropy(stock(), make_problem(*tensors(), **given))


def test_a_temperature_that_would_round_half_precision_is_refused() -> None:
    q, k = tensors(dtype=torch.bfloat16)
    assert torch.equal(make_plain(make_problem(q, k, temperature=torch.tensor([0.5, 4.0]))).q[0, 1], q[0, 1] / 4)
    with pytest.raises(InputError, match="no power of two"):
        make_plain(make_problem(q, k, temperature=torch.tensor([1.0, 3.0])))


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (6, 1), (3, 6), (6, 3)])
def test_only_a_diagonal_at_the_bottom_right_counts_as_causal(queries: int, keys: int) -> None:
    q, k = tensors(queries, keys)
    assert make_plain(make_problem(q, k, causal=True)).causal == (queries > 1)
    assert not make_plain(make_problem(q, k)).causal
    assert make_plain(make_problem(q, k, causal=True, offset=keys - queries)).causal == (queries > 1)
    assert not make_plain(make_problem(q, k, causal=True, offset=keys)).causal  # it hides nothing
    assert make_plain(make_problem(q, k, causal=True, window=queries + keys)).causal == (queries > 1)  # nor does such a window


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_three_ways_to_hide_a_key_are_one(dtype: torch.dtype) -> None:
    q, k = tensors(dtype=dtype)
    hidden = torch.tensor([False, False, True, False, False, True])
    low = torch.zeros(6).masked_fill(hidden, -torch.inf)
    problems = [
        make_problem(q, k, causal=True, key_bias=low),
        make_problem(q, k, causal=True, bias=low[None, None, None]),
        make_problem(q, k, causal=True, mask=~hidden[None, None, None]),
    ]
    for number in (identities.log_sum_exp, identities.entropy, identities.received):
        first, *others = (number(stock(), problem) for problem in problems)
        assert all(torch.equal(first, other) for other in others)
        assert number is not identities.received or torch.equal(first[..., hidden], torch.zeros(1, 2, 2, dtype=first.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_low_bias_hides_a_key_unless_a_row_sees_no_other(dtype: torch.dtype) -> None:
    q, k = tensors(dtype=dtype)
    right = torch.zeros(6, dtype=dtype)
    right[4:] = torch.finfo(dtype).min
    hidden = make_problem(q, k, causal=True, mask=(right == 0)[None, None, None])
    assert torch.equal(
        identities.log_sum_exp(stock(), make_problem(q, k, causal=True, key_bias=right)), identities.log_sum_exp(stock(), hidden)
    )
    with pytest.raises(InputError, match="too low for .* to tell them apart; hide keys with a bias of -inf"):
        identities.log_sum_exp(stock(), make_problem(q, k, causal=True, key_bias=right.flip(0)))


def test_what_lies_under_padding_does_not_matter() -> None:
    q, k = tensors()
    mask = torch.tensor([True, True, True, True, False, False])[None, None, None]
    clean = make_problem(q, k, causal=True, mask=mask)
    dirty = make_problem(q, k.clone(), causal=True, mask=mask)
    dirty.k[:, :, 4:] = torch.inf
    rows = make_problem(q.clone(), k, mask=mask.mT)
    rows.q[:, :, 4:] = torch.nan
    for number in (identities.entropy, identities.sum_squares, identities.received, identities.mean_key):
        assert torch.equal(number(stock(), dirty), number(stock(), clean))
        assert torch.isfinite(number(stock(), rows)).all()
    x = torch.ones(1, 1, 6, 1, dtype=torch.float64)
    x[:, :, 4:] = torch.nan
    torch.testing.assert_close(identities.apply(stock(), clean, x), torch.ones(1, 2, 6, 1, dtype=torch.float64))
    assert torch.isfinite(identities.apply_transposed(stock(), rows, x)).all()


def test_a_bias_beyond_float16_is_refused() -> None:
    q, k = tensors(dtype=torch.float16)
    even = identities.log_sum_exp(stock(), make_problem(q, k))
    torch.testing.assert_close(
        identities.log_sum_exp(stock(), make_problem(q, k, key_bias=torch.full((6,), 4e4))) - 4e4, even, atol=4e-3, rtol=0
    )
    with pytest.raises(InputError, match=r"a bias of up to 2e\+05 at scale 0.5 overflows float16"):
        identities.log_sum_exp(stock(), make_problem(q, k, key_bias=torch.full((6,), 2e5)))


def test_statistics_of_a_model_in_training_carry_no_graph() -> None:
    q, k = tensors()
    assert not identities.entropy(stock(), make_problem(q.requires_grad_(), k)).requires_grad
