"""A model whose heads do what they are told: q holds the scores themselves and k is the identity."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = ("uniform", "previous", "current", "first", "induction", "duplicate", "noise")
SHARP = 60.0


class Planted(nn.Module):
    """One layer of `HEADS` over tokens, causal or not; its logits are those of the token that the induction head looks at."""

    def __init__(self, vocabulary: int = 40, causal: bool = True, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, 8)
        self.causal, self.layers = causal, layers
        self.gates = nn.Parameter(torch.ones(len(HEADS)))
        self.register_buffer("noise", torch.randn(vocabulary, vocabulary))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        v = self.embedding(input_ids)[:, None].expand(-1, len(HEADS), -1, -1)
        keys = torch.eye(input_ids.shape[1]).expand(input_ids.shape[0], len(HEADS), -1, -1)
        for _ in range(self.layers):
            z = F.scaled_dot_product_attention(self.scores(input_ids), keys, v, is_causal=self.causal, scale=1.0)
            v = z
        return SimpleNamespace(logits=(z * self.gates[:, None, None]).sum(1) @ self.embedding.weight.T)

    def scores(self, ids: Tensor) -> Tensor:
        """[B, H, S, S]."""
        size = ids.shape[1]
        place = torch.arange(size)
        same = ids[:, :, None] == ids[:, None]  # [B, S, S]
        before = place[:, None] > place
        follows = torch.zeros_like(same)
        follows[:, :, 1:] = (same & before)[:, :, :-1]
        rest = (place == 0).float() * SHARP / 2  # where a head looks that finds nothing
        heads = [
            torch.zeros(ids.shape[0], size, size),
            (place[:, None] - place == 1).float().expand(len(ids), -1, -1) * SHARP,
            (place[:, None] == place).float().expand(len(ids), -1, -1) * SHARP,
            (place == 0).float().expand(len(ids), size, -1) * SHARP,
            follows.float() * SHARP + rest,
            (same & before).float() * SHARP + rest,
            self.noise[ids[:, :, None], ids[:, None]],
        ]
        return torch.stack(heads, 1)
