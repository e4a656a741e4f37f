"""How much of a loss's gradient reaches queries and keys, compared with values.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, N tokens, D width of a query or key, V width of a value.

Where all tokens have become alike, a pattern makes no difference to what it averages: the gradient at q and k vanishes while that at v
does not, and a head can no longer learn where to look. Source: Noci et al. 2022, theorem 3.2. The gradients here are those at q, k and
v themselves, [B, H, Q, D] and [B, G, K, D] as attention sees them, so they exist whatever projections a model has, frozen ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, NonFiniteError, NotIntercepted
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.health.inputs import Inputs, Tokens, batches_of, refuse_training
from headscope.probe.health.measures import GradientMeasures
from headscope.probe.interception.intercept import intercept

Loss = Callable[[Any], Tensor]
Place = tuple[str, int, str]  # a site, which of its calls, a stage
_STAGES = ("q", "k", "v")


def measure_gradients(
    model: nn.Module, inputs: Inputs, loss: Loss, tokens: Tensor | Sequence[Tensor] | None = None
) -> tuple[GradientMeasures, ...]:
    """The norm of ∂loss/∂q, ∂loss/∂k and ∂loss/∂v of every head, and their ratio. One forward and one backward a batch.

    Norms run over all calls, samples and positions, of several batches as of one whose loss is their sum. Parameters may be frozen;
    none gets a gradient, and the state of the random numbers is as it was. Heads that share a key and value share their norms.

    Args:
        model: in eval mode.
        inputs: keyword inputs, the first positional input as a tensor, or a list of either.
        loss: function of the model's output, one number: `lambda output: output.loss`.
        tokens: bool [B, N], True = counts, one for each batch; gradients at other positions are left out. Windows and other foldings,
            which have no such positions, count whole. None takes `attention_mask` of the inputs.

    Returns:
        One for each site, in execution order. The ratio is (query + key) / (2 value).

    Raises:
        InputError: training mode; a loss that is no single number or does not depend on any attention.
        NonFiniteError: a loss of NaN or infinity.
        NotIntercepted: no attention was caught.
    """
    refuse_training(model, "gradients are")
    totals: dict[str, Tensor] = {}  # [3, H] sums of squares by site
    blind: set[str] = set()
    sites: dict[str, AttentionSite] = {}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    for batch in batches_of(model, inputs, tokens=tokens):
        handler = _Asked(batch.tokens)
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            with intercept(model, handler) as session:
                output = batch.run(model)
            value = _one_number(loss(output), handler)
            places = list(handler.tensors)
            asked = [handler.tensors[place] for place in places]
            found = torch.autograd.grad(value, asked, allow_unused=True) if asked else ()
        sites |= {name: session.sites.get(name, site) for name, site in handler.sites.items()}
        blind |= handler.blind
        for place, gradient in zip(places, found, strict=True):
            site, _, stage = place
            total = totals.setdefault(site, torch.zeros(len(_STAGES), sites[site].query_heads, dtype=torch.float64))
            if gradient is not None:
                total[_STAGES.index(stage)] += _squares(gradient, handler.counted[place], sites[site].query_heads)
    return tuple(_measures(site, totals.get(name), name in blind) for name, site in sites.items())


@dataclass(eq=False)
class _Asked:
    """An interception handler that keeps q, k and v of every call where the loss's gradient passes them, and which positions count."""

    tokens: Tokens
    tensors: dict[Place, Tensor] = field(default_factory=dict)
    counted: dict[Place, Tensor | None] = field(default_factory=dict)
    sites: dict[str, AttentionSite] = field(default_factory=dict)
    blind: set[str] = field(default_factory=set)
    changes: bool = False

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset() if site.mechanism == "edge-softmax" else frozenset(_STAGES)  # over edges there are no q, k and v

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        self.sites[call.site.name] = call.site
        if call.recomputed:
            return value
        if not torch.is_grad_enabled():  # the model turned gradients off, or a checkpoint will come back
            self.blind.add(call.site.name)
            return value
        source = value if value.requires_grad else value.detach().requires_grad_()
        alias = source.view_as(source) if source is value else source.clone()
        place = (call.site.name, call.step, stage)
        self.tensors[place] = alias if source is value else source
        self.counted[place] = self.tokens.rows(call) if stage == "q" else self._keys(call)
        return alias

    def _keys(self, call: AttentionCall) -> Tensor | None:
        """[B, K], bool: the keys of a call that count; None where all do, or where its keys are not the tokens."""
        if call.site.kind != "cross" and call.keys == call.queries:
            return self.tokens.rows(call)
        given = self.tokens.counts
        return given if given is not None and given.shape == (call.k.shape[0], call.keys) else None

    def see(self, call: AttentionCall) -> None:
        self.sites.setdefault(call.site.name, call.site)


def _one_number(value: object, handler: _Asked) -> Tensor:
    if not handler.sites:
        raise NotIntercepted("no attention was caught in this model, so there are no gradients of queries, keys and values")
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        came = f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the loss gave {came}: return one number, such as output.loss or output.logits.logsumexp(-1).mean()")
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"the loss is {float(value.detach())}: its gradients say nothing about the heads")
    if not value.requires_grad:
        raise InputError("the loss depends on no attention: the model ran without gradients, or the loss detached its output")
    return value.reshape(())


def _squares(gradient: Tensor, counted: Tensor | None, heads: int) -> Tensor:
    """[H], float64, sums of squares of a gradient [B, H or G, N, D]; those of a shared key or value for each head that shares it."""
    rows = gradient.detach().double().square().sum(-1)  # [B, H or G, N]
    if counted is not None:
        rows = rows.masked_fill(~counted.to(rows.device)[:, None], 0.0)
    found = rows.sum((0, 2)).cpu()
    return found.repeat_interleave(heads // found.shape[0])


def _measures(site: AttentionSite, total: Tensor | None, blind: bool) -> GradientMeasures:
    undefined: dict[str, str] = {}
    if total is None:
        norms = torch.full((len(_STAGES), site.query_heads), torch.nan, dtype=torch.float64)
        why = "graph attention over a list of edges has no queries, keys and values of its own"
        why = why if site.mechanism == "edge-softmax" else "the model ran this site without gradients"
        undefined = dict.fromkeys(("query", "key", "value", "ratio"), why)
    else:
        norms = total.sqrt()
        if blind:
            norms[:] = torch.nan
            undefined = dict.fromkeys(("query", "key", "value", "ratio"), "the model ran some calls of this site without gradients")
    query, key, value = norms
    ratio = torch.where(value == 0, torch.nan, (query + key) / (2 * value))
    if not undefined and bool((value == 0).any()):
        undefined["ratio"] = "no gradient at the values of a head"
    if bool(norms.isnan().any()) and not undefined:
        undefined = dict.fromkeys(("query", "key", "value", "ratio"), "the gradient is NaN")
    return GradientMeasures(site, query, key, value, ratio, undefined)
