"""What a head's matrices say in tokens: whether it copies, and which tokens its strongest directions read and write.

Letters: H heads, E width of what is read, F width of what is written, V width of a value, n words of the vocabulary, R = min(D, E, F).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.atlas.maps import Unreadable, find_maps, input_gain
from headscope.probe.atlas.spectra import factors, product_singular_vectors
from headscope.probe.atlas.weights import HeadWeights, learning
from headscope.probe.visible import visible


class Decoder(Protocol):
    """The one thing that is asked of a tokenizer."""

    def decode(self, token_ids: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Where tokens enter the residual stream and leave it.

    Attributes:
        embedding: [n, E], what a token puts into the stream; positions and norms of the embedding are no part of it.
        unembedding: [n, F], the logit of a token is its product with the stream, the final norm's scale taken into it; None for a model
            that gives no logits of tokens.
    """

    embedding: Tensor
    unembedding: Tensor | None = None

    @cached_property
    def centred_way(self) -> Tensor | None:
        """W_U W_E [F, E] in float64, both without their mean over the vocabulary; kept, as every site asks for it."""
        if self.unembedding is None:
            return None
        return (self.unembedding - self.unembedding.mean(0)).double().mT @ (self.embedding - self.embedding.mean(0)).double()

    def way(self, centred: bool) -> Tensor | None:
        """W_U W_E [F, E]; None without unembedding."""
        if centred or self.unembedding is None:
            return self.centred_way
        return self.unembedding.double().mT @ self.embedding.double()


@dataclass(frozen=True, eq=False)
class CopyingScores:
    """Re Σλ / Σ|λ| of each head at a site.

    Attributes:
        values: [H] in [-1, 1], NaN where undefined. 1: what is read is written again; -1: it is taken back.
        kind: `copying`, of W_E W_V W_O W_U (Elhage et al. 2021); `sign`, of W_V W_O alone, for models without logits of tokens.
        reason: why the values are NaN.
    """

    values: Tensor
    kind: str
    reason: str | None = None


@dataclass(frozen=True)
class Pole:
    """One end of a direction: the tokens with the largest products, [(text, product with the singular vector)].

    For OV a head that reads the first writes the second; for QK a query made of the first scores high on a key made of the second.
    """

    reads: tuple[tuple[str, float], ...]
    writes: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Direction:
    """A pair of singular vectors of one head, read in tokens.

    Attributes:
        circuit: `qk` or `ov`.
        value: the singular value.
        share: of Σσ².
        poles: both ends; a singular pair is the same with both signs turned.
    """

    circuit: str
    value: float
    share: float
    poles: tuple[Pole, Pole]


def vocabulary_of(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Vocabulary:
    """Embedding and unembedding of a model that says where they are, as those of transformers do.

    Args:
        model: any module with `get_input_embeddings`, and `get_output_embeddings` if it has logits.
        inputs: for one run, by which the scale of the final norm is found and taken into the unembedding; without it that scale is not.

    Raises:
        InputError: the model does not say where its embedding is: build a `Vocabulary` from its tensors instead.
    """
    entry = _asked(model, "get_input_embeddings")
    if entry is None:
        raise InputError(
            f"{type(model).__name__} does not say where its token embedding is: give Vocabulary(embedding, unembedding) yourself"
        )
    leave = _asked(model, "get_output_embeddings")
    if leave is not None and inputs is not None:
        gain = _final_gain(model, inputs, leave)
        leave = leave if gain is None else leave * gain
    return Vocabulary(entry, leave)


def copying_scores(weights: HeadWeights, vocabulary: Vocabulary | None = None, *, centred: bool = True) -> CopyingScores:
    """Whether each head writes what it reads, by the signs of the eigenvalues of its way from token to logit.

    The eigenvalues other than 0 of the n × n matrix W_E W_V W_O W_U are those of the V × V matrix W_O W_U W_E W_V.

    Args:
        weights: of one site; the scale of the norm in front is taken into them.
        vocabulary: None, or one without unembedding, for the sign score.
        centred: take the mean over the vocabulary out of both ends: the softmax does not see it, and a common component is not copying.
    """
    folded = weights.folded()
    left, right, why = factors(folded, "ov")
    unknown = torch.full((weights.site.query_heads,), float("nan"), dtype=torch.float64)
    kind = "sign" if vocabulary is None or vocabulary.unembedding is None else "copying"
    if left is None or right is None:
        return CopyingScores(unknown, kind, why)
    if weights.reads["v"] != "residual":
        return CopyingScores(unknown, kind, f"the head reads the {weights.reads['v']}, not the stream that it writes into")
    if vocabulary is None or vocabulary.unembedding is None:
        small = right @ left.mT  # [H, V, V]
    else:
        entry, leave = vocabulary.embedding.shape, vocabulary.unembedding.shape
        if (entry[1], leave[1]) != (left.shape[-1], right.shape[-1]) or entry[0] != leave[0]:
            shapes = f"{list(entry)} and {list(leave)}"
            return CopyingScores(unknown, kind, f"embedding and unembedding are {shapes}, and the stream is {left.shape[-1]} wide")
        way = vocabulary.way(centred)
        assert way is not None
        small = right @ way @ left.mT
    values = torch.linalg.eigvals(small)
    size = values.abs().sum(-1)
    # Σλ is the trace, which is real. Without the eigenvalues' own rounding:
    score = torch.where(size > 0, small.diagonal(dim1=-2, dim2=-1).sum(-1) / size, torch.nan)
    return CopyingScores(score.cpu(), kind, None if bool((size > 0).all()) else "a head whose matrix is zero has no score")


def read_directions(
    weights: HeadWeights, head: int, vocabulary: Vocabulary, tokenizer: Decoder | None = None, *, circuit: str = "ov", count: int = 3,
    top: int = 8, only: Sequence[int] | Tensor | None = None, centred: bool = True,
) -> tuple[Direction, ...]:  # fmt: skip
    """The strongest singular directions of one head's matrix, read in tokens at both sides.

    Args:
        weights: of the head's site; the scale of the norm in front is taken into them.
        head: query head.
        vocabulary: tokens are compared with what is read by their embedding, with what is written by their unembedding (or embedding,
            where there are no logits).
        tokenizer: anything with `decode`; without it tokens are shown by their number.
        circuit: `ov`, or `qk`, whose two sides are the query's token and the key's.
        count: directions.
        top: tokens at each end.
        only: token ids to choose among; all by default.
        centred: compare with each token's difference from the mean over the vocabulary.

    Raises:
        InputError: weights or vocabulary that do not reach from token to token, a circuit other than `qk` and `ov`.
        SelectionError: there is no such head, or no such token.
    """
    if circuit not in ("qk", "ov"):
        raise InputError(f"no circuit {circuit!r}: there are qk and ov")
    if not 0 <= head < weights.site.query_heads:
        raise SelectionError(
            f"no head {head}: {weights.site.name} has {weights.site.query_heads} heads, 0 to {weights.site.query_heads - 1}"
        )
    left, right, why = factors(weights.folded(), circuit)
    if left is None or right is None:
        raise InputError(f"{weights.site.name}: no {circuit} directions: {why}")
    leave = vocabulary.embedding if circuit == "qk" or vocabulary.unembedding is None else vocabulary.unembedding
    ends = {"reads": (vocabulary.embedding, left.shape[-1]), "writes": (leave, right.shape[-1])}
    for side, (words, width) in ends.items():
        if words.shape[1] != width:
            read = ", ".join(f"{stage} {source}" for stage, source in weights.reads.items())
            raise InputError(
                f"{weights.site.name}: a head that {side} {width} numbers cannot be read by words of {words.shape[1]} (it reads: {read})"
            )
    ids = torch.arange(vocabulary.embedding.shape[0]) if only is None else torch.as_tensor(only, dtype=torch.int64)
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary.embedding.shape[0]:
        raise SelectionError(f"token ids must be 0 to {vocabulary.embedding.shape[0] - 1}, at least one of them")
    u, values, v = product_singular_vectors(left[head], right[head])
    sides = [(_centred(words, centred)[ids.to(words.device)], vectors) for (words, _), vectors in zip(ends.values(), (u, v), strict=True)]
    energy = values.square() / values.square().sum().clamp_min(1e-300)
    names = _Names(tokenizer)
    found = []
    for rank in range(min(count, len(values))):
        products = [(words @ vectors[:, rank].to(words.dtype)).cpu() for words, vectors in sides]
        poles = [Pole(*(names.strongest(sign * product, ids, top) for product in products)) for sign in (1, -1)]
        found.append(Direction(circuit, float(values[rank]), float(energy[rank]), (poles[0], poles[1])))
    return tuple(found)


# -- reading tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    tokenizer: Decoder | None

    def strongest(self, products: Tensor, ids: Tensor, top: int) -> tuple[tuple[str, float], ...]:
        """The tokens with the largest products, [n] each."""
        best = products.topk(min(top, len(products)))
        pairs = zip(ids[best.indices].tolist(), best.values.tolist(), strict=True)
        return tuple(
            (str(token) if self.tokenizer is None else visible(str(self.tokenizer.decode([token]))), value) for token, value in pairs
        )


def _centred(words: Tensor, centred: bool) -> Tensor:
    return words - words.mean(0) if centred else words


def _asked(model: nn.Module, method: str) -> Tensor | None:
    """The weight of what a model's `get_…_embeddings` gives, [n, E]."""
    ask = getattr(model, method, None)
    if not callable(ask):
        return None
    try:
        weight = getattr(ask(), "weight", None)
    except NotImplementedError:  # transformers' way of saying that a model has none
        return None
    return weight.detach() if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _final_gain(model: nn.Module, inputs: Mapping[str, Any], leave: Tensor) -> Tensor | None:
    """[F], the scale of the norm whose output the logits are made of."""
    with learning(model), torch.enable_grad():
        output = model(**inputs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.grad_fn is None:
            return None
        parameters = {id(p): name for name, p in model.named_parameters()}
        try:
            maps = [m for m in find_maps(logits, parameters) if m.weight.shape[1:] == leave.mT.shape]
        except Unreadable:
            return None
        return input_gain(maps[0], parameters) if maps else None


def restricted(vocabulary: Vocabulary, ids: Sequence[int] | Tensor) -> Vocabulary:
    """The vocabulary of some tokens alone, in their order: for copying scores over the words that matter.

    Raises:
        SelectionError: no ids, or one out of range.
    """
    chosen = torch.as_tensor(ids, dtype=torch.int64)
    size = vocabulary.embedding.shape[0]
    if chosen.numel() == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= size:
        raise SelectionError(f"token ids must be 0 to {size - 1}, at least one of them")
    leave = vocabulary.unembedding
    return replace(vocabulary, embedding=vocabulary.embedding[chosen], unembedding=None if leave is None else leave[chosen])
