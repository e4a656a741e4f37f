"""A value is the target of the model run on the input with some units gone, however they go, and leaves the model as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from headscope.interventions import Edit, Plan, scale, select
from headscope.kernels.errors import AttributionError, InputError, NonFiniteError, SelectionError, ShapeError
from headscope.probe.attribution.target import Target, contrast
from headscope.probe.attribution.units import Units, group_words, patch_units, token_units, units_of, word_units
from headscope.probe.attribution.value import Value, neutral_token

EXACT = dict(atol=1e-12, rtol=0)


class Speller:
    """A tokenizer of bytes in which token 0 is special."""

    all_special_ids = (0,)
    mask_token_id = 7

    def decode(self, ids: list[int]) -> str:
        return chr(96 + ids[0])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, num_labels=3
    )
    return BertForSequenceClassification(config).double().eval()


class Weighing(nn.Module):
    """An image's logits are sums of its weighted pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.arange(3 * 2 * 4 * 6, dtype=torch.float64).reshape(3, 2, 4, 6) / 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", pixel_values, self.weights)


def ids(*numbers: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([numbers]), "attention_mask": torch.ones(1, len(numbers), dtype=torch.long)}


def masks(*rows: str) -> Tensor:
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


# -- removals ------------------------------------------------------------------------------------------------------------------------


def test_a_removed_token_is_another_token() -> None:
    model = llama()
    value = Value(model, ids(0, 3, 4, 5, 6), 9, tokenizer=Speller())
    expected = [model(torch.tensor([row])).logits[0, -1, 9] for row in ([0, 3, 7, 5, 7], [0, 7, 7, 7, 7], [0, 3, 4, 5, 6])]
    torch.testing.assert_close(value(masks("1010", "0000", "1111")), torch.stack(expected).detach(), **EXACT)


def test_a_deleted_token_is_a_shorter_text_and_positions_close_up() -> None:
    model = llama()
    inputs = ids(0, 3, 4, 5, 6) | {"position_ids": torch.arange(5)[None]}
    value = Value(model, inputs, 9, removal="delete", tokenizer=Speller())
    expected = [model(torch.tensor([row])).logits[0, -1, 9] for row in ([0, 3, 5], [0], [0, 3, 4, 5, 6], [0, 6])]
    torch.testing.assert_close(value(masks("1010", "0000", "1111", "0001")), torch.stack(expected).detach(), **EXACT)


def test_a_hidden_token_is_out_of_the_attention_mask() -> None:
    model, inputs = bert(), ids(0, 3, 4, 5)
    value = Value(model, inputs, 1, removal="attention", tokenizer=Speller())
    expected = model(inputs["input_ids"], attention_mask=torch.tensor([[1, 1, 0, 1]])).logits[0, 1]
    torch.testing.assert_close(value(masks("101"))[0], expected.detach(), **EXACT)


@pytest.mark.parametrize("mean", [False, True])
def test_a_blank_embedding_is_zero_or_the_mean(mean: bool) -> None:
    model, inputs = llama(), ids(0, 3, 4, 5)
    looked_up = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds = looked_up.clone()
    embeds[0, 2] = looked_up[0].mean(0) if mean else 0
    value = Value(model, inputs, 9, removal="mean-embedding" if mean else "zero-embedding", tokenizer=Speller())
    expected = model(inputs_embeds=embeds).logits[0, -1, 9]
    torch.testing.assert_close(value(masks("101"))[0], expected.detach(), **EXACT)
    assert not model.get_input_embeddings()._forward_hooks


def test_a_shared_embedding_is_blank_for_the_encoder_only() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, init_std=0.3, max_position_embeddings=16,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).double().eval()
    inputs = ids(4, 5, 6) | {"decoder_input_ids": torch.tensor([[4, 5, 9]])}
    value = Value(model, inputs, 3, removal="zero-embedding")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds[0, 1] = 0
    expected = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], decoder_input_ids=inputs["decoder_input_ids"])
    torch.testing.assert_close(value(masks("101"))[0], expected.logits[0, -1, 3].detach(), **EXACT)


def test_tokens_that_no_embedding_looks_up_cannot_be_blanked() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(20, 3))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table[input_ids].sum(1)

    with pytest.raises(InputError, match="no embedding of Aside looked the tokens up as they were given: choose the removal token, delete"):
        Value(Aside().eval(), {"input_ids": torch.tensor([[3, 4]])}, 0, removal="zero-embedding").whole()


@pytest.mark.parametrize("removal", ["zero", "mean", "blur"])
def test_removed_patches_are_the_background(removal: str) -> None:
    model = Weighing().eval()
    image = torch.randn(1, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = Value(model, {"pixel_values": image}, 2, removal=removal, units=patch_units({"pixel_values": image}, 2))
    background = {"zero": torch.zeros_like(image), "mean": image.mean((2, 3), keepdim=True).expand_as(image)}
    changed = image.clone()
    if removal == "blur":
        side = 3  # the largest odd one in an image of 4 rows
        blurred = image
        for _ in range(2):
            rows = [[blurred[0, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean((1, 2)) for x in range(6)] for y in range(4)]
            blurred = torch.stack([torch.stack(row, -1) for row in rows], -2)[None]
        assert side == 3
        background["blur"] = blurred
    changed[..., 2:4, 2:4] = background[removal][..., 2:4, 2:4]  # row 1, column 1: unit 4
    torch.testing.assert_close(value(masks("111101"))[0], model(changed)[0, 2].detach(), **EXACT)


def test_removed_heads_are_those_that_a_plan_sets_to_zero() -> None:
    model, inputs = llama(), ids(0, 3, 4, 5, 6)
    value = Value(model, inputs, 9, removal="heads")
    assert len(value.units) == 8
    assert value.units.names[5] == "model.layers.1.self_attn#0 head 1"
    found = value(masks("11111111", "10111111", "11110101", "00000000"))
    for row, gone in zip(found[1:3], ([(0, 1)], [(1, 0), (1, 2)]), strict=True):
        with Plan([Edit("z", scale(0.0), select(layer=layer, head=head)) for layer, head in gone]).on(model), torch.no_grad():
            torch.testing.assert_close(row, model(**inputs).logits[0, -1, 9], **EXACT)
    torch.testing.assert_close(found[0], model(**inputs).logits[0, -1, 9].detach(), **EXACT)
    assert found.unique().numel() == 4


# -- what is read --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removal", ["token", "delete", "attention", "zero-embedding", "heads"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_makes_no_difference(removal: str, batch: int) -> None:
    keep = torch.rand(9, 8 if removal == "heads" else 5, generator=torch.Generator().manual_seed(1)) > 0.5
    keep[:, 0] = True
    model = llama()
    whole = Value(model, ids(3, 4, 5, 6, 3), 9, removal=removal, replacement=7)(keep)
    torch.testing.assert_close(Value(model, ids(3, 4, 5, 6, 3), 9, removal=removal, replacement=7, batch=batch)(keep), whole, **EXACT)


def test_probabilities_are_read_beside_the_logit() -> None:
    model, inputs = bert(), ids(3, 4, 5)
    values, chances = Value(model, inputs, 1, replacement=7).read(masks("111"))
    logits = model(**inputs).logits[0].detach()
    torch.testing.assert_close(values[0], logits[1], **EXACT)
    torch.testing.assert_close(chances[0], logits.exp()[1] / logits.exp().sum(), **EXACT)


@pytest.mark.parametrize("target", [contrast(1, 0), lambda output: output.logits[0, 1] - output.logits[0, 0]])
def test_what_has_no_probability_is_read_twice(target: Any) -> None:
    model, inputs = bert(), ids(3, 4, 5)
    values, chances = Value(model, inputs, target, replacement=7).read(masks("111", "010"))
    assert torch.equal(values, chances)
    logits = model(**inputs).logits[0].detach()
    torch.testing.assert_close(values[0], logits[1] - logits[0], **EXACT)


def test_the_largest_logit_is_that_of_the_intact_input() -> None:
    model, inputs = bert(), ids(3, 4, 5)
    value = Value(model, inputs, replacement=7)
    best = int(model(**inputs).logits[0].argmax())
    torch.testing.assert_close(value(masks("000"))[0], model(torch.tensor([[7, 7, 7]])).logits[0, best].detach(), **EXACT)
    assert value.whole() == model(**inputs).logits[0, best].item()


def test_every_set_is_counted() -> None:
    value = Value(bert(), ids(3, 4, 5), replacement=7, batch=2)
    value(torch.ones(5, 3, dtype=torch.bool))
    assert value.forwards == 5


# -- bad input -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"removal": "erase"}, SelectionError, "no removal 'erase': there are token, delete, attention"),
        ({"removal": "blur"}, InputError, "input_ids cannot be removed by 'blur': choose token, delete, attention"),
        ({"batch": 0}, InputError, "batch 0: give 1 or more"),
        ({"removal": "delete", "target": Target((1,), positions=(1,))}, InputError, "deletion moves the positions of a target"),
        ({"removal": "heads", "units": Units("input_ids", ((0,),), ("a",), (3,))}, InputError, "leave units= out"),
        ({"units": Units("words", ((0,),), ("a",), (3,))}, InputError, "'words', which is not one sample's tensor among input_ids"),
        ({"units": Units("input_ids", ((0,),), ("a",), (4,))}, InputError, r"\[1, 3\]; its last axes must be those of the units, \[4\]"),
    ],
)
def test_what_cannot_be_removed_is_refused(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Value(bert(), ids(3, 4, 5), **{"target": 1, "replacement": 7, **changes})


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"call model\.eval\(\) first"):
        Value(bert().train(), ids(3, 4, 5), 1, replacement=7)


def test_a_value_that_is_not_finite_is_refused() -> None:
    model = bert()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    value = Value(model, ids(3, 4, 5), 1, replacement=7)
    assert value.whole() == value.whole()
    with pytest.raises(NonFiniteError, match="not finite with some units removed by 'token'"):
        value(masks("101"))


def test_keep_of_another_shape_is_refused() -> None:
    value = Value(bert(), ids(3, 4, 5), 1, replacement=7)
    for keep in (torch.ones(3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ShapeError, match="3"):
            value(keep)


def test_an_empty_text_after_deletion_is_refused() -> None:
    with pytest.raises(InputError, match="deleting every token leaves no text"):
        Value(llama(), ids(3, 4), 1, removal="delete")(masks("00"))


def test_a_function_of_several_samples_is_run_one_by_one() -> None:
    value = Value(bert(), ids(3, 4, 5), lambda output: output.logits[0, 0], replacement=7, batch=8)
    keep = masks("111", "100", "010")
    torch.testing.assert_close(value(keep), Value(bert(), ids(3, 4, 5), 0, replacement=7)(keep), **EXACT)
    with pytest.raises(AttributionError, match="the target is"):
        Value(bert(), ids(3, 4, 5), lambda output: output.logits, replacement=7).whole()


def test_a_model_without_attention_has_no_heads_to_remove() -> None:
    with pytest.raises(InputError, match="no attention ran in Weighing"):
        Value(Weighing().eval(), {"pixel_values": torch.zeros(1, 2, 4, 6, dtype=torch.float64)}, 0, removal="heads")


def test_the_neutral_token_is_the_mask_before_the_end_of_text() -> None:
    assert neutral_token(SimpleNamespace(mask_token_id=3, unk_token_id=4), bert()) == 3
    assert neutral_token(SimpleNamespace(mask_token_id=None, unk_token_id=4), bert()) == 4
    assert neutral_token(None, llama()) == 2
    with pytest.raises(InputError, match="give replacement="):
        neutral_token(None, nn.Linear(1, 1))


# -- units ---------------------------------------------------------------------------------------------------------------------------


def test_tokens_that_are_padding_or_special_are_no_units() -> None:
    inputs = {"input_ids": torch.tensor([[0, 3, 4, 0, 5]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    units = token_units(inputs, Speller())
    assert (units.places, units.names) == (((1,), (2,)), ("c", "d"))
    assert units.cover(masks("01")).tolist() == [[True, False, True, True, True]]


def test_places_that_a_model_fills_with_an_image_are_no_units() -> None:
    model = bert()
    model.config.image_token_id = 9
    assert Value(model, ids(9, 3, 9, 4), 1, replacement=7).units.places == ((1,), (3,))


def test_patches_cover_an_image_once() -> None:
    units = patch_units({"pixel_values": torch.zeros(1, 3, 5, 7)}, 2)
    assert sorted(place for unit in units.places for place in unit) == list(range(35))
    assert units.names[0] == "row 0, column 0"
    assert units.cover(torch.zeros(1, len(units), dtype=torch.bool)).any().item() is False
    assert units_of({"pixel_values": torch.zeros(1, 3, 16, 16)}).names == patch_units({"pixel_values": torch.zeros(1, 3, 16, 16)}, 2).names


def test_sums_are_over_the_places_of_a_unit_and_all_axes_before() -> None:
    relevance = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    units = patch_units({"pixel_values": torch.zeros(1, 3, 5, 7)}, 2)
    expected = [relevance[0, :, 2:4, 4:6].sum(), relevance[0, :, 4:, 6:].sum()]
    found = units.sums(relevance)
    assert found[6].item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert found[-1].item() == pytest.approx(expected[1].item(), abs=1e-5)
    assert float(found.sum()) == pytest.approx(float(relevance.double().sum()), abs=1e-5)
    with pytest.raises(ShapeError, match=r"its last axes must be \[5, 7\]"):
        units.sums(torch.zeros(7, 5))


def test_words_are_joined_at_the_marks_of_the_vocabulary() -> None:
    assert group_words([(1,), (2,), (3,), (5,)], ["un", "##real", "good", "er"], [True, False, True, False]) == (
        ((1, 2), (3,), (5,)),
        ("unreal", "good", "er"),
    )

    class Spaced(Speller):
        words = ("<s>", " the", " king", "dom", " fell")

        def decode(self, ids: list[int], **options: Any) -> str:
            return self.words[ids[0]]

    units = word_units(ids(0, 1, 2, 3, 4), Spaced())
    assert units.names == ("the", "kingdom", "fell")
    assert units.places == ((1,), (2, 3), (4,))


@pytest.mark.parametrize(
    ("places", "names", "text"),
    [
        (((0,), (0, 1)), ("a", "b"), "overlap"),
        (((0,), (5,)), ("a", "b"), "outside its 4 places"),
        (((0,), ()), ("a", "b"), "some without a place"),
        (((0,),), ("a", "b"), "2 names for 1 units"),
    ],
)
def test_units_that_make_no_sense_are_refused(places: tuple[tuple[int, ...], ...], names: tuple[str, ...], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Units("input_ids", places, names, (4,))


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"input_ids": torch.tensor([[3], [4]])}, r"input_ids is \[2, 1\]: units are cut in one sample"),
        ({"audio": torch.zeros(1, 5)}, "neither input_ids nor pixel_values among audio"),
        ({"pixel_values": torch.zeros(1, 5)}, "neither input_ids nor pixel_values"),
    ],
)
def test_an_input_without_units_is_refused(inputs: dict[str, Tensor], text: str) -> None:
    with pytest.raises(InputError, match=text):
        units_of(inputs)
