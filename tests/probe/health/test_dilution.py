"""The sweep over lengths: heads whose growth is known, a dense computation written here, and lengths that make no sense."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.health.dilution import LengthSweep, context_window, sweep_lengths

LENGTHS = (8, 16, 32, 64)
UNIFORM, OWN, HALVES, LOCAL = range(4)


class Known(nn.Module):
    """Bidirectional attention of four heads: to all keys alike, to the own one, to the square root of all, to four neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        place = torch.arange(n)
        root = round(math.sqrt(n))
        scores = torch.full((1, 4, n, n), -60.0, dtype=x.dtype)
        scores[:, UNIFORM] = 0
        scores[0, OWN, place, place] = 0
        scores[0, HALVES, :, :root] = 0
        scores[0, LOCAL, place[:, None], (place[:, None] + torch.arange(4)) % n] = 0
        q = torch.zeros(1, 4, n, 2, dtype=x.dtype)
        return scaled_dot_product_attention(q, q, q, attn_mask=scores)


@pytest.fixture(scope="module")
def known() -> LengthSweep:
    return sweep_lengths(Known().eval(), lambda n: torch.zeros(1, n, 4, dtype=torch.float64), LENGTHS)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.5, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_heads_whose_growth_is_known_have_the_slopes_of_it(known: LengthSweep) -> None:
    one = known.heads[0]
    roots = [math.log(round(math.sqrt(n))) for n in LENGTHS]
    x = [math.log(n) for n in LENGTHS]
    mx, my = sum(x) / 4, sum(roots) / 4
    expected = sum((a - mx) * (b - my) for a, b in zip(x, roots, strict=True)) / sum((a - mx) ** 2 for a in x)
    assert one.slope.tolist() == pytest.approx([1.0, 0.0, expected, 0.0], abs=1e-6)
    assert one.effective_keys[:, UNIFORM].tolist() == pytest.approx(LENGTHS)
    assert one.effective_keys[:, LOCAL].tolist() == pytest.approx([4] * 4)
    assert one.effective_share[:, LOCAL].tolist() == pytest.approx([4 / n for n in LENGTHS])
    assert one.p_max[:, OWN].tolist() == pytest.approx([1] * 4)
    assert one.keys.tolist() == list(LENGTHS)


def test_those_that_spread_are_told_from_those_that_stay_sharp(known: LengthSweep) -> None:
    site = known.heads[0].site.name
    assert known.spreading() == [(site, UNIFORM)]
    assert known.sharp() == [(site, OWN), (site, LOCAL)]
    found = known.findings()
    assert [(one.rule, one.severity, one.head) for one in found] == [("dilution", "warn", UNIFORM)]
    assert "from 0.12 to 0.016" in found[0].why
    assert known.findings({"dilution": 1.5}) == ()


def test_the_numbers_of_a_causal_model_are_those_of_a_dense_computation(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 31, (1, 32), generator=torch.Generator().manual_seed(0))
    found = sweep_lengths(llama, lambda n: {"input_ids": ids[:, :n]}, (8, 32))
    for place, n in enumerate((8, 32)):
        with torch.no_grad():
            maps = llama(input_ids=ids[:, :n], output_attentions=True).attentions
        seen = torch.arange(1, n + 1)
        for one, pattern in zip(found.heads, maps, strict=True):
            effective = 1 / pattern[0].double().square().sum(-1)
            assert one.effective_keys[place].tolist() == pytest.approx(effective.mean(-1).tolist(), rel=1e-4)
            assert one.effective_share[place].tolist() == pytest.approx(
                (effective / seen)[:, 1:].mean(-1).tolist(), rel=1e-4
            )  # one key is no choice
            assert one.p_max[place].tolist() == pytest.approx(pattern[0].amax(-1).mean(-1).tolist(), rel=1e-4)
            assert float(one.keys[place]) == pytest.approx((n + 1) / 2)
    first = found.heads[0]
    rise = (first.effective_keys[1].log() - first.effective_keys[0].log()) / math.log(33 / 9)
    assert first.slope.tolist() == pytest.approx(rise.tolist(), rel=1e-9)  # two points make a line


def test_a_window_that_sees_no_more_keys_has_no_slope() -> None:
    class Windowed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            place = torch.arange(n)
            mask = (place[:, None] - place).remainder(n) < 4
            q = torch.zeros(1, 1, n, 2)
            return scaled_dot_product_attention(q, q, q, attn_mask=mask)

    one = sweep_lengths(Windowed().eval(), lambda n: torch.zeros(1, n, 4), (8, 16)).heads[0]
    assert one.keys.tolist() == [4, 4]
    assert one.slope.isnan().all()
    assert "visible keys" in one.undefined["slope"]


def test_padding_is_not_counted(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 31, (1, 16), generator=torch.Generator().manual_seed(0))

    def padded(n: int) -> dict[str, Tensor]:
        mask = torch.cat([torch.ones(1, n), torch.zeros(1, 5)], 1).long()
        return {"input_ids": torch.cat([ids[:, :n], torch.full((1, 5), 3)], 1), "attention_mask": mask}

    alone = sweep_lengths(llama, lambda n: {"input_ids": ids[:, :n]}, (8, 16))
    found = sweep_lengths(llama, padded, (8, 16))
    for one, other in zip(found.heads, alone.heads, strict=True):
        assert torch.allclose(one.slope, other.slope, atol=1e-5)
        assert torch.allclose(one.p_max, other.p_max, atol=1e-6)


def test_lengths_that_make_no_sense_are_refused(llama: LlamaForCausalLM) -> None:
    def inputs(n: int) -> dict[str, Tensor]:
        return {"input_ids": torch.ones(1, n, dtype=torch.long)}

    assert context_window(llama) == 64
    assert context_window(Known()) is None
    with pytest.raises(InputError, match=r"a length of 128 tokens: the context window of LlamaForCausalLM has 64"):
        sweep_lengths(llama, inputs, (8, 128))
    for lengths in ((8,), (16, 8), (8, 8), (1, 8), ()):
        with pytest.raises(InputError, match="give two or more numbers of tokens"):
            sweep_lengths(llama, inputs, lengths)
    with pytest.raises(InputError, match=r"inputs_at\(32\) gave 20 tokens: the text has run out"):
        sweep_lengths(llama, lambda n: inputs(min(n, 20)), (16, 32))
    with pytest.raises(InputError, match="training mode"):
        sweep_lengths(LlamaForCausalLM(llama.config).train(), inputs, (8, 16))


def test_the_result_is_plain_json_a_table_and_a_figure(known: LengthSweep) -> None:
    record = json.loads(known.to_json())
    assert record["lengths"] == list(LENGTHS)
    assert len(record["heads"][0]["p_max"]) == 4
    assert len(known.to_frame()) == 16
    assert len(known.plot().data) == 5
    assert "<table" in known._repr_html_()
    assert str(known) == "LengthSweep(8 to 64 tokens, 4 heads: 1 spread with the text, 2 stay sharp)"
    with pytest.raises(SelectionError, match="no number 'x'"):
        known.plot("x")


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    sweep_lengths(Known().eval(), lambda n: torch.zeros(1, n, 4), (4, 8), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
