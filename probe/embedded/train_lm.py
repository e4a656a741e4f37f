"""Train `embedded:lm`: a small Llama-architecture language model with real induction heads.

Three parts: a byte-level BPE tokenizer, a stream of training sequences (prose, with a share of random spans that repeat,
so that previous-token and induction heads form), and a plain training loop that resumes from its last checkpoint.

    python probe/embedded/train_lm.py --text tiny-shakespeare.txt wikitext-2-valid.txt --out probe/embedded/lm

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
HELD_OUT = 0.05  # the last part of each text is never trained on
STAGES = ((0.5, 128, 24), (0.85, 256, 12), (1.0, 1024, 3))  # (until this share of the steps, sequence length S, sequences B)


# (until this share of the steps, share of sequences that repeat a span, share of those whose span is random): prose with some
# repetition, then a push in which induction forms, then prose again.
REPEATED = ((0.375, 0.5, 0.5), (0.65, 0.85, 0.8), (1.0, 0.3, 0.5))


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts `<s>` before every text and can spell any string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def build_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=640, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096, rope_theta=10000.0,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2, attention_bias=False,
    )  # fmt: skip


def sample_batch(
    streams: list[np.ndarray], n: int, length: int, repeated: float, random: float, rng: np.random.Generator, vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that start with `<s>`, and their labels, both [B, S].

    Either prose, or (a share `repeated`) a span repeated to the end. A share `random` of those are spans of random tokens, which
    nothing but the repetition predicts; their first copy is unpredictable, so it is left out of the loss (label -100).
    """
    weights = np.array([len(s) for s in streams], dtype=float)
    rows, labels = [], []
    for _ in range(n):
        stream = streams[rng.choice(len(streams), p=weights / weights.sum())]
        target = None
        if rng.random() < repeated:
            longest = min(length // 2, 256)
            period = int(np.exp(rng.uniform(np.log(4), np.log(longest))))  # log-uniform: short repetitions teach first
            if rng.random() < random:
                span = rng.integers(3, vocab, size=period)
                target = np.full(length, -100, dtype=np.int64)
            else:
                start = int(rng.integers(0, len(stream) - period))
                span = stream[start : start + period]
            row = np.tile(span, length // period + 1)[: length - 1]
            if target is not None:
                target[1 + period :] = row[period:]
        else:
            start = int(rng.integers(0, len(stream) - length))
            row = stream[start : start + length - 1]
        row = np.concatenate([[0], row])
        rows.append(row)
        labels.append(row if target is None else target)
    return torch.from_numpy(np.stack(rows)).long(), torch.from_numpy(np.stack(labels)).long()


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, streams: list[np.ndarray], length: int, n: int) -> list[float]:
    """Mean loss in nats per token on evenly spaced held-out windows, one figure a text."""
    losses = []
    for stream in streams:
        starts = np.linspace(0, len(stream) - length, n).astype(int)
        ids = torch.from_numpy(np.stack([np.concatenate([[0], stream[s : s + length - 1]]) for s in starts])).long()
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses


@torch.no_grad()
def stripe_scores(model: LlamaForCausalLM, vocab: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Induction and previous-token scores of every head on repeated random tokens, each [L, H].

    Induction: mean attention from a token of the second copy to the token after its first occurrence.
    Previous-token: mean attention to the position just before. (Olsson et al. 2022, "stripe" scores.)
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    period = 64
    span = torch.randint(3, vocab, (8, period), generator=generator)
    ids = torch.cat([torch.zeros(8, 1, dtype=torch.long), span, span], dim=1)
    patterns = torch.stack(model(input_ids=ids, output_attentions=True).attentions)  # [L, B, H, S, S]
    model.set_attn_implementation(implementation)
    induction = patterns.diagonal(offset=1 - period, dim1=-2, dim2=-1)[..., 1:].mean(dim=(1, -1))
    previous = patterns.diagonal(offset=-1, dim1=-2, dim2=-1).mean(dim=(1, -1))
    return induction, previous


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Write beside, then rename: a killed run leaves the last whole checkpoint."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = [path.read_text(encoding="utf-8") for path in args.text]
    cut = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    tokenizer = train_tokenizer([text[:c] for text, c in zip(texts, cut, strict=True)], args.vocab)
    vocab = len(tokenizer)

    def encode(part: str) -> np.ndarray:
        return np.array(tokenizer(part, add_special_tokens=False)["input_ids"], dtype=np.int64)

    training = [encode(text[:c]) for text, c in zip(texts, cut, strict=True)]
    held_out = [encode(text[c:]) for text, c in zip(texts, cut, strict=True)]
    model = LlamaForCausalLM(build_config(vocab))
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.95)
    )
    checkpoint = args.work / "checkpoint.pt"
    args.work.mkdir(parents=True, exist_ok=True)
    step, spent, tokens, log = 0, 0.0, 0, []
    runs: list[dict[str, object]] = []  # a resumed training may go on with other arguments: say so in its record
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, tokens, log = state["step"], state["seconds"], state["tokens"], json.loads(state["log"])
        runs = json.loads(state.get("runs", "[]"))
        print(f"resumed at step {step}", flush=True)
    runs.append({"from_step": step, "steps": args.steps, "lr": args.lr})
    began = time.monotonic() - spent
    while step < args.steps:
        share = step / args.steps
        _, length, batch = next(stage for stage in STAGES if share < stage[0])
        rng = np.random.default_rng([args.seed, step])  # one generator a step: a resumed run sees the same data
        repeated, random = next(phase[1:] for phase in REPEATED if share < phase[0])
        ids, labels = sample_batch(training, batch, length, repeated, random, rng, vocab)
        rate = args.lr * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += ids.numel()
        if step % args.every == 0 or step == args.steps:
            model.eval()
            validation = validation_loss(model, held_out, 256, 24)
            induction, previous = stripe_scores(model, vocab)
            model.train()
            seconds = time.monotonic() - began
            row = {
                "step": step, "tokens": tokens, "seconds": round(seconds, 1), "training_loss": round(loss.item(), 4),
                "validation_loss": [round(v, 4) for v in validation],
                "induction_best": round(induction.max().item(), 4), "previous_token_best": round(previous.max().item(), 4),
            }  # fmt: skip
            log.append(row)
            left = seconds / step * (args.steps - step)
            print(f"{json.dumps(row)}  about {left / 60:.0f} min left", flush=True)
            save_checkpoint(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                                         "seconds": seconds, "tokens": tokens, "log": json.dumps(log), "runs": json.dumps(runs)})  # fmt: skip
    model.eval().half().save_pretrained(args.out)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(args.out)
    final = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    induction, previous = stripe_scores(final, vocab)
    report = {
        "arguments": {"runs": runs, "repeated": REPEATED, "seed": args.seed, "vocab": vocab,
                      "bf16": args.bf16, "threads": args.threads, "batch_stages": STAGES},
        "texts": [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "held_out_characters": len(text) - c}
                  for path, text, c in zip(args.text, texts, cut, strict=True)],
        "parameters": sum(p.numel() for p in final.parameters()),
        "validation_loss": dict(zip([p.name for p in args.text], validation_loss(final, held_out, 256, 64), strict=True)),
        "validation_characters_per_token": [(len(text) - c) / len(h) for text, c, h in zip(texts, cut, held_out, strict=True)],
        "induction": induction.tolist(), "previous_token": previous.tolist(), "log": log,
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"saved {args.out}: validation {report['validation_loss']}, best induction {induction.max():.3f}, best previous-token {previous.max():.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="UTF-8 text files to train on; the last 5 %% of each is held out"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "lm", help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("lm-training"), help="folder of the checkpoint; run again to resume")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations and checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 (faster where the processor has it)")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
