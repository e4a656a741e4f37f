"""The border of the op: what is refused and with which words, and the values that odd inputs have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.kernels.attention import TILE, attention
from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.kernels.statistics import NAMES, Statistics
from tests.kernels.dense import dense

INF = float("inf")
IMPLEMENTATIONS = ("blockwise", "reference", None)


def parts(queries: int = 5, keys: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 3)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def agree(got: tuple[Tensor | None, Statistics], want: tuple[np.ndarray | None, dict[str, np.ndarray]], tolerance: float = 1e-5) -> None:
    output, found = got
    pairs = {name: (value, want[1][name]) for name, value in found.tensors().items()}
    if output is not None:
        assert want[0] is not None
        np.testing.assert_allclose(
            output.double(), want[0], rtol=2e-2 if output.itemsize == 2 else tolerance, atol=tolerance, err_msg="output"
        )
    for name, (value, twin) in pairs.items():
        np.testing.assert_allclose(value.numpy(), twin, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"causal": True},
        {"causal": True, "offset": 0},
        {"causal": True, "offset": -2},
        {"causal": True, "offset": 100},
        {"window": 2},
        {"window": 1, "offset": 3},
        {"window": 2, "causal": True},
    ],
)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (2, 6), (6, 2), (1, 7), (1, 1)])
def test_structure_is_counted_as_told(implementation: str | None, more: dict[str, Any], queries: int, keys: int) -> None:
    q, k, v = parts(queries, keys)
    agree(attention(q, k, v, pooled=2, implementation=implementation, **more), dense(q, k, v, pooled=2, **more))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_sequences_see_themselves_alone(implementation: str | None) -> None:
    q, k, v = (part[:1] for part in parts(7, 9))
    packed = {"lengths": [3, 0, 4], "key_lengths": [2, 3, 4], "causal": True}
    agree(attention(q, k, v, implementation=implementation, pooled=4, **packed), dense(q, k, v, pooled=4, **packed))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dead_rows_have_the_values_of_dead_rows_and_no_nan(implementation: str | None) -> None:
    q, k, v = parts()
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    more: dict[str, Any] = {"mask": mask, "sink": torch.ones(4), "features": torch.ones(5, 2), "rows": [2]}
    output, found = attention(q, k, v, implementation=implementation, keep=NAMES, **more)
    assert output[:, :, 2].abs().max() == 0
    values = {name: set(value[:, :, 2].flatten().tolist()) for name, value in found.tensors().items() if name not in ("received", "rows")}
    assert values.pop("argmax") == {-1}
    assert values.pop("lse") == values.pop("max_score") == {-INF}
    assert all(value == {0.0} for value in values.values())
    assert found.rows is not None
    assert found.rows.abs().max() == 0
    assert not any(value.isnan().any() for value in (output, *found.tensors().values()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_a_row_without_a_softmax_is_nan_in_every_number_and_the_others_are_not(implementation: str | None, bad: float) -> None:
    q, k, v = parts()
    bias = torch.zeros(5, 5)
    bias[3, 1] = bad
    output, found = attention(q, k, v, bias=bias, causal=True, implementation=implementation)
    for name, value in {"output": output[..., 0], **found.tensors()}.items():
        if name == "argmax":
            assert (value < 0).any(dim=1).any(dim=0).tolist() == [False, False, False, True, False]
        elif name not in ("received", "pooled"):
            assert value.isnan().any(dim=1).any(dim=0).tolist() == [False, False, False, True, False], name
    assert found.received is not None
    assert found.pooled is not None
    assert found.received.isnan().all()
    assert found.pooled.isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty_axes_give_empty_or_dead_results(implementation: str | None, batch: int, queries: int, keys: int) -> None:
    q, k, v = (x[:batch] for x in parts(queries, keys))
    output, found = attention(
        q, k, v, causal=True, features=torch.ones(keys, 2), rows=range(queries), pooled=2, implementation=implementation
    )
    assert output.shape == (batch, 4, queries, 3)
    assert not output.any()
    assert found.lse is not None
    assert found.pooled is not None
    assert found.moments is not None
    assert found.rows is not None
    assert found.lse.shape == (batch, 4, queries)
    assert found.pooled.shape == (batch, 4, -(-queries // 2), -(-keys // 2))
    assert found.moments.shape == (batch, 4, queries, 2)
    assert found.rows.shape == (batch, 4, queries, keys)
    assert keys or (found.lse == -INF).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_statistics_of_single_precision_also_under_autocast(implementation: str | None, dtype: torch.dtype) -> None:
    q, k, v = parts(70, 70, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, found = attention(q, k, v, causal=True, implementation=implementation)
    assert output.dtype == dtype
    assert {value.dtype for value in found.tensors().values()} == {torch.float32, torch.int64}
    agree((output, found), dense(q, k, v, causal=True, pooled=TILE), 1e-2 if dtype == torch.bfloat16 else 1e-3)
    agree((None, found), dense(q, k, v, causal=True, pooled=TILE), 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory_order_does_not_matter(implementation: str | None) -> None:
    q, k, v = parts(6, 6)
    bias = torch.randn(6, 1)
    plain = attention(q, k, v, bias=bias, implementation=implementation)
    scattered = [torch.stack([x, x], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0] for x in (q, k, v)]
    assert not scattered[0].is_contiguous()
    other = attention(*scattered, bias=bias.expand(2, 4, 6, 6), implementation=implementation)
    torch.testing.assert_close(other[0], plain[0])
    for name, value in plain[1].tensors().items():
        torch.testing.assert_close(other[1].tensors()[name], value)


def test_only_what_is_kept_comes_back() -> None:
    q, k, v = parts()
    assert set(attention(q, k, v)[1].tensors()) == {*NAMES, "pooled"}
    assert set(attention(q, k, v, keep=())[1].tensors()) == set()
    assert set(attention(q, k, v, keep="entropy", pooled=2)[1].tensors()) == {"entropy", "pooled"}
    assert set(attention(q, k, v, keep=("lse",), top=1, rows=[0])[1].tensors()) == {"lse", "top_keys", "top_weights", "rows"}
    output, found = attention(q, k, None)
    assert output is None
    assert set(found.tensors()) == {*NAMES, "pooled"}


def test_rows_come_in_the_order_asked_for_negative_ones_from_the_end() -> None:
    q, k, _ = parts()
    whole = attention(q, k, None, keep=(), rows=range(5))[1].rows
    some = attention(q, k, None, keep=(), rows=torch.tensor([-1, 0, 4]))[1].rows
    assert whole is not None
    assert some is not None
    torch.testing.assert_close(some, whole[:, :, [4, 0, 4]])


Q, K, V = parts()


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"q": Q[0]}, ShapeError, r"give q as \[B, H, Q, D\]"),
        ({"q": Q.long()}, ShapeError, "q is torch.int64"),
        ({"q": Q[:, :3]}, ShapeError, "3 query heads cannot share 2 key/value heads"),
        ({"q": Q[..., :7]}, ShapeError, "queries of width 7, keys of width 8"),
        ({"k": K.double()}, ShapeError, "k is torch.float64"),
        ({"v": V[:, :, :4]}, ShapeError, r"v is \[2, 2, 4, 3\] beside k \[2, 2, 5, 8\]"),
        (
            {"mask": torch.ones(5, 4, dtype=torch.bool)},
            ShapeError,
            r"mask is \[5, 4\]; it must broadcast to \[B, H, Q, K\] = \[2, 4, 5, 5\]",
        ),
        ({"mask": torch.ones(5, 5)}, ShapeError, "mask is torch.float32; give a bool mask"),
        ({"bias": torch.ones(5, 5, dtype=torch.bool)}, ShapeError, "bias is torch.bool"),
        ({"key_bias": torch.ones(4)}, ShapeError, r"key_bias is \[4\] of torch.float32 on cpu; give floating-point numbers \[B, H, K\]"),
        ({"features": torch.ones(5)}, ShapeError, r"features is \[5\] .*\[B, H, K, F\]"),
        ({"sink": torch.ones(3)}, ShapeError, r"sink is \[3\]"),
        ({"temperature": torch.ones(3)}, ShapeError, r"temperature is \[3\] .*one floating-point number per query head, \[4\]"),
        ({"temperature": torch.tensor([1.0, 0, 1, 1])}, InputError, "every head needs a positive one"),
        ({"gate": torch.ones(4, dtype=torch.int64)}, ShapeError, r"gate is \[4\] of torch.int64"),
        ({"scale": INF}, InputError, "scale inf: give a finite number"),
        ({"softcap": 0.0}, InputError, "softcap 0.0: give a positive number"),
        ({"window": 0}, InputError, "window 0: give at least 1"),
        ({"lengths": [2, 3]}, InputError, "lengths with a batch of 2"),
        ({"key_lengths": [5]}, InputError, "key_lengths without lengths"),
        ({"rows": [5]}, SelectionError, "no query at position 5: there are 5 queries, positions -5 to 4"),
        ({"top": -1}, InputError, "top -1: give how many"),
        ({"pooled": 0}, InputError, "tiles of side 0: give pooled=1 or more"),
        (
            {"keep": "budget"},
            SelectionError,
            "no statistic 'budget': there are lse, entropy, p_max, argmax, max_score, sum_squares, received$",
        ),
        ({"keep": ["lse", "pooled"]}, SelectionError, "for the pooled map give its tile, pooled=16"),
        ({"implementation": "fast"}, SelectionError, "no implementation 'fast': there are triton, cpu, blockwise, reference"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_given_and_what_is_allowed(
    more: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        attention(**({"q": Q, "k": K, "v": V} | more))


def test_packed_lengths_must_add_up_and_pair_up() -> None:
    q, k, v = Q[:1], K[:1], V[:1]
    with pytest.raises(InputError, match=r"lengths \[2, 2\] add up to 4; they must be 0 or more and add up to 5"):
        attention(q, k, v, lengths=[2, 2])
    with pytest.raises(InputError, match="2 sequences in lengths and 1 in key_lengths"):
        attention(q, k, v, lengths=[2, 3], key_lengths=[5])
