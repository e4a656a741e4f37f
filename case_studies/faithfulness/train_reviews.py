"""Train a small classifier of film reviews, positive or negative, for the faithfulness study.

The data are ERASER's movies (DeYoung et al. 2020): reviews cut into words, a label each, and the words that a person marked as its
reasons. Training crops each review at random; whoever reads a result should know that the model sees 510 words at most.

    python case_studies/faithfulness/train_reviews.py --data movies --out reviews

Letters: B reviews, S tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

LABELS = ("NEG", "POS")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST = 512  # tokens, with [CLS] and [SEP]


@dataclass(frozen=True)
class Review:
    """One review: its words, its label, and the places of the words that a person marked."""

    name: str
    words: tuple[str, ...]
    label: int
    marked: frozenset[int]


def read_reviews(folder: Path, part: str) -> list[Review]:
    """The reviews of `train`, `val` or `test`; the training part without those that stand in `val`, which its file repeats."""
    rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
    if part == "train":
        held_out = {json.loads(line)["annotation_id"] for line in (folder / "val.jsonl").read_text(encoding="utf-8").splitlines()}
        rows = [row for row in rows if row["annotation_id"] not in held_out]
    found = []
    for row in rows:
        name = row["annotation_id"]
        words = tuple((folder / "docs" / name).read_text(encoding="utf-8").split())
        spans = [span for group in row["evidences"] for span in group]
        marked = frozenset(place for span in spans for place in range(span["start_token"], span["end_token"]))
        found.append(Review(name, words, LABELS.index(row["classification"]), marked))
    return found


def build_tokenizer(reviews: Sequence[Review], least: int = 4) -> PreTrainedTokenizerFast:
    """One token a word, for words that stand in at least `least` reviews."""
    counts = Counter(word for review in reviews for word in set(review.words))
    words = [*SPECIAL, *sorted(word for word, count in counts.items() if count >= least)]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_max_length=LONGEST,
    )  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [1, S] of the first words; token 1 + n is word n."""
    encoded = tokenizer(" ".join(words[: LONGEST - 2]), return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def build_model(words: int, seed: int) -> DistilBertForSequenceClassification:
    torch.manual_seed(seed)
    config = DistilBertConfig(
        vocab_size=words, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=LONGEST, dropout=0.2,
        attention_dropout=0.1, seq_classif_dropout=0.3, initializer_range=0.1, pad_token_id=0,
        num_labels=2, id2label=dict(enumerate(LABELS)),
        label2id={label: place for place, label in enumerate(LABELS)},
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


def crops(ids: Sequence[Tensor], length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random piece of each review between [CLS] and [SEP], and its mask, both [B, S]; one word in ten is hidden."""
    rows = []
    for words in ids:
        start = int(torch.randint(max(1, len(words) - length + 3), (1,), generator=generator))
        piece = words[start : start + length - 2].clone()
        piece[torch.rand(len(piece), generator=generator) < 0.1] = 4
        rows.append(torch.cat([torch.tensor([2]), piece, torch.tensor([3])]))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, (padded != 0).long()


@torch.no_grad()
def accuracy(model: DistilBertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, reviews: Sequence[Review]) -> float:
    """Share of reviews whose label the model gives, from their first 510 words."""
    right = [int(model(**encode(tokenizer, review.words)).logits.argmax()) == review.label for review in reviews]
    return sum(right) / len(right)


def train(
    folder: Path, out: Path, *, epochs: int = 12, length: int = 192, batch: int = 16, rate: float = 1.5e-3, seed: int = 0
) -> dict[str, Any]:
    """Train, save model and tokenizer in `out`, and say how well it does."""
    reviews = read_reviews(folder, "train")
    tokenizer = build_tokenizer(reviews)
    model = build_model(len(tokenizer), seed)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.tensor(tokenizer(" ".join(review.words), add_special_tokens=False, verbose=False)["input_ids"]) for review in reviews]
    labels = torch.tensor([review.label for review in reviews])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps, step, began = epochs * math.ceil(len(reviews) / batch), 0, time.monotonic()
    for epoch in range(1, epochs + 1):
        model.train()
        size = LONGEST if epoch == epochs else length  # the last epoch sees every position
        total = 0.0
        for chosen in torch.randperm(len(reviews), generator=generator).split(batch):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
            tokens, mask = crops([ids[place] for place in chosen.tolist()], size, generator)
            loss = functional.cross_entropy(model(input_ids=tokens, attention_mask=mask).logits, labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            total += loss.item() * len(chosen)
        print(f"epoch {epoch} of {epochs}: loss {total / len(reviews):.3f}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    model.eval()
    report = {
        "training_reviews": len(reviews), "vocabulary": len(tokenizer), "parameters": sum(p.numel() for p in model.parameters()),
        "validation_accuracy": round(accuracy(model, tokenizer, read_reviews(folder, "val")), 4),
        "seconds": round(time.monotonic() - began, 1), "epochs": epochs, "length": length, "batch": batch, "rate": rate, "seed": seed,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small classifier of film reviews")
    parser.add_argument("--data", type=Path, required=True, help="folder of ERASER's movies: train.jsonl, val.jsonl, test.jsonl, docs/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(train(args.data, args.out, epochs=args.epochs, seed=args.seed)))


if __name__ == "__main__":
    main()
