"""The linear maps that a tensor was made by, read off its autograd graph.

Walking from a tensor back through rotations, norms, views and sums, the first products of an activation with a weight are the
projections it comes from, whatever module or function they stand in.

Letters: N blocks of a batched product (1 for a plain one), T rows of a block, R = N·T rows, E width of the input, C width of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

REACH = 400  # nodes between a query and its projection; models have some ten
WEIGHT_REACH = 60
# Steps that a weight may take between its parameter and the product. An activation comes through something else, or from the inputs.
WEIGHT_STEPS = frozenset({
    "T", "Transpose", "View", "UnsafeView", "Permute", "Unsqueeze", "Squeeze", "Slice", "Select", "Split", "SplitWithSizes", "Unbind",
    "Expand", "Alias", "Clone", "ToCopy", "ReshapeAlias", "AsStrided", "Mul", "Div", "Add", "Sub", "Neg", "Mm", "Bmm", "Sqrt", "Pow", "Sum",
    "LinalgVectorNorm", "Norm", "WeightNormInterface", "Cat", "Stack", "Chunk", "UnsafeSplit", "Contiguous",
})  # fmt: skip
PASSED = frozenset({"View", "UnsafeView", "ReshapeAlias", "Alias", "ToCopy", "Clone", "NativeDropout", "Transpose", "Permute"})
# Where each product keeps its operands: (place among the inputs, name of the saved tensor), twice, and the place of the bias.
PRODUCTS = {
    "Addmm": ((1, "_saved_mat1"), (2, "_saved_mat2"), 0),
    "Mm": ((0, "_saved_self"), (1, "_saved_mat2"), None),
    "Bmm": ((0, "_saved_self"), (1, "_saved_mat2"), None),
    "Baddbmm": ((1, "_saved_batch1"), (2, "_saved_batch2"), 0),
    "Convolution": ((0, "_saved_input"), (1, "_saved_weight"), 2),
    "Linear": ((0, "_saved_input"), (1, "_saved_weight"), 2),
}


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One product of an activation with a weight: y [R, C] = x [R, E] · weight[n] [E, C] + bias [C], n the block of the row.

    Attributes:
        node: the product in the autograd graph.
        x: [R, E].
        weight: [N, E, C].
        bias: [C], None where there is none.
        names: of the parameters that the weight is made of.
        rows: brings what belongs to the node's output, a gradient, to [R, C].
        source: what made x; None where nothing differentiable did.
    """

    node: Node
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    names: tuple[str, ...]
    rows: Callable[[Tensor], Tensor]
    source: Node | None

    def block(self, row: int) -> Tensor:
        """[E, C], the weight that a row was multiplied with."""
        return self.weight[row * self.weight.shape[0] // max(1, self.x.shape[0])]

    def output(self) -> Tensor:
        """y [R, C]."""
        blocks = self.x.reshape(self.weight.shape[0], -1, self.x.shape[1])
        y = (blocks @ self.weight).flatten(0, 1)
        return y if self.bias is None else y + self.bias


class Unreadable(Exception):
    """A product was met that is no map of one token; the text says why."""


def find_maps(tensor: Tensor, parameters: Mapping[int, str]) -> list[LinearMap]:
    """The nearest linear maps behind a tensor, in the order in which they are met.

    Args:
        tensor: with its autograd graph.
        parameters: names of the model's parameters by identity.

    Raises:
        Unreadable: a convolution over neighbours, or a product whose operands were not kept.
    """
    found: list[LinearMap] = []
    biases: dict[Node, Tensor] = {}
    seen: set[Node] = set()
    todo = [tensor.grad_fn]
    while todo and len(seen) < REACH:
        node = todo.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        map_ = read_map(node, parameters)
        if map_ is not None:
            found.append(map_)
            continue
        if base_name(node) == "Add":
            biases.update(_bias_of(node, parameters))
        todo.extend(before for before, _ in node.next_functions)
    return [replace(m, bias=biases[m.node]) if m.bias is None and m.node in biases else m for m in found]


def read_map(node: Node, parameters: Mapping[int, str]) -> LinearMap | None:
    """The node as a linear map, or None when it is none.

    Raises:
        Unreadable: see `find_maps`.
    """
    kind = base_name(node)
    if kind not in PRODUCTS:
        return None
    (first, first_name), (second, second_name), bias_place = PRODUCTS[kind]
    before = [n for n, _ in node.next_functions]
    names = weight_names(before[second], parameters)
    swapped = not names and kind not in ("Convolution", "Linear")
    if swapped:
        names = weight_names(before[first], parameters)
    if not names:
        return None
    x, weight = (_saved(node, first_name), _saved(node, second_name))
    source = before[first]
    if kind == "Convolution":
        x, weight = _pointwise(node, x, weight)
        rows: Callable[[Tensor], Tensor] = _channels_last
    elif kind == "Linear":
        weight, x, rows = weight.mT[None], x.flatten(0, -2), _flat
    elif swapped:  # W x, with a token in each column
        x, weight, source = weight, x, before[second]
        x, weight, rows = _rows_first(x), _three(weight.mT), _rows_first
    else:
        x, weight, rows = x.flatten(0, -2), _three(weight), _flat
    leaf = before[bias_place] if bias_place is not None and bias_place < len(before) else None
    bias = variable(leaf) if leaf is not None else None
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != weight.shape[-1]):
        bias = None
    return LinearMap(node, x.detach(), weight.detach(), None if bias is None else bias.detach(), names, rows, source)


def passed(node: Node | None) -> Node | None:
    """What stands before views, copies and dropout."""
    while node is not None and base_name(node) in PASSED:
        node = node.next_functions[0][0]
    return node


def weight_names(node: Node | None, parameters: Mapping[int, str]) -> tuple[str, ...]:
    """Names of the parameters that an operand is made of; none when something else has a part in it."""
    names: list[str] = []
    seen: set[Node] = set()
    todo = [node]
    while todo:
        item = todo.pop()
        if item is None or item in seen:
            if item is None and not seen:
                return ()
            continue
        seen.add(item)
        leaf = variable(item)
        if leaf is not None:
            if id(leaf) not in parameters:
                return ()
            names.append(parameters[id(leaf)])
        elif base_name(item) not in WEIGHT_STEPS or len(seen) > WEIGHT_REACH:
            return ()
        else:
            todo.extend(before for before, _ in item.next_functions)
    return tuple(names)


def input_gain(map_: LinearMap, parameters: Mapping[int, str]) -> Tensor | None:
    """[E], the scale of the norm that made a map's input; None where no such norm stands directly in front of it."""
    node = passed(map_.source)
    width = map_.x.shape[1]
    if node is None:
        return None
    if base_name(node) in ("NativeLayerNorm", "FusedRmsNorm", "RmsNorm"):
        for before, _ in node.next_functions[1:2]:
            gain = variable(before) if before is not None else None
            if gain is not None and gain.shape == (width,):
                return gain.detach()
        return None
    if base_name(node) == "Add":  # a norm written out: x · gain + shift
        sides = [passed(before) for before, _ in node.next_functions]
        node = next((side for side in sides if side is not None and base_name(side) == "Mul"), None)
    if node is None or base_name(node) != "Mul":
        return None
    for place, saved in enumerate(("_saved_self", "_saved_other")):
        if weight_names(node.next_functions[place][0], parameters):
            gain = getattr(node, saved, None)
            return gain.detach() if isinstance(gain, Tensor) and gain.shape == (width,) else None
    return None


def base_name(node: Node) -> str:
    """`Addmm` for AddmmBackward0."""
    return node.name().partition("Backward")[0]


def variable(node: Node) -> Tensor | None:
    """The leaf of an AccumulateGrad node."""
    leaf = getattr(node, "variable", None)
    return leaf if isinstance(leaf, Tensor) else None


def _bias_of(node: Node, parameters: Mapping[int, str]) -> dict[Node, Tensor]:
    """For y + bias: the product that made y, and the bias."""
    sides = [before for before, _ in node.next_functions]
    leaves = [leaf if side is not None and (leaf := variable(side)) is not None and leaf.ndim == 1 else None for side in sides]
    return {
        product: leaf.detach()
        for leaf, other in zip(leaves, reversed(sides), strict=True)
        if leaf is not None and id(leaf) in parameters and (product := passed(other)) is not None and base_name(product) in PRODUCTS
    }


def _saved(node: Node, name: str) -> Tensor:
    try:
        value = getattr(node, name)
    except RuntimeError as error:
        raise Unreadable(f"an operand of {node.name()} was overwritten after its use") from error
    if not isinstance(value, Tensor):
        raise Unreadable("what its projection reads depends on no input and no parameter, so autograd has not kept the weight")
    return value


def _pointwise(node: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and weight of a convolution that looks at one place at a time."""
    if any(n != 1 for n in weight.shape[2:]):
        raise Unreadable(f"a convolution over {' × '.join(map(str, weight.shape[2:]))} neighbouring places makes it, no map of one token")
    if node._saved_groups != 1 or node._saved_transposed:
        raise Unreadable("a grouped or transposed convolution makes it")
    if any(n != 1 for n in node._saved_stride):
        raise Unreadable("a convolution with a stride makes it, which leaves tokens out")
    return _channels_last(x), weight.flatten(1).mT[None]


def _channels_last(x: Tensor) -> Tensor:
    """[B, C, ...] -> [B·…, C]."""
    return x.movedim(1, -1).flatten(0, -2)


def _rows_first(x: Tensor) -> Tensor:
    """[..., C, T] -> [R, C]."""
    return x.mT.flatten(0, -2)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _three(weight: Tensor) -> Tensor:
    return weight[None] if weight.ndim == 2 else weight


def zero_gradients(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """A hook before a node: no gradient goes past it."""
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)
