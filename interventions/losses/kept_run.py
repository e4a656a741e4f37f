"""One forward of a model with its patterns and hidden states still on the autograd graph, for losses on attention.

Letters: B batch, S tokens, H query heads, Q queries, K keys, D width of a query or key, E width of the residual stream.

Only q and k are held while the model runs; patterns are made of them afterwards, at the chosen layers alone. Nothing is therefore
added to a region under gradient checkpointing, whose second forward has to save what the first one saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, NotIntercepted
from headscope.probe.attribution.target import logits_of
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.capture import Capture
from headscope.probe.interception import intercept, outside
from headscope.probe.interception.outside import block_of
from headscope.probe.interception.place import recomputing
from headscope.probe.keep import Keep
from headscope.probe.probe import Probe

Place = tuple[str, int]  # a site or block, and which of its calls
HALF = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Run:
    """What one forward left; made by `keep_run`. Its tensors belong to the graph if the forward ran with gradients.

    Attributes:
        seen: the capture: `seen.q(layer=3)`, `seen.k(…)`, and `v`, `z` where they were asked for.
        hidden: what left each block that holds a chosen site, [B, S, E].
        output: what the model returned.
        tokens: [B, S], bool, True = counts; the `attention_mask` that the model was called with, None where there was none.
    """

    seen: Capture
    hidden: dict[Place, Tensor] = field(default_factory=dict)
    output: Any = None
    tokens: Tensor | None = None
    _patterns: dict[Place, Tensor] | None = field(default=None, repr=False)

    @property
    def patterns(self) -> dict[Place, Tensor]:
        """[B, H, Q, K] by (site, step), in single precision where the model runs in half. Made at the first reading, then held."""
        if self._patterns is None:
            found = {}
            for place, record in self.seen.records.items():
                for name in ("q", "k"):
                    if name in record.tensors and record.tensors[name].dtype in HALF:
                        record.tensors[name] = record.tensors[name].float()
                device = next(iter(record.tensors.values())).device.type
                with torch.autocast(device, enabled=False):
                    found[place] = record.pattern(None, None)
            self._patterns = found
        return self._patterns

    @property
    def logits(self) -> Tensor:
        """[B, S, V] or [B, C].

        Raises:
            AttributionError: the model returned none.
        """
        return logits_of(self.output)

    def __repr__(self) -> str:
        return f"Run({len(self.seen.records)} attention calls, {len(self.hidden)} blocks)"


@contextmanager
def keep_run(
    model: nn.Module, *, layers: int | Sequence[int] | None = None, sites: str | Sequence[str] | None = None, hidden: bool = True,
    v: bool = False, z: bool = False, tokens: Tensor | None = None,
) -> Iterator[Run]:  # fmt: skip
    """Keep one forward of `model` for `AttentionLoss` or a loss of your own. The output stays bit-identical.

    Under `torch.no_grad()` it keeps a reference without a graph. Non-reentrant gradient checkpointing works; what is kept of a
    checkpointed block then stays in memory, at the chosen layers.

    Args:
        model: any module.
        layers, sites: where; everywhere if left out.
        hidden: keep what leaves the blocks of these sites too.
        v, z: keep values, or per-head outputs, in `run.seen`.
        tokens: [B, S], which tokens count; None takes the 2-D `attention_mask` that the model is called with.

    Raises:
        InputError: the model was run more than once in the block.
        NotIntercepted: no attention was caught, or it ran without gradients although they are on, as inside a reentrant checkpoint.
        SelectionError: no site was chosen.
    """
    chosen = None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
    states = _States(chosen, hidden, torch.is_grad_enabled())
    undo: list[Callable[[], None]] = []
    keep = Keep(qk=True, v=v, z=z, gradient=True)
    with Probe(model).capture(keep, layers=chosen, sites=sites) as seen, intercept(model, states) as session:
        run = Run(seen, tokens=None if tokens is None else tokens.bool())
        try:
            outside.install(session, states, undo)
            undo.append(model.register_forward_hook(_output_into(run), with_kwargs=True).remove)
            yield run
        finally:
            for step in undo:
                step()
    blocks = {block_of(site.module) for site in seen.sites}
    run.hidden = {place: state for place, state in states.hidden.items() if place[0] in blocks}
    blind = [site.name for site in seen.sites if site.name in states.blind]
    if blind:
        raise NotIntercepted(
            f"{blind[0]} ran without gradients although they are on: a reentrant gradient checkpoint, whose graph is made only in the "
            "backward, or the model's own no_grad. Use non-reentrant checkpointing (gradient_checkpointing_kwargs="
            "{'use_reentrant': False}), or choose other layers"
        )


def _output_into(run: Run) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> None:
        if run.output is not None:
            raise InputError("the model ran twice inside one keep_run block: open a block for every forward")
        run.output = output
        mask = inputs.get("attention_mask")
        if run.tokens is None and isinstance(mask, Tensor) and mask.ndim == 2:
            run.tokens = mask.bool()

    return hook


@dataclass(eq=False)
class _States:
    """An interception handler that holds what leaves the blocks, and notes the sites that ran without gradients."""

    layers: tuple[int, ...] | None
    wanted: bool
    gradient: bool
    hidden: dict[Place, Tensor] = field(default_factory=dict)
    blind: set[str] = field(default_factory=set)
    changes: bool = False

    @property
    def outside(self) -> frozenset[str]:
        return frozenset({"resid"}) if self.wanted else frozenset()

    def stages(self, site: AttentionSite) -> frozenset[str]:
        of_block = site.kind == "module" and (self.layers is None or site.layer in self.layers)
        return self.outside if of_block else frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        if not recomputing():
            self.hidden[call.site.name, call.step] = value[:, 0]  # [B, 1, S, E] -> [B, S, E]
        return value

    def see(self, call: AttentionCall) -> None:
        if self.gradient and not call.recomputed and not torch.is_grad_enabled():
            self.blind.add(call.site.name)
