"""An attention network whose parts can be left out: skips, MLPs, LayerNorm, the causal mask; and whose patterns are softmax or Sinkhorn.

Letters: B samples, N tokens, E width, H heads, D width of a head, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from headscope.kernels.sinkhorn import sinkhorn


@dataclass(frozen=True)
class Design:
    """What the network is made of.

    Attributes:
        depth, width, heads: L, E, H.
        skip: weight of the attention's output beside its input; None: the output replaces the input.
        norm: LayerNorm "before" a branch, "after" the sum, or "none".
        mlp: a two-layer MLP of twice the width after the attention.
        mlp_skip: as `skip`, of the MLP.
        causal: tokens see themselves and what stands before.
        half_steps: of Sinkhorn's normalisation; 1 is softmax.
        xavier: Xavier weights, which keep the variance; without, those of `nn.Linear`, which are smaller by √3.
    """

    depth: int
    width: int
    heads: int
    skip: float | None = 1.0
    norm: str = "none"
    mlp: bool = False
    mlp_skip: float | None = 1.0
    causal: bool = False
    half_steps: int = 1
    xavier: bool = True


class Attention(nn.Module):
    """Multi-head self-attention without biases."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.heads, self.causal, self.half_steps = design.heads, design.causal, design.half_steps
        self.q, self.k, self.v, self.o = (nn.Linear(design.width, design.width, bias=False) for _ in range(4))
        for linear in (self.q, self.k, self.v, self.o) if design.xavier else ():
            nn.init.xavier_uniform_(linear.weight)

    def scores(self, x: Tensor) -> Tensor:
        """[B, N, E] -> [B, H, N, N]; hidden pairs are -inf."""
        q, k = (self.split(linear(x)) for linear in (self.q, self.k))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        return scores

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        pattern = torch.softmax(scores, -1) if self.half_steps == 1 else sinkhorn(scores, half_steps=self.half_steps)
        out: Tensor = self.o((pattern @ self.split(self.v(x))).transpose(1, 2).flatten(2))
        return out

    def split(self, x: Tensor) -> Tensor:
        """[B, N, E] -> [B, H, N, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention and, if there is one, the MLP; each with or without its skip and norm."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design = design
        self.attention = Attention(design)
        self.mlp = nn.Sequential(nn.Linear(design.width, 2 * design.width), nn.ReLU(), nn.Linear(2 * design.width, design.width))
        for linear in (self.mlp[0], self.mlp[2]) if design.xavier else ():
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.norms = nn.ModuleList([nn.LayerNorm(design.width), nn.LayerNorm(design.width)])

    def forward(self, x: Tensor) -> Tensor:
        x = self._branch(x, self.attention, self.norms[0], self.design.skip)
        return self._branch(x, self.mlp, self.norms[1], self.design.mlp_skip) if self.design.mlp else x

    def attention_input(self, x: Tensor) -> Tensor:
        """What the attention reads of the block's input."""
        out: Tensor = self.norms[0](x) if self.design.norm == "before" else x
        return out

    def _branch(self, x: Tensor, branch: nn.Module, norm: nn.Module, skip: float | None) -> Tensor:
        y = branch(norm(x) if self.design.norm == "before" else x)
        y = y if skip is None else x + skip * y
        out: Tensor = norm(y) if self.design.norm == "after" else y
        return out


class Network(nn.Module):
    """A stack of blocks, [B, N, E] -> [B, N, E]."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design = design
        self.blocks = nn.ModuleList(Block(design) for _ in range(design.depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    @torch.no_grad()
    def walk(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The L + 1 states [B, N, E], and the scores of the L layers [B, H, N, N]."""
        states, scores = [x], []
        for block in self.blocks:
            assert isinstance(block, Block)
            scores.append(block.attention.scores(block.attention_input(states[-1])))
            states.append(block(states[-1]))
        return states, scores


class Classifier(nn.Module):
    """Patches to class scores: a linear embedding, learned positions, the network, LayerNorm, the mean over tokens, a linear read-out."""

    def __init__(self, design: Design, tokens: int, inputs: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, design.width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, design.width))
        self.network = Network(design)
        self.norm = nn.LayerNorm(design.width)
        self.read = nn.Linear(design.width, classes)

    def tokens(self, patches: Tensor) -> Tensor:
        """[B, N, F] -> [B, N, E], the network's input."""
        out: Tensor = self.embed(patches) + self.positions
        return out

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.read(self.norm(self.network(self.tokens(patches))).mean(1))
        return out

    def loss(self, patches: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self(patches), labels)
