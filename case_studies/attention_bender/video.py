"""A tiny video model that can be judged to the pixel: one shape moves over 8 × 8 pixels and 4 frames, as two words say.

diffusers' own `WanTransformer3DModel`: self-attention within the video, cross-attention to the words, rectified flow as in
`embedded:mmdit`. Where the shape starts is left open by the prompt. All videos that a prompt can ask for can be listed, so the judge is a
list: what a drawn video shows is the shape, motion and start of the nearest one.

Shapes: N videos, F frames (4), T text tokens (4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SIDE, FRAMES, WORDS = 8, 4, 4
GRID = (FRAMES, SIDE // 2, SIDE // 2)  # image tokens: one a frame and 2 × 2 pixels
SHAPES = {
    "block": ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "plus": ((0, 1, 0), (1, 1, 1), (0, 1, 0)),
    "ex": ((1, 0, 1), (0, 1, 0), (1, 0, 1)),
    "ell": ((1, 0, 0), (1, 0, 0), (1, 1, 1)),
}
MOTIONS = {"still": (0, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # pixels a frame: rows, columns
FILLERS = ("a", "the", "film", "please")
VOCABULARY = (*SHAPES, *MOTIONS, *FILLERS)
TEXT_WIDTH = 16
WEIGHTS = Path(__file__).parent / "video.safetensors"


def clean_video(shape: str, motion: str, row: int, column: int) -> Tensor:
    """[F, 8, 8], -1 paper and 1 ink; (row, column) is the upper left corner of the shape in the first frame."""
    video = torch.full((FRAMES, SIDE, SIDE), -1.0)
    down, right = MOTIONS[motion]
    for frame in range(FRAMES):
        y, x = row + frame * down, column + frame * right
        video[frame, y : y + 3, x : x + 3] = 2 * torch.tensor(SHAPES[shape], dtype=torch.float32) - 1
    return video


def starts(motion: str) -> list[tuple[int, int]]:
    """From where a shape stays in the picture for all frames."""
    free = []
    for step in MOTIONS[motion]:
        way = step * (FRAMES - 1)
        free.append(range(max(0, -way), SIDE - 3 - max(0, way) + 1))
    return list(product(*free))


@dataclass(frozen=True)
class VideoJudge:
    """Every clean video, [M, F·64], and what it shows: shape, motion and start."""

    videos: Tensor
    answers: tuple[tuple[str, str, tuple[int, int]], ...]

    @classmethod
    def listed(cls) -> VideoJudge:
        answers = [(shape, motion, start) for shape in SHAPES for motion in MOTIONS for start in starts(motion)]
        return cls(torch.stack([clean_video(s, m, *at).flatten() for s, m, at in answers]), tuple(answers))

    def read(self, videos: Tensor) -> list[tuple[str, str]]:
        """(shape, motion) of the nearest clean video to each of [N, 1, F, 8, 8]; what is beyond -1 to 1 counts as that."""
        near = torch.cdist(videos.clamp(-1, 1).flatten(1), self.videos).argmin(1)
        return [self.answers[int(place)][:2] for place in near]


class VideoFlow:
    """The model, its words, and the walk from noise to videos."""

    def __init__(self, model: nn.Module, embedding: Tensor) -> None:
        self.model, self.embedding = model, embedding

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[N, T, width]; prompts of four words each."""
        return self.embedding[torch.tensor([[VOCABULARY.index(word) for word in prompt.split()] for prompt in prompts])]

    def inputs(self, videos: Tensor, t: float | Tensor, text: Tensor) -> dict[str, Any]:
        """Keyword arguments of one model call."""
        time = torch.as_tensor(t, dtype=torch.float32).expand(len(videos)) * 1000
        return {"hidden_states": videos, "timestep": time, "encoder_hidden_states": text}

    def velocity(self, videos: Tensor, t: float | Tensor, text: Tensor) -> Tensor:
        """Predicted noise minus video, [N, 1, F, 8, 8]."""
        found: Tensor = self.model(**self.inputs(videos, t, text), return_dict=False)[0]
        return found

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], *, seed: int = 0, steps: int = 20, callback: Callable[[int], None] | None = None) -> Tensor:
        """Draw one video a prompt, [N, 1, F, 8, 8]."""
        text = self.encode(prompts)
        videos = torch.randn(len(text), 1, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            videos = videos - self.velocity(videos, 1 - step / steps, text) / steps
            if callback is not None:
                callback(step)
        return videos


def new_flow(seed: int = 0) -> VideoFlow:
    """The untrained model."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=1, out_channels=1, text_dim=TEXT_WIDTH,
        freq_dim=32, ffn_dim=96, num_layers=3, rope_max_seq_len=16,
    )  # fmt: skip
    embedding = torch.randn(len(VOCABULARY), TEXT_WIDTH)
    return VideoFlow(model, embedding)


def load_flow(path: Path = WEIGHTS) -> VideoFlow:
    """The model that `train_video.py` made."""
    flow = new_flow()
    weights = {name: value.float() for name, value in load_file(path).items()}
    flow.embedding = weights.pop("word_embedding")
    flow.model.load_state_dict(weights)
    flow.model.eval()
    return flow
