"""Sums over words, sentences and spans lose nothing, whatever the tokenizer did to the text."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.attribution.aggregate import on_grid
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.words import joined, pieces_of, sentence_starts, word_starts

Pieces = Sequence[str]


def made(pieces: Pieces, special: Sequence[bool] | None = None, relevance: torch.Tensor | None = None) -> Attribution:
    numbers = torch.arange(1.0, len(pieces) + 1, dtype=torch.float64) if relevance is None else relevance
    return Attribution(
        "attnlrp", "logit", 1.0, {"input_ids": numbers[None]}, tokens=[list(pieces)], pieces=[list(pieces)],
        special=torch.tensor([special if special is not None else [False] * len(pieces)]),
    )  # fmt: skip


def cut(text: str, at: Sequence[int]) -> list[str]:
    """The text in pieces, cut between any two bytes."""
    raw = text.encode()
    edges = [0, *sorted({place % (len(raw) + 1) for place in at} - {0, len(raw)}), len(raw)]
    return [raw[a:b].decode("utf-8", "surrogateescape") for a, b in zip(edges, edges[1:], strict=False)]


TEXTS = st.text(st.sampled_from("ab Zé.!?\n\t 日本の👍\u202e\u0301\u3000。<>"), min_size=1, max_size=40)
CUTS = st.lists(st.integers(0, 200), max_size=30)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


@given(TEXTS, CUTS, st.data())
@settings(max_examples=300, deadline=None)
def test_sums_are_the_same_number_at_every_level_and_in_every_order(text: str, at: list[int], data: st.DataObject) -> None:
    pieces = cut(text, at)
    count = len(pieces)
    relevance = torch.tensor(data.draw(st.lists(NUMBERS, min_size=count, max_size=count)), dtype=torch.float64)
    special = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    edge = data.draw(st.integers(0, count))
    found = made(pieces, special, relevance)
    levels = [found.words(), found.sentences(), found.groups([[place] for place in range(count)])]
    if edge:
        levels.append(found.groups({"the first": (0, edge)}))
    for groups in levels:
        numbers = [row.relevance for row in groups]
        assert sum(numbers) == math.fsum(numbers) == groups.total == levels[0].total
        random.Random(0).shuffle(numbers)
        assert sum(numbers) == groups.total
        assert sorted(place for row in groups for place in row.places) == list(range(count))
    exact = math.fsum(relevance.tolist())
    assert abs(levels[0].total - exact) <= count * 2.0**-52 * float(relevance.abs().sum())
    assert [row.places for row in levels[0] if row.kind == "special"] == [(place,) for place in range(count) if special[place]]


@given(st.lists(st.floats(width=32, min_value=-1e4, max_value=1e4).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=1, max_size=50))
def test_relevance_in_float32_of_ordinary_size_is_not_moved_at_all(numbers: list[float]) -> None:
    given = torch.tensor(numbers, dtype=torch.float32)
    assert torch.equal(on_grid(given), given.double())


def naive_words(pieces: Pieces) -> list[list[int]]:
    """Read byte by byte: a token goes on with the group before it exactly if the text is not between two words where it begins."""
    text = b"".join(piece.encode("utf-8", "surrogateescape") for piece in pieces).decode()
    word, inside, of_byte = -1, False, []
    for character in text:
        if character.isspace():
            inside = False
        elif not inside:
            word, inside = word + 1, True
        of_byte += [word if inside else None] * len(character.encode())
    found: list[list[int]] = []
    at = 0
    for place, piece in enumerate(pieces):
        if at and of_byte[at] is not None and of_byte[at - 1] == of_byte[at]:
            found[-1].append(place)
        else:
            found.append([place])
        at += len(piece.encode("utf-8", "surrogateescape"))
    return found


@given(st.text(st.sampled_from("ab é.\n👍"), min_size=1, max_size=40), CUTS)
@settings(max_examples=300, deadline=None)
def test_a_token_that_begins_within_a_word_joins_it_and_no_other_does(text: str, at: list[int]) -> None:
    pieces = cut(text, at)
    assert [list(row.places) for row in made(pieces).words()] == naive_words(pieces)


@given(TEXTS, CUTS)
def test_the_text_of_groups_is_the_text(text: str, at: list[int]) -> None:
    pieces = cut(text, at)
    assert joined(pieces) == text
    assert "".join("".join(row.text.split()) for row in made(pieces).sentences()) == "".join(text.split())


# -- tokenizers ----------------------------------------------------------------------------------------------------------

CORPUS = ["the unbelievable cat sat on the mat", "naïve café wörld", "a banana in the sun", "unbe liev able cats"] * 5
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Any:
    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    own.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    own.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return own


def metaspace() -> Any:
    own = tokenizers.Tokenizer(models.Unigram())
    own.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    own.decoder = decoders.Metaspace()  # type: ignore[assignment]
    own.train_from_iterator([*CORPUS, "👍"], trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>"))
    return own


def byte_fallback() -> Any:
    vocabulary = {
        token: id for id, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"])
    }
    own = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    return own


def word_piece() -> Any:
    own = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    own.decoder = decoders.WordPiece()  # type: ignore[assignment]
    own.train_from_iterator([*CORPUS, "👍"], trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL))
    return own


def word_level() -> Any:
    own = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    own.train_from_iterator([*CORPUS, "👍"], trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return own


def word_ends() -> Any:
    own = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    own.decoder = decoders.BPEDecoder(suffix="</w>")  # type: ignore[assignment]
    own.train_from_iterator([*CORPUS, "👍"], trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, end_of_word_suffix="</w>"))
    return own


@pytest.mark.parametrize("make", [byte_level, metaspace, byte_fallback, word_piece, word_level, word_ends])
def test_words_are_those_of_the_text_with_every_kind_of_vocabulary(make: Callable[[], Any]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    text = "the unbelievable naïve café 👍 cat"
    ids = [1, *tokenizer.encode(text, add_special_tokens=False), 2]
    pieces = pieces_of(tokenizer, ids)
    special = [id in tokenizer.all_special_ids for id in ids]
    assert not any(special[1:-1]), tokenizer.convert_ids_to_tokens(ids)
    found = made(pieces, special).words()
    words = [row.text for row in found if row.text.strip() or row.kind == "special"]
    if make is byte_fallback:
        words = [word for word in words if word]
    assert words == ["<s>", *text.split(), "</s>"]
    assert joined(pieces[1:-1]).split() == text.split()


def test_a_tokenizer_that_only_decodes_will_do() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    assert pieces_of(Letters(), list(b"a b")) == ["a", " ", "b"]


# -- rules ---------------------------------------------------------------------------------------------------------------

WORDS = [
    (["To", " be", ","], ["To", "be,"]),
    (["New York", " City", "'s of", " it"], ["New York", "City's of", "it"]),  # a token that holds several words is not divided
    (["a", "\n", "\n", "b"], ["a", "\n", "\n", "b"]),
    (["日本", "語の", "abc"], ["日本", "語の", "abc"]),
    (["x", " ", " ", "y"], ["x", " ", " ", "y"]),
    ([" \udcf0\udc9f", "\udc91", "\udc8d", "!"], ["👍!"]),
    (["a\udcf0", "\udc9f\udc91\udc8d b", "c"], ["a👍 bc"]),  # it begins in the first word, and its rest follows
    (["\udce2"], ["\ufffd"]),
]


@pytest.mark.parametrize(("pieces", "words"), WORDS)
def test_tokens_are_joined_where_no_space_is(pieces: list[str], words: list[str]) -> None:
    assert [row.text for row in made(pieces).words()] == words


SENTENCES = [
    ("It rains. I stay! Do you? … Yes", ["It rains.", "I stay!", "Do you?", "…", "Yes"]),
    ("Mr. Smith met J. K. Rowling, e.g. Today. End", ["Mr. Smith met J. K. Rowling, e.g. Today.", "End"]),
    ("He said “no.” Then left.", ["He said “no.”", "Then left."]),
    ("it was 3.5 percent. then no more.", ["it was 3.5 percent.", "then no more."]),  # no capitals at all
    ("The U.S. economy. Grew", ["The U.S. economy.", "Grew"]),
    ("A heading\n\nThe text\ngoes on.", ["A heading", "The text\ngoes on."]),
    ("今日は。明日は！", ["今日は。", "明日は！"]),
    ("Wait... what? no", ["Wait... what? no"]),  # small letters go on
]


@pytest.mark.parametrize(("text", "sentences"), SENTENCES)
def test_sentences_end_where_readers_see_an_end(text: str, sentences: list[str]) -> None:
    assert [row.text for row in made(list(text)).sentences()] == sentences


def test_a_special_token_is_a_row_and_ends_words_and_sentences() -> None:
    found = made(["<s>", "Hel", "</s>", "lo", "<pad>"], [True, False, True, False, True])
    for groups in (found.words(), found.sentences()):
        assert [(row.text, row.kind) for row in groups] == [
            ("<s>", "special"), ("Hel", "text"), ("</s>", "special"), ("lo", "text"), ("<pad>", "special"),
        ]  # fmt: skip


def test_starts_of_nothing_are_nothing() -> None:
    assert word_starts([], []) == []
    assert sentence_starts(["", "a", ""], [False] * 3) == [True, False, False]


# -- groups --------------------------------------------------------------------------------------------------------------


def test_spans_have_names_and_what_is_in_none_is_a_row() -> None:
    found = made(["<s>", "sys", " use", "r", "!"], [True, False, False, False, False])
    groups = found.groups({"system": (1, 2), "user": range(2, 4)})
    assert [(row.text, row.places, row.relevance, row.kind) for row in groups] == [
        ("system", (1,), 2.0, "text"), ("user", (2, 3), 7.0, "text"), ("rest", (0, 4), 6.0, "rest"),
    ]  # fmt: skip
    assert [row.text for row in found.groups([(1, 4)])] == ["sys user", "rest"]
    assert groups[0].text == "system"
    assert len(groups[0:2]) == 2
    assert list(groups.to_frame()["relevance"]) == [2.0, 7.0, 6.0]
    assert groups.to_dict()["total"] == 15.0
    assert "system" in groups._repr_html_()
    assert str(groups) == "Groups(3 groups, total 15)"


def test_groups_need_no_tokens() -> None:
    bare = Attribution("attnlrp", "logit", 1.0, {"input_ids": torch.ones(1, 3)})
    assert [row.text for row in bare.groups([(0, 2)])] == ["0:2", "rest"]


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([(0, 2), (1, 3)], "token 1 is in two groups, '0' and '1'"),
        ([(2, 2)], "is empty"),
        ([(1, 9)], "there are 3 tokens, 0 to 2"),
        ([[-1]], "leaves the text"),
    ],
)
def test_spans_that_make_no_groups_are_refused(spans: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        made(["a", "b", "c"]).groups(spans)
    assert says in str(error.value)


def test_words_without_tokens_or_special_mask_are_refused() -> None:
    bare = Attribution("attnlrp", "logit", 1.0, {"input_ids": torch.ones(1, 3)})
    with pytest.raises(InputError, match="words need the text of the tokens, which this attribution has not"):
        bare.words()
    with pytest.raises(InputError, match="sentences need to know which tokens are special"):
        Attribution("attnlrp", "logit", 1.0, {"input_ids": torch.ones(1, 1)}, tokens=[["a"]]).sentences()


def test_one_text_of_several_must_be_named() -> None:
    two = Attribution(
        "attnlrp", "logit", 1.0, {"input_ids": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, tokens=[["a", " b"], ["c", "d"]],
        special=torch.zeros(2, 2, dtype=torch.bool),
    )  # fmt: skip
    with pytest.raises(SelectionError, match="which text\\? there are 2"):
        two.words()
    with pytest.raises(SelectionError, match="no sample 2: there are 2, 0 to 1"):
        two.words(2)
    assert [row.relevance for row in two.words(1)] == [7.0]


def test_tokens_of_another_input_are_refused() -> None:
    found = Attribution(
        "attnlrp", "logit", 1.0, {"decoder_input_ids": torch.ones(1, 3)}, tokens=[["a"]], special=torch.zeros(1, 1, dtype=torch.bool)
    )
    with pytest.raises(InputError, match="3 positions and 1 tokens"):
        found.words()


def test_a_relevance_that_is_not_finite_has_no_sum() -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        on_grid(torch.tensor([1.0, float("nan")]))
