"""`chart_heads` from end to end: it names planted heads, leaves the model and the random numbers alone, and refuses what it cannot do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headscope.kernels.errors import HeadscopeError, InputError, NotIntercepted, SelectionError
from headscope.probe import load
from headscope.probe.atlas.atlas import HeadAtlas
from headscope.probe.atlas.chart import chart_heads
from headscope.probe.models import embedded_folder
from tests.probe.atlas.planted import HEADS, Planted

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def planted() -> HeadAtlas:
    return chart_heads(Planted().eval(), length=12, samples=3, weights=False)


def test_planted_heads_get_their_names(planted: HeadAtlas) -> None:
    expected = {
        "previous": "previous-token", "current": "current-token", "first": "first-token", "induction": "induction",
        "duplicate": "duplicate-token", "uniform": "broad",
    }  # fmt: skip
    for head, label in expected.items():
        card = planted.card(0, HEADS.index(head))
        assert card.labels[0] == label, card
        for other in expected.values():
            assert other == label or other not in card.labels[:1]
    text = planted.card(0, HEADS.index("induction")).text
    assert text.startswith("0.4 induction, first-token: 1.00 of its attention follows a repeat (uniform 0.06); rests on the first token")


def test_the_same_seed_gives_the_same_atlas_and_no_random_number_is_used_up(planted: HeadAtlas) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = Planted().eval()
    torch.set_rng_state(before)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    again = chart_heads(model, length=12, samples=3, weights=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.to_dict() == planted.to_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    other = chart_heads(model, length=12, samples=3, weights=False, seed=1)
    assert other.scores["positional"].tolist() != planted.scores["positional"].tolist()


def test_importance_is_the_effect_of_a_gate_on_the_head() -> None:
    model = Planted().eval()
    ids = torch.tensor([[3, 9, 4, 3, 9, 7]])
    atlas = chart_heads(model, inputs={"input_ids": ids}, length=6, samples=2, weights=False, redundancy=False)
    logits = model(ids).logits.log_softmax(-1)
    value = logits[0, range(5), ids[0, 1:]].sum()
    gates = torch.autograd.grad(value, model.gates)[0]
    torch.testing.assert_close(atlas.scores["importance"][0], gates.abs().double(), atol=1e-5, rtol=1e-4)
    in_layer = atlas.scores["importance_in_layer"]
    assert float(in_layer.norm()) == pytest.approx(1)
    assert "log-probability of the next tokens" in atlas.on["importance"]


def test_progress_ends_at_its_total() -> None:
    told: list[tuple[int, int]] = []
    chart_heads(Planted().eval(), length=12, samples=2, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert told[-1][0] == told[-1][1]


def test_what_cannot_be_charted_is_refused() -> None:
    model = Planted().eval()
    with pytest.raises(InputError, match=r"training mode, where dropout makes heads random: call model.eval\(\)"):
        chart_heads(Planted().train())
    with pytest.raises(InputError, match="samples=1: give a whole number from 2 up"):
        chart_heads(model, samples=1)
    with pytest.raises(InputError, match="inputs and texts are both given"):
        chart_heads(model, inputs={"input_ids": torch.zeros(1, 3)}, texts=["a"])
    with pytest.raises(InputError, match="texts need the model's tokenizer"):
        chart_heads(model, texts=["a"])
    with pytest.raises(InputError, match="Linear reads no tokens: give inputs="):
        chart_heads(nn.Linear(3, 3).eval())
    with pytest.raises(InputError, match="holds NaN or infinity"):
        chart_heads(nn.Linear(3, 3).eval(), inputs=torch.full((1, 3), torch.nan))
    with pytest.raises(InputError, match="empty or no keyword inputs"):
        chart_heads(model, inputs=[])
    with pytest.raises(SelectionError, match="no label 'shy': there are induction, previous-token"):
        chart_heads(model, thresholds={"shy": 0.5})
    with pytest.raises(NotIntercepted):
        chart_heads(nn.Linear(3, 3).eval(), inputs=torch.randn(1, 3))


def test_what_no_head_of_these_inputs_can_tell_is_undefined_with_its_reason() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    atlas = chart_heads(model, inputs=torch.randn(1, 1, 8), weights=False)
    assert [card.labels for card in atlas.cards()] == [("undefined",)] * 2
    assert "nothing could be measured" in atlas.cards()[0].text
    assert {"previous", "entropy", "positional"} <= set(atlas.undefined)
    constant = chart_heads(model, inputs=torch.zeros(2, 5, 8), weights=False)
    assert "broad" in constant.card(0, 0).labels


def test_an_encoder_of_images_is_charted_on_its_own_inputs() -> None:
    try:
        embedded_folder("vit")
    except HeadscopeError as error:
        pytest.skip(str(error))
    model, _ = load("embedded:vit")
    atlas = chart_heads(model, inputs={"pixel_values": torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))}, weights=False)
    assert not bool(atlas.scores["distance"].isnan().any())
    assert atlas.undefined["induction"] == "the model reads no tokens that could be repeated"
    assert not bool(atlas.scores["importance"].isnan().any())


def test_the_embedded_language_model_shows_its_known_heads_and_how_they_are_wired() -> None:
    try:
        embedded_folder("lm")
    except HeadscopeError as error:
        pytest.skip(str(error))
    model, tokenizer = load("embedded:lm")
    atlas = chart_heads(model, tokenizer)
    names = {label: {card.name for card in cards} for label, cards in atlas.labels().items()}
    assert {"5.2", "5.3", "5.6"} <= names["induction"]
    assert {"3.6", "2.4", "3.7"} <= names["previous-token"]
    assert not names["induction"] & names["previous-token"]
    assert float(atlas.scores["induction"][5, 2]) == pytest.approx(0.9, abs=0.03)
    assert atlas.circuits is not None
    pair = atlas.circuits.compositions[0]  # a previous-token head feeds the keys of an induction head
    assert pair.kind == "k"
    assert atlas.name(pair.source, pair.source_head) in names["previous-token"]
    assert atlas.name(pair.target, pair.target_head) in names["induction"]
    assert "composition" in atlas.describe(5, 2)
    assert "looks for" in atlas.describe(5, 2)


def test_texts_are_read_and_special_tokens_do_not_count() -> None:
    try:
        embedded_folder("lm")
    except HeadscopeError as error:
        pytest.skip(str(error))
    model, tokenizer = load("embedded:lm")
    seen: list[Tensor] = []
    chart_heads(
        model, tokenizer, texts=["The cat sat on the mat."], length=4, samples=2, weights=False, redundancy=False, importance=False,
        detectors={"spy": lambda rows: seen.append(rows.counted) or rows.at(rows.queries)},  # type: ignore[func-returns-value]
    )  # fmt: skip
    assert not bool(seen[0][0, 0])
    assert bool(seen[0][0, 1:].all())
    with pytest.raises(InputError, match="give a list of texts"):
        chart_heads(model, tokenizer, texts="The cat")
    with pytest.raises(InputError, match="length=3000: 6001 tokens are needed"):
        chart_heads(model, tokenizer, length=3000)
