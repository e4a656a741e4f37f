"""Linear probes: a label that is in one head is found there and nowhere else, and memory is told from knowledge."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headscope.kernels.errors import HeadscopeError, InputError, SelectionError
from headscope.probe.atlas.probing import HeadProbes, probe_heads

pytest.importorskip("sklearn")


class Knowing(nn.Module):
    """Head 0 carries the parity of each token, head 1 the token itself (one-hot), head 2 noise of the position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.noise = torch.randn(16, 12)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        batch, size = input_ids.shape
        parity = F.one_hot(input_ids % 2, 12).float()
        own = F.one_hot(input_ids, 12).float()
        v = torch.stack([parity, own, self.noise[:size].expand(batch, -1, -1)], 1)
        q = torch.eye(size).expand(batch, 3, -1, -1) * 50
        return F.scaled_dot_product_attention(q, q / 50, v, scale=1.0)


def ids(samples: int = 30, size: int = 8) -> Tensor:
    return torch.randint(0, 12, (samples, size), generator=torch.Generator().manual_seed(1))


def probed(**named: object) -> HeadProbes:
    tokens = ids(20)
    return probe_heads(Knowing().eval(), {"input_ids": tokens}, tokens % 2, **{"folds": 3, **named})  # type: ignore[arg-type]


def test_a_label_of_tokens_is_read_where_it_is_and_memory_is_told_from_knowledge() -> None:
    found = probed()
    accuracy, control = found.accuracy[0], found.control[0]
    assert float(accuracy[0]) == float(accuracy[1]) == 1
    assert float(accuracy[2]) < 0.65
    assert float(control[1]) > 0.99  # a head that carries the token learns any label of tokens by heart
    assert float(control[0]) < 0.8
    assert float(found.selectivity[0, 0]) > 0.2 > float(found.selectivity[0, 1])
    assert found.places == 20 * 8
    assert found.classes == (0, 1)
    assert 0.4 < found.majority < 0.6


def test_intervals_hold_the_accuracy_and_the_seed_decides() -> None:
    found = probed(folds=2)
    assert bool((found.low <= found.accuracy + 1e-12).all())
    assert bool((found.accuracy <= found.high + 1e-12).all())
    assert float(found.high[0, 2] - found.low[0, 2]) > 0.02
    again = probed(folds=2)
    assert torch.equal(found.accuracy, again.accuracy)
    assert torch.equal(found.control, again.control)
    assert not torch.equal(found.control, probed(folds=2, seed=7).control)


def test_a_label_of_samples_is_read_at_a_position_or_from_the_mean() -> None:
    tokens = ids(60)
    label = tokens[:, -1] % 2
    last = probe_heads(Knowing().eval(), {"input_ids": tokens}, label, position=-1, control=False)
    assert float(last.accuracy[0, 0]) == 1
    assert bool(last.control.isnan().all())
    first = probe_heads(Knowing().eval(), {"input_ids": tokens}, label, position=0, control=False)
    assert float(first.accuracy[0, 0]) < 0.75
    mean = probe_heads(Knowing().eval(), {"input_ids": tokens}, (tokens % 2).sum(1).gt(4).long(), control=False)
    assert float(mean.accuracy[0, 0]) > 0.9
    with pytest.raises(SelectionError, match="position 9: there are 8 tokens"):
        probe_heads(Knowing().eval(), {"input_ids": tokens}, label, position=9)


def test_tokens_without_a_label_are_left_out_and_batches_are_put_together() -> None:
    tokens = ids()
    label = tokens % 2
    label[:, ::2] = -100
    one = probe_heads(Knowing().eval(), {"input_ids": tokens}, label, folds=3)
    assert one.places == 30 * 4
    batches = [{"input_ids": part} for part in tokens.split(10)]
    many = probe_heads(Knowing().eval(), batches, list(label.split(10)), folds=3)
    assert torch.equal(one.accuracy, many.accuracy)


def test_a_sample_is_never_in_training_and_test_at_once() -> None:
    class Named(nn.Module):  # z carries which sample it is: knowing that tells the label only of samples seen in training
        def forward(self, x: Tensor) -> Tensor:
            v = x[:, :, :1].round().long() % 12
            own = F.one_hot(v[..., 0], 12).float()[:, None]
            q = torch.eye(x.shape[1]).expand(len(x), 1, -1, -1) * 50
            return F.scaled_dot_product_attention(q, q / 50, own, scale=1.0)

    x = torch.arange(12.0)[:, None, None].expand(12, 6, 1).contiguous()
    label = torch.tensor([0, 1] * 6)[:, None].expand(12, 6).contiguous()
    found = probe_heads(Named().eval(), {"x": x}, label, folds=4, control=False)
    assert float(found.accuracy[0, 0]) < 0.7


def test_progress_counts_heads_and_the_result_can_be_written() -> None:
    pandas = pytest.importorskip("pandas")
    told: list[tuple[int, int]] = []
    found = probed(progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    frame = found.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["head"]) == [0, 1, 2]
    assert found.to_dict()["accuracy"] == found.accuracy.tolist()
    assert "control" in found.to_dict()


def test_bad_labels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids(6)
    with pytest.raises(InputError, match="hold 1 classes"):
        probe_heads(Knowing().eval(), {"input_ids": tokens}, torch.zeros(6, 8, dtype=torch.long))
    with pytest.raises(InputError, match="6 labelled samples for 9 folds"):
        probe_heads(Knowing().eval(), {"input_ids": tokens}, tokens % 2, folds=9)
    with pytest.raises(InputError, match=r"labels are \[6, 5\] and z of .* is \[6, 3, 8, 12\]"):
        probe_heads(Knowing().eval(), {"input_ids": tokens}, (tokens % 2)[:, :5])
    with pytest.raises(InputError, match="2 tensors of labels for 1 inputs"):
        probe_heads(Knowing().eval(), {"input_ids": tokens}, [tokens % 2, tokens % 2])
    with pytest.raises(InputError, match="folds=1"):
        probe_heads(Knowing().eval(), {"input_ids": tokens}, tokens % 2, folds=1)
    with pytest.raises(InputError, match="training mode"):
        probe_heads(Knowing().train(), {"input_ids": tokens}, tokens % 2)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(HeadscopeError, match="probes need scikit-learn"):
        probe_heads(Knowing().eval(), {"input_ids": tokens}, tokens % 2)
