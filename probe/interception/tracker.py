"""Follows products of activations through the torch calls of one thread, and recognises attention among them.

Fused attention is known by its name (`fused`); hand-written attention by provenance: a product of two activations, whatever
happens to it on the way (scale, mask, bias, softcap, sinks, any layout), a normaliser over its keys, and a product with the
values (`handwritten`). No model is known by name here.
"""

from __future__ import annotations

import types
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from headscope.probe.interception import fused, handwritten, products
from headscope.probe.interception.candidate import Candidate, result_axes
from headscope.probe.interception.layout import RESHAPE, SWAP, layout
from headscope.probe.interception.place import locate
from headscope.probe.interception.products import Product
from headscope.probe.interception.tape import TRANSPOSES, Node, base_name, idle_dropout, untaped, writes

if TYPE_CHECKING:
    from headscope.probe.interception.mode import Watch

REDUCE = frozenset({"sum", "mean", "max", "min", "amax", "amin", "logsumexp", "norm", "std", "var", "argmax", "argmin", "topk", "nansum"})
PASS = frozenset({
    "__get__", "__set__", "__delete__", "size", "dim", "ndimension", "numel", "nelement", "stride", "data_ptr", "storage_offset",
    "is_floating_point", "is_complex", "__len__", "__bool__", "item", "tolist", "is_contiguous", "get_device", "element_size", "__hash__",
    "__repr__", "__format__", "register_hook", "requires_grad_", "is_inference", "untyped_storage", "_is_view", "has_names", "is_pinned",
    "cpu", "numpy",
})  # fmt: skip
CONTRACT = frozenset({
    "linear", "addmm", "conv1d", "conv2d", "conv3d", "bilinear", "embedding", "layer_norm", "rms_norm", "group_norm", "tensordot",
})  # fmt: skip
ANGLES = frozenset({"cos", "sin", "polar"})  # of positions times frequencies: the product was a rotary table
DIVIDE = frozenset({"div", "div_", "true_divide", "__truediv__", "__itruediv__", "divide"})
MARKED = (
    RESHAPE
    | SWAP
    | {"contiguous", "permute", "to", "float", "half", "bfloat16", "type_as", "mul", "__mul__", "clone", "movedim"}
    | TRANSPOSES
)
WEIGHT_VIEWS = frozenset({"__getitem__", "index_select", "to", "float", "t", "transpose", "permute", "view", "reshape"}) | TRANSPOSES
OPAQUE = ("attention", "attn", "mha_fwd", "mha_varlen", "encoder_layer_fwd", "native_multi_head")
NOTED = MARKED | WEIGHT_VIEWS | {"expand", "repeat_interleave"}
STAGE_ORDER = ("exp", "pattern", "scores", "z", "stat")

T = TypeVar("T")
_kinds: dict[Any, tuple[str, str]] = {}  # torch function -> what it is, its plain name


class ByIdentity(Generic[T]):
    """What is known of tensors, by identity, for as long as each of them lives."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], T]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, tensor: Any) -> T | None:
        hit = self._entries.get(id(tensor))
        return hit[1] if hit is not None and hit[0]() is tensor else None

    def put(self, tensor: Tensor, value: T) -> None:
        key, entries = id(tensor), self._entries
        entries[key] = (weakref.ref(tensor, lambda _: entries.pop(key, None)), value)


class Tracker:
    """See the module docstring.

    Attributes:
        nodes: what is known of each tracked tensor.
        marks: origins that matter later: (-1, n) each key head n times over, (-2, H) batch and H heads fused in one axis,
            (dim, n) about to become the first of these.
        weights: tensors that are parameters in another guise.
    """

    def __init__(self, mode: Watch) -> None:
        self.mode = mode
        self.nodes: ByIdentity[Node] = ByIdentity()
        self.marks: ByIdentity[tuple[int, int]] = ByIdentity()
        self.weights: ByIdentity[bool] = ByIdentity()

    def node(self, tensor: Any) -> Node | None:
        return self.nodes.get(tensor)

    def track(self, tensor: Tensor, node: Node) -> None:
        self.nodes.put(tensor, node)

    def repeats(self, tensor: Tensor) -> int:
        """How often each key/value head stands in this tensor, one copy after the other."""
        mark = self.marks.get(tensor)
        return mark[1] if mark is not None and mark[0] == -1 else 1

    def fused_heads(self, tensor: Tensor) -> int | None:
        """Heads in a leading axis that a reshape made of batch and heads."""
        mark = self.marks.get(tensor)
        return mark[1] if mark is not None and mark[0] == -2 else None

    def weight_like(self, tensor: Tensor) -> bool:
        """A parameter, a view of one, or rows picked out of one."""
        return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter) or bool(self.weights.get(tensor))

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = _kinds.get(func)
        if known is None:
            known = _kinds[func] = (classify(func), base_name(func))
        kind, name = known
        if kind == "pass":
            return func(*args, **kwargs)
        if kind == "product":
            return self.product(func, args, kwargs)
        if kind == "sdpa":
            return fused.run(self, func, args, kwargs)
        if kind == "composite":
            return self.reenter(func, args, kwargs)
        if kind == "opaque":
            return self.opaque(func, args, kwargs)
        tracked = self.tracked(args, kwargs) if self.nodes else []
        if not tracked:
            result = func(*args, **kwargs)
            if name in NOTED:
                self.note_origin(name, args, result)
            return result
        if kind == "softmax" or kind == "weak":
            source = args[0] if args else kwargs.get("input")
            node = self.node(source)
            if node is not None and node.stage == "scores":
                return handwritten.normalise(self, func, args, kwargs, node)
        if kind == "contract":
            return self.contract(func, args, kwargs)
        return self.follow(func, args, kwargs, tracked)

    def tracked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, Node]]:
        found: list[tuple[Any, Node]] = []
        for item in (*args, *kwargs.values()) if kwargs else args:
            for one in item if isinstance(item, list | tuple) else (item,):
                node = self.nodes.get(one)
                if node is not None:
                    found.append((one, node))
        return found

    def reenter(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a Python composite so that its inner calls are seen: a copy of it that does not hand itself to the mode again."""
        inner = types.FunctionType(
            func.__code__,
            {
                **func.__globals__,
                **dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), never),
            },
            func.__name__,
            func.__defaults__,
            func.__closure__,
        )
        inner.__kwdefaults__ = func.__kwdefaults__
        with self.mode:
            return inner(*args, **kwargs)

    def opaque(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An attention kernel that is known only by its name: it cannot be looked into, so it is reported."""
        place = locate(self.mode.sessions)
        if place is not None:
            place.session.pending.append(
                Candidate(
                    place.session,
                    place,
                    place.path,
                    "opaque",
                    None,
                    f"{place.path or 'the model'}: the kernel {base_name(func)} computes attention in one opaque call; choose an "
                    "implementation made of torch functions (for transformers: model.set_attn_implementation('sdpa'))",
                )
            )
        return func(*args, **kwargs)

    def note_origin(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Remember two origins that matter later: key heads repeated for their query heads, and rows of parameters."""
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        source = args[0]
        if name == "expand":
            if result.ndim == source.ndim and result.ndim >= 5:
                grown = [i for i in range(1, result.ndim - 2) if source.shape[i] == 1 and result.shape[i] > 1]
                if len(grown) == 1:
                    self.marks.put(result, (grown[0], result.shape[grown[0]]))
        elif name == "repeat_interleave":
            if len(args) > 1 and isinstance(args[1], int) and args[1] > 1 and result.ndim >= 3:
                self.marks.put(result, (-1, args[1]))
        elif name in RESHAPE and source.ndim == 4 and result.ndim == 3 and result.shape[1:] == source.shape[2:]:
            self.marks.put(result, (-2, source.shape[1] // self.repeats(source)))
        elif self.marks and name in MARKED:
            mark = self.marks.get(source)
            if mark is not None:
                dim, n = mark
                if dim == -2:
                    if result.ndim == 3:
                        self.marks.put(result, (-2, n))
                elif result.ndim >= 3 and (dim == -1 or (name in RESHAPE and _merged(source, result, dim, n))):
                    self.marks.put(result, (-1, n))
        elif name in WEIGHT_VIEWS and self.weight_like(source):
            self.weights.put(result, True)

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        product = products.read(base_name(func), func, args, kwargs)
        if product is None or not product.first.is_floating_point():
            return func(*args, **kwargs)
        weights = self.weight_like(product.first), self.weight_like(product.second)
        if self.nodes:
            for which, tensor in enumerate((product.first, product.second)):
                node = self.node(tensor)
                if node is None or node.candidate is None:
                    continue
                if node.stage == "z" and weights[1 - which]:
                    return handwritten.project(product, which, node, lambda: func(*args, **kwargs))
                open_pattern = node.stage in ("pattern", "exp") and not node.candidate.confirmed
                if open_pattern and not weights[1 - which] and handwritten.contracts_keys(product, which, node):
                    return handwritten.value_product(self, product, which, node, lambda: func(*args, **kwargs))
        result = func(*args, **kwargs)
        if all(weights):
            return result
        if any(weights) and handwritten.mix_heads(self, product, 0 if weights[1] else 1, result):
            return result
        product.fixed = weights.index(True) if any(weights) else None
        place = locate(self.mode.sessions)
        if place is not None:
            self.track(result, Node("scores", result_axes(product, result.shape), product, place.path))
        return result

    def contract(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that sums over a parameter: the output projection of an attention, or a mixing of its heads, or the end of a trail."""
        form = self._as_product(func, args, kwargs)
        node = self.node(form.first) if form is not None else None
        if form is not None and node is not None and node.stage == "z":
            return handwritten.project(form, 0, node, lambda: func(*args, **kwargs))
        result = func(*args, **kwargs)
        if form is not None and node is not None:
            handwritten.mix_heads(self, form, 0, result)
        return result

    def _as_product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
        """A linear map, or a 1 × 1 convolution over head channels, read as the product of its input and its weight."""
        name = base_name(func)
        names = {"linear": ("input", "weight"), "addmm": ("input", "mat1", "mat2"), "conv2d": ("input", "weight")}.get(name)
        if names is None:
            return None
        given = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
        rest = {n: v for n, v in kwargs.items() if n not in names}
        tensor, weight = given.get(names[-2]), given.get(names[-1])
        if not isinstance(tensor, Tensor) or not isinstance(weight, Tensor):
            return None

        others, extra = {n: v for n, v in given.items() if n != names[-2]}, args[len(names) :]  # without the input, which must not be held

        def rebuild(x: Tensor, _: Tensor) -> Tensor:
            result: Tensor = func(*(x if n == names[-2] else others[n] for n in names), *extra, **rest)
            return result

        if name == "conv2d":
            small = tensor.ndim == 4 and tuple(weight.shape[2:]) == (1, 1)
            return Product(tensor, weight, "bZyx", "XZ..", "bXyx", rebuild) if small else None
        if tensor.ndim < 2 or tensor.ndim > 20:
            return None
        letters = "".join(chr(ord("a") + i) for i in range(tensor.ndim - 1))
        return Product(tensor, weight, letters + "Z", "XZ" if name == "linear" else "ZX", letters + "X", rebuild)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[tuple[Tensor, Node]]) -> Any:
        """Carry tracking across a call that is neither a product nor a normaliser."""
        name = base_name(func)
        inplace = writes(name, args, kwargs)
        target = self.node(args[0]) if inplace and args else None
        if target is not None and target.candidate is not None:
            target.candidate.secure()
        shapes = [t.shape for t, _ in tracked]
        keep = tuple(tracked)
        result = func(*args, **kwargs)
        stages = {node.stage for _, node in keep}
        if inplace and args and isinstance(args[0], Tensor):
            outputs: list[tuple[Tensor, int | None]] = [(args[0], None)]
        elif isinstance(result, Tensor):
            outputs = [(result, None)]
        elif isinstance(result, list | tuple):
            outputs = [(t, i) for i, t in enumerate(result) if isinstance(t, Tensor)]
        else:
            return result
        lead = next(stage for stage in STAGE_ORDER if stage in stages)
        chosen = [(t, n, s) for (t, n), s in zip(keep, shapes, strict=True) if n.stage == lead]
        for output, pick in outputs:
            if not output.is_floating_point() or name in ANGLES:
                continue
            tensor, node, shape = next(((t, n, s) for t, n, s in chosen if n.axes is not None and s == output.shape), chosen[0])
            reduced = name in REDUCE and not (len(args) > 1 and isinstance(args[1], Tensor))  # max(a, b) is element-wise
            axes = None if reduced or node.axes is None else layout(name, node.axes, shape, tensor, args, kwargs, output, pick)
            if (
                lead == "exp"
                and name in DIVIDE
                and any(n.stage == "stat" and n.summed and n.candidate is node.candidate for _, n in keep)
                and axes is not None
            ):
                replaced = handwritten.normalised(self, output, axes, node.candidate)
                if replaced is not output and inplace:
                    output.copy_(replaced)
                elif replaced is not output:
                    result = replaced
                continue
            if lead == "z":
                if axes is not None:
                    self.track(output, Node("z", axes, candidate=node.candidate))
                continue
            if lead == "pattern":
                if not reduced:
                    self.track(output, Node("pattern", axes, candidate=node.candidate))
                continue
            if lead == "exp":
                stage = "stat" if reduced else "exp"
                if reduced and name in ("sum", "nansum"):
                    node.candidate.summed = True
                self.track(
                    output,
                    Node(stage, axes, node.product, node.path, candidate=node.candidate, summed=reduced and name in ("sum", "nansum")),
                )
                continue
            stage = "stat" if reduced or lead == "stat" else "scores"
            taped = self._tape(args, target, inplace)
            operations = frozenset().union(*(n.operations for _, n in keep)) | (frozenset() if idle_dropout(name, args, kwargs) else {name})
            again = func if taped is not None else untaped
            options = self._tape_kwargs(kwargs)
            self.track(
                output, Node(stage, axes, node.product, node.path, again, taped or (), options, pick, inplace, operations=operations)
            )
        return result

    def _tape(self, args: tuple[Any, ...], target: Node | None, inplace: bool) -> tuple[Any, ...] | None:
        """The arguments with tracked tensors replaced by their nodes; None where the call wrote into an untracked tensor."""
        if inplace and target is None:
            return None

        def held(item: Any) -> Any:
            if isinstance(item, Tensor):
                node = self.node(item)
                return node if node is not None and node.stage in ("scores", "stat") else item
            if isinstance(item, list | tuple) and type(item) in (list, tuple):
                return type(item)(held(x) for x in item)
            return item

        if inplace:
            return (target, *(held(x) for x in args[1:]))
        return tuple(held(x) for x in args)

    def _tape_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {k: (self.node(v) or v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def classify(func: Any) -> str:
    """What a torch function is to the tracker."""
    name = base_name(func)
    if name in PASS:
        return "pass"
    if name in products.NAMES:
        return "product"
    if name in handwritten.SOFTMAX:
        return "softmax"
    if name in handwritten.WEAK or name in handwritten.CLAMP:
        return "weak"
    if name == "scaled_dot_product_attention":
        return "sdpa"
    if name == "multi_head_attention_forward":
        return "composite"
    if func in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
        return "composite"  # a checkpoint's second forward happens in there
    if name in CONTRACT:
        return "contract"
    if any(word in name.lower() for word in OPAQUE):
        return "opaque"
    return "other"


def _merged(source: Tensor, result: Tensor, dim: int, n: int) -> bool:
    """Whether a reshape merged the copies of a key head into the head axis before them."""
    return list(result.shape) == [*source.shape[: dim - 1], source.shape[dim - 1] * n, *source.shape[dim + 1 :]]


def never(*_: Any) -> bool:
    return False
