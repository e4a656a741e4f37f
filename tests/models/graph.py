"""Graph attention of torch_geometric: a pattern over edges, compared as a dense [1, H, target, source]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.entry import Entry, Inputs

NODES, EDGES, HEADS = 6, 14, 4


def graph() -> tuple[Tensor, Tensor]:
    """Node features [6, 8] and edges [2, E] without duplicates, source above target."""
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randperm(NODES * NODES, generator=generator)[:EDGES]
    return torch.randn(NODES, 8), torch.stack([pairs // NODES, pairs % NODES])


def convolution(name: str) -> tuple[nn.Module, Inputs]:
    """One layer of a graph network."""
    import torch_geometric.nn

    x, edges = graph()
    return getattr(torch_geometric.nn, name)(8, 8, heads=HEADS), {"x": x, "edge_index": edges}


def own_weights(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """`return_attention_weights`, scattered into a dense matrix."""
    with torch.no_grad():
        _, (edges, weights) = model(**inputs, return_attention_weights=True)
    dense = torch.zeros(1, weights.shape[1], NODES, NODES)
    dense[0, :, edges[1], edges[0]] = weights.T
    return [dense]


ENTRIES = [
    Entry(f"PyG {name}", "torch_geometric", lambda name=name: convolution(name), 1, own_weights, ("torch_geometric",))  # type: ignore[misc]
    for name in ("GATConv", "GATv2Conv", "TransformerConv")
]
