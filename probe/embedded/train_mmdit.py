"""Train `embedded:mmdit`: diffusers' own Flux transformer at toy size, which draws 8 × 8 digits from prompts of words.

The images are those that `embedded:vit` is trained on; the same fifth is held out. The prompts come from `prompts.json`, and
their token embeddings are random and frozen. At every evaluation a support vector classifier of real digits judges what the
averaged weights draw. A killed run goes on from its last checkpoint when started again.

    python probe/embedded/train_mmdit.py --out probe/embedded/mmdit

Shapes: B prompts, T text tokens (8), I image tokens (16).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional
from train_vit import SPLIT_SEED, split_digits, to_pixels

from headscope.probe.digit_flow import EMBEDDING, DigitFlow, load_digit_flow
from headscope.probe.digit_prompts import DIGITS, PromptBook

IMPLICIT, PLAIN = 0.45, 0.05  # shares of the prompts in training; the others are explicit
PROMPTS = 400  # different sentences a digit and family, drawn once
UNSEEN = 10_000  # added to the seed of the sentences that are judged


def build_model(args: argparse.Namespace) -> FluxTransformer2DModel:
    third = args.width // 16 * 6  # rotary dimensions for row and for column; the rest belongs to the unused third axis
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=args.width, num_attention_heads=4,
        joint_attention_dim=args.text_width, pooled_projection_dim=8, guidance_embeds=False,
        axes_dims_rope=(args.width - 2 * third, third, third),
    )  # fmt: skip


def build_prompts(book: PromptBook, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids of the training prompts: [10, PROMPTS, T] explicit and as many implicit."""
    families = ([method(digit, PROMPTS, seed) for digit in range(DIGITS)] for method in (book.explicit, book.implicit))
    explicit, implicit = (torch.tensor([[book.encode(prompt) for prompt in row] for row in rows]) for rows in families)
    return explicit, implicit


def to_ink(pictures: Tensor) -> Tensor:
    """[B, 1, 8, 8] in [-1, 1] as the judge reads them: rows of ink from 0 to 16, [B, 64]."""
    return ((pictures.clamp(-1, 1) + 1) * 8).flatten(1)


def judged(flow: DigitFlow, judge: SVC, n: int, seed: int, *, apart: bool = False) -> dict[str, float]:
    """Share of drawings that the judge reads as the digit asked for, n a digit, by family; the worst digit, and 8 alone.

    Args:
        apart: judge the third synonym apart from the first two, as a study does that holds it out.
    """
    synonyms = {"synonyms_0_1": (0, 1), "synonym_2": (2,)} if apart else {"explicit": (0, 1, 2)}
    prompts = {name: [flow.book.explicit(d, n, UNSEEN + seed, chosen) for d in range(DIGITS)] for name, chosen in synonyms.items()}
    prompts["implicit"] = [flow.book.implicit(d, n, UNSEEN + seed) for d in range(DIGITS)]
    scores: dict[str, float] = {}
    for name, rows in prompts.items():
        ink = to_ink(flow.sample([prompt for row in rows for prompt in row], seed=seed))
        right = judge.predict(ink.numpy()).reshape(DIGITS, n) == np.arange(DIGITS)[:, None]
        scores[name] = round(float(right.mean()), 4)
        scores[f"{name}_worst_digit"] = round(float(right.mean(1).min()), 4)
        scores[f"{name}_eight"] = round(float(right[8].mean()), 4)
    return scores


def nearest(points: Tensor, others: Tensor) -> float:
    """Median distance from a point to the nearest of the others, in ink."""
    return round(float(torch.cdist(points, others).min(dim=1).values.median()), 3)


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Write beside, then rename: a killed run leaves the last whole checkpoint."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    book = PromptBook.read(args.out / "prompts.json")
    images, labels, held_images, held_labels = split_digits()
    pixels = to_pixels(images)
    of_digit = [torch.nonzero(labels == digit).flatten() for digit in range(DIGITS)]
    judge = SVC(C=10, gamma=0.001).fit(images.flatten(1).numpy(), labels.numpy())
    judge_accuracy = float(judge.score(held_images.flatten(1).numpy(), held_labels.numpy()))

    model = build_model(args)
    average = build_model(args)
    average.load_state_dict(model.state_dict())
    embedding = torch.randn(len(book.words), args.text_width, generator=torch.Generator().manual_seed(args.seed)).half().float()
    flow, averaged = DigitFlow(model, book, embedding), DigitFlow(average.eval(), book, embedding)
    explicit, implicit = build_prompts(book, args.seed)
    plain = torch.tensor([book.encode(prompt) for prompt in book.plain(PROMPTS, args.seed)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))

    checkpoint = args.work / "checkpoint.pt"
    step, spent, log, losses = 0, 0.0, [], []
    runs: list[dict[str, object]] = []  # a resumed training may go on with other arguments: say so in its record
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, log, runs = state["step"], state["seconds"], json.loads(state["log"]), json.loads(state["runs"])
        print(f"resumed at step {step}", flush=True)
    if step < args.steps:
        runs.append({"from_step": step, "steps": args.steps, "lr": args.lr, "batch": args.batch})
    began = time.monotonic() - spent
    while step < args.steps:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # one a step: a resumed run sees the same data

        def draw(high: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randint(high, (args.batch,), generator=generator)

        digits, sentence, pick = draw(DIGITS), draw(PROMPTS), draw(2**30)
        kind = torch.rand(args.batch, generator=generator)[:, None]
        ids = torch.where(kind < IMPLICIT, implicit[digits, sentence], explicit[digits, sentence])
        ids = torch.where(kind > 1 - PLAIN, plain[sentence], ids)
        clean = pixels[[int(of_digit[d][p % len(of_digit[d])]) for d, p in zip(digits.tolist(), pick.tolist(), strict=True)]]
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.sigmoid(torch.randn(args.batch, generator=generator))  # half of them in the middle, where the digit is decided
        t[::2] = torch.rand(len(t[::2]), generator=generator)
        mixed = torch.lerp(clean, noise, t[:, None, None, None])
        share = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            predicted = flow.velocity(mixed, t, embedding[ids])
        loss = functional.mse_loss(predicted.float(), noise - clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.append(loss.item())
        keep = min(args.average, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        if step % args.every == 0 or step == args.steps:
            seconds = time.monotonic() - began
            log.append({"step": step, "seconds": round(seconds, 1), "training_loss": round(float(np.mean(losses)), 4),
                        **judged(averaged, judge, 20, step)})  # fmt: skip
            losses = []
            print(f"{json.dumps(log[-1])}  about {seconds / step * (args.steps - step) / 60:.0f} min left", flush=True)
            save_checkpoint(checkpoint, {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                                         "step": step, "seconds": time.monotonic() - began, "log": json.dumps(log),
                                         "runs": json.dumps(runs)})  # fmt: skip
    average.save_config(args.out)
    weights = {name: value.half().contiguous() for name, value in average.state_dict().items()}
    save_file({**weights, EMBEDDING: embedding.half()}, args.out / "model.safetensors")
    final = load_digit_flow(args.out, FluxTransformer2DModel)
    plain_prompts = book.plain(1000, UNSEEN + args.seed)
    readings = judge.predict(to_ink(final.sample(plain_prompts, seed=args.seed)).numpy())
    drawn = to_ink(final.sample([prompt for digit in range(DIGITS) for prompt in book.explicit(digit, 36, UNSEEN, (0,))], seed=args.seed))
    seen, unseen = images.flatten(1).float(), held_images.flatten(1).float()
    report = {
        "arguments": {"runs": runs, "width_of_a_head": args.width, "text_width": args.text_width, "average": args.average,
                      "implicit": IMPLICIT, "plain": PLAIN, "seed": args.seed, "threads": args.threads, "bf16": args.bf16},
        "data": {"name": "scikit-learn load_digits", "training_images": len(images), "held_out_images": len(held_images),
                 "split_seed": SPLIT_SEED},
        "parameters": sum(p.numel() for p in final.model.parameters()),
        "steps": step,
        "seconds": log[-1]["seconds"],
        "judge_held_out_accuracy": round(judge_accuracy, 4),
        "drawings_a_family": 100 * DIGITS,
        "judged": {**judged(final, judge, 100, args.seed), **judged(final, judge, 100, args.seed, apart=True)},
        "plain_prompts_drawn_as": np.bincount(readings, minlength=DIGITS).tolist(),
        "distance_to_nearest_training_image": {"drawings": nearest(drawn, seen), "held_out_images": nearest(unseen, seen)},
        "log": log,
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"saved {args.out}: {report['judged']}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train embedded:mmdit, a toy Flux transformer that draws digits from prompts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "mmdit", help="folder of the finished model, with prompts.json")
    parser.add_argument("--work", type=Path, default=Path("mmdit-training"), help="folder of the checkpoint; run again to resume")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=16, help="dimensions of a head; 16 or 32")
    parser.add_argument("--text-width", type=int, default=64)
    parser.add_argument("--average", type=float, default=0.998, help="share that the averaged weights keep at each step")
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations and checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 (faster where the processor has it)")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
