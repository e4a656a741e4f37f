"""Attention written out by hand: from the normaliser over a product of activations to the product with the values.

The three points at which a model's own code passes here are where edits happen: at the normaliser (q, k, bias, scores, pattern),
at the value product (v, z) and at the output projection (o). Between them the model's code runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headscope.kernels.errors import EditError
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception import axes as ax
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
from headscope.probe.interception.guard import guarded, refuse_reentrant
from headscope.probe.interception.place import Place, locate
from headscope.probe.interception.products import Product
from headscope.probe.interception.rerun import Operand, Rerun, put_back, real_keys
from headscope.probe.interception.tape import Node, base_name, repeatable, replay

if TYPE_CHECKING:
    from headscope.probe.interception.tracker import Tracker

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
WEAK = {
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "relu": "relu",
    "relu_": "relu",
    "clamp_min": "relu",
    "exp": "exp-sum",
    "exp_": "exp-sum",
}
CLAMP = frozenset({"clamp", "clamp_", "clip", "clip_"})
LOGARITHMIC = frozenset({"logsumexp", "log_softmax"})
ADDITIVE = frozenset({"add", "__add__", "__iadd__", "add_", "masked_fill", "masked_fill_", "where", "baddbmm"})


def normalise(tracker: Tracker, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], node: Node) -> Any:
    """A normaliser over tracked scores: the beginning of an attention call, where its axes can be followed."""
    name = base_name(func)
    normaliser = "softmax" if name in SOFTMAX else WEAK.get(name, "relu")
    if normaliser == "exp-sum" and node.operations & LOGARITHMIC:
        normaliser = "softmax"  # exp(s - logsumexp(s)): normalised already
    if name in CLAMP and not _clamps_at_zero(args, kwargs):
        return tracker.follow(func, args, kwargs, tracker.tracked(args, kwargs))
    source: Tensor = args[0] if args else kwargs["input"]
    place = locate(tracker.mode.sessions)
    if place is None or node.product is None:
        return func(*args, **kwargs)
    session, path = place.session, common_path(node.path, place.path)
    axes = node.axes
    if axes is None and source.shape == node.product.shape:  # lost on a side branch, such as a shifted relative bias
        axes = result_axes(node.product, source.shape)
    grouping = None
    dim = _key_dim(node.product, axes, source, args, kwargs, normaliser)
    if axes is not None and dim is not None:
        fused_heads = tracker.fused_heads(node.product.first)
        heads = fused_heads or head_count(session.modules.get(path, place.module)) or head_count(place.module)
        grouping = group(node.product, axes, dim, heads, None if fused_heads else session.batch)
    if grouping is not None and node.product.fixed == (1 if grouping.keys_second else 0):
        return func(*args, **kwargs)  # over the rows of a parameter: a router or a classifier
    if axes is None or grouping is None:
        result = func(*args, **kwargs)
        if normaliser == "softmax" and node.product.fixed is None:
            complaint = (
                f"{path or 'the model'}: a {name} over a product of activations, whose axes could not be followed "
                "(block-sparse or windowed attention that copies scores around is not supported)"
            )
            session.pending.append(Candidate(session, place, path, normaliser, None, complaint))
        return result

    rest, options, named = args[1:], {n: x for n, x in kwargs.items() if n not in ("input", "out")}, not args

    def again(scores: Tensor) -> Tensor:  # a capture may keep it, so it must not hold the scores it was made for
        result: Tensor = func(input=scores, **options) if named else func(scores, *rest, **options)
        return result

    begun = _Beginning(tracker, node, node.product, axes, grouping, place, path, normaliser, name, again)
    edited = begun.edited_scores(source)
    if begun.call.materialised_scores is not None and name.endswith("_"):  # it is about to write the exponentials over them
        begun.call.materialised_scores = begun.call.materialised_scores.clone()
    result = func(edited, *rest, **kwargs) if args else func(**{**kwargs, "input": edited})
    if normaliser == "exp-sum":
        tracker.track(result, Node("exp", axes, node.product, node.path, candidate=begun.candidate))
        return result
    return normalised(tracker, result, axes, begun.candidate)


class _Beginning:
    """An attention call at its normaliser: q, k and scores are known, canonical and open to edits."""

    def __init__(
        self,
        tracker: Tracker,
        node: Node,
        product: Product,
        axes: Axes,
        grouping: Grouping,
        place: Place,
        path: str,
        normaliser: str,
        name: str,
        softmax: Callable[[Tensor], Tensor],
    ) -> None:
        session = place.session
        self.session, self.node, self.product, self.axes, self.grouping, self.place = session, node, product, axes, grouping, place
        strong = normaliser == "softmax" and product.fixed is None
        complaint = None
        if strong:
            complaint = f"{path or 'the model'}: a {name} over a product of activations that no value product followed"
        self.candidate = candidate = Candidate(session, place, path, normaliser, grouping, complaint, product=product)
        session.pending.append(candidate)
        candidate.claimed = strong
        ordinal = session.claim(path) if strong else session.ordinals[path]
        query_operand, key_operand = (0, 1) if grouping.keys_second else (1, 0)
        q, q_axes, q_groups = canonical_operand(product, query_operand, grouping, grouping.query)
        k, k_axes, k_groups = canonical_operand(product, key_operand, grouping, grouping.key)
        batch = max(q.shape[0], k.shape[0])
        q, k = expand_batch(q, batch), expand_batch(k, batch)
        own_q, own_k = product.operand(query_operand)[0], product.operand(key_operand)[0]
        copies = tracker.repeats(own_k)
        copies = copies if copies > 1 and k.shape[1] == q.shape[1] and k.shape[1] % copies == 0 else 1
        self.q, self.k = q, k[:, ::copies] if copies > 1 else k
        self.operands = Operand(own_q, q_axes, q_groups), Operand(own_k, k_axes, k_groups, copies)
        site_name = session.site_name(path, ordinal)
        site = session.sites.get(site_name)
        if site is None:
            site = describe(
                session, place, path, ordinal, q, self.k, 0, mechanism="dataflow", normaliser=normaliser,
                sinks=ax.size_of(grouping.key) > k.shape[2], softcap=softcap(node) if "tanh" in node.operations else None,
                bias=bool(node.operations & ADDITIVE),
            )  # fmt: skip
        call = AttentionCall(site, session.steps[site_name] - (1 if place.recomputed else 0), q, self.k, None, recomputed=place.recomputed)
        if repeatable(node):
            call.replay = Rerun(site_name, node, axes, grouping, *self.operands, softmax, normaliser == "softmax")
        else:
            call.rewritten = normaliser == "softmax"
        candidate.call, candidate.stages = call, session.stages(site)
        self.call = call

    def edited_scores(self, source: Tensor) -> Tensor:
        """What the normaliser is to see: the model's own scores, after the edits of q, k, bias and scores."""
        session, call, stages = self.session, self.call, self.candidate.stages
        if stages:
            refuse_reentrant(session, self.place)
        if stages & {"q", "k"}:
            q = session.change(call, "q", self.q) if "q" in stages else self.q
            k = session.change(call, "k", self.k) if "k" in stages else self.k
            old_and_new = zip((self.q, self.k), (q, k), self.operands, strict=True)
            pairs = [operand.swap(new) for old, new, operand in old_and_new if new is not old]
            if pairs:
                try:
                    source = replay(self.node, pairs)
                except ValueError as error:
                    raise EditError(
                        f"{call.site.name}: its code copies scores in a way that cannot be run again with other queries or keys; "
                        "edit scores, pattern or z"
                    ) from error
                call.q, call.k = q, k
        if stages & {"bias", "scores"}:
            full = arrange(source, self.axes, self.grouping.map)
            scores = changed = real_keys(full, self.grouping, call.keys)
            if "bias" in stages:
                zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
                added = session.change(call, "bias", zero)
                if added is not zero:
                    changed = changed + added.to(scores.dtype)
            if "scores" in stages:
                changed = session.change(call, "scores", changed)
            if changed is not scores:
                call.rewritten = True
                source = _write(full, changed, source, self.axes, self.grouping)
        if "scores" in session.reads(call.site) or call.rewritten:
            call.materialised_scores = real_keys(arrange(source, self.axes, self.grouping.map), self.grouping, call.keys)
        return source


def _write(full: Tensor, changed: Tensor, like: Tensor, axes: Axes, grouping: Grouping) -> Tensor:
    """Put changed real-key columns back between whatever sink columns there are, in the model's own layout."""
    lead, width = grouping.lead, changed.shape[-1]
    if full.shape[-1] != width:
        changed = torch.cat([full[..., :lead], changed.to(full.dtype), full[..., lead + width :]], dim=-1)
    return restore(changed.to(like.dtype), like, axes, grouping.map)


def normalised(tracker: Tracker, result: Tensor, axes: Axes, candidate: Candidate) -> Tensor:
    """The pattern is there: let handlers change it, then follow it to its value product."""
    session, call, grouping = candidate.session, candidate.call, candidate.grouping
    assert call is not None
    assert grouping is not None

    def real(tensor: Tensor) -> Tensor:
        return real_keys(arrange(tensor, axes, grouping.map), grouping, call.keys)

    if "pattern" in candidate.stages:
        pattern = real(result)
        changed = session.change(call, "pattern", pattern)
        if changed is not pattern:
            call.rewritten = True
            result = _write(arrange(result, axes, grouping.map), changed, result, axes, grouping)
    if candidate.normaliser == "softmax" and (call.rewritten or "pattern" in session.reads(call.site)):
        call.materialised = real(result)
    if call.rewritten and candidate.complaint is None:
        candidate.complaint = (
            f"{candidate.path or 'the model'}: an edit reached a {candidate.normaliser} over a product of activations that turned out "
            "not to be attention"
        )
    tracker.track(result, Node("pattern", axes, candidate=candidate))
    return result


def contracts_keys(product: Product, which: int, node: Node) -> bool:
    """Whether this product sums over the keys of the pattern (and not, say, over its queries)."""
    candidate: Candidate = node.candidate
    if candidate.grouping is None or node.axes is None:
        return False
    mine, other = product.operand(which)[1], product.operand(1 - which)[1]
    summed_dims = [dim for c, dim in zip(mine, node.axes, strict=True) if c in other and c not in product.result_letters]
    keys = {atom.key[0] for atom in candidate.grouping.key}
    large = {atom.key[0] for dim in summed_dims for atom in dim if atom.size != 1}
    return large == keys if large else any(atom.key[0] in keys for dim in summed_dims for atom in dim)


def value_product(tracker: Tracker, product: Product, which: int, node: Node, run: Callable[[], Tensor]) -> Tensor:
    """Complete an attention call: v and z are here."""
    candidate: Candidate = node.candidate
    session, call, grouping = candidate.session, candidate.call, candidate.grouping
    assert call is not None
    assert grouping is not None
    assert node.axes is not None
    pattern, pattern_letters = product.operand(which)
    values, letters = product.operand(1 - which)
    mine = dict(zip(pattern_letters, node.axes, strict=True))
    v_axes: Axes = tuple(() if c == "." else mine.get(c, (Atom(("v" + c,), n),)) for c, n in zip(letters, values.shape, strict=True))
    present = [atom for dim in node.axes for atom in dim]
    by_key = {atom.key: atom for atom in present}

    def now(atoms: Sequence[Atom]) -> tuple[Atom, ...]:  # as they are after what happened between normaliser and here
        return tuple(by_key.get(atom.key, atom) for atom in refine(atoms, present))

    batch, head, query, key = (now(atoms) for atoms in grouping.map)
    width = tuple(Atom(("v" + c,), n) for c, n in zip(letters, values.shape, strict=True) if c not in mine and c in product.result_letters)
    if ax.size_of(query) != call.queries or not width:
        return run()
    groups = (batch, head, key, width)
    try:
        v = arrange(values, v_axes, groups)
    except ValueError:
        return run()
    lead = max(0, next((a.lead for a in key if a.size != 1), 0))
    has_sinks = v.shape[2] > call.keys
    v = v[:, :, lead : lead + call.keys] if has_sinks else v
    repeated = tracker.repeats(values)
    repeated = repeated if repeated > 1 and v.shape[1] == call.k.shape[1] * repeated else 1
    call.v = v = expand_batch(v[:, ::repeated] if repeated > 1 else v, call.q.shape[0])
    unsummed = candidate.normaliser == "exp-sum" and node.stage == "exp"
    if unsummed and "pattern" in candidate.stages:
        raise EditError(
            f"{call.site.name} multiplies values before it divides by the sum: its pattern is never formed; edit bias or z instead"
        )
    call.site = _settle_site(candidate, call, v.shape[-1])
    call.step = session.next_step(call.site.name, call.recomputed)
    result: Tensor | None = None
    if "v" in candidate.stages:
        changed = session.change(call, "v", v)
        if changed is not v:
            if has_sinks:
                raise EditError(f"{call.site.name} has values for its sink columns: an edit of v cannot be told apart from them")
            call.v = changed
            new = put_back(changed.repeat_interleave(repeated, dim=1) if repeated > 1 else changed, values, v_axes, groups)
            result = product.rebuild(product.first, new) if which == 0 else product.rebuild(new, product.second)
    if result is None:
        result = run()
    v_dims = dict(zip(letters, v_axes, strict=True))
    z_axes: Axes = tuple(mine[c] if c in mine else v_dims[c] for c in product.result_letters)
    z_groups = (batch, head, query, width)
    z = arrange(result, z_axes, z_groups, expand=True)
    if "z" in candidate.stages:
        changed = session.change(call, "z", z)
        if changed is not z:
            result, z = restore(changed.to(result.dtype), result, z_axes, z_groups), changed
    call.z = z
    if call.materialised is None and candidate.normaliser != "softmax" and (call.rewritten or "pattern" in session.reads(call.site)):
        weights = arrange(pattern, node.axes, (batch, head, query, key))  # what multiplies the values counts
        # Exponentials that are not divided yet are divided after the product, by their sum that may not have been taken yet.
        call.materialised = weights / weights.sum(-1, keepdim=True) if unsummed else weights
    candidate.confirmed = True
    session.finish(call)
    session.release(candidate)
    result = guarded(result, session, candidate.place, call.site.name)
    tracker.track(result, Node("z", z_axes, candidate=candidate))
    return result


def _settle_site(candidate: Candidate, call: AttentionCall, value_dim: int) -> AttentionSite:
    """The site's entry in the session, complete now that the values are known."""
    session, name = candidate.session, call.site.name
    if not candidate.claimed:
        session.claim(candidate.path)
    return session.site(name, lambda: call.site.named(value_dim=value_dim))


def project(product: Product, which: int, node: Node, run: Callable[[], Tensor]) -> Tensor:
    """The output projection W_O: remember which it is, and let handlers change what each head writes."""
    candidate: Candidate = node.candidate
    session, call, grouping = candidate.session, candidate.call, candidate.grouping
    tensor, letters = product.operand(which)
    weight, weight_letters = product.operand(1 - which)
    if node.axes is None or grouping is None or call is None:
        return run()
    present = [atom for dim in node.axes for atom in dim]
    width = [a for a in present if str(a.key[0]).startswith("v")]
    batch, head, query = (refine(atoms, present) for atoms in (grouping.batch, grouping.head, grouping.query))
    summed = {c for c in letters if c in weight_letters and c not in product.result_letters}
    inside = {atom.key for c, dim in zip(letters, node.axes, strict=True) if c in summed for atom in dim}
    if not all(a.key in inside for a in (*width, *head) if a.size != 1):
        return run()
    name = session.parameters.get(id(weight)) or session.parameters.get(id(weight._base))
    site = session.sites.get(call.site.name, call.site)
    if name is not None and site.output_projection is None:
        site = session.sites[site.name] = call.site = site.named(output_projection=name.removesuffix(".weight"))
    result = run()
    if not candidate.stages & {"o", "attn_out"}:
        return result
    seen = {a.key: a for a in present}
    if ax.size_of([seen[a.key] for a in query if a.key in seen]) != call.queries:
        raise EditError(
            f"{site.name} sends its queries through several output projections: edit z, or what its projections return with stage out"
        )
    new = Atom(("e",), next(n for c, n in zip(product.result_letters, result.shape, strict=True) if c not in letters))
    out_axes: Axes = tuple(node.axes[letters.index(c)] if c in letters else (new,) for c in product.result_letters)
    out_groups, groups = (batch, query, [new]), (batch, head, query, width)
    if "o" in candidate.stages:
        z = arrange(tensor, node.axes, groups, expand=True)

        def through(x: Tensor) -> Tensor:
            return product.rebuild(x, weight) if which == 0 else product.rebuild(weight, x)

        constant = through(torch.zeros_like(tensor))  # the projection's bias belongs to no head
        parts = []
        for h in range(z.shape[1]):
            only = torch.zeros_like(z)
            only[:, h] = z[:, h]
            parts.append(arrange(through(restore(only, tensor, node.axes, groups)) - constant, out_axes, out_groups))
        o = torch.stack(parts, dim=1)  # [B, H, Q, E]
        changed = session.change(call, "o", o)
        if changed is not o:
            result = result + restore((changed - o).sum(1).to(result.dtype), result, out_axes, out_groups)
    if "attn_out" in candidate.stages:
        written = arrange(result, out_axes, out_groups)[:, None]  # [B, 1, Q, E]
        changed = session.change(call, "attn_out", written)
        if changed is not written:
            result = restore(changed[:, 0].to(result.dtype), result, out_axes, out_groups)
    return result


def mix_heads(tracker: Tracker, product: Product, which: int, result: Tensor) -> bool:
    """Scores or a pattern times a parameter over the head axis (talking heads) stay what they are: whether this was that."""
    node = tracker.node(product.operand(which)[0])
    if node is None or node.axes is None or node.stage not in ("scores", "pattern"):
        return False
    mine, other = product.operand(which)[1], product.operand(1 - which)[1]
    summed = [c for c in mine if c in other and c not in product.result_letters]
    new = [c for c in product.result_letters if c not in mine]
    origin = node.product if node.product is not None else node.candidate.product
    if len(summed) != 1 or len(new) != 1 or origin is None:
        return False
    mixed = node.axes[mine.index(summed[0])]
    if any(origin.owners(str(a.key[0])) != "01" for a in mixed if a.size != 1):
        return False
    if ax.size_of(mixed) != result.shape[product.result_letters.index(new[0])]:
        return False
    axes = tuple(node.axes[mine.index(c)] if c in mine else mixed for c in product.result_letters)
    if node.stage == "pattern":
        tracker.track(result, Node("pattern", axes, candidate=node.candidate))
        return True
    weight, rebuild = product.operand(1 - which)[0], product.rebuild  # the scores themselves must not be held

    def again(x: Tensor) -> Tensor:
        return rebuild(x, weight) if which == 0 else rebuild(weight, x)

    tracker.track(result, Node("scores", axes, node.product, node.path, again, (node,), operations=node.operations | {"mix_heads"}))
    return True


def _clamps_at_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    return bool(low == 0 and high is None)


def _key_dim(
    product: Product, axes: Axes | None, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], normaliser: str
) -> int | None:
    """The dimension that holds the keys: the one normalised over, or for element-wise normalisers the second operand's own."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if normaliser == "softmax" and isinstance(dim, int):
        return dim % source.ndim
    own = [i for i, d in enumerate(axes or ()) if any(product.owners(str(a.key[0])) == "1" for a in d)]
    return own[-1] if own else None


def softcap(node: Node) -> float | None:
    """The cap c of c · tanh(s / c), read off the tape."""
    seen: set[int] = set()
    todo = [node]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if base_name(item.func) in ("mul", "__mul__", "mul_", "__imul__") and any(
            isinstance(x, Node) and "tanh" in x.operations for x in item.args
        ):
            number = next((x for x in item.args if isinstance(x, int | float)), None)
            if number is not None:
                return float(number)
        todo.extend(x for x in item.args if isinstance(x, Node))
    return None
