"""An attention call's own way from queries and keys to its scores and pattern, to be run again when the call is long over.

Captures hold on to it, so it holds no frame, no module and no map: only the tape, and the operands that the tape is run with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from headscope.kernels.errors import EditError, SelectionError
from headscope.probe.interception.axes import Axes, arrange, restore
from headscope.probe.interception.candidate import Grouping, Groups
from headscope.probe.interception.tape import Node, borrowed, detached, replay


@dataclass(frozen=True, eq=False)
class Operand:
    """Queries or keys in the model's own layout.

    Attributes:
        tensor: as the product took it.
        axes, groups: what its dimensions are made of, and how `arrange` sorts them.
        copies: how often each key head stands in it.
    """

    tensor: Tensor
    axes: Axes
    groups: Groups
    copies: int = 1

    def swap(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor, and canonical `value` [B, H or G, S, D] in its layout."""
        whole = value.repeat_interleave(self.copies, dim=1) if self.copies > 1 else value
        return self.tensor, put_back(whole, self.tensor, self.axes, self.groups)


@dataclass(frozen=True, eq=False)
class Rerun:
    """See the module docstring, and `headscope.probe.call.Replay`.

    Attributes:
        site: name of the site, for messages.
        node: the scores at the normaliser.
        axes, grouping: of them.
        q, k: the operands.
        normalise: the model's own call of it, on scores in the model's own layout.
        tells_pattern: it is a softmax. The weights of another normaliser may be changed before they multiply the values.
        lent: tensors that the tape takes from the model, such as a mask, and how often each had been written into.
    """

    site: str
    node: Node
    axes: Axes
    grouping: Grouping
    q: Operand
    k: Operand
    normalise: Callable[[Tensor], Tensor]
    tells_pattern: bool
    lent: tuple[tuple[Tensor, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.lent is None:
            own = (self.q.tensor, self.k.tensor)  # these are swapped: a cache that goes on filling does no harm
            found = [t for t in borrowed(self.node) if not t.is_inference() and not any(t is x for x in own)]
            object.__setattr__(self, "lent", tuple((t, t._version) for t in found))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Canonical scores [B, H, Q, K] from these queries and keys, sink columns left out."""
        return self._real(self._own_scores(q, k), k.shape[2])

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        """The canonical pattern [B, H, Q, K] of these queries and keys, sink columns left out."""
        return self._real(self.normalise(self._own_scores(q, k)), k.shape[2])

    def detached(self) -> Rerun:
        """The same, holding on to no autograd graph."""
        q, k = (replace(x, tensor=x.tensor.detach()) for x in (self.q, self.k))
        lent = tuple((tensor.detach(), version) for tensor, version in self.lent or ())
        return replace(self, node=detached(self.node), q=q, k=k, lent=lent)

    def _own_scores(self, q: Tensor, k: Tensor) -> Tensor:
        if any(tensor._version != version for tensor, version in self.lent or ()):
            raise SelectionError(
                f"the model has since written into a mask or bias that the scores of {self.site} are made with, so they cannot be made "
                "again: capture with Keep(pattern=True), Keep(rows=[…]) or Keep(statistics=True)"
            )
        return replay(self.node, [self.q.swap(q), self.k.swap(k)])

    def _real(self, tensor: Tensor, keys: int) -> Tensor:
        return real_keys(arrange(tensor, self.axes, self.grouping.map), self.grouping, keys)


def real_keys(full: Tensor, grouping: Grouping, keys: int) -> Tensor:
    """A canonical map without its sink columns."""
    return full if full.shape[-1] == keys else full[..., grouping.lead : grouping.lead + keys]


def put_back(value: Tensor, like: Tensor, axes: Axes, groups: Groups) -> Tensor:
    """A changed canonical operand in the model's own layout, type and place.

    Raises:
        EditError: the operand is shared by the whole batch and the edit treats its samples differently.
    """
    if value.numel() != like.numel() and value.shape[0] > 1:
        if not bool((value == value[:1]).all()):
            raise EditError("this operand is shared by the whole batch: an edit must change every sample alike")
        value = value[:1]
    return restore(value.to(like), like, axes, groups)
