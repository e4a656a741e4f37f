"""`chart_heads`: look at every head of a model from all sides, and put what was found into an atlas.

Letters: L sites, H query heads, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import AttributionError, HeadscopeError, InputError, NonFiniteError, SelectionError
from headscope.probe.atlas.atlas import HeadAtlas
from headscope.probe.atlas.behaviour import Behaviour, RandomTokens, measure_behaviour, merged
from headscope.probe.atlas.card import RULES, rules_of
from headscope.probe.atlas.circuits import read_weights
from headscope.probe.atlas.redundancy import Redundancy, measure_redundancy
from headscope.probe.atlas.stimuli import TEXTS, Alphabet, Stimulus, alphabet_of, inputs_of, shortened, texts_of
from headscope.probe.atlas.tally import Detector
from headscope.probe.attribution.heads import rank_heads
from headscope.probe.attribution.target import Scalar, Target, logits_of
from headscope.probe.models import model_fingerprint

Ask = int | Target | Scalar | None


def chart_heads(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Tensor | None = None,
    texts: Sequence[str] | None = None,
    target: Ask | Sequence[Ask] = None,
    length: int = 64,
    samples: int = 8,
    seed: int = 0,
    detectors: Mapping[str, Detector] | None = None,
    thresholds: Mapping[str, float] | None = None,
    weights: bool = True,
    redundancy: bool = True,
    importance: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> HeadAtlas:
    """Say what each head of a model does.

    A model that reads tokens is looked at on random tokens that are made here, and on texts: yours, or a few that come with the library.
    Any other model is looked at on your inputs. The model is as it was afterwards, and so are the random numbers of the process.

    Args:
        model: any module with attention, in eval mode.
        tokenizer: its tokenizer; without one, random tokens come from the model's config.
        inputs: keyword inputs, a list of them, or one tensor for the first argument, in place of texts.
        texts: what a language model is to read.
        target: for the importance of heads, as in `rank_heads`; None is the log-probability of the text's own next tokens for a causal
            language model, else the largest logit.
        length: tokens in a block of random tokens; what is repeated is twice that long.
        samples: how many blocks.
        seed: of the random tokens.
        detectors: scores of your own, by name; see `pairs` and `AttentionRows`. They run on texts or inputs.
        thresholds: of labels, where they are not to be the default; by label.
        weights: read the weights too: copying, QK and OV spectra and directions, composition.
        redundancy: compare the patterns of all heads with each other; needs scikit-learn.
        importance: score the effect of every head on the target; one backward pass a text.
        progress: told (steps done, steps in all).

    Raises:
        InputError: a model in training mode; no inputs for a model that reads no tokens; texts or lengths that do not fit it.
        SelectionError: a threshold for a label that there is not, a detector with the name of a score.
        ShapeError: a detector that does not return a number per row.
        NotIntercepted: no attention was caught.
        HeadscopeError: scikit-learn is not installed.
    """
    if any(module.training for module in model.modules()):
        raise InputError("the model is in training mode, where dropout makes heads random: call model.eval() first")
    for name, number, least in (("length", length, 2), ("samples", samples, 2)):
        if not isinstance(number, int) or number < least:
            raise InputError(f"{name}={number}: give a whole number from {least} up")
    if inputs is not None and texts is not None:
        raise InputError("inputs and texts are both given: choose one")
    rules_of(thresholds)
    letters = alphabet_of(model, tokenizer) if inputs is None or _reads_tokens(model, inputs) else None
    contents, told = _contents(model, tokenizer, inputs, texts, letters, length, samples, seed)
    random = None if letters is None else _random(letters, length, samples, seed)
    runs = len(contents) * (1 + redundancy) + (2 if random is not None else len(merged(contents)))
    steps = _Steps(progress, runs + importance * sum(_batch(one) for one in contents) + weights)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        found = measure_behaviour(model, contents, random, detectors=detectors, told=told, progress=steps.one)
        alike: Redundancy | None = None
        if redundancy:
            alike = measure_redundancy(model, contents, progress=steps.one)
        if importance:
            found = _with_importance(model, contents, target, found, told, steps)
    atlas = HeadAtlas(
        found.sites, found.scores, found.uniform, found.sink_key, found.on, found.undefined, alike, None, dict(thresholds or {}),
        () if alike is None else alike.notes,
        {
            "model": type(model).__name__, "fingerprint": model_fingerprint(model),
            "versions": {name: version(name) for name in ("headscope", "torch")}, "seed": seed, "length": length, "samples": samples,
            "causal": found.causal, "read": told, "detectors": list(detectors or {}),
        },
    )  # fmt: skip
    atlas = _with_weights(atlas, model, tokenizer, contents, steps) if weights else atlas
    steps.finish()
    return atlas


class _Steps:
    """Counts what is done."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def one(self) -> None:
        self.done = min(self.total, self.done + 1)
        if self.progress is not None:
            self.progress(self.done, self.total)

    def finish(self) -> None:
        """What was left out is done too."""
        if self.done < self.total:
            self.done = self.total - 1
            self.one()


def _batch(stimulus: Stimulus) -> int:
    return next((value.shape[0] for value in stimulus.inputs.values() if isinstance(value, Tensor) and value.dim()), 1)


def _reads_tokens(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Tensor) -> bool:
    return any(stimulus.tokens is not None for stimulus in inputs_of(model, inputs))


def _contents(
    model: nn.Module,
    tokenizer: Any,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Tensor | None,
    texts: Sequence[str] | None,
    letters: Alphabet | None,
    length: int,
    samples: int,
    seed: int,
) -> tuple[list[Stimulus], str]:
    """What the model is run on beside random tokens, and what to call it."""
    if inputs is not None:
        found = inputs_of(model, inputs)
        return found, f"{len(found)} inputs" if len(found) > 1 else "the inputs"
    if letters is None:
        raise InputError(f"{type(model).__name__} reads no tokens: give inputs=, such as {{'pixel_values': images}}")
    readable = callable(getattr(tokenizer, "decode", None))
    if texts is not None and not readable:
        raise InputError("texts need the model's tokenizer: chart_heads(model, tokenizer, texts=…)")
    if readable:
        chosen = list(texts) if texts is not None and not isinstance(texts, str) else texts
        if chosen is None:
            own = [shortened(model, tokenizer, text) for text in TEXTS]
            return texts_of(model, tokenizer, own), f"{len(own)} texts that come with the library"
        return texts_of(model, tokenizer, chosen), f"{len(chosen)} texts"
    return [letters.write(2 * length, 1, samples, seed + 2)], "random tokens, for want of texts"


def _random(letters: Alphabet, length: int, samples: int, seed: int) -> RandomTokens:
    repeated = letters.write(length, 2, samples, seed)
    return RandomTokens(repeated, letters.write(2 * length, 1, samples, seed + 1), length, len(letters.before))


# -- importance --------------------------------------------------------------------------------------------------------


def _with_importance(
    model: nn.Module, contents: Sequence[Stimulus], target: Ask | Sequence[Ask], found: Behaviour, told: str, steps: _Steps
) -> Behaviour:
    """The scores with Michel's, raw and with each layer's norm as the unit; where it cannot be had, with the reason."""
    inputs = [one.inputs for one in contents]
    given: Ask | Sequence[Ask] = target
    if target is None and found.causal:
        own = [_next_tokens(model, one) for one in contents]
        if all(one is not None for one in own):
            given = own
    try:
        ranking = rank_heads(model, inputs, given, "michel", progress=lambda done, total: steps.one())
    except (AttributionError, SelectionError, NonFiniteError) as error:
        return replace(found, undefined={**found.undefined, **dict.fromkeys(("importance", "importance_in_layer"), str(error))})
    places = {site.name: row for site, row in zip(ranking.sites, ranking.scores["michel"], strict=True)}
    table = torch.full_like(next(iter(found.scores.values())), torch.nan)
    for place, site in enumerate(found.sites):
        if site.name in places:
            table[place, : site.query_heads] = places[site.name].cpu()
    unit = table.nan_to_num(nan=0.0).norm(dim=1, keepdim=True)
    scores = {**found.scores, "importance": table, "importance_in_layer": table / unit.masked_fill(unit == 0, torch.nan)}
    what = "log-probability of the next tokens" if given is not target else "the target" if target is not None else "the largest logit"
    return replace(found, scores=scores, on={**found.on, **dict.fromkeys(("importance", "importance_in_layer"), f"{told}; {what}")})


def _next_tokens(model: nn.Module, content: Stimulus) -> Target | None:
    """The log-probability of a text's own tokens, each after the ones before it; None where the model predicts no tokens of one text."""
    ids = content.tokens
    if ids is None or ids.shape[0] != 1 or ids.shape[1] < 2:
        return None
    try:
        with torch.no_grad():
            logits = logits_of(model(**content.inputs))
    except HeadscopeError:
        return None
    if logits.dim() != 3 or logits.shape[1] != ids.shape[1] or int(ids.max()) >= logits.shape[2]:
        return None
    return Target(tuple(ids[0, 1:].tolist()), positions=tuple(range(ids.shape[1] - 1)), log_probability=True)


# -- weights -----------------------------------------------------------------------------------------------------------


def _with_weights(atlas: HeadAtlas, model: nn.Module, tokenizer: Any, contents: Sequence[Stimulus], steps: _Steps) -> HeadAtlas:
    """The atlas with what the weights say; directions are read for the heads that have a name first, then for others."""
    first = {name: value[:1] if isinstance(value, Tensor) and value.dim() else value for name, value in contents[0].inputs.items()}
    reading = read_weights(model, first, atlas.sites)
    found = replace(
        atlas,
        scores={**atlas.scores, **reading.scores},
        on={**atlas.on, **reading.on},
        undefined={**atlas.undefined, **reading.undefined},
    )
    cards = [card for label, own in found.labels().items() if label in RULES for card in own]
    order = dict.fromkeys([(card.site, card.head) for card in cards] + [(card.site, card.head) for card in found.cards()])
    circuits = reading.circuits(tokenizer, [place for place in order if place[0] in reading.weights])
    steps.one()
    return replace(found, circuits=circuits)
