"""Rows for generated tokens, and relevance that hops from an answer to the prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from headscope.kernels.errors import AttributionError, HeadscopeError, InputError, SelectionError
from headscope.probe import load
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.reasoning import Trace, attribute_span, open_ended, redistribute, trace
from headscope.probe.attribution.target import Target
from headscope.probe.models import embedded_folder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    made: nn.Module = LlamaForCausalLM(config).double().eval()
    return made


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 40, (1, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["attnlrp", "cp-lrp", "gim", "gradient-x-input"])
def test_each_row_is_the_attribution_of_that_token_alone(method: str, model: nn.Module, ids: Tensor) -> None:
    found = attribute_span(model, ids, 4, 8, method)
    assert found.places == (4, 5, 6, 7)
    for place, value, row in zip(found.places, found.values, found.relevance, strict=True):
        alone = attribute(model, {"input_ids": ids}, Target((int(ids[0, place]),), (), (place - 1,)), method)
        assert value == pytest.approx(alone.value, abs=1e-12)
        assert torch.allclose(row, alone.of_tokens()[0, :8], atol=1e-12, rtol=0)
        assert not row[place:].any()


def test_rows_add_up_to_the_attribution_of_the_sum(model: nn.Module, ids: Tensor) -> None:
    found = attribute_span(model, ids, 1, 9)
    assert torch.allclose(found.relevance.sum(0), found.whole.of_tokens()[0], atol=1e-12, rtol=0)
    assert sum(found.values) == pytest.approx(found.whole.value, abs=1e-12)
    assert found.whole.passed


def test_rows_share_one_forward_pass(model: nn.Module, ids: Tensor) -> None:
    forwards: list[int] = []
    steps: list[tuple[int, int]] = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        attribute_span(model, ids, 2, 9, progress=lambda done, total: steps.append((done, total)))
    finally:
        handle.remove()
    assert len(forwards) == 2  # the rows, and the sum
    assert steps == [(done, 7) for done in range(1, 8)]


def test_nothing_stays_on_the_model(model: nn.Module, ids: Tensor) -> None:
    before = model(input_ids=ids).logits
    attribute_span(model, ids, 4, 6)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("given", "span", "method", "error", "says"),
    [
        ([1, 9], (0, 2), "attnlrp", SelectionError, "no tokens 0:2 to explain: give START:STOP between 1 and 9"),
        ([1, 9], (4, 10), "attnlrp", SelectionError, "no tokens 4:10"),
        ([1, 9], (4, 4), "attnlrp", SelectionError, "no tokens 4:4"),
        ([1, 9], (4, 5), "attnlpr", SelectionError, "no rules 'attnlpr'"),
        ([2, 9], (4, 5), "attnlrp", InputError, "ids are [2, 9]: give the token ids of one text, [1, S]"),
        ([9], (4, 5), "attnlrp", InputError, "ids are [9]"),
    ],
)
def test_spans_that_cannot_be_explained_are_refused(
    given: list[int], span: tuple[int, int], method: str, error: type[HeadscopeError], says: str, model: nn.Module
) -> None:
    with pytest.raises(error) as caught:
        attribute_span(model, torch.ones(given, dtype=torch.long), *span, method)
    assert says in str(caught.value)


def test_models_that_write_no_text_of_one_piece_are_refused(ids: Tensor) -> None:
    config = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(InputError, match="T5ForConditionalGeneration has an encoder for its prompt"):
        attribute_span(T5ForConditionalGeneration(config).eval(), ids, 4, 5)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(40, 8), nn.Linear(8, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            found: Tensor = self.out(self.embedding(input_ids).mean(1))
            return found

    with pytest.raises(AttributionError, match=r"logits are \[1, 3\]; a row for each token needs those of every position, \[1, 5, V\]"):
        attribute_span(Pooled().eval(), ids, 4, 5)


# -- hops ----------------------------------------------------------------------------------------------------------------


def naive_hop(mass: list[float], rows: list[list[float]], prompt: int) -> list[float]:
    """One hop, token by token, from the formula."""
    after = [number if place < prompt else 0.0 for place, number in enumerate(mass)]
    for place in range(prompt, len(mass)):
        evidence = [max(number, 0.0) for number in rows[place - prompt][:place]]
        if sum(evidence) == 0:
            after[place] += mass[place]
            continue
        for other, number in enumerate(evidence):
            after[other] += mass[place] * number / sum(evidence)
    return after


@given(st.integers(1, 4), st.integers(1, 6), st.data())
@settings(max_examples=150, deadline=None)
def test_every_hop_keeps_the_sum_and_all_of_it_reaches_the_prompt(prompt: int, made: int, data: st.DataObject) -> None:
    numbers = st.floats(-10, 10, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
    length = prompt + made
    rows = data.draw(st.lists(st.lists(numbers, min_size=length, max_size=length), min_size=made, max_size=made))
    mass = data.draw(st.lists(numbers, min_size=length, max_size=length))
    found = redistribute(torch.tensor(mass, dtype=torch.float64), torch.tensor(rows, dtype=torch.float64), prompt)
    assert len(found) <= made + 1
    expected = mass
    for after in found:
        assert after.tolist() == pytest.approx(expected, abs=1e-9)
        assert float(after.sum()) == pytest.approx(sum(mass), abs=1e-9)
        expected = naive_hop(expected, rows, prompt)
    stuck = [place for place in range(prompt, length) if not any(number > 0 for number in rows[place - prompt][:place])]
    left = [place for place in range(prompt, length) if found[-1][place] != 0]
    assert set(left) <= set(stuck)


def test_hops_stop_where_asked() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.0, 1, 0, 0], [0, 0, 1, 0]])
    mass = torch.tensor([0.0, 0, 0, 8.0])
    found = redistribute(mass, rows, 1)
    assert [step.tolist() for step in found] == [[0, 0, 0, 8], [0, 0, 8, 0], [0, 8, 0, 0], [8, 0, 0, 0]]
    assert len(redistribute(mass, rows, 1, hops=0)) == 1
    assert len(redistribute(mass, rows, 1, hops=2)) == 3
    assert len(redistribute(mass, rows, 1, hops=99)) == 4


# -- end to end ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking() -> tuple[nn.Module, Any, list[int]]:
    try:
        embedded_folder("lm")
    except HeadscopeError as error:
        pytest.skip(str(error))
    model, tokenizer = load("embedded:lm")
    inputs = tokenizer("To be, or not to", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    return model, tokenizer, written[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def traced(speaking: tuple[nn.Module, Any, list[int]]) -> Trace:
    return trace(speaking[0], speaking[1], "To be, or not to", speaking[2], (4, 6))


def test_an_answer_is_traced_to_the_prompt(traced: Trace, speaking: tuple[nn.Module, Any, list[int]]) -> None:
    assert traced.prompt == 7
    assert traced.answer == (11, 13)
    assert len(traced.tokens) == 13
    assert torch.allclose(traced.masses[0].float(), traced.whole.of_tokens()[0], atol=1e-4)
    total = float(traced.masses[0].sum())
    assert [float(mass.sum()) for mass in traced.masses] == pytest.approx([total] * len(traced.masses), abs=1e-9)
    assert traced.on_generated[0] > 0.1 * total  # otherwise there was nothing to send on
    assert traced.on_generated[-1] == pytest.approx(0, abs=1e-12)
    assert traced.on_prompt[-1] == pytest.approx(total)
    assert traced.whole.passed
    once = trace(speaking[0], speaking[1], "To be, or not to", speaking[1].decode(speaking[2]), (4, 6), hops=1)
    assert len(once.masses) == 2
    assert torch.allclose(once.masses[1], traced.masses[1], atol=1e-6)  # as text it has the same tokens here


def test_a_trace_can_be_shown_and_written(traced: Trace) -> None:
    told = json.loads(traced.to_json())
    assert told["prompt"] == 7
    assert len(told["hops"]) == len(told["on_prompt"]) == len(traced.masses)
    frame = traced.to_frame()
    assert len(frame) == len(traced.masses) * 13
    assert frame[frame["hop"] == 0]["relevance"].sum() == pytest.approx(float(traced.masses[0].sum()))
    page = traced._repr_html_()
    assert "0 hops" in page
    assert "<script" not in page
    assert "hops," in str(traced)


def test_rows_can_be_shown_and_written(speaking: tuple[nn.Module, Any, list[int]]) -> None:
    model, tokenizer, said = speaking
    ids = torch.cat([tokenizer("To be, or not to", return_tensors="pt")["input_ids"], torch.tensor([said])], dim=1)
    rows = attribute_span(model, ids, 7, 9, tokenizer=tokenizer)
    assert rows.tokens[2] == " be"
    assert json.loads(rows.to_json())["places"] == [7, 8]
    assert len(rows.to_frame()) == 7 + 8
    assert "at 7" in rows._repr_html_()
    assert str(rows) == "Rows(2 of 9 tokens, attnlrp)"


@pytest.mark.parametrize(
    ("generated", "span", "hops", "error", "says"),
    [
        ("", (0, 1), None, InputError, "the generated text has no tokens"),
        ([5, 6], (1, 3), None, SelectionError, "no answer 1:3: 2 tokens were generated, give START:STOP between 0 and 2"),
        ([5, 6], (1, 1), None, SelectionError, "no answer 1:1"),
        ([5, 6], (0, 1), -1, SelectionError, "-1 hops: give 0 or more, or None for all"),
        ([5] * 5000, (0, 5000), None, InputError, "prompt and answer have 5002 tokens, the context window of this model 4096"),
    ],
)
def test_answers_that_cannot_be_traced_are_refused(
    generated: Any,
    span: tuple[int, int],
    hops: int | None,
    error: type[HeadscopeError],
    says: str,
    speaking: tuple[nn.Module, Any, list[int]],
) -> None:
    with pytest.raises(error) as caught:
        trace(speaking[0], speaking[1], "To", generated, span, hops=hops)
    assert says in str(caught.value)


def test_an_end_of_text_behind_the_prompt_is_left_out() -> None:
    class Ending:
        eos_token_id = 2

    assert open_ended(torch.tensor([[1, 5, 2]]), Ending()).tolist() == [[1, 5]]
    assert open_ended(torch.tensor([[1, 5]]), Ending()).tolist() == [[1, 5]]
    assert open_ended(torch.tensor([[2]]), Ending()).tolist() == [[2]]
