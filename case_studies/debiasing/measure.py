"""What is measured of a model: its odds of he against she, what lies behind them inside, and what it costs elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from arms import LAYERS
from sentences import ANCHORS, HELD_OUT, NEW_ANCHORS, Occupations, Pair, anchors_of, pairs_of, stereotype
from subject import Subject
from torch import Tensor, nn

from headscope.interventions.losses.losses import hidden_distance, keep_run, log_odds, spectrum_distance


@torch.no_grad()
def measure(model: nn.Module, subject: Subject, occupations: Occupations, wino: Sequence[Pair], frames: int = 4) -> dict[str, Any]:
    """Numbers of one model, on the first of the frames that no debiasing saw."""
    held_out = HELD_OUT[:frames]
    found: dict[str, Any] = {}
    for name, words in (("seen", occupations.seen), ("unseen", occupations.unseen)):
        odds = odds_of(model, subject, pairs_of(words, held_out)).view(len(words), -1)  # [occupations, frames]
        found[name] = {word: row.tolist() for word, row in zip(words, odds, strict=True)}
        found[f"gap {name}"] = gap(found[name])
    for name, anchors in (("anchors", ANCHORS), ("new anchors", NEW_ANCHORS)):
        pairs = anchors_of(anchors, held_out)
        signs = torch.tensor([1.0 if pair.pro == "he" else -1.0 for pair in pairs])
        found[name] = (signs * odds_of(model, subject, pairs)).tolist()
    found["internals"] = internals(model, subject, pairs_of([*occupations.seen, *occupations.unseen], held_out[:2]))
    found["wino preference"], found["wino odds"] = (values.tolist() for values in preference(model, subject, wino))
    text = subject.text[len(subject.text) // 2 :]
    log_p = model(input_ids=text).logits[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None])
    found["text"] = (-log_p.mean((1, 2))).tolist()
    return found


def odds_of(model: nn.Module, subject: Subject, pairs: Sequence[Pair]) -> Tensor:
    """[N]: log p(he) − log p(she) at the pronoun."""
    batch = subject.batch(pairs)
    return log_odds(model(**batch.inputs).logits, subject.he, subject.she, batch.at)


def gap(odds: dict[str, list[float]]) -> float:
    """How much more the odds favour "he" after occupations of men than of women, in nats: the stereotype without the preference."""
    means = {"he": [], "she": []}  # type: dict[str, list[float]]
    for word, row in odds.items():
        means[stereotype(word)].append(sum(row) / len(row))
    return sum(means["he"]) / len(means["he"]) - sum(means["she"]) / len(means["she"])


def internals(model: nn.Module, subject: Subject, pairs: Sequence[Pair]) -> dict[str, float]:
    """Distances between each sentence and its counterfactual, tokens weighted alike; hidden as a share of the states' squared norm."""
    batches = [subject.batch(pairs, side) for side in ("pro", "anti")]
    runs = []
    for batch in batches:
        with keep_run(model) as run:
            model(**batch.inputs)
        runs.append(run)
    first, second = runs
    found = {"spectrum": 0.0, "hidden": 0.0, "spectrum elsewhere": 0.0, "hidden elsewhere": 0.0}
    places = list(zip(first.patterns, first.hidden, strict=True))
    for layer, (site, block) in enumerate(places):
        where = "" if layer in LAYERS else " elsewhere"
        share = 1 / (len(LAYERS) if layer in LAYERS else len(places) - len(LAYERS))
        found["spectrum" + where] += share * float(spectrum_distance(first.patterns[site], second.patterns[site], tokens=first.tokens))
        size = hidden_distance(first.hidden[block], torch.zeros_like(first.hidden[block]), tokens=first.tokens)
        apart = hidden_distance(first.hidden[block], second.hidden[block], tokens=first.tokens)
        found["hidden" + where] += share * float(apart / size)
    return found


def preference(model: nn.Module, subject: Subject, pairs: Sequence[Pair], size: int = 25) -> tuple[Tensor, Tensor]:
    """[N] each, nats: log p of the sentence that fits the stereotype less that of the other, and of the two pronouns alone, in place."""
    whole, alone = [], []
    for start in range(0, len(pairs), size):
        sides = []
        for side in ("pro", "anti"):
            batch = subject.batch(pairs[start : start + size], side)
            log_p = model(**batch.inputs).logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
            sides.append(((log_p * batch.tokens[:, 1:]).sum(-1), log_p[torch.arange(len(log_p)), batch.at]))
        whole.append(sides[0][0] - sides[1][0])
        alone.append(sides[0][1] - sides[1][1])
    return torch.cat(whole), torch.cat(alone)
