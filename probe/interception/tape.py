"""What the dataflow tracker remembers about a tensor: which product it came from, and how to make it again.

A `Node` stands for one tensor that descends from a product of two activations. While it is still scores, the node also
holds the call that made it, with its tracked arguments replaced by their nodes, so that the scores can be made again from
other queries and keys: that is how an edit of q or k reaches hand-written attention, and how a pattern can be computed
later without keeping it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from headscope.probe.interception.axes import Axes
from headscope.probe.interception.products import Product

INPLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__setitem__"})
TRANSPOSES = frozenset({"mT", "mH", "T", "H", "t", "adjoint"})
DROPOUT = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"})
RANDOM = DROPOUT | {
    "bernoulli", "bernoulli_", "rand_like", "randn_like", "normal_", "uniform_", "multinomial", "exponential_", "random_", "dropout_",
    "gumbel_softmax", "rrelu",
}  # fmt: skip


@dataclass(eq=False)
class Node:
    """One tracked tensor.

    Attributes:
        stage: `scores`, `stat` (a reduction of scores: a maximum, a sum), `exp`, `pattern` or `z`.
        axes: what its dimensions are made of; None where that was lost.
        product: the product of activations it descends from.
        path: module in which that product was made.
        func, args, kwargs, pick: the call that made it, for replay (scores and stats only).
        inplace: the call wrote into its first argument.
        candidate: from the normaliser on, the attention call in the making.
        operations: names of the torch calls since the product.
    """

    stage: str
    axes: Axes | None
    product: Product | None = None
    path: str = ""
    func: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    pick: int | None = None
    inplace: bool = False
    candidate: Any = None
    operations: frozenset[str] = frozenset()
    summed: bool = False


def replay(node: Node, swap: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Make a node's tensor again, with some operands of its products swapped for others.

    Args:
        node: of stage `scores` or `stat`.
        swap: pairs (operand as it was, operand to use instead); an operand that shares its memory and shape follows too.
    """
    made: dict[int, Any] = {}

    def operand(tensor: Tensor) -> Tensor:
        for old, new in swap:
            if tensor is old or (tensor.shape == old.shape and tensor.data_ptr() == old.data_ptr() and tensor.stride() == old.stride()):
                return new
        return tensor

    def value(item: Any) -> Any:
        if isinstance(item, Node):
            return make(item)
        if isinstance(item, list | tuple):
            return type(item)(value(x) for x in item)
        return item

    def make(item: Node) -> Any:
        if id(item) in made:
            return made[id(item)]
        if item.func is untaped:
            untaped()
        if item.func is None:
            if item.product is None:
                raise ValueError("a tracked tensor without a way to make it again")
            result: Any = item.product.rebuild(operand(item.product.first), operand(item.product.second))
        else:
            args = tuple(value(x) for x in item.args)
            kwargs = {name: value(x) for name, x in item.kwargs.items()}
            if item.inplace:
                target = args[0].clone()
                item.func(target, *args[1:], **kwargs)
                result = target
            else:
                result = item.func(*args, **kwargs)
            if item.pick is not None:
                result = result[item.pick]
        made[id(item)] = result
        return result

    result: Tensor = make(node)
    return result


def ancestors(node: Node) -> list[Node]:
    """The node and all nodes that its tensor was made from."""
    found: dict[int, Node] = {}
    todo: list[Any] = [node]
    while todo:
        item = todo.pop()
        if isinstance(item, list | tuple):
            todo.extend(item)
        elif isinstance(item, Node) and id(item) not in found:
            found[id(item)] = item
            todo.extend((*item.args, *item.kwargs.values()))
    return list(found.values())


def detached(node: Node) -> Node:
    """A copy of the tape whose tensors belong to no autograd graph."""
    made: dict[int, Node] = {}

    def copied(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.detach()
        if isinstance(item, list | tuple):
            return type(item)(copied(x) for x in item)
        if not isinstance(item, Node):
            return item
        if id(item) not in made:
            product = item.product
            if product is not None:
                product = replace(product, first=product.first.detach(), second=product.second.detach())
            options = {name: copied(x) for name, x in item.kwargs.items()}
            made[id(item)] = replace(item, product=product, args=copied(item.args), kwargs=options)
        return made[id(item)]

    found: Node = copied(node)
    return found


def repeatable(node: Node) -> bool:
    """Whether running a node's calls again gives the same tensor: none was lost, none draws random numbers."""
    return not node.operations & RANDOM and all(item.func is not untaped for item in ancestors(node))


def borrowed(node: Node) -> list[Tensor]:
    """Tensors that a node's calls take from elsewhere: masks, biases, operands of the products."""
    found: dict[int, Tensor] = {}
    for item in ancestors(node):
        operands = () if item.product is None or item.func is not None else (item.product.first, item.product.second)
        todo: list[Any] = [*item.args, *item.kwargs.values(), *operands]
        while todo:
            one = todo.pop()
            if isinstance(one, list | tuple):
                todo.extend(one)
            elif isinstance(one, Tensor):
                found[id(one)] = one
    return list(found.values())


def writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a torch call writes into its first argument."""
    named = name in INPLACE or (name.endswith("_") and not name.startswith("_"))
    return named or bool(kwargs.get("inplace")) or (name in DROPOUT and len(args) > 3 and bool(args[3]))


def idle_dropout(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is a dropout that drops nothing."""
    return name in DROPOUT and not kwargs.get("training", args[2] if len(args) > 2 else True)


def base_name(func: Any) -> str:
    """`matmul` for torch.matmul, Tensor.matmul, torch.ops.aten.matmul and its overloads; `mT` for reading that attribute."""
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    if name == "__get__":
        attribute = str(getattr(getattr(func, "__self__", None), "__name__", ""))
        return attribute if attribute in TRANSPOSES else name
    return name


def untaped(*_: Any, **__: Any) -> Any:
    """Stands for a call that cannot be run again."""
    raise ValueError("this tensor was written into another one and cannot be made again")
