"""`measure_health` reads real models as they are: fused or written out, padded or not, and leaves them and the random state alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from headscope.kernels.errors import InputError, NotIntercepted, SelectionError
from headscope.probe.health.inputs import batches_of
from headscope.probe.health.measure import measure_health, run_batches
from headscope.probe.health.measures import HEAD_FIELDS, STREAM_FIELDS, HeadMeasures, StreamMeasures
from headscope.probe.models import load

torch.set_num_threads(1)

WITHOUT_PADDING = {"sink_key", "special_mass"}


def gpt2(attention: str = "sdpa") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=50, bos_token_id=0, eos_token_id=0, attn_implementation=attention
    )
    return GPT2LMHeadModel(config).eval()


def bert(attention: str = "sdpa") -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50, max_position_embeddings=64,
        attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config).eval()


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(2, 50, shape, generator=torch.Generator().manual_seed(1))


def close(a: tuple[HeadMeasures, ...], b: tuple[HeadMeasures, ...], near: float = 3e-5, without: set[str] = WITHOUT_PADDING) -> None:
    assert [one.site.name for one in a] == [one.site.name for one in b]
    for one, other in zip(a, b, strict=True):
        assert (one.queries, one.causal, one.square) == (other.queries, other.causal, other.square)
        for name in set(HEAD_FIELDS) - without:
            torch.testing.assert_close(one.numbers()[name], other.numbers()[name], rtol=near, atol=near, equal_nan=True)


def close_streams(a: tuple[StreamMeasures, ...], b: tuple[StreamMeasures, ...]) -> None:
    assert [one.name for one in a] == [one.name for one in b]
    for one, other in zip(a, b, strict=True):
        for name in STREAM_FIELDS:
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4, abs=1e-5, nan_ok=True), name


def test_the_embedded_language_model_is_causal_in_every_head_and_every_number_is_there() -> None:
    model, tokenizer = load("embedded:lm")
    report = measure_health(
        model, dict(tokenizer("the cat sat on the mat and the cat sat on the mat", return_tensors="pt")), baselines=False
    )
    assert all(one.causal and one.square for one in report.heads)
    assert len(report.streams) == len(report.heads) + 1
    for one in report.heads:
        assert set(one.undefined) == {"special_mass"}
        shares = one.diffuse + one.routing + one.hub
        torch.testing.assert_close(shares, torch.ones_like(shares))


def test_the_embedded_vision_model_sees_both_sides() -> None:
    model, _ = load("embedded:vit")
    side, channels = model.config.image_size, model.config.num_channels
    report = measure_health(model, {"pixel_values": torch.rand(2, channels, side, side)}, baselines=False)
    assert not any(one.causal for one in report.heads)
    assert all(set(one.undefined) == {"special_mass", "contraction"} for one in report.heads)
    assert [one.place for one in report.streams] == ["input", *["output"] * len(report.heads)]


def test_fused_and_written_out_attention_of_gpt2_agree() -> None:
    ids = tokens_of(2, 20)
    fused, written = (measure_health(gpt2(way), {"input_ids": ids}, baselines=False, spectrum=2) for way in ("sdpa", "eager"))
    close(fused.heads, written.heads, without={"special_mass"})
    close_streams(fused.streams, written.streams)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_padding_a_bert_batch_changes_no_number(way: str) -> None:
    model, long, short = bert(way), tokens_of(1, 12), tokens_of(1, 7)
    ids, mask = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int64)
    ids[0], mask[0], ids[1, :7], mask[1, :7] = long[0], 1, short[0], 1
    padded = measure_health(model, {"input_ids": ids, "attention_mask": mask}, baselines=False)
    alone = measure_health(model, [{"input_ids": long}, {"input_ids": short}], baselines=False)
    close(padded.heads, alone.heads)
    close_streams(padded.streams, alone.streams)
    assert padded.heads[0].queries == 19


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_left_padding_a_causal_model_changes_no_number(way: str) -> None:
    model, ids = gpt2(way), tokens_of(1, 9)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(14) >= 5).long()[None]
    place = (torch.arange(14) - 5).clamp_min(0)[None]
    one = measure_health(model, {"input_ids": padded, "attention_mask": mask, "position_ids": place}, baselines=False)
    other = measure_health(model, {"input_ids": ids}, baselines=False)
    close(one.heads, other.heads)
    close_streams(one.streams, other.streams)
    assert int(one.heads[0].sink_key[0]) == int(other.heads[0].sink_key[0]) + 5


def test_model_gradients_and_random_state_are_left_alone() -> None:
    model, ids = gpt2(), tokens_of(1, 8)
    with torch.no_grad():
        before = model(ids).logits
    state = torch.random.get_rng_state()
    measure_health(model, {"input_ids": ids})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_token_ids_may_come_as_a_tensor_without_a_batch() -> None:
    ids = tokens_of(8)
    one, other = measure_health(gpt2(), ids, baselines=False), measure_health(gpt2(), {"input_ids": ids[None]}, baselines=False)
    close(one.heads, other.heads)


def test_special_tokens_have_their_mass_and_can_be_left_out() -> None:
    ids = tokens_of(1, 8)
    special = torch.tensor([[True, *[False] * 6, True]])
    report = measure_health(bert(), {"input_ids": ids}, special=special, ignore_special=True, baselines=False)
    assert report.heads[0].queries == 6
    assert bool((report.heads[0].special_mass > 0).all())
    assert report.streams[0].tokens == 6


def test_only_the_chosen_layers_are_measured_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    report = measure_health(gpt2(), [{"input_ids": tokens_of(1, 6)}] * 3, layers=1, progress=lambda *done: told.append(done))
    assert [one.site.layer for one in report.heads] == [1]
    assert {one.layer for one in report.streams} == {1}
    assert told[-1][0] == told[-1][1] == 6
    assert report.heads[0].calls == 3


def test_a_loss_gives_gradients_and_baselines_give_a_fresh_model() -> None:
    ids = tokens_of(1, 8)
    report = measure_health(gpt2(), {"input_ids": ids, "labels": ids}, gradients=lambda output: output.loss)
    assert [one.site.name for one in report.gradients] == [one.site.name for one in report.heads]
    assert bool(report.gradients[0].ratio.isfinite().all())
    assert report.info["model"] == "GPT2LMHeadModel"


def test_generation_is_measured_call_by_call() -> None:
    model = gpt2()
    batches = batches_of(model, {"input_ids": tokens_of(1, 6)})
    model.forward = _generating(model)  # type: ignore[method-assign]
    heads, _ = run_batches(model, batches)
    assert heads[0].calls == 3
    assert heads[0].queries == 6 + 1 + 1
    assert heads[0].causal


def _generating(model: GPT2LMHeadModel) -> object:
    original = type(model).forward

    def forward(input_ids: Tensor) -> object:
        output = original(model, input_ids, use_cache=True)
        for _ in range(2):
            output = original(model, output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)
        return output

    return forward


def test_one_token_and_a_broken_model_are_undefined_not_ill() -> None:
    one = measure_health(gpt2(), {"input_ids": tokens_of(1, 1)}, baselines=False)
    assert "one" in one.heads[0].undefined["routing"]
    assert one.streams[0].undefined["residual"] == "fewer than two tokens"
    assert one.findings == ()
    model = gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight[2] = math.nan
    broken = measure_health(model, {"input_ids": tokens_of(1, 5)}, baselines=False)
    assert "NaN" in broken.heads[0].undefined["entropy"]
    assert "NaN" in broken.streams[0].undefined["residual"]
    assert broken.findings == ()


def test_what_cannot_be_measured_is_refused_in_words() -> None:
    ids, training = tokens_of(1, 6), gpt2().train()
    with pytest.raises(InputError, match="training mode"):
        measure_health(training, {"input_ids": ids})
    with pytest.raises(NotIntercepted, match="0 attention sites"):
        measure_health(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4), baselines=False)
    with pytest.raises(NotIntercepted, match="expected a torch"):
        measure_health("gpt2", {"input_ids": ids})  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="chooses no attention"):
        measure_health(gpt2(), {"input_ids": ids}, sites="*nowhere*", baselines=False)
    with pytest.raises(InputError, match="give at least one batch"):
        measure_health(gpt2(), [])
    with pytest.raises(InputError, match="inputs is str"):
        measure_health(gpt2(), "text")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokens is .* give bool"):
        measure_health(gpt2(), {"input_ids": ids}, tokens=torch.ones(1, 6))
    with pytest.raises(InputError, match="no attention has"):
        measure_health(gpt2(), {"input_ids": ids}, tokens=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="spectrum=-1"):
        measure_health(gpt2(), {"input_ids": ids}, spectrum=-1)
    with pytest.raises(InputError, match="without special"):
        measure_health(gpt2(), {"input_ids": ids}, ignore_special=True)


def test_inputs_without_a_token_are_refused() -> None:
    with pytest.raises(InputError, match="no token to measure"):
        measure_health(gpt2(), {"input_ids": tokens_of(1, 0)})
    with pytest.raises(InputError, match="no token to measure"):
        measure_health(gpt2(), tokens_of(1, 0))


def test_a_compiled_model_is_compared_with_a_fresh_copy_of_what_it_wraps() -> None:
    compiled = torch.compile(gpt2(), backend="eager")
    report = measure_health(compiled, {"input_ids": tokens_of(1, 12)})
    assert not report.baselines.absent
    assert [one.site.name for one in report.baselines.heads] == [one.site.name for one in report.heads]
    assert [one.name for one in report.baselines.streams] == [one.name for one in report.streams]
