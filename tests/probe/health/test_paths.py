"""Products of patterns are those of the patterns multiplied out, and known stacks give known numbers."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.probe import Capture, Keep, Probe
from headscope.probe.health.paths import PathMeasures, measure_paths

torch.set_num_threads(1)


class Fused(nn.Module):
    """Layers of torch's own attention on given queries and keys, [layers, B, H, N, D]."""

    class Layer(nn.Module):
        def forward(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
            v = torch.ones_like(k)
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Fused.Layer() for _ in range(layers))
        self.eval()

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return torch.stack([layer(a, b, mask, causal) for layer, a, b in zip(self.layers, q, k, strict=True)])


def drawn(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


def captured(q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False) -> Capture:
    model = Fused(len(q))
    with Probe(model).capture(Keep()) as seen:
        model(q, k, mask, causal)
    return seen


def maps(q: Tensor, k: Tensor, visible: Tensor | None = None) -> NDArray[numpy.float64]:
    """[layers, B, H, N, N], every pattern written out."""
    s = numpy.einsum("lbhqd,lbhkd->lbhqk", q.numpy(), k.numpy()) / math.sqrt(q.shape[-1])
    p = numpy.exp(s)
    if visible is not None:
        p = p * visible.numpy()
    return numpy.asarray(p / p.sum(-1, keepdims=True))


def by_hand(patterns: list[NDArray[numpy.float64]], threshold: float = 1e-2) -> dict[str, list[float]]:
    """The numbers of one path in one sample, after each layer."""
    count = patterns[0].shape[0]
    centre = numpy.eye(count) - 1 / count
    product = numpy.eye(count)
    found: dict[str, list[float]] = {name: [] for name in ("residual", "contrast", "effective_rank", "rank", "contraction")}
    for pattern in patterns:
        product = pattern @ product
        sigma = numpy.linalg.svd(product, compute_uv=False)
        share = sigma[sigma > 0] / sigma.sum()
        found["residual"].append(float(numpy.linalg.norm(centre @ product) / numpy.linalg.norm(product)))
        found["contrast"].append(float(numpy.linalg.norm(centre @ product, 2)))
        found["effective_rank"].append(float(numpy.exp(-(share * numpy.log(share)).sum())))
        found["rank"].append(float((sigma > threshold * sigma[0]).sum()))
        found["contraction"].append(float(numpy.sort(numpy.linalg.eigvals(product).real)[-2]))
    return found


def check(found: PathMeasures, number: int, expected: list[dict[str, list[float]]], names: tuple[str, ...], near: float = 1e-9) -> None:
    for name in names:
        mean = numpy.mean([one[name] for one in expected], axis=0)
        numpy.testing.assert_allclose(getattr(found, name)[number].numpy(), mean, rtol=near, atol=1e-13, err_msg=name)


ALL = ("residual", "contrast", "effective_rank", "rank")


def test_products_along_chosen_paths_and_of_the_mean_of_heads_are_those_multiplied_out() -> None:
    q, k = drawn(4, 2, 3, 12, 5), drawn(4, 2, 3, 12, 5, seed=1)
    found = measure_paths(captured(q, k), heads=[(2, 0, 1, 1)], random=2)
    p = maps(q, k)
    assert found.paths[:2] == ((None,) * 4, (2, 0, 1, 1))
    assert len(found.paths) == 4
    for number, path in enumerate(found.paths):
        each = [by_hand([p[i, b].mean(0) if h is None else p[i, b, h] for i, h in enumerate(path)]) for b in range(2)]
        check(found, number, each, ALL)
    assert found.exact
    assert found.samples == 2
    assert found.tokens == 24
    assert bool(found.contraction.isnan().all())
    assert found.undefined == {"contraction": "the patterns are not causal"}


def test_shared_keys_are_repeated_for_their_queries() -> None:
    q, k = drawn(2, 1, 4, 9, 3), drawn(2, 1, 2, 9, 3, seed=1)
    found = measure_paths(captured(q, k), heads=[(1, 3)], random=0)
    p = maps(q, k.repeat_interleave(2, 2))
    check(found, 1, [by_hand([p[0, 0, 1], p[1, 0, 3]])], ALL)


@pytest.mark.parametrize("cells", [1 << 20, 40])
def test_causal_products_contract_as_their_second_eigenvalue(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headscope.probe.health.rows.CELLS", cells)  # one panel of rows, or several
    q, k = drawn(3, 1, 2, 8, 4), drawn(3, 1, 2, 8, 4, seed=1)
    found = measure_paths(captured(q, k, causal=True), heads=[(0, 1, 0)], random=0)
    p = maps(q, k, torch.ones(8, 8).tril())
    check(found, 1, [by_hand([p[0, 0, 0], p[1, 0, 1], p[2, 0, 0]])], (*ALL, "contraction"))
    assert found.undefined == {}


def test_uniform_attention_has_one_direction_left_after_one_layer_and_causal_uniform_halves_it_each_layer() -> None:
    zero = torch.zeros(5, 1, 1, 16, 4, dtype=torch.float64)
    whole = measure_paths(captured(zero, zero), random=0)
    assert float(whole.residual.max()) < 1e-14
    torch.testing.assert_close(whole.effective_rank, torch.ones(1, 5, dtype=torch.float64), rtol=1e-12, atol=0)
    assert whole.rank.tolist() == [[1.0] * 5]
    causal = measure_paths(captured(zero, zero, causal=True), random=0)
    torch.testing.assert_close(causal.contraction[0], 0.5 ** torch.arange(1, 6, dtype=torch.float64), rtol=1e-12, atol=0)


def test_attention_of_each_token_to_itself_keeps_every_difference() -> None:
    q = 60 * torch.eye(6, dtype=torch.float64).expand(3, 1, 1, 6, 6)
    found = measure_paths(captured(q, q), random=0)
    torch.testing.assert_close(found.residual, torch.full((1, 3), (5 / 6) ** 0.5, dtype=torch.float64))
    torch.testing.assert_close(found.contrast, torch.ones(1, 3, dtype=torch.float64))
    torch.testing.assert_close(found.effective_rank, torch.full((1, 3), 6.0, dtype=torch.float64))


@pytest.mark.parametrize("dense_up_to", [512, 3])
def test_padding_changes_nothing(dense_up_to: int) -> None:
    q, k = drawn(3, 2, 2, 11, 4), drawn(3, 2, 2, 11, 4, seed=1)
    tokens = torch.ones(2, 11, dtype=torch.bool)
    tokens[1, 7:] = False
    seen = captured(q, k, tokens[:, None, None].expand(2, 1, 11, 11))
    found = measure_paths(seen, heads=[(0, 1, 1)], random=0, tokens=tokens, dense_up_to=dense_up_to)
    full, short = maps(q, k), maps(q[..., :7, :], k[..., :7, :])
    each = [by_hand([full[0, 0, 0], full[1, 0, 1], full[2, 0, 1]]), by_hand([short[0, 1, 0], short[1, 1, 1], short[2, 1, 1]])]
    check(found, 1, each, ALL)
    assert found.tokens == 18


def test_what_padding_holds_does_not_matter() -> None:
    q, k = drawn(2, 1, 2, 9, 4), drawn(2, 1, 2, 9, 4, seed=1)
    tokens = torch.arange(9)[None] >= 2  # on the left
    mask = (tokens[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()).expand(1, 1, 9, 9) | torch.eye(9, dtype=torch.bool)
    clean = measure_paths(captured(q, k, mask), random=2, tokens=tokens)
    q[..., :2, :] = 50.0
    other = measure_paths(captured(q, k, mask), random=2, tokens=tokens)
    short = measure_paths(captured(q[..., 2:, :], k[..., 2:, :], causal=True), random=2)
    for name in (*ALL, "contraction"):
        torch.testing.assert_close(getattr(clean, name), getattr(other, name), rtol=1e-12, atol=0)
        torch.testing.assert_close(getattr(clean, name), getattr(short, name), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_the_streamed_numbers_agree_with_the_products_themselves(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headscope.probe.health.rows.CELLS", 4000)  # several panels
    seen = captured(drawn(5, 2, 3, 60, 8, size=1.5), drawn(5, 2, 3, 60, 8, seed=1), causal=causal)
    exact, streamed = measure_paths(seen, random=2), measure_paths(seen, random=2, dense_up_to=10, block=32)
    assert exact.paths == streamed.paths
    assert not streamed.exact
    torch.testing.assert_close(streamed.residual, exact.residual, rtol=0.03, atol=0)
    torch.testing.assert_close(streamed.contrast, exact.contrast, rtol=0.03, atol=0)
    for name in ("effective_rank", "rank"):
        held = streamed.__dict__[name].isfinite()
        assert bool(held[:, 2 if not causal else 4 :].all()), name
        torch.testing.assert_close(getattr(streamed, name)[held], getattr(exact, name)[held], rtol=0.05, atol=0)
        assert "than the block holds" in streamed.undefined[name]  # a single layer has more rank than that
    if causal:
        torch.testing.assert_close(streamed.contraction, exact.contraction, rtol=1e-12, atol=0)


def test_what_a_narrow_block_leaves_out_still_counts_in_the_residual() -> None:
    seen = captured(drawn(1, 1, 3, 200, 8, size=2.0), drawn(1, 1, 3, 200, 8, seed=1))
    exact, narrow = (measure_paths(seen, heads=[(0,), (1,), (2,)], random=0, dense_up_to=most, block=6) for most in (512, 1))
    assert bool(narrow.rank.isnan().all())
    torch.testing.assert_close(narrow.residual, exact.residual, rtol=0.03, atol=0)


def test_a_block_as_wide_as_the_tokens_gives_every_number_exactly() -> None:
    seen = captured(drawn(4, 1, 2, 20, 6), drawn(4, 1, 2, 20, 6, seed=1))
    exact, streamed = measure_paths(seen, random=3), measure_paths(seen, random=3, dense_up_to=1, block=20)
    for name in ("residual", "contrast", "effective_rank"):
        torch.testing.assert_close(getattr(streamed, name), getattr(exact, name), rtol=1e-8, atol=1e-14)


def test_random_paths_and_blocks_follow_the_seed_alone() -> None:
    seen = captured(drawn(3, 1, 4, 10, 4), drawn(3, 1, 4, 10, 4, seed=1))
    torch.manual_seed(0)
    one = measure_paths(seen, seed=5, dense_up_to=2, block=4)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    two = measure_paths(seen, seed=5, dense_up_to=2, block=4)
    assert one.paths == two.paths
    assert torch.equal(one.residual, two.residual)
    assert measure_paths(seen, seed=6).paths != one.paths
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_token_and_broken_numbers_are_undefined_with_the_reason() -> None:
    alone = measure_paths(captured(drawn(2, 1, 1, 1, 4), drawn(2, 1, 1, 1, 4)), random=1)
    assert bool(alone.residual.isnan().all())
    assert alone.undefined["residual"] == "one token: there is nothing to compare"
    q, k = drawn(2, 1, 1, 5, 4), drawn(2, 1, 1, 5, 4, seed=1)
    seen = captured(q, k)
    seen.records["layers.1#0", 0].tensors["q"] = q[1].index_fill(2, torch.tensor(2), torch.nan)  # a capture itself refuses NaN
    for limit in (512, 2):
        broken = measure_paths(seen, random=0, dense_up_to=limit, block=5)
        assert bool(broken.residual[0, 0].isfinite())
        assert all(bool(getattr(broken, name)[0, 1].isnan()) for name in ALL)
        assert broken.undefined["rank"] == "a pattern holds NaN or nothing but zeros"


def test_the_result_is_plain_in_json_and_in_rows() -> None:
    found = measure_paths(captured(drawn(2, 1, 2, 5, 4), drawn(2, 1, 2, 5, 4, seed=1)), heads=[(1, 0)], random=0)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["paths"] == [[None, None], [1, 0]]
    assert told["contraction"] == [[None, None], [None, None]]
    rows = found.rows()
    assert [(row["heads"], row["depth"]) for row in rows] == [("mean", 1), ("mean.mean", 2), ("1", 1), ("1.0", 2)]
    assert rows[3]["residual"] == pytest.approx(float(found.residual[1, 1]))


def test_what_is_no_path_is_refused() -> None:
    seen = captured(drawn(2, 1, 2, 5, 4), drawn(2, 1, 2, 5, 4, seed=1))
    with pytest.raises(InputError, match="a path has one head for each of the 2 sites"):
        measure_paths(seen, heads=[(1,)])
    with pytest.raises(SelectionError, match="no head 2: this site has 2 heads, 0 to 1"):
        measure_paths(seen, heads=[(0, 2)])
    with pytest.raises(SelectionError, match="no captured site matches sites"):
        measure_paths(seen, sites=["nowhere"])
    with pytest.raises(SelectionError, match="no step 3 of"):
        measure_paths(seen, step=3)
    with pytest.raises(ShapeError, match=r"tokens is \[1, 4\] of torch.bool; give bool \[1, 5\]"):
        measure_paths(seen, tokens=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="give a share between 0 and 1"):
        measure_paths(seen, threshold=0.0)


def test_cross_attention_and_captures_without_queries_are_refused() -> None:
    with pytest.raises(InputError, match="has 5 queries and 7 keys: path products need queries and keys that are the same tokens"):
        measure_paths(captured(drawn(1, 1, 2, 5, 4), drawn(1, 1, 2, 7, 4)))
    model = Fused(1)
    with Probe(model).capture(Keep(statistics=True)) as seen:
        model(drawn(1, 1, 2, 5, 4), drawn(1, 1, 2, 5, 4))
    with pytest.raises(SelectionError, match=r"was kept: capture with Keep\(\) to follow paths"):
        measure_paths(seen)
    with Probe(model).capture(Keep()) as twice:
        for _ in range(2):
            model(drawn(1, 1, 2, 5, 4), drawn(1, 1, 2, 5, 4))
    with pytest.raises(SelectionError, match="was called 2 times: say step=0 … step=1"):
        measure_paths(twice)
    assert measure_paths(twice, step=1).residual.shape == (9, 1)
