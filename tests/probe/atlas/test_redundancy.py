"""Heads that look alike: distances against dense float64 code, clusters of planted copies, and what happens when there is too much."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headscope.kernels.errors import HeadscopeError, InputError, NotIntercepted, SelectionError
from headscope.probe.atlas.redundancy import measure_redundancy
from headscope.probe.atlas.stimuli import Stimulus, inputs_of

pytest.importorskip("sklearn")

SIZE = 11


class Maps(nn.Module):
    """Heads 0 and 1 are the same, 2 is their neighbour, 3 is another thing; a second layer repeats head 3, and has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        one, other, third = torch.randn(3, SIZE, SIZE) * 3
        self.first = torch.stack([one, one, one + 0.3 * torch.randn(SIZE, SIZE), other])
        self.second = torch.stack([other, third])
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        for scores in (self.first, self.second):
            q = scores.expand(len(x), -1, -1, -1)
            keys = torch.eye(SIZE).expand(len(x), len(scores), -1, -1)
            x = F.scaled_dot_product_attention(q, keys, x[:, None].expand(-1, len(scores), -1, -1), is_causal=True, scale=1.0).sum(1)
        return x

    def patterns(self) -> Tensor:
        """[6, S, S], by hand."""
        scores = torch.cat([self.first, self.second]).double()
        return scores.masked_fill(~torch.ones(SIZE, SIZE).tril().bool(), -torch.inf).softmax(-1)


def contents(count: int = 1) -> list[Stimulus]:
    return [one for _ in range(count) for one in inputs_of(Maps(), torch.randn(2, SIZE, 4))]


def dense_divergence(a: Tensor, b: Tensor) -> float:
    """Mean over the rows that see two keys of the Jensen-Shannon divergence, from its definition by Kullback-Leibler."""
    middle = (a + b) / 2

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return torch.where(p > 0, p * (p / q.clamp_min(1e-300)).clamp_min(1e-300).log(), 0.0).sum(-1)

    return float(((kl(a, middle) + kl(b, middle)) / 2)[1:].mean())


@pytest.mark.parametrize("cells", [40, 1 << 22])
def test_cosine_and_divergence_are_those_of_dense_maps_across_layers(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.probe.atlas import redundancy

    monkeypatch.setattr(redundancy, "CELLS", cells)
    found = measure_redundancy(Maps(), contents(2))
    maps = Maps().patterns()
    assert [head for _, head in found.heads] == [0, 1, 2, 3, 0, 1]
    for i in range(6):
        for j in range(6):
            a, b = maps[i][1:].flatten(), maps[j][1:].flatten()
            assert float(found.cosine[i, j]) == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
            assert float(found.divergence[i, j]) == pytest.approx(dense_divergence(maps[i], maps[j]), abs=1e-6)
    assert found.queries == 2 * 2 * SIZE
    assert found.notes == ()


def test_copies_are_one_cluster_whatever_their_layer() -> None:
    found = measure_redundancy(Maps(), contents(), threshold=0.3)
    assert found.clusters == ((0, 1, 2), (3, 4))
    site = found.heads[0][0]
    assert found.cluster_of(site, 0) == ((site, 1), (site, 2))
    assert found.cluster_of(found.heads[5][0], 1) == ()
    assert found.clustered(1e-3).clusters == ((0, 1), (3, 4))
    assert found.clustered(1.5).clusters == ((0, 1, 2, 3, 4, 5),)
    assert found.clustered(0.2, "cosine").clusters[0] == (0, 1, 2)
    with pytest.raises(SelectionError, match="no head 9"):
        found.cluster_of(site, 9)


def test_without_the_first_key_heads_that_rest_on_it_part_company() -> None:
    class Resting(Maps):
        def __init__(self) -> None:
            super().__init__()
            sink = torch.zeros(SIZE, SIZE)
            sink[:, 0] = 14
            self.first = self.first + sink
            self.second = self.second + sink

    whole = measure_redundancy(Resting(), contents())
    apart = measure_redundancy(Resting(), contents(), exclude_first=True)
    assert float(whole.cosine[0, 3]) > 0.9
    assert float(apart.cosine[0, 3]) < 0.8


def test_too_much_work_takes_every_so_many_th_row_and_says_so() -> None:
    found = measure_redundancy(Maps(), contents(), work=6 * 6 * 2 * SIZE * SIZE // 8)
    assert 2 <= found.queries < 2 * SIZE
    assert found.notes[0].startswith(f"{found.queries} of {2 * SIZE} query rows were compared")
    assert float(found.cosine[0, 1]) == pytest.approx(1)


def test_maps_of_different_shapes_are_not_compared() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
            half = x[:, ::2]
            return F.scaled_dot_product_attention(half[:, None], half[:, None], half[:, None])

    found = measure_redundancy(Pooled(), inputs_of(Pooled(), torch.randn(1, 8, 4)))
    assert math.isnan(float(found.cosine[0, 1]))
    assert found.clusters == ()
    assert float(found.cosine[0, 0]) == pytest.approx(1)


def test_padding_is_not_compared() -> None:
    inputs = contents()[0]
    counted = torch.ones(2, SIZE, dtype=torch.bool)
    counted[:, 6:] = False
    found = measure_redundancy(Maps(), [Stimulus(inputs.inputs, counted)])
    a, b = (Maps().patterns()[place][1:6].flatten() for place in (0, 3))
    assert float(found.cosine[0, 3]) == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)


def test_bad_wishes_are_refused_and_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="threshold=0: give a positive distance"):
        measure_redundancy(Maps(), contents(), threshold=0)
    with pytest.raises(SelectionError, match="no distance 'euclid': there are jensen-shannon, cosine"):
        measure_redundancy(Maps(), contents(), distance="euclid")
    with pytest.raises(NotIntercepted):
        measure_redundancy(nn.Linear(4, 4), inputs_of(nn.Linear(4, 4), torch.randn(1, 4)))
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(HeadscopeError, match=r"need scikit-learn.*pip install 'headscope\[attribution\]', or chart without redundancy"):
        measure_redundancy(Maps(), contents())
