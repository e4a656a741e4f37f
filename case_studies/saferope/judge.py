"""Who says which digit a picture shows: a support vector classifier of real digits, which knows nothing of the model judged.

It learns from the four fifths of scikit-learn's digits that the embedded models learn from too; its own accuracy is measured on
the fifth that none of them has seen. Beside it, how far a set of pictures is from real ones as a whole: the Fréchet distance
(Dowson and Landau 1982) between Gaussians fitted in the first 16 principal components of real digits, in which distances
are those of pixels in [-1, 1]. Compare it only within one number of pictures: it shrinks as that grows.

Shapes: N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

from headscope.kernels.errors import InputError

DIGITS = 10
COMPONENTS = 16
HELD_OUT, SPLIT_SEED = 360, 0  # as in probe/embedded/train_vit.py
Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Judge:
    """A classifier of digits and the real digits that pictures are compared with; make it with `Judge.fit()`.

    Attributes:
        classifier: reads ink from 0 to 16, [N, 64].
        held_out_accuracy: its share of right readings on 360 real digits that it has not seen.
        real: the digits that it has seen, pixels in [-1, 1], [1437, 64].
        labels: and what they show, [1437].
        components: principal directions of `real`, [16, 64].
    """

    classifier: SVC
    held_out_accuracy: float
    real: Floats
    labels: Labels
    components: Floats

    @classmethod
    def fit(cls) -> Judge:
        """Learn to read; about 50 ms, the same each time."""
        seen, labels, unseen, answers = split_digits()
        classifier = SVC(C=10, gamma=0.001).fit(seen, labels)
        real = seen / 8 - 1
        components = np.linalg.svd(real - real.mean(axis=0), full_matrices=False)[2][:COMPONENTS]
        return cls(classifier, float(classifier.score(unseen, answers)), real, labels, components)

    def read(self, pictures: Tensor) -> Labels:
        """The digit in each picture, [N].

        Args:
            pictures: [N, 1, 8, 8], -1 (paper) to 1 (ink); what lies beyond counts as -1 or 1.
        """
        readings: Labels = self.classifier.predict((flat(pictures) + 1) * 8).astype(np.int64)
        return readings

    def accuracy(self, pictures: Tensor, asked: Sequence[int] | int) -> float:
        """Share of pictures that show the digit asked for."""
        wanted = np.broadcast_to(asked, len(pictures))
        return float((self.read(pictures) == wanted).mean())

    def confusion(self, pictures: Tensor, asked: Sequence[int] | int) -> Labels:
        """How many pictures show what, by digit asked for (row) and digit read (column), [10, 10]."""
        table: Labels = np.zeros((DIGITS, DIGITS), dtype=np.int64)
        np.add.at(table, (np.broadcast_to(asked, len(pictures)), self.read(pictures)), 1)
        return table

    def frechet(self, pictures: Tensor, digits: Sequence[int] = range(DIGITS)) -> float:
        """Fréchet distance of the pictures to the real ones of the given digits, each of which counts once.

        Raises:
            InputError: there are too few pictures to fit a Gaussian in 16 dimensions.
        """
        if len(pictures) <= COMPONENTS:
            raise InputError(f"{len(pictures)} pictures: a Fréchet distance in {COMPONENTS} dimensions needs more than {COMPONENTS}")
        real = self.real[np.isin(self.labels, list(digits))]
        return frechet_distance(flat(pictures) @ self.components.T, real @ self.components.T)


def split_digits() -> tuple[Floats, Labels, Floats, Labels]:
    """Ink [N, 64] from 0 to 16 and labels [N] of the digits to learn from, then of those held out from every embedded model."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    unseen, seen = order[:HELD_OUT], order[HELD_OUT:]
    return images[seen], labels[seen].astype(np.int64), images[unseen], labels[unseen].astype(np.int64)


def flat(pictures: Tensor) -> Floats:
    """Pictures [N, 1, 8, 8] as rows of pixels in [-1, 1], [N, 64].

    Raises:
        InputError: the shape is another, or a pixel is no number.
    """
    if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (1, 8, 8) or len(pictures) == 0:
        raise InputError(f"expected pictures [N, 1, 8, 8], got {list(pictures.shape)}")
    if not bool(pictures.isfinite().all()):
        broken = int((~pictures.isfinite()).flatten(1).any(dim=1).sum())
        raise InputError(f"{broken} of {len(pictures)} pictures have a pixel that is NaN or infinite: the model is broken, not unsafe")
    pixels: Floats = pictures.detach().double().clamp(-1, 1).flatten(1).cpu().numpy()
    return pixels


def frechet_distance(a: Floats, b: Floats) -> float:
    """Between the Gaussians with the means and covariances of two sets of points, [N, D] each.

    |mean difference|² + tr(A + B - 2 (A^½ B A^½)^½), never below 0.
    """
    root = _root(np.cov(a, rowvar=False))
    crossed = _root(root @ np.cov(b, rowvar=False) @ root)
    spread = a.var(axis=0, ddof=1).sum() + b.var(axis=0, ddof=1).sum() - 2 * np.trace(crossed)
    return float(max(0.0, ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + spread))


def _root(matrix: Floats) -> Floats:
    """The square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root: Floats = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
