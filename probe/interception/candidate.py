"""An attention call in the making: from the normaliser over a product of activations to the product with the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception.axes import Atom, Axes, arrange, refine
from headscope.probe.interception.place import Place
from headscope.probe.interception.products import Product
from headscope.probe.interception.session import Session

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_head", "nheads", "n_local_heads")

# Words in the names of a module's arguments that tell a second stream of tokens, and those that tell something else about it.
CONTEXT = ("encoder", "key_value", "context", "memory", "cross")
NOT_CONTEXT = ("mask", "bias", "pos", "emb")


Groups = tuple[tuple[Atom, ...], ...]  # atoms of each canonical dimension


@dataclass(frozen=True)
class Grouping:
    """Which atoms are batch, head, query and key, and which operand of the product holds the keys."""

    batch: tuple[Atom, ...]
    head: tuple[Atom, ...]
    query: tuple[Atom, ...]
    key: tuple[Atom, ...]
    keys_second: bool

    @property
    def map(self) -> Groups:
        return (self.batch, self.head, self.query, self.key)

    @property
    def lead(self) -> int:
        """Index of key 0 along the key axis: normalisers over extra sink columns may put them first."""
        large = [atom for atom in self.key if atom.size != 1] or list(self.key)
        return max(0, large[0].lead) if large else 0


@dataclass(eq=False)
class Candidate:
    """State between normaliser and value product."""

    session: Session
    place: Place
    path: str
    normaliser: str
    grouping: Grouping | None
    complaint: str | None  # what to say if it never becomes an attention call; None: a weak sign, say nothing
    call: AttentionCall | None = None
    confirmed: bool = False
    claimed: bool = False  # a softmax over two activations takes its ordinal at once, weaker signs when they are confirmed
    summed: bool = False  # the sum of the exponentials was taken: the pattern is their share of it
    stages: frozenset[str] = frozenset()
    product: Product | None = None

    def __post_init__(self) -> None:
        self.place = self.place.without_frames()  # a candidate lives as long as any tensor that descends from it

    def secure(self) -> None:
        """Copy what is to be shown of the pattern: the model's own code is about to write into it."""
        if self.call is not None and self.call.materialised is not None:
            self.call.materialised = self.call.materialised.clone()


def head_count(module: nn.Module) -> int | None:
    """The number of heads that a module says it has, whatever it calls it."""
    for holder in (module, getattr(module, "config", None)):
        for name in HEAD_COUNTS:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def operand_axes(product: Product, which: int) -> Axes:
    tensor, letters = product.operand(which)
    return tuple(() if c == "." else (Atom((c,), n),) for c, n in zip(letters, tensor.shape, strict=True))


def result_axes(product: Product, shape: torch.Size) -> Axes:
    return tuple((Atom((c,), n),) for c, n in zip(product.result_letters, shape, strict=True))


def group(product: Product, axes: Axes, dim: int, heads: int | None, batch: int | None) -> Grouping | None:
    """Sort the atoms of the scores into batch, head, query and key.

    Args:
        product: the product that the scores descend from.
        axes: of the scores at the normaliser.
        dim: the dimension that is normalised: it holds the keys.
        heads: the number of heads the module claims, to split a fused batch · head axis.
        batch: the batch size of the model's input, where that helps.
    """
    key = axes[dim]
    owners = {product.owners(str(atom.key[0])) for atom in key if atom.size != 1} or {product.owners(str(a.key[0])) for a in key}
    if len(owners) != 1:
        return None
    owner = owners.pop()
    if owner not in ("0", "1"):
        return None
    key_letter = next((str(a.key[0]) for a in key if product.owners(str(a.key[0])) == owner), None)
    if key_letter is None:
        return None
    queries, keys = ("1", "0") if owner == "0" else ("0", "1")
    own = [c for c in product.result_letters if product.owners(c) == queries]
    if not own:
        return None
    query_letters, key_letters = product.operand(int(queries))[1], product.operand(int(keys))[1]
    spot = key_letters.index(key_letter)
    twin = query_letters[spot] if spot < len(query_letters) else ""
    query_letter = twin if twin in own else own[-1]
    present = [atom for d in axes for atom in d]
    by_letter: dict[str, list[Atom]] = {}
    for atom in present:
        by_letter.setdefault(str(atom.key[0]), []).append(atom)
    for atoms in by_letter.values():
        atoms.sort(key=lambda a: a.key)
    query = by_letter.get(query_letter, [])
    rest = [
        (atom, product.owners(c)) for c in product.result_letters if c not in (query_letter, key_letter) for atom in by_letter.get(c, [])
    ]
    taken = {atom.key for atom in (*query, *by_letter.get(key_letter, []))} | {atom.key for atom, _ in rest}
    if any(atom.size != 1 and atom.key not in taken for atom in present):
        return None
    split = _split_heads(rest, queries, heads, batch)
    if len([a for a in query if a.size != 1]) > 1:
        large = [a for a in query if a.size != 1]  # queries and heads fused in one axis, split since: (query, head)
        count = next((a for a in large if a.size == heads), large[-1])
        return Grouping(
            tuple(a for a, _ in rest), (count,), tuple(a for a in query if a is not count), tuple(by_letter[key_letter]), owner == "1"
        )
    return Grouping(split[0], split[1], tuple(query), tuple(by_letter[key_letter]), owner == "1")


def _split_heads(
    rest: list[tuple[Atom, str]], queries: str, heads: int | None, batch: int | None
) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
    """Which of the batch-like atoms are heads: those of the queries alone (grouped keys), else the last."""
    large = [(atom, owner) for atom, owner in rest if atom.size != 1]
    if not large:
        atoms = [atom for atom, _ in rest]
        return (tuple(atoms[:-1]), tuple(atoms[-1:])) if len(atoms) > 1 else (tuple(atoms), ())
    tail = 0
    while tail < len(rest) and rest[-1 - tail][1] == queries and len(rest) - tail > 1:
        tail += 1
    if tail and any(atom.size != 1 for atom, _ in rest[-tail:]):
        shared = len(rest) - tail
        if shared > 1:
            tail += 1
        atoms = [atom for atom, _ in rest]
        return tuple(atoms[:-tail]), tuple(atoms[-tail:])
    if len(rest) == 1:
        atom = rest[0][0]
        if (
            heads is not None
            and heads > 0
            and atom.size % heads == 0
            and not (atom.size == batch and heads > 1 and batch is not None and heads != batch)
        ):
            return (Atom((*atom.key, 0), atom.size // heads),), (Atom((*atom.key, 1), heads),)
        return (atom,), ()
    atoms = [atom for atom, _ in rest]
    if heads is not None and atoms[-1].size != heads:
        match = [atom for atom in atoms if atom.size == heads]
        if match:
            return tuple(a for a in atoms if a is not match[-1]), (match[-1],)
    return tuple(atoms[:-1]), (atoms[-1],)


def canonical_operand(product: Product, which: int, grouping: Grouping, sequence: tuple[Atom, ...]) -> tuple[Tensor, Axes, Groups]:
    """An operand as [batch, head, sequence, width], with what is needed to put a changed one back."""
    tensor, letters = product.operand(which)
    axes = operand_axes(product, which)
    other = product.operand(1 - which)[1]
    summed = tuple(atom for c, dim in zip(letters, axes, strict=True) for atom in dim if c in other and c not in product.result_letters)
    original = tuple(a for dim in axes for a in dim)
    names = {atom.key[0] for atom in sequence}
    refined = refine(original, [*grouping.batch, *grouping.head])
    seq = tuple(a for a in refined if a.key[0] in names and a.key not in {x.key for x in grouping.head})
    groups = (grouping.batch, grouping.head, seq, summed)
    return arrange(tensor, axes, groups), axes, groups


def expand_batch(tensor: Tensor, batch: int) -> Tensor:
    return tensor.expand(batch, *tensor.shape[1:]) if tensor.shape[0] == 1 and batch != 1 else tensor


def describe(
    session: Session, place: Place, path: str, ordinal: int, call_q: Tensor, call_k: Tensor, v_dim: int, **facts: Any
) -> AttentionSite:
    """The static description of a site, at its first call."""
    fold = 1
    if session.batch and call_q.shape[0] > session.batch and call_q.shape[0] % session.batch == 0:
        fold = call_q.shape[0] // session.batch
    kind = kind_of(session, place, path, call_q.shape[2], call_k.shape[2])
    if kind == "self" and fold > 1:
        kind = "window"
    return AttentionSite(
        name=session.site_name(path, ordinal), module=path, ordinal=ordinal, layer=layer_of(session, path), kind=kind,
        query_heads=call_q.shape[1], kv_heads=call_k.shape[1], key_dim=call_q.shape[-1], value_dim=v_dim, fold=fold, **facts,
    )  # fmt: skip


def layer_of(session: Session, path: str) -> int | None:
    """Block index of a module path: its number, or with several numbers its place among the paths of the same shape."""
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    if not numbers:
        return None
    if len(numbers) == 1:
        return int(numbers[0])
    shape = ["*" if part.isdigit() else part for part in parts]
    alike = [p for p in session.modules if ["*" if part.isdigit() else part for part in p.split(".")] == shape]
    return alike.index(path) if path in alike else None


def kind_of(session: Session, place: Place, path: str, queries: int, keys: int) -> str:
    """Self, cross or joint attention, from what the module was given."""
    frame = place.forward
    given: dict[str, Tensor] = {}
    if frame is not None:
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
        local = frame.f_locals
        given = {n: local[n] for n in names if isinstance(local.get(n), Tensor) and local[n].ndim >= 2 and local[n].is_floating_point()}
    lowered = path.lower()
    if {"query", "key"} <= given.keys() and place.module.__class__.__name__ == "MultiheadAttention":
        query, key, value = given["query"], given["key"], given.get("value")
        if key is not query and (value is None or value is key or key.shape != query.shape):
            return "cross"
        return "self"
    context = [t for n, t in given.items() if any(w in n for w in CONTEXT) and not any(w in n for w in NOT_CONTEXT)]
    if context:
        others = [t for t in given.values() if t is not context[0]]
        lengths = {context[0].shape[1] if context[0].ndim > 2 else context[0].shape[0], context[0].shape[-2]}
        if (
            queries == keys
            and others
            and queries not in lengths
            and any(queries == n + (o.shape[1] if o.ndim > 2 else o.shape[0]) for n in lengths for o in others)
        ):
            return "joint"
        if keys in lengths:
            return "cross"
    if any(word in lowered for word in ("encdecattention", "encoder_attn", "crossattention", "cross_attn", "cross_attention")):
        return "cross"
    if lowered.rsplit(".", 1)[-1] == "attn2" and queries != keys:
        return "cross"
    return "self"


def common_path(first: str, second: str) -> str:
    """The module that holds both."""
    if first == second:
        return first
    a, b = first.split("."), second.split(".")
    shared = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)
