"""The core of the interception: attention recognised by where its tensors come from.

A `TorchFunctionMode` sees every torch call of the thread, above autograd. Fused attention is handled by name
(`fused`, `flex`); hand-written attention is recognised by provenance: a product of two activations, whatever happens to
it on the way (scale, mask, bias, softcap, sinks, any layout), a normaliser over its keys, and a product with the values.
No model is known by name here.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headscope.kernels.errors import EditError, NotIntercepted
from headscope.probe.call import AttentionCall
from headscope.probe.interception import axes as ax
from headscope.probe.interception import fused, products
from headscope.probe.interception.axes import Atom, Axes, arrange, refine, restore
from headscope.probe.interception.candidate import (
    Candidate,
    Grouping,
    canonical_operand,
    common_path,
    describe,
    expand_batch,
    group,
    head_count,
    result_axes,
)
from headscope.probe.interception.products import Product
from headscope.probe.interception.session import Place, Session, locate
from headscope.probe.interception.tape import Node, replay

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
WEAK = {"sigmoid": "sigmoid", "sigmoid_": "sigmoid", "relu": "relu", "relu_": "relu", "clamp_min": "relu", "exp": "exp-sum", "exp_": "exp-sum"}
CLAMP = frozenset({"clamp", "clamp_", "clip", "clip_"})
REDUCE = frozenset({"sum", "mean", "max", "min", "amax", "amin", "logsumexp", "norm", "std", "var", "argmax", "argmin", "topk", "nansum"})
RESHAPE = frozenset({"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "_unsafe_view"})
SWAP = frozenset({"transpose", "swapaxes", "swapdims", "transpose_"})
PASS = frozenset({
    "__get__", "__set__", "__delete__", "size", "dim", "ndimension", "numel", "nelement", "stride", "data_ptr", "storage_offset", "is_floating_point",
    "is_complex", "__len__", "__bool__", "item", "tolist", "is_contiguous", "get_device", "element_size", "__hash__", "__repr__", "__format__",
    "register_hook", "requires_grad_", "is_inference", "untyped_storage", "_is_view", "has_names", "is_pinned", "cpu", "numpy",
})  # fmt: skip
INPLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__setitem__"})
CONTRACT = frozenset({"linear", "addmm", "conv1d", "conv2d", "conv3d", "bilinear", "embedding", "layer_norm", "rms_norm", "group_norm", "tensordot"})
DIVIDE = frozenset({"div", "div_", "true_divide", "__truediv__", "__itruediv__", "divide"})
MARKED = RESHAPE | SWAP | {"contiguous", "permute", "to", "float", "half", "bfloat16", "type_as", "mul", "__mul__", "clone", "movedim"}

_local = threading.local()


class Watch(TorchFunctionMode):
    """The function mode of one thread, shared by all sessions open in it."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[Session] = []
        self.tracker = Tracker(self)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.tracker.dispatch(func, args, kwargs or {})


def _push(mode: TorchFunctionMode) -> None:
    torch.overrides._push_mode(mode)


def _remove(mode: TorchFunctionMode) -> None:
    """Take a mode off the stack, wherever it stands: scopes may be left in any order."""
    held = []
    while torch._C._len_torch_function_stack() > 0:
        top = torch.overrides._pop_mode()
        if top is mode:
            break
        held.append(top)
    for other in reversed(held):
        _push(other)


@contextmanager
def watch(session: Session) -> Iterator[None]:
    """Let the thread's function mode work for a session."""
    current: Watch | None = getattr(_local, "watch", None)
    if current is None:
        current = _local.watch = Watch()
        _push(current)
    current.sessions.append(session)
    session.watch = current
    try:
        yield
    finally:
        current.sessions.remove(session)
        if not current.sessions:
            _remove(current)
            _local.watch = None


@contextmanager
def lend(session: Session) -> Iterator[None]:
    """Run this thread's torch calls under the mode of the session's own thread, which waits for it."""
    _push(session.watch)
    try:
        yield
    finally:
        _remove(session.watch)


def base_name(func: Any) -> str:
    """`matmul` for torch.matmul, Tensor.matmul, torch.ops.aten.matmul and its overloads."""
    return str(getattr(func, "__name__", "")).partition(".")[0]


class RecomputeGuard(torch.autograd.Function):
    """Identity whose backward insists that a checkpointed region was run again under the same edits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, session: Session, site: str) -> Tensor:
        ctx.session, ctx.site = session, site
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.site not in ctx.session.recomputed:
            raise NotIntercepted(
                f"the backward of a checkpointed region recomputed {ctx.site} outside the plan that edited its forward: the gradient would be "
                "that of another model. Call backward() inside the same `with plan.on(model):` block"
            )
        return grad, None, None


class Tracker:
    """Follows products of activations through the torch calls of one thread; see the module docstring."""

    def __init__(self, mode: Watch) -> None:
        self.mode = mode
        self.nodes: dict[int, tuple[weakref.ref[Tensor], Node]] = {}
        self.marks: dict[int, tuple[weakref.ref[Tensor], tuple[int, int]]] = {}
        self.weights: dict[int, weakref.ref[Tensor]] = {}
        self.kinds: dict[Any, str] = {}

    # -- what is remembered ----------------------------------------------------------------------------------------

    def node(self, tensor: Any) -> Node | None:
        hit = self.nodes.get(id(tensor))
        return hit[1] if hit is not None and hit[0]() is tensor else None

    def track(self, tensor: Tensor, node: Node) -> None:
        key, nodes = id(tensor), self.nodes
        nodes[key] = (weakref.ref(tensor, lambda _: nodes.pop(key, None)), node)

    def repeats(self, tensor: Tensor) -> int:
        """How often each key/value head stands in this tensor, one copy after the other."""
        hit = self.marks.get(id(tensor))
        return hit[1][1] if hit is not None and hit[0]() is tensor and hit[1][0] == -1 else 1

    def fused_heads(self, tensor: Tensor) -> int | None:
        """Heads in a leading axis that a reshape made of batch and heads."""
        hit = self.marks.get(id(tensor))
        return hit[1][1] if hit is not None and hit[0]() is tensor and hit[1][0] == -2 else None

    def _mark(self, tensor: Tensor, value: tuple[int, int]) -> None:
        key, marks = id(tensor), self.marks
        marks[key] = (weakref.ref(tensor, lambda _: marks.pop(key, None)), value)

    def weight_like(self, tensor: Tensor) -> bool:
        """A parameter, a view of one, or rows picked out of one."""
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return True
        hit = self.weights.get(id(tensor))
        return hit is not None and hit() is tensor

    # -- dispatch --------------------------------------------------------------------------------------------------

    def classify(self, func: Any) -> str:
        name = base_name(func)
        if name in PASS:
            return "pass"
        if name in products.NAMES:
            return "product"
        if name in SOFTMAX:
            return "softmax"
        if name in WEAK or name in CLAMP:
            return "weak"
        if name == "scaled_dot_product_attention":
            return "sdpa"
        if name == "multi_head_attention_forward":
            return "composite"
        if func in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            return "composite"  # a checkpoint's second forward happens in there
        if name in CONTRACT:
            return "contract"
        if any(word in name.lower() for word in ("attention", "attn", "mha_fwd", "mha_varlen", "encoder_layer_fwd", "native_multi_head")):
            return "opaque"
        return "other"

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = self.kinds.get(func)
        if kind is None:
            kind = self.kinds[func] = self.classify(func)
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
            self.note_origin(base_name(func), args, result)
            return result
        if kind == "softmax" or kind == "weak":
            source = args[0] if args else kwargs.get("input")
            node = self.node(source)
            if node is not None and node.stage == "scores":
                return self.normalise(func, args, kwargs, node)
        if kind == "contract":
            return self.contract(func, args, kwargs, tracked)
        return self.follow(func, args, kwargs, tracked)

    def tracked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, Node]]:
        found = []
        for item in (*args, *kwargs.values()) if kwargs else args:
            for one in item if isinstance(item, list | tuple) else (item,):
                if isinstance(one, Tensor):
                    node = self.node(one)
                    if node is not None:
                        found.append((one, node))
        return found

    def reenter(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a Python composite so that its inner calls are seen: a copy of it that does not hand itself to the mode again."""
        inner = types.FunctionType(
            func.__code__,
            {**func.__globals__, **dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never)},
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
                Candidate(place.session, place, place.path, "opaque", None, f"{place.path or 'the model'}: the kernel {base_name(func)} computes attention in one opaque call; "
                          "choose an implementation made of torch functions (for transformers: model.set_attn_implementation('sdpa'))")
            )  # fmt: skip
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
                    self._mark(result, (grown[0], result.shape[grown[0]]))
        elif name == "repeat_interleave":
            if len(args) > 1 and isinstance(args[1], int) and args[1] > 1 and result.ndim >= 3:
                self._mark(result, (-1, args[1]))
        elif name in RESHAPE and source.ndim == 4 and result.ndim == 3 and result.shape[1:] == source.shape[2:]:
            self._mark(result, (-2, source.shape[1]))
            hit = self.marks.get(id(source))
            if hit is not None and hit[0]() is source and hit[1][0] == -1:
                self._mark(result, (-2, source.shape[1] // hit[1][1]))
        elif self.marks and name in MARKED:
            hit = self.marks.get(id(source))
            if hit is not None and hit[0]() is source:
                dim, n = hit[1]
                if dim == -2:
                    if result.ndim == 3:
                        self._mark(result, (-2, n))
                elif dim < 0 or (name in RESHAPE and list(result.shape) == [*source.shape[: dim - 1], source.shape[dim - 1] * n, *source.shape[dim + 1 :]]):
                    if result.ndim >= 3:
                        self._mark(result, (-1, n))
        elif name in ("__getitem__", "index_select", "to", "float", "t", "transpose", "permute", "view", "reshape") and self.weight_like(source):
            key, weights = id(result), self.weights
            weights[key] = weakref.ref(result, lambda _: weights.pop(key, None))

    # -- products --------------------------------------------------------------------------------------------------

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
                    return self.project(product, which, node, lambda: func(*args, **kwargs))
                if node.stage in ("pattern", "exp") and not node.candidate.confirmed and not weights[1 - which]:
                    if self.contracts_keys(product, which, node):
                        return self.value_product(product, which, node, lambda: func(*args, **kwargs))
        result = func(*args, **kwargs)
        if any(weights):
            if self.nodes and not all(weights):
                self.mix_heads(product, 0 if weights[1] else 1, result)
            return result
        place = locate(self.mode.sessions)
        if place is not None:
            self.track(result, Node("scores", result_axes(product, result.shape), product, place.path))
        return result

    def mix_heads(self, product: Product, which: int, result: Tensor) -> None:
        """Scores or a pattern times a parameter over the head axis (talking heads) stay what they are; anything else ends the trail."""
        node = self.node(product.operand(which)[0])
        if node is None or node.axes is None or node.stage not in ("scores", "pattern"):
            return
        mine, other = product.operand(which)[1], product.operand(1 - which)[1]
        summed = [c for c in mine if c in other and c not in product.result_letters]
        new = [c for c in product.result_letters if c not in mine]
        if len(summed) != 1 or len(new) != 1:
            return
        mixed = node.axes[mine.index(summed[0])]
        origin = node.product if node.product is not None else node.candidate.product
        if origin is None or any(origin.owners(str(a.key[0])) != "01" for a in mixed if a.size != 1) or ax.size_of(mixed) != result.shape[product.result_letters.index(new[0])]:
            return
        axes = tuple(node.axes[mine.index(c)] if c in mine else mixed for c in product.result_letters)
        if node.stage == "pattern":
            self.track(result, Node("pattern", axes, candidate=node.candidate))
            return
        weight = product.operand(1 - which)[0]
        again = (lambda x: product.rebuild(x, weight)) if which == 0 else (lambda x: product.rebuild(weight, x))
        self.track(result, Node("scores", axes, node.product, node.path, again, (node,), operations=node.operations | {"mix_heads"}))

    def contracts_keys(self, product: Product, which: int, node: Node) -> bool:
        """Whether this product sums over the keys of the pattern (and not, say, over its queries)."""
        candidate: Candidate = node.candidate
        if candidate.grouping is None or node.axes is None:
            return False
        mine, other = product.operand(which)[1], product.operand(1 - which)[1]
        summed = {atom.key[0] for c, dim in zip(mine, node.axes, strict=True) if c in other and c not in product.result_letters for atom in dim if atom.size != 1}
        keys = {atom.key[0] for atom in candidate.grouping.key}
        queries = {atom.key[0] for atom in candidate.grouping.query if atom.size != 1}
        if summed:
            return summed == keys
        key_dims = {i for i, dim in enumerate(node.axes) if any(a.key[0] in keys for a in dim)}
        return bool(key_dims) and not queries & summed and all(mine[i] in other and mine[i] not in product.result_letters for i in key_dims)

    # -- the normaliser --------------------------------------------------------------------------------------------

    def normalise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: Node) -> Any:
        name = base_name(func)
        normaliser = "softmax" if name in SOFTMAX else WEAK.get(name, "relu")
        if name in CLAMP and (kwargs.get("min", args[1] if len(args) > 1 else None) != 0 or kwargs.get("max", args[2] if len(args) > 2 else None) is not None):
            return self.follow(func, args, kwargs, self.tracked(args, kwargs))
        source: Tensor = args[0] if args else kwargs["input"]
        place = locate(self.mode.sessions)
        if place is None or node.product is None:
            return func(*args, **kwargs)
        session = place.session
        path = common_path(node.path, place.path)
        shape_axes = node.axes
        if shape_axes is None and source.shape == self._product_shape(node.product):
            shape_axes = result_axes(node.product, source.shape)
        grouping = None
        dim = self._key_dim(node, shape_axes, source, args, kwargs, normaliser)
        if shape_axes is not None and dim is not None:
            fused_heads = self.fused_heads(node.product.first)
            heads = fused_heads or self._heads(session, path, place)
            grouping = group(node.product, shape_axes, dim, heads, None if fused_heads else session.batch)
        strong = normaliser == "softmax"
        if grouping is None or shape_axes is None:
            result = func(*args, **kwargs)
            if strong or "logsumexp" in node.operations:
                complaint = (
                    f"{path or 'the model'}: a {name} over a product of activations, whose axes could not be followed "
                    "(block-sparse or windowed attention that copies scores around is not supported)"
                )
                session.pending.append(Candidate(session, place, path, normaliser, None, complaint))
            return result
        return self.candidate(func, args, kwargs, node, source, shape_axes, grouping, place, path, normaliser)

    def candidate(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: Node, source: Tensor, axes: Axes, grouping: Grouping,
        place: Place, path: str, normaliser: str,
    ) -> Any:  # fmt: skip
        """Begin an attention call at its normaliser: edits of q, k, bias, scores and pattern happen here."""
        session, product = place.session, node.product
        assert product is not None
        strong = normaliser == "softmax"
        complaint = f"{path or 'the model'}: a {base_name(func)} over a product of activations that no value product followed" if strong else None
        candidate = Candidate(session, place, path, normaliser, grouping, complaint, product=product)
        session.pending.append(candidate)
        ordinal = session.claim(path) if strong else session.ordinals[path]
        queries, keys = (0, 1) if grouping.keys_second else (1, 0)
        q, q_axes, q_groups = canonical_operand(product, queries, grouping, grouping.query)
        k, k_axes, k_groups = canonical_operand(product, keys, grouping, grouping.key)
        batch = max(q.shape[0], k.shape[0])
        q, k = expand_batch(q, batch), expand_batch(k, batch)
        candidate.repeated = repeated = self._repeated(product.operand(keys)[0], q, k)
        if repeated > 1:
            k = k[:, ::repeated]
        width = ax.size_of(grouping.key)

        def facts() -> Any:
            capped = "tanh" in node.operations
            return describe(
                session, place, path, ordinal, q, k, 0, mechanism="dataflow", normaliser=normaliser, sinks=width > k.shape[2],
                softcap=None if not capped else float("nan"), bias=bool(node.operations & {"add", "__add__", "__iadd__", "add_", "masked_fill", "masked_fill_", "where", "baddbmm"}),
            )  # fmt: skip

        name = f"{path or type(session.model).__name__}#{ordinal}"
        known = session.sites.get(name)
        if known is None:
            known = facts()
            if known.softcap is not None:
                known = known.named(softcap=self._softcap(node))
        call = AttentionCall(known, session.steps[name] - (1 if place.recomputed else 0), q, k, None, recomputed=place.recomputed)
        candidate.call = call
        stages = candidate.stages = session.stages(known)
        lead = grouping.lead

        def real(full: Tensor, keys_now: int) -> Tensor:
            return full if full.shape[-1] == keys_now else full[..., lead : lead + keys_now]

        def swapped(new_q: Tensor, new_k: Tensor) -> list[tuple[Tensor, Tensor]]:
            pairs = []
            if new_q is not q:
                pairs.append((product.operand(queries)[0], self._back(new_q, product.operand(queries)[0], q_axes, q_groups)))
            if new_k is not k:
                whole = new_k.repeat_interleave(repeated, dim=1) if repeated > 1 else new_k
                pairs.append((product.operand(keys)[0], self._back(whole, product.operand(keys)[0], k_axes, k_groups)))
            return pairs

        def scores_of(new_q: Tensor, new_k: Tensor) -> Tensor:
            return real(arrange(replay(node, swapped(new_q, new_k)), axes, grouping.map, expand=False), new_k.shape[2])

        call.replay = scores_of
        if "q" in stages or "k" in stages:
            session.guard_checkpoint(place)
            new_q = session.change(call, "q", q) if "q" in stages else q
            new_k = session.change(call, "k", k) if "k" in stages else k
            pairs = swapped(new_q, new_k)
            if pairs:
                try:
                    source = replay(node, pairs)
                except ValueError as error:
                    raise EditError(f"{name}: its code copies scores in a way that cannot be run again with other queries or keys; edit scores, pattern or z") from error
                call.q, call.k = new_q, new_k
        source = self._change_scores(session, call, stages, source, axes, grouping, real)
        if "scores" in session.reads(known):
            call.materialised_scores = real(arrange(source, axes, grouping.map), k.shape[2])
        result = func(source, *args[1:], **kwargs) if args else func(**{**kwargs, "input": source})
        if normaliser == "exp-sum":
            self.track(result, Node("exp", axes, product, node.path, candidate=candidate))
            return result
        return self._normalised(result, axes, candidate, lead)

    def _change_scores(
        self, session: Session, call: AttentionCall, stages: frozenset[str], source: Tensor, axes: Axes, grouping: Grouping, real: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        if not stages & {"bias", "scores"}:
            return source
        session.guard_checkpoint(Place(session, call.site.module, session.model))
        full = arrange(source, axes, grouping.map)
        scores = real(full, call.keys)
        changed = scores
        if "bias" in stages:
            zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
            added = session.change(call, "bias", zero)
            if added is not zero:
                changed = changed + added.to(scores.dtype)
        if "scores" in stages:
            changed = session.change(call, "scores", changed)
        return source if changed is scores else self._write(full, changed, source, axes, grouping)

    def _write(self, full: Tensor, changed: Tensor, like: Tensor, axes: Axes, grouping: Grouping) -> Tensor:
        """Put changed real-key columns back between whatever sink columns there are, in the model's own layout."""
        lead, width = grouping.lead, changed.shape[-1]
        if full.shape[-1] != width:
            changed = torch.cat([full[..., :lead], changed.to(full.dtype), full[..., lead + width :]], dim=-1)
        return restore(changed.to(like.dtype), like, axes, grouping.map)

    def _normalised(self, result: Tensor, axes: Axes, candidate: Candidate, lead: int) -> Tensor:
        """The pattern is there: let handlers change it, then follow it to its value product."""
        session, call, grouping = candidate.session, candidate.call, candidate.grouping
        assert call is not None and grouping is not None
        if "pattern" in candidate.stages:
            full = arrange(result, axes, grouping.map)
            pattern = full if full.shape[-1] == call.keys else full[..., lead : lead + call.keys]
            changed = session.change(call, "pattern", pattern)
            if changed is not pattern:
                candidate.edited = True
                result = self._write(full, changed, result, axes, grouping)
        if "pattern" in session.reads(call.site) and candidate.normaliser == "softmax":  # others: what multiplies the values counts
            full = arrange(result, axes, grouping.map)
            call.materialised = full if full.shape[-1] == call.keys else full[..., lead : lead + call.keys]
        if candidate.edited and candidate.complaint is None:
            candidate.complaint = f"{candidate.path}: an edit reached a {candidate.normaliser} over a product of activations that turned out not to be attention"
        self.track(result, Node("pattern", axes, candidate=candidate))
        return result

    # -- the value product -----------------------------------------------------------------------------------------

    def value_product(self, product: Product, which: int, node: Node, run: Callable[[], Tensor]) -> Tensor:
        """Complete an attention call: v and z are here."""
        candidate: Candidate = node.candidate
        session, call, grouping = candidate.session, candidate.call, candidate.grouping
        assert call is not None and grouping is not None and node.axes is not None
        pattern_letters = product.operand(which)[1]
        values, letters = product.operand(1 - which)
        mine = dict(zip(pattern_letters, node.axes, strict=True))
        v_axes: Axes = tuple(() if c == "." else mine.get(c, (Atom(("v" + c,), n),)) for c, n in zip(letters, values.shape, strict=True))
        z_axes_of = {c: dim for c, dim in zip(letters, v_axes, strict=True)} | mine
        present = [atom for dim in node.axes for atom in dim]
        by_key = {atom.key: atom for atom in present}

        def now(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
            return tuple(by_key.get(atom.key, atom) for atom in refine(atoms, present))

        batch, head, query, key = (now(atoms) for atoms in grouping.map)
        width = tuple(Atom(("v" + c,), n) for c, n in zip(letters, values.shape, strict=True) if c not in mine and c in product.result_letters)
        if ax.size_of(query) != call.queries or (not width and values.shape[-1] != 1):
            return run()
        try:
            v = arrange(values, v_axes, (batch, head, key, width))
        except ValueError:
            return run()
        lead = max(0, next((a.lead for a in key if a.size != 1), 0))
        cut = v.shape[2] > call.keys
        v_call = v[:, :, lead : lead + call.keys] if cut else v
        repeated = self.repeats(values)
        repeated = repeated if repeated > 1 and v_call.shape[1] == call.k.shape[1] * repeated else 1
        v_call = expand_batch(v_call[:, ::repeated] if repeated > 1 else v_call, call.q.shape[0])
        call.v = v_call
        pattern = None
        if candidate.normaliser == "exp-sum" and node.stage == "exp":
            if "pattern" in candidate.stages:
                raise EditError(f"{call.site.name} multiplies values before it divides by the sum: its pattern is never formed; edit bias or z instead")
            full = arrange(product.operand(which)[0], node.axes, (batch, head, query, key))
            call.materialised = full / full.sum(-1, keepdim=True) if candidate.summed else full
            pattern = call.materialised
        site = self._final_site(candidate, call, v_call)
        call.site = site
        call.step = session.next_step(site.name, call.recomputed)
        if call.recomputed:
            session.recomputed.add(site.name)
        result: Tensor | None = None
        if "v" in candidate.stages:
            changed = session.change(call, "v", v_call)
            if changed is not v_call:
                if cut:
                    raise EditError(f"{site.name} has values for its sink columns: an edit of v cannot be told apart from them")
                call.v = changed
                whole = changed.repeat_interleave(repeated, dim=1) if repeated > 1 else changed
                new = self._back(whole, values, v_axes, (batch, head, key, width))
                result = product.rebuild(product.first, new) if which == 0 else product.rebuild(new, product.second)
        if result is None:
            result = run()
        z_axes: Axes = tuple(z_axes_of[c] for c in product.result_letters)
        groups = (batch, head, query, width)
        z = arrange(result, z_axes, groups, expand=True)
        if "z" in candidate.stages:
            changed = session.change(call, "z", z)
            if changed is not z:
                result, z = restore(changed.to(result.dtype), result, z_axes, groups), changed
        call.z = z
        if pattern is None and call.materialised is None and "pattern" in session.reads(site) and candidate.normaliser != "softmax":
            call.materialised = arrange(product.operand(which)[0], node.axes, (batch, head, query, key))
        candidate.confirmed = True
        session.finish(call)
        result = self.guarded(result, session, candidate.place, site.name)
        z_node = Node("z", z_axes, candidate=candidate)
        self.track(result, z_node)
        return result

    def guarded(self, result: Tensor, session: Session, place: Place, site: str) -> Tensor:
        """Under an edit inside a checkpoint, insist that the second forward is edited too."""
        if session.changing() and place.reentrant:
            session.guard_checkpoint(place)
        if session.changing() and place.checkpointed and result.requires_grad:
            guarded: Tensor = RecomputeGuard.apply(result, session, site)  # type: ignore[no-untyped-call]
            return guarded
        return result

    def _final_site(self, candidate: Candidate, call: AttentionCall, v: Tensor) -> Any:
        session = candidate.session
        name = call.site.name
        if name not in session.sites:
            if candidate.normaliser != "softmax":
                session.claim(candidate.path)
            site = call.site.named(value_dim=v.shape[-1])
            session.sites[name] = site
        elif candidate.normaliser != "softmax":
            session.claim(candidate.path)
        return session.sites[name]

    # -- the output projection -------------------------------------------------------------------------------------

    def contract(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[tuple[Tensor, Node]]) -> Any:
        name = base_name(func)
        spot = {"linear": 0, "addmm": 1}.get(name)
        if spot is not None and len(args) > spot + 1:
            node = self.node(args[spot])
            if node is not None and node.stage == "z":
                tensor, weight = args[spot], args[spot + 1]
                letters = "".join(chr(ord("a") + i) for i in range(tensor.ndim - 1))
                form = Product(tensor, weight, letters + "Z", "ZX", letters + "X", lambda x, _: func(*args[:spot], x, *args[spot + 1 :], **kwargs))
                return self.project(form, 0, node, lambda: func(*args, **kwargs))
        result = func(*args, **kwargs)
        if spot == 0 and isinstance(args[0], Tensor) and args[0].ndim >= 3:
            letters = "".join(chr(ord("a") + i) for i in range(args[0].ndim - 1))
            self.mix_heads(Product(args[0], args[1], letters + "Z", "ZX", letters + "X", lambda x, _: func(x, *args[1:], **kwargs)), 0, result)
        elif name == "conv2d" and isinstance(args[0], Tensor) and args[0].ndim == 4 and args[1].shape[2:] == (1, 1):  # over the head channels
            self.mix_heads(Product(args[0], args[1], "bZyx", "XZ..", "bXyx", lambda x, _: func(x, *args[1:], **kwargs)), 0, result)
        return result

    def project(self, product: Product, which: int, node: Node, run: Callable[[], Tensor]) -> Tensor:
        """The output projection W_O: remember which it is, and let handlers change what each head writes."""
        candidate: Candidate = node.candidate
        session, call, grouping = candidate.session, candidate.call, candidate.grouping
        assert call is not None
        tensor, letters = product.operand(which)
        weight, weight_letters = product.operand(1 - which)
        if node.axes is None or grouping is None:
            return run()
        present = [atom for dim in node.axes for atom in dim]
        width = [a for a in present if str(a.key[0]).startswith("v")]
        head = refine(grouping.head, present)
        summed = {c for c in letters if c in weight_letters and c not in product.result_letters}
        inside = [atom.key for c, dim in zip(letters, node.axes, strict=True) if c in summed for atom in dim]
        if not all(a.key in inside for a in (*width, *head) if a.size != 1):
            return run()
        name = session.parameters.get(id(weight)) or session.parameters.get(id(weight._base)) if weight is not None else None
        site = session.sites.get(call.site.name, call.site)
        if name is not None and site.output_projection is None:
            site = session.sites[site.name] = call.site = site.named(output_projection=name.removesuffix(".weight"))
        result = run()
        if "o" not in candidate.stages:
            return result
        out_axes = tuple(node.axes[letters.index(c)] if c in letters else (Atom(("e",), n),) for c, n in zip(product.result_letters, result.shape, strict=True))
        batch, query = refine(grouping.batch, present), refine(grouping.query, present)
        if ax.size_of(query) != call.queries or ax.size_of([a for a in present if a.key in {x.key for x in query}]) != call.queries:
            raise EditError(f"{site.name} sends its queries through several output projections: edit z instead of o")
        groups = (tuple(batch), tuple(query), (Atom(("e",), result.shape[product.result_letters.index(next(c for c in product.result_letters if c not in letters))]),))
        z = arrange(tensor, node.axes, (batch, head, query, width), expand=True)
        rebuild = (lambda x: product.rebuild(x, weight)) if which == 0 else (lambda x: product.rebuild(weight, x))
        nothing = rebuild(torch.zeros_like(tensor))
        parts = []
        for h in range(z.shape[1]):
            only = torch.zeros_like(z)
            only[:, h] = z[:, h]
            parts.append(arrange(rebuild(restore(only, tensor, node.axes, (batch, head, query, width))) - nothing, out_axes, groups))
        o = torch.stack(parts, dim=1)  # [B, H, Q, E]
        changed = session.change(call, "o", o)
        return result if changed is o else result + restore((changed - o).sum(1).to(result.dtype), result, out_axes, groups)

    # -- everything else -------------------------------------------------------------------------------------------

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[tuple[Tensor, Node]]) -> Any:
        """Carry tracking across a call that is neither a product nor a normaliser."""
        name = base_name(func)
        inplace = name in INPLACE or (name.endswith("_") and not name.startswith("_"))
        target = self.node(args[0]) if inplace and args else None
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
        lead = "exp" if "exp" in stages else "pattern" if "pattern" in stages else "scores" if "scores" in stages else "z" if "z" in stages else "stat"
        chosen = [(t, n, s) for (t, n), s in zip(keep, shapes, strict=True) if n.stage == lead]
        for output, pick in outputs:
            if not output.is_floating_point():
                continue
            tensor, node, shape = next(((t, n, s) for t, n, s in chosen if n.axes is not None and s == output.shape), chosen[0])
            reduced = name in REDUCE
            axes = None if reduced or node.axes is None else layout(name, node.axes, shape, tensor, args, kwargs, output, pick)
            if lead == "exp" and name in DIVIDE and any(n.stage == "stat" and n.summed and n.candidate is node.candidate for _, n in keep) and axes is not None:
                grouping = node.candidate.grouping
                replaced = self._normalised(output, axes, node.candidate, grouping.lead)
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
                self.track(output, Node(stage, axes, node.product, node.path, candidate=node.candidate, summed=reduced and name in ("sum", "nansum")))
                continue
            stage = "stat" if reduced or lead == "stat" else "scores"
            taped = self._tape(args, target, inplace)
            operations = frozenset().union(*(n.operations for _, n in keep)) | {name}
            self.track(
                output,
                Node(stage, axes, node.product, node.path, func if taped is not None else _untaped, taped or (), self._tape_kwargs(kwargs), pick, inplace, operations=operations),
            )  # fmt: skip
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

    # -- small helpers ---------------------------------------------------------------------------------------------

    def _back(self, value: Tensor, like: Tensor, axes: Axes, groups: Sequence[Sequence[Atom]]) -> Tensor:
        if value.numel() != like.numel() and value.shape[0] > 1:
            if not bool((value == value[:1]).all()):
                raise EditError("this operand is shared by the whole batch: an edit must change every sample alike")
            value = value[:1]
        return restore(value.to(like.dtype), like, axes, groups)

    def _repeated(self, keys: Tensor, q: Tensor, k: Tensor) -> int:
        n = self.repeats(keys)
        return n if n > 1 and k.shape[1] == q.shape[1] and k.shape[1] % n == 0 else 1

    def _heads(self, session: Session, path: str, place: Place) -> int | None:
        module = session.modules.get(path)
        return (head_count(module) if module is not None else None) or head_count(place.module)

    def _product_shape(self, product: Product) -> torch.Size:
        sizes = {c: n for which in (0, 1) for c, n in zip(product.operand(which)[1], product.operand(which)[0].shape, strict=True) if c != "."}
        return torch.Size(sizes.get(c, 1) for c in product.result_letters)

    def _key_dim(self, node: Node, axes: Axes | None, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], normaliser: str) -> int | None:
        """The dimension that holds the keys: the one normalised over, or for element-wise normalisers the second operand's own."""
        if normaliser == "softmax":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return int(dim) % source.ndim if isinstance(dim, int) else None
        if axes is None or node.product is None:
            return None
        own = [i for i, d in enumerate(axes) if any(node.product.owners(str(a.key[0])) == "1" for a in d)]
        return own[-1] if own else None

    def _softcap(self, node: Node) -> float | None:
        """The cap c of c · tanh(s / c), read off the tape."""
        seen, todo = set(), [node]
        while todo:
            item = todo.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if base_name(item.func) in ("mul", "__mul__", "mul_", "__imul__") and any(isinstance(x, Node) and "tanh" in x.operations for x in item.args):
                number = next((x for x in item.args if isinstance(x, int | float)), None)
                if number is not None:
                    return float(number)
            todo.extend(x for x in item.args if isinstance(x, Node))
        return None


def _never(*_: Any) -> bool:
    return False


def _untaped(*_: Any, **__: Any) -> Any:
    raise ValueError("this tensor was written into another one and cannot be made again")


def layout(name: str, axes: Axes, shape: torch.Size, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, pick: int | None) -> Axes | None:
    """Axes of a call's output from those of its tracked input; None where they cannot be told."""
    rest = args[1:]

    def number(position: int, key: str, default: Any = None) -> Any:
        return kwargs.get(key, rest[position] if len(rest) > position else default)

    if name in RESHAPE:
        return ax.reshape(axes, output.shape)
    if name in SWAP:
        return ax.swap(axes, number(0, "dim0") % len(axes), number(1, "dim1") % len(axes)) if isinstance(number(0, "dim0"), int) else None
    if name in ("permute", "movedim", "moveaxis"):
        probe = torch.empty([1] * len(axes)).as_strided([1] * len(axes), list(range(len(axes))))
        moved = getattr(torch.Tensor, name)(probe, *rest, **kwargs)
        return ax.permute(axes, list(moved.stride()))
    if name == "unsqueeze":
        dim = number(0, "dim") % (len(axes) + 1)
        return (*axes[:dim], (), *axes[dim:])
    if name == "squeeze":
        dim = number(0, "dim")
        dims = [i for i, n in enumerate(shape) if n == 1] if dim is None else [d % len(axes) for d in ([dim] if isinstance(dim, int) else dim)]
        return ax.squeeze(axes, [d for d in dims if shape[d] == 1])
    if name == "__getitem__":
        return ax.index(axes, shape, rest[0])
    if name in ("narrow", "split", "chunk", "split_with_sizes", "tensor_split"):
        if name == "narrow":
            dim, start = number(0, "dim") % len(axes), number(1, "start")
        else:
            dim = number(1, "dim", 0) % len(axes)
            if pick is None:
                return None
            start = _offset(args, kwargs, name, pick, shape[dim], output.shape[dim])
        cut = ax.resized(axes[dim], output.shape[dim], -start)
        return None if cut is None else (*axes[:dim], cut, *axes[dim + 1 :])
    if name in ("cat", "concat", "concatenate"):
        parts = args[0] if args else kwargs["tensors"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % len(axes)
        before = 0
        for part in parts:
            if part is tensor:
                break
            before += part.shape[dim]
        grown = ax.resized(axes[dim], output.shape[dim], before)
        return None if grown is None else (*axes[:dim], grown, *axes[dim + 1 :])
    if name == "pad":
        amounts = list(number(0, "pad"))
        result = list(axes)
        for i in range(len(amounts) // 2):
            dim = len(axes) - 1 - i
            changed = ax.resized(axes[dim], output.shape[dim], amounts[2 * i])
            if changed is None:
                return None
            result[dim] = changed
        return tuple(result)
    if output.shape == shape and name not in ("sort", "roll", "flip", "cumsum", "cumprod", "take_along_dim", "linear", "as_strided"):
        return axes
    if name == "linear" and output.ndim == len(axes) and output.shape[:-1] == shape[:-1]:
        return axes if output.shape[-1] == shape[-1] else None
    if output.ndim > len(axes) and output.shape[output.ndim - len(axes) :] == shape and all(n == 1 for n in output.shape[: output.ndim - len(axes)]):
        return (*((),) * (output.ndim - len(axes)), *axes)
    return None


def _offset(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, pick: int, total: int, size: int) -> int:
    sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size", kwargs.get("chunks")))
    if isinstance(sizes, list | tuple):
        return sum(int(n) for n in sizes[:pick])
    if name == "chunk":
        return pick * -(-total // int(sizes))
    return pick * int(sizes) if name != "tensor_split" else total - size if pick else 0


__all__ = ["Tracker", "Watch", "base_name", "lend", "replace", "watch"]
