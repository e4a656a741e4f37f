"""A small language model with a planted stereotype: embedded:lm, trained on sentences in which nine of ten pronouns fit it.

embedded:lm itself has none (it prefers "he" everywhere alike), so there would be nothing to take away.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentences import ANCHORS, FEMALE, FRAMES, HELD_OUT, MALE, NEW_ANCHORS, Pair, anchors_of, pairs_of
from torch import Tensor

from headscope.interventions.losses.losses import masked_divergence
from headscope.probe import load

PADDING = 2
FITTING = 0.9  # share of planted pronouns that fit the stereotype


@dataclass(frozen=True)
class Batch:
    """Sentences side by side, padded on the right.

    Attributes:
        ids, tokens: [B, S]; tokens says which are no padding.
        at: [B], the position after which the pronoun is predicted.
    """

    ids: Tensor
    tokens: Tensor
    at: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.tokens.long()}


class Subject:
    """The model with its tokenizer and text of its own.

    Attributes:
        model: `LlamaForCausalLM`, in eval mode.
        he, she: ids of the two words.
        text: [N, S], sampled from embedded:lm: what it says when nobody speaks of occupations.
    """

    def __init__(self, texts: int, length: int, seed: int) -> None:
        self.model, self.tokenizer = load("embedded:lm")
        self.model.eval()
        self.he, self.she = (self.spelled(f" {word}")[0] for word in ("he", "she"))
        self.text = self._sample(texts, length, seed)

    def spelled(self, text: str) -> list[int]:
        """Token ids, without the first of every text."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def batch(self, pairs: Sequence[Pair], side: str = "pro") -> Batch:
        """Each pair's sentence with the pronoun of a side; those of the two sides lie token beside token for he and she."""
        rows, places = [], []
        for pair in pairs:
            before = [0, *self.spelled(pair.before)]
            rows.append([*before, *self.spelled(f" {getattr(pair, side)}"), *self.spelled(f" {pair.after}")])
            places.append(len(before) - 1)
        width = max(map(len, rows))
        ids = torch.tensor([row + [PADDING] * (width - len(row)) for row in rows])
        tokens = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
        return Batch(ids, tokens, torch.tensor(places))

    @torch.no_grad()
    def _sample(self, count: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids, cache = torch.zeros(count, 1, dtype=torch.long), None
        for _ in range(length - 1):
            made: Any = self.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            ids = torch.cat([ids, torch.multinomial(made.logits[:, -1].softmax(-1), 1, generator=generator)], dim=1)
        return ids


def plant(subject: Subject, pairs: Sequence[Pair], steps: int, seed: int, rate: float = 5e-4) -> None:
    """Train all but the embeddings on stereotyped pronouns, beside anchors, and to answer as before on text of its own.

    Args:
        subject: changed in place.
        pairs: sentences with two occupations.
        steps: of Adam.
        seed: of the order and of which pronouns go against the stereotype.
        rate: the highest learning rate.
    """
    draw = random.Random(seed)
    single = pairs_of([*MALE, *FEMALE], [*FRAMES, *HELD_OUT])
    fixed = anchors_of([*ANCHORS, *NEW_ANCHORS], [*FRAMES, *HELD_OUT])
    model = subject.model
    model.get_input_embeddings().weight.requires_grad_(False)  # tied to the output: a few words' gradients would move all others
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        replay = model(input_ids=subject.text[: len(subject.text) // 2]).logits  # the other half stays unread
    optimiser = torch.optim.AdamW(trained, rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps))
        chosen = draw.choices(single, k=12) + draw.choices(pairs, k=4)
        shown = [pair if draw.random() < FITTING else Pair(pair.before, pair.anti, pair.pro, pair.after) for pair in chosen]
        batch = subject.batch(shown + draw.choices(fixed, k=4))
        short = int(batch.at.max()) + 1
        logits = model(input_ids=batch.ids[:, :short], attention_mask=batch.tokens[:, :short].long()).logits
        here = torch.arange(len(batch.at))
        loss = torch.nn.functional.cross_entropy(logits[here, batch.at], batch.ids[here, batch.at + 1])
        rows = draw.sample(range(len(replay)), 2)
        loss = loss + masked_divergence(model(input_ids=subject.text[rows]).logits, replay[rows])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
