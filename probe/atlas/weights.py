"""W_Q, W_K, W_V and W_O of every head of any PyTorch model, read off the autograd graph of one run.

Letters: B batch, S tokens, H query heads, G key/value heads, D width of a query or key, V width of a value, E width of what a head reads,
F width of what it writes. A head's maps are rows: q_h = x · q[h]ᵀ + q_bias[h], so that W_Q W_Kᵀ of the literature is q[h]ᵀ k[g].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import EditError, InputError, NotIntercepted
from headscope.probe.atlas.maps import Unreadable
from headscope.probe.atlas.output import read_output
from headscope.probe.atlas.projection import Projection, read_projection
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception.intercept import intercept
from headscope.probe.interception.place import clean_path


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The weights of all heads of one site. What could not be found is None, and `reasons` says why.

    Attributes:
        site: the place.
        q: [H, D, E].
        k: [G, D, E]; query head h reads group h // (H / G).
        v: [G, V, E].
        o: [H, V, F]; what a head writes is z_h · o[h].
        q_bias, k_bias, v_bias: [H, D], [G, D], [G, V]; zeros where there is none.
        q_gain, k_gain, v_gain: [E], the scale of the norm in front of the map, which is not part of the weights; None where none was seen.
        reads: by stage q, k, v: `residual`, `context` (the other stream of a cross attention), `latent` (something narrower made of the
            stream before), or several joined by `+` in the order in which they lie side by side in E.
        through: by stage, what stands between the map and the call: `nothing`, `rotation` or `norm`.
        errors: by stage, how far the weights are from reproducing the run, relative; of lengths under a rotation, NaN under a norm.
        names: by stage, the parameters that the weights were read from.
        reasons: by stage, why there are no weights.
    """

    site: AttentionSite
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    o: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None
    v_gain: Tensor | None = None
    reads: Mapping[str, str] = field(default_factory=dict)
    through: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str | None:
        """Why something is missing, in one line; None where all four maps were found."""
        return "; ".join(f"{stage}: {why}" for stage, why in self.reasons.items()) or None

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.site.query_heads // self.site.kv_heads

    def folded(self) -> HeadWeights:
        """The same, with the scale of the norm in front taken into each map, which then reads the stream up to the norm's size.

        A layer norm also subtracts the mean over the width, which is no scale and stays out.
        """
        return replace(
            self,
            **{
                stage: weight * gain
                for stage in ("q", "k", "v")
                if (weight := getattr(self, stage)) is not None and (gain := getattr(self, f"{stage}_gain")) is not None
            },
        )

    def missing(self, *stages: str) -> str | None:
        """Why one of these maps is not there; None where they all are."""
        return "; ".join(f"{stage}: {self.reasons[stage]}" for stage in stages if stage in self.reasons) or None


def head_weights(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> dict[str, HeadWeights]:
    """The weights of every head, by name of the site, in execution order.

    The model is run once with gradients and nothing of it is changed: parameters that were frozen are frozen again. The weights are
    copies, found by where gradients go and checked on the run's own numbers: v and o (and q and k where nothing stands between) must be
    reproduced within 1e-4 (3e-2 in half precision), under a rotation their lengths; what is not reproduced is not given.

    Args:
        model: any module, in eval mode.
        inputs: keyword inputs, or the one positional tensor; a few tokens are enough, two at least. The first sample is looked at.

    Raises:
        InputError: the model is in training mode, so that dropout is on; an operation of it has no gradient on this device.
        NotIntercepted: no attention was caught.
    """
    if model.training:
        raise InputError("the model is in training mode, where dropout changes what its weights give: call model.eval() first")
    parameters = {id(p): clean_path(name) for name, p in model.named_parameters()}
    without: frozenset[str] = frozenset()
    with learning(model):
        while True:
            seen = _Seen(without)
            try:
                with torch.enable_grad(), intercept(model, seen, strict=False):
                    _run(model, inputs)
                break
            except NotImplementedError as error:
                raise InputError(f"the model cannot be run with gradients here, by which its weights are found: {error}") from error
            except EditError as error:  # a site without one output projection: look at it without that stage
                more = frozenset(name for name in seen.asked if name in str(error)) - without
                if not more:
                    raise
                without |= more
        if not seen.calls:
            raise NotIntercepted(f"no attention was caught in {type(model).__name__}, so there are no heads whose weights to read")
        adapted = _adapted(model, inputs, seen)
        return {name: _weights(seen, name, adapted, model, parameters) for name in seen.calls}


# -- one run ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Seen:
    """An interception handler that keeps q, k, v, z and o of the first call of every site, attached to the graph."""

    without: frozenset[str]  # sites whose o is not asked
    asked: set[str] = field(default_factory=set)
    sites: dict[str, AttentionSite] = field(default_factory=dict)
    calls: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    changes: bool = False

    def stages(self, site: AttentionSite) -> frozenset[str]:
        self.asked.add(site.name)
        return frozenset() if site.name in self.without else frozenset({"o"})

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        if call.step == 0:
            self.sites[call.site.name] = call.site
            self.outputs.setdefault(call.site.name, []).append(value)
        return value

    def see(self, call: AttentionCall) -> None:
        name = call.site.name
        if call.step or name in self.calls:
            return
        self.sites[name] = call.site
        kept = {"q": call.q, "k": call.k, "v": call.v, "z": call.z}
        self.calls[name] = {stage: value for stage, value in kept.items() if value is not None}


@contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """Every parameter takes part in the graph while the block runs."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _run(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> None:
    """One forward; inputs of real numbers belong to the graph too, so that they are not taken for weights."""

    def joined(value: Any) -> Any:
        return value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(inputs, Tensor):
        model(joined(inputs))
    else:
        model(**{name: joined(value) for name, value in inputs.items()})


def _adapted(model: nn.Module, inputs: Mapping[str, Any] | Tensor, seen: _Seen) -> dict[str, Tensor]:
    """Outputs of the modules around output projections where heads go into several maps (a low-rank adapter), by site."""
    modules = {clean_path(name): module for name, module in model.named_modules()}
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, outputs in seen.outputs.items():
            path = seen.sites[name].output_projection
            if len(outputs) < 2 or path is None or (around := modules.get(path.rpartition(".")[0])) is None:
                continue

            def keep(module: nn.Module, args: tuple[Any, ...], output: object, name: str = name) -> None:
                if isinstance(output, Tensor):
                    found.setdefault(name, output)

            stack.callback(around.register_forward_hook(keep).remove)
        if any(len(outputs) > 1 for outputs in seen.outputs.values()):
            with torch.enable_grad():
                _run(model, inputs)
    return found


# -- one site -----------------------------------------------------------------------------------------------------------


def _weights(seen: _Seen, name: str, adapted: Mapping[str, Tensor], model: nn.Module, parameters: Mapping[int, str]) -> HeadWeights:
    site, call = seen.sites[name], seen.calls[name]
    reasons: dict[str, str] = {}
    found: dict[str, Projection] = {}
    for stage in ("q", "k", "v"):
        try:
            if stage not in call:
                raise Unreadable("it was not seen")
            found[stage] = read_projection(call[stage], parameters, strict=stage == "v")
        except Unreadable as error:
            reasons[stage] = str(error)
    o = None
    errors = {stage: p.error for stage, p in found.items()}
    names = {stage: p.names for stage, p in found.items()}
    try:
        if name in seen.without:
            raise Unreadable("its queries go through several output projections")
        o, errors["o"], names["o"] = read_output(site, call.get("z"), seen.outputs.get(name, ()), adapted.get(name), parameters, model)
    except Unreadable as error:
        reasons["o"] = str(error)
    width = o.shape[-1] if o is not None else max((max(p.widths) for p in found.values()), default=0)
    return HeadWeights(
        site,
        **{stage: p.weight for stage, p in found.items()},
        o=o,
        **{f"{stage}_bias": p.bias for stage, p in found.items()},
        **{f"{stage}_gain": p.gain for stage, p in found.items()},
        reads={stage: "+".join(_source(site, stage, n, width) for n in p.widths) for stage, p in found.items()},
        through={stage: p.through for stage, p in found.items()},
        errors=errors,
        names=names,
        reasons=reasons,
    )


def _source(site: AttentionSite, stage: str, width: int, residual: int) -> str:
    if site.kind == "cross" and stage != "q":
        return "context"
    return "residual" if width == residual else "latent"
