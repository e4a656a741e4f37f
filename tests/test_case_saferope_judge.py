"""The judge of the SafeRoPE study: it reads real digits, and its distances are those of the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn")

from case_studies.saferope.judge import HELD_OUT, Judge, flat, frechet_distance, split_digits
from headscope.kernels.errors import InputError
from headscope.probe.models import digits_processor, embedded_folder


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.fit()


def real(digit: int | None = None) -> tuple[torch.Tensor, np.ndarray]:
    """Held-out digits as pictures [N, 1, 8, 8], and what they show."""
    stored = load_file(embedded_folder("vit") / "held_out.safetensors")
    labels = stored["labels"].long().numpy()
    pictures = digits_processor(stored["images"])["pixel_values"]
    chosen = np.arange(len(labels)) if digit is None else np.flatnonzero(labels == digit)
    return pictures[chosen], labels[chosen]


def test_the_judge_reads_unseen_digits(judge: Judge) -> None:
    pictures, labels = real()
    assert len(pictures) == HELD_OUT
    assert judge.held_out_accuracy >= 0.98
    assert judge.accuracy(pictures, labels) == pytest.approx(judge.held_out_accuracy)


def test_held_out_is_what_no_embedded_model_has_seen() -> None:
    seen, labels, unseen, answers = split_digits()
    stored = load_file(embedded_folder("vit") / "held_out.safetensors")
    assert np.array_equal(unseen, stored["images"].flatten(1).numpy())
    assert np.array_equal(answers, stored["labels"].numpy())
    assert (len(seen), len(labels)) == (1437, 1437)


def test_pixels_beyond_the_range_count_as_its_ends(judge: Judge) -> None:
    pictures, _ = real()
    assert np.array_equal(judge.read(torch.where(pictures == 1, 3.0, pictures)), judge.read(pictures))


def test_the_confusion_counts_each_picture_once(judge: Judge) -> None:
    pictures, labels = real()
    table = judge.confusion(pictures, labels)
    assert table.sum() == len(pictures)
    assert np.trace(table) / table.sum() == pytest.approx(judge.accuracy(pictures, labels))
    eights, _ = real(8)
    assert judge.confusion(eights, 3)[3, 8] == (judge.read(eights) == 8).sum()


def test_unseen_digits_are_nearer_to_real_ones_than_noise_or_one_digit_alone(judge: Judge) -> None:
    pictures, _ = real()
    near = judge.frechet(pictures)
    noise = torch.randn(360, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert near < 0.3
    assert judge.frechet(real(8)[0]) > 10 * near
    assert judge.frechet(noise) > 10 * near
    assert judge.frechet(real(8)[0], digits=[8]) < judge.frechet(real(8)[0]) / 3


def test_the_distance_of_a_set_to_itself_is_zero_and_of_a_shifted_one_the_square_of_the_shift() -> None:
    points = np.random.default_rng(0).normal(size=(200, 4)) @ np.diag([1.0, 2.0, 0.5, 0.0])  # rank 3
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(points, points + np.array([3.0, 0, 0, 4.0])) == pytest.approx(25, abs=1e-6)


def test_the_distance_is_that_of_the_textbook() -> None:
    scipy = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(90, 5)) @ rng.normal(size=(5, 5)) + 1
    first, second = np.cov(a.T), np.cov(b.T)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * scipy.sqrtm(first @ second).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_what_is_no_picture_is_refused(judge: Judge) -> None:
    with pytest.raises(InputError, match=r"expected pictures \[N, 1, 8, 8\], got \[3, 8, 8\]"):
        flat(torch.zeros(3, 8, 8))
    with pytest.raises(InputError, match="1 of 2 pictures have a pixel that is NaN"):
        judge.read(torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), torch.nan)]))
    with pytest.raises(InputError, match="16 pictures: a Fréchet distance in 16 dimensions needs more than 16"):
        judge.frechet(torch.zeros(16, 1, 8, 8))
