"""`Probe`: look at the attention of a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import ClosedError, SelectionError
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.capture import Capture
from headscope.probe.interception import check_model, intercept
from headscope.probe.keep import Keep
from headscope.probe.models import model_fingerprint


class Probe:
    """Sees every attention call of one model. Cheap; changes nothing in the model; many may exist.

    Args:
        model: any nn.Module.
        tokenizer: kept for those who print tokens; not used to compute anything.
        strict: raise `NotIntercepted` when attention-like operations were seen but not caught, or none at all.

    Attributes:
        unclaimed: attention-like operations that were seen but not caught (filled where strict is off).

    Raises:
        NotIntercepted: `model` is not a torch module.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, strict: bool = True) -> None:
        self.model = check_model(model)
        self.tokenizer = tokenizer
        self.strict = strict
        self.unclaimed: list[str] = []
        self._closed = False

    def sites(self, *args: Any, **inputs: Any) -> list[AttentionSite]:
        """Every place where the model computes attention, in execution order, from one dry run on these inputs.

        The run computes no gradients and leaves the random state as it was; the model's own caches and buffers see an
        ordinary forward.

        Raises:
            NotIntercepted: attention that was not caught; see `strict`.
        """
        self._open()
        found = _Sites()
        devices = [p.device for p in self.model.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices), torch.no_grad(), intercept(self.model, found, self.strict) as session:
            self.model(*args, **inputs)
        self.unclaimed = list(dict.fromkeys(session.unclaimed))
        return [session.sites[name] for name in found.names]

    @contextmanager
    def capture(
        self, keep: Keep = Keep(), *, sites: str | Sequence[str] | None = None, layers: int | Sequence[int] | None = None,  # noqa: B008
        heads: int | Sequence[int] | None = None, steps: int | Sequence[int] | None = None,
    ) -> Iterator[Capture]:  # fmt: skip
        """Keep what is asked of every attention call made in the block; the model's outputs stay bit-identical.

        Args:
            keep: what to keep; by default q and k, from which patterns and statistics are computed on demand.
            sites: names or globs of the sites to keep.
            layers, heads, steps: further limits; a head must exist at every selected site.

        Raises:
            NotIntercepted: the model was not run, or attention was not caught.
            SelectionError: the selection hit no site, or a head that does not exist.
            NonFiniteError: q or k is not finite.
            BudgetError: keeping this would not fit.
        """
        self._open()
        if heads is not None and not isinstance(heads, int) and not len(heads):
            raise SelectionError("heads=[] chooses no head: name some, or leave heads out for all")
        as_list = [x if x is None or not isinstance(x, int) else [x] for x in (layers, heads, steps)]
        seen = Capture(
            keep, sites=sites, layers=as_list[0], heads=as_list[1], steps=as_list[2], fingerprint=lambda: model_fingerprint(self.model)
        )
        with intercept(self.model, seen, self.strict) as session:
            yield seen
        self.unclaimed = list(dict.fromkeys(session.unclaimed))
        seen.finish(session.sites)

    def close(self) -> None:
        """Give up the model; using the probe afterwards raises ClosedError."""
        self._closed = True

    def _open(self) -> None:
        if self._closed:
            raise ClosedError("this probe was closed: make a new Probe(model)")

    def __repr__(self) -> str:
        return f"Probe({type(self.model).__name__})"


class _Sites:
    """A handler that only writes down which sites came by."""

    changes = False

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        return value

    def see(self, call: AttentionCall) -> None:
        self.names.setdefault(call.site.name)
