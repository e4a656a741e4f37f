"""The arms of the ablation: which terms of the loss are on, and the training they share."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sentences import ANCHORS, FRAMES, Pair, anchors_of, pairs_of
from subject import Subject
from torch import nn

from headscope.interventions.losses.losses import AttentionLoss, keep_run

LAYERS = (2, 3, 4)  # of 6: as deep, relatively, as UGID's 13, 15, 17 of 32
TRAINED = ("q_proj", "k_proj", "v_proj", "o_proj")
# UGID's 20, 20, 5, 1, 100, 10 are weights of sums over heads, layers and tokens; ours are of means: x 8 heads, 3 layers, 8 tokens.
KEEPING = {"divergence": 1.0, "anchor": 80.0}
GRAPH = {"spectrum": 480.0, "hidden": 60.0, "edges": 15.0}
LOGIT = {"log_odds": 100.0}


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        weights: of the terms besides `KEEPING`, which all arms have.
        late: by how many tokens the log-odds are taken after the place that predicts the pronoun.
    """

    weights: tuple[tuple[str, float], ...]
    late: int = 0


ARMS = {
    "neither": Arm(()),
    "logit": Arm(tuple(LOGIT.items())),
    "logit, one token late": Arm(tuple(LOGIT.items()), late=1),
    "graph": Arm(tuple(GRAPH.items())),
    "both": Arm((*LOGIT.items(), *GRAPH.items())),
}
RANDOM = "random direction"


def debias(subject: Subject, arm: Arm, seen: Sequence[str], steps: int, seed: int, rate: float = 1e-3) -> nn.Module:
    """A copy of the model with q, k, v and o of all layers trained by an arm's loss; the subject stays as it is."""
    base = subject.model
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
    loss = AttentionLoss(**{**KEEPING, **dict(arm.weights)}, words=(subject.he, subject.she))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    draw = random.Random(seed)
    pairs, fixed = pairs_of(seen, FRAMES), anchors_of(ANCHORS, FRAMES)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10, (steps - step) / (0.5 * steps))
        chosen, kept = draw.sample(pairs, 6), subject.batch(draw.sample(fixed, 4))
        he_first = [swapped(pair) if draw.random() < 0.5 else pair for pair in chosen]
        one, other = subject.batch(he_first), subject.batch(he_first, "anti")
        at = one.at + arm.late
        counted = one.tokens.clone()
        counted[torch.arange(len(at)), at] = False  # what the log-odds change may change
        with keep_run(model, layers=LAYERS) as run:
            model(**one.inputs)
        with keep_run(model, layers=LAYERS) as counterfactual:
            model(**other.inputs)
        with keep_run(model, layers=LAYERS, hidden=False) as anchor:
            model(**kept.inputs)
        with torch.no_grad():
            with keep_run(base, layers=LAYERS, hidden=False) as reference:
                base(**one.inputs)
            with keep_run(base, layers=LAYERS, hidden=False) as anchor_reference:
                base(**kept.inputs)
        value = loss(run, counterfactual, reference, at=at, counted=counted, anchors=(anchor, anchor_reference))
        optimiser.zero_grad()
        value.total.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    return model


def swapped(pair: Pair) -> Pair:
    return Pair(pair.before, pair.anti, pair.pro, pair.after)


def random_direction(base: nn.Module, trained: nn.Module, seed: int) -> nn.Module:
    """The base model moved as far as the trained one, tensor by tensor, in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter, before, after in zip(model.parameters(), base.parameters(), trained.parameters(), strict=True):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * ((after - before).norm() / noise.norm()))
    return model
