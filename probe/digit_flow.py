"""`embedded:mmdit` at work: text prompts in, pictures of handwritten digits out, through diffusers' own Flux transformer.

Rectified flow: x_t = (1 - t) · image + t · noise, the model predicts the velocity noise - image, and sampling walks from t = 1
to t = 0 in equal Euler steps, one call of the model each. No guidance, no pooled text: the prompt acts by attention alone.

Shapes: B prompts, T text tokens (8), I image tokens (16, row by row), each 2 × 2 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from headscope.kernels.errors import InputError, ModelError
from headscope.probe.checkpoint import read_json
from headscope.probe.digit_prompts import PromptBook

SIDE, PATCH = 8, 2  # pixels
GRID = SIDE // PATCH
EMBEDDING = "prompt_embedding"  # beside the model's weights in the file


class DigitFlow:
    """A Flux transformer, the words that it knows, and the walk from noise to digits.

    Args:
        model: a `FluxTransformer2DModel` with 4 input channels.
        book: its vocabulary.
        embedding: one frozen random vector a word, [words, width].
    """

    def __init__(self, model: nn.Module, book: PromptBook, embedding: Tensor) -> None:
        self.model, self.book, self.embedding = model, book, embedding

    def __call__(self, prompts: str | Sequence[str], *, seed: int = 0, t: float = 1.0) -> dict[str, Tensor]:
        """Keyword arguments of one model call on pure noise: `model(**flow("a plain eight"))`."""
        return self.inputs(self.noise(len(_listed(prompts)), seed), t, prompts)

    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """Token embeddings [B, T, width] on the model's device.

        Raises:
            InputError: there is no prompt, or one that the vocabulary cannot spell.
        """
        ids = torch.tensor([self.book.encode(prompt) for prompt in _listed(prompts)])
        return self.embedding[ids].to(self._like)

    def inputs(self, images: Tensor, t: float | Tensor, prompts: str | Sequence[str] | Tensor) -> dict[str, Tensor]:
        """Keyword arguments of one model call.

        Args:
            images: [B, 1, 8, 8], at time t.
            t: 0 (image) to 1 (noise); one number, or one a picture [B].
            prompts: B texts, or their embeddings [B, T, width].
        """
        text = prompts if isinstance(prompts, Tensor) else self.encode(prompts)
        if tuple(images.shape) != (len(text), 1, SIDE, SIDE):
            raise InputError(f"expected images [{len(text)}, 1, {SIDE}, {SIDE}], one a prompt, got {list(images.shape)}")
        like = self._like
        rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)  # [I, 3]
        pooled: Any = self.model.config
        return {
            "hidden_states": to_tokens(images.to(like)),
            "encoder_hidden_states": text,
            "pooled_projections": like.new_zeros(len(text), pooled.pooled_projection_dim),
            "timestep": torch.as_tensor(t, dtype=like.dtype, device=like.device).expand(len(text)),
            "img_ids": places.to(like),
            "txt_ids": like.new_zeros(text.shape[1], 3),
        }

    def velocity(self, images: Tensor, t: float | Tensor, prompts: str | Sequence[str] | Tensor) -> Tensor:
        """Predicted noise minus image, [B, 1, 8, 8]; arguments as of `inputs`. Gradients flow."""
        return to_images(self.model(**self.inputs(images, t, prompts), return_dict=False)[0])

    def noise(self, n: int, seed: int) -> Tensor:
        """Standard normal pictures [n, 1, 8, 8]; the first few are the same whatever n is, and on every device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, 1, SIDE, SIDE, generator=generator).to(self._like)

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str] | Tensor,
        *,
        seed: int = 0,
        steps: int = 20,
        callback: Callable[[int, float, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw one digit a prompt.

        Args:
            prompts: B texts, or their embeddings [B, T, width].
            seed: of the noise.
            steps: Euler steps, each one call of the model.
            callback: called after each step with its number, the time reached and the pictures there.

        Returns:
            [B, 1, 8, 8], about -1 (paper) to 1 (ink), not clipped.
        """
        if steps < 1:
            raise InputError(f"{steps} steps: give at least 1")
        text = prompts if isinstance(prompts, Tensor) else self.encode(prompts)
        images = self.noise(len(text), seed)
        for step in range(steps):
            images = images - self.velocity(images, 1 - step / steps, text) / steps
            if callback is not None:
                callback(step, 1 - (step + 1) / steps, images)
        return images

    @property
    def _like(self) -> Tensor:
        return next(self.model.parameters()).detach()


def load_digit_flow(folder: Path, kind: Any) -> DigitFlow:
    """The model and its words from a folder.

    Args:
        folder: holds config.json, model.safetensors and prompts.json.
        kind: diffusers' `FluxTransformer2DModel`, handed in because diffusers is optional.

    Raises:
        ModelError: weights and words do not fit together.
    """
    book = PromptBook.read(folder / "prompts.json")
    model = kind.from_config(read_json(folder / "config.json"))
    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    embedding = weights.pop(EMBEDDING, None)
    if embedding is None or len(embedding) != len(book.words):
        found = "none" if embedding is None else len(embedding)
        raise ModelError(f"expected {len(book.words)} word vectors in {folder.name}/model.safetensors, found {found}: train it again")
    model.load_state_dict(weights)
    return DigitFlow(model.eval(), book, embedding)


def to_tokens(images: Tensor) -> Tensor:
    """[B, 1, 8, 8] as image tokens [B, I, 4], the 2 × 2 patches row by row."""
    patches = images.reshape(-1, GRID, PATCH, GRID, PATCH).transpose(2, 3)
    return patches.reshape(-1, GRID * GRID, PATCH * PATCH)


def to_images(tokens: Tensor) -> Tensor:
    """Image tokens [B, I, 4] as [B, 1, 8, 8]."""
    patches = tokens.reshape(-1, GRID, GRID, PATCH, PATCH).transpose(2, 3)
    return patches.reshape(-1, 1, SIDE, SIDE)


def _listed(prompts: str | Sequence[str]) -> list[str]:
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise InputError("no prompt was given: give at least one")
    return listed
