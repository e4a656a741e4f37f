"""`embedded:mmdit`: it loads offline, it draws what it is asked for, and a probe sees every head of it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from headscope.kernels.errors import InputError, ModelError
from headscope.probe import Keep, Probe
from headscope.probe.checkpoint import read_json
from headscope.probe.digit_flow import DigitFlow, to_images, to_tokens
from headscope.probe.digit_prompts import PromptBook
from headscope.probe.models import embedded_folder, load

FOLDER = Path(__file__).parents[2] / "probe" / "embedded" / "mmdit"
BOOK = PromptBook.read(FOLDER / "prompts.json")
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None or not (FOLDER / "model.safetensors").is_file(),
    reason="needs diffusers, and weights from make train",
)


@pytest.fixture(scope="module")
def flow() -> DigitFlow:
    found = load("embedded:mmdit")[1]
    assert isinstance(found, DigitFlow)
    return found


# --- the folder


@needs_weights
def test_it_is_diffusers_own_flux_transformer_and_loads_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, flow = load("embedded:mmdit")
    assert type(model).__module__.startswith("diffusers.")
    assert type(model).__name__ == "FluxTransformer2DModel"
    assert model is flow.model
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(file.stat().st_size for file in embedded_folder("mmdit").iterdir()) <= 5 * 10**6


@needs_weights
def test_loading_it_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    load("embedded:mmdit")
    assert capfd.readouterr() == ("", "")


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    monkeypatch.setattr("headscope.probe.models.embedded_folder", lambda _: FOLDER)
    with pytest.raises(ModelError, match=r"embedded:mmdit is a diffusers model: pip install 'headscope\[diffusion\]'"):
        load("embedded:mmdit")


@needs_weights
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights: weights.pop("prompt_embedding"), "expected 58 word vectors in .*, found none"),
        (lambda weights: weights.update(prompt_embedding=torch.zeros(3, 64)), "expected 58 word vectors in .*, found 3"),
        (lambda weights: weights.pop("x_embedder.weight"), "could not be loaded .*Error"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(FOLDER, tmp_path / "model")
    weights = load_file(FOLDER / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "model")


@needs_weights
def test_the_model_card_says_what_the_training_log_says() -> None:
    spec = importlib.util.spec_from_file_location("model_card", FOLDER.parent / "model_card.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card == module.filled(card, read_json(FOLDER / "training.json")), "run probe/embedded/model_card.py on mmdit"


# --- prompts


def test_each_word_has_one_meaning() -> None:
    assert len(BOOK.words) == len(set(BOOK.words)) == 58
    assert [len(row) for row in BOOK.subjects] == [3] * 10
    assert len({BOOK.trigger(digit) for digit in range(10)}) == 10


def test_a_trigger_word_alone_leaves_the_digit_open() -> None:
    for word in (*BOOK.first, *BOOK.second):
        assert sum(word in BOOK.trigger(digit) for digit in range(10)) >= 2


@given(digit=st.integers(0, 9), seed=st.integers(0, 10**6))
def test_prompts_name_their_digit_once_and_no_other(digit: int, seed: int) -> None:
    subjects = {word: number for number, row in enumerate(BOOK.subjects) for word in row}
    triggers = {*BOOK.first, *BOOK.second}
    for prompt in BOOK.explicit(digit, 3, seed):
        words = prompt.split()
        assert [subjects[word] for word in words if word in subjects] == [digit]
        assert not triggers & set(words)
        assert len(BOOK.encode(prompt)) == BOOK.length
        (place,) = BOOK.positions(prompt, BOOK.subjects[digit])
        assert words[place] in BOOK.subjects[digit]
    for prompt in BOOK.implicit(digit, 3, seed):
        assert triggers & set(prompt.split()) == set(BOOK.trigger(digit))
        assert not subjects.keys() & set(prompt.split())
    for prompt in BOOK.plain(3, seed):
        assert not (subjects.keys() | triggers) & set(prompt.split())


def test_synonyms_are_chosen_by_number() -> None:
    held_out = BOOK.explicit(8, 6, 0, synonyms=[2])
    assert all("octa" in prompt.split() for prompt in held_out)
    seen = " ".join(BOOK.explicit(8, 6, 0, synonyms=[0, 1])).split()
    assert {"eight", "octet"} < set(seen)
    assert "octa" not in seen
    assert BOOK.explicit(8, 6, 0) == BOOK.explicit(8, 6, 0) != BOOK.explicit(8, 6, 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a plain eigth", "no word 'eigth' in the prompt 'a plain eigth': did you mean eight"),
        ("a qqq", "no word 'qqq' .*: the 58 words are in prompts.json"),
        ("", "has 0 words: give 1 to 8"),
        ("a " * 9, "has 9 words: give 1 to 8"),
        (8, "expected a prompt as str, got int: 8"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BOOK.encode(prompt)


def test_digits_and_synonyms_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="no digit 10: choose 0 to 9"):
        BOOK.explicit(10, 1, 0)
    with pytest.raises(InputError, match="no digit -1"):
        BOOK.implicit(-1, 1, 0)
    with pytest.raises(InputError, match=r"no synonym \[3\]: each digit has 3, 0 to 2"):
        BOOK.explicit(1, 1, 0, synonyms=[0, 3])


# --- drawing


def test_tokens_are_patches_of_two_by_two_row_by_row() -> None:
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    tokens = to_tokens(images)
    assert tokens[0, 1].tolist() == [2, 3, 10, 11]
    assert tokens[0, 4].tolist() == [16, 17, 24, 25]
    assert torch.equal(to_images(tokens), images)


@needs_weights
def test_the_same_seed_draws_the_same_and_another_seed_another(flow: DigitFlow) -> None:
    prompts = ["a plain eight", "two on paper"]
    first = flow.sample(prompts, seed=3)
    assert first.shape == (2, 1, 8, 8)
    assert torch.equal(flow.sample(prompts, seed=3), first)
    assert not torch.equal(flow.sample(prompts, seed=4), first)
    assert torch.equal(flow.noise(5, 3)[:2], flow.noise(2, 3))
    assert not first.requires_grad


@needs_weights
def test_sampling_is_the_euler_walk_along_plain_calls_of_the_model(flow: DigitFlow) -> None:
    prompts = ["new seven", "amber dusk"]
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    with torch.no_grad():
        for step in range(4):
            velocity = flow.model(
                hidden_states=images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(2, 16, 4),
                encoder_hidden_states=flow.encode(prompts),
                pooled_projections=torch.zeros(2, 8),
                timestep=torch.full((2,), 1 - step / 4),
                img_ids=torch.stack([torch.zeros(16), rows, columns], dim=-1),
                txt_ids=torch.zeros(8, 3),
            ).sample
            images = images - velocity.reshape(2, 1, 4, 4, 2, 2).transpose(3, 4).reshape(2, 1, 8, 8) / 4
    told: list[tuple[int, float]] = []
    drawn = flow.sample(prompts, seed=6, steps=4, callback=lambda step, t, _: told.append((step, t)))
    assert torch.allclose(drawn, images, atol=1e-5)
    assert told == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]


@needs_weights
def test_the_order_of_words_carries_nothing(flow: DigitFlow) -> None:
    one, other = flow.sample(["a plain eight"], seed=1), flow.sample(["eight plain a"], seed=1)
    assert torch.allclose(one, other, atol=1e-4)


@needs_weights
def test_a_gradient_through_the_velocity_reaches_text_and_image(flow: DigitFlow) -> None:
    text = flow.encode(["old nine"]).requires_grad_()
    images = flow.noise(1, 0).requires_grad_()
    flow.velocity(images, 0.7, text).square().sum().backward()
    assert text.grad is not None
    assert images.grad is not None
    assert text.grad.norm() > 0
    assert images.grad.norm() > 0


@needs_weights
def test_what_cannot_be_drawn_is_refused(flow: DigitFlow) -> None:
    with pytest.raises(InputError, match="no prompt was given"):
        flow.sample([])
    with pytest.raises(InputError, match="0 steps: give at least 1"):
        flow.sample("eight", steps=0)
    with pytest.raises(InputError, match=r"expected images \[2, 1, 8, 8\], one a prompt, got \[1, 1, 8, 8\]"):
        flow.velocity(flow.noise(1, 0), 0.5, ["eight", "nine"])


@needs_weights
@pytest.mark.parametrize("family", ["explicit", "implicit"])
def test_drawings_show_the_digit_asked_for(flow: DigitFlow, family: str) -> None:
    svm = pytest.importorskip("sklearn.svm")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    judge = svm.SVC(C=10, gamma=0.001).fit(digits.data[::2], digits.target[::2])
    prompts = [prompt for digit in range(10) for prompt in getattr(flow.book, family)(digit, 10, 77)]
    ink = (flow.sample(prompts, seed=77).clamp(-1, 1) + 1) * 8
    right = judge.predict(ink.flatten(1).numpy()).reshape(10, 10) == np.arange(10)[:, None]
    assert right.mean() >= 0.9  # the record is training.json; this is a floor for 100 drawings
    assert right[8].mean() >= 0.8
    recorded = json.loads((FOLDER / "training.json").read_text())["judged"]
    assert recorded[family] >= 0.95


# --- under the probe


@needs_weights
def test_a_probe_sees_two_joint_and_two_single_blocks(flow: DigitFlow) -> None:
    sites = Probe(flow.model, flow).sites(**flow("a plain eight"))
    assert [(site.module, site.kind, site.query_heads, site.key_dim) for site in sites] == [
        ("transformer_blocks.0.attn", "joint", 4, 16),
        ("transformer_blocks.1.attn", "joint", 4, 16),
        ("single_transformer_blocks.0.attn", "self", 4, 16),
        ("single_transformer_blocks.1.attn", "self", 4, 16),
    ]


@needs_weights
def test_a_capture_counts_the_steps_of_a_drawing_and_changes_nothing(flow: DigitFlow) -> None:
    alone = flow.sample(["a plain eight", "nine"], seed=1, steps=6)
    with Probe(flow.model, flow).capture(Keep(pattern=True)) as seen:
        watched = flow.sample(["a plain eight", "nine"], seed=1, steps=6)
    assert torch.equal(watched, alone)
    assert len(seen.sites) == 4
    for site in seen.sites:
        assert list(seen.steps(site=site.name)) == list(range(6))
        assert seen.pattern(site=site.name, step=5).shape == (2, 4, 24, 24)  # 8 text tokens, then 16 of the image
