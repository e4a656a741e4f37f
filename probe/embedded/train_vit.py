"""Train `embedded:vit`: a small vision transformer that reads 8 × 8 handwritten digits.

The data ship with scikit-learn (1,797 grey images, values 0 to 16). A fixed fifth of them is held out, is never trained on,
chooses nothing, and is stored beside the model so that its accuracy can be checked without scikit-learn.

    python probe/embedded/train_vit.py --out probe/embedded/vit

Shapes: B images, C classes (10).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

HELD_OUT = 360  # images, drawn once by SPLIT_SEED whatever the seed of the training
SPLIT_SEED = 0


def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [B, 8, 8] uint8 and labels [B], then the held-out ones."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images.astype(np.uint8)), torch.from_numpy(digits.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(images)))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return images[training], labels[training], images[held_out], labels[held_out]


def build_config() -> ViTConfig:
    names = {index: str(index) for index in range(10)}
    return ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, pooler_output_size=64, initializer_range=0.08,
        id2label=names, label2id={name: index for index, name in names.items()},
    )  # fmt: skip


def to_pixels(images: Tensor) -> Tensor:
    """[B, 8, 8] of 0 to 16 as the model takes it: [B, 1, 8, 8] in [-1, 1]."""
    return images.float()[:, None] / 8.0 - 1.0


def jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to one pixel, turned by up to 8 degrees and scaled by up to 10 %, [B, 1, 8, 8]."""
    n = len(pixels)

    def spread(width: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * width

    angle, size = spread(math.radians(8)), 1 + spread(0.1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = size * angle.cos(), -size * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = size * angle.sin(), size * angle.cos()
    theta[:, 0, 2], theta[:, 1, 2] = spread(0.25), spread(0.25)  # 0.25 of half the width is one pixel
    grid = functional.affine_grid(theta, [n, 1, 8, 8], align_corners=False)
    return functional.grid_sample(pixels + 1, grid, align_corners=False) - 1  # outside is ink-free: -1


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Share of images whose most probable class is the label."""
    predicted = model(pixel_values=to_pixels(images)).logits.argmax(dim=-1)
    return (predicted == labels).float().mean().item()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels, held_images, held_labels = split_digits()
    model = ViTForImageClassification(build_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps_an_epoch = math.ceil(len(images) / args.batch)
    steps, step, log = args.epochs * steps_an_epoch, 0, []
    began = time.monotonic()
    for epoch in range(1, args.epochs + 1):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(args.batch):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
            logits = model(pixel_values=jitter(to_pixels(images[chosen]), generator)).logits
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            total += loss.item() * len(chosen)
        if epoch % args.every == 0 or epoch == args.epochs:
            model.eval()
            row = {
                "epoch": epoch, "seconds": round(time.monotonic() - began, 1), "training_loss": round(total / len(images), 4),
                "training_accuracy": round(accuracy(model, images, labels), 4),
            }  # fmt: skip
            log.append(row)
            print(json.dumps(row), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(args.out)
    save_file({"images": held_images, "labels": held_labels.to(torch.uint8)}, args.out / "held_out.safetensors")
    final = ViTForImageClassification.from_pretrained(args.out).eval()
    report = {
        "arguments": {"epochs": args.epochs, "batch": args.batch, "lr": args.lr, "seed": args.seed, "threads": args.threads},
        "data": {"name": "scikit-learn load_digits", "training_images": len(images), "held_out_images": len(held_images),
                 "split_seed": SPLIT_SEED},
        "parameters": sum(p.numel() for p in final.parameters()),
        "seconds": round(time.monotonic() - began, 1),
        "training_accuracy": round(accuracy(final, images, labels), 4),
        "held_out_accuracy": round(accuracy(final, held_images, held_labels), 4),
        "log": log,
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"saved {args.out}: held-out accuracy {report['held_out_accuracy']:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train embedded:vit, a small vision transformer that reads digits")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vit", help="folder of the finished model")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=10, help="epochs between lines of the log")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
