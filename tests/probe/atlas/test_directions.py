"""Heads read in tokens, against dense matrices over the whole vocabulary and against planted heads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.atlas.directions import Vocabulary, copying_scores, read_directions, restricted, vocabulary_of
from headscope.probe.atlas.weights import HeadWeights
from headscope.probe.call import AttentionSite
from tests.models import ENTRIES

WORDS, STREAM, WIDTH = 14, 9, 3
READS = {"q": "residual", "k": "residual", "v": "residual"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(heads: int = 4, groups: int = 2, **changes: object) -> HeadWeights:
    site = AttentionSite("layers.0#0", "layers.0", 0, 0, "self", heads, groups, WIDTH, WIDTH, "sdpa")
    given: dict[str, object] = {
        "q": random(heads, WIDTH, STREAM), "k": random(groups, WIDTH, STREAM, seed=1),
        "v": random(groups, WIDTH, STREAM, seed=2), "o": random(heads, WIDTH, STREAM, seed=3), "reads": READS,
    }  # fmt: skip
    return HeadWeights(site, **{**given, **changes})  # type: ignore[arg-type]


class Letters:
    """A tokenizer of single letters; token 0 is a line break."""

    def decode(self, token_ids: list[int]) -> str:
        return "\n" if token_ids == [0] else "".join(chr(96 + i) for i in token_ids)


@given(st.integers(0, 200), st.booleans())
@settings(max_examples=30, deadline=None)
def test_copying_is_the_share_of_the_dense_matrix_of_tokens(seed: int, centred: bool) -> None:
    entry, leave = random(WORDS, STREAM, seed=seed), random(WORDS, STREAM, seed=seed + 1)
    found = weights(v=random(2, WIDTH, STREAM, seed=seed + 2))
    ours = copying_scores(found, Vocabulary(entry, leave), centred=centred)
    assert ours.kind == "copying"
    assert ours.reason is None
    if centred:
        entry, leave = entry - entry.mean(0, keepdim=True), leave - leave.mean(0, keepdim=True)
    assert found.v is not None
    assert found.o is not None
    for head in range(4):
        dense = entry @ found.v[head // 2].T @ found.o[head] @ leave.T  # [n, n]
        values = torch.linalg.eigvals(dense)
        expected = float(values.sum().real / values.abs().sum())
        assert float(ours.values[head]) == pytest.approx(expected, abs=1e-6)


def test_a_head_that_writes_what_it_reads_scores_one_and_one_that_takes_it_back_minus_one() -> None:
    basis = torch.linalg.qr(random(STREAM, WIDTH)).Q.T  # [V, E]
    tokens = Vocabulary(torch.eye(STREAM, dtype=torch.float64), torch.eye(STREAM, dtype=torch.float64))
    both = weights(2, 2, v=torch.stack([basis, basis]), o=torch.stack([basis, -2 * basis]))
    for vocabulary in (tokens, None):
        found = copying_scores(both, vocabulary, centred=False)
        torch.testing.assert_close(found.values, torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert copying_scores(both, None).kind == "sign"
    assert copying_scores(both, Vocabulary(tokens.embedding)).kind == "sign"
    turned = torch.tensor([[0.0, -1], [1, 0]], dtype=torch.float64)  # eigenvalues ±i: neither
    quarter = copying_scores(weights(1, 1, v=basis[None, :2], o=(turned @ basis[:2])[None]), None)
    assert float(quarter.values[0]) == pytest.approx(0, abs=1e-12)


def test_what_all_tokens_have_in_common_is_no_copying() -> None:
    entry, leave = random(WORDS, STREAM), random(WORDS, STREAM, seed=1)
    shifted = Vocabulary(entry + 7 * random(STREAM, seed=2), leave - 3 * random(STREAM, seed=3))
    torch.testing.assert_close(copying_scores(weights(), shifted).values, copying_scores(weights(), Vocabulary(entry, leave)).values)
    assert not torch.allclose(
        copying_scores(weights(), shifted, centred=False).values, copying_scores(weights(), Vocabulary(entry, leave), centred=False).values
    )


def test_the_scale_of_the_norm_in_front_belongs_to_what_a_head_reads() -> None:
    gain = random(STREAM, seed=5).abs() + 0.1
    tokens = Vocabulary(random(WORDS, STREAM), random(WORDS, STREAM, seed=1))
    found = weights()
    assert found.v is not None
    with_gain, folded = copying_scores(weights(v_gain=gain), tokens), copying_scores(weights(v=found.v * gain), tokens)
    assert torch.equal(with_gain.values, folded.values)
    assert not torch.equal(with_gain.values, copying_scores(found, tokens).values)


def test_what_has_no_score_is_nan_with_a_reason() -> None:
    tokens = Vocabulary(random(WORDS, STREAM), random(WORDS, STREAM, seed=1))
    cases = {
        "v: it is convolved": copying_scores(weights(v=None, reasons={"v": "it is convolved"}), tokens),
        "reads the latent": copying_scores(weights(reads={**READS, "v": "latent"}), tokens),
        "the stream is 9 wide": copying_scores(weights(), Vocabulary(random(WORDS, 5), random(WORDS, STREAM))),
    }
    for text, found in cases.items():
        assert bool(found.values.isnan().all())
        assert found.reason is not None
        assert text in found.reason
    zero = copying_scores(weights(o=torch.zeros(4, WIDTH, STREAM, dtype=torch.float64)), tokens)
    assert bool(zero.values.isnan().all())
    assert zero.reason == "a head whose matrix is zero has no score"


def planted(circuit: str) -> HeadWeights:
    """Head 0 reads word 3 (or a query of it) and writes word 5 (or looks for a key of it); weakly 7 and the line break."""
    left, right = torch.zeros(1, 2, STREAM, dtype=torch.float64), torch.zeros(1, 2, STREAM, dtype=torch.float64)
    left[0, 0, 3] = right[0, 0, 5] = 4
    left[0, 1, 7] = right[0, 1, 0] = 1
    return weights(1, 1, **{"v": left, "o": right} if circuit == "ov" else {"q": left, "k": right})


@pytest.mark.parametrize("circuit", ["ov", "qk"])
def test_a_planted_head_is_read_in_its_tokens_and_they_can_be_seen(circuit: str) -> None:
    eye = torch.eye(STREAM, dtype=torch.float64)
    strong, weak, *rest = read_directions(planted(circuit), 0, Vocabulary(eye, eye), Letters(), circuit=circuit, top=2, centred=False)
    assert rest == []
    assert strong.value == pytest.approx(16)
    assert strong.share == pytest.approx(256 / 257)
    for direction, (read, written) in ((strong, ("c", "e")), (weak, ("g", "⏎"))):
        pole = next(p for p in direction.poles if p.reads[0][1] > 0.5)
        assert pole.reads[0] == (read, pytest.approx(1))
        assert pole.writes[0] == (written, pytest.approx(1))


def test_tokens_can_be_chosen_and_are_shown_by_number_without_a_tokenizer() -> None:
    eye = torch.eye(STREAM, dtype=torch.float64)
    found = read_directions(planted("ov"), 0, Vocabulary(eye, eye), count=1, top=9, only=[1, 5, 8])
    assert len(found) == 1
    assert {text for pole in found[0].poles for text, _ in pole.writes} == {"1", "5", "8"}
    with pytest.raises(SelectionError, match="token ids must be 0 to 8"):
        read_directions(planted("ov"), 0, Vocabulary(eye, eye), only=[9])


def test_what_cannot_be_read_says_why() -> None:
    eye = torch.eye(STREAM, dtype=torch.float64)
    with pytest.raises(SelectionError, match="no head 4: layers.0#0 has 4 heads, 0 to 3"):
        read_directions(weights(), 4, Vocabulary(eye))
    with pytest.raises(InputError, match="no circuit 'vo'"):
        read_directions(weights(), 0, Vocabulary(eye), circuit="vo")
    with pytest.raises(InputError, match="reads 9 numbers cannot be read by words of 5"):
        read_directions(weights(), 0, Vocabulary(random(WORDS, 5)))
    with pytest.raises(InputError, match="o: it is gated"):
        read_directions(weights(o=None, reasons={"o": "it is gated"}), 0, Vocabulary(eye))


def test_a_restricted_vocabulary_keeps_the_chosen_words_in_their_order() -> None:
    whole = Vocabulary(random(WORDS, STREAM), random(WORDS, STREAM, seed=1))
    some = restricted(whole, [4, 2])
    assert some.unembedding is not None
    assert torch.equal(some.embedding, whole.embedding[[4, 2]])
    with pytest.raises(SelectionError, match="0 to 13"):
        restricted(whole, [14])
    assert not math.isnan(float(copying_scores(weights(), restricted(whole, list(range(9)))).values[0]))


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_the_vocabulary_of_a_model_has_the_scale_of_its_final_norm() -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "GPT-2")
    model, inputs = entry.build()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    table, gain = model.get_parameter("transformer.wte.weight"), model.get_parameter("transformer.ln_f.weight")
    found = vocabulary_of(model, inputs)
    assert found.unembedding is not None
    assert torch.equal(found.embedding, table)
    assert torch.equal(found.unembedding, table * gain)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plain = vocabulary_of(model)
    assert plain.unembedding is not None
    assert torch.equal(plain.unembedding, table)
    with pytest.raises(InputError, match="Linear does not say where its token embedding is"):
        vocabulary_of(torch.nn.Linear(2, 2))
