"""The panelled pattern equals the dense one, whatever is added to the scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.kernels import blockwise, reference
from headscope.kernels.errors import ShapeError


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
