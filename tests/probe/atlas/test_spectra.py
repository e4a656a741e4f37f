"""Spectra of heads through their factors, against dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.kernels.errors import InputError, ShapeError
from headscope.probe.atlas.spectra import (
    effective_ranks,
    energy_ranks,
    head_spectra,
    product_singular_values,
    product_singular_vectors,
    report_ranks,
    stable_ranks,
    stack_spectra,
    tucker_modes,
)
from headscope.probe.atlas.weights import HeadWeights
from headscope.probe.call import AttentionSite


def site(heads: int, groups: int, width: int) -> AttentionSite:
    return AttentionSite("layers.0#0", "layers.0", 0, 0, "self", heads, groups, width, width, "sdpa")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(heads: int = 4, groups: int = 2, width: int = 3, stream: int = 20) -> HeadWeights:
    return HeadWeights(
        site(heads, groups, width),
        random(heads, width, stream), random(groups, width, stream, seed=1),
        random(groups, width, stream, seed=2), random(heads, width, stream, seed=3),
    )  # fmt: skip


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_singular_values_of_a_product_are_those_of_the_dense_matrix(d: int, e: int, f: int, seed: int) -> None:
    left, right = random(2, d, e, seed=seed), random(2, d, f, seed=seed + 1)
    ours = product_singular_values(left, right)
    for mine, a, b in zip(ours, left.numpy(), right.numpy(), strict=True):
        dense = np.linalg.svd(a.T @ b, compute_uv=False)
        count = min(d, e, f)
        np.testing.assert_allclose(mine.numpy()[:count], dense[:count], rtol=1e-9, atol=1e-12 * dense[0])
        assert np.all(dense[count:] < 1e-12 * dense[0] + 1e-300)


def test_singular_vectors_put_the_product_together_again() -> None:
    left, right = random(3, 4, 11), random(3, 4, 9, seed=1)
    u, values, v = product_singular_vectors(left, right)
    torch.testing.assert_close(u * values[:, None] @ v.mT, left.mT @ right)
    torch.testing.assert_close(u.mT @ u, torch.eye(4, dtype=torch.float64).expand(3, -1, -1))


def test_factors_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"factors of \[2, 5\] and \[3, 5\]"):
        product_singular_values(random(2, 5), random(3, 5))


def test_modes_are_those_of_the_unfolded_tensor() -> None:
    left, right = random(4, 3, 10), random(4, 3, 8, seed=1)
    dense = np.einsum("hde,hdf->hef", left.numpy(), right.numpy())
    for mode, ours in enumerate(tucker_modes(left, right)):
        unfolded = np.moveaxis(dense, mode, 0).reshape(dense.shape[mode], -1)
        expected = np.linalg.svd(unfolded, compute_uv=False) ** 2
        count = min(len(ours), len(expected))
        np.testing.assert_allclose(ours.numpy()[:count], expected[:count], rtol=1e-9, atol=1e-9)
        assert math.isclose(float(ours.sum()), float((dense**2).sum()), rel_tol=1e-12)


def test_a_site_has_the_spectra_of_each_query_head_with_the_key_head_that_it_uses() -> None:
    found = weights()
    spectra = head_spectra(found)
    assert spectra.qk is not None
    assert spectra.ov is not None
    assert found.q is not None
    assert found.k is not None
    assert found.v is not None
    assert found.o is not None
    for head in range(4):
        qk = found.q[head].T @ found.k[head // 2]
        ov = found.v[head // 2].T @ found.o[head]
        torch.testing.assert_close(spectra.qk[head], torch.linalg.svdvals(qk)[:3])
        torch.testing.assert_close(spectra.ov[head], torch.linalg.svdvals(ov)[:3])


def test_multilinear_ranks_keep_their_bounds_and_grouped_keys_bound_the_key_mode() -> None:
    every = stack_spectra(weights(heads=4, groups=4)).ranks("qk", 1 - 1e-9)
    grouped = stack_spectra(weights(heads=4, groups=2))
    assert every == (4, 12, 12)
    assert grouped.ranks("qk", 1 - 1e-9) == (4, 12, 6)  # keys: 2 groups of width 3
    assert grouped.ranks("ov", 1 - 1e-9) == (4, 6, 12)
    wide = stack_spectra(weights(heads=4, groups=4, width=8))  # 32 directions of a stream that has 20
    assert wide.ranks("qk", 1 - 1e-9) == (4, 20, 20)
    with pytest.raises(InputError, match="no circuit 'kq'"):
        grouped.ranks("kq")


def test_heads_that_are_copies_of_one_another_have_one_component_in_the_head_mode() -> None:
    one = weights(heads=1, groups=1)
    assert one.q is not None
    assert one.k is not None
    modes = tucker_modes(one.q.repeat(5, 1, 1) * torch.arange(1, 6)[:, None, None], one.k.repeat(5, 1, 1))
    assert int(energy_ranks(modes[0].sqrt(), 1 - 1e-9)) == 1
    assert int(energy_ranks(modes[1].sqrt(), 1 - 1e-9)) == 3


def test_ranks_of_exact_spectra() -> None:
    flat = torch.tensor([2.0, 2, 2, 2], dtype=torch.float64)
    single = torch.tensor([3.0, 0, 0, 0], dtype=torch.float64)
    mixed = torch.tensor([3.0, 1, 0, 0], dtype=torch.float64)
    both = torch.stack([flat, single, mixed])
    torch.testing.assert_close(effective_ranks(both)[:2], torch.tensor([4.0, 1], dtype=torch.float64))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert float(effective_ranks(mixed)) == pytest.approx(expected)
    torch.testing.assert_close(stable_ranks(both), torch.tensor([4, 1, 10 / 9], dtype=torch.float64))
    assert energy_ranks(both, 0.9).tolist() == [4, 1, 1]
    assert energy_ranks(both, 0.95).tolist() == [4, 1, 2]
    assert energy_ranks(both, 0.5).tolist() == [2, 1, 1]
    assert report_ranks(both, (0.95,))["energy_rank_0.95"].tolist() == [4, 1, 2]
    with pytest.raises(InputError, match=r"share=1.5"):
        energy_ranks(both, 1.5)


def test_a_zero_matrix_has_no_rank_and_weights_that_are_missing_or_not_finite_have_a_reason() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert math.isnan(float(effective_ranks(zero)))
    assert math.isnan(float(stable_ranks(zero)))
    assert int(energy_ranks(zero)) == 0
    found = weights()
    partial = HeadWeights(found.site, None, found.k, found.v, found.o, reasons={"q": "it is convolved"})
    broken = head_spectra(partial)
    assert broken.qk is None
    assert stack_spectra(partial).ranks("qk") is None
    assert stack_spectra(partial).undefined == broken.undefined
    assert broken.undefined["qk"] == "q: it is convolved"
    assert broken.ov is not None
    assert found.o is not None
    bad = head_spectra(HeadWeights(found.site, found.q, found.k, found.v, found.o * torch.nan))
    assert bad.undefined["ov"] == "the weights are not finite"
    empty = HeadWeights(found.site, found.q, found.k, found.v, found.o * 0)
    assert stack_spectra(empty).ranks("ov") is None
