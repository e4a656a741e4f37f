"""Who was measured: a change of weights or vocabulary changes the name, padding and truncation do not."""

from __future__ import annotations

import copy
from typing import Any

import torch

from headscope.app.report.identity import describe_environment, describe_model, tokenizer_digest
from headscope.probe import Probe
from headscope.probe.models import tokenize
from tests.app.report.conftest import Small


class Slow:
    """A tokenizer without a fast one behind it."""

    special_tokens_map = {"pad_token": "<pad>"}

    def __init__(self, **words: int) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_the_digest_of_a_tokenizer_follows_its_vocabulary_only(small: Small) -> None:
    before, other = tokenizer_digest(small.tokenizer), copy.deepcopy(small.tokenizer)
    other.backend_tokenizer.enable_truncation(5)
    other.backend_tokenizer.enable_padding(length=9)
    assert tokenizer_digest(other) == before
    other.add_tokens(["<new>"])
    assert tokenizer_digest(other) != before


def test_a_tokenizer_without_a_fast_one_is_named_by_its_words() -> None:
    found: list[Any] = [tokenizer_digest(Slow(a=1, b=2)), tokenizer_digest(Slow(b=2, a=1)), tokenizer_digest(Slow(a=1, b=3))]
    assert found[0] == found[1] != found[2]
    assert tokenizer_digest(None) is None


def test_a_model_is_described_by_what_can_be_counted(small: Small) -> None:
    sites = tuple(Probe(small.model).sites(**tokenize(small.tokenizer, "a", small.model)))
    found = describe_model(small.model, small.tokenizer, sites, "name", "abc")
    assert (found["id"], found["revision"], found["sites"], found["heads"], found["dtype"]) == ("name", "abc", 2, 4, "float32")
    assert found["parameters"] == sum(parameter.numel() for parameter in small.model.parameters())
    other = copy.deepcopy(small.model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    assert describe_model(other, small.tokenizer, sites, None, None)["weights_sha256"] != found["weights_sha256"]


def test_the_environment_names_the_versions_that_ran() -> None:
    found = describe_environment(torch.device("cpu"))
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0] or found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
