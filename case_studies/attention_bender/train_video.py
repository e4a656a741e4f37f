"""Train the tiny video model. Writes video.safetensors and video.json; 21 minutes on one busy CPU core.

python case_studies/attention_bender/train_video.py [--steps N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from video import FILLERS, FRAMES, MOTIONS, SHAPES, SIDE, VideoJudge, clean_video, new_flow, starts

BATCH, PEAK, KEPT = 64, 3e-3, 0.998


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    flow, judge, draw = new_flow(), VideoJudge.listed(), random.Random(0)
    optimiser = torch.optim.AdamW(flow.model.parameters(), lr=PEAK, weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in flow.model.state_dict().items()}
    losses = []
    for step in range(arguments.steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / arguments.steps))
        asked = [(draw.choice(list(SHAPES)), draw.choice(list(MOTIONS))) for _ in range(BATCH)]
        videos = torch.stack([clean_video(s, m, *draw.choice(starts(m))) for s, m in asked])[:, None]
        text = flow.encode([f"{s} {m} {draw.choice(FILLERS)} {draw.choice(FILLERS)}" for s, m in asked])
        noise, t = torch.randn_like(videos), torch.rand(BATCH)
        mixed = torch.lerp(videos, noise, t[:, None, None, None, None])
        loss = (flow.velocity(mixed, t, text) - (noise - videos)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        for name, value in flow.model.state_dict().items():
            average[name].lerp_(value, 1 - KEPT)
        if step % 500 == 499:
            sys.stderr.write(f"step {step + 1}: loss {sum(losses[-200:]) / 200:.4f}, {time.monotonic() - began:.0f} s\n")
            sys.stderr.flush()
    flow.model.load_state_dict(average)
    flow.model.eval()
    asked = [(s, m) for s in SHAPES for m in MOTIONS] * 10
    read = judge.read(flow.sample([f"{s} {m} a film" for s, m in asked], seed=1))
    found = {
        "steps": arguments.steps,
        "seconds": round(time.monotonic() - began),
        "loss": round(sum(losses[-200:]) / 200, 4),
        "shape as asked": sum(a[0] == b[0] for a, b in zip(asked, read, strict=True)) / len(asked),
        "motion as asked": sum(a[1] == b[1] for a, b in zip(asked, read, strict=True)) / len(asked),
        "videos": len(asked),
        "frames": FRAMES,
        "side": SIDE,
        "seed": 0,
    }
    half = {name: value.half().contiguous() for name, value in {**flow.model.state_dict(), "word_embedding": flow.embedding}.items()}
    save_file(half, arguments.out / "video.safetensors")
    (arguments.out / "video.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
