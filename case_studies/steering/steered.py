"""Text that a model writes while it is steered, freely or with attention patterns as they are without steering; and a judge of style.

Letters: B texts, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from headscope.interventions import Edit, Plan, freeze
from headscope.probe import Keep, Probe


def write(model: nn.Module, ids: Tensor, tokens: int, plan: Plan | None = None, *, frozen: bool = False, seed: int = 0) -> Tensor:
    """[B, tokens], sampled at temperature 1, token by token without a cache; the draws are the same for every way of steering.

    Args:
        model: a language model.
        ids: [B, S], prompts of one length.
        tokens: how many to write.
        plan: the steering.
        frozen: hold every pattern at that of the same text without steering.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    text = ids
    for _ in range(tokens):
        with torch.no_grad(), ExitStack() as stack:
            if frozen:
                with Probe(model).capture(Keep(pattern=True)) as seen:
                    model(text)
                stack.enter_context(Plan([Edit("pattern", freeze(seen))]).on(model))
            if plan is not None:
                stack.enter_context(plan.on(model))
            logits = model(text).logits[:, -1].double()
        ranks = logits.softmax(-1).cumsum(-1)
        drawn = torch.rand(len(text), 1, generator=generator, dtype=torch.float64) * ranks[:, -1:]
        chosen = torch.searchsorted(ranks, drawn).clamp(max=logits.shape[-1] - 1)
        text = torch.cat([text, chosen], 1)
    return text[:, ids.shape[1] :]


class Judge:
    """A logistic regression on counts of tokens: the share of texts that read like plays."""

    def __init__(self, vocabulary: int, plays: Tensor, articles: Tensor) -> None:
        self.vocabulary = vocabulary
        labels = [1] * len(plays) + [0] * len(articles)
        self.model = LogisticRegression(C=0.3, max_iter=2000).fit(self._counts(torch.cat([plays, articles])), labels)

    def accuracy(self, plays: Tensor, articles: Tensor) -> float:
        """On texts of both styles."""
        labels = np.array([1] * len(plays) + [0] * len(articles))
        return float((self.model.predict(self._counts(torch.cat([plays, articles]))) == labels).mean())

    def plays(self, texts: Tensor) -> list[float]:
        """1 for each text that it takes for a play, else 0."""
        return [float(x) for x in self.model.predict(self._counts(texts))]

    def _counts(self, texts: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.stack([np.bincount(row, minlength=self.vocabulary) for row in texts.numpy()]).astype(np.float64)


def grouped(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    """The texts as ids, those of one length together: [B, S] each."""
    rows: dict[int, list[Tensor]] = {}
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        rows.setdefault(ids.shape[1], []).append(ids)
    return [torch.cat(own) for _, own in sorted(rows.items())]


def write_all(model: nn.Module, groups: Sequence[Tensor], tokens: int, plan: Plan | None = None, *, frozen: bool = False) -> Tensor:
    """[texts, tokens] for groups of prompts."""
    return torch.cat([write(model, ids, tokens, plan, frozen=frozen, seed=place) for place, ids in enumerate(groups)])
