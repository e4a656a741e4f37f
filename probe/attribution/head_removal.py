"""Attention heads as units that can be removed: each set of heads is taken out of its own row of one batch.

Letters: n candidate sets, B batch, H query heads, Q queries, V width of a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import AttributionError, InputError
from headscope.probe.attribution.units import Units
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception.intercept import intercept


@dataclass(eq=False)
class Seen:
    """A handler that only notes which sites there are."""

    sites: dict[str, AttentionSite] = field(default_factory=dict)
    changes: bool = False

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        return value

    def see(self, call: AttentionCall) -> None:
        self.sites.setdefault(call.site.name, call.site)


@dataclass(eq=False)
class Zeroing(Seen):
    """A handler that sets z of heads to zero, other heads in every row of the batch; `stay` [n, heads of all sites]."""

    stay: Tensor = field(default_factory=lambda: torch.ones(1, 0, dtype=torch.bool))
    offsets: dict[str, int] = field(default_factory=dict)
    changes: bool = True

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"z"})

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        """z [B, H, Q, V] with the heads that do not stay at zero; B is n, or n times the windows folded into the batch."""
        name, sets = call.site.name, len(self.stay)
        if name not in self.offsets:
            self.offsets[name] = sum(site.query_heads for site in self.sites.values())
            self.sites[name] = call.site
        if value.shape[0] % sets:
            raise AttributionError(f"{name} has {value.shape[0]} rows for {sets} sets of heads: give batch=1")
        stay = self.stay[:, self.offsets[name] : self.offsets[name] + value.shape[1]].to(value.device)
        stay = stay.repeat_interleave(value.shape[0] // sets, dim=0)[..., None, None]  # [B, H, 1, 1]
        return torch.where(stay, value, torch.zeros((), dtype=value.dtype, device=value.device))


def head_units(model: nn.Module, inputs: Mapping[str, Any]) -> Units:
    """Every head of every site, sites in execution order; found by one forward.

    Raises:
        InputError: no attention ran.
        NotIntercepted: attention that cannot be followed.
    """
    seen = Seen()
    with torch.no_grad(), intercept(model, seen, strict=False):
        model(**inputs)
    names = tuple(f"{site.name} head {head}" for site in seen.sites.values() for head in range(site.query_heads))
    if not names:
        raise InputError(f"no attention ran in {type(model).__name__}: there is no head to remove")
    return Units("heads", tuple((place,) for place in range(len(names))), names, (len(names),))


@contextmanager
def zeroed_heads(model: nn.Module, stay: Tensor) -> Iterator[None]:
    """Remove heads while the block runs; row b of the batch goes without the heads that row b of `stay` [n, heads] lacks."""
    with intercept(model, Zeroing(stay=stay)):
        yield
