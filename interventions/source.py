"""Where patch() and freeze() take their tensors from: a tensor, a capture of another run, or a run stored in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headscope.kernels.errors import EditError, SelectionError
from headscope.probe.call import AttentionSite

CAPTURED_STAGES = ("q", "k", "v", "scores", "pattern", "z")


class Kept(Protocol):
    """What `headscope.probe.Capture` offers that a patch reads: the tensors of each site and step, whole."""

    @property
    def sites(self) -> Iterable[AttentionSite]: ...
    def steps(self, site: str) -> Iterable[int]: ...
    def q(self, *, site: str, step: int) -> Tensor: ...
    def k(self, *, site: str, step: int) -> Tensor: ...
    def v(self, *, site: str, step: int) -> Tensor: ...
    def scores(self, *, site: str, step: int) -> Tensor: ...
    def pattern(self, *, site: str, step: int) -> Tensor: ...
    def z(self, *, site: str, step: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class StoredRun:
    """One stage of another run, by site name and step, as a recipe's tensor file holds it."""

    stage: str
    tensors: Mapping[tuple[str, int], Tensor]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StoredRun):
            return NotImplemented
        return (
            self.stage == other.stage
            and self.tensors.keys() == other.tensors.keys()
            and all(same_tensor(tensor, other.tensors[place]) for place, tensor in self.tensors.items())
        )

    def __hash__(self) -> int:
        return hash((self.stage, frozenset(self.tensors)))


Source = Tensor | Kept | StoredRun


def read_source(source: Source, stage: str, site: str, step: int) -> Tensor:
    """The tensor that the other run had at this stage, site and step.

    Raises:
        SelectionError: that run did not reach the site or step.
        EditError: a capture does not keep this stage.
    """
    if isinstance(source, Tensor):
        return source
    if isinstance(source, StoredRun):
        if (site, step) not in source.tensors:
            raise SelectionError(f"the stored run has no {stage} of {site} at step {step}; it has {spoken_places(source.tensors)}")
        return source.tensors[site, step]
    readers = {"q": source.q, "k": source.k, "v": source.v, "scores": source.scores, "pattern": source.pattern, "z": source.z}
    if stage not in readers:
        raise EditError(f"a capture keeps no {stage}: patch from it at {', '.join(CAPTURED_STAGES)}, or give a tensor")
    return readers[stage](site=site, step=step)


def store_run(source: Kept, stage: str, wanted: Callable[[AttentionSite], bool]) -> StoredRun:
    """A capture's tensors of one stage at the sites wanted, at every step, detached and on the CPU."""
    tensors = {
        (site.name, step): read_source(source, stage, site.name, step).detach().cpu().contiguous()
        for site in source.sites
        if wanted(site)
        for step in source.steps(site.name)
    }
    return StoredRun(stage, tensors)


def spoken_places(tensors: Mapping[tuple[str, int], Tensor]) -> str:
    """A few of the places as text, for a message."""
    places = [f"{site} step {step}" for site, step in sorted(tensors)]
    return ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Equal dtype, shape and entries; NaN equals NaN."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(torch.nan_to_num(one.cpu()), torch.nan_to_num(other.cpu()))
