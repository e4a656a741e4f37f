"""The output projection of each head: which rows of W_O it goes through.

Letters: B batch, H query heads, Q queries, V width of a value, F width of what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from headscope.probe.atlas.maps import Unreadable
from headscope.probe.atlas.projection import ALIKE, read_projection
from headscope.probe.call import AttentionSite
from headscope.probe.interception.place import clean_path


def read_output(
    site: AttentionSite, z: Tensor | None, outputs: Sequence[Tensor], around: Tensor | None, parameters: Mapping[int, str], model: nn.Module
) -> tuple[Tensor, float, tuple[str, ...]]:
    """W_O by head [H, V, F], how far it is from reproducing what the heads wrote, and the names of its parameters.

    The derivative of Σ r·o[h] with respect to the weight is, at the column that meets z[h, :, v], Σ r·z[h, :, v]: so columns are
    matched to heads, however they lie.

    Args:
        site: where.
        z: [B, H, Q, V].
        outputs: what went through each map that z entered, [B, H, Q, F].
        around: output [B, Q, F] of the module around the first of several maps.
        parameters: names of the model's parameters by identity.
        model: that holds them.

    Raises:
        Unreadable: there is no such weight, or it does not reproduce what the heads write.
    """
    if site.output_projection is None or z is None:
        raise Unreadable("no output projection was seen that the heads go into")
    if not outputs:
        raise Unreadable(f"what the heads write through {site.output_projection} was not seen")
    if len(outputs) > 1:
        if around is None:
            raise Unreadable(f"the heads go into {len(outputs)} maps at {site.output_projection}")
        return _summed(z.detach(), around, parameters)
    o, name = outputs[0], site.output_projection
    if not o.requires_grad:
        raise Unreadable("the model runs it without gradients")
    named = {clean_path(n): p for n, p in model.named_parameters()}
    weight = named.get(f"{name}.weight", named.get(name))
    if weight is None:
        raise Unreadable(f"{name} holds no weight that is a parameter")
    b, h, q, v = z.shape
    generator = torch.Generator().manual_seed(0)
    marks: list[Tensor] = []
    prints: list[Tensor] = []
    for _ in range(4):
        r = torch.randn(b, q, generator=generator).to(o)
        gradient = torch.autograd.grad(o, weight, r[:, None, :, None].expand_as(o), retain_graph=True, allow_unused=True)[0]
        if gradient is None:
            raise Unreadable(f"what the heads write does not depend on {name}")
        marks.append(gradient.detach().double())
        prints.append(torch.einsum("bq,bhqv->hv", r.double(), z.detach().double()).flatten())
    targets = torch.stack(prints, dim=1)  # [H·V, 4]
    flat = weight.detach().flatten(1)
    for matrix, seen in ((flat, [m.flatten(1) for m in marks]), (flat.mT, [m.flatten(1).mT for m in marks])):
        if matrix.shape != (o.shape[-1], h * v):
            continue
        columns = torch.stack([m.mean(0) for m in seen], dim=1)  # [H·V, 4], in the order of the weight
        match = torch.cdist(targets, columns).argmin(1)
        if len(set(match.tolist())) < h * v:
            match = torch.arange(h * v, device=match.device)  # heads that write nothing cannot be told apart: as they lie
        heads = matrix[:, match].mT.reshape(h, v, -1).contiguous().clone()
        made = torch.einsum("bhqv,hve->bhqe", z.detach().double(), heads.double())
        error = float((made - o.detach()).abs().max() / o.detach().abs().max().double().clamp_min(1e-30))
        if error <= (ALIKE if o.dtype in (torch.float32, torch.float64) else 0.03):
            return heads, error, (f"{name}.weight" if f"{name}.weight" in named else name,)
    raise Unreadable(f"the weight of {name}, {list(weight.shape)}, does not reproduce what {h} heads of width {v} write")


def _summed(z: Tensor, around: Tensor, parameters: Mapping[int, str]) -> tuple[Tensor, float, tuple[str, ...]]:
    """The sum of the maps between z [B, H, Q, V] and the output of the module around them [B, Q, F] (an adapter beside its base)."""
    b, h, q, v = z.shape
    if around.shape[:-1] != (b, q):
        raise Unreadable(f"the heads go into several maps, and the module around them gives {list(around.shape)}")
    found = read_projection(around[:, None], parameters, strict=True)  # as one head as wide as the stream
    if found.weight.shape[-1] != h * v:
        raise Unreadable("the heads go into several maps, which read something else beside them")
    heads = found.weight[0].mT.reshape(h, v, -1)
    made = torch.einsum("bhqv,hve->bqe", z.double(), heads.double()) + found.bias[0].double()
    error = float((made - around.detach()).abs().max() / around.detach().abs().max().double().clamp_min(1e-30))
    if error > (ALIKE if around.dtype in (torch.float32, torch.float64) else 0.03):
        raise Unreadable("the heads go into several maps, whose sum does not reproduce what is written")
    return heads.contiguous(), error, found.names
