"""The weights of each head behind a query, key or value: which part of which linear map makes which of its numbers.

Letters: H heads, S tokens, D width of a head, R rows and C columns of a map's output, E width of its input.

Everything between a projection and the attention call works on one token, so the derivative J of a head's vector with respect to the
projection's output tells what belongs to what. It is taken by vector products with the part of the graph in between alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from headscope.probe.atlas.maps import LinearMap, Unreadable, base_name, find_maps, input_gain, passed, read_map, zero_gradients

TOKENS = 16  # so many at most are looked at, from the first to the last
CELLS = 1 << 26  # of the derivatives that are held at once
SHARED = 0.3  # of the gradient of a column's strongest head: from there on the column belongs to another head too
ALIKE = 1e-4  # relative differences below it are rounding, in float32
LENGTHS = 1e-3


@dataclass(frozen=True, eq=False)
class Projection:
    """What makes one stage of a site.

    Attributes:
        weight: [H, D, E]; the stage is x · weightᵀ + bias, or that with a rotation or a norm after it.
        bias: [H, D].
        names: parameters that it was read from.
        widths: of the inputs that E is made of, in their order; one, unless a head reads from several places.
        through: what stands between: `nothing`, `rotation` or `norm`.
        error: largest difference between the stage and what the weights give, over the largest value; of lengths for a rotation,
            NaN under a norm.
        gain: [E], the scale of the norm that made the input; None where no norm stands there.
    """

    weight: Tensor
    bias: Tensor
    names: tuple[str, ...]
    widths: tuple[int, ...]
    through: str
    error: float
    gain: Tensor | None


@dataclass(frozen=True, eq=False)
class Part:
    """The share of one map in one head: its rows [S] and n columns, J [S, D, n] there, x [S, E], weight [E, n], bias [n]."""

    map: LinearMap
    rows: Tensor
    jacobian: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor


def chosen_tokens(count: int, cells: int) -> list[int]:
    """Which tokens are looked at, when each takes so many cells: the first, where a rotation is none as a rule, to the last."""
    chosen = min(count, TOKENS, max(2, CELLS // cells))
    return [place * (count - 1) // max(1, chosen - 1) for place in range(chosen)]


def read_projection(tensor: Tensor, parameters: Mapping[int, str], strict: bool) -> Projection:
    """The weights behind one stage of a call.

    Args:
        tensor: q, k or v [B, H, S, D], with its graph.
        parameters: names of the model's parameters by identity.
        strict: accept only what reproduces the tensor, as v must; else a rotation or a norm may stand between.

    Raises:
        Unreadable: no weights are behind it that could be told by head; the text says why.
    """
    if tensor.grad_fn is None:
        raise Unreadable("it does not depend on any parameter")
    if not bool(torch.isfinite(tensor).all()):
        raise Unreadable("it holds NaN or infinity on these inputs")
    maps = sorted(find_maps(tensor, parameters), key=lambda m: -m.x.shape[1])
    if not maps:
        raise Unreadable("no product of an activation with a parameter stands behind it")
    chosen = chosen_tokens(tensor.shape[2], tensor.shape[3] * max(m.weight.shape[2] for m in maps))
    heads = [[_composed(part, parts[0], parameters) for part in parts] for parts in _parts(tensor, maps, chosen)]
    used = [part.map for part in heads[0]]
    blocks, widths = _blocks(heads[0])
    stage = tensor[0, :, chosen].detach().double()  # [H, S, D]
    steady = max(_unsteadiness(part.jacobian) for parts in heads for part in parts)
    limit = ALIKE if tensor.dtype in (torch.float32, torch.float64) else 0.03
    names = tuple(dict.fromkeys(name for part in heads[0] for name in part.map.names))
    gain = input_gain(used[0], parameters) if len(widths) == 1 else None
    if steady <= 10 * limit:
        weight, bias = _assembled(heads, [[p.jacobian.double().mean(0) for p in parts] for parts in heads], blocks, widths)
        rest = stage - _applied(heads, weight, bias, blocks, widths)
        if stage.shape[1] > 1:  # a constant is a bias, wherever it was added
            constant = rest.mean(1)
            if float(constant.abs().max()) > limit * float(stage.abs().max()):
                bias, rest = bias + constant, rest - constant[:, None]
        error = float(rest.abs().max() / stage.abs().max().clamp_min(1e-30))
        if error <= limit:
            return Projection(_like(weight, tensor), _like(bias, tensor), names, widths, "nothing", error, gain)
    if strict:
        raise Unreadable("a norm or another step that is not linear stands between it and its projection, or tokens are mixed")
    weight, bias = _assembled(heads, _orders(heads), blocks, widths)
    before = _applied(heads, weight, bias, blocks, widths).norm(dim=-1)  # [H, S]
    ratio = stage.norm(dim=-1) / before.clamp_min(1e-30)
    size = ratio.mean()
    error = float((ratio / size - 1).abs().max())
    if error <= max(LENGTHS, limit):
        return Projection(_like(weight * size, tensor), _like(bias * size, tensor), names, widths, "rotation", error, gain)
    return Projection(_like(weight, tensor), _like(bias, tensor), names, widths, "norm", float("nan"), gain)


# -- which part of which map makes which head ---------------------------------------------------------------------------


def _parts(tensor: Tensor, maps: Sequence[LinearMap], chosen: list[int]) -> list[list[Part]]:
    """For each head, the maps that it is made by.

    Raises:
        Unreadable: tokens are mixed on the way, come from several maps, or the columns of heads cannot be told.
    """
    _, heads, length, width = tensor.shape
    tokens = len(chosen)
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (tokens, width), generator=generator) * 2 - 1).to(tensor)
    with ExitStack() as stack:
        for item in maps:  # what is upstream of one map is not to be seen through it by another
            stack.callback(item.node.register_prehook(zero_gradients).remove)

        def pulled(wanted: Tensor) -> list[Tensor]:
            """The gradients [R, C] at the output of each map, for one of [H, S, D] at the stage."""
            full = torch.zeros_like(tensor)
            full[0, :, chosen if wanted.shape[1] == tokens else slice(None)] = wanted
            edges = [GradientEdge(item.node, 0) for item in maps]
            found = torch.autograd.grad(tensor, edges, full, retain_graph=True, allow_unused=True)
            return [torch.zeros(m.x.shape[0], m.weight.shape[2], dtype=tensor.dtype, device=tensor.device) if g is None
                    else m.rows(g) for g, m in zip(found, maps, strict=True)]  # fmt: skip

        for found, item in zip(pulled(torch.ones(heads, length, width).to(tensor) * signs[0]), maps, strict=True):
            if int((found != 0).any(1).sum()) < length:
                raise Unreadable(f"only some of its tokens come through {' and '.join(item.names)}")
        alone = []  # [H] of one gradient a map: only that head is asked
        for head in range(heads):
            wanted = torch.zeros(heads, tokens, width, dtype=tensor.dtype, device=tensor.device)
            wanted[head] = signs
            alone.append([g.double() for g in pulled(wanted)])
        places = _token_of_rows(pulled, signs, heads, tokens)
        units = []
        for column in range(width):
            wanted = torch.zeros(heads, tokens, width, dtype=tensor.dtype, device=tensor.device)
            wanted[:, :, column] = 1
            units.append(pulled(wanted))
    result: list[list[Part]] = [[] for _ in range(heads)]
    for number, item in enumerate(maps):
        every = torch.stack([unit[number] for unit in units])  # [D, R, C]
        energy = torch.stack([one[number].square().sum(0) for one in alone])  # [H, C]
        strongest = energy.amax(0)
        owners = (energy > SHARED * strongest) & (strongest > 1e-12 * strongest.max().clamp_min(1e-300))
        for head in range(heads):
            columns = owners[head].nonzero().flatten()
            if not columns.numel():
                continue
            strength = alone[head][number][:, columns].square().sum(1)
            rows = (strength > 1e-12 * strength.max()).nonzero().flatten()
            order = places[number][rows]
            if sorted(order.tolist()) != list(range(tokens)):
                raise Unreadable("its heads or tokens are mixed between the projection and the call")
            rows = rows[order.argsort()]
            shares = owners[:, columns].sum(0)
            jacobian = every[:, rows[:, None], columns].transpose(0, 1) / shares  # [S, D, n]
            bias = item.bias[columns] if item.bias is not None else torch.zeros_like(item.x[0, :1]).expand(len(columns))
            result[head].append(Part(item, rows, jacobian, item.x[rows], item.block(int(rows[0]))[:, columns], bias))
    if any(not parts for parts in result):
        raise Unreadable("a head of it depends on no projection")
    shapes = {tuple(id(part.map) for part in parts) for parts in result}
    if len(shapes) > 1:
        raise Unreadable("its heads come from different maps")
    return result


def _token_of_rows(ask: Callable[[Tensor], list[Tensor]], signs: Tensor, heads: int, tokens: int) -> list[Tensor]:
    """For each map, which token each row of its output belongs to, [R]; from the signs of the bits of its number."""
    every = signs[None].expand(heads, -1, -1)
    whole = [g.double() for g in ask(every)]
    places = [torch.zeros(g.shape[0], dtype=torch.int64, device=g.device) for g in whole]
    for bit in range((tokens - 1).bit_length()):
        sign = torch.tensor([1.0 if token >> bit & 1 else -1.0 for token in range(tokens)], device=signs.device, dtype=signs.dtype)
        for place, reference, found in zip(places, whole, ask(every * sign[:, None]), strict=True):
            both, one = (found.double() * reference).sum(1), reference.square().sum(1)
            if bool((both.abs() < 0.98 * one).any()):
                raise Unreadable("tokens are mixed between its projection and the call")
            place += (both > 0).to(torch.int64) << bit
    return places


def _composed(part: Part, lead: Part, parameters: Mapping[int, str]) -> Part:
    """A map that reads what another map makes of the leading part's input (a low-rank adapter), as one map of that input."""
    if part is lead or _same(part.x, lead.x):
        return part
    node = passed(part.map.source)
    while node is not None and base_name(node) == "Mul":
        node = passed(node.next_functions[0][0])
    inner = read_map(node, parameters) if node is not None else None
    if inner is None or inner.weight.shape[0] != 1 or inner.x.shape[0] != part.map.x.shape[0]:
        return part
    made, x = inner.output(), inner.x[part.rows]
    size = float((made * part.map.x).sum() / made.square().sum().clamp_min(1e-30))
    if not _same(made * size, part.map.x) or not _same(x, lead.x):
        return part
    bias = part.bias if inner.bias is None else part.bias + size * inner.bias @ part.weight
    names = replace(part.map, names=(*inner.names, *part.map.names))
    return replace(part, map=names, x=x, weight=size * inner.weight[0] @ part.weight, bias=bias)


# -- what they add up to ------------------------------------------------------------------------------------------------


def _blocks(parts: Sequence[Part]) -> tuple[list[int], tuple[int, ...]]:
    """Which input each part reads, numbered, and the widths of these inputs."""
    inputs: list[Tensor] = []
    numbers: list[int] = []
    for part in parts:
        number = next((n for n, x in enumerate(inputs) if _same(x, part.x)), len(inputs))
        if number == len(inputs):
            inputs.append(part.x)
        numbers.append(number)
    return numbers, tuple(x.shape[1] for x in inputs)


def _assembled(
    heads: Sequence[Sequence[Part]], mixes: Sequence[Sequence[Tensor]], blocks: Sequence[int], widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """[H, D, E] and [H, D]: Σ mix · weightᵀ over the parts of each head, mix [D, n]; inputs side by side."""
    weights, biases = [], []
    for parts, mix in zip(heads, mixes, strict=True):
        sides = [torch.zeros(mix[0].shape[0], width, dtype=torch.float64, device=mix[0].device) for width in widths]
        bias = torch.zeros(mix[0].shape[0], dtype=torch.float64, device=mix[0].device)
        for part, m, block in zip(parts, mix, blocks, strict=True):
            sides[block] = sides[block] + m @ part.weight.double().mT
            bias = bias + m @ part.bias.double()
        weights.append(torch.cat(sides, dim=1))
        biases.append(bias)
    return torch.stack(weights), torch.stack(biases)


def _applied(heads: Sequence[Sequence[Part]], weight: Tensor, bias: Tensor, blocks: Sequence[int], widths: Sequence[int]) -> Tensor:
    """x · weightᵀ + bias, [H, S, D], on the inputs of the run."""
    rows = []
    for parts in heads:
        x = torch.cat([next(p.x for p, b in zip(parts, blocks, strict=True) if b == n) for n in range(len(widths))], dim=-1)
        rows.append(x.double())
    return torch.einsum("hse,hde->hsd", torch.stack(rows), weight) + bias[:, None]


def _orders(heads: Sequence[Sequence[Part]]) -> list[list[Tensor]]:
    """For each head and part a matrix [D, n] with one entry a column: which number of the head the column makes.

    At the token with the smallest rotation (the first, as a rule) each number comes from one column. Under every norm and at every
    rotation the columns of a map that makes the whole head in order are taken as they lie, as q and k then agree in their order.
    """
    spread = sum(_spread(part.jacobian) for parts in heads for part in parts)
    assert isinstance(spread, Tensor)
    token = int(spread.argmin())
    orders = [[part.jacobian[token].double() for part in parts] for parts in heads]  # [D, n]
    picks = [[j.abs().argmax(0) for j in js] for js in orders]  # [n], a number of the head for each column
    if any(len(set(pick.tolist())) < len(pick) for row in picks for pick in row):
        if any(len(row) > 1 or row[0].shape[0] != row[0].shape[1] for row in orders):
            raise Unreadable("which column makes which number of a head cannot be told: a rotation or a norm mixes them at every token")
        return [[torch.eye(row[0].shape[0], dtype=torch.float64, device=row[0].device)] for row in orders]
    result = []
    for js, row in zip(orders, picks, strict=True):
        lead = torch.zeros(js[0].shape[0], dtype=torch.float64, device=js[0].device)  # [D], the coefficient of the leading map
        mixes = []
        for j, pick in zip(js, row, strict=True):
            columns = torch.arange(j.shape[1], device=j.device)
            value = j[pick, columns]
            lead[pick] = torch.where(lead[pick] == 0, value, lead[pick])
            mix = torch.zeros_like(j)
            mix[pick, columns] = value / lead[pick]
            mixes.append(mix)
        result.append(mixes)
    return result


def _spread(jacobian: Tensor) -> Tensor:
    """[S], how far each token is from one column for each number: 0 there."""
    square = jacobian.double().square()
    return (1 - square.amax(1) / square.sum(1).clamp_min(1e-300)).mean(-1)


def _unsteadiness(jacobian: Tensor) -> float:
    """How far J [S, D, n] changes from token to token, over its largest value."""
    return float((jacobian - jacobian.mean(0)).abs().max() / jacobian.abs().max().clamp_min(1e-30))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max())))


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    return value.to(tensor.dtype).contiguous()
