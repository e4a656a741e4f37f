"""What the study measures on: three trained models, samples they never saw, and how their inputs are taken away.

Letters: S tokens.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from train_reviews import Review, encode, read_reviews, train

from headscope.probe import load
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.target import Scalar, Target
from headscope.probe.attribution.units import Units, patch_units, token_units
from headscope.probe.models import embedded_folder

ROOT = Path(__file__).parents[2]
CONTEXT = 48  # tokens of a text, besides <s>
CHUNK = 8  # words that Shapley sampling takes together in a review: one by one, 510 words would take a minute a review

Ranker = Callable[[nn.Module, Mapping[str, Any], Target | Scalar], Attribution]


@dataclass(frozen=True)
class Subject:
    """One model and what it is asked.

    Attributes:
        name: of the model.
        what: model, samples and target, in a sentence.
        model, tokenizer: as `load` gives them.
        samples: keyword inputs, one sample each.
        removals: ways to take units away; the first is that of the table.
        units: what is ranked, by sample; None for tokens.
        methods: how to rank them, by name.
        steps: points of a curve.
        reviews: where the samples are reviews, with what people marked in them.
        marked_share: share of a review's words that people marked, in the reviews that are not among the samples.
    """

    name: str
    what: str
    model: nn.Module
    tokenizer: Any
    samples: list[dict[str, Tensor]]
    removals: tuple[str, ...]
    units: Callable[[Mapping[str, Any]], Units] | None
    methods: dict[str, Ranker]
    steps: int
    reviews: tuple[Review, ...] = field(default=())
    marked_share: float = 0.0


def method(name: str, label: str | None = None, /, **options: Any) -> Ranker:
    """A method of `attribute` with these options; options that are functions are asked with the sample."""

    def rank(model: nn.Module, inputs: Mapping[str, Any], target: Target | Scalar) -> Attribution:
        made = {key: value(inputs) if callable(value) else value for key, value in options.items()}
        return attribute(model, inputs, target, name, heads=False, layers=False, **made)

    rank.__qualname__ = f"{name} {sorted((key, label if callable(value) else value) for key, value in options.items())}"
    return rank


def methods(removal: str, *, shapley: int, steps: int, units: Callable[[Mapping[str, Any]], Units]) -> dict[str, Ranker]:
    """The methods that are compared; Shapley sampling takes away by the removal that the table is measured with."""
    return {
        "attnlrp": method("attnlrp"),
        "attnlrp-gamma": method("attnlrp-gamma"),
        "cp-lrp": method("cp-lrp"),
        "gim": method("gim"),
        "gradient-x-input": method("gradient-x-input"),
        "integrated-gradients": method("integrated-gradients", steps=steps),
        "shapley-sampling": method("shapley-sampling", "as in the study", samples=shapley, removal=removal, units=units),
        "rollout": method("rollout"),
        "chefer": method("chefer"),
        "attention": method("attention"),
    }  # fmt: skip


def digits(quick: bool) -> Subject:
    """`embedded:vit` on the digits that it was not trained on."""
    model, processor = load("embedded:vit")
    images = load_file(embedded_folder("vit") / "held_out.safetensors")["images"]
    count = 4 if quick else 100

    def patches(inputs: Mapping[str, Any]) -> Units:
        return patch_units(inputs, 2)

    return Subject(
        "embedded:vit",
        f"{count} held-out digits, 16 patches of 2 × 2 pixels; target: the logit of the class the model chooses",
        model, None, [processor(image.numpy()) for image in images[:count]], ("zero", "mean"), patches,
        methods("zero", shapley=10, steps=20, units=patches), 16,
    )  # fmt: skip


def held_out_text(data: Path | None) -> tuple[str, str]:
    """Text that `embedded:lm` was not trained on, and its name."""
    found = sorted(data.rglob("wikitext-2-test.txt")) if data is not None else []
    if found:
        return found[0].read_text(encoding="utf-8"), "WikiText-2, test part"
    return " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split()), "this project's licence text"


def language(data: Path | None, quick: bool, seed: int) -> Subject:
    """`embedded:lm` on held-out text."""
    model, tokenizer = load("embedded:lm")
    text, name = held_out_text(data)
    ids = torch.tensor(tokenizer(text[:400_000], add_special_tokens=False, verbose=False)["input_ids"])
    count = 2 if quick else 24
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(len(ids) - CONTEXT, generator=generator)[:count].tolist()
    samples = [{"input_ids": torch.cat([torch.tensor([tokenizer.bos_token_id]), ids[start : start + CONTEXT]])[None]} for start in starts]
    return Subject(
        "embedded:lm",
        f"{count} pieces of {CONTEXT} tokens from {name}; target: the logit of the next token the model would write",
        model, tokenizer, samples, ("zero-embedding", "delete"), None,
        methods("zero-embedding", shapley=5, steps=20, units=lambda inputs: token_units(inputs, tokenizer)), 12,
    )  # fmt: skip


def film_reviews(data: Path | None, work: Path, quick: bool, seed: int) -> Subject | None:
    """A classifier trained here on ERASER's film reviews; None where they are not among the data."""
    found = sorted(data.rglob("movies/train.jsonl")) if data is not None else []
    if not found:
        return None
    folder, trained = found[0].parent, work / "reviews"
    if not (trained / "training.json").is_file():
        sys.stderr.write("training the classifier of reviews\n")
        train(folder, trained, epochs=1 if quick else 12, seed=seed)
    model, tokenizer = load(trained)
    reviews = [review for review in read_reviews(folder, "test") if review.marked]
    order = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = tuple(reviews[place] for place in order[: 4 if quick else 40])
    others = [reviews[place] for place in order[len(chosen) :]]
    shares = [len([place for place in review.marked if place < 510]) / min(510, len(review.words)) for review in others]

    def chunks(inputs: Mapping[str, Any]) -> Units:
        length = inputs["input_ids"].shape[1]
        places = tuple(tuple(range(start, min(start + CHUNK, length - 1))) for start in range(1, length - 1, CHUNK))
        return Units("input_ids", places, tuple(f"words from {place[0]}" for place in places), (length,))

    return Subject(
        "film reviews",
        f"{len(chosen)} reviews of ERASER's test part, their first 510 words; target: the logit of the class the model chooses",
        model, tokenizer, [encode(tokenizer, review.words) for review in chosen], ("token", "zero-embedding"),
        lambda inputs: token_units(inputs, tokenizer),
        methods("token", shapley=5, steps=20, units=chunks), 12, chosen, sum(shares) / len(shares),
    )  # fmt: skip


def folder_for_work(given: Path | None) -> Path:
    """Where the trained classifier and finished entries are kept: a folder of the user's, or a new one that goes with the system's rest."""
    work = given or Path(tempfile.mkdtemp(prefix="faithfulness-"))
    work.mkdir(parents=True, exist_ok=True)
    return work
