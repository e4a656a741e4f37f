"""A target is one number of an output, named so that a report can say it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.kernels.errors import AttributionError, InputError, SelectionError
from headscope.probe.attribution.target import (
    Target,
    as_target,
    contrast,
    generated,
    id_named,
    logits_of,
    one_number,
    one_number_of,
)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_each_sample_has_its_own_value(logits: Tensor) -> None:
    assert Target((3,)).each(logits).tolist() == [float(logits[sample, 4, 3]) for sample in range(2)]
    assert float(Target((3,))(logits)) == pytest.approx(float(logits[0, 4, 3] + logits[1, 4, 3]))
    assert Target().each(logits).tolist() == logits[:, -1].amax(-1).tolist()
    assert Target((1,)).each(logits[:, 0]).tolist() == logits[:, 0, 1].tolist()  # classes: no positions


def test_a_contrast_is_a_difference(logits: Tensor) -> None:
    assert contrast(2, 5, 1).each(logits).tolist() == (logits[:, 1, 2] - logits[:, 1, 5]).tolist()


def test_a_generated_span_is_read_where_each_token_was_predicted(logits: Tensor) -> None:
    span = generated([6, 0, 3], prompt=2)
    assert span.positions == (1, 2, 3)
    expected = logits[:, 1, 6] + logits[:, 2, 0] + logits[:, 3, 3]
    assert span.each(logits).tolist() == pytest.approx(expected.tolist())
    chances = logits.log_softmax(-1)
    expected = chances[:, 1, 6] + chances[:, 2, 0] + chances[:, 3, 3]
    assert generated([6, 0, 3], 2, log_probability=True).each(logits).tolist() == pytest.approx(expected.tolist())


def test_several_tokens_at_one_position_are_summed(logits: Tensor) -> None:
    assert Target((1, 2), (3, 4)).each(logits).tolist() == pytest.approx(
        (logits[:, -1, 1] + logits[:, -1, 2] - logits[:, -1, 3] - logits[:, -1, 4]).tolist()
    )


def test_the_largest_logit_is_named_for_one_sample_only(logits: Tensor) -> None:
    assert Target().resolved(logits[:1]).ids == (int(logits[0, -1].argmax()),)
    assert Target(positions=(0, 3)).resolved(logits[:1]).ids == (int(logits[0, 0].argmax()), int(logits[0, 3].argmax()))
    assert Target((1,)).resolved(logits).ids == (1,)
    with pytest.raises(AttributionError, match="the largest logit of 2 samples is not one class"):
        Target().resolved(logits)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (Target((7,)), "no class or token 7: there are 7, 0 to 6"),
        (Target((-1,)), "no class or token -1"),
        (Target((1,), (9,)), "no class or token 9"),
        (Target((1,), positions=(5,)), "no prediction at position 5: there are 5, -5 to 4"),
        (Target((1, 2, 3), positions=(0, 1)), "3 tokens, 0 against them and 2 positions"),
        (Target((1, 2), (3,)), "2 tokens, 1 against them"),
    ],
)
def test_what_is_not_there_is_refused(target: Target, says: str, logits: Tensor) -> None:
    with pytest.raises(SelectionError) as error:
        target.each(logits)
    assert says in str(error.value)


def test_a_target_of_nothing_is_refused() -> None:
    for make in (lambda: Target(()), lambda: Target((1,), (), ()), lambda: generated([], 3)):
        with pytest.raises(SelectionError, match="a target of no tokens or no positions"):
            make()
    with pytest.raises(SelectionError, match="a prompt of 0 tokens: the first token of a text is not predicted"):
        generated([1], 0)


def test_a_target_says_what_it_is() -> None:
    assert Target().describe() == "largest logit"
    assert contrast(1, 2).describe(lambda id: f"<{id}>") == "logit of <1> minus <2>"
    assert contrast(1, 2, 4).describe() == "logit of 1 minus 2 at position 4"
    assert generated([5, 6], 3, log_probability=True).describe() == "log-probability of 5 + 6"
    assert contrast(1, 2).to_dict() == {"ids": [1], "against": [2], "positions": [-1], "log_probability": False}


def test_logits_are_found_in_what_models_return(logits: Tensor) -> None:
    for output in (logits, SimpleNamespace(logits=logits), {"logits": logits}, (logits, None)):
        assert logits_of(output) is logits
    for wrong in (None, SimpleNamespace(), {}, (), logits.long(), "text"):
        with pytest.raises(AttributionError, match="has no logits: give target= as a function"):
            logits_of(wrong)
    with pytest.raises(AttributionError, match=r"logits are \[2, 5, 7, 1\]"):
        Target((1,)).each(logits[..., None])


def test_users_may_give_numbers_targets_and_functions() -> None:
    def own(output: Any) -> Tensor:
        return torch.zeros(())

    assert as_target(None) == Target()
    assert as_target(3) == Target((3,))
    assert as_target(own) is own
    with pytest.raises(AttributionError, match="target=True"):
        as_target(True)


def test_only_one_number_with_a_graph_can_be_attributed() -> None:
    for wrong in (torch.zeros(2), torch.zeros(1, dtype=torch.long), 3.0, None):
        with pytest.raises(AttributionError, match="it must be one floating-point number"):
            one_number_of(wrong)
    with pytest.raises(AttributionError, match="does not depend on the inputs"):
        one_number(torch.zeros(1))
    assert one_number(torch.zeros(1, 1, requires_grad=True)).shape == ()


class Words:
    """A tokenizer of three words."""

    WORDS = ("to", " be", " or")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [id for id, word in enumerate(self.WORDS) for _ in range(text.count(word))]

    def decode(self, ids: list[int]) -> str:
        return self.WORDS[ids[0]]


def test_a_token_is_named_by_its_text_or_number() -> None:
    assert id_named(" be", Words()) == 1
    assert id_named("1077", Words()) == 1077
    with pytest.raises(InputError, match=r"'to be' is 2 tokens here, 'to' ' be': give one of them, or a token's number"):
        id_named("to be", Words())
    with pytest.raises(InputError, match="'xyz' is 0 tokens here, none"):
        id_named("xyz", Words())


def test_a_class_is_named_by_its_label_or_number() -> None:
    labels = {0: "cat", 1: "dog", 2: "dog"}
    assert id_named("cat", labels=labels) == 0
    assert id_named("2", labels=labels) == 2
    for text in ("dog", "cow"):  # two of that name, none
        with pytest.raises(InputError, match=f"no class '{text}': give a number, or one of cat, dog, dog"):
            id_named(text, labels=labels)
    with pytest.raises(InputError, match="no labels"):
        id_named("cat")
