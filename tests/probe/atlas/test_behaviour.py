"""Scores of heads: planted heads get what they must, random ones what dense float64 code says, and nothing is held that is large."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headscope.kernels.errors import InputError, NotIntercepted, SelectionError, ShapeError
from headscope.probe import Keep, Probe
from headscope.probe.atlas.behaviour import Behaviour, RandomTokens, match_heads, measure_behaviour, pairs
from headscope.probe.atlas.rows import AttentionRows, stream_rows
from headscope.probe.atlas.stimuli import Alphabet, Stimulus, alphabet_of, inputs_of
from headscope.probe.atlas.tally import grid_of
from tests.probe.atlas.planted import HEADS, Planted

LENGTH, START = 12, 1


def alphabet(window: int | None = None, before: tuple[int, ...] = (0,)) -> Alphabet:
    return Alphabet("input_ids", torch.arange(1, 40), before, (), window, torch.device("cpu"))


def random_tokens(samples: int = 3, length: int = LENGTH) -> RandomTokens:
    letters = alphabet()
    return RandomTokens(letters.write(length, 2, samples, 0), letters.write(2 * length, 1, samples, 1), length, START)


def measured(model: nn.Module, samples: int = 3) -> Behaviour:
    tokens = random_tokens(samples)
    return measure_behaviour(model, [tokens.fresh], tokens)


def of(found: Behaviour, score: str, head: str) -> float:
    return float(found.scores[score][0, HEADS.index(head)])


def test_every_planted_head_gets_its_score_and_no_other() -> None:
    found = measured(Planted())
    for head in ("previous", "current", "induction", "duplicate"):
        assert of(found, head, head) == pytest.approx(1, abs=1e-6)
        for other in HEADS:
            if other != head:
                assert of(found, head, other) < 0.35, (head, other)
    assert of(found, "first", "first") == pytest.approx(1, abs=1e-6)
    assert of(found, "sink", "first") == pytest.approx(1, abs=1e-6)
    assert int(found.sink_key[0, HEADS.index("first")]) == 0
    assert found.causal
    assert not found.undefined


def test_a_uniform_head_scores_what_uniform_attention_scores() -> None:
    found = measured(Planted())
    rows = range(1 + LENGTH, 1 + 2 * LENGTH)  # of the second copy
    assert of(found, "induction", "uniform") == pytest.approx(sum(1 / (i + 1) for i in rows) / LENGTH)
    for name, table in found.uniform.items():
        if name != "sink":
            assert of(found, name, "uniform") == pytest.approx(float(table[0, 0]), abs=1e-6), name
    assert of(found, "spread", "uniform") == pytest.approx(1)
    assert of(found, "local", "uniform") == pytest.approx(0, abs=1e-6)


def test_uniform_attention_of_an_encoder_is_its_own_baseline() -> None:
    found = measured(Planted(causal=False))
    size = 1 + 2 * LENGTH
    assert not found.causal
    for name in ("induction", "previous", "duplicate", "confidence"):
        assert float(found.uniform[name][0, 0]) == pytest.approx(1 / size, abs=1e-6)
    assert of(found, "entropy", "uniform") == pytest.approx(math.log(size), abs=1e-5)


def test_without_the_first_token_a_head_that_rests_on_it_shows_what_it_does_otherwise() -> None:
    class Half(Planted):
        def scores(self, ids: Tensor) -> Tensor:
            found = super().scores(ids)
            found[:, HEADS.index("induction"), :, 0] = 60.0  # half rests on the first token, half follows the repeat
            return found

    found = measured(Half())
    assert of(found, "induction", "induction") == pytest.approx(0.5, abs=1e-5)
    assert of(found, "induction_off_first", "induction") == pytest.approx(1, abs=1e-5)
    assert math.isnan(of(found, "induction_off_first", "first"))  # nothing is left beside the first token


def test_only_content_moves_a_head_that_is_not_positional() -> None:
    found = measured(Planted(), samples=4)
    assert of(found, "positional", "previous") == pytest.approx(1, abs=1e-6)
    assert of(found, "positional", "current") == pytest.approx(1, abs=1e-6)
    assert abs(of(found, "positional", "noise")) < 0.2
    assert math.isnan(of(found, "positional", "uniform"))


def dense(maps: Tensor) -> dict[str, Tensor]:
    """[H] each, of maps [B, H, S, S] in float64 on a begin token and two copies of a block, written from the definitions."""
    size = maps.shape[-1]
    rows = range(1, size)
    second = range(1 + LENGTH, size)

    def mean(cells: list[tuple[int, int]]) -> Tensor:
        return torch.stack([maps[:, :, i, j] for i, j in cells]).mean((0, 1))

    return {
        "previous": mean([(i, i - 1) for i in rows if i >= 2]),
        "current": mean([(i, i) for i in rows]),
        "duplicate": mean([(i, i - LENGTH) for i in second]),
        "induction": mean([(i, i - LENGTH + 1) for i in second]),
    }


def dense_content(maps: Tensor) -> dict[str, Tensor]:
    size = maps.shape[-1]
    places = torch.arange(size, dtype=torch.float64)
    own = maps[:, :, 1:]
    entropy = -(own * own.clamp_min(1e-300).log()).sum(-1)
    return {
        "first": own[..., 0].mean((0, 2)),
        "confidence": own.amax(-1).mean((0, 2)),
        "entropy": entropy.mean((0, 2)),
        "spread": (entropy / (places[1:] + 1).log()).mean((0, 2)),
        "distance": (own * (places[1:, None] - places).abs()).sum(-1).mean((0, 2)),
    }


@pytest.mark.parametrize("panel", [7, 1 << 21])
def test_scores_are_those_of_dense_float64_maps(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from headscope.probe.atlas import behaviour

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.4, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    tokens = random_tokens()
    whole = behaviour.stream_rows
    monkeypatch.setattr(behaviour, "stream_rows", lambda *given, **named: whole(*given, **{**named, "cells": panel}))
    found = measure_behaviour(model, [tokens.fresh], tokens)
    for stimulus, expect in ((tokens.repeated, dense), (tokens.fresh, dense_content)):
        with torch.no_grad():
            maps = model(**stimulus.inputs, output_attentions=True).attentions  # their softmax is in float32
        for layer, pattern in enumerate(maps):
            for name, value in expect(pattern).items():
                torch.testing.assert_close(found.scores[name][layer], value, atol=3e-6, rtol=0, msg=f"{name} of layer {layer}")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_panels_put_together_are_the_pattern(seed: int, cells: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(0, 40, (2, 9))
    model = Planted()
    with torch.no_grad(), Probe(model).capture(Keep()) as seen:
        model(ids)
    record = next(iter(seen.records.values()))
    panels = list(stream_rows(record, cells=cells * 18))
    torch.testing.assert_close(torch.cat([panel.pattern for panel in panels], 2), seen.pattern(site=record.site.name))
    assert torch.cat([panel.queries for panel in panels]).tolist() == list(range(9))
    assert torch.equal(torch.cat([panel.visible for panel in panels], 2)[0, 0], torch.ones(9, 9).tril().bool())


def test_padding_counts_neither_as_query_nor_as_key() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32,
        initializer_range=0.5,
    )  # fmt: skip
    model = BertModel(config).eval()
    ids = torch.randint(1, 40, (1, 9))
    mask = torch.ones(1, 9, dtype=torch.long)
    plain = measure_behaviour(model, inputs_of(model, {"input_ids": ids, "attention_mask": mask}))
    padded = {"input_ids": nn.functional.pad(ids, (0, 5)), "attention_mask": nn.functional.pad(mask, (0, 5))}
    found = measure_behaviour(model, inputs_of(model, padded))
    for name, table in plain.scores.items():
        torch.testing.assert_close(found.scores[name], table, atol=1e-5, rtol=0, equal_nan=True, msg=name)
        if name in plain.uniform:
            torch.testing.assert_close(found.uniform[name], plain.uniform[name], atol=1e-5, rtol=0, equal_nan=True, msg=name)


def test_an_image_is_measured_in_patches() -> None:
    assert grid_of(16) == (0, 4)
    assert grid_of(17) == (1, 4)
    assert grid_of(198) == (2, 14)
    assert grid_of(21) == (5, 4)
    assert grid_of(3) == (0, None)

    class Below(nn.Module):  # every patch looks at the one below it; the class token looks anywhere
        def forward(self, pixel_values: Tensor) -> Tensor:
            size = 10
            place = torch.arange(size)
            scores = (place[:, None] + 3 == place).float() * 60
            scores[7:] = (place[7:, None] == place).float() * 60
            q = scores.expand(len(pixel_values), 1, -1, -1)
            k = torch.eye(size).expand_as(q)
            return nn.functional.scaled_dot_product_attention(q, k, k, scale=1.0)

    found = measure_behaviour(Below(), inputs_of(Below(), {"pixel_values": torch.zeros(2, 1, 3, 3)}))
    assert float(found.scores["distance"][0, 0]) == pytest.approx(6 / 9)  # six patches look one down, three at themselves


def test_one_token_leaves_every_pattern_undefined_with_a_reason() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1, enable_nested_tensor=False).eval()
    found = measure_behaviour(model, inputs_of(model, torch.randn(1, 1, 8)))
    assert all(bool(table.isnan().all()) for table in found.scores.values())
    assert set(found.undefined) == set(found.scores)


def test_a_users_pairs_are_scored_with_their_baseline() -> None:
    model = Planted()
    ids = torch.arange(1, 9)[None]
    subject = pairs([(3, 2), (6, 1)])
    found = measure_behaviour(model, inputs_of(model, {"input_ids": ids}), detectors={"subject": subject})
    assert of(found, "subject", "previous") == pytest.approx(0.5, abs=1e-6)
    assert of(found, "subject", "uniform") == pytest.approx((1 / 4 + 1 / 7) / 2)
    assert float(found.uniform["subject"][0, 0]) == pytest.approx((1 / 4 + 1 / 7) / 2)
    with pytest.raises(SelectionError, match=r"pair \(3, 20\) of sample 0: it has 8 tokens"):
        measure_behaviour(model, inputs_of(model, {"input_ids": ids}), detectors={"subject": pairs([(3, 20)])})


def test_a_detector_of_ones_own_sees_tokens_and_is_checked() -> None:
    model = Planted()
    inputs = inputs_of(model, {"input_ids": torch.tensor([[5, 7, 5, 9]])})

    def to_five(rows: AttentionRows) -> Tensor:
        assert rows.tokens is not None
        return (rows.pattern * (rows.tokens == 5)[:, None, None]).sum(-1)

    found = measure_behaviour(model, inputs, detectors={"five": to_five})
    assert of(found, "five", "uniform") == pytest.approx((1 / 2 + 2 / 3 + 2 / 4) / 3)
    with pytest.raises(ShapeError, match=r"'bad' returned \[4\]: give a number per row, \[B, H, R\]"):
        measure_behaviour(model, inputs, detectors={"bad": lambda rows: torch.zeros(4)})
    with pytest.raises(SelectionError, match="cannot be named 'first'"):
        measure_behaviour(model, inputs, detectors={"first": to_five})


def test_random_tokens_repeat_exactly_and_are_never_special() -> None:
    written = alphabet().write(12, 2, 4, seed=5)
    ids = written.inputs["input_ids"]
    assert torch.equal(ids[:, 1:13], ids[:, 13:])
    assert bool((ids[:, 0] == 0).all())
    assert bool((ids[:, 1:] > 0).all())
    assert all(len(set(row)) == 12 for row in ids[:, 1:13].tolist())
    assert torch.equal(ids, alphabet().write(12, 2, 4, seed=5).inputs["input_ids"])
    assert not torch.equal(ids, alphabet().write(12, 2, 4, seed=6).inputs["input_ids"])
    with pytest.raises(InputError, match="length=12: 25 tokens are needed and the context window of this model is 20: give 9 or less"):
        alphabet(window=20).write(12, 2, 4, seed=5)


def test_the_frame_of_the_tokenizer_stands_around_random_tokens() -> None:
    class Tokenizer:
        all_special_ids = (0, 1, 2)

        def __len__(self) -> int:
            return 30

        def decode(self, ids: object) -> str:
            return ""

        def __call__(self, text: str, **named: object) -> dict[str, list[int]]:
            return {"input_ids": [1, 7, 8, 2], "special_tokens_mask": [1, 0, 0, 1]}

    letters = alphabet_of(Planted(), Tokenizer())
    assert letters is not None
    assert (letters.before, letters.after) == ((1,), (2,))
    assert letters.tokens.tolist() == list(range(3, 30))
    written = letters.write(4, 2, 2, 0)
    assert written.counted is not None
    assert written.counted[0].tolist() == [False, *[True] * 8, False]
    assert alphabet_of(nn.Linear(2, 2)) is None


def test_a_detector_pattern_by_mul_is_that_of_the_definition() -> None:
    model = Planted()
    stimulus = random_tokens().repeated
    found = match_heads(model, stimulus, "induction")
    assert float(found[0, HEADS.index("induction")]) == pytest.approx(LENGTH / (1 + 2 * LENGTH), abs=1e-6)
    without = match_heads(model, stimulus, "induction", exclude_first=True)
    assert float(without[0, HEADS.index("induction")]) == pytest.approx(1, abs=1e-5)
    own = torch.eye(1 + 2 * LENGTH)
    torch.testing.assert_close(match_heads(model, stimulus, own)[0, 2], torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(SelectionError, match="no detection 'next': there are previous, duplicate, induction"):
        match_heads(model, stimulus, "next")
    with pytest.raises(InputError, match="found by the tokens"):
        match_heads(model, Stimulus(stimulus.inputs), "induction")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exclude", [False, True])
def test_transformer_lens_gives_the_same_heads_the_same_scores(exclude: bool) -> None:
    pytest.importorskip("transformer_lens")
    from transformer_lens.head_detector import detect_head

    torch.manual_seed(0)
    model = Planted()
    block = torch.randint(1, 12, (1, 9))  # some tokens come twice within a block
    ids = torch.cat([torch.zeros(1, 1, dtype=torch.long), block, block], 1)
    size = ids.shape[1]
    maps = model.scores(ids)[0].masked_fill(~torch.ones(size, size).tril().bool(), -torch.inf).softmax(-1)
    settings = SimpleNamespace(n_layers=1, n_heads=len(HEADS), n_ctx=64, device="cpu", dtype=torch.float32)
    theirs_model = SimpleNamespace(cfg=settings, to_tokens=lambda text: ids)
    stimulus = Stimulus({"input_ids": ids}, None, ids)
    for name in ("previous", "duplicate", "induction"):
        for current in (False, True):
            theirs = detect_head(
                theirs_model, "x", "induction_head" if name == "induction" else f"{name}_token_head",
                cache={("pattern", 0, "attn"): maps.clone()}, exclude_bos=exclude, exclude_current_token=current, error_measure="mul",
            )  # fmt: skip
            ours = match_heads(model, stimulus, name, exclude_first=exclude, exclude_current=current)
            known = ~ours.isnan()  # nothing is left of a head that looks at what is excluded
            assert int(known.sum()) >= len(HEADS) - 2
            torch.testing.assert_close(ours[known].float(), theirs[known].float(), atol=1e-6, rtol=1e-5)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(NotIntercepted):
        measure_behaviour(nn.Linear(3, 3), inputs_of(nn.Linear(3, 3), torch.randn(1, 3)))
